"""Four simulated devices on a CPU, strict promotion for our own numerics, the shared folder."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Before JAX is imported, which reads it. What one test, worker or process of the suite compiled,
# the others read: pytest-xdist's workers and the commands that tests run get the environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.mkdtemp(prefix="qlora_jax_compiled_")
  atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# LLVM's optimization is a third of the time of a suite that compiles much and computes little. On a
# CPU it is left out, in the commands that tests start as well, but where a test is marked
# `optimized`. JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the whole suite with it.
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  # Another two fifths of compiling is MLIR's passes over each fusion. JAX 0.10 has the older
  # emitters as well, which do without; JAX 0.11 has the new ones alone, and runs the quick part.
  if importlib.metadata.version("jax").startswith("0.10.") and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

import jax
import pytest

# Tracing makes many objects and few cycles.
gc.set_threshold(20_000, 20, 20)

# At import, before any test module can start a backend.
jax.config.update("jax_num_cpu_devices", 4)
if "JAX_PLATFORMS" not in os.environ:
  jax.config.update("jax_platforms", "cpu")

_UNOPTIMIZED = jax.config.read("jax_disable_most_optimizations")

ROOT = Path(__file__).resolve().parents[1]

# Optax needs the standard modes of promotion.
_STANDARD = (
  "tests/test_train.py",
  "tests/test_trial_groups.py",
  "tests/test_optimizers.py",
  "tests/test_checkpoints.py",
  "tests/test_readme.py",
  "tests/experiments/",
)


@pytest.hookimpl(tryfirst=True)  # before fixtures, which compile too
def pytest_runtest_setup(item):
  older = "use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
  if older and item.get_closest_marker("newer_emitters"):
    pytest.skip("XLA's older emitters, which the suite takes on JAX 0.10, sum it otherwise")
  disable = _UNOPTIMIZED and item.get_closest_marker("optimized") is None
  if jax.config.read("jax_disable_most_optimizations") != disable:
    jax.config.update("jax_disable_most_optimizations", disable)
    # The level is not part of what a compiled function is found by.
    jax.clear_caches()


@pytest.fixture(autouse=True)
def strict_promotion(request):
  if request.path.relative_to(ROOT).as_posix().startswith(_STANDARD):
    yield
    return
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture(scope="session")
def shared() -> Path:
  """The folder of golden vectors, reference tables and data that stands beside the project."""
  folder = ROOT.parent / "shared"
  if not folder.is_dir():
    pytest.skip(f"{folder} is absent: a clone of the project alone has no golden vectors")
  return folder

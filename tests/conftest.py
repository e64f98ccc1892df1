"""Four simulated devices on a CPU, strict promotion for our own numerics, the shared folder."""

import atexit
import gc
import importlib.metadata
import os
import platform
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

# The suite compiles much and computes little: on a CPU it leaves out what it can of XLA, in the
# commands that tests start as well. `XLA_FLAGS= pytest` takes XLA as it comes (.ci/run does, for a
# few files), and so does a processor that this was not tried on.
if (
  os.environ.get("JAX_PLATFORMS", "cpu") == "cpu"
  and "XLA_FLAGS" not in os.environ
  and platform.machine() == "x86_64"
):
  # LLVM's optimization: a third. Not where a test is marked `optimized`.
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  os.environ["XLA_FLAGS"] = " ".join(
    [
      # MLIR's passes over each fusion: two thirds. The older emitters do without; JAX 0.10 and 0.11
      # name them differently.
      "--xla_cpu_use_fusion_emitters=false"
      if importlib.metadata.version("jax").startswith("0.10.")
      else "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
      # A part for each thread, where programs are small: a quarter.
      "--xla_cpu_parallel_codegen_split_count=1",
      # Without instructions that round a product and a sum at once, two programs of one formula
      # are alike to the bit, however little of them is optimized.
      "--xla_cpu_max_isa=AVX",
    ]
  )

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

"""Where a figure comes from: device, versions and the commit, for `summary.json`.

The host's name and the user's are left out: a summary is made to be shown.
"""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# Bytes of compiled programs that are kept where this does not say.
MOST_COMPILED = 4 * 2**30
_MAX_SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"

# As they are installed; importlib.metadata knows a version without importing the package.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "qlora_jax")


def describe() -> dict[str, Any]:
  """Describes the machine and the software; starts JAX's backend if it is not running.

  Returns:
    `device`: `{"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1}`, of all processes;
    `host`: operating system, architecture and CPU cores this process may use;
    `versions`: of Python and the packages, None for one that is not installed;
    `git`: `git_state` of this package's own repository, None outside of one.
  """
  devices = jax.devices()
  return {
    "device": {
      "platform": devices[0].platform,
      "kind": devices[0].device_kind,
      "count": len(devices),
      "processes": jax.process_count(),
    },
    "host": {
      "system": platform.system(),
      "machine": platform.machine(),
      "cpu_cores": _cpu_cores(),
    },
    "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
    "git": git_state(Path(__file__)),
  }


def keep_compiled_programs(directory: str | None, default: Path) -> None:
  """Has XLA's compiled programs kept on disk, for the processes that come after this one.

  Of what lies there, the least recently used goes where it is more than `MOST_COMPILED` bytes, or
  than `$JAX_COMPILATION_CACHE_MAX_SIZE` says. A directory that JAX was told of otherwise, one of a
  remote file system, or one that can only be read, is left as it is.

  Args:
    directory: "auto" takes `$JAX_COMPILATION_CACHE_DIR`, or what was set before in this process,
      else `default`; None keeps none.
    default: a directory; made when there is something to keep.

  Raises:
    OSError: `directory` cannot be made.
  """
  before = compiled_programs()
  if directory == "auto":
    chosen = before or str(default)
  elif directory is None or "://" in directory:
    chosen = directory
  else:
    chosen = str(Path(directory).expanduser())
    # JAX would warn of each program that it cannot keep there.
    Path(chosen).mkdir(parents=True, exist_ok=True)
  if chosen != before:
    most = -1
    if chosen is not None and "://" not in chosen and _takes_files(Path(chosen)):
      most = MOST_COMPILED
      _date(Path(chosen))
    if _MAX_SIZE not in os.environ:
      jax.config.update(_MAX_SIZE.lower(), most)
    jax.config.update("jax_compilation_cache_dir", chosen)
    # JAX looks once, when it compiles for the first time.
    compilation_cache.reset_cache()


def _takes_files(directory: Path) -> bool:
  """Whether files can be written there, or it is still to be made."""
  return not directory.exists() or os.access(directory, os.W_OK | os.X_OK)


def _date(directory: Path) -> None:
  """Says when the programs were used that were written without a bound: JAX 0.10 stumbles there."""
  for program in directory.glob("*-cache"):
    used = program.with_name(f"{program.name.removesuffix('cache')}atime")
    # Another process may do the same, or drop it.
    with contextlib.suppress(FileNotFoundError):
      if not used.exists():
        used.write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))


def compiled_programs() -> str | None:
  """The directory where they are kept; None for none."""
  return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]


def git_state(file: Path) -> dict[str, Any] | None:
  """The commit that `file` stands at.

  Args:
    file: a source file.

  Returns:
    `{"commit": 40 hex digits, "dirty": bool}`. Dirty, as `git describe --dirty` means it: a tracked
    file of the repository differs from the commit. None where there is no git, no commit, or the
    repository around the file does not track it (a package installed below somebody's project).
  """

  def git(*arguments: str) -> str | None:
    try:
      result = subprocess.run(
        ["git", "-C", str(file.parent), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
        # No lock is taken: the user may be committing in this very moment.
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
      )
    except (OSError, subprocess.TimeoutExpired):
      return None
    return result.stdout.strip() if result.returncode == 0 else None

  if git("ls-files", "--error-unmatch", file.name) is None:
    return None
  commit = git("rev-parse", "--verify", "HEAD")
  changes = git("status", "--porcelain", "--untracked-files=no")
  if commit is None or changes is None:
    return None
  return {"commit": commit, "dirty": changes != ""}


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _cpu_cores() -> int | None:
  # Containers and `taskset` give a process fewer than the machine has.
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()

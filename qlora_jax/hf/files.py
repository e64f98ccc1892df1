"""Directories that are written whole or not at all, and the errors of those that are read."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
  """A temporary directory beside `path`, which takes its name when the block ends well.

  Raises:
    FileExistsError: there is something at `path`; it is left as it is.
  """
  path = Path(path).absolute()
  if os.path.lexists(path):
    raise FileExistsError(f"{path}: exists already; give another path, or move it away")
  path.parent.mkdir(parents=True, exist_ok=True)
  # Not the process id, which in containers is often the same: what a killed run left behind would
  # stop the next.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  temporary.mkdir()
  try:
    yield temporary
    os.rename(temporary, path)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    ValueError: it is not one; the message names the file.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from None
  if not isinstance(value, dict):
    raise ValueError(f"{path}: a JSON {type(value).__name__}; an object is wanted")
  return value


def write_json(path: Path, value: dict[str, Any]) -> None:
  """Writes `value`, indented."""
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

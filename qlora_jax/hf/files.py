"""Directories that are written whole or not at all, and the errors of those that are read."""

import contextlib
import errno
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
    try:
      os.rename(temporary, path)
    except OSError as error:
      if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        raise FileExistsError(f"{path}: was made by another process meanwhile") from None
      raise
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


# Of a model's directory: what goes with the weights, wherever they go.
_TOKENIZER = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
  "generation_config.json",
)


def copy_tokenizer(source: Path, directory: Path) -> None:
  """Copies the tokenizer, chat templates and generation config of a model, those that it has."""
  for name in _TOKENIZER:
    if (source / name).is_file():
      shutil.copyfile(source / name, directory / name)
  if (source / "additional_chat_templates").is_dir():
    shutil.copytree(source / "additional_chat_templates", directory / "additional_chat_templates")

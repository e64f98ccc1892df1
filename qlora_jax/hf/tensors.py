"""The tensors of a checkpoint by name, whichever safetensors file they lie in, row by row."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from qlora_jax.hf.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Buffers that old checkpoints carry, which follow from config.json.
_IGNORED_ENDINGS = (".rotary_emb.inv_freq",)

# safetensors' names of the float dtypes that a weight may have.
FLOATS = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


class Tensors:
  """The tensors of a checkpoint's directory.

  Names are the family's, with the prefix `model.`, which some files leave off.

  Args:
    directory: holds `model.safetensors`, or an index and the files it names.

  Raises:
    FileNotFoundError: neither is there, or a file of the index is not.
    ValueError: an index or a file that is not whole; the message names it.
  """

  def __init__(self, directory: Path):
    self.directory = directory
    self._open: dict[Path, Any] = {}
    self._offsets: dict[Path, dict[str, int]] = {}
    index = directory / INDEX
    if (directory / SINGLE).exists():
      single = directory / SINGLE
      self._files = dict.fromkeys(self._handle(single).keys(), single)
    elif index.exists():
      weight_map = read_json(index).get("weight_map")
      if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map; it says which file holds which tensor")
      for name, file in weight_map.items():
        # Of this directory: nothing else is opened on a file's word.
        if not isinstance(file, str) or Path(file).name != file:
          raise ValueError(f"{index}: {name}: {file!r}; the name of a file beside it is wanted")
      self._files = {name: directory / file for name, file in weight_map.items()}
      # A shard that is missing or cut short is found now, not after half an hour of the others.
      for file in sorted(set(self._files.values())):
        self._handle(file)
    else:
      pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
      reason = (
        f"only {pickled[0].name}, which is pickled and could run code; convert it to safetensors: "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('NEW_DIRECTORY')\""
        if pickled
        else f"{SINGLE} and {INDEX} were looked for"
      )
      raise FileNotFoundError(f"{directory}: no weights: {reason}")
    self._prefix = "" if any(name.startswith("model.") for name in self._files) else "model."

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._open.clear()

  def __contains__(self, name: str) -> bool:
    return self._stored(name) in self._files

  def _stored(self, name: str) -> str:
    return name.removeprefix(self._prefix)

  def _handle(self, file: Path) -> Any:
    if file not in self._open:
      if not file.exists():
        raise FileNotFoundError(f"{file}: missing; {INDEX} names it")
      try:
        self._open[file] = safetensors.safe_open(file, framework="numpy")
      except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    return self._open[file]

  def _slice(self, name: str) -> Any:
    stored = self._stored(name)
    try:
      return self._handle(self._files[stored]).get_slice(stored)
    except safetensors.SafetensorError as error:
      raise ValueError(f"{self.where(name)}: cannot be read ({error})") from None

  def where(self, name: str) -> str:
    """File and tensor, for a message."""
    stored = self._stored(name)
    return f"{self._files.get(stored, self.directory)}: {stored}"

  def shape(self, name: str) -> tuple[int, ...]:
    """Of the tensor `name`, from the header."""
    return tuple(self._slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Of the tensor `name`, from the header, as safetensors spells it."""
    return self._slice(name).get_dtype()

  def nbytes(self, name: str) -> int:
    """Of the tensor `name`, from the header."""
    bits = int(self.dtype(name).lstrip("BFIUOL") or 8)
    return math.prod(self.shape(name)) * bits // 8

  def float_dtype(self, name: str) -> np.dtype:
    """Of the weight `name`, from the header.

    Raises:
      ValueError: it is not a float dtype that is supported.
    """
    dtype = self.dtype(name)
    if dtype not in FLOATS:
      raise ValueError(f"{self.where(name)}: dtype {dtype}; a weight is {', '.join(FLOATS)}")
    return jnp.dtype(FLOATS[dtype])

  def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` … `stop` of the weight `name`, read from the file.

    Threads may call it at once. By reads of the file rather than of a mapping of it, which
    `experiments.bench.load` showed to be slower than the disk.
    """
    shape, dtype = self.shape(name), self.float_dtype(name)
    start, stop, _ = slice(start, stop).indices(shape[0])
    rows = np.empty((stop - start, *shape[1:]), dtype)
    file = self._files[self._stored(name)]
    offset = self._offset(file, self._stored(name)) + start * math.prod(shape[1:]) * dtype.itemsize
    view: Any = memoryview(rows.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
    with open(file, "rb", buffering=0) as handle:
      handle.seek(offset)
      while view:
        count = handle.readinto(view)
        if not count:
          raise ValueError(f"{self.where(name)}: cannot be read (the file ends before it)")
        view = view[count:]
    return rows

  def _offset(self, file: Path, stored: str) -> int:
    """Where a tensor begins in its file. safetensors has checked the header when it opened it."""
    if file not in self._offsets:
      with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
      self._offsets[file] = {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
      }
    return self._offsets[file][stored]

  def get(self, name: str) -> np.ndarray:
    """The whole tensor `name`, of any dtype that numpy has."""
    stored = self._stored(name)
    try:
      return self._handle(self._files[stored]).get_tensor(stored)
    except safetensors.SafetensorError as error:
      raise ValueError(f"{self.where(name)}: cannot be read ({error})") from None

  def check(
    self, wanted: Mapping[str, tuple[int, ...] | None], ignored: Iterable[str] = ()
  ) -> None:
    """Compares names and shapes with those the config asks for, before anything is read.

    Args:
      wanted: name → shape; None for any.
      ignored: names that may be there too.

    Raises:
      ValueError: a tensor that is missing, unexpected or of another shape.
    """
    for name in sorted(wanted):
      if name not in self:
        raise ValueError(f"{self.where(name)}: missing tensor; the config asks for it")
    known = {self._stored(name) for name in [*wanted, *ignored]}
    for stored in sorted(set(self._files) - known):
      if not stored.endswith(_IGNORED_ENDINGS):
        raise ValueError(
          f"{self._files[stored]}: {stored}: unexpected tensor; the config has no place for it"
        )
    for name, shape in sorted(wanted.items()):
      if shape is not None and (found := self.shape(name)) != shape:
        raise ValueError(
          f"{self.where(name)}: shape {list(found)}; the config asks for {list(shape)}"
        )

  def check_tied(self, head: str, table: str) -> None:
    """Refuses a head that the config ties to `table` and that is there with other weights."""
    if head not in self:
      return
    same = self.shape(head) == self.shape(table) and self.dtype(head) == self.dtype(table)
    rows = self.shape(table)[0]
    for start in range(0, rows, 4096):
      if same:
        # Bytes, so that a NaN equals itself here and is named where the table is read.
        part = (start, min(start + 4096, rows))
        same = self.rows(head, *part).tobytes() == self.rows(table, *part).tobytes()
    if not same:
      raise ValueError(
        f"{self.where(head)}: differs from {table}, to which tie_word_embeddings ties it; set that "
        "to false in config.json, or leave the tensor out"
      )

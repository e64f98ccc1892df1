"""A safetensors file that is written a tensor at a time.

safetensors' own writer takes all tensors of a file at once, and a copy of them.
https://github.com/huggingface/safetensors#format
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
# PyTorch opens no tensor that begins within one of its elements. Those whose size is a multiple of
# this begin at multiples of it; the others follow at the end, at multiples of their own item size.
_ALIGNMENT = 8


class TensorFile:
  """Writes a file, which is whole once the block that it is the context of has ended well.

  Args:
    path: is made, or emptied.
    header_bytes: left for the header; at least what `entry_bytes` says of each tensor.
  """

  def __init__(self, path: Path, header_bytes: int):
    self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    self._room = -(-(header_bytes + 64) // _ALIGNMENT) * _ALIGNMENT
    self._end = 0
    self._last: list[tuple[str, np.ndarray]] = []
    self._file = open(path, "wb")
    self._file.seek(8 + self._room)

  def __enter__(self) -> "TensorFile":
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    with self._file:
      if kind is None:
        self._finish()

  def write(self, name: str, tensor: np.ndarray) -> None:
    """Appends a tensor; one that others could not follow waits for the end."""
    # Not ascontiguousarray, which gives a scalar an axis.
    tensor = np.asarray(tensor, order="C")
    if tensor.nbytes % _ALIGNMENT:
      self._last.append((name, tensor))
    else:
      self._append(name, tensor)

  def _append(self, name: str, tensor: np.ndarray) -> None:
    self._header[name] = {
      "dtype": _DTYPES[tensor.dtype.name],
      "shape": list(tensor.shape),
      "data_offsets": [self._end, self._end + tensor.nbytes],
    }
    self._end += tensor.nbytes
    self._file.write(tensor.reshape(-1).view(np.uint8).data)

  def _finish(self) -> None:
    for name, tensor in sorted(self._last, key=lambda pair: -pair[1].itemsize):
      self._append(name, tensor)
    header = json.dumps(self._header, separators=(",", ":")).encode()
    if len(header) > self._room:
      raise AssertionError(f"{self._file.name}: {len(header)} bytes of header in {self._room}")
    self._file.seek(0)
    # The format allows for spaces behind it.
    self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


def entry_bytes(name: str) -> int:
  """At most what a tensor takes in the header whose name is `name`, or that and 40 bytes."""
  return len(json.dumps(name)) + 200

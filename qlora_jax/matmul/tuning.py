"""The kernels and tiles that were fastest on a device, by the weight's shape and the rows.

`tuning.json` ships with the package, as `python -m experiments.bench.tune` wrote it on each device:
device kind → "KxN" → class of rows → kernel, tiles, and the times in µs of these and of the rule's
(`gpu.by_rule`). A class is named by the most rows it has, at which it was measured. What is not
there is served by the rule, and nothing is searched at run time.
"""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, Literal

from qlora_jax.quantized_tensor import NestedScales, QuantizedTensor

# The most rows of each class.
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# What was measured: NF4's width and block, its scales quantized once more.
_BITS, _BLOCK_SIZE = 4, 64


@dataclasses.dataclass(frozen=True)
class Entry:
  """What serves a class.

  Attributes:
    kernel: "dequantize" with rows: the weight is dequantized, and the library multiplies.
    tiles: the fields of the kernel's `Tiles`.
  """

  kernel: Literal["few_rows", "tiles", "dequantize"]
  tiles: dict[str, Any]


@functools.cache
def table() -> dict[str, Any]:
  """What ships, as JSON has it."""
  return json.loads((importlib.resources.files("qlora_jax.matmul") / "tuning.json").read_text())


def row_class(rows: int) -> str | None:
  """The class's name; None of no rows, and of more than any was measured with."""
  return next((str(most) for most in ROWS if 1 <= rows <= most), None)


def find(device_kind: str, w: QuantizedTensor, rows: int | None = None) -> Entry | None:
  """What serves so many rows times `w`, `[K, N]`, or, with None, what dequantizes `w`.

  Returns:
    None where the rule is to serve.
  """
  if w.bits != _BITS or w.block_size != _BLOCK_SIZE or w.zero is not None:
    return None
  if not isinstance(w.scales, NestedScales):
    return None
  name = "dequantize" if rows is None else row_class(rows)
  k, n = w.shape
  entry = table().get(device_kind, {}).get(f"{k}x{n}", {}).get(name)
  return None if entry is None else Entry(entry["kernel"], entry["tiles"])

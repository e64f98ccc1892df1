"""How long the packed product should take on a TPU, and what bounds it: a model, not a measurement.

  python -m experiments.bench.tpu_model [--out model.json] [--shapes 4096x14336,…] [--rows 1,16,…]

Two times for each case, of which the longer is the prediction, since the kernel's pipeline runs
them side by side: bytes at the bandwidth of HBM, and the bundles of the kernel's steps, which
`experiments.bench.tpu_compile --parts real` counts with 16 rows, 256 and 1,024, and which lie on
lines between those here. What bounds those is called products where the matrix units alone would
take longer than a step with 16 rows does, which decodes as much; else decoding. Beside it the same
of a bf16 weight, its products at the peak of the matrix units, and of one that is dequantized into
HBM first: its bytes alone, no time for decoding, so that both are at best that. `share` is bf16's
time over ours: above 1 the packed product is the faster one.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.matmul.tpu_tiles import Tiles, cuts_of


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as JAX has it: a chip, of TPU7x one of its two TensorCores.

  Attributes:
    flop_s: bf16 peak; bytes_s: of HBM.
    cores: TensorCores of the device.
    products: multiplications of a core's matrix units a cycle.
  """

  flop_s: float
  bytes_s: float
  cores: int
  products: int

  @property
  def cycles_s(self) -> float:
    """The clock, which is not published: from the peak."""
    return self.flop_s / (2 * self.cores * self.products)


# Peaks, bandwidths and TensorCores: https://docs.cloud.google.com/tpu/docs/v5e, and of the others
# the table of https://docs.cloud.google.com/tpu/docs/tpu7x. The matrix units of v5e and v5p are
# four of 128 × 128. Those of v6e and TPU7x, two of 256 × 256 by JAX's own table
# (`pltpu.get_tpu_info_for_chip`), are taken to do 2^18 products a cycle, an assumption: at the
# clock that follows, a full schedule reaches the published peak.
CHIPS = {
  "v5e": Chip(197e12, 819e9, cores=1, products=4 * 128**2),
  "v5p": Chip(459e12, 2765e9, cores=2, products=4 * 128**2),
  "v6e": Chip(918e12, 1638e9, cores=1, products=2**18),
  "v7x": Chip(2307e12 / 2, 7380e9 / 2, cores=1, products=2**18),
}

# Of a step for 1,024 weights, 4096 → 14336, forward, by its rows of x.
BUNDLES = {
  "v5e": {16: 2.57, 256: 4.72, 1024: 16.96},
  "v5p": {16: 2.57, 256: 4.72, 1024: 16.96},
  "v6e": {16: 2.28, 256: 2.74, 1024: 5.19},
  "v7x": {16: 2.27, 256: 2.47, 1024: 5.06},
}

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192))
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)

# NF4 in blocks of 64 with double quantization.
_BYTES_A_WEIGHT = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def predict(chip_name: str, k: int, n: int, rows: int) -> dict[str, Any]:
  """Seconds of x `[rows, K]` times a packed `[K, N]`, and of its peers."""
  chip, tiles, bundles = CHIPS[chip_name], Tiles(), BUNDLES[chip_name]
  passes = math.ceil(rows / tiles.rows)  # over the weight: each decodes it again
  # Few rows fill as much of a matrix unit as 8 do.
  peak = 2 * max(rows, 8) * k * n / chip.flop_s
  bundle = k * n / 1024 / (chip.cores * chip.cycles_s)
  # The last tile of N is decoded as a whole, and multiplied.
  width = cuts_of(n, tiles.n)[0]
  bundle *= math.ceil(n / width) * width / n
  # x again for each tile of N, which is how the grid goes.
  activations = 2 * rows * (k * math.ceil(n / width) + n)
  a_pass = rows / passes
  ours = {
    "bytes": (passes * k * n * _BYTES_A_WEIGHT + activations) / chip.bytes_s,
    "steps": passes * float(np.interp(a_pass, [*bundles], [*bundles.values()])) * bundle,
  }
  products = a_pass * 1024 / chip.products
  bound = "products" if products > bundles[16] else "decoding"
  bf16 = max((2 * k * n + 2 * rows * (k + n)) / chip.bytes_s, peak)
  # Written once and read once.
  through_hbm = (k * n * (_BYTES_A_WEIGHT + 2) / chip.bytes_s) + bf16
  seconds = max(ours.values())
  return {
    "chip": chip_name,
    "k": k,
    "n": n,
    "rows": rows,
    "seconds": seconds,
    "bound": "bytes" if ours["bytes"] > ours["steps"] else bound,
    "parts": ours,
    "bf16_seconds": bf16,
    "dequantized_seconds_at_best": through_hbm,
    "share": bf16 / seconds,
  }


def main(argv: Sequence[str]) -> int:
  """Prints the table that `argv` asks for."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench.tpu_model",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", type=Path)
  parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES))
  parser.add_argument("--rows", default=",".join(map(str, ROWS)))
  arguments = parser.parse_args(argv)
  shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
  rows = [int(m) for m in arguments.rows.split(",")]
  results = [predict(chip, k, n, m) for chip in CHIPS for k, n in shapes for m in rows]
  print("predicted, µs; nothing here was run")
  print(f"{'':24}{'ours':>9}  {'bound':9}{'bf16':>9}{'via HBM':>9}{'share':>7}")
  for each in results:
    case = f"{each['chip']} {each['k']}→{each['n']}, {each['rows']}"
    print(
      f"{case:24}{1e6 * each['seconds']:9.1f}  {each['bound']:9}{1e6 * each['bf16_seconds']:9.1f}"
      f"{1e6 * each['dequantized_seconds_at_best']:9.1f}{each['share']:7.2f}"
    )
  if arguments.out:
    lines = ",\n".join(f"  {json.dumps(each)}" for each in results)
    head = f'"predicted_for": {json.dumps([*CHIPS])}, "ran_on": null'
    arguments.out.write_text(f'{{{head}, "results": [\n{lines}\n]}}\n')
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

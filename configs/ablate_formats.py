"""Which 4-bit format costs least: hardware's, tables learned from the weights, better scales?

By error on normal weights, in bits' order: MXFP4 .0132 (4.25 bits), NF4 .0085 and BOF4-S .0074
(4.127), NVFP4 .0090 (4.5). NF4 with scales of least error has .0073; any4, which has a zero-point
a group, .0068 (4.75 beside its tables); a rotation or outliers kept in 16 bits help where the
weights' tails are heavy (`python -m experiments.bench.quantization_error`).

  python -m experiments.run --config configs/ablate_formats.py --workdir runs/ablate_formats

36 trials: about 4 minutes on 2 idle cores (estimated, as in configs/ablate.py). any4's tables are
as large as the codes on a base so small as the quickstart's.
The answer found here: not run as a whole yet.
"""

from configs import ablate
from qlora_jax.sweeps import cross, grid, zipped

FORMATS = {
  "quantization.codebook": ["nf4", "bof4s", "nvfp4", "mxfp4", "lloyd_max4", "any4"],
  "quantization.block_size": [64, 64, 16, 32, 64, 64],
  "quantization.double_quantization": [True, True, False, False, True, True],
}
# One thing beside NF4.
AROUND = (
  {"quantization.scale_rule": ["signed_absmax", "mse"]},
  {"quantization.outlier_fraction": [0.01, 0.05]},
  {"quantization.rotate": [True]},
)


def get_config():
  """The trainings of configs/ablate.py, at rank 8."""
  config = ablate.get_config()
  config.name = "ablate_formats"
  return config


def sweep():
  """16-bit LoRA; every format; NF4 with each of the others."""
  seeds = [*grid({"seed": ablate.SEEDS})]
  yield from cross(grid({"model.quantize": [False]}), seeds)
  yield from cross(zipped(FORMATS), seeds)
  for each in AROUND:
    yield from cross(grid(each), seeds)

"""Which 4-bit format costs least: hardware's, tables learned from the weights, better scales?

By error on normal weights, in bits' order: MXFP4 .0132 (4.25 bits), NF4 .0085 and BOF4-S .0074
(4.127), NVFP4 .0090 (4.5). NF4 with scales of least error has .0073; any4, which has a zero-point
a group, .0068 (4.75 beside its tables); a rotation or outliers kept in 16 bits help where the
weights' tails are heavy (`python -m experiments.bench.quantization_error`).

  python -m experiments.run --config configs/ablate_formats.py --workdir runs/ablate_formats

36 trials, 11 minutes on 2 cores that other work kept busy (CPU, JAX 0.11.2). any4's tables are as
large as the codes on a base so small as the quickstart's.
The answer found here, at rank 8: three seeds tell none from 16-bit LoRA. Held-out loss after
training (standard errors .012 to .02), and KL(16-bit base ‖ base) before it, nats a token:

  16-bit LoRA           1.177               NF4, rotated          1.184   .058
  Lloyd–Max             1.164   .042        NF4, 5% outliers      1.191   .044
  NF4, scales by error  1.165   .054        NF4, 1% outliers      1.198   .050
  MXFP4                 1.179   .081        BOF4-S                1.201   .039
  any4                  1.181   .036        NF4                   1.204   .051
  NVFP4                 1.182   .064        NF4, signed scales    1.207   .054

What lies nearest to the 16-bit base before training is not what ends lowest.
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

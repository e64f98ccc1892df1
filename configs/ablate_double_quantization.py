"""What does double quantization cost, and what does it save?

The paper: nothing measurable, and .37 bits a weight at block 64 (Dettmers et al., QLoRA, 2023,
https://arxiv.org/abs/2305.14314, section 3 and table 4). On normal weights it adds less than .1% to
NF4's squared error. The scales in bfloat16 are the cheap alternative: they save 16 / 64 = .25 bits.

  python -m experiments.run --config configs/ablate_double_quantization.py \\
    --workdir runs/ablate_double_quantization

54 trials, 7.7 s each on 2 cores of a Xeon (eight processes at once, JAX 0.11.2). The answer found
here, held-out loss over all block sizes: double quantization costs nothing that 3 seeds show
(−.0012 ± .0015 nats), nor do scales in bfloat16 (−.0071 ± .0060); training comes to 1.20, so
this base resolves a hundredth. Blocks of 32, 64 and 128 are not told apart either.
"""

from configs import ablate
from qlora_jax.sweeps import cross, grid, zipped

BLOCK_SIZES = (32, 64, 128)


def get_config():
  """The trainings of configs/ablate.py, at rank 8."""
  config = ablate.get_config()
  config.name = "ablate_double_quantization"
  return config


def sweep():
  """float32, bfloat16 and doubly quantized scales, of two codebooks."""
  scales = zipped(
    {
      "quantization.double_quantization": [True, False, False],
      "quantization.scale_dtype": ["float32", "float32", "bfloat16"],
    }
  )
  bases = {"quantization.codebook": ["nf4", "fp4"], "quantization.block_size": BLOCK_SIZES}
  return cross(grid(bases), scales, grid({"seed": ablate.SEEDS}))

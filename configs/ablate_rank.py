"""Does the rank matter once every linear layer is adapted?

The paper: no; at r = 8 to 256 the scores are alike when all linear layers have adapters (Dettmers
et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, figure 4, appendix A), and the layers matter
more than the rank. So both are varied here; alpha is 2 r throughout.

  python -m experiments.run --config configs/ablate_rank.py --workdir runs/ablate_rank

36 trials, 8.6 s each on 2 cores of a Xeon (eight processes at once, JAX 0.11.2). The answer found
here, held-out loss in nats at ranks 1, 2, 4, 8, 16, 32:

  q and v      1.818  1.720  1.632  1.531  1.486  1.643
  all layers   1.480  1.331  1.225  1.213  1.459  2.483

The layers matter more than the rank, as in the paper; but so does the rank (4 to 8: .057 ± .004
over both rows). From 16 on, at the one learning rate of all, training is thrown off, which says
nothing of the rank: 16-bit LoRA of rank 32 has 1.070 at a rate of 5e-3 (one seed).
"""

from configs import ablate
from qlora_jax.sweeps import cross, grid

RANKS = (1, 2, 4, 8, 16, 32)
TARGETS = (("*/attn/q", "*/attn/v"), ("*/attn/*", "*/mlp/*"))


def get_config():
  """The trainings of configs/ablate.py."""
  config = ablate.get_config()
  config.name = "ablate_rank"
  return config


def sweep():
  """Six ranks, on the queries and values or on every linear layer."""
  ranks = ablate.of_ranks(RANKS)
  return cross(grid({"lora.targets": TARGETS}), ranks, grid({"seed": ablate.SEEDS}))

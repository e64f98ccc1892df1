"""Does the rank matter once every linear layer is adapted?

The paper: no; at r = 8 to 256 the scores are alike when all linear layers have adapters (Dettmers
et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, figure 4, appendix A), and the layers matter
more than the rank. So both are varied here; alpha is 2 r throughout.

  python -m experiments.run --config configs/ablate_rank.py --workdir runs/ablate_rank

36 trials: about 4 minutes on 2 idle cores (estimated, as in configs/ablate.py).
The answer found here: not run as a whole yet.
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

"""Which layers need adapters?

The paper: all linear layers; adapters on queries and values alone fall short of full fine-tuning,
whatever their rank (Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, section 4 and
figure 2). Beside each set at rank 8 stands one of q and v with as many trained parameters as all
layers have at rank 8 (on the quickstart's base: 41).

  python -m experiments.run --config configs/ablate_targets.py --workdir runs/ablate_targets

15 trials and as many of 16-bit LoRA: measured, 225 CPU seconds, 6 minutes on 2 cores that other
work kept busy (CPU, JAX 0.11.2). The answer found here, held-out loss after 30 steps (mean and
deviation, 3 seeds):

                       parameters   QLoRA           16-bit LoRA
  q and v, rank 8          14,336   1.537 (.009)    1.531 (.009)
  attention, rank 8        28,672   1.409 (.008)    1.394 (.007)
  MLP, rank 8              45,312   1.201 (.006)    1.188 (.012)
  all, rank 8              73,984   1.202 (.024)    1.170 (.010)
  q and v, rank 41         73,472   1.767 (.095)    1.708 (.030)

So the layers matter, as in the paper, and the MLP's adapters do nearly all of it here. The last row
trains at the learning rate of the others, which is too high for its rank: it says nothing more.
"""

from configs import ablate
from qlora_jax.sweeps import cross, grid

QUERIES_AND_VALUES = ("*/attn/q", "*/attn/v")
TARGETS = (QUERIES_AND_VALUES, ("*/attn/*",), ("*/mlp/*",), ("*/attn/*", "*/mlp/*"))


def get_config():
  """The trainings of configs/ablate.py, at rank 8."""
  config = ablate.get_config()
  config.name = "ablate_targets"
  return config


def sweep():
  """Four sets of layers at one rank, and the smallest set at a rank that makes up for it."""
  sets = [
    *grid({"lora.targets": TARGETS}),
    {"lora.targets": QUERIES_AND_VALUES, "lora.rank": 41, "lora.alpha": 82.0},
  ]
  return cross(grid({"model.quantize": [True, False]}), sets, grid({"seed": ablate.SEEDS}))

"""Does a start that makes up for quantizing help, and from how few bits on?

Published: at 2 bits plain QLoRA fails, and LoftQ recovers (Li et al., LoftQ, 2023: Llama-2-7B,
WikiText perplexity 7.85). Here with rank 8, scaling 2, 60 steps of 4 sequences:

  python -m experiments.run --config configs/ablate_init.py --workdir runs/ablate_init

(60 trials; 24 minutes on one core, the other one busy; CPU, JAX 0.11.2.)
Found on the quickstart's base, held-out loss before → after, the mean of three seeds (standard
errors of the latter .009 to .017, of pissa at 2e-2 .035 to .074):

                   rate 2e-2          rate 2e-3
  16 bits          1.816 → .686       1.816 → 1.119
  nf4  lora        1.859 → .700       1.859 → 1.142
       pissa       1.836 → 1.653      1.836 → .884
       loftq       1.827 → .695       1.827 → 1.142
  nf3  lora        1.962 → .692       1.962 → 1.183
       pissa       1.960 → 1.773      1.960 → .909
       loftq       1.935 → .703       1.935 → 1.140
  nf2  lora        2.855 → .805       2.855 → 1.492
       pissa       2.691 → 1.617      2.691 → 1.036
       loftq       2.612 → .851       2.612 → 1.157

LoftQ starts nearer at every width. At the rate at which steps are small that lasts, the more the
fewer bits there are: it wins back 90% of what 2 bits cost ((1.492 − 1.157) / (1.492 − 1.119)), and
67% of what 3 did; at 4 there is nothing to win. At the better rate it does not: .851 against .805
at 2 bits, where plain adapters make up for all but .12 themselves. PiSSA learns faster at the lower
rate and is thrown off by the higher one: compare starts each at its own best rate.
"""

from configs import quickstart
from qlora_jax.sweeps import grid

SEEDS = (0, 1, 2)
CODEBOOKS = ("nf4", "nf3", "nf2")
INITS = ("lora", "pissa", "loftq")
# A start of the weight's own size does not bear the rate that one at zero asks for.
RATES = (2e-2, 2e-3)


def get_config():
  """The draft that each trial starts from: short trainings on the quickstart's base."""
  config = quickstart.get_config()
  config.name = "ablate_init"
  config.train.compare_16bit = False  # the 16-bit trials of `sweep` serve all
  config.train.batch_size = 4
  config.train.steps = 60
  config.train.log_every = 30
  config.train.eval_every = 60
  config.train.checkpoint_every = 60
  config.optimizer.warmup_steps = 3
  return config


def sweep():
  """16-bit LoRA of each rate and seed; each codebook with each start."""
  rates = {"optimizer.learning_rate": RATES, "seed": SEEDS}
  yield from grid({"model.quantize": [False], **rates})
  yield from grid({"quantization.codebook": CODEBOOKS, "lora.init": INITS, **rates})

"""Does a start that makes up for quantizing help, and from how few bits on?

Published: at 2 bits plain QLoRA fails, and LoftQ recovers (Li et al., LoftQ, 2023: Llama-2-7B,
WikiText perplexity 7.85). Here with rank 8, scaling 2, 60 steps of 4 sequences:

  python -m experiments.run --config configs/ablate_init.py --workdir runs/ablate_init

(60 trials; 16 s each, on two busy cores; CPU, JAX 0.11.2.)
Found on the quickstart's base, held-out loss before → after, the mean of three seeds at 4 and 16
bits, one seed at 2 bits; nf3 was not run to its end:

                   rate 2e-2          rate 2e-3
  16 bits          1.816 → .687       1.816 → 1.119
  nf4  lora        1.859 → .695       1.859 → 1.142
       pissa       1.836 → 1.652      1.836 → .884
       loftq       1.831 → .699       1.831 → 1.144
  nf2  lora        2.854 → .819       2.854 → 1.489
       pissa       2.689 → 1.554      2.689 → 1.040
       loftq       2.674 → .879       2.674 → 1.176

LoftQ starts nearer at either width. At 2 bits (one seed) and the rate at which steps are small that
lasts: it wins back 85% of what quantizing cost ((1.489 − 1.176) / (1.489 − 1.119)). At the better
rate its recovery is negative (.879 against .819, one seed), and at 4 bits there is nothing to win.
PiSSA learns faster at the lower rate and is thrown off by the higher one: compare starts each at
its own best rate.
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

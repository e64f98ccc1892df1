"""A case in which QLoRA recovers less than nothing: PiSSA at a rate that LoRA bears.

  python -m experiments.run --config configs/no_recovery.py --workdir runs/no_recovery
  python -m experiments.report runs/no_recovery

6 trials of the trainings of configs/ablate_init.py, at the rate 3e-2.
Found (CPU, JAX 0.11.2), held-out loss before → after, of each seed, and the recovery
(L_q − L_qlora) / (L_q − L_16bit-LoRA), L_q the loss before training:

  16-bit LoRA   1.816 → 1.430, 1.723, 1.691
  nf4  pissa    1.836 → 2.301, 2.559, 2.508    −2.4 ± 1.3

At 5e-2 nothing recovers: 16-bit LoRA itself ends at 3.211, 3.077, 3.026 (PiSSA at 3.102, 2.905,
2.891), so that there is nothing to compare with. At 2e-2 PiSSA still wins a little:
configs/ablate_init.py.
"""

from configs import ablate_init
from qlora_jax.sweeps import cross, grid


def get_config():
  """The draft of configs/ablate_init.py, at a high rate."""
  config = ablate_init.get_config()
  config.name = "no_recovery"
  config.optimizer.learning_rate = 3e-2
  return config


def sweep():
  """16-bit LoRA; NF4 with PiSSA; each with every seed."""
  seeds = [*grid({"seed": ablate_init.SEEDS})]
  yield from cross(grid({"model.quantize": [False]}), seeds)
  yield from cross(grid({"lora.init": ["pissa"]}), seeds)

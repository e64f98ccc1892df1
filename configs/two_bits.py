"""At 2 bits plain QLoRA fails and LoftQ recovers: on a real model too?

  python -m experiments.run --config configs/two_bits.py --workdir runs/two_bits
  python -m experiments.report runs/two_bits

15 trials of 100 steps, of stories260K on Tiny Shakespeare. Published: Li et al., LoftQ, 2023, table
of Llama-2-7B, WikiText perplexity 7.85 at 2 bits, where plain QLoRA does not converge.

Found (CPU, JAX 0.11.2), held-out loss before → after, the mean of three seeds, and the recovery
(L_q − L_qlora) / (L_q − L_16bit-LoRA), L_q the loss of the quantized base:

  16-bit LoRA   4.965 → 3.028
  nf4  lora     5.013 → 3.049    .990 ± .002
       loftq    5.041 → 3.034    .997 ± .002
  nf2  lora     8.447 → 3.476    .917 ± .001
       loftq    7.030 → 3.216    .965 ± .001

At 2 bits the base is worse than guessing all 512 tokens alike (6.238). Plain QLoRA is left .448
above 16-bit LoRA, and LoftQ wins back 58% of that. At 4 bits LoftQ starts farther off than plain
rounding, and ends .015 nearer. (A recovery below 0: configs/no_recovery.py.)
"""

from configs import stories
from qlora_jax.sweeps import cross, grid, zipped

SEEDS = (0, 1, 2)

SETTINGS = {
  "quantization.codebook": ["nf2", "nf2", "nf4", "nf4"],
  "lora.init": ["lora", "loftq", "lora", "loftq"],
}


def get_config():
  """The draft that each trial starts from: a short training of configs/stories.py."""
  config = stories.get_config()
  config.name = "two_bits"
  config.lora.rank = 16
  config.data.seq_len = 256
  config.optimizer.warmup_steps = 5
  config.train.compare_16bit = False  # the 16-bit trials of `sweep` serve all
  config.train.steps = 100
  config.train.log_every = 50
  config.train.eval_every = 100
  config.train.eval_batch_size = 32
  config.train.checkpoint_every = 100
  return config


def sweep():
  """16-bit LoRA; the settings; each with every seed."""
  seeds = [*grid({"seed": SEEDS})]
  yield from cross(grid({"model.quantize": [False]}), seeds)
  yield from cross(zipped(SETTINGS), seeds)

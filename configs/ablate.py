"""Rank, block size or codebook: which of them matters for the loss?

The paper: NF4 with double quantization equals 16-bit LoRA, NF4 is better than FP4 and INT4, and the
rank hardly matters once every linear layer is adapted (Dettmers et al., QLoRA, 2023,
https://arxiv.org/abs/2305.14314, sections 3 to 5). By expected error on normal weights NF4 is not
always the best of 4 bits: signed INT4 is better in blocks of 32, BOF4-S in all.

  python -m experiments.run --config configs/ablate.py --workdir runs/ablate

Alpha is 2 r throughout, so that a higher rank does not scale the adapter down.

261 trials of 30 short steps on the quickstart's base: about 16 minutes on 2 idle cores, the base's
training included. Estimated from 39 trials: 4 CPU seconds each, 10 to compile for a rank and block
size, 5 to measure a base.
The other widths and INT4 with a zero-point are in configs/ablate_full.py; with the same --workdir
it runs what is new in it. On another base and text:

  --config.model.path=PATH --config.pretrain.steps=0 --config.data.path=TEXT \\
  --config.data.synthetic=None --config.data.tokenizer=model --config.train.steps=500

The quickstart's matrices have 128 or 344 rows: on its base, blocks of 256 are cut short. The answer
found here: not run as a whole yet.
"""

from configs import quickstart
from qlora_jax.sweeps import cross, grid, zipped

RANKS = (2, 8, 32)
SEEDS = (0, 1, 2)
BLOCK_SIZES = (32, 64, 128, 256)
CODEBOOKS = ("nf4", "fp4", "e2m1", "int4", "int4_signed", "af4", "bof4s")


def get_config():
  """The draft that each trial starts from: short trainings on the quickstart's base."""
  config = quickstart.get_config()
  config.name = "ablate"
  config.data.seq_len = 128
  config.train.steps = 30
  config.train.batch_size = 4
  config.train.log_every = 30
  config.train.eval_every = 30
  config.train.checkpoint_every = 30
  config.train.compare_16bit = False  # one 16-bit trial serves all that it is compared with
  config.optimizer.warmup_steps = 3
  return config


def of_ranks(ranks):
  """Each rank with alpha = 2 r."""
  return zipped({"lora.rank": ranks, "lora.alpha": [2.0 * rank for rank in ranks]})


def of(codebooks):
  """16-bit LoRA of each rank and seed; every codebook and block size beside it."""
  adapters = [*cross(of_ranks(RANKS), grid({"seed": SEEDS}))]
  yield from cross(grid({"model.quantize": [False]}), adapters)
  bases = {"quantization.codebook": codebooks, "quantization.block_size": BLOCK_SIZES}
  yield from cross(grid(bases), adapters)


def sweep():
  """The tables of 16 levels; they share their compiled programs."""
  return of(CODEBOOKS)

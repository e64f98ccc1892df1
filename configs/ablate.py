"""Rank, block size or codebook: which of them matters for the loss?

The paper: NF4 with double quantization equals 16-bit LoRA, NF4 is better than FP4 and INT4, and the
rank hardly matters once every linear layer is adapted (Dettmers et al., QLoRA, 2023,
https://arxiv.org/abs/2305.14314, sections 3 to 5). By expected error on normal weights NF4 is not
always the best of 4 bits: signed INT4 is better in blocks of 32, BOF4-S in all.

  python -m experiments.run --config configs/ablate.py --workdir runs/ablate

Alpha is 2 r throughout, so that a higher rank does not scale the adapter down, and rank 32 has a
lower learning rate than the others: at 2e-2 it is thrown off (held-out loss 2.41 of 16-bit LoRA;
1.12 at 1e-2 and 1.07 at 5e-3, one seed).

261 trials of 30 short steps on the quickstart's base: 18 minutes on 2 cores (measured, the base's
training and compiling included; CPU, JAX 0.11.2).
The other widths and INT4 with a zero-point are in configs/ablate_full.py; with the same --workdir
it runs what is new in it. On another base and text:

  --config.model.path=PATH --config.pretrain.steps=0 --config.data.path=TEXT \\
  --config.data.synthetic=None --config.data.tokenizer=model --config.train.steps=500

The quickstart's matrices have 128 or 344 rows: on its base, blocks of 256 are cut short.

The answer found here (CPU, JAX 0.11.2; held-out loss of 16-bit LoRA 1.324, 1.177 and 1.073 at ranks
2, 8 and 32; less that, the mean over ranks and block sizes, with its standard error):

  bof4s .005 (.004)   af4 .006 (.005)   int4_signed .007 (.005)   nf4 .009 (.002)
  e2m1 .011 (.003)    int4 .012 (.003)  fp4 .020 (.006)

NF4 is .009 nats above 16-bit LoRA, 1% of what training wins, and three seeds on so small a base do
not separate them (p = .30). Of the codebooks they tell apart fp4 and af4 alone (.014, p = .024), of
the ranks 2 and 32, each at its own rate (.262, p = 8e-4; 2 and 8, .144, p = .06), and no two block
sizes. configs/ablate_own.py resolves ten times more.
"""

from configs import quickstart
from qlora_jax.sweeps import cross, grid, zipped

RANKS = (2, 8, 32)
RATES = (2e-2, 2e-2, 5e-3)
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


def of(codebooks, ranks):
  """16-bit LoRA of each of `ranks` (overrides) and seed, and of every codebook and block size."""
  adapters = [*cross(ranks, grid({"seed": SEEDS}))]
  yield from cross(grid({"model.quantize": [False]}), adapters)
  bases = {"quantization.codebook": codebooks, "quantization.block_size": BLOCK_SIZES}
  yield from cross(grid(bases), adapters)


def at_their_rates():
  """The ranks, each at its learning rate."""
  return [
    {**rank, "optimizer.learning_rate": rate}
    for rank, rate in zip(of_ranks(RANKS), RATES, strict=True)
  ]


def sweep():
  """The tables of 16 levels; they share their compiled programs."""
  return of(CODEBOOKS, at_their_rates())

"""The main ablation on a base of our own, which has seen real text (configs/own.py).

The paper's claims: NF4 with double quantization equals 16-bit LoRA, NF4 is better than FP4 and
INT4, the rank hardly matters, and all layers need adapters (Dettmers et al., QLoRA, 2023,
https://arxiv.org/abs/2305.14314, sections 3 to 5). Beside them: whether NF4's advantage depends on
the block size as its error on normal weights does, and whether a weight error predicts a loss.

  python -m experiments.base --config configs/own.py --workdir runs/own_base
  python -m experiments.run --config configs/ablate_own.py --workdir runs/ablate_own

Wikipedia's articles (WikiText-2, of which the base has seen nothing), the last fifth held out; 200
steps of 8 × 256 tokens, one and a half epochs; alpha = 2 r; the learning rate is the best of six
for 16-bit LoRA over three ranks.

399 trials: on one H100 (JAX 0.11.2) 60 in 4.5 minutes in one process, and the other 339 in 5.2 in
six, each with XLA_PYTHON_CLIENT_MEM_FRACTION=0.14: at this size a trial is mostly the host's work.
The answer found here (experiments/results/ablate_own.md): NF4 is .0072 nats worse than 16-bit LoRA,
0.4% of what training wins; better than FP4 by .0037 and than INT4 by .0025, neither of which three
seeds separate; the rank matters (.072 from 2 to 8, .017 from 8 to 32), and the MLPs' adapters do,
without which .128 is lost (.025 without the attention's, not separated). Weight error predicts the
KL before training and the loss after it, and not the loss before it.
"""

from configs import ablate, own
from qlora_jax.config import defaults
from qlora_jax.sweeps import cross, grid

# Tables of 16 levels, which share their compiled programs.
CODEBOOKS = (
  "nf4",
  "fp4",
  "int4",
  "int4_signed",
  "e2m1",
  "bof4s",
  "af4",
  "sf4",
  "lloyd_max4",
  "apot4",
)
TARGETS = (("*/attn/q", "*/attn/v"), ("*/attn/*",), ("*/mlp/*",))


def get_config():
  """The draft that each trial starts from."""
  config = own.get_config()
  config.name = "ablate_own"
  config.model.path = "runs/own_base/model"
  config.pretrain = defaults().pretrain  # the base is there
  config.data.holdout = 0.2
  config.train.compare_16bit = False  # one 16-bit trial serves all that it is compared with
  return config


def sweep():
  """16-bit LoRA and ten codebooks; NF4 on some layers alone; 3 and 2 bits."""
  seeds = [*grid({"seed": ablate.SEEDS})]
  some_layers = [
    *grid({"lora.targets": TARGETS}),
    # The smallest set, with more parameters.
    {"lora.targets": TARGETS[0], "lora.rank": 32, "lora.alpha": 64.0},
  ]
  yield from cross(grid({"model.quantize": [False]}), some_layers, seeds)
  yield from ablate.of(CODEBOOKS, ablate.of_ranks(ablate.RANKS))
  yield from cross(some_layers, seeds)
  yield from cross(grid({"quantization.codebook": ["nf3", "nf2"]}), seeds)

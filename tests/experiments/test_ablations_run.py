"""A step of the kinds of formats in configs/ablate_formats.py, on a tiny base."""

import jax
import jax.numpy as jnp
import pytest

from configs import ablate, ablate_formats
from experiments import trial
from qlora_jax import hf, sweeps
from qlora_jax.models.transformer import Transformer, TransformerConfig

# Each format is a program to compile.
pytestmark = pytest.mark.slow

TINY = {
  "pretrain.steps": 0,
  "model.storage_dtype": "float32",
  "data.path": None,
  "data.synthetic": "manuals",
  "data.num_documents": 10,
  "data.tokenizer": "bytes",
  "data.packing": False,
  "data.seq_len": 16,
  "optimizer.warmup_steps": 0,
  "train.steps": 1,
  "train.batch_size": 1,
  "train.eval_batch_size": 64,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  cfg = TransformerConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=True,
    max_position_embeddings=32,
  )
  model = Transformer(cfg, dtype=jnp.float32)
  path = tmp_path_factory.mktemp("base") / "model"
  tokens = jnp.zeros((1, 2), jnp.int32)
  hf.save(path, model, jax.jit(model.init)(jax.random.key(0), tokens)["frozen"])
  return path


# One of each kind that a run treats in its own way; the other formats are tables like NF4, which
# tests/experiments/test_run.py trains with. Bits a weight: from, to.
KINDS = {
  ("quantization.codebook", "nvfp4"): (4.5, 4.7),  # scales of 8-bit floats
  ("quantization.codebook", "any4"): (8, 16),  # zero-points, and a table a column of 64 or 96
  ("quantization.outlier_fraction", 0.05): (4.8, 5.5),
  ("quantization.rotate", True): (4.15, 4.5),  # the signs
}


def test_formats_train_a_step(base, tmp_path):
  shared, seen = trial.Shared(), set()
  for each in ablate_formats.sweep():
    kinds = KINDS.keys() & each.items()
    if not kinds or each["seed"] != ablate.SEEDS[0]:
      continue
    (one,) = sweeps.resolve(ablate_formats.get_config(), [each], {**TINY, "model.path": str(base)})
    stage = trial.run(one.config, tmp_path / one.id, shared)["qlora"]
    assert stage["loss_before"] < 7 and stage["loss_after"] < 7, one.label
    (low, high) = KINDS[kinds.pop()]
    assert low < stage["bits"] < high, (one.label, stage["bits"])
    seen.add(one.label)
  assert len(seen) == len(KINDS)

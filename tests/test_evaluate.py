import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import data, lora
from qlora_jax.evaluate import held_out_loss
from qlora_jax.models.transformer import Transformer, TransformerConfig

MODEL = Transformer(TransformerConfig(32, 16, 24, 2, 2, 1, 8), dtype=jnp.float32)


@pytest.fixture(scope="module")
def variables():
  dense = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  frozen = ql.quantize_tree(dense, {"layers/*/mlp/*": ql.QuantizationConfig()})
  params, constants = lora.init(jax.random.key(1), frozen, lora.LoRAConfig(rank=2))
  params = jax.tree.map(lambda p: p + 0.1, params)
  return {"params": params, "constants": constants, "frozen": frozen}


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
  rng = np.random.default_rng(0)
  return [rng.integers(0, 32, rng.integers(2, 9)).tolist() for _ in range(14)]


@pytest.fixture(scope="module")
def oracle(variables, documents) -> float:
  """Mean over all targets of a float64 cross entropy, each document on its own."""
  # What stands behind a document's end does not reach a causal model's logits before it.
  padded = np.zeros((len(documents), 8), np.int32)
  for row, ids in enumerate(documents):
    padded[row, : len(ids)] = ids
  all_logits = np.asarray(jax.jit(MODEL.apply)(variables, padded), np.float64)
  total = 0.0
  for logits, ids in zip(all_logits, documents, strict=True):
    logits = logits[: len(ids) - 1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
  return total / sum(len(ids) - 1 for ids in documents)


# Rows of several documents; batches with and without rows of padding; chunks that cut rows.
@pytest.mark.parametrize(("batch_size", "loss_chunk"), [(1, 5), (4, 1024), (16, 48)])
def test_mean_over_all_targets_whatever_the_batch(
  variables, documents, oracle, batch_size, loss_chunk
):
  rows = data.pack(documents, 16)
  assert len(rows.tokens) % 4 != 0  # else no batch below is filled up
  loss = held_out_loss(MODEL, variables, rows, batch_size=batch_size, loss_chunk=loss_chunk)
  assert rows.num_targets == sum(len(ids) - 1 for ids in documents)
  np.testing.assert_allclose(loss, oracle, rtol=1e-5)


def test_only_what_the_mask_names_counts(variables, documents):
  pairs = [(ids[:1], ids[1:]) for ids in documents]
  both = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in documents]
  losses = [
    held_out_loss(MODEL, variables, data.pack(each, 16), batch_size=4)
    for each in (documents, pairs, both)
  ]
  assert losses[0] == losses[1]  # a prompt of one token is what is never predicted anyway
  assert abs(losses[0] - losses[2]) > 1e-3

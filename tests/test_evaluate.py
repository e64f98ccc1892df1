import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import data
from qlora_jax.evaluate import held_out_loss
from qlora_jax.models.transformer import Transformer, TransformerConfig


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_mean_over_all_targets_whatever_the_batch(batch_size):
  model = Transformer(TransformerConfig(32, 16, 24, 2, 2, 1, 8), dtype=jnp.float32)
  frozen = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  variables = {"params": {}, "constants": {}, "frozen": frozen}
  rng = np.random.default_rng(0)
  documents = [rng.integers(0, 32, rng.integers(2, 9)).tolist() for _ in range(11)]
  total, count = 0.0, 0
  for ids in documents:
    logits = np.asarray(model.apply(variables, jnp.asarray([ids])), np.float64)[0, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
    count += len(ids) - 1
  rows = data.pack(documents, 16)
  loss = held_out_loss(model, variables, rows, batch_size=batch_size, loss_chunk=5)
  assert rows.num_targets == count
  np.testing.assert_allclose(loss, total / count, rtol=1e-5)

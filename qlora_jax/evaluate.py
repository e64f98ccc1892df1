"""Held-out loss."""

import functools
from typing import Any

import jax

from qlora_jax.data import Dataset, evaluation_batches
from qlora_jax.models.transformer import Transformer
from qlora_jax.train import batch_loss


@functools.partial(jax.jit, static_argnums=(0, 3))
def _batch_loss(model, variables, batch, loss_chunk):
  return batch_loss(model, variables, batch, loss_chunk)


def held_out_loss(
  model: Transformer,
  variables: dict[str, Any],
  dataset: Dataset,
  *,
  batch_size: int,
  loss_chunk: int = 1024,
) -> float:
  """Mean cross entropy over all targets of `dataset`, in nats a token.

  Batches' sums are added in double precision and divided once by the count.
  """
  total = 0.0
  for batch in evaluation_batches(dataset, batch_size):
    total += float(_batch_loss(model, variables, batch, loss_chunk))
  return total / dataset.num_targets

"""Cross entropy as a sum over tokens, taken in chunks so that all logits never exist at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
  """−Σ mask · log softmax(logits)[target], a float32 sum in nats.

  A sum, not a mean: batches of unequal token counts add up exactly, and whoever knows the
  global count divides by it once.

  Args:
    logits: `[..., V]` float32.
    targets: `[...]` int32 ids.
    mask: `[...]` bool; False where the prediction does not count.
  """
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0).sum()


def chunked_cross_entropy(
  logits: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  chunk: int,
) -> jax.Array:
  """`cross_entropy(logits(hidden), …)` holding the logits of `chunk` tokens at a time.

  The backward pass computes each chunk's logits again, for `chunk · V` floats of memory in
  place of `B · T · V`.

  Args:
    logits: the head, `[n, D] → [n, V]` float32. What it closes over is differentiated.
    hidden: `[..., D]`. targets, mask: `[...]`.
    chunk: tokens; the last chunk is filled up with masked ones.
  """
  hidden = hidden.reshape(-1, hidden.shape[-1])
  targets, mask = targets.reshape(-1), mask.reshape(-1)
  tokens = len(targets)
  chunk = min(chunk, tokens)
  padding = -tokens % chunk
  hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
  targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk)
  mask = jnp.pad(mask, (0, padding)).reshape(-1, chunk)

  @jax.checkpoint
  def step(total, part):
    hidden, targets, mask = part
    return total + cross_entropy(logits(hidden), targets, mask), None

  total, _ = jax.lax.scan(step, jnp.zeros((), jnp.float32), (hidden, targets, mask))
  return total

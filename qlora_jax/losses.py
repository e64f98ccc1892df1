"""Cross entropy as a sum over tokens, taken in chunks so that all logits never exist at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# `(trained, fixed, hidden [n, D]) → [n, V]` float32.
Head = Callable[[Any, Any, jax.Array], jax.Array]


def cross_entropy(
  logits: jax.Array, targets: jax.Array, mask: jax.Array, z_loss: float = 0.0
) -> jax.Array:
  """Σ mask · (−log softmax(logits)[target] + z · (log Σ exp logits)²), a float32 sum in nats.

  A sum, not a mean: batches of unequal token counts add up exactly, and whoever knows the
  global count divides by it once.

  Args:
    logits: `[..., V]` float32.
    targets: `[...]` ids within V; another counts as one whose logit is 0.
    mask: `[...]` bool; False where the prediction does not count.
    z_loss: z, which keeps the sums of exponentials near 1 (Chowdhery et al., PaLM, 2022,
      https://arxiv.org/abs/2204.02311, section 5).
  """
  # By comparison, not by index: an index's gradient is a scatter, for which XLA writes down the
  # gradient of all logits in float32 and reads it again to round it.
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  picked = jnp.where(ids == targets.astype(jnp.int32)[..., None], logits, 0).sum(-1)
  total = jax.nn.logsumexp(logits, axis=-1)
  loss = total - picked
  if z_loss:
    loss = loss + z_loss * jnp.square(total)
  return jnp.where(mask, loss, 0).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunked_cross_entropy(
  head: Head,
  chunk: int,
  z_loss: float,
  trained: Any,
  fixed: Any,
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """`cross_entropy(head(trained, fixed, hidden), …)`, holding the logits of `chunk` tokens at once.

  Differentiated, each chunk's gradient is taken while its logits are there: two products with the
  head in place of the three that computing them again would take. What is kept for the backward
  pass is the gradient of `hidden`, `[..., D]`, and of `trained`.

  Args:
    head: a function of its arguments alone: what it closed over would have no gradient.
    chunk: tokens; the last chunk is filled up with masked ones.
    z_loss: see `cross_entropy`.
    trained: a pytree of floats that has a gradient. fixed: any pytree; it has none.
    hidden: `[..., D]`. targets, mask: `[...]`.
  """

  def step(total, part):
    hidden, targets, mask = part
    return total + cross_entropy(head(trained, fixed, hidden), targets, mask, z_loss), None

  parts = _parts(chunk, hidden, targets, mask)
  return jax.lax.scan(step, jnp.zeros((), jnp.float32), parts)[0]


def token_chunks(chunk: int, x: jax.Array) -> jax.Array:
  """`[tokens, ...] → [n, chunk, ...]`, the last chunk filled up with zeros (False).

  Args:
    chunk: tokens of a chunk; all of them where there are fewer.
    x: any array whose first axis is tokens.
  """
  tokens = x.shape[0]
  chunk = min(chunk, tokens)
  x = jnp.pad(x, [(0, -tokens % chunk), *[(0, 0)] * (x.ndim - 1)])
  return x.reshape(-1, chunk, *x.shape[1:])


def _parts(chunk: int, hidden, targets, mask) -> tuple[jax.Array, ...]:
  """`[n, chunk, D]`, `[n, chunk]`, `[n, chunk]`; what fills them up is masked."""
  flat = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), mask.reshape(-1))
  return tuple(token_chunks(chunk, x) for x in flat)


# The gradient of a chunk is taken before the loss's own scale is known: unscaled, what the head
# multiplies is a probability at a time, and in float16 small ones would be lost.
_FLOAT16_SCALE = 1024.0


def _forward(head, chunk, z_loss, trained, fixed, hidden, targets, mask):
  scale = _FLOAT16_SCALE if hidden.dtype == jnp.float16 else 1.0

  def step(sums, part):
    states, targets, mask = part

    def loss(trained, states):
      return scale * cross_entropy(head(trained, fixed, states), targets, mask, z_loss)

    value, (of_trained, of_states) = jax.value_and_grad(loss, argnums=(0, 1))(trained, states)
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, (value, of_trained)), of_states

  sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.zeros(()), trained))
  (total, of_trained), of_hidden = jax.lax.scan(step, sums, _parts(chunk, hidden, targets, mask))
  of_trained = jax.tree.map(lambda x, y: x.astype(y.dtype), of_trained, trained)
  of_hidden = of_hidden.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
  return total / scale, (of_trained, of_hidden)


def _backward(head, chunk, z_loss, gradients, g):
  del head, chunk, z_loss
  of_trained, of_hidden = gradients
  g = g / (_FLOAT16_SCALE if of_hidden.dtype == jnp.float16 else 1.0)

  def scaled(x: jax.Array) -> jax.Array:
    # In float32: g rounded to 16 bits would be an error of the same sign everywhere.
    return (x.astype(jnp.float32) * g).astype(x.dtype)

  of_trained, of_hidden = jax.tree.map(scaled, gradients)
  return of_trained, None, of_hidden, None, None


chunked_cross_entropy.defvjp(_forward, _backward)

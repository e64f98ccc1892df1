"""Attention, in its plain form: all logits at once."""

import math

import jax
import jax.numpy as jnp


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None,
  *,
  scale: float | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """softmax(scale · q · kᵀ) · v, grouped: H / G query heads share a key and value head.

  Logits and softmax are float32. The softmax's division is left for after the product, and a
  group's queries are the rows of one product: fewer passes over T × S elements than
  `jax.nn.dot_product_attention` makes, which besides refuses float16 on a CPU.

  Args:
    q: `[B, T, H, h]`. k, v: `[B, S, G, h]`, of one dtype.
    mask: `[B, T, S]` or `[1, T, S]` bool, True where a query sees a key, at least one for each
      query; None for a causal one (S = T).
    scale: 1 / √h where None.
    softcap: c, where the logits become c · tanh(logits / c).

  Returns:
    `[B, T, H, h]` in q's dtype.
  """
  batch, queries, heads, width = q.shape
  keys, groups = k.shape[1:3]
  grouped = (batch, groups, heads // groups, queries)
  rows = (batch, groups, heads // groups * queries)
  q = q.reshape(batch, queries, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
  scale = 1 / math.sqrt(width) if scale is None else scale
  q = (q * jnp.asarray(scale, q.dtype)).reshape(*rows, width)
  k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
  if mask is None:
    mask = jnp.tril(jnp.ones((queries, keys), bool))[None]
  logits = jnp.matmul(q, k, preferred_element_type=jnp.float32).reshape(*grouped, keys)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  logits = jnp.where(mask[:, None, None], logits, jnp.float32(-jnp.inf))
  largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - largest).reshape(*rows, keys)
  y = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  y = (y / weights.sum(-1, keepdims=True)).astype(q.dtype)
  y = y.reshape(*grouped, width).transpose(0, 3, 1, 2, 4)
  return y.reshape(batch, queries, heads, width)

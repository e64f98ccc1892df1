"""Generation with a KV cache."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qlora_jax.models.transformer import Transformer, init_cache


def generate(
  model: Transformer,
  variables: dict[str, Any],
  prompt: ArrayLike,
  *,
  max_new_tokens: int,
  segment_ids: ArrayLike | None = None,
  temperature: float = 0.0,
  key: jax.Array | None = None,
  eos_id: int | None = None,
) -> jax.Array:
  """Continues each row of `prompt`.

  Args:
    prompt: `[B, P]` ids, padded left or right.
    max_new_tokens: how many follow.
    segment_ids: `[B, P]`, 1 for a token and 0 for padding; all tokens where None.
    temperature: 0 takes the likeliest token; above it, tokens are drawn from
      softmax(logits / temperature).
    key: a JAX random key, for a temperature above 0.
    eos_id: a row that has produced it goes on with it.

  Returns:
    `[B, max_new_tokens]` int32, the new tokens alone.

  Raises:
    ValueError: an empty prompt, a row that is all padding, a temperature without a key, or
      below 0.
  """
  prompt = jnp.asarray(prompt, jnp.int32)
  if prompt.ndim != 2 or 0 in prompt.shape:
    raise ValueError(f"generate: prompt {list(prompt.shape)}; [B, P] with at least one token")
  if max_new_tokens < 1:
    raise ValueError(f"generate: max_new_tokens {max_new_tokens}; at least 1")
  if not 0 <= temperature < math.inf or (temperature > 0 and key is None):
    raise ValueError(f"generate: temperature {temperature}; 0, or above it with a key")
  if segment_ids is not None:
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    if segment_ids.shape != prompt.shape:
      raise ValueError(
        f"generate: segment_ids {list(segment_ids.shape)}; the prompt's shape {list(prompt.shape)}"
      )
    empty = np.flatnonzero(~np.asarray(segment_ids != 0).any(1))
    if empty.size:
      raise ValueError(f"generate: row {empty[0]} of the prompt is all padding")
  key = jax.random.key(0) if key is None else key
  # An array, or None for greedy: all temperatures above 0 share one program.
  divisor = jnp.asarray(temperature, jnp.float32) if temperature > 0 else None
  return _generate(model, variables, prompt, segment_ids, key, divisor, max_new_tokens, eos_id)


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _generate(model, variables, prompt, segment_ids, key, temperature, max_new_tokens, eos_id):
  batch, length = prompt.shape
  cache = init_cache(model.config, batch, length + max_new_tokens, model.dtype)
  hidden, cache = model.apply(
    variables, prompt, segment_ids, cache=cache, fresh=True, method="hidden"
  )
  segment = None
  if segment_ids is None:
    hidden = hidden[:, -1]
  else:
    # The last token of a row stands before its right padding.
    index = jax.lax.broadcasted_iota(jnp.int32, prompt.shape, 1)
    last = jnp.where(segment_ids != 0, index, 0).max(1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    segment = jnp.take_along_axis(segment_ids, last[:, None], axis=1)

  def pick(hidden, key):
    logits = model.apply(variables, hidden, method="logits")
    if temperature is None:
      return logits.argmax(-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

  def step(carry, key):
    cache, token, done = carry
    hidden, cache = model.apply(variables, token[:, None], segment, cache=cache, method="hidden")
    following = pick(hidden[:, 0], key)
    if eos_id is not None:
      done = done | (token == eos_id)
      following = jnp.where(done, eos_id, following)
    return (cache, following, done), following

  keys = jax.random.split(key, max_new_tokens)
  first = pick(hidden, keys[0])
  done = jnp.zeros(batch, bool)
  _, rest = jax.lax.scan(step, (cache, first, done), keys[1:])
  return jnp.concatenate([first[:, None], rest.T], axis=1)

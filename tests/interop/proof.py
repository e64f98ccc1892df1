"""What is shown of each: it packs, it trains, nothing but the adapter changes, it merges."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.quantized_tensor import is_quantized

STEPS = 20


def packed_leaves(frozen: Any) -> list[Any]:
  return [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(leaf)]


def assert_packed_size(frozen: Any) -> None:
  """4 bits, 8 for each block of 64, 32 for each 256 of those; tables and offsets by matrix."""
  for leaf in packed_leaves(frozen):
    *leading, k, n = leaf.shape
    assert k % 64 == 0, f"{leaf.shape}: not a size to show this with"
    matrices = int(np.prod(leading, initial=1))
    nested = -(-(k // 64 * n) // 256)
    own = k * n // 2 + k // 64 * n + 4 * nested
    assert leaf.nbytes == matrices * (own + 4 + 4 * 16)
    # 4.127 bits a weight, and what is rounded up and stored once a matrix.
    assert 8 * own / (k * n) <= 4.127 + 32 / (k * n)


def prove(
  weights: Any,
  frozen: Any,
  params: Any,
  packed_loss: Callable[[Any, Any], jax.Array],
  dense_loss: Callable[[Any], jax.Array],
  merge: Callable[[Any, Any], Any],
  *,
  learning_rate: float = 3e-3,
  tolerance: float = 1e-4,
) -> None:
  """Runs all of it.

  Args:
    weights: the package's own.
    frozen, params: the packed base (or all that holds it), and the adapters.
    packed_loss: of params and frozen. dense_loss: of weights. merge: params and frozen to weights.
    tolerance: of the merged weights' loss, relative.
  """
  assert packed_leaves(frozen)
  assert_packed_size(frozen)
  dense_loss, value_and_grad = jax.jit(dense_loss), jax.jit(jax.value_and_grad(packed_loss))
  before = float(dense_loss(weights))
  start = float(value_and_grad(params, frozen)[0])
  assert abs(start - before) < 0.1 * before

  kept = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), frozen)
  optimizer = optax.adam(learning_rate)
  state = optimizer.init(params)
  for _ in range(STEPS):
    _, gradient = value_and_grad(params, frozen)
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  after = float(value_and_grad(params, frozen)[0])
  assert after < 0.98 * start
  # What Optax sees: two moments a leaf of the adapter, and a count.
  assert len(jax.tree.leaves(state)) == 2 * len(jax.tree.leaves(params)) + 1
  jax.tree.map(np.testing.assert_array_equal, frozen, kept)

  merged = merge(params, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(weights)
  for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(weights), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
  np.testing.assert_allclose(float(dense_loss(merged)), after, rtol=tolerance)
  print(f"loss: dense {before:.4f}, packed {start:.4f}, {STEPS} steps {after:.4f}")


def prove_linen(module: Any, variables: Any, args: Any, loss: Callable[[Any], jax.Array], **adapt):
  """`prove`, of a Linen module whose outputs `loss` reads."""
  from qlora_jax import linen

  adapted, frozen, params, constants = linen.adapt(module, variables, *args, **adapt)

  def trees(params, frozen):
    return {"frozen": frozen, "params": params, "constants": constants}

  prove(
    variables["params"],
    frozen,
    params,
    lambda params, frozen: loss(adapted.apply(trees(params, frozen), *args)),
    lambda weights: loss(module.apply({"params": weights}, *args)),
    lambda params, frozen: adapted.merge(trees(params, frozen)),
  )
  return adapted, frozen


def prove_nnx(model: Any, args: Any, loss: Callable[[Any], jax.Array], **adapt):
  """`prove`, of an NNX module whose outputs `loss` reads."""
  from flax import nnx as fnnx

  from qlora_jax import nnx

  adapted = nnx.adapt(model, *args, **adapt)
  graph, params, frozen = fnnx.split(adapted, fnnx.LoRAParam, ...)
  own, weights, others = fnnx.split(model, fnnx.Param, ...)

  def merge(params, frozen):
    again = fnnx.clone(model)
    fnnx.merge(graph, params, frozen).merge(again)
    return fnnx.state(again, fnnx.Param)

  prove(
    weights,
    frozen,
    params,
    lambda params, frozen: loss(fnnx.merge(graph, params, frozen, copy=True)(*args)),
    lambda weights: loss(fnnx.merge(own, weights, others, copy=True)(*args)),
    merge,
  )
  return adapted


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  logits = logits[:, :-1].astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

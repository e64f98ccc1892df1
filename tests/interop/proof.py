"""What is shown of each: it packs, it trains, nothing but the adapter changes, it merges."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax import Adapted, lora, tree_paths
from qlora_jax.quantized_tensor import is_quantized

STEPS = 20
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 100, (2, 12)), jnp.int32)


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
  function: Adapted,
  weights: Any,
  frozen: Any,
  params: Any,
  adapted: set[str],
  packed: Callable[[Any, Any], jax.Array],
  dense: Callable[[Any], jax.Array],
  loss: Callable[[jax.Array], jax.Array],
  merge: Callable[[Any, Any], Any],
  *,
  learning_rate: float = 3e-3,
  tolerance: float = 1e-4,
) -> None:
  """Runs all of it.

  Args:
    function: what adapt made of the package's own.
    weights: the package's own.
    frozen, params: the packed base (or all that holds it), and the adapters.
    adapted: the paths of the weights that have an adapter.
    packed: of params and frozen, the output. dense: of weights.
    loss: of an output.
    merge: params and frozen to weights.
    tolerance: of the merged weights' output, relative to its largest element.
  """
  assert packed_leaves(frozen) and adapted
  assert_packed_size(frozen)
  dense, packed = jax.jit(dense), jax.jit(packed)
  before, first = float(loss(dense(weights))), float(loss(packed(params, frozen)))
  assert abs(first - before) < 0.1 * before
  start = merge(params, frozen)

  optimizer = optax.adam(learning_rate)

  @jax.jit
  def step(params, state, frozen):
    gradient = jax.grad(lambda params: loss(packed(params, frozen)))(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  # What Optax sees: two moments a leaf of the adapters, A and B of each, and a count.
  assert len(jax.tree.leaves(params)) == 2 * len(adapted)
  assert len(jax.tree.leaves(state)) == 2 * 2 * len(adapted) + 1
  for _ in range(STEPS):
    params, state = step(params, state, frozen)
  trained = packed(params, frozen)
  after = float(loss(trained))
  assert after < 0.98 * first

  # Nothing but the adapters changed: 20 steps moved the weights that have one and no other, and
  # what is not packed is the package's own to the bit.
  merged = merge(params, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(weights)
  own, then, now = (
    dict(zip(function.specs, jax.tree.leaves(tree), strict=True))
    for tree in (weights, start, merged)
  )
  moved = {path for path in now if not np.array_equal(now[path], then[path])}
  assert moved == adapted, moved ^ adapted
  for path, w in own.items():
    assert (now[path].shape, now[path].dtype) == (w.shape, w.dtype), path
    if path not in function.layouts:
      np.testing.assert_array_equal(now[path], w, err_msg=path)
  error = np.abs(np.asarray(dense(merged), np.float32) - np.asarray(trained, np.float32)).max()
  assert error < tolerance * float(jnp.abs(trained).max()), error
  print(
    f"loss: dense {before:.4f}, packed {first:.4f}, {STEPS} steps {after:.4f}; merge {error:.1e}"
  )


def adapted_paths(function: Adapted, adapters: Mapping[str, Any]) -> set[str]:
  """The weights that have a pair at their layer's path in a tree of dicts."""
  names = tree_paths.leaves(adapters)
  return {path for path in function.specs if f"{lora.module(path)}/lora_a" in names}


def prove_linen(
  module: Any,
  variables: Any,
  args: Any,
  read: Callable[[Any], jax.Array],
  loss: Callable[[jax.Array], jax.Array],
  **adapt: Any,
):
  """`prove`, of a Linen module in whose outputs `read` finds the logits."""
  from qlora_jax import linen

  adapted, frozen, params, constants = linen.adapt(module, variables, *args, **adapt)

  def trees(params, frozen):
    return {"frozen": frozen, "params": params, "constants": constants}

  prove(
    adapted.function,
    variables["params"],
    frozen,
    params,
    adapted_paths(adapted.function, params),
    lambda params, frozen: read(adapted.apply(trees(params, frozen), *args)),
    lambda weights: read(module.apply({"params": weights}, *args)),
    loss,
    lambda params, frozen: adapted.merge(trees(params, frozen)),
  )
  return adapted, frozen


def prove_nnx(
  model: Any,
  args: Any,
  read: Callable[[Any], jax.Array],
  loss: Callable[[jax.Array], jax.Array],
  **adapt: Any,
):
  """`prove`, of an NNX module in whose outputs `read` finds the logits."""
  from flax import nnx as fnnx

  from qlora_jax import nnx

  adapted = nnx.adapt(model, *args, **adapt)
  graph, params, frozen = fnnx.split(adapted, fnnx.LoRAParam, ...)
  own, weights, others = fnnx.split(model, fnnx.Param, ...)
  adapters = fnnx.to_pure_dict(params)["adapters"]

  def merge(params, frozen):
    again = fnnx.clone(model)
    fnnx.merge(graph, params, frozen, copy=True).merge(again)
    return fnnx.state(again, fnnx.Param)

  prove(
    adapted.function,
    weights,
    frozen,
    params,
    adapted_paths(adapted.function, adapters),
    lambda params, frozen: read(fnnx.merge(graph, params, frozen, copy=True)(*args)),
    lambda weights: read(fnnx.merge(own, weights, others, copy=True)(*args)),
    loss,
    merge,
  )
  return adapted


def next_token_loss(logits: jax.Array) -> jax.Array:
  """Of TOKENS."""
  logits = logits[:, :-1].astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

"""Many trials in one program: their adapters stacked on an axis of trials, one base for all.

  trial     rank  targets           in the group of rank 8, on all layers
  0         8     attention, MLP    as it is
  1         2     attention         A `[K, 8]`, B `[8, N]` with six columns and rows of zeros, and
                                    an adapter of zeros, scaling 0, on each layer of the MLP

Zeros in both A and B stay zeros: the gradient of each vanishes with the other, Adam moves nothing
whose moments are 0, and weight decay has nothing to shrink. So a padded trial computes what it does
alone, but for the order in which float arithmetic adds up. A trial's numbers depend on no other
trial's: `vmap` gives each its own loss, gradient norm, clipping, optimizer and metrics, and what
is not finite in one stays in it. What they share is the base: `quantized_matmul` under `vmap`
decodes each weight once for all trials and multiplies their rows by it in one product.

Learning rates are data, a table `[trials, steps]`: trials of other rates share the program.

On an H100 the base's products run at the library's speed, and are half to two thirds of a step's
time (`experiments/bench/trial_groups.py`); the rest are the adapters' own products, of rank 16,
and passes over activations, each at memory speed. Layers in a row (`Transformer.unroll`) do without
those that copy to a loop's stacks, and round A and B once: on an H200, 1B, 32 trials of 128 tokens,
71,648 tokens a second became 79,363. Tried, without gain (H100, 8B, 8 trials of 512 tokens, 13,960
tokens a second in a loop, remat "elementwise"): all trials' adapters as one dense product with
blocks on the diagonal, 13,884; that with XLA's Triton products off, whose library products add to
what is there, 11,948; remat "none", 12,600.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax import tree_paths
from qlora_jax.models.transformer import Transformer
from qlora_jax.train import Batch, Metrics, TrainState, init_state, step_function

# `learning_rates [steps] → optimizer`: see `optimizers.make`.
MakeOptimizer = Callable[[Any], optax.GradientTransformation]
# `(states, learning_rates [trials, steps], learning [trials], frozen, batches [trials, A, B, T]) →
# (states, metrics)`
GroupStep = Callable[[TrainState, Any, Any, Any, Batch], tuple[TrainState, Metrics]]


def make_group_step(
  model: Transformer, make_optimizer: MakeOptimizer, loss_chunk: int = 1024, z_loss: float = 0.0
) -> GroupStep:
  """Builds the jitted step of a group: `train.step_function`, mapped over trials.

  It donates the states. Every leaf of states, batches and metrics has an axis of trials in front.
  A trial where `learning`, `[trials]` bool, is False keeps its state, by `where`: one that diverged
  or came to its end. The program is the same, so the others' numbers are, to the bit.

  Args:
    model: of all trials.
    make_optimizer: of a trial, from its learning rates.
    loss_chunk: tokens of a trial whose logits exist at once.
    z_loss: see `losses.cross_entropy`.
  """

  def one(
    state: TrainState, learning_rates: jax.Array, learning: jax.Array, frozen: Any, batch: Batch
  ):
    step = step_function(model, make_optimizer(learning_rates), loss_chunk, z_loss)
    new, metrics = step(state, frozen, batch)
    return jax.tree.map(functools.partial(jnp.where, learning), new, state), metrics

  return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, 0)), donate_argnums=0)


def widest(
  states: Sequence[TrainState], optimizer: optax.GradientTransformation, dtype: Any
) -> TrainState:
  """The shapes of a state into which each of `states` fits: all their adapters, the largest ranks.

  Args:
    states: of arrays or shapes.
    optimizer: of any of them; their states have one structure.
    dtype: the model's compute dtype.

  Returns:
    A TrainState of `jax.ShapeDtypeStruct`.
  """

  def union(trees: Sequence[Any]) -> Any:
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for tree in trees:
      for path, leaf in tree_paths.leaves(tree).items():
        shape = leaf.shape
        if path in found:
          shape = tuple(map(max, shape, found[path].shape))
        found[path] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    # In one order, whichever trial comes first.
    return tree_paths.nest({path: found[path] for path in sorted(found)})

  return jax.eval_shape(
    functools.partial(init_state, optimizer=optimizer, seed=0, dtype=dtype),
    union([state.params for state in states]),
    union([state.constants for state in states]),
  )


def rank(wide: TrainState) -> int:
  """The largest rank of the adapters of `wide`, from `widest`; 0 without any."""
  leaves = tree_paths.leaves(wide).items()
  return max((leaf.shape[-1] for path, leaf in leaves if path.endswith("/lora_a")), default=0)


def stack(states: Sequence[TrainState], wide: TrainState) -> TrainState:
  """The states as one, padded with zeros to the shapes of `wide`, with an axis of trials.

  Args:
    states: of arrays; read to the host, one leaf after another.
    wide: from `widest`.

  Raises:
    ValueError: a state has a leaf that `wide` lacks; the message names it.
  """
  leaves = [tree_paths.leaves(state) for state in states]
  for i, own in enumerate(leaves):
    for path in own.keys() - tree_paths.leaves(wide).keys():
      raise ValueError(f"trial {i}: {path}: none of the group's; widest() is of all its trials")

  def padded(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    values = np.zeros((len(states), *like.shape), like.dtype)
    for i, own in enumerate(leaves):
      leaf = own.get(tree_paths.path_string(path))
      if leaf is not None:
        values[(i, *map(slice, leaf.shape))] = np.asarray(leaf)
    return jnp.asarray(values)

  return jax.tree_util.tree_map_with_path(padded, wide)


def unstack(states: TrainState, index: int, like: TrainState) -> TrainState:
  """Trial `index` of a group's `states`, without the padding.

  Args:
    like: arrays or shapes of the trial alone.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  shapes = tuple((tree_paths.path_string(path), leaf.shape) for path, leaf in leaves)
  return structure.unflatten(_cut(states, index, shapes))


@functools.partial(jax.jit, static_argnums=2)
def _cut(states: Any, index: Any, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> list[Any]:
  flat = tree_paths.leaves(states)
  return [flat[path][index][tuple(map(slice, shape))] for path, shape in shapes]


def stack_batches(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
  """`[A, B, T]` arrays of each trial as `[trials, A, B, T]`."""
  return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

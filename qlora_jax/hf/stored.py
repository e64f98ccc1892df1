"""A dense base that stays in its files, for models larger than memory.

It is read a layer at a time; the token table and the head, which may be larger, each by itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import tree_paths
from qlora_jax.hf import stacks
from qlora_jax.hf.tensors import Tensors
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantized_tensor import is_quantized


class StoredArray:
  """A leaf of a base that lies in the files of a checkpoint: indexing it reads a part.

  It has an array's shape, and is no array: `x[layer]` is one, as is `x[()]`, the whole.

  Args:
    tensors: of the checkpoint.
    names: the file's tensor at each index of the leaf's leading axes.
    shape, dtype: of the leaf.
    transposed: the file has the matrices' axes the other way about.
  """

  def __init__(
    self,
    tensors: Tensors,
    names: Mapping[tuple[int, ...], str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    transposed: bool,
  ):
    self._tensors, self._names, self._transposed = tensors, names, transposed
    self.shape, self.dtype = shape, dtype

  @property
  def ndim(self) -> int:
    """How many axes it has."""
    return len(self.shape)

  @property
  def T(self) -> "StoredArray":
    """A matrix, transposed."""
    if len(self._names) != 1 or self.ndim != 2:
      raise ValueError(f"StoredArray of shape {self.shape}: only a single matrix is transposed")
    return StoredArray(
      self._tensors, self._names, self.shape[::-1], self.dtype, not self._transposed
    )

  def __getitem__(self, index: int | tuple[int, ...]) -> jax.Array:
    """The part at `index`, of leading axes.

    Raises:
      IndexError: there is none.
      ValueError: a value in the file is not finite, or the file cannot be read.
    """
    index = index if isinstance(index, tuple) else (index,)
    leading = self.shape[: len(next(iter(self._names)))]
    inside = all(0 <= i < count for i, count in zip(index, leading, strict=False))
    if len(index) > len(leading) or not inside:
      raise IndexError(f"index {index} of a StoredArray of shape {self.shape}")
    if len(index) == len(leading):
      return jnp.asarray(self._read(self._names[index]), self.dtype)
    whole = jnp.zeros(self.shape[len(index) :], self.dtype)
    for below in np.ndindex(leading[len(index) :]):
      one = jnp.asarray(self._read(self._names[index + below]), self.dtype)
      whole = stacks.write_whole(whole, one, below)
      del one  # else it would be held while the next is read
    return whole

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy  # It is one in any case.
    return np.asarray(self[()], dtype)

  def _read(self, name: str) -> np.ndarray:
    value = self._tensors.rows(name)
    finite = np.isfinite(value)
    if not finite.all():
      at = [int(i) for i in np.argwhere(~finite)[0]]
      raise ValueError(f"{self._tensors.where(name)}: the value at index {at} is not finite")
    return value.T if self._transposed else value


def logits(
  model: Transformer, frozen: Any, params: Any, constants: Any, tokens: jax.Array
) -> jax.Array:
  """What `model.apply` gives of `[B, T]` tokens; in memory is the table, a layer, or the head.

  Args:
    model: of any depth.
    frozen, params, constants: as `model.apply` takes them; leaves may be StoredArrays.
    tokens: `[B, T]` ids.

  Returns:
    `[B, T, V]` float32.
  """
  config = model.config
  trees = {"frozen": frozen, "params": params, "constants": constants}

  def variables(wanted: Callable[[str], bool], layer: int | None = None) -> dict[str, Any]:
    """The leaves whose paths are wanted; of stacks a layer, as a stack of one."""
    part = (lambda x: x[()]) if layer is None else (lambda x: x[layer][None])
    return {
      collection: tree_paths.nest(
        {
          path: jax.tree.map(part, x)
          for path, x in tree_paths.leaves(tree, is_leaf=is_quantized).items()
          if wanted(path)
        }
      )
      for collection, tree in trees.items()
    }

  def embeds(path: str) -> bool:
    return path.startswith("embed/")

  def ends(path: str) -> bool:
    return not tree_paths.is_stacked(path) and (config.tie_embeddings or not embeds(path))

  # Each waits, so that what comes next is not held beside what was read before.
  x = jax.block_until_ready(_embed(model, variables(embeds), tokens))
  for layer, kind in enumerate(config.kind_of_layer):
    one = dataclasses.replace(config, num_layers=1, layer_pattern=(config.kinds[kind],))
    own = model.clone(config=one)
    x = jax.block_until_ready(_blocks(own, variables(tree_paths.is_stacked, layer), x))
  return jax.block_until_ready(_head(model, variables(ends), x))


def _method(method: Callable) -> Callable:
  """Applies a method of the model, compiled."""

  @functools.partial(jax.jit, static_argnums=0)
  def apply(model: Transformer, variables: Any, x: jax.Array) -> Any:
    return model.apply(variables, x, method=method)

  return apply


_embed = _method(lambda model, tokens: model.embed(tokens))
_blocks = _method(lambda model, x: model.blocks(x)[0])
_head = _method(lambda model, x: model.logits(model.final_norm(x)))

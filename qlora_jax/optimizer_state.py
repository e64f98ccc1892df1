"""Adam's moments between two steps: in fewer bits, or in the host's memory.

An optimizer that is wrapped here computes in float32 as it did; what it remembers is unpacked when
a step begins and packed again when it ends, inside of the step's program:

  float32   8 bytes a trained parameter, as Optax keeps them
  bfloat16  4: the second moment rounded at random, so that the mean of many roundings is right
  8bit      2.03: blocks of 256, a QuantizedTensor each (Dettmers et al., 2021,
            https://arxiv.org/abs/2110.02861)
  host      none on the device: 8 in the host's pinned memory, copied there and back each step

Adapters are small, and so is what this saves (README, "Training at real size"). It is for ranks and
targets that are not, and for weights that are trained in full.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax import codebooks
from qlora_jax.codebooks import Codebook
from qlora_jax.quantization import dequantize, quantize

Storage = Literal["float32", "bfloat16", "8bit", "host"]

_BLOCK = 256


def stored(optimizer: optax.GradientTransformation, storage: Storage) -> Any:
  """`optimizer`, which remembers its `optax.ScaleByAdamState`s in `storage`."""
  if storage == "float32":
    return optimizer

  def pack(state: Any) -> Any:
    return _of_adam(functools.partial(_pack, storage), state)

  def init(params: Any) -> Any:
    return pack(optimizer.init(params))

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    state = _of_adam(functools.partial(_unpack, storage, updates), state)
    updates, state = optimizer.update(updates, state, params)
    return updates, pack(state)

  return optax.GradientTransformation(init, update)


def _of_adam(change: Any, state: Any) -> Any:
  def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)

  return jax.tree.map(lambda node: change(node) if is_adam(node) else node, state, is_leaf=is_adam)


def _pack(storage: Storage, state: Any) -> Any:
  if storage == "host":
    return state._replace(**_moved(state, jax.memory.Space.Host))
  if storage == "bfloat16":
    key = jax.random.fold_in(jax.random.key(0), state.count)
    leaves, structure = jax.tree.flatten(state.nu)
    keys = jax.random.split(key, len(leaves))
    nu = [_rounded_at_random(leaf, key) for leaf, key in zip(leaves, keys, strict=True)]
    mu = jax.tree.map(lambda m: m.astype(jnp.bfloat16), state.mu)
    return state._replace(mu=mu, nu=structure.unflatten(nu))
  # The root of the second moment is what an update is divided by, so it is its relative error that
  # counts; and it has half the decades.
  return state._replace(
    mu=_quantized(state.mu, _signed()),
    nu=_quantized(jax.tree.map(jnp.sqrt, state.nu), _positive()),
  )


def _unpack(storage: Storage, like: Any, state: Any) -> Any:
  if storage == "host":
    return state._replace(**_moved(state, jax.memory.Space.Device))
  if storage == "bfloat16":
    wide = functools.partial(jax.tree.map, lambda m: m.astype(jnp.float32))
    return state._replace(mu=wide(state.mu), nu=wide(state.nu))
  root = _dequantized(state.nu, like)
  return state._replace(mu=_dequantized(state.mu, like), nu=jax.tree.map(jnp.square, root))


def _moved(state: Any, space: Any) -> dict[str, Any]:
  # The count stays: a scalar of the host is a scalar on the device as well.
  return {"mu": jax.device_put(state.mu, space), "nu": jax.device_put(state.nu, space)}


def _rounded_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
  """x in bfloat16, up or down by chance, with mean x.

  To the nearest, a second moment that changes by 1 - b2 = .001 of itself would never change: a
  bfloat16 has 8 bits.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = bits + (jax.random.bits(key, x.shape, jnp.uint32) & np.uint32(0xFFFF))
  # Exact: the lower half is cut off.
  cut = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
  return cut.astype(jnp.bfloat16)


@functools.cache
def _signed() -> Codebook:
  return Codebook("dynamic8", tuple(codebooks.dynamic_map()))


@functools.cache
def _positive() -> Codebook:
  """The map's positive half, with the means of neighbours; no zero, which would be divided by."""
  half = codebooks.dynamic_map()
  half = half[half > 0]
  return Codebook("dynamic8_positive", tuple(np.sort([*half, *(half[1:] + half[:-1]) / 2])))


def _quantized(tree: Any, codebook: Codebook) -> Any:
  """All leaves as one matrix `[256, blocks]`, so that few programs are compiled."""
  parts = [
    jnp.pad(leaf.reshape(-1), (0, -leaf.size % _BLOCK)).reshape(-1, _BLOCK)
    for leaf in jax.tree.leaves(tree)
  ]
  return quantize(
    jnp.concatenate(parts).T, codebook=codebook, block_size=_BLOCK, double_quantization=False
  )


def _dequantized(packed: Any, like: Any) -> Any:
  blocks = dequantize(packed).T
  leaves, structure = jax.tree.flatten(like)
  ends = np.cumsum([-(-leaf.size // _BLOCK) for leaf in leaves])[:-1]
  parts = jnp.split(blocks, ends)
  return structure.unflatten(
    part.reshape(-1)[: leaf.size].reshape(leaf.shape)
    for part, leaf in zip(parts, leaves, strict=True)
  )

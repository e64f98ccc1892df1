"""Layers of a stack, which kernels read where they lie.

What a scan slices from a stack, XLA writes once more before a kernel reads it: on a TPU a layer's
codes into VMEM, or where that is too small into HBM; on a GPU what is small by a copy of its own,
each a launch, and codes that the dequantizing kernel reads into memory. Here a layer remembers its
stack, and a kernel reads it there by the layer's number (on a TPU by scalar prefetch); nothing
reads the slice then, and XLA drops it. On a CPU the slice is what is read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.matmul import target
from qlora_jax.quantized_tensor import QuantizedTensor, Stack


def remembers() -> bool:
  """Whether layers remember their stacks, on what is traced for."""
  return target.target()[0] in ("tpu", "gpu", "cuda")


def of(stack: QuantizedTensor, index: Any) -> Stack:
  """What a layer of it remembers: for a TPU's kernel the codes, for a GPU's all that it reads."""
  if target.target()[0] == "tpu":
    return Stack(stack.codes, index)
  return Stack(stack.codes, index, stack.scales, stack.levels, stack.zero)


def remembering(layer: Any, stack: Any, index: jax.Array | int) -> Any:
  """`layer`, which a scan sliced from `stack`, with its stack if it is packed and kernels read it.

    def step(x, layer):
      i, w = layer
      return quantized_matmul(x, remembering(w, stack, i)), None

    jax.lax.scan(step, x, (jnp.arange(L), stack))

  Args:
    layer: `[..., K, N]`; where there are further axes, `layer_of` takes them, not `vmap` or `scan`.
    stack: `[L, ..., K, N]`, which may be a layer that remembers another one.
    index: `[]` int32, within L, which nothing checks.
  """
  index = jnp.asarray(index, jnp.int32)
  if not isinstance(layer, QuantizedTensor) or not remembers():
    return layer
  if stack.stack is None:
    return dataclasses.replace(layer, stack=of(stack, index))
  index = stack.stack.index * len(stack.codes) + index
  return dataclasses.replace(layer, stack=dataclasses.replace(stack.stack, index=index))


def layer_of(stack: Any, index: jax.Array | int) -> Any:
  """Slices `layer`, and `remembering` of it. A scan that slices keeps no slice for a gradient.

  Args:
    stack: `[L, ..., K, N]`, packed or plain.
    index: `[]` int32, within L.
  """
  layer = jax.tree.map(
    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), without(stack)
  )
  return remembering(layer, stack, index)


def without(w: Any) -> Any:
  """A weight that remembers nothing: its own slice is what is read."""
  return dataclasses.replace(w, stack=None) if isinstance(w, QuantizedTensor) else w


def readable(w: QuantizedTensor) -> Stack | None:
  """The stack of a layer, where a GPU's kernels can read all of it: what is converted, is not."""
  if w.stack is None or w.stack.levels is None:
    return None
  leaves = jax.tree.leaves((w.stack.scales, w.stack.levels))
  return w.stack if all(leaf.dtype in (jnp.uint8, jnp.float32) for leaf in leaves) else None

"""quantized_matmul on a TPU: what its kernel (`tpu_tiles`) serves.

It was compiled for v5e, v5p, v6e and v7x by their compiler, and its numbers checked in interpret
mode; it has run on none of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.matmul import target
from qlora_jax.quantized_tensor import GROUP, AnyQuantizedTensor, QuantizedTensor

# Of a K that 128 does not divide: its planes are one tile.
_MOST_RAGGED = 8192
# Of a weight whose scales are written down for each of its rows, in float32.
_MOST_BY_ROW = 2**20


def unsupported(x: Any, w: AnyQuantizedTensor) -> str | None:
  """Why the kernel cannot serve the product, or None. Of x, the dtype is read."""
  if reason := target.unsupported(w, "tpu"):
    return reason
  if x.dtype == jnp.float16:
    return "x is float16; a TPU multiplies bfloat16 and float32"
  assert isinstance(w, QuantizedTensor)
  k = w.shape[0]
  if k % GROUP and k > _MOST_RAGGED:
    return f"K = {k}, which {GROUP} does not divide: at most {_MOST_RAGGED} of those"
  from qlora_jax.matmul import tpu_tiles

  if w.size > _MOST_BY_ROW and tpu_tiles.Layout.of(w, tpu_tiles.Tiles()).block == 0:
    return (
      f"K = {k} in blocks of {w.block_size}: 8 rows that are decoded together may lie in two "
      f"blocks, so each row's scales would be written down, of more than {_MOST_BY_ROW} weights"
    )
  return None


def forward(x: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., K] · [K, N] → [..., N]`, accumulated in float32, in x's dtype."""
  from qlora_jax.matmul import tpu_tiles

  return tpu_tiles.product(*_tied(x, w))


def input_gradient(g: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., N] · [K, N]ᵀ → [..., K]`, in g's dtype."""
  from qlora_jax.matmul import tpu_tiles

  return tpu_tiles.product(*_tied(g, w), transposed=True)


def _tied(x: jax.Array, w: AnyQuantizedTensor) -> tuple[jax.Array, QuantizedTensor]:
  """Both, the restoring of the scales tied to this x by a barrier: see `xla.forward`."""
  assert isinstance(w, QuantizedTensor)
  if w.stack is None:
    return jax.lax.optimization_barrier((x, w))
  # Not the codes: those of a layer that remembers its stack are a slice that XLA drops.
  x, tied = jax.lax.optimization_barrier((x, dataclasses.replace(w, codes=None, stack=None)))  # pyright: ignore[reportArgumentType]
  return x, dataclasses.replace(tied, codes=w.codes, stack=w.stack)

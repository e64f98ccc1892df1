"""quantized_matmul on a TPU: what its kernel (`tpu_tiles`) serves.

It was compiled for v5e, v5p, v6e and v7x by their compiler, and its numbers checked in interpret
mode; it has run on none of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.matmul import target
from qlora_jax.quantized_tensor import GROUP, AnyQuantizedTensor, QuantizedTensor

# Of a K that 128 does not divide: its planes are one tile.
_MOST_RAGGED = 8192


def unsupported(x: Any, w: AnyQuantizedTensor) -> str | None:
  """Why the kernel cannot serve the product, or None. Of x, the dtype is read."""
  if reason := target.unsupported(w, "tpu"):
    return reason
  if x.dtype == jnp.float16:
    return "x is float16; a TPU multiplies bfloat16 and float32"
  k = w.shape[0]
  if k % GROUP and k > _MOST_RAGGED:
    return f"K = {k}, which {GROUP} does not divide: at most {_MOST_RAGGED} of those"
  return None


def forward(x: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., K] · [K, N] → [..., N]`, accumulated in float32, in x's dtype."""
  from qlora_jax.matmul import tpu_tiles

  # The barrier ties the decoding of the scales to this x: see `xla.forward`.
  x, w = jax.lax.optimization_barrier((x, w))
  assert isinstance(w, QuantizedTensor)
  return tpu_tiles.product(x, w)


def input_gradient(g: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., N] · [K, N]ᵀ → [..., K]`, in g's dtype."""
  from qlora_jax.matmul import tpu_tiles

  g, w = jax.lax.optimization_barrier((g, w))
  assert isinstance(w, QuantizedTensor)
  return tpu_tiles.product(g, w, transposed=True)

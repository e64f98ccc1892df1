"""The definition of the op: dequantize, then dot, in plain JAX. Runs everywhere."""

import jax
import jax.numpy as jnp

from qlora_jax.matmul import stacked
from qlora_jax.quantization import decode, dequantize
from qlora_jax.quantized_tensor import (
  AnyQuantizedTensor,
  FlatQuantizedTensor,
  QuantizedTensor,
  join_rows,
  split_rows,
)


def unsupported(x: jax.Array, w: AnyQuantizedTensor) -> str | None:
  """Why this implementation cannot serve the product; None, since it always can."""
  del x, w
  return None


def forward(x: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., K] · [K, N] → [..., N]`, accumulated in float32, in x's dtype.

  x is split to match the planes of the packed weight, one product each: nothing of the
  weight's size is concatenated or interleaved.
  """
  # The barrier ties the decoding to this x. Without it XLA shares one decoded weight between
  # the forward and the backward pass, which keeps all layers' weights alive
  # (tests/matmul asserts that 8 layers hold at most 3, and fails without the barriers).
  x, w = jax.lax.optimization_barrier((x, stacked.without(w)))
  if isinstance(w, FlatQuantizedTensor):
    dense = dequantize(w, x.dtype)
    return jnp.matmul(x, dense, preferred_element_type=jnp.float32).astype(x.dtype)
  assert isinstance(w, QuantizedTensor)
  total = None
  for part, plane in zip(split_rows(x, w.bits, -1), decode(w, x.dtype), strict=True):
    product = jnp.einsum("...gk,gkn->...n", part, plane, preferred_element_type=jnp.float32)
    total = product if total is None else total + product
  assert total is not None
  return total.astype(x.dtype)


def input_gradient(g: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., N] · [K, N]ᵀ → [..., K]`: the gradient of `forward` for x, from the same packed w."""
  g, w = jax.lax.optimization_barrier((g, stacked.without(w)))
  if isinstance(w, FlatQuantizedTensor):
    dense = dequantize(w, g.dtype)
    return jnp.matmul(g, dense.T, preferred_element_type=jnp.float32).astype(g.dtype)
  assert isinstance(w, QuantizedTensor)
  parts = [
    jnp.einsum("...n,gkn->...gk", g, plane, preferred_element_type=jnp.float32).astype(g.dtype)
    for plane in decode(w, g.dtype)
  ]
  return join_rows(parts, g.ndim - 1)

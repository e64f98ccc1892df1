"""quantized_matmul: one op, its custom VJP and batching rule, the choice of implementation.

The residual of the VJP is the packed weight, so that training holds no dequantized weight
from the forward to the backward pass; the base gets no gradient. Under `vmap` over x alone
(adapters, trials) the batch folds into the rows of x, and the weight is decoded once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax import rotation
from qlora_jax.matmul import gpu, manual_axes, stacked, tpu, xla
from qlora_jax.quantized_tensor import (
  AnyQuantizedTensor,
  OutlierQuantizedTensor,
  RotatedQuantizedTensor,
  is_quantized,
)


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute the product and its input gradient.

  Attributes:
    forward: `(x [..., K], w [K, N]) → [..., N]` in x's dtype.
    input_gradient: `(g [..., N], w [K, N]) → [..., K]` in g's dtype.
    unsupported: `(x, w) →` the reason why it cannot serve them, or None.
  """

  forward: Callable[[jax.Array, AnyQuantizedTensor], jax.Array]
  input_gradient: Callable[[jax.Array, AnyQuantizedTensor], jax.Array]
  unsupported: Callable[[jax.Array, AnyQuantizedTensor], str | None]


# In the order of preference: where none is named, the first that supports the case serves it.
IMPLEMENTATIONS: dict[str, Implementation] = {
  "gpu": Implementation(gpu.forward, gpu.input_gradient, gpu.unsupported),
  "tpu": Implementation(tpu.forward, tpu.input_gradient, tpu.unsupported),
  "xla": Implementation(xla.forward, xla.input_gradient, xla.unsupported),
}


def quantized_matmul(
  x: jax.Array, w: AnyQuantizedTensor, *, implementation: str | None = None
) -> jax.Array:
  """y = x · dequantize(w), with w read packed.

  Reverse-mode differentiable in x. w gets no gradient: its cotangent is zero, scales and
  levels included.

  Args:
    x: `[..., K]`, bfloat16, float16 or float32. Products accumulate in float32; of float32 x they
      have JAX's default precision, which on a GPU is TF32, on a TPU bfloat16; but "tpu" multiplies
      them as float32 where `jax_default_matmul_precision` is not set.
    w: `[K, N]`, no leading axes: `vmap` or `scan` over a stack.
    implementation: a name in the registry ("gpu", "tpu", "xla"); None takes the first of them that
      serves the case on JAX's default device.

  Returns:
    `[..., N]` in x's dtype.

  Raises:
    TypeError: w is not a QuantizedTensor, or x not of a float dtype.
    ValueError: shapes that do not fit, an unknown implementation, or one that was named and
      cannot serve the case, with its reason.
  """
  if not is_quantized(w):
    raise TypeError(f"quantized_matmul: w is a {type(w).__name__}; a QuantizedTensor is wanted")
  x = jnp.asarray(x)
  if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise TypeError(f"quantized_matmul: x is {x.dtype}; bfloat16, float16 or float32 is wanted")
  if w.ndim != 2:
    raise ValueError(
      f"quantized_matmul: w stands for {list(w.shape)}; a matrix [K, N] is wanted, "
      "so vmap or scan over leading axes"
    )
  if x.ndim < 1 or x.shape[-1] != w.shape[0]:
    raise ValueError(
      f"quantized_matmul: x {list(x.shape)} and w {list(w.shape)}; x's last axis is w's first"
    )
  name = choose(x, w, implementation)
  return _around(name, *manual_axes.alike(x, w))


def transposed_matmul(
  g: jax.Array, w: AnyQuantizedTensor, *, implementation: str | None = None
) -> jax.Array:
  """g · dequantize(w)ᵀ, the input gradient of `quantized_matmul`, for a custom VJP around it.

  Args:
    g: `[..., N]`, of x's dtype. w: `[K, N]`, without outliers or a rotation.
    implementation: as in `quantized_matmul`.

  Returns:
    `[..., K]` in g's dtype.

  Raises:
    ValueError: see `choose`.
  """
  return _folded(IMPLEMENTATIONS[choose(g, w, implementation)].input_gradient)(g, w)


def choose(x: Any, w: AnyQuantizedTensor, name: str | None = None) -> str:
  """The implementation that takes a product: `name` if it is one. Of x, the dtype is read.

  Outliers and rotations stand around a packed weight; it is that one which is served.

  Raises:
    ValueError: no such implementation, or it cannot serve the case, with the reason.
  """
  while isinstance(w, OutlierQuantizedTensor | RotatedQuantizedTensor):
    w = w.inner
  if name is None:
    return next(name for name, each in IMPLEMENTATIONS.items() if each.unsupported(x, w) is None)
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"quantized_matmul: implementation {name!r}: not in this version; "
      f"there is {', '.join(IMPLEMENTATIONS)}"
    )
  if reason := IMPLEMENTATIONS[name].unsupported(x, w):
    raise ValueError(f"quantized_matmul: implementation {name!r} cannot serve this: {reason}")
  return name


def _around(name: str, x: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """The product of an implementation, with what stands around the packed weight."""
  if isinstance(w, OutlierQuantizedTensor):
    y = _around(name, x, w.inner)
    kept = x.at[..., w.rows].get(mode="promise_in_bounds", unique_indices=True)
    values = jax.lax.stop_gradient(w.values).astype(x.dtype)
    beside = jnp.matmul(kept, values, preferred_element_type=jnp.float32)
    return (y.astype(jnp.float32) + beside).astype(x.dtype)
  if isinstance(w, RotatedQuantizedTensor):
    return _around(name, rotation.rotate(x, w.signs), w.inner)
  return _product(name, x, w)


# In an int32.
_MOST_INDICES = 2**31


# custom_vjp outside, custom_vmap inside: the other way round has no gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(name: str, x: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  return _folded(IMPLEMENTATIONS[name].forward)(x, w)


def _product_forward(name, x, w):
  return _product(name, x, w), w


def _product_backward(name, w, g):
  return _folded(IMPLEMENTATIONS[name].input_gradient)(g, w), None


_product.defvjp(_product_forward, _product_backward)


@functools.cache
def _folded(product: Callable[[jax.Array, AnyQuantizedTensor], jax.Array]):
  """`product` with a batching rule: a batch of x alone becomes rows of one product."""
  folded = jax.custom_batching.custom_vmap(product)
  _define_batching(folded, product)
  return folded


def _define_batching(function: Any, one: Callable[..., jax.Array]) -> None:
  """A batch of the first operand alone becomes its rows; else `one` serves each of the batch.

  Args:
    function: a `custom_vmap` of x, a weight, and others.
    one: of the same operands and result.
  """

  @function.def_vmap
  def _rule(axis_size, batched, *operands):
    if not any(jax.tree.leaves(batched[1:])):
      # custom_vmap moves the batch to the front, where the product takes any leading axes.
      return function(*operands), True
    if any(jax.tree.leaves(batched[1])):
      # Weights of a batch are their own: no kernel reads several layers of a stack.
      operands = (operands[0], stacked.without(operands[1]), *operands[2:])
      batched = (batched[0], stacked.without(batched[1]), *batched[2:])
    if max(leaf.size for leaf in jax.tree.leaves(stacked.without(operands[1]))) >= _MOST_INDICES:
      # One matrix after the other: a kernel's indices could not count through the whole stack.
      def at(i):
        return one(*jax.tree.map(lambda leaf, b: leaf[i] if b else leaf, operands, tuple(batched)))

      return jax.lax.map(at, jnp.arange(axis_size)), True
    axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
    return jax.vmap(one, axes, axis_size=axis_size)(*operands), True


def fuses_adapter(
  x: jax.Array, w: AnyQuantizedTensor, rank: int, *, implementation: str | None = None
) -> bool:
  """Whether `adapted_matmul` serves x `[..., K]` and w `[K, N]`, with an adapter of that rank.

  Raises:
    ValueError: see `choose`.
  """
  return choose(x, w, implementation) == "gpu" and gpu.fuses_adapter(x, w, rank)


def adapted_matmul(
  x: jax.Array, w: AnyQuantizedTensor, a: jax.Array, b: jax.Array, scaling: jax.Array
) -> jax.Array:
  """y = x · (dequantize(w) + s · A · B), as one product in either direction.

  The adapter is added to the weight in float32 as that is decoded, before it is rounded to x's
  dtype, so that neither (x · A) · B nor its sum with x · W is a pass over y. Rounded are the weight
  and y; apart, the weight, x · A, (x · A) · B, and y twice.
  Differentiable in x, a and b.

  Args:
    x: `[..., K]`. w: `[K, N]`; what `fuses_adapter`.
    a: `[K, r]`. b: `[r, N]`. scaling: `[]`.

  Returns:
    `[..., N]` in x's dtype.

  Raises:
    ValueError: operands that it does not serve.
  """
  if not gpu.fuses_adapter(x, w, a.shape[-1]):
    raise ValueError(
      f"adapted_matmul: x {x.dtype}{list(x.shape)} and w {list(w.shape)} with an adapter of rank "
      f"{a.shape[-1]}; only what fuses_adapter says yes to"
    )
  return _adapted(*manual_axes.alike(x, w, a, b, scaling))


@jax.custom_vjp
def _adapted(x, w, a, b, scaling):
  return _adapted_rule(x, w, a, b, scaling)


def _adapted_forward(x, w, a, b, scaling):
  return _adapted(x, w, a, b, scaling), (x, w, a, b, scaling)


def _adapted_backward(residuals, g):
  x, w, a, b, scaling = residuals
  dx = _adapted_gradient_rule(g, w, a, b, scaling)
  dtype = x.dtype
  x, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
  h = jnp.matmul(x, a.astype(dtype), preferred_element_type=jnp.float32) * scaling
  dh = jnp.matmul(g_rows, b.astype(dtype).T, preferred_element_type=jnp.float32) * scaling
  da = jnp.matmul(x.T, dh.astype(dtype), preferred_element_type=jnp.float32)
  db = jnp.matmul(h.astype(dtype).T, g_rows, preferred_element_type=jnp.float32)
  return dx, None, da.astype(a.dtype), db.astype(b.dtype), None


_adapted.defvjp(_adapted_forward, _adapted_backward)


def _apart(product, x, w, a, b, scaling):
  """As an adapter's own products beside that of the weight, which is decoded once for a batch."""
  h = jnp.matmul(x, a.astype(x.dtype), preferred_element_type=jnp.float32) * scaling
  return _folded(product)(x, w) + jnp.matmul(h.astype(x.dtype), b.astype(x.dtype))


@jax.custom_batching.custom_vmap
def _adapted_rule(x, w, a, b, scaling):
  return gpu.adapted_forward(x, w, a, scaling * b)


@jax.custom_batching.custom_vmap
def _adapted_gradient_rule(g, w, a, b, scaling):
  return gpu.adapted_input_gradient(g, w, a, scaling * b)


# Adapters of their own stand apart.
_define_batching(_adapted_rule, functools.partial(_apart, gpu.forward))
_define_batching(
  _adapted_gradient_rule,
  lambda g, w, a, b, scaling: _apart(gpu.input_gradient, g, w, b.T, a.T, scaling),
)

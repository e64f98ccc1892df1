"""quantized_matmul: one op, its custom VJP and batching rule, the choice of implementation.

The residual of the VJP is the packed weight, so that training holds no dequantized weight
from the forward to the backward pass; the base gets no gradient. Under `vmap` over x alone
(adapters, trials) the batch folds into the rows of x, and the weight is decoded once.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qlora_jax.matmul import gpu, xla
from qlora_jax.quantized_tensor import AnyQuantizedTensor, is_quantized


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
      have JAX's default precision, which on a GPU is TF32.
    w: `[K, N]`, no leading axes: `vmap` or `scan` over a stack.
    implementation: a name in the registry ("gpu", "xla"); None takes the first of them that
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
  return _product(_choose(x, w, implementation), x, w)


def _choose(x: jax.Array, w: AnyQuantizedTensor, name: str | None) -> str:
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

  @folded.def_vmap
  def _rule(axis_size, batched, x, w):
    x_batched, w_batched = batched
    if not any(jax.tree.leaves(w_batched)):
      # custom_vmap moves the batch to the front, where the product takes any leading axes.
      return folded(x, w), True
    if max(leaf.size for leaf in jax.tree.leaves(w)) >= _MOST_INDICES:
      # One matrix after the other: a kernel's indices could not count through the whole stack.
      def one(i):
        part = jax.tree.map(lambda leaf, b: leaf[i] if b else leaf, (x, w), tuple(batched))
        return product(*part)

      return jax.lax.map(one, jnp.arange(axis_size)), True
    axes = (0 if x_batched else None, jax.tree.map(lambda b: 0 if b else None, w_batched))
    return jax.vmap(product, axes, axis_size=axis_size)(x, w), True

  return folded

"""Random Hadamard rotations of a contraction axis, which spread outliers over their neighbours.

`x · W = (x · R) · (Rᵀ · W)` for any orthogonal R. With R = D · H, random signs times a Hadamard
matrix, a weight that stands out becomes a small part of each of many, so that a block's largest
magnitude is near what it is of normal weights. The input is rotated as it is read, by a few
additions a value, and the packed weight has no larger codes.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Factors of a Hadamard matrix are products of this many values: matrices that a device multiplies
# by well.
_MOST_FACTOR = 128


def hadamard_size(k: int) -> int:
  """The largest power of two that divides k: so many neighbours are rotated together."""
  return k & -k


def random_signs(seed: int, k: int) -> jax.Array:
  """`[k]` int8, ±1. All weights of one K have the same, so that those of one input share it."""
  return jax.random.rademacher(jax.random.key(seed), (k,), jnp.int8)


def rotate(x: jax.Array, signs: jax.Array, axis: int = -1) -> jax.Array:
  """(x · signs) · H along an axis: what a packed weight was rotated by, done to its input.

  H is block-diagonal, of Hadamard matrices of `hadamard_size(K)`, each divided by its root.

  Args:
    x: `[..., K, ...]`, any float dtype.
    signs: `[K]`.

  References:
    Ashkboos et al., QuaRot, 2024, https://arxiv.org/abs/2404.00456, section 3;
    Tseng et al., QuIP#, 2024, https://arxiv.org/abs/2402.04396, section 3.
  """
  x = jnp.moveaxis(x, axis, -1)
  x = x * jax.lax.broadcast_in_dim(signs.astype(x.dtype), x.shape, (x.ndim - 1,))
  return jnp.moveaxis(_hadamard(x), -1, axis)


def rotate_back(x: jax.Array, signs: jax.Array, axis: int = -1) -> jax.Array:
  """The inverse of `rotate`, up to rounding: (x · H) · signs."""
  x = _hadamard(jnp.moveaxis(x, axis, -1))
  x = x * jax.lax.broadcast_in_dim(signs.astype(x.dtype), x.shape, (x.ndim - 1,))
  return jnp.moveaxis(x, -1, axis)


def _hadamard(x: jax.Array) -> jax.Array:
  """`[..., K]`: each run of `hadamard_size(K)` times H, in x's dtype."""
  k = x.shape[-1]
  size = hadamard_size(k)
  factors = []
  while size > 1:
    factors.append(min(size, _MOST_FACTOR))
    size //= factors[-1]
  # H of a · b is the Kronecker product of H of a and H of b.
  y = x.reshape(*x.shape[:-1], -1, *factors)
  for i, factor in enumerate(factors):
    axis = y.ndim - len(factors) + i
    h = jnp.asarray(_sylvester(factor), x.dtype)
    y = jax.lax.dot_general(
      y,
      h,
      (((axis,), (0,)), ((), ())),
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )
    y = jnp.moveaxis(y * np.float32(factor**-0.5), -1, axis).astype(x.dtype)
  return y.reshape(x.shape)


def _sylvester(size: int) -> np.ndarray:
  """`[size, size]` of ±1, size a power of two."""
  h = np.ones((1, 1))
  while len(h) < size:
    h = np.block([[h, h], [h, -h]])
  return h

"""The largest singular values of a matrix and their vectors, without its whole decomposition.

A random sketch of the row space, wide as twice the rank, is turned towards the leading singular
vectors by subspace iteration, each step orthonormalized; the small matrix that is left is
decomposed in full. Products, QR of tall matrices and one small SVD: all fast on an accelerator.
"""

import functools

import jax
import jax.numpy as jnp

# A flat spectrum is the hard case (tests/test_lora_init.py bounds what is lost of one): more steps
# help, and so do more vectors to spare.
STEPS = 8
_LEAST_SPARE = 16


@functools.partial(jax.jit, static_argnames=("rank", "steps"))
def truncated_svd(
  w: jax.Array, rank: int, key: jax.Array, steps: int | None = STEPS
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """W ≈ U · diag(S) · Vᵀ, of the `rank` largest singular values.

  Exact (to float32) where twice the rank, and no fewer than 16 vectors more than it, span W.

  Args:
    w: `[K, N]`; computed in float32.
    rank: at most min(K, N).
    key: of the sketch.
    steps: subspace iterations; None decomposes W in full instead.

  Returns:
    U `[K, rank]`, S `[rank]` descending, V `[N, rank]`, float32. Signs are arbitrary.

  References:
    Halko, Martinsson, Tropp, Finding structure with randomness, 2011,
    https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1.
  """
  w = w.astype(jnp.float32)
  k, n = w.shape
  if steps is None:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T
  width = min(rank + max(rank, _LEAST_SPARE), k, n)
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

  def turn(_, v):
    u, _ = jnp.linalg.qr(product(w, v))
    v, _ = jnp.linalg.qr(product(w.T, u))
    return v

  v = jax.lax.fori_loop(0, steps, turn, jax.random.normal(key, (n, width), jnp.float32))
  left, _ = jnp.linalg.qr(product(w, v))
  # Wᵀ · left = right · R, so that W ≈ left · Rᵀ · rightᵀ.
  right, r = jnp.linalg.qr(product(w.T, left))
  u, s, vt = jnp.linalg.svd(r.T)
  return product(left, u)[:, :rank], s[:rank], product(right, vt.T)[:, :rank]

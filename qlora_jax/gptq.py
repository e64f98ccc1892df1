"""GPTQ: rounding that makes up for its own errors along K, by the inputs' second moments.

Rounding to nearest makes the error of each weight small. What a layer's output sees is
‖X · (Ŵ − W)‖², in which errors of inputs that go together add up or cancel: with H = Xᵀ · X, that
is tr((Ŵ − W)ᵀ · H · (Ŵ − W)). GPTQ rounds K row after row, and adds to the rows that are still to
come what makes up best for the error so far.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import rotation, tree_paths
from qlora_jax.quantization import count_below, reciprocal
from qlora_jax.quantized_tensor import (
  GROUP,
  AnyQuantizedTensor,
  QuantizedTensor,
  RotatedQuantizedTensor,
  is_quantized,
  pack,
  restore_scales,
)


def feed_back_errors(
  w: jax.Array, packed: AnyQuantizedTensor, moments: jax.Array, *, damping: float = 0.01
) -> AnyQuantizedTensor:
  """The codes of `packed` chosen again, to lower tr((Ŵ − W)ᵀ · H · (Ŵ − W)).

  With U the upper Cholesky factor of (H + λ)⁻¹, row k of the residual R (W at first) is rounded to
  q, and R[j] −= U[k, j] / U[k, k] · (R[k] − q) for j > k. Scales, zero-points and levels stay what
  they are ("static groups", in GPTQ's code), so that every codebook and scale format is served.

  Args:
    w: `[..., K, N]`, what `packed` stands for.
    packed: of `quantize`, or with a rotation around it (`quantize_by`).
    moments: H, `[..., K, K]`: Σ x · xᵀ (`calibration.second_moments`), or a multiple.
    damping: λ as a share of the mean of H's diagonal.

  Raises:
    ValueError: shapes that do not fit; moments that are not finite, or of which no Cholesky factor
      is found; damping that is not above 0; outliers, or blocks that cross from row to row.

  References:
    Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323, algorithm 1.
  """
  if not isinstance(packed, QuantizedTensor | RotatedQuantizedTensor):
    raise ValueError(
      f"feed_back_errors: a {type(packed).__name__}; rows of one grid, packed or rotated and packed"
    )
  k = w.shape[-2]
  if packed.shape != w.shape:
    raise ValueError(f"feed_back_errors: w {list(w.shape)} for a packed {list(packed.shape)}")
  if moments.shape != (*w.shape[:-1], k):
    raise ValueError(f"feed_back_errors: moments {list(moments.shape)} for w {list(w.shape)}")
  if not damping > 0:
    raise ValueError(f"damping: {damping}; above 0, since inputs may be fewer than K")
  found, good = _feed_back(w, packed, moments, np.float32(damping))
  if not bool(good):
    raise ValueError("feed_back_errors: no Cholesky factor of the moments; raise damping")
  return found


def feed_back_tree(
  dense: Any, frozen: Any, moments: Mapping[str, Any], *, damping: float = 0.01
) -> Any:
  """`feed_back_errors` of every weight whose moments are given.

  Args:
    dense: the tree before it was quantized.
    frozen: `quantize_tree` of it.
    moments: path of the weight → `[..., K, K]`, as `calibration.second_moments` gives them.

  Returns:
    `frozen` with other codes.

  Raises:
    ValueError: moments of what is not packed; see `feed_back_errors`. The message names the path.
  """
  packed = tree_paths.leaves(frozen, is_leaf=is_quantized)
  for path in moments:
    if path not in packed or not is_quantized(packed[path]):
      raise ValueError(f"feed_back_tree: {path}: moments of no packed weight")
  originals = tree_paths.leaves(dense)

  def treat(path, leaf):
    path = tree_paths.path_string(path)
    if path not in moments:
      return leaf
    try:
      h = jnp.asarray(moments[path])
      return feed_back_errors(jnp.asarray(originals[path]), leaf, h, damping=damping)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None

  return jax.tree_util.tree_map_with_path(treat, frozen, is_leaf=is_quantized)


@jax.jit
def _feed_back(w, packed, moments, damping):
  def matrix(w, packed, h):
    return _feed_back_matrix(w.astype(jnp.float32), packed, h.astype(jnp.float32), damping)

  for _ in range(w.ndim - 2):
    matrix = jax.vmap(matrix)
  found, good = matrix(w, packed, moments)
  return found, good.all()


def _feed_back_matrix(w, packed, h, damping):
  if isinstance(packed, RotatedQuantizedTensor):
    w = rotation.rotate(w, packed.signs, 0)
    h = rotation.rotate(rotation.rotate(h, packed.signs, 0), packed.signs, 1)
    inner, good = _feed_back_matrix(w, packed.inner, h, damping)
    return dataclasses.replace(packed, inner=inner), good
  u, good = _upper_factor(h, damping)
  codes, _ = pack(_codes(w, packed, u), packed.bits)
  return dataclasses.replace(packed, codes=codes), good


def _codes(w: jax.Array, packed: QuantizedTensor, u: jax.Array) -> jax.Array:
  """`[K, N]` uint8 by algorithm 1: rows in groups, so that most of the work is products."""
  k, n = w.shape
  step = GROUP if k % GROUP == 0 else k
  scales = restore_scales(packed.scales)
  table = packed.levels.astype(jnp.float32)
  # [2**bits, 1 or N]
  table = table.T if packed.column_tables else table[:, None]
  # A short table is filled up with its last level, whose own code is the lower one.
  filler = (table[1:] == table[:-1]) & (table[1:] != 0)
  thresholds = jnp.where(filler, jnp.inf, (table[1:] + table[:-1]) * np.float32(0.5))

  def round_row(row, index):
    block = index // packed.block_size
    scale = jax.lax.dynamic_index_in_dim(scales, block)[0]
    zero = jnp.float32(0)
    if packed.zero is not None:
      zero = jax.lax.dynamic_index_in_dim(packed.zero, block)[0].astype(jnp.float32)
    code = count_below(row * reciprocal(scale) + zero, thresholds)
    level = jnp.take_along_axis(jnp.broadcast_to(table, (len(table), n)), code[None], 0)[0]
    return code, (level - zero) * scale

  def group(i, carry):
    residual, codes = carry
    start = i * step
    own = jax.lax.dynamic_slice_in_dim(residual, start, step)
    u_rows = jax.lax.dynamic_slice_in_dim(u, start, step)
    u_own = jax.lax.dynamic_slice_in_dim(u_rows, start, step, axis=1)

    def row(j, carry):
      own, errors, codes = carry
      code, value = round_row(own[j], start + j)
      error = (own[j] - value) / u_own[j, j]
      own = own - u_own[j][:, None] * error[None]
      return own, errors.at[j].set(error), codes.at[start + j].set(code)

    _, errors, codes = jax.lax.fori_loop(0, step, row, (own, jnp.zeros_like(own), codes))
    product = jnp.matmul(u_rows.T, errors, precision=jax.lax.Precision.HIGHEST)
    return residual - product, codes

  start = (w, jnp.zeros(w.shape, jnp.uint8))
  return jax.lax.fori_loop(0, k // step, group, start)[1]


def damped(h: jax.Array, damping: Any) -> jax.Array:
  """H + λ of inputs' second moment `[K, K]`, in units of the mean of its diagonal.

  Inputs that are all zero leave λ: rounding to nearest, the SVD of a weight's own error.
  """
  mean = jnp.trace(h) / len(h)
  return h / jnp.where(mean > 0, mean, 1) + damping * jnp.eye(len(h))


def _upper_factor(h: jax.Array, damping: Any) -> tuple[jax.Array, jax.Array]:
  """U with Uᵀ · U = (H + λ)⁻¹, and whether there is one."""
  lower = jnp.linalg.cholesky(damped(h, damping))
  inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(len(h)))
  u = jnp.linalg.cholesky(inverse).T
  return u, jnp.isfinite(u).all()

"""Rows of a packed matrix, without the rest: what a token table that is packed is read by."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.quantized_tensor import (
  QuantizedTensor,
  look_up,
  plane_rows,
  planes,
  restore_scales,
)


def take_rows(w: QuantizedTensor, ids: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """`dequantize(w, dtype)[ids]`, reading those rows' codes.

  Args:
    w: `[K, N]`; of a token table, K is the vocabulary, so that a scale is of neighbouring tokens.
    ids: `[...]`, in range.

  Returns:
    `[..., N]`.

  Raises:
    ValueError: a form whose rows are not read alone: 3-bit codes, zero-points, tables a column, or
      what stands around a QuantizedTensor.
  """
  if not isinstance(w, QuantizedTensor) or w.bits == 3 or w.zero is not None or w.column_tables:
    raise ValueError(
      "a packed table: rows are looked up in plain codes of 2, 4 or 8 bits, without zero-points, "
      "tables a column, outliers or rotation; quantize it by such a codebook, or leave it"
    )
  count, (_, full, _) = planes(w.bits), plane_rows(w.shape[0], w.bits)
  group, inside = jnp.divmod(ids, np.int32(count * full))
  plane, row = jnp.divmod(inside, np.int32(full))
  packed = jnp.take(w.codes, group * np.int32(full) + row, axis=0)
  shift = (plane * np.int32(w.bits)).astype(jnp.uint8)[..., None]
  codes = (packed >> shift) & np.uint8(2**w.bits - 1)
  scales = jnp.take(restore_scales(w.scales), ids // np.int32(w.block_size), axis=0)
  return (look_up(w.levels.astype(jnp.float32), codes) * scales).astype(dtype)

"""The dequantized weight on a GPU, written once at the speed of memory, for the library's product.

With many rows the product is bound by arithmetic, and the library's is the fastest there is: what
counts is that the weight is decoded into one array in its own order, with no pass over it after
that. On Pallas' Triton route, which serves every GPU that Triton does; JAX has it deprecated since
0.11.0, and still in 0.12.0.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from qlora_jax import codebooks
from qlora_jax.matmul import manual_axes, stacked
from qlora_jax.quantized_tensor import (
  GROUP,
  NestedScales,
  QuantizedTensor,
  Stack,
  plane_rows,
  restore_scales,
)

# Of a plane, in a tile: of fewer, warps are idle.
_LEAST_ROWS = 16
# Of an adapter.
_MOST_RANK = 64


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How the work is cut.

  Attributes:
    rows: of a plane, at most; columns: of the weight. Powers of 2.
    warps: of a program.
  """

  rows: int = 16
  columns: int = 256
  warps: int = 4


def _tile_rows(w: QuantizedTensor, tiles: Tiles) -> tuple[int, bool]:
  """Rows of a tile, and whether they share a block of scales."""
  k = w.shape[0]
  rows = math.gcd(min(tiles.rows, plane_rows(k, w.bits)[1]), w.block_size)
  uniform = k % GROUP == 0 and rows >= _LEAST_ROWS
  return (rows if uniform else _LEAST_ROWS), uniform


def takes_adapter(w: QuantizedTensor, rank: int, tiles: Tiles = Tiles()) -> bool:
  """Whether `dequantize` can add an adapter of that rank to `w` as it writes it."""
  # More than that does not fit in the registers beside the codes.
  whole = _tile_rows(w, tiles)[1] and w.shape[1] % tiles.columns == 0
  return whole and _padded_rank(rank) <= _MOST_RANK


def _padded_rank(rank: int) -> int:
  return max(16, 1 << (rank - 1).bit_length())


def readable_stack(w: QuantizedTensor) -> Stack | None:
  """The stack that `dequantize` reads a layer from, if any."""
  stack = stacked.readable(w)
  if stack is None:
    return None
  leaves = jax.tree.leaves((stack.codes, stack.scales, stack.levels, stack.zero))
  return stack if all(map(_countable, leaves)) else None


def _countable(x: jax.Array) -> bool:
  # Pallas' Triton route counts in 64 bits what has over 2³² bytes, all else in 32, with a sign.
  return not (x.dtype.itemsize == 1 and 1 << 31 < x.size <= 1 << 32)


def dequantize(
  w: QuantizedTensor,
  dtype: DTypeLike,
  tiles: Tiles = Tiles(),
  *,
  adapter: tuple[jax.Array, jax.Array] | None = None,
  interpret: bool = False,
) -> jax.Array:
  """`[K, N]`, bit for bit what `quantization.dequantize` gives, or that plus an adapter.

  Args:
    adapter: `[K, r]` and `[r, N]`, multiplied in `dtype`, 16 bits, and added in float32, before the
      one rounding; what `takes_adapter`.
  """
  k, n = w.shape
  groups, full, _ = plane_rows(k, w.bits)
  rows, uniform = _tile_rows(w, tiles)
  # Those of a layer's stack, where it can be read: `[L, …]`, else of a stack of one.
  stack = readable_stack(w)
  whole: Any = w if stack is None else stack
  number = jnp.zeros(1, jnp.int32) if stack is None else stack.index.reshape(1)

  def by_layer(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape(-1, *x.shape[x.ndim - ndim :])

  operands: list[Any] = [
    number,
    by_layer(whole.codes, 2),
    whole.levels.astype(jnp.float32).reshape(-1),
  ]
  nested_block_size = None
  scales = whole.scales
  if isinstance(scales, NestedScales):
    nested_block_size = scales.block_size
    absmax, offset = scales.absmax.astype(jnp.float32), scales.offset.astype(jnp.float32)
    operands += [by_layer(scales.codes, 2), absmax.reshape(-1), offset.reshape(-1)]
    operands.append(jnp.asarray(codebooks.dynamic_map()))
  else:
    operands.append(by_layer(restore_scales(scales), 2))
  if whole.zero is not None:
    operands.append(by_layer(whole.zero, 2))
  if adapter is not None:
    # Triton's products are of powers of 2, at least 16.
    a, b = adapter
    missing = _padded_rank(a.shape[1]) - a.shape[1]
    operands.append(jnp.pad(a.astype(dtype), ((0, 0), (0, missing))))
    operands.append(jnp.pad(b.astype(dtype), ((0, missing), (0, 0))))
  operands = manual_axes.alike(*operands)
  manual: Any = {"manual_axis_type": jax.typeof(operands[0]).manual_axis_type}
  return pl.pallas_call(
    functools.partial(
      _kernel,
      rows=rows,
      columns=tiles.columns,
      bits=w.bits,
      block_size=w.block_size,
      nested_block_size=nested_block_size,
      has_zero=w.zero is not None,
      has_adapter=adapter is not None,
      uniform=uniform,
    ),
    out_shape=jax.ShapeDtypeStruct((k, n), dtype, **manual),
    grid=(groups * pl.cdiv(full, rows), pl.cdiv(n, tiles.columns)),
    compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
    interpret=interpret,
    name="dequantize",
  )(*operands)


def _kernel(
  number,
  codes,
  levels,
  *refs,
  rows,
  columns,
  bits,
  block_size,
  nested_block_size,
  has_zero,
  has_adapter,
  uniform,
) -> None:
  *scales, out = refs
  b, a = (scales.pop(), scales.pop()) if has_adapter else (None, None)
  zero = scales.pop() if has_zero else None
  k, n = out.shape
  _, full, sizes = plane_rows(k, bits)
  tiles = pl.cdiv(full, rows)
  group, within = pl.program_id(0) // tiles, pl.program_id(0) % tiles * rows
  start = pl.program_id(1) * columns
  # Of whole tiles by slices, their scales as vectors: as rows of a matrix, Triton took 10% longer
  # on an H100.
  whole = uniform and n % columns == 0
  column = start + (jnp.arange(columns) if whole else jnp.arange(columns)[None])
  inside = column < n if n % columns else None

  layer = number[0]
  first_level = layer * np.int32(levels.shape[0] // codes.shape[0])

  def tile(ref, first, *leading):
    """`[rows, columns]` from a row on."""
    if whole:
      return ref.at[*leading, pl.ds(first, rows), pl.ds(start, columns)]
    row = first + jnp.arange(rows)[:, None]
    return ref.at[tuple(jnp.broadcast_arrays(*leading, row, column))]

  def of_block(ref, block, mask):
    """A block's row, or, where rows differ in theirs, `[rows, columns]`."""
    if whole:
      return triton.load(ref.at[layer, block, pl.ds(start, columns)])
    index = jnp.broadcast_arrays(layer, block, column)
    return triton.load(ref.at[tuple(index)], **masked(mask, index[0].shape))

  def masked(mask, shape):
    return {} if mask is None else {"mask": jnp.broadcast_to(mask, shape), "other": 0}

  def by_rows(x):
    return x[None] if whole else x

  def rows_below(limit):
    """The mask of a plane's rows in a tile, with that of the columns."""
    if limit == full and full % rows == 0:
      return inside
    below = within + jnp.arange(rows)[:, None] < limit
    return below if inside is None else below & inside

  def restore(block, mask):
    if nested_block_size is None:
      return of_block(scales[0], block, mask).astype(jnp.float32)
    quantized, absmax, offset, dynamic_map = scales
    # The flat index of bitsandbytes' order, [out, in].
    layers, blocks, _ = quantized.shape
    flat = (column * np.int32(blocks) + block) // np.int32(nested_block_size)
    flat += layer * np.int32(absmax.shape[0] // layers)
    largest = triton.load(absmax.at[flat], **masked(mask, flat.shape))
    code = of_block(quantized, block, mask).astype(jnp.int32)
    product = triton.load(dynamic_map.at[code]) * largest
    # As `restore_scales`: two roundings.
    return jnp.where(code == 127, 0.0, product) + offset[layer]

  def run(part, parts):
    ref = tile(codes, (group * parts + part) * full + within, layer)
    return triton.load(ref, **masked(rows_below(full), (rows, columns))).astype(jnp.uint32)

  if bits == 3:
    low, middle, high = (run(part, 3) for part in range(3))
    word = low | middle << np.uint32(8) | high << np.uint32(16)
  else:
    word = run(0, 1)
  own_b: Any = None if b is None else triton.load(b.at[:, pl.ds(start, columns)])
  for plane, size in enumerate(sizes):
    first = group * GROUP + plane * full + within
    mask = rows_below(size)
    if whole:
      block, block_mask = first // block_size, None
    elif uniform:
      block, block_mask = jnp.full((1, 1), first // block_size, jnp.int32), inside
    else:
      block, block_mask = (first + jnp.arange(rows)[:, None]) // np.int32(block_size), mask
    code = (word >> np.uint32(bits * plane)) & np.uint32(2**bits - 1)
    value = triton.load(levels.at[first_level + code.astype(jnp.int32)])
    if zero is not None:
      value = value - by_rows(of_block(zero, block, block_mask).astype(jnp.float32))
    value = value * by_rows(restore(block, block_mask))
    if a is not None:
      own_a = triton.load(a.at[pl.ds(first, rows), :])
      value += jnp.dot(own_a, own_b, preferred_element_type=jnp.float32)
    value = value.astype(out.dtype)
    if mask is None:
      triton.store(tile(out, first), value)
    else:
      triton.store(tile(out, first), value, mask=jnp.broadcast_to(mask, value.shape))

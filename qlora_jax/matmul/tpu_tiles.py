"""The packed product on a TPU: tiles of codes, decoded in VMEM, straight into the matrix unit.

A grid step holds a tile of codes, which the pipeline fetched while the step before it computed;
decodes it into a `[k, n]` tile of x's dtype; and multiplies all the rows of x that fit by it. No
dequantized weight is written to HBM. The input gradient decodes the same tiles, and contracts n.
Of a layer that remembers its stack (`stacked`), the pipeline fetches the tiles from the stack.

Two units share the decode. By sublane: a table of 16 levels lies along the 8 sublanes of two
registers, the low three bits of a code pick a sublane in each, and the fourth chooses; that is the
vector unit's work, and of all ways alone takes the fewest bundles of the compiler's schedule, on
every generation (`python -m experiments.bench.tpu_compile --parts decodes` counts them). By lane:
the levels lie along one register's lanes, and the permute unit, idle else, picks. Every fourth
strip of 8 rows goes by lane: with 16 rows of x a step takes 2.57 bundles for 1,024 weights on v5e
in place of 2.72, 2.28 on v6e and 2.27 on TPU7x in place of 2.56. More of them take more, the
permutes' results being waited for, and so do fewer (`--parts strips`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlora_jax import codebooks
from qlora_jax.matmul import manual_axes, stacked
from qlora_jax.quantized_tensor import (
  GROUP,
  NestedScales,
  QuantizedTensor,
  plane_rows,
  planes,
  restore_scales,
  split_rows,
)

# Of a 32-bit register.
_SUBLANES, _LANES = 8, 128
# Rows of a tile of bytes.
_BYTE_ROWS = 32
# Rows of K that are multiplied as soon as they are decoded: the depth of the largest matrix unit.
_CHUNK = 256
# Every which strip of 16-level codes is looked up by lane: see the counts above.
BY_LANE = 4
# Of VMEM a kernel may take, by libtpu's leave on each generation.
_VMEM_LIMIT = 48 << 20


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How the work is cut, at most. The last tile of an axis may hold less.

  Attributes:
    rows: of x, or of the output's gradient, that a decoded tile is multiplied by.
    k, n: rows and columns of W.
  """

  rows: int = 1024
  k: int = 1024
  n: int = 1024


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the kernel sees a weight.

  Attributes:
    bits: of a code.
    plane: rows of a plane.
    ragged: whether 128 does not divide K: it is one group then, its planes padded, and one tile.
    k, n: of a tile, of which the last may hold fewer; rows: of x, at most.
    block: rows of K that share a scale, which is written down again for each block of so many
      where those of the weight do not fall on tiles; 0 where each row has its own.
    nested: whether scales come as codes, absmax, offset and map.
    has_zero: whether zero-points come after them.
  """

  bits: int
  plane: int
  ragged: bool
  k: int
  n: int
  rows: int
  block: int
  nested: bool
  has_zero: bool

  @classmethod
  def of(cls, w: QuantizedTensor, tiles: Tiles) -> "Layout":
    """Of a matrix, in tiles of at most these sizes."""
    k, n = w.shape
    ragged = k % GROUP != 0
    _, byte_rows, sizes = plane_rows(k, w.bits)
    plane = -(-byte_rows // _BYTE_ROWS) * _BYTE_ROWS if ragged else 0
    # Else a strip of 8 rows may lie in two blocks, and each row has its scale written beside it.
    in_one_block = not any(size % _SUBLANES for size in (w.block_size, *sizes))
    block, nested = 0, False
    if ragged:
      tile_k = planes(w.bits) * plane
      block = _SUBLANES if in_one_block else 0
    else:
      # Mosaic moves whole tiles of bytes, which an odd number of groups of 3 bits is not, or all.
      cuts = cuts_of(k, tiles.k)
      cuts = [each for each in cuts if each == k or not each * w.bits // 8 % _BYTE_ROWS] or cuts
      # Whole blocks in a tile, or whole tiles in a block.
      whole = [each for each in cuts if in_one_block and not _remainder(each, w.block_size)]
      if in_one_block:
        block = w.block_size if whole else math.gcd(w.block_size, GROUP)
      if isinstance(w.scales, NestedScales):
        # The same of a run of absmax; else the scales are restored ahead of the kernel.
        run = _run(w.scales)
        runs = [each for each in whole if not _remainder(max(1, each // block), run)]
        nested, whole = bool(runs), runs or whole
      tile_k = (whole or cuts)[0]
    # A ragged K may be longer than a tile: less of the others then.
    longer = -(-tile_k // tiles.k)
    return cls(
      bits=w.bits,
      plane=plane if ragged else GROUP // planes(w.bits),
      ragged=ragged,
      k=tile_k,
      n=cuts_of(n, tiles.n // longer)[0],
      rows=max(_BYTE_ROWS, tiles.rows // longer // _BYTE_ROWS * _BYTE_ROWS),
      block=block,
      nested=nested,
      has_zero=w.zero is not None,
    )

  @property
  def group(self) -> int:
    """Rows of a group of planes."""
    return self.plane * planes(self.bits)

  @property
  def byte_rows(self) -> int:
    """Of a tile of codes."""
    return self.k * self.bits // 8

  @property
  def scale_rows(self) -> int:
    """Of a tile."""
    return self.k if self.block == 0 else max(1, self.k // self.block)


def cuts_of(size: int, most: int) -> list[int]:
  """Tiles of whole registers that an axis can be cut into, of at most so much; the best first.

  By a guess: a tile costs what it holds, of the axis or not, and a register's width more. (Of 256
  columns a step took a quarter to a third more bundles for as many weights than of 1,024.)
  """
  widths = range(_LANES, max(min(most, size + -size % _LANES), _LANES) + 1, _LANES)
  return sorted(widths, key=lambda width: (-(-size // width) * (width + _LANES), -width))


def _remainder(a: int, b: int) -> int:
  """Of the larger by the smaller."""
  return max(a, b) % min(a, b)


def product(
  x: jax.Array,
  w: QuantizedTensor,
  tiles: Tiles = Tiles(),
  *,
  transposed: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """`[..., K] · [K, N] → [..., N]`, or `[..., N] · [K, N]ᵀ → [..., K]`, in x's dtype.

  Args:
    x: bfloat16 or float32, of any leading axes. Products of float32 are of full precision, unless
      `jax_default_matmul_precision` says otherwise.
    w: of one table; what `tpu.unsupported` says nothing of.
    tiles: the largest.
    transposed: whether x `[..., N]` is multiplied by the transpose.
    interpret: run the kernel's program as JAX, on any device.
  """
  k, n = w.shape
  rows = x.reshape(-1, x.shape[-1])
  if not len(rows):
    return jnp.zeros((*x.shape[:-1], k if transposed else n), x.dtype)
  layout = Layout.of(w, tiles)
  rows = jnp.pad(rows, ((0, 0), (0, -n % _LANES))) if transposed else _split_planes(rows, w, layout)
  if w.stack is not None and layout.ragged:
    # The codes are padded ahead of the kernel: those of this layer alone.
    w = stacked.without(w)
  operands = _operands(w, layout)
  # Each pass over the weight takes as many rows, in whole registers.
  passes = pl.cdiv(len(rows), layout.rows)
  m = pl.cdiv(len(rows), passes)
  m += -m % _BYTE_ROWS if passes > 1 else 0
  # Of the result, and of what is summed over: the whole and a tile.
  (kept, kept_tile), (summed, summed_tile) = (n, layout.n), (_padded(k, layout), layout.k)
  if transposed:
    (kept, kept_tile), (summed, summed_tile) = (summed, summed_tile), (kept, kept_tile)
  grid = (passes, pl.cdiv(kept, kept_tile), pl.cdiv(summed, summed_tile))
  # Of the last tile of it only what there is: beyond that lies anything, also what is no number.
  last = rows.shape[1] - (grid[2] - 1) * summed_tile

  def place(index):
    return lambda i, kept, summed, layer: index(
      *((kept, summed) if transposed else (summed, kept)), layer[0]
    )

  layer = jnp.zeros(1, jnp.int32) if w.stack is None else w.stack.index.reshape(1)
  layer, *arrays = manual_axes.alike(layer, rows, *(operand.array for operand in operands))
  # Of a stack, one layer's codes.
  moved = (w.codes, *arrays[2:])
  manual: Any = {"manual_axis_type": jax.typeof(arrays[0]).manual_axis_type}
  y = pl.pallas_call(
    functools.partial(_kernel, layout=layout, transposed=transposed, last=last),
    out_shape=jax.ShapeDtypeStruct((len(rows), kept), x.dtype, **manual),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=[
        pl.BlockSpec((m, summed_tile), lambda i, kept, summed, layer: (i, summed)),
        *(pl.BlockSpec(each.block, place(each.index)) for each in operands),
      ],
      out_specs=pl.BlockSpec((m, kept_tile), lambda i, kept, summed, layer: (i, kept)),
      scratch_shapes=[pltpu.VMEM((m, kept_tile), jnp.float32)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=_VMEM_LIMIT,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * len(rows) * kept * summed,
      # x again for each tile of the result, the weight for each pass; not what stays in VMEM.
      bytes_accessed=rows.nbytes * (grid[1] if grid[2] > 1 else 1)
      + sum(array.nbytes for array in moved) * (passes if grid[1] * grid[2] > 1 else 1)
      + len(rows) * kept * x.dtype.itemsize,
      transcendentals=0,
    ),
    interpret=interpret,
    name="quantized_matmul_gradient" if transposed else "quantized_matmul",
  )(layer, *arrays)
  if transposed:
    y = _join_planes(y, w, layout)
  return y.reshape(*x.shape[:-1], y.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Operand:
  """What the kernel reads, and the block of it that a tile of the weight needs.

  Attributes:
    block: its shape.
    index: `(tile of K, tile of N, layer of a stack) →` where it is, in blocks.
  """

  array: jax.Array
  block: Any
  index: Any


def _operands(w: QuantizedTensor, layout: Layout) -> list[_Operand]:
  """Codes, levels, scales (one array, or codes, absmax, offset and map), zero-points."""
  columns = -w.shape[1] % _LANES
  codes = w.codes if w.stack is None else w.stack.codes
  if layout.ragged:
    assert w.stack is None
    unit = codes.reshape(-1, plane_rows(w.shape[0], w.bits)[1], codes.shape[1])
    codes = jnp.pad(unit, ((0, 0), (0, layout.plane - unit.shape[1]), (0, 0)))
    codes = codes.reshape(-1, codes.shape[-1])
  operands = [
    _Operand(
      codes.reshape(-1, *codes.shape[-2:]),
      (None, layout.byte_rows, layout.n),
      lambda t, j, layer: (layer, t, j),
    ),
    _whole(_tables(w.levels.astype(jnp.float32), w.bits)),
  ]

  def per_block(blocks: jax.Array) -> _Operand:
    """`[K/B, N]`, of scales, their codes or zero-points."""
    unit = max(1, min(layout.block, w.block_size))
    if unit != w.block_size or layout.ragged:
      blocks = jnp.repeat(blocks, w.block_size // unit, 0)[: w.shape[0] // unit]
      blocks = _split_planes(blocks.T, w, layout, unit).T
    rows = layout.scale_rows
    blocks = jnp.pad(blocks, ((0, -len(blocks) % rows), (0, columns)))
    tiles_a_row = max(1, layout.block // layout.k)
    return _Operand(
      blocks.reshape(-1, rows, blocks.shape[1]),
      (None, rows, layout.n),
      lambda t, j, _: (t // tiles_a_row, 0, j),
    )

  if layout.nested:
    assert isinstance(w.scales, NestedScales)
    operands.append(per_block(w.scales.codes))
    operands.append(_absmax(w.scales, layout, columns))
    operands.append(_whole(w.scales.offset.astype(jnp.float32).reshape(1, 1)))
    operands.append(_whole(_table(jnp.asarray(codebooks.dynamic_map()), along_lanes=True)))
  else:
    operands.append(per_block(restore_scales(w.scales)))
  if w.zero is not None:
    operands.append(per_block(w.zero.astype(jnp.float32)))
  return operands


def _whole(array: jax.Array) -> _Operand:
  """An operand that every tile reads whole."""
  return _Operand(array, array.shape, lambda t, j, _: (0,) * array.ndim)


def _tables(levels: jax.Array, bits: int) -> jax.Array:
  """What `lookup` wants: by lane the 256 levels of 8 bits, else by sublane; of 4 bits by both."""
  if bits == 8:
    return _table(levels, along_lanes=True)
  by_sublane = _table(levels, along_lanes=False)
  return (
    jnp.concatenate([by_sublane, _table(levels, along_lanes=True)]) if bits == 4 else by_sublane
  )


def _table(levels: jax.Array, along_lanes: bool) -> jax.Array:
  """`[L]` → `[registers, 8, 128]`, the levels along the sublanes or the lanes, and repeated."""
  length = _LANES if along_lanes else _SUBLANES
  levels = jnp.pad(levels, (0, -len(levels) % length)).reshape(-1, length)
  axis = 2 if along_lanes else 1
  return jax.lax.broadcast_in_dim(levels, (len(levels), _SUBLANES, _LANES), (0, axis))


def _run(scales: Any) -> int:
  """How many blocks of an output, one after the other, surely share an absmax."""
  return math.gcd(scales.shape[-2], scales.block_size)


def _absmax(scales: NestedScales, layout: Layout, columns: int) -> _Operand:
  """The absmax of each run of blocks, without a lookup: they are in [out, in] order already."""
  blocks, n = scales.shape
  run = _run(scales)
  each = jnp.repeat(scales.absmax.astype(jnp.float32), scales.block_size // run)
  each = each[: n * blocks // run].reshape(n, -1).T
  rows = max(1, layout.scale_rows // run)
  each = jnp.pad(each, ((0, -len(each) % rows), (0, columns)))
  tiles_a_run = max(1, run * layout.block // layout.k)
  return _Operand(
    each.reshape(-1, rows, each.shape[1]),
    (None, rows, layout.n),
    lambda t, j, _: (t // tiles_a_run, 0, j),
  )


def _padded(k: int, layout: Layout) -> int:
  return layout.group if layout.ragged else k


def _split_planes(x: jax.Array, w: QuantizedTensor, layout: Layout, unit: int = 1) -> jax.Array:
  """`[M, K / unit]` → as the tiles have K: a ragged one's planes each padded with zeros."""
  if not layout.ragged:
    return x
  plane = layout.plane // unit
  parts = split_rows(x, w.bits, -1)
  return jnp.concatenate(
    [jnp.pad(part[..., 0, :], ((0, 0), (0, plane - part.shape[-1]))) for part in parts], -1
  )


def _join_planes(y: jax.Array, w: QuantizedTensor, layout: Layout) -> jax.Array:
  """The inverse of `_split_planes`."""
  if not layout.ragged:
    return y
  sizes = plane_rows(w.shape[0], w.bits)[2]
  return jnp.concatenate(
    [y[:, j * layout.plane : j * layout.plane + size] for j, size in enumerate(sizes)], -1
  )


# The kernel


def _kernel(
  layer_ref,
  x_ref,
  codes_ref,
  table_ref,
  *refs,
  layout: Layout,
  transposed: bool,
  last: int,
):
  """One tile: see the module. `last`: what the last tile holds of what is summed over."""
  del layer_ref  # it is what the codes were found by
  *parameters, y_ref, sum_ref = refs
  step, steps = pl.program_id(2), pl.num_programs(2)

  @pl.when(step == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def add(held: int) -> None:
    """The products of the first so many of what is summed over."""
    k, n = (layout.k, held) if transposed else (held, layout.n)
    columns = slice(0, n)
    *scales_refs, zero_ref = parameters if layout.has_zero else (*parameters, None)
    zero = None if zero_ref is None else zero_ref[:, columns]
    scales = _restored(columns, *scales_refs) if layout.nested else scales_refs[0][:, columns]
    codes = _signed(codes_ref[:, columns])
    levels = functools.partial(lookup, [table_ref[i] for i in range(table_ref.shape[0])])
    chunk = layout.group * max(1, _CHUNK // layout.group)
    for start in range(0, k, chunk):
      rows = slice(start, min(start + chunk, k))
      groups = range(rows.start // layout.group, rows.stop // layout.group)
      # A value of its own, so that the next chunk is decoded while this one is multiplied.
      w = jnp.concatenate(
        [
          piece
          for group in groups
          for piece in _decoded_group(group, codes, levels, scales, zero, layout, x_ref.dtype)
        ]
      )
      if transposed:
        sum_ref[:, rows] += _dot(x_ref[:, columns], w, 1)
      else:
        sum_ref[...] += _dot(x_ref[:, rows], w, 0)

  whole = layout.n if transposed else layout.k
  if last == whole:
    add(whole)
  else:
    pl.when(step < steps - 1)(lambda: add(whole))
    pl.when(step == steps - 1)(lambda: add(last))

  @pl.when(step == steps - 1)
  def _():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _signed(codes: jax.Array) -> jax.Array:
  """Bytes as int32, the top bit their sign, as `lookup` wants them: widened in one operation.

  Here, since a weight that changes its type ahead of the kernel is written to HBM once more.
  """
  return jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)


def _dot(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
  # The matrix unit would round float32 to bfloat16. Of bfloat16 it takes no precision but its own,
  # whatever `jax_default_matmul_precision` asks of float32.
  config: Any = jax.config
  precision = None
  if x.dtype != jnp.float32:
    precision = jax.lax.Precision.DEFAULT
  elif config.jax_default_matmul_precision is None:
    precision = jax.lax.Precision.HIGHEST
  return jax.lax.dot_general(
    x,
    w,
    (((1,), (axis,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _decoded_group(group: int, codes, levels, scales, zero, layout: Layout, dtype) -> list:
  """A group's rows of W, 16 by 16: float32 level times float32 scale, rounded once to `dtype`."""
  bytes_a_group = layout.group * layout.bits // 8

  def strip(array, row):
    return array[row : row + _SUBLANES]

  weights = {}
  for row in range(0, layout.plane, _SUBLANES):
    first = group * bytes_a_group + row
    if layout.bits == 3:
      low, middle, high = (strip(codes, first + i * layout.plane) & 255 for i in range(3))
      word = low | (middle << 8) | (high << 16)
    else:
      word = strip(codes, first)
    for j in range(planes(layout.bits)):
      k = group * layout.group + j * layout.plane + row
      by_lane = layout.bits == 4 and k // _SUBLANES % BY_LANE == BY_LANE - 1
      weight = levels(word, layout.bits, layout.bits * j, by_lane=by_lane)
      if zero is not None:
        weight = weight - _of_strip(zero, k, layout)
      weights[k] = weight * _of_strip(scales, k, layout)
  # Two strips fill a register of 16 bits.
  return [
    jnp.concatenate([weights[k], weights[k + _SUBLANES]]).astype(dtype)
    for k in range(group * layout.group, (group + 1) * layout.group, 2 * _SUBLANES)
  ]


def _of_strip(blocks: jax.Array, k: int, layout: Layout) -> jax.Array:
  """`[1, n]` or `[8, n]`: what the 8 rows from k on of a tile have of `blocks`."""
  if layout.block == 0:
    return blocks[k : k + _SUBLANES]
  block = k // layout.block
  return blocks[block : block + 1]


def lookup(
  tables: list[jax.Array], word: jax.Array, bits: int, first: int = 0, *, by_lane: bool = False
) -> jax.Array:
  """The levels of the codes that start at bit `first` of `word`, a byte with its sign, `[8, n]`.

  Args:
    tables: registers, as `_tables` has them.
    by_lane: of 4 bits, which of its tables to look in.
  """
  shifted = word >> first if first else word
  if by_lane:
    return gather(tables[-1], shifted & ((1 << bits) - 1), 1)
  # 256 levels lie along the lanes of two registers, fewer along the sublanes of one or two.
  axis, length = (1, _LANES) if bits == 8 else (0, _SUBLANES)
  index = shifted & (min(length, 1 << bits) - 1)
  low = gather(tables[0], index, axis)
  if 1 << bits <= length:
    return low
  top = first + bits - 1
  upper = word < 0 if top == 7 else word & (1 << top) != 0
  return jnp.where(upper, gather(tables[1], index, axis), low)


def gather(register: jax.Array, index: jax.Array, axis: int) -> jax.Array:
  """`register` `[8, 128]`, permuted along an axis by each `[8, 128]` of `index`, all of them in it.

  As `jnp.take_along_axis`, which would take indices below zero for such from the end: three vector
  operations for each register.
  """
  numbers = jax.lax.GatherDimensionNumbers(
    offset_dims=(),
    collapsed_slice_dims=(axis,),
    start_index_map=(axis,),
    operand_batching_dims=(1 - axis,),
    start_indices_batching_dims=(1 - axis,),
  )
  pieces = [
    jax.lax.gather(
      register,
      index[:, j : j + _LANES, None],
      numbers,
      slice_sizes=(1, 1),
      mode="promise_in_bounds",
    )
    for j in range(0, index.shape[1], _LANES)
  ]
  return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, 1)


def _restored(columns: slice, codes_ref, absmax_ref, offset_ref, map_ref) -> jax.Array:
  """Some columns of a tile's scales, undoing double quantization: two roundings, as there."""
  codes = _signed(codes_ref[:, columns])
  halves = [map_ref[0], map_ref[1]]
  rows = len(codes)
  # In whole registers, which is what is looked up in.
  filling = jnp.zeros((-rows % _SUBLANES, codes.shape[1]), codes.dtype)
  whole = jnp.concatenate([codes, filling]) if len(filling) else codes
  strips = [whole[row : row + _SUBLANES] for row in range(0, rows, _SUBLANES)]
  value = jnp.concatenate([lookup(halves, strip, 8) for strip in strips])[:rows]
  # Of each run; one run's is broadcast.
  absmax = absmax_ref[:, columns]
  if len(absmax) > 1:
    shape = (rows // len(absmax), absmax.shape[1])
    absmax = jnp.concatenate([jnp.broadcast_to(run[None], shape) for run in absmax])
  # Code 127 stands for 0.
  product = jnp.where(codes == 127, 0.0, value * absmax)
  return product + offset_ref[0, 0]

"""Few rows times a packed 4-bit weight on Hopper: decoded in registers, one pass over the codes.

With few rows the product takes as long as reading the weight, if decoding keeps up. It does by
these means:

- A byte of codes is one lookup: 256 pairs of levels lie in shared memory, once a lane, so that a
  warp's 32 lookups meet no bank twice. It gives two weights in the register form of the tensor
  cores, which multiply 16 outputs by 16 of K at once (`mma.sync`), however few the rows.
- The scales multiply float32 sums of whole blocks, not weights: a weight costs no arithmetic of
  its own, and its level is rounded once, to the input's dtype.
- The two codes of a byte belong to rows of K 64 apart (`quantized_tensor`), so to two blocks. For
  up to 4 rows of x, B's 8 columns tell them apart: column 2m has x[m] where the low codes are,
  2m + 1 where the high ones are, and zeros elsewhere. For more rows, two bytes exchange codes.
- A thread block has 16 or 8 warps, each with 32 or 64 outputs and a share of K, of which it reads
  the next group of 128 while it multiplies the last one. Scales are restored once, in shared
  memory.

`mma.sync`'s operands, lane 4g + t: A rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9; B the
same rows of K, column g; the sums rows g and g + 8, columns 2t and 2t + 1. (PTX ISA, section
9.7.14, "Matrix fragments for mma.m16n8k16".) Which of W's rows a column of A is, is free, as long
as B agrees: so a lane's are consecutive, and read in words.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax import codebooks
from qlora_jax.matmul import gpu_threads, manual_axes, stacked
from qlora_jax.quantized_tensor import (
  GROUP,
  NestedScales,
  QuantizedTensor,
  restore_scales,
)

# Rows that a thread block may take: 4 with the planes told apart by columns.
_ROW_TILES = (4, 8, 16)
_SHARED_BYTES = 227 << 10
# Of the table of pairs, and of the dynamic map.
_TABLE_WORDS = 256 * 32
_MAP_WORDS = 256


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How the work is cut.

  Attributes:
    rows: of x a thread block takes, 4, 8 or 16.
    column_warps: warps side by side along N; the block's other warps share K out.
    warps: of a thread block, 16 or 8: with 512 threads, each has up to 128 registers.
    lane_columns: outputs of a lane, 4 or 8, whose codes it reads at once.
  """

  rows: int
  column_warps: int
  warps: int = 16
  lane_columns: int = 4

  @property
  def warp_columns(self) -> int:
    """Outputs of a warp: of 8 lanes; the other lanes have other rows of K."""
    return 8 * self.lane_columns

  @property
  def columns(self) -> int:
    """Outputs of a thread block."""
    return self.column_warps * self.warp_columns

  @property
  def k_warps(self) -> int:
    """Warps that share K out."""
    return self.warps // self.column_warps


def default_tiles(rows: int, w: QuantizedTensor) -> Tiles:
  """Tiles that give the GPU's 132 multiprocessors a block each, where N is large enough.

  And whose scales fit the shared memory, where any do.
  """
  tile = next((tile for tile in _ROW_TILES if rows <= tile), _ROW_TILES[-1])
  n = w.shape[-1]
  # Wide lanes read codes in fewer instructions, which is 3 to 7% of the time where rows are few and
  # N gives every multiprocessor two warps of them; with more rows it is nothing (an H200).
  wide = [Tiles(tile, 4, 16, 8), Tiles(tile, 2, 8, 8)] if tile == 4 and n % 8 == 0 else []
  for tiles in (*wide, *(Tiles(tile, warps) for warps in (8, 4, 2))):
    if n >= 100 * tiles.columns and shared_bytes(w, tiles) <= _SHARED_BYTES:
      return tiles
  return Tiles(tile, 1)


def undecoded(x: Any, w: QuantizedTensor, multiple: int) -> str | None:
  """Why codes cannot be decoded in registers, N being cut in multiples of so many; or None.

  Args:
    x: `[M, K]`, of a shape and dtype. w: `[K, N]`.
  """
  k, n = w.shape
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x is {x.dtype}; bfloat16 or float16"
  if w.bits != 4 or w.zero is not None:
    return "codes of other than 4 bits, or zero-points"
  if k % GROUP or n % multiple:
    return f"K = {k} and N = {n}; multiples of {GROUP} and {multiple}"
  if w.block_size not in (16, 32) and w.block_size % 64:
    return f"block size {w.block_size}; 16, 32 or a multiple of 64"
  return None


def unsupported(x: Any, w: QuantizedTensor, tiles: Tiles) -> str | None:
  """Why the kernel cannot serve the product, or None; of `undecoded`'s arguments."""
  if reason := undecoded(x, w, tiles.lane_columns):
    return reason
  if (size := shared_bytes(w, tiles)) > _SHARED_BYTES:
    return f"its scales need {size} bytes of shared memory; there are {_SHARED_BYTES}"
  return None


def shared_bytes(w: QuantizedTensor, tiles: Tiles) -> int:
  """What a thread block needs."""
  # The warps' sums take the table's place.
  table = max(_TABLE_WORDS, tiles.warps * tiles.warp_columns * tiles.rows)
  return 4 * (table + _MAP_WORDS + w.scales.shape[-2] * tiles.columns)


def product(x: jax.Array, w: QuantizedTensor, tiles: Tiles) -> jax.Array:
  """`[M, K] · [K, N] → [M, N]` in x's dtype, accumulated in float32. The same bits at every run."""
  shape = shape_of(x, w, tiles)
  number, operands, strides = weight_operands(w)
  kernel = plgpu.kernel(
    functools.partial(_kernel, shape, strides),
    out_type=jax.ShapeDtypeStruct((shape.m, shape.n), x.dtype),
    grid=(-(-shape.m // tiles.rows), -(-shape.n // tiles.columns)),
    grid_names=("rows", "columns"),
    num_threads=tiles.warps // 4,
    thread_name="warpgroup",
    scratch_types=[plgpu.SMEM((shared_bytes(w, tiles) // 4,), jnp.float32)],
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    kernel_name="few_rows",
  )
  y = kernel(*number, x, *operands)
  # The kernel's own result does not say what it varies over.
  return manual_axes.cast(y, manual_axes.varying(x, *jax.tree.leaves(w)))


def shape_of(x: Any, w: QuantizedTensor, tiles: Tiles) -> "Shape":
  """What the program is made for."""
  return Shape(**measures(x, w), tiles=tiles)


def measures(x: Any, w: QuantizedTensor) -> dict[str, Any]:
  """A `Shape`'s fields, but for its tiles."""
  (m, k), (_, n) = x.shape, w.shape
  nested = w.scales.block_size if isinstance(w.scales, NestedScales) else None
  return {
    "m": m,
    "k": k,
    "n": n,
    "block_size": w.block_size,
    "nested_block_size": nested,
    "dtype": x.dtype.name,
  }


def weight_operands(
  w: QuantizedTensor,
) -> tuple[list[jax.Array], list[jax.Array], tuple[int, ...] | None]:
  """What a kernel reads the weight from, and how the layers of a stack lie apart.

  Returns:
    Of a layer that remembers its stack, its number, `[1]`. The codes, the levels, and the scales,
    `[K/B, N]` float32, or of nested ones what restores them; of such a layer, those of the stack.
    The bytes between its layers, of each of them; None of a weight that has no stack.
  """
  layered = stacked.readable(w)
  whole: Any = w if layered is None else layered
  arrays = [whole.codes, whole.levels.astype(jnp.float32)]
  scales, shared = whole.scales, []
  if isinstance(scales, NestedScales):
    arrays += [scales.codes, scales.absmax.astype(jnp.float32)]
    arrays.append(scales.offset.astype(jnp.float32).reshape(-1))
    shared = [jnp.asarray(codebooks.dynamic_map())]
  else:
    arrays.append(restore_scales(scales))
  if layered is None:
    return [], arrays + shared, None
  layers = math.prod(whole.codes.shape[:-2])
  strides = [x.size * x.dtype.itemsize // layers for x in arrays]
  return [layered.index.reshape(1)], arrays + shared, (*strides, *(0 for _ in shared))


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a kernel is specialized to."""

  m: int
  k: int
  n: int
  block_size: int
  nested_block_size: int | None
  dtype: str
  tiles: Tiles


def _kernel(shape: Shape, strides: tuple[int, ...] | None, *refs: Any) -> None:
  rows, columns = jax.lax.axis_index("rows"), jax.lax.axis_index("columns")
  indices = [rows, columns]
  gpu_threads.run(functools.partial(program, shape), refs, indices, all_strides(strides))


def all_strides(strides: tuple[int, ...] | None) -> tuple[int, ...] | None:
  """With those of x and y, which are no stacks."""
  return None if strides is None else (0, *strides, 0)


def program(shape: Shape, t: Any, pointers: list[Any], indices: list[Any]) -> None:
  """The program of one thread.

  Args:
    t: what a thread can do (`gpu_threads.Thread`).
    pointers: of x, codes, levels, the scales' operands, y and the shared memory.
    indices: of the block's tile of rows and of columns.
  """
  x, codes, levels, *scales, y, shared = pointers
  tiles, m, k, n = shape.tiles, shape.m, shape.k, shape.n
  groups, blocks = k // GROUP, -(-k // shape.block_size)
  threads, k_warps, width = 32 * tiles.warps, tiles.k_warps, tiles.lane_columns
  row_tile, column_tile = indices
  index = t.thread_index()
  lane, warp = index % 32, index // 32
  g, q = lane // 4, lane % 4
  column_warp, k_warp = warp % tiles.column_warps, warp // tiles.column_warps
  first_row = row_tile * tiles.rows
  first_column = column_tile * tiles.columns
  # This lane's outputs, which lie side by side: in the block's tile, and of all.
  local_column = column_warp * tiles.warp_columns + g * width
  column = first_column + local_column
  table = shared
  dynamic_map = shared + 4 * max(_TABLE_WORDS, tiles.warps * tiles.warp_columns * tiles.rows)
  restored = dynamic_map + 4 * _MAP_WORDS
  by_columns = tiles.rows == 4
  # Rows of a plane that a lane reads: one run of 16, where a block covers the plane, else a run a
  # step, so that the products of a step are of one block.
  whole = shape.block_size >= 64
  steps = 8 if by_columns else 4
  run = 16 // steps
  first_of_step = [q * 16 + run * s if whole else s * 4 * run + q * run for s in range(steps)]

  def share_out(items, body):
    """Runs `body` of each item, in the threads in turn."""
    for i in range(0, items, threads):
      item = index + i
      if i + threads <= items:
        body(item)
      else:
        t.when(item < items, functools.partial(body, item))

  def read_codes(group):
    inside = (group < groups) & (column < n)
    return [
      t.load_words(codes, (group * 64 + first + r) * n + column, width // 4, inside)
      for first in first_of_step
      for r in range(run)
    ]

  def read_x(row, group, plane):
    """The 16 values of a lane in a plane of the group, as pairs; zeros beyond the last row."""
    inside = (group < groups) & (row < m)
    start = row * k + group * GROUP + plane * 64
    if whole:
      loads = [t.load_words(x, (start + q * 16 + 8 * i) * 2, 4, inside) for i in range(2)]
    else:
      loads = [t.load_words(x, (start + first) * 2, run // 2, inside) for first in first_of_step]
    return [word for words in loads for word in words]

  def read(group):
    if by_columns:
      return read_codes(group), [read_x(first_row + g // 2, group, g % 2)]
    return read_codes(group), []

  now = read(k_warp)

  # The table of pairs, a copy a lane; the map; and the block's scales.
  for i in range(0, 256 * 8, threads):
    pair = (index + i) // 8
    low, high = (t.load(levels, code * 4, "f32") for code in (pair % 16, pair // 16))
    word = t.pack(low, high, shape.dtype)
    t.store_words(table, (index + i) * 16, [word] * 4)
  if shape.nested_block_size:
    quantized, absmax, offset, source = scales
    t.when(index < 256, lambda: t.store(dynamic_map, index * 4, t.load(source, index * 4, "f32")))
    t.barrier()
    mean = t.load(offset, t.integer(0), "f32")

  def restore(item):
    block, local = item // (tiles.columns // 4), item % (tiles.columns // 4) * 4
    outer = first_column + local
    inside = (block < blocks) & (outer < n)
    if shape.nested_block_size:
      word = t.load(quantized, block * n + outer, "u32", inside)
      values = []
      for j in range(4):
        largest = t.load(
          absmax, ((outer + j) * blocks + block) // shape.nested_block_size * 4, "f32", inside
        )
        level = t.load_shared(dynamic_map, t.byte(word, j) * 4, "f32")
        # Two roundings, as `restore_scales` has them.
        values.append(t.add(t.multiply(level, largest), mean))
    else:
      values = [
        t.as_float(word) for word in t.load_words(scales[0], (block * n + outer) * 4, 4, inside)
      ]
    t.store_words(restored, item * 16, [t.as_word(value) for value in values])

  share_out(blocks * tiles.columns // 4, restore)
  t.barrier()

  lookups = table + lane * 4

  def look(words, output):
    byte = t.byte(words[output // 4], output % 4)
    return t.load_shared(lookups, byte * 128, "u32")

  def block_scales(group, plane, step):
    """Of the lane's outputs, in the block that a step belongs to; any, beyond the last group."""
    within = plane * 64 + (0 if whole else step * 4 * run)
    block = (group * GROUP + within) // shape.block_size
    block = t.minimum(block, blocks - 1)
    at = (block * tiles.columns + local_column) * 4
    words = [t.load_shared_words(restored, at + 16 * i, 4) for i in range(width // 4)]
    return [t.as_float(word) for each in words for word in each]

  # Steps whose products are of one block.
  per_block = steps if whole else shape.block_size // (4 * run)
  tile_rows = 1 if by_columns else tiles.rows // 8
  halves = width // 2
  zero = t.float(0.0)

  def multiply_by_columns(group, words, x_words, sums):
    # Where the low codes are, x stands in the lower halves of even columns; where the high ones
    # are, in the upper halves of odd ones.
    even = (g % 2).equals(0)
    selectors = t.select(even, 0x4410, 0x1044), t.select(even, 0x4432, 0x3244)
    (x_words,) = x_words
    for start in range(0, steps, per_block):
      products = [[zero] * 4 for _ in range(halves)]
      for s in range(start, start + per_block):
        b = [t.permute(x_words[s], selector) for selector in selectors]
        first, second = words[2 * s], words[2 * s + 1]
        for half in range(halves):
          a = [look(each, 2 * half + i) for each in (first, second) for i in range(2)]
          products[half] = t.mma(products[half], a, b, shape.dtype)
      low, high = (block_scales(group, plane, start) for plane in range(2))
      for output in range(width):
        half, i = divmod(output, 2)
        sums[output] = t.fma(low[output], products[half][2 * i], sums[output])
        sums[output] = t.fma(high[output], products[half][2 * i + 1], sums[output])

  def multiply_by_planes(group, words, x_words, sums):
    del x_words
    for plane in range(2):
      xs = [read_x(first_row + tile * 8 + g, group, plane) for tile in range(tile_rows)]
      for start in range(0, steps, per_block):
        products = [[[zero] * 4 for _ in range(tile_rows)] for _ in range(halves)]
        for s in range(start, start + per_block):
          # Codes of one plane of two rows, in the bytes of a word.
          pairs = []
          for first, second in ((4 * s, 4 * s + 1), (4 * s + 2, 4 * s + 3)):
            exchanged = []
            for one, other in zip(words[first], words[second], strict=True):
              one, other = (one, other << 4) if plane == 0 else (one >> 4, other)
              exchanged.append((one & 0x0F0F0F0F) | (other & 0xF0F0F0F0))
            pairs.append(exchanged)
          for half in range(halves):
            a = [look(pair, 2 * half + i) for pair in pairs for i in range(2)]
            for tile in range(tile_rows):
              b = xs[tile][2 * s : 2 * s + 2]
              products[half][tile] = t.mma(products[half][tile], a, b, shape.dtype)
        scale = block_scales(group, plane, start)
        for half in range(halves):
          for tile in range(tile_rows):
            for i in range(4):
              at = (half * tile_rows + tile) * 4 + i
              sums[at] = t.fma(scale[2 * half + i // 2], products[half][tile][i], sums[at])

  multiply = multiply_by_columns if by_columns else multiply_by_planes
  count = width if by_columns else 2 * width * tile_rows

  def step(i, carried):
    (words, x_words), sums = carried
    group = i * k_warps + k_warp
    following = read(group + k_warps)
    sums = list(sums)
    multiply(group, words, x_words, sums)
    return following, sums

  _, sums = t.loop(-(-groups // k_warps), step, (now, [zero] * count))

  # The warps' sums lie in the table's place, [K warps, rows, columns], and are added in order.
  t.barrier()

  def put(row, output, value):
    at = (k_warp * tiles.rows + row) * tiles.columns + local_column + output
    t.store(table, at * 4, value)

  if by_columns:
    for output in range(width):
      put(q, output, sums[output])
  else:
    for at, value in enumerate(sums):
      half, tile, i = at // (4 * tile_rows), at // 4 % tile_rows, at % 4
      put(q * 2 + (tile * 8 + i % 2), 2 * half + i // 2, value)
  t.barrier()

  def finish(item):
    row, output = item // tiles.columns, item % tiles.columns
    total = zero
    for part in range(k_warps):
      at = item + part * tiles.rows * tiles.columns
      total = t.add(total, t.load_shared(table, at * 4, "f32"))
    row, output = first_row + row, first_column + output
    inside = (row < m) & (output < n)
    t.when(inside, lambda: t.store_rounded(y, (row * n + output) * 2, total, shape.dtype))

  share_out(tiles.rows * tiles.columns, finish)

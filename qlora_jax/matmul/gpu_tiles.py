"""Tiles of rows times a packed 4-bit weight on Hopper: decoded in registers, into `wgmma`.

The product is made transposed: a warpgroup has 64 outputs as the rows of its A, decoded straight
into the registers that the tensor cores read, and a tile of x's rows as its B, in shared memory.

- Codes come as the layout has them, 64 byte rows by 128 outputs, and `ldmatrix` transposed hands
  each lane the bytes of two consecutive rows of K: one logical operation makes of them the pairs of
  codes of either plane.
- A pair of codes is one lookup: 256 pairs of levels lie in shared memory, once a lane, so that a
  warp's 32 lookups meet no bank twice.
- For few rows, the pairs are levels in x's dtype, and a block's product is scaled in float32 when
  it is done (`Tiles.promoted`). For more, that would take too many registers: the levels come as
  16-bit integers (32768 + level / largest · 32767), become float32 by bits alone (0x4B00 above them
  is 2²³ and they), and are scaled by one fused multiply-add before they are rounded to x's dtype.
  The scale has 15 bits there, so that zero is zero: an error of 2⁻¹⁶, under the dtype's 2⁻⁹.
- A tile of x, 64 of K, is copied some tiles ahead. While the tensor cores multiply one, the
  warps decode the next.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.matmul import gpu_threads, manual_axes
from qlora_jax.matmul.gpu_few_rows import all_strides, measures, undecoded, weight_operands
from qlora_jax.quantized_tensor import GROUP, QuantizedTensor

# Outputs of a thread block: two warpgroups'.
COLUMNS = 128
# By rows, the tiles of x that a thread block has room for, and use of.
_STAGES = {32: 8, 64: 8, 128: 4, 256: 5}
_SHARED_BYTES = 227 << 10
_TABLE_BYTES = 256 * 32 * 4
_MAP_BYTES = 256 * 4
# Codes of a group, K = 128, and of x a row's K = 64.
_CODES_BYTES = 64 * COLUMNS
_ROW_BYTES = 128
# Beyond what the ring of tiles needs, so that it can begin at a multiple of 1,024.
_SLACK = 1024
# 2²³ + 2¹⁵: what a level of zero becomes.
_ZERO = float((1 << 23) + (1 << 15))


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How the work is cut.

  Attributes:
    rows: of x a thread block takes: 8 to 256, a multiple of 8.
    k_sets: sets of two warpgroups in a thread block, which share K out: 1 or 2.
    splits: thread blocks that share K out; their parts are added by XLA.
    stages: tiles of x in a set's ring.
    promoted: whether blocks' products are scaled, rather than weights.
  """

  rows: int
  k_sets: int
  splits: int
  stages: int
  promoted: bool

  @property
  def threads(self) -> int:
    """Of a thread block."""
    return 256 * self.k_sets

  @property
  def lookahead(self) -> int:
    """Tiles of x under way while one is multiplied."""
    return self.stages - 2

  @property
  def code_stages(self) -> int:
    """Groups of codes in a set's ring."""
    return self.lookahead // 2 + 1


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

  @property
  def parts(self) -> int:
    """Blocks that a plane is cut in."""
    return parts_of(self.block_size)

  @property
  def scale_row_bytes(self) -> int:
    """Of a block's scales, one an output of the thread block."""
    return COLUMNS * (1 if self.nested_block_size else 4)

  @property
  def scales_bytes(self) -> int:
    """Of a group's scales."""
    return 2 * self.parts * self.scale_row_bytes

  @property
  def shared_bytes(self) -> int:
    """What a thread block needs."""
    tiles = self.tiles
    codes = tiles.code_stages * (_CODES_BYTES + self.scales_bytes)
    ring = tiles.stages * tiles.rows * _ROW_BYTES + codes
    return _SLACK + _TABLE_BYTES + _MAP_BYTES + tiles.k_sets * ring


def parts_of(block_size: int) -> int:
  """Blocks that a plane, 64 of K, is cut in; 1 where a block covers it."""
  return max(1, 64 // block_size)


def default_tiles(rows: int, w: QuantizedTensor) -> Tiles:
  """Tiles that give the GPU's 132 multiprocessors work, as far as N and K allow."""
  k, n = w.shape
  tile = next((tile for tile in _STAGES if rows <= tile), max(_STAGES))
  blocks = -(-rows // tile) * -(-n // COLUMNS)
  splits = min(max(1, 132 // blocks), 8, k // GROUP)
  return Tiles(tile, 1, splits, _STAGES[tile], promoted=tile * parts_of(w.block_size) <= 64)


def unsupported(x: Any, w: QuantizedTensor, tiles: Tiles) -> str | None:
  """Why the kernel cannot serve the product, or None.

  Args:
    x: `[M, K]`, of a shape and dtype. w: `[K, N]`.
  """
  # Columns are copied 16 codes at a time.
  if reason := undecoded(x, w, 16):
    return reason
  k, n = w.shape
  if max(4 * x.shape[0] * max(k, n * tiles.splits), k * n // 2) >= 1 << 32:
    return f"{x.shape[0]} rows of {max(k, n)} or {k * n} weights; offsets have 32 bits"
  shape = shape_of(x, w, tiles)
  if shape.shared_bytes > _SHARED_BYTES:
    return f"{shape.shared_bytes} bytes of shared memory wanted; there are {_SHARED_BYTES}"
  return None


def shape_of(x: Any, w: QuantizedTensor, tiles: Tiles) -> Shape:
  """What the program is made for."""
  return Shape(**measures(x, w), tiles=tiles)


def product(x: jax.Array, w: QuantizedTensor, tiles: Tiles) -> jax.Array:
  """`[M, K] · [K, N] → [M, N]` in x's dtype, accumulated in float32. The same bits at every run."""
  shape = shape_of(x, w, tiles)
  parts = tiles.splits > 1
  out = jax.ShapeDtypeStruct((tiles.splits, shape.m, shape.n), jnp.float32 if parts else x.dtype)
  number, operands, strides = weight_operands(w)
  kernel = plgpu.kernel(
    functools.partial(_kernel, shape, strides),
    out_type=out,
    grid=(grid_size(shape),),
    grid_names=("tile",),
    num_threads=tiles.threads // 128,
    thread_name="warpgroup",
    scratch_types=[plgpu.SMEM((shape.shared_bytes // 4,), jnp.float32)],
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    kernel_name="tiles",
  )
  y = kernel(*number, x, *operands)
  # The kernel's own result does not say what it varies over.
  y = manual_axes.cast(y, manual_axes.varying(x, *jax.tree.leaves(w)))
  return jnp.sum(y, 0).astype(x.dtype) if parts else y[0]


def grid_size(shape: Shape) -> int:
  """Thread blocks."""
  return -(-shape.m // shape.tiles.rows) * -(-shape.n // COLUMNS) * shape.tiles.splits


def _kernel(shape: Shape, strides: tuple[int, ...] | None, *refs: Any) -> None:
  tile = jax.lax.axis_index("tile")
  gpu_threads.run(functools.partial(program, shape), refs, [tile], all_strides(strides))


def program(shape: Shape, t: Any, pointers: list[Any], indices: list[Any]) -> None:
  """The program of one thread.

  Args:
    t: what a thread can do (`gpu_threads.Thread`).
    pointers: of x, codes, levels, the scales' operands, y and the shared memory.
    indices: of the block's tile.
  """
  x, codes, levels, *scales, y, shared = pointers
  tiles, m, k, n = shape.tiles, shape.m, shape.k, shape.n
  parts, row_tiles = shape.parts, -(-shape.m // tiles.rows)
  groups, blocks = k // GROUP, -(-k // shape.block_size)
  index = t.thread_index()
  lane, warp = index % 32, index // 32
  g, q = lane // 4, lane % 4
  # Of the 256 threads of its set.
  own, k_set = index % 256, index // 256
  column_warp = warp % 8

  # Tiles of rows lie next to one another, so that blocks that run together share codes and x.
  (tile,) = indices
  split, tile = tile % tiles.splits, tile // tiles.splits
  first_row, first_column = (tile % row_tiles) * tiles.rows, (tile // row_tiles) * COLUMNS
  # This lane's two outputs lie side by side.
  local_column = column_warp * 16 + g * 2
  column = first_column + local_column

  # Shared memory: the rings of x, then of codes and scales, the table of pairs and the map.
  stages, code_stages = tiles.stages, tiles.code_stages
  x_stage = tiles.rows * _ROW_BYTES
  x_rings = ((shared + (_SLACK - 1)) // _SLACK) * _SLACK
  x_ring = x_rings + k_set * (stages * x_stage)
  code_ring = x_rings + tiles.k_sets * stages * x_stage + k_set * (code_stages * _CODES_BYTES)
  scale_ring = x_rings + tiles.k_sets * (stages * x_stage + code_stages * _CODES_BYTES)
  table = scale_ring + tiles.k_sets * code_stages * shape.scales_bytes
  scale_ring = scale_ring + k_set * (code_stages * shape.scales_bytes)
  dynamic_map = table + _TABLE_BYTES

  # The sets take groups in turn, over all splits.
  stride = tiles.splits * tiles.k_sets
  mine = split * tiles.k_sets + k_set
  count = -(-groups // stride)

  def group_of(i):
    return i * stride + mine

  # Each thread copies pieces of 16 bytes: number `piece` of rows `piece_row`, `piece_row` + 32, …
  piece_row, piece = own // 8, own % 8
  exchanged = (piece ^ (piece_row & 7)) * 16

  def copy_x(chunk):
    group = group_of(chunk // 2)
    start = group * GROUP + (chunk % 2) * 64 + piece * 8
    stage = x_ring + (chunk % stages) * x_stage + piece_row * _ROW_BYTES + exchanged
    for first in range(0, tiles.rows, 32):
      local = piece_row + first
      row = first_row + local
      inside = (row < m) & (group < groups)

      def copy(first=first, row=row, inside=inside):
        t.copy_async(stage + first * _ROW_BYTES, x, (row * k + start) * 2, inside)

      if first + 32 <= tiles.rows:
        copy()
      else:
        t.when(local < tiles.rows, copy)

  def copy_codes(i):
    group, stage = group_of(i), i % code_stages
    to = code_ring + stage * _CODES_BYTES + piece_row * COLUMNS + exchanged
    inside = (first_column + piece * 16 < n) & (group < groups)
    for first in (0, 32):
      source = (group * 64 + piece_row + first) * n + first_column + piece * 16
      t.copy_async(to + first * COLUMNS, codes, source, inside)
    # A row of scales a block.
    pieces = shape.scale_row_bytes // 16
    width = COLUMNS // pieces

    def copy_scales():
      block_row, at = own // pieces, own % pieces
      block = block_of(group, block_row // parts, block_row % parts)
      outer = first_column + at * width
      inside = (outer < n) & (group < groups)
      source = (block * n + outer) * (16 // width)
      t.copy_async(scale_ring + stage * shape.scales_bytes + own * 16, scales[0], source, inside)

    t.when(own < 2 * parts * pieces, copy_scales)

  def block_of(group, plane, part):
    within = plane * 64 + part * shape.block_size
    return t.minimum((group * GROUP + within) // shape.block_size, blocks - 1)

  def copy(chunk, odd):
    """A tile of x, and the codes that are decoded while it is multiplied."""
    copy_x(chunk)
    if odd:
      copy_codes((chunk + 1) // 2)
    t.commit_copies()

  copy_codes(t.integer(0))
  t.commit_copies()
  for chunk in range(tiles.lookahead):
    copy(t.integer(chunk), chunk % 2)

  # The table of pairs, a copy a lane, and the map.
  values = [t.load(levels, t.integer(4 * code), "f32") for code in range(16)]
  largest = functools.reduce(t.largest_of, values, t.float(1e-30))
  # Levels are stored as integers of 1/32767 of the largest.
  unit = t.multiply(largest, t.float(1 / 32767))
  units = t.divide(t.float(32767.0), largest)

  def entry(low, high):
    low, high = (t.load(levels, code * 4, "f32") for code in (low, high))
    if tiles.promoted:
      return t.pack(low, high, shape.dtype)
    low, high = (t.round(t.multiply(value, units)) + 32768 for value in (low, high))
    return low | (high << 16)

  for i in range(0, 256 * 8, tiles.threads):
    pair = (index + i) // 8
    t.store_words(table, (index + i) * 16, [entry(pair % 16, pair // 16)] * 4)
  if shape.nested_block_size:
    source, absmax, mean = scales[3], scales[1], t.load(scales[2], t.integer(0), "f32")
    fill = functools.partial(t.load, source, index * 4, "f32")
    t.when(index < 256, lambda: t.store(dynamic_map, index * 4, fill()))

  # A lane restores, of its quad's two outputs and the group's two planes, those of one pair.
  output, plane_of = q & 1, q // 2

  def read_absmax(i):
    if not shape.nested_block_size:
      return []
    group, at = group_of(i), column + output
    inside = (group < groups) & (at < n)
    return [
      t.load(
        absmax,
        (at * blocks + block_of(group, plane_of, part)) // shape.nested_block_size * 4,
        "f32",
        inside,
      )
      for part in range(parts)
    ]

  def read_scales(i, absmaxes):
    """`[plane][part][output]`."""
    stage = scale_ring + (i % code_stages) * shape.scales_bytes
    restored = []
    for part in range(parts):
      at = (plane_of * parts + part) * COLUMNS + local_column + output
      if shape.nested_block_size:
        level = t.load_shared(dynamic_map, t.load_shared(stage, at, "u8") * 4, "f32")
        # Two roundings, as `restore_scales` has them.
        scale = t.add(t.multiply(level, absmaxes[part]), mean)
      else:
        scale = t.load_shared(stage, at * 4, "f32")
      scale = t.as_word(scale)
      if not tiles.promoted:
        scale = t.as_word(t.multiply(t.as_float(scale), unit)) & 0xFFFFFE00
      restored.append(scale)
    quad = lane & 28
    return [
      [
        [t.as_float(t.shuffle(restored[part], quad + (2 * plane + out))) for out in range(2)]
        for part in range(parts)
      ]
      for plane in range(2)
    ]

  lookups = table + lane * 4
  code_rows = lane * COLUMNS + (column_warp ^ (lane & 7)) * 16

  def read_codes(i):
    stage = code_ring + (i % code_stages) * _CODES_BYTES + code_rows
    return [word for first in (0, 32) for word in t.load_matrices(stage + first * COLUMNS)]

  def look_up(words, plane, step):
    """The pairs of a plane's step, 16 of K."""
    entries = []
    for word in words[2 * step : 2 * step + 2]:
      first, second = (word, word >> 12) if plane == 0 else (word >> 4, word >> 16)
      pairs = (first & 0x0F0F) | (second & 0xF0F0)
      entries += [
        t.load_shared(lookups, offset, "u32")
        for offset in ((pairs << 7) & 0x7F80, (pairs >> 1) & 0x7F80)
      ]
    return entries

  def convert(entries, step, scales):
    """The step's fragment: rows g, g + 8 of columns 2t, 2t + 1, then of 2t + 8, 2t + 9."""
    if tiles.promoted:
      return entries
    fragment = []
    for at, entry in enumerate(entries):
      scale = scales[step * parts // 4][at % 2]
      bias = t.multiply(scale, t.float(-_ZERO))
      halves = (entry & 0xFFFF) | 0x4B000000, (entry >> 16) | 0x4B000000
      low, high = (t.fma(t.as_float(half), scale, bias) for half in halves)
      fragment.append(t.pack(low, high, shape.dtype))
    return fragment

  def promote(sums, products, scales):
    """Adds the blocks' products, scaled."""
    values = t.wgmma_results([value for part in products for value in part])
    for part in range(parts):
      for at in range(len(sums)):
        value = values[part * len(sums) + at]
        sums[at] = t.fma(scales[part][at // 2 % 2], value, sums[at])

  t.wait_copies(tiles.lookahead)
  t.barrier()
  start = t.integer(0)
  words, scale = read_codes(start), read_scales(start, read_absmax(start))
  fragments = [convert(look_up(words, 0, step), step, scale[0]) for step in range(4)]

  def multiply_group(i, carried):
    words, scale, absmaxes, fragments, sums = carried
    sums = list(sums)
    for plane in range(2):
      chunk = i * 2 + plane
      stage = x_ring + (chunk % stages) * x_stage
      t.wait_copies(tiles.lookahead - 1)
      t.barrier()
      now, products, entries, following = scale[plane], [], [], []
      for step in range(4):
        # The tensor cores take A from registers as they go, and hold up a warp that begins several
        # steps at once: so between two of them a step of the next tile is decoded.
        new_part = step * parts % 4 == 0
        held = sums if not tiles.promoted else None if new_part else products.pop()
        t.wgmma_fence()
        result = t.wgmma(held, fragments[step], stage + step * 32, tiles.rows, shape.dtype)
        if tiles.promoted:
          products.append(result)
        else:
          sums = result
        if step == 0:
          t.wgmma_commit()
          # Of the last tile, whose registers are filled again.
          t.wgmma_wait(1)
          if plane == 1:
            words, scale = read_codes(i + 1), read_scales(i + 1, absmaxes)
            absmaxes = read_absmax(i + 2)
          entries.append(look_up(words, 1 - plane, 0))
        if step == 1:
          copy(chunk + tiles.lookahead, (tiles.lookahead + plane) % 2)
        if step == 3:
          t.wgmma_commit()
        else:
          entries.append(look_up(words, 1 - plane, step + 1))
        following.append(convert(entries[step], step, scale[1 - plane]))
      if tiles.promoted:
        promote(sums, products, now)
      fragments = following
    return words, scale, absmaxes, fragments, sums

  sums = [t.float(0.0)] * (tiles.rows // 2)
  carried = words, scale, read_absmax(t.integer(1)), fragments, sums
  *_, sums = t.loop(count, multiply_group, carried)
  sums = t.wgmma_results(sums)
  t.wait_copies(0)

  if tiles.k_sets > 1:
    # The second set's sums, in the place of x, are added by the first.
    t.barrier()

    def put():
      for at, value in enumerate(sums):
        t.store(x_rings, (own + 256 * at) * 4, value)

    t.when(k_set.equals(1), put)
    t.barrier()
    sums = [
      t.add(value, t.load_shared(x_rings, (own + 256 * at) * 4, "f32"))
      for at, value in enumerate(sums)
    ]

  def write():
    for j in range(tiles.rows // 8):
      for e in range(2):
        row = first_row + q * 2 + (8 * j + e)
        pair = sums[4 * j + e], sums[4 * j + 2 + e]
        inside = (row < m) & (column < n)
        at = row * n + column

        def put(at=at, pair=pair):
          if tiles.splits > 1:
            t.store_global_words(y, (split * (m * n) + at) * 4, [t.as_word(v) for v in pair])
          else:
            t.store_global_words(y, at * 2, [t.pack(*pair, shape.dtype)])

        t.when(inside, put)

  t.when(k_set.equals(0), write) if tiles.k_sets > 1 else write()

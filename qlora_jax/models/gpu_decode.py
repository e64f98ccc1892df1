"""Attention of one token over a layer of the cache, on Hopper: keys and values are read once.

Generation reads the whole cache for each token, and little else is to be done with it. Left to XLA,
a layer of the cache is written out before the library's products read it, and what lies between
these are launches of their own. Here a thread block takes 128 keys of a group, of all queries that
share it, and gives their sums without what other blocks have (Dao et al., Flash-Decoding, 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html); a few small operations join these.

A warp takes 16 keys. Of the tensor cores' products (`mma.sync`, see `gpu_few_rows`) logits are
queries × keys, and their exponentials are, in the registers where they lie, the left operand of the
product with the values. Which element of a head a column is, is free in the first product, and
which output in the second: so a lane's are consecutive in memory, and read 16 bytes at a time.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.matmul import gpu_threads, manual_axes

# Warps of a thread block, and keys of each.
_WARPS, _WARP_KEYS = 8, 16
KEYS = _WARPS * _WARP_KEYS
THREADS = 32 * _WARPS
# Queries of a group, rows of the tensor cores' left operand.
MOST_SHARED = 16
WIDTHS = (64, 128, 256)
# Of a logit that counts nothing, where others of its row may be infinitely small.
_LEAST = -1e30


@dataclasses.dataclass(frozen=True)
class Shape:
  """What the kernel is specialized to.

  Attributes:
    batch, groups, shared, width: B, G, H / G, h.
    slots: S, of the cache.
    scale: of the logits.
    windowed: whether a window is read.
    dtype: of q and of the cache.
  """

  batch: int
  groups: int
  shared: int
  slots: int
  width: int
  scale: float
  windowed: bool
  dtype: str

  @property
  def rows(self) -> int:
    """Of the left operand that hold a query: the upper half of them, where that is enough."""
    return 8 if self.shared <= 8 else 16

  @property
  def chunks(self) -> int:
    """Thread blocks that share out a group's keys."""
    return -(-self.slots // KEYS)

  @property
  def shared_words(self) -> int:
    """Of shared memory: the warps' largest logits, sums, and products."""
    return _WARPS * self.rows * (2 + self.stride)

  @property
  def stride(self) -> int:
    """Words of a row of products: eight rows' next pieces lie in banks of their own."""
    return self.width + 8


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  layer: jax.Array,
  start: jax.Array,
  segment_ids: tuple[jax.Array, jax.Array],
  positions: tuple[jax.Array, jax.Array],
  window: jax.Array | None,
  scale: float,
) -> jax.Array:
  """softmax(scale · q · kᵀ) · v over what the token sees, in q's dtype, `[B, 1, H, h]`.

  Args:
    q: `[B, 1, H, h]`. k, v: `[L, B, G, S, h]`, of q's dtype, 16 bits.
    layer: `[]` int32, of the cache. start: `[]` int32, the token's own slot; it sees no later one.
    segment_ids, positions: the token's `[B, 1]` and the slots' `[B, S]` int32; it sees its own
      segment, and those whose position is less than the window before its own.
    window: `[]` int32, or None for all.
  """
  shape = shape_of(q, k, window, scale)
  kernel = plgpu.kernel(
    functools.partial(_kernel, shape, strides(k)),
    out_type=jax.ShapeDtypeStruct(
      (shape.batch, shape.groups, shape.chunks, shape.shared, shape.width + 2), jnp.float32
    ),
    grid=(shape.batch * shape.groups, shape.chunks),
    grid_names=("group", "chunk"),
    num_threads=_WARPS // 4,
    thread_name="warpgroup",
    scratch_types=[plgpu.SMEM((shape.shared_words,), jnp.float32)],
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    kernel_name="decode_attention",
  )
  arrays = manual_axes.alike(*operands(q, k, v, layer, start, segment_ids, positions, window))
  # The kernel's own result does not say what it varies over.
  parts = manual_axes.cast(kernel(*arrays), manual_axes.varying(*arrays))
  return joined(parts).astype(q.dtype).reshape(q.shape)


def shape_of(q: Any, k: Any, window: Any, scale: float) -> Shape:
  """What the program is made for; `attend`'s arguments."""
  batch, _, heads, width = q.shape
  _, _, groups, slots, _ = k.shape
  shared = heads // groups
  return Shape(batch, groups, shared, slots, width, scale, window is not None, q.dtype.name)


def operands(q, k, v, layer, start, segment_ids, positions, window) -> list[jax.Array]:
  """The kernel's, in order: the layer's number, and what the program sees."""
  numbers = [start] if window is None else [start, window]
  numbers = jnp.stack([jnp.asarray(each, jnp.int32) for each in numbers])
  # The kernel reads words, whatever the caller counts in.
  marks = (x.astype(jnp.int32) for x in (*segment_ids, *positions))
  return [layer.astype(jnp.int32).reshape(1), q, k, v, numbers, *marks]


def strides(k: jax.Array) -> tuple[int, ...]:
  """Bytes between layers, of each operand behind the number, and of the result."""
  layer = math.prod(k.shape[1:]) * k.dtype.itemsize
  return (0, layer, layer, 0, 0, 0, 0, 0, 0)


def joined(parts: jax.Array) -> jax.Array:
  """`[B, G, chunks, R, h + 2] → [B, G, R, h]`: sums, the largest logit and the total, of chunks."""
  sums, largest, totals = parts[..., :-2], parts[..., -2:-1], parts[..., -1:]
  decay = jnp.exp2(largest - largest.max(2, keepdims=True))
  return (sums * decay).sum(2) / (totals * decay).sum(2)


def _kernel(shape: Shape, strides: tuple[int, ...], *refs: Any) -> None:
  indices = [jax.lax.axis_index("group"), jax.lax.axis_index("chunk")]
  gpu_threads.run(functools.partial(program, shape), refs, indices, strides)


def program(shape: Shape, t: Any, pointers: list[Any], indices: list[Any]) -> None:
  """The program of one thread.

  Args:
    t: what a thread can do (`gpu_threads.Thread`).
    pointers: of q, a layer's k and v, the numbers, the token's and the slots' segments and
      positions, the result and the shared memory.
    indices: of the block's group, counted through the batch, and of its chunk of keys.
  """
  q, k, v, numbers, segment, segments, position, positions, out, shared = pointers
  group, chunk = indices
  width, rows, slots = shape.width, shape.rows, shape.slots
  index = t.thread_index()
  lane, warp = index % 32, index // 32
  g, quad = lane // 4, lane % 4
  row = group // shape.groups  # of the batch
  k, v = (t.advance(each, group, slots * width * 2) for each in (k, v))
  # A token behind the last slot was written into it.
  start = t.minimum(t.load(numbers, t.integer(0), "u32"), slots - 1)
  first = chunk * KEYS + warp * _WARP_KEYS
  # Words of 16 bytes that a lane reads of a query or key, and of a value.
  pieces, value_pieces = width // 32, width // 64

  def read(pointer, item, offset, inside):
    return t.load_words(pointer, (item * width + offset) * 2, 4, inside)

  def reaches(key):
    # A slot behind the token's own is empty.
    return key < start + 1

  keys = [
    [
      read(k, first + 8 * half + g, i * 32 + quad * 8, reaches(first + 8 * half + g))
      for i in range(pieces)
    ]
    for half in range(2)
  ]
  # Rows of a value's fragment: two for each word, and of each half.
  places = [first + quad * 2 + 8 * half + i for half in range(2) for i in range(2)]
  values = [
    [read(v, place, i * 64 + g * 8, reaches(place)) for i in range(value_pieces)]
    for place in places
  ]
  nothing = [t.integer(0)] * 4
  queries = [
    [
      read(q, group * shape.shared + g + 8 * half, i * 32 + quad * 8, g + 8 * half < shape.shared)
      for i in range(pieces)
    ]
    if 8 * half < rows
    else [nothing] * pieces
    for half in range(2)
  ]

  def seen(place):
    inside = reaches(place)
    at = (row * slots + place) * 4
    same = t.load(segments, at, "u32", inside).equals(t.load(segment, row * 4, "u32"))
    if not shape.windowed:
      return inside & same
    # As signed numbers: positions may be anything.
    distance = t.load(position, row * 4, "u32") - t.load(positions, at, "u32", inside)
    window = t.load(numbers, t.integer(4), "u32")
    near = (distance ^ 0x80000000) < (window ^ 0x80000000)
    return inside & same & near

  zero, unseen = t.float(0.0), t.float(-math.inf)
  by = t.float(shape.scale * math.log2(math.e))
  logits = []  # of each half: row g, keys 2t and 2t + 1, then row g + 8
  for half in range(2):
    sums = [zero] * 4
    for i in range(pieces):
      for s in (0, 2):
        low, high = queries[0][i], queries[1][i]
        a = [low[s], high[s], low[s + 1], high[s + 1]]
        sums = t.mma(sums, a, keys[half][i][s : s + 2], shape.dtype)
    visible = [seen(place) for place in places[2 * half : 2 * half + 2]]
    logits.append([t.choose(visible[j % 2], t.multiply(x, by), unseen) for j, x in enumerate(sums)])

  def over_quad(x, join):
    """Of the four lanes that have a row."""
    for other in (1, 2):
      x = join(x, t.as_float(t.shuffle(t.as_word(x), lane ^ other)))
    return x

  halves = range(rows // 8)
  own = [
    over_quad(
      functools.reduce(t.maximum, [x for each in logits for x in each[2 * h : 2 * h + 2]]),
      t.maximum,
    )
    for h in halves
  ]
  totals_at = _WARPS * rows * 4
  sums_at = 2 * totals_at

  def put(start, h, value):
    t.when(quad.equals(0), lambda: t.store(shared + start, (warp * rows + g + 8 * h) * 4, value))

  for h in halves:
    put(0, h, own[h])
  t.barrier()
  largest = []
  for h in halves:
    found = t.float(_LEAST)
    for w in range(_WARPS):
      found = t.maximum(found, t.load_shared(shared, (g + 8 * h) * 4 + w * rows * 4, "f32"))
    largest.append(found)
  weights = []
  for each in logits:
    weights.append(
      [
        t.exp2(t.add(each[j], t.multiply(largest[j // 2], t.float(-1.0))))
        if j // 2 in halves
        else zero
        for j in range(4)
      ]
    )
  for h in halves:
    total = functools.reduce(t.add, [x for each in weights for x in each[2 * h : 2 * h + 2]])
    put(totals_at, h, over_quad(total, t.add))
  a = [t.pack(each[j], each[j + 1], shape.dtype) for each in weights for j in (0, 2)]

  for i in range(value_pieces):
    for e in range(8):
      words = [values[place][i][e // 2] for place in range(4)]
      pairs = []
      for one, other in (words[:2], words[2:]):
        low = (one & 0xFFFF) | (other << 16)
        pairs.append(low if e % 2 == 0 else (one >> 16) | (other & 0xFFFF0000))
      product = t.mma([zero] * 4, a, pairs, shape.dtype)
      for h in halves:
        # Of outputs 64i + 8c + e, lanes have two c each, and write them side by side.
        at = ((warp * rows + g + 8 * h) * shape.stride + quad * 2 + (i * 64 + e * 8)) * 4
        t.store_words(shared + sums_at, at, [t.as_word(x) for x in product[2 * h : 2 * h + 2]])
  t.barrier()

  def of_warps(start, at, stride):
    total = zero
    for w in range(_WARPS):
      total = t.add(total, t.load_shared(shared + start, at + w * stride, "f32"))
    return total

  def write(item, offset, value):
    at = (((group * shape.chunks + chunk) * shape.shared + item) * (width + 2) + offset) * 4
    t.store_global_words(out, at, [t.as_word(value)])

  count = shape.shared * width
  for i in range(0, count, THREADS):
    item = index + i

    def sum_up(item=item):
      own_row, column = item // width, item % width
      place = (column // 64 * 8 + column % 8) * 8 + column % 64 // 8
      at = (own_row * shape.stride + place) * 4
      write(own_row, column, of_warps(sums_at, at, rows * shape.stride * 4))

    t.when(item < count, sum_up)
  # Each of these rows is lane 4r's, of the first warp, twice where there are 16.
  for h in halves:
    own_row = g + 8 * h

    def finish(own_row=own_row, h=h):
      write(own_row, t.integer(width), largest[h])
      write(own_row, t.integer(width + 1), of_warps(totals_at, own_row * 4, rows * 4))

    t.when(quad.equals(0) & warp.equals(0) & (own_row < shape.shared), finish)

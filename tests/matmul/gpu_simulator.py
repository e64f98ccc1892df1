"""Runs the program of a GPU thread in NumPy, all threads of a block side by side.

What `gpu_threads.Thread` says in PTX, `Thread` here says in arrays with an element a thread: so
that a kernel's addresses, fragments and sums are tested without a GPU. Threads run in lockstep, so
a missing barrier does not show.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Integer:
  """Unsigned 32-bit integers, one a thread."""

  def __init__(self, value):
    self.value = np.asarray(value)

  def _binary(self, op, other):
    other = other.value if isinstance(other, Integer) else np.uint32(other)
    return Integer(op(self.value, other))

  def __add__(self, other):
    return self._binary(np.add, other)

  __radd__ = __add__

  def __sub__(self, other):
    return self._binary(np.subtract, other)

  def __mul__(self, other):
    return self._binary(np.multiply, other)

  def __floordiv__(self, other):
    return self._binary(np.floor_divide, other)

  def __mod__(self, other):
    return self._binary(np.mod, other)

  def __and__(self, other):
    return self._binary(np.bitwise_and, other)

  def __or__(self, other):
    return self._binary(np.bitwise_or, other)

  def __lshift__(self, other):
    return self._binary(np.left_shift, other)

  def __rshift__(self, other):
    return self._binary(np.right_shift, other)

  def __lt__(self, other):
    return self._binary(np.less, other)

  def __xor__(self, other):
    return self._binary(np.bitwise_xor, other)

  def equals(self, other):
    return self._binary(np.equal, other)


@dataclasses.dataclass
class Thread:
  """As `gpu_threads.Thread`. Pointers are arrays of bytes; an access outside of one is an error."""

  threads: int
  shared: np.ndarray

  def __post_init__(self):
    self._active = np.ones(self.threads, bool)

  def thread_index(self):
    return Integer(np.arange(self.threads, dtype=np.uint32))

  def integer(self, value):
    return Integer(np.full(self.threads, value, np.uint32))

  def float(self, value):
    return np.full(self.threads, value, np.float32)

  def advance(self, pointer, count, stride):
    (count,) = set(np.atleast_1d(count.value).tolist())
    return pointer[count * stride :]

  def load(self, pointer, offset, kind, inside=None):
    (word,) = self.load_words(pointer, offset, 1, inside)
    return word if kind == "u32" else self.as_float(word)

  def load_words(self, pointer, offset, count, inside=None):
    active = self._active if inside is None else self._active & inside.value
    return self._read(pointer, offset, count, active)

  def _read(self, memory, offset, count, active):
    at = np.broadcast_to(offset.value, self.threads).astype(np.int64)
    assert not (at[active] % (4 * count)).any(), "not aligned"
    words = np.zeros((count, self.threads), np.uint32)
    for i in range(count):
      own = at[active] + 4 * i
      words[i, active] = memory[own[:, None] + np.arange(4)].copy().view(np.uint32)[:, 0]
    return [Integer(word) for word in words]

  def copy_async(self, address, pointer, offset, inside):
    at = np.broadcast_to(address.value, self.threads).astype(np.int64)
    pieces = self._read(pointer, offset, 4, self._active & inside.value)
    assert not (at[self._active] % 16).any(), "not aligned"
    self.store_words(self.integer(0), Integer(at), pieces)

  def commit_copies(self):
    pass

  def wait_copies(self, pending):
    pass

  def load_matrices(self, address):
    at = np.broadcast_to(address.value, self.threads).astype(np.int64).reshape(-1, 4, 8)
    assert not (at % 16).any(), "not aligned"
    # `[warps, matrices, rows, columns]` → lane (column g, rows 2t and 2t + 1).
    rows = self.shared[at[..., None] + np.arange(16)].copy().view(np.uint16)
    words = rows.transpose(0, 1, 3, 2).copy().view(np.uint32)
    return [Integer(words[:, i].reshape(-1)) for i in range(4)]

  def shuffle(self, word, lane):
    lanes = np.broadcast_to(lane.value, self.threads).reshape(-1, 32)
    words = np.broadcast_to(word.value, self.threads).reshape(-1, 32)
    return Integer(np.take_along_axis(words, lanes.astype(np.int64), 1).reshape(-1))

  def wgmma_fence(self):
    pass

  def wgmma(self, sums, a, b, n, dtype):
    parts = np.stack([word.value for word in a], -1).astype(np.uint32)
    fragment = parts[..., None].view(np.uint16).view(_DTYPES[dtype]).astype(np.float64)
    # warpgroup, warp, lane (g, t), word (column half, row half), two columns.
    fragment = fragment.reshape(-1, 4, 8, 4, 2, 2, 2).transpose(0, 1, 5, 2, 4, 3, 6)
    fragment = fragment.reshape(-1, 64, 16)
    start = np.broadcast_to(b.value, self.threads).astype(np.int64).reshape(-1, 128)
    assert (start == start[:, :1]).all(), "not the same in all threads"
    at = start[:, :1, None] + 128 * np.arange(n)[:, None] + np.arange(32)
    at ^= (at >> 7 & 7) << 4
    right = self.shared[at].copy().view(_DTYPES[dtype]).astype(np.float64)
    product = np.einsum("wrk,wnk->wrn", fragment, right)
    product = product.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
    product = product.reshape(self.threads, n // 2)
    before = np.zeros((n // 2, self.threads)) if sums is None else sums
    return [(x + product[:, i]).astype(np.float32) for i, x in enumerate(before)]

  def wgmma_commit(self):
    pass

  def wgmma_wait(self, pending):
    pass

  def wgmma_results(self, sums):
    return sums

  def load_shared(self, address, offset, kind):
    if kind == "u8":
      at = np.broadcast_to((address + offset).value, self.threads).astype(np.int64)
      return Integer(self.shared[at].astype(np.uint32))
    (word,) = self.load_shared_words(address, offset, 1)
    return word if kind == "u32" else self.as_float(word)

  def load_shared_words(self, address, offset, count):
    return self._read(self.shared, address + offset, count, self._active)

  def store(self, address, offset, value):
    self.store_words(address, offset, [self.as_word(value)])

  def store_words(self, address, offset, words):
    at = np.broadcast_to((address + offset).value, self.threads).astype(np.int64)[self._active]
    assert not (at % (4 * len(words))).any(), "not aligned"
    for i, word in enumerate(words):
      value = np.broadcast_to(word.value, self.threads).astype(np.uint32)[self._active]
      self.shared[(at + 4 * i)[:, None] + np.arange(4)] = value[:, None].copy().view(np.uint8)

  def store_rounded(self, pointer, offset, value, dtype):
    at = np.broadcast_to(offset.value, self.threads).astype(np.int64)[self._active]
    rounded = value[self._active].astype(_DTYPES[dtype])
    pointer[at[:, None] + np.arange(2)] = rounded[:, None].copy().view(np.uint8)

  def store_global_words(self, pointer, offset, words):
    at = np.broadcast_to(offset.value, self.threads).astype(np.int64)[self._active]
    assert not (at % (4 * len(words))).any(), "not aligned"
    for i, word in enumerate(words):
      value = np.broadcast_to(word.value, self.threads).astype(np.uint32)[self._active]
      pointer[(at + 4 * i)[:, None] + np.arange(4)] = value[:, None].copy().view(np.uint8)

  def as_float(self, word):
    return np.broadcast_to(word.value, self.threads).astype(np.uint32).view(np.float32)

  def as_word(self, value):
    return Integer(value.view(np.uint32))

  def pack(self, low, high, dtype):
    halves = [x.astype(_DTYPES[dtype]).view(np.uint16).astype(np.uint32) for x in (low, high)]
    return Integer(halves[0] | halves[1] << np.uint32(16))

  def byte(self, word, index):
    return self.permute(word, 0x4440 + index)

  def permute(self, word, selector):
    selector = self.integer(selector) if isinstance(selector, int) else selector
    result = np.zeros(self.threads, np.uint32)
    for i in range(4):
      chosen = selector.value >> np.uint32(4 * i) & np.uint32(7)
      byte = word.value >> np.uint32(8) * (chosen & np.uint32(3)) & np.uint32(255)
      result |= np.where(chosen < 4, byte, 0).astype(np.uint32) << np.uint32(8 * i)
    return Integer(result)

  def select(self, condition, yes, no):
    return Integer(np.where(condition.value, np.uint32(yes), np.uint32(no)))

  def choose(self, condition, yes, no):
    return np.where(condition.value, yes, no).astype(np.float32)

  def maximum(self, a, b):
    return np.maximum(a, b)

  def exp2(self, a):
    return np.exp2(a)

  def minimum(self, a, b):
    return a._binary(np.minimum, b)

  def add(self, a, b):
    return a + b

  def divide(self, a, b):
    return a / b

  def largest_of(self, a, b):
    return np.maximum(np.abs(a), np.abs(b))

  def round(self, a):
    return Integer(np.rint(a).astype(np.int32).view(np.uint32))

  def multiply(self, a, b):
    return a * b

  def fma(self, a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)

  def mma(self, sums, a, b, dtype):
    def halves(words):
      """`[warps, 8, 4, words, 2]`."""
      parts = np.stack([word.value for word in words], -1).astype(np.uint32)
      return parts[..., None].view(np.uint16).view(_DTYPES[dtype]).reshape(-1, 8, 4, len(words), 2)

    fragment = halves(a).astype(np.float64).reshape(-1, 8, 4, 2, 2, 2)
    # lane (g, t), word (column half, row half), two columns → rows (half, g), columns (half, t, 2).
    left = fragment.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
    # lane (g, t), word (row half), two rows → rows (half, t, 2), column g.
    right = halves(b).astype(np.float64).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
    product = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
    product = product.reshape(self.threads, 4)
    return [(x + product[:, i]).astype(np.float32) for i, x in enumerate(sums)]

  def barrier(self):
    pass

  def when(self, condition, body: Callable[[], None]):
    before = self._active
    self._active = before & condition.value
    if self._active.any():
      body()
    self._active = before

  def loop(self, count, body, carried):
    for i in range(count):
      carried = body(self.integer(i), carried)
    return carried


def simulate(x: Any, w: Any, tiles: Any) -> np.ndarray:
  """`gpu_few_rows.product`. The output and the shared memory begin as NaN."""
  from qlora_jax.matmul import gpu_few_rows

  shape = gpu_few_rows.shape_of(x, w, tiles)
  grid = itertools.product(range(-(-shape.m // tiles.rows)), range(-(-shape.n // tiles.columns)))
  size = gpu_few_rows.shared_bytes(w, tiles)
  program = functools.partial(gpu_few_rows.program, shape)
  y = _run(program, 32 * tiles.warps, size, grid, _weight_memory(x, w), shape.m * shape.n * 2)
  return y.view(_DTYPES[shape.dtype]).reshape(shape.m, shape.n).astype(np.float32)


def simulate_tiles(x: Any, w: Any, tiles: Any) -> np.ndarray:
  """`gpu_tiles.product`, as `simulate`."""
  from qlora_jax.matmul import gpu_tiles

  shape = gpu_tiles.shape_of(x, w, tiles)
  grid = ((i,) for i in range(gpu_tiles.grid_size(shape)))
  program = functools.partial(gpu_tiles.program, shape)
  wide = tiles.splits > 1
  nbytes = tiles.splits * shape.m * shape.n * (4 if wide else 2)
  memory = _weight_memory(x, w)
  y = _run(program, tiles.threads, shape.shared_bytes, grid, memory, nbytes)
  y = y.view(np.float32 if wide else _DTYPES[shape.dtype])
  return y.reshape(tiles.splits, shape.m, shape.n).astype(np.float32).sum(0)


def simulate_decode(q, k, v, layer, *others) -> np.ndarray:
  """`gpu_decode.attend`, as `simulate`."""
  from qlora_jax.models import gpu_decode

  shape = gpu_decode.shape_of(q, k, *others[-2:])
  (number, *arrays) = gpu_decode.operands(q, k, v, layer, *others[:-1])
  memory = _memory(arrays, number, gpu_decode.strides(k))
  program = functools.partial(gpu_decode.program, shape)
  grid = itertools.product(range(shape.batch * shape.groups), range(shape.chunks))
  count = shape.batch * shape.groups * shape.chunks * shape.shared * (shape.width + 2)
  parts = _run(program, gpu_decode.THREADS, 4 * shape.shared_words, grid, memory, 4 * count)
  parts = parts.view(np.float32)
  parts = parts.reshape(shape.batch, shape.groups, shape.chunks, shape.shared, -1)
  return np.asarray(gpu_decode.joined(jnp.asarray(parts))).reshape(q.shape)


def _weight_memory(x, w) -> list[np.ndarray]:
  from qlora_jax.matmul.gpu_few_rows import all_strides, weight_operands

  number, arrays, strides = weight_operands(w)
  return _memory([x, *arrays], *number, all_strides(strides))


def _memory(arrays, *layered) -> list[np.ndarray]:
  """What the operands' pointers point to: of stacks, where `gpu_threads.run` advances them to."""
  memory = [np.asarray(a).reshape(-1).view(np.uint8) for a in arrays]
  if layered[-1] is None:
    return memory
  number, strides = layered
  return [x[int(number[0]) * stride :] for x, stride in zip(memory, strides, strict=False)]


def _run(program, threads, shared_bytes, grid, memory, nbytes) -> np.ndarray:
  """The output's bytes."""
  y = np.full(nbytes, 0xFF, np.uint8)
  with np.errstate(over="ignore", invalid="ignore"):
    for place in grid:
      thread = Thread(threads, np.full(shared_bytes, 0xFF, np.uint8))
      indices = [Integer(np.uint32(i)) for i in place]
      program(thread, [*memory, y, Integer(np.uint32(0))], indices)
  return y

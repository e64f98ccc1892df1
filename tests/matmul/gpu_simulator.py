"""Runs the program of a GPU thread in NumPy, all threads of a block side by side.

What `gpu_threads.Thread` says in PTX, `Thread` here says in arrays with an element a thread: so
that a kernel's addresses, fragments and sums are tested without a GPU. Threads run in lockstep, so
a missing barrier does not show.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

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

  def load_shared(self, address, offset, kind):
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

  def minimum(self, a, b):
    return a._binary(np.minimum, b)

  def add(self, a, b):
    return a + b

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

  shape, operands = gpu_few_rows.specialize(x, w, tiles)
  memory = [
    np.asarray(a).reshape(-1).view(np.uint8)
    for a in (x, w.codes, w.levels.astype(np.float32), *operands)
  ]
  y = np.full(shape.m * shape.n * 2, 0xFF, np.uint8)
  size = gpu_few_rows.shared_bytes(w, tiles)
  with np.errstate(over="ignore", invalid="ignore"):
    for row in range(-(-shape.m // tiles.rows)):
      for column in range(-(-shape.n // tiles.columns)):
        thread = Thread(512, np.full(size, 0xFF, np.uint8))
        start = Integer(np.uint32(0))
        indices = [Integer(np.uint32(i)) for i in (row, column)]
        gpu_few_rows.program(shape, thread, [*memory, y, start], indices)
  return y.view(_DTYPES[shape.dtype]).reshape(shape.m, shape.n).astype(np.float32)

"""One thread's program inside a Pallas Mosaic GPU kernel.

Mosaic GPU's own arrays belong to warpgroups. What a packed weight needs, bytes looked up and
matrix fragments put together in registers, is said by thread: these are the few PTX instructions
for it, with 32-bit integers that have operators.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as _typed_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

# What it has, differs by JAX's version; the kernels are for those from 0.11.2 on (`gpu`).
utils: Any = _typed_utils

_NAMES = {"bfloat16": "bf16", "float16": "f16"}


def run(program: Callable, refs: Sequence[Any], indices: Sequence[jax.Array]) -> None:
  """Runs `program(thread, pointers, indices)` in each thread of the block.

  Args:
    refs: in global memory, all but the last, which is in shared memory.
    indices: int32 scalars.
  """
  types = [plgpu.RefType()] * len(refs) + [plgpu.Layout.WG_SPLAT(())] * len(indices)

  @plgpu.inline_mgpu(arg_types=tuple(types))
  def inline(_, *args):
    pointers = [_address(arg, 64) for arg in args[: len(refs) - 1]]
    pointers.append(Integer(_address(args[len(refs) - 1], 32)))
    program(Thread(), pointers, [Integer(x.registers.item()) for x in args[len(refs) :]])

  inline(*refs, *indices)


def _address(ref: Any, width: int) -> Any:
  return llvm.ptrtoint(ir.IntegerType.get_signless(width), utils.memref_ptr(ref))


def _i32() -> Any:
  return ir.IntegerType.get_signless(32)


def _unwrap(x: Any) -> Any:
  return x.value if isinstance(x, Integer) else x


class Integer:
  """An unsigned 32-bit integer; `//`, `%` and `<` are of unsigned ones."""

  def __init__(self, value: Any):
    self.value = value

  def _binary(self, op: Callable, other: "Integer | int") -> "Integer":
    if isinstance(other, int):
      other = Integer(arith.constant(_i32(), _signed(other)))
    return Integer(op(self.value, other.value))

  def __add__(self, other):
    return self._binary(arith.addi, other)

  def __mul__(self, other):
    return self._binary(arith.muli, other)

  __radd__ = __add__

  def __floordiv__(self, other):
    return self._binary(arith.divui, other)

  def __mod__(self, other):
    return self._binary(arith.remui, other)

  def __and__(self, other):
    return self._binary(arith.andi, other)

  def __or__(self, other):
    return self._binary(arith.ori, other)

  def __lshift__(self, other):
    return self._binary(arith.shli, other)

  def __rshift__(self, other):
    return self._binary(arith.shrui, other)

  def __lt__(self, other):
    return self._binary(lambda a, b: arith.cmpi(arith.CmpIPredicate.ult, a, b), other)

  def equals(self, other):
    """Whether the two are equal."""
    return self._binary(lambda a, b: arith.cmpi(arith.CmpIPredicate.eq, a, b), other)


def _signed(value: int) -> int:
  return operator.index(value) - (1 << 32 if value >= 1 << 31 else 0)


class Thread:
  """What a thread can do. Addresses in shared memory are Integers; all offsets are in bytes."""

  def thread_index(self) -> Integer:
    """In the block."""
    return Integer(mgpu.thread_idx())

  def integer(self, value: int) -> Integer:
    """A constant."""
    return Integer(arith.constant(_i32(), _signed(value)))

  def float(self, value: float) -> Any:
    """A float32 constant."""
    return arith.constant(ir.F32Type.get(), value)

  def load(self, pointer: Any, offset: Integer, kind: str, inside: Integer | None = None) -> Any:
    """A "u32" or "f32" of global memory that no one writes; 0 where not `inside`."""
    (word,) = self.load_words(pointer, offset, 1, inside)
    return word if kind == "u32" else self.as_float(word)

  def load_words(
    self, pointer: Any, offset: Integer, count: int, inside: Integer | None = None
  ) -> list[Integer]:
    """1, 2 or 4 words side by side, which begin at a multiple of their size."""
    address = arith.addi(pointer, arith.extui(pointer.type, offset.value))
    results = [f"${i}" for i in range(count)]
    load = f"ld.global.nc{_vector(count)} {_braced(results)}, [${count}];"
    if inside is not None:
      zeros = " ".join(f"mov.b32 {result}, 0;" for result in results)
      load = f"{{ {zeros} @${count + 1} {load} }}"
    words = utils.inline_ptx(
      load,
      address,
      *([] if inside is None else [inside.value]),
      result_types=[_i32()] * count,
      has_side_effects=True,
    )
    return [Integer(word) for word in words]

  def load_shared(self, address: Integer, offset: Integer, kind: str) -> Any:
    """A "u32" or "f32" of shared memory."""
    (word,) = self.load_shared_words(address, offset, 1)
    return word if kind == "u32" else self.as_float(word)

  def load_shared_words(self, address: Integer, offset: Integer, count: int) -> list[Integer]:
    """1, 2 or 4 words side by side of shared memory."""
    results = [f"${i}" for i in range(count)]
    words = utils.inline_ptx(
      f"ld.shared{_vector(count)} {_braced(results)}, [${count}];",
      (address + offset).value,
      result_types=[_i32()] * count,
      has_side_effects=True,
    )
    return [Integer(word) for word in words]

  def store(self, address: Integer, offset: Integer, value: Any) -> None:
    """Writes a float32 to shared memory."""
    self.store_words(address, offset, [self.as_word(value)])

  def store_words(self, address: Integer, offset: Integer, words: Sequence[Integer]) -> None:
    """Writes 1, 2 or 4 words to shared memory."""
    names = [f"${i + 1}" for i in range(len(words))]
    utils.inline_ptx(
      f"st.shared{_vector(len(words))} [$0], {_braced(names)};",
      (address + offset).value,
      *map(_unwrap, words),
    )

  def store_rounded(self, pointer: Any, offset: Integer, value: Any, dtype: str) -> None:
    """Rounds a float32 to "bfloat16" or "float16", and writes it to global memory."""
    address = arith.addi(pointer, arith.extui(pointer.type, offset.value))
    utils.inline_ptx(
      f"{{ .reg .b16 rounded; cvt.rn.{_NAMES[dtype]}.f32 rounded, $1;"
      " st.global.b16 [$0], rounded; }",
      address,
      value,
    )

  def as_float(self, word: Integer) -> Any:
    """The float32 of these bits."""
    return arith.bitcast(ir.F32Type.get(), word.value)

  def as_word(self, value: Any) -> Integer:
    """The bits of a float32."""
    return Integer(arith.bitcast(_i32(), value))

  def pack(self, low: Any, high: Any, dtype: str) -> Integer:
    """Two float32 as one word of "bfloat16" or "float16"."""
    return Integer(
      utils.inline_ptx(f"cvt.rn.{_NAMES[dtype]}x2.f32 $0, $1, $2;", high, low, result_types=_i32())
    )

  def byte(self, word: Integer, index: int) -> Integer:
    """Byte `index` of a word, from the lowest."""
    return self.permute(word, 0x4440 + index)

  def permute(self, word: Integer, selector: Integer | int) -> Integer:
    """PTX's `prmt` of a word and 0: the bytes that the selector names, 4 being a zero."""
    selector = self.integer(selector) if isinstance(selector, int) else selector
    return Integer(
      utils.inline_ptx("prmt.b32 $0, $1, 0, $2;", word.value, selector.value, result_types=_i32())
    )

  def select(self, condition: Integer, yes: int, no: int) -> Integer:
    """One of two constants."""
    chosen = arith.select(condition.value, self.integer(yes).value, self.integer(no).value)
    return Integer(chosen)

  def minimum(self, a: Integer, b: int) -> Integer:
    """The smaller of the two."""
    return a._binary(arith.minui, b)

  def add(self, a: Any, b: Any) -> Any:
    """float32, rounded: never joined with a product."""
    return utils.inline_ptx("add.rn.f32 $0, $1, $2;", a, b, result_types=ir.F32Type.get())

  def multiply(self, a: Any, b: Any) -> Any:
    """float32, rounded."""
    return utils.inline_ptx("mul.rn.f32 $0, $1, $2;", a, b, result_types=ir.F32Type.get())

  def fma(self, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    return utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, result_types=ir.F32Type.get())

  def mma(
    self, sums: Sequence[Any], a: Sequence[Integer], b: Sequence[Integer], dtype: str
  ) -> list[Any]:
    """The warp's 16 × 8 sums plus A (16 × 16) times B (16 × 8), by fragments."""
    kind = _NAMES[dtype]
    return list(
      utils.inline_ptx(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *map(_unwrap, (*a, *b, *sums)),
        result_types=[ir.F32Type.get()] * 4,
        convergent=True,
      )
    )

  def barrier(self) -> None:
    """Waits for all threads of the block."""
    utils.inline_ptx("bar.sync 0;", has_side_effects=True, convergent=True)

  def when(self, condition: Integer, body: Callable[[], None]) -> None:
    """Runs `body` in the threads where `condition` holds."""
    with utils.when(condition.value):
      body()

  def loop(self, count: int, body: Callable[[Integer, Any], Any], carried: Any) -> Any:
    """`carried = body(i, carried)` for i from 0 to `count`."""
    leaves, tree = jax.tree.flatten(carried)
    integers = [isinstance(leaf, Integer) for leaf in leaves]

    def wrap(values: Sequence[Any]) -> Any:
      wrapped = [Integer(v) if i else v for v, i in zip(values, integers, strict=True)]
      return jax.tree.unflatten(tree, wrapped)

    bounds = [self.integer(bound).value for bound in (0, count, 1)]
    lower, upper, step = bounds
    loop = scf.ForOp(lower, upper, step, [_unwrap(leaf) for leaf in leaves])
    with ir.InsertionPoint(loop.body):
      result = body(Integer(loop.induction_variable), wrap(loop.inner_iter_args))
      scf.YieldOp([_unwrap(leaf) for leaf in jax.tree.leaves(result)])
    return wrap(loop.results)


def _vector(count: int) -> str:
  return ".b32" if count == 1 else f".v{count}.b32"


def _braced(names: Sequence[str]) -> str:
  return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"

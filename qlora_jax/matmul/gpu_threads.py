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


def run(
  program: Callable,
  refs: Sequence[Any],
  indices: Sequence[jax.Array],
  strides: Sequence[int] | None = None,
) -> None:
  """Runs `program(thread, pointers, indices)` in each thread of the block.

  Args:
    refs: in global memory, all but the last, which is in shared memory.
    indices: int32 scalars.
    strides: bytes by which the layers of a stack lie apart, of each ref in global memory but the
      first: that holds the number of the layer, int32, and the program sees the others, at it.
  """
  types = [plgpu.RefType()] * len(refs) + [plgpu.Layout.WG_SPLAT(())] * len(indices)

  @plgpu.inline_mgpu(arg_types=tuple(types))
  def inline(_, *args):
    pointers = [_address(arg, 64) for arg in args[: len(refs) - 1]]
    if strides is not None:
      number, *pointers = pointers
      layer = Thread().load(number, Integer(arith.constant(_i32(), 0)), "u32").value
      pointers = [_advanced(*each, layer) for each in zip(pointers, strides, strict=True)]
    pointers.append(Integer(_address(args[len(refs) - 1], 32)))
    program(Thread(), pointers, [Integer(x.registers.item()) for x in args[len(refs) :]])

  inline(*refs, *indices)


def _address(ref: Any, width: int) -> Any:
  return llvm.ptrtoint(ir.IntegerType.get_signless(width), utils.memref_ptr(ref))


def _advanced(pointer: Any, stride: int, count: Any) -> Any:
  """With 64 bits: a stack may have more bytes than 32 count."""
  if not stride:
    return pointer
  wide = pointer.type
  step = arith.muli(arith.extui(wide, count), arith.constant(wide, stride))
  return arith.addi(pointer, step)


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

  def __sub__(self, other):
    return self._binary(arith.subi, other)

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

  def __xor__(self, other):
    return self._binary(arith.xori, other)

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

  def advance(self, pointer: Any, count: Integer, stride: int) -> Any:
    """The pointer behind `count` items of so many bytes, counted with 64 bits."""
    return _advanced(pointer, stride, count.value)

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

  def copy_async(self, address: Integer, pointer: Any, offset: Integer, inside: Integer) -> None:
    """Begins to copy 16 bytes of global memory to shared memory; zeros where not `inside`."""
    source = arith.addi(pointer, arith.extui(pointer.type, offset.value))
    utils.inline_ptx(
      "{ .reg .b32 size; selp.b32 size, 16, 0, $2;"
      " cp.async.cg.shared.global [$0], [$1], 16, size; }",
      address.value,
      source,
      inside.value,
    )

  def commit_copies(self) -> None:
    """Closes a group of the copies begun so far by this thread."""
    utils.inline_ptx("cp.async.commit_group;")

  def wait_copies(self, pending: int) -> None:
    """Waits until all but the last `pending` groups are there.

    After a barrier they are so for all threads, and for the tensor cores too.
    """
    utils.inline_ptx(f"cp.async.wait_group {pending}; fence.proxy.async.shared::cta;")

  def load_matrices(self, address: Integer) -> list[Integer]:
    """Four matrices of 8 rows × 8 columns of 2 bytes from shared memory, transposed: `ldmatrix`.

    Args:
      address: lane 8i + j gives that of row j of matrix i, a multiple of 16.

    Returns:
      Lane 4g + t's words, one a matrix: column g of rows 2t (low) and 2t + 1 (high).
    """
    return self._words(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", 4, address.value
    )

  def _words(self, ptx: str, count: int, *operands: Any) -> list[Integer]:
    words = utils.inline_ptx(
      ptx, *operands, result_types=[_i32()] * count, has_side_effects=True, convergent=True
    )
    return [Integer(word) for word in words]

  def shuffle(self, word: Integer, lane: Integer) -> Integer:
    """What `lane` of the warp has."""
    (word,) = self._words(
      "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", 1, word.value, lane.value
    )
    return word

  def load_shared(self, address: Integer, offset: Integer, kind: str) -> Any:
    """A "u8", a "u32" or an "f32" of shared memory."""
    if kind == "u8":
      (word,) = utils.inline_ptx(
        "ld.shared.u8 $0, [$1];",
        (address + offset).value,
        result_types=[_i32()],
        has_side_effects=True,
      )
      return Integer(word)
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

  def store_global_words(self, pointer: Any, offset: Integer, words: Sequence[Integer]) -> None:
    """Writes 1, 2 or 4 words to global memory."""
    names = [f"${i + 1}" for i in range(len(words))]
    address = arith.addi(pointer, arith.extui(pointer.type, offset.value))
    utils.inline_ptx(
      f"st.global{_vector(len(words))} [$0], {_braced(names)};", address, *map(_unwrap, words)
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

  def choose(self, condition: Integer, yes: Any, no: Any) -> Any:
    """One of two float32."""
    return arith.select(condition.value, yes, no)

  def maximum(self, a: Any, b: Any) -> Any:
    """The larger of two float32."""
    return utils.inline_ptx("max.f32 $0, $1, $2;", a, b, result_types=ir.F32Type.get())

  def exp2(self, a: Any) -> Any:
    """2 to the power of a float32, to 2 units in the last place."""
    return utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", a, result_types=ir.F32Type.get())

  def minimum(self, a: Integer, b: int) -> Integer:
    """The smaller of the two."""
    return a._binary(arith.minui, b)

  def add(self, a: Any, b: Any) -> Any:
    """float32, rounded: never joined with a product."""
    return utils.inline_ptx("add.rn.f32 $0, $1, $2;", a, b, result_types=ir.F32Type.get())

  def divide(self, a: Any, b: Any) -> Any:
    """float32, rounded."""
    return utils.inline_ptx("div.rn.f32 $0, $1, $2;", a, b, result_types=ir.F32Type.get())

  def largest_of(self, a: Any, b: Any) -> Any:
    """The larger magnitude of two float32."""
    ptx = "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.f32 $0, a, b; }"
    return utils.inline_ptx(ptx, a, b, result_types=ir.F32Type.get())

  def round(self, a: Any) -> Integer:
    """The nearest integer to a float32, in two's complement."""
    return Integer(utils.inline_ptx("cvt.rni.s32.f32 $0, $1;", a, result_types=_i32()))

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

  def wgmma_fence(self) -> None:
    """Orders registers and shared memory before the products that follow."""
    utils.inline_ptx("wgmma.fence.sync.aligned;", has_side_effects=True, convergent=True)

  def wgmma(
    self, sums: Sequence[Any] | None, a: Sequence[Integer], b: Integer, n: int, dtype: str
  ) -> list[Any]:
    """Begins a warpgroup's product: 64 × n sums plus A (64 × 16) times B (16 × n).

    Sums and `a` must not be read or written before `wgmma_wait`.

    Args:
      sums: n / 2 float32, or None for zeros: lane 4g + t of warp w has, at 4j + 2h + i, row
        16w + g + 8h and column 8j + 2t + i.
      a: fragment of rows 16w to 16w + 15, as `mma`'s.
      b: address of Bᵀ in shared memory, n rows of 128 bytes whose 16-byte pieces are exchanged
        (piece p of row r lies at p ^ r % 8, rows counted from a multiple of 1,024 bytes).
    """
    count = n // 2
    kind = _NAMES[dtype]
    held = [] if sums is None else list(sums)
    registers = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    first = count + len(held)
    words = "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"
    # The descriptor: address / 16; 8 rows are 1,024 bytes; pieces exchanged over 128 bytes. (PTX
    # ISA, "Matrix descriptor format".)
    ptx = (
      "{ .reg .pred p; .reg .b64 b; .reg .b32 low;"
      f" and.b32 low, ${first + 4}, 0x3ffff; shr.b32 low, low, 4; or.b32 low, low, 0x10000;"
      f" mov.b64 b, {{low, {(1 << 30) | 64}}}; setp.ne.b32 p, {int(bool(held))}, 0;"
      f" wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"
      f" {registers}, {words}, b, p, 1, 1, 0; }}"
    )
    return _tied(ptx, count, held, [*map(_unwrap, a), b.value])

  def wgmma_commit(self) -> None:
    """Closes a group of the products begun so far."""
    utils.inline_ptx("wgmma.commit_group.sync.aligned;", has_side_effects=True, convergent=True)

  def wgmma_wait(self, pending: int) -> None:
    """Waits until all but the last `pending` groups are done."""
    utils.inline_ptx(
      f"wgmma.wait_group.sync.aligned {pending};", has_side_effects=True, convergent=True
    )

  def wgmma_results(self, sums: Sequence[Any]) -> list[Any]:
    """Waits until all products are done: their `sums`, which may be read."""
    return _tied("wgmma.wait_group.sync.aligned 0;", len(sums), list(sums), [])

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


def _tied(ptx: str, count: int, held: list[Any], operands: list[Any]) -> list[Any]:
  """PTX with `count` float32 results in the registers of `held`, if any; then `operands`."""
  f32 = ir.F32Type.get()
  constraints = ["=f"] * count + [str(i) for i in range(len(held))] + ["r"] * len(operands)
  inline: Any = llvm.inline_asm
  result = inline(
    llvm.StructType.get_literal([f32] * count),
    [*held, *operands],
    ptx,
    ",".join(constraints),
    has_side_effects=True,
    convergent=True,
  )
  return [llvm.extractvalue(f32, result, [i]) for i in range(count)]


def _vector(count: int) -> str:
  return ".b32" if count == 1 else f".v{count}.b32"


def _braced(names: Sequence[str]) -> str:
  return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"

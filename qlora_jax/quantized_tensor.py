"""QuantizedTensor: a weight as packed codes, scales and a table, in one pytree.

`w[..., k, n] ≈ (levels[code[..., k, n]] − zero[..., k // B, n]) · scale[..., k // B, n]`

Blocks of B weights run along K, the contraction axis of a `[K, N]` kernel. Codes keep the
weight's axes: K is packed in place, so the codes and the scales are cut by the same
PartitionSpec as the weight, and `scan`, `vmap` and `shard_map` slice all leaves alike. The
shape is read off the arrays, never remembered, so that it is right inside them.

Packing. Rows come in groups of 128 (the whole K, rounded up to a unit, where 128 does not
divide it). A group is cut in planes of consecutive rows: 2 planes for 4-bit codes, 4 for
2-bit, 8 for 3-bit, 1 for 8-bit. Byte row i of a 4-bit group holds row i of plane 0 in its low
nibble and row i of plane 1 in its high one, so that a decoded plane is a plain slice of the
weight and nothing needs interleaving, on any backend. 3-bit codes go 8 to 3 bytes, one from
each plane; the three bytes lie in three consecutive runs of rows.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import codebooks, traced_for

GROUP = 128

# Codes in a unit and the bytes that it fills, by the width of a code.
_UNITS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}


def planes(bits: int) -> int:
  """How many planes of rows a group of `bits`-bit codes is cut in."""
  return _UNITS[bits][0]


def _register(cls, data: list[str], static: list[str]):
  return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)


@dataclasses.dataclass(frozen=True)
class NestedScales:
  """Scales that are quantized again: 8 bits each, plus a float32 for every `block_size`.

  `scale[k, n] = map[codes[k, n]] · absmax[i // block_size] + offset`, with `map` the signed
  dynamic map (`codebooks.dynamic_map`) and `i = n · K/B + k` the flat index in bitsandbytes'
  order, which is [out, in]. Two float32 roundings, as bitsandbytes restores them.

  Attributes:
    codes: `[..., K/B, N]` uint8.
    absmax: `[..., ceil(K/B · N / block_size)]` float32.
    offset: `[...]` float32, the mean that was subtracted.
    block_size: scales that share an absmax.
  """

  codes: jax.Array
  absmax: jax.Array
  offset: jax.Array
  block_size: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the scales that are stood for, `[..., K/B, N]`."""
    return self.codes.shape


_register(NestedScales, ["codes", "absmax", "offset"], ["block_size"])


@dataclasses.dataclass(frozen=True)
class TwoLevelScales:
  """Scales of 8-bit floats and one float32: `scale[k, n] = codes[k, n] · factor`, as NVFP4 has.

  Attributes:
    codes: `[..., K/B, N]` float8_e4m3fn.
    factor: `[...]` float32, of the whole matrix.
  """

  codes: jax.Array
  factor: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the scales that are stood for, `[..., K/B, N]`."""
    return self.codes.shape


_register(TwoLevelScales, ["codes", "factor"], [])

Scales = jax.Array | NestedScales | TwoLevelScales


class _Counted:
  """What a weight takes, of whatever leaves it has."""

  if TYPE_CHECKING:

    @property
    def size(self) -> int:
      """Weights, without padding."""
      ...

  @property
  def nbytes(self) -> int:
    """Of all leaves: codes with their padding, scales, zero-points, tables, what is beside them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  @property
  def bits_per_param(self) -> float:
    """8 · nbytes / size."""
    return 8 * self.nbytes / self.size


@dataclasses.dataclass(frozen=True)
class Stack:
  """What a layer was sliced from, for a kernel that reads it where it lies.

  Attributes:
    codes: `[..., rows, N]` uint8, of all layers.
    index: `[]` int32, which of their matrices, counted through all leading axes.
    scales, levels, zero: of all layers, where the kernels read these there too; else None.
  """

  codes: jax.Array
  index: jax.Array
  scales: "Scales | None" = None
  levels: jax.Array | None = None
  zero: jax.Array | None = None


_register(Stack, ["codes", "index", "scales", "levels", "zero"], [])


@dataclasses.dataclass(frozen=True)
class QuantizedTensor(_Counted):
  """A packed weight; `w ≈ (levels[code] − zero) · scale`. Made by `quantize`.

  Nothing is validated here, since tree transforms put all kinds of things in the leaves;
  `quantize` and `quantized_matmul` validate.

  Attributes:
    codes: `[..., rows, N]` uint8, packed along K as the module says.
    scales: `[..., ceil(K / block_size), N]` float32, bfloat16 or float8_e8m0fnu, or NestedScales,
      or TwoLevelScales; `restore_scales` gives the numbers.
    levels: `[..., 2**bits]` float32, or `[..., N, 2**bits]`, a table a column. Data, not a
      constant: learned tables, or one a layer.
    zero: `[..., ceil(K / block_size), N]`, in units of levels, of zero-point formats.
    bits: of a code: 2, 3, 4 or 8.
    block_size: weights along K that share a scale.
    padding: rows that round K up to whole units; 0 where K divides.
    stack: None but in a scan over layers (see `matmul.stacked`); never in what is kept.
  """

  codes: jax.Array
  scales: Scales
  levels: jax.Array
  zero: jax.Array | None
  bits: int
  block_size: int
  padding: int
  stack: Stack | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight that is stood for, `[..., K, N]`."""
    *leading, rows, n = self.codes.shape
    codes, unit_bytes = _UNITS[self.bits]
    return (*leading, rows * codes // unit_bytes - self.padding, n)

  @property
  def ndim(self) -> int:
    return len(self.codes.shape)

  @property
  def column_tables(self) -> bool:
    """Whether each column has a table of its own."""
    return len(self.levels.shape) == self.ndim

  @property
  def size(self) -> int:
    """Weights, without padding."""
    return math.prod(self.shape)


_register(
  QuantizedTensor,
  ["codes", "scales", "levels", "zero", "stack"],
  ["bits", "block_size", "padding"],
)


class _Wrapper(_Counted):
  """What is the same of a weight that holds a packed one, `inner`."""

  if TYPE_CHECKING:

    @property
    def inner(self) -> "QuantizedTensor | RotatedQuantizedTensor":
      """What is wrapped."""
      ...

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight that is stood for, `[..., K, N]`."""
    return self.inner.shape

  @property
  def ndim(self) -> int:
    return self.inner.ndim

  @property
  def size(self) -> int:
    """Weights."""
    return self.inner.size

  @property
  def bits(self) -> int:
    """Of a code."""
    return self.inner.bits

  @property
  def block_size(self) -> int:
    """Weights that share a scale."""
    return self.inner.block_size

  @property
  def scales(self) -> Scales:
    """Of what is wrapped."""
    return self.inner.scales

  @property
  def levels(self) -> jax.Array:
    """The table."""
    return self.inner.levels


@dataclasses.dataclass(frozen=True)
class FlatQuantizedTensor(_Wrapper):
  """A weight whose blocks cross from output to output, as bitsandbytes has them where B ∤ K.

  It is read from such files, dequantized and written again code for code. Products decode it
  whole: only a weight that is imported has this form.

  Attributes:
    flat: `[..., N · K, 1]`, the weight in torch's order, `[out, in]` row by row.
    features: N, remembered: the arrays do not tell it.
  """

  flat: QuantizedTensor
  features: int

  @property
  def inner(self) -> QuantizedTensor:
    """`flat`."""
    return self.flat

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight that is stood for, `[..., K, N]`."""
    *leading, count, _ = self.flat.shape
    return (*leading, count // self.features, self.features)


_register(FlatQuantizedTensor, ["flat"], ["features"])


@dataclasses.dataclass(frozen=True)
class RotatedQuantizedTensor(_Wrapper):
  """A weight whose K was rotated before it was quantized: `x · W = rotate(x, signs) · inner`.

  See `rotation`, which says what is rotated how.

  Attributes:
    inner: the rotated weight, packed.
    signs: `[..., K]` int8, ±1.
  """

  inner: QuantizedTensor
  signs: jax.Array


@dataclasses.dataclass(frozen=True)
class OutlierQuantizedTensor(_Wrapper):
  """A packed weight some of whose K rows are kept in 16 bits (columns, in torch's order).

  `W = inner`, and `inner + values` in the rows: those were zeros when `inner` was quantized, and a
  table without a zero rounds them to what `values` make up for.

  Attributes:
    inner: the weight without those rows, packed.
    rows: `[..., R]` int32, ascending.
    values: `[..., R, N]` bfloat16.
  """

  inner: QuantizedTensor | RotatedQuantizedTensor
  rows: jax.Array
  values: jax.Array


_register(RotatedQuantizedTensor, ["inner", "signs"], [])
_register(OutlierQuantizedTensor, ["inner", "rows", "values"], [])

AnyQuantizedTensor = (
  QuantizedTensor | FlatQuantizedTensor | RotatedQuantizedTensor | OutlierQuantizedTensor
)


def is_quantized(x: object) -> bool:
  """For `is_leaf=`: treats a packed weight as one leaf."""
  return isinstance(x, AnyQuantizedTensor)


def innermost(w: AnyQuantizedTensor) -> QuantizedTensor:
  """The codes of a weight, without what is flat about it or wrapped around it."""
  while not isinstance(w, QuantizedTensor):
    w = w.inner
  return w


def plane_rows(k: int, bits: int) -> tuple[int, int, list[int]]:
  """How K rows are laid out: (groups, rows of a full plane, rows of each plane).

  Planes are alike but where 128 does not divide K: there the last ones fall short by the
  padding.
  """
  count = planes(bits)
  if k % GROUP == 0:
    return k // GROUP, GROUP // count, [GROUP // count] * count
  rows = -(-k // count)
  return 1, rows, [min(max(k - j * rows, 0), rows) for j in range(count)]


def split_rows(x: jax.Array, bits: int, axis: int) -> list[jax.Array]:
  """Cuts an axis of length K into planes: each `[..., groups, plane rows, ...]`.

  The very slices that `unpack` returns: a product over K is the sum over planes.
  """
  axis = axis % x.ndim
  k = x.shape[axis]
  groups, full, rows = plane_rows(k, bits)
  if groups > 1 or k == GROUP:
    shape = (*x.shape[:axis], groups, len(rows), full, *x.shape[axis + 1 :])
    x = x.reshape(shape)
    return [jax.lax.index_in_dim(x, j, axis + 1, keepdims=False) for j in range(len(rows))]
  starts = [min(j * full, k) for j in range(len(rows))]
  return [
    jnp.expand_dims(jax.lax.slice_in_dim(x, start, start + size, axis=axis), axis)
    for start, size in zip(starts, rows, strict=True)
  ]


def join_rows(parts: list[jax.Array], axis: int) -> jax.Array:
  """The inverse of `split_rows`: `axis` is where `groups` stands, as counted in the result."""
  rank = parts[0].ndim - 1
  axis = axis % rank
  if len({part.shape for part in parts}) == 1:
    x = jnp.stack(parts, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])
  return jnp.concatenate([jax.lax.squeeze(part, (axis,)) for part in parts], axis)


def pack(codes: jax.Array, bits: int) -> tuple[jax.Array, int]:
  """Packs `[K, N]` uint8 codes along K as the module says.

  Returns:
    The packed rows, `[rows, N]` uint8, and the padding (codes 0) that K took.
  """
  k, n = codes.shape
  padding = -k % planes(bits)
  _, full, rows = plane_rows(k, bits)
  parts = [
    jnp.pad(part, ((0, 0), (0, full - size), (0, 0))) if size < full else part
    for part, size in zip(split_rows(codes, bits, 0), rows, strict=True)
  ]
  if bits == 3:
    c0, c1, c2, c3, c4, c5, c6, c7 = parts
    # [groups, 3, full, N]: the low bytes of all words, then the middle ones, then the high. In
    # bytes throughout: words of 32 bits would be held.
    low = c0 | c1 << np.uint8(3) | c2 << np.uint8(6)
    middle = c2 >> np.uint8(2) | c3 << np.uint8(1) | c4 << np.uint8(4) | c5 << np.uint8(7)
    high = c5 >> np.uint8(1) | c6 << np.uint8(2) | c7 << np.uint8(5)
    packed = jnp.stack([low, middle, high], axis=1)
  else:
    packed = parts[0]
    for j, part in enumerate(parts[1:], 1):
      packed = packed | (part << np.uint8(bits * j))
  return packed.reshape(-1, n), padding


def unpack(packed: jax.Array, bits: int, padding: int) -> list[jax.Array]:
  """The planes of codes in `[rows, N]` packed bytes, each `[groups, plane rows, N]` uint8."""
  rows, n = packed.shape
  count, unit_bytes = _UNITS[bits]
  groups, full, sizes = plane_rows(rows * count // unit_bytes - padding, bits)
  if bits == 3:
    low, middle, high = jnp.moveaxis(packed.reshape(groups, 3, full, n), 1, 0).astype(jnp.uint32)
    word = low | (middle << np.uint32(8)) | (high << np.uint32(16))
    parts = [((word >> np.uint32(3 * j)) & np.uint32(7)).astype(jnp.uint8) for j in range(count)]
  else:
    packed = packed.reshape(groups, full, n)
    mask = np.uint8(2**bits - 1)
    parts = [(packed >> np.uint8(bits * j)) & mask for j in range(count)]
  return [part[:, :size] for part, size in zip(parts, sizes, strict=True)]


def look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
  """`table[codes]`, of uint8 codes within the table.

  On a TPU by a tree of selects: XLA's gather there reads a whole tile of memory for each code, by
  its compiler's account (`experiments.bench.tpu_compile`).

  Args:
    table: `[2**bits]`, or `[N, 2**bits]`, a table for each of the codes' last axis.
    codes: `[..., N]`.
  """
  if traced_for.target()[0] == "tpu":
    found = [jnp.broadcast_to(table[..., i], codes.shape) for i in range(table.shape[-1])]
    bit = 1
    while len(found) > 1:
      on = (codes & np.uint8(bit)) != 0
      found = [jnp.where(on, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
      bit *= 2
    return found[0]
  place: Any = codes
  if table.ndim == 2:
    place = (jax.lax.broadcasted_iota(jnp.int32, codes.shape, codes.ndim - 1), codes)
  return table.at[place].get(mode="promise_in_bounds")


def restore_scales(scales: Scales) -> jax.Array:
  """`[..., K/B, N]` float32 scales, from whatever they are stored as."""
  if isinstance(scales, TwoLevelScales):
    return scales.codes.astype(jnp.float32) * scales.factor[..., None, None]
  if not isinstance(scales, NestedScales):
    if scales.dtype != jnp.float8_e8m0fnu:
      return scales.astype(jnp.float32)
    # Its byte is the exponent of a float32. Byte 0, 2^-127, is zero: XLA's CPU backend flushes it.
    exponent = jax.lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(exponent << np.uint32(23), jnp.float32)
  if scales.codes.ndim > 2:
    return jax.vmap(restore_scales)(scales)
  blocks, n = scales.codes.shape
  # The flat index of bitsandbytes' order, [out, in].
  if traced_for.target()[0] == "tpu":
    # Without a lookup: see `look_up`.
    absmax = jnp.repeat(scales.absmax, scales.block_size)[: n * blocks].reshape(n, blocks).T
  else:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (blocks, n), axis) for axis in (0, 1))
    index = (column * np.int32(blocks) + row) // np.int32(scales.block_size)
    absmax = scales.absmax.at[index].get(mode="promise_in_bounds")
  product = look_up(jnp.asarray(codebooks.dynamic_map()), scales.codes) * absmax
  # The level of code 127 is 0. The select keeps two roundings: XLA's CPU backend fuses a bare
  # product and sum into one (a barrier between them does not stop it in JAX 0.10.2).
  restored = jnp.where(scales.codes == np.uint8(127), 0, product) + scales.offset
  # Restored once a block, not again for each weight that reads it.
  return jax.lax.optimization_barrier(restored)

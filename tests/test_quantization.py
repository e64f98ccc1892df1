import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax import codebooks
from qlora_jax.quantization import (
  QuantizationConfig,
  dequantize,
  nest_scales,
  quantize,
  quantize_tree,
  treatments,
)
from qlora_jax.quantized_tensor import (
  NestedScales,
  QuantizedTensor,
  join_rows,
  restore_scales,
  unpack,
)

TINY = np.float32(2.0**-126)


def unpacked(q: QuantizedTensor) -> np.ndarray:
  """The codes `[K, N]` of a packed matrix."""
  return np.asarray(join_rows(unpack(q.codes, q.bits, q.padding), 0))


@jax.jit
def jitted_nest(scales, offset):
  return nest_scales(scales, 256, offset=offset)


def assert_same(a, b):
  """Two trees alike bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# Golden vectors of bitsandbytes. Its flat blocks over [out, in] are our blocks along K of the
# transposed weight where in % block == 0, else of the flat weight as one column.

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}
# bitsandbytes' code of each of our sorted FP4 levels.
FP4_CODES = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8)
# Its rows 0 to 2 hold subnormals, which XLA's CPU backend flushes to zero: asserted apart.
SUBNORMAL = "extreme_8x64"


@dataclasses.dataclass
class Golden:
  folder: str
  inputs: dict
  vectors: dict
  cases: dict


@pytest.fixture(scope="module")
def golden(shared):
  folder = shared / "golden" / "quant4bit"
  return Golden(
    str(folder),
    dict(np.load(folder / "inputs.npz")),
    dict(np.load(folder / "vectors.npz")),
    {case["key"]: case for case in json.loads((folder / "index.json").read_text())},
  )


# index.json's rows, written out so that the cases have names where the folder is absent.
INPUTS = {
  "normal_256x192": ("f32",),
  "normal_64x192": ("bf16", "f16"),
  "student3_64x192": ("f32", "bf16", "f16"),
  "zeroblock_64x128": ("f32",),
  "midpoints_nf4": ("f32",),
  "midpoints_fp4": ("f32",),
  "ragged_1000": ("f32", "bf16"),
  "ragged_7x33": ("f32", "bf16"),
  "ragged_5x100": ("f32", "bf16"),
  "extreme_8x64": ("f32",),
}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
KEYS = [
  f"{name}.{dtype}.{table}.bs{block}"
  for name, dtypes in INPUTS.items()
  for dtype in dtypes
  for table in ("nf4", "fp4")
  for block in BLOCKS
]
# One block size within a row and one that crosses rows are enough for the quick part.
CASES = [
  pytest.param(key, marks=[] if key.endswith((".bs64", ".bs256")) else pytest.mark.slow)
  for key in KEYS
]


def test_these_are_all_of_the_goldens(golden):
  assert len(KEYS) == 256 and set(KEYS) == set(golden.cases)


class Case:
  """One golden and what we make of its input."""

  def __init__(self, golden: Golden, key: str):
    self.row, self.key, self.golden = golden.cases[key], key, golden
    self.dtype, self.block = DTYPES[self.row["dtype"]], self.row["blocksize"]
    # The subnormals as they are: a cast by XLA would flush them.
    self.x = golden.inputs[self.row["input"]].astype(self.dtype)
    self.flat = self.x.ndim == 1 or self.x.shape[-1] % self.block != 0
    w = jnp.asarray(self.x.reshape(-1, 1) if self.flat else self.x.T)
    self.ours = quantize(
      w, codebook=self.row["quant_type"], block_size=self.block, double_quantization=False
    )
    self.codes = self.flattened(unpacked(self.ours))
    packed = golden.vectors[f"{key}.packed"]
    self.expected = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    if self.codes.size % 2:
      # bitsandbytes fills an odd tail with the code of zero.
      zero = {"nf4": 7, "fp4": 0}[self.row["quant_type"]]
      assert self.expected[-1] == zero
    self.expected = self.expected[: self.codes.size]
    if self.row["quant_type"] == "fp4":
      self.codes = FP4_CODES[self.codes]
    self.absmax = golden.vectors[f"{key}.absmax"]
    assert isinstance(self.ours.scales, jax.Array)
    self.scales = self.flattened(self.ours.scales)

  def flattened(self, x) -> np.ndarray:
    """`[K, N]` in bitsandbytes' order, [out, in]."""
    return np.asarray(x).T.reshape(-1)

  def unflattened(self, x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.reshape(-1, 1) if self.flat else x.reshape(len(self.x), -1).T)

  def digest(self, q: QuantizedTensor) -> str:
    dense = self.flattened(dequantize(q, self.dtype)).reshape(self.x.shape)
    return hashlib.sha256(np.ascontiguousarray(dense).tobytes()).hexdigest()

  def subnormal(self) -> np.ndarray:
    """Where, in the flat input, our answer differs by rule: a subnormal, or in such a block."""
    magnitude = np.abs(self.x.astype(np.float32)).reshape(-1)
    small = (magnitude > 0) & (magnitude < TINY)
    blocks = np.maximum.reduceat(magnitude, np.arange(0, magnitude.size, self.block))
    where = small | np.repeat(blocks < TINY, self.block)[: magnitude.size]
    assert not where.reshape(8, 64)[3:].any()
    return where


@pytest.mark.parametrize("key", CASES)
def test_golden(golden, key):
  case = Case(golden, key)
  check_single(case)
  check_double(case)


def check_single(case: Case):
  excepted = np.zeros(case.codes.size, bool)
  if case.row["input"] == SUBNORMAL:
    excepted = case.subnormal()
  np.testing.assert_array_equal(case.codes[~excepted], case.expected[~excepted])
  empty = case.absmax < TINY
  np.testing.assert_array_equal(case.scales[~empty], case.absmax[~empty])
  if (case.absmax[empty] == 0).all():
    assert case.digest(case.ours) == case.row["dequant_single_sha256"]
  else:
    assert case.row["input"] == SUBNORMAL


def check_double(case: Case):
  vectors, prefix = case.golden.vectors, f"{case.key}.dq."
  offset, nested_absmax = vectors[prefix + "offset"], vectors[prefix + "nested_absmax"]
  blocks = case.unflattened(case.absmax)
  ours = jitted_nest(blocks, jnp.asarray(offset))
  codes, expected = case.flattened(ours.codes), vectors[prefix + "absmax_u8_cuda_emul"]
  np.testing.assert_array_equal(ours.absmax, nested_absmax)
  # A nested block that is all zero once the mean is subtracted is all code 127 here, whose level
  # is 0; bitsandbytes writes 0 there, and the product with its absmax of 0 restores the same.
  zero = np.repeat(nested_absmax == 0, 256)[: codes.size]
  np.testing.assert_array_equal(codes[~zero], expected[~zero])
  assert (codes[zero] == 127).all() and (expected[zero] == 0).all()
  if zero.any():
    theirs = dataclasses.replace(ours, codes=case.unflattened(expected))
    np.testing.assert_array_equal(restore_scales(ours), restore_scales(theirs))

  # bitsandbytes' CPU codes differ from the nearest ones (by a coarse table), so the dequantized
  # weight is tested from those it wrote.
  cpu = NestedScales(
    codes=case.unflattened(vectors[prefix + "absmax_u8"]),
    absmax=jnp.asarray(nested_absmax),
    offset=jnp.asarray(offset),
    block_size=256,
  )
  if case.row["input"] == SUBNORMAL and (case.absmax < TINY).any():
    return  # codes of its are excepted: see below
  assert (
    case.digest(dataclasses.replace(case.ours, scales=cpu)) == case.row["dequant_double_sha256"]
  )


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64])
def test_golden_blocks_of_subnormals_become_exact_zeros(golden, table, block):
  # bitsandbytes gives them levels of 1e-38; rows 0 and 1 hold blocks of subnormals alone.
  case = Case(golden, f"extreme_8x64.f32.{table}.bs{block}")
  zero = {"nf4": 7, "fp4": 0}[table]
  codes, scales = case.codes.reshape(8, 64), case.scales.reshape(8, -1)
  assert (np.abs(case.x[:2]) < TINY).all() and (case.x[:2] != 0).any()
  assert (codes[:2] == zero).all() and (scales[:2] == 0).all()
  assert (case.expected.reshape(8, 64)[:2] != zero).any()
  assert (np.asarray(dequantize(case.ours)).T[:2] == 0).all()
  # Row 2 holds subnormals in a block of normal scale: they count as zeros (in FP4 those above 0
  # as its second one, code 8).
  small = (np.abs(case.x[2]) < TINY) & (case.x[2] != 0)
  assert small.any() and scales[2].all()
  second = {"nf4": 7, "fp4": 8}[table]
  np.testing.assert_array_equal(codes[2][small], np.where(case.x[2][small] > 0, second, zero))
  # And the other rows are bitsandbytes' own.
  np.testing.assert_array_equal(codes[3:], case.expected.reshape(8, 64)[3:])


@pytest.mark.parametrize("block", [64, 4096])
def test_golden_subnormals_take_the_second_zero_of_fp4(golden, block):
  # Where w / absmax, rounded, is above 0 though XLA takes it for 0.
  case = Case(golden, f"midpoints_fp4.f32.fp4.bs{block}")
  x = case.x.reshape(-1)
  small = (np.abs(x) < TINY) & (x != 0)
  assert set(case.codes[small].tolist()) == {0, 8}
  np.testing.assert_array_equal(case.codes[small], case.expected[small])


def test_golden_zero_blocks_are_exact_zeros(golden):
  for table, zero in (("nf4", 7), ("fp4", 0)):
    case = Case(golden, f"zeroblock_64x128.f32.{table}.bs64")
    blocks = case.x.reshape(-1, 64)
    empty = (blocks == 0).all(1)
    assert empty.any() and not empty.all()
    assert (case.codes.reshape(-1, 64)[empty] == zero).all()
    double = quantize(jnp.asarray(case.x.T), codebook=table, block_size=64)
    assert (np.asarray(dequantize(double)).T.reshape(-1, 64)[empty] == 0).all()


@pytest.mark.parametrize("name", ["normal_4000", "absmaxlike_1024", "zeros_300", "code_mid"])
def test_golden_blockwise_8_bit(shared, name):
  vectors = np.load(shared / "golden" / "quant4bit" / "blockwise8.npz")
  x = vectors[f"{name}.x"]
  ours = nest_scales(jnp.asarray(x)[:, None], 256, offset=jnp.zeros(()))
  codes = np.asarray(ours.codes)[:, 0]
  np.testing.assert_array_equal(ours.absmax, vectors[f"{name}.absmax"])
  if name == "zeros_300":
    assert (codes == 127).all() and (vectors[f"{name}.q_cuda_emul"] == 0).all()
  else:
    np.testing.assert_array_equal(codes, vectors[f"{name}.q_cuda_emul"])
  # And their values from their codes.
  cpu = dataclasses.replace(ours, codes=jnp.asarray(vectors[f"{name}.q_cpu"])[:, None])
  np.testing.assert_array_equal(restore_scales(cpu)[:, 0], vectors[f"{name}.deq_cpu"])


# A float64 oracle that knows nothing of packing


def oracle(w: np.ndarray, codebook: codebooks.Codebook, block: int):
  """(levels[code] − zero) · scale in float64, and each weight's scale; `[K, N]`."""
  w = w.astype(np.float64)
  levels = np.asarray(codebook.levels)
  dense, steps = np.empty_like(w), np.empty_like(w)
  for start in range(0, len(w), block):
    part = w[start : start + block]
    zero = np.zeros(part.shape[1])
    if codebook.scale == "absmax":
      scale = np.abs(part).max(0)
    elif codebook.scale == "signed_absmax":
      scale = part[np.abs(part).argmax(0), np.arange(part.shape[1])]
    else:
      low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
      scale = (high - low) / (levels[-1] - levels[0])
      zero = np.clip(np.round(levels[0] - low / scale), levels[0], levels[-1])
    target = part / scale + zero
    code = np.abs(target[..., None] - levels).argmin(-1)
    dense[start : start + block] = (levels[code] - zero) * scale
    steps[start : start + block] = np.abs(scale)
  return dense, steps


# Weights whose nearest level float32 finds otherwise lie this close to a tie, in scales.
TIE = 4e-6 / 2
# Of the restored value: float32 scale, level and product.
RTOL = 4 * 2.0**-23


@pytest.mark.parametrize("k", [1, 3, 127, 129, 172, 255])
@pytest.mark.parametrize("codebook, block", [
  ("nf2", 64), ("nf3", 48), ("nf4", 64), ("fp4", 7), ("int4", 1), ("int4_signed", 33),
  ("int4_zero_point", 32), ("int8", 64), ("equal_mass16", 1000), ("nf4", 128),
])  # fmt: skip
def test_against_the_oracle(codebook, block, k):
  table = codebooks.get(codebook)
  w = np.random.default_rng(k).standard_normal((2, k, 3), np.float32)
  q = quantize(jnp.asarray(w), codebook=codebook, block_size=block, double_quantization=False)
  assert q.shape == (2, k, 3) and q.bits == table.bits
  dense = np.asarray(dequantize(q))
  for ours, weights in zip(dense, w, strict=True):
    expected, scale = oracle(weights, table, block)
    # A weight on a tie may go either way, at the same error.
    distance = np.abs(ours - weights) - np.abs(expected - weights)
    close = np.isclose(ours, expected, rtol=RTOL, atol=RTOL * scale.max())
    assert (close | (np.abs(distance) <= TIE * scale)).all()
    assert close.mean() > 0.99


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_and_results(dtype):
  w = jax.random.normal(jax.random.key(0), (192, 8), dtype)
  q = quantize(w)
  assert_same(q, quantize(w.astype(jnp.float32)))
  assert_same(dequantize(q, dtype), dequantize(q).astype(dtype))
  assert dequantize(q).dtype == jnp.float32


def test_double_quantization_moves_a_weight_by_its_scales_error():
  w = jax.random.normal(jax.random.key(0), (512, 64))
  single, double = quantize(w, double_quantization=False), quantize(w)
  # NF4's codes are drawn with the exact scale, as bitsandbytes does.
  np.testing.assert_array_equal(single.codes, double.codes)
  exact, restored = np.asarray(single.scales), np.asarray(restore_scales(double.scales))
  assert isinstance(double.scales, NestedScales)
  np.testing.assert_allclose(double.scales.offset, exact.mean(dtype=np.float64), rtol=1e-6)
  # A cell of the dynamic map is at most 1/64 · .9/2 wide on either side, in its absmax.
  assert np.abs(restored - exact).max() <= np.asarray(double.scales.absmax).max() * 0.45 / 64 * 1.01
  levels = np.asarray(double.levels)[unpacked(double)]
  np.testing.assert_array_equal(dequantize(double), levels * np.repeat(restored, 64, axis=0))


@pytest.mark.parametrize("kwargs", [
  dict(), dict(double_quantization=False), dict(double_quantization=False, scale_dtype="bfloat16"),
])  # fmt: skip
def test_a_signed_scale_restores_its_own_element(kwargs):
  # Codes are drawn with the restored scale, so the largest element is one level, exactly.
  w = jax.random.normal(jax.random.key(0), (128, 16))
  q = quantize(w, codebook="int4_signed", block_size=32, **kwargs)
  scale = np.asarray(restore_scales(q.scales))
  dense = np.asarray(dequantize(q)).reshape(4, 32, 16)
  blocks = np.asarray(w).reshape(4, 32, 16)
  top = np.abs(blocks).argmax(1)[:, None]
  assert (scale < 0).any() and (scale > 0).any()
  np.testing.assert_array_equal(np.take_along_axis(dense, top, 1)[:, 0], scale)


def test_bfloat16_scales():
  w = jax.random.normal(jax.random.key(0), (128, 16))
  q = quantize(w, double_quantization=False, scale_dtype="bfloat16")
  exact = quantize(w, double_quantization=False).scales
  assert_same(q.scales, exact.astype(jnp.bfloat16))  # pyright: ignore[reportAttributeAccessIssue]


def test_zero_point_of_one_signed_blocks_is_exact():
  w = jnp.asarray(np.linspace([1.0, -2.0], [16.0, -1.0], 32, dtype=np.float32))
  q = quantize(w, codebook="int4_zero_point", block_size=32, double_quantization=False)
  # The range holds zero, so the zero-points are its ends.
  np.testing.assert_array_equal(q.zero, [[0, 15]])
  np.testing.assert_allclose(q.scales, [[16 / 15, 2 / 15]], rtol=RTOL)  # pyright: ignore


# Properties


@given(
  k=st.sampled_from([1, 3, 127, 128, 129, 172, 255]),
  codebook=st.sampled_from(["nf2", "nf3", "nf4", "fp4", "int4", "int8", "int4_signed"]),
  block=st.sampled_from([1, 32, 48, 64, 300]),
  exponent=st.integers(-30, 30),
  seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_quantizing_twice_changes_nothing(k, codebook, block, exponent, seed):
  w = np.random.default_rng(seed).standard_normal((k, 2), np.float32) * np.float32(2.0**exponent)
  kwargs = dict(codebook=codebook, block_size=block, double_quantization=False)
  dense = dequantize(quantize(jnp.asarray(w), **kwargs))  # pyright: ignore[reportArgumentType]
  again = dequantize(quantize(dense, **kwargs))  # pyright: ignore[reportArgumentType]
  np.testing.assert_array_equal(dense, again)


@pytest.mark.parametrize("k", [128, 172])
def test_powers_of_two_commute_with_quantizing(k):
  w = jax.random.normal(jax.random.key(0), (k, 5))
  a, b = (quantize(w * s, double_quantization=False) for s in (np.float32(1), np.float32(2**-20)))
  np.testing.assert_array_equal(a.codes, b.codes)
  np.testing.assert_array_equal(dequantize(a) * np.float32(2**-20), dequantize(b))


@pytest.mark.parametrize("k", [130, 172])
def test_padding_never_reaches_a_value(k):
  # Tables with no zero, and rows that do not fill the last unit.
  w = jnp.full((k, 2), -0.5)
  for name in ("equal_mass16", "nf3"):
    q = quantize(w, codebook=name, double_quantization=False)
    np.testing.assert_array_equal(dequantize(q), w)


# Structure


@pytest.mark.parametrize(
  "k, codebook",
  [(256, "nf4"), (172, "nf3")],
)
def test_jit_vmap_and_scan_equal_the_eager_call(k, codebook):
  w = jax.random.normal(jax.random.key(0), (3, k, 16))

  def f(w):
    return quantize(w, codebook=codebook)

  stacked = f(w)
  assert_same(stacked, jax.jit(f)(w))
  assert_same(stacked, jax.vmap(f)(w))
  _, scanned = jax.lax.scan(lambda carry, w: (carry, f(w)), None, w)
  assert_same(stacked, scanned)
  for i in range(3):
    assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), f(w[i]))
  dense = dequantize(stacked)
  assert dense.shape == w.shape
  assert_same(dense, jax.jit(dequantize)(stacked))
  assert_same(dense, jax.vmap(dequantize)(stacked))
  _, scanned = jax.lax.scan(lambda carry, q: (carry, dequantize(q)), None, stacked)
  assert_same(dense, scanned)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")], ids=["K", "N"])
def test_sharded_weights(spec, double):
  mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  w = jax.random.normal(jax.random.key(0), (1024, 64))
  expected = quantize(w, double_quantization=double)
  placed = jax.device_put(w, NamedSharding(mesh, spec))
  assert len(placed.sharding.device_set) == 4
  q = quantize(placed, double_quantization=double)
  np.testing.assert_array_equal(q.codes, expected.codes)
  if double:
    # The mean is summed in another order.
    np.testing.assert_allclose(restore_scales(q.scales), restore_scales(expected.scales), rtol=1e-6)
  else:
    assert_same(q.scales, expected.scales)
    assert_same(dequantize(q), dequantize(expected))
  # The packed codes and scales are cut by the weight's own spec.
  codes = jax.device_put(expected.codes, NamedSharding(mesh, spec))
  scales = expected.scales
  if isinstance(scales, NestedScales):
    scales = dataclasses.replace(
      scales, codes=jax.device_put(scales.codes, NamedSharding(mesh, spec))
    )
  else:
    scales = jax.device_put(scales, NamedSharding(mesh, spec))
  sharded = dataclasses.replace(expected, codes=codes, scales=scales)
  dense = jax.jit(dequantize)(sharded)
  assert_same(dense, dequantize(expected))


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")], ids=["K", "N"])
def test_shape_is_right_inside_shard_map(spec):
  mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  w = jax.random.normal(jax.random.key(0), (1024, 64))
  expected = quantize(w, double_quantization=False)
  specs = dataclasses.replace(expected, codes=spec, scales=spec, levels=P(None))
  local = (256, 64) if spec[0] else (1024, 16)

  def decode(q):
    assert q.shape == local
    return dequantize(q)

  dense = jax.jit(jax.shard_map(decode, mesh=mesh, in_specs=(specs,), out_specs=spec))(expected)
  assert_same(dense, dequantize(expected))

  def encode(w):
    return quantize(w, double_quantization=False)

  q = jax.jit(jax.shard_map(encode, mesh=mesh, in_specs=(spec,), out_specs=specs))(w)
  assert_same(q, expected)


@pytest.mark.parametrize(
  "codebook, k, block, double",
  [
    *(
      ("nf4", k, block, double)
      for k, block in ((4096, 64), (4000, 64), (4096, 48))
      for double in (False, True)
    ),
    # What is drawn, searched and packed in other ways.
    ("nf3", 4000, 64, True),
    ("fp4", 4000, 64, True),
    ("int8", 4096, 64, True),
    ("int4_signed", 4096, 48, True),
    ("int4_zero_point", 4096, 48, True),
  ],
)
def test_memory_of_quantizing(codebook, k, block, double):
  shape = jax.ShapeDtypeStruct((k, 2048), jnp.float32)

  def f(w):
    return quantize(w, codebook=codebook, block_size=block, double_quantization=double)

  memory = jax.jit(f).lower(shape).compile().memory_analysis()
  assert memory is not None
  held = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  ) / (4 * k * 2048)
  assert 1.1 < held <= 1.5  # the input itself, its codes, and little else


# Errors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_non_finite_weight_is_named(value, dtype):
  w = np.zeros((2, 5, 3), np.float32)
  w[1, 4, 2] = value
  with pytest.raises(ValueError) as error:
    quantize(jnp.asarray(w, dtype))
  assert str(error.value) == (
    f"quantize: the weight at index [1, 4, 2] is {value}; weights are finite"
  )


def test_a_weight_whose_scales_would_not_add_up_is_named():
  w = np.full((64, 2), 2.0**106, np.float32)
  q = quantize(jnp.asarray(w), double_quantization=False)
  np.testing.assert_array_equal(dequantize(q), w)
  assert np.isfinite(dequantize(quantize(jnp.asarray(w)))).all()
  w[3, 1] = -3e38
  with pytest.raises(ValueError) as error:
    quantize(jnp.asarray(w))
  assert "the weight at index [3, 1] is -3.0" in str(error.value)
  assert str(error.value).endswith("weights are at most 2^106, so that their scales add up")


@pytest.mark.parametrize(
  "w, kind, message",
  [
    (np.ones((4, 4), np.int8), TypeError, "quantize: dtype int8; a weight is of a float dtype"),
    (np.ones(4, np.float32), ValueError, "quantize: shape (4,); a weight is [..., K, N]"),
    (np.ones((0, 4), np.float32), ValueError, "quantize: shape (0, 4)"),
  ],
)
def test_what_is_no_weight(w, kind, message):
  with pytest.raises(kind) as error:
    quantize(jnp.asarray(w))
  assert message in str(error.value)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(codebook="nf5"), "did you mean nf4?"),
    (dict(block_size=0), "block_size: 0; a block holds at least 1"),
    (dict(nested_block_size=-1), "nested_block_size: -1"),
    (dict(scale_dtype="float23"), "did you mean float32?"),
    (dict(scale_dtype="bfloat16"), "'bfloat16' with double_quantization"),
  ],
)
def test_arguments_and_config_are_refused_alike(kwargs, message):
  with pytest.raises(ValueError) as of_config:
    QuantizationConfig(**kwargs)
  with pytest.raises(ValueError) as of_call:
    quantize(jnp.ones((4, 4)), **kwargs)
  assert message in str(of_config.value) and str(of_call.value) == str(of_config.value)


def test_dequantize_wants_a_packed_weight():
  with pytest.raises(TypeError, match="dequantize: ndarray; a QuantizedTensor is wanted"):
    dequantize(np.ones((2, 2)))  # pyright: ignore[reportArgumentType]


# A whole tree


def tree():
  def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)

  return {
    "embed": {"embedding": normal(0, 16, 64)},
    "layers": {
      "q": {"kernel": normal(1, 3, 64, 8), "bias": normal(2, 3, 8)},
      "norm": {"scale": normal(3, 3, 64)},
    },
    "head": {"kernel": normal(4, 64, 16)},
  }


def test_quantize_tree():
  params = tree()
  cfg = QuantizationConfig(block_size=32)
  out = quantize_tree(params, {"layers/*": cfg, "embed/*": jnp.bfloat16, "head": None})
  assert_same(
    out["layers"]["q"]["kernel"], quantize(params["layers"]["q"]["kernel"], block_size=32)
  )
  # Vectors that a rule for matrices matches stay as they are, though a stack of them has 2 axes.
  assert out["layers"]["q"]["bias"] is params["layers"]["q"]["bias"]
  assert out["layers"]["norm"]["scale"] is params["layers"]["norm"]["scale"]
  assert_same(out["embed"]["embedding"], params["embed"]["embedding"].astype(jnp.bfloat16))
  assert out["head"]["kernel"] is params["head"]["kernel"]


def test_treatments():
  cfg = QuantizationConfig()
  assert treatments(tree(), {"*/q": cfg, "head": jnp.bfloat16}) == {
    "embed/embedding": None,
    "layers/q/kernel": cfg,
    "layers/q/bias": None,
    "layers/norm/scale": None,
    "head/kernel": jnp.bfloat16,
  }


def test_rules_that_agree_may_overlap():
  cfg = QuantizationConfig()
  out = quantize_tree(tree(), {"*/q": cfg, "layers/[01]/q": cfg, "layers/2/q/kernel": cfg})
  assert isinstance(out["layers"]["q"]["kernel"], QuantizedTensor)


@pytest.mark.parametrize(
  "rules, messages",
  [
    (
      {"layers/*/k": QuantizationConfig()},
      ["'layers/*/k' matches no weight", "near", "layers/*/q,"],
    ),
    (
      {"*/norm/*": QuantizationConfig()},
      ["pattern '*/norm/*' matches no matrix, only layers/norm/scale"],
    ),
    (
      {"*/q": QuantizationConfig(), "layers/1/q": jnp.bfloat16},
      ["layers/1/q/kernel: patterns '*/q'", "'layers/1/q'", "disagree"],
    ),
    (
      {"layers/[01]/q": QuantizationConfig()},
      ["layers/2/q/kernel (None)", "layers/0/q/kernel (Quantiz", "in one stack"],
    ),
  ],
)
def test_quantize_tree_refuses(rules, messages):
  with pytest.raises(ValueError) as error:
    quantize_tree(tree(), rules)
  for message in messages:
    assert message in str(error.value)


def test_quantize_tree_does_not_quantize_twice():
  rules = {"*/q": QuantizationConfig()}
  once = quantize_tree(tree(), rules)
  with pytest.raises(ValueError, match="layers/q/kernel: is quantized already"):
    quantize_tree(once, rules)
  # What no rule touches may be packed.
  again = quantize_tree(once, {"head": QuantizationConfig()})
  assert again["layers"]["q"]["kernel"] is once["layers"]["q"]["kernel"]


@pytest.mark.parametrize(
  "bad, kind, message",
  [
    (jnp.ones((4, 4), jnp.int32), TypeError, "head/kernel: quantize: dtype int32"),
    (jnp.full((4, 4), jnp.nan), ValueError, "head/kernel: quantize: the weight at index [0, 0]"),
  ],
)
def test_quantize_tree_names_the_path_of_an_error(bad, kind, message):
  params = {**tree(), "head": {"kernel": bad}}
  with pytest.raises(kind) as error:
    quantize_tree(params, {"head": QuantizationConfig()})
  assert str(error.value).startswith(message)

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax import codebooks
from qlora_jax.quantization import quantize
from qlora_jax.quantized_tensor import (
  GROUP,
  NestedScales,
  is_quantized,
  join_rows,
  pack,
  plane_rows,
  planes,
  restore_scales,
  split_rows,
  unpack,
)

BITS = (2, 3, 4, 8)
# Whole groups, one short of and one past them, fewer rows than planes, odd ones.
ROWS = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 127, 128, 129, 172, 255, 256, 384])


def random_codes(seed, shape, bits):
  return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


# Packing


@given(k=ROWS, n=st.sampled_from([1, 3]), bits=st.sampled_from(BITS), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_unpack_inverts_pack(k, n, bits, seed):
  codes = random_codes(seed, (k, n), bits)
  packed, padding = pack(jnp.asarray(codes), bits)
  units = -(-k // planes(bits))
  assert packed.shape == (units * {2: 1, 3: 3, 4: 1, 8: 1}[bits], n) and packed.dtype == jnp.uint8
  assert padding == units * planes(bits) - k
  np.testing.assert_array_equal(join_rows(unpack(packed, bits, padding), 0), codes)


@given(
  k=ROWS,
  bits=st.sampled_from(BITS),
  before=st.lists(st.just(2), max_size=2),
  after=st.lists(st.just(2), max_size=2),
)
@settings(max_examples=25, deadline=None)
def test_join_inverts_split(k, bits, before, after):
  shape = (*before, k, *after)
  x = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
  groups, _, sizes = plane_rows(k, bits)
  for axis in (len(before), len(before) - len(shape)):
    parts = split_rows(jnp.asarray(x), bits, axis)
    assert [part.shape for part in parts] == [(*before, groups, size, *after) for size in sizes]
    np.testing.assert_array_equal(join_rows(parts, len(before)), x)
  assert groups * sum(sizes) == k


@pytest.mark.parametrize("k", [2, 6, 128, 256])
def test_4_bit_bytes_are_halves_of_a_group(k):
  # Written out from the module's docstring.
  codes = random_codes(0, (k, 2), 4)
  group = GROUP if k % GROUP == 0 else k
  low, high = np.split(codes.reshape(k // group, group, 2), 2, axis=1)
  packed, _ = pack(jnp.asarray(codes), 4)
  np.testing.assert_array_equal(packed, (low | high << 4).reshape(k // 2, 2))


def test_2_bit_bytes_are_quarters_of_a_group():
  codes = random_codes(0, (256, 2), 2)
  quarters = np.split(codes.reshape(2, 128, 2), 4, axis=1)
  expected = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
  np.testing.assert_array_equal(pack(jnp.asarray(codes), 2)[0], expected.reshape(64, 2))


def test_3_bit_bytes_lie_in_three_runs():
  codes = random_codes(0, (256, 2), 3)
  parts = np.split(codes.reshape(2, 128, 2).astype(np.uint32), 8, axis=1)
  word = sum(part << (3 * j) for j, part in enumerate(parts))
  runs = np.stack([(word >> shift) & 255 for shift in (0, 8, 16)], axis=1)
  np.testing.assert_array_equal(pack(jnp.asarray(codes), 3)[0], runs.reshape(96, 2))


# What a QuantizedTensor says of itself


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("k", [1, 3, 127, 128, 129, 172, 255])
@pytest.mark.parametrize("codebook", ["nf2", "nf3", "nf4", "int8"])
def test_shape_is_read_off_the_arrays(codebook, k, leading):
  q = jax.eval_shape(
    lambda w: quantize(w, codebook=codebook), jax.ShapeDtypeStruct((*leading, k, 5), jnp.float32)
  )
  assert q.shape == (*leading, k, 5) and q.ndim == len(q.shape)
  assert q.size == math.prod(q.shape)
  assert q.scales.shape == (*leading, -(-k // 64), 5)


@pytest.mark.parametrize(
  "kwargs, nbytes",
  [
    # codes, scales, levels; and doubly quantized: codes, nested absmax, offset, levels.
    (dict(double_quantization=False), 256 * 64 // 2 + 4 * 4 * 64 + 64),
    (
      dict(double_quantization=False, scale_dtype="bfloat16"),
      256 * 64 // 2 + 2 * 4 * 64 + 64,
    ),
    (dict(), 256 * 64 // 2 + 4 * 64 + 4 * 1 + 4 + 64),
    (dict(nested_block_size=100), 256 * 64 // 2 + 4 * 64 + 4 * 3 + 4 + 64),
    (dict(codebook="nf3", double_quantization=False), 256 * 64 * 3 // 8 + 4 * 4 * 64 + 32),
    (dict(codebook="nf2", double_quantization=False), 256 * 64 // 4 + 4 * 4 * 64 + 16),
    (dict(codebook="int8", double_quantization=False), 256 * 64 + 4 * 4 * 64 + 1024),
    # A byte of zero-point a block.
    (
      dict(codebook="int4_zero_point", double_quantization=False),
      256 * 64 // 2 + 4 * 4 * 64 + 4 * 64 + 64,
    ),
  ],
)
def test_nbytes_and_bits_per_param_are_exact(kwargs, nbytes):
  q = quantize(jax.random.normal(jax.random.key(0), (256, 64)), **kwargs)
  assert q.nbytes == nbytes
  assert q.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))
  assert q.bits_per_param == 8 * nbytes / (256 * 64)


def test_nbytes_counts_padding_but_the_size_does_not():
  q = quantize(jnp.ones((129, 3)), double_quantization=False)
  assert (q.padding, q.size) == (1, 129 * 3)
  assert q.nbytes == 65 * 3 + 4 * 3 * 3 + 64


@pytest.mark.parametrize("double, bits", [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)])
def test_bits_of_a_large_weight_are_the_published_ones(double, bits):
  shape = (4096, 4096)
  q = jax.eval_shape(
    lambda w: quantize(w, double_quantization=double), jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  )
  table = 8 * (64 + 4 * double) / math.prod(shape)
  assert q.bits_per_param == pytest.approx(bits + table, rel=1e-12)


def test_is_quantized():
  q = quantize(jnp.ones((2, 2)))
  assert is_quantized(q)
  assert not is_quantized(q.codes) and not is_quantized(q.scales) and not is_quantized(None)


def test_round_trip_through_the_leaves():
  q = quantize(jax.random.normal(jax.random.key(0), (2, 130, 3)), codebook="int4_zero_point")
  leaves, treedef = jax.tree.flatten(q)
  assert len(leaves) == 6
  again = jax.tree.unflatten(treedef, leaves)
  assert (again.bits, again.block_size, again.padding) == (4, 64, 0)
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)]
  assert names == [
    ".codes",
    ".scales.codes",
    ".scales.absmax",
    ".scales.offset",
    ".levels",
    ".zero",
  ]


# Restored scales


def restored(scales: NestedScales) -> np.ndarray:
  """Two float32 roundings, in numpy."""
  blocks, n = scales.codes.shape
  flat = np.asarray(scales.codes).T.reshape(-1)
  absmax = np.asarray(scales.absmax)[np.arange(flat.size) // scales.block_size]
  product = codebooks.dynamic_map()[flat] * absmax
  return (product + np.asarray(scales.offset)).reshape(n, blocks).T


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("blocks, n, block_size", [(16, 64, 256), (3, 7, 256), (5, 11, 4)])
def test_scales_are_restored_in_two_roundings(blocks, n, block_size, wrap):
  # XLA contracts a bare product and sum into one rounding: a fifth of these would differ.
  rng = np.random.default_rng(0)
  scales = NestedScales(
    codes=jnp.asarray(random_codes(0, (blocks, n), 8)),
    absmax=jnp.asarray(rng.random(-(-blocks * n // block_size), np.float32)),
    offset=jnp.asarray(np.float32(0.3)),
    block_size=block_size,
  )
  np.testing.assert_array_equal(wrap(restore_scales)(scales), restored(scales))


def test_each_matrix_of_a_stack_restores_its_own_scales():
  q = quantize(jax.random.normal(jax.random.key(0), (2, 3, 256, 16)))
  assert isinstance(q.scales, NestedScales)
  stacked = restore_scales(q.scales)
  for i in range(2):
    for j in range(3):
      one = dataclasses.replace(
        q.scales, **{name: getattr(q.scales, name)[i, j] for name in ("codes", "absmax", "offset")}
      )
      np.testing.assert_array_equal(stacked[i, j], restored(one))


def test_plain_scales_come_back_in_float32():
  scales = jnp.asarray([[1.5]], jnp.bfloat16)
  assert restore_scales(scales).dtype == jnp.float32 and restore_scales(scales)[0, 0] == 1.5

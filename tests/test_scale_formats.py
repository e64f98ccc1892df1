"""Scales of 8 bits (E4M3 times a float32, E8M0), and the rules that draw a block's scale.

Against the formats' definitions in NumPy and ml_dtypes, and the reference's Monte Carlo.
"""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax import codebooks, quantization, quantized_matmul
from qlora_jax.quantization import QuantizationConfig, dequantize, quantize, quantize_by
from qlora_jax.quantized_tensor import TwoLevelScales, join_rows, restore_scales, unpack

SINGLE: dict[str, Any] = {"double_quantization": False}
NVFP4: dict[str, Any] = {"codebook": "nvfp4", "block_size": 16, **SINGLE}
MXFP4: dict[str, Any] = {"codebook": "mxfp4", "block_size": 32, **SINGLE}

E2M1 = np.array([0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([-E2M1[::-1], [0], E2M1])


@pytest.fixture(scope="module")
def oracle(shared):
  return json.loads((shared / "reference" / "oracle.json").read_text())["mc"]["results"]


# Arguments of `quantize` → the oracle's row: name, block size, scale family.
ROWS = [
  (NVFP4, "nvfp4", 16, "e4m3+fp32 tensor"),
  ({**NVFP4, "scale_dtype": "float32"}, "nvfp4_exact_scale", 16, "fp32"),
  (MXFP4, "mxfp4_floor", 32, "e8m0"),
  *(
    ({"codebook": ours, "block_size": size, "scale_dtype": "e8m0", **SINGLE}, name, size, family)
    for ours, name in (("nf4", "nf4"), ("e2m1", "fp4_e2m1_ocp"))
    for size in (32, 64)
    for family in ("e8m0_ceil",)
  ),
  *(
    (
      {"codebook": ours, "block_size": size, "scale_dtype": "bfloat16", **SINGLE},
      name,
      size,
      "bf16",
    )
    for ours, name, size in (
      ("nf4", "nf4", 32),
      ("nf4", "nf4", 4096),
      ("int4", "int4_sym7", 128),
      ("fp4", "fp4_bnb", 64),
      ("af4", "af4_256", 256),
      ("bof4", "bof4_mse_64", 64),
      ("bof4s", "bof4s_mse_32", 32),
    )
  ),
  # Codes are drawn with the exact scale where bitsandbytes does so.
  *(
    ({"codebook": ours, "block_size": size}, name, size, family)
    for ours, name, size, family in (
      ("nf4", "nf4", 64, "dq_bnb_dynamic8_256_encode_fp32"),
      ("nf4", "nf4", 256, "dq_bnb_dynamic8_256_encode_fp32"),
      ("bof4s", "bof4s_mse_64", 64, "dq_bnb_dynamic8_256"),
      ("bof4s", "bof4s_mse_128", 128, "dq_bnb_dynamic8_256"),
    )
  ),
]


@pytest.mark.parametrize(("kind", "name", "size", "family"), ROWS, ids=lambda x: str(x)[:40])
def test_errors_are_the_oracle_s(kind, name, size, family, oracle):
  row = oracle[name][str(size)][family]
  w = jax.random.normal(jax.random.key(5), (4096, 128))
  blocks = jnp.square(dequantize(quantize(w, **kind)) - w).reshape(-1, size, 128).mean(1)
  blocks = np.asarray(blocks, np.float64)
  # All rows see the same weights, so their deviations go together: 3.5 standard errors.
  error = math.hypot(blocks.std(ddof=1) / math.sqrt(blocks.size), row["mse_se"])
  assert abs(blocks.mean() - row["mse"]) < 3.5 * error
  assert error < 0.02 * row["mse"]


def codes_of(q):
  return np.asarray(join_rows(unpack(q.codes, q.bits, q.padding), 0))


def test_nvfp4_is_its_definition():
  """In the format's own units: the float32 is amax / (6 · 448), a block's scale absmax / 6 / it."""
  w = np.random.default_rng(0).standard_t(3, (80, 24)).astype(np.float32)
  q = quantize(jnp.asarray(w), **NVFP4)
  assert isinstance(q.scales, TwoLevelScales) and q.scales.codes.dtype == jnp.float8_e4m3fn
  blocks = w.astype(np.float64).reshape(5, 16, 24)
  absmax = np.abs(blocks).max(1)
  factor = np.abs(w).max() / (6 * 448)
  scale = (absmax / 6 / factor).astype(ml_dtypes.float8_e4m3fn)
  np.testing.assert_array_equal(np.asarray(q.scales.codes), scale)
  np.testing.assert_allclose(q.scales.factor, 6 * factor, rtol=1e-6)
  real = scale.astype(np.float64)[:, None] * factor
  value = E2M1[np.abs(blocks[..., None] / real[..., None] - E2M1).argmin(-1)] * real
  np.testing.assert_allclose(dequantize(q), value.reshape(80, 24), rtol=1e-6)
  assert q.nbytes == 80 * 24 // 2 + 5 * 24 + 4 + 16 * 4


def test_mxfp4_is_its_definition():
  """OCP MX 1.0, section 6.3: the shared exponent is ⌊log₂ absmax⌋ − 2; what is beyond 6 is 6."""
  w = np.random.default_rng(1).standard_t(3, (96, 24)).astype(np.float32)
  q = quantize(jnp.asarray(w), **MXFP4)
  assert isinstance(q.scales, jax.Array) and q.scales.dtype == jnp.float8_e8m0fnu
  blocks = w.astype(np.float64).reshape(3, 32, 24)
  exponent = np.floor(np.log2(np.abs(blocks).max(1))) - 2
  np.testing.assert_array_equal(np.asarray(q.scales).view(np.uint8), exponent + 127)
  scale = 2.0 ** exponent[:, None]
  value = E2M1[np.abs(blocks[..., None] / scale[..., None] - E2M1).argmin(-1)] * scale
  np.testing.assert_array_equal(np.asarray(dequantize(q)), value.reshape(96, 24))
  assert q.nbytes == 96 * 24 // 2 + 3 * 24 + 16 * 4


def test_numbers_are_rounded_to_e4m3_once():
  """Also those near the middle of two, which a way through float16 would round twice."""
  grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  grid = np.sort(grid[np.isfinite(grid)])
  middle = (grid[1:] + grid[:-1]) / 2
  x = np.concatenate([grid, middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)])
  x = np.concatenate([x, [450, -460, 1e6]]).astype(np.float32)
  found = quantization._store_scales(jnp.asarray(x), jnp.float32(448), "e4m3")
  assert isinstance(found, TwoLevelScales)
  expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
  np.testing.assert_array_equal(np.asarray(found.codes, np.float32), expected.astype(np.float32))


def test_powers_of_two_are_rounded_up():
  x = jnp.array([[0.0, 2.0**-126, 1.0, 1 + 2.0**-23, 1.5, 2.0, 2.0**106]], jnp.float32)
  found = restore_scales(quantization._store_scales(x, x.max(), "e8m0"))
  np.testing.assert_array_equal(found, [[0, 2.0**-126, 1, 2, 2, 2, 2.0**106]])


@pytest.mark.parametrize(
  "kind", [NVFP4, MXFP4, {"codebook": "nf4_symmetric", "scale_dtype": "e8m0"}]
)
def test_blocks_of_zeros_and_tiny_ones(kind):
  kind = {"block_size": 16, **SINGLE, **kind}
  w = jnp.zeros((96, 3)).at[:, 1].set(2.0**-130).at[40, 2].set(1.0)
  for each in (w, jnp.zeros_like(w)):
    found = dequantize(quantize(each, **kind))
    np.testing.assert_array_equal(found[:, :2], 0)
    np.testing.assert_allclose(found[40, 2], each[40, 2], rtol=1e-6)


@pytest.mark.parametrize("kind", [NVFP4, MXFP4], ids=["nvfp4", "mxfp4"])
def test_stacks_scan_and_vmap(kind):
  w = jax.random.normal(jax.random.key(0), (3, 64, 32)) * jnp.array([1, 10, 0.1])[:, None, None]
  stack = quantize(w, **kind)
  assert stack.shape == w.shape
  x = jax.random.normal(jax.random.key(1), (4, 64))
  _, scanned = jax.lax.scan(lambda c, q: (c, quantized_matmul(x, q)), None, stack)
  mapped = jax.vmap(quantized_matmul, (None, 0))(x, stack)
  for i in range(3):
    one = quantize(w[i], **kind)
    np.testing.assert_array_equal(dequantize(one), dequantize(stack)[i])
    np.testing.assert_allclose(scanned[i], x @ dequantize(one), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mapped[i], x @ dequantize(one), rtol=1e-4, atol=1e-4)


# How a scale is drawn.


def heavy(shape=(100, 12)):
  return jnp.asarray(np.random.default_rng(3).standard_t(3, shape).astype(np.float32))


@pytest.mark.parametrize("codebook", ["nf4", "bof4s", "int4_zero_point"])
def test_the_scale_of_least_error_is_the_best_that_is_tried(codebook):
  """A ragged last block among them, against every candidate in float64."""
  w = heavy()
  kind: dict[str, Any] = {"codebook": codebook, "block_size": 32, **SINGLE}
  plain, found = quantize(w, **kind), quantize(w, scale_rule="mse", **kind)
  table = np.asarray(plain.levels, np.float64)
  scale = np.asarray(plain.scales, np.float64)
  zero = 0 if plain.zero is None else np.asarray(plain.zero, np.float64)[:, None]
  blocks = np.pad(np.asarray(w, np.float64), ((0, 28), (0, 0))).reshape(4, 32, 12)
  errors = []
  for clip in [1, *np.arange(50, 121, 2) / 100]:
    own = scale[:, None] * clip
    nearest = np.abs((blocks / own + zero)[..., None] - table).argmin(-1)
    error = np.square((table[nearest] - zero) * own - blocks)
    error[-1, 4:] = 0
    errors.append(error.sum(1))
  own = np.asarray(dequantize(found) - w, np.float64)
  own = np.square(np.pad(own, ((0, 28), (0, 0)))).reshape(4, 32, 12).sum(1)
  np.testing.assert_allclose(own, np.min(errors, 0), rtol=1e-3, atol=1e-9)
  assert own.sum() < 0.95 * errors[0].sum()


def test_the_search_weighs_errors():
  """A row that matters more has the smaller error; weights of 1 are no weights."""
  w = heavy((64, 64))
  kind: dict[str, Any] = {"scale_rule": "mse", **SINGLE}
  plain = dequantize(quantize(w, **kind))
  np.testing.assert_array_equal(
    dequantize(quantize(w, importance=jnp.ones(w.shape), **kind)), plain
  )
  importance = jnp.ones((64, 1)).at[7].set(1000)
  weighed = dequantize(quantize(w, importance=importance, **kind))
  error, before = jnp.square(weighed - w).sum(1), jnp.square(plain - w).sum(1)
  assert error[7] < 0.2 * before[7] and error.sum() > before.sum()


def test_the_search_sees_the_stored_scale():
  """Of powers of two, a half and the double are all that is different."""
  w = heavy((96, 40))
  found, plain = (
    quantize(w, codebook="e2m1", block_size=32, scale_dtype="e8m0", scale_rule=rule, **SINGLE)
    for rule in ("mse", "auto")
  )
  ratio = np.asarray(restore_scales(found.scales) / restore_scales(plain.scales))
  assert set(np.unique(ratio)) == {0.5, 1}
  assert jnp.square(dequantize(found) - w).sum() < jnp.square(dequantize(plain) - w).sum()


def test_a_percentile_is_numpy_s():
  w = heavy().at[:32, 0].set(0).at[3, 0].set(5.0)
  kind: dict[str, Any] = {"codebook": "nf4", "block_size": 32, **SINGLE}
  found = restore_scales(quantize(w, scale_rule="percentile", percentile=90.0, **kind).scales)
  assert found[0, 0] == 5  # The percentile of that block is 0.
  for start, stop in ((0, 32), (32, 64), (64, 96), (96, 100)):
    expected = np.percentile(np.abs(w[start:stop, 1:]), 90, axis=0)
    np.testing.assert_allclose(found[start // 32, 1:], expected, rtol=1e-5)
  whole = quantize(w, scale_rule="percentile", percentile=100.0, **kind)
  np.testing.assert_array_equal(whole.codes, quantize(w, **kind).codes)


def test_another_sign_of_the_scale():
  """BOF4-S's levels end at 1 alone, so that its scale needs the maximum's sign."""
  w = heavy((64, 40))
  signed, plain = (
    restore_scales(quantize(w, codebook="nf4", scale_rule=rule, **SINGLE).scales)
    for rule in ("signed_absmax", "absmax")
  )
  assert (signed < 0).any() and (plain > 0).all()
  np.testing.assert_array_equal(jnp.abs(signed), plain)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (
      dict(codebook="nvfp4", double_quantization=False),
      "'nvfp4': block_size 64; the format's is 16",
    ),
    (dict(codebook="mxfp4", block_size=16), "'mxfp4': block_size 16; the format's is 32"),
    (dict(codebook="nvfp4", block_size=16), "codebook 'nvfp4', 'e4m3' with double_quantization"),
    (dict(scale_dtype="e4m3"), "'e4m3' with double_quantization"),
    (dict(scale_dtype="e5m2", **SINGLE), "scale_dtype: 'e5m2'; one of auto, float32"),
    (dict(codebook="bof4s", scale_dtype="e8m0", **SINGLE), "'e8m0' with scales by 'signed_absmax'"),
    (dict(codebook="int4_zero_point", scale_dtype="e8m0", **SINGLE), "by 'minmax'"),
    (dict(scale_rule="max"), "scale_rule: 'max'; one of auto, absmax"),
    (dict(codebook="int4_zero_point", scale_rule="absmax"), "a scale drawn by 'minmax'"),
    (dict(codebook="any4", scale_rule="mse"), "its levels are learned for the scales"),
    (dict(percentile=0.0), "percentile: 0.0; above 0"),
    (dict(outlier_fraction=1.0), "outlier_fraction: 1.0; from 0 to below 1"),
  ],
)
def test_what_makes_no_sense_is_refused(given, message):
  with pytest.raises(ValueError, match=message):
    QuantizationConfig(**given)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(scale="power_of_two"), "last level 0.0; above 0 under 'power_of_two'"),
    (dict(scale_dtype="e5m2"), "scale_dtype 'e5m2'; one of float32, bfloat16, e4m3, e8m0"),
    (dict(learned="matrix"), "3 levels to learn; all that a code can name"),
  ],
)
def test_codebooks_that_make_no_sense(given, message):
  with pytest.raises(ValueError, match=message):
    codebooks.Codebook("own", (-1.0, -0.5, 0.0), **given)


@pytest.mark.parametrize("name", ["lloydmax_gauss_4bit", "int4_asym_floatmin", "mxfp4_ceil"])
def test_names_that_are_left_out_say_why(name):
  with pytest.raises(ValueError, match=f"codebook '{name}': not offered; .*(scale|cost)"):
    codebooks.get(name, 32)


def test_how_it_is_said_in_words():
  config = QuantizationConfig(
    "nf4", 64, False, scale_dtype="bfloat16", scale_rule="mse", outlier_fraction=0.01, rotate=True
  )
  words = ", bfloat16 scales, scales by mse, 1% of inputs in 16 bits, rotated"
  assert quantization.details(dataclasses.asdict(config)) == words
  assert quantization.details({"double_quantization": True}) == ", double quantization"
  percentile = dataclasses.replace(config, scale_rule="percentile", rotate=False)
  assert "scales at percentile 99" in quantization.details(dataclasses.asdict(percentile))


@pytest.mark.parametrize(
  ("config", "importance", "message"),
  [
    ({}, jnp.ones((4, 6)), r"importance: weighs nothing; codebook 'nf4'"),
    ({"codebook": "any4"}, jnp.ones((4,)), r"importance: \[4\] for a weight \[4, 6\]"),
    ({"codebook": "any4"}, -jnp.ones((4, 1)), "negative or not finite"),
    ({"codebook": "any4", "rotate": True}, jnp.ones((4, 1)), "weights that were not rotated"),
    ({"rotate": True}, None, "K = 3; a Hadamard rotation wants an even K"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(config, importance, message):
  w = jnp.ones((3 if importance is None else 4, 6))
  with pytest.raises(ValueError, match=message):
    quantize_by(w, QuantizationConfig(**config), importance=importance)

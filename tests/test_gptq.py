"""Error feedback along K, against GPTQ's algorithm written row by row in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import gptq, quantization
from qlora_jax.quantization import QuantizationConfig, dequantize, quantize, quantize_by
from qlora_jax.quantized_tensor import (
  RotatedQuantizedTensor,
  innermost,
  join_rows,
  restore_scales,
  unpack,
)


def inputs(k, count=400, seed=0):
  """Correlated, and with a few channels much larger than the others."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(count, k)) @ (np.eye(k) + 2 * rng.normal(size=(k, k)) / np.sqrt(k))
  return x * rng.exponential(size=k)


def algorithm_1(w, packed, h, damping):
  """The paper's, one row after the other, in float64."""
  k, n = w.shape
  table = np.asarray(packed.levels, np.float64)
  table = table if packed.column_tables else np.tile(table, (n, 1))
  blocks = np.arange(k) // packed.block_size
  scale = np.asarray(restore_scales(packed.scales), np.float64)[blocks]
  zero = np.zeros_like(scale)
  if packed.zero is not None:
    zero = np.asarray(packed.zero, np.float64)[blocks]
  h = h + damping * np.trace(h) / k * np.eye(k)
  u = np.linalg.cholesky(np.linalg.inv(h)).T
  w = w.copy()
  codes = np.zeros((k, n), np.uint8)
  for i in range(k):
    codes[i] = np.abs((w[i] / scale[i] + zero[i])[:, None] - table).argmin(-1)
    value = (table[np.arange(n), codes[i]] - zero[i]) * scale[i]
    w[i + 1 :] -= np.outer(u[i, i + 1 :], (w[i] - value) / u[i, i])
  return codes


@pytest.mark.parametrize(
  ("k", "kind"),
  [
    (256, dict(codebook="nf4", block_size=32)),
    (100, dict(codebook="int4_zero_point", block_size=32, double_quantization=False)),
    (128, dict(codebook="any3", block_size=64)),
    (128, dict(codebook="nvfp4", block_size=16, double_quantization=False)),
  ],
)
def test_it_is_algorithm_1(k, kind):
  w = np.random.default_rng(1).normal(size=(k, 16))
  x = inputs(k)
  packed = quantize(jnp.asarray(w, jnp.float32), **kind)
  h = jnp.asarray(x.T @ x, jnp.float32)
  found = innermost(gptq.feed_back_errors(jnp.asarray(w, jnp.float32), packed, h))
  codes = np.asarray(join_rows(unpack(found.codes, found.bits, found.padding), 0))
  expected = algorithm_1(w, packed, x.T @ x, 0.01)
  # A rounding that float32 decides otherwise changes what follows it in its column.
  assert (codes == expected).mean() > 0.97
  np.testing.assert_array_equal(codes[:8], expected[:8])

  def error(q):
    return np.square(x @ (np.asarray(dequantize(q), np.float64) - w)).sum()

  assert error(found) < 0.8 * error(packed)
  same = dataclasses.replace(found, codes=packed.codes)
  for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(packed), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_without_correlations_it_is_rounding_to_nearest():
  w = jax.random.normal(jax.random.key(0), (128, 24))
  for codebook in ("fp4", "int4"):
    packed = quantize(w, codebook=codebook, double_quantization=False)
    for h in (jnp.eye(128), jnp.zeros((128, 128))):
      found = innermost(gptq.feed_back_errors(w, packed, h))
      np.testing.assert_array_equal(found.codes, packed.codes)


def test_a_tree_of_stacks_and_rotations():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(2, 96, 12)), jnp.float32)
  x = np.stack([inputs(96, seed=seed) for seed in range(2)])
  moments = {"layers/up": np.einsum("ltk,ltj->lkj", x, x).astype(np.float32)}
  dense = {"layers": {"up": w}, "head": w[0]}
  frozen = quantization.quantize_tree(dense, {"*": QuantizationConfig(block_size=32, rotate=True)})
  found = gptq.feed_back_tree(dense, frozen, moments)
  assert found["head"] is frozen["head"]
  found, before = (dequantize(each["layers"]["up"]) for each in (found, frozen))
  assert isinstance(frozen["layers"]["up"], RotatedQuantizedTensor)
  for i in range(2):
    error, least = (np.square(x[i] @ np.asarray(q[i] - w[i])).sum() for q in (found, before))
    assert error < 0.8 * least


def test_refusals():
  w = jnp.ones((64, 4))
  packed = quantize(w)
  with pytest.raises(ValueError, match=r"moments \[4, 4\] for w \[64, 4\]"):
    gptq.feed_back_errors(w, packed, jnp.eye(4))
  with pytest.raises(ValueError, match=r"damping: 0.0; above 0"):
    gptq.feed_back_errors(w, packed, jnp.eye(64), damping=0.0)
  with pytest.raises(ValueError, match="no Cholesky factor"):
    gptq.feed_back_errors(w, packed, -jnp.eye(64))
  with pytest.raises(ValueError, match="a OutlierQuantizedTensor"):
    outliers = quantize_by(w, QuantizationConfig(outlier_fraction=0.1))
    gptq.feed_back_errors(w, outliers, jnp.eye(64))
  with pytest.raises(ValueError, match="up: moments of no packed weight"):
    gptq.feed_back_tree({"up": w}, {"up": w}, {"up": jnp.eye(64)})

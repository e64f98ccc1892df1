"""Lloyd–Max and any4 tables, learned from a matrix's own weights, against Lloyd in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from qlora_jax import codebooks, packed_evaluation, quantized_matmul
from qlora_jax.matmul import target
from qlora_jax.quantization import dequantize, quantize

SINGLE: dict[str, Any] = {"double_quantization": False}


def lloyd(x, mass, levels, rounds):
  """In float64, by sorting: a level moves to the mean of what is nearest to it."""
  for _ in range(rounds):
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    whole = np.bincount(cell, mass, len(levels))
    moment = np.bincount(cell, mass * x, len(levels))
    levels = np.where(whole > 0, moment / np.where(whole > 0, whole, 1), levels)
  return levels


def start_of(name, x, mass):
  """Normal quantiles of √3 times the weights' own deviation, within [−1, 1]."""
  levels = np.asarray(codebooks.get(name).levels)
  end = scipy.stats.norm.ppf(1 - 0.5 / len(levels))
  deviation = np.sqrt((mass * x**2).sum() / mass.sum())
  return levels * min(1, np.sqrt(3) * end * deviation)


def test_few_rounds_are_nearly_the_best():
  """In blocks whose largest weights lie far out, where Lloyd to the end is less than 1% better."""
  w = jax.random.normal(jax.random.key(0), (1024, 64))
  x, scale = scaled(w, 1024)
  x, mass = x.reshape(-1), (scale**2).reshape(-1)
  best = lloyd(x, mass, start_of("lloyd_max4", x, mass), 1000)
  least = (mass * np.abs(x[:, None] - best).min(1) ** 2).sum()
  q = quantize(w, codebook="lloyd_max4", block_size=1024, **SINGLE)
  assert jnp.square(dequantize(q) - w).sum() < 1.01 * least


def scaled(w, block_size):
  """Weights in units of their block's largest magnitude, and that."""
  blocks = np.asarray(w, np.float64).reshape(-1, block_size, w.shape[1])
  scale = np.broadcast_to(np.abs(blocks).max(1, keepdims=True), blocks.shape)
  return (blocks / scale).reshape(w.shape), scale.reshape(w.shape)


def heavy(shape):
  return jnp.asarray(np.random.default_rng(2).standard_t(4, shape).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighed", [False, True])
def test_lloyd_max_is_lloyd_s(bits, weighed):
  w = heavy((128, 48))
  importance = None
  x, scale = scaled(w, 64)
  mass = scale**2
  if weighed:
    importance = jnp.asarray(np.random.default_rng(3).exponential(size=(128, 48)), jnp.float32) ** 3
    mass = mass * np.asarray(importance, np.float64)
  name = f"lloyd_max{bits}"
  q = quantize(w, codebook=name, block_size=64, importance=importance, **SINGLE)
  expected = lloyd(x.reshape(-1), mass.reshape(-1), start_of(name, x, mass), 30)
  np.testing.assert_allclose(q.levels, expected, atol=1e-3)
  error = np.asarray(dequantize(q) - w, np.float64) ** 2
  fixed = np.asarray(dequantize(quantize(w, codebook=f"nf{bits}", **SINGLE)) - w, np.float64) ** 2
  weight = 1 if importance is None else np.asarray(importance)
  assert (weight * error).sum() < 0.95 * (weight * fixed).sum()


def groups(w, block_size, zeros):
  """Weights as any4's groups have them, from 0 to 15 or nearly so, and the scales: (x, scale)."""
  blocks = np.asarray(w, np.float64).reshape(-1, block_size, w.shape[1])
  scale = (blocks.max(1) - blocks.min(1)) / 15
  np.testing.assert_allclose(zeros, -blocks.min(1) / scale, rtol=2**-8)
  x = blocks / scale[:, None] + np.asarray(zeros, np.float64)[:, None]
  return x.reshape(w.shape), np.repeat(scale, block_size, 0)


def any4_start(x, mass):
  """Of normal quantiles, about the mean and as wide as the weights' own deviation has it."""
  mean = (mass * x).sum() / mass.sum()
  deviation = np.sqrt((mass * (x - mean) ** 2).sum() / mass.sum())
  quantiles = scipy.stats.norm.ppf((np.arange(16) + 0.5) / 16)
  end = quantiles[-1]
  return mean + quantiles / end * min(7.5, np.sqrt(3) * end * deviation)


def test_any4_has_asymmetric_groups_and_a_table_a_column():
  w = heavy((128, 6)).at[:, 5].multiply(100).at[:, 4].add(1)
  q = quantize(w, codebook="any4", block_size=32, **SINGLE)
  assert q.levels.shape == (6, 16) and q.column_tables and q.zero.dtype == jnp.bfloat16
  x, scale = groups(w, 32, q.zero)
  tables = np.asarray(q.levels, np.float64)
  rounded = np.zeros_like(x)
  for i in range(6):
    own, mass = x[:, i], scale[:, i] ** 2
    expected = lloyd(own, mass, any4_start(own, mass), 30)
    np.testing.assert_allclose(tables[i], expected, atol=1e-2, err_msg=str(i))
    rounded[:, i] = tables[i][np.abs(own[:, None] - tables[i]).argmin(-1)]
  zeros = np.repeat(np.asarray(q.zero, np.float64), 32, 0)
  np.testing.assert_allclose(dequantize(q), (rounded - zeros) * scale, rtol=1e-5, atol=1e-4)
  fixed = quantize(w, codebook="int4_zero_point", block_size=32, **SINGLE)
  assert jnp.square(dequantize(q) - w).sum() < 0.8 * jnp.square(dequantize(fixed) - w).sum()
  # A byte more for each zero-point, and five tables more.
  assert q.nbytes == fixed.nbytes + 4 * 6 + 5 * 16 * 4


def test_any4_in_products_stacks_and_gradients():
  w = heavy((3, 100, 8))
  q = quantize(w, codebook="any4", block_size=32)
  assert q.levels.shape == (3, 8, 16)
  x = jax.random.normal(jax.random.key(0), (5, 100))
  _, scanned = jax.lax.scan(lambda c, layer: (c, quantized_matmul(x, layer)), None, q)
  gradient = jax.vmap(jax.grad(lambda x, layer: quantized_matmul(x, layer).sum()), (None, 0))(x, q)
  for i in range(3):
    dense = dequantize(quantize(w[i], codebook="any4", block_size=32))
    np.testing.assert_array_equal(dense, dequantize(q)[i])
    np.testing.assert_allclose(scanned[i], x @ dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient[i], jnp.tile(dense.sum(1), (5, 1)), rtol=1e-4, atol=1e-4)


def test_columns_that_are_looked_up_have_their_own_tables():
  q = quantize(heavy((64, 8)), codebook="any2", block_size=32)
  ids = jnp.array([5, 0, 5])
  np.testing.assert_array_equal(packed_evaluation._rows(q, ids), dequantize(q)[:, ids].T)


def test_kernels_refuse_a_table_a_column(monkeypatch):
  monkeypatch.setattr(target, "target", lambda: ("gpu", None))
  monkeypatch.setattr(target, "_LEAST_JAX", (0, 1))
  found = target.unsupported(quantize(heavy((128, 8)), codebook="any4"), "gpu")
  assert found is not None and "a table for each output" in found
  assert target.unsupported(quantize(heavy((128, 8)), codebook="lloyd_max4"), "gpu") is None


def test_a_constant_and_an_empty_cell():
  """Levels that no weight is nearest to stay where they were; zeros stay zeros."""
  w = jnp.ones((64, 2)).at[:, 1].set(0)
  for codebook in ("lloyd_max4", "any4"):
    q = quantize(w, codebook=codebook, **SINGLE)
    np.testing.assert_allclose(dequantize(q), w, rtol=3e-7)
    assert bool(jnp.isfinite(q.levels).all()) and bool((jnp.diff(q.levels) > 0).all())

"""What stands around a packed weight: a rotation of K, and rows of it kept in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qlora_jax import lora, quantized_matmul, rotation
from qlora_jax.lora import LoRAConfig
from qlora_jax.matmul import fuses_adapter
from qlora_jax.quantization import QuantizationConfig, dequantize, quantize_by, quantize_tree
from qlora_jax.quantized_tensor import OutlierQuantizedTensor, RotatedQuantizedTensor

PLAIN = QuantizationConfig(block_size=32, double_quantization=False)
ROTATED = QuantizationConfig(block_size=32, double_quantization=False, rotate=True)
OUTLIERS = QuantizationConfig(block_size=32, double_quantization=False, outlier_fraction=0.02)
BOTH = QuantizationConfig("nvfp4", 16, False, outlier_fraction=0.02, rotate=True)
# Rows that its table, without a zero, rounds to something.
NO_ZERO = QuantizationConfig("equal_mass16", 32, False, outlier_fraction=0.02)


def heavy(shape=(128, 48), seed=0):
  """Student's t of 3 degrees of freedom, with two inputs 30 times the others."""
  w = np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)
  w[..., [5, 77], :] *= 30
  return jnp.asarray(w)


@pytest.mark.parametrize("k", [2, 96, 128, 172, 512])
def test_the_rotation_is_a_hadamard_matrix_s(k):
  signs = rotation.random_signs(3, k)
  assert set(np.asarray(signs)) <= {-1, 1} and signs.dtype == jnp.int8
  size = rotation.hadamard_size(k)
  h = np.kron(np.eye(k // size), scipy.linalg.hadamard(size) / np.sqrt(size))
  x = jax.random.normal(jax.random.key(0), (3, k))
  expected = np.asarray(x, np.float64) * np.asarray(signs) @ h
  np.testing.assert_allclose(rotation.rotate(x, signs), expected, atol=2e-6)
  np.testing.assert_allclose(rotation.rotate(x.T, signs, 0), expected.T, atol=2e-6)
  np.testing.assert_allclose(rotation.rotate_back(rotation.rotate(x, signs), signs), x, atol=2e-6)


def test_a_rotation_helps_heavy_tails_alone():
  def error(w, config):
    return float(jnp.square(dequantize(quantize_by(w, config)) - w).mean() / jnp.square(w).mean())

  normal = jax.random.normal(jax.random.key(0), (512, 256))
  student = jnp.asarray(np.random.default_rng(1).standard_t(2.5, (512, 256)).astype(np.float32))
  # Rotated weights are nearly normal, whatever they were.
  plain = error(normal, PLAIN)
  assert error(normal, ROTATED) == pytest.approx(plain, rel=0.03)
  assert error(student, ROTATED) == pytest.approx(plain, rel=0.05)
  assert error(student, PLAIN) > 1.1 * error(student, ROTATED)


def test_outliers_are_the_largest_rows_in_16_bits():
  w = heavy()
  q = quantize_by(w, OUTLIERS)
  assert isinstance(q, OutlierQuantizedTensor) and isinstance(q.values, jax.Array)
  # .02 of 128 rows, rounded up.
  norms = np.linalg.norm(np.asarray(w), axis=1)
  np.testing.assert_array_equal(q.rows, np.sort(np.argsort(norms)[-3:]))
  np.testing.assert_array_equal(dequantize(q)[q.rows], w[q.rows].astype(jnp.bfloat16))
  rest = np.setdiff1d(np.arange(128), q.rows)
  without = w.at[q.rows].set(0)
  np.testing.assert_array_equal(dequantize(q)[rest], dequantize(quantize_by(without, PLAIN))[rest])
  error, before = (jnp.square(dequantize(each) - w).sum() for each in (q, quantize_by(w, PLAIN)))
  assert error < 0.5 * before
  assert q.nbytes == quantize_by(w, PLAIN).nbytes + 3 * (4 + 48 * 2)
  # Of a table without a zero the rest is made up for.
  found = dequantize(quantize_by(w, NO_ZERO))
  np.testing.assert_allclose(found[q.rows], w[q.rows], rtol=2**-8, atol=0.02)


def test_an_importance_chooses_the_outliers():
  importance = jnp.ones((128, 1)).at[jnp.array([1, 2, 3])].set(1e6)
  q = quantize_by(heavy(), OUTLIERS, importance=importance)
  assert isinstance(q, OutlierQuantizedTensor)
  np.testing.assert_array_equal(q.rows, [1, 2, 3])


@pytest.mark.parametrize("config", [ROTATED, OUTLIERS, BOTH, NO_ZERO], ids=["r", "o", "ro", "n"])
def test_products_are_with_the_dequantized_weight(config):
  """In a stack too, under scan, vmap over trials, and backward."""
  w = heavy((2, 128, 48))
  stack = quantize_by(w, config)
  assert stack.shape == w.shape and stack.bits == 4 and stack.nbytes > 0
  dense = dequantize(stack)
  x = jax.random.normal(jax.random.key(1), (3, 5, 128))

  def loss(x, layer):
    return jnp.square(quantized_matmul(x, layer)).sum()

  def step(carry, layer):
    return carry, (quantized_matmul(x, layer), jax.grad(loss)(x, layer))

  _, (y, gradient) = jax.jit(lambda: jax.lax.scan(step, None, stack))()
  for i in range(2):
    scale = float(jnp.abs(x @ dense[i]).max())
    np.testing.assert_allclose(y[i], x @ dense[i], atol=2e-6 * scale)
    expected = 2 * (x @ dense[i]) @ dense[i].T
    np.testing.assert_allclose(gradient[i], expected, atol=4e-6 * float(jnp.abs(expected).max()))
    one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
    np.testing.assert_allclose(dequantize(one), dense[i], rtol=1e-6, atol=1e-5)
    trials = jax.vmap(quantized_matmul, (0, None))(x, one)
    np.testing.assert_allclose(trials, y[i], atol=2e-6 * scale)


def test_bfloat16_products_round_little_more():
  w = heavy()
  x = jax.random.normal(jax.random.key(1), (64, 128))
  q = quantize_by(w, BOTH)
  exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(dequantize(q), np.float64)
  found = np.asarray(quantized_matmul(x.astype(jnp.bfloat16), q), np.float64)
  # Three roundings of 8 bits: of the rotated input twice, and of the decoded weight; and y's.
  assert np.linalg.norm(found - exact) < 2 * 2**-8 * np.linalg.norm(exact)


def test_trees_adapters_and_merging():
  weights = {"up": heavy(), "down": heavy((128, 48), 1)}
  frozen = quantize_tree(weights, {"up": BOTH, "down": ROTATED})
  assert isinstance(frozen["up"], OutlierQuantizedTensor)
  assert isinstance(frozen["up"].inner, RotatedQuantizedTensor)
  cfg = LoRAConfig(rank=4, targets=("*",))
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  a = params["up"]["lora_a"]
  b = jax.random.normal(jax.random.key(1), (4, 48))
  params["up"]["lora_b"] = b
  merged = lora.merge(frozen, params, constants)
  expected = dequantize(frozen["up"]) + cfg.alpha / 4 * a @ b
  np.testing.assert_allclose(merged["up"], expected, rtol=1e-5, atol=1e-5)
  assert not fuses_adapter(jnp.ones((100, 128), jnp.bfloat16), frozen["up"], 4)

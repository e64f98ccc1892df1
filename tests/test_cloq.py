"""CLoQ: the least squares that it solves, against float64, and what it asks for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import config as config_lib
from qlora_jax import lora_init
from qlora_jax.lora import LoRAConfig
from qlora_jax.quantization import QuantizationConfig, dequantize, quantize_by

L, K, N, R = 2, 32, 24, 4
CFG = LoRAConfig(
  rank=R,
  alpha=6.0,
  targets=("*/up",),
  init="cloq",
  rank_pattern={"layers/1/up": 2},
  svd_iterations=None,
)
FORMAT = QuantizationConfig("nf2", block_size=16)
RULES = {"*/up": FORMAT}
PATH = "layers/up/kernel"


def weights():
  return np.random.default_rng(1).normal(size=(L, K, N)).astype(np.float32)


def inputs(rows=96):
  """`[L, rows, K]`, of variances that differ by 10^4, and mixed."""
  rng = np.random.default_rng(2)
  mixing = np.logspace(0, -2, K)[:, None] * rng.normal(size=(L, K, K))
  return rng.normal(size=(L, rows, K)) @ mixing


def moments(x):
  return {PATH: np.einsum("ltk,ltj->lkj", x, x).astype(np.float32)}


@pytest.fixture(scope="module")
def made():
  dense = {"layers": {"up": {"kernel": jnp.asarray(weights())}}}
  return lora_init.initialize(jax.random.key(0), dense, RULES, CFG, moments=moments(inputs()))


def damped_root(x):
  """H + λ = Rᵀ · R by its eigenvectors: another root than the code's."""
  h = x.T @ x
  values, vectors = np.linalg.eigh(h + 0.01 * np.trace(h) / K * np.eye(K))
  return np.sqrt(values)[:, None] * vectors.T


@pytest.mark.parametrize("layer", [0, 1])
def test_the_closed_form(made, layer):
  """s · A · B = R⁻¹ · SVD_r(R · (W − Q)), of each layer's rank."""
  frozen, params, constants = made
  rank = 2 if layer else R
  packed = frozen["layers"]["up"]["kernel"]
  # The base is W quantized, as without an init.
  expected = quantize_by(jnp.asarray(weights()), FORMAT)
  jax.tree.map(np.testing.assert_array_equal, packed, expected)
  error = weights()[layer].astype(np.float64) - np.asarray(dequantize(packed))[layer]
  root = damped_root(inputs()[layer])
  u, s, vt = np.linalg.svd(root @ error)
  wanted = np.linalg.solve(root, u[:, :rank] * s[:rank] @ vt[:rank])
  a, b = (np.asarray(params["layers"]["up"][x][layer], np.float64) for x in ("lora_a", "lora_b"))
  scaling = float(constants["layers"]["up"]["scaling"][layer])
  assert scaling == 6.0 / rank and not a[:, rank:].any() and not b[rank:].any()
  np.testing.assert_allclose(scaling * a @ b, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())


def test_no_other_of_its_rank_leaves_less_of_the_outputs(made):
  """Less than the SVD of the error itself, which knows no inputs; and a stationary point."""
  frozen, params, constants = made
  x, own = inputs()[0], params["layers"]["up"]
  error = (
    weights()[0].astype(np.float64) - np.asarray(dequantize(frozen["layers"]["up"]["kernel"]))[0]
  )
  root = damped_root(x)
  scaling = float(constants["layers"]["up"]["scaling"][0])
  a, b = (np.asarray(own[name][0], np.float64) for name in ("lora_a", "lora_b"))

  def left(change):
    return np.linalg.norm(x @ (error - change)) / np.linalg.norm(x @ error)

  u, s, vt = np.linalg.svd(error)
  assert left(scaling * a @ b) < 0.8 * left(u[:, :R] * s[:R] @ vt[:R])
  # The gradients of ‖R · (E − s · A · B)‖² / 2 with respect to A and B, of unit rows and columns.
  slope = scaling * root.T @ root @ (error - scaling * a @ b)
  scale = np.linalg.norm(scaling * root.T @ root @ error)
  assert np.linalg.norm(slope @ (b / np.linalg.norm(b)).T) < 1e-3 * scale
  assert np.linalg.norm((a / np.linalg.norm(a)).T @ slope) < 1e-3 * scale


def test_fewer_inputs_than_k_and_none():
  """λ makes up for the first; without any input it is LoftQ's single step."""
  dense = {"layers": {"up": {"kernel": jnp.asarray(weights())}}}
  few = inputs(5)
  few[1] = 0
  _, params, _ = lora_init.initialize(jax.random.key(0), dense, RULES, CFG, moments=moments(few))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  loftq = dataclasses.replace(CFG, init="loftq", loftq_iterations=1)
  _, other, _ = lora_init.initialize(jax.random.key(0), dense, RULES, loftq)
  product, wanted = (
    tree["layers"]["up"]["lora_a"][1] @ tree["layers"]["up"]["lora_b"][1]
    for tree in (params, other)
  )
  np.testing.assert_allclose(product, wanted, rtol=0, atol=2e-5)


def test_refused():
  dense = {"layers": {"up": {"kernel": jnp.asarray(weights())}}}

  def refuses(match, rules=RULES, **arguments: Any):
    with pytest.raises(ValueError, match=match):
      lora_init.initialize(jax.random.key(0), dense, rules, CFG, **arguments)

  refuses(r"'cloq'; layers/up/kernel: its second moment \[2, 32, 32\] is missing")
  refuses(
    r"a second moment \[2, 32, 31\]; \[2, 32, 32\], and finite",
    moments={PATH: moments(inputs())[PATH][..., :31]},
  )
  refuses("and finite", moments={PATH: np.full((L, K, K), np.nan)})
  refuses("'cloq'; layers/up is not quantized", {}, moments=moments(inputs()))
  with pytest.raises(ValueError, match="cloq_damping: 0; a finite number above 0"):
    dataclasses.replace(CFG, cloq_damping=0)
  overrides = {
    "name": "run",
    "model.path": "base",
    "data.path": "rows",
    "model.quantize": False,
    "train.compare_16bit": False,
  }
  with pytest.raises(config_lib.ConfigError, match=r"lora\.init: 'cloq'; model\.quantize is False"):
    config_lib.from_config_dict(config_lib.defaults(), overrides | {"lora.init": "cloq"})

"""QA-LoRA: its paper's equation and gradients in float64, its merge, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import config as config_lib
from qlora_jax import lora, quantize, quantize_tree
from qlora_jax.linen import QDense
from qlora_jax.lora import LoRAConfig
from qlora_jax.quantization import QuantizationConfig, dequantize

L, K, N, B, R = 2, 48, 24, 16, 3
CFG = LoRAConfig(rank=R, alpha=6.0, targets=("*",), variant="qa_lora")
FORMAT = QuantizationConfig("int4_zero_point", block_size=B)
CLOSE: Any = {"rtol": 0, "atol": 2e-5}


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32))


def adapted(w, quantization=FORMAT):
  """(frozen, params, constants) of a layer or a stack of them, trained a little."""
  name = "layers" if w.ndim > 2 else "up"
  tree = {"layers": {"up": {"kernel": w}}} if w.ndim > 2 else {"up": {"kernel": w}}
  frozen = quantize_tree(tree, {"*": quantization})
  params, constants = lora.init(jax.random.key(0), frozen, CFG)
  own = (params["layers"] if name == "layers" else params)["up"]
  own["lora_b"] = normal(3, *own["lora_b"].shape)
  return frozen, params, constants


def test_the_equation_and_its_gradient():
  """Algorithm 1: y = x · W̃ + s · (AvgPool_B(x) · B) · A · B, its pool times the block size."""
  frozen, params, constants = adapted(normal(1, K, N))
  w, own, fixed = frozen["up"]["kernel"], params["up"], constants["up"]
  assert own["lora_a"].shape == (K // B, R)
  assert lora.count(params, constants) == (K // B + N) * R
  # As LoRA's: U(−1/√K, 1/√K).
  assert 0.5 / np.sqrt(K) < np.abs(own["lora_a"]).max() <= 1 / np.sqrt(K)
  dense, s = np.asarray(dequantize(w), np.float64), float(fixed["scaling"])
  a, b = (np.asarray(own[name], np.float64) for name in ("lora_a", "lora_b"))
  x, dy = np.random.default_rng(5).normal(size=(6, K)), np.random.default_rng(6).normal(size=(6, N))
  layer = QDense(N, dtype=jnp.float32)

  @jax.jit
  def both(own, x, dy) -> Any:
    def apply(own, x) -> Any:
      return layer.apply({"params": own, "constants": fixed, "frozen": {"kernel": w}}, x)

    y, back = jax.vjp(apply, own, x)
    return y, *back(dy)

  y, grads, dx = both(own, jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32))
  pooled = x.reshape(6, K // B, B).mean(-1) * B
  np.testing.assert_allclose(y, x @ dense + s * pooled @ a @ b, **CLOSE)
  spread = np.repeat(a, B, axis=0)
  np.testing.assert_allclose(dx, dy @ (dense + s * spread @ b).T, **CLOSE)
  assert grads.keys() == own.keys()
  np.testing.assert_allclose(grads["lora_a"], s * pooled.T @ (dy @ b.T), **CLOSE)
  np.testing.assert_allclose(grads["lora_b"], s * (pooled @ a).T @ dy, **CLOSE)


def test_merged_it_equals_the_live_model():
  """To float32 rounding, with the packed codes and scales as they were."""
  frozen, params, constants = adapted(normal(1, L, K, N))
  params["norm"] = {"scale": jnp.ones(3)}
  merged, left = lora.merge_zero_points(frozen, params, constants)
  jax.tree.map(np.testing.assert_array_equal, left, {"norm": {"scale": jnp.ones(3)}})
  before, after = frozen["layers"]["up"]["kernel"], merged["layers"]["up"]["kernel"]
  assert before.zero.dtype == jnp.uint8 and after.zero.dtype == jnp.float32
  same = dataclasses.replace(after, zero=before.zero)
  jax.tree.map(np.testing.assert_array_equal, same, before)
  x, layer = normal(2, L, 5, K), QDense(N, dtype=jnp.float32)

  def outputs(kernel, own, fixed):
    def one(x, kernel, own, fixed) -> Any:
      return layer.apply({"params": own, "constants": fixed, "frozen": {"kernel": kernel}}, x)

    return jax.vmap(one)(x, kernel, own, fixed)

  live = outputs(before, params["layers"]["up"], constants["layers"]["up"])
  # Sums of 48 products of about 1, each of a few float32 roundings.
  np.testing.assert_allclose(outputs(after, {}, {}), live, rtol=0, atol=5e-6)
  assert np.abs(live - outputs(before, {}, {})).max() > 0.1
  # And as the dense merge has it.
  whole = lora.merge(frozen, {"layers": params["layers"]}, constants)
  np.testing.assert_allclose(dequantize(after), whole["layers"]["up"]["kernel"], rtol=0, atol=1e-6)


def test_as_plain_lora_it_is_the_same():
  frozen, params, constants = adapted(normal(1, L, K, N))
  plain, fixed, cfg = lora.plain(params, constants, CFG)
  assert cfg.variant == "lora" and plain["layers"]["up"]["lora_a"].shape == (L, K, R)
  assert fixed["layers"]["up"].keys() == {"scaling", "rank"}
  one, other = (lora.merge(frozen, *each) for each in ((params, constants), (plain, fixed)))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_refused():
  w = normal(1, K, N)

  def refuses(match, leaf, cfg=CFG):
    with pytest.raises(ValueError, match=match):
      lora.init(jax.random.key(0), {"up": {"kernel": leaf}}, cfg)

  refuses("up: not quantized; QA-LoRA merges into zero-points", w)
  refuses("up: no zero-point; QA-LoRA merges", quantize(w, codebook="nf4", block_size=B))
  for field in ({"rotate": True}, {"outlier_fraction": 0.1}):
    wrapped = quantize_tree(
      {"up": jnp.pad(w, ((0, 16), (0, 0)))}, {"up": dataclasses.replace(FORMAT, **field)}
    )["up"]
    refuses(f"up: a {type(wrapped).__name__}; QA-LoRA .* with nothing around it", wrapped)
  refuses(
    "up: K = 48; a multiple of its block size, 32",
    quantize(w, codebook=FORMAT.codebook, block_size=32),
  )
  with pytest.raises(ValueError, match="init: 'pissa' with variant 'qa_lora'"):
    dataclasses.replace(CFG, init="pissa")
  with pytest.raises(ValueError, match="lora_bias: True with variant 'qa_lora'"):
    dataclasses.replace(CFG, lora_bias=True)


def test_a_merge_that_cannot_be_is_refused():
  # Doubly quantized, its scale would not be 0.
  single = dataclasses.replace(FORMAT, double_quantization=False)
  frozen, params, constants = adapted(normal(1, K, N).at[:B, 0].set(0), single)
  with pytest.raises(ValueError, match="merge_zero_points: up: a block of zeros has scale 0"):
    lora.merge_zero_points(frozen, params, constants)
  plain, fixed, _ = lora.plain(params, constants, CFG)
  with pytest.raises(ValueError, match="merge_zero_points: up: its adapter is not of variant"):
    lora.merge_zero_points(frozen, plain, fixed)
  with pytest.raises(ValueError, match="merge_zero_points: down/lora_a: the base has no weight"):
    lora.merge_zero_points(frozen, {"down": params["up"]}, {"down": constants["up"]})


@pytest.mark.parametrize(
  ("fields", "path"),
  [
    ({}, "quantization.codebook: 'nf4'"),
    ({"quantization.codebook": "int4_zero_point", "quantization.rotate": True}, ".rotate: True"),
    (
      {"quantization.codebook": "int4_zero_point", "model.quantize": False},
      "model.quantize: False",
    ),
  ],
)
def test_a_config_is_refused_before_anything_is_made(fields, path):
  overrides = {
    "name": "run",
    "model.path": "base",
    "data.path": "rows",
    "lora.variant": "qa_lora",
    "train.compare_16bit": False,
  }
  with pytest.raises(config_lib.ConfigError, match=f"{path}; lora.variant 'qa_lora' merges into"):
    config_lib.from_config_dict(config_lib.defaults(), overrides | fields)


@pytest.mark.parametrize(("field", "name"), [("variant", "ir_qlora"), ("init", "apiq")])
def test_names_that_are_left_out_say_why(field, name):
  with pytest.raises(ValueError, match=f"{field}: '{name}'; not offered: it "):
    LoRAConfig(**{field: name})

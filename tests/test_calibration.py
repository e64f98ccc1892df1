"""Gradients with respect to whole weights, and moments of inputs, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import (
  QuantizationConfig,
  calibration,
  dequantize,
  lora,
  quantize_tree,
  tree_paths,
)
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.train import batch_loss

CONFIG = TransformerConfig(
  vocab_size=20,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  tie_embeddings=True,
  max_position_embeddings=16,
)
CFG = LoRAConfig(rank=2, targets=("*/attn/q", "layers/1/mlp/down", "head"))


@pytest.fixture(scope="module")
def frozen():
  model = Transformer(CONFIG, dtype=jnp.float32)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]


def test_moments_are_those_of_the_inputs():
  """Of the first layer, whose inputs are the normed embeddings; and of the head's."""
  config = dataclasses.replace(CONFIG, tie_embeddings=False)
  model = Transformer(config, dtype=jnp.float32, remat="full")
  frozen = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  ids = np.random.default_rng(0).integers(0, 20, (2, 3, 9)).astype(np.int32)
  batch = {"tokens": ids, "targets": ids, "loss_mask": np.ones(ids.shape, bool)}
  cfg = dataclasses.replace(CFG, targets=("*/attn/[qk]", "head"))
  found = calibration.second_moments(model, frozen, cfg, [batch, batch])
  x = np.asarray(frozen["embed"]["embedding"], np.float64)[ids].reshape(-1, 16)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_eps)
  own = found["layers/attn/q/kernel"]
  assert own.shape == (2, 16, 16)
  np.testing.assert_allclose(own[0], 2 * x.T @ x, rtol=1e-4, atol=1e-3)
  np.testing.assert_array_equal(own, found["layers/attn/k/kernel"])
  with pytest.raises(ValueError, match="head: no dense layer reads it"):
    tied = {name: x for name, x in frozen.items() if name != "head"}
    cfg = dataclasses.replace(cfg, targets=("head",))
    calibration.second_moments(Transformer(CONFIG, dtype=jnp.float32), tied, cfg, [batch])
  apply = jax.jit(lambda rows: model.apply({"frozen": frozen}, rows, method="hidden"))
  hidden = [apply(rows) for rows in ids]
  rows = np.asarray(hidden, np.float64).reshape(-1, 16)
  np.testing.assert_allclose(found["head/kernel"], 2 * rows.T @ rows, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_mean_loss(frozen, packed):
  model = Transformer(CONFIG, dtype=jnp.float32)
  if packed:
    frozen = quantize_tree(frozen, {"layers/*/attn/*": QuantizationConfig(block_size=16)})
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 20, (2, 2, 3, 9)).astype(np.int32)
  # Two batches of two microbatches, with unequal counts of targets.
  batches = [
    {"tokens": tokens, "targets": (tokens * 7 + 3) % 20, "loss_mask": rng.random(tokens.shape) < p}
    for tokens, p in zip(ids, (0.3, 0.8), strict=True)
  ]
  found = calibration.weight_gradients(model, frozen, CFG, batches, 16)
  assert found.keys() == {"layers/attn/q/kernel", "layers/mlp/down/kernel", "head/kernel"}
  targets = sum(batch["loss_mask"].sum() for batch in batches)

  @jax.jit
  def loss(params, batch):
    return batch_loss(model, {"params": params, "constants": {}, "frozen": frozen}, batch, 16)

  def mean(params):
    each = [{name: x[i] for name, x in batch.items()} for batch in batches for i in range(2)]
    return sum(float(loss(params, microbatch)) for microbatch in each) / targets

  for path, gradient in found.items():
    w = lora.merge({"w": lora.base_weight(frozen, path)}, {}, {})["w"]
    direction = gradient / np.linalg.norm(gradient)
    step = 1e-2
    up, down = (mean(tree_paths.nest({path: w + sign * step * direction})) for sign in (1, -1))
    # Float32 losses of about 3, over 2e-2.
    np.testing.assert_allclose(
      (up - down) / (2 * step), np.linalg.norm(gradient), rtol=1e-2, atol=1e-4
    )


def test_the_fisher_diagonal_is_the_mean_of_squares(frozen):
  """Of gradients of a sequence's loss, one at a time; and an importance for learned levels."""
  model = Transformer(CONFIG, dtype=jnp.float32)
  ids = np.random.default_rng(0).integers(0, 20, (2, 2, 9)).astype(np.int32)
  batch = {"tokens": ids, "targets": (ids * 7 + 3) % 20, "loss_mask": np.ones(ids.shape, bool)}
  cfg = dataclasses.replace(CFG, targets=("*/attn/q",))
  found = calibration.fisher_diagonal(model, frozen, cfg, [batch], 16)["layers/attn/q/kernel"]
  expected = 0
  for i in range(2):
    for j in range(2):
      one = {name: x[i : i + 1, j : j + 1] for name, x in batch.items()}
      gradient = calibration.weight_gradients(model, frozen, cfg, [one], 16)
      expected = expected + np.square(9 * gradient["layers/attn/q/kernel"]) / 4
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
  rules = {"layers/*/attn/q": QuantizationConfig("lloyd_max2", 16)}
  importance = {"layers/attn/q/kernel": found}
  weighed, plain = (
    dequantize(quantize_tree(frozen, rules, importance=each)["layers"]["attn"]["q"]["kernel"])
    for each in (importance, None)
  )
  w = frozen["layers"]["attn"]["q"]["kernel"]
  assert (found * np.square(weighed - w)).sum() < (found * np.square(plain - w)).sum()
  with pytest.raises(ValueError, match="layers/mlp/up/kernel: an importance of what is not"):
    quantize_tree(frozen, rules, importance={"layers/mlp/up/kernel": found})


def test_the_inputs_own_moments():
  h = np.arange(18.0).reshape(2, 3, 3)
  found = calibration.input_moments({"w": h})["w"]
  np.testing.assert_array_equal(found, [[[0], [4], [8]], [[9], [13], [17]]])

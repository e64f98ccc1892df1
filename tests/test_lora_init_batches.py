"""Layers that are decomposed in one program, against one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import QuantizationConfig, lora_init
from qlora_jax.lora import LoRAConfig

# Many programs to compile: for the whole suite, not its quick part.
pytestmark = pytest.mark.slow


def test_together():
  one = 4 * 4096 * 4096
  assert [lora_init._together(count, one) for count in (1, 32, 6, 7)] == [1, 1, 1, 1]
  assert [lora_init._together(count, one // 4) for count in (1, 32, 6, 7)] == [1, 4, 3, 1]


def test_layers_together_are_layers_one_by_one(monkeypatch):
  """Each with its own rank, scaling and draw."""
  w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 48, 32)), jnp.float32)
  dense = {"layers": {"up": {"kernel": w}}}
  rules = {"layers/*/up": QuantizationConfig("nf2", 16, double_quantization=False)}
  cfg = LoRAConfig(rank=3, targets=("layers/*/up",), rank_pattern={"layers/2/up": 5}, init="loftq")
  key = jax.random.key(0)
  sizes, matrices = [], lora_init._matrices

  def counted(w, *rest, **how):
    sizes.append(len(w))
    return matrices(w, *rest, **how)

  monkeypatch.setattr(lora_init, "_matrices", counted)
  together = lora_init.initialize(key, dense, rules, cfg)
  monkeypatch.setattr(lora_init, "_BATCH_BYTES", 1)
  apart = lora_init.initialize(key, dense, rules, cfg)
  assert sizes == [4, 1, 1, 1, 1]

  def product(params):
    own = params["layers"]["up"]
    return jnp.matmul(own["lora_a"], own["lora_b"])

  codes = [each[0]["layers"]["up"]["kernel"].codes for each in (together, apart)]
  # A weight on the edge of two codes may be rounded otherwise.
  assert (np.asarray(codes[0]) == np.asarray(codes[1])).mean() > 0.99
  np.testing.assert_allclose(product(together[1]), product(apart[1]), atol=2e-2)
  assert together[1]["layers"]["up"]["lora_a"].shape == (4, 48, 5)
  assert not np.asarray(together[1]["layers"]["up"]["lora_a"][0, :, 3:]).any()


def test_the_layer_that_cannot_be_stored_is_named():
  w = np.ones((2, 16, 4), np.float32)
  w[1, 3, 2] = np.nan
  with pytest.raises(ValueError, match=r"layers/up: index \[1\]: a weight that is not finite"):
    lora_init.initialize(
      jax.random.key(0),
      {"layers": {"up": w}},
      {"layers/*/up": QuantizationConfig(block_size=16)},
      LoRAConfig(rank=2, targets=("layers/*/up",), init="pissa"),
    )

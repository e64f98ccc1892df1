"""What a sweep measures, against numpy in float64."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from experiments import analysis
from qlora_jax import data, lora
from qlora_jax.evaluate import held_out_loss
from qlora_jax.models.transformer import Transformer, TransformerConfig

SHAPE = TransformerConfig(
  vocab_size=37,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
)
NF4 = ql.QuantizationConfig(block_size=8, double_quantization=False)


@pytest.fixture(scope="module")
def model():
  return Transformer(SHAPE, dtype=jnp.float32)


@pytest.fixture(scope="module")
def dense(model):
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]


@pytest.fixture(scope="module")
def frozen(dense):
  return ql.quantize_tree(dense, {"layers/*/attn/*": NF4, "layers/*/mlp/*": NF4})


@pytest.fixture(scope="module")
def variables(frozen):
  params, constants = lora.init(jax.random.key(1), frozen, lora.LoRAConfig(rank=2))
  params = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
  )
  return {"params": params, "constants": constants, "frozen": frozen}


@pytest.fixture(scope="module")
def rows():
  generator = np.random.default_rng(0)
  documents = [generator.integers(1, 37, size).tolist() for size in (5, 9, 12, 4, 11, 7, 12)]
  return data.pack(documents, 12)


def log_probabilities(model, variables, rows):
  """`[rows, T, V]` float64."""
  logits = model.apply(variables, rows.tokens, rows.segment_ids, rows.positions)
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("loss_chunk", [7, 1000])
def test_losses_and_divergences_by_sequence(model, dense, variables, rows, loss_chunk):
  found = analysis.by_sequence(model, variables, dense, rows, batch_size=4, loss_chunk=loss_chunk)
  ours = log_probabilities(model, variables, rows)
  theirs = log_probabilities(model, {"params": {}, "constants": {}, "frozen": dense}, rows)
  picked = np.take_along_axis(ours, rows.targets[..., None], -1)[..., 0]
  kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
  assert found.kl is not None
  assert found.targets == rows.loss_mask.sum(1).tolist()
  assert len(found.loss) == len(rows.tokens) and len(rows.tokens) % 4  # the last batch is filled
  np.testing.assert_allclose(found.loss, -(picked * rows.loss_mask).sum(1), rtol=1e-5)
  np.testing.assert_allclose(found.kl, (kl * rows.loss_mask).sum(1), rtol=1e-3, atol=1e-5)
  assert min(found.kl) > 0.01
  # What the trainer reports is their mean.
  mean = held_out_loss(model, variables, rows, batch_size=4)
  assert sum(found.loss) / sum(found.targets) == pytest.approx(mean, rel=1e-6)


def test_without_a_16_bit_base_there_is_no_divergence(model, variables, rows):
  found = analysis.by_sequence(model, variables, None, rows, batch_size=4, loss_chunk=64)
  assert found.kl is None
  assert len(found.loss) == len(rows.tokens)


@pytest.mark.parametrize(
  "config",
  [
    NF4,
    ql.QuantizationConfig(codebook="nf3", block_size=8),
    ql.QuantizationConfig(codebook="int4_zero_point", block_size=16, double_quantization=False),
  ],
  ids=lambda config: config.codebook,
)
def test_weight_errors(config):
  # 20 rows: 3-bit codes are padded to 24, which the histogram must not show.
  generator = np.random.default_rng(0)
  stack = generator.standard_t(5, (2, 20, 6)).astype(np.float32)
  single = generator.normal(size=(20, 4)).astype(np.float32)
  dense = {"layers": {"mlp": {"up": {"kernel": jnp.asarray(stack)}}}, "head": jnp.asarray(single)}
  packed = ql.quantize_tree(dense, {"layers/*/mlp/up": config, "head": config})
  found = {each["path"]: each for each in analysis.weight_errors(dense, packed)}
  assert list(found) == ["head", "layers/0/mlp/up/kernel", "layers/1/mlp/up/kernel"]
  for path, w in zip(found, (single, *stack), strict=True):
    own = ql.quantize(jnp.asarray(w), **dataclasses.asdict(config))
    wide, error = w.astype(np.float64), np.asarray(ql.dequantize(own), np.float64) - w
    measured = found[path]
    assert measured["shape"] == list(w.shape)
    np.testing.assert_allclose(
      measured["relative_mse"], (error**2).sum() / (wide**2).sum(), rtol=1e-4
    )
    centered = wide - wide.mean()
    np.testing.assert_allclose(
      measured["kurtosis"], (centered**4).mean() / (centered**2).mean() ** 2, rtol=1e-4
    )
    assert len(measured["codes"]) == 2**own.bits
    assert sum(measured["codes"]) == w.size
    if config is NF4:
      table = np.asarray(ql.codebooks.get("nf4").table)
      scale = np.asarray(own.scales).repeat(8, 0)[:20]
      codes = np.abs(np.asarray(ql.dequantize(own) / scale)[..., None] - table).argmin(-1)
      assert measured["codes"] == np.bincount(codes.reshape(-1), minlength=16).tolist()
    share = np.array(measured["codes"])[np.array(measured["codes"]) > 0] / w.size
    assert measured["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum())


def test_experts_and_flat_blocks():
  generator = np.random.default_rng(1)
  experts = jnp.asarray(generator.normal(size=(2, 3, 16, 4)), jnp.float32)
  dense = {"layers": {"mlp": {"up": experts}}}
  packed = ql.quantize_tree(dense, {"layers/*/mlp/up": NF4})
  first, second = analysis.weight_errors(dense, packed)
  assert first["shape"] == [3, 16, 4] and sum(first["codes"]) == 3 * 16 * 4
  assert first["relative_mse"] != second["relative_mse"]


def test_the_error_of_normal_weights_is_that_of_the_oracle(shared):
  oracle = json.loads((shared / "reference/oracle.json").read_text())["analytic"]
  for codebook, key in (("nf4", "nf4"), ("int4", "int4_sym7")):
    for block_size in (64, 4096):
      config = ql.QuantizationConfig(codebook, block_size, double_quantization=False)
      assert analysis.normal_relative_mse(config) == pytest.approx(
        oracle[key][str(block_size)]["mse"], rel=0.01
      )


def test_entropy():
  assert analysis.entropy_bits(np.array([4, 4, 0, 4, 4])) == 2
  assert analysis.entropy_bits(np.array([7])) == 0


def test_of_a_base(model, dense, frozen, rows):
  sizes = {"batch_size": 4, "loss_chunk": 64}
  found = analysis.of_base(model, frozen, dense, NF4, rows, **sizes)
  json.dumps(found, allow_nan=False)
  assert found["quantization"]["block_size"] == 8
  # 4 bits, a float32 scale to 8 weights, and a table of 64 bytes to each of the 14 matrices.
  packed = [each["shape"] for each in found["layers"]]
  weights = sum(math.prod(shape) for shape in packed)
  assert len(packed) == 14
  assert found["bits_per_quantized_weight"] == pytest.approx(8 + 14 * 64 * 8 / weights)
  other = found["parameters"] - weights
  expected = found["bits_per_quantized_weight"] * weights + 32 * other
  assert found["bits_per_parameter"] == pytest.approx(expected / found["parameters"])
  assert found["bytes"] * 8 == pytest.approx(expected)
  assert found["quantized_parameters"] == weights
  assert found["bytes_by_part"] == {
    "codes": weights // 2,
    "scales": weights // 8 * 4,
    "tables": 14 * 64,
    "not_quantized": 4 * other,
  }
  assert 0.005 < found["normal_relative_mse"] < 0.007  # NF4 in blocks of 8
  assert found["layers"] == analysis.weight_errors(dense, frozen)
  assert min(found["sequences"]["kl"]) > 0

  plain = analysis.of_base(model, dense, dense, None, rows, **sizes)
  assert plain["layers"] is plain["normal_relative_mse"] is plain["quantization"] is None
  assert plain["bits_per_parameter"] == 32
  assert plain["sequences"]["kl"] == pytest.approx([0] * len(rows.tokens), abs=1e-5)

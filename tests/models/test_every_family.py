"""Small models of every family: caches, padding, windows, and the size of their programs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import lora, tree_paths
from qlora_jax.generate import generate
from qlora_jax.hf.checkpoint import default_rules, model_shapes
from qlora_jax.models import families
from qlora_jax.models.mlp import Experts
from qlora_jax.models.transformer import Transformer, init_cache

COMMON = {
  "vocab_size": 32,
  "hidden_size": 32,
  "intermediate_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 16,
  "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 9.0]}

# Windows of 5 and contexts of 16 are passed by the 24 tokens of the tests.
FIELDS = {
  "llama": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
  "mistral": {"sliding_window": 5},
  "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  "qwen3": {"head_dim": 12, "rope_scaling": YARN},
  "gemma": {"head_dim": 12},
  "gemma2": {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20},
  "gemma3_text": {"head_dim": 12, "sliding_window": 5, "num_hidden_layers": 7},
  "phi3": {
    "partial_rotary_factor": 0.5,
    "rope_scaling": LONGROPE,
    "original_max_position_embeddings": 8,
    "sliding_window": 11,
  },
  "olmo2": {},
  "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
  "mixtral": {"num_local_experts": 3, "sliding_window": 5},
  "qwen3_moe": {
    "head_dim": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
  },
}


def config_of(model_type, **fields):
  return families.read_config({"model_type": model_type, **COMMON, **FIELDS[model_type], **fields})


@functools.cache
def model_and_base(model_type) -> tuple[Any, Any]:
  model = Transformer(config_of(model_type), jnp.float32)
  rng = np.random.default_rng(0)

  def leaf(path, like):
    name = path[-1].key
    if name == "scale":
      return jnp.asarray(1 + 0.3 * rng.standard_normal(like.shape), jnp.float32)
    width = 1.0 if name == "embedding" else 0.3 if name == "bias" else 1.5 * like.shape[-2] ** -0.5
    return jnp.asarray(width * rng.standard_normal(like.shape), jnp.float32)

  return model, jax.tree_util.tree_map_with_path(leaf, model_shapes(model))


def test_every_family_is_here():
  assert set(FIELDS) == set(families.FAMILIES)


def one_layer(model, frozen) -> tuple[Any, Any]:
  """Frequencies that depend on the length: deeper layers' caches are of the length they had."""
  config = config_of(model.config.model_type, num_hidden_layers=1)
  first = {**frozen, "layers": jax.tree.map(lambda w: w[:1], frozen["layers"])}
  return Transformer(config, jnp.float32), first


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FIELDS)
def test_generation_with_a_cache_is_the_full_forward_token_by_token(model_type):
  model, frozen = model_and_base(model_type)
  if model.config.rotates_cached_keys:
    model, frozen = one_layer(model, frozen)
  variables = {"params": {}, "constants": {}, "frozen": frozen}
  rng = np.random.default_rng(1)
  prompt = rng.integers(1, 32, (3, 9))
  # A whole row, one padded on the left, one on the right.
  segment_ids = np.ones((3, 9), np.int32)
  segment_ids[1, :4] = 0
  segment_ids[2, 6:] = 0
  new = np.asarray(
    generate(model, variables, prompt, max_new_tokens=15, segment_ids=jnp.asarray(segment_ids))
  )
  full: Any = jax.jit(model.apply)
  for row in range(3):
    tokens = prompt[row][segment_ids[row] == 1].tolist()
    for i, expected in enumerate(new[row].tolist()):
      if model.config.rotates_cached_keys and i % 4:
        tokens.append(expected)  # each length is a program of its own
        continue
      # One length for all steps: what stands behind a token does not change it, unless rotary
      # frequencies depend on the length.
      behind = 0 if model.config.rotates_cached_keys else 24 - len(tokens)
      logits = full(variables, jnp.asarray([[*tokens, *[0] * behind]]))
      assert int(logits[0, len(tokens) - 1].argmax()) == expected, (row, len(tokens))
      tokens.append(expected)


@pytest.mark.parametrize("model_type", FIELDS)
def test_logits_with_a_cache_are_those_without(model_type):
  model, frozen = model_and_base(model_type)
  # Where the frequencies depend on the length, the last token alone has seen the whole one.
  last = slice(None)
  if model.config.rotates_cached_keys:
    model, frozen = one_layer(model, frozen)
    last = slice(-1, None)
  variables = {"params": {}, "constants": {}, "frozen": frozen}
  tokens = jnp.asarray(np.random.default_rng(2).integers(1, 32, (2, 24)))
  cache = init_cache(model.config, 2, 24, jnp.float32)
  step: Any = jax.jit(model.apply)
  parts = []
  for start in range(0, 24, 8):
    logits, cache = step(variables, tokens[:, start : start + 8], cache=cache)
    parts.append(logits)
  expected = step(variables, tokens)
  found = jnp.concatenate(parts, axis=1)
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(found[:, last], expected[:, last], rtol=0, atol=2e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FIELDS)
def test_adapters_reach_every_projection_live_and_merged(model_type):
  model, frozen = model_and_base(model_type)
  params, constants = lora.init(
    jax.random.key(0), frozen, lora.LoRAConfig(rank=2, targets=("*/attn/*", "*/mlp/*"))
  )
  assert "router" not in params["layers"]
  rng = np.random.default_rng(3)
  params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), params)
  tokens = jnp.asarray(rng.integers(1, 32, (2, 12)))

  @jax.jit
  def logits(params, frozen):
    return model.apply({"params": params, "constants": constants, "frozen": frozen}, tokens)

  @jax.jit
  def live_and_gradients(params, frozen):
    live, transposed = jax.vjp(lambda params: logits(params, frozen), params)
    return live, transposed(2 * live / live.size)[0]  # of the mean of squares

  merged = lora.merge(frozen, params, constants)
  live, gradients = live_and_gradients(params, frozen)
  scale = float(jnp.abs(live).max())
  np.testing.assert_allclose(logits({}, merged), live, rtol=0, atol=1e-4 * scale)
  for path, gradient in tree_paths.leaves(gradients).items():
    assert bool(jnp.isfinite(gradient).all()) and float(jnp.abs(gradient).max()) > 0, path


def test_a_router_stays_dense_and_experts_are_packed():
  _, frozen = model_and_base("mixtral")
  rules = default_rules(ql.QuantizationConfig(block_size=16, nested_block_size=8))
  packed = ql.quantize_tree(frozen, rules)
  up = packed["layers"]["mlp"]["up"]["kernel"]
  assert up.shape == (3, 3, 32, 24) and up.bits == 4
  assert isinstance(packed["layers"]["router"]["kernel"], jax.Array)
  model, _ = model_and_base("mixtral")
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 32, (2, 50)))
  variables = {"params": {}, "constants": {}, "frozen": packed}
  dense = {**variables, "frozen": lora.merge(packed, {}, {})}
  apply: Any = jax.jit(model.apply)
  expected = apply(dense, tokens)
  np.testing.assert_allclose(apply(variables, tokens), expected, rtol=0, atol=1e-4)


def test_experts_are_what_a_loop_over_tokens_gives():
  _, frozen = model_and_base("qwen3_moe")
  experts = frozen["layers"]["mlp"]
  kernels = {name: np.asarray(experts[name]["kernel"][0], np.float64) for name in experts}
  # 300 tokens over 5 experts: several tiles each, the last ones part empty.
  rng = np.random.default_rng(4)
  x = rng.standard_normal((300, 32))
  logits = rng.standard_normal((300, 5)) * 2
  module: Any = Experts(5, 2, 16, True, "silu", jnp.float32, None)
  first = jax.tree.map(lambda w: w[0], experts)
  y = module.apply({"frozen": first}, jnp.asarray(x, jnp.float32), jnp.asarray(logits, jnp.float32))
  expected = np.zeros_like(x)
  for row in range(300):
    weights = np.exp(logits[row]) / np.exp(logits[row]).sum()
    best = np.argsort(-weights)[:2]
    for expert in best:
      gate, up = x[row] @ kernels["gate"][expert], x[row] @ kernels["up"][expert]
      hidden = gate / (1 + np.exp(-gate)) * up
      expected[row] += weights[expert] / weights[best].sum() * (hidden @ kernels["down"][expert])
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma2", "smollm3", "qwen2"])
def test_a_model_of_60_layers_lowers_to_the_program_of_one_of_12(model_type):
  def text(layers):
    model: Any = Transformer(config_of(model_type, num_hidden_layers=layers), jnp.float32)
    frozen = model_shapes(model)
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def loss(params, tokens):
      return model.apply({"params": params, "constants": {}, "frozen": {}}, tokens).mean()

    return len(jax.jit(jax.grad(loss)).lower(frozen, tokens).as_text())

  assert text(60) <= 1.1 * text(12)


@pytest.mark.parametrize("layers", [26, 34, 62])
def test_the_pattern_of_a_gemma_need_not_divide_its_layers(layers):
  config = config_of("gemma3_text", num_hidden_layers=layers)
  windows = [config.kinds[kind].window for kind in config.kind_of_layer]
  assert windows == [None if (i + 1) % 6 == 0 else 5 for i in range(layers)]

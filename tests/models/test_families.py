import dataclasses
import json

import pytest
import safetensors

from qlora_jax.models import families
from qlora_jax.models.rope import Linear, Llama3, Rope, Yarn
from qlora_jax.models.transformer import LayerKind, TransformerConfig

LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}

# What transformers 4 and 5 write of one model (Llama 3.1's kind, small).
VERSION_5 = {
  "model_type": "llama",
  "vocab_size": 100,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 131072,
  "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3},
  "dtype": "bfloat16",
}
VERSION_4 = {
  **{name: value for name, value in VERSION_5.items() if name not in ("rope_parameters", "dtype")},
  "rope_theta": 500000.0,
  "rope_scaling": {"rope_type": "llama3", **LLAMA3},
  "torch_dtype": "bfloat16",
}


def rotating(theta, scaling=None, width=None):
  return (LayerKind(None, Rope(theta, width, scaling)),)


EXPECTED = TransformerConfig(
  vocab_size=100,
  hidden_size=64,
  intermediate_size=96,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  norm_eps=1e-5,
  layer_pattern=rotating(
    500000.0,
    Llama3(
      factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
  ),
  max_position_embeddings=131072,
)


def changed(raw, **fields):
  """`raw` with other fields; those given as None are left out."""
  return {name: value for name, value in {**raw, **fields}.items() if value is not None}


def test_configs_of_transformers_4_and_5_read_alike():
  assert families.read_config(VERSION_4) == EXPECTED
  assert families.read_config(VERSION_5) == EXPECTED


@pytest.mark.parametrize(
  "rope",
  [
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 5e5}},
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
  ],
)
def test_unscaled_rope_in_either_version(rope):
  raw = {**changed(VERSION_5, rope_parameters=None), **rope}
  assert families.read_config(raw) == dataclasses.replace(EXPECTED, layer_pattern=rotating(5e5))


def test_fields_that_may_be_absent_have_the_defaults_of_transformers():
  optional = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
  raw = changed(VERSION_5, rope_parameters=None, **dict.fromkeys(optional))
  config = families.read_config(raw)
  assert config == TransformerConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    norm_eps=1e-6,
    layer_pattern=rotating(10000.0),
    max_position_embeddings=2048,
  )


@pytest.mark.parametrize(
  "config",
  [
    EXPECTED,
    dataclasses.replace(EXPECTED, layer_pattern=rotating(3.0), tie_embeddings=True, head_dim=8),
    dataclasses.replace(
      EXPECTED, attention_bias=True, output_bias=True, mlp_bias=True, norm_eps=1e-6
    ),
    dataclasses.replace(EXPECTED, layer_pattern=rotating(3.0, Linear(2.5))),
    dataclasses.replace(EXPECTED, layer_pattern=rotating(3.0, Yarn(64, 4.0, beta_fast=16.0))),
  ],
)
def test_hf_config_round_trips(config):
  # Through JSON, as the file does it.
  raw = json.loads(json.dumps(families.hf_config(config, "bfloat16")))
  assert families.read_config(raw) == config
  assert raw["dtype"] == "bfloat16"
  # A reader of transformers 4 knows the two old fields alone.
  assert families.read_config(changed(raw, rope_parameters=None)) == config


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "lama"}, r"model_type: 'lama' is not supported; did you mean llama\?"),
    ({"model_type": "mamba9"}, r"model_type: 'mamba9' is not supported; .*known: llama"),
    ({"model_type": None}, "model_type: missing; a model's config has it"),
    ({"hidden_act": "gelu_new"}, "hidden_act: 'gelu_new' is not supported; silu"),
    ({"rope_parameters": {"rope_type": "warp", "factor": 2.0}}, "rope_type: 'warp' is not supp"),
    (
      {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}},
      "rope_parameters: mrope_section: unknown of rope_type 'linear'",
    ),
    ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor: unknown of rope_type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ({"rope_parameters": "linear"}, "rope_parameters: 'linear'; an object is wanted"),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta: -1.0; above 0"),
    ({"rms_norm_eps": -1.0}, "norm_eps: -1.0; above 0"),
    (
      {
        "rope_parameters": {
          "rope_type": "longrope",
          "short_factor": [1.0],
          "long_factor": [2.0],
          "original_max_position_embeddings": 8,
        }
      },
      "short_factor: 1 factors; 8 pairs are rotated",
    ),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one for each of full_atten"),
    ({"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported"),
    ({"vocab_size": None}, "vocab_size: missing; a llama config has it"),
    ({"num_hidden_layers": None}, "num_hidden_layers: missing; a llama config has it"),
    (
      {"rope_parameters": {"rope_type": "llama3", **changed(LLAMA3, factor=None)}},
      "factor: missing; rope_type 'llama3' has it",
    ),
    ({"num_key_value_heads": 3}, "num_kv_heads: 3; divides num_heads, which is 4"),
  ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message):
  with pytest.raises(ValueError, match=message):
    families.read_config(changed(VERSION_5, **fields))


def test_rope_scaling_of_version_4_by_its_old_name():
  raw = {**VERSION_4, "rope_scaling": {"type": "linear", "factor": 2.0}}
  pattern = rotating(5e5, Linear(2.0))
  assert families.read_config(raw) == dataclasses.replace(EXPECTED, layer_pattern=pattern)


def test_names_are_those_of_a_llama_file(shared):
  directory = shared / "golden" / "tiny_llama" / "hf_fp32"
  with safetensors.safe_open(directory / "model.safetensors", framework="numpy") as file:
    stored = set(file.keys())
  names = families.family("llama").names
  ours = {names[leaf].format(layer=layer) for leaf in names for layer in range(2)}
  assert stored == {name for name in ours if not name.endswith(".bias")}

"""Checkpoints that would load, and compute something else than the file means."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax import QuantizationConfig, hf
from qlora_jax.models.transformer import Transformer, TransformerConfig

TIED = TransformerConfig(
  vocab_size=32,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  tie_embeddings=True,
)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def saved(tmp_path):
  model = Transformer(TIED, dtype=jnp.float32)
  frozen = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  hf.save(tmp_path / "model", model, frozen)
  return tmp_path / "model"


def edit(path, change=None, **fields):
  """Changes tensors by a function of their dict, and fields of config.json (None drops one)."""
  if change is not None:
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
  raw = {**json.loads((path / "config.json").read_text()), **fields}
  raw = {name: value for name, value in raw.items() if value is not None}
  (path / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported"),
    ({"is_causal": False}, "is_causal: False is not supported; True"),
    (
      {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
      "rope_parameters: one for each of full_attention is not supported",
    ),
    ({"hidden_size": "16"}, "hidden_size: '16'; a value of type int is wanted"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers: 2.5; a value of type int is wanted"),
    ({"vocab_size": True}, "vocab_size: True; a value of type int is wanted"),
    ({"num_attention_heads": 0}, "num_heads: 0; at least 1"),
    # bool("false") is True.
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false'; a value of type bool"),
    ({"attention_bias": 1}, "attention_bias: 1; a value of type bool is wanted"),
  ],
)
def test_fields_that_would_be_passed_over(saved, fields, message):
  edit(saved, **fields)
  with pytest.raises(ValueError) as error:
    hf.load(saved)
  assert str(error.value).startswith(f"{saved}: ")
  assert message in str(error.value)


def test_a_head_that_differs_from_the_table_it_is_tied_to(saved):
  def add(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)

  edit(saved, add)
  with pytest.raises(ValueError, match=r"lm_head\.weight: differs from model\.embed_tokens\.wei"):
    hf.load(saved)
  # As it says: untied, both are read.
  edit(saved, tie_word_embeddings=False)
  _, frozen = hf.load(saved)
  np.testing.assert_array_equal(frozen["head"]["kernel"].T, frozen["embed"]["embedding"] + 1)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_layers_of_unlike_dtypes_are_kept_whole(saved, layer, dtype):
  before = hf.load(saved)[1]["layers"]["mlp"]["up"]["kernel"]
  name = UP.replace("1", str(layer))
  edit(saved, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
  after = hf.load(saved)[1]["layers"]["mlp"]["up"]["kernel"]
  expected = before.at[layer].set(before[layer].astype(dtype).astype(jnp.float32))
  assert after.dtype == jnp.float32
  np.testing.assert_array_equal(after, expected)
  # Packed, the stack has one form whatever the layers' dtypes.
  hf.load(saved, QuantizationConfig(block_size=16))


def test_dtypes_by_name(saved):
  edit(saved, dtype=None, torch_dtype="torch.bfloat16")
  assert hf.load(saved)[0].dtype == jnp.bfloat16
  for name in ("int8", "float31"):
    with pytest.raises(ValueError, match=rf"^storage_dtype: '{name}' is not supported; bfloat16"):
      hf.load(saved, storage_dtype=name)
  with pytest.raises(ValueError, match=r"^dtype: 'bf16' is not supported"):
    hf.load(saved, dtype="bf16")


def test_what_is_written_claims_no_token_ids(saved):
  raw = json.loads((saved / "config.json").read_text())
  # Left out, transformers would stop at id 2, whatever the tokenizer.
  assert raw["bos_token_id"] is raw["eos_token_id"] is None
  assert raw["dtype"] == raw["torch_dtype"] == "float32"


def test_pickled_weights_come_with_the_command_that_converts_them(saved):
  (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError) as error:
    hf.load(saved)
  assert f"M.from_pretrained('{saved}').save_pretrained('NEW_DIRECTORY')" in str(error.value)

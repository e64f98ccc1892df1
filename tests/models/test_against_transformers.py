"""Ten random small models of each family, with random weights, against transformers in float32."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import hf
from qlora_jax.generate import generate
from qlora_jax.models.families import FAMILIES

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DRAWS = 10
VOCABULARY = 48
LENGTH = 40

pytestmark = pytest.mark.slow


def ropes(rng, original):
  """A way of stretching rotary positions, each of the types that the Llama-like families take."""
  factor = float(rng.uniform(1.5, 8))
  return [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": factor},
    {"rope_type": "dynamic", "factor": factor},
    {
      "rope_type": "yarn",
      "factor": factor,
      "original_max_position_embeddings": original,
      "beta_fast": float(rng.uniform(8, 32)),
      "truncate": bool(rng.integers(2)),
      **({"attention_factor": 1.3} if rng.integers(2) else {}),
      **({"mscale": 0.7, "mscale_all_dim": 0.4} if rng.integers(2) else {}),
    },
    {
      "rope_type": "llama3",
      "factor": factor,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": original,
    },
  ]


def draw(model_type, rng, index):
  """The fields of a random config."""
  groups, per_group = int(rng.integers(1, 3)), int(rng.integers(1, 4))
  heads = groups * per_group
  width = int(rng.choice([4, 8, 12]))
  layers = int(rng.integers(1, 4))
  fields = {
    "vocab_size": VOCABULARY,
    "hidden_size": heads * width,
    "intermediate_size": int(rng.integers(5, 40)),
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": groups,
    "max_position_embeddings": int(rng.choice([16, 64])),
    "rms_norm_eps": float(rng.choice([1e-5, 1e-3])),
    "tie_word_embeddings": bool(rng.integers(2)),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
  }
  theta = float(rng.choice([100.0, 10000.0, 500000.0]))
  rope = {"rope_theta": theta, "rope_type": "default"}
  window = int(rng.integers(3, 30))
  slides = bool(rng.integers(2))
  bias = bool(rng.integers(2))
  if model_type in ("llama", "qwen2", "qwen3", "mistral", "smollm3", "olmo2", "mixtral"):
    choices = ropes(rng, 16)
    rope |= choices[index % len(choices)]
  if model_type == "llama":
    fields |= {"attention_bias": bias, "mlp_bias": not bias}
    if slides:
      fields["head_dim"] = 6
  if model_type in ("mistral", "mixtral"):
    fields |= {"sliding_window": window if slides else None}
  if model_type in ("mistral", "mixtral"):
    fields["head_dim"] = 8
  if model_type in ("qwen2", "qwen3", "qwen3_moe"):
    fields |= {"use_sliding_window": slides, "sliding_window": window}
  if model_type in ("qwen2", "qwen3"):
    fields["max_window_layers"] = int(rng.integers(0, layers + 1))
  if model_type in ("qwen3", "qwen3_moe"):
    fields |= {"head_dim": int(rng.choice([6, 10])), "attention_bias": bias}
  if model_type.startswith("gemma"):
    fields |= {"head_dim": int(rng.choice([6, 10])), "attention_bias": bias}
    fields["num_hidden_layers"] = layers = int(rng.integers(1, 8))
  if model_type in ("gemma2", "gemma3_text"):
    fields |= {
      "sliding_window": window,
      "query_pre_attn_scalar": int(rng.integers(4, 40)),
      "final_logit_softcapping": float(rng.uniform(2, 30)) if slides else None,
    }
  if model_type == "gemma2":
    fields["attn_logit_softcapping"] = float(rng.uniform(2, 30)) if bias else None
  if model_type == "gemma3_text":
    rope = {
      "full_attention": rope | {"rope_type": "linear", "factor": 8.0} if slides else rope,
      "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
    }
  if model_type == "phi3":
    fields |= {
      "sliding_window": window if slides else None,
      "original_max_position_embeddings": 24,
      "max_position_embeddings": 64,
    }
    rope["partial_rotary_factor"] = partial = 0.5 if bias else 1.0
    if index % 2:
      pairs = int(width * partial) // 2
      rope |= {
        "rope_type": "longrope",
        "short_factor": rng.uniform(1, 2, pairs).tolist(),
        "long_factor": rng.uniform(2, 9, pairs).tolist(),
      }
  if model_type == "olmo2":
    fields["attention_bias"] = bias
  if model_type == "smollm3":
    fields["num_hidden_layers"] = layers = int(rng.integers(2, 7))
    fields |= {
      "no_rope_layer_interval": int(rng.integers(2, 4)),
      "use_sliding_window": slides,
      "sliding_window": window,
      "attention_bias": bias,
      "mlp_bias": not bias,
    }
  if model_type == "mixtral":
    fields |= {"num_local_experts": int(rng.integers(2, 7)), "num_experts_per_tok": 2}
  if model_type == "qwen3_moe":
    fields |= {
      "num_experts": int(rng.integers(4, 12)),
      "num_experts_per_tok": int(rng.integers(1, 5)),
      "moe_intermediate_size": int(rng.integers(5, 20)),
      "norm_topk_prob": bias,
    }
  return fields | {"rope_parameters": rope}


def build(model_type, seed, index, directory):
  """transformers' model of a draw, saved."""
  rng = np.random.default_rng([seed, index])
  config = transformers.AutoConfig.for_model(model_type, **draw(model_type, rng, index))
  config._attn_implementation = "eager"
  config._experts_implementation = "eager"
  torch.manual_seed(index)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      if weight.ndim == 1:  # norms and biases would start as ones and zeros
        weight.add_(torch.randn_like(weight) * 0.3)
      else:
        weight.copy_(torch.randn_like(weight) * (2 / weight.shape[-1] ** 0.5))
  model.save_pretrained(directory)
  return model


def relative(ours, theirs):
  theirs = theirs.detach().numpy()
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_logits_of_random_models(model_type, tmp_path, record_property):
  worst = 0.0
  for index in range(DRAWS):
    directory = tmp_path / str(index)
    theirs = build(model_type, 7, index, directory)
    ours: Any
    ours, frozen = hf.load(directory)
    variables = {"params": {}, "constants": {}, "frozen": frozen}
    rng = np.random.default_rng(index)
    tokens = rng.integers(3, VOCABULARY, (2, LENGTH))
    # Before the longer call: transformers' dynamic frequencies do not shrink again.
    alone = theirs(torch.asarray(tokens[1:, :-9])).logits[0]
    error = relative(ours.apply(variables, tokens), theirs(torch.asarray(tokens)).logits)
    # Right padding, by transformers' mask and by our segment ids.
    mask = np.arange(LENGTH)[None] < np.asarray([[LENGTH], [LENGTH - 9]])
    logits = ours.apply(variables, tokens, jnp.asarray(mask, jnp.int32))
    if ours.config.rotates_cached_keys:
      # By the longest of a batch there, by each row's own length here: alone they agree.
      logits, padded = logits[1, : LENGTH - 9], alone
    else:
      padded = theirs(torch.asarray(tokens), attention_mask=torch.asarray(mask * 1)).logits[mask]
      logits = logits[mask]
    error = max(error, relative(logits, padded))
    assert error < 1e-4, json.loads((directory / "config.json").read_text())
    worst = max(worst, error)
  record_property("largest deviation", worst)
  print(f"{model_type}: largest relative deviation of {DRAWS} models: {worst:.1e}")


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_greedy_generation_of_a_random_model(model_type, tmp_path):
  theirs = build(model_type, 8, 0, tmp_path / "model")
  ours, frozen = hf.load(tmp_path / "model")
  prompt = np.random.default_rng(0).integers(3, VOCABULARY, (1, 8))
  expected = theirs.generate(
    torch.asarray(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None
  )
  variables = {"params": {}, "constants": {}, "frozen": frozen}
  found = generate(ours, variables, prompt, max_new_tokens=20)
  assert found.tolist() == expected[:, 8:].tolist()

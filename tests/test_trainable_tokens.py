"""Rows of some tokens trained alone: as the whole table would be, merged, and in PEFT's format."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import hf, lora
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.transformer import Transformer, TransformerConfig

V, D, IDS = 48, 32, (3, 40, 47)
TIED = TransformerConfig(V, D, 48, 1, 4, 2, 8, tie_embeddings=True)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)
CFG = LoRAConfig(rank=2, targets=("*/attn/q",), trainable_tokens=(47, 3, 40))
TOKENS = jnp.asarray([[3, 5, 47, 3], [0, 46, 40, 41]])


def adapted(config):
  """(model, frozen, params, constants), trained a little."""
  model = Transformer(config, dtype=jnp.float32)
  frozen = jax.jit(model.init)(jax.random.key(0), TOKENS)["frozen"]
  params, constants = lora.init(jax.random.key(1), frozen, CFG)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape).astype(np.float32)), params
  )
  return model, frozen, params, constants


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_it_is_the_table_with_these_rows_changed(config, tmp_path):
  """Logits and gradients are those of the whole table and head in params, in these rows."""
  model, frozen, params, constants = adapted(config)
  layers = ["embed"] if config.tie_embeddings else ["embed", "head"]
  assert [x for x in ("embed", "head") if "token_delta" in params.get(x, {})] == layers
  np.testing.assert_array_equal(constants["embed"]["token_ids"], IDS)
  count = lora.count(params, constants)
  assert count == 2 * (D + D) + len(layers) * len(IDS) * D

  whole = {"layers": params["layers"]}
  table = np.array(frozen["embed"]["embedding"])
  table[list(IDS)] += params["embed"]["token_delta"]
  whole["embed"] = {"embedding": jnp.asarray(table)}
  if not config.tie_embeddings:
    kernel = np.array(frozen["head"]["kernel"])
    kernel[:, list(IDS)] += params["head"]["token_delta"].T
    whole["head"] = {"kernel": jnp.asarray(kernel)}
  dy = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, V)).astype(np.float32))

  @jax.jit
  def both(params) -> Any:
    def logits(params) -> Any:
      variables = {"params": params, "constants": constants, "frozen": frozen}
      return model.apply(variables, TOKENS)

    y, back = jax.vjp(logits, params)
    return y, back(dy)[0]

  y, grads = both(params)
  wanted, expected = both(whole)
  np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
  close: Any = {"rtol": 0, "atol": 5e-5}
  full = expected["embed"]["embedding"]
  np.testing.assert_allclose(grads["embed"]["token_delta"], full[jnp.asarray(IDS)], **close)
  assert np.abs(grads["embed"]["token_delta"]).max() > 1e-2
  if not config.tie_embeddings:
    full = expected["head"]["kernel"][:, jnp.asarray(IDS)].T
    np.testing.assert_allclose(grads["head"]["token_delta"], full, **close)

  merged = lora.merge(frozen, params, constants)
  assert ("head" in merged) != config.tie_embeddings
  for layer in layers:
    for name, leaf in whole[layer].items():
      np.testing.assert_array_equal(merged[layer][name], leaf)

  # PEFT keeps the rows whole.
  hf.save_adapter(tmp_path / "adapter", params, constants, CFG, model=model, frozen=frozen)
  raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  names = {"embed": "embed_tokens", "head": "lm_head"}
  assert raw["trainable_token_indices"] == {names[layer]: list(IDS) for layer in layers}
  read, fixed, cfg = hf.load_adapter(tmp_path / "adapter", frozen, model=model)
  assert cfg.trainable_tokens == IDS
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6),
    (read, fixed),
    (params, constants),
  )


def test_a_tied_head_with_its_own_adapter_merges():
  model, frozen, _, _ = adapted(TIED)
  cfg = dataclasses.replace(CFG, targets=("head",))
  params, constants = lora.init(jax.random.key(1), frozen, cfg)
  params = jax.tree.map(lambda x: x + 0.1, params)
  merged = lora.merge(frozen, params, constants)
  untied = Transformer(UNTIED, dtype=jnp.float32)
  live: Any = model.apply({"params": params, "constants": constants, "frozen": frozen}, TOKENS)
  found: Any = untied.apply({"params": {}, "constants": {}, "frozen": merged}, TOKENS)
  np.testing.assert_allclose(found, live, rtol=0, atol=1e-5)


def test_refused(tmp_path):
  model, frozen, params, constants = adapted(UNTIED)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="trainable_tokens: 48; the base's vocabulary has 48"):
    lora.init(key, frozen, dataclasses.replace(CFG, trainable_tokens=(48,)))
  with pytest.raises(ValueError, match=r"modules_to_save: head: of it lora\.trainable_tokens"):
    lora.init(key, frozen, dataclasses.replace(CFG, modules_to_save=("head",)))
  with pytest.raises(ValueError, match=r"lora\.trainable_tokens: the base has no embed/embedding"):
    lora.init(key, {"layers": frozen["layers"]}, CFG)
  for wrong in ((3, 3), (-1, 3)):
    with pytest.raises(ValueError, match=r"trainable_tokens: .*; ids, 0 or more, each once"):
      dataclasses.replace(CFG, trainable_tokens=wrong)
  with pytest.raises(ValueError, match="embed/token_delta: in params without its token_ids"):
    model.apply({"params": params, "constants": {}, "frozen": frozen}, TOKENS)
  with pytest.raises(ValueError, match="whole rows; give save_adapter frozen"):
    hf.save_adapter(tmp_path / "adapter", params, constants, CFG, model=model)
  cfg = dataclasses.replace(CFG, targets=("embed",))
  both = lora.init(key, frozen, cfg)
  with pytest.raises(ValueError, match="embed: has an adapter, and trainable_tokens; PEFT has one"):
    hf.save_adapter(tmp_path / "adapter", *both, cfg, model=model, frozen=frozen)

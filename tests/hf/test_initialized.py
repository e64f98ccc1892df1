"""Checkpoints whose adapters start as a part of them, and other kinds of adapters, in files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import QuantizationConfig, hf, lora, lora_init
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.transformer import Transformer, TransformerConfig

# Models trained and decomposed: many programs to compile.
pytestmark = pytest.mark.slow

# float32, logits of order 1.
LOGITS = 2e-5

CONFIG = TransformerConfig(
  vocab_size=40,
  hidden_size=32,
  intermediate_size=48,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)
CFG = LoRAConfig(
  rank=4, alpha=6.0, init="pissa", rank_pattern={"layers/1/attn/*": 2}, svd_iterations=None
)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """(directory, frozen) of a random base."""
  model = Transformer(CONFIG, dtype=jnp.float32)
  frozen = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  path = tmp_path_factory.mktemp("base") / "model"
  hf.save(path, model, frozen)
  return path, frozen


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables):
  return model.apply(variables, jnp.asarray(TOKENS))


def logits(model, frozen, params, constants):
  return np.asarray(forward(model, {"params": params, "constants": constants, "frozen": frozen}))


def moved(params):
  """As training leaves them: all have moved but the padding."""
  rng = np.random.default_rng(3)
  return jax.tree.map(
    lambda x: jnp.where(x != 0, x + rng.normal(0, 0.1, x.shape).astype(np.float32), 0), params
  )


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_checkpoint_is_read_a_tensor_at_a_time(checkpoint, init):
  """To what its tree gives in memory; what is no target is as `load` makes it."""
  path, dense = checkpoint
  cfg = dataclasses.replace(CFG, init=init, targets=("*/attn/*",), loftq_iterations=2)
  quantization = QuantizationConfig(block_size=16)
  key = jax.random.key(1)
  model, frozen, params, constants = hf.initialize(key, path, quantization, cfg, remat="full")
  assert model.remat == "full"
  rules = {"layers/*/attn/*": quantization, "layers/*/mlp/*": quantization}
  expected = lora_init.initialize(key, dense, rules, cfg)
  jax.tree.map(np.testing.assert_array_equal, (frozen, params, constants), expected)
  _, loaded = hf.load(path, quantization)
  same = ({**frozen["layers"], "attn": None}, {**loaded["layers"], "attn": None})
  jax.tree.map(np.testing.assert_array_equal, *same)
  _, half, *_ = hf.initialize(key, path, quantization, cfg, storage_dtype="bfloat16")
  assert half["embed"]["embedding"].dtype == jnp.bfloat16


def test_eva_is_not_taken_for_plain_lora(checkpoint):
  path, _ = checkpoint
  with pytest.raises(ValueError, match="'eva' starts from activations"):
    hf.initialize(jax.random.key(1), path, None, dataclasses.replace(CFG, init="eva"))


def test_it_starts_as_the_checkpoint_and_its_file_fits_that(checkpoint, tmp_path):
  path, dense = checkpoint
  model, frozen, initial, constants = hf.initialize(jax.random.key(1), path, None, CFG)
  plain = logits(model, dense, {}, {})
  np.testing.assert_allclose(logits(model, frozen, initial, constants), plain, rtol=0, atol=LOGITS)
  assert np.abs(logits(model, frozen, {}, {}) - plain).max() > 0.1
  trained = moved(initial)
  live = logits(model, frozen, trained, constants)
  assert np.abs(live - plain).max() > 0.1
  hf.save_adapter(
    tmp_path / "adapter", trained, constants, CFG, model=model, frozen=frozen, initial=initial
  )
  raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert (raw["r"], raw["lora_alpha"], raw["init_lora_weights"]) == (8, 12, True)
  params, fixed, _ = hf.load_adapter(tmp_path / "adapter", dense)
  np.testing.assert_allclose(logits(model, dense, params, fixed), live, rtol=0, atol=LOGITS)
  # A base that it is merged into already is known still.
  merged = lora.merge(dense, params, fixed)
  with pytest.raises(ValueError, match="merged into this base already"):
    hf.load_adapter(tmp_path / "adapter", merged)
  # And before training there is no direction to know it by.
  hf.save_adapter(tmp_path / "untrained", initial, constants, CFG, frozen=frozen, initial=initial)
  own = json.loads((tmp_path / "untrained" / "qlora_jax.json").read_text())
  assert own["base_alignment"] == {}
  with pytest.raises(ValueError, match="'pissa' changed the base: `initial`"):
    hf.save_adapter(tmp_path / "without", trained, constants, CFG)


def test_the_fingerprint_counts_what_was_taken_out(checkpoint, tmp_path):
  """That of the same adapter on the base with A · B put back, whatever of s LoftQ took out."""
  path, _ = checkpoint
  quantization = QuantizationConfig(block_size=16)
  for ignores in (False, True):
    cfg = dataclasses.replace(
      CFG, init="loftq", targets=("*/attn/q",), loftq_iterations=1, loftq_ignores_scaling=ignores
    )
    model, frozen, initial, constants = hf.initialize(jax.random.key(1), path, quantization, cfg)
    own = tmp_path / str(ignores)
    trained = moved(initial)
    hf.save_adapter(own, trained, constants, cfg, model=model, frozen=frozen, initial=initial)
    whole = lora.merge(frozen, {}, {})
    q, start = whole["layers"]["attn"]["q"], initial["layers"]["attn"]["q"]
    scaling = np.asarray(constants["layers"]["attn"]["q"]["scaling"])[:, None, None]
    q["kernel"] += (1 if ignores else scaling) * np.matmul(start["lora_a"], start["lora_b"])
    params, fixed, plain = hf.load_adapter(own, whole, model=model)
    hf.save_adapter(tmp_path / f"{ignores}-again", params, fixed, plain, model=model, frozen=whole)
    one, other = (
      json.loads((each / "qlora_jax.json").read_text())["base_alignment"]
      for each in (own, tmp_path / f"{ignores}-again")
    )
    assert one.keys() == other.keys() and len(one) == 3
    for name, value in one.items():
      np.testing.assert_allclose(value, other[name], atol=1e-4)


@pytest.mark.parametrize("variant", ["vera", "lora_xs"])
def test_variants_are_written_as_the_lora_that_they_are(checkpoint, tmp_path, variant):
  path, _ = checkpoint
  cfg = dataclasses.replace(CFG, init="lora", variant=variant, dropout=0.1)
  model, frozen = hf.load(path, QuantizationConfig(block_size=16))
  params, constants = lora.init(jax.random.key(1), frozen, cfg)
  trained = jax.tree.map(lambda x: x + 0.3, params)
  live = logits(model, frozen, trained, constants)
  assert np.abs(live - logits(model, frozen, {}, {})).max() > 0.1
  hf.save_adapter(tmp_path / "adapter", trained, constants, cfg, frozen=frozen)
  params, fixed, read = hf.load_adapter(tmp_path / "adapter", frozen)
  assert (read.variant, read.dropout) == ("lora", 0.1)
  np.testing.assert_allclose(logits(model, frozen, params, fixed), live, rtol=0, atol=LOGITS)


@pytest.mark.parametrize(
  "fields",
  [{}, {"rank_stabilized": True}, {"variant": "dora", "init": "olora"}],
  ids=["pissa", "rslora", "dora"],
)
def test_peft_opens_it_on_the_original_base(checkpoint, tmp_path, fields):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  theirs = pytest.importorskip("peft")
  path, _ = checkpoint
  cfg = dataclasses.replace(CFG, **fields)
  model, frozen, initial, constants = hf.initialize(jax.random.key(1), path, None, cfg)
  trained = moved(initial)
  live = logits(model, frozen, trained, constants)
  hf.save_adapter(tmp_path / "adapter", trained, constants, cfg, frozen=frozen, initial=initial)
  dense = transformers.AutoModelForCausalLM.from_pretrained(path)
  opened = theirs.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
  with torch.no_grad():
    expected = opened(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
  np.testing.assert_allclose(live, expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_starts_with_the_same(checkpoint, tmp_path, init):
  """Its own init and conversion: the residual base and the products A · B, before and after."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  theirs = pytest.importorskip("peft")
  path, original = checkpoint
  cfg = dataclasses.replace(CFG, init=init, rank_pattern={})
  _, frozen, initial, constants = hf.initialize(jax.random.key(1), path, None, cfg)
  config = theirs.LoraConfig(
    r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM"
  )
  made = theirs.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(path), config)
  made.peft_config["default"].init_lora_weights = True
  made.save_pretrained(tmp_path / "start")
  made.peft_config["default"].init_lora_weights = init
  q = made.base_model.model.model.layers[1].self_attn.q_proj
  ours = {name: tree["layers"]["attn"]["q"] for name, tree in (("base", frozen), ("ab", initial))}
  theirs_base = q.base_layer.weight.detach().numpy().T
  np.testing.assert_allclose(ours["base"]["kernel"][1], theirs_base, rtol=0, atol=1e-5)
  a, b = (getattr(q, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
  np.testing.assert_allclose(
    ours["ab"]["lora_a"][1] @ ours["ab"]["lora_b"][1], (b @ a).T, rtol=0, atol=1e-5
  )
  # Theirs, trained and converted by them, is ours with the same factors, converted by us.
  with torch.no_grad():
    for name, parameter in made.named_parameters():
      if ".lora_" in name:
        parameter += 0.05
  made.save_pretrained(
    tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
  )
  params, fixed, _ = hf.load_adapter(tmp_path / "theirs", original)
  start, *_ = hf.load_adapter(tmp_path / "start", original)
  trained = jax.tree.map(lambda x: x + 0.05, start)
  own, own_fixed, _ = lora.plain(trained, constants, cfg, start)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6),
    (params, fixed),
    (own, own_fixed),
  )

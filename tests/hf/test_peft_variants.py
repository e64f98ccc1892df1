"""Every kind of PEFT adapter: read to PEFT's logits, and written so that PEFT opens it to ours."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax import QuantizationConfig, hf, lora, quantize_tree, tree_paths
from qlora_jax.hf import checkpoint, peft_reading
from qlora_jax.lora import LoRAConfig
from qlora_jax.models import families
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantized_tensor import is_quantized

# float32, logits of order 1; measured deviations are below 3e-6.
LOGITS = 1e-5

VOCABULARY = 40

COMMON = {
  "vocab_size": VOCABULARY,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "max_position_embeddings": 64,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": None,
}
BASES = {
  "llama": {"model_type": "llama"},
  "tied llama": {"model_type": "llama", "tie_word_embeddings": True},
  # With biases of q, k and v.
  "qwen2": {"model_type": "qwen2"},
  # Tied, and scaled.
  "gemma3": {
    "model_type": "gemma3_text",
    "tie_word_embeddings": True,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
  },
  "mixtral": {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
  },
}


def random(shape, seed, scale=0.2):
  return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


@functools.cache
def make(name):
  """(model, frozen) of a random base."""
  raw = {**COMMON, **BASES[name]}
  raw["architectures"] = [families.family(raw["model_type"]).architecture]
  model = Transformer(families.read_config(raw), jnp.dtype("float32"))
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["frozen"]
  frozen = {
    path: random(like.shape, i, 0.2) + np.float32(path.endswith("scale"))
    for i, (path, like) in enumerate(tree_paths.leaves(shapes).items())
  }
  return model, tree_paths.nest(frozen)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, tokens):
  return model.apply(variables, tokens)


def logits(model, frozen, params=None, constants=None, tokens=None):
  if tokens is None:
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCABULARY)
  variables = {"params": params or {}, "constants": constants or {}, "frozen": frozen}
  return np.asarray(forward(model, variables, jnp.asarray(tokens, jnp.int32)))


def untied(model, frozen):
  """The model that reads `frozen`."""
  if "head" not in frozen:
    return model
  return model.clone(config=dataclasses.replace(model.config, tie_embeddings=False))


def adapter(frozen, cfg, seed=0):
  """As training leaves it: all has moved but the padding."""
  params, constants = lora.init(jax.random.key(seed), frozen, cfg)
  flat, fixed = tree_paths.leaves(params), tree_paths.leaves(constants)
  for i, (path, x) in enumerate(flat.items()):
    layer, _, name = path.rpartition("/")
    moved = random(x.shape, 1000 * seed + i, 0.1)
    if name in ("lora_a", "lora_b", "lora_bias", "magnitude"):
      rank = np.asarray(fixed[f"{layer}/rank"])
      used = np.broadcast_to(rank > 0, rank.shape)
      used = used.reshape(*used.shape, *[1] * (x.ndim - used.ndim))
      if name in ("lora_a", "lora_b"):
        axis = -1 if name == "lora_a" else -2
        index = np.arange(x.shape[axis]).reshape(-1, *[1] * (-1 - axis))
        used = index < rank.reshape(*rank.shape, *[1] * (x.ndim - rank.ndim))
      moved = moved * jnp.asarray(used, jnp.float32)
    flat[path] = x + moved
  return tree_paths.nest(flat), constants


def assert_same(a, b):
  a, b = tree_paths.leaves(a), tree_paths.leaves(b)
  assert sorted(a) == sorted(b)
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def read(directory):
  config = json.loads((directory / "adapter_config.json").read_text())
  return config, safetensors.numpy.load_file(directory / "adapter_model.safetensors")


def edit(directory, change=None, **fields):
  config, tensors = read(directory)
  (directory / "adapter_config.json").write_text(json.dumps({**config, **fields}))
  if change is not None:
    tensors = {key: np.ascontiguousarray(x) for key, x in change(tensors).items()}
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")


# PEFT's adapters.


@pytest.fixture(scope="session")
def tiny_llama(shared):
  return shared / "golden" / "tiny_llama"


@pytest.fixture(scope="session")
def golden(tiny_llama):
  with np.load(tiny_llama / "golden.npz") as file:
    return dict(file)


@pytest.fixture(scope="session")
def tiny(tiny_llama):
  return hf.load(tiny_llama / "hf_fp32")


VARIANTS = {
  "peft_adapter": {"rank": 8, "alpha": 16.0},
  "peft_rslora_patterns": {
    "rank_stabilized": True,
    "rank_pattern": {"layers/*/mlp/down": 4, "layers/1/attn/q": 2},
    "alpha_pattern": {"layers/*/attn/q": 32.0},
  },
  "peft_dora": {"variant": "dora"},
  "peft_lora_bias": {"lora_bias": True},
  "peft_modules_to_save_embed": {
    "modules_to_save": ("head/kernel",),
    "targets": ("embed", "layers/*/attn/q", "layers/*/attn/v"),
  },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_goldens(tiny_llama, golden, tiny, tmp_path, name):
  model, frozen = tiny
  ids = golden["input_ids"]
  expected = golden[f"logits_fp32_{name.removeprefix('peft_').replace('adapter', 'lora')}"]
  assert np.abs(expected - golden["logits_fp32"]).max() > 1e-2
  params, constants, cfg = hf.load_adapter(tiny_llama / name, frozen)
  live = logits(model, frozen, params, constants, ids)
  np.testing.assert_allclose(live, expected, rtol=0, atol=LOGITS)

  # The config says it in few words, and makes the same trees.
  for field, value in VARIANTS[name].items():
    assert getattr(cfg, field) == value, field
  made, fixed = lora.init(jax.random.key(0), frozen, cfg)
  assert_same(fixed, constants)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
    lambda x: (x.shape, x.dtype), params
  )
  assert lora.count(params, constants) == sum(
    x.size
    for key, x in read(tiny_llama / name)[1].items()
    if not key.endswith("embed_tokens.base_layer.weight")
  )

  if name == "peft_lora_bias":
    # Llama's projections have no bias that it could go into.
    with pytest.raises(ValueError, match="layers/attn/q/lora_bias: the base's layer has no bias"):
      lora.merge(frozen, params, constants)
  else:
    merged = lora.merge(frozen, params, constants)
    np.testing.assert_allclose(logits(model, merged, tokens=ids), expected, rtol=0, atol=LOGITS)

  # Written again it is PEFT's own file, but for the copy of the embedding.
  hf.save_adapter(tmp_path / "again", params, constants, cfg, frozen=frozen)
  theirs, ours = read(tiny_llama / name), read(tmp_path / "again")
  assert ours[1].keys() == {key for key in theirs[1] if "base_layer" not in key}
  for key, x in ours[1].items():
    np.testing.assert_array_equal(x, theirs[1][key], err_msg=key)
  for field in ("use_dora", "lora_bias", "use_rslora", "modules_to_save", "r", "lora_alpha"):
    assert ours[0][field] == theirs[0][field], field
  assert set(ours[0]["target_modules"]) == set(theirs[0]["target_modules"])
  again = hf.load_adapter(tmp_path / "again", frozen)
  assert_same(again[0], params)
  assert_same(again[1], constants)
  assert again[2] == cfg


@pytest.mark.parametrize("name", ["peft_dora", "peft_lora_bias", "peft_modules_to_save_embed"])
def test_beside_a_packed_base(tiny_llama, golden, tiny, name):
  model, frozen = tiny
  packed = quantize_tree(frozen, checkpoint.default_rules(QuantizationConfig()))
  params, constants, _ = hf.load_adapter(tiny_llama / name, packed)
  live = logits(model, packed, params, constants, golden["input_ids"])
  # The definition: the same adapter on the dequantized base.
  dense = lora.merge(packed, {}, {})
  params, constants, _ = hf.load_adapter(tiny_llama / name, dense)
  expected = logits(model, dense, params, constants, golden["input_ids"])
  np.testing.assert_allclose(live, expected, rtol=0, atol=LOGITS)


def test_both_spellings_of_a_magnitude(tiny_llama, tiny, tmp_path):
  _, frozen = tiny
  params, constants, cfg = hf.load_adapter(tiny_llama / "peft_dora", frozen)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  edit(
    tmp_path / "adapter",
    lambda t: {re.sub("magnitude_vector$", "magnitude_vector.weight", k): x for k, x in t.items()},
  )
  assert_same(hf.load_adapter(tmp_path / "adapter", frozen)[0], params)


# Adapters of ours, on bases of several kinds.

CASES = {
  "dora": ("llama", LoRAConfig(rank=4, alpha=8.0, variant="dora")),
  "dora with patterns": (
    "qwen2",
    LoRAConfig(
      rank=4,
      alpha=8.0,
      variant="dora",
      rank_stabilized=True,
      targets=("layers/[02]/attn/*", "*/mlp/down", "head"),
      rank_pattern={"layers/2/attn/q": 2},
      alpha_pattern={"*/mlp/down": 5.0},
    ),
  ),
  "biases": ("qwen2", LoRAConfig(rank=4, lora_bias=True, targets=("layers/*/attn/[qkv]",))),
  "biases where there are none": ("llama", LoRAConfig(rank=4, lora_bias=True)),
  "norms in full": (
    "llama",
    LoRAConfig(rank=4, modules_to_save=("final_norm", "layers/*/mlp_norm")),
  ),
  "a head in full": ("llama", LoRAConfig(rank=4, modules_to_save=("head",))),
  "a projection in full": (
    "qwen2",
    LoRAConfig(rank=4, targets=("*/mlp/*",), modules_to_save=("layers/*/attn/q",)),
  ),
  "the embedding": ("llama", LoRAConfig(rank=4, targets=("embed", "*/attn/q"))),
  "the embedding in full": ("llama", LoRAConfig(rank=4, modules_to_save=("embed",))),
  "trained biases of the adapted": (
    "qwen2",
    LoRAConfig(rank=4, targets=("*/attn/[qkv]",), modules_to_save=("*/attn/*/bias",)),
  ),
  "trained biases of others": (
    "qwen2",
    LoRAConfig(rank=4, targets=("*/attn/q", "*/mlp/*"), modules_to_save=("*/attn/*/bias",)),
  ),
  "a tied head": ("tied llama", LoRAConfig(rank=4, targets=("head", "*/attn/q"))),
  "a tied head with dora": (
    "tied llama",
    LoRAConfig(rank=4, targets=("head", "*/attn/q"), variant="dora"),
  ),
  "a tied head in full": ("tied llama", LoRAConfig(rank=4, modules_to_save=("head",))),
  "a tied embedding": ("tied llama", LoRAConfig(rank=4, targets=("embed", "*/attn/q"))),
  "a tied embedding and its head": (
    "tied llama",
    LoRAConfig(rank=4, targets=("embed", "head"), rank_pattern={"embed": 3}),
  ),
  "a tied embedding in full": ("tied llama", LoRAConfig(rank=4, modules_to_save=("embed",))),
  "a tied embedding and its head in full": (
    "tied llama",
    LoRAConfig(rank=4, modules_to_save=("embed", "head")),
  ),
  "a scaled embedding": ("gemma3", LoRAConfig(rank=4, targets=("embed", "*/attn/q"))),
  "a scaled embedding and its head": ("gemma3", LoRAConfig(rank=4, targets=("embed", "head"))),
}


@pytest.mark.parametrize(("base", "cfg"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("given", ["frozen", "model", "none"])
def test_round_trip(tmp_path, base, cfg, given):
  model, frozen = make(base)
  params, constants = adapter(frozen, cfg)
  kwargs = {"frozen": {"frozen": frozen}, "model": {"model": model}, "none": {}}[given]
  ambiguous = {
    # What one family calls the second norm is the third of another's.
    "families differ in their name for it": "mlp_norm" in params.get("layers", {}),
    "has to know whether the head is tied": "embedding" in params.get("embed", {})
    and "kernel" not in params.get("head", {}),
  }
  if given == "none" and any(ambiguous.values()):
    (message,) = (message for message, is_so in ambiguous.items() if is_so)
    with pytest.raises(ValueError, match=f"{message}.* the model, or frozen"):
      hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
    return
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, **kwargs)
  again, fixed, read_cfg = hf.load_adapter(tmp_path / "adapter", frozen)
  assert_same(again, params)
  assert_same(fixed, constants)
  made, _ = lora.init(jax.random.key(0), frozen, read_cfg)
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
  assert len(read_cfg.targets) <= 8
  assert (tmp_path / "adapter" / "README.md").exists()
  assert (tmp_path / "adapter" / "qlora_jax.json").exists() == (given == "frozen")


@pytest.mark.parametrize(("base", "cfg"), CASES.values(), ids=CASES)
def test_live_and_merged_agree(base, cfg):
  model, frozen = make(base)
  params, constants = adapter(frozen, cfg)
  live = logits(model, frozen, params, constants)
  assert np.abs(live - logits(model, frozen)).max() > 1e-2
  if cfg.lora_bias and base == "llama":
    with pytest.raises(ValueError, match="lora_bias: the base's layer has no bias"):
      lora.merge(frozen, params, constants)
    return
  merged = lora.merge(frozen, params, constants)
  assert ("head" in merged) == (
    "head" in frozen or "head" in params or "lora_a" in params.get("embed", {})
  )
  atol = 2e-6 * np.abs(live).max() + LOGITS
  np.testing.assert_allclose(logits(untied(model, merged), merged), live, rtol=0, atol=atol)


@pytest.mark.parametrize(("base", "cfg"), CASES.values(), ids=CASES)
def test_peft_computes_the_same(tmp_path, base, cfg):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  theirs = pytest.importorskip("peft")
  model, frozen = make(base)
  params, constants = adapter(frozen, cfg)
  ours = logits(model, frozen, params, constants)
  hf.save(tmp_path / "base", model, frozen)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, frozen=frozen)
  dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  opened = theirs.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCABULARY)
  with torch.no_grad():
    expected = opened(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
  atol = 2e-6 * np.abs(expected).max() + LOGITS
  np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)

  # And back: what PEFT writes of it computes the same.
  opened.save_pretrained(tmp_path / "theirs")
  again, fixed, _ = hf.load_adapter(tmp_path / "theirs", frozen)
  np.testing.assert_allclose(logits(model, frozen, again, fixed), ours, rtol=0, atol=LOGITS)
  if "bias" not in str(cfg.modules_to_save):
    assert_same(again, params)
    assert_same(fixed, constants)


def test_peft_trains_a_copy_of_a_tied_embedding(tmp_path):
  """Without ensure_weight_tying the lookup is trained, and the head stays the base's."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  theirs = pytest.importorskip("peft")
  model, frozen = make("tied llama")
  hf.save(tmp_path / "base", model, frozen)
  dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  config = theirs.LoraConfig(
    r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
  )
  trained = theirs.get_peft_model(dense, config).eval()
  with torch.no_grad():
    trained.get_input_embeddings().modules_to_save["default"].weight += 0.1
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCABULARY)
  with torch.no_grad():
    expected = trained(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
  trained.save_pretrained(tmp_path / "adapter")
  params, constants, _ = hf.load_adapter(tmp_path / "adapter", frozen)
  assert np.abs(expected - logits(model, frozen)).max() > 1e-2
  ours = logits(model, frozen, params, constants)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=LOGITS)
  merged = lora.merge(frozen, params, constants)
  np.testing.assert_allclose(logits(untied(model, merged), merged), expected, rtol=0, atol=LOGITS)


# Ways to say what is adapted.

TARGETS = {
  "all-linear": ({"target_modules": "all-linear"}, ("*/attn/*", "*/mlp/*")),
  "a regular expression": (
    {"target_modules": r".*layers\.[01]\..*(q|v)_proj"},
    ("layers/[01]/attn/[qv]",),
  ),
  "layers": (
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    ("layers/[02]/attn/q", "layers/[02]/mlp/down"),
  ),
  "one layer, by the list's name": (
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ("layers/1/attn/[qv]",),
  ),
  "exclusion": (
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ("layers/[12]/attn/q", "*/attn/v"),
  ),
  "exclusion by a regular expression": (
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    ("*/attn/*",),
  ),
}


@pytest.mark.parametrize(("fields", "targets"), TARGETS.values(), ids=TARGETS)
def test_targets_and_tensors_agree(tmp_path, fields, targets):
  _, frozen = make("llama")
  cfg = LoRAConfig(rank=4, targets=targets)
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  edit(tmp_path / "adapter", **fields)
  assert_same(hf.load_adapter(tmp_path / "adapter", frozen)[0], params)
  # Without one of its modules the file is not whole.
  key = next(key for key in read(tmp_path / "adapter")[1])
  module = key.partition(".lora_")[0]
  edit(tmp_path / "adapter", lambda t: {k: x for k, x in t.items() if module not in k})
  name = re.escape(module.removeprefix("base_model.model."))
  with pytest.raises(ValueError, match=f"holds no tensor of {name}, which target_modules"):
    hf.load_adapter(tmp_path / "adapter", frozen)


@pytest.mark.parametrize(("fields", "targets"), TARGETS.values(), ids=TARGETS)
def test_peft_chooses_the_same_modules(tmp_path, fields, targets):
  transformers = pytest.importorskip("transformers")
  theirs = pytest.importorskip("peft")
  model, frozen = make("llama")
  hf.save(tmp_path / "base", model, frozen)
  dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  made = theirs.get_peft_model(dense, theirs.LoraConfig(r=4, task_type="CAUSAL_LM", **fields))
  made.save_pretrained(tmp_path / "adapter")
  params, constants, _ = hf.load_adapter(tmp_path / "adapter", frozen)
  expected, fixed = lora.init(jax.random.key(0), frozen, LoRAConfig(rank=4, targets=targets))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
  ranks = {path: x for path, x in tree_paths.leaves(fixed).items() if path.endswith("rank")}
  for path, rank in ranks.items():
    np.testing.assert_array_equal(tree_paths.leaves(constants)[path], rank)


def test_patterns_of_many_layers_are_few():
  frozen = {"layers": {"attn": {"q": {"kernel": jnp.zeros((24, 4, 4))}}}}
  chosen = [0, 2, *range(10, 20), 21]
  everything = tree_paths.per_layer("layers/attn/q/kernel", 24)
  patterns = peft_reading._patterns([everything[i] for i in chosen], everything)
  assert patterns == ["layers/[02]/attn/q", "layers/1[0-9]/attn/q", "layers/21/attn/q"]
  _, constants = lora.init(jax.random.key(0), frozen, LoRAConfig(rank=2, targets=tuple(patterns)))
  ranks = np.asarray(constants["layers"]["attn"]["q"]["rank"])
  assert np.flatnonzero(ranks).tolist() == chosen


# Experts.


def test_experts_have_a_pair_each(tmp_path):
  model, frozen = make("mixtral")
  cfg = LoRAConfig(
    rank=4, targets=("*/mlp/*", "layers/*/router"), rank_pattern={"layers/1/mlp/up": 2}
  )
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, frozen=frozen)
  config, tensors = read(tmp_path / "adapter")
  prefix = "base_model.model.model.layers.1.block_sparse_moe"
  assert tensors[f"{prefix}.experts.3.w3.lora_A.weight"].shape == (2, 32)
  np.testing.assert_array_equal(
    tensors[f"{prefix}.experts.2.w2.lora_B.weight"],
    params["layers"]["mlp"]["down"]["lora_b"][1, 2].T,
  )
  assert set(config["target_modules"]) == {"w1", "w2", "w3", "gate"}
  for kwargs in ({}, {"model": model}):
    again, fixed, read_cfg = hf.load_adapter(tmp_path / "adapter", frozen, **kwargs)
    assert_same(again, params)
    assert_same(fixed, constants)
  assert set(read_cfg.targets) == {
    "layers/*/mlp/gate",
    "layers/*/mlp/up",
    "layers/*/mlp/down",
    "layers/*/router",
  }
  # Mixtral's experts and Qwen's have other names.
  with pytest.raises(ValueError, match="families differ in their name for it"):
    hf.save_adapter(tmp_path / "again", params, constants, cfg)
  edit(
    tmp_path / "adapter",
    lambda t: {k: x for k, x in t.items() if "1.block_sparse_moe.experts.2.w1" not in k},
  )
  with pytest.raises(
    ValueError, match="layers/1/mlp/gate/kernel: expert 2 has no adapter, and expert 0 has"
  ):
    hf.load_adapter(tmp_path / "adapter", frozen)


def test_experts_of_unlike_rank_are_refused(tmp_path):
  _, frozen = make("mixtral")
  cfg = LoRAConfig(rank=4, targets=("*/mlp/up",))
  hf.save_adapter(tmp_path / "adapter", *adapter(frozen, cfg), cfg, frozen=frozen)
  module = "layers.1.block_sparse_moe.experts.2.w3"

  def cut(tensors):
    for key in tensors:
      if module in key:
        tensors[key] = tensors[key][:2] if "lora_A" in key else tensors[key][:, :2]
    return tensors

  edit(tmp_path / "adapter", cut, rank_pattern={module: 2})
  with pytest.raises(ValueError, match="experts of unlike rank or alpha are not supported"):
    hf.load_adapter(tmp_path / "adapter", frozen)


@pytest.mark.parametrize("more", [(), ("layers/*/router",), ("*/attn/*",)])
def test_peft_computes_the_same_of_experts(tmp_path, more):
  # transformers 5 keeps all experts in one tensor; PEFT converts the pairs of version 4's modules.
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  theirs = pytest.importorskip("peft")
  model, frozen = make("mixtral")
  cfg = LoRAConfig(rank=4, targets=("*/mlp/*", *more))
  params, constants = adapter(frozen, cfg)
  ours = logits(model, frozen, params, constants)
  assert np.abs(ours - logits(model, frozen)).max() > 1e-2
  hf.save(tmp_path / "base", model, frozen)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, frozen=frozen)
  dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  opened = theirs.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCABULARY)
  with torch.no_grad():
    expected = opened(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
  atol = 2e-6 * np.abs(expected).max() + LOGITS
  np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


# A vocabulary that is not the base's.


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
  "cfg",
  [
    LoRAConfig(rank=4, targets=("embed", "*/attn/q")),
    LoRAConfig(rank=4, targets=("head", "*/attn/q")),
    LoRAConfig(rank=4, modules_to_save=("embed",)),
    LoRAConfig(rank=4, modules_to_save=("head",)),
  ],
  ids=["adapted embedding", "adapted head", "embedding", "head"],
)
@pytest.mark.parametrize("base", ["llama", "tied llama"])
def test_rows_that_the_base_has_not(tmp_path, cfg, base, packed):
  # Trained on 18 rows, opened on 16.
  _, small = make(base)
  rows = {"embed/embedding": lambda x: x[:16], "head/kernel": lambda x: x[:, :16]}
  cut = {path: rows.get(path, lambda x: x)(x) for path, x in tree_paths.leaves(small).items()}
  large = {
    "embed/embedding": lambda x: x[:18],
    "head/kernel": lambda x: x[:, :18],
  }
  grown = {path: large.get(path, lambda x: x)(x) for path, x in tree_paths.leaves(small).items()}
  grown, cut = tree_paths.nest(grown), tree_paths.nest(cut)
  if packed:
    cut = quantize_tree(cut, checkpoint.default_rules(QuantizationConfig(block_size=16)))
  params, constants = adapter(grown, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, frozen=grown)
  hf.load_adapter(tmp_path / "adapter", grown)
  with pytest.raises(ValueError, match="is for a vocabulary of 18; the base's has 16 rows"):
    hf.load_adapter(tmp_path / "adapter", cut)


@pytest.mark.parametrize("module", ["embed_tokens.base_layer", "embed_tokens"])
def test_a_copy_of_a_grown_table(tmp_path, module):
  # PEFT keeps one where the vocabulary was resized, or the embedding adapted.
  _, frozen = make("llama")
  cfg = LoRAConfig(rank=4)
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  key = f"base_model.model.model.{module}.weight"
  table = np.asarray(frozen["embed"]["embedding"])
  # The base's own, in any precision, is no more than a copy.
  for copy in (table, table.astype(jnp.bfloat16)):
    edit(tmp_path / "adapter", lambda t, copy=copy: {**t, key: copy})
    assert_same(hf.load_adapter(tmp_path / "adapter", frozen)[0], params)
  edit(tmp_path / "adapter", lambda t: {**t, key: np.concatenate([table, table[:2]])})
  with pytest.raises(ValueError, match="is for a vocabulary of 42; the base's has 40 rows"):
    hf.load_adapter(tmp_path / "adapter", frozen)
  edit(tmp_path / "adapter", lambda t: {**t, key: table + 1})
  if "base_layer" in module:
    with pytest.raises(ValueError, match="differs from the base's"):
      hf.load_adapter(tmp_path / "adapter", frozen)
  else:
    again, _, again_cfg = hf.load_adapter(tmp_path / "adapter", frozen)
    np.testing.assert_array_equal(again["embed"]["embedding"], table + 1)
    assert again_cfg.modules_to_save == ("embed/embedding",)


# The base's fingerprint.


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
  "name", ["peft_adapter", "peft_rslora_patterns", "peft_dora", "peft_modules_to_save_embed"]
)
def test_a_base_that_it_is_merged_into_is_refused(tiny_llama, tiny, tmp_path, name, packed):
  _, frozen = tiny
  rules = checkpoint.default_rules(QuantizationConfig())
  params, constants, cfg = hf.load_adapter(tiny_llama / name, frozen)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, frozen=frozen)
  written = json.loads((tmp_path / "adapter" / "qlora_jax.json").read_text())["base_alignment"]
  modules = {key.partition(".lora_")[0] for key in read(tmp_path / "adapter")[1] if ".lora_" in key}
  assert {f"base_model.model.{module}" for module in written} == modules
  # p, from the definition.
  w = np.asarray(frozen["layers"]["attn"]["q"]["kernel"][1], np.float64)
  q, fixed = params["layers"]["attn"]["q"], constants["layers"]["attn"]["q"]
  delta = float(fixed["scaling"][1]) * np.asarray(q["lora_a"][1], np.float64) @ q["lora_b"][1]
  p = (w * delta).sum() / (delta * delta).sum()
  np.testing.assert_allclose(written["model.layers.1.self_attn.q_proj"], p, atol=1e-5)

  merged = lora.merge(frozen, params, constants)
  hf.load_adapter(tmp_path / "adapter", quantize_tree(frozen, rules) if packed else frozen)
  with pytest.raises(ValueError, match="the adapter is merged into this base already") as error:
    hf.load_adapter(tmp_path / "adapter", quantize_tree(merged, rules) if packed else merged)
  assert str(tmp_path) in str(error.value)
  # Another adapter of the same base is nobody's business.
  other, _ = adapter(frozen, LoRAConfig(rank=4), seed=5)
  _, fixed = lora.init(jax.random.key(0), frozen, LoRAConfig(rank=4))
  elsewhere = lora.merge(frozen, other, fixed)
  hf.load_adapter(tmp_path / "adapter", elsewhere)


def test_an_adapter_that_was_never_trained_has_no_fingerprint(tmp_path):
  _, frozen = make("llama")
  cfg = LoRAConfig(rank=4)
  hf.save_adapter(
    tmp_path / "adapter", *lora.init(jax.random.key(0), frozen, cfg), cfg, frozen=frozen
  )
  assert json.loads((tmp_path / "adapter" / "qlora_jax.json").read_text()) == {"base_alignment": {}}
  hf.load_adapter(tmp_path / "adapter", frozen)


def test_a_tiny_adapter_is_not_mistaken_for_a_merged_one(tmp_path):
  # Beside it, the rounding of a packed base is large: p moves by more than 1, but not all one way.
  _, frozen = make("llama")
  packed = quantize_tree(frozen, checkpoint.default_rules(QuantizationConfig(block_size=16)))
  cfg = LoRAConfig(rank=1)
  for seed in range(6):
    params, constants = adapter(frozen, cfg, seed)
    params = jax.tree.map(lambda x: x * np.float32(1e-2), params)
    hf.save_adapter(tmp_path / str(seed), params, constants, cfg, frozen=frozen)
    hf.load_adapter(tmp_path / str(seed), packed)


def test_a_fingerprint_that_is_none(tmp_path):
  _, frozen = make("llama")
  cfg = LoRAConfig(rank=4)
  hf.save_adapter(tmp_path / "adapter", *adapter(frozen, cfg), cfg, frozen=frozen)
  (tmp_path / "adapter" / "qlora_jax.json").write_text('{"base_alignment": 3}')
  with pytest.raises(ValueError, match=r"qlora_jax.json: base_alignment: 3; numbers by module"):
    hf.load_adapter(tmp_path / "adapter", frozen)


# What is refused.


def test_an_adapter_that_the_tied_head_would_share(tmp_path):
  _, frozen = make("tied llama")
  cfg = LoRAConfig(rank=4, targets=("embed", "*/attn/q"))
  hf.save_adapter(tmp_path / "adapter", *adapter(frozen, cfg), cfg, frozen=frozen)
  edit(tmp_path / "adapter", ensure_weight_tying=True)
  with pytest.raises(
    ValueError, match="ensure_weight_tying: True with an adapter on the embedding"
  ):
    hf.load_adapter(tmp_path / "adapter", frozen)
  # On a base that is not tied it means nothing.
  hf.load_adapter(tmp_path / "adapter", make("llama")[1])


def test_a_tied_embedding_in_full_beside_an_adapter_on_its_head(tmp_path):
  model, frozen = make("tied llama")
  cfg = LoRAConfig(rank=4, targets=("head",), modules_to_save=("embed",))
  params, constants = adapter(frozen, cfg)
  for given in ((model, None), (None, frozen)):
    with pytest.raises(ValueError, match="head/kernel: has an adapter, and the embedding that it"):
      hf.save_adapter(tmp_path / "adapter", params, constants, cfg, model=given[0], frozen=given[1])
  # An untied head is another weight.
  model, _ = make("llama")
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, model=model)
  assert read(tmp_path / "adapter")[0]["ensure_weight_tying"] is False


def test_dora_on_an_embedding_is_refused(tmp_path):
  _, frozen = make("llama")
  cfg = LoRAConfig(rank=4, targets=("embed", "*/attn/q"))
  hf.save_adapter(tmp_path / "adapter", *adapter(frozen, cfg), cfg)
  ones = {
    "base_model.model.model.embed_tokens.lora_magnitude_vector": np.ones(32, np.float32),
    **{
      f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_magnitude_vector": np.ones(
        32, np.float32
      )
      for i in range(3)
    },
  }
  edit(tmp_path / "adapter", lambda t: {**t, **ones}, use_dora=True)
  with pytest.raises(
    ValueError, match=r"embed_tokens.lora_magnitude_vector: DoRA on an embedding is not"
  ):
    hf.load_adapter(tmp_path / "adapter", frozen)


def test_a_family_that_has_no_such_layer(tmp_path):
  model, frozen = make("mixtral")
  llama, _ = make("llama")
  cfg = LoRAConfig(rank=4, targets=("*/attn/q",))
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, model=model)
  with pytest.raises(ValueError, match="layers/router/kernel: the files of the family llama have"):
    hf.load_adapter(tmp_path / "adapter", frozen, model=llama)


def test_a_module_is_saved_with_its_bias(tmp_path):
  # PEFT asks for all weights of a module that it trains in full.
  model, frozen = make("qwen2")
  cfg = LoRAConfig(rank=4, targets=("*/mlp/*",), modules_to_save=("layers/*/attn/q/kernel",))
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, frozen=frozen)
  bias = read(tmp_path / "adapter")[1]["base_model.model.model.layers.1.self_attn.q_proj.bias"]
  np.testing.assert_array_equal(bias, frozen["layers"]["attn"]["q"]["bias"][1])
  again, fixed, _ = hf.load_adapter(tmp_path / "adapter", frozen)
  np.testing.assert_array_equal(
    logits(model, frozen, again, fixed), logits(model, frozen, params, constants)
  )


def test_some_layers_in_full(tmp_path):
  # A stack is trained as a whole: the others take the base's weights.
  _, frozen = make("llama")
  cfg = LoRAConfig(rank=4, targets=("*/attn/*",))
  hf.save_adapter(tmp_path / "adapter", *adapter(frozen, cfg), cfg)
  new = np.asarray(random((48, 32), 3))
  key = "base_model.model.model.layers.1.mlp.up_proj.weight"
  edit(tmp_path / "adapter", lambda t: {**t, key: new}, modules_to_save=["layers.1.mlp.up_proj"])
  for base in (frozen, quantize_tree(frozen, {"*/mlp/up": QuantizationConfig(block_size=16)})):
    params, _, cfg = hf.load_adapter(tmp_path / "adapter", base)
    ours = params["layers"]["mlp"]["up"]["kernel"]
    dense = lora.merge(base, {}, {})["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(ours[1], new.T)
    np.testing.assert_array_equal(ours[0], dense[0])
    np.testing.assert_array_equal(ours[2], dense[2])
    assert cfg.modules_to_save == ("layers/*/mlp/up/kernel",)
  assert is_quantized(base["layers"]["mlp"]["up"]["kernel"])


# The model card.


def test_the_model_card(tmp_path):
  yaml = pytest.importorskip("yaml")
  _, frozen = make("llama")
  cfg = LoRAConfig(
    rank=4,
    alpha=8.0,
    variant="dora",
    rank_stabilized=True,
    dropout=0.1,
    rank_pattern={"layers/1/*": 2},
    modules_to_save=("head",),
  )
  params, constants = adapter(frozen, cfg)
  facts = {"Steps": 200, "Learning rate": 2e-4, "Base in": "NF4, block 64"}
  hf.save_adapter(
    tmp_path / "adapter",
    params,
    constants,
    cfg,
    frozen=frozen,
    base_model_name="org/base: one",
    base_revision="abc123",
    card=facts,
  )
  _, front, body = (tmp_path / "adapter" / "README.md").read_text().split("---\n", 2)
  front = yaml.safe_load(front)
  assert front["base_model"] == "org/base: one"
  assert front["library_name"] == "peft"
  assert {"lora", "dora"} <= set(front["tags"])
  for line in (
    "- Base model: org/base: one, revision abc123",
    "- Adapter: DoRA, rank-stabilized (rsLoRA)",
    "- Rank: 4; `layers/1/*` 2",
    "- Alpha: 8.0",
    "- Dropout: 0.1",
    "- Trained in full: `lm_head`",
    f"- Trained parameters: {lora.count(params, constants):,}",
    "- Steps: 200",
    "- Learning rate: 0.0002",
    "- Base in: NF4, block 64",
  ):
    assert line in body.splitlines(), line
  assert read(tmp_path / "adapter")[0]["revision"] == "abc123"
  hf.save_adapter(tmp_path / "text", params, constants, cfg, frozen=frozen, card="As one does.")
  text = (tmp_path / "text" / "README.md").read_text()
  assert text.endswith("## Training\n\nAs one does.\n") and "base_model" not in text

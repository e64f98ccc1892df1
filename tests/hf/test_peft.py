import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax import QuantizationConfig, hf, lora, quantize_tree, tree_paths
from qlora_jax.hf import checkpoint, peft, peft_reading
from qlora_jax.lora import LoRAConfig
from qlora_jax.models import families
from qlora_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
  vocab_size=40,
  hidden_size=32,
  intermediate_size=48,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
)
MODEL = Transformer(CONFIG, jnp.dtype("float32"))
UP = "base_model.model.model.layers.1.mlp.up_proj.lora"


@pytest.fixture(scope="module")
def frozen():
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), tokens)["frozen"]
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(len(x.shape) == 1, 0.2, x.shape).astype(np.float32)), shapes
  )


def adapter(frozen, cfg, seed=0):
  """An adapter as training leaves it: no zeros but the padding of unequal ranks."""
  params, constants = lora.init(jax.random.key(seed), frozen, cfg)
  rng = np.random.default_rng(seed)
  flat, ranks = tree_paths.leaves(params), tree_paths.leaves(constants)
  for leaf, x in flat.items():
    if leaf.endswith("/lora_b"):
      rank = np.asarray(ranks[leaf.replace("lora_b", "rank")])
      used = np.arange(x.shape[-2]) < rank[..., None]
      value = rng.normal(0, 0.3, x.shape) * used[..., None]
      flat[leaf] = jnp.asarray(value.astype(np.float32))
  return tree_paths.nest(flat), constants


def assert_same(a, b):
  # A tree read from a file is in the order of its names.
  a, b = tree_paths.leaves(a), tree_paths.leaves(b)
  assert sorted(a) == sorted(b)
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def read(directory):
  config = json.loads((directory / "adapter_config.json").read_text())
  return config, safetensors.numpy.load_file(directory / "adapter_model.safetensors")


def modules():
  """All modules of the model by their names in Hugging Face's code, those without a kernel too."""
  names = {"model", "model.embed_tokens", "model.layers", "model.norm", "lm_head"}
  for leaf, name in families.family("llama").names.items():
    for layer in range(CONFIG.num_layers) if tree_paths.is_stacked(leaf) else (None,):
      module = name.format(layer=layer).rpartition(".")[0]
      parts = module.split(".")
      names |= {".".join(parts[: i + 1]) for i in range(len(parts))}
  return sorted(names)


CASES = {
  "default": LoRAConfig(rank=4, alpha=8.0),
  "one projection": LoRAConfig(rank=4, alpha=8.0, targets=("layers/*/attn/q",)),
  "with the head": LoRAConfig(rank=4, alpha=8.0, targets=("*/mlp/*", "head")),
  "dropout": LoRAConfig(rank=4, alpha=8.0, dropout=0.1),
  "rank and alpha patterns": LoRAConfig(
    rank=4,
    alpha=8.0,
    rank_pattern={"layers/*/mlp/down": 2, "layers/1/attn/q": 7},
    alpha_pattern={"layers/2/*": 5.0, "layers/0/mlp/up": 0.3},
  ),
  "a rank for each layer": LoRAConfig(
    rank=3, alpha=1.7, rank_pattern={"layers/1/*": 5, "layers/2/*": 6}
  ),
  "some layers": LoRAConfig(
    rank=4, alpha=8.0, targets=("layers/[02]/attn/*", "layers/1/mlp/gate", "layers/*/mlp/up")
  ),
  "rank-stabilized": LoRAConfig(
    rank=8,
    alpha=16.0,
    rank_stabilized=True,
    rank_pattern={"layers/1/attn/*": 3},
    alpha_pattern={"layers/1/attn/k": 7.7},
  ),
}


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_save_then_load_is_exact(tmp_path, frozen, cfg):
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
  again, fixed, read_cfg = hf.load_adapter(tmp_path / "adapter", frozen)
  assert_same(again, params)
  assert_same(fixed, constants)
  # The config would make the same adapters: ranks, scalings and dropout.
  shapes, made = lora.init(jax.random.key(0), frozen, read_cfg)
  assert_same(made, constants)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, again)
  # And a second round writes the same bytes.
  hf.save_adapter(tmp_path / "again", again, fixed, read_cfg)
  for name in ("adapter_config.json", "adapter_model.safetensors"):
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_peft_would_match_exactly_the_adapted_modules(tmp_path, frozen, cfg):
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg, base_model_name="the/base")
  config, tensors = read(tmp_path / "adapter")
  assert config["base_model_name_or_path"] == "the/base"
  written = {}
  for key, x in tensors.items():
    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
    assert match, key
    written.setdefault(match[1], {})[match[2]] = x
  # PEFT's rule for a list: the whole name, or its end after a dot.
  targets = config["target_modules"]
  matched = {
    module
    for module in modules()
    if module in targets or any(module.endswith(f".{target}") for target in targets)
  }
  assert matched == set(written)

  expected = set()
  for leaf, ranks in tree_paths.leaves(constants).items():
    layer_path, _, which = leaf.rpartition("/")
    if which != "rank":
      continue
    name = families.family("llama").names[f"{layer_path}/kernel"].removesuffix(".weight")
    scalings = np.atleast_1d(tree_paths.leaves(constants)[f"{layer_path}/scaling"])
    for layer, rank in enumerate(np.atleast_1d(ranks).tolist()):
      if rank == 0:
        continue
      module = name.format(layer=layer)
      expected.add(module)
      assert written[module]["A"].shape[0] == written[module]["B"].shape[1] == rank

      def by_pattern(field, default, module=module):
        hits = [v for k, v in config[field].items() if re.match(rf"(.*\.)?({k})$", module)]
        return hits[0] if hits else default

      assert by_pattern("rank_pattern", config["r"]) == rank
      alpha = by_pattern("alpha_pattern", config["lora_alpha"])
      scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
      assert np.float32(scaling) == scalings[layer]
  assert expected == set(written)


def test_alphas_are_written_short(tmp_path, frozen):
  cfg = CASES["rank and alpha patterns"]
  hf.save_adapter(tmp_path / "adapter", *adapter(frozen, cfg), cfg)
  config, _ = read(tmp_path / "adapter")
  assert (config["r"], config["lora_alpha"]) == (4, 8)
  assert set(config["alpha_pattern"].values()) == {5.0, 0.3}
  assert config["alpha_pattern"]["model.layers.0.mlp.up_proj"] == 0.3
  assert set(config["rank_pattern"].values()) == {2, 7}
  cfg = CASES["rank-stabilized"]
  hf.save_adapter(tmp_path / "stabilized", *adapter(frozen, cfg), cfg)
  config, _ = read(tmp_path / "stabilized")
  assert config["alpha_pattern"] == {"model.layers.1.self_attn.k_proj": 7.7}


def test_scalings_that_follow_from_no_short_alpha_are_kept_to_the_bit(tmp_path, frozen):
  cfg = CASES["default"]
  params, constants = adapter(frozen, cfg)
  odd = np.nextafter(np.float32(2), np.float32(3), dtype=np.float32)
  constants["layers"]["attn"]["q"]["scaling"] = jnp.asarray([2, odd, math.pi], jnp.float32)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  _, fixed, _ = hf.load_adapter(tmp_path / "adapter", frozen)
  assert_same(fixed, constants)


def test_an_adapter_is_read_beside_a_packed_base(tmp_path, frozen):
  cfg = CASES["some layers"]
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  rules = checkpoint.default_rules(QuantizationConfig(block_size=16))
  again, fixed, _ = hf.load_adapter(tmp_path / "adapter", quantize_tree(frozen, rules))
  assert_same(again, params)
  assert_same(fixed, constants)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_16_bits_stay_so(tmp_path, frozen, dtype):
  cfg = CASES["default"]
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  edit(tmp_path / "adapter", lambda t: {key: x.astype(jnp.dtype(dtype)) for key, x in t.items()})
  packed = quantize_tree(frozen, checkpoint.default_rules(QuantizationConfig(block_size=16)))
  again, fixed, read_cfg = hf.load_adapter(tmp_path / "adapter", packed)
  assert_same(again, jax.tree.map(lambda x: x.astype(dtype), params))
  assert_same(fixed, constants)
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab_size)
  # They are computed with as they are.
  for tree in (again, jax.tree.map(lambda x: x.astype(jnp.float32), again)):
    logits: Any = MODEL.apply({"params": tree, "constants": fixed, "frozen": packed}, tokens)
    assert logits.dtype == jnp.float32
  # And written as they are.
  hf.save_adapter(tmp_path / "again", again, fixed, read_cfg)
  _, tensors = read(tmp_path / "again")
  assert {x.dtype for x in tensors.values()} == {jnp.dtype(dtype)}
  assert_same(hf.load_adapter(tmp_path / "again", packed)[0], again)


def test_mixed_dtypes_in_a_stack_take_float32(saved, frozen):
  before, _, _ = hf.load_adapter(saved, frozen)
  edit(saved, replaced(f"{UP}_A.weight", lambda x: x.astype(jnp.bfloat16)))
  after, _, _ = hf.load_adapter(saved, frozen)
  up = before["layers"]["mlp"]["up"]
  up["lora_a"] = up["lora_a"].at[1].set(up["lora_a"][1].astype(jnp.bfloat16).astype(jnp.float32))
  assert_same(before, after)


def test_patterns_are_matched_as_peft_does_it():
  raw = {
    "r": 8,
    "lora_alpha": 16,
    "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 3, "own": 4},
    "alpha_pattern": None,
  }
  declared = {
    "model.layers.1.self_attn.q_proj": (2, 16.0),  # the first that matches
    "model.layers.1.mlp.up_proj": (8, 16.0),
    "model.layers.1.mlp.down": (8, 16.0),  # "own" must follow a dot
  }
  assert {module: peft_reading._declared(raw, module) for module in declared} == declared


@pytest.fixture
def saved(tmp_path, frozen):
  cfg = CASES["default"]
  hf.save_adapter(tmp_path / "adapter", *adapter(frozen, cfg), cfg)
  return tmp_path / "adapter"


def edit(directory, change):
  file = directory / "adapter_model.safetensors"
  safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)


def edit_config(directory, **fields):
  file = directory / "adapter_config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_fields_that_change_nothing_are_accepted(saved, frozen):
  before = hf.load_adapter(saved, frozen)
  edit_config(
    saved,
    peft_version="0.99",
    init_lora_weights="gaussian",
    target_modules="all-linear",
    layers_to_transform=[0, 1, 2],
    loftq_config={"loftq_bits": 4},
    use_dora=None,
    a_later_field=None,
    another=False,
  )
  after = hf.load_adapter(saved, frozen)
  assert_same(before[0], after[0])
  assert before[2] == after[2]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported; 'LORA' is"),
    ({"use_dora": True}, r"down_proj: magnitude is missing"),
    ({"lora_bias": True}, r"down_proj: lora_B\.bias is missing"),
    ({"bias": "some"}, "bias: 'some' is not supported; none, all, lora_only are"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: True is not supported"),
    ({"modules_to_save": ["lm_head"]}, "holds no tensor of lm_head, which modules_to_save"),
    (
      {"target_parameters": ["experts.up"]},
      r"target_parameters: \['experts.up'\] is not supported",
    ),
    ({"trainable_token_indices": [3]}, r"0 tensors of .*, with trainable_token_indices \[3\]"),
    ({"layer_replication": [[0, 2]]}, r"layer_replication: .* is not supported"),
    # These also change the base.
    (
      {"init_lora_weights": "pissa_niter_4"},
      "init_lora_weights: 'pissa_niter_4' is not supported: it changed the base .*; PEFT's save_",
    ),
    ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' is not supported: it changed"),
    ({"init_lora_weights": "corda"}, "init_lora_weights: 'corda' is not supported: it changed"),
    ({"init_lora_weights": "loftq"}, "'loftq' is not supported: it changed .*; merge it with PEFT"),
    ({"init_lora_weights": "newstart"}, "init_lora_weights: 'newstart' is not supported"),
    # Kinds that came after this was written.
    ({"use_newlora": True}, "use_newlora: True is not supported"),
    ({"r": None}, "r: None; a number is wanted"),
    ({"lora_alpha": "16"}, "lora_alpha: '16'; a number is wanted"),
    ({"rank_pattern": {"up(": 2}}, r"rank_pattern: 'up\(' is no regular expression \(missing \)"),
    ({"alpha_pattern": {"[": 2}}, r"alpha_pattern: '\[' is no regular expression"),
    ({"alpha_pattern": {"up_proj": "2"}}, "alpha_pattern: 'up_proj': '2'; a number is wanted"),
    ({"target_modules": "(q_proj"}, r"target_modules: '\(q_proj' is no regular expression"),
    # Of the targets one matches nothing; PEFT is silent if others do.
    ({"target_modules": ["q_proj", "w1"]}, "target_modules: 'w1' matches no layer of the base"),
    ({"lora_alpha": -1}, "alpha: -1.0; an alpha is above 0"),
    ({"r": 5}, "model.layers.0.mlp.down_proj: rank 4; adapter_config.json says 5"),
    ({"rank_pattern": {"layers.1.mlp.up_proj": 2}}, r"layers\.1\.mlp\.up_proj: rank 4; .* says 2"),
  ],
)
def test_other_kinds_of_adapter_are_refused(saved, frozen, fields, message):
  edit_config(saved, **fields)
  with pytest.raises(ValueError, match=message) as error:
    hf.load_adapter(saved, frozen)
  assert str(saved) in str(error.value)


def renamed(old, new):
  return lambda t: {key.replace(old, new): x for key, x in t.items()}


def without(*keys):
  return lambda t: {key: x for key, x in t.items() if key not in keys}


def replaced(key, change):
  return lambda t: {**t, key: np.ascontiguousarray(change(t[key]))}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (renamed("layers.1.", "layers.7."), r"layers\.7\.mlp.*lora_A\.weight: the base has no such"),
    (renamed("up_proj", "w1"), r"mlp\.w1\.lora_A\.weight: the base has no such layer"),
    (renamed("lora_A.weight", "lora_E"), r"lora_E: not a tensor of a LoRA adapter"),
    (renamed("base_model.model.", ""), "lora_A.weight: not a tensor of a LoRA adapter"),
    (renamed("mlp.up_proj.lora_A.weight", "mlp.up_proj.lora_embedding_A"), "not an embedding"),
    (without(f"{UP}_A.weight"), r"layers\.1\.mlp\.up_proj: lora_A is missing"),
    (without(f"{UP}_B.weight"), r"layers\.1\.mlp\.up_proj: lora_B is missing"),
    (
      replaced(f"{UP}_A.weight", lambda x: x[:, :-1]),
      r"layers\.1\.mlp\.up_proj: lora_A \[4, 31\], lora_B \[48, 4\]; .* \[r, 32\], \[48, r\]",
    ),
    (replaced(f"{UP}_B.weight", lambda x: x.T), r"up_proj: lora_A \[4, 32\], lora_B \[4, 48\]"),
    # The two ranks of a pair.
    (replaced(f"{UP}_A.weight", lambda x: x[:3]), r"lora_A \[3, 32\], lora_B \[48, 4\]; the base"),
    (replaced(f"{UP}_A.weight", lambda x: x[0]), r"up_proj: lora_A \[32\], lora_B"),
    (
      replaced(f"{UP}_A.weight", lambda x: x * np.nan),
      r"up_proj\.lora_A\.weight: holds a value that is not finite",
    ),
    (lambda t: {}, "holds no LoRA matrix"),
    (
      lambda t: {**t, f"{UP}_B.bias": np.zeros(48, np.float32)},
      "has a lora_B.bias; adapter_config",
    ),
    (
      lambda t: {**t, f"{UP}_magnitude_vector": np.zeros(48, np.float32)},
      "up_proj: has a magnitude; adapter_config.json: use_dora says that there is none",
    ),
    (
      lambda t: {**t, "base_model.model.model.norm.weight": np.zeros(31, np.float32)},
      r"model\.norm\.weight: shape \[31\]; the base asks for \[32\]",
    ),
    (
      lambda t: {**t, "base_model.model.model.other.weight": np.zeros(32, np.float32)},
      r"model\.other\.weight: the base has no such tensor",
    ),
    (
      lambda t: {key: x for key, x in t.items() if "layers.2.mlp.up" not in key},
      # In adapter_config.json it says which; half a file is not read as a whole one.
      r"holds no tensor of model\.layers\.2\.mlp\.up_proj, which target_modules",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(saved, frozen, change, message):
  edit(saved, change)
  with pytest.raises(ValueError, match=message) as error:
    hf.load_adapter(saved, frozen)
  assert "adapter_model.safetensors: " in str(error.value)


def test_a_copy_of_the_base_may_stand_in_the_file(tmp_path, frozen):
  cfg = CASES["with the head"]
  params, constants = adapter(frozen, cfg)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  key = "base_model.model.lm_head.base_layer.weight"
  w = np.ascontiguousarray(frozen["head"]["kernel"].T)
  edit(tmp_path / "adapter", lambda t: {**t, key: w})
  for base in (frozen, quantize_tree(frozen, {"head": QuantizationConfig(block_size=16)})):
    assert_same(hf.load_adapter(tmp_path / "adapter", base)[0], params)
  edit(tmp_path / "adapter", lambda t: {**t, key: w + 1})
  with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight: differs from the base's"):
    hf.load_adapter(tmp_path / "adapter", frozen)


def test_one_matrix_without_any_other_is_named(saved, frozen):
  edit(saved, lambda t: {f"{UP}_B.weight": t[f"{UP}_B.weight"]})
  with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: lora_A is missing"):
    hf.load_adapter(saved, frozen)


def test_files_that_are_missing_or_cut_short(saved, frozen):
  file = saved / "adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:-8])
  with pytest.raises(ValueError, match=r"safetensors: not a whole safetensors file"):
    hf.load_adapter(saved, frozen)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors was looked for"):
    hf.load_adapter(saved, frozen)
  with pytest.raises(FileNotFoundError, match=r"adapter_config\.json was looked for"):
    hf.load_adapter(saved / "absent", frozen)


def test_save_overwrites_nothing_and_leaves_nothing_behind(saved, frozen, monkeypatch):
  cfg = CASES["default"]
  before = {file.name: file.read_bytes() for file in saved.iterdir()}
  with pytest.raises(FileExistsError, match="adapter: exists already"):
    hf.save_adapter(saved, *adapter(frozen, cfg, seed=1), cfg)
  assert {file.name: file.read_bytes() for file in saved.iterdir()} == before

  def fail(tensors, file, **_):
    file.write_bytes(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(peft.safetensors.numpy, "save_file", fail)
  with pytest.raises(OSError, match="No space left"):
    hf.save_adapter(saved.parent / "other", *adapter(frozen, cfg), cfg)
  assert [file.name for file in saved.parent.iterdir()] == ["adapter"]


def test_what_peft_cannot_express_is_refused(tmp_path, frozen):
  cfg = CASES["default"]
  params, constants = adapter(frozen, cfg)
  q = params["layers"]["attn"]["q"]
  fixed_q = constants["layers"]["attn"]["q"]
  flat, fixed_flat = tree_paths.leaves(params), tree_paths.leaves(constants)

  def with_leaves(**leaves):
    return tree_paths.nest({**flat, **{k.replace("__", "/"): x for k, x in leaves.items()}})

  def of_all(name):
    return {
      leaf.replace("lora_b", name): x[..., 0, :]
      for leaf, x in flat.items()
      if leaf.endswith("/lora_b")
    }

  trials = {
    leaf: jnp.stack([x, x], 1) if leaf.endswith("/scaling") else x for leaf, x in fixed_flat.items()
  }
  magnitude = jnp.ones((3, 32))
  cases = [
    ({}, constants, "params is empty; there is no adapter to write"),
    ({"final_norm": frozen["final_norm"]}, constants, "params has no LoRA matrix"),
    ({"own": {"q": q}}, {"own": {"q": fixed_q}}, "own/q/kernel: the files of no known family have"),
    ({"layers": {"attn": {"q": {"lora_a": q["lora_a"]}}}}, constants, "attn/q/lora_b: missing"),
    (
      with_leaves(layers__attn__q__magnitude=magnitude),
      constants,
      "/magnitude: missing, and other",
    ),
    (
      with_leaves(layers__attn__q__lora_bias=magnitude),
      constants,
      "/lora_bias: missing, and other",
    ),
    (
      tree_paths.nest({**flat, **of_all("magnitude"), **of_all("lora_bias")}),
      constants,
      "lora_bias: beside DoRA's magnitude; PEFT has no adapter with both",
    ),
    (
      with_leaves(layers__attn__q__kernel=frozen["layers"]["attn"]["q"]["kernel"]),
      constants,
      "layers/attn/q/kernel: trained in full, and has an adapter",
    ),
    (params, {}, "/rank: missing; pass the constants that lora.init returned"),
    (
      params,
      tree_paths.nest({k: x for k, x in fixed_flat.items() if not k.endswith("/scaling")}),
      "/scaling: missing; pass the constants that lora.init returned",
    ),
    (
      params,
      tree_paths.nest(trials),
      r"lora_a \[3, 32, 4\] with scaling \[3, 2\]: several trials; slice one out",
    ),
  ]
  for tree, fixed, message in cases:
    with pytest.raises(ValueError, match=message):
      hf.save_adapter(tmp_path / "adapter", tree, fixed, cfg)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_peft_computes_the_same(tmp_path, frozen, cfg):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  theirs = pytest.importorskip("peft")
  params, constants = adapter(frozen, cfg)
  hf.save(tmp_path / "base", MODEL, frozen)
  hf.save_adapter(tmp_path / "adapter", params, constants, cfg)
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  model = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
  # No module has an adapter that the file says nothing of.
  _, tensors = read(tmp_path / "adapter")
  state = theirs.get_peft_model_state_dict(model)
  # Of a head it keeps the base's weight too.
  assert {key for key in state if "base_layer" not in key} == set(tensors)
  for key, x in tensors.items():
    np.testing.assert_array_equal(state[key].numpy(), x)

  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab_size)
  ours: Any = MODEL.apply({"params": params, "constants": constants, "frozen": frozen}, tokens)
  with torch.no_grad():
    expected = model(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)

  # And back: what PEFT writes of it is read to the same adapter.
  model.save_pretrained(tmp_path / "theirs")
  again, fixed, _ = hf.load_adapter(tmp_path / "theirs", frozen)
  assert_same(again, params)
  assert_same(fixed, constants)

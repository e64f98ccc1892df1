import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from qlora_jax import QuantizationConfig, hf, lora, quantize_tree, tree_paths
from qlora_jax.hf import checkpoint, saving
from qlora_jax.hf.tensors import Tensors
from qlora_jax.models.rope import Llama3, Rope
from qlora_jax.models.transformer import LayerKind, Transformer, TransformerConfig
from qlora_jax.quantized_tensor import is_quantized
from tests.hf import peak_memory

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

NF4 = QuantizationConfig(block_size=16, nested_block_size=32)
# Its codes are drawn with restored scales, so that they need the whole matrix.
BOF = QuantizationConfig("int4_signed", block_size=16, nested_block_size=32)
RULES = [
  None,
  NF4,
  {"layers/*/mlp/*": BOF},
  {"layers/*": QuantizationConfig("int4_zero_point", 16, double_quantization=False)},
  {"head": QuantizationConfig("nf3", 8, double_quantization=False, scale_dtype="bfloat16")},
]
ROOT = Path(__file__).resolve().parents[2]
DOWN = "model.layers.1.mlp.down_proj.weight"


def make(config=CONFIG, seed=0):
  """A model and a base with a value of its own in every place."""
  model = Transformer(config, jnp.dtype("float32"))
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["frozen"]
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(
    lambda x: jnp.asarray(rng.normal(len(x.shape) == 1, 0.2, x.shape).astype(np.float32)), shapes
  )


@pytest.fixture(scope="module")
def base():
  return make()


@pytest.fixture
def saved(tmp_path, base):
  """A directory that a test may spoil."""
  hf.save(tmp_path / "model", *base)
  return tmp_path / "model"


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, variables, tokens):
  return model.apply(variables, tokens)


def apply(model, frozen, tokens, params=None, constants=None):
  variables = {"params": params or {}, "constants": constants or {}, "frozen": frozen}
  return np.asarray(logits_of(model, variables, tokens))


def edit_config(directory, **fields):
  file = directory / "config.json"
  raw = {**json.loads(file.read_text()), **fields}
  file.write_text(json.dumps({name: x for name, x in raw.items() if x is not None}))


def read_tensors(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


def edit_tensors(directory, edit):
  tensors = edit(read_tensors(directory))
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def shard(directory):
  """Splits the file in three, by name, with an index."""
  tensors = read_tensors(directory)
  names = sorted(tensors)
  weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
  for file in set(weight_map.values()):
    part = {name: tensors[name] for name in names if weight_map[name] == file}
    safetensors.numpy.save_file(part, directory / file)
  (directory / "model.safetensors").unlink()
  index = {"metadata": {}, "weight_map": weight_map}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  return weight_map


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"tie_embeddings": True},
    {"attention_bias": True, "output_bias": True, "mlp_bias": True},
  ],
)
def test_save_then_load_is_exact(tmp_path, changes):
  config = dataclasses.replace(CONFIG, **changes)
  model, frozen = make(config)
  hf.save(tmp_path / "model", model, frozen)
  assert sorted(os.listdir(tmp_path)) == ["model"]
  again, loaded = hf.load(tmp_path / "model")
  assert again == model
  assert_same(loaded, frozen)
  assert checkpoint.read_config(tmp_path / "model") == config


def test_kernels_are_stored_transposed(saved, base):
  tensors = read_tensors(saved)
  down = base[1]["layers"]["mlp"]["down"]["kernel"]
  assert down.shape == (3, 48, 32)
  np.testing.assert_array_equal(tensors[DOWN], down[1].T)
  np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], base[1]["embed"]["embedding"])
  with safetensors.safe_open(saved / "model.safetensors", framework="numpy") as file:
    assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
  "rules",
  [
    NF4,
    QuantizationConfig(codebook="int4", block_size=32, double_quantization=False),
    # 48 is not a multiple of 32.
    QuantizationConfig(codebook="nf3", block_size=32),
    {"layers/*/mlp/*": NF4, "head": NF4, "embed/*": jnp.bfloat16, "layers/*/attn/o": None},
  ],
)
def test_quantized_as_it_comes_equals_quantized_as_a_whole(saved, base, rules):
  _, frozen = hf.load(saved, rules)
  whole = quantize_tree(base[1], checkpoint.default_rules(rules))
  assert_same(frozen, whole)
  assert any(is_quantized(w) for w in tree_paths.leaves(frozen, is_leaf=is_quantized).values())


def test_biases_and_norms_are_left_dense_in_the_storage_dtype(tmp_path):
  model, frozen = make(dataclasses.replace(CONFIG, attention_bias=True, output_bias=True))
  hf.save(tmp_path / "model", model, frozen)
  _, loaded = hf.load(tmp_path / "model", NF4, storage_dtype=jnp.bfloat16)
  for leaf, w in tree_paths.leaves(loaded, is_leaf=is_quantized).items():
    if leaf.startswith("layers/") and leaf.endswith("/kernel"):
      assert is_quantized(w), leaf
    else:
      assert w.dtype == jnp.bfloat16, leaf
  rules = checkpoint.default_rules(NF4)
  planned = checkpoint.abstract_base(model, rules, jnp.bfloat16)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(
    lambda x: (x.shape, x.dtype), loaded
  )


@pytest.mark.parametrize("rules", RULES)
def test_read_in_runs_of_rows_equals_read_whole(saved, monkeypatch, rules):
  _, whole = hf.load(saved, rules)
  reads = []
  rows = Tensors.rows

  def spy(self, name, start=0, stop=None):
    value = rows(self, name, start, stop)
    reads.append((name, value.nbytes))
    return value

  monkeypatch.setattr(Tensors, "rows", spy)
  # Five rows of 32 columns: no run is a whole matrix, and the last of a matrix is shorter.
  monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 5 * 32 * 4)
  _, parts = hf.load(saved, rules)
  assert jax.tree.structure(parts) == jax.tree.structure(whole)
  for x, y in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
    assert x.dtype == y.dtype
    # The mean of the scales is a sum in another order on JAX 0.10: its last bits may differ.
    np.testing.assert_allclose(x, y, rtol=0, atol=5e-7 if x.dtype == jnp.float32 else 0)
  assert len(reads) > 2 * len(read_tensors(saved))
  # Each byte once.
  assert sum(size for _, size in reads) == sum(x.nbytes for x in read_tensors(saved).values())
  if rules != {"layers/*/mlp/*": BOF}:
    assert max(size for _, size in reads) <= 5 * 32 * 4


def test_the_stack_is_written_in_place(saved, monkeypatch):
  donated = []

  def watch(name):
    write = getattr(checkpoint, name)

    def spy(stack, *arguments):
      result = write(stack, *arguments)
      donated.extend(x.is_deleted() for x in jax.tree.leaves(stack) if x.size)
      return result

    monkeypatch.setattr(checkpoint, name, spy)

  for name in ("_write_matrix", "_write_columns_beside", "_write_dense"):
    watch(name)
  hf.load(saved, NF4)
  monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 5 * 32 * 4)
  hf.load(saved, NF4)
  assert len(donated) > 100 and all(donated)


PEAK = """
import sys
import jax
from qlora_jax import QuantizationConfig, hf
from qlora_jax.hf import checkpoint
from tests.hf.peak_memory import peak_of

checkpoint._CHUNK_BYTES = int(sys.argv[3])
rules = QuantizationConfig()
# The programs are compiled first: a compiler's memory is not the loader's.
hf.load(sys.argv[1], rules)
frozen, peak = peak_of(lambda: jax.block_until_ready(hf.load(sys.argv[2], rules)[1]))
print(peak, sum(x.nbytes for x in jax.tree.leaves(frozen)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_peak_is_the_packed_base_and_less_than_a_tensor_and_a_third(tmp_path):
  # Tensors of 128 MB, large beside what a process otherwise holds (its compiler's memory, too).
  config = dataclasses.replace(
    CONFIG, hidden_size=2048, intermediate_size=32768, num_layers=2, vocab_size=64
  )
  one = dataclasses.replace(config, num_layers=1)
  for name, shape in (("warm", one), ("model", config)):
    model = Transformer(shape, jnp.dtype("bfloat16"))
    tree = jax.tree.map(
      lambda x: jnp.full(x.shape, 0.01, jnp.bfloat16), checkpoint.model_shapes(model)
    )
    hf.save(tmp_path / name, model, tree, dtype=jnp.bfloat16)
    del tree
  tensor = 2048 * 32768 * 2
  script = [sys.executable, "-c", PEAK, tmp_path / "warm", tmp_path / "model", str(8 << 20)]
  result = subprocess.run(
    script, capture_output=True, text=True, check=True, cwd=ROOT, env=peak_memory.ENVIRONMENT
  )
  peak, packed = map(int, result.stdout.split())
  assert packed < 2 * 3.5 * tensor / 3.8
  assert peak < packed + 1.3 * tensor, (peak / tensor, packed / tensor)


def test_shards_are_read_by_the_index(saved, base):
  assert len(set(shard(saved).values())) == 3
  _, frozen = hf.load(saved)
  assert_same(frozen, base[1])


def test_names_without_their_prefix(saved, base):
  edit_tensors(saved, lambda t: {name.removeprefix("model."): x for name, x in t.items()})
  assert "lm_head.weight" in read_tensors(saved)
  _, frozen = hf.load(saved)
  assert_same(frozen, base[1])
  edit_tensors(saved, lambda t: {name: x for name, x in t.items() if name != DOWN[6:]})
  with pytest.raises(ValueError, match=rf"model: {DOWN[6:]}: missing tensor"):
    hf.load(saved)


def test_a_tied_head_and_old_buffers_may_be_in_the_file(tmp_path):
  model, frozen = make(dataclasses.replace(CONFIG, tie_embeddings=True))
  hf.save(tmp_path / "model", model, frozen)
  before = read_tensors(tmp_path / "model")
  assert "lm_head.weight" not in before

  def add(tensors):
    return {
      **tensors,
      "lm_head.weight": tensors["model.embed_tokens.weight"],
      "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }

  edit_tensors(tmp_path / "model", add)
  assert len(read_tensors(tmp_path / "model")) == len(before) + 2
  _, loaded = hf.load(tmp_path / "model")
  assert_same(loaded, frozen)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_16_bits(tmp_path, base, dtype):
  model, frozen = base
  hf.save(tmp_path / "model", model, frozen, dtype=dtype)
  assert read_tensors(tmp_path / "model")[DOWN].dtype == jnp.dtype(dtype)
  again, loaded = hf.load(tmp_path / "model")
  # What config.json says, as transformers 4 names it too.
  assert again.dtype == jnp.dtype(dtype)
  rounded = jax.tree.map(lambda x: x.astype(dtype), frozen)
  assert_same(loaded, rounded)
  _, packed = hf.load(tmp_path / "model", NF4, dtype=jnp.float32)
  assert_same(packed, quantize_tree(rounded, checkpoint.default_rules(NF4)))
  edit_config(tmp_path / "model", dtype=None, torch_dtype=dtype)
  again, loaded = hf.load(tmp_path / "model", storage_dtype=jnp.float32)
  assert again.dtype == jnp.dtype(dtype)
  assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_arguments_reach_the_model(saved):
  model, _ = hf.load(saved, dtype=jnp.bfloat16, remat="full", implementation="xla")
  assert model == Transformer(CONFIG, jnp.dtype("bfloat16"), "full", "xla")


def nan_at(*index):
  def edit(tensors):
    w = tensors[DOWN].copy()
    w[index] = math.nan
    return {**tensors, DOWN: w}

  return edit


def remove(tensors):
  return {name: x for name, x in tensors.items() if name != DOWN}


def misspell(tensors):
  return {**tensors, "model.layers.1.mlp.dwon_proj.weight": tensors[DOWN]}


def cut(tensors):
  return {**tensors, DOWN: tensors[DOWN][:, :-1].copy()}


def integers(tensors):
  return {**tensors, DOWN: tensors[DOWN].astype(np.int32)}


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (remove, rf"model: {DOWN}: missing tensor; the config asks for it"),
    (misspell, r"model\.safetensors: model\.layers\.1\.mlp\.dwon_proj\.weight: unexpected tensor"),
    (
      cut,
      rf"model\.safetensors: {DOWN}: shape \[32, 47\]; the config asks for \[32, 48\]",
    ),
    (integers, rf"model\.safetensors: {DOWN}: dtype I32; a weight is F32, F16, BF16"),
    # The index is the file's: [out, in].
    (
      nan_at(5, 40),
      rf"model\.safetensors: {DOWN}: the value at index \[5, 40\] is not finite",
    ),
  ],
)
@pytest.mark.parametrize("rules", [None, NF4])
def test_wrong_tensors_are_named(saved, edit, message, rules):
  edit_tensors(saved, edit)
  with pytest.raises(ValueError, match=message):
    hf.load(saved, rules)


def test_names_are_checked_before_anything_is_read(saved, monkeypatch):
  edit_tensors(saved, misspell)
  monkeypatch.setattr(Tensors, "rows", None)
  with pytest.raises(ValueError, match="unexpected tensor"):
    hf.load(saved)


def test_a_file_that_is_cut_short(saved):
  file = saved / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
    hf.load(saved)
  file.write_bytes(b"")
  with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
    hf.load(saved)


def test_shards_that_are_missing_cut_short_or_wrongly_listed(saved, monkeypatch):
  weight_map = shard(saved)
  last = sorted(set(weight_map.values()))[-1]
  whole = (saved / last).read_bytes()
  index = saved / "model.safetensors.index.json"
  with monkeypatch.context() as patch:
    # Found before anything is read.
    patch.setattr(Tensors, "rows", None)
    (saved / last).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=f"{last}: not a whole safetensors file"):
      hf.load(saved)
    (saved / last).unlink()
    with pytest.raises(FileNotFoundError, match=f"{last}: missing; .*index.json names it"):
      hf.load(saved)
  (saved / last).write_bytes(whole)
  other = next(file for file in weight_map.values() if file != weight_map[DOWN])
  index.write_text(json.dumps({"weight_map": {**weight_map, DOWN: other}}))
  with pytest.raises(ValueError, match=f"{other}: {DOWN}: cannot be read"):
    hf.load(saved)
  index.write_text(json.dumps({"metadata": {}}))
  with pytest.raises(ValueError, match=r"index\.json: has no weight_map"):
    hf.load(saved)
  index.write_text("{")
  with pytest.raises(ValueError, match=r"index\.json: not JSON"):
    hf.load(saved)


def test_directories_that_hold_no_model(saved):
  with pytest.raises(FileNotFoundError, match="absent: no such directory; a model is a directory"):
    hf.load(saved / "absent")
  (saved / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"no weights: model\.safetensors and .* looked for"):
    hf.load(saved)
  (saved / "pytorch_model.bin").write_bytes(b"\x80\x04")
  with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin, which is pickled"):
    hf.load(saved)
  (saved / "config.json").unlink()
  for read in (hf.load, checkpoint.read_config):
    with pytest.raises(FileNotFoundError, match=r"not a model: config\.json was looked for"):
      read(saved)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "gpt2"}, r"/model: config\.json: model_type: 'gpt2' is not supported"),
    ({"hidden_act": "relu"}, r"/model: config\.json: hidden_act: 'relu' is not supported"),
    ({"hidden_size": None}, r"/model: config\.json: hidden_size: missing"),
    ({"vocab_size": "many"}, r"/model: "),
    ({"dtype": "float64"}, r"/model: config\.json: dtype: 'float64' is not supported"),
    (
      {"quantization_config": {"quant_method": "gptq"}},
      r"/model: quantized already \(gptq\): .*; give the 16-bit checkpoint",
    ),
  ],
)
def test_wrong_configs_name_their_directory(saved, fields, message):
  edit_config(saved, **fields)
  with pytest.raises(ValueError, match=message):
    hf.load(saved)


def test_an_empty_quantization_config_is_none(saved, base):
  raw = json.loads((saved / "config.json").read_text())
  (saved / "config.json").write_text(json.dumps({**raw, "quantization_config": None}))
  assert_same(hf.load(saved)[1], base[1])


def test_a_config_that_is_no_object(saved):
  (saved / "config.json").write_text("[]")
  with pytest.raises(ValueError, match=r"config\.json: a JSON list; an object is wanted"):
    hf.load(saved)


def test_patterns_are_checked_before_anything_is_read(saved, monkeypatch):
  monkeypatch.setattr(checkpoint, "Tensors", None)
  with pytest.raises(ValueError, match=r"'layers/\*/atn/\*' matches no weight; near paths: lay"):
    hf.load(saved, {"layers/*/atn/*": NF4})
  with pytest.raises(ValueError, match="matches no matrix, only final_norm/scale"):
    hf.load(saved, {"final_norm/*": NF4})
  with pytest.raises(ValueError, match="lie in one stack; its layers share a treatment"):
    hf.load(saved, {"layers/1/mlp/*": NF4})


def test_save_overwrites_nothing(saved, base, monkeypatch):
  before = {file.name: file.read_bytes() for file in saved.iterdir()}
  # Refused at once, not after an hour of merging.
  monkeypatch.setattr(saving, "_write", None)
  for write in (hf.save, lambda *x: hf.save_merged(x[0], x[1], x[2], {}, {})):
    with pytest.raises(FileExistsError, match="model: exists already; give another path"):
      write(saved, *base)
  assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
  link = saved.parent / "dangling"
  link.symlink_to(saved.parent / "nowhere")
  with pytest.raises(FileExistsError, match="dangling: exists already"):
    hf.save(link, *base)


def test_a_save_that_fails_leaves_nothing(tmp_path, base, monkeypatch):
  model, frozen = base
  written = []

  def fail(file, name, tensor):
    del name, tensor
    written.extend(Path(file._file.name).parent.parent.iterdir())
    raise OSError("No space left on device")

  monkeypatch.setattr(saving.TensorFile, "write", fail)
  with pytest.raises(OSError, match="No space left"):
    hf.save(tmp_path / "deep" / "model", model, frozen)
  # It was being written beside its place, under another name.
  assert len(written) == 1 and written[0].name.startswith(".model.")
  assert list((tmp_path / "deep").iterdir()) == []


def test_what_a_killed_save_left_does_not_stop_the_next(tmp_path, base):
  (tmp_path / f".model.{os.getpid()}.tmp").mkdir()
  hf.save(tmp_path / "model", *base)
  assert_same(hf.load(tmp_path / "model")[1], base[1])


def without(tree, leaf):
  return tree_paths.nest({path: x for path, x in tree_paths.leaves(tree).items() if path != leaf})


def test_what_cannot_be_saved_is_named(tmp_path, base):
  model, frozen = base
  cases = [
    (without(frozen, "layers/mlp/up/kernel"), "layers/0/mlp/up/kernel: missing; the model has it"),
    ({**frozen, "extra": jnp.zeros(3)}, "extra: a llama file of this model has no name for it"),
    (quantize_tree(frozen, {"head": NF4}), "head/kernel: packed; save_merged writes it dense"),
    ({**frozen, "final_norm": {"scale": jnp.zeros(3)}}, r"final_norm/scale: shape \(3,\); the mo"),
  ]
  for tree, message in cases:
    with pytest.raises(ValueError, match=message):
      hf.save(tmp_path / "model", model, tree)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rules", [None, NF4])
def test_merged_equals_the_live_model(tmp_path, saved, rules):
  model, frozen = hf.load(saved, rules)
  cfg = lora.LoRAConfig(rank=4, alpha=8.0, rank_pattern={"layers/1/attn/*": 2})
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  params = jax.tree.map(lambda x: x + 0.05, params)
  # Padding of the smaller rank stays zero in training.
  params["layers"]["attn"] = jax.tree.map(lambda x: x.at[1].set(0), params["layers"]["attn"])
  # And a norm that was trained in full.
  params["final_norm"] = {"scale": frozen["final_norm"]["scale"] * 1.5}
  tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, CONFIG.vocab_size)
  live = apply(model, frozen, tokens, params, constants)
  bare = apply(model, frozen, tokens)
  assert float(jnp.abs(live - bare).max()) > 0.1

  hf.save_merged(tmp_path / "merged", model, frozen, params, constants)
  again, merged = hf.load(tmp_path / "merged")
  assert again == model
  assert_same(merged, lora.merge(frozen, params, constants))
  np.testing.assert_allclose(apply(again, merged, tokens), live, rtol=0, atol=2e-5)

  hf.save_merged(tmp_path / "half", model, frozen, params, constants, dtype=jnp.bfloat16)
  _, half = hf.load(tmp_path / "half")
  # Rounded once.
  assert_same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), merged))
  assert half["head"]["kernel"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
  "changes",
  [
    {"attention_bias": True, "output_bias": True, "mlp_bias": True, "norm_eps": 1e-3},
    {"layer_pattern": (LayerKind(None, Rope(500.0)),)},
    {
      "layer_pattern": (LayerKind(None, Rope(1e4, None, Llama3(8.0, 1.0, 4.0, 32))),),
      "tie_embeddings": True,
    },
  ],
)
def test_transformers_opens_what_we_write(tmp_path, changes):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model, frozen = make(dataclasses.replace(CONFIG, **changes))
  hf.save(tmp_path / "model", model, frozen)
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "model", output_loading_info=True
  )
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab_size)
  ours = apply(model, frozen, tokens)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)

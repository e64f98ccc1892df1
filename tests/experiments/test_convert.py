import errno
import json
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convert
from qlora_jax import QuantizationConfig, hf, lora
from qlora_jax.hf import hub, saving
from qlora_jax.hf.checkpoint import model_shapes
from qlora_jax.models.transformer import Transformer, TransformerConfig


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A model with a tokenizer's file beside it, and an adapter."""
  root = tmp_path_factory.mktemp("convert")
  config = TransformerConfig(48, 32, 64, 2, 2, 1, 16, tie_embeddings=True)
  model = Transformer(config, jnp.float32)
  rng = np.random.default_rng(0)
  frozen = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(len(x.shape) == 1, 0.3, x.shape), jnp.float32),
    model_shapes(model),
  )
  hf.save(root / "model", model, frozen)
  (root / "model" / "tokenizer.json").write_text("{}")
  cfg = lora.LoRAConfig(rank=2, targets=("*/attn/q", "head"))
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  params = jax.tree.map(lambda x: x + 0.05, params)
  hf.save_adapter(root / "adapter", params, constants, cfg, model=model, frozen=frozen)
  return root


def run(capsys, *arguments):
  status = convert.main([str(argument) for argument in arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def logits_of(path, adapter=None, **kwargs) -> Any:
  model, frozen = hf.load(path, dtype=jnp.float32, **kwargs)
  params, constants = {}, {}
  if adapter is not None:
    params, constants, _ = hf.load_adapter(adapter, frozen, model=model)
  tokens = jnp.arange(12)[None]
  variables = {"params": params, "constants": constants, "frozen": frozen}
  return jax.jit(model.apply)(variables, tokens)


def test_quantize_is_opened_as_it_was_quantized(directory, tmp_path, capsys):
  out = tmp_path / "packed"
  flags = ("--block_size", 32, "--nested_block_size", 64, "--rotate", "--outlier_fraction", 0.05)
  status, text, _ = run(capsys, "quantize", directory / "model", out, "--dry_run", *flags)
  assert status == 0 and "would be written" in text and not out.exists()
  status, text, _ = run(capsys, "quantize", directory / "model", out, *flags)
  assert status == 0 and "bits a quantized weight" in text
  rules = QuantizationConfig(
    block_size=32, nested_block_size=64, rotate=True, outlier_fraction=0.05
  )
  np.testing.assert_array_equal(logits_of(out), logits_of(directory / "model", quantization=rules))
  assert (out / "tokenizer.json").exists()
  status, text, _ = run(capsys, "inspect", out)
  assert status == 0 and "4-bit codes in blocks of 32" in text and "  whole: " in text
  assert "bit for bit as it was written" in text
  with pytest.raises(ValueError, match=r"layers/attn/k: stored as nf4, .* asked for is nf4, "):
    hf.load(out, QuantizationConfig(block_size=16))
  # Each device reads onto its own place.
  place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
  _, frozen = hf.load(out, sharding=place)
  assert all(leaf.devices() == {jax.devices()[1]} for leaf in jax.tree.leaves(frozen))


def test_nothing_is_overwritten_untold(directory, tmp_path, capsys):
  out = tmp_path / "packed"
  out.mkdir()
  (out / "mine").write_text("x")
  status, _, error = run(capsys, "quantize", directory / "model", out, "--overwrite")
  assert status == 2 and "replaces a directory with a model or an adapter alone" in error
  (out / "config.json").write_text("{}")
  status, _, error = run(capsys, "quantize", directory / "model", out, "--block_size", 32)
  assert status == 2 and "exists already; give another, or --overwrite" in error
  assert (out / "mine").read_text() == "x"
  # Nor what is to be read.
  model = directory / "model"
  status, _, error = run(capsys, "quantize", model, model, "--overwrite")
  assert status == 2 and "which is to be read" in error and (model / "model.safetensors").exists()
  # One that fails leaves the old.
  status, _, error = run(capsys, "quantize", tmp_path / "absent", out, "--overwrite")
  assert status == 2 and (out / "mine").exists()
  assert run(capsys, "quantize", directory / "model", out, "--overwrite")[0] == 0
  assert not (out / "mine").exists() and [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_merge_unties_a_head_that_has_an_adapter(directory, tmp_path, capsys):
  out = tmp_path / "merged"
  model, adapter = directory / "model", directory / "adapter"
  status, text, _ = run(capsys, "merge", model, adapter, out, "--dtype", "float32")
  assert status == 0 and "logits of a sample move by up to" in text
  raw = json.loads((out / "config.json").read_text())
  assert raw["tie_word_embeddings"] is False and raw["dtype"] == "float32"
  np.testing.assert_allclose(logits_of(out), logits_of(model, adapter), rtol=0, atol=2e-5)
  base, merged = hf.load(model)[1], hf.load(out)[1]
  np.testing.assert_array_equal(base["embed"]["embedding"], merged["embed"]["embedding"])
  # The adapter is in it already.
  with pytest.raises(ValueError, match="merged"):
    hf.load_adapter(adapter, merged)
  status, _, error = run(capsys, "merge", out, adapter, tmp_path / "twice")
  assert status == 2 and "merged" in error and not (tmp_path / "twice").exists()


def test_what_cannot_be_merged_is_refused_before_anything(directory, shared, tmp_path, capsys):
  out, llama = tmp_path / "out", shared / "golden" / "tiny_llama"
  status, _, error = run(
    capsys, "merge", llama / "hf_fp32", llama / "peft_lora_bias", out, "--dry_run"
  )
  assert status == 2 and "lora_bias: the base's layer has no bias to add it to" in error
  paths = (directory / "model", directory / "adapter", out)
  status, _, error = run(capsys, "merge", *paths, "--dry_run", "--quantize", "nf5")
  assert status == 2 and "'nf5'" in error
  status, text, _ = run(capsys, "merge", *paths, "--dry_run", "--dtype", "float16")
  # Two layers, a norm, the table, and a head of its own.
  weights = 2 * (3 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32 + 2 * 48 * 32
  assert status == 0 and f"{2 * weights / 1e6:.3f} MB would be written" in text
  status, text, _ = run(capsys, "merge", *paths, "--dry_run", "--quantize", "nf4")
  assert status == 0 and f"{2 * weights / 1e6:.3f} MB would be written" not in text
  assert not out.exists()


def test_a_merge_that_fails_leaves_the_old(directory, tmp_path, capsys, monkeypatch):
  model, out = tmp_path / "model", tmp_path / "out"
  base, frozen = hf.load(directory / "model", dtype=jnp.float32)
  frozen["final_norm"]["scale"] = frozen["final_norm"]["scale"].at[3].set(1e5)
  hf.save(model, base, frozen)
  arguments = ("merge", model, directory / "adapter", out, "--no-check", "--overwrite", "--dtype")
  assert run(capsys, *arguments, "bfloat16")[0] == 0
  before = {file.name: file.read_bytes() for file in out.iterdir()}

  def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  status, _, error = run(capsys, *arguments, "float16")
  assert status == 2 and "index [3] is inf in float16; write bfloat16 or float32" in error
  monkeypatch.setattr(saving.TensorFile, "write", fail)
  status, _, error = run(capsys, *arguments, "float32")
  assert status == 2 and f"{out}: not written: [Errno 28] No space left on device" in error
  assert {file.name: file.read_bytes() for file in out.iterdir()} == before
  assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_merge_into_few_bits_says_what_it_moves(directory, tmp_path, capsys):
  status, text, _ = run(
    capsys, "merge", directory / "model", directory / "adapter", tmp_path / "m", "--quantize", "nf4"
  )
  assert status == 0
  moved = float(text.split("by up to ")[1].split()[0])
  expected = logits_of(directory / "model", directory / "adapter")
  assert 0.01 < moved < 10 * float(jnp.abs(logits_of(tmp_path / "m") - expected).max())


def test_adapter_of_what_is_no_run(tmp_path, capsys):
  status, _, error = run(capsys, "adapter", tmp_path / "absent", tmp_path / "out")
  assert status == 2 and "no run with checkpoints" in error


def test_adapter_is_read_and_written_again(directory, tmp_path, capsys):
  source, out = directory / "adapter", tmp_path / "again"
  status, _, error = run(capsys, "adapter", source, out)
  assert status == 2 and "--base: missing" in error
  assert run(capsys, "adapter", source, out, "--base", directory / "model")[0] == 0
  ours, theirs = (logits_of(directory / "model", path) for path in (source, out))
  np.testing.assert_array_equal(ours, theirs)


def test_inspect_says_what_is_missing(directory, tmp_path, capsys):
  status, text, _ = run(capsys, "inspect", directory / "adapter")
  assert status == 0 and "PEFT adapter: LORA, rank 2, alpha 16" in text
  copy = tmp_path / "cut"
  copy.mkdir()
  for file in (directory / "model").iterdir():
    (copy / file.name).write_bytes(file.read_bytes())
  weights = copy / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-8])
  assert "cannot be read: " in run(capsys, "inspect", copy)[1]
  status, _, error = run(capsys, "inspect", tmp_path / "absent")
  assert status == 2 and "no such directory" in error


# Each folder of the goldens, and what is to be said of it.
GOLDEN = {
  "tiny_llama/hf_fp32": ("LlamaForCausalLM", "21 tensors, 90,432 weights", "  whole: "),
  "tiny_llama/bnb_4bit": ("14 tensors, 73,728 weights", "nf4, block 64, double", "  whole: "),
  "tiny_llama/peft_dora": ("DoRA, rank 4, alpha 8", "42 tensors of F32"),
  "tiny_llama/peft_rslora_patterns": ("rsLoRA, rank 8", "rank_pattern: {'down_proj': 4"),
  "tiny_gemma3_text/hf_fp32": ("1 window 8, 1 full attention", "tied head", "  whole: "),
  "ondisk_formats": ("neither a model", "fp4_dq.safetensors", "packed by bitsandbytes in fp4"),
  "quant4bit": ("neither a model", "vectors.npz"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_inspect_of_the_goldens(shared, capsys, name):
  status, text, _ = run(capsys, "inspect", shared / "golden" / name)
  assert status == 0
  for words in GOLDEN[name]:
    assert words in text


def test_a_hub_id_comes_from_the_cache_or_is_said_to_be_absent(
  directory, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
  status, _, error = run(capsys, "inspect", "someone/model")
  assert status == 2 and "someone/model: no such directory, and not to be had from the hub" in error
  assert len(error.splitlines()) == 1
  repo = tmp_path / "models--someone--model"
  snapshot = repo / "snapshots" / ("a" * 40)
  snapshot.parent.mkdir(parents=True)
  snapshot.symlink_to(directory / "model")
  (repo / "refs").mkdir()
  (repo / "refs" / "main").write_text("a" * 40)
  download = huggingface_hub.snapshot_download
  monkeypatch.setattr(
    hub.huggingface_hub,
    "snapshot_download",
    lambda *a, **k: download(*a, **k, cache_dir=str(tmp_path), local_files_only=True),
  )
  assert "  whole: " in run(capsys, "inspect", "someone/model")[1]
  with pytest.raises(FileNotFoundError, match="not to be had from the hub"):
    hf.load("someone/model@other")

"""Every scale format, learned table and wrapper, from a checkpoint to a packed base and back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import analysis
from qlora_jax import QuantizationConfig, dequantize, hf, quantize_tree, tree_paths
from qlora_jax.fingerprint import fingerprint
from qlora_jax.hf import checkpoint, packed
from qlora_jax.hf.bitsandbytes import to_bitsandbytes
from qlora_jax.memory import quantized_bits
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.quantized_tensor import OutlierQuantizedTensor, is_quantized

CONFIG = TransformerConfig(
  vocab_size=40,
  hidden_size=32,
  intermediate_size=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=32,
)
NVFP4 = QuantizationConfig("nvfp4", 16, False)
RULES = {
  "layers/*/attn/q": NVFP4,
  "layers/*/attn/k": QuantizationConfig("mxfp4", 32, False),
  "layers/*/attn/v": QuantizationConfig("any4", 16),
  "layers/*/attn/o": QuantizationConfig("lloyd_max3", 16, False, scale_dtype="e8m0"),
  "layers/*/mlp/gate": QuantizationConfig("nf4", 16, rotate=True),
  "layers/*/mlp/up": QuantizationConfig("int4_zero_point", 16, False, outlier_fraction=0.1),
  "layers/*/mlp/down": dataclasses.replace(NVFP4, outlier_fraction=0.05, rotate=True),
}


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The dense base, the directory with it, and what was read packed, in runs of five rows."""
  model = Transformer(CONFIG, jnp.dtype("float32"))
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))[
    "frozen"
  ]
  rng = np.random.default_rng(0)
  dense = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(len(x.shape) == 1, 0.2, x.shape).astype(np.float32)), shapes
  )
  directory = tmp_path_factory.mktemp("formats") / "model"
  hf.save(directory, model, dense)
  with pytest.MonkeyPatch.context() as patch:
    # Matrices of which a few columns could be treated at a time, were their format such.
    patch.setattr(checkpoint, "_CHUNK_BYTES", 5 * 32 * 4)
    return dense, directory, *hf.load(directory, RULES)


def test_read_from_a_checkpoint_as_quantized_at_once(made):
  dense, _, model, frozen = made
  assert_same(frozen, quantize_tree(dense, checkpoint.default_rules(RULES)))
  planned = checkpoint.abstract_base(model, checkpoint.default_rules(RULES), jnp.float32)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(
    lambda x: (x.shape, x.dtype), frozen
  )


def test_a_packed_base_is_written_and_opened_bit_for_bit(made, tmp_path):
  _, _, model, frozen = made
  hf.save_base(tmp_path / "packed", model, frozen)
  again, opened = hf.load(tmp_path / "packed", RULES)
  assert_same(opened, frozen)
  assert fingerprint(opened) == fingerprint(frozen)
  manifest = json.loads((tmp_path / "packed" / packed.MANIFEST).read_text())
  entry = manifest["leaves"]["layers/mlp/down/kernel"]
  assert entry["around"] == ["outliers", "rotated"] and entry["scale_dtype"] == "float8_e4m3fn"
  shapes = packed.read(
    tmp_path / "packed",
    checkpoint.model_shapes(again),
    lambda _, value: value,
    progress=False,
    headers_only=True,
  )
  assert jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), shapes) == jax.tree.map(
    lambda x: (x.shape, x.dtype), frozen
  )
  # Bytes changed behind the manifest's back, and a word that this version does not know.
  entry["around"] = ["sparse"]
  (tmp_path / "packed" / packed.MANIFEST).write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match="stands in 'sparse'; this version knows outliers, rotated"):
    hf.load(tmp_path / "packed")


@pytest.mark.parametrize(
  ("path", "other", "message"),
  [
    (
      "attn/q",
      QuantizationConfig("nvfp4", 16, False, scale_dtype="float32"),
      "float8_e4m3fn scales",
    ),
    ("attn/v", QuantizationConfig("nf4", 16), "another codebook"),
    ("mlp/gate", QuantizationConfig("nf4", 16), "rotated; the quantization that was asked for"),
    ("mlp/up", QuantizationConfig("int4_zero_point", 16, False), "4 inputs in 16 bits"),
  ],
)
def test_a_packed_base_of_another_format_is_refused(made, tmp_path, path, other, message):
  _, _, model, frozen = made
  hf.save_base(tmp_path / "packed", model, frozen)
  with pytest.raises(ValueError, match=message):
    hf.load(tmp_path / "packed", {**RULES, f"layers/*/{path}": other})


def test_the_model_reads_them(made):
  """Logits are those of the dequantized base; bytes and bits are the arrays'."""
  _, _, model, frozen = made
  plain = jax.tree.map(
    lambda leaf: dequantize(leaf) if is_quantized(leaf) else leaf, frozen, is_leaf=is_quantized
  )
  tokens = jnp.arange(12).reshape(2, 6)
  y, expected = (
    jax.jit(model.apply)({"params": {}, "constants": {}, "frozen": each}, tokens)
    for each in (frozen, plain)
  )
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  parts = analysis.bytes_by_part(frozen)
  assert sum(parts.values()) == tree_paths.tree_bytes(frozen)
  leaves = tree_paths.leaves(frozen, is_leaf=is_quantized)
  down = leaves["layers/mlp/down/kernel"]
  assert isinstance(down, OutlierQuantizedTensor)
  # A layer of 64 × 32: codes, E4M3 scales, float32 factor, table; signs; 4 rows.
  one = 64 * 32 // 2 + 4 * 32 + 4 + 64 + 64 + 4 * (4 + 2 * 32)
  assert down.nbytes == 2 * one
  bits = quantized_bits(frozen)
  assert bits is not None and 4 < bits < 8
  found = {row["path"]: row for row in analysis.weight_errors(made[0], frozen)}
  assert found["layers/1/mlp/down/kernel"]["relative_mse"] < 0.02
  assert sum(found["layers/1/mlp/down/kernel"]["codes"]) == 64 * 32


def test_bitsandbytes_refuses_them(made):
  _, _, _, frozen = made
  for path, message in (
    ("mlp/gate", "a rotation beside the codes"),
    ("mlp/down", "outliers in 16 bits"),
    ("attn/q", "codebook e2m1: bitsandbytes decodes"),
    ("attn/v", "codebook a custom table"),
  ):
    leaf = tree_paths.leaves(frozen, is_leaf=is_quantized)[f"layers/{path}/kernel"]
    with pytest.raises(ValueError, match=message):
      to_bitsandbytes(jax.tree.map(lambda x: x[0], leaf))

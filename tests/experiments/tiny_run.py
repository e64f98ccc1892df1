"""A base of two small layers in files, and the config of a run on it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax import config as config_lib
from qlora_jax import hf
from qlora_jax.models.transformer import Transformer, TransformerConfig


def save_base(path: Path) -> Path:
  """Random float32 weights."""
  model = Transformer(
    TransformerConfig(
      vocab_size=256,
      hidden_size=32,
      intermediate_size=48,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      max_position_embeddings=64,
    ),
    dtype=jnp.float32,
  )
  tokens = jnp.zeros((1, 2), jnp.int32)
  hf.save(path, model, jax.jit(model.init)(jax.random.key(0), tokens)["frozen"])
  return path


def config(base: Path, **values: Any) -> config_lib.ExperimentConfig:
  """Of a run in 2-bit blocks of 16, with these values by their dotted names."""
  draft = config_lib.defaults()
  draft.name = "tiny"
  draft.model.path = str(base)
  draft.model.dtype = draft.model.storage_dtype = "float32"
  draft.model.remat = "none"
  draft.quantization.codebook = "nf2"
  draft.quantization.block_size = 16
  draft.data.synthetic = "manuals"
  draft.data.num_documents = 10
  draft.data.tokenizer = "bytes"
  draft.data.seq_len = 32
  draft.train.batch_size = 2
  draft.train.compare_16bit = False
  return config_lib.from_config_dict(draft, values)

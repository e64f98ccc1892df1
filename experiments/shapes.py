"""Shapes of well-known models, for what needs no weights: benchmarks on random ones, and plans."""

import math
from typing import Any

from qlora_jax.models.rope import Linear, Rope
from qlora_jax.models.transformer import LayerKind, TransformerConfig


def _model(
  vocabulary: int, d: int, i: int, layers: int, heads: int, groups: int, h: int, **fields: Any
) -> TransformerConfig:
  return TransformerConfig(vocabulary, d, i, layers, heads, groups, h, **fields)


_GEMMA3: dict[str, Any] = {
  "layer_pattern": (
    *[LayerKind(1024, Rope(1e4))] * 5,
    LayerKind(None, Rope(1e6, scaling=Linear(8.0))),
  ),
  "tie_embeddings": True,
  "activation": "gelu_pytorch_tanh",
  "qk_norm": "head",
  "post_norms": True,
  "unit_offset": True,
  "model_type": "gemma3_text",
}

# As their config.json files on the hub have them.
SHAPES: dict[str, TransformerConfig] = {
  "llama-8b": _model(128256, 4096, 14336, 32, 32, 8, 128),
  "llama-70b": _model(128256, 8192, 28672, 80, 64, 8, 128),
  "llama-3b": _model(128256, 3072, 8192, 28, 24, 8, 128, tie_embeddings=True),
  "llama-1b": _model(128256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True),
  "qwen3-32b": _model(151936, 5120, 25600, 64, 64, 8, 128, qk_norm="head", model_type="qwen3"),
  "gemma3-27b": _model(
    *(262208, 5376, 21504, 62, 32, 16, 128),
    query_scale=168**-0.5,
    embedding_scale=math.sqrt(5376),
    **_GEMMA3,
  ),
  "mixtral-8x7b": _model(
    *(32000, 4096, 14336, 32, 32, 8, 128),
    num_experts=8,
    experts_per_token=2,
    model_type="mixtral",
  ),
  "qwen3-30b-a3b": _model(
    *(151936, 2048, 768, 48, 32, 4, 128),
    qk_norm="head",
    num_experts=128,
    experts_per_token=8,
    model_type="qwen3_moe",
  ),
  "stories-260k": _model(512, 64, 172, 5, 8, 4, 8, tie_embeddings=True),
  "tiny": _model(256, 64, 128, 2, 4, 2, 16),
}

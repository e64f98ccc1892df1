"""One decoder for every supported family, scanned over its layers.

B batch, T time, S cache slots, D model width, H heads, h head width, V vocabulary. What
differs between families is data in TransformerConfig; how their files name things stands in
`families`.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.linen import QDense, plain_weight
from qlora_jax.models.attention import attend

RematPolicy = Literal["none", "full"]

# The KV cache: {"k", "v": [L, B, S, Hkv, h], "segment_ids": [B, S], "index": []}.
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of rotary frequencies for contexts past the original one.

  Wavelengths below original / high_freq_factor stay, those above original / low_freq_factor
  are multiplied by `factor`, with a ramp between.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The architecture, in the terms of Hugging Face's config.json."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  tie_embeddings: bool = False
  max_position_embeddings: int = 2048
  attention_bias: bool = False
  mlp_bias: bool = False
  model_type: str = "llama"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type in (int, "int") and value < 1:
        raise ValueError(f"{field.name}: {value}; at least 1")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads: {self.num_kv_heads}; divides num_heads, which is {self.num_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim: {self.head_dim}; rotary embeddings rotate pairs, so it is even")


def rotary_frequencies(config: TransformerConfig) -> np.ndarray:
  """`[h / 2]` float32 radians a position."""
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies.astype(np.float32)
  wavelengths = 2 * np.pi / frequencies
  original = scaling.original_max_position_embeddings
  ramp = (original / wavelengths - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  ramp = np.clip(ramp, 0, 1)
  return ((1 - ramp) * frequencies / scaling.factor + ramp * frequencies).astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary embedding of `[B, T, H, h]` by `[B, T, h / 2]` cosines and sines, in float32.

  Pairs lie half a head apart (Hugging Face's order, not the original interleaved one).
  """
  cos, sin = cos[:, :, None], sin[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def restarting_positions(segment_ids: jax.Array) -> jax.Array:
  """`[B, T]` positions that count from 0 in each run of equal segment ids."""
  index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
  starts = segment_ids[:, 1:] != segment_ids[:, :-1]
  starts = jnp.pad(starts, ((0, 0), (1, 0)), constant_values=True)
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


class RMSNorm(nn.Module):
  """x / √(mean(x²) + eps) · scale; the statistics in float32."""

  eps: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = plain_weight(self, "scale", nn.initializers.ones_init(), x.shape[-1:])
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
    scale = jax.lax.broadcast_in_dim(scale.astype(self.dtype), x.shape, (x.ndim - 1,))
    return x.astype(self.dtype) * scale


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: TransformerConfig
  dtype: DTypeLike
  implementation: str | None

  @nn.compact
  def __call__(self, x, rotary, mask, cache):
    config = self.config

    def project(name: str, features: int) -> QDense:
      return QDense(
        features,
        use_bias=config.attention_bias,
        dtype=self.dtype,
        implementation=self.implementation,
        name=name,
      )

    def heads(name: str, count: int) -> jax.Array:
      y = project(name, count * config.head_dim)(x)
      return y.reshape(*y.shape[:-1], count, config.head_dim)

    q = rotate(heads("q", config.num_heads), *rotary)
    k = rotate(heads("k", config.num_kv_heads), *rotary)
    v = heads("v", config.num_kv_heads)
    if cache is not None:
      start = (0, cache["index"], 0, 0)
      k = jax.lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), start)
      v = jax.lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), start)
      cache = {"k": k, "v": v}
    y = attend(q, k.astype(q.dtype), v.astype(q.dtype), mask)
    y = y.reshape(*y.shape[:-2], config.num_heads * config.head_dim)
    return project("o", config.hidden_size)(y), cache


class MLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) · up(x))."""

  config: TransformerConfig
  dtype: DTypeLike
  implementation: str | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def project(name: str, features: int) -> QDense:
      return QDense(
        features,
        use_bias=self.config.mlp_bias,
        dtype=self.dtype,
        implementation=self.implementation,
        name=name,
      )

    width = self.config.intermediate_size
    hidden = jax.nn.silu(project("gate", width)(x)) * project("up", width)(x)
    return project("down", self.config.hidden_size)(hidden)


class Block(nn.Module):
  """One decoder layer, in the form that `nn.scan` wants: carry, then what is shared."""

  config: TransformerConfig
  dtype: DTypeLike
  implementation: str | None

  @nn.compact
  def __call__(self, x, rotary, mask, index, cache):
    def norm(name: str) -> RMSNorm:
      return RMSNorm(self.config.norm_eps, self.dtype, name=name)

    if cache is not None:
      cache = {**cache, "index": index}
    y, cache = Attention(self.config, self.dtype, self.implementation, name="attn")(
      norm("attn_norm")(x), rotary, mask, cache
    )
    x = x + y
    y = MLP(self.config, self.dtype, self.implementation, name="mlp")(norm("mlp_norm")(x))
    return x + y, cache


class Embed(nn.Module):
  """The token table `[V, D]`, looked up, or multiplied by where it is tied to the head."""

  vocab_size: int
  features: int
  dtype: DTypeLike

  def setup(self):
    shape = (self.vocab_size, self.features)
    self.embedding = plain_weight(self, "embedding", nn.initializers.normal(0.02), shape)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    table = self.embedding.astype(self.dtype)
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)


class Transformer(nn.Module):
  """A causal language model over a frozen base.

  `model.apply({"params": …, "constants": …, "frozen": …}, tokens)`; params and constants may
  be {}. Dropout only with rngs={"dropout": key}.

  Attributes:
    config: the architecture.
    dtype: of activations and of the products' operands. Norms' statistics, softmax and logits
      are float32.
    remat: "none" keeps a layer's activations for the backward pass; "full" keeps its input
      alone and computes the layer again.
    implementation: of `quantized_matmul`.
  """

  config: TransformerConfig
  dtype: DTypeLike = jnp.bfloat16
  remat: RematPolicy = "none"
  implementation: str | None = None

  def setup(self):
    config = self.config
    if self.remat not in ("none", "full"):
      raise ValueError(f"remat: {self.remat!r}; one of none, full")
    self.embed = Embed(config.vocab_size, config.hidden_size, self.dtype)
    # A scan already keeps XLA from merging a layer's two computations.
    block = nn.remat(Block, prevent_cse=False) if self.remat == "full" else Block
    self.layers = nn.scan(
      block,
      variable_axes={"params": 0, "frozen": 0, "constants": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
      length=config.num_layers,
    )(config, self.dtype, self.implementation)
    self.final_norm = RMSNorm(config.norm_eps, self.dtype)
    if not config.tie_embeddings:
      self.head = QDense(
        config.vocab_size,
        dtype=self.dtype,
        output_dtype=jnp.float32,
        implementation=self.implementation,
      )

  def __call__(self, tokens, segment_ids=None, positions=None, cache=None):
    """Logits of the next token.

    Args:
      tokens: `[B, T]` ids. Out of range is undefined.
      segment_ids: `[B, T]`; a token sees those before it with the same id. 0 is padding, left
        or right. All 1 where absent.
      positions: `[B, T]`; where absent they count from 0 in each segment (with a cache: from
        the tokens of the segment that are in it).
      cache: from `init_cache`, or an earlier call; the new keys are written behind the old.

    Returns:
      `[B, T, V]` float32; with a cache, (logits, the new cache).
    """
    if cache is None:
      return self.logits(self.hidden(tokens, segment_ids, positions))
    hidden, cache = self.hidden(tokens, segment_ids, positions, cache)
    return self.logits(hidden), cache

  def hidden(self, tokens, segment_ids=None, positions=None, cache=None) -> Any:
    """`[B, T, D]` after the last norm, for a loss that takes the head in chunks."""
    mask, index, layers_cache, slots = None, None, None, None
    if cache is not None:
      if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
      index = cache["index"]
      slots = jax.lax.dynamic_update_slice(
        cache["segment_ids"], segment_ids.astype(jnp.int32), (0, index)
      )
      # Slots behind the newest token are empty or its future.
      slot = jax.lax.broadcasted_iota(jnp.int32, (tokens.shape[1], slots.shape[1]), 1)
      own = index + jax.lax.broadcasted_iota(jnp.int32, slot.shape, 0)
      same = segment_ids[:, :, None] == slots[:, None, :]
      if positions is None:
        positions = (same & (slot < own)[None]).sum(-1, dtype=jnp.int32)
      mask = same & (slot <= own)[None]
      layers_cache = {"k": cache["k"], "v": cache["v"]}
    elif segment_ids is not None:
      if positions is None:
        positions = restarting_positions(segment_ids)
      causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
      # Padding sees padding, so that no row of the softmax is empty.
      mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & causal[None]
    elif positions is None:
      positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    frequencies = jnp.asarray(rotary_frequencies(self.config))
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    rotary = (jnp.cos(angles), jnp.sin(angles))

    x: Any
    written: Any
    x, written = self.layers(self.embed(tokens), rotary, mask, index, layers_cache)
    x = self.final_norm(x)
    if cache is None:
      return x
    index = cache["index"] + tokens.shape[1]
    return x, {"k": written["k"], "v": written["v"], "segment_ids": slots, "index": index}

  def logits(self, hidden: jax.Array) -> jax.Array:
    """`[..., D] → [..., V]` float32: the head."""
    if self.config.tie_embeddings:
      return self.embed.attend(hidden)
    return self.head(hidden)


def init_cache(
  config: TransformerConfig, batch_size: int, length: int, dtype: DTypeLike = jnp.bfloat16
) -> Cache:
  """An empty KV cache of `length` slots a row: 2 · L · B · S · Hkv · h elements of `dtype`."""
  shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
  return {
    "k": jnp.zeros(shape, dtype),
    "v": jnp.zeros(shape, dtype),
    "segment_ids": jnp.zeros((batch_size, length), jnp.int32),
    "index": jnp.zeros((), jnp.int32),
  }

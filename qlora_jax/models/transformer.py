"""One decoder for every supported family, scanned over its layers.

B batch, T time, S cache slots, D model width, H heads, h head width, V vocabulary. What
differs between families is data in TransformerConfig; how their files name things stands in
`families`. Layers that differ from each other (sliding windows, rotary bases) do so by data
that the scan reads: a model of 60 layers lowers to the same program as one of 12 (but where
training is told to compute them in a row: `Transformer.unroll`).
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.linen import (
  NUMBER,
  STACKED,
  Embed,
  QDense,
  TiedHead,
  lend_stacks,
  plain_weight,
)
from qlora_jax.matmul import sharded, stacked
from qlora_jax.models import remat
from qlora_jax.models.attention import AttentionName, Case, Visible, attend, choose
from qlora_jax.models.mlp import ACTIVATIONS, MLP, Experts, in_chunks
from qlora_jax.models.remat import RematPolicy
from qlora_jax.models.rope import Rope, rotate
from qlora_jax.quantized_tensor import QuantizedTensor

# The KV cache: {"k", "v": [L, B, Hkv, S, h], "segment_ids", "positions": [B, S], "index": []}.
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """In what the layers of one model may differ.

  Attributes:
    window: a token sees itself and the `window` − 1 before it; None for all before it.
    rope: its rotary positions; None for none.
  """

  window: int | None = None
  rope: Rope | None = dataclasses.field(default_factory=Rope)

  def __post_init__(self):
    if self.window is not None and self.window < 1:
      raise ValueError(f"window: {self.window}; a token sees at least itself")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The architecture, in the terms of Hugging Face's config.json.

  Attributes:
    layer_pattern: the kinds of the layers, repeated until there are `num_layers`.
    attention_bias, output_bias, mlp_bias: biases of q, k and v; of o; of the MLP.
    fused_projections: q, k and v are one projection `qkv`, gate and up one `gate_up`.
    qk_norm: RMS norms of queries and keys: of each head, or over all heads ("full").
    query_scale: what q · k is multiplied by; None for 1 / √h.
    pre_norms, post_norms: norms of what enters attention and MLP, and of what leaves them.
    unit_offset: norms multiply by 1 + scale.
    embedding_scale: what the looked-up embeddings are multiplied by.
    attention_softcap, final_softcap: c · tanh(logits / c).
    num_experts: 0 for one dense MLP; else `intermediate_size` is that of an expert.
    experts_per_token: of those, how many a token goes through.
    normalize_experts: whether a token's weights of its experts are made to sum to 1.
    hf_json: the config.json that this was read from, which `hf` writes again.
    hf_directory: where that lies, with the tokenizer that `hf` copies.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-5
  layer_pattern: tuple[LayerKind, ...] = (LayerKind(),)
  tie_embeddings: bool = False
  max_position_embeddings: int = 2048
  activation: str = "silu"
  attention_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  fused_projections: bool = False
  qk_norm: Literal["head", "full"] | None = None
  query_scale: float | None = None
  pre_norms: bool = True
  post_norms: bool = False
  unit_offset: bool = False
  embedding_scale: float | None = None
  attention_softcap: float | None = None
  final_softcap: float | None = None
  num_experts: int = 0
  experts_per_token: int = 0
  normalize_experts: bool = True
  model_type: str = "llama"
  hf_json: str | None = dataclasses.field(default=None, compare=False, repr=False)
  hf_directory: str | None = dataclasses.field(default=None, compare=False, repr=False)

  def __post_init__(self):
    experts = ("num_experts", "experts_per_token")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      least = 0 if field.name in experts else 1
      if field.type in (int, "int") and value < least:
        raise ValueError(f"{field.name}: {value}; at least {least}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads: {self.num_kv_heads}; divides num_heads, which is {self.num_heads}"
      )
    for name in ("norm_eps", "embedding_scale", "attention_softcap", "final_softcap"):
      value = getattr(self, name)
      if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{name}: {value}; above 0")
    if self.head_dim % 2:
      raise ValueError(f"head_dim: {self.head_dim}; rotary embeddings rotate pairs, so it is even")
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation: {self.activation!r}; one of {', '.join(ACTIVATIONS)}")
    if not self.layer_pattern:
      raise ValueError("layer_pattern: empty; at least one kind of layer")
    if bool(self.num_experts) != bool(self.experts_per_token):
      raise ValueError(
        f"num_experts: {self.num_experts} with experts_per_token: {self.experts_per_token}; both "
        "are 0, or neither"
      )
    if self.experts_per_token > self.num_experts:
      raise ValueError(
        f"experts_per_token: {self.experts_per_token}; at most num_experts, {self.num_experts}"
      )
    widths = {kind.rope.width or self.head_dim for kind in self.layer_pattern if kind.rope}
    if len(widths) > 1 or max(widths, default=0) > self.head_dim:
      raise ValueError(
        f"layer_pattern: rotary widths {sorted(widths)}; one for all layers, at most head_dim, "
        f"which is {self.head_dim}"
      )

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The distinct kinds of layers."""
    return tuple(dict.fromkeys(self.layer_pattern[: self.num_layers]))

  @property
  def kind_of_layer(self) -> tuple[int, ...]:
    """The index in `kinds` of each layer."""
    pattern = self.layer_pattern
    return tuple(self.kinds.index(pattern[i % len(pattern)]) for i in range(self.num_layers))

  @property
  def windows(self) -> tuple[int | None, ...]:
    """The window of each of `kinds`."""
    return tuple(kind.window for kind in self.kinds)

  @property
  def rotates_cached_keys(self) -> bool:
    """Whether keys are cached as they are before rotation, since a longer call turns them anew."""
    return any(kind.rope is not None and kind.rope.depends_on_length for kind in self.kinds)


def restarting_positions(segment_ids: jax.Array) -> jax.Array:
  """`[B, T]` positions that count from 0 in each run of equal segment ids."""
  index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
  starts = segment_ids[:, 1:] != segment_ids[:, :-1]
  starts = jnp.pad(starts, ((0, 0), (1, 0)), constant_values=True)
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


class RMSNorm(nn.Module):
  """x / √(mean(x²) + eps) · (offset + scale), in float32, rounded once."""

  eps: float
  dtype: DTypeLike
  offset: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.constant(1 - self.offset)
    scale = plain_weight(self, "scale", init, x.shape[-1:]).astype(jnp.float32)
    if self.offset:
      scale = scale + np.float32(self.offset)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
    scale = jax.lax.broadcast_in_dim(scale, x.shape, (x.ndim - 1,))
    return (x * scale).astype(self.dtype)


def _through_cache(cache: Cache, k: jax.Array, v: jax.Array) -> tuple[Cache, jax.Array, jax.Array]:
  """Writes the new keys and values `[B, T, G, h]` of a layer into the cache of all layers.

  Returns:
    The cache, which XLA writes in place, and the keys and values that are seen, `[B, S, G, h]`:
    those of the layer's cache, or where its index is None, since it was empty, the new ones.
  """
  layer, index = cache["layer"], cache["index"]

  def written(name: str, new: jax.Array) -> jax.Array:
    new = new.swapaxes(1, 2)[None].astype(cache[name].dtype)
    return jax.lax.dynamic_update_slice(
      cache[name], new, (layer, 0, 0, 0 if index is None else index, 0)
    )

  def of_layer(stack: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False).swapaxes(1, 2)

  cache = {**cache, "k": written("k", k), "v": written("v", v)}
  if index is None:
    return cache, k, v
  return cache, of_layer(cache["k"]), of_layer(cache["v"])


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: TransformerConfig
  dtype: DTypeLike
  implementation: str | None
  attention: AttentionName | None

  @nn.compact
  def __call__(self, x, rotary, visible, kind, cache):
    config = self.config

    def project(name: str, features: int, x: jax.Array, use_bias: bool) -> jax.Array:
      return QDense(
        features,
        use_bias=use_bias,
        dtype=self.dtype,
        implementation=self.implementation,
        partition=sharded.ROWS if name == "o" else sharded.COLUMNS,
        name=name,
      )(x)

    def norm(name: str, x: jax.Array) -> jax.Array:
      offset = float(config.unit_offset)
      return RMSNorm(config.norm_eps, self.dtype, offset, name=f"{name}_norm")(x)

    counts = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    widths = {name: count * config.head_dim for name, count in counts.items()}
    if config.fused_projections:
      q, k, _ = widths.values()
      fused = project("qkv", sum(widths.values()), x, config.attention_bias)
      flat = dict(zip(widths, jnp.split(fused, [q, q + k], axis=-1), strict=True))
    else:
      flat = {name: project(name, widths[name], x, config.attention_bias) for name in widths}
    if config.qk_norm == "full":
      flat |= {name: norm(name, flat[name]) for name in ("q", "k")}
    heads = {
      name: y.reshape(*y.shape[:-1], counts[name], config.head_dim) for name, y in flat.items()
    }
    if config.qk_norm == "head":
      heads |= {name: norm(name, heads[name]) for name in ("q", "k")}
    q, k, v = heads.values()

    if rotary is not None:
      q = rotate(q, *rotary["q"])
      if not config.rotates_cached_keys:
        k = rotate(k, *rotary["k"])
    whole = None
    if cache is not None:
      cache, k, v = _through_cache(cache, k, v)
      if cache["index"] is not None and cache["k"].dtype == q.dtype:
        whole = (cache["k"], cache["v"], cache["layer"])
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    if rotary is not None and config.rotates_cached_keys:
      k, whole = rotate(k, *rotary["k"]), None
    q, k, v = remat.named(remat.QKV, q, k, v)
    y = attend(
      q,
      k,
      v,
      visible,
      windows=config.windows,
      kind=kind,
      scale=config.query_scale,
      softcap=config.attention_softcap,
      implementation=self.attention,
      cache=whole,
    )
    y = y.reshape(*y.shape[:-2], widths["q"])
    return project("o", config.hidden_size, y, config.output_bias), cache


class Block(nn.Module):
  """One decoder layer, in the form that `nn.scan` wants: carry, what is shared, what is its own."""

  config: TransformerConfig
  dtype: DTypeLike
  implementation: str | None
  attention: AttentionName | None
  mlp_chunk: int | None

  paired: bool = False

  @nn.compact
  def __call__(self, carry, rotary, visible, index, kind, layer):
    config = self.config
    x, stacks = carry
    x = x if self.paired else remat.named(remat.INPUT, x)

    def norm(name: str, wanted: bool, x: jax.Array) -> jax.Array:
      if not wanted:
        return x
      return RMSNorm(config.norm_eps, self.dtype, float(config.unit_offset), name=name)(x)

    if kind is not None:
      rotary = jax.tree.map(
        lambda each: jax.lax.dynamic_index_in_dim(each, kind, 0, keepdims=False), rotary
      )
    cache = None if stacks is None else {**stacks, "index": index, "layer": layer}
    y = norm("attn_norm", config.pre_norms, x)
    y, cache = Attention(config, self.dtype, self.implementation, self.attention, name="attn")(
      y, rotary, visible, kind, cache
    )
    x = remat.named(remat.MIDDLE, x + norm("attn_post_norm", config.post_norms, y))
    y = self._mlp(norm("mlp_norm", config.pre_norms, x))
    x = x + norm("mlp_post_norm", config.post_norms, y)
    return (x, None if cache is None else {name: cache[name] for name in ("k", "v")}), None

  def _mlp(self, x: jax.Array) -> jax.Array:
    config = self.config
    if not config.num_experts:
      mlp = MLP(
        config.intermediate_size,
        config.activation,
        config.mlp_bias,
        config.fused_projections,
        self.dtype,
        self.implementation,
        name="mlp",
      )
      return mlp(x) if self.mlp_chunk is None else in_chunks(mlp, x, self.mlp_chunk)
    # Not below "mlp", where the patterns of projections would take it in: it stays in 16 bits.
    router = QDense(config.num_experts, dtype=self.dtype, output_dtype=jnp.float32, name="router")
    return Experts(
      config.num_experts,
      config.experts_per_token,
      config.intermediate_size,
      config.normalize_experts,
      config.activation,
      self.dtype,
      self.implementation,
      name="mlp",
    )(x, router(x))


class Pair(nn.Module):
  """Two decoder layers, as `Block`, whose weights have a leading axis of 2."""

  config: TransformerConfig
  dtype: DTypeLike
  implementation: str | None
  attention: AttentionName | None
  mlp_chunk: int | None

  def setup(self):
    layers = _scanned(remat.block(Block, "full"), 2)
    rest = (self.implementation, self.attention, self.mlp_chunk, True)
    self.layers = layers(self.config, self.dtype, *rest)
    nn.share_scope(self, self.layers)  # a layer's path is the same in a pair

  def __call__(self, carry, *rest):
    x, stacks = carry
    return self.layers((remat.named(remat.INPUT, x), stacks), *rest)


def _scanned(block: Any, length: int) -> Any:
  """`block`, a layer or a pair, run one after another over what their variables are stacks of."""
  shared = nn.broadcast
  return nn.scan(
    block,
    variable_axes={"params": 0, "frozen": 0, "constants": 0, NUMBER: 0},
    variable_broadcast=STACKED,
    split_rngs={"params": True, "dropout": True},
    in_axes=(shared, shared, shared, 0, 0),  # pyright: ignore[reportArgumentType]
    length=length,
  )


class _Layer(nn.Module):
  """A layer by the path that it has in a scan."""

  layers: nn.Module

  def __call__(self, *operands):
    return self.layers(*operands)


def _parts(tree: Any, length: int) -> list[Any]:
  """Stacks `[L, …]` as one tree for each layer."""
  # Of a split, unlike of slices, the gradient is one concatenation.
  leaves, structure = jax.tree.flatten(tree)
  parts = [[part[0] for part in jax.lax.split(leaf, (1,) * length)] for leaf in leaves]
  return [structure.unflatten(leaf[i] for leaf in parts) for i in range(length)]


def _of_base(block: Any, index: int) -> Any:
  """`block`, which takes its layer out of the base's stacks.

  Within what a policy computes again: outside of it a slice would be a copy that is kept.
  """

  def layer(variables):
    return jax.tree.map(
      lambda w: stacked.layer_of(w, index),
      variables,
      is_leaf=lambda w: isinstance(w, QuantizedTensor),
    )

  return nn.map_variables(block, "frozen", layer)


def _in_pairs(tree: Any) -> Any:
  """Every `[L, …]` of a tree as `[L / 2, 2, …]`."""
  return jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), tree)


class Transformer(nn.Module):
  """A causal language model over a frozen base.

  `model.apply({"params": …, "constants": …, "frozen": …}, tokens)`; params and constants may
  be {}. Dropout only with rngs={"dropout": key}.

  Attributes:
    config: the architecture.
    dtype: of activations and of the products' operands. Norms, softmax and logits are float32.
    remat: what the backward pass computes again (see `remat`).
    implementation: of `quantized_matmul`.
    attention: an implementation of `attention.attend`; None takes what `attention.choose` says.
    mlp_chunk: of each row, tokens whose wide activations in an MLP exist at once, at most (see
      `mlp.chunk_length`); None for all. The backward pass computes a chunk's again, and each draws
      a dropout mask of its own. (Not of experts, which go by tiles as it is.)
    unroll: whether training computes the layers in a row, not in a loop, which would copy what its
      policy keeps of each to a stack: faster, the more is kept, but compiling takes longer the more
      layers there are. (Each draws another dropout mask. With a cache there is always a loop.)
  """

  config: TransformerConfig
  dtype: DTypeLike = jnp.bfloat16
  remat: RematPolicy = "none"
  implementation: str | None = None
  attention: AttentionName | None = None
  mlp_chunk: int | None = None
  unroll: bool = False

  def setup(self):
    config = self.config
    if self.unroll and self.remat == "offload_pairs":
      raise ValueError("unroll: True with remat 'offload_pairs', whose pairs are a loop's")
    if self.mlp_chunk is not None and self.mlp_chunk < 1:
      raise ValueError(f"mlp_chunk: {self.mlp_chunk}; at least 1, or None")
    if self.remat == "offload_pairs" and config.num_layers % 2:
      # When its weights are made as well: not after a base was loaded.
      raise ValueError(f"remat: 'offload_pairs' of {config.num_layers} layers; an even number")
    self.embed = Embed(
      config.vocab_size, config.hidden_size, self.dtype, scale=config.embedding_scale
    )
    if not self._paired:
      policy = "full" if self.remat == "offload_pairs" else self.remat
      layers = _scanned(remat.block(Block, policy), config.num_layers)
    else:
      layers = _scanned(remat.block(Pair, self.remat), config.num_layers // 2)
      collections = ("params", "frozen", "constants", NUMBER)
      layers = nn.map_variables(layers, collections, _in_pairs)
    # Those that are being made have no stacks yet.
    layers = layers if self.is_initializing() else lend_stacks(layers)
    self.layers = layers(config, self.dtype, *self._how)
    self.final_norm = RMSNorm(config.norm_eps, self.dtype, float(config.unit_offset))
    if config.tie_embeddings:
      self.head: Any = TiedHead(self.dtype)
    else:
      self.head = QDense(
        config.vocab_size,
        dtype=self.dtype,
        output_dtype=jnp.float32,
        implementation=self.implementation,
      )

  @property
  def _how(self) -> tuple[str | None, AttentionName | None, int | None]:
    """What a layer is told beside its config and dtype."""
    return self.implementation, self.attention, self.mlp_chunk

  @property
  def _paired(self) -> bool:
    # Weights that are being made have the axis of layers alone.
    return self.remat == "offload_pairs" and not self.is_initializing()

  def __call__(self, tokens, segment_ids=None, positions=None, cache=None, *, fresh=False):
    """Logits of the next token.

    Args:
      tokens: `[B, T]` ids. Out of range is undefined.
      segment_ids: `[B, T]`; a token sees those before it with the same id. 0 is padding, left
        or right. All 1 where absent.
      positions: `[B, T]`; where absent they count from 0 in each segment (with a cache: from
        the tokens of the segment that are in it). Sliding windows are of positions.
      cache: from `init_cache`, or an earlier call; the new keys are written behind the old.
      fresh: that the cache is one of `init_cache`, which only the caller knows: then attention is
        that of training, among the new tokens, and not over all slots.

    Returns:
      `[B, T, V]` float32; with a cache, (logits, the new cache).
    """
    if cache is None:
      return self.logits(self.hidden(tokens, segment_ids, positions))
    hidden, cache = self.hidden(tokens, segment_ids, positions, cache, fresh=fresh)
    return self.logits(hidden), cache

  def hidden(self, tokens, segment_ids=None, positions=None, cache=None, *, fresh=False) -> Any:
    """`[B, T, D]` after the last norm, for a loss that takes the head in chunks."""
    x, written = self.blocks(self.embed(tokens), segment_ids, positions, cache, fresh=fresh)
    x = self.final_norm(x)
    return x if cache is None else (x, written)

  def blocks(self, x, segment_ids=None, positions=None, cache=None, *, fresh=False) -> Any:
    """`[B, T, D]` embedded tokens through all layers: (`[B, T, D]`, the new cache or None)."""
    if cache is None:
      positions, keys, visible = self._positions(x, segment_ids, positions)
    else:
      positions, keys, visible = self._cached_positions(x, segment_ids, positions, cache, fresh)
    seen = {"positions": positions, "segment_ids": segment_ids} if fresh else keys
    segments = seen.get("segment_ids", segment_ids)
    real = True if segments is None else segments != 0
    rotary = self._rotary(positions, seen["positions"], real)
    kind = None
    if len(self.config.kinds) > 1:
      kind = jnp.asarray(self.config.kind_of_layer, jnp.int32)

    index = layer = stacks = None
    if cache is not None:
      index = None if fresh else cache["index"]
      layer = jnp.arange(self.config.num_layers)
      # In the carry, not an output of each layer: that would be a second cache, written anew.
      stacks = {"k": cache["k"], "v": cache["v"]}
    by_layer = (kind, layer)
    if self.unroll and cache is None and not self.is_initializing():
      return self._in_a_row(x, rotary, visible, kind), None
    if self._paired:
      by_layer = _in_pairs(by_layer)
    (y, written), _ = self.layers((x, stacks), rotary, visible, index, *by_layer)
    if cache is None:
      return y, None
    return y, {**written, **keys, "index": cache["index"] + x.shape[1]}

  def _in_a_row(self, x, rotary, visible, kind):
    """As the scan over layers, of which each is traced for itself."""
    length = self.config.num_layers
    variables = self.layers.variables
    own = {name: _parts(variables.get(name, {}), length) for name in ("params", "constants")}
    keys = None
    if self.has_rng("dropout"):
      keys = jax.random.split(self.make_rng("dropout"), length)
    for i in range(length):
      block = remat.block(_of_base(Block, i), self.remat, scanned=False)
      layer = _Layer(block(self.config, self.dtype, *self._how, parent=None), parent=None)
      trees = {"frozen": variables.get("frozen", {}), **{name: own[name][i] for name in own}}
      (x, _), _ = layer.apply(  # pyright: ignore
        {name: {"layers": tree} for name, tree in trees.items()},
        *((x, None), rotary, visible, None, None if kind is None else kind[i], None),
        rngs=None if keys is None else {"dropout": keys[i]},
      )
    return x

  def _positions(self, x, segment_ids, positions):
    """Positions of queries, those of keys, and which keys each query may see.

    Returns:
      `[B or 1, T]` int32; {"positions": `[B or 1, S]`, …}; Visible.
    """
    # Padding sees padding, so that no row of the softmax is empty.
    segments = None if segment_ids is None else (segment_ids, segment_ids)
    if positions is None and segment_ids is None:
      # Of one row: the rows are alike.
      positions = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
      return positions, {"positions": positions}, Visible()
    if positions is None:
      positions = restarting_positions(segment_ids)  # pyright: ignore[reportArgumentType]
    return positions, {"positions": positions}, Visible(None, segments, (positions, positions))

  def _cached_positions(self, x, segment_ids, positions, cache, fresh):
    """As `_positions`, the keys being those of the cache with the new ones in their slots."""
    plain = segment_ids is None and positions is None
    if segment_ids is None:
      segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    index = cache["index"]

    def write(name: str, values: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice(cache[name], values.astype(jnp.int32), (0, index))

    slots = write("segment_ids", segment_ids)
    if positions is None:
      slot = jax.lax.broadcasted_iota(jnp.int32, (x.shape[1], slots.shape[1]), 1)
      own = index + jax.lax.broadcasted_iota(jnp.int32, slot.shape, 0)
      same = segment_ids[:, :, None] == slots[:, None, :]
      positions = (same & (slot < own)[None]).sum(-1, dtype=jnp.int32)
    positions = jnp.broadcast_to(positions, x.shape[:2])
    keys = {"segment_ids": slots, "positions": write("positions", positions)}
    if fresh:
      same = Visible(None, (segment_ids, segment_ids), (positions, positions))
      return positions, keys, Visible() if plain else same
    # Slots behind the newest token are empty or its future.
    visible = Visible(index, (segment_ids, slots), (positions, keys["positions"]))
    return positions, keys, visible

  def _rotary(self, positions, key_positions, real):
    """The rotary angles of each kind of layer, stacked where there are several; None for none.

    Args:
      real: `[B, S]`, which keys are no padding; True for all.
    """
    config = self.config
    length = None
    if config.rotates_cached_keys:
      length = key_positions.max(-1, where=real, initial=0) + 1
    turned = {"q": positions, "k": key_positions if config.rotates_cached_keys else positions}
    width = next((kind.rope.width for kind in config.kinds if kind.rope), None) or config.head_dim

    def angles(kind: LayerKind, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
      if kind.rope is not None:
        return kind.rope.angles(positions, config.head_dim, length)
      shape = (*positions.shape, width // 2)
      return jnp.ones(shape), jnp.zeros(shape)

    kinds = list(config.kinds)
    if len(kinds) == 1 and kinds[0].rope is None:
      return None
    rotary = [{name: angles(kind, each) for name, each in turned.items()} for kind in kinds]
    if len(kinds) == 1:
      return rotary[0]
    return jax.tree.map(lambda *each: jnp.stack(each), *rotary)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """`[..., D] → [..., V]` float32: the head."""
    if self.config.tie_embeddings:
      logits = self.head(hidden, self.embed.embedding, self.embed.tokens)
    else:
      logits = self.head(hidden)
    cap = self.config.final_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def attention_name(model: Transformer, seq_len: int, *, packed: bool) -> AttentionName:
  """How `model` computes attention in training, on rows of `seq_len` tokens (see `attention`).

  Args:
    model: its config, dtype and choice of attention are read.
    seq_len: T.
    packed: whether rows hold several documents.

  Raises:
    ValueError: see `attention.choose`.
  """
  return choose(training_case(model, seq_len, packed=packed), model.attention)


def training_case(model: Transformer, seq_len: int, *, packed: bool) -> Case:
  """The case of attention in training; `attention_name`'s arguments."""
  config = model.config
  return Case(
    queries=seq_len,
    keys=seq_len,
    width=config.head_dim,
    dtype=jnp.dtype(model.dtype),
    packed=packed,
    windowed=any(window is not None for window in config.windows),
    moved=packed,
    softcap=config.attention_softcap is not None,
  )


def init_cache(
  config: TransformerConfig, batch_size: int, length: int, dtype: DTypeLike = jnp.bfloat16
) -> Cache:
  """An empty KV cache of `length` slots a row: 2 · L · B · Hkv · S · h elements of `dtype`."""
  shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_dim)
  return {
    "k": jnp.zeros(shape, dtype),
    "v": jnp.zeros(shape, dtype),
    "segment_ids": jnp.zeros((batch_size, length), jnp.int32),
    "positions": jnp.zeros((batch_size, length), jnp.int32),
    "index": jnp.zeros((), jnp.int32),
  }

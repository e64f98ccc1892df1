"""LoRA: low-rank adapters as a pytree of their own.

For a frozen weight W `[K, N]` of the layer at path p, `params[p]` holds A `[K, r]` and B `[r, N]`:

  y = x · W + s · (x · A) · B

B starts at zero, so that step 0 computes the base exactly. `constants[p]` holds what belongs
to the adapter and never trains: its scaling s, its rank, its dropout rate. In a stack of
layers every leaf has the layer axis; ranks that differ by layer are padded with zeros in both
A and B, which stay zero, since the gradient of each vanishes with the other.

Beside A and B there may be a `lora_bias` b `[N]`, and DoRA's `magnitude` m `[N]`:

  y = x · W + s · (x · A · B + b)
  y = m / ‖W + s · A · B‖ · (x · W + s · x · A · B)     the norm is over K, and detached

A table `[V, D]` that is looked up has A `[V, r]` and B `[r, D]`: (table + s · A · B)[ids]. A head
that is tied to the table has its own adapter, as if its kernel, tableᵀ, stood at `head/kernel`;
neither sees the other's. And a full leaf in `params` at the path of a base weight takes its place.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax import tree_paths
from qlora_jax.quantization import dequantize
from qlora_jax.quantized_tensor import is_quantized

# The least normal float32: a smaller squared norm counts as zero.
_TINY = np.float32(2.0**-126)

# Read by a lookup, not by a product.
_LOOKUP = "/embedding"

# A base with the one and not the other ties them.
TABLE, HEAD = "embed/embedding", "head/kernel"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Which weights get adapters, and of what size.

  Attributes:
    rank: r, columns of A.
    alpha: s = alpha / r, or alpha / √r where `rank_stabilized`.
    targets: path patterns (`tree_paths`) of the weights that get one. The token table, and a head
      tied to it, only by their names, `embed` and `head`: no wildcard takes them in.
    rank_stabilized: rsLoRA, Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732.
    dropout: probability that an element of the adapter's input is zeroed, where the model
      is given a dropout key. Lookups have none.
    rank_pattern: path pattern → rank, for some of the targets.
    alpha_pattern: path pattern → alpha.
    use_dora: DoRA, Liu et al., 2024, https://arxiv.org/abs/2402.09353.
    lora_bias: whether an adapter has a bias.
    modules_to_save: path patterns of weights, or of layers with all their weights, that are
      trained in full. `head` gives a tied head a kernel of its own.

  Raises:
    ValueError: naming the field, its value and the rule.

  References:
    Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = ("*/attn/*", "*/mlp/*")
  rank_stabilized: bool = False
  dropout: float = 0.0
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  use_dora: bool = False
  lora_bias: bool = False
  modules_to_save: tuple[str, ...] = ()

  def __post_init__(self):
    for name in ("targets", "modules_to_save"):
      value = getattr(self, name)
      if isinstance(value, str):
        raise ValueError(f"{name}: {value!r}; a tuple of patterns, such as ('*/attn/*',)")
      object.__setattr__(self, name, tuple(value))
    object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
    object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))
    if not self.targets:
      raise ValueError("targets: empty; at least one pattern")
    for name, rank in {"rank": self.rank, **_named("rank_pattern", self.rank_pattern)}.items():
      if rank < 1:
        raise ValueError(f"{name}: {rank}; a rank is at least 1")
    for name, alpha in {"alpha": self.alpha, **_named("alpha_pattern", self.alpha_pattern)}.items():
      if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{name}: {alpha}; an alpha is above 0")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout: {self.dropout}; a probability in [0, 1)")

  def scaling(self, rank: int, alpha: float) -> float:
    """s, of an adapter with this rank and alpha."""
    return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _named(field: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
  return {f"{field}[{key!r}]": value for key, value in pattern.items()}


def module(path: str) -> str:
  """The path of a weight's layer, below which its adapter stands: `embed` for `embed/embedding`."""
  return tree_paths.module(path).removesuffix(_LOOKUP)


def is_lookup(path: str) -> bool:
  """Whether the weight at `path` is looked up, not multiplied by."""
  return path.endswith(_LOOKUP)


def weights(frozen: Any) -> dict[str, Any]:
  """The leaves of a base by path; of a head that is tied, which has none, the shape of one."""
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  if TABLE in flat and HEAD not in flat:
    flat[HEAD] = jax.ShapeDtypeStruct(flat[TABLE].shape[::-1], flat[TABLE].dtype)
  return flat


def is_tied(frozen: Any) -> bool:
  """Whether the head of `frozen` is its token table."""
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  return TABLE in flat and HEAD not in flat


def init(key: jax.Array, frozen: Any, cfg: LoRAConfig) -> tuple[dict, dict]:
  """Makes adapters for the weights of `frozen` that the targets match.

  A ~ U(−1/√K, 1/√K) and B = 0; of a lookup, A = 0 and B ~ N(0, 1); as PEFT draws them. DoRA's m =
  ‖W‖. The draw for a weight depends on the key and its path alone: adding a target changes no
  other adapter.

  Args:
    key: a JAX random key.
    frozen: the base; packed or plain weights `[..., K, N]` of the layers.
    cfg: what to make.

  Returns:
    (params, constants), nested dicts. Below each target's layer, params has `lora_a`
    `[..., K, r]` and `lora_b` `[..., r, N]`, and `magnitude` or `lora_bias` `[..., N]` where cfg
    asks for them, float32; constants as the function of that name says. Weights to be trained in
    full are copied to their own paths in params, float32.

  Raises:
    ValueError: a pattern that matches no weight, patterns that disagree on one, a rank
      that exceeds min(K, N), or what a lookup's adapter cannot have.
  """
  fixed = tree_paths.leaves(constants(frozen, cfg))
  params = {}
  for path, (leaf, ranks, _) in _plan(frozen, cfg).items():
    layer = module(path)
    *leading, k, n = leaf.shape
    rank = max(ranks)
    # crc32, not hash(): Python's differs from process to process.
    path_key = jax.random.fold_in(key, np.uint32(zlib.crc32(layer.encode())))
    shape_a, shape_b = (*leading, k, rank), (*leading, rank, n)
    if is_lookup(path):
      a = jnp.zeros(shape_a, jnp.float32)
      b = _padded(jax.random.normal(path_key, shape_b, jnp.float32), ranks, -2)
    else:
      bound = 1 / math.sqrt(k)
      a = _padded(jax.random.uniform(path_key, shape_a, jnp.float32, -bound, bound), ranks, -1)
      b = jnp.zeros(shape_b, jnp.float32)
    params |= {f"{layer}/lora_a": a, f"{layer}/lora_b": b}
    if cfg.lora_bias:
      params[f"{layer}/lora_bias"] = jnp.zeros((*leading, n), jnp.float32)
    if cfg.use_dora:
      # A copy: a step that is given params to overwrite must not take the constant with it.
      params[f"{layer}/magnitude"] = jnp.array(fixed[f"{layer}/weight_norm"], copy=True)
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  for path in _saved(frozen, cfg):
    w = flat[TABLE].T if path not in flat else flat[path]
    w = dequantize(w) if is_quantized(w) else w
    params[path] = jnp.array(w, jnp.float32, copy=True)
  return tree_paths.nest(params), tree_paths.nest(fixed)


def _padded(x: jax.Array, ranks: list[int], axis: int) -> jax.Array:
  """x `[L, ...]` with zeros beyond each layer's rank along `axis`."""
  if min(ranks) == x.shape[axis]:
    return x
  used = np.arange(x.shape[axis]) < np.asarray(ranks)[:, None]
  shape = [len(ranks), *[1] * (x.ndim - 1)]
  shape[axis] = x.shape[axis]
  return jnp.where(jnp.asarray(used.reshape(shape)), x, 0)


def constants(frozen: Any, cfg: LoRAConfig) -> dict:
  """What `init` returns beside the params.

  Returns:
    Nested dicts: below each target's layer `scaling` (float32), `rank` (int32), where cfg.dropout
    > 0 (and not of a lookup) `dropout`, each `[L]` in a stack, else `[]`; for DoRA `weight_norm`,
    ‖W‖ `[..., N]`, 0 in layers of a stack that are no target.

  Raises:
    ValueError: see `init`.
  """
  _saved(frozen, cfg)
  fixed = {}
  for path, (_, ranks, scalings) in _plan(frozen, cfg).items():
    values = {
      "scaling": np.asarray(scalings, np.float32),
      "rank": np.asarray(ranks, np.int32),
    }
    if cfg.dropout > 0 and not is_lookup(path):
      values["dropout"] = np.full(len(ranks), cfg.dropout, np.float32)
    stacked = tree_paths.is_stacked(path)
    for name, value in values.items():
      fixed[f"{module(path)}/{name}"] = jnp.asarray(value if stacked else value[0])
    if cfg.use_dora:
      norm = _norm(base_weight(frozen, path))
      if 0 in ranks:
        targeted = np.reshape(np.asarray(ranks) > 0, (-1, *[1] * (norm.ndim - 1)))
        norm = jnp.where(jnp.asarray(targeted), norm, 0)
      fixed[f"{module(path)}/weight_norm"] = norm
  return tree_paths.nest(fixed)


def base_weight(frozen: Any, path: str) -> Any:
  """The leaf of a base at `path`; of a tied head tableᵀ."""
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  return flat[TABLE].T if path == HEAD and HEAD not in flat else flat[path]


def _norm(w: Any) -> jax.Array:
  """‖W‖ over K, `[..., N]` float32; of a stack, one dense layer at a time."""
  if is_quantized(w) or isinstance(w, jax.Array | np.ndarray):
    return _norm_in_memory(w)
  # It lies in a file (`hf.stored`), and indexing reads a part.
  if w.ndim > 2:
    # Waits, so that layers are not read before those ahead of them are done with.
    norms = [jax.block_until_ready(_norm_in_memory(w[layer])) for layer in range(w.shape[0])]
    return jnp.stack(norms)
  return _norm_in_memory(w[()])


@jax.jit
def _norm_in_memory(w: Any) -> jax.Array:
  if w.ndim > 2:
    return jax.lax.map(_norm_in_memory, w)
  w = dequantize(w) if is_quantized(w) else w.astype(jnp.float32)
  return jnp.sqrt(jnp.square(w).sum(0))


def _saved(frozen: Any, cfg: LoRAConfig) -> list[str]:
  """The paths of the leaves that are trained in full."""
  flat = weights(frozen)
  layers = {path: tree_paths.layers(path, leaf) for path, leaf in flat.items()}

  def matches(pattern: str, layer: str) -> bool:
    if layer == HEAD and is_tied(frozen):
      return pattern in (HEAD, module(HEAD))
    return _matches(pattern, layer) or tree_paths.matches(pattern, layer.rpartition("/")[0])

  saved = []
  for pattern in cfg.modules_to_save:
    hit = False
    for path, own in layers.items():
      chosen = [layer for layer in own if matches(pattern, layer)]
      if not chosen:
        continue
      hit = True
      if len(chosen) < len(own):
        raise ValueError(
          f"lora.modules_to_save: pattern {pattern!r} matches {len(chosen)} of the {len(own)} "
          f"layers of {path}; a stack is trained in full as a whole, or not"
        )
      saved.append(path)
    if not hit:
      everything = [layer for own in layers.values() for layer in own]
      raise ValueError(f"lora.modules_to_save: {tree_paths.no_match(pattern, everything)}")
  targeted = _plan(frozen, cfg)
  for path in saved:
    if path in targeted:
      raise ValueError(
        f"lora.modules_to_save: {module(path)}: a target too; a weight is trained in full or has "
        "an adapter"
      )
  if cfg.use_dora and TABLE in saved and HEAD in targeted and is_tied(frozen):
    raise ValueError(
      f"lora.modules_to_save: {module(TABLE)}: the head is tied to it and has a DoRA adapter, "
      "which needs a weight that stays as it is"
    )
  return list(dict.fromkeys(saved))


def _matches(pattern: str, path: str) -> bool:
  return tree_paths.matches(pattern, path) or tree_paths.matches(pattern, module(path))


def _plan(frozen: Any, cfg: LoRAConfig) -> dict[str, tuple[Any, list[int], list[float]]]:
  """By path of the weight: its shape, each layer's rank (0 where untargeted) and scaling."""
  flat = weights(frozen)
  virtual = {
    path: tree_paths.layers(path, leaf)
    for path, leaf in flat.items()
    if tree_paths.is_matrix(path, leaf)
  }
  layers = [layer for own in virtual.values() for layer in own]

  def targets(pattern: str, layer: str) -> bool:
    if is_lookup(layer) or (layer == HEAD and is_tied(frozen)):
      return pattern in (layer, module(layer))
    return tree_paths.matches(pattern, layer)

  targeted = set()
  for pattern in cfg.targets:
    hit = {layer for layer in layers if targets(pattern, layer)}
    if not hit:
      raise ValueError(f"lora.targets: {tree_paths.no_match(pattern, layers)}")
    targeted |= hit
  for field in ("rank_pattern", "alpha_pattern"):
    for pattern in getattr(cfg, field):
      if not any(_matches(pattern, layer) for layer in targeted):
        raise ValueError(f"lora.{field}: {tree_paths.no_match(pattern, targeted)}")
  for layer in targeted:
    for field in ("use_dora", "lora_bias"):
      if is_lookup(layer) and getattr(cfg, field):
        raise ValueError(f"lora.{field}: True; {module(layer)}, a lookup, takes plain LoRA only")

  plan = {}
  for path, own in virtual.items():
    if not targeted.intersection(own):
      continue
    ranks, scalings = [], []
    for layer in own:
      if layer not in targeted:
        ranks.append(0)
        scalings.append(0.0)
        continue
      rank = _by_pattern("rank_pattern", cfg.rank_pattern, layer, cfg.rank)
      alpha = _by_pattern("alpha_pattern", cfg.alpha_pattern, layer, cfg.alpha)
      limit = min(flat[path].shape[-2:])
      if rank > limit:
        raise ValueError(
          f"{module(layer)}: rank {rank}; at most min(K, N) = {limit} of its weight "
          f"{list(flat[path].shape[-2:])}"
        )
      ranks.append(rank)
      scalings.append(cfg.scaling(rank, alpha))
    plan[path] = (flat[path], ranks, scalings)
  return plan


def _by_pattern(field: str, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
  hits = [pattern for pattern in patterns if _matches(pattern, path)]
  for other in hits[1:]:
    if patterns[other] != patterns[hits[0]]:
      raise ValueError(
        f"lora.{field}: {module(path)}: {hits[0]!r} says {patterns[hits[0]]} and "
        f"{other!r} says {patterns[other]}"
      )
  return patterns[hits[0]] if hits else default


def apply(
  x: jax.Array,
  a: jax.Array,
  b: jax.Array,
  scaling: jax.Array,
  *,
  dropout: jax.Array | None = None,
  key: jax.Array | None = None,
) -> jax.Array:
  """s · (x · A) · B: what an adapter adds to its layer's output.

  Args:
    x: `[..., K]`; the products are in its dtype and accumulate in float32.
    a: `[K, r]`. b: `[r, N]`. scaling: `[]`.
    dropout: `[]`, the rate; used only with a key.
    key: zeroes elements of x with probability `dropout`, scaling up the others.

  Returns:
    `[..., N]` in x's dtype.
  """
  if key is not None and dropout is not None:
    kept = jax.random.uniform(key, x.shape, jnp.float32) >= dropout
    x = jnp.where(kept, x / (1 - dropout).astype(x.dtype), 0)
  return _expand(jnp.matmul(x, a.astype(x.dtype)), b, scaling, x.dtype)


def apply_lookup(
  ids: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array, *, dtype: DTypeLike
) -> jax.Array:
  """s · A[ids] · B: what an adapter adds to a lookup in a table `[V, D]`.

  Args:
    ids: `[...]`. a: `[V, r]`. b: `[r, D]`. scaling: `[]`.
    dtype: of the product's operands and the result; it accumulates in float32.

  Returns:
    `[..., D]`.
  """
  return _expand(jnp.take(a, ids, axis=0).astype(dtype), b, scaling, dtype)


def _expand(h: jax.Array, b: jax.Array, scaling: jax.Array, dtype: DTypeLike) -> jax.Array:
  # s multiplies where the array is narrowest.
  return jnp.matmul((h.astype(jnp.float32) * scaling).astype(dtype), b.astype(dtype))


def dora_scale(
  magnitude: jax.Array,
  weight_norm: jax.Array,
  projected: jax.Array,
  a: jax.Array,
  b: jax.Array,
  scaling: jax.Array,
) -> jax.Array:
  """m / ‖W + s · A · B‖ of each output, by which DoRA multiplies x · (W + s · A · B).

  The norm is over K, and detached: only m has a gradient through this. W is not made dense for
  it: ‖W + sAB‖² = ‖W‖² + 2s ⟨AᵀW, B⟩ + s² ⟨(AᵀA)B, B⟩, each a sum over r. The error is a few
  float32 roundings of the larger of ‖W‖² and ‖sAB‖². An output whose norm is 0 is left as it is:
  its scale is 1.

  Args:
    magnitude: m `[N]`.
    weight_norm: ‖W‖ `[N]`.
    projected: AᵀW `[r, N]`, float32.
    a: `[K, r]`. b: `[r, N]`. scaling: `[]`.

  Returns:
    `[N]`, float32.

  References:
    Liu et al., DoRA, 2024, https://arxiv.org/abs/2402.09353, sections 4.1 and 4.3.
  """
  a, b, weight_norm, projected = jax.lax.stop_gradient(
    (a.astype(jnp.float32), b.astype(jnp.float32), weight_norm, projected)
  )
  gram = jnp.matmul(a.T, a, precision=jax.lax.Precision.HIGHEST)
  own = jnp.matmul(gram, b, precision=jax.lax.Precision.HIGHEST)
  square = jnp.square(weight_norm) + scaling * ((2 * projected + scaling * own) * b).sum(0)
  return _ratio(magnitude, square)


def _ratio(magnitude: jax.Array, square: jax.Array) -> jax.Array:
  """m / ‖·‖ from the squared norm, 1 where that is 0, with finite gradients."""
  usable = square >= _TINY
  norm = jnp.sqrt(jnp.where(usable, square, 1))
  return jnp.where(usable, magnitude.astype(jnp.float32) / norm, 1)


def merge(
  frozen: Any,
  params: Any,
  constants: Any,
  dtype: DTypeLike = jnp.float32,
  *,
  tied: bool | None = None,
) -> Any:
  """The base with its adapters added in, as plain arrays: W + s · A · B, or what DoRA makes of it.

  Computed in float32, rounded once to `dtype`. A full leaf of `params` at a base weight's
  path takes its place. A `lora_bias` is added to the layer's bias.

  Args:
    frozen, params, constants: as the model reads them; params and constants may be {}.
    dtype: of the result.
    tied: whether the head is the token table, said of a part of a base; else `frozen` shows it.

  Returns:
    `frozen`'s tree with an array for each leaf. Where the head is tied to the token table and the
    adapters tell them apart, it has a `head/kernel` of its own: a model that is not tied reads it.

  Raises:
    ValueError: a path of params that is no weight of `frozen`, or a bias for which the base's
      layer has no place.
  """
  full = tree_paths.leaves(params)
  fixed = tree_paths.leaves(constants)
  used = set()

  def merged_leaf(path, w):
    layer, _, name = path.rpartition("/")
    if path in full:
      used.add(path)
      w = full[path]
    if is_quantized(w):
      w = dequantize(w)
    if name == "bias" and f"{layer}/lora_bias" in full:
      used.add(f"{layer}/lora_bias")
      bias = full[f"{layer}/lora_bias"].astype(jnp.float32)
      w = w.astype(jnp.float32) + _leading(fixed[f"{layer}/scaling"], bias) * bias
    layer = module(path)
    if f"{layer}/lora_a" in full and w.ndim >= 2:
      used.update((f"{layer}/lora_a", f"{layer}/lora_b"))
      a, b = (full[f"{layer}/{name}"].astype(jnp.float32) for name in ("lora_a", "lora_b"))
      delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
      scaling = fixed[f"{layer}/scaling"]
      w = w.astype(jnp.float32) + _leading(scaling, delta) * delta
      if f"{layer}/magnitude" in full:
        used.add(f"{layer}/magnitude")
        scale = _ratio(full[f"{layer}/magnitude"], jnp.square(w).sum(-2))
        # Layers of a stack that are no target have no scaling, and a magnitude that means nothing.
        w = w * jnp.where(_leading(scaling, scale) != 0, scale, 1)[..., None, :]
    return jnp.asarray(w, dtype)

  merged = jax.tree_util.tree_map_with_path(
    lambda path, w: merged_leaf(tree_paths.path_string(path), w), frozen, is_leaf=is_quantized
  )
  own = {HEAD, *(f"{module(HEAD)}/{name}" for name in ("lora_a", "lora_bias"))}
  tied = is_tied(frozen) if tied is None else tied
  if tied and not full.keys().isdisjoint(own | {f"{module(TABLE)}/lora_a"}):
    table = full.get(TABLE, tree_paths.leaves(frozen)[TABLE])
    merged = {**merged, module(HEAD): {"kernel": merged_leaf(HEAD, table.T)}}
  for path in sorted(set(full) - used):
    if path.endswith("/lora_bias"):
      raise ValueError(f"merge: {path}: the base's layer has no bias to add it to; keep it apart")
    raise ValueError(f"merge: {path}: the base has no weight there")
  return merged


def _leading(x: jax.Array, like: jax.Array) -> jax.Array:
  """x with axes of 1 added at its end, to go with the leading axes of `like`."""
  return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


def count(params: Any, constants: Any) -> int:
  """Trained parameters, the padding of unequal ranks not counted."""
  total = 0
  ranks = tree_paths.leaves(constants)
  for path, leaf in tree_paths.leaves(params).items():
    layer, _, name = path.rpartition("/")
    if name not in ("lora_a", "lora_b", "lora_bias", "magnitude"):
      total += leaf.size
      continue
    rank = np.asarray(ranks[f"{layer}/rank"])
    if name in ("lora_a", "lora_b"):
      padded = leaf.shape[-1] if name == "lora_a" else leaf.shape[-2]
      # leaf.size counts padded columns of every layer: replace them by the layers' own.
      total += leaf.size // (padded * rank.size) * int(rank.sum())
    else:
      total += leaf.size // rank.size * int((rank > 0).sum())
  return total

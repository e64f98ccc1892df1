"""LoRA: low-rank adapters as a pytree of their own.

For a frozen weight W `[K, N]` at path p, `params[p]` holds A `[K, r]` and B `[r, N]`:

  y = x · W + s · (x · A) · B

B starts at zero, so that step 0 computes the base exactly. `constants[p]` holds what belongs
to the adapter and never trains: its scaling s, its rank, its dropout rate. In a stack of
layers every leaf has the layer axis; ranks that differ by layer are padded with zeros in both
A and B, which stay zero, since the gradient of each vanishes with the other.
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

# Read by a lookup, not by a product: adapters on them have another form.
_LOOKUPS = ("embedding",)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Which weights get adapters, and of what size.

  Attributes:
    rank: r, columns of A.
    alpha: s = alpha / r, or alpha / √r where `rank_stabilized`.
    targets: path patterns (`tree_paths`) of the weights that get one.
    rank_stabilized: rsLoRA, Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732.
    dropout: probability that an element of the adapter's input is zeroed, where the model
      is given a dropout key.
    rank_pattern: path pattern → rank, for some of the targets.
    alpha_pattern: path pattern → alpha.

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

  def __post_init__(self):
    if isinstance(self.targets, str):
      raise ValueError(f"targets: {self.targets!r}; a tuple of patterns, such as ('*/attn/*',)")
    object.__setattr__(self, "targets", tuple(self.targets))
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


def init(key: jax.Array, frozen: Any, cfg: LoRAConfig) -> tuple[dict, dict]:
  """Makes adapters for the weights of `frozen` that the targets match.

  A ~ U(−1/√K, 1/√K), as PEFT draws it; B = 0. The draw for a weight depends on the key and
  its path alone: adding a target changes no other adapter.

  Args:
    key: a JAX random key.
    frozen: the base; packed or plain weights `[..., K, N]` of the layers.
    cfg: what to make.

  Returns:
    (params, constants), nested dicts. At each target's path, params has `lora_a`
    `[..., K, r]` and `lora_b` `[..., r, N]`, float32; constants has `scaling` (float32),
    `rank` (int32) and, where cfg.dropout > 0, `dropout`, each `[L]` in a stack, else `[]`.

  Raises:
    ValueError: a pattern that matches no weight, patterns that disagree on one, or a rank
      that exceeds min(K, N).
  """
  params, constants = {}, {}
  for path, (leaf, ranks, scalings) in _plan(frozen, cfg).items():
    *leading, k, n = leaf.shape
    rank = max(ranks)
    # crc32, not hash(): Python's differs from process to process.
    path_key = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
    bound = 1 / math.sqrt(k)
    a = jax.random.uniform(path_key, (*leading, k, rank), jnp.float32, -bound, bound)
    if min(ranks) < rank:
      used = np.arange(rank)[None, :] < np.asarray(ranks)[:, None]
      a = jnp.where(jnp.asarray(used).reshape(len(ranks), *[1] * (a.ndim - 2), rank), a, 0)
    params[f"{path}/lora_a"] = a
    params[f"{path}/lora_b"] = jnp.zeros((*leading, rank, n), jnp.float32)
    stacked = tree_paths.is_stacked(f"{path}/kernel")
    values = {
      "scaling": np.asarray(scalings, np.float32),
      "rank": np.asarray(ranks, np.int32),
    }
    if cfg.dropout > 0:
      values["dropout"] = np.full(len(ranks), cfg.dropout, np.float32)
    for name, value in values.items():
      constants[f"{path}/{name}"] = jnp.asarray(value if stacked else value[0])
  return tree_paths.nest(params), tree_paths.nest(constants)


def _plan(frozen: Any, cfg: LoRAConfig) -> dict[str, tuple[Any, list[int], list[float]]]:
  """By path of the layer: the weight, and each layer's rank (0 where untargeted) and scaling."""
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  weights = {
    path: tree_paths.layers(path, leaf)
    for path, leaf in flat.items()
    if tree_paths.is_matrix(path, leaf) and path.rsplit("/", 1)[-1] not in _LOOKUPS
  }
  layers = [layer for virtual in weights.values() for layer in virtual]
  targeted = {layer for layer in layers if any(_hits(cfg.targets, layer))}
  for pattern in cfg.targets:
    if not any(tree_paths.matches(pattern, layer) for layer in layers):
      raise ValueError(f"lora.targets: {tree_paths.no_match(pattern, layers)}")
  for field in ("rank_pattern", "alpha_pattern"):
    for pattern in getattr(cfg, field):
      if not any(tree_paths.matches(pattern, layer) for layer in targeted):
        raise ValueError(f"lora.{field}: {tree_paths.no_match(pattern, targeted)}")

  plan = {}
  for path, virtual in weights.items():
    if not targeted.intersection(virtual):
      continue
    ranks, scalings = [], []
    for layer in virtual:
      if layer not in targeted:
        ranks.append(0)
        scalings.append(0.0)
        continue
      rank = _by_pattern("rank_pattern", cfg.rank_pattern, layer, cfg.rank)
      alpha = _by_pattern("alpha_pattern", cfg.alpha_pattern, layer, cfg.alpha)
      limit = min(flat[path].shape[-2:])
      if rank > limit:
        raise ValueError(
          f"{tree_paths.module(layer)}: rank {rank}; at most min(K, N) = {limit} of its weight "
          f"{list(flat[path].shape[-2:])}"
        )
      ranks.append(rank)
      scalings.append(cfg.scaling(rank, alpha))
    plan[tree_paths.module(path)] = (flat[path], ranks, scalings)
  return plan


def _hits(patterns, path: str) -> list[str]:
  return [pattern for pattern in patterns if tree_paths.matches(pattern, path)]


def _by_pattern(field: str, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
  hits = _hits(patterns, path)
  for other in hits[1:]:
    if patterns[other] != patterns[hits[0]]:
      raise ValueError(
        f"lora.{field}: {tree_paths.module(path)}: {hits[0]!r} says {patterns[hits[0]]} and "
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
  # s multiplies where the array is narrowest.
  h = (jnp.matmul(x, a.astype(x.dtype)).astype(jnp.float32) * scaling).astype(x.dtype)
  return jnp.matmul(h, b.astype(x.dtype))


def merge(frozen: Any, params: Any, constants: Any, dtype: DTypeLike = jnp.float32) -> Any:
  """The base with its adapters added in: W + s · A · B, as plain arrays.

  Computed in float32, rounded once to `dtype`. A full leaf of `params` at a base weight's
  path takes its place.

  Args:
    frozen, params, constants: as the model reads them; params and constants may be {}.
    dtype: of the result.

  Returns:
    `frozen`'s tree with an array for each leaf.

  Raises:
    ValueError: a path of params that is no weight of `frozen`.
  """
  adapters = tree_paths.leaves(params)
  constants = tree_paths.leaves(constants)
  used = set()

  def leaf(path, w):
    path = tree_paths.path_string(path)
    layer = tree_paths.module(path)
    if path in adapters:
      used.add(path)
      w = adapters[path]
    if is_quantized(w):
      w = dequantize(w)
    if f"{layer}/lora_a" in adapters and w.ndim >= 2:
      used.update((f"{layer}/lora_a", f"{layer}/lora_b"))
      a, b = adapters[f"{layer}/lora_a"], adapters[f"{layer}/lora_b"]
      delta = jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
      )
      scaling = constants[f"{layer}/scaling"]
      scaling = scaling.reshape(*scaling.shape, *[1] * (delta.ndim - scaling.ndim))
      w = w.astype(jnp.float32) + scaling * delta
    return jnp.asarray(w, dtype)

  merged = jax.tree_util.tree_map_with_path(leaf, frozen, is_leaf=is_quantized)
  if unused := sorted(set(adapters) - used):
    raise ValueError(f"merge: {unused[0]}: the base has no weight there")
  return merged


def count(params: Any, constants: Any) -> int:
  """Trained parameters, the padding of unequal ranks not counted."""
  total = 0
  ranks = tree_paths.leaves(constants)
  for path, leaf in tree_paths.leaves(params).items():
    layer, _, name = path.rpartition("/")
    if name in ("lora_a", "lora_b"):
      rank = np.asarray(ranks[f"{layer}/rank"])
      padded = leaf.shape[-1] if name == "lora_a" else leaf.shape[-2]
      # leaf.size counts padded columns of every layer: replace them by the layers' own.
      total += leaf.size // (padded * rank.size) * int(rank.sum())
    else:
      total += leaf.size
  return total

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

Two variants train less than A and B, which then stand in `constants`: VeRA two vectors, `vera_d`
`[r]` and `vera_b` `[N]`, LoRA-XS a `core` `[r, r]`; `factors` makes an A and a B of all of them:

  y = x · W + s · ((x · A) ⊙ d) · B ⊙ b                  VeRA: A and B random, shared by all layers
  y = x · W + s · x · A · core · B                       LoRA-XS: A and B of W's truncated SVD

QA-LoRA's A `[K/B, r]` has a row for each of the blocks along K that share a scale, whose inputs are
summed: A's rows are repeated by a constant `pool` `[B]`, all ones. So s · A · B is the same along a
block, and may be taken off the block's zero-point:

  y = x · W + s · (x · P · A) · B                        QA-LoRA: P `[K, K/B]` sums over blocks

A table `[V, D]` that is looked up has A `[V, r]` and B `[r, D]`: (table + s · A · B)[ids]. A head
that is tied to the table has its own adapter, as if its kernel, tableᵀ, stood at `head/kernel`;
neither sees the other's. And a full leaf in `params` at the path of a base weight takes its place.
Of some tokens alone, a `token_delta` `[T, D]` at `embed` is added to their rows of the table, with
which a tied head reads it too; a head of its own has another at `head`, added to their columns.
`constants` has their `token_ids` `[T]`, ascending.
"""

import dataclasses
import difflib
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from qlora_jax import tree_paths
from qlora_jax.quantization import dequantize
from qlora_jax.quantized_tensor import QuantizedTensor, is_quantized, restore_scales
from qlora_jax.truncated_svd import STEPS, truncated_svd

Variant = Literal["lora", "dora", "vera", "lora_xs", "qa_lora"]
Init = Literal["lora", "pissa", "olora", "loftq", "lora_ga", "cloq", "eva"]

# Names of the field that are not offered, and why.
REFUSED = {
  "ir_qlora": "it adds a float to each block, searched for the entropy of its codes, which no "
  "codebook here has, and means of the inputs beside A and B",
  "apiq": "it trains clipping and adapters of one block of layers after another by gradient; init "
  "'cloq' solves the least squares of a layer's outputs in closed form",
}

# Inits that take something out of the base, or make up for what quantizing did to it.
_OF_CHANGED_BASE = ("pissa", "olora", "loftq", "lora_ga", "cloq")

# The leaves that an adapter's A and B are made of, in params or constants.
FACTORS = ("lora_a", "lora_b", "core", "vera_d", "vera_b", "pool")

# VeRA's d at the start, and the standard deviation of LoRA-XS's core.
_VERA_D = 0.1
_CORE = 1e-5

# The least normal float32: a smaller squared norm counts as zero.
_TINY = np.float32(2.0**-126)

# Read by a lookup, not by a product.
_LOOKUP = "/embedding"

# What remat policies know by name: x · A, and A and B rounded to the compute dtype.
LOW_RANK, ROUNDED = "low_rank", "rounded"

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
    variant: lora; dora, Liu et al., 2024, https://arxiv.org/abs/2402.09353; vera, Kopiczko et al.,
      2023, https://arxiv.org/abs/2310.11454 (s = 1, whatever alpha is); lora_xs, Bałazy et al.,
      2024, https://arxiv.org/abs/2405.17604; qa_lora, Xu et al., 2023,
      https://arxiv.org/abs/2309.14717, algorithm 1, of bases with zero-points: the inputs of a
      block are summed, as there, not averaged (PEFT multiplies their mean by the number of blocks).
    init: what A and B start as. lora: A random, B = 0. pissa, olora, loftq, lora_ga, cloq: see
      `lora_init`, whose `initialize` makes base and adapters together. eva: `lora_init.eva`.
    loftq_iterations: of LoftQ, T.
    loftq_ignores_scaling: as PEFT has it: what is made up for is right only where alpha = rank.
    lora_ga_gamma: γ of LoRA-GA, by whose root A and B are divided.
    eva_rho: of EVA: a layer's rank is at most so many times the one it is given.
    calibration_batches: of training, whose gradient LoRA-GA, and whose activations EVA and CLoQ
      start from.
    cloq_damping: of CLoQ, what is added to the activations' second moment, as a share of the mean
      of its diagonal.
    svd_iterations: of the randomized SVD that pissa, loftq, lora_ga, cloq and lora_xs start with;
      None for the full decomposition.
    lora_bias: whether an adapter has a bias.
    modules_to_save: path patterns of weights, or of layers with all their weights, that are
      trained in full. `head` gives a tied head a kernel of its own.
    trainable_tokens: ids, such as those of new tokens, whose rows of the token table are trained,
      and columns of the head.

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
  variant: Variant = "lora"
  init: Init = "lora"
  loftq_iterations: int = 5
  loftq_ignores_scaling: bool = False
  lora_ga_gamma: float = 16.0
  eva_rho: float = 2.0
  calibration_batches: int = 1
  cloq_damping: float = 0.01
  svd_iterations: int | None = STEPS
  lora_bias: bool = False
  modules_to_save: tuple[str, ...] = ()
  trainable_tokens: tuple[int, ...] = ()

  def __post_init__(self):
    for name in ("targets", "modules_to_save"):
      value = getattr(self, name)
      if isinstance(value, str):
        raise ValueError(f"{name}: {value!r}; a tuple of patterns, such as ('*/attn/*',)")
      object.__setattr__(self, name, tuple(value))
    object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
    object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))
    tokens = tuple(sorted(self.trainable_tokens))
    if len(set(tokens)) < len(tokens) or (tokens and tokens[0] < 0):
      raise ValueError(f"trainable_tokens: {tokens}; ids, 0 or more, each once")
    object.__setattr__(self, "trainable_tokens", tokens)
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
    for name, choices in (("variant", get_args(Variant)), ("init", get_args(Init))):
      value = getattr(self, name)
      if value in REFUSED:
        raise ValueError(f"{name}: {value!r}; not offered: {REFUSED[value]}")
      if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name}: {value!r}; one of {', '.join(choices)}{hint}")
    for name in ("loftq_iterations", "calibration_batches"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: {getattr(self, name)}; at least 1")
    if not (math.isfinite(self.lora_ga_gamma) and self.lora_ga_gamma > 0):
      raise ValueError(f"lora_ga_gamma: {self.lora_ga_gamma}; a finite number above 0")
    if not (math.isfinite(self.eva_rho) and self.eva_rho >= 1):
      raise ValueError(f"eva_rho: {self.eva_rho}; a finite number, 1 or more")
    if not (math.isfinite(self.cloq_damping) and self.cloq_damping > 0):
      raise ValueError(
        f"cloq_damping: {self.cloq_damping}; a finite number above 0, since inputs may be fewer "
        "than K"
      )
    if self.svd_iterations is not None and self.svd_iterations < 1:
      raise ValueError(f"svd_iterations: {self.svd_iterations}; at least 1, or None")
    if self.has_fixed_matrices and self.init != "lora":
      raise ValueError(
        f"init: {self.init!r} with variant {self.variant!r}, whose A and B are fixed by what it is"
      )
    if self.variant == "qa_lora" and self.init != "lora":
      raise ValueError(
        f"init: {self.init!r} with variant 'qa_lora', whose A has a row a block, not one an input"
      )
    if self.variant == "qa_lora" and self.lora_bias:
      raise ValueError("lora_bias: True with variant 'qa_lora': no zero-point takes it up")

  @property
  def has_fixed_matrices(self) -> bool:
    """Whether A and B stand in constants, and something smaller is trained."""
    return self.variant in ("vera", "lora_xs")

  @property
  def changes_base(self) -> bool:
    """Whether the init takes something out of the base."""
    return self.init in _OF_CHANGED_BASE

  def scaling(self, rank: int, alpha: float) -> float:
    """s, of an adapter with this rank and alpha."""
    if self.variant == "vera":
      return 1.0
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
    table = flat[TABLE]
    dtype = jnp.float32 if is_quantized(table) else table.dtype
    flat[HEAD] = jax.ShapeDtypeStruct(table.shape[::-1], dtype)
  return flat


def is_tied(frozen: Any) -> bool:
  """Whether the head of `frozen` is its token table."""
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  return TABLE in flat and HEAD not in flat


def init(key: jax.Array, frozen: Any, cfg: LoRAConfig) -> tuple[dict, dict]:
  """Makes adapters for the weights of `frozen` that the targets match.

  A ~ U(−1/√K, 1/√K) and B = 0; of a lookup, A = 0 and B ~ N(0, 1); as PEFT draws them. DoRA's m =
  ‖W‖. The draw for a weight depends on the key and its path alone: adding a target changes no
  other adapter. (VeRA's A and B are those of the key and the largest target, cut to size.)

  VeRA: d = 0.1, b = 0; A and B uniform, with bounds √(6 / K) and √(6 / r), as PEFT draws them.
  LoRA-XS: A = V and B = S · Uᵀ of Wᵀ = U · S · Vᵀ, the layer's own; core ~ N(0, 10⁻¹⁰).
  QA-LoRA: as LoRA, from the same bounds, but A is `[..., K/B, r]`.

  Args:
    key: a JAX random key.
    frozen: the base; packed or plain weights `[..., K, N]` of the layers.
    cfg: what to make.

  Returns:
    (params, constants), nested dicts. Below each target's layer, params has `lora_a`
    `[..., K, r]` and `lora_b` `[..., r, N]`, and `magnitude` or `lora_bias` `[..., N]` where cfg
    asks for them, float32; constants as the function of that name says. Of VeRA and LoRA-XS,
    constants has `lora_a` and `lora_b`, and params `vera_d` `[..., r]` and `vera_b` `[..., N]`, or
    `core` `[..., r, r]`. Weights to be trained in full are copied to their own paths in params,
    float32. `trainable_tokens` have `token_delta` `[T, D]`, zeros, in params.

  Raises:
    ValueError: a pattern that matches no weight, patterns that disagree on one, a rank
      that exceeds min(K, N), or what a lookup's adapter cannot have; an init that changes the
      base.
  """
  if cfg.changes_base:
    raise ValueError(
      f"lora.init: {cfg.init!r} changes the base; lora_init.initialize makes both from the dense "
      "weights"
    )
  refuse_eva(cfg)
  fixed = tree_paths.leaves(constants(frozen, cfg))
  params = {}
  planned = plan(frozen, cfg)
  shared = _vera_matrices(key, planned) if cfg.variant == "vera" else None
  for path, (leaf, ranks, _) in planned.items():
    layer = module(path)
    *leading, k, n = leaf.shape
    rank = max(ranks)
    own = path_key(key, path)
    shape_a, shape_b = (*leading, k, rank), (*leading, rank, n)
    if shared is not None:
      # One axis of layers, as all that is scanned has: each has a copy.
      a = _padded(jnp.broadcast_to(shared[0][:k, :rank], shape_a), ranks, -1)
      b = _padded(jnp.broadcast_to(shared[1][:rank, :n], shape_b), ranks, -2)
      fixed |= {f"{layer}/lora_a": a, f"{layer}/lora_b": b}
      d = jnp.full((*leading, rank), _VERA_D, jnp.float32)
      params[f"{layer}/vera_d"] = _padded(d, ranks, -1)
      params[f"{layer}/vera_b"] = jnp.zeros((*leading, n), jnp.float32)
    elif cfg.variant == "lora_xs":
      a, b = _singular_vectors(own, base_weight(frozen, path), ranks, cfg.svd_iterations)
      fixed |= {f"{layer}/lora_a": a, f"{layer}/lora_b": b}
      core = _CORE * jax.random.normal(own, (*leading, rank, rank), jnp.float32)
      params[f"{layer}/core"] = _padded(_padded(core, ranks, -1), ranks, -2)
    elif is_lookup(path):
      b = _padded(jax.random.normal(own, shape_b, jnp.float32), ranks, -2)
      params |= {f"{layer}/lora_a": jnp.zeros(shape_a, jnp.float32), f"{layer}/lora_b": b}
    else:
      bound = 1 / math.sqrt(k)
      if cfg.variant == "qa_lora":
        shape_a = (*leading, k // leaf.block_size, rank)
      a = _padded(jax.random.uniform(own, shape_a, jnp.float32, -bound, bound), ranks, -1)
      params |= {f"{layer}/lora_a": a, f"{layer}/lora_b": jnp.zeros(shape_b, jnp.float32)}
    if cfg.lora_bias:
      params[f"{layer}/lora_bias"] = jnp.zeros((*leading, n), jnp.float32)
    if cfg.variant == "dora":
      # A copy: a step that is given params to overwrite must not take the constant with it.
      params[f"{layer}/magnitude"] = jnp.array(fixed[f"{layer}/weight_norm"], copy=True)
  for layer, width in _token_layers(frozen, cfg).items():
    params[f"{layer}/token_delta"] = jnp.zeros((len(cfg.trainable_tokens), width), jnp.float32)
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  for path in _saved(frozen, cfg):
    w = flat[TABLE].T if path not in flat else flat[path]
    w = dequantize(w) if is_quantized(w) else w
    params[path] = jnp.array(w, jnp.float32, copy=True)
  return tree_paths.nest(params), tree_paths.nest(fixed)


def refuse_eva(cfg: LoRAConfig) -> None:
  """Raises ValueError where weights alone do not give what `cfg.init` starts from."""
  if cfg.init == "eva":
    raise ValueError("lora.init: 'eva' starts from activations; lora_init.eva takes their moments")


def path_key(key: jax.Array, path: str) -> jax.Array:
  """The key of a weight's draw."""
  # crc32, not hash(): Python's differs from process to process.
  return jax.random.fold_in(key, np.uint32(zlib.crc32(module(path).encode())))


def _vera_matrices(key: jax.Array, planned: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
  """A `[K, r]` and B `[r, N]` of the largest K, r and N among the targets."""
  k = max(leaf.shape[-2] for leaf, *_ in planned.values())
  n = max(leaf.shape[-1] for leaf, *_ in planned.values())
  rank = max(max(ranks) for _, ranks, _ in planned.values())
  key_a, key_b = jax.random.split(key)
  bound_a, bound_b = math.sqrt(6 / k), math.sqrt(6 / rank)
  a = jax.random.uniform(key_a, (k, rank), jnp.float32, -bound_a, bound_a)
  return a, jax.random.uniform(key_b, (rank, n), jnp.float32, -bound_b, bound_b)


def _singular_vectors(
  key: jax.Array, w: Any, ranks: list[int], svd_iterations: int | None
) -> tuple[jax.Array, jax.Array]:
  """LoRA-XS's A and B of a weight, one layer at a time; zeros beyond each layer's rank."""
  a, b = [], []
  for layer in range(w.shape[0]) if w.ndim > 2 else [()]:
    u, s, v = truncated_svd(dense_part(w, layer), max(ranks), key, svd_iterations)
    a.append(u)
    b.append(s[:, None] * v.T)
  if w.ndim == 2:
    return a[0], b[0]
  return _padded(jnp.stack(a), ranks, -1), _padded(jnp.stack(b), ranks, -2)


def dense_part(w: Any, index: Any) -> jax.Array:
  """The matrix of a leaf of a base at `index` of its leading axes, dense, float32."""
  if is_quantized(w):
    return dequantize(jax.tree.map(lambda x: x[index], w))
  return jnp.asarray(w[index], jnp.float32)


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
    ‖W‖ `[..., N]`, 0 in layers of a stack that are no target; for QA-LoRA `pool` `[..., B]`.
    (VeRA's and LoRA-XS's matrices need a key: `init` adds them.) Of `trainable_tokens`, `token_ids`
    `[T]` int32.

  Raises:
    ValueError: see `init`.
  """
  _saved(frozen, cfg)
  fixed = {
    f"{layer}/token_ids": jnp.asarray(cfg.trainable_tokens, jnp.int32)
    for layer in _token_layers(frozen, cfg)
  }
  for path, (leaf, ranks, scalings) in plan(frozen, cfg).items():
    values = {
      "scaling": np.asarray(scalings, np.float32),
      "rank": np.asarray(ranks, np.int32),
    }
    if cfg.dropout > 0 and not is_lookup(path):
      values["dropout"] = np.full(len(ranks), cfg.dropout, np.float32)
    stacked = tree_paths.is_stacked(path)
    for name, value in values.items():
      fixed[f"{module(path)}/{name}"] = jnp.asarray(value if stacked else value[0])
    if cfg.variant == "qa_lora":
      fixed[f"{module(path)}/pool"] = jnp.ones((*leaf.shape[:-2], leaf.block_size), jnp.float32)
    if cfg.variant == "dora":
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
  targeted = plan(frozen, cfg)
  for path in saved:
    if path in targeted:
      raise ValueError(
        f"lora.modules_to_save: {module(path)}: a target too; a weight is trained in full or has "
        "an adapter"
      )
  if cfg.variant == "dora" and TABLE in saved and HEAD in targeted and is_tied(frozen):
    raise ValueError(
      f"lora.modules_to_save: {module(TABLE)}: the head is tied to it and has a DoRA adapter, "
      "which needs a weight that stays as it is"
    )
  return list(dict.fromkeys(saved))


def _token_layers(frozen: Any, cfg: LoRAConfig) -> dict[str, int]:
  """D of the layers where `trainable_tokens` have a delta, by path."""
  if not cfg.trainable_tokens:
    return {}
  flat = weights(frozen)
  if TABLE not in flat:
    raise ValueError(f"lora.trainable_tokens: the base has no {TABLE}")
  vocabulary, width = flat[TABLE].shape
  if cfg.trainable_tokens[-1] >= vocabulary:
    raise ValueError(
      f"lora.trainable_tokens: {cfg.trainable_tokens[-1]}; the base's vocabulary has {vocabulary}"
    )
  paths = [TABLE] if is_tied(frozen) else [TABLE, HEAD]
  for path in _saved(frozen, cfg):
    if path in (TABLE, HEAD):
      raise ValueError(
        f"lora.modules_to_save: {module(path)}: of it lora.trainable_tokens are trained; a weight "
        "is trained in full or in these"
      )
  return {module(path): width for path in paths}


def _matches(pattern: str, path: str) -> bool:
  return tree_paths.matches(pattern, path) or tree_paths.matches(pattern, module(path))


def plan(frozen: Any, cfg: LoRAConfig) -> dict[str, tuple[Any, list[int], list[float]]]:
  """By path of the weight: the leaf, each layer's rank (0 where untargeted) and scaling.

  Raises:
    ValueError: see `init`.
  """
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
    for field, plain in (("variant", "lora"), ("init", "lora"), ("lora_bias", False)):
      value = getattr(cfg, field)
      if is_lookup(layer) and value != plain:
        raise ValueError(
          f"lora.{field}: {value!r}; {module(layer)}, a lookup, takes plain LoRA only"
        )
    if cfg.changes_base and layer == HEAD and is_tied(frozen):
      raise ValueError(
        f"lora.init: {cfg.init!r} changes the base; {module(layer)} is tied to the token table"
      )

  planned = {}
  for path, own in virtual.items():
    if not targeted.intersection(own):
      continue
    of_experts = flat[path].ndim - tree_paths.is_stacked(path) > 2
    if (cfg.has_fixed_matrices or cfg.variant == "qa_lora") and of_experts:
      raise ValueError(f"lora.variant: {cfg.variant!r}; {module(path)}: experts take plain LoRA")
    if cfg.variant == "qa_lora":
      _check_zero_point(path, flat[path])
    ranks, scalings = [], []
    for layer in own:
      if layer not in targeted:
        ranks.append(0)
        scalings.append(0.0)
        continue
      rank = _by_pattern("rank_pattern", cfg.rank_pattern, layer, cfg.rank)
      alpha = _by_pattern("alpha_pattern", cfg.alpha_pattern, layer, cfg.alpha)
      limit = min(flat[path].shape[-2:])
      # VeRA's are long vectors, no small factors.
      if rank > limit and cfg.variant != "vera":
        raise ValueError(
          f"{module(layer)}: rank {rank}; at most min(K, N) = {limit} of its weight "
          f"{list(flat[path].shape[-2:])}"
        )
      ranks.append(rank)
      scalings.append(cfg.scaling(rank, alpha))
    planned[path] = (flat[path], ranks, scalings)
  return planned


def _check_zero_point(path: str, w: Any) -> None:
  """Raises ValueError where QA-LoRA's adapter cannot merge into the weight at `path`."""
  wanted = "QA-LoRA merges into zero-points: a codebook that has them, such as int4_zero_point"
  if not isinstance(w, QuantizedTensor):
    what = f"a {type(w).__name__}" if is_quantized(w) else "not quantized"
    raise ValueError(
      f"lora.variant: 'qa_lora'; {module(path)}: {what}; {wanted}, with nothing around it"
    )
  if w.zero is None:
    raise ValueError(f"lora.variant: 'qa_lora'; {module(path)}: no zero-point; {wanted}")
  if w.shape[-2] % w.block_size:
    raise ValueError(
      f"lora.variant: 'qa_lora'; {module(path)}: K = {w.shape[-2]}; a multiple of its "
      f"block size, {w.block_size}"
    )


def _by_pattern(field: str, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
  hits = [pattern for pattern in patterns if _matches(pattern, path)]
  for other in hits[1:]:
    if patterns[other] != patterns[hits[0]]:
      raise ValueError(
        f"lora.{field}: {module(path)}: {hits[0]!r} says {patterns[hits[0]]} and "
        f"{other!r} says {patterns[other]}"
      )
  return patterns[hits[0]] if hits else default


def factors(own: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array] | None:
  """A `[..., K, r]` and B `[..., r, N]` of an adapter of any variant; None where there is none.

  Args:
    own: what params and constants have at the layer's path, by name.
  """
  if "lora_a" not in own or "lora_b" not in own:
    return None
  a, b = own["lora_a"], own["lora_b"]
  if "pool" in own:
    # Not x is summed but A repeated: it is the same product, the sums are in float32, and all that
    # serves a plain adapter serves this one.
    spread = a[..., :, None, :] * own["pool"][..., None, :, None]
    a = spread.reshape(*a.shape[:-2], -1, a.shape[-1])
  if "core" in own:
    b = jnp.matmul(own["core"], b, precision=jax.lax.Precision.HIGHEST)
  if "vera_d" in own:
    b = own["vera_d"][..., :, None] * b * own["vera_b"][..., None, :]
  return a, b


def factors_at(layer: str, params: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
  """`factors` of the layer at a path, from the leaves of the two trees by path."""
  return factors(
    {
      name: flat[f"{layer}/{name}"]
      for flat in (constants, params)
      for name in FACTORS
      if f"{layer}/{name}" in flat
    }
  )


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
    a: `[K, r]`. b: `[r, N]`. scaling: `[]`, or of `combine` by row `[B, r]`.
    dropout: `[]`, the rate; used only with a key.
    key: zeroes elements of x with probability `dropout`, scaling up the others.

  Returns:
    `[..., N]` in x's dtype.
  """
  if key is not None and dropout is not None:
    kept = jax.random.uniform(key, x.shape, jnp.float32) >= dropout
    x = jnp.where(kept, x / (1 - dropout).astype(x.dtype), 0)
  low_rank = checkpoint_name(jnp.matmul(x, _rounded(a, x.dtype)), LOW_RANK)
  return _expand(low_rank, b, scaling, x.dtype)


def apply_lookup(
  ids: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array, *, dtype: DTypeLike
) -> jax.Array:
  """s · A[ids] · B: what an adapter adds to a lookup in a table `[V, D]`.

  Args:
    ids: `[...]`. a: `[V, r]`. b: `[r, D]`. scaling: as `apply`.
    dtype: of the product's operands and the result; it accumulates in float32.

  Returns:
    `[..., D]`.
  """
  return _expand(jnp.take(a, ids, axis=0).astype(dtype), b, scaling, dtype)


def token_rows(tokens: jax.Array, ids: jax.Array, delta: jax.Array) -> jax.Array:
  """What `trainable_tokens` add to rows of the table that are looked up.

  Args:
    tokens: `[...]`. ids: `[T]`, ascending. delta: `[T, D]`.

  Returns:
    `[..., D]` float32, zeros where the token is none of the ids.
  """
  place = jnp.clip(jnp.searchsorted(ids, tokens), 0, len(ids) - 1)
  rows = jnp.take(delta.astype(jnp.float32), place, axis=0)
  return jnp.where((jnp.take(ids, place) == tokens)[..., None], rows, 0)


def add_token_logits(y: jax.Array, x: jax.Array, ids: jax.Array, delta: jax.Array) -> jax.Array:
  """Logits `[..., V]` of x `[..., D]`, with what `trainable_tokens` add to the head's columns.

  Args:
    ids: `[T]`, ascending. delta: `[T, D]`.
  """
  own = jnp.matmul(x, delta.T.astype(x.dtype), preferred_element_type=jnp.float32)
  return y.at[..., ids].add(own.astype(y.dtype), indices_are_sorted=True, unique_indices=True)


def _expand(h: jax.Array, b: jax.Array, scaling: jax.Array, dtype: DTypeLike) -> jax.Array:
  if scaling.ndim:
    if h.ndim < 2 or len(scaling) != len(h):
      raise ValueError(
        f"lora: an input of shape {list(h.shape[:-1])} to adapters that are weighted by row, of "
        f"{len(scaling)} rows"
      )
    scaling = scaling.reshape(len(scaling), *[1] * (h.ndim - 2), -1)
  # s multiplies where the array is narrowest.
  return jnp.matmul((h.astype(jnp.float32) * scaling).astype(dtype), _rounded(b, dtype))


def _rounded(factor: jax.Array, dtype: DTypeLike) -> jax.Array:
  """A or B as a product reads it; what already has the dtype is no policy's to keep."""
  if factor.dtype == dtype:
    return factor
  return checkpoint_name(factor.astype(dtype), ROUNDED)


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
  path takes its place. A `lora_bias` is added to the layer's bias, a `token_delta` last.

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
  tied = is_tied(frozen) if tied is None else tied
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
    pair = factors_at(layer, full, fixed) if w.ndim >= 2 else None
    if pair is not None:
      used.update(f"{layer}/{name}" for name in FACTORS)
      a, b = (x.astype(jnp.float32) for x in pair)
      delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
      scaling = fixed[f"{layer}/scaling"]
      w = w.astype(jnp.float32) + _leading(scaling, delta) * delta
      if f"{layer}/magnitude" in full:
        used.add(f"{layer}/magnitude")
        scale = _ratio(full[f"{layer}/magnitude"], jnp.square(w).sum(-2))
        # Layers of a stack that are no target have no scaling, and a magnitude that means nothing.
        w = w * jnp.where(_leading(scaling, scale) != 0, scale, 1)[..., None, :]
    if path in (TABLE, HEAD):
      layer = module(TABLE) if tied else layer
      if f"{layer}/token_delta" in full:
        used.add(f"{layer}/token_delta")
        ids, delta = fixed[f"{layer}/token_ids"], full[f"{layer}/token_delta"].astype(jnp.float32)
        w = w.astype(jnp.float32)
        w = w.at[ids].add(delta) if path == TABLE else w.at[:, ids].add(delta.T)
    return jnp.asarray(w, dtype)

  merged = jax.tree_util.tree_map_with_path(
    lambda path, w: merged_leaf(tree_paths.path_string(path), w), frozen, is_leaf=is_quantized
  )
  own = {HEAD, *(f"{module(HEAD)}/{name}" for name in (*FACTORS, "lora_bias"))}
  if tied and not full.keys().isdisjoint(own | {f"{module(TABLE)}/lora_a"}):
    table = full.get(TABLE, tree_paths.leaves(frozen)[TABLE])
    merged = {**merged, module(HEAD): {"kernel": merged_leaf(HEAD, table.T)}}
  for path in sorted(set(full) - used):
    if path.endswith("/lora_bias"):
      raise ValueError(f"merge: {path}: the base's layer has no bias to add it to; keep it apart")
    raise ValueError(f"merge: {path}: the base has no weight there")
  return merged


def merge_zero_points(frozen: Any, params: Any, constants: Any) -> tuple[Any, dict]:
  """QA-LoRA's adapters merged into float32 zero-points, so that the base stays packed.

  (level − (zero − s · A · B / scale)) · scale = (level − zero) · scale + s · A · B, to float32
  rounding, with the A of a row for each block.

  Args:
    frozen, params, constants: as the model reads them, of variant "qa_lora".

  Returns:
    (frozen, params): the base, and what is left of params: weights that are trained in full.

  Raises:
    ValueError: an adapter of another variant; a block of zeros, whose scale is 0, with an adapter
      that is not 0 there. The message names the path.

  References:
    Xu et al., QA-LoRA, 2023, https://arxiv.org/abs/2309.14717, algorithm 1.
  """
  left, fixed = tree_paths.leaves(params), tree_paths.leaves(constants)
  merged = tree_paths.leaves(frozen, is_leaf=is_quantized)
  for path, w in merged.items():
    layer = module(path)
    if w.ndim < 2 or not any(f"{layer}/{name}" in left for name in FACTORS):
      continue
    if f"{layer}/pool" not in fixed:
      raise ValueError(f"merge_zero_points: {layer}: its adapter is not of variant 'qa_lora'")
    _check_zero_point(path, w)
    a, b = (left.pop(f"{layer}/{name}").astype(jnp.float32) for name in ("lora_a", "lora_b"))
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    delta = _leading(fixed[f"{layer}/scaling"], delta) * delta
    scales = restore_scales(w.scales)
    if bool(((scales == 0) & (delta != 0)).any()):
      raise ValueError(
        f"merge_zero_points: {layer}: a block of zeros has scale 0, and no zero-point changes it"
      )
    shift = jnp.where(scales == 0, 0, delta / jnp.where(scales == 0, 1, scales))
    merged[path] = dataclasses.replace(w, zero=w.zero.astype(jnp.float32) - shift)
  for path in left:
    if path.rpartition("/")[2] in FACTORS:
      raise ValueError(f"merge_zero_points: {path}: the base has no weight there")
  return tree_paths.nest(merged), tree_paths.nest(left)


def _leading(x: jax.Array, like: jax.Array) -> jax.Array:
  """x with axes of 1 added at its end, to go with the leading axes of `like`."""
  return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


def plain(
  params: Any, constants: Any, cfg: LoRAConfig, initial: Any = None
) -> tuple[dict, dict, LoRAConfig]:
  """An adapter of any variant and init as a LoRA (or DoRA) adapter of the original base.

  VeRA's and LoRA-XS's factors are multiplied out, and QA-LoRA's A is repeated, at the same rank.
  What was trained from A₀, B₀ that had been taken out of the base becomes [A, A₀], [B; −B₀] at the
  same scaling: the change s · (A · B − A₀ · B₀), of twice the rank (at most min(K, N)).

  On the original dense base W that change is exact: where the base was W − s · A₀ · B₀ without
  rounding, the function is the same. Where it was q(W − s · A₀ · B₀), that function differs by the
  rounding q(x) − x, which the adapter does not hold: nor LoftQ's or CLoQ's correction of it.

  Args:
    params, constants, cfg: as `init` or `lora_init.initialize` made them, trained.
    initial: the params before training, where cfg's init changes the base; else None.

  Returns:
    (params, constants, cfg), with variant "lora" or "dora" and init "lora".

  Raises:
    ValueError: `initial` where there should be none, or the other way about.
  """
  if cfg.changes_base and initial is None:
    raise ValueError(
      f"lora.init: {cfg.init!r} changed the base: `initial`, the params before training, is needed "
      "for an adapter of the original one"
    )
  if initial is not None and not cfg.changes_base:
    raise ValueError(f"initial: given, and lora.init {cfg.init!r} left the base as it is")
  if not (cfg.changes_base or cfg.has_fixed_matrices or cfg.variant == "qa_lora"):
    return params, constants, cfg
  flat, fixed = tree_paths.leaves(params), tree_paths.leaves(constants)
  start = {} if initial is None else tree_paths.leaves(taken_out(initial, constants, cfg))
  new, new_fixed = dict(flat), dict(fixed)
  for leaf in fixed:
    layer, _, name = leaf.rpartition("/")
    if name != "scaling":
      continue
    pair = factors_at(layer, flat, fixed)
    assert pair is not None, layer
    for each in FACTORS:
      new.pop(f"{layer}/{each}", None)
      new_fixed.pop(f"{layer}/{each}", None)
    pairs = [pair]
    if cfg.changes_base:
      pairs.append((start[f"{layer}/lora_a"], -start[f"{layer}/lora_b"]))
    rank = np.asarray(fixed[f"{layer}/rank"])
    a, b, ranks = _side_by_side(pairs, [rank] * len(pairs))
    new |= {f"{layer}/lora_a": a, f"{layer}/lora_b": b}
    new_fixed[f"{layer}/rank"] = ranks
  if cfg.changes_base:
    # The scaling stays: alpha / r or alpha / √r.
    more = math.sqrt(2) if cfg.rank_stabilized else 2
    cfg = dataclasses.replace(
      cfg,
      init="lora",
      rank=2 * cfg.rank,
      alpha=more * cfg.alpha,
      rank_pattern={pattern: 2 * rank for pattern, rank in cfg.rank_pattern.items()},
      alpha_pattern={pattern: more * alpha for pattern, alpha in cfg.alpha_pattern.items()},
    )
  elif cfg.variant == "vera":
    # Its scaling is 1, which is alpha / r or alpha / √r of no one alpha where ranks differ.
    cfg = dataclasses.replace(cfg, variant="lora", alpha=float(cfg.rank), rank_stabilized=False)
  else:
    cfg = dataclasses.replace(cfg, variant="lora")
  return tree_paths.nest(new), tree_paths.nest(new_fixed), cfg


def combine(
  adapters: Sequence[tuple[Any, Any]], weights: ArrayLike | Sequence[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Several adapters of one base as one: their weighted sum, or one sum for each row of a batch.

  y[b] = x[b] · W + Σᵢ weights[b, i] · sᵢ · x[b] · Aᵢ · Bᵢ

  A row of zeros is the base's, a row with a single 1 that adapter's: so one batch serves several
  tenants, whose weights are arrays, and may change without compiling anew. The A's stand side by
  side, so that all rows take one product with all of them; what another row's adapter gives is
  multiplied by 0. (The other way, an A and B gathered for each row, reads them again for each.)

  Args:
    adapters: (params, constants) of each, as `init` gives them. Any variant but DoRA, any targets
      and ranks. Dropout rates are left out.
    weights: `[A]` of the sum; or `[B, A]`, for a batch of B rows.

  Returns:
    (params, constants) for the model that the adapters are of, and for `generate`. Of `[A]` it is
    a plain adapter, of scaling 1, which also merges. Of `[B, A]` the constants' `scaling` is
    `[..., B, r]`, which the layers of this package take where x has B rows; they do not merge.

  Raises:
    ValueError: weights of another shape; a leaf that does not add up, as a bias, a DoRA magnitude
      or a weight trained in full; adapters of different bases; experts by row. The message names
      the path.
  """
  weights = jnp.asarray(weights, jnp.float32)
  if weights.ndim not in (1, 2) or weights.shape[-1] != len(adapters) or not adapters:
    raise ValueError(
      f"combine: weights {list(weights.shape)} of {len(adapters)} adapters; [A] or [B, A], A "
      "at least 1"
    )
  flat = [tuple(map(tree_paths.leaves, each)) for each in adapters]
  for number, (params, _) in enumerate(flat):
    for path in params:
      if path.rpartition("/")[2] not in FACTORS:
        raise ValueError(f"combine: adapter {number}: {path}: only products s · A · B add up")
  made, fixed = {}, {}
  paths = [path for _, constants in flat for path in constants if path.endswith("/scaling")]
  for layer in dict.fromkeys(path.removesuffix("/scaling") for path in paths):
    pairs, scalings, ranks = [], [], []
    for number, (params, constants) in enumerate(flat):
      pair = factors_at(layer, params, constants)
      if pair is None:
        continue
      pairs.append(pair)
      # [L] or [], and by row [L, B] or [B].
      scalings.append(jnp.multiply.outer(constants[f"{layer}/scaling"], weights[..., number]))
      ranks.append(constants[f"{layer}/rank"])
    shapes = {(*a.shape[:-1], b.shape[-1]) for a, b in pairs}
    if len(shapes) != 1:
      raise ValueError(f"combine: {layer}: adapters of weights of shapes {sorted(shapes)}")
    if weights.ndim == 1:
      pairs = [(a, _leading(s, b) * b) for (a, b), s in zip(pairs, scalings, strict=True)]
      a, b, rank = _side_by_side(pairs, [np.asarray(each) for each in ranks])
      fixed |= {f"{layer}/rank": rank, f"{layer}/scaling": (rank > 0).astype(jnp.float32)}
    else:
      if pairs[0][0].ndim - scalings[0].ndim > 1:
        raise ValueError(f"combine: {layer}: experts take one adapter for all rows")
      a = jnp.concatenate([a for a, _ in pairs], axis=-1)
      b = jnp.concatenate([b for _, b in pairs], axis=-2)
      by_column = [
        jnp.repeat(s[..., None], own.shape[-1], axis=-1)
        for (own, _), s in zip(pairs, scalings, strict=True)
      ]
      fixed[f"{layer}/scaling"] = jnp.concatenate(by_column, axis=-1)
    made |= {f"{layer}/lora_a": a, f"{layer}/lora_b": b}
  return tree_paths.nest(made), tree_paths.nest(fixed)


def taken_out(initial: Any, constants: Any, cfg: LoRAConfig) -> dict:
  """A₀ and B₀ of the s · A₀ · B₀ that an init has taken out of the base.

  They are those that training starts from, except under `loftq_ignores_scaling`, which takes out
  A · B without s: then B₀ = B / s.

  Args:
    initial, constants, cfg: as `lora_init.initialize` made them.

  Returns:
    A tree like `initial`.
  """
  flat = tree_paths.leaves(initial)
  if cfg.init == "loftq" and cfg.loftq_ignores_scaling:
    for path, scaling in tree_paths.leaves(constants).items():
      layer, _, name = path.rpartition("/")
      if name == "scaling":
        b = flat[f"{layer}/lora_b"]
        # Layers of a stack that are no target have s = 0, and zeros in B.
        flat[f"{layer}/lora_b"] = b / _leading(jnp.where(scaling > 0, scaling, 1), b)
  return tree_paths.nest(flat)


def _side_by_side(
  pairs: list[tuple[Any, Any]], ranks: list[np.ndarray]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Pairs of A `[..., K, r]` and B `[..., r, N]` as one of A · B summed over them, and its ranks.

  Args:
    ranks: of each pair, `[L]` or `[]`: what lies beyond is padding, and is not taken along.
  """
  leading, (k, n) = np.shape(pairs[0][0])[:-2], (np.shape(pairs[0][i])[i - 2] for i in (0, 1))
  limit = min(k, n)
  total = np.minimum(sum(ranks), limit)
  whole_a = np.zeros((*leading, k, total.max()), np.float32)
  whole_b = np.zeros((*leading, total.max(), n), np.float32)
  host = [(np.asarray(own_a, np.float32), np.asarray(own_b, np.float32)) for own_a, own_b in pairs]
  for index in np.ndindex(*leading):
    own = [int(rank[index[: rank.ndim]]) for rank in ranks]
    own_a = np.concatenate([a[index][:, :r] for (a, _), r in zip(host, own, strict=True)], axis=1)
    own_b = np.concatenate([b[index][:r] for (_, b), r in zip(host, own, strict=True)], axis=0)
    if own_a.shape[1] > limit:
      # As a product with the identity, which is as small as it gets.
      whole, one = own_a @ own_b, np.eye(limit, dtype=np.float32)
      own_a, own_b = (one, whole) if k <= n else (whole, one)
    whole_a[index][:, : own_a.shape[1]] = own_a
    whole_b[index][: own_b.shape[0]] = own_b
  return jnp.asarray(whole_a), jnp.asarray(whole_b), jnp.asarray(total.astype(np.int32))


def count(params: Any, constants: Any) -> int:
  """Trained parameters, the padding of unequal ranks not counted."""
  total = 0
  ranks = tree_paths.leaves(constants)
  for path, leaf in tree_paths.leaves(params).items():
    layer, _, name = path.rpartition("/")
    # How many axes of a leaf are as long as the rank; of the others the layers' targets count.
    axes = {"lora_a": 1, "lora_b": 1, "vera_d": 1, "core": 2}.get(name, 0)
    if axes == 0 and name not in ("lora_bias", "magnitude", "vera_b"):
      total += leaf.size
      continue
    rank = np.asarray(ranks[f"{layer}/rank"])
    padded = leaf.shape[-2] if name == "lora_b" else leaf.shape[-1]
    # leaf.size counts the padding of every layer: replace it by the layers' own.
    used = (rank**axes).sum() if axes else (rank > 0).sum()
    total += leaf.size // ((padded**axes) * rank.size) * int(used)
  return total

"""Adapters that start as a part of the weight, and the base that is left without it.

From a dense weight W `[K, N]`, with q for quantizing (or rounding to a dtype) and back:

  pissa   s · A · B is W's truncated SVD, A = U · √(S / s) and B = √(S / s) · Vᵀ
  olora   Wᵀ = Q · R: A = R[:r]ᵀ and B = Q[:, :r]ᵀ
  loftq   T times: W′ = q(W − s · A · B), then s · A · B the truncated SVD of W − W′; from B = 0
  cloq    s · A · B minimises ‖X · (W − q(W) − s · A · B)‖, X the inputs of some batches (below)
  lora_ga the loss's gradient is G = U · S · Vᵀ: A = c · U[:, :r], B = c · V[:, r:2r]ᵀ, c = ⁴√N / √γ

The base becomes q(W − s · A · B); LoftQ's is its last W′, without the last SVD, and CLoQ's q(W). So
the function at step 0 is W's own where q is the identity; with LoftQ, ‖W − W′ − s · A · B‖ is made
small, with CLoQ that of the outputs: where Rᵀ · R = Xᵀ · X + λ, s · R · A · B is the truncated SVD
of R · (W − q(W)), and no other of its rank leaves less of ‖X · E‖² + λ‖E‖².

What is trained on such a base fits the original one no longer. `lora.plain` makes an adapter for
that of it. It is q's error alone that this leaves behind: see there.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax import gptq, lora, tree_paths
from qlora_jax.lora import LoRAConfig
from qlora_jax.quantization import (
  QuantizationConfig,
  Treatment,
  dequantize,
  in_range,
  quantize_by,
  quantize_tree,
  treatments,
)
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.truncated_svd import truncated_svd

# Of the float32 weights of several layers that are decomposed in one program.
_BATCH_BYTES = 64 << 20


def initialize(
  key: jax.Array,
  dense: Any,
  rules: Mapping[str, Treatment],
  cfg: LoRAConfig,
  *,
  storage_dtype: DTypeLike | None = None,
  gradients: Mapping[str, Any] | None = None,
  moments: Mapping[str, Any] | None = None,
) -> tuple[Any, dict, dict]:
  """Makes a base and the adapters that start with a part of it, as `cfg.init` says.

  One large matrix at a time, or several layers' at once of at most 64 MiB together: in memory are
  the packed base, and these in float32 a few times. (A leaf of the base is held twice while its
  layers are put together.) An `init` of "lora" gives what
  `quantize_tree` and `lora.init` do.

  Args:
    key: of the adapters' draws and the SVDs' sketches.
    dense: the base; arrays, or what reads an array when it is indexed (`hf.open_stored`).
    rules: path pattern → treatment, as `quantize_tree` takes them.
    cfg: the adapters.
    storage_dtype: of the leaves that no rule treats and those that are not quantized by it; None
      keeps theirs.
    gradients: of LoRA-GA: by path of the weight, of the loss with respect to it, `[..., K, N]`
      (`calibration.weight_gradients`).
    moments: of CLoQ: by path of the weight, H = Xᵀ · X of its inputs, `[..., K, K]`, or a multiple
      (`calibration.second_moments`).

  Returns:
    (frozen, params, constants), as `quantize_tree` and `lora.init` give them.

  Raises:
    ValueError: see `quantize_tree` and `lora.init`; LoftQ or CLoQ of a weight that is not
      quantized; a base that is packed already; a weight that cannot be quantized; a gradient or a
      moment that is missing, of another shape or not finite. The message names the path.

  References:
    Meng et al., PiSSA, 2024, https://arxiv.org/abs/2404.02948, sections 3 and 4;
    Büyükakyüz, OLoRA, 2024, https://arxiv.org/abs/2406.01775;
    Li et al., LoftQ, 2023, https://arxiv.org/abs/2310.08659, algorithm 1, where s = 1;
    Wang et al., LoRA-GA, 2024, https://arxiv.org/abs/2407.05000, algorithm 1. (PEFT multiplies its
    B by S[r:2r], and does not scale A.)
    Deng et al., CLoQ, 2025, https://arxiv.org/abs/2501.18475, whose closed form this is; what is
    quantized by error feedback there is rounded to nearest here.
  """
  lora.refuse_eva(cfg)
  flat = tree_paths.leaves(dense, is_leaf=is_quantized)
  for path, leaf in flat.items():
    if is_quantized(leaf):
      raise ValueError(f"{tree_paths.module(path)}: packed; an init needs the dense weights")
  shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
  # For its checks: that each rule matches, and no two disagree.
  jax.eval_shape(functools.partial(quantize_tree, rules=rules), tree_paths.nest(shapes))
  chosen = treatments(tree_paths.nest(shapes), rules)
  # Else `lora.init` makes the adapters, of the base as it is stored.
  planned = lora.plan(dense, cfg) if cfg.changes_base else {}
  frozen, made = {}, {}
  for path, leaf in flat.items():
    store = _storage(path, leaf, chosen[path], storage_dtype)
    layer = lora.module(path)
    if path in planned:
      _, ranks, scalings = planned[path]
      if cfg.init in ("loftq", "cloq") and not isinstance(store, QuantizationConfig):
        raise ValueError(
          f"lora.init: {cfg.init!r}; {layer} is not quantized: there is no error to make up for"
        )
      gradient = None
      if cfg.init == "lora_ga":
        gradient = _gradient(path, leaf, max(ranks), gradients)
      moment = _moment(path, leaf, moments) if cfg.init == "cloq" else None
      method = _Method(
        cfg.init,
        max(ranks),
        cfg.lora_ga_gamma,
        cfg.cloq_damping,
        cfg.loftq_iterations,
        cfg.loftq_ignores_scaling,
        cfg.svd_iterations,
        cfg.variant == "dora",
      )
      own_key = lora.path_key(key, path)
      parts = _parts(path, leaf, store, method, ranks, scalings, own_key, gradient, moment)
      frozen[path] = parts.pop("base")
      made |= {f"{layer}/{name}": value for name, value in parts.items()}
    elif isinstance(store, QuantizationConfig):
      frozen[path] = _parts(path, leaf, store)["base"]
    else:
      frozen[path] = jnp.asarray(leaf[()], store)
      if not bool(jnp.isfinite(frozen[path]).all()):
        raise ValueError(f"{path}: a weight that is not finite, or beyond what {store} holds")
  base = tree_paths.nest(frozen)
  params, constants = lora.init(key, base, dataclasses.replace(cfg, init="lora"))
  return base, tree_paths.nest(tree_paths.leaves(params) | made), constants


def eva(
  key: jax.Array, frozen: Any, cfg: LoRAConfig, moments: Mapping[str, Any]
) -> tuple[dict, dict, LoRAConfig]:
  """EVA: A spans the inputs' leading directions, and ranks go where these explain most.

  A layer's share of variance i is λᵢ / Σ λ, of the eigenvalues of its inputs' second moment. The
  sum of all ranks that cfg gives is handed out to the largest shares of all layers, none of which
  gets more than `cfg.eva_rho` times its own. B = 0, so that the base is left as it is; each layer
  keeps the scaling that cfg gives it.

  Args:
    key: see `lora.init`.
    frozen: the base.
    cfg: the adapters, of init "eva".
    moments: path of the weight → Σ x · xᵀ of its inputs, `[..., K, K]`
      (`calibration.second_moments`).

  Returns:
    (params, constants, cfg): the last of init "lora", with each layer's rank and alpha by pattern;
    layers without a rank are no targets.

  Raises:
    ValueError: see `lora.init`; a weight without its moment, or of inputs that are all zero; a
      lookup or an expert.

  References:
    Paischer et al., EVA, 2024, https://arxiv.org/abs/2410.07170.
  """
  if cfg.init != "eva":
    raise ValueError(f"lora.init: {cfg.init!r}; this makes adapters of init 'eva'")
  vectors: dict[str, np.ndarray] = {}
  shares: list[tuple[float, str]] = []
  given: dict[str, tuple[int, float]] = {}
  for path, (leaf, ranks, scalings) in lora.plan(frozen, cfg).items():
    *_, k, n = leaf.shape
    wanted = (*leaf.shape[:-2], k, k)
    if lora.is_lookup(path) or leaf.ndim - tree_paths.is_stacked(path) > 2:
      raise ValueError(f"eva: {lora.module(path)}: only of dense layers")
    if path not in moments or tuple(moments[path].shape) != wanted:
      raise ValueError(f"eva: {path}: a second moment {list(wanted)} is needed in `moments`")
    for number, layer in enumerate(map(lora.module, tree_paths.layers(path, leaf))):
      if ranks[number] == 0:
        continue
      moment = np.asarray(moments[path], np.float64)
      values, own = np.linalg.eigh(moment[number] if tree_paths.is_stacked(path) else moment)
      if not values.sum() > 0:
        raise ValueError(
          f"eva: {layer}: a second moment of trace {values.sum():g}; it is above 0: the layer's "
          "inputs are not all zero"
        )
      most = min(round(cfg.eva_rho * ranks[number]), k, n)
      shares += [(float(value), layer) for value in values[::-1][:most] / values.sum()]
      vectors[layer] = own[:, ::-1][:, :most]
      given[layer] = (ranks[number], scalings[number])
  chosen = sorted(shares, reverse=True)[: sum(rank for rank, _ in given.values())]
  counts = {layer: sum(other == layer for _, other in chosen) for layer in given}
  counts = {layer: count for layer, count in counts.items() if count}
  cfg = dataclasses.replace(
    cfg,
    init="lora",
    targets=tuple(counts),
    rank_pattern=counts,
    alpha_pattern={
      layer: given[layer][1] * (math.sqrt(count) if cfg.rank_stabilized else count)
      for layer, count in counts.items()
    },
  )
  params, constants = lora.init(key, frozen, cfg)
  flat = tree_paths.leaves(params)
  for path, (leaf, ranks, _) in lora.plan(frozen, cfg).items():
    a = np.zeros(flat[f"{lora.module(path)}/lora_a"].shape, np.float32)
    for number, layer in enumerate(map(lora.module, tree_paths.layers(path, leaf))):
      if ranks[number]:
        part = a[number] if tree_paths.is_stacked(path) else a
        part[:, : ranks[number]] = vectors[layer][:, : ranks[number]]
    flat[f"{lora.module(path)}/lora_a"] = jnp.asarray(a)
  return tree_paths.nest(flat), constants, cfg


def _gradient(path: str, leaf: Any, rank: int, gradients: Mapping[str, Any] | None) -> Any:
  """LoRA-GA's of a leaf, checked."""
  if gradients is None or path not in gradients:
    raise ValueError(f"lora.init: 'lora_ga'; {path}: its gradient is missing in `gradients`")
  if tuple(gradients[path].shape) != tuple(leaf.shape):
    raise ValueError(
      f"lora.init: 'lora_ga'; {path}: a gradient {list(gradients[path].shape)} of a weight "
      f"{list(leaf.shape)}"
    )
  if 2 * rank > min(leaf.shape[-2:]):
    raise ValueError(
      f"lora.init: 'lora_ga'; {lora.module(path)}: rank {rank}; it takes 2 · rank directions, of "
      f"min(K, N) = {min(leaf.shape[-2:])}"
    )
  return gradients[path]


def _moment(path: str, leaf: Any, moments: Mapping[str, Any] | None) -> Any:
  """CLoQ's of a leaf, checked."""
  wanted = [*leaf.shape[:-1], leaf.shape[-2]]
  if moments is None or path not in moments:
    raise ValueError(
      f"lora.init: 'cloq'; {path}: its second moment {wanted} is missing in `moments`"
    )
  moment = moments[path]
  if list(moment.shape) != wanted or not np.isfinite(moment).all():
    raise ValueError(
      f"lora.init: 'cloq'; {path}: a second moment {list(moment.shape)}; {wanted}, and finite"
    )
  return moment


def _storage(
  path: str, leaf: Any, treatment: Treatment, storage_dtype: DTypeLike | None
) -> QuantizationConfig | np.dtype:
  """How a leaf is stored."""
  if isinstance(treatment, QuantizationConfig):
    if tree_paths.is_matrix(path, leaf):
      return treatment
    treatment = None
  wanted = storage_dtype if treatment is None else treatment
  return jnp.dtype(leaf.dtype if wanted is None else wanted)


@dataclasses.dataclass(frozen=True)
class _Method:
  """An init, for matrices of one leaf: what of a `LoRAConfig` it depends on."""

  init: str
  rank: int
  gamma: float
  damping: float
  loftq_iterations: int
  loftq_ignores_scaling: bool
  svd_iterations: int | None
  magnitude: bool


def _parts(
  path: str,
  leaf: Any,
  store: QuantizationConfig | np.dtype,
  method: _Method | None = None,
  ranks: list[int] | None = None,
  scalings: list[float] | None = None,
  key: jax.Array | None = None,
  gradient: Any = None,
  moment: Any = None,
) -> dict[str, Any]:
  """The stored base of a leaf, and where there is a method its adapters; stacked as the leaf is."""
  leading = leaf.shape[:-2]
  indices = list(np.ndindex(*leading))
  size = _together(len(indices), 4 * math.prod(leaf.shape[-2:]))
  parts, good = [], []
  for start in range(0, len(indices), size):
    batch = indices[start : start + size]

    def dense(x: Any, batch: list[tuple[int, ...]] = batch) -> Any:
      return None if x is None else jnp.stack([lora.dense_part(x, index) for index in batch])

    w = dense(leaf)
    if method is None:
      some: dict[str, Any] = {"base": _all_stored(w, store)}
    else:
      assert ranks is not None and scalings is not None and key is not None
      stacked = tree_paths.is_stacked(path)
      layers = [index[0] if index and stacked else 0 for index in batch]
      some = _matrices(
        w,
        jnp.asarray([scalings[layer] for layer in layers], jnp.float32),
        jnp.asarray([ranks[layer] for layer in layers], jnp.int32),
        jnp.stack([jax.random.fold_in(key, np.uint32(start + i)) for i in range(size)]),
        dense(gradient),
        dense(moment),
        method=method,
        store=store,
      )
    good.append(_are_good(w, some["base"]))
    # Waits, so that no matrix is read before those ahead of it are done with.
    parts.append(jax.block_until_ready(some))
    del w, some
  for index, fine in zip(indices, np.concatenate(good), strict=True):
    if not fine:
      raise ValueError(
        f"{path}: index {list(index)}: a weight that is not finite, or beyond what is stored"
      )
  return jax.tree.map(lambda *x: jnp.concatenate(x).reshape(*leading, *x[0].shape[1:]), *parts)


def _together(count: int, size: int) -> int:
  """How many of `count` matrices of `size` bytes are made at once: a divisor of it."""
  most = max(1, _BATCH_BYTES // size)
  return max(i for i in range(1, count + 1) if count % i == 0 and i <= most)


def _stored(w: jax.Array, store: QuantizationConfig | np.dtype) -> Any:
  if isinstance(store, QuantizationConfig):
    return quantize_by(w, store)
  return w.astype(store)


@functools.partial(jax.jit, static_argnums=1)
def _all_stored(w: jax.Array, store: QuantizationConfig | np.dtype) -> Any:
  """Of matrices `[..., K, N]`."""
  return jax.vmap(functools.partial(_stored, store=store))(w)


@jax.jit
@jax.vmap
def _are_good(w: jax.Array, base: Any) -> jax.Array:
  """Whether each matrix could be stored: a plain one has to be finite in its dtype."""
  good = in_range(w).all()
  return good if is_quantized(base) else good & jnp.isfinite(base).all()


def _restored(w: Any) -> jax.Array:
  return dequantize(w) if is_quantized(w) else w.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("method", "store"))
def _matrices(*arrays: jax.Array | None, **how: Any) -> dict[str, Any]:
  """`_matrix` of each of several."""
  return jax.vmap(functools.partial(_matrix, **how))(*arrays)


def _matrix(
  w: jax.Array,
  scaling: jax.Array,
  rank: jax.Array,
  key: jax.Array,
  gradient: jax.Array | None,
  moment: jax.Array | None,
  method: _Method,
  store: QuantizationConfig | np.dtype,
) -> dict[str, Any]:
  """The stored base `[K, N]` of a matrix, A and B, and the norms of their sum for DoRA.

  A layer that is no target has rank and scaling 0: A and B are zeros, and its base is q(W).
  """
  used = jnp.arange(method.rank) < rank
  divisor = jnp.where(scaling > 0, scaling, 1)
  if method.init == "loftq" and method.loftq_ignores_scaling:
    divisor = jnp.ones_like(divisor)

  def leading(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A and B of `divisor` · A · B = the truncated SVD of x."""
    u, s, v = truncated_svd(x, method.rank, key, method.svd_iterations)
    root = jnp.where(used, jnp.sqrt(s / divisor), 0)
    return u * root[None, :], root[:, None] * v.T

  def without(a: jax.Array, b: jax.Array) -> Any:
    return _stored(w - divisor * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), store)

  if method.init == "loftq":
    base = jax.lax.fori_loop(
      0,
      method.loftq_iterations - 1,
      lambda _, base: without(*leading(w - _restored(base))),
      _stored(w, store),
    )
    a, b = leading(w - _restored(base))
  elif method.init == "cloq":
    assert moment is not None
    base = _stored(w, store)
    # R is the Cholesky factor Lᵀ of H + λ; the result does not depend on H's units.
    root = jnp.linalg.cholesky(gptq.damped(moment, method.damping)).T
    error = jnp.matmul(root, w - _restored(base), precision=jax.lax.Precision.HIGHEST)
    a, b = leading(error)
    a = jax.scipy.linalg.solve_triangular(root, a)
  else:
    if method.init == "pissa":
      a, b = leading(w)
    elif method.init == "olora":
      a, b = _orthonormal(w, used)
    else:
      assert gradient is not None
      u, _, v = truncated_svd(gradient, 2 * method.rank, key, method.svd_iterations)
      c = w.shape[1] ** 0.25 / math.sqrt(method.gamma)
      following = jnp.take(v, rank + jnp.arange(method.rank), axis=1)
      a = jnp.where(used[None, :], c * u[:, : method.rank], 0)
      b = jnp.where(used[:, None], c * following.T, 0)
    base = without(a, b)
  one = {"base": base, "lora_a": a, "lora_b": b}
  if method.magnitude:
    whole = _restored(base) + scaling * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    one["magnitude"] = jnp.where(rank > 0, jnp.sqrt(jnp.square(whole).sum(0)), 0)
  return one


def _orthonormal(w: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
  """OLoRA's A and B. The first r columns of Q depend on the first r of Wᵀ alone."""
  q, _ = jnp.linalg.qr(w[: len(used)].T)
  r = jnp.matmul(q.T, w.T, precision=jax.lax.Precision.HIGHEST)
  return jnp.where(used[None, :], r.T, 0), jnp.where(used[:, None], q.T, 0)

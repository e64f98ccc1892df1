"""Causal attention: which keys a query sees, and four ways to compute it.

`plain` holds all T × S logits, and is the definition. `blockwise` holds one block of them at a
time, in both directions: memory linear in T, on every backend (Dao et al., FlashAttention-2, 2023,
https://arxiv.org/abs/2307.08691). `cudnn` is the GPU library's fused kernel, `decode` a kernel for
one token over a layer of the cache (`gpu_decode`). `choose` says which of them takes a case.

B batch, T queries, S keys, H heads, G groups of H / G query heads that share a key and value head,
h head width.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.matmul import gpu, target

AttentionName = Literal["plain", "blockwise", "cudnn", "decode"]

# Logits of a head up to which they are held all at once: less memory than the wide activations of
# an MLP, and fewer passes than by blocks.
_MOST_PLAIN_LOGITS = 1024 * 1024
# Queries and keys of a block of `blockwise`.
_BLOCK = 512

# What remat policies know the result and the logarithms of the sums by.
ATTENTION = "attention"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
  """Which keys a query sees: those up to itself, of its own segment, in its window.

  Attributes:
    start: `[]` int32, the slot among the keys of the first query; None where queries and keys are
      the same tokens.
    segment_ids: those of queries `[B, T]` and keys `[B, S]`; None for one segment.
    positions: those of queries and keys, `[B, T]` and `[B, S]` or one row, by which windows are
      counted; None where they count up by one.
  """

  start: jax.Array | None = None
  segment_ids: tuple[jax.Array, jax.Array] | None = None
  positions: tuple[jax.Array, jax.Array] | None = None


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: Visible,
  *,
  windows: Sequence[int | None] = (None,),
  kind: jax.Array | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  implementation: AttentionName | None = None,
  cache: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
  """softmax(scale · q · kᵀ) · v, grouped, over the keys that a query sees.

  Logits and softmax are float32.

  Args:
    q: `[B, T, H, h]`. k, v: `[B, S, G, h]`, of one dtype.
    visible: each query sees at least one key.
    windows: of each kind of layer: a query sees the keys whose position is less than this before
      its own; None for all.
    kind: `[]` int32, the index in `windows` of this layer's; None where there is one.
    scale: 1 / √h where None.
    softcap: c, where the logits become c · tanh(logits / c).
    implementation: None takes what `choose` says. "cudnn" takes rows of several segments where they
      are at most `most_segments`, which only the data says: a batch with more goes by blocks.
    cache: where k and v are a layer of the cache: all layers' keys and values, `[L, B, G, S, h]`,
      and the layer's number. "decode" reads them there, and has no gradient ("plain" has).

  Returns:
    `[B, T, H, h]` in q's dtype.

  Raises:
    ValueError: the implementation that was named cannot serve the case, with its reason; a window
      below 1.
  """
  if any(window is not None and window < 1 for window in windows):
    raise ValueError(f"attend: windows {tuple(windows)}; a token sees at least itself")
  case = Case.of(q, k, visible, windows, softcap, cache is not None)
  name = choose(case, implementation)
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  if name == "cudnn":
    branches = [
      functools.partial(_cudnn, visible=visible, window=window, scale=scale) for window in windows
    ]
    if kind is None:
      return branches[0](q, k, v)
    return jax.lax.switch(kind, branches, q, k, v)
  window = None
  if any(each is not None for each in windows):
    # No position is so far away.
    reach = jnp.asarray([np.iinfo(np.int32).max if w is None else w for w in windows], jnp.int32)
    window = reach[0 if kind is None else kind]
  if name == "decode":
    return _decode(scale, q, visible, window, cache)
  function = _plain if name == "plain" else _blockwise
  return function(scale, softcap, q, k, v, (visible, window))


@dataclasses.dataclass(frozen=True)
class Case:
  """What the choice of an implementation depends on.

  Attributes:
    queries, keys, width: T, S, h.
    dtype: of q, k and v.
    cached: whether the keys are those of a cache, by which queries know their slots.
    shared: H / G.
    stacked: whether that cache is there, of all layers.
    packed: whether there are segments.
    windowed: whether a kind of layer has a window.
    moved: whether positions are other than counted up.
    softcap: whether logits are capped.
  """

  queries: int
  keys: int
  width: int
  dtype: Any
  cached: bool = False
  shared: int = 1
  stacked: bool = False
  packed: bool = False
  windowed: bool = False
  moved: bool = False
  softcap: bool = False

  @classmethod
  def of(
    cls, q, k, visible: Visible, windows: Sequence[int | None], softcap, stacked: bool = False
  ) -> "Case":
    """The case of `attend`'s arguments."""
    return cls(
      queries=q.shape[1],
      keys=k.shape[1],
      width=q.shape[-1],
      dtype=q.dtype,
      cached=visible.start is not None,
      shared=q.shape[2] // k.shape[2],
      stacked=stacked,
      packed=visible.segment_ids is not None,
      windowed=any(window is not None for window in windows),
      moved=visible.positions is not None,
      softcap=softcap is not None,
    )


def choose(case: Case, name: AttentionName | None = None) -> AttentionName:
  """The implementation that takes a case: `name` if it is one.

  Raises:
    ValueError: no such name, or it cannot serve the case, with the reason.
  """
  names = get_args(AttentionName)
  if name is not None and name not in names:
    raise ValueError(f"attention: {name!r}; one of {', '.join(names)}")
  if name in ("plain", "blockwise"):
    return name
  kernels: dict[AttentionName, Any] = {"cudnn": _cudnn_unsupported, "decode": _decode_unsupported}
  for each, unsupported in kernels.items():
    if name in (None, each) and (reason := unsupported(case)) is None:
      return each
    if name == each:
      raise ValueError(f"attention: {each!r} cannot serve this: {reason}")
  return without_kernels(case)


def without_kernels(case: Case) -> AttentionName:
  """What takes a case that no kernel does."""
  return "plain" if case.queries * case.keys <= _MOST_PLAIN_LOGITS else "blockwise"


def _seen(
  visible: Visible, window: jax.Array | None, queries: jax.Array, keys: jax.Array
) -> jax.Array:
  """Which of the keys at some indices the queries at others see: `[B or 1, t, s]` bool."""
  start = jnp.int32(0) if visible.start is None else visible.start
  seen = (keys[None, :] <= (queries + start)[:, None])[None]

  def pairs(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    of_queries, of_keys = arrays
    return jnp.take(of_queries, queries, 1)[:, :, None], jnp.take(of_keys, keys, 1)[:, None, :]

  if visible.segment_ids is not None:
    mine, theirs = pairs(visible.segment_ids)
    seen = seen & (mine == theirs)
  if window is not None:
    if visible.positions is not None:
      mine, theirs = pairs(visible.positions)
    else:
      mine, theirs = (queries + start)[None, :, None], keys[None, None, :]
    seen = seen & (mine - theirs < window)
  return seen


def _capped(logits: jax.Array, softcap: float | None) -> jax.Array:
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _grouped(q: jax.Array, groups: int) -> jax.Array:
  """`[B, T, H, h] → [B, G, H / G, T, h]`."""
  batch, queries, heads, width = q.shape
  return q.reshape(batch, queries, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)


def _ungrouped(y: jax.Array) -> jax.Array:
  batch, groups, shared, queries, width = y.shape
  return y.transpose(0, 3, 1, 2, 4).reshape(batch, queries, groups * shared, width)


def _plain(scale, softcap, q, k, v, seen_by) -> jax.Array:
  """All logits at once.

  The softmax's division is left for after the product, and a group's queries are the rows of one
  product: fewer passes over T × S elements than `jax.nn.dot_product_attention` makes, which besides
  refuses float16 on a CPU.
  """
  visible, window = seen_by
  keys = k.shape[1]
  indices = (jnp.arange(count, dtype=jnp.int32) for count in (q.shape[1], keys))
  seen = _seen(visible, window, *indices)
  q = _grouped(q * jnp.asarray(scale, q.dtype), k.shape[2])
  rows = (*q.shape[:2], q.shape[2] * q.shape[3])
  k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
  logits = jnp.matmul(q.reshape(*rows, -1), k, preferred_element_type=jnp.float32)
  logits = _capped(logits.reshape(*q.shape[:4], keys), softcap)
  logits = jnp.where(seen[:, None, None], logits, jnp.float32(-jnp.inf))
  largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - largest).reshape(*rows, keys)
  y = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  y = (y / weights.sum(-1, keepdims=True)).astype(q.dtype)
  return checkpoint_name(_ungrouped(y.reshape(q.shape)), ATTENTION)


# --- By blocks ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(scale, softcap, q, k, v, seen_by) -> jax.Array:
  """One block of logits at a time, in the order of the queries."""
  return _blockwise_forward(scale, softcap, q, k, v, seen_by)[0]


def _in_blocks(x: jax.Array, axis: int) -> jax.Array:
  """`x` with `axis` cut into blocks, filled up with zeros, that are the first axis."""
  size = x.shape[axis]
  block = min(_BLOCK, size)
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -size % block)
  x = jnp.pad(x, padding)
  x = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _from_blocks(x: jax.Array, axis: int, size: int) -> jax.Array:
  x = jnp.moveaxis(x, 0, axis)
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  return jax.lax.slice_in_dim(x, 0, size, axis=axis)


class _Blocks:
  """The pairs of a block of queries and one of keys, and their logits."""

  def __init__(self, scale, softcap, q, k, v, seen_by):
    self.scale, self.softcap = scale, softcap
    self.visible, self.window = seen_by
    self.sizes = q.shape[1], k.shape[1]
    self.q = _in_blocks(_grouped(q, k.shape[2]), 3)  # [i, B, G, H / G, t, h]
    self.k, self.v = (_in_blocks(x.transpose(0, 2, 1, 3), 2) for x in (k, v))  # [j, B, G, s, h]
    counts = len(self.q), len(self.k)
    pairs = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 2)
    t, s = self.q.shape[4], self.k.shape[3]
    if self.visible.start is None:
      # Of keys behind the block's last query nothing is seen.
      pairs = pairs[pairs[:, 1] * s <= pairs[:, 0] * t + t - 1]
    # As if it followed from q: what can be known before a layer's input, such as the masks of all
    # pairs, JAX computes once for all layers, and keeps; of T × T elements a head.
    self.pairs, _ = jax.lax.optimization_barrier((jnp.asarray(pairs, jnp.int32), self.q[:0]))

  def seen(self, i: jax.Array, j: jax.Array) -> jax.Array:
    """`[B or 1, 1, 1, t, s]` of a pair; what fills up the last blocks is seen by nothing real."""
    t, s = self.q.shape[4], self.k.shape[3]
    queries = jnp.minimum(i * t + jnp.arange(t, dtype=jnp.int32), self.sizes[0] - 1)
    keys = j * s + jnp.arange(s, dtype=jnp.int32)
    real = keys < self.sizes[1]
    seen = _seen(self.visible, self.window, queries, jnp.minimum(keys, self.sizes[1] - 1))
    return (seen & real[None, None])[:, None, None]

  def logits(self, i: jax.Array, j: jax.Array) -> jax.Array:
    """`[B, G, H / G, t, s]` float32, −∞ where a key is not seen."""
    logits = jnp.einsum(
      "bgrth,bgsh->bgrts", self.q[i], self.k[j], preferred_element_type=jnp.float32
    )
    logits = _capped(logits * jnp.float32(self.scale), self.softcap)
    return jnp.where(self.seen(i, j), logits, jnp.float32(-jnp.inf))

  def over_pairs(self, step, carry):
    """Scans `step(carry, i, j) → carry`, passing over pairs of which nothing is seen."""
    skips = self.window is not None or bool(jax.tree.leaves(self.visible))

    def body(carry, pair):
      i, j = pair
      if not skips:
        return step(carry, i, j), None
      return jax.lax.cond(
        self.seen(i, j).any(), lambda carry: step(carry, i, j), lambda carry: carry, carry
      ), None

    return jax.lax.scan(body, carry, self.pairs)[0]


def _blockwise_forward(scale, softcap, q, k, v, seen_by):
  blocks = _Blocks(scale, softcap, q, k, v, seen_by)

  def step(carry, i, j):
    sums, largest, totals = carry
    logits = blocks.logits(i, j)
    new = jnp.maximum(largest[i], logits.max(-1))
    # Where nothing was seen yet, −∞ − −∞ is not to be taken.
    safe = jnp.where(jnp.isneginf(new), 0, new)
    weights, decay = jnp.exp(logits - safe[..., None]), jnp.exp(largest[i] - safe)
    product = jnp.einsum(
      "bgrts,bgsh->bgrth",
      weights.astype(v.dtype),
      blocks.v[j],
      preferred_element_type=jnp.float32,
    )
    return (
      sums.at[i].set(sums[i] * decay[..., None] + product),
      largest.at[i].set(new),
      totals.at[i].set(totals[i] * decay + weights.sum(-1)),
    )

  shape = blocks.q.shape
  carry = (
    jnp.zeros(shape, jnp.float32),
    jnp.full(shape[:-1], -jnp.inf, jnp.float32),
    jnp.zeros(shape[:-1], jnp.float32),
  )
  sums, largest, totals = blocks.over_pairs(step, carry)
  totals = jnp.where(totals > 0, totals, 1)
  y = _ungrouped(_from_blocks((sums / totals[..., None]).astype(q.dtype), 3, q.shape[1]))
  y = checkpoint_name(y, ATTENTION)
  log_totals = checkpoint_name(largest + jnp.log(totals), ATTENTION)
  return y, (q, k, v, seen_by, y, log_totals)


def _blockwise_backward(scale, softcap, residuals, g):
  q, k, v, seen_by, y, log_totals = residuals
  blocks = _Blocks(scale, softcap, q, k, v, seen_by)
  g_blocks = _in_blocks(_grouped(g, k.shape[2]), 3)
  # Σ over keys of weight · gradient of weight, from what is of T × h.
  mean = (g.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
  mean = _in_blocks(_grouped(mean, k.shape[2]), 3)

  def step(carry, i, j):
    dq, dk, dv = carry
    logits = blocks.logits(i, j)
    unseen = jnp.isneginf(logits)
    # A row without keys has −∞ − −∞.
    weights = jnp.where(unseen, 0, jnp.exp(logits - log_totals[i][..., None]))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dv = dv.at[j].add(product("bgrts,bgrth->bgsh", weights.astype(v.dtype), g_blocks[i]))
    dweights = product("bgrth,bgsh->bgrts", g_blocks[i], blocks.v[j])
    dlogits = weights * (dweights - mean[i])
    if softcap is not None:
      # d tanh, of logits that stand capped; those not seen are 0 · ∞ otherwise.
      dlogits = dlogits * (1 - jnp.square(jnp.where(unseen, 0, logits) / softcap))
    dlogits = (dlogits * jnp.float32(scale)).astype(q.dtype)
    dq = dq.at[i].add(product("bgrts,bgsh->bgrth", dlogits, blocks.k[j]))
    dk = dk.at[j].add(product("bgrts,bgrth->bgsh", dlogits, blocks.q[i]))
    return dq, dk, dv

  carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (blocks.q, blocks.k, blocks.v))
  dq, dk, dv = blocks.over_pairs(step, carry)
  dq = _ungrouped(_from_blocks(dq, 3, q.shape[1])).astype(q.dtype)
  dk, dv = (_from_blocks(x, 2, k.shape[1]).transpose(0, 2, 1, 3).astype(k.dtype) for x in (dk, dv))
  return dq, dk, dv, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


# --- cuDNN ----------------------------------------------------------------------------------------

# Below, its launch costs more than it saves.
_LEAST_CUDNN_QUERIES = 64


def _cudnn_unsupported(case: Case) -> str | None:
  """Why cuDNN cannot serve a case, or None."""
  platform, device = target.target()
  if platform not in ("gpu", "cuda"):
    return f"the computation is for a {platform}"
  capability = gpu.capability(device)
  if capability is None or capability < 8:
    return f"{device.device_kind}: it needs an NVIDIA GPU of capability 8.0 or more"
  if reason := cudnn_limits(case, capability):
    return reason
  if device not in jax.devices():
    # It asks the library that is there for its version.
    return f"no {device.device_kind} is here"
  return None


def cudnn_limits(case: Case, capability: float) -> str | None:
  """Why cuDNN cannot serve a case on a GPU of a capability from 8.0 on, or None."""
  if case.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q is {np.dtype(case.dtype).name}; it takes bfloat16 and float16"
  if case.softcap:
    return "the logits are capped"
  if case.cached:
    return "the keys are those of a cache"
  if case.queries < _LEAST_CUDNN_QUERIES:
    return f"{case.queries} queries; at least {_LEAST_CUDNN_QUERIES}"
  widest = 256 if capability >= 9 else 128
  if case.width % 8 or case.width > widest:
    return f"heads of width {case.width}; a multiple of 8, at most {widest}"
  if case.moved and case.windowed:
    return "windows of positions that do not count up"
  return _packing_unsupported(case, capability) if case.packed else None


def _packing_unsupported(case: Case, capability: float) -> str | None:
  if case.windowed:
    return "windows in rows of several segments"
  if capability < 9:
    return "rows of several segments, which it takes on Hopper and later"
  if _packed_cudnn() is None:
    return f"rows of several segments, which this JAX, {jax.__version__}, gives no access to"
  return None


@functools.cache
def _packed_cudnn() -> Any:
  """(function, mask type) of the form with offsets, which is not in JAX's public interface."""
  try:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention, cudnn.MaskType.PADDING_CAUSAL
  except (ImportError, AttributeError):
    return None


def _cudnn(q, k, v, *, visible: Visible, window: int | None, scale: float) -> jax.Array:
  if visible.segment_ids is None:
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      scale=scale,
      is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
      implementation="cudnn",
    )
  segment_ids = visible.segment_ids[0]
  most = most_segments(q.shape[1])
  starts, lengths, fits = _segments(segment_ids, most)

  def packed(q, k, v):
    function, mask_type = _packed_cudnn()
    return function(
      q, k, v, None, None, lengths, lengths, starts, starts, scale=scale, mask_type=mask_type
    )

  def blockwise(q, k, v):
    return _blockwise(scale, None, q, k, v, (visible, None))

  return jax.lax.cond(fits, packed, blockwise, q, k, v)


def most_segments(tokens: int) -> int:
  """Runs of equal ids in a row of so many tokens that cuDNN's kernel is laid out for.

  Each costs it some work, used or not. A batch with more in a row goes by blocks.
  """
  return max(32, tokens // 64)


def _segments(segment_ids: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Where the runs of equal ids in `[B, T]` start and how long they are.

  Padding is a run as well, so that every row of the result is written.

  Returns:
    `[B, most + 1]` and `[B, most]` int32, −1 behind the last; whether all runs fit, and no id but
    0 comes back after another (then segments are more than runs).
  """
  batch, tokens = segment_ids.shape
  first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  run = jnp.cumsum(first, 1) - 1
  highest = jax.lax.cummax(jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0))), axis=1)
  rising = jnp.where(first & (segment_ids != 0), segment_ids > highest, True)
  fits = (run[:, -1] < most).all() & rising.all()
  row = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 0)
  index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
  at = jnp.where(first, run, most + 1)
  starts = jnp.full((batch, most + 1), -1, jnp.int32).at[row, at].set(index, mode="drop")
  ends = jnp.where(starts[:, 1:] < 0, tokens, starts[:, 1:])
  lengths = jnp.where(starts[:, :most] < 0, -1, ends - starts[:, :most])
  return starts, lengths, fits


# --- One token over the cache ---------------------------------------------------------------------


def _decode_unsupported(case: Case) -> str | None:
  """Why `gpu_decode` cannot serve a case, or None."""
  if reason := target.unavailable("gpu", "cuda"):
    return reason
  device = target.target()[1]
  if not gpu.runs_thread_programs(device):
    return f"{device.device_kind}: it is for Hopper and the data centre's Blackwell"
  from qlora_jax.models import gpu_decode

  if not (case.cached and case.stacked):
    return "the keys are not those of a cache of all layers"
  if not (case.packed and case.moved):
    return "the cache's segments and positions are not given"
  if case.queries != 1:
    return f"{case.queries} queries; it takes one"
  if case.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q is {np.dtype(case.dtype).name}; it takes bfloat16 and float16"
  if case.softcap:
    return "the logits are capped"
  if case.width not in gpu_decode.WIDTHS:
    return f"heads of width {case.width}; one of {gpu_decode.WIDTHS}"
  if case.shared > gpu_decode.MOST_SHARED:
    return f"{case.shared} heads share a key; at most {gpu_decode.MOST_SHARED}"
  return None


def _decode(scale, q, visible: Visible, window, cache) -> jax.Array:
  from qlora_jax.models import gpu_decode

  k, v, layer = cache
  start, segment_ids, positions = visible.start, visible.segment_ids, visible.positions
  assert start is not None and segment_ids is not None and positions is not None
  return gpu_decode.attend(q, k, v, layer, start, segment_ids, positions, window, scale)

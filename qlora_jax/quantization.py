"""Quantize and dequantize: one matrix, a stack of them, or a whole tree by path rules."""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from qlora_jax import codebooks, tree_paths
from qlora_jax.codebooks import Codebook
from qlora_jax.quantized_tensor import (
  AnyQuantizedTensor,
  FlatQuantizedTensor,
  NestedScales,
  QuantizedTensor,
  is_quantized,
  join_rows,
  pack,
  restore_scales,
  split_rows,
  unpack,
)

# A smaller absmax counts as zero. It is the least normal float32: XLA's CPU backend flushes
# subnormals, and 1 / subnormal would be inf on the others.
_TINY = np.float32(2.0**-126)

# A larger magnitude is refused: 1 / absmax would be flushed from 2^126, and the mean of four
# million scales overflow from here.
_HUGE = np.float32(2.0**106)

_SCALE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """How a weight is quantized: the arguments of `quantize`, as plain values.

  Attributes:
    codebook: a name in `codebooks.names()`, or the path of a file for `codebooks.load`.
    block_size: weights along K that share a scale.
    double_quantization: code the scales in 8 bits.
    nested_block_size: scales that share an absmax under double quantization.
    scale_dtype: "float32" or "bfloat16", where the scales are not doubly quantized.

  Raises:
    ValueError: naming the field, its value and the rule.
  """

  codebook: str = "nf4"
  block_size: int = 64
  double_quantization: bool = True
  nested_block_size: int = 256
  scale_dtype: str = "float32"

  def __post_init__(self):
    _validate(**dataclasses.asdict(self))


def _validate(codebook, block_size, double_quantization, nested_block_size, scale_dtype):
  if isinstance(codebook, str):
    codebook = codebooks.get(codebook, block_size)
  for name, value in (("block_size", block_size), ("nested_block_size", nested_block_size)):
    if value < 1:
      raise ValueError(f"{name}: {value}; a block holds at least 1")
  if scale_dtype not in _SCALE_DTYPES:
    near = difflib.get_close_matches(str(scale_dtype), _SCALE_DTYPES, 1, 0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"scale_dtype: {scale_dtype!r}; one of {', '.join(_SCALE_DTYPES)}{hint}")
  if double_quantization and scale_dtype != "float32":
    raise ValueError(
      f"scale_dtype: {scale_dtype!r} with double_quantization; the scales are then 8-bit codes, "
      "so leave scale_dtype at float32 or turn double_quantization off"
    )
  return codebook


def quantize(
  w: jax.Array,
  *,
  codebook: str | Codebook = "nf4",
  block_size: int = 64,
  double_quantization: bool = True,
  nested_block_size: int = 256,
  scale_dtype: str = "float32",
) -> QuantizedTensor:
  """Rounds `w` to the nearest level, block by block along the contraction axis.

  code[k, n] = #{i : w[k, n] / scale[k // B, n] > (levels[i] + levels[i + 1]) / 2}

  so that a tie takes the lower code. Works under `jit`, `vmap` and `scan` and on sharded
  arrays. Code for code what bitsandbytes writes for the same blocks (its CPU rounding: whole
  blocks times a reciprocal, a ragged last block by true division), but for blocks whose
  largest magnitude is below 2^-126: those become exact zeros here.

  Codes are drawn with the exact scale where bitsandbytes does so (absmax), with the restored
  one (rounded to bfloat16, or doubly quantized) under the other rules, whose end level would
  otherwise be missed.

  Args:
    w: `[..., K, N]`, any float dtype. Leading axes are separate matrices, with their own
      nested scales.
    codebook: a name, or a Codebook.
    block_size: weights along K that share a scale; the last block may be shorter.
    double_quantization: code the scales in 8 bits, blocks of `nested_block_size`.
    scale_dtype: of the scales otherwise.

  Returns:
    At 4 bits and block 64: 4.127 bits a weight with double quantization, else 4.5 with
    float32 scales (and the table's 64 bytes).

  Raises:
    ValueError: fewer than two axes, an empty one, or, where the values are at hand (not
      under a trace), a weight that is not finite or beyond 2^106: the message names its index.
    TypeError: not a float dtype.

  References:
    Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, section 3.
  """
  codebook = _validate(codebook, block_size, double_quantization, nested_block_size, scale_dtype)
  w = jnp.asarray(w)
  if not jnp.issubdtype(w.dtype, jnp.floating):
    raise TypeError(f"quantize: dtype {w.dtype}; a weight is of a float dtype")
  if w.ndim < 2 or 0 in w.shape:
    raise ValueError(f"quantize: shape {w.shape}; a weight is [..., K, N] with no empty axis")
  if not isinstance(w, Tracer):
    _check_range(w)
  return _quantize(
    w, codebook, block_size, nested_block_size if double_quantization else None, scale_dtype
  )


def in_range(w: jax.Array) -> jax.Array:
  """Whether each weight can be quantized: it is finite and at most 2^106."""
  return jnp.abs(w.astype(jnp.float32)) <= _HUGE


def _check_range(w: jax.Array):
  if bool(_all_in_range(w)):
    return
  host = np.asarray(w, np.float32)
  index = tuple(int(i) for i in np.argwhere(~(np.abs(host) <= _HUGE))[0])
  rule = "finite" if not np.isfinite(host[index]) else "at most 2^106, so that their scales add up"
  raise ValueError(
    f"quantize: the weight at index {list(index)} is {float(host[index])}; weights are {rule}"
  )


@jax.jit
def _all_in_range(w):
  return in_range(w).all()


def _quantize_tree_of_matrices(w, codebook, block_size, nested_block_size, scale_dtype):
  def matrix(w):
    return _quantize_matrix(w, codebook, block_size, nested_block_size, scale_dtype)

  for _ in range(w.ndim - 2):
    matrix = jax.vmap(matrix)
  return matrix(w)


# Jitted as a whole so that an eager call holds no copies of w either.
_quantize = jax.jit(_quantize_tree_of_matrices, static_argnums=(1, 2, 3, 4))


def _quantize_matrix(w, codebook, block_size, nested_block_size, scale_dtype) -> QuantizedTensor:
  k, _ = w.shape
  whole = k // block_size * block_size
  exact, zero = _scale(w, codebook, block_size)
  if nested_block_size is not None:
    scales = nest_scales(exact, nested_block_size)
  else:
    scales = exact.astype(scale_dtype)
  bitsandbytes = codebook.scale == "absmax" and nested_block_size is not None
  scale = exact if bitsandbytes else restore_scales(scales)

  usable = jnp.abs(scale) >= _TINY
  inverse = jnp.where(usable, 1 / jnp.where(usable, scale, 1), 0)
  x = w.astype(jnp.float32) * _rows(inverse, k, block_size)
  if zero is not None:
    x = x + _rows(zero.astype(jnp.float32), k, block_size)
  codes = nearest(x, codebook)
  if whole < k:
    # bitsandbytes divides in a ragged last block, where it multiplies by the reciprocal above.
    x = w[whole:].astype(jnp.float32)
    # The select keeps this a division: XLA turns one by a broadcast into the reciprocal again.
    x = x / jnp.where((x != 0) & usable[-1:], scale[-1:], 1)
    x = jnp.where(usable[-1:], x, 0)
    if zero is not None:
      x = x + zero[-1:].astype(jnp.float32)
    codes = jnp.concatenate([codes[:whole], nearest(x, codebook)])
  if any(level == following for level, following in itertools.pairwise(codebook.levels)):
    codes = codes + _flushed(w, _rows(inverse, k, block_size)).astype(jnp.uint8)
  packed, padding = pack(codes, codebook.bits)
  return QuantizedTensor(
    codes=packed,
    scales=scales,
    levels=jnp.asarray(codebook.table),
    zero=zero,
    bits=codebook.bits,
    block_size=block_size,
    padding=padding,
  )


def _scale(w: jax.Array, codebook: Codebook, block_size: int) -> tuple[jax.Array, jax.Array | None]:
  """`[K, N]` → the blocks' float32 scales and their zero-points, `[ceil(K / B), N]`."""
  if codebook.scale == "absmax":
    scale = _block_max(jnp.abs(w), block_size)
    return jnp.where(scale >= _TINY, scale, 0), None
  low, high = -_block_max(-w, block_size), _block_max(w, block_size)
  if codebook.scale == "signed_absmax":
    scale = jnp.where(high >= -low, high, low)
    return jnp.where(jnp.abs(scale) >= _TINY, scale, 0), None
  # "minmax": zero lies within the range, so that it has a code.
  low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  first, last = codebook.levels[0], codebook.levels[-1]
  scale = (high - low) / (last - first)
  usable = scale >= _TINY
  zero = jnp.round(first - jnp.where(usable, low / jnp.where(usable, scale, 1), 0))
  return jnp.where(usable, scale, 0), jnp.clip(zero, first, last).astype(jnp.uint8)


def _block_max(x: jax.Array, block_size: int) -> jax.Array:
  k, n = x.shape
  x = x.astype(jnp.float32)
  if k % block_size == 0:
    return x.reshape(-1, block_size, n).max(1)
  # The window pads the ragged block by itself; slices of x, or jnp.pad, would be copies of it.
  return jax.lax.reduce_window(
    x,
    np.float32(-np.inf),
    jax.lax.max,
    window_dimensions=(block_size, 1),
    window_strides=(block_size, 1),
    padding=((0, -k % block_size), (0, 0)),
  )


def nearest(x: jax.Array, codebook: Codebook) -> jax.Array:
  """The uint8 index of the level nearest to each `x`; the lower one at a tie."""
  return _count_below(x, codebook.thresholds)


def _count_below(x: jax.Array, thresholds: np.ndarray) -> jax.Array:
  """#{i : x > thresholds[i]} as uint8, of at most 255.

  An unrolled sum of comparisons fuses with what is around it. argmin or searchsorted over 16
  levels would hold many copies of x (measured: 1.2 times x in all, against 7.1), a bisection of
  8 lookups over 255 three (1.3, against 4.5, and no faster).
  """
  code = jnp.zeros(x.shape, jnp.uint8)
  for threshold in thresholds:
    code = code + (x > threshold).astype(jnp.uint8)
  return code


def _flushed(w: jax.Array, inverse: jax.Array) -> jax.Array:
  """Where w · inverse is positive, but a subnormal that XLA's CPU backend takes for 0.

  bitsandbytes' FP4 has a second zero for all that lies above 0, subnormals included: the value
  is the same, the code is not.
  """
  w = w.astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(w, jnp.int32)
  # 2^75 w, where a subnormal (or negative) w is read as an integer, which is not flushed.
  lifted = jnp.where(
    bits < np.int32(1 << 23),
    bits.astype(jnp.float32) * np.float32(2.0**-74),
    w * np.float32(2.0**75),
  )
  # Above 2^-150, half the least subnormal, the product rounds up.
  return (lifted * (inverse * np.float32(2.0**75)) > 1) & (w * inverse <= 0)


def nest_scales(
  scales: jax.Array, block_size: int = 256, offset: jax.Array | None = None
) -> NestedScales:
  """Double quantization: `[K/B, N]` scales as 8-bit codes of (scale − offset) / absmax.

  Nearest in the dynamic map, as bitsandbytes' CUDA code does it (its x86 code looks the
  value up in a coarse table, and near zero lands up to 4 codes away).

  Args:
    scales: `[K/B, N]` float32.
    block_size: scales, in bitsandbytes' flat [out, in] order, that share an absmax.
    offset: subtracted first; the mean where absent. torch's mean is not bit-reproducible
      elsewhere, so imports and tests pass theirs.
  """
  blocks, n = scales.shape
  if offset is None:
    offset = scales.mean()
  flat = (scales - offset).T.reshape(-1)
  flat = jnp.pad(flat, (0, -len(flat) % block_size)).reshape(-1, block_size)
  absmax = jnp.abs(flat).max(1)
  absmax = jnp.where(absmax >= _TINY, absmax, 0)
  table = codebooks.dynamic_map()
  thresholds = (table[:-1] + table[1:]) * np.float32(0.5)
  inverse = jnp.where(absmax > 0, 1 / jnp.where(absmax > 0, absmax, 1), 0)
  # A bisection: scales are few, and 255 comparisons take seconds to compile on a GPU.
  codes = jnp.searchsorted(thresholds, flat * inverse[:, None], side="left").astype(jnp.uint8)
  codes = codes.reshape(-1)[: blocks * n].reshape(n, blocks).T
  return NestedScales(codes, absmax, offset, block_size)


def decode(w: QuantizedTensor, dtype: DTypeLike) -> list[jax.Array]:
  """The planes of a packed matrix, each `[groups, plane rows, N]`, ready for a product.

  float32 level times float32 scale, rounded once to `dtype`.

  Args:
    w: no leading axes.
  """
  k, _ = w.shape
  scales = split_rows(_rows(restore_scales(w.scales), k, w.block_size), w.bits, 0)
  levels = w.levels.astype(jnp.float32)
  weights = [
    levels.at[codes].get(mode="promise_in_bounds") for codes in unpack(w.codes, w.bits, w.padding)
  ]
  if w.zero is not None:
    zeros = split_rows(_rows(w.zero.astype(jnp.float32), k, w.block_size), w.bits, 0)
    weights = [weight - zero for weight, zero in zip(weights, zeros, strict=True)]
  return [(weight * scale).astype(dtype) for weight, scale in zip(weights, scales, strict=True)]


def _rows(blocks: jax.Array, k: int, block_size: int) -> jax.Array:
  """`[ceil(K / B), N]` → `[K, N]`: a broadcast, which fuses into what reads it."""
  count, n = blocks.shape
  return jnp.broadcast_to(blocks[:, None], (count, block_size, n)).reshape(-1, n)[:k]


def dequantize(w: AnyQuantizedTensor, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """The weight that `w` stands for, `[..., K, N]`.

  float32 level times float32 scale, rounded once to `dtype`, as bitsandbytes does.
  """
  if not is_quantized(w):
    raise TypeError(f"dequantize: {type(w).__name__}; a QuantizedTensor is wanted")
  return _dequantize(w, jnp.dtype(dtype))


def _dequantize_tree_of_matrices(w, dtype):
  if isinstance(w, FlatQuantizedTensor):
    *leading, k, n = w.shape
    flat = _dequantize_tree_of_matrices(w.flat, dtype)
    return jnp.swapaxes(flat.reshape(*leading, n, k), -1, -2)
  if w.ndim > 2:
    return jax.vmap(lambda layer: _dequantize_tree_of_matrices(layer, dtype))(w)
  return join_rows(decode(w, dtype), 0)


# Jitted as `_quantize` is, and for the same reason.
_dequantize = jax.jit(_dequantize_tree_of_matrices, static_argnums=1)


Treatment = QuantizationConfig | DTypeLike | None


def quantize_tree(params: Any, rules: Mapping[str, Treatment]) -> Any:
  """Treats each weight of a tree by the rule whose pattern matches its path.

  Args:
    params: any pytree of arrays. Leaves under a key `layers` are stacks (see `tree_paths`).
    rules: path pattern → what to do: a QuantizationConfig quantizes the matrices
      `[..., K, N]` that it matches (vectors, such as biases and norms, stay as they are); a
      dtype casts; None leaves as is, as does no rule.

  Returns:
    The tree with a QuantizedTensor for each quantized leaf.

  Raises:
    ValueError: a pattern that matches nothing, or none but vectors for a QuantizationConfig;
      a leaf, or two layers of one stack, to which rules that disagree apply; a non-finite
      weight. Each names pattern and path.

  >>> quantize_tree(params, {"*/mlp/*": QuantizationConfig(), "embed/*": jnp.bfloat16})
  """
  flat = tree_paths.leaves(params, is_leaf=is_quantized)
  chosen = treatments(params, rules)
  virtual = {path: tree_paths.layers(path, leaf) for path, leaf in flat.items()}
  for pattern, treatment in rules.items():
    hit = [
      path
      for path, layers in virtual.items()
      if any(tree_paths.matches(pattern, layer) for layer in layers)
    ]
    if not hit:
      raise ValueError(f"quantize_tree: {tree_paths.no_match(pattern, flat)}")
    if isinstance(treatment, QuantizationConfig) and not any(
      tree_paths.is_matrix(path, flat[path]) for path in hit
    ):
      raise ValueError(
        f"quantize_tree: pattern {pattern!r} matches no matrix, only {', '.join(hit[:3])}"
      )

  def treat(path, leaf):
    path = tree_paths.path_string(path)
    treatment = chosen[path]
    if treatment is None or (
      isinstance(treatment, QuantizationConfig) and not tree_paths.is_matrix(path, leaf)
    ):
      return leaf
    if is_quantized(leaf):
      raise ValueError(f"quantize_tree: {path}: is quantized already; quantize the original")
    if not isinstance(treatment, QuantizationConfig):
      return jnp.asarray(leaf, treatment)
    try:
      return quantize(leaf, **dataclasses.asdict(treatment))
    except (TypeError, ValueError) as error:
      raise type(error)(f"{path}: {error}") from None

  return jax.tree_util.tree_map_with_path(treat, params, is_leaf=is_quantized)


def treatments(params: Any, rules: Mapping[str, Treatment]) -> dict[str, Treatment]:
  """What `quantize_tree` does with each leaf, by path; None where no rule applies.

  Raises:
    ValueError: rules that disagree.
  """
  flat = tree_paths.leaves(params, is_leaf=is_quantized)
  return {path: _treatment(path, leaf, rules) for path, leaf in flat.items()}


def _treatment(path: str, leaf: Any, rules: Mapping[str, Treatment]) -> Treatment:
  """The one treatment of all layers of a leaf; None where no rule applies."""
  by_layer = []
  for layer in tree_paths.layers(path, leaf):
    hits = [pattern for pattern in rules if tree_paths.matches(pattern, layer)]
    for pattern in hits[1:]:
      if rules[pattern] != rules[hits[0]]:
        raise ValueError(
          f"quantize_tree: {layer}: patterns {hits[0]!r} ({rules[hits[0]]}) and {pattern!r} "
          f"({rules[pattern]}) both match it and disagree"
        )
    by_layer.append((layer, rules[hits[0]] if hits else None))
  first = by_layer[0]
  for layer, treatment in by_layer:
    if treatment != first[1]:
      raise ValueError(
        f"quantize_tree: {layer} ({treatment}) and {first[0]} ({first[1]}) lie in one stack; "
        "its layers share a treatment"
      )
  return first[1]

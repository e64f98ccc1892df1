"""Quantize and dequantize: one matrix, a stack of them, or a whole tree by path rules."""

import dataclasses
import difflib
import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from qlora_jax import codebooks, rotation, tree_paths
from qlora_jax.codebooks import Codebook, ScaleDtype
from qlora_jax.quantized_tensor import (
  AnyQuantizedTensor,
  FlatQuantizedTensor,
  NestedScales,
  OutlierQuantizedTensor,
  QuantizedTensor,
  RotatedQuantizedTensor,
  Scales,
  TwoLevelScales,
  is_quantized,
  join_rows,
  look_up,
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

# Of E4M3 scales.
_MOST_E4M3 = np.float32(448)

# What a search for the scale of least error tries, beside the scale itself.
_CLIPS = np.arange(50, 121, 2).astype(np.float32) / 100

# Of Lloyd's iteration. In the limit the error of a normal matrix is .2% lower (.8% in blocks of 16
# weights, 1 to 12% of Student's t of 3 degrees, by block size).
_LLOYD_ROUNDS = 30

_SCALE_DTYPES = ("auto", *get_args(ScaleDtype))
_SCALE_RULES = ("auto", "absmax", "signed_absmax", "percentile", "mse")


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """How a weight is quantized: the arguments of `quantize`, as plain values.

  Attributes:
    codebook: a name in `codebooks.names()`, or the path of a file for `codebooks.load`.
    block_size: weights along K that share a scale.
    double_quantization: code the scales in 8 bits.
    nested_block_size: scales that share an absmax under double quantization.
    scale_dtype: "float32", "bfloat16", "e4m3" (times a float32 of the matrix) or "e8m0" (a power of
      two), where the scales are not doubly quantized; "auto": the codebook's own, which is
      "float32" but for NVFP4's and MXFP4's.
    scale_rule: how a block's scale is drawn from it. "auto": as the codebook says; "absmax" or
      "signed_absmax" instead; "percentile": of the magnitudes; "mse": that of least squared error.
    percentile: of "percentile"; 100 is the largest magnitude.
    outlier_fraction: of the K rows (columns, in torch's order) that are kept in 16 bits, those of
      the largest norms; 0 for none.
    rotate: rotate K by a random Hadamard matrix first, and the input of each product.
    rotation_seed: of its signs.

  Raises:
    ValueError: naming the field, its value and the rule.
  """

  codebook: str = "nf4"
  block_size: int = 64
  double_quantization: bool = True
  nested_block_size: int = 256
  scale_dtype: str = "auto"
  scale_rule: str = "auto"
  percentile: float = 99.0
  outlier_fraction: float = 0.0
  rotate: bool = False
  rotation_seed: int = 0

  def __post_init__(self):
    _recipe(**self.arguments)

  @property
  def arguments(self) -> dict[str, Any]:
    """Of `quantize`."""
    return {
      field.name: getattr(self, field.name) for field in dataclasses.fields(QuantizationConfig)
    }

  @property
  def choices(self) -> tuple["QuantizationConfig", ...]:
    """What each weight may be quantized by: itself."""
    return (self,)

  @property
  def weighs_errors(self) -> bool:
    """Whether an importance has a part in what `quantize` makes: see there."""
    codebook = codebooks.get(self.codebook, self.block_size)
    return bool(codebook.learned or self.scale_rule == "mse" or self.outlier_fraction)

  @property
  def by_columns(self) -> bool:
    """Whether a matrix's columns can be quantized a few at a time, but for nested scales."""
    recipe = _recipe(**self.arguments)
    restored = recipe.nested_block_size is not None and recipe.codebook.scale != "absmax"
    whole = recipe.codebook.learned or recipe.scale_dtype == "e4m3" or recipe.outlier_fraction
    return not (restored or whole or recipe.rotation_seed is not None)


def details(fields: Mapping[str, Any]) -> str:
  """What is other than float32 scales by the codebook's rule: `, double quantization, rotated`.

  Args:
    fields: of a QuantizationConfig; those of older files may be fewer.
  """
  parts = ["double quantization"] if fields["double_quantization"] else []
  if (dtype := fields.get("scale_dtype", "auto")) not in ("auto", "float32"):
    parts.append(f"{dtype} scales")
  rule = fields.get("scale_rule", "auto")
  if rule == "percentile":
    parts.append(f"scales at percentile {fields['percentile']:g}")
  elif rule != "auto":
    parts.append(f"scales by {rule}")
  if fraction := fields.get("outlier_fraction"):
    parts.append(f"{100 * fraction:g}% of inputs in 16 bits")
  if fields.get("rotate"):
    parts.append("rotated")
  if (bits := fields.get("bits_per_weight")) is not None:
    parts.append(f"{bits:g} bits a weight")
  if (importance := fields.get("importance", "none")) != "none":
    parts.append(f"errors weighed by {importance}")
  if fields.get("gptq"):
    parts.append("GPTQ")
  return "".join(f", {part}" for part in parts)


@dataclasses.dataclass(frozen=True)
class _Recipe:
  """A QuantizationConfig with its choices made: None stands for what is not done."""

  codebook: Codebook
  block_size: int
  nested_block_size: int | None
  scale_dtype: str
  clip: str | None
  percentile: float
  outlier_fraction: float
  rotation_seed: int | None


def _recipe(
  codebook: str | Codebook,
  block_size: int,
  double_quantization: bool,
  nested_block_size: int,
  scale_dtype: str,
  scale_rule: str,
  percentile: float,
  outlier_fraction: float,
  rotate: bool,
  rotation_seed: int,
) -> _Recipe:
  if isinstance(codebook, str):
    codebook = codebooks.get(codebook, block_size)
  for name, value in (("block_size", block_size), ("nested_block_size", nested_block_size)):
    if value < 1:
      raise ValueError(f"{name}: {value}; a block holds at least 1")
  _one_of("scale_dtype", scale_dtype, _SCALE_DTYPES)
  _one_of("scale_rule", scale_rule, _SCALE_RULES)
  stored = codebook.scale_dtype if scale_dtype == "auto" else scale_dtype
  if double_quantization and stored != "float32":
    whose = f"that of codebook {codebook.name!r}, " if scale_dtype == "auto" else ""
    raise ValueError(
      f"scale_dtype: {whose}{stored!r} with double_quantization; the scales are then 8-bit codes, "
      "so leave scale_dtype at float32 or turn double_quantization off"
    )
  if scale_rule in ("absmax", "signed_absmax"):
    if codebook.scale not in ("absmax", "signed_absmax"):
      raise ValueError(
        f"scale_rule: {scale_rule!r} with codebook {codebook.name!r}; its levels are multiples of "
        f"a scale drawn by {codebook.scale!r}"
      )
    codebook = dataclasses.replace(codebook, scale=scale_rule)
  if stored == "e8m0" and codebook.scale in ("signed_absmax", "minmax", "range"):
    raise ValueError(
      f"scale_dtype: 'e8m0' with scales by {codebook.scale!r}; powers of two have no sign, and are "
      "rounded up, which a zero-point does not follow"
    )
  if scale_rule == "mse" and codebook.learned:
    raise ValueError(
      f"scale_rule: 'mse' with codebook {codebook.name!r}; its levels are learned for the scales, "
      "so no scale can be searched for with them"
    )
  if not 0 < percentile <= 100:
    raise ValueError(f"percentile: {percentile}; above 0 and at most 100")
  if not 0 <= outlier_fraction < 1:
    raise ValueError(f"outlier_fraction: {outlier_fraction}; from 0 to below 1")
  return _Recipe(
    codebook,
    block_size,
    nested_block_size if double_quantization else None,
    stored,
    scale_rule if scale_rule in ("percentile", "mse") else None,
    percentile,
    outlier_fraction,
    rotation_seed if rotate else None,
  )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    near = difflib.get_close_matches(str(value), known, 1, 0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{name}: {value!r}; one of {', '.join(known)}{hint}")


def quantize(
  w: jax.Array,
  *,
  codebook: str | Codebook = "nf4",
  block_size: int = 64,
  double_quantization: bool = True,
  nested_block_size: int = 256,
  scale_dtype: str = "auto",
  scale_rule: str = "auto",
  percentile: float = 99.0,
  outlier_fraction: float = 0.0,
  rotate: bool = False,
  rotation_seed: int = 0,
  importance: jax.Array | None = None,
) -> Any:
  """Rounds `w` to the nearest level, block by block along the contraction axis.

  code[k, n] = #{i : w[k, n] / scale[k // B, n] > (levels[i] + levels[i + 1]) / 2}

  so that a tie takes the lower code. Works under `jit`, `vmap` and `scan` and on sharded
  arrays. Code for code what bitsandbytes writes for the same blocks (its CPU rounding: whole
  blocks times a reciprocal, a ragged last block by true division), but for blocks whose
  largest magnitude is below 2^-126: those become exact zeros here.

  Codes are drawn with the exact scale where bitsandbytes does so (absmax, doubly quantized), with
  the stored one otherwise.

  Args:
    w: `[..., K, N]`, any float dtype. Leading axes are separate matrices, with their own
      nested scales.
    codebook: a name, or a Codebook. A learned one's levels minimize
      Σ importance · (w − level · scale)², by Lloyd's iteration.
    block_size: weights along K that share a scale; the last block may be shorter.
    double_quantization: code the scales in 8 bits, blocks of `nested_block_size`.
    scale_dtype, scale_rule, percentile: see `QuantizationConfig`. "mse" takes of each block the
      best of 36 multiples of the codebook's own scale, from .5 to 1.2 and 1 among them. A
      percentile that is zero leaves a block its largest magnitude.
    outlier_fraction, rotate, rotation_seed: see `QuantizationConfig`.
    importance: what a squared error weighs, `[..., K, N]` or `[..., K, 1]`, not negative: a Fisher
      diagonal, or second moments of the inputs. For learned codebooks and "mse"; outliers are the
      rows of the largest Σ importance · w².

  Returns:
    A QuantizedTensor, in an OutlierQuantizedTensor or a RotatedQuantizedTensor where asked for.
    At 4 bits and block 64: 4.127 bits a weight with double quantization, else 4.5 with
    float32 scales (and the table's 64 bytes).

  Raises:
    ValueError: fewer than two axes, an empty one, or, where the values are at hand (not
      under a trace), a weight that is not finite or beyond 2^106: the message names its index;
      an importance that does not fit or that nothing would weigh by; a rotation of an odd K, or
      with an importance.
    TypeError: not a float dtype.

  References:
    Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, section 3.
  """
  recipe = _recipe(
    codebook,
    block_size,
    double_quantization,
    nested_block_size,
    scale_dtype,
    scale_rule,
    percentile,
    outlier_fraction,
    rotate,
    rotation_seed,
  )
  w = jnp.asarray(w)
  if not jnp.issubdtype(w.dtype, jnp.floating):
    raise TypeError(f"quantize: dtype {w.dtype}; a weight is of a float dtype")
  if w.ndim < 2 or 0 in w.shape:
    raise ValueError(f"quantize: shape {w.shape}; a weight is [..., K, N] with no empty axis")
  if recipe.rotation_seed is not None and w.shape[-2] % 2:
    raise ValueError(f"rotate: K = {w.shape[-2]}; a Hadamard rotation wants an even K")
  if importance is not None:
    importance = _checked_importance(jnp.asarray(importance, jnp.float32), w.shape, recipe)
  if not isinstance(w, Tracer):
    _check_range(w)
  return _quantize(w, importance, recipe)


def quantize_by(
  w: jax.Array, config: QuantizationConfig, *, importance: jax.Array | None = None
) -> AnyQuantizedTensor:
  """`quantize` with the arguments that are `config`'s fields.

  Raises:
    ValueError, TypeError: see `quantize`.
  """
  return quantize(w, **config.arguments, importance=importance)


def _checked_importance(
  importance: jax.Array, shape: tuple[int, ...], recipe: _Recipe
) -> jax.Array:
  if importance.shape not in (shape, (*shape[:-1], 1)):
    raise ValueError(
      f"importance: {list(importance.shape)} for a weight {list(shape)}; of the weight's shape, or "
      "with a last axis of 1"
    )
  if recipe.rotation_seed is not None:
    raise ValueError("importance: with rotate; it is of the weights that were not rotated")
  if not (recipe.codebook.learned or recipe.clip == "mse" or recipe.outlier_fraction):
    raise ValueError(
      f"importance: weighs nothing; codebook {recipe.codebook.name!r} is not learned, scale_rule "
      "is not 'mse', and no outliers are kept"
    )
  if not isinstance(importance, Tracer) and not bool(
    ((importance >= 0) & jnp.isfinite(importance)).all()
  ):
    raise ValueError("importance: has values that are negative or not finite")
  return importance


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


def _quantize_tree_of_matrices(w, importance, recipe):
  def matrix(w, importance):
    return _quantize_around(w, importance, recipe)

  for _ in range(w.ndim - 2):
    matrix = jax.vmap(matrix)
  return matrix(w, importance)


# Jitted as a whole so that an eager call holds no copies of w either.
_quantize = jax.jit(_quantize_tree_of_matrices, static_argnums=2)


def _quantize_around(w, importance, recipe: _Recipe) -> AnyQuantizedTensor:
  """A matrix with what stands around it: outliers first, then the rotation of what is left."""
  if not recipe.outlier_fraction:
    return _quantize_rotated(w, importance, recipe)
  size = jnp.square(w.astype(jnp.float32))
  size = (size if importance is None else size * importance).sum(1)
  count = math.ceil(recipe.outlier_fraction * len(size))
  rows = jnp.sort(jax.lax.top_k(size, count)[1])
  inner = _quantize_rotated(w.at[rows].set(0), importance, recipe)
  values = w[rows].astype(jnp.float32) - _dequantize_tree_of_matrices(inner, jnp.float32)[rows]
  return OutlierQuantizedTensor(inner, rows, values.astype(jnp.bfloat16))


def _quantize_rotated(w, importance, recipe: _Recipe) -> QuantizedTensor | RotatedQuantizedTensor:
  if recipe.rotation_seed is None:
    return _quantize_matrix(w, importance, recipe)
  signs = rotation.random_signs(recipe.rotation_seed, len(w))
  rotated = rotation.rotate(w.astype(jnp.float32), signs, 0)
  return RotatedQuantizedTensor(_quantize_matrix(rotated, importance, recipe), signs)


def _quantize_matrix(w, importance, recipe: _Recipe) -> QuantizedTensor:
  codebook, block_size = recipe.codebook, recipe.block_size
  if importance is not None:
    importance = jnp.broadcast_to(importance, w.shape)
  exact, zero = _scale(w, codebook, block_size)
  largest = jnp.abs(exact).max()
  if recipe.clip is not None:
    exact = exact * _clip(w, exact, zero, largest, importance, recipe)
  if recipe.nested_block_size is not None:
    scales = nest_scales(exact, recipe.nested_block_size)
  else:
    scales = _store_scales(exact, largest, recipe.scale_dtype)
  bitsandbytes = codebook.scale == "absmax" and recipe.nested_block_size is not None
  scale = exact if bitsandbytes else restore_scales(scales)

  levels, thresholds = jnp.asarray(codebook.table), codebook.thresholds
  if codebook.learned:
    levels, thresholds = _learn_levels(w, scale, zero, importance, recipe)
  codes = _codes(w, scale, zero, thresholds, block_size)
  if any(level == following for level, following in itertools.pairwise(codebook.levels)):
    inverse = _rows(reciprocal(scale), len(w), block_size)
    codes = codes + _flushed(w, inverse).astype(jnp.uint8)
  packed, padding = pack(codes, codebook.bits)
  return QuantizedTensor(
    codes=packed,
    scales=scales,
    levels=levels,
    zero=zero,
    bits=codebook.bits,
    block_size=block_size,
    padding=padding,
  )


def reciprocal(scale: jax.Array) -> jax.Array:
  """1 / scale, and 0 where the scale counts as zero."""
  usable = jnp.abs(scale) >= _TINY
  return jnp.where(usable, 1 / jnp.where(usable, scale, 1), 0)


def _codes(w, scale, zero, thresholds, block_size) -> jax.Array:
  """`[K, N]` uint8: how many thresholds each weight, in units of its block's scale, lies above."""
  k, _ = w.shape
  whole = k // block_size * block_size
  x = w.astype(jnp.float32) * _rows(reciprocal(scale), k, block_size)
  if zero is not None:
    x = x + _rows(zero.astype(jnp.float32), k, block_size)
  codes = count_below(x, thresholds)
  if whole < k:
    # bitsandbytes divides in a ragged last block, where it multiplies by the reciprocal above.
    usable = jnp.abs(scale[-1:]) >= _TINY
    x = w[whole:].astype(jnp.float32)
    # The select keeps this a division: XLA turns one by a broadcast into the reciprocal again.
    x = x / jnp.where((x != 0) & usable, scale[-1:], 1)
    x = jnp.where(usable, x, 0)
    if zero is not None:
      x = x + zero[-1:].astype(jnp.float32)
    codes = jnp.concatenate([codes[:whole], count_below(x, thresholds)])
  return codes


def _store_scales(scales: jax.Array, largest: jax.Array, dtype: str) -> Scales:
  """float32 scales as `dtype`; `largest` is the magnitude that E4M3's largest number stands for."""
  if dtype == "e4m3":
    factor = largest / _MOST_E4M3
    codes = jnp.clip(scales * reciprocal(factor), -_MOST_E4M3, _MOST_E4M3)
    return TwoLevelScales(codes.astype(jnp.float8_e4m3fn), factor)
  if dtype == "e8m0":
    # The exponent of a float32 is the byte; what is no power of two is rounded up, so that no
    # weight is clipped.
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    exponent = ((bits + np.uint32((1 << 23) - 1)) >> np.uint32(23)).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(exponent, jnp.float8_e8m0fnu)
  return scales.astype(dtype)


def _scale(w: jax.Array, codebook: Codebook, block_size: int) -> tuple[jax.Array, jax.Array | None]:
  """`[K, N]` → the blocks' float32 scales and their zero-points, `[ceil(K / B), N]`."""
  if codebook.scale in ("absmax", "power_of_two"):
    scale = _block_max(jnp.abs(w), block_size)
    if codebook.scale == "power_of_two":
      # Without its mantissa a float is a power of two.
      bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) & np.uint32(0x7F800000)
      scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
      scale = scale * np.float32(2.0 ** -math.floor(math.log2(codebook.levels[-1])))
    return jnp.where(scale >= _TINY, scale, 0), None
  low, high = -_block_max(-w, block_size), _block_max(w, block_size)
  if codebook.scale == "signed_absmax":
    scale = jnp.where(high >= -low, high, low)
    return jnp.where(jnp.abs(scale) >= _TINY, scale, 0), None
  # "minmax" and "range": zero lies within the range, so that it has a code, and that a block of
  # one value has a scale.
  low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  first, last = codebook.levels[0], codebook.levels[-1]
  scale = (high - low) / (last - first)
  usable = scale >= _TINY
  zero = first - jnp.where(usable, low / jnp.where(usable, scale, 1), 0)
  if codebook.scale == "range":
    zero = zero.astype(jnp.bfloat16)
  else:
    zero = jnp.clip(jnp.round(zero), first, last).astype(jnp.uint8)
  return jnp.where(usable, scale, 0), zero


def _clip(w, exact, zero, largest, importance, recipe: _Recipe) -> jax.Array:
  """What each block's scale is multiplied by, `[ceil(K / B), N]`."""
  block_size = recipe.block_size
  if recipe.clip == "percentile":
    share = _block_percentile(jnp.abs(w), block_size, recipe.percentile)
    share = share / jnp.maximum(_block_max(jnp.abs(w), block_size), _TINY)
    return jnp.where(share > 0, share, 1)

  def error(clip):
    scale = exact * clip
    if recipe.nested_block_size is None:
      scale = restore_scales(_store_scales(scale, largest, recipe.scale_dtype))
    codes = _codes(w, scale, zero, recipe.codebook.thresholds, block_size)
    level = jnp.asarray(recipe.codebook.table).at[codes].get(mode="promise_in_bounds")
    if zero is not None:
      level = level - _rows(zero.astype(jnp.float32), len(w), block_size)
    loss = jnp.square(level * _rows(scale, len(w), block_size) - w.astype(jnp.float32))
    return _block_sum(loss if importance is None else loss * importance, block_size)

  def better(best, clip):
    least, found = best
    own = error(clip)
    return (jnp.minimum(own, least), jnp.where(own < least, clip, found)), None

  start = (error(np.float32(1)), jnp.ones_like(exact))
  return jax.lax.scan(better, start, jnp.asarray(_CLIPS))[0][1]


def _learn_levels(w, scale, zero, importance, recipe: _Recipe) -> tuple[jax.Array, jax.Array]:
  """Levels of least Σ importance · (w − (level − zero) · scale)², near the codebook's; midpoints.

  Returns:
    `[2**bits]` of a matrix, or `[N, 2**bits]`; and what `_codes` compares with.
  """
  k, n = w.shape
  scale = _rows(scale, k, recipe.block_size)
  x = w.astype(jnp.float32) * reciprocal(scale)
  if zero is not None:
    x = x + _rows(zero.astype(jnp.float32), k, recipe.block_size)
  mass = jnp.square(scale) if importance is None else jnp.square(scale) * importance
  by_column = recipe.codebook.learned == "column"

  def total(values):
    return values.sum(0, keepdims=True) if by_column else values.sum()

  def lloyd(_, levels):
    thresholds = (levels[:-1] + levels[1:]) * np.float32(0.5)
    centers = []
    for i in range(len(levels)):
      cell = mass
      if i:
        cell = jnp.where(x > thresholds[i - 1], cell, 0)
      if i < len(levels) - 1:
        cell = jnp.where(x <= thresholds[i], cell, 0)
      whole = total(cell)
      # A level that no weight is nearest to stays.
      centers.append(
        jnp.where(whole > 0, total(cell * x) / jnp.where(whole > 0, whole, 1), levels[i])
      )
    return jnp.stack(centers)

  # The codebook's levels are quantiles of N(0, 1) about a middle, in units of the last, `end`.
  # Stretched by √3 they are about as dense as a normal's best levels (Panter and Dite, 1951), so
  # that few rounds do.
  table = recipe.codebook.table
  middle, half = (table[-1] + table[0]) / 2, (table[-1] - table[0]) / 2
  start = jnp.asarray((table - middle) / half)
  start = jnp.broadcast_to(start[:, None, None], (len(start), 1, n)) if by_column else start
  end = np.float32(statistics.NormalDist().inv_cdf(1 - 0.5 / len(start)))
  whole = total(mass)

  def mean(values):
    return total(mass * values) / jnp.where(whole > 0, whole, 1)

  center = jnp.zeros_like(whole) if zero is None else mean(x)
  square = mean(jnp.square(x - center))
  # Of weights that are all alike what is left is rounding.
  varied = square > np.square(half * np.float32(2.0**-12))
  spread = jnp.where(varied, np.float32(3**0.5) * end * jnp.sqrt(square), half)
  spread = jnp.minimum(spread, half)
  if by_column:
    center, spread = center[None], spread[None]
  start = center + start * spread
  levels = jax.lax.fori_loop(0, _LLOYD_ROUNDS, lloyd, start)
  thresholds = (levels[:-1] + levels[1:]) * np.float32(0.5)
  return (levels[:, 0].T if by_column else levels), thresholds


def _block_max(x: jax.Array, block_size: int) -> jax.Array:
  k, n = x.shape
  x = x.astype(jnp.float32)
  if k % block_size == 0:
    return x.reshape(-1, block_size, n).max(1)
  return _by_windows(x, block_size, np.float32(-np.inf), jax.lax.max)


def _block_sum(x: jax.Array, block_size: int) -> jax.Array:
  k, n = x.shape
  if k % block_size == 0:
    return x.reshape(-1, block_size, n).sum(1)
  return _by_windows(x, block_size, np.float32(0), jax.lax.add)


def _by_windows(x: jax.Array, block_size: int, start: np.float32, reduce: Any) -> jax.Array:
  # The window pads the ragged block by itself; slices of x, or jnp.pad, would be copies of it.
  return jax.lax.reduce_window(
    x,
    start,
    reduce,
    window_dimensions=(block_size, 1),
    window_strides=(block_size, 1),
    padding=((0, -len(x) % block_size), (0, 0)),
  )


def _block_percentile(x: jax.Array, block_size: int, percentile: float) -> jax.Array:
  """Interpolated between neighbours, as NumPy does it by default."""
  x = jnp.pad(
    x.astype(jnp.float32), ((0, -len(x) % block_size), (0, 0)), constant_values=np.float32(np.nan)
  )
  blocks = x.reshape(-1, block_size, x.shape[1])
  return jnp.nanpercentile(blocks, np.float32(percentile), axis=1)


def nearest(x: jax.Array, codebook: Codebook) -> jax.Array:
  """The uint8 index of the level nearest to each `x`; the lower one at a tie."""
  return count_below(x, codebook.thresholds)


def count_below(x: jax.Array, thresholds: np.ndarray | jax.Array) -> jax.Array:
  """#{i : x > thresholds[i]} as uint8, of at most 255. They are numbers, or `[1, N]` each.

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

  weights = [look_up(levels, codes) for codes in unpack(w.codes, w.bits, w.padding)]
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
  if isinstance(w, RotatedQuantizedTensor):
    rotated = _dequantize_tree_of_matrices(w.inner, jnp.float32)
    return rotation.rotate_back(rotated, w.signs, 0).astype(dtype)
  if isinstance(w, OutlierQuantizedTensor):
    inner = _dequantize_tree_of_matrices(w.inner, jnp.float32)
    rows = inner.at[w.rows].add(w.values.astype(jnp.float32), unique_indices=True)
    return rows.astype(dtype)
  return join_rows(decode(w, dtype), 0)


# Jitted as `_quantize` is, and for the same reason.
_dequantize = jax.jit(_dequantize_tree_of_matrices, static_argnums=1)


Treatment = QuantizationConfig | DTypeLike | None


def quantize_tree(
  params: Any, rules: Mapping[str, Treatment], *, importance: Mapping[str, Any] | None = None
) -> Any:
  """Treats each weight of a tree by the rule whose pattern matches its path.

  Args:
    params: any pytree of arrays. Leaves under a key `layers` are stacks (see `tree_paths`).
    rules: path pattern → what to do: a QuantizationConfig quantizes the matrices
      `[..., K, N]` that it matches (vectors, such as biases and norms, stay as they are); a
      dtype casts; None leaves as is, as does no rule.
    importance: path of a weight that is quantized → what its errors weigh, as `quantize_by` takes
      it (`calibration.fisher_diagonal`, `calibration.input_moments`).

  Returns:
    The tree with a QuantizedTensor for each quantized leaf.

  Raises:
    ValueError: a pattern that matches nothing, or none but vectors for a QuantizationConfig;
      a leaf, or two layers of one stack, to which rules that disagree apply; a non-finite
      weight; an importance of what is not quantized. Each names pattern and path.

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

  importance = importance or {}
  for path in importance:
    if not isinstance(chosen.get(path), QuantizationConfig):
      raise ValueError(f"quantize_tree: {path}: an importance of what is not quantized")

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
      return quantize_by(leaf, treatment, importance=importance.get(path))
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

"""The tables of levels that codes index, and how each is constructed.

A codebook is a short ascending list of levels; a weight is stored as the index of the
level nearest to `weight / scale`, with one scale a block. What differs between NF4, FP4
and INT4 is the list and how the scale is drawn from the block, nothing else: none of them
computes in 4-bit arithmetic. Adding a table is one `@_register` function and a test.
"""

import dataclasses
import difflib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

ScaleRule = Literal["absmax", "signed_absmax", "minmax"]

# The widths a code can be packed to.
CODE_BITS = (2, 3, 4, 8)


@dataclasses.dataclass(frozen=True)
class Codebook:
  """Levels, and the rule that draws a block's scale from its weights.

  `w ≈ levels[code] · scale`, or `(levels[code] − zero) · scale` under "minmax".

  Attributes:
    name: the published name.
    levels: ascending, at most 256. Two zeros may stand side by side (bitsandbytes' FP4
      has a code for −0 that it uses).
    scale: "absmax", the block's largest magnitude; "signed_absmax", the element of largest
      magnitude with its sign, so that one end of the table is always hit exactly;
      "minmax", (max − min) / (last − first level) with an integer zero-point in 8 bits.
    reference: where the table comes from.

  Raises:
    ValueError: levels that are not finite, not ascending, too few or many, or, under "minmax",
      out of the zero-point's range.
  """

  name: str
  levels: tuple[float, ...]
  scale: ScaleRule = "absmax"
  reference: str = ""

  def __post_init__(self):
    object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
    if self.scale not in get_args(ScaleRule):
      raise ValueError(
        f"codebook {self.name}: scale {self.scale!r}; one of {', '.join(get_args(ScaleRule))}"
      )
    if not 2 <= len(self.levels) <= 256:
      raise ValueError(f"codebook {self.name}: {len(self.levels)} levels; a table has 2 to 256")
    for i, level in enumerate(self.levels):
      if not math.isfinite(level):
        raise ValueError(f"codebook {self.name}: level {i} is {level}; levels are finite")
    for i, (low, high) in enumerate(zip(self.levels, self.levels[1:], strict=False)):
      if low > high or (low == high and low != 0):
        raise ValueError(
          f"codebook {self.name}: level {i + 1} ({high}) does not exceed level {i} ({low}); "
          "levels ascend"
        )
    if self.scale == "minmax" and not 0 <= self.levels[0] <= self.levels[-1] <= 255:
      raise ValueError(
        f"codebook {self.name}: levels from {self.levels[0]} to {self.levels[-1]}; under "
        "'minmax' they lie in [0, 255], as the zero-point does, a uint8"
      )

  @property
  def bits(self) -> int:
    """The smallest width in `CODE_BITS` that can index every level."""
    return next(bits for bits in CODE_BITS if len(self.levels) <= 2**bits)

  @property
  def table(self) -> np.ndarray:
    """`[2**bits]` float32; a short table is filled up with its last level, which no code uses."""
    filler = (self.levels[-1],) * (2**self.bits - len(self.levels))
    return np.asarray(self.levels + filler, np.float32)

  @property
  def thresholds(self) -> np.ndarray:
    """`[len(levels) - 1]` float32 midpoints; a weight on one takes the lower code.

    Rounded from float32 levels, as bitsandbytes' own are: float64 midpoints would send
    weights that lie on a tie the other way.
    """
    levels = np.asarray(self.levels, np.float32)
    return (levels[:-1] + levels[1:]) * np.float32(0.5)


_REGISTRY: dict[str, Callable[[int | None], Codebook]] = {}


def _register(name: str):
  def register(build: Callable[[int | None], Codebook]):
    _REGISTRY[name] = build
    return build

  return register


def names() -> tuple[str, ...]:
  """The names that `get` knows."""
  return tuple(_REGISTRY)


def get(name: str, block_size: int | None = None) -> Codebook:
  """The codebook called `name`.

  Args:
    name: one of `names()`.
    block_size: for the tables that depend on it; the others ignore it.

  Raises:
    ValueError: an unknown name, with the nearest known one.
  """
  if name not in _REGISTRY:
    near = difflib.get_close_matches(name, _REGISTRY, 1, 0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"codebook {name!r}: no such table; {hint}known: {', '.join(_REGISTRY)}")
  return _REGISTRY[name](block_size)


def custom(
  levels: Sequence[float], *, name: str = "custom", scale: ScaleRule = "absmax"
) -> Codebook:
  """A table of one's own. Levels are multiples of the block's scale, so within [−1, 1] as a rule.

  Raises:
    ValueError: see `Codebook`.
  """
  return Codebook(name, tuple(levels), scale, "the user's own")


def _normal_ppf(p: float) -> float:
  return statistics.NormalDist().inv_cdf(p)


def normal_float(bits: int) -> tuple[float, ...]:
  """The NormalFloat construction: quantiles of two half normals that share an exact zero.

  With n = 2^bits, the positive half is Φ⁻¹ at n/2 points evenly spaced from `offset` down to
  (not including) ½, the negative half the same with n/2 − 1, all divided by Φ⁻¹(offset);
  offset = 1 − (1/(2n) + 1/(2(n−1)))/2, which is .9677083 at 4 bits. The bins do not have
  equal mass: that is `equal_mass16`.

  References:
    Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E.
  """
  n = 2**bits
  offset = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
  half = [_normal_ppf(float(p)) for p in np.linspace(offset, 0.5, n // 2 + 1)[:-1]]
  other = [-_normal_ppf(float(p)) for p in np.linspace(offset, 0.5, n // 2)[:-1]]
  return tuple(level / half[0] for level in sorted([*half, 0.0, *other]))


def dynamic_map() -> np.ndarray:
  """The signed 8-bit dynamic map of bitsandbytes, `[256]` float32, ascending in (−1, 1].

  Seven decades; decade i holds 2^i magnitudes, the means of neighbours among 2^i + 1 points
  evenly spaced in [.1, 1], times 10^(i − 6), with either sign, plus 0 and 1. It codes the
  absmax scales under double quantization (the paper's text says FP8; the code uses this).

  References:
    Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021,
    https://arxiv.org/abs/2110.02861.
  """
  f32 = np.float32
  values = [0.0, 1.0]
  for i in range(7):
    # The bits of torch.linspace in float32, which the published map is made with: its step is
    # rounded, each point is one fused multiply-add from the nearer end.
    steps = 2**i
    step, index = np.float64((f32(1) - f32(0.1)) / f32(steps)), np.arange(steps + 1)
    edges = np.where(
      index < (steps + 1) // 2,
      (np.float64(f32(0.1)) + step * index).astype(f32),
      (1 - step * (steps - index)).astype(f32),
    )
    means = (edges[:-1] + edges[1:]) / f32(2) * f32(10.0 ** (i - 6))
    values += [*means, *-means]
  return np.sort(np.asarray(values, f32))


_QLORA = "Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314"


@_register("nf4")
def _nf4(_):
  # The published constants, not the construction: the two differ in the last bits (by at
  # most 1.9e-7), and checkpoints hold these.
  levels = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  )
  return Codebook("nf4", levels, reference=f"{_QLORA}, appendix E")


@_register("nf3")
def _nf3(_):
  return Codebook("nf3", normal_float(3), reference=f"the construction of {_QLORA} at 3 bits")


@_register("nf2")
def _nf2(_):
  return Codebook("nf2", normal_float(2), reference=f"the construction of {_QLORA} at 2 bits")


@_register("fp4")
def _fp4(_):
  # bitsandbytes' own FP4, not OCP's E2M1: its smallest level is 16 times smaller. Both of its
  # codes for zero are kept: it sends values in (0, .0026] to the second one.
  positive = tuple(level / 12 for level in (0.0625, 2, 3, 4, 6, 8, 12))
  levels = (*(-level for level in reversed(positive)), 0.0, 0.0, *positive)
  return Codebook("fp4", levels, reference="bitsandbytes, functional.py, get_4bit_type")


@_register("int4")
def _int4(_):
  return Codebook(
    "int4", tuple(i / 7 for i in range(-7, 8)), reference="symmetric round to nearest, ±7"
  )


@_register("int4_signed")
def _int4_signed(_):
  # The element of largest magnitude maps to code −8 whatever its sign, so w = −8 d: in units
  # of that element the levels are −7/8 … 1.
  return Codebook(
    "int4_signed",
    tuple(i / 8 for i in range(-7, 9)),
    scale="signed_absmax",
    reference="llama.cpp, Q4_0",
  )


@_register("int4_zero_point")
def _int4_zero_point(_):
  return Codebook(
    "int4_zero_point",
    tuple(float(i) for i in range(16)),
    scale="minmax",
    reference="asymmetric round to nearest, 8-bit integer zero-point, as in GPTQ and AWQ files",
  )


@_register("int8")
def _int8(_):
  return Codebook(
    "int8", tuple(i / 127 for i in range(-127, 128)), reference="symmetric round to nearest, ±127"
  )


@_register("equal_mass16")
def _equal_mass16(_):
  # What many write-ups call NF4: the medians of 16 bins of equal normal mass. It has no zero.
  quantiles = [_normal_ppf((i + 0.5) / 16) for i in range(16)]
  return Codebook(
    "equal_mass16",
    tuple(q / quantiles[-1] for q in quantiles),
    reference="medians of 16 bins of equal mass under N(0, 1)",
  )


def name_of(levels: np.ndarray, block_size: int) -> str | None:
  """The registered name of a table, `[..., 2**bits]`, all of whose rows are alike; else None."""
  return next((name for name in names() if is_table(levels, get(name, block_size).table)), None)


def is_table(levels: Any, table: np.ndarray) -> bool:
  """Whether all rows of `levels`, `[..., 2**bits]`, are `table`."""
  return levels.shape[-1] == len(table) and bool((np.asarray(levels) == table).all())

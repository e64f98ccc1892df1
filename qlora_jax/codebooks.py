"""The tables of levels that codes index, and how each is constructed.

A codebook is a short ascending list of levels; a weight is stored as the index of the
level nearest to `weight / scale`, with one scale a block. What differs between NF4, FP4
and INT4 is the list and how the scale is drawn from the block, nothing else: none of them
computes in 4-bit arithmetic. Adding a table is one `_register_table` and a test.
"""

import dataclasses
import difflib
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qlora_jax import block_optimal

ScaleRule = Literal["absmax", "signed_absmax", "minmax", "range", "power_of_two"]

# What the scales are stored in, where they are not doubly quantized: "e4m3" is an 8-bit float times
# a float32 of the whole matrix, "e8m0" a power of two in 8 bits.
ScaleDtype = Literal["float32", "bfloat16", "e4m3", "e8m0"]

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
      "minmax", (max − min) / (last − first level) with an integer zero-point in 8 bits; "range",
      the same with a zero-point that is no integer, in bfloat16;
      "power_of_two", 2^(⌊log₂ absmax⌋ − ⌊log₂ last level⌋), as the OCP's microscaling formats.
    reference: where the table comes from.
    scale_dtype: of the scales, where no other is asked for.
    learned: None, or what has a table of its own, learned from its weights: each "matrix", or
      each output "column" of one. Lloyd's iteration then starts from `levels`, quantiles of the
      normal distribution, in units of the weights' own spread (and, under "range", about their
      mean).

  Raises:
    ValueError: levels that are not finite, not ascending, too few or many, or, under "minmax",
      out of the zero-point's range, or, under "power_of_two", all at most 0; a learned table that
      is not full; an unknown rule or dtype.
  """

  name: str
  levels: tuple[float, ...]
  scale: ScaleRule = "absmax"
  reference: str = ""
  scale_dtype: ScaleDtype = "float32"
  learned: Literal["matrix", "column"] | None = None

  def __post_init__(self):
    object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
    if self.scale not in get_args(ScaleRule):
      raise ValueError(
        f"codebook {self.name}: scale {self.scale!r}; one of {', '.join(get_args(ScaleRule))}"
      )
    if self.scale_dtype not in get_args(ScaleDtype):
      raise ValueError(
        f"codebook {self.name}: scale_dtype {self.scale_dtype!r}; one of "
        f"{', '.join(get_args(ScaleDtype))}"
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
    if self.scale == "power_of_two" and self.levels[-1] <= 0:
      raise ValueError(
        f"codebook {self.name}: last level {self.levels[-1]}; above 0 under 'power_of_two', whose "
        "exponent is taken from it"
      )
    if self.learned and len(self.levels) not in [2**bits for bits in CODE_BITS]:
      raise ValueError(
        f"codebook {self.name}: {len(self.levels)} levels to learn; all that a code can name"
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

# Names from papers and other frameworks that are left out, and why.
_REFUSED = {
  **{
    f"lloydmax_gauss_{bits}bit": "its scale is a matrix's standard deviation, which no rule here "
    f"draws; lloyd_max{bits} learns its levels from the weights, bof{bits} is the normal optimum "
    "under the absmax"
    for bits in (2, 3, 4)
  },
  "int4_asym_floatmin": "a float32 minimum a block costs 24 bits more than a zero-point's 8",
  "mxfp4_ceil": "the format's exponent is rounded down, as mxfp4 does; codebook e2m1 with "
  "scale_dtype e8m0 rounds up",
  "mxfp4_round": "the format's exponent is rounded down, as mxfp4 does",
}


def _register_table(
  name: str, levels: Sequence[float], reference: str, scale: ScaleRule = "absmax"
) -> None:
  """A table that does not depend on the block size."""
  codebook = Codebook(name, tuple(levels), scale, reference)
  _REGISTRY[name] = lambda _: codebook


def names() -> tuple[str, ...]:
  """The names that `get` knows."""
  return tuple(_REGISTRY)


def get(name: str, block_size: int | None = None) -> Codebook:
  """The codebook called `name`.

  Args:
    name: one of `names()`, or the path of a file for `load`, which ends in ".json".
    block_size: for the tables that depend on it; the others ignore it.

  Raises:
    ValueError: an unknown name, with the nearest known one; one that is left out, with the reason;
      a block size that a table is not published for.
    FileNotFoundError, ValueError: as `load`.
  """
  if name.endswith(".json"):
    return load(name)
  if name in _REFUSED:
    raise ValueError(f"codebook {name!r}: not offered; {_REFUSED[name]}")
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


def load(path: str | os.PathLike[str]) -> Codebook:
  """A table from a file: `{"levels": [...], "scale": "absmax"}`, or the list of levels alone.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not JSON, or no table; the message names the file.
  """
  path = Path(path)
  try:
    given = json.loads(path.read_text(encoding="utf-8"))
    table: dict[str, Any] = {"levels": given} if isinstance(given, list) else dict(given)
    if unknown := table.keys() - {"levels", "scale", "name"}:
      raise ValueError(f"{', '.join(sorted(unknown))}: unknown; a table has levels, scale, name")
    return custom(**{"name": path.stem, **table})
  except FileNotFoundError:
    raise FileNotFoundError(f"{path}: no such file; a codebook's levels were looked for") from None
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{path}: not a codebook ({error})") from None


def _normal_ppf(p: float) -> float:
  return statistics.NormalDist().inv_cdf(p)


def student_ppf(p: float) -> float:
  """The inverse of the distribution of Student's t with 5 degrees of freedom."""

  def below(t: float) -> float:
    angle = math.atan(t / math.sqrt(5))
    sine, cosine = math.sin(angle), math.cos(angle)
    return 0.5 + (angle + sine * cosine * (1 + 2 / 3 * cosine**2)) / math.pi

  low, high = -1e3, 1e3
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if below(middle) < p else (low, middle)
  return (low + high) / 2


def normal_float(
  bits: int, *, offset: float | None = None, ppf: Callable[[float], float] = _normal_ppf
) -> tuple[float, ...]:
  """The NormalFloat construction: quantiles of two half normals that share an exact zero.

  With n = 2^bits, the positive half is Φ⁻¹ at n/2 points evenly spaced from `offset` down to
  (not including) ½, the negative half the same with n/2 − 1, all divided by Φ⁻¹(offset);
  offset = 1 − (1/(2n) + 1/(2(n−1)))/2, which is .9677083 at 4 bits. The bins do not have
  equal mass: that is `equal_mass16`.

  Args:
    offset: another than that of the bits.
    ppf: another distribution's inverse than Φ⁻¹.

  References:
    Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E.
  """
  n = 2**bits
  end = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2 if offset is None else offset
  half = [ppf(float(p)) for p in np.linspace(end, 0.5, n // 2 + 1)[:-1]]
  other = [-ppf(float(p)) for p in np.linspace(end, 0.5, n // 2)[:-1]]
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


# The published constants, not the construction: the two differ in the last bits (by at most
# 1.9e-7), and checkpoints hold these.
_register_table(
  "nf4",
  (
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
  ),
  f"{_QLORA}, appendix E",
)
for _bits in (3, 2):
  _register_table(
    f"nf{_bits}", normal_float(_bits), f"the construction of {_QLORA} at {_bits} bits"
  )


def _mirrored(positive: Sequence[float], largest: float) -> tuple[float, ...]:
  """±positive and 0, in units of `largest`."""
  scaled = [level / largest for level in positive]
  return (*(-level for level in reversed(scaled)), 0.0, *scaled)


# Integers. Symmetric: ±(2^(b-1) − 1), one code unused. Signed: the element of largest magnitude
# maps to −2^(b-1) whatever its sign, so w = −2^(b-1) d: in units of it the levels end at 1.
for _bits in (2, 3, 4, 8):
  _half = 2 ** (_bits - 1)
  _register_table(
    f"int{_bits}",
    _mirrored(range(1, _half), _half - 1),
    f"symmetric round to nearest, ±{_half - 1}",
  )
for _bits in (2, 3, 4, 8):
  _half = 2 ** (_bits - 1)
  _register_table(
    f"int{_bits}_signed",
    [i / _half for i in range(1 - _half, _half + 1)],
    "llama.cpp, Q4_0 and its like",
    "signed_absmax",
  )
_register_table(
  "int2_no_zero", [-1, -1 / 3, 1 / 3, 1], "uniform, levels in the middle of equal steps; no zero"
)
_register_table(
  "int4_absmax8", [i / 8 for i in range(-8, 8)], "the naive −8 … 7: clips positive maxima to 7/8"
)
_register_table(
  "int4_absmax7_5",
  [i / 7.5 for i in range(-8, 8)],
  "(largest − least integer) / 2, as torchao's symmetric mapping",
)

# Floats of 4 bits. bitsandbytes' own is not OCP's E2M1: its smallest level is 16 times smaller.
# Both of its codes for zero are kept: it sends values in (0, .0026] to the second one.
_register_table(
  "fp4",
  sorted((*_mirrored((0.0625, 2, 3, 4, 6, 8, 12), 12), 0.0)),
  "bitsandbytes, functional.py, get_4bit_type",
)
_register_table(
  "e2m1",
  _mirrored((0.5, 1, 1.5, 2, 3, 4, 6), 6),
  "OCP Microscaling Formats 1.0, 2023; the element of MXFP4 and NVFP4",
)
_register_table("e3m0", _mirrored((0.25, 0.5, 1, 2, 4, 8, 16), 16), "powers of two, 3-bit exponent")
_DOTZEL = "Dotzel et al., Learning from Students, 2024, https://arxiv.org/abs/2405.03103"
_register_table(
  "e2m1_super_precision",
  sorted((*_mirrored((0.5, 1, 1.5, 2, 3, 4, 6), 6), 5 / 6)),
  f"{_DOTZEL}: the code of −0 is +5",
)
_register_table(
  "e2m1_super_range",
  sorted((*_mirrored((0.5, 1, 1.5, 2, 3, 4, 6), 8), 1)),
  f"{_DOTZEL}: the code of −0 is +8",
)
_APOT = (1, 2, 3, 4, 6, 8, 10)
_register_table(
  "apot4",
  _mirrored(_APOT, 10),
  "Li et al., Additive Powers-of-Two Quantization, 2020, https://arxiv.org/abs/1909.13144",
)
_register_table(
  "apot4_super_precision", sorted((*_mirrored(_APOT, 10), 0.5)), f"{_DOTZEL}: the code of −0 is +5"
)

# Quantiles.
_register_table(
  "sf4",
  normal_float(4, ppf=student_ppf),
  f"{_DOTZEL}: NF4's construction of Student's t with 5 degrees of freedom",
)
_LOFTQ = "Li et al., LoftQ, 2023, https://arxiv.org/abs/2310.08659, its code"
for _bits in (2, 3):
  _register_table(
    f"nf{_bits}_loftq",
    normal_float(_bits, offset=0.9677083),
    f"{_LOFTQ}: the offset of 4 bits",
  )


def _symmetric_normal_float(bits: int) -> list[float]:
  """The middles between 2^bits + 1 quantiles of the normal distribution: no zero."""
  edges = [_normal_ppf(float(p)) for p in np.linspace(1 - 0.9677083, 0.9677083, 2**bits + 1)]
  middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
  return [middle / middles[-1] for middle in middles]


for _bits in (2, 4):
  _register_table(
    f"nf{_bits}_symmetric", _symmetric_normal_float(_bits), f"{_LOFTQ}, symmetric; no zero"
  )

# By block size, without −1, 0 and 1.
_AF4 = {
  32: (
    -0.72380075,
    -0.54068711,
    -0.3963985,
    -0.2723577,
    -0.15956821,
    -0.05258802,
    0.04554747,
    0.13780891,
    0.23375854,
    0.33656744,
    0.4508456,
    0.58437857,
    0.75299116,
  ),
  64: (
    -0.69441008,
    -0.51243739,
    -0.3736951,
    -0.25607552,
    -0.14982478,
    -0.04934812,
    0.04273164,
    0.12934483,
    0.21961274,
    0.31675666,
    0.42563882,
    0.55496234,
    0.72424863,
  ),
  128: (
    -0.66495284,
    -0.48589589,
    -0.3529405,
    -0.24139225,
    -0.14109901,
    -0.04645526,
    0.04021689,
    0.12176897,
    0.2068883,
    0.29877409,
    0.40238482,
    0.52697805,
    0.69496104,
  ),
  256: (
    -0.63630214,
    -0.46141631,
    -0.33419526,
    -0.22826385,
    -0.13333677,
    -0.04388739,
    0.03798458,
    0.1150332,
    0.19553393,
    0.28262047,
    0.38124113,
    0.5009191,
    0.66607302,
  ),
  512: (
    -0.60903865,
    -0.43908944,
    -0.31736711,
    -0.2165657,
    -0.12644575,
    -0.04161132,
    0.03600625,
    0.10905684,
    0.18543324,
    0.26818022,
    0.36216937,
    0.4769826,
    0.63827231,
  ),
  1024: (
    -0.58348586,
    -0.41884827,
    -0.30229144,
    -0.20614334,
    -0.12032288,
    -0.03959127,
    0.034251,
    0.10374994,
    0.17644691,
    0.25528724,
    0.34502762,
    0.45517148,
    0.61198895,
  ),
  2048: (
    -0.55977324,
    -0.40054344,
    -0.28877911,
    -0.19683974,
    -0.11486815,
    -0.03779316,
    0.03268924,
    0.09902518,
    0.16843521,
    0.24376258,
    0.32962969,
    0.4353765,
    0.58743975,
  ),
  4096: (
    -0.5379003,
    -0.38399174,
    -0.27664257,
    -0.18850865,
    -0.10999076,
    -0.03618635,
    0.03129431,
    0.09480323,
    0.16126887,
    0.23343416,
    0.31577979,
    0.41743354,
    0.56468758,
  ),
}


def _af4(block_size: int | None) -> Codebook:
  if block_size not in _AF4:
    raise ValueError(
      f"codebook 'af4': block size {block_size}; it is published for {', '.join(map(str, _AF4))}"
    )
  inner = _AF4[block_size]
  return Codebook(
    "af4",
    (-1.0, *inner[:6], 0.0, *inner[6:], 1.0),
    reference="Yoshida, NF4 Isn't Information Theoretically Optimal, 2023, "
    "https://arxiv.org/abs/2306.06965, as published (not quite the L1 optimum it sets out for)",
  )


_REGISTRY["af4"] = _af4


def _block_optimal(name: str, bits: int, signed: bool, error: str) -> None:
  def build(block_size: int | None) -> Codebook:
    if block_size is None:
      raise ValueError(f"codebook {name!r}: depends on the block size; give one")
    return Codebook(
      name,
      block_optimal.levels(bits, block_size, signed=signed, error=error),
      "signed_absmax" if signed else "absmax",
      "Blumenberg et al., BOF4, 2025, https://arxiv.org/abs/2505.06653, constructed for the block "
      "size (the paper's own tables, from samples, lie within 3.3e-4)",
    )

  _REGISTRY[name] = build


for _bits in (2, 3, 4):
  _block_optimal(f"bof{_bits}", _bits, signed=False, error="mse")
  _block_optimal(f"bof{_bits}s", _bits, signed=True, error="mse")
_block_optimal("bof4_mae", 4, signed=False, error="mae")
_block_optimal("bof4s_mae", 4, signed=True, error="mae")

_register_table(
  "iq4_nl",
  [-i / 127 for i in (113, 89, 69, 53, 38, 25, 13, 1, -10, -22, -35, -49, -65, -83, -104, -127)],
  "llama.cpp, kvalues_iq4nl; no zero",
  "signed_absmax",
)


# Formats: a table, a block size and scales of a dtype.
def _register_format(codebook: Codebook, own_block_size: int) -> None:
  """A table that is of one block size."""

  def build(block_size: int | None) -> Codebook:
    if block_size not in (None, own_block_size):
      raise ValueError(
        f"codebook {codebook.name!r}: block_size {block_size}; the format's is {own_block_size}"
      )
    return codebook

  _REGISTRY[codebook.name] = build


_register_format(
  Codebook(
    "nvfp4",
    get("e2m1").levels,
    "absmax",
    "NVIDIA, Pretraining Large Language Models with NVFP4, 2025, "
    "https://arxiv.org/abs/2509.25149: E2M1 in blocks of 16, E4M3 scales times a float32 a matrix",
    "e4m3",
  ),
  16,
)
# In the format's own units: its scales are powers of two, which no other multiple of E2M1 keeps.
_register_format(
  Codebook(
    "mxfp4",
    _mirrored((0.5, 1, 1.5, 2, 3, 4, 6), 1),
    "power_of_two",
    "OCP Microscaling Formats 1.0, 2023: E2M1 in blocks of 32, E8M0 scales (section 6.3)",
    "e8m0",
  ),
  32,
)


for _bits in (2, 3, 4, 8):
  _register_table(
    f"int{_bits}_zero_point",
    range(2**_bits),
    "asymmetric round to nearest, 8-bit integer zero-point, as in GPTQ and AWQ files",
    "minmax",
  )


def _equal_mass_medians(bins: int) -> list[float]:
  quantiles = [_normal_ppf((i + 0.5) / bins) for i in range(bins)]
  return [quantile / quantiles[-1] for quantile in quantiles]


def _equal_mass_means() -> list[float]:
  edges = [-math.inf, *(_normal_ppf(i / 16) for i in range(1, 16)), math.inf]
  height = [math.exp(-(edge**2) / 2) for edge in edges]
  means = [low - high for low, high in itertools.pairwise(height)]
  return [mean / means[-1] for mean in means]


# What many write-ups call NF4: it has no zero.
_register_table(
  "equal_mass16", _equal_mass_medians(16), "medians of 16 bins of equal mass under N(0, 1)"
)
_register_table(
  "equal_mass16_means", _equal_mass_means(), "means of 16 bins of equal mass under N(0, 1)"
)


def _register_learned(
  name: str, bits: int, learned: Literal["matrix", "column"], reference: str
) -> None:
  levels, scale = _equal_mass_medians(2**bits), "absmax"
  if learned == "column":
    # From 0 to the last code, as a group's weights lie in units of its scale.
    half = (2**bits - 1) / 2
    levels, scale = [half * (level + 1) for level in levels], "range"
  codebook = Codebook(name, tuple(levels), scale, reference, learned=learned)
  _REGISTRY[name] = lambda _: codebook


for _bits in (2, 3, 4):
  _register_learned(
    f"lloyd_max{_bits}",
    _bits,
    "matrix",
    "Lloyd, Least Squares Quantization in PCM, 1982; Max, Quantizing for Minimum Distortion, 1960: "
    "on the matrix's own weights",
  )
  _register_learned(
    f"any{_bits}",
    _bits,
    "column",
    "Elhoushi and Johnson, any4, 2025, https://arxiv.org/abs/2507.04610: asymmetric groups "
    "(their own are of 128), and a table an output, of its own weights",
  )


def name_of(levels: np.ndarray, block_size: int) -> str | None:
  """The registered name of a table, `[..., 2**bits]`, all of whose rows are alike; else None."""
  for name in names():
    try:
      codebook = get(name, block_size)
    except ValueError:  # There is none for this block size.
      continue
    if not codebook.learned and is_table(levels, codebook.table):
      return name
  return None


def is_table(levels: Any, table: np.ndarray) -> bool:
  """Whether all rows of `levels`, `[..., 2**bits]`, are `table`."""
  return levels.shape[-1] == len(table) and bool((np.asarray(levels) == table).all())

"""What the report's figures rest on: estimates with their errors, tests, and their correction.

A trial is measured on the held-out sequences q, which all trials have in common, and a setting is
trained from several seeds s. So a mean over both has two sources of chance, the seeds and the text,
and its variance is the sum of two parts: that of the means of the seeds over S, and that of the
means of the sequences over n. (What is of neither alone is counted twice, which makes the sum a
little too large rather than too small.) All quantities are ratios of sums over [S, n] of
losses in nats to counts of targets, or to other losses: one formula, that of the linearized ratio,
serves a loss, a paired difference and a recovery.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

# Of intervals, and of what is called a difference.
LEVEL = 0.95

_DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Σ numerator / Σ denominator, and how sure it is.

  Attributes:
    value: the ratio.
    error: standard error, of seeds and sequences together; of the sequences alone for one seed;
      nan for one seed and one sequence.
    seeds: S, the number of rows.
    p: two-sided, of the value being 0, by Student's t; None for one seed. Its degrees of freedom
      are those of a sum of two variances: S − 1 where the seeds are what varies, up to S + n − 2
      where the text is as well. (S − 1 throughout finds nothing where the text varies most: of null
      differences it calls fewer than 1 in 1,000 different at a level of 5%; these call 1 to 6%.)
      At the levels that a long table asks for they are lenient, of three seeds: at 5% / 81, .06%,
      they call .01 to 1.4%, the most where the seeds vary much less than the text but not nothing.
  """

  value: float
  error: float
  seeds: int
  p: float | None


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Ratio:
  """Estimates Σ numerator / Σ denominator.

  Args:
    numerator: `[S, n]`, a row a seed, a column a held-out sequence.
    denominator: the same, or what broadcasts to it. Its sum is not 0.

  References:
    Cochran, Sampling Techniques, 1977, section 6.4, on the variance of a ratio.
    Satterthwaite, An approximate distribution of estimates of variance components, 1946.
  """
  numerator, denominator = np.broadcast_arrays(numerator, denominator)
  total = denominator.sum()
  value = float(numerator.sum() / total)
  residual = (numerator - value * denominator) / total  # sums to 0
  parts = [each for each in (residual.sum(0), residual.sum(1)) if each.size > 1]
  variances = [each.size / (each.size - 1) * float(np.square(each).sum()) for each in parts]
  error = math.sqrt(sum(variances)) if variances else math.nan
  seeds = len(numerator)
  p = None
  if seeds > 1:
    # Two equal trials (no adapter saw the difference, say) are no evidence of one.
    t = value / error if error else math.copysign(math.inf, value) if value else 0.0
    spread = sum(v**2 / (each.size - 1) for v, each in zip(variances, parts, strict=True))
    degrees = sum(variances) ** 2 / spread if spread else seeds - 1
    # Rounded down, to the safe side; but not by what float arithmetic adds to a whole number.
    p = t_two_sided(t, max(1, math.floor(degrees + 1e-6)))
  return Ratio(value, error, seeds, p)


def bootstrap(
  numerator: np.ndarray, denominator: np.ndarray, *, draws: int = _DRAWS
) -> tuple[float, float] | None:
  """Percentile interval of Σ numerator / Σ denominator at `LEVEL`.

  Seeds and sequences are drawn again together, each with replacement. The draws are the same ones
  at every call. With few seeds the interval is too narrow (that of the means of three normal values
  lies within their range, which covers 75%), so no verdict rests on it.

  Args:
    numerator: `[S, n]`; `denominator` broadcasts to it.
    draws: how many.

  Returns:
    (low, high), or None for one seed.

  References:
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
  """
  numerator, denominator = np.broadcast_arrays(numerator, denominator)
  seeds, sequences = numerator.shape
  if seeds < 2:
    return None
  of_seeds, of_sequences = _weights(seeds, draws, 0), _weights(sequences, draws, 1)
  above, below = (
    np.einsum("ds,ds->d", of_seeds, of_sequences @ each.T) for each in (numerator, denominator)
  )
  low, high = np.quantile(above / below, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return float(low), float(high)


@functools.lru_cache(maxsize=8)
def _weights(count: int, draws: int, stream: int) -> np.ndarray:
  """`[draws, count]`: how often each of `count` things was drawn, of `count` draws."""
  generator = np.random.default_rng([count, stream])
  return generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def t_two_sided(t: float, degrees: int) -> float:
  """P(|T| ≥ |t|) of Student's t with a whole number of degrees of freedom.

  References:
    Abramowitz and Stegun, 1964, equations 26.7.3 and 26.7.4: finite sums in cos² θ,
    tan θ = |t| / √degrees.
  """
  theta = math.atan2(abs(t), math.sqrt(degrees))
  cosine2 = math.cos(theta) ** 2
  odd = degrees % 2
  # 1 + (1/2) c² + (1·3)/(2·4) c⁴ + …; of odd degrees c + (2/3) c³ + (2·4)/(3·5) c⁵ + …
  term, total = 1.0, 0.0
  for k in range(degrees // 2):
    total += term
    term *= cosine2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
  within = math.sin(theta) * total
  if odd:
    within = 2 / math.pi * (theta + math.cos(theta) * within)
  return max(0.0, 1 - within)


def holm(p: Sequence[float]) -> list[float]:
  """p values corrected for their number: the chance of any false one among them is held.

  References:
    Holm, A simple sequentially rejective multiple test procedure, 1979.
  """
  corrected, worst = [0.0] * len(p), 0.0
  for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
    worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
    corrected[i] = worst
  return corrected


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
  """Ranks from 1; equal values share the mean of theirs."""
  _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
  last = counts.cumsum()
  return (last - (counts - 1) / 2)[inverse]


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
  """Rank correlation, −1 to 1; None where one of the two has a single value."""
  centered = [each - each.mean() for each in (ranks(x), ranks(y))]
  scale = math.sqrt(math.prod(float(each @ each) for each in centered))
  return float(centered[0] @ centered[1]) / scale if scale else None


def spearman_p(
  x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, *, draws: int = _DRAWS
) -> float:
  """Two-sided p of `spearman`, by random permutations, the one that was found among them."""
  a, b = ranks(x), ranks(y)
  a, b = a - a.mean(), b - b.mean()
  generator = np.random.default_rng(len(a))
  shuffled = generator.permuted(np.tile(b, (draws, 1)), axis=1) @ a
  return float((1 + (np.abs(shuffled) >= abs(a @ b) - 1e-9).sum()) / (1 + draws))


def pareto(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
  """Indices that nothing beats in both, by rising cost; of equals the first."""
  frontier, best = [], math.inf
  for i in sorted(range(len(cost)), key=lambda i: (cost[i], loss[i])):
    if loss[i] < best:
      frontier.append(i)
      best = loss[i]
  return frontier

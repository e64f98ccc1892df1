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

# The least p that is told: below it 1 − P(|T| < t) is rounding.
LEAST_P = 1e-12


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Σ numerator / Σ denominator, and how sure it is.

  Attributes:
    value: the ratio.
    error: standard error, of seeds and sequences together; of the sequences alone for one seed;
      nan for one seed and one sequence.
    seeds: S, the number of rows.
    p: `two_sided`, of the value being 0; None for one seed.
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
  """
  numerator, denominator = np.broadcast_arrays(numerator, denominator)
  total = denominator.sum()
  value = float(numerator.sum() / total)
  residual = (numerator - value * denominator) / total  # sums to 0
  parts = [each for each in (residual.sum(0), residual.sum(1)) if each.size > 1]
  variances = [each.size / (each.size - 1) * float(np.square(each).sum()) for each in parts]
  error = math.sqrt(sum(variances)) if variances else math.nan
  seeds = len(numerator)
  p = two_sided(value, variances, [each.size - 1 for each in parts]) if seeds > 1 else None
  return Ratio(value, error, seeds, p)


def two_sided(value: float, variances: Sequence[float], degrees: Sequence[int]) -> float:
  """p of `value` being 0, whose error is of several parts, each with a variance that was estimated.

  The p that solves value² = Σᵢ vᵢ t²ᵢ(p), t of each part's own degrees of freedom: intervals of the
  parts, their squares added. Of one part it is Student's t; of more it holds every level, with room
  where both count. Simulated at 3 seeds and 155 sequences, null
  differences called different, × the level:

    the seeds' share of the variance    2%     10%    25%    50%    75%    90%    97%
    level .05                           .86    .60    .48    .49    .64    .80    .93
    level .05 / 84                      .07    .01    .04    .06    .17    .51    .82
    .05 / 84, Satterthwaite's degrees   1.0    1.0    1.3    3.6    11     22     21

  The last (one t, with degrees of freedom estimated from the variances) is what stood here before.
  Student's t of the seeds alone would find nothing where the text varies most.

  Args:
    value: the estimate.
    variances: of its independent parts.
    degrees: of freedom, of each variance.

  Returns:
    `LEAST_P` where it is smaller, but 0 of a value without any error.

  References:
    Howe, Approximate confidence limits on the mean of X + Y, 1974.
  """
  if not any(variances):
    # Two equal trials (no adapter saw the difference, say) are no evidence of one.
    return 0.0 if value else 1.0
  squares = sum(v * np.square(_quantiles(d)) for v, d in zip(variances, degrees, strict=True))
  return float(np.exp(np.interp(abs(value), np.sqrt(squares), np.log(_chances()))))


def _chances() -> np.ndarray:
  """`[2001]`, 1 to `LEAST_P`; straight lines between them are off by 1e-5 of p at most."""
  return np.geomspace(1, LEAST_P, 2001)


@functools.lru_cache(maxsize=64)
def _quantiles(degrees: int) -> np.ndarray:
  """`[2001]`: what |T| exceeds with each of `_chances`, by bisection of its logarithm."""
  low, high = np.full(2001, -20.0), np.full(2001, 40.0)
  for _ in range(45):
    middle = (low + high) / 2
    beyond = t_two_sided(np.exp(middle), degrees) > _chances()
    low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
  return np.concatenate([[0.0], np.exp(high[1:])])


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


def t_two_sided(t: np.ndarray | float, degrees: int) -> np.ndarray:
  """P(|T| ≥ |t|) of Student's t with a whole number of degrees of freedom.

  References:
    Abramowitz and Stegun, 1964, equations 26.7.3 and 26.7.4: finite sums in cos² θ,
    tan θ = |t| / √degrees.
  """
  theta = np.arctan2(np.abs(t), math.sqrt(degrees))
  cosine2 = np.square(np.cos(theta))
  odd = degrees % 2
  # 1 + (1/2) c² + (1·3)/(2·4) c⁴ + …; of odd degrees c + (2/3) c³ + (2·4)/(3·5) c⁵ + …
  term, total = np.ones_like(theta), np.zeros_like(theta)
  for k in range(degrees // 2):
    total = total + term
    term = term * cosine2 * ((2 * k + 1 + odd) / (2 * k + 2 + odd))
  within = np.sin(theta) * total
  if odd:
    within = 2 / math.pi * (theta + np.cos(theta) * within)
  return np.maximum(0.0, 1 - within)


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

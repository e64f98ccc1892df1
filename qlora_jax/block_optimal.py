"""Levels of least expected error for normal weights in blocks that are scaled by their maximum.

Which levels are best depends on the block size: the larger a block, the smaller are its weights
beside its maximum.
"""

import functools
import math
from typing import Literal

import numpy as np

# Of the maximum m, and of a weight beside it, x = w / m.
_MAXIMA, _PLACES = 300, 8001
_ROUNDS = 20000


@functools.cache
def levels(
  bits: int, block_size: int, *, signed: bool, error: Literal["mse", "mae"]
) -> tuple[float, ...]:
  """2^bits levels that minimize E|w − m · level|^p over w ~ N(0, 1), m the block's maximum.

  Lloyd's iteration with exact centroids: each level is the mean (p = 2; the median, p = 1) of what
  is nearest to it, weighted by m^p. 0 and the places of the maximum are levels always: ±1, or 1
  alone where the scale has the maximum's sign.

  Args:
    signed: whether the scale has the sign of the weight of largest magnitude.
    error: what is minimized.

  Raises:
    ValueError: a block size below 2.

  References:
    Blumenberg et al., Improving Block-Wise LLM Quantization by 4-bit Block-Wise Optimal Float
    (BOF4), 2025, https://arxiv.org/abs/2505.06653, equations 5 to 7.
  """
  if block_size < 2:
    raise ValueError(f"block_size: {block_size}; these levels are of blocks of at least 2")
  power = {"mse": 2, "mae": 1}[error]
  x = np.linspace(-1, 1, _PLACES)
  density = _density(x, block_size, power)
  mass, moment = _cumulative(density, x), _cumulative(density * x, x)
  negative = 2 ** (bits - 1) - 1
  if signed:
    found = np.concatenate([np.linspace(-1, 0, negative + 2)[1:], np.linspace(0, 1, negative + 2)])
    found = np.unique(found)
    pinned = (negative, len(found) - 1)
  else:
    found = np.concatenate([np.linspace(-1, 0, negative + 1), np.linspace(0, 1, negative + 2)[1:]])
    pinned = (0, negative, len(found) - 1)
  free = np.setdiff1d(np.arange(len(found)), pinned)
  for _ in range(_ROUNDS):
    edges = np.concatenate([[-1], (found[:-1] + found[1:]) / 2, [1]])
    below = np.interp(edges, x, mass)
    if error == "mse":
      centers = np.diff(np.interp(edges, x, moment)) / np.diff(below)
    else:
      centers = np.interp((below[:-1] + below[1:]) / 2, mass, x)
    following = found.copy()
    following[free] = centers[free]
    if np.abs(following - found).max() < 1e-12:
      break
    found = following
  return tuple(float(level) for level in found)


def _density(x: np.ndarray, block_size: int, power: int) -> np.ndarray:
  """Of the weights that are not the maximum, m^power taken in; up to a factor."""
  nodes, weights = np.polynomial.legendre.leggauss(_MAXIMA)
  # Beyond 9 standard deviations there is no maximum of any block.
  m, weights = 4.5 * (nodes + 1), 4.5 * weights
  inside = np.asarray([math.erf(each / math.sqrt(2)) for each in m])
  # m has the density 2 B φ(m) (2Φ(m) − 1)^(B − 1), and the others are normal within ±m: each has
  # the density m φ(x m) / (2Φ(m) − 1).
  of_maximum = np.exp(-np.square(m) / 2) * inside ** (block_size - 2)
  normal = np.exp(-np.square(x[:, None] * m) / 2)
  return normal @ (weights * of_maximum * m ** (power + 1))


def _cumulative(y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """The integral of y from the first x on, by trapezoids."""
  return np.concatenate([[0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])

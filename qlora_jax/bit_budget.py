"""Which codebook each weight gets under a budget of bits: "3.5 bits a weight".

Some weights lose more by few bits than others. Each is quantized with each candidate, and its error
and exact size noted; dynamic programming then finds the choice of least total error that fits.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import tree_paths
from qlora_jax.quantization import QuantizationConfig, dequantize, quantize_by

# So many sizes are told apart: where there are more, each is rounded up to a multiple.
_MOST_UNITS = 2**16

# Mixed 2, 3, 4 and 8 bits.
WIDTHS = tuple(QuantizationConfig(name) for name in ("bof2s", "bof3s", "bof4s", "int8"))


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One weight under one candidate.

  Attributes:
    bits: all of it, scales and tables included.
    error: Σ importance · (Ŵ − W)².
  """

  bits: int
  error: float


def allocate(measured: Sequence[Sequence[Measurement]], budget: int) -> list[int]:
  """The candidate of each weight, by index, of least total error whose bits fit in the budget.

  Exact where the sizes are multiples of a unit of which the budget has at most 65,536; else sizes
  are rounded up to such a unit, so that the budget is kept all the same.

  Args:
    measured: a row a weight, an entry a candidate.
    budget: bits.

  Raises:
    ValueError: the smallest candidates do not fit.
  """
  least = sum(min(each.bits for each in row) for row in measured)
  if least > budget:
    raise ValueError(f"budget: {budget} bits; the smallest candidates take {least}")
  unit = math.gcd(*(each.bits for row in measured for each in row))
  unit = max(unit, -(-budget // _MOST_UNITS))
  units = budget // unit
  best = np.zeros(units + 1)
  chosen = np.zeros((len(measured), units + 1), np.int16)
  for i, row in enumerate(measured):
    following = np.full(units + 1, np.inf)
    for j, each in enumerate(row):
      size = -(-each.bits // unit)
      if size > units:
        continue
      total = np.full(units + 1, np.inf)
      total[size:] = best[: units + 1 - size] + each.error
      better = total < following
      following, chosen[i] = np.where(better, total, following), np.where(better, j, chosen[i])
    best = following
  if not np.isfinite(best[-1]):
    # Rounding up took what was only just enough.
    return [min(range(len(row)), key=lambda j, row=row: row[j].bits) for row in measured]
  found, left = [], units
  for row, choices in zip(measured[::-1], chosen[::-1], strict=True):
    choice = int(choices[left])
    found.append(choice)
    left -= -(-row[choice].bits // unit)
  return found[::-1]


def measure(
  w: jax.Array, config: QuantizationConfig, importance: jax.Array | None = None
) -> Measurement:
  """Quantizes a weight `[..., K, N]` to see its error and its bits.

  Args:
    importance: `[..., K, N]` or `[..., K, 1]`; what an error weighs. The codes do not depend on it.

  Raises:
    ValueError, TypeError: see `quantize_by`.
  """
  packed = quantize_by(w, config)
  error = jnp.square(dequantize(packed) - w.astype(jnp.float32))
  if importance is not None:
    error = error * importance
  return Measurement(8 * packed.nbytes, float(error.sum()))


def rules(
  dense: Any,
  bits_per_weight: float,
  *,
  targets: Sequence[str] = ("*",),
  candidates: Sequence[QuantizationConfig] = WIDTHS,
  importance: Mapping[str, Any] | None = None,
) -> dict[str, QuantizationConfig]:
  """Rules for `quantize_tree`, of least error within a mean of bits a weight.

  A stack's layers share a choice, as `quantize_tree` has it; a tree of single layers does not need
  to.

  Args:
    dense: the tree to be quantized.
    bits_per_weight: the mean over all weights that are quantized, scales and tables included.
    targets: patterns of the matrices to be quantized.
    candidates: what each may be quantized by.
    importance: path of the weight → what its errors weigh, as `measure` takes it: a Fisher diagonal
      makes them changes of the loss. All weights' errors count alike without it.

  Returns:
    Pattern → configuration, one for each weight.

  Raises:
    ValueError: a pattern that matches no matrix; an importance of no target; candidates that all
      are too large, or of which one does not serve a weight. The message names the path.

  >>> frozen = quantize_tree(params, bit_budget.rules(params, 3.5, targets=("layers/*",)))
  """
  flat = {
    path: leaf
    for path, leaf in tree_paths.leaves(dense).items()
    if tree_paths.is_matrix(path, leaf)
    and any(
      tree_paths.matches(pattern, layer)
      for pattern in targets
      for layer in tree_paths.layers(path, leaf)
    )
  }
  for pattern in targets:
    if not any(
      tree_paths.matches(pattern, layer)
      for path, leaf in flat.items()
      for layer in tree_paths.layers(path, leaf)
    ):
      raise ValueError(f"bit_budget: {tree_paths.no_match(pattern, tree_paths.leaves(dense))}")
  importance = importance or {}
  if unknown := importance.keys() - flat.keys():
    raise ValueError(f"bit_budget: {min(unknown)}: an importance of no target")
  measured = []
  for path, leaf in flat.items():
    w, own = jnp.asarray(leaf), importance.get(path)
    own = None if own is None else jnp.asarray(own, jnp.float32)
    try:
      measured.append([measure(w, config, own) for config in candidates])
    except (ValueError, TypeError) as error:
      raise type(error)(f"{path}: {error}") from None
  size = sum(leaf.size for leaf in flat.values())
  least = sum(min(each.bits for each in row) for row in measured) / size
  if least > bits_per_weight:
    raise ValueError(
      f"bits_per_weight: {bits_per_weight:g}; the smallest candidates take {least:.4g}, scales and "
      "tables included"
    )
  budget = math.floor(bits_per_weight * size)
  found = allocate(measured, budget)
  return {_pattern(path): candidates[choice] for path, choice in zip(flat, found, strict=True)}


def _pattern(path: str) -> str:
  """Of all layers of a leaf."""
  if not tree_paths.is_stacked(path):
    return path
  return tree_paths.per_layer(path, 1)[0].replace("layers/0/", "layers/*/", 1)

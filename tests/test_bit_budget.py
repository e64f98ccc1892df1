"""The choice of a codebook for each weight, against every choice there is."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import QuantizationConfig, bit_budget, dequantize, quantize_tree
from qlora_jax.bit_budget import Measurement, allocate
from qlora_jax.memory import quantized_bits

# Without the block-optimal tables, whose construction takes a second each.
WIDTHS = tuple(QuantizationConfig(name, 32) for name in ("nf2", "nf3", "nf4", "int8"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", [1, 64])
def test_it_is_the_best_of_all_choices(seed, unit):
  rng = np.random.default_rng(seed)
  measured = [
    [Measurement(unit * int(rng.integers(5, 60)), float(rng.exponential())) for _ in range(4)]
    for _ in range(6)
  ]
  least = sum(min(each.bits for each in row) for row in measured)
  budget = least + unit * int(rng.integers(0, 120))
  found = [row[j] for row, j in zip(measured, allocate(measured, budget), strict=True)]
  assert sum(each.bits for each in found) <= budget
  best = min(
    sum(each.error for each in choice)
    for choice in itertools.product(*measured)
    if sum(each.bits for each in choice) <= budget
  )
  assert sum(each.error for each in found) == pytest.approx(best)


def test_sizes_without_a_common_unit_keep_the_budget():
  rng = np.random.default_rng(0)
  measured = [
    [Measurement(int(10**7 * bits + rng.integers(100)), 4.0**-bits) for bits in (2, 3, 4, 8)]
    for _ in range(40)
  ]
  least = sum(row[0].bits for row in measured)
  for budget in (least, int(1.5 * least), 10**10):
    found = allocate(measured, budget)
    assert sum(row[j].bits for row, j in zip(measured, found, strict=True)) <= budget
  assert set(allocate(measured, 10**10)) == {3} and set(allocate(measured, least)) == {0}
  with pytest.raises(ValueError, match="the smallest candidates take"):
    allocate(measured, least - 1)


def tree():
  rng = np.random.default_rng(0)
  scale = {"q": 1.0, "k": 0.1, "up": 3.0, "down": 0.02}
  stack = {
    name: jnp.asarray(s * rng.normal(size=(2, 64, 64)), jnp.float32) for name, s in scale.items()
  }
  return {"layers": stack, "head": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)}


def test_rules_of_a_budget():
  params = tree()
  rules = bit_budget.rules(params, 3.5, targets=("layers/*",), candidates=WIDTHS)
  frozen = quantize_tree(params, rules)
  bits = quantized_bits(frozen)
  assert bits is not None and 3 < bits <= 3.5
  assert not hasattr(frozen["head"], "codes")
  # What has larger weights has larger errors.
  assert frozen["layers"]["up"].bits > frozen["layers"]["down"].bits
  assert rules.keys() == {f"layers/*/{name}" for name in ("q", "k", "up", "down")}

  def error(frozen):
    return sum(
      float(jnp.square(dequantize(frozen["layers"][name]) - w).sum())
      for name, w in params["layers"].items()
    )

  # 3 bits for all take less, 4 more.
  assert error(frozen) < error(quantize_tree(params, {"layers/*": WIDTHS[1]}))


def test_an_importance_moves_the_bits():
  params = tree()
  importance = {"layers/down": np.full((2, 64, 1), 1e6)}
  plain, weighed = (
    bit_budget.rules(params, 3.5, targets=("layers/*",), candidates=WIDTHS, importance=each)
    for each in (None, importance)
  )
  assert plain["layers/*/down"].codebook == "nf2" and weighed["layers/*/down"].codebook == "nf4"


def test_refusals():
  params = tree()
  with pytest.raises(ValueError, match="pattern 'mlp/\\*' matches no weight"):
    bit_budget.rules(params, 3.5, targets=("mlp/*",))
  with pytest.raises(ValueError, match="layers/up: an importance of no target"):
    bit_budget.rules(params, 3.5, targets=("head",), importance={"layers/up": 1})
  with pytest.raises(ValueError, match=r"bits_per_weight: 1\.5; the smallest candidates take 2\.3"):
    bit_budget.rules(params, 1.5, targets=("head",), candidates=WIDTHS)
  rotated = QuantizationConfig(rotate=True)
  with pytest.raises(ValueError, match="odd: rotate: K = 3"):
    bit_budget.rules({"odd": jnp.ones((3, 4))}, 8.0, candidates=(rotated,))

"""Several adapters of one base: their weighted sum, and a row of the batch for each tenant."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora, quantize_tree
from qlora_jax.generate import generate
from qlora_jax.linen import QDense
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.quantization import QuantizationConfig, dequantize

L, K, N = 2, 32, 24
CLOSE: Any = {"rtol": 0, "atol": 2e-5}
MODEL = Transformer(TransformerConfig(48, 32, 48, 2, 4, 2, 8), dtype=jnp.float32)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32))


def base():
  dense = {
    "layers": {"q": {"kernel": normal(1, L, K, N)}, "up": {"kernel": normal(2, L, K, N)}},
    "head": {"kernel": normal(3, K, 40)},
  }
  return quantize_tree(dense, {"layers/*": QuantizationConfig(block_size=16)})


def adapter(frozen, seed, **fields):
  """(params, constants), trained a little; zeros of an A beyond a layer's rank stay zeros."""
  cfg = LoRAConfig(**{"rank": 3, "alpha": 6.0, "targets": ("*",), **fields})
  params, constants = lora.init(jax.random.key(seed), frozen, cfg)

  def moved(x):
    noise = normal(seed, *x.shape)
    return x + (jnp.where(x != 0, noise, 0) if x.any() else noise)

  return jax.tree.map(moved, params), constants


def adapters(frozen):
  """Of other ranks, targets and variants."""
  return [
    adapter(frozen, 1),
    adapter(frozen, 2, rank=2, targets=("layers/*/q",), rank_pattern={"layers/1/q": 1}),
    adapter(frozen, 3, rank=2, targets=("layers/*",), variant="lora_xs", alpha=2.0),
  ]


def change(made, layer, index):
  """s · A · B in float64."""
  params, constants = (lora.tree_paths.leaves(tree) for tree in made)
  if f"{layer}/scaling" not in constants:
    return 0.0
  a, b = (np.asarray(x, np.float64) for x in lora.factors_at(layer, params, constants))
  s = np.asarray(constants[f"{layer}/scaling"], np.float64)
  return s[index] * a[index] @ b[index] if a.ndim > 2 else s * a @ b


def test_the_weighted_sum_merges():
  frozen = base()
  made, weights = adapters(frozen), (0.5, -2.0, 1.5)
  params, constants = lora.combine(made, weights)
  assert params["layers"]["q"]["lora_a"].shape == (L, K, 3 + 2 + 2)
  assert params["head"]["lora_a"].shape == (K, 3)
  np.testing.assert_array_equal(constants["layers"]["q"]["rank"], [7, 6])
  merged = lora.merge(frozen, params, constants)
  for layer in ("layers/q", "layers/up", "head"):
    *above, name = layer.split("/")
    w = (frozen["layers"] if above else frozen)[name]["kernel"]
    found = np.asarray((merged["layers"] if above else merged)[name]["kernel"])
    dense = np.asarray(dequantize(w) if above else w, np.float64)
    for index in range(L) if above else [()]:
      total = sum(x * change(each, layer, index) for x, each in zip(weights, made, strict=True))
      assert np.abs(total).max() > 0.1
      np.testing.assert_allclose(found[index], dense[index] + total, **CLOSE)


def test_each_row_has_its_own_and_its_gradient():
  frozen = {"up": {"kernel": base()["layers"]["up"]["kernel"]}}
  frozen = jax.tree.map(lambda x: x[0], frozen)
  made = [adapter(frozen, 1), adapter(frozen, 2, rank=2)]
  weights = np.asarray([[1, 0], [0, 1], [0, 0], [0.5, -2]])
  x, dy = (
    np.random.default_rng(5).normal(size=(4, 3, K)),
    np.random.default_rng(6).normal(size=(4, 3, N)),
  )
  layer, w = QDense(N, dtype=jnp.float32), frozen["up"]["kernel"]

  @jax.jit
  def both(own, x, dy) -> Any:
    def apply(own, x) -> Any:
      params, constants = lora.combine(list(zip(own, fixed, strict=True)), weights)
      return layer.apply(
        {"params": params["up"], "constants": constants["up"], "frozen": {"kernel": w}}, x
      )

    y, back = jax.vjp(apply, own, x)
    return y, *back(dy)

  own, fixed = zip(*made, strict=True)
  y, grads, dx = both(list(own), jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32))
  dense = np.asarray(dequantize(w), np.float64)
  changes = [change(each, "up", ()) for each in made]
  for row, (first, second) in enumerate(weights):
    whole = dense + first * changes[0] + second * changes[1]
    np.testing.assert_allclose(y[row], x[row] @ whole, **CLOSE)
    np.testing.assert_allclose(dx[row], dy[row] @ whole.T, **CLOSE)
  for number, (params, constants) in enumerate(made):
    a, b = (np.asarray(params["up"][name], np.float64) for name in ("lora_a", "lora_b"))
    s = float(constants["up"]["scaling"]) * weights[:, number, None, None]
    np.testing.assert_allclose(
      grads[number]["up"]["lora_a"], np.einsum("btk,btn,rn->kr", x * s, dy, b), **CLOSE
    )
    np.testing.assert_allclose(
      grads[number]["up"]["lora_b"], np.einsum("btk,kr,btn->rn", x * s, a, dy), **CLOSE
    )


def test_tenants_generate_in_one_batch_what_each_does_alone():
  """A table, a head and all layers adapted; the third row is the base's."""
  dense = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  frozen = quantize_tree(
    jax.tree.map(lambda w: 3 * w, dense), {"layers/*/mlp/*": QuantizationConfig()}
  )
  made = [
    adapter(frozen, 1, targets=("layers/*", "embed", "head")),
    adapter(frozen, 2, rank=2, targets=("*/attn/*",)),
  ]
  prompt = jnp.asarray([[5, 6, 7]] * 3)

  def new(params, constants):
    variables = {"params": params, "constants": constants, "frozen": frozen}
    return np.asarray(generate(MODEL, variables, prompt, max_new_tokens=6)).tolist()

  together = new(*lora.combine(made, [[1, 0], [0, 1], [0, 0]]))
  alone = [new(*lora.combine(made, [weights] * 3))[0] for weights in ([1, 0], [0, 1], [0, 0])]
  assert together == alone
  params, constants = made[0]
  assert together[0] == new(params, constants)[0]
  assert together[2] == new(jax.tree.map(jnp.zeros_like, params), constants)[0]
  assert len({tuple(row) for row in together}) == 3


def test_refused():
  frozen = base()
  made = adapters(frozen)
  with pytest.raises(ValueError, match=r"combine: weights \[2\] of 3 adapters; \[A\] or \[B, A\]"):
    lora.combine(made, [1, 2])
  for fields, path in (
    ({"variant": "dora"}, "magnitude"),
    ({"lora_bias": True}, "lora_bias"),
    ({"targets": ("layers/*",), "modules_to_save": ("head",)}, "head/kernel"),
  ):
    with pytest.raises(ValueError, match=f"combine: adapter 1: .*{path}: only products"):
      lora.combine([made[0], adapter(frozen, 1, **fields)], [1, 1])
  other = adapter({"head": {"kernel": normal(3, K, 41)}}, 1)
  with pytest.raises(
    ValueError, match=r"combine: head: adapters of weights of shapes \[\(32, 40\), "
  ):
    lora.combine([made[0], other], [1, 1])
  experts = adapter({"layers": {"up": {"kernel": normal(1, L, 3, K, N)}}}, 1)
  with pytest.raises(ValueError, match="combine: layers/up: experts take one adapter"):
    lora.combine([experts], [[1.0]])
  params, constants = lora.combine([made[0]], [[1.0], [1.0]])
  head, fixed = params["head"], constants["head"]
  with pytest.raises(ValueError, match=r"an input of shape \[3\] to adapters .* of 2 rows"):
    lora.apply(jnp.ones((3, K)), head["lora_a"], head["lora_b"], fixed["scaling"])

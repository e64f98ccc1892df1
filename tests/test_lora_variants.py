"""VeRA and LoRA-XS: their equations and gradients in float64, in a layer, merged, and as LoRA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora, quantize_tree
from qlora_jax.linen import QDense
from qlora_jax.lora import LoRAConfig
from qlora_jax.quantization import QuantizationConfig, dequantize

L, D, F, R = 3, 32, 24, 4
CLOSE: Any = {"rtol": 0, "atol": 2e-5}


def base():
  def normal(i, *shape):
    return jnp.asarray(np.random.default_rng(i).normal(0, 0.3, shape).astype(np.float32))

  return {
    "layers": {"q": {"kernel": normal(1, L, D, D)}, "up": {"kernel": normal(2, L, D, F)}},
    "head": {"kernel": normal(3, D, 40)},
  }


def config(variant, **fields):
  return LoRAConfig(**{"rank": R, "alpha": 6.0, "targets": ("*",), "variant": variant, **fields})


def moved(params, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + jnp.asarray(rng.normal(0, 0.5, x.shape).astype(np.float32)), params
  )


def one(variant, frozen=None):
  """(W, params, constants) of a single layer, trained a little."""
  frozen = {"up": {"kernel": base()["layers"]["up"]["kernel"][0]}} if frozen is None else frozen
  params, constants = lora.init(jax.random.key(0), frozen, config(variant))
  return frozen["up"]["kernel"], moved(params)["up"], constants["up"]


def product(variant, own, fixed):
  """The change of the weight, in float64, as the paper writes it; and what it is made of."""
  a, b, s = (np.asarray(fixed[name], np.float64) for name in ("lora_a", "lora_b", "scaling"))
  own = {name: np.asarray(x, np.float64) for name, x in own.items()}
  if variant == "vera":
    return s * a @ np.diag(own["vera_d"]) @ b @ np.diag(own["vera_b"]), a, b, own
  return s * a @ own["core"] @ b, a, b, own


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["vera", "lora_xs"])
def test_the_equation_and_its_gradient(variant, packed):
  frozen = {"up": {"kernel": base()["layers"]["up"]["kernel"][0]}}
  if packed:
    frozen = quantize_tree(frozen, {"up": QuantizationConfig(block_size=16)})
  w, own, fixed = one(variant, frozen)
  dense = np.asarray(dequantize(w) if packed else w, np.float64)
  change, a, b, trained = product(variant, own, fixed)
  assert np.abs(change).max() > 1e-2
  layer = QDense(F, dtype=jnp.float32)
  x = np.random.default_rng(5).normal(size=(6, D))
  dy = np.random.default_rng(6).normal(size=(6, F))

  def apply(own, x) -> Any:
    return layer.apply({"params": own, "constants": fixed, "frozen": {"kernel": w}}, x)

  y, back = jax.vjp(apply, own, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(y, x @ (dense + change), **CLOSE)
  grads, dx = back(jnp.asarray(dy, jnp.float32))
  np.testing.assert_allclose(dx, dy @ (dense + change).T, **CLOSE)
  assert grads.keys() == own.keys()
  s = float(fixed["scaling"])
  if variant == "vera":
    assert s == 1.0
    d, vector = trained["vera_d"], trained["vera_b"]
    np.testing.assert_allclose(grads["vera_d"], ((dy * vector) @ b.T * (x @ a)).sum(0), **CLOSE)
    np.testing.assert_allclose(grads["vera_b"], (dy * (x @ a * d @ b)).sum(0), **CLOSE)
  else:
    np.testing.assert_allclose(grads["core"], s * (x @ a).T @ (dy @ b.T), **CLOSE)


@pytest.mark.parametrize("variant", ["vera", "lora_xs"])
def test_merged(variant):
  cfg = config(variant, rank_pattern={"layers/1/q": 2})
  frozen = base()
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  untouched = lora.merge(frozen, params, constants)
  # VeRA's b is 0; LoRA-XS's core is 1e-5.
  atol = 0 if variant == "vera" else 1e-3
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), untouched, frozen)
  params = moved(params)
  merged = lora.merge(frozen, params, constants)
  for layer in range(L):
    own, fixed = (
      jax.tree.map(lambda x, layer=layer: x[layer], tree["layers"]["q"])
      for tree in (params, constants)
    )
    change, *_ = product(variant, own, fixed)
    assert np.linalg.matrix_rank(change, tol=1e-5) == (2 if layer == 1 else R)
    np.testing.assert_allclose(
      merged["layers"]["q"]["kernel"][layer],
      frozen["layers"]["q"]["kernel"][layer] + change,
      **CLOSE,
    )


def test_vera_shares_its_matrices_and_lora_xs_takes_the_weights_own():
  frozen = base()
  _, vera = lora.init(jax.random.key(0), frozen, config("vera"))
  q, up, head = vera["layers"]["q"], vera["layers"]["up"], vera["head"]
  for layer in range(L):
    np.testing.assert_array_equal(q["lora_a"][layer], head["lora_a"])
    np.testing.assert_array_equal(up["lora_b"][layer], head["lora_b"][:, :F])
  assert 0.9 * np.sqrt(6 / D) < np.abs(head["lora_a"]).max() < np.sqrt(6 / D)
  assert 0.9 * np.sqrt(6 / R) < np.abs(head["lora_b"]).max() < np.sqrt(6 / R)
  params, xs = lora.init(jax.random.key(0), frozen, config("lora_xs", svd_iterations=None))
  w = np.asarray(frozen["layers"]["up"]["kernel"][1], np.float64)
  u, s, vt = np.linalg.svd(w, full_matrices=False)
  own = xs["layers"]["up"]
  np.testing.assert_allclose(
    own["lora_a"][1] @ own["lora_b"][1], u[:, :R] * s[:R] @ vt[:R], **CLOSE
  )
  np.testing.assert_allclose(own["lora_a"][1].T @ own["lora_a"][1], np.eye(R), **CLOSE)
  assert 2e-6 < np.std(params["layers"]["up"]["core"]) < 2e-5


def test_what_is_trained_is_small():
  frozen = base()
  cfg = config("vera", rank_pattern={"layers/1/q": 2})
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  assert lora.count(params, constants) == (L * D + 2 * R + 2) + L * (F + R) + 40 + R
  cfg = config("lora_xs", rank_pattern={"layers/1/q": 2}, targets=("*/q",))
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  assert lora.count(params, constants) == 2 * R * R + 4
  assert {x.shape for x in jax.tree.leaves(params)} == {(L, R, R)}


@pytest.mark.parametrize("variant", ["vera", "lora_xs"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_as_plain_lora(variant, rank_stabilized):
  cfg = config(variant, rank_pattern={"layers/1/q": 2}, rank_stabilized=rank_stabilized)
  frozen = base()
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  params = moved(params)
  plain, fixed, plain_cfg = lora.plain(params, constants, cfg)
  assert plain_cfg.variant == "lora"
  assert plain["layers"]["q"].keys() == {"lora_a", "lora_b"}
  assert fixed["layers"]["q"].keys() == {"scaling", "rank"}
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **CLOSE),
    lora.merge(frozen, plain, fixed),
    lora.merge(frozen, params, constants),
  )


def test_what_makes_no_sense_is_refused():
  frozen = base() | {"embed": {"embedding": jnp.zeros((9, D))}}
  with pytest.raises(ValueError, match=r"lora\.variant: 'vera'; embed, a lookup, takes plain LoRA"):
    lora.init(jax.random.key(0), frozen, config("vera", targets=("embed",)))
  experts = {"layers": {"experts": {"up": {"kernel": jnp.zeros((L, 2, D, F))}}}}
  with pytest.raises(ValueError, match=r"'lora_xs'; layers/experts/up: experts take plain LoRA"):
    lora.init(jax.random.key(0), experts, config("lora_xs", targets=("*/experts/up",)))
  w, own, _ = one("vera")
  variables = {"params": own, "constants": {"scaling": jnp.ones(())}, "frozen": {"kernel": w}}
  with pytest.raises(ValueError, match="vera_d: in params without lora_a and lora_b"):
    QDense(F, dtype=jnp.float32).apply(variables, jnp.ones((1, D)))
  # VeRA's matrices are no factors of W: its rank may exceed both axes.
  params, constants = lora.init(
    jax.random.key(0), base(), dataclasses.replace(config("vera"), rank=64)
  )
  assert lora.plain(params, constants, config("vera", rank=64))[0]["head"]["lora_a"].shape == (D, D)
  with pytest.raises(ValueError, match=r"rank 64; at most min\(K, N\)"):
    lora.init(jax.random.key(0), base(), config("lora_xs", rank=64))

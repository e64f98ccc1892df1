from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax import optimizers
from qlora_jax.config import OptimizerConfig


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_rises_and_decays(kind, warmup):
  cfg = OptimizerConfig(learning_rate=0.5, schedule=kind, warmup_steps=warmup)
  rates = np.asarray([optimizers.schedule(cfg, 20)(step) for step in range(21)])
  np.testing.assert_allclose(rates[warmup], 0.5, rtol=1e-6)
  assert rates[0] > 0  # the first step is not wasted
  assert (np.diff(rates[: warmup + 1]) > 0).all()
  np.testing.assert_allclose(rates[-1], 0.5 if kind == "constant" else 0.0, atol=1e-7)
  middle = rates[warmup + (20 - warmup) // 2]
  np.testing.assert_allclose(middle, 0.5 if kind == "constant" else 0.25, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_at_its_corners(kind):
  def rate(warmup, steps, step) -> float:
    cfg = OptimizerConfig(learning_rate=0.5, schedule=kind, warmup_steps=warmup)
    return np.asarray(optimizers.schedule(cfg, steps)(step)).item()

  # Warm-up: 1/5, 2/5, … of the rate, all of it at step `warmup_steps`.
  rates = [rate(4, 20, step) for step in range(5)]
  np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
  # The last step that is taken is `steps − 1`; its rate is the last above 0.
  last = {"constant": 0.5, "linear": 0.5 / 16, "cosine": 0.25 * (1 + np.cos(np.pi * 15 / 16))}
  np.testing.assert_allclose(rate(4, 20, 19), last[kind], rtol=1e-5)
  for step in (20, 21, 1000):
    np.testing.assert_allclose(rate(4, 20, step), 0.5 if kind == "constant" else 0.0, atol=1e-7)
  # All warm-up but the last step; one step in all.
  np.testing.assert_allclose(rate(19, 20, 19), 0.5, rtol=1e-6)
  np.testing.assert_allclose(rate(0, 1, 0), 0.5, rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_adamw_follows_its_equations(clip_norm):
  # The schedule moves too, and the second gradient is below the norm that clips.
  cfg = OptimizerConfig(
    learning_rate=0.1, schedule="linear", weight_decay=0.01, b1=0.8, b2=0.9, clip_norm=clip_norm
  )
  optimizer = optimizers.make(cfg, 10)
  params: Any = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([0.5])}
  state = optimizer.init(params)
  p, m, v = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
  for step, g in enumerate(([3.0, 1.0, -1.0], [0.3, -0.2, 0.1], [4.0, 3.0, 2.0]), start=1):
    grads = {"a": jnp.asarray(g[:2]), "b": jnp.asarray(g[2:])}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    g = np.asarray(g)
    if clip_norm is not None:
      g = g * min(1, clip_norm / np.linalg.norm(g))
    m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
    update = (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8)
    p = p - 0.1 * (1 - (step - 1) / 10) * (update + 0.01 * p)
  np.testing.assert_allclose(np.concatenate([params["a"], params["b"]]), p, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_lora_plus_is_adamw_with_a_rate_of_its_own_for_b(clip_norm):
  fields: Any = {"weight_decay": 0.1, "schedule": "linear", "clip_norm": clip_norm}
  plus = optimizers.make(OptimizerConfig(learning_rate=0.01, lora_plus_ratio=16, **fields), 10)
  slow, fast = (
    optimizers.make(OptimizerConfig(learning_rate=rate, **fields), 10) for rate in (0.01, 0.16)
  )

  def trained(optimizer) -> Any:
    params: Any = {"q": {"lora_a": jnp.ones(3), "lora_b": -jnp.ones(2), "lora_bias": jnp.ones(2)}}
    params["norm"] = {"scale": jnp.ones(3)}
    start, state = params, optimizer.init(params)
    rng = np.random.default_rng(0)
    for _ in range(4):
      grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), start)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  found, by_a, by_b = trained(plus), trained(slow), trained(fast)
  for layer, name, expected in (
    ("q", "lora_a", by_a),
    ("norm", "scale", by_a),
    ("q", "lora_b", by_b),
    ("q", "lora_bias", by_b),
  ):
    np.testing.assert_allclose(found[layer][name], expected[layer][name], rtol=1e-5)
  assert np.abs(np.asarray(by_a["q"]["lora_b"] - by_b["q"]["lora_b"])).max() > 0.1


def test_lora_plus_asks_for_a_b():
  optimizer = optimizers.make(OptimizerConfig(lora_plus_ratio=2.0), 10)
  params: Any = {"q": {"vera_d": jnp.ones(3)}}
  with pytest.raises(ValueError, match=r"lora_plus_ratio: 2\.0; nothing that is trained"):
    optimizer.update(params, optimizer.init(params), params)

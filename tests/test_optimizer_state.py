"""Moments kept in fewer bits, or on the host: what each costs in loss, and what it holds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax import lora, optimizer_state, optimizers, plan, tree_paths
from qlora_jax.checkpoints import Checkpoints
from qlora_jax.config import OptimizerConfig, defaults, from_config_dict
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.sweeps import group_identity
from qlora_jax.train import init_state, make_train_step

STORAGES = ("float32", "bfloat16", "8bit", "host")
X = jax.random.normal(jax.random.key(0), (64, 48))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (48, 24)))


def optimizer(storage) -> Any:
  return optimizers.make(OptimizerConfig(learning_rate=3e-3, state=storage), 300)


def start(storage) -> Any:
  """A low-rank regression, B at zero as an adapter's is: (params, state of the optimizer)."""
  a = jax.random.normal(jax.random.key(2), (48, 16)) / 7
  params = {"lora_a": a, "lora_b": jnp.zeros((16, 24))}
  return params, optimizer(storage).init(params)


@functools.cache
def step(storage) -> Any:
  def loss(params):
    return jnp.square(X @ params["lora_a"] @ params["lora_b"] - Y).mean()

  def one(state):
    params, opt_state = state
    value, grads = jax.value_and_grad(loss)(params)
    # Optax mixes dtypes freely.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      updates, opt_state = optimizer(storage).update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
    return (params, opt_state), value

  return jax.jit(one, donate_argnums=0)


@functools.cache
def trained(storage) -> tuple[list[float], Any]:
  state, losses = start(storage), []
  for _ in range(150):
    state, value = step(storage)(state)
    losses.append(float(value))
  return losses, state[1]


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_the_loss_falls_as_in_float32(storage):
  expected, found = trained("float32")[0], trained(storage)[0]
  assert expected[-1] < 0.3 * expected[0]
  if storage == "host":
    # The same numbers, elsewhere.
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  else:
    assert found != expected
    fallen = (found[0] - found[-1]) / (expected[0] - expected[-1])
    assert 0.95 < fallen < 1.05


def test_bytes_a_parameter():
  count = 48 * 16 + 16 * 24
  held = {s: tree_paths.tree_bytes(trained(s)[1]) / count for s in STORAGES}
  assert held["float32"] == pytest.approx(8, rel=0.01)
  assert held["bfloat16"] == pytest.approx(4, rel=0.01)
  # Two codes, two float32 scales in 256, and two tables of 1 kB; the last block of B is half full.
  blocks = 3 + 2
  assert held["8bit"] == pytest.approx(2 * (256 * blocks + 4 * blocks + 1024) / count, rel=0.01)


def test_moments_lie_on_the_host():
  """Of a whole train step, which donates them; and the plan knows where they are."""
  model = Transformer(TransformerConfig(64, 32, 48, 2, 2, 1, 16), dtype=jnp.float32)
  frozen = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  cfg = lora.LoRAConfig(rank=8)
  params, constants = lora.init(jax.random.key(1), frozen, cfg)
  state = init_state(params, constants, optimizer("host"), seed=0, dtype=model.dtype)
  tokens = jnp.ones((1, 1, 8), jnp.int32)
  batch = {"tokens": tokens, "targets": tokens, "loss_mask": tokens > 0}
  state, _ = make_train_step(model, optimizer("host"))(state, frozen, batch)
  kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
  assert kinds == {"pinned_host"}
  planned = [
    plan.Planner.of(model, frozen, cfg, optimizer(storage)).memory(plan.Step(4, 32))
    for storage in ("float32", "host")
  ]
  moments = 2 * planned[0].adapters
  assert planned[0].optimizer - planned[1].optimizer == planned[1].host == moments
  assert planned[0].total - planned[1].total == moments


@pytest.mark.parametrize("storage", ["8bit", "host"])
def test_a_run_goes_on_to_the_same_numbers(storage, tmp_path):
  state = start(storage)
  with Checkpoints(tmp_path, keep=1, base_fingerprint="x") as checkpoints:
    for _ in range(2):
      state, _ = step(storage)(state)
    checkpoints.save(2, state)
    checkpoints.wait()
    restored = checkpoints.restore(start(storage))
  assert restored is not None
  kinds = [[x.sharding.memory_kind for x in jax.tree.leaves(s)] for s in (state, restored)]
  assert kinds[0] == kinds[1]
  for _ in range(2):
    (state, value), (restored, other) = step(storage)(state), step(storage)(restored)
    assert value == other


def test_random_rounding_is_right_in_the_mean():
  x = jnp.full((4096,), 1 + 1 / 512, jnp.float32)  # a quarter of the way between two bfloat16s
  found = optimizer_state._rounded_at_random(x, jax.random.key(0)).astype(jnp.float32)
  assert set(np.unique(found)) == {np.float32(1), np.float32(1 + 1 / 128)}
  assert abs(float(found.mean()) - float(x[0])) < 4 * np.sqrt(0.25 * 0.75 / 4096) / 128


def test_a_small_second_moment_is_never_zero():
  """A block of large and of tiny moments: what is divided by stays above 0."""
  nu: Any = {"a": jnp.asarray([1.0, 1e-14, 1e-20] + [0.0] * 253, jnp.float32), "b": jnp.zeros(300)}
  adam = optax.ScaleByAdamState(jnp.zeros((), jnp.int32), nu, nu)
  back = optimizer_state._unpack("8bit", nu, optimizer_state._pack("8bit", adam))
  assert (np.asarray(back.nu["a"]) > 0).all()
  np.testing.assert_allclose(back.nu["a"][0], 1.0)
  assert back.nu["a"][1] < 1e-12
  assert (np.asarray(back.nu["b"]) == 0).all()


def test_such_trials_stay_alone():
  draft = defaults()
  draft.name, draft.pretrain.steps, draft.data.synthetic = "x", 2, "manuals"
  draft.data.seq_len = 64

  def identity(**overrides):
    return group_identity(from_config_dict(draft, overrides))

  assert identity(seed=1) == identity(seed=2)
  alone = {"optimizer.state": "8bit"}
  assert identity(**alone, seed=1) != identity(**alone, seed=2)

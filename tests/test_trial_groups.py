"""Trials stacked in one program: padding, what each trial computes, and that it is its own."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import lora, optimizers, train, tree_paths, trial_groups
from qlora_jax.config import OptimizerConfig
from qlora_jax.hf import checkpoint
from qlora_jax.models.transformer import Transformer, TransformerConfig

STEPS, TOKENS, VOCABULARY = 3, 12, 29
OPTIMIZER = OptimizerConfig(
  learning_rate=2e-2, schedule="linear", warmup_steps=1, clip_norm=0.5, weight_decay=0.1
)
# Of these the first has all adapters and the largest rank.
ADAPTERS = (
  lora.LoRAConfig(rank=4),
  lora.LoRAConfig(rank=2, alpha=4.0, targets=("*/attn/*",), dropout=0.3),
  lora.LoRAConfig(rank=3, targets=("*/attn/q", "*/mlp/down"), rank_pattern={"*/0/mlp/*": 1}),
)
RATES = (2e-2, 1e-2, 3e-3)


@pytest.fixture(scope="module")
def model() -> Transformer:
  config = TransformerConfig(VOCABULARY, 16, 24, 2, 2, 1, 8, tie_embeddings=True)
  return Transformer(config, dtype=jnp.float32)


@pytest.fixture(scope="module")
def frozen(model):
  tokens = jnp.zeros((1, TOKENS), jnp.int32)
  dense = jax.jit(model.init)(jax.random.key(0), tokens)["frozen"]
  rules = checkpoint.default_rules(ql.QuantizationConfig(block_size=8))
  return ql.quantize_tree(dense, rules)


def config_of(rate: float) -> OptimizerConfig:
  return dataclasses.replace(OPTIMIZER, learning_rate=rate)


def state_of(frozen, adapters: lora.LoRAConfig, seed: int) -> train.TrainState:
  params, constants = lora.init(jax.random.key(seed), frozen, adapters)
  optimizer = optimizers.make(OPTIMIZER, STEPS)
  return train.init_state(params, constants, optimizer, seed=seed, dtype=jnp.float32)


def batch_of(seed: int, step: int) -> dict[str, np.ndarray]:
  generator = np.random.default_rng([seed, step])
  tokens = generator.integers(0, VOCABULARY, (2, 2, TOKENS), np.int32)
  mask = generator.random(tokens.shape) < 0.7
  return {"tokens": tokens, "targets": np.roll(tokens, -1, -1), "loss_mask": mask}


@pytest.fixture(scope="module")
def step(model):
  # Of another rate than any trial's: rates are data.
  make = functools.partial(optimizers.make, config_of(7.0), STEPS)
  return trial_groups.make_group_step(model, make, loss_chunk=16, z_loss=1e-4)


def train_group(step, frozen, states, rates, seeds, learning=None):
  """All steps; the states, and the metrics of each. `learning` `[STEPS, trials]`; None: all."""
  learning = np.ones((STEPS, len(states)), np.bool_) if learning is None else learning
  wide = trial_groups.widest(states, optimizers.make(OPTIMIZER, STEPS), jnp.float32)
  stacked = trial_groups.stack(states, wide)
  table = np.stack([optimizers.rates(config_of(rate), STEPS) for rate in rates])
  found = []
  for i in range(STEPS):
    batch = trial_groups.stack_batches([batch_of(seed, i) for seed in seeds])
    stacked, metrics = step(stacked, table, learning[i], frozen, batch)
    found.append(jax.device_get(metrics))
  return stacked, found


@pytest.fixture(scope="module")
def states(frozen):
  return [state_of(frozen, adapters, seed) for seed, adapters in enumerate(ADAPTERS)]


@pytest.fixture(scope="module")
def trained(step, frozen, states):
  return train_group(step, frozen, states, RATES, range(3))


@pytest.mark.parametrize("i", [1, 2])  # padded both
def test_a_trial_of_a_group_is_its_single_run(model, frozen, states, trained, i):
  single = train.make_train_step(model, optimizers.make(config_of(RATES[i]), STEPS), 16, 1e-4)
  state = jax.tree.map(jnp.copy, states[i])
  for number in range(STEPS):
    state, metrics = single(state, frozen, batch_of(i, number))
    for name, value in metrics.items():
      np.testing.assert_allclose(trained[1][number][name][i], value, rtol=2e-5, err_msg=name)
  ours = trial_groups.unstack(trained[0], i, states[i])
  assert jax.tree.structure(ours) == jax.tree.structure(state)
  found, expected = tree_paths.leaves(ours), tree_paths.leaves(state)
  for path, value in expected.items():
    # Adam divides by the root of a second moment: where that is small, roundings are not.
    np.testing.assert_allclose(found[path], value, rtol=1e-3, atol=2e-5, err_msg=path)
  start = tree_paths.leaves(states[i])
  for path in expected:
    if path.startswith("params/"):
      assert np.abs(np.asarray(found[path]) - np.asarray(start[path])).max() > 1e-4, path


def test_a_masked_trial_stays_and_the_others_do_not_change_by_a_bit(step, frozen, states, trained):
  learning = np.ones((STEPS, 3), np.bool_)
  learning[1:, 1] = False
  found, metrics = train_group(step, frozen, states, RATES, range(3), learning)
  first = np.zeros((STEPS, 3), np.bool_)
  first[0, 1] = True
  one_step, _ = train_group(step, frozen, states, RATES, range(3), first)
  for path, leaf in tree_paths.leaves(found).items():
    whole, once = (np.asarray(tree_paths.leaves(each)[path]) for each in (trained[0], one_step))
    leaf = np.asarray(leaf)
    np.testing.assert_array_equal(leaf[[0, 2]], whole[[0, 2]], err_msg=path)
    np.testing.assert_array_equal(leaf[1], once[1], err_msg=path)  # as the first step left it
  assert all((ours["loss"][[0, 2]] == theirs["loss"][[0, 2]]).all()
             for ours, theirs in zip(metrics, trained[1], strict=True))  # fmt: skip


def test_layers_in_a_row_train_a_padded_trial_alike(model, frozen, states, trained):
  make = functools.partial(optimizers.make, config_of(7.0), STEPS)
  row = model.clone(unroll=True, remat="elementwise")
  step = trial_groups.make_group_step(row, make, loss_chunk=16, z_loss=1e-4)
  found, metrics = train_group(step, frozen, states, RATES, range(3))
  # The second has dropout, whose masks are others.
  for ours, theirs in zip(metrics, trained[1], strict=True):
    np.testing.assert_allclose(ours["loss"][[0, 2]], theirs["loss"][[0, 2]], rtol=2e-5)
  expected = tree_paths.leaves(trained[0].params)
  for path, leaf in tree_paths.leaves(found.params).items():
    whole = np.asarray(expected[path])
    np.testing.assert_allclose(leaf[2], whole[2], rtol=1e-3, atol=2e-5, err_msg=path)
    if path.endswith("/lora_b"):
      # Of rank 3 among 4.
      assert not np.asarray(leaf[2][:, 3:]).any()


def test_padding_stays_exactly_zero(trained, states):
  checked = 0
  for i, own in enumerate(states):
    like = tree_paths.leaves(own)
    for path, leaf in tree_paths.leaves(trained[0]).items():
      value = np.array(leaf[i])
      if path in like:
        value[tuple(map(slice, like[path].shape))] = 0
      elif "constants" not in path:
        assert "mlp" in path or "attn" in path
      checked += value.size if path not in like else 0
      assert not value.any(), path
  assert checked > 1000


def test_the_gradient_of_padding_is_exactly_zero(model, frozen, states):
  wide = trial_groups.widest(states, optimizers.make(OPTIMIZER, STEPS), jnp.float32)
  state = trial_groups.unstack(trial_groups.stack(states, wide), 1, wide)
  # B is no longer zero, as it is at the start, but for its padding.
  params = tree_paths.leaves(state.params)
  own = tree_paths.leaves(states[1].params)
  for path, leaf in own.items():
    params[path] = params[path].at[tuple(map(slice, leaf.shape))].add(0.01)
  batch = {name: value[0] for name, value in batch_of(0, 0).items()}

  def loss(params):
    variables = {"params": params, "constants": state.constants, "frozen": frozen}
    return train.batch_loss(model, variables, batch, 16)

  gradients = tree_paths.leaves(jax.jit(jax.grad(loss))(tree_paths.nest(params)))
  for path, gradient in gradients.items():
    padding = np.array(gradient)
    if path in own:
      part = tuple(map(slice, own[path].shape))
      assert padding[part].any(), path
      padding[part] = 0
    assert not padding.any(), path


def test_a_trial_is_the_same_to_the_bit_beside_any_others(step, frozen, states, trained):
  """Beside another one, in another place, and beside one that is not finite."""
  other = state_of(frozen, ADAPTERS[0], 9)
  broken = dataclasses.replace(
    other, params=jax.tree.map(lambda x: x.at[...].set(jnp.nan), other.params)
  )
  for order in ([states[1], other, states[2]], [broken, states[2], states[1]]):
    of = {1: 0, 2: 2} if order[0] is states[1] else {2: 1, 1: 2}
    seeds, rates = [9, 9, 9], [1.0, 1.0, 1.0]
    for trial, place in of.items():
      seeds[place], rates[place] = trial, RATES[trial]
    again, metrics = train_group(step, frozen, order, rates, seeds)
    if order[0] is broken:
      assert not np.isfinite(metrics[0]["loss"][0])
    for trial, place in of.items():
      for number in range(STEPS):
        assert metrics[number]["loss"][place] == trained[1][number]["loss"][trial]
      ours, theirs = (
        trial_groups.unstack(each, index, states[trial])
        for each, index in ((again, place), (trained[0], trial))
      )
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_stack_names_what_has_no_place(states):
  narrow = trial_groups.widest([states[1]], optimizers.make(OPTIMIZER, STEPS), jnp.float32)
  with pytest.raises(ValueError, match=r"trial 0: .*mlp.*: none of the group's; widest\(\)"):
    trial_groups.stack([states[0]], narrow)


def test_rates_as_data_are_the_schedule():
  cfg = dataclasses.replace(OPTIMIZER, schedule="cosine", warmup_steps=2)
  table = optimizers.rates(cfg, 6)
  schedule: Any = optimizers.schedule(cfg, 6)
  np.testing.assert_allclose(table, [float(schedule(i)) for i in range(6)], rtol=1e-6)
  plain = optimizers.make(cfg, 6)
  data = optimizers.make(config_of(9.0), 6, jnp.asarray(table))
  params: Any = {"lora_b": jnp.arange(3.0)}
  first, second = plain.init(params), data.init(params)
  update: Any
  other: Any
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for _ in range(6):
    update, first = plain.update(params, first, params)
    other, second = data.update(params, second, params)
    assert np.abs(update["lora_b"]).max() > 0
    np.testing.assert_allclose(update["lora_b"], other["lora_b"], rtol=1e-5)

"""What is said when a step does not fit."""

import dataclasses
import functools
import io

import jax
import numpy as np
import pytest

from experiments import planned, trial, trial_group
from experiments.shapes import SHAPES
from qlora_jax import config as config_lib
from qlora_jax import data, lora, optimizers, train
from qlora_jax.models.transformer import Transformer

SHAPE = SHAPES["tiny"]
MODEL = Transformer(SHAPE, remat="mlp")


def config(**overrides):
  draft = config_lib.defaults()
  draft.name, draft.pretrain.steps, draft.data.synthetic = "large", 2, "manuals"
  draft.data.seq_len = draft.pretrain.max_position_embeddings = 8192
  draft.model.remat = "auto"
  draft.train.batch_size = 5
  return config_lib.from_config_dict(draft, overrides)


# What is found, where that is not what is asked.
SAVED = [("--config.a=1", 3_000_000), ("--config.b=2", 2_000_000), ("--config.c=3", 1)]
EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")


def fails(*_, **__):
  raise EXHAUSTED


def test_what_would_save_most():
  cfg = config(**{"model.remat": "mlp"})
  found = planned.savings(cfg, SHAPE, planned.training, planned._of_training(cfg))
  sizes = [saved for _, saved in found]
  assert sizes == sorted(sizes, reverse=True)
  assert all(size > 0 for size in sizes)
  fields = [text.split("=")[0] for text, _ in found]
  assert len(set(fields)) == len(fields)
  half = dict(found)["--config.train.batch_size=3 --config.train.accumulate_steps=2"]
  planner, step = planned.planner(cfg, SHAPE), planned.step_of(cfg)
  fewer = dataclasses.replace(step, batch_size=3, accumulate_steps=2)
  assert half == planner.memory(step).total - planner.memory(fewer).total
  # The optimizer's state is that of another planner.
  state = dict(found)["--config.optimizer.state=host"]
  assert state == 2 * planner.adapter_bytes


def parts(error, what, counted):
  """The settings that the message names, whose first line is of these parts."""
  first, *settings = str(error.value).splitlines()
  sizes = {k: v for k, v in dataclasses.asdict(counted).items() if k != "host" and v}
  listed = ", ".join(
    f"{name} {size / 1e6:.3g} MB" for name, size in sorted(sizes.items(), key=lambda p: -p[1])
  )
  assert first == (
    f"out of memory: {what} takes about {counted.total / 1e6:.3g} MB ({listed}). Try"
  )
  assert len(settings) == 3
  assert all(line.startswith("  --") and "saves about" in line for line in settings)
  return settings


def test_a_step_that_does_not_fit_is_explained(monkeypatch):
  def loop():
    yield {}

  monkeypatch.setattr(planned, "savings", lambda *_: SAVED)
  monkeypatch.setattr(trial, "_train_step", lambda *_: fails)
  training = trial.Training(config(), MODEL, {}, None, None, loop(), None)  # pyright: ignore
  with pytest.raises(planned.OutOfMemoryError) as caught:
    trial.train_alone(training, trial.Shared())
  # By the policy that "auto" has chosen.
  step = dataclasses.replace(planned.step_of(config()), remat="mlp")
  parts(caught, "the step", planned.planner(config(), SHAPE).memory(step))


def test_an_evaluation_that_does_not_fit_is_explained(monkeypatch, tmp_path):
  cfg = config(**{"model.remat": "mlp", "train.eval_batch_size": 6})
  ids = np.zeros((20, 8), np.int32)
  rows = data.Dataset(ids, ids, ids, ids > 0)
  monkeypatch.setattr(planned, "savings", lambda *_: SAVED)
  monkeypatch.setattr(trial, "held_out_loss", fails)
  optimizer = optimizers.make(cfg.optimizer, cfg.train.steps)
  state = train.init_state({}, {}, optimizer, seed=0, dtype=MODEL.dtype)
  monkeypatch.setattr(trial, "_start", lambda *_: (MODEL, {}, optimizer, state))
  stage = trial.run_stage(
    cfg,
    tmp_path,
    trial.Rows(rows, rows),
    tmp_path / "stage",
    quantization=None,
    description="",
    shared=trial.Shared(),
  )
  with pytest.raises(planned.OutOfMemoryError) as caught:
    next(stage)
  counted = planned.evaluation(planned.planner(cfg, SHAPE), cfg)
  assert counted.kept == counted.gradients == 0
  parts(caught, "evaluating 6 rows at a time", counted)


def test_attention_is_that_which_computes(monkeypatch):
  """By blocks, where rows are crowded, though the config leaves it open."""
  found = []
  monkeypatch.setattr(planned, "savings", lambda cfg, *_: found.append(cfg.model.attention) or [])
  for explain in (planned.training_explained, planned.evaluation_explained):
    explain(config(), MODEL.clone(attention="blockwise"))
    explain(config(), MODEL)
  assert found == ["blockwise", "auto"] * 2


def test_what_would_save_most_of_an_evaluation():
  cfg = config(**{"train.eval_batch_size": 6})
  fewer = list(planned._of_evaluation(cfg))[:2]
  found = dict(planned.savings(cfg, SHAPE, planned.evaluation, fewer))
  assert list(found) == ["--config.train.eval_batch_size=3", "--config.data.seq_len=4096"]
  # Half of what a layer works on, but for its weight.
  working = planned.evaluation(planned.planner(cfg, SHAPE), cfg).working
  assert all(size == pytest.approx(working / 2, rel=0.01) for size in found.values())


def test_a_group_that_does_not_fit_is_explained(monkeypatch):
  cfgs = [config(**{"model.remat": "mlp", "lora.rank": rank}) for rank in (2, 4, 4)]
  frozen = planned.abstract_base(cfgs[0], MODEL)
  states = []
  for cfg in cfgs:
    params, constants = jax.eval_shape(
      lambda base, cfg=cfg: lora.init(jax.random.key(0), base, cfg.lora), frozen
    )
    optimizer = optimizers.make(cfg.optimizer, cfg.train.steps)
    make = functools.partial(train.init_state, optimizer=optimizer, seed=0, dtype=MODEL.dtype)
    state = jax.eval_shape(make, params, constants)
    states.append(dataclasses.replace(state, step=0))  # pyright: ignore

  class Writer:
    def write(self, *_):
      pass

  def loop():
    yield {"tokens": np.zeros((1, 5, 8192), np.int32)}

  asked = []
  monkeypatch.setattr(planned, "savings", lambda *given: asked.append(given) or SAVED)

  def members():
    for cfg, state in zip(cfgs, states, strict=True):
      member = trial_group._Member(iter(()), io.StringIO())  # pyright: ignore
      member.training = trial.Training(cfg, MODEL, frozen, optimizer, state, loop(), Writer())  # pyright: ignore
      yield member

  # At the call, and where it is only then that the numbers are asked for.
  monkeypatch.setattr(trial_group.trial_groups, "stack", lambda *_: None)
  monkeypatch.setattr(trial_group, "_step", lambda *_: fails)
  with pytest.raises(planned.OutOfMemoryError) as caught:
    trial_group._train_together(list(members()), trial.Shared())
  alone = planned.planner(cfgs[1], SHAPE).memory(planned.step_of(cfgs[1]))
  together = planned.planner(cfgs[1], SHAPE).memory(
    dataclasses.replace(planned.step_of(cfgs[1]), trials=3)
  )
  assert together.base == alone.base
  assert together.adapters == 3 * alone.adapters  # of the largest rank
  assert together.kept == 3 * alone.kept
  settings = parts(caught, "the step of 3 trials together", together)
  assert any("--group_size=2:" in line for line in settings)
  (cfg, _, _, offered) = asked[0]
  assert cfg.lora.rank == 4
  fields = {path for choices in offered for overrides in choices for path in overrides}
  assert "train.batch_size" in fields
  # What would take the trials apart, and what they differ in.
  assert not fields & {"optimizer.state", "lora.rank"}
  # And where the states are put on the device, before any step.
  monkeypatch.setattr(trial_group.trial_groups, "stack", fails)
  with pytest.raises(planned.OutOfMemoryError, match="the step of 3 trials"):
    trial_group._train_together(list(members()), trial.Shared())
  monkeypatch.setattr(trial_group.jax, "device_get", fails)
  with pytest.raises(planned.OutOfMemoryError, match="the step of 3 trials"):
    trial_group._read({}, lambda: "the step of 3 trials")


def test_other_errors_are_as_they_were():
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    with planned.out_of_memory_explained(lambda: ""):
      raise jax.errors.JaxRuntimeError("INTERNAL: something else")

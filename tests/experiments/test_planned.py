"""What is said when a step does not fit."""

import dataclasses

import jax
import pytest

from experiments import planned, trial
from experiments.shapes import SHAPES
from qlora_jax import config as config_lib
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


def test_what_would_save_most():
  cfg = config(**{"model.remat": "mlp"})
  found = planned.savings(cfg, SHAPE)
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


def test_a_step_that_does_not_fit_is_explained(monkeypatch):
  def step(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

  def loop():
    yield {}

  monkeypatch.setattr(trial, "_train_step", lambda *_: step)
  training = trial.Training(config(), MODEL, {}, None, None, loop(), None)  # pyright: ignore
  with pytest.raises(planned.OutOfMemoryError) as caught:
    trial.train_alone(training, trial.Shared())
  first, *settings = str(caught.value).splitlines()
  # By the policy that "auto" has chosen; the largest part first.
  total = planned.planner(config(), SHAPE).memory(
    dataclasses.replace(planned.step_of(config()), remat="mlp")
  )
  parts = f"(working {total.working / 1e6:.3g} MB, kept {total.kept / 1e6:.3g} MB, optimizer"
  assert f"takes about {total.total / 1e6:.3g} MB {parts}" in first
  assert len(settings) == 3
  assert all(line.startswith("  --config.") and "saves about" in line for line in settings)


def test_other_errors_are_as_they_were():
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    with planned.out_of_memory_explained(config(), MODEL):
      raise jax.errors.JaxRuntimeError("INTERNAL: something else")

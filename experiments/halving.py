"""Successive halving: of a sweep's settings the worse ones stop early, at losses that all reached.

  rung         steps     of 48 settings, one in 4 kept      work, in whole trainings
  1            T / 16    48 → 12                            3.00
  2            T / 4     12 → 3                             2.25
  the end      T         3                                  2.25

(Of trials that are evaluated every T / 16 steps: where it is more often, there are earlier rungs.)

Settings are compared, trials that differ in their seed alone: the mean of their held-out losses,
at a step that each of them has reached and saved. So seeds stay or go together, and what is left
can be compared in pairs. 16-bit LoRA beside QLoRA is what others are compared with, and goes on.

A trial that was stopped has `stopped.json`, with its loss and its place; the listing, the outcome
and the report name it, and it is in no table of results. It is not finished: the sweep run without
halving goes on with it from its checkpoint. Groups of trials are made anew from those that are left
at a rung, where all have saved, so nothing changes in a program that runs. Of several processes
each waits at a rung until the others' trials have come there, and all decide the same.

References:
  Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization,
  2016, https://arxiv.org/abs/1502.07943.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import trial
from qlora_jax import metrics
from qlora_jax.config import ConfigError, TrainConfig
from qlora_jax.hf.files import read_json
from qlora_jax.sweeps import Trial


def rungs(train: TrainConfig, keep: int) -> list[int]:
  """The steps at which one in `keep` settings goes on: T / keep, T / keep², …, rising.

  Each is rounded to a step at which the trial is evaluated, and none comes before the first.
  """
  found = set()
  share = train.steps / keep
  while share >= train.eval_every:
    found.add(round(share / train.eval_every) * train.eval_every)
    share /= keep
  return sorted(step for step in found if step < train.steps)


def check(trials: Sequence[Trial], keep: int) -> list[int]:
  """The rungs of a sweep.

  Raises:
    ConfigError: trials whose losses cannot be compared at common steps, or none to stop.
  """
  if keep < 2:
    raise ConfigError(f"halving: {keep}; one setting in 2 or more goes on")
  first = trials[0].config
  for each in trials:
    for path, ours, other in (
      ("data", each.config.data, first.data),
      ("train.steps", each.config.train.steps, first.train.steps),
      ("train.eval_every", each.config.train.eval_every, first.train.eval_every),
    ):
      if ours != other:
        raise ConfigError(
          f"halving: trial {each.index}: {path} is not that of trial {trials[0].index}; losses of "
          "one text at the same steps are compared"
        )
    if each.config.train.compare_16bit:
      raise ConfigError(
        f"halving: trial {each.index}: train.compare_16bit trains twice; set it to False"
      )
  steps = rungs(first.train, keep)
  if not steps:
    raise ConfigError(
      f"halving: train.steps = {first.train.steps} over {keep} is below train.eval_every = "
      f"{first.train.eval_every}: no loss to stop a trial by; lower train.eval_every"
    )
  return steps


def competing(trials: Sequence[Trial]) -> list[list[Trial]]:
  """The settings that are compared, each its trials; without 16-bit LoRA beside QLoRA."""
  quantized = [each for each in trials if each.config.model.quantize]
  settings: dict[Any, list[Trial]] = collections.defaultdict(list)
  for each in quantized or trials:
    alike = dataclasses.replace(each.config, name="setting", seed=0)
    settings[repr(alike)].append(each)
  return list(settings.values())


def decide(
  trials: Sequence[Trial], directory: Callable[[str], Path], step: int, keep: int
) -> list[Trial]:
  """Stops the settings that are not among the best at `step`; the same ones whenever it is asked.

  Of those that are, a trial that was stopped here goes on again: one beside a seed that had failed,
  say, and by now has not.

  Args:
    trials: of the sweep.
    directory: of a trial, by its id.
    step: a rung, which all that go on have reached.
    keep: one setting in so many goes on, and one at least.

  Returns:
    The trials that are stopped now.
  """
  ranked: list[tuple[float, int, list[Trial]]] = []
  for setting in competing(trials):
    # One that an earlier rung stopped competes no more.
    if not any(0 < stopped_at(directory(each.id)) < step for each in setting):
      losses = [_loss(directory(each.id), step) for each in setting]
      ranked.append((sum(losses) / len(losses), setting[0].index, setting))
  ranked.sort(key=lambda each: each[:2])
  kept = math.ceil(len(ranked) / keep)
  for *_, setting in ranked[:kept]:
    for each in setting:
      if stopped_at(directory(each.id)) == step:
        (directory(each.id) / FILE).unlink()
  stopped = []
  for place, (loss, _, setting) in enumerate(ranked[kept:], start=kept + 1):
    for each in setting:
      path = directory(each.id)
      # One that failed has its error, and one that is finished stays so.
      if math.isfinite(_loss(path, step)) and not (path / "summary.json").exists():
        found = {"step": step, "loss": loss, "place": place, "of": len(ranked), "kept": kept}
        trial.write_json(path / FILE, found)
        stopped.append(each)
  return stopped


FILE = "stopped.json"


def stopped_at(directory: Path) -> int:
  """The step at which a trial was stopped; 0 where it was not, or where that cannot be read.

  What was torn is then decided again, from the losses, and written whole.
  """
  try:
    found = stopped(directory)
  except ValueError:
    return 0
  return 0 if found is None else found["step"]


def stopped(directory: Path) -> dict[str, Any] | None:
  """What stopped a trial: step, loss, place; None where nothing did.

  Raises:
    ValueError: the file is torn.
  """
  try:
    return read_json(directory / FILE)
  except FileNotFoundError:
    return None


def described(found: dict[str, Any]) -> str:
  """`stopped early at step 50: loss 3.1200, place 30 of 48, 12 went on`."""
  loss = "not finite" if not math.isfinite(found["loss"]) else f"{found['loss']:.4f}"
  return (
    f"stopped early at step {found['step']}: loss {loss}, place {found['place']} of {found['of']}, "
    f"{found['kept']} went on"
  )


def _loss(directory: Path, step: int) -> float:
  """Held-out, at `step`; infinite where a trial did not come so far, or its losses are torn."""
  try:
    lines = metrics.read(directory)
  except (FileNotFoundError, ValueError):  # what is torn fails, with that, when it goes on
    return math.inf
  found = [
    line["held_out_loss"] for line in lines if line["step"] == step and "held_out_loss" in line
  ]
  return found[-1] if found else math.inf

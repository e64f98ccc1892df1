"""Trials of a sweep that train together: the files, the numbers and the ends of each."""

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from experiments import sweep, trial, trial_group
from qlora_jax import metrics, sweeps, trial_groups
from qlora_jax.train import SignalGuard
from tests.experiments.test_sweep import CONFIG as SWEEP
from tests.experiments.test_sweep import main, trials_of

CONFIG = (
  SWEEP.partition("  return config")[0]
  + """
  config.optimizer.warmup_steps = 1
  config.train.log_every = 2
  return config

def sweep():
  yield {"lora.rank": 2, "seed": 1}
  yield {"lora.rank": 4, "seed": 0, "optimizer.learning_rate": 3e-2}
  yield {"lora.rank": 2, "lora.targets": ["*/attn/q"], "lora.dropout": 0.2}
"""
)
# The last two beside one that takes such steps: the program is that of the three.
DIVERGES = CONFIG.replace(
  '{"lora.rank": 2, "seed": 1}',
  '{"lora.rank": 2, "optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1.0}',
)


def write(folder: Path, text: str) -> Path:
  path = folder / "tiny.py"
  path.write_text(text)
  return path


def summary(workdir: Path, one: sweeps.Trial) -> dict:
  return json.loads((workdir / "trials" / one.id / "summary.json").read_text())["qlora"]


def summaries(config: Path, workdir: Path) -> list[dict]:
  return [summary(workdir, each) for each in trials_of(config)]


def files(directory: Path) -> set[str]:
  """Of a run, but for the names that TensorBoard and Orbax make up."""
  found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
  return {
    path.as_posix() for path in found if path.parts[0] not in ("tensorboard", "checkpoints")
  } | {str(trial.saved_step(directory))}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
  return write(tmp_path_factory.mktemp("config"), CONFIG)


@pytest.fixture(scope="module")
def together(config, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("together") / "s"
  assert main(config, workdir, "--group_size=3") == 0
  return workdir


def test_a_group_writes_what_a_single_trial_writes(config, together, tmp_path):
  """Of the trial that is padded in all ways: rank, targets, dropout."""
  one = trials_of(config)[2]
  assert main(config, tmp_path / "s", "--index=2") == 0
  ours, theirs = (each / "trials" / one.id for each in (together, tmp_path / "s"))
  assert files(ours) == files(theirs)
  lines, expected = metrics.read(ours), metrics.read(theirs)
  lines = [line for line in lines if "trials_together" not in line]  # a line that only groups have
  assert [sorted(line) for line in lines] == [sorted(line) for line in expected]
  for line, other in zip(lines, expected, strict=True):
    for name in ("loss", "held_out_loss", "grad_norm", "learning_rate", "targets"):
      if name in line:
        np.testing.assert_allclose(line[name], other[name], rtol=2e-4, err_msg=name)
  found, wanted = (
    json.loads((each / "summary.json").read_text())["qlora"] for each in (ours, theirs)
  )
  np.testing.assert_allclose(found["loss_after"], wanted["loss_after"], rtol=1e-5)
  assert found["loss_after"] != found["loss_before"]
  assert found.pop("trials_together") == [[0, 3, 4]] and wanted.pop("trials_together") == []
  for name in found.keys() - {"seconds_this_process", "measured", "loss_after", "loss_before"}:
    assert found[name] == wanted[name], name


def test_each_trial_of_a_group_has_a_log_of_its_own(config, together):
  for one in trials_of(config):
    log = (together / "trials" / one.id / "log.txt").read_text()
    assert log.count("QLoRA: step 6/6") == 2  # its loss, and that of the held-out text


def test_trials_differ_in_what_is_their_own(config, together):
  folders = [together / "trials" / one.id / "adapter" for one in trials_of(config)]
  adapters = [json.loads((each / "adapter_config.json").read_text()) for each in folders]
  assert [each["r"] for each in adapters] == [2, 4, 2]
  assert adapters[2]["target_modules"] == ["q_proj"]
  losses = [each["loss_after"] for each in summaries(config, together)]
  assert len(set(losses)) == 3


def test_one_that_is_not_finite_stops_no_other(config, together, tmp_path, capsys):
  workdir = tmp_path / "s"
  assert main(write(tmp_path, DIVERGES), workdir, "--group_size=3") == 1
  printed = capsys.readouterr().out
  assert "tiny: 0/3 done, 3 running, 0 failed; 3 trials together" in printed
  assert "2 finished, 1 failed" in printed
  assert "NonFiniteLossError: step" in printed
  for one in trials_of(config)[1:]:
    ours, theirs = (summary(each, one) for each in (workdir, together))
    np.testing.assert_allclose(ours["loss_after"], theirs["loss_after"], rtol=1e-5)


def steps_that(act, monkeypatch) -> None:
  """Has `act(n)` called ahead of the n-th step of a group."""
  make, count = trial_groups.make_group_step, [0]

  def make_acting(*arguments):
    step = make(*arguments)

    def acting(*arguments):
      count[0] += 1
      act(count[0])
      return step(*arguments)

    acting.lower = step.lower
    return acting

  monkeypatch.setattr(trial_groups, "make_group_step", make_acting)


@pytest.mark.slow
def test_a_signal_saves_all_and_the_same_command_goes_on(config, together, tmp_path, monkeypatch):
  workdir = tmp_path / "s"
  with monkeypatch.context() as patch:
    steps_that(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 3 else None, patch)
    assert main(config, workdir, "--group_size=3") == 128 + signal.SIGTERM
  for one in trials_of(config):
    assert trial.saved_step(workdir / "trials" / one.id) == 3
  assert not list(workdir.rglob("error.json"))
  assert main(config, workdir, "--group_size=3") == 0
  for ours, theirs in zip(summaries(config, workdir), summaries(config, together), strict=True):
    assert ours["loss_after"] == theirs["loss_after"]
  log = (workdir / "trials" / trials_of(config)[0].id / "log.txt").read_text()
  assert "QLoRA: resumes at step 3 of 6" in log


def test_a_killed_group_goes_on_in_other_groups(config, together, tmp_path, monkeypatch):
  """One trial alone first; the others find it ahead, and at different steps."""
  workdir, trials = tmp_path / "s", trials_of(config)

  class Killed(BaseException):
    pass

  def die(n):
    if n == 4:
      raise Killed

  with monkeypatch.context() as patch:
    steps_that(die, patch)
    with pytest.raises(Killed):
      main(config, workdir, "--group_size=3")
  assert {trial.saved_step(workdir / "trials" / each.id) for each in trials} == {2}
  assert main(config, workdir, "--index=1") == 0
  ahead = json.loads((workdir / "trials" / trials[1].id / "summary.json").read_text())
  assert main(config, workdir, "--group_size=3") == 0
  again = json.loads((workdir / "trials" / trials[1].id / "summary.json").read_text())
  assert again == ahead
  for ours, theirs in zip(summaries(config, workdir), summaries(config, together), strict=True):
    np.testing.assert_allclose(ours["loss_after"], theirs["loss_after"], rtol=1e-5)


@pytest.mark.slow
def test_what_does_not_fit_trains_alone(config, together, tmp_path, monkeypatch):
  monkeypatch.setattr(trial_group.memory, "available_bytes", lambda _: 0)
  monkeypatch.setattr(trial_group, "_train_together", None)
  assert main(config, tmp_path / "s", "--group_size=3") == 0
  pairs = zip(summaries(config, tmp_path / "s"), summaries(config, together), strict=True)
  for ours, theirs in pairs:
    np.testing.assert_allclose(ours["loss_after"], theirs["loss_after"], rtol=1e-5)


def in_a_stub_s_groups(count: int, fit: int, shared: trial.Shared, monkeypatch):
  """Sizes that were compiled, and that trained, of `count` trials of which `fit` fit together."""
  tried, trained = [], []

  def steps():
    yield trial.Training(*[None] * 7)  # pyright: ignore[reportArgumentType]
    return {}

  def fits(members, _):
    tried.append(len(members))
    return len(members) <= fit

  def train(members, _):
    trained.append(len(members))
    return [(member, "its state") for member in members]

  for name, value in (
    ("_on_the_host", lambda state: state),
    ("_program", lambda _: "one"),
    ("_fits", fits),
    ("_train_together", train),
    ("_train_alone", train),
  ):
    monkeypatch.setattr(trial_group, name, value)
  trials = [(steps(), io.StringIO()) for _ in range(count)]
  assert trial_group.run(trials, 64, shared, SignalGuard()) == [{}] * count
  return set(tried), trained


def test_what_did_not_fit_once_is_not_tried_again(monkeypatch):
  shared = trial.Shared()
  assert in_a_stub_s_groups(64, 10, shared, monkeypatch) == ({64, 32, 16, 8}, [8] * 8)
  # The next ones of the process: in equal parts of what fitted.
  assert in_a_stub_s_groups(24, 10, shared, monkeypatch) == ({8}, [8] * 3)
  assert in_a_stub_s_groups(10, 10, shared, monkeypatch) == ({5}, [5] * 2)
  assert in_a_stub_s_groups(3, 1, shared, monkeypatch) == ({3, 2}, [1] * 3)


def test_a_compiler_that_runs_out_of_memory_says_that_a_group_does_not_fit(config, monkeypatch):
  class Step:
    def lower(self, *_):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")

  training = SimpleNamespace(config=trials_of(config)[0].config, frozen=None)
  members: Any = [SimpleNamespace(training=training)] * 2
  monkeypatch.setattr(trial_group, "_wide", lambda _: np.zeros(2))
  monkeypatch.setattr(trial_group, "_step", lambda *_: Step())
  assert not trial_group._fits(members, trial.Shared())


def test_a_program_that_fails_fails_its_trials_alone(tmp_path, monkeypatch, capsys):
  two = (
    "  yield {'model.quantize': False, 'seed': 1}\n  yield {'model.quantize': False, 'seed': 2}\n"
  )
  path = write(tmp_path, CONFIG.split("  yield")[0] + two + "  yield {'lora.rank': 2, 'seed': 1}\n")
  trained = []

  def fails(members, _):
    trained.append(len(members))
    raise RuntimeError("RESOURCE_EXHAUSTED")

  monkeypatch.setattr(trial_group, "_fits", fails)
  monkeypatch.setattr(sweep, "run_trial", lambda _, one, *__: trained.append(one.index))
  assert main(path, tmp_path / "s", "--group_size=2") == 1
  assert trained == [2, 2]  # two together, and trial 2
  printed = capsys.readouterr().out
  assert printed.count("RuntimeError: RESOURCE_EXHAUSTED") == 4  # as they came, and at the end
  assert "2 failed" in printed


def test_a_group_leaves_out_what_another_process_has(config, tmp_path, monkeypatch):
  trials, ran = trials_of(config), []
  monkeypatch.setattr(sweep, "run_group", lambda _, trials, *__: ran.append([*trials]))
  directory = sweep.prepare("tiny", trials, tmp_path / "s")
  with directory.lock(trials[1].id):
    found = sweep.run("tiny", trials, tmp_path / "s", group_size=3)
  assert ran[0] == [trials[0], trials[2]]
  assert found.elsewhere == [trials[1]]


def test_groups_are_of_like_sizes_steps_and_ranks(tmp_path):
  """Of what one program serves; a base of its own is a group of its own."""
  path = write(
    tmp_path,
    CONFIG.split("def sweep")[0]
    + """
def sweep():
  for seed in range(3):
    for rank in (8, 2, 4):
      yield {"lora.rank": rank, "seed": seed}
  yield {"lora.rank": 2, "seed": 9, "quantization.block_size": 32}
  yield {"lora.init": "pissa", "seed": 0}
  yield {"lora.init": "pissa", "seed": 1}
  yield {"optimizer.clip_norm": 2.0}
""",
  )
  trials = trials_of(path)
  directory = sweep.Directory(tmp_path / "s")
  (directory.trial(trials[0].id) / "checkpoints" / "4").mkdir(parents=True)
  found = sweep.groups(directory, trials, 4)
  # Nine, in threes: the one that is ahead of the others stands last.
  assert [[each.config.lora.rank for each in group] for group in found[:3]] == [
    [2, 2, 2],
    [4, 4, 4],
    [8, 8, 8],
  ]
  assert found[2][-1] == trials[0]
  assert sorted(len(group) for group in found[3:]) == [1, 1, 1, 1]
  assert sum(map(len, sweep.groups(directory, trials, 1))) == len(trials)
  assert sweeps.group_identity(trials[0].config) == sweeps.group_identity(trials[4].config)


@pytest.mark.slow
def test_ray_takes_a_group_at_a_time(config, together, tmp_path):
  pytest.importorskip("ray")
  workdir = tmp_path / "s"
  assert main(config, workdir, "--ray", "--group_size=3") == 0
  for ours, theirs in zip(summaries(config, workdir), summaries(config, together), strict=True):
    np.testing.assert_allclose(ours["loss_after"], theirs["loss_after"], rtol=1e-5)
  logs = [path.read_text() for path in workdir.glob("trials/*/log.txt")]
  assert sum(log.count("QLoRA: step 6/6") for log in logs) == 2 * 3


def test_on_a_cpu_trials_run_alone_unless_told(config, tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(sweep, "run_group", lambda _, trials, *__: ran.append(len(trials)))
  sweep.run("tiny", trials_of(config), tmp_path / "s")
  assert set(ran) == {1}
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert trial_group.default_size() == trial_group.MOST_TRIALS

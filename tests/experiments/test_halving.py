"""Successive halving: which trials stop, that the others do not notice, and that it is told."""

import json
import math
import shutil
from pathlib import Path

import pytest

from experiments import halving, report, sweep, trial
from experiments.bench import halving as bench
from qlora_jax import config as config_lib
from qlora_jax import metrics, sweeps
from qlora_jax.config import ConfigError, TrainConfig
from qlora_jax.train import Paused
from tests.experiments.test_sweep import CONFIG as SWEEP
from tests.experiments.test_sweep import main, trials_of

# 1e-7 learns nothing; of the two rates that learn something the higher one wins.
CONFIG = (
  SWEEP.partition("  return config")[0]
  + """
  config.train.log_every = 1
  config.train.eval_every = 1
  config.train.checkpoint_every = 6
  return config

def sweep():
  yield from grid({"optimizer.learning_rate": [1e-7, 2e-2, 1e-2, 2e-7], "seed": [0]})
"""
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(CONFIG)
  return path


@pytest.fixture(scope="module")
def halved(config, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("halved") / "s"
  assert main(config, workdir, "--halving=2", "--group_size=4") == 0
  return workdir


def directory(workdir: Path, one: sweeps.Trial) -> Path:
  return workdir / "trials" / one.id


def test_the_rungs():
  train = TrainConfig(steps=200, eval_every=10)
  assert halving.rungs(train, 4) == [10, 50]
  assert halving.rungs(train, 2) == [10, 20, 50, 100]
  assert halving.rungs(TrainConfig(steps=6, eval_every=1), 2) == [2, 3]


def test_the_best_settings_go_on_and_the_others_stand_where_they_stopped(config, halved):
  """Rungs at 2 and 3: four settings, two, one."""
  trials = trials_of(config)
  stopped = [halving.stopped_at(directory(halved, each)) for each in trials]
  assert stopped == [2, 0, 3, 2]
  steps = [trial.saved_step(directory(halved, each)) for each in trials]
  assert steps == [2, 6, 3, 2]
  finished = [(directory(halved, each) / "summary.json").exists() for each in trials]
  assert finished == [False, True, False, False]
  found = halving.stopped(directory(halved, trials[2]))
  assert found is not None and (found["place"], found["of"], found["kept"]) == (2, 2, 1)
  lines = metrics.read(directory(halved, trials[2]))
  at_rung = [
    line["held_out_loss"] for line in lines if line["step"] == 3 and "held_out_loss" in line
  ]
  assert at_rung == [found["loss"]]


def test_the_winner_is_what_it_is_without_halving(config, halved, tmp_path):
  winner = trials_of(config)[1]
  assert main(config, tmp_path / "s", "--index=1") == 0
  ours, theirs = (
    json.loads((directory(each, winner) / "summary.json").read_text())["qlora"]
    for each in (halved, tmp_path / "s")
  )
  assert ours["loss_after"] == pytest.approx(theirs["loss_after"], rel=1e-5)
  # Groups are made anew at rungs alone; the last one has a single trial.
  assert ours["trials_together"] == [[0, 4, 2], [2, 2, 2]] and theirs["trials_together"] == []


def test_it_is_told(config, halved, capsys):
  trials = trials_of(config)
  assert main(config, halved, "--halving=2", "--group_size=4") == 0  # again: nothing changes
  printed = capsys.readouterr().out
  assert "1 finished, 0 failed, 0 with other processes" in printed
  assert "3 stopped early by successive halving, and not finished:" in printed
  assert f"trial 2 ({trials[2].label}): stopped early at step 3: loss " in printed
  assert main(config, halved, "--list") == 0
  assert capsys.readouterr().out.count("; stopped early at step ") == 3
  assert report.main([str(halved)]) == 0
  text = (halved / "report.md").read_text()
  assert "3 trials were stopped early by successive halving" in text
  assert "stopped early at step 2" in text and "4 trials: 3 stopped, 1 finished" in text


def test_without_halving_what_was_stopped_goes_on(config, halved, tmp_path):
  shutil.copytree(halved, tmp_path / "s")
  assert main(config, tmp_path / "s", "--group_size=4") == 0
  for each in trials_of(config):
    path = directory(tmp_path / "s", each)
    assert (path / "summary.json").exists() and halving.stopped(path) is None
    steps = [line["step"] for line in metrics.read(path) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]  # from its checkpoint: no step twice


def made(tmp_path: Path, losses: dict[tuple[float, int], float]) -> list[sweeps.Trial]:
  """Trials by rate and seed, with what they came to at step 10; a NaN came to nothing."""
  draft = config_lib.defaults()
  draft.name, draft.model.path, draft.data.path = "made", "/nowhere", "/nowhere/text.txt"
  draft.train.compare_16bit = False
  draft.train.eval_every = 10
  overrides = ({"optimizer.learning_rate": rate, "seed": seed} for rate, seed in losses)
  trials = sweeps.resolve(draft, overrides)
  for one, loss in zip(trials, losses.values(), strict=True):
    path = tmp_path / one.id
    path.mkdir()
    line = {"step": 10, "time": 0.0, "held_out_loss": loss}
    (path / metrics.METRICS_FILE).write_text("" if math.isnan(loss) else json.dumps(line) + "\n")
  return trials


def test_seeds_of_a_setting_stay_or_go_together(tmp_path):
  # The best trial of all is of the second setting, whose mean is worse.
  losses = {(1e-3, 0): 2.0, (1e-3, 1): 2.1, (2e-3, 0): 1.0, (2e-3, 1): 3.5}
  trials = made(tmp_path, losses)
  stopped = halving.decide(trials, lambda id: tmp_path / id, 10, 2)
  assert stopped == trials[2:]
  # Asked again, and at a later rung: those that were stopped compete no more.
  assert halving.decide(trials, lambda id: tmp_path / id, 10, 2) == trials[2:]
  assert halving.decide(trials, lambda id: tmp_path / id, 20, 2) == []


def test_a_torn_decision_is_made_again(tmp_path):
  trials = made(tmp_path, {(1e-3, 0): 2.0, (2e-3, 0): 1.0})
  assert halving.decide(trials, lambda id: tmp_path / id, 10, 2) == trials[:1]
  path = tmp_path / trials[0].id / halving.FILE
  whole = path.read_text()
  path.write_text(whole[:9])
  assert halving.decide(trials, lambda id: tmp_path / id, 10, 2) == trials[:1]
  assert path.read_text() == whole


def test_torn_losses_rank_last_and_stop_no_other(tmp_path):
  trials = made(tmp_path, {(1e-3, 0): 1.0, (2e-3, 0): 2.0, (3e-3, 0): 3.0})
  path = tmp_path / trials[0].id / metrics.METRICS_FILE
  path.write_text("{torn\n" + path.read_text())
  assert halving.decide(trials, lambda id: tmp_path / id, 10, 2) == []
  assert halving.decide(trials, lambda id: tmp_path / id, 10, 3) == trials[2:]


@pytest.mark.parametrize("other", ["comes", "dies", "came"])
def test_at_a_rung_a_process_waits_for_the_others(config, tmp_path, monkeypatch, capsys, other):
  """Trial 0 is another's, who brings it to the rung, while we wait or run ours, or never does."""
  trials, ran = trials_of(config), []
  directory = sweep.prepare("tiny", trials, tmp_path / "s")
  lock = directory.lock(trials[0].id)

  def to_step(one, step):
    path = directory.trial(one.name)
    (path / "checkpoints" / str(step)).mkdir(parents=True)
    loss = abs(one.optimizer.learning_rate - 2e-2)
    with open(path / metrics.METRICS_FILE, "a") as file:
      file.write(json.dumps({"step": step, "time": 0.0, "held_out_loss": loss}) + "\n")

  def train(one, workdir, shared, measure, until):
    del shared, measure
    ran.append((one.name, until))
    to_step(one, until or 6)
    if other == "came" and len(ran) == 1:
      to_step(trials[0].config, 2)
    if until:
      raise Paused(until)
    found = {"qlora": {"loss_before": 2.0, "loss_after": 1.0}}
    (workdir / "summary.json").write_text(json.dumps(found))

  def wait(seconds):
    assert seconds == sweep._POLL and lock.is_locked
    if other == "comes":
      to_step(trials[0].config, 2)
    lock.release()

  monkeypatch.setattr(trial, "run", train)
  monkeypatch.setattr(sweep.time, "sleep", wait)
  with lock:
    found = sweep.run("tiny", trials, tmp_path / "s", keep=2)
  assert found.finished == 1 and not found.elsewhere
  assert [halving.stopped_at(directory.trial(each.id)) for each in trials] == [2, 0, 3, 2]
  assert ((trials[0].id, 2) in ran) == (other == "dies")
  printed = capsys.readouterr().out
  waits = "tiny: step 2: waits for 1 with other processes\n"
  assert printed.count(waits) == (other != "came")
  # What stands at the rung is not called running.
  assert ("1 running, 0 failed; trial 2 " in printed) == (other == "came")


def test_what_failed_ranks_last_and_is_not_called_stopped(tmp_path):
  trials = made(tmp_path, {(1e-3, 0): math.nan, (2e-3, 0): 5.0, (3e-3, 0): 4.0, (4e-3, 0): 3.0})
  stopped = halving.decide(trials, lambda id: tmp_path / id, 10, 2)
  assert stopped == [trials[1]] and halving.stopped(tmp_path / trials[0].id) is None


def test_a_seed_that_failed_and_then_did_not_takes_its_setting_with_it(tmp_path):
  losses = {(1e-3, 0): 1.0, (1e-3, 1): math.nan, (2e-3, 0): 2.0, (2e-3, 1): 2.0}
  trials = made(tmp_path, losses)
  assert halving.decide(trials, lambda id: tmp_path / id, 10, 2) == trials[:1]
  line = {"step": 10, "time": 0.0, "held_out_loss": 1.1}
  (tmp_path / trials[1].id / metrics.METRICS_FILE).write_text(json.dumps(line) + "\n")
  assert halving.decide(trials, lambda id: tmp_path / id, 10, 2) == trials[2:]
  assert [halving.stopped_at(tmp_path / each.id) for each in trials] == [0, 0, 10, 10]


def test_16bit_lora_that_others_are_compared_with_goes_on():
  draft = config_lib.defaults()
  draft.name, draft.model.path, draft.data.path = "made", "/nowhere", "/nowhere/text.txt"
  draft.train.compare_16bit = False
  trials = sweeps.resolve(draft, sweeps.grid({"model.quantize": [False, True], "seed": [0, 1]}))
  assert halving.competing(trials) == [trials[2:]]
  assert halving.competing(trials[:2]) == [trials[:2]]


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"data.seq_len": 64}, "halving: trial 1: data is not that of trial 0"),
    ({"train.steps": 100}, "halving: trial 1: train.steps is not that of trial 0"),
    ({"train.compare_16bit": True}, "halving: trial 1: train.compare_16bit trains twice"),
  ],
)
def test_what_cannot_be_compared_is_refused(overrides, message):
  draft = config_lib.defaults()
  draft.name, draft.model.path, draft.data.path = "made", "/nowhere", "/nowhere/text.txt"
  draft.train.compare_16bit = False
  trials = sweeps.resolve(draft, [{}, overrides])
  with pytest.raises(ConfigError, match=message):
    halving.check(trials, 4)


def test_a_sweep_without_rungs_is_refused(config, tmp_path, capsys):
  flags = ("--halving=2", "--config.train.eval_every=6")
  assert main(config, tmp_path / "s", *flags) == 2
  assert "train.steps = 6 over 2 is below train.eval_every = 6" in capsys.readouterr().err
  assert main(config, tmp_path / "s", "--halving=1") == 2
  assert "halving: 1; one setting in 2 or more goes on" in capsys.readouterr().err
  for flags, message in (
    (("--halving=x",), "flag --halving=x; a whole number is needed"),
    (("--halving=2", "--index=0"), "--halving: with --index, which runs one trial"),
    (("--halving=2", "--ray"), "--halving: with --ray, which compares no trials"),
  ):
    with pytest.raises(SystemExit):
      main(config, tmp_path / "s", *flags)
    assert message in capsys.readouterr().err
  assert not (tmp_path / "s").exists()


def test_a_trial_that_another_process_brought_to_the_rung_is_not_taken_again(config, halved):
  """Its `stopped.json` would be lost."""
  place, trials = sweep.Directory(halved), trials_of(config)
  with sweep._ours(place, trials[2], {}, 3, 2) as ours:
    assert not ours
  with sweep._ours(place, trials[2], {}) as ours:  # without halving it goes on
    assert ours
  line = sweep._Progress("tiny", place, trials, {}, 2)._line(0)
  assert line == "tiny: 1/4 done, 0 running, 0 failed, 3 stopped early"


def test_the_benchmark_counts_the_steps_that_were_taken(config, halved):
  """Two settings stop at 2, one at 3, of 6."""
  trials = trials_of(config)
  result = bench.found(halved, trials)
  assert (result.steps, result.finished) == (2 + 2 + 3 + 6, 1)
  assert result.winner == trials[1].label
  grid = bench.trials_of(str(config), 1, whole=False)
  assert len(grid) == 48 and {each.config.seed for each in grid} == {1}
  assert halving.check(grid, bench.KEEP) == [8, 32]


def test_the_benchmark_s_row_tells_another_winner():
  whole = {"winner": "a", "loss": 1.0, "steps": 48, "seconds": 9.0}
  assert "halved the same, 1.0000, for 6.0× fewer steps" in bench.line(
    0, whole, {**whole, "steps": 8}
  )
  assert "halved b: another, 1.5000" in bench.line(0, whole, {**whole, "winner": "b", "loss": 1.5})

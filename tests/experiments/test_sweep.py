"""A sweep: what it runs, skips, gives up and leaves to others."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments import command_line, run, sweep, trial
from qlora_jax.train import Interrupted

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
from qlora_jax.config import defaults
from qlora_jax.sweeps import grid

def get_config():
  config = defaults()
  config.name = "tiny"
  config.model.dtype = "float32"
  config.model.remat = "none"
  config.pretrain.steps = 2
  config.pretrain.batch_size = 2
  config.pretrain.num_documents = 20
  config.pretrain.hidden_size = 16
  config.pretrain.intermediate_size = 24
  config.pretrain.num_layers = 2
  config.pretrain.max_position_embeddings = 32
  config.lora.rank = 2
  config.data.synthetic = "manuals"
  config.data.num_documents = 20
  config.data.tokenizer = "bytes"
  config.data.packing = True
  config.data.seq_len = 32
  config.optimizer.learning_rate = 1e-2
  config.train.steps = 6
  config.train.batch_size = 2
  config.train.log_every = 6
  config.train.eval_every = 6
  config.train.checkpoint_every = 2
  config.train.compare_16bit = False
  return config

def sweep():
  yield {"quantization.block_size": 16, "seed": 0}
  yield {"data.path": "/nowhere/text.txt", "data.synthetic": None}
  yield {"quantization.block_size": 16, "seed": 1}
  yield {"model.quantize": False}
"""


def write(folder: Path, text: str = CONFIG) -> Path:
  path = folder / "tiny.py"
  path.write_text(textwrap.dedent(text))
  return path


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
  return write(tmp_path_factory.mktemp("config"))


def trials_of(config: Path):
  trials = command_line.parse(["--config", str(config)]).trials
  assert trials is not None
  return trials


@pytest.fixture
def stub(monkeypatch):
  """In place of training: notes whose turn it was, and writes the summary."""
  ran = []

  def train(config, workdir, shared, measure, until):
    del shared, measure, until
    print(f"training {config.name}")
    ran.append(config.name)
    if config.data.path is not None:
      raise FileNotFoundError(f"{config.data.path}: no such\nfile")
    summary = {"qlora": None, "lora_16bit": {"loss_before": 2.0, "loss_after": 1.0}}
    (workdir / "summary.json").write_text(json.dumps(summary))

  monkeypatch.setattr(trial, "run", train)
  return ran


def main(config: Path, workdir: Path, *flags: str) -> int:
  return run.main(["--config", str(config), "--workdir", str(workdir), *flags])


def test_a_failed_trial_is_listed_and_stops_no_other(config, tmp_path, stub, capsys):
  trials = trials_of(config)
  assert main(config, tmp_path / "s") == 1
  assert sorted(stub) == sorted(each.id for each in trials)
  printed = capsys.readouterr().out
  assert "3 finished, 1 failed, 0 with other processes" in printed
  error = "FileNotFoundError: /nowhere/text.txt: no such file"
  assert f"trial 1 ({trials[1].id}: {trials[1].label}): {error}" in printed
  assert re.search(
    r"^tiny: 2/4 done, 1 running, 0 failed, .* left; trial \d .* →", printed, re.MULTILINE
  )
  assert "→ held-out loss 2.0000, after 1.0000" in printed
  directory = tmp_path / "s/trials" / trials[1].id
  stored = json.loads((directory / "error.json").read_text())
  assert stored["error"] == error
  assert "Traceback" in stored["traceback"]
  # A trial's own words are in its directory.
  assert (directory / "log.txt").read_text() == f"training {trials[1].id}\n"
  assert "training" not in printed


def test_trials_that_share_a_base_run_one_after_another(config, tmp_path, stub):
  trials = trials_of(config)
  main(config, tmp_path / "s")
  assert stub == [trials[i].id for i in (0, 2, 1, 3)]


def test_what_the_directory_says(config, tmp_path, stub):
  main(config, tmp_path / "s")
  stored = json.loads((tmp_path / "s/sweep.json").read_text())
  trials = trials_of(config)
  assert stored["name"] == "tiny"
  assert [each["id"] for each in stored["trials"]] == [each.id for each in trials]
  assert [each["index"] for each in stored["trials"]] == [0, 1, 2, 3]
  assert stored["trials"][2]["overrides"] == {"quantization.block_size": 16, "seed": 1}
  bases = [each["base"] for each in stored["trials"]]
  assert bases[0] == bases[2] and len(set(bases)) == 3
  assert not [path for path in (tmp_path / "s").rglob("*.tmp")]


def test_again_only_the_failed_ones_are_tried(config, tmp_path, stub, capsys):
  trials = trials_of(config)
  main(config, tmp_path / "s")
  stub.clear()
  assert main(config, tmp_path / "s") == 1
  assert stub == [trials[1].id]
  # Last time's failure, which is tried again, is none of this time's.
  assert "tiny: 3/4 done, 1 running, 0 failed; trial 1 " in capsys.readouterr().out
  (tmp_path / "s/trials" / trials[1].id / "summary.json").write_text("{}")
  stub.clear()
  capsys.readouterr()
  assert main(config, tmp_path / "s") == 0
  assert stub == []
  assert "4 finished, 0 failed" in capsys.readouterr().out


def test_a_wider_grid_reruns_nothing(config, tmp_path, stub):
  main(config, tmp_path / "s")
  stub.clear()
  wider = write(tmp_path, CONFIG.replace("def sweep():", "def sweep():\n  yield {'lora.rank': 4}"))
  main(wider, tmp_path / "s", "--config.name=renamed")
  trials = trials_of(wider)
  assert stub == [trials[0].id, trials[2].id]  # the new one, and the one that failed


def test_a_default_that_has_changed_since_does_not_go_unseen(config, tmp_path, stub, capsys):
  workdir, one = tmp_path / "s", trials_of(config)[3]
  main(config, workdir)
  path = workdir / "trials" / one.id / "config.json"
  path.with_name("metrics.jsonl").write_text("{}")  # it has trained
  stored = json.loads(path.read_text())
  stored["lora"]["alpha"] = 5.0
  path.write_text(json.dumps(stored))
  stub.clear()
  capsys.readouterr()
  assert main(config, workdir) == 1
  assert one.id not in stub
  printed = capsys.readouterr().out
  assert "2 finished, 2 failed" in printed
  assert "holds a run with another config (lora.alpha: 5.0 before, 16.0 now)" in printed
  # A field that is no more.
  stored["lora"]["alfa"] = stored["lora"].pop("alpha")
  path.write_text(json.dumps(stored))
  assert main(config, workdir, "--index=3") == 1
  assert "lora.alfa: no such field" in capsys.readouterr().out


def test_damaged_trials_are_listed_as_failed_and_stop_no_other(config, tmp_path, stub, capsys):
  workdir, trials = tmp_path / "s", trials_of(config)
  main(config, workdir)
  paths = [workdir / "trials" / each.id for each in trials]
  (paths[0] / "config.json").unlink()
  (paths[2] / "config.json").write_text('{"name": "to')
  (paths[3] / "summary.json").unlink()
  (paths[3] / "stopped.json").write_text("")
  capsys.readouterr()
  assert main(config, workdir, "--list") == 0
  printed = capsys.readouterr().out
  assert "0 finished, 4 failed, 0 running" in printed
  assert f"{trials[0].label}; {paths[0]}: holds summary.json but no config.json" in printed
  assert f"{trials[2].label}; {paths[2]}/config.json: not JSON" in printed
  assert f"{trials[3].label}; {paths[3]}/stopped.json: not JSON" in printed
  stub.clear()
  assert main(config, workdir) == 1
  assert sorted(stub) == sorted([trials[1].id, trials[3].id])  # the others' files are left alone
  printed = capsys.readouterr().out
  assert "1 finished, 3 failed" in printed
  assert "holds files but no config.json" in printed and "config.json: not JSON" in printed
  assert main(config, workdir, "--index=3") == 0
  assert main(config, workdir, "--index=2") == 1
  assert "0 finished, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 2])
def test_a_torn_summary_is_written_again(config, tmp_path, stub, monkeypatch, size):
  workdir, trials = tmp_path / "s", trials_of(config)
  main(config, workdir)
  torn = [workdir / "trials" / trials[i].id / "summary.json" for i in (0, 2)]
  for path in torn:
    path.write_text(path.read_text()[:20])
  stub.clear()

  def together(started, *_):
    """In place of a group's training."""
    assert not any(path.exists() for path in torn)
    for i in (0, 2):
      trial.run(trials[i].config, workdir / "trials" / trials[i].id, None, None, None)
    return [{} for _ in started]

  monkeypatch.setattr(sweep.trial_group, "run", together)
  main(config, workdir, f"--group_size={size}")
  assert stub[:2] == [trials[0].id, trials[2].id]
  assert all(json.loads(path.read_text())["lora_16bit"] for path in torn)


def test_an_error_that_is_gone_or_torn_is_told(tmp_path):
  directory = sweep.Directory(tmp_path)
  assert directory.failure("a") is None
  directory.trial("a").mkdir(parents=True)
  directory.error("a").write_text('{"err')
  assert directory.failure("a") == f"{directory.error('a')}: cannot be read"


def test_one_trial_of_an_array_job(config, tmp_path, stub, capsys):
  trials = trials_of(config)
  assert main(config, tmp_path / "s", "--index=3") == 0
  assert stub == [trials[3].id]
  assert main(config, tmp_path / "s", "--index", "1") == 1
  assert "FileNotFoundError" in capsys.readouterr().out
  # All of them are known to the directory, whoever runs.
  assert len(json.loads((tmp_path / "s/sweep.json").read_text())["trials"]) == 4


def test_list(config, tmp_path, stub, capsys):
  workdir = tmp_path / "s"
  assert main(config, workdir, "--list") == 0
  printed = capsys.readouterr().out
  assert stub == [] and not workdir.exists()
  assert printed.startswith("tiny: 4 trials on 3 bases; 0 finished, 0 failed")
  trials = trials_of(config)
  for each in trials:
    assert re.search(rf"^ +{each.index}  {each.id} +{re.escape(each.label)}$", printed, re.M)
  assert "nf4, blocks of 16, double quantization, 32 tokens: 2 trials share the base" in printed
  assert "16 bits, 32 tokens: 1 trial has the base" in printed
  main(config, workdir)
  capsys.readouterr()
  main(config, workdir, "--list")
  printed = capsys.readouterr().out
  assert "3 finished, 1 failed" in printed
  assert f"{trials[1].id}  failed  " in printed and f"{trials[3].id}  finished" in printed


@pytest.mark.parametrize("flag", ["--list", "--index=0", "--ray", "--group_size=2"])
def test_flags_of_a_sweep_want_one(tmp_path, capsys, flag):
  plain = write(tmp_path, CONFIG.split("def sweep")[0])
  with pytest.raises(SystemExit):
    run.main(["--config", str(plain), flag])
  assert "has no sweep(), so it is one trial" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--index=4"], "--index: 4; the sweep's trials are 0 to 3"),
    (["--index=-1"], "--index: -1; the sweep's trials are 0 to 3"),
    (["--index=x"], "flag --index=x; a whole number is needed"),
    (["--group_size=0"], "--group_size: 0; a number of trials, 1 or more, or auto"),
    (["--group_size=few"], "--group_size: few; a number of trials, 1 or more, or auto"),
    (["--index=1", "--ray"], "--index: with --ray, which runs all trials; give one of the two"),
    (["--index=0", "--list"], "--index: with --list, which names all trials; give one of the two"),
    (["--dry_run", "--ray"], "--dry_run: with --ray, which runs all trials; give one of the two"),
    (["--config.seed=5"], "trial 0 (quantization.block_size=16, seed=0): seed: set by the sweep"),
  ],
)
def test_flags_that_do_not_fit(config, capsys, flags, message):
  with pytest.raises(SystemExit) as caught:
    run.main(["--config", str(config), *flags])
  assert caught.value.code == 2
  errors = capsys.readouterr().err
  assert errors.startswith(f"error: {message}")
  assert errors.count("\n") == 1


def test_a_sweep_that_does_not_run_names_the_line(tmp_path, capsys):
  broken = write(tmp_path, CONFIG + "  yield {'seed': 1 // 0}\n")
  line = len(broken.read_text().splitlines())
  with pytest.raises(SystemExit):
    run.main(["--config", str(broken)])
  assert f"tiny.py:{line}: ZeroDivisionError" in capsys.readouterr().err


def test_a_directory_of_something_else_is_left_alone(config, tmp_path, stub, capsys):
  (tmp_path / "thesis.tex").write_text("years of work")
  assert main(config, tmp_path) == 2
  assert "holds files but no sweep.json, so it is no sweep" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
  assert stub == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_sweep_and_says_how_to_go_on(
  config, tmp_path, monkeypatch, capsys, number
):
  def stopped(config, workdir, shared, measure, until):
    raise Interrupted(number, 4, saved=True)

  monkeypatch.setattr(trial, "run", stopped)
  workdir = tmp_path / "s"
  assert main(config, workdir) == 128 + number
  errors = capsys.readouterr().err
  assert f"stopped by {number.name} at step 4, and saved. To go on: " in errors
  assert f"-m experiments.run --config {config} --workdir {workdir}" in errors
  assert len(list((workdir / "trials").iterdir())) == 1
  assert not list(workdir.rglob("error.json"))


HOLDER = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


def test_a_trial_of_another_process_is_left_to_it_until_it_dies(config, tmp_path, stub, capsys):
  workdir = tmp_path / "s"
  trials = trials_of(config)
  lock = sweep.prepare("tiny", trials, workdir).lock(trials[0].id).lock_file
  holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE)
  try:
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert main(config, workdir) == 1
    assert trials[0].id not in stub and len(stub) == 3
    assert "2 finished, 1 failed, 1 with other processes" in capsys.readouterr().out
    assert main(config, workdir, "--index=0") == 1
    assert trials[0].id not in stub
    capsys.readouterr()
    assert main(config, workdir, "--list") == 0
    printed = capsys.readouterr().out
    assert "2 finished, 1 failed, 1 running" in printed and f"{trials[0].id}  running" in printed
  finally:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
  assert main(config, workdir, "--index=0") == 0
  assert stub[-1] == trials[0].id


# Two of these on one directory; `trial.run` takes a moment and notes what it ran.
WORKER = """
import json, sys, time
from experiments import run, trial

def train(config, workdir, shared, measure, until):
  with open(sys.argv[1], "a") as file:
    file.write(config.name + "\\n")
  time.sleep(0.05)
  if config.seed % 5 == 0:
    raise ValueError("every fifth")
  summary = {"qlora": None, "lora_16bit": {"loss_before": 2.0, "loss_after": 1.0}}
  (workdir / "summary.json").write_text(json.dumps(summary))

trial.run = train
sys.exit(run.main(sys.argv[2:]))
"""


def test_two_processes_share_a_sweep(tmp_path):
  many = write(tmp_path, CONFIG.split("def sweep")[0] + "def sweep():\n  yield from grid({'seed': "
               "range(30)})\n")  # fmt: skip
  ran, workdir = tmp_path / "ran", tmp_path / "s"
  arguments = [str(ran), "--config", str(many), "--workdir", str(workdir)]
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", WORKER, *arguments],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  printed = [worker.communicate(timeout=120)[0] for worker in workers]
  assert [worker.returncode for worker in workers] == [1, 1]
  ids = ran.read_text().split()
  failing = {each.id for each in trials_of(many) if each.config.seed % 5 == 0}
  assert len(set(ids)) == 30 and len(failing) == 6
  # One that failed before the later process began may be tried by it too.
  succeeding = [id for id in ids if id not in failing]
  assert len(succeeding) == len(set(succeeding)) == 24
  # Both had a part in it, and whoever ended last has seen it all.
  assert all("→ held-out loss" in each for each in printed)
  assert any("24 finished, 6 failed, 0 with other" in each for each in printed), printed


KILLER = """
import os, signal, sys
from qlora_jax import data
original, count = data.Batches.batch, 0

def counted(self, step):
  global count
  count += 1
  if count == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
  return original(self, step)

data.Batches.batch = counted
from experiments import run
sys.exit(run.main(sys.argv[2:]))
"""


def in_a_process(config: Path, workdir: Path, cache: Path, *head: str):
  return subprocess.run(
    [sys.executable, *head, "--config", str(config), "--workdir", str(workdir)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "QLORA_JAX_CACHE": str(cache)},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


def summary(workdir: Path, id: str) -> dict:
  found = json.loads((workdir / "trials" / id / "summary.json").read_text())
  stage = found["qlora"] or found["lora_16bit"]
  del stage["seconds_this_process"]
  return found


@pytest.mark.slow
def test_killed_in_its_second_trial_it_ends_with_the_same_numbers(config, tmp_path):
  trials = trials_of(config)
  reference, workdir, cache = tmp_path / "reference", tmp_path / "s", tmp_path / "cache"
  result = in_a_process(config, reference, cache, "-m", "experiments.run")
  assert result.returncode == 1, result.stderr
  assert "3 finished, 1 failed" in result.stdout

  # The base is there: 6 batches of the first trial, and 5 of the second, which has saved step 2
  # (the checkpoint of step 4 waited for it) and perhaps step 4.
  result = in_a_process(config, workdir, cache, "-c", KILLER, "11")
  assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr
  first = workdir / "trials" / trials[0].id / "summary.json"
  finished_at = first.stat().st_mtime_ns
  assert not (workdir / "trials" / trials[2].id / "summary.json").exists()
  result = in_a_process(config, workdir, cache, "-m", "experiments.run")
  assert result.returncode == 1, result.stderr
  assert first.stat().st_mtime_ns == finished_at
  log = (workdir / "trials" / trials[2].id / "log.txt").read_text()
  assert re.search(r"resumes at step [24] of 6", log)
  for i in (0, 2, 3):
    assert summary(workdir, trials[i].id) == summary(reference, trials[i].id)

  # What a report reads.
  for i, kind in ((0, "qlora"), (2, "qlora"), (3, "lora_16bit")):
    found = summary(reference, trials[i].id)
    assert (found["qlora"] is None) == (kind == "lora_16bit")
    stage = found[kind]
    sequences = stage["measured"]["sequences"]
    mean = sum(sequences["loss"]) / sum(sequences["targets"])
    assert mean == pytest.approx(stage["loss_after"], rel=1e-6)
    base = json.loads((reference / "bases" / f"{stage['measured']['base']}.json").read_text())
    before = base["sequences"]
    assert sum(before["loss"]) / sum(before["targets"]) == pytest.approx(
      stage["loss_before"], rel=1e-6
    )
    assert before["targets"] == sequences["targets"]
    assert all(kl >= -1e-5 for kl in sequences["kl"]) and sum(sequences["kl"]) > 0
    if kind == "lora_16bit":
      assert before["kl"] == pytest.approx([0] * len(before["kl"]), abs=1e-5)
      assert base["layers"] is None and stage["bits"] == 16
    else:
      assert sum(before["kl"]) > 1e-4
      assert len(base["layers"]) == 2 * 7
  assert len(list((reference / "bases").iterdir())) == 2  # of four trials


@pytest.mark.slow
def test_a_signal_saves_the_trial_that_runs(config, tmp_path):
  workdir, cache = tmp_path / "s", tmp_path / "cache"
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.run", "--config", config, "--workdir", workdir,
     "--config.train.steps=100000"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "QLORA_JAX_CACHE": str(cache)},
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  deadline = time.monotonic() + 120
  while not list(workdir.glob("trials/*/checkpoints/2")) and time.monotonic() < deadline:
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 128 + signal.SIGTERM, errors
  assert re.search(r"stopped by SIGTERM at step \d+, and saved. To go on: ", errors)
  assert len(list((workdir / "trials").iterdir())) == 1
  assert not list(workdir.rglob("error.json"))


# Loaded by every Python: a Ray worker dies, once, where it would save step 6.
DEATH = """
import os, pathlib, signal, sys, threading, time

def arm():
  while not hasattr(sys.modules.get("experiments.sweep"), "_ray_group"):
    time.sleep(0.01)
  from qlora_jax.checkpoints import Checkpoints
  save = Checkpoints.save

  def dying(self, step, state):
    if step == int(os.environ["DEATH_STEP"]):
      try:
        pathlib.Path(os.environ["DEATH"]).touch(exist_ok=False)
      except FileExistsError:
        pass
      else:
        os.kill(os.getpid(), int(os.environ["DEATH_SIGNAL"]))
    save(self, step, state)

  Checkpoints.save = dying

if "default_worker.py" in " ".join(sys.orig_argv):
  threading.Thread(target=arm, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("number", "step", "evaluations"),
  # The trial that was killed had evaluated step 6, and did so again.
  [(signal.SIGKILL, 6, 3), (signal.SIGTERM, 4, 2)],
)
def test_ray_sends_a_trial_again_whose_worker_died_or_was_stopped(
  tmp_path, monkeypatch, number, step, evaluations
):
  pytest.importorskip("ray")
  (tmp_path / "sitecustomize.py").write_text(DEATH)
  monkeypatch.setenv("DEATH", str(tmp_path / "died"))
  monkeypatch.setenv("DEATH_SIGNAL", str(int(number)))
  monkeypatch.setenv("DEATH_STEP", str(step))
  paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
  three = write(tmp_path, CONFIG.replace('  yield {"model.quantize": False}\n', ""))
  result = in_a_process(three, tmp_path / "s", tmp_path / "cache", "-m", "experiments.run", "--ray")
  assert result.returncode == 1, result.stderr
  assert (tmp_path / "died").exists()
  logs = [path.read_text() for path in (tmp_path / "s").glob("trials/*/log.txt")]
  assert sum(log.count("held-out loss") for log in logs) == evaluations
  assert sum(log.count("resumes at step") for log in logs) == 1
  assert "2 finished, 1 failed, 0 with other processes" in result.stdout
  assert "FileNotFoundError: /nowhere/text.txt" in result.stdout
  assert result.stdout.count("→ held-out loss") == 2


@pytest.mark.parametrize(
  ("name", "trials", "bases"),
  [
    ("ablate", 9 + 7 * 4 * 9, 1 + 7 * 4),
    ("ablate_full", 9 + 10 * 4 * 9, 1 + 10 * 4),
    ("ablate_rank", 36, 1),
    ("ablate_double_quantization", 54, 18),
    ("ablate_formats", 36, 12),
    ("ablate_init", 60, 4),
    ("two_bits", 15, 3),
    ("no_recovery", 6, 2),
    ("ablate_targets", 30, 2),
  ],
)
def test_the_configs_that_ship(name, trials, bases, capsys):
  assert run.main(["--config", str(ROOT / "configs" / f"{name}.py"), "--list"]) == 0
  told = "1 base" if bases == 1 else f"{bases} bases"
  assert f"{trials} trials on {told}; " in capsys.readouterr().out


def test_the_full_ablation_holds_the_short_one():
  short, full = (
    {each.id for each in trials_of(ROOT / "configs" / f"{name}.py")}
    for name in ("ablate", "ablate_full")
  )
  assert short < full


@pytest.mark.parametrize("name", ["ablate", "ablate_full", "ablate_rank"])
def test_ranks_are_compared_at_one_scaling(name):
  configs = [each.config.lora for each in trials_of(ROOT / "configs" / f"{name}.py")]
  assert len({each.rank for each in configs}) > 2
  assert all(each.alpha == 2 * each.rank for each in configs)


def test_without_ray_it_says_what_to_install(config, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "ray", None)
  assert main(config, tmp_path / "s", "--ray") == 2
  assert "pip install 'qlora_jax[ray]'" in capsys.readouterr().err

"""The command itself, in processes of its own: what it writes, and what a kill leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from experiments import base, command_line, run, trial
from qlora_jax import hf, metrics
from qlora_jax.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
from qlora_jax.config import defaults

def get_config():
  config = defaults()
  config.name = "tiny"
  config.model.dtype = "float32"
  config.model.remat = "none"
  config.pretrain.steps = 3
  config.pretrain.batch_size = 2
  config.pretrain.num_documents = 20
  config.pretrain.hidden_size = 32
  config.pretrain.intermediate_size = 48
  config.pretrain.num_layers = 2
  config.pretrain.max_position_embeddings = 64
  config.lora.rank = 2
  config.lora.dropout = 0.1
  config.data.synthetic = "manuals"
  config.data.num_documents = 20
  config.data.tokenizer = "bytes"
  config.data.packing = True
  config.data.seq_len = 64
  config.optimizer.learning_rate = 1e-2
  config.train.steps = 9
  config.train.batch_size = 2
  config.train.log_every = 1
  config.train.eval_every = 4
  config.train.checkpoint_every = 3
  return config
"""

# Runs the command, but dies by SIGKILL at the given call of the given function.
KILLER = """
import importlib, os, signal, sys
module, name, call = sys.argv[1].rsplit(".", 1)[0], sys.argv[1].rsplit(".", 1)[1], int(sys.argv[2])
if ":" in module:
  module, owner = module.split(":")
  owner = getattr(importlib.import_module(module), owner)
else:
  owner = importlib.import_module(module)
original, count, marker = getattr(owner, name), 0, sys.argv[3]

def counted(*args, **kwargs):
  global count
  if marker in " ".join(map(str, args)):
    count += 1
    if count == call:
      os.kill(os.getpid(), signal.SIGKILL)
  return original(*args, **kwargs)

setattr(owner, name, counted)
from experiments import run, trial
sys.exit(run.main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(CONFIG)
  return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "QLORA_JAX_CACHE": str(tmp_path_factory.mktemp("cache")),
    "PYTHONPATH": str(ROOT),
  }


def command(*arguments: object, environment, killer: tuple[str, int, str] | None = None):
  head = ["-m", "experiments.run"] if killer is None else ["-c", KILLER, *map(str, killer)]
  return subprocess.run(
    [sys.executable, *head, *map(str, arguments)],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.fixture(scope="module")
def finished(config, environment, tmp_path_factory):
  """A run that nothing disturbed, and what it printed."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  result = command("--config", config, "--workdir", workdir, environment=environment)
  assert result.returncode == 0, result.stderr
  return workdir, result.stdout


def losses(workdir: Path) -> list[dict]:
  """The lines of the record without what depends on the clock."""
  clock = ("time", "tokens_per_second", "waiting_for_data", "compile_seconds")
  return [
    {name: value for name, value in line.items() if name not in clock}
    for line in metrics.read(workdir)
  ]


def assert_same_run(workdir: Path, reference: Path):
  for directory in (".", "lora_16bit"):
    assert losses(workdir / directory) == losses(reference / directory)
    ours, theirs = (
      safetensors.numpy.load_file(each / directory / "adapter" / "adapter_model.safetensors")
      for each in (workdir, reference)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
      np.testing.assert_array_equal(value, theirs[name], err_msg=name)
  summary, expected = (
    json.loads((each / "summary.json").read_text()) for each in (workdir, reference)
  )
  for stage in ("qlora", "lora_16bit"):
    for each in (summary, expected):
      del each[stage]["seconds_this_process"]
    assert summary[stage] == expected[stage]


@pytest.mark.slow
def test_a_run_ends_with_the_table_and_its_files(finished, environment):
  workdir, printed = finished
  summary = json.loads((workdir / "summary.json").read_text())
  qlora, full = summary["qlora"], summary["lora_16bit"]
  for name, loss in (
    ("16-bit base", full["loss_before"]),
    ("4-bit base", qlora["loss_before"]),
    ("after QLoRA, rank 2", qlora["loss_after"]),
    ("after 16-bit LoRA", full["loss_after"]),
  ):
    assert re.search(rf"^{name}.* {loss:.4f} ", printed, re.MULTILINE), printed
  assert qlora["loss_after"] < qlora["loss_before"]
  assert full["bits"] == 16
  assert 4 < qlora["bits"] < 6
  assert qlora["base_bytes"] < full["base_bytes"]
  # AdamW: two moments of each adapter, and two counts.
  assert qlora["optimizer_bytes"] == 2 * qlora["adapter_bytes"] + 8
  assert summary["environment"]["device"]["platform"] == "cpu"
  # None of those of a GPU; rows are short.
  used = {"attention": "plain", "remat": "none"}
  assert qlora["implementations"] == {"matmul": "xla", **used}
  assert full["implementations"] == {"matmul": None, **used}
  for name in ("config.json", "metrics.jsonl", "checkpoints", "adapter", "tensorboard"):
    assert (workdir / name).exists()
  assert [line["step"] for line in metrics.read(workdir) if "loss" in line] == list(range(1, 10))
  # The commands that it proposes are whole, and it says where things are.
  assert printed.count(" -m experiments.run --config") == 2
  assert str(workdir) in printed

  _, frozen = hf.load(summary["base"])
  params, _, cfg = hf.load_adapter(workdir / "adapter", frozen)
  assert cfg.rank == 2
  assert params["layers"]["attn"]["q"]["lora_a"].shape == (2, 32, 2)


@pytest.mark.slow
def test_killed_at_three_places_it_ends_with_the_same_numbers(
  config, environment, finished, tmp_path
):
  reference, _ = finished
  workdir = tmp_path / "run"
  arguments = ("--config", config, "--workdir", workdir)
  for place in (
    # The fifth step of QLoRA, with a checkpoint behind it.
    ("qlora_jax.data:Batches.batch", 5, ""),
    # In the middle of writing a checkpoint: its temporary directory is there, its name is not yet.
    ("os.rename", 1, "orbax-checkpoint-tmp"),
    # In the stage of 16-bit LoRA, with QLoRA done.
    ("qlora_jax.data:Batches.batch", 12, ""),
  ):
    result = command(*arguments, environment=environment, killer=place)
    assert result.returncode == -signal.SIGKILL, (place, result.stdout, result.stderr)
    assert not (workdir / "summary.json").exists()
  result = command(*arguments, environment=environment)
  assert result.returncode == 0, result.stderr
  assert "resumes at step" in result.stdout
  assert_same_run(workdir, reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(config, environment, finished, tmp_path, number):
  """And it does go on, after one of them; after any, in tests/test_train.py."""
  reference, _ = finished
  workdir = tmp_path / "run"
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.run", "--config", config, "--workdir", workdir],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr is not None
  for line in process.stderr:
    if "QLoRA: step 2/" in line:
      process.send_signal(number)
      break
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 128 + number, errors
  assert f"--workdir {workdir}" in errors
  assert f"stopped by {number.name} at step" in errors
  if number == signal.SIGINT:
    assert trial.saved_step(workdir) >= 2
    return
  result = command("--config", config, "--workdir", workdir, environment=environment)
  assert result.returncode == 0, result.stderr
  assert_same_run(workdir, reference)


@pytest.mark.slow
def test_a_finished_run_shows_its_table_again(config, finished, capsys):
  workdir, printed = finished
  started = time.time()
  assert run.main(["--config", str(config), "--workdir", str(workdir)]) == 0
  # But for the commands that it proposes: those are of the program that runs.
  table = printed[printed.index("16-bit base") :].partition("\n\n")[0]
  assert table in capsys.readouterr().out
  assert (workdir / "summary.json").stat().st_mtime < started


@pytest.mark.slow
def test_another_config_is_refused_naming_the_fields(config, finished, capsys):
  workdir, _ = finished
  before = (workdir / "config.json").read_bytes()
  flags = ["--config", str(config), "--workdir", str(workdir), "--config.lora.rank=4"]
  assert run.main(flags) == 2
  errors = capsys.readouterr().err
  assert "lora.rank: 2 before, 4 now" in errors
  assert errors.count("\n") == 1
  assert (workdir / "config.json").read_bytes() == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(
  config, environment, finished, tmp_path, capsys, monkeypatch
):
  del finished  # the base is trained by now
  monkeypatch.setenv("QLORA_JAX_CACHE", environment["QLORA_JAX_CACHE"])
  workdir = tmp_path / "run"
  flags = ["--config.optimizer.learning_rate=1e25", "--config.optimizer.schedule=constant"]
  assert run.main(["--config", str(config), "--workdir", str(workdir), *flags]) == 1
  errors = capsys.readouterr().err
  assert re.search(r"step \d: (loss|grad_norm) is (nan|inf)", errors)
  assert "Traceback" not in errors
  assert not (workdir / "summary.json").exists()


def test_dry_run_prints_and_makes_nothing(config, capsys, tmp_path, monkeypatch):
  monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
  workdir = tmp_path / "run"
  assert (
    run.main(
      [
        "--config",
        str(config),
        "--workdir",
        str(workdir),
        "--dry_run",
        "--config.model.unroll=True",
        "--config.model.attention=cudnn",
      ]
    )
    == 0
  )
  printed = capsys.readouterr().out
  assert '"rank": 2' in printed
  assert re.search(
    r"layers/attn/q/kernel +2×32×32 +4-bit codes, block 64, [\d.]+ bits a weight +LoRA rank 2",
    printed,
  )
  assert re.search(r"embed/embedding +256×32 +bfloat16$", printed, re.MULTILINE)
  for part in ("base", "adapters", "optimizer", "activations"):
    assert re.search(rf"^  {part} +[\d.]+ [kMG]B$", printed, re.MULTILINE)
  assert "(model.unroll: counted as a loop over the layers)" in printed
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (["--config.lora.rnak=8"], "lora.rnak: no such field; did you mean rank?"),
    (["--config.lora.rank=0"], "lora.rank: 0; a rank is at least 1"),
    (["--config.lora.rank=many"], "lora.rank: 'many'"),
    (["--config.quantization.codebook=nf5"], "did you mean nf"),
  ],
)
def test_wrong_keys_and_values_are_one_line(config, capsys, overrides, message):
  with pytest.raises(SystemExit) as exit_:
    run.main(["--config", str(config), *overrides])
  assert exit_.value.code == 2
  errors = capsys.readouterr().err
  assert message in errors
  assert errors.count("\n") == 1


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_model_that_is_not_there_says_what_was_looked_for(config, capsys, tmp_path, what):
  path = tmp_path / "model"
  if what == "empty":
    path.mkdir()
  arguments = [
    "--config", str(config), "--workdir", str(tmp_path / "run"), "--config.pretrain.steps=0",
    f"--config.model.path={path}",
  ]  # fmt: skip
  assert run.main(arguments) == 2
  errors = capsys.readouterr().err
  assert str(path) in errors
  assert errors.count("\n") == 1
  if what == "empty":
    assert "config.json" in errors


def test_a_mistyped_path_does_not_claim_the_directory(config, capsys, tmp_path):
  workdir = tmp_path / "run"
  for name in ("wrong", "other"):
    arguments = [
      "--config", str(config), "--workdir", str(workdir), "--config.pretrain.steps=0",
      f"--config.model.path={tmp_path / name}",
    ]  # fmt: skip
    assert run.main(arguments) == 2
    # Of the second one too: nothing was trained that the first config would have to protect.
    assert f"{tmp_path / name}: no such directory" in capsys.readouterr().err
  stored = json.loads((workdir / "config.json").read_text())
  assert stored["model"]["path"] == str(tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_the_loop_says_how_to_go_on(
  config, capsys, tmp_path, monkeypatch, number
):
  monkeypatch.setattr(trial, "run", lambda config, workdir: os.kill(os.getpid(), number))
  before = signal.getsignal(number)
  workdir = tmp_path / "run"
  assert run.main(["--config", str(config), "--workdir", str(workdir)]) == 128 + number
  errors = capsys.readouterr().err
  assert f"stopped by {number.name}; what was saved stays. To go on: " in errors
  assert f"-m experiments.run --config {config} --workdir {workdir}" in errors
  assert signal.getsignal(number) is before


def test_a_base_that_another_process_made_meanwhile_is_used(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path))
  saved = []

  def made_meanwhile(path, *args, **kwargs):
    path.mkdir()
    saved.append(path)
    raise FileExistsError(path)

  monkeypatch.setattr(base, "fit", lambda state, **kwargs: state)
  monkeypatch.setattr(base.hf, "save", made_meanwhile)
  cfg = PretrainConfig(steps=1, num_documents=2, hidden_size=8, num_heads=2, num_kv_heads=1)
  assert [base.trained_base(cfg)] == saved
  assert "made by another process" in capsys.readouterr().out
  # And once it is there it is not trained again.
  monkeypatch.setattr(base, "fit", None)
  assert [base.trained_base(cfg)] == saved


def test_a_directory_that_cannot_be_written_is_reported_first(config, capsys, tmp_path):
  (tmp_path / "file").write_text("")
  assert run.main(["--config", str(config), "--workdir", str(tmp_path / "file" / "run")]) == 2
  assert "cannot be written" in capsys.readouterr().err


def test_a_directory_of_something_else_is_left_alone(config, capsys, tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  assert run.main(["--config", str(config), "--workdir", str(tmp_path)]) == 2
  assert "no config.json" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_while_the_config_was_written_leaves_nothing_behind(config, tmp_path):
  (tmp_path / "config.json.tmp").write_text('{"na')
  trial.prepare_directory(tmp_path, command_line.parse(["--config", str(config)]).config)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_is_reported_before_training(tmp_path, monkeypatch):
  monkeypatch.setattr(trial.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
  with pytest.raises(trial.RunDirectoryError, match=r"0 MB free .* checkpoints need 2 MB"):
    trial.check_disk(tmp_path, 2_000_000)

"""A trial whose adapters start as a part of the base: resumed, exported, and refused."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import trial
from qlora_jax import config as config_lib
from qlora_jax import hf, lora, sweeps, train, tree_paths
from tests.experiments import tiny_run

# Models trained and decomposed: many programs to compile.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return tiny_run.save_base(tmp_path_factory.mktemp("base") / "model")


def config(base, **overrides):
  values = {
    "lora.rank": 4,
    "lora.init": "loftq",
    "train.steps": 6,
    "train.eval_every": 3,
    "train.checkpoint_every": 2,
  }
  return tiny_run.config(base, **values | overrides)


def run(cfg, workdir):
  return trial.run(cfg, workdir)


def test_a_stopped_run_goes_on_to_the_same_numbers(base, tmp_path, monkeypatch):
  cfg = config(base)
  whole = run(cfg, tmp_path / "whole")["qlora"]

  fit_loop, steps = trial.fit_loop, []

  def stops(start, *, cfg, **rest):
    steps.append(start)
    if len(steps) == 1:
      yield from fit_loop(start, cfg=dataclasses.replace(cfg, steps=4), **rest)
      raise train.Interrupted(15, 4, saved=True)
    yield from fit_loop(start, cfg=cfg, **rest)

  monkeypatch.setattr(trial, "fit_loop", stops)
  with pytest.raises(train.Interrupted):
    run(cfg, tmp_path / "stopped")
  # What was made is kept: it is not decomposed again.
  monkeypatch.setattr(hf, "initialize", None)
  stopped = run(cfg, tmp_path / "stopped")["qlora"]
  assert steps == [0, 4]
  for name in ("loss_before", "loss_after", "base_bytes", "trained_parameters"):
    assert stopped[name] == whole[name], name

  # The adapter is for the original base, and the export of the checkpoint is the same.
  _, frozen = hf.load(base)
  params, _, read = hf.load_adapter(tmp_path / "stopped" / "adapter", frozen)
  assert (read.rank, read.alpha, read.init) == (8, 32.0, "lora")
  assert trial.export_adapter(tmp_path / "whole", tmp_path / "exported") == 6
  again, _, _ = hf.load_adapter(tmp_path / "exported", frozen)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  # And says that what was measured is another model.
  said = "the original 32-bit base; the quantized base's error is not in it"
  assert said in (tmp_path / "stopped" / "adapter" / "README.md").read_text()
  assert said in trial.closing_table(cfg, trial.run(cfg, tmp_path / "stopped"), tmp_path)
  # What was trained, beside what it started as.
  q = params["layers"]["attn"]["q"]
  assert np.abs(q["lora_a"][..., :4] - q["lora_a"][..., 4:]).max() > 0


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_without_quantizing_it_starts_as_the_base(base, tmp_path, init):
  cfg = config(base, **{"lora.init": init, "model.quantize": False, "train.steps": 2})
  changed = run(cfg, tmp_path / init)["lora_16bit"]
  plain = run(
    dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, init="lora")), tmp_path / "plain"
  )["lora_16bit"]
  np.testing.assert_allclose(changed["loss_before"], plain["loss_before"], rtol=1e-5)
  assert changed["loss_after"] != plain["loss_after"]
  assert "- fits" not in (tmp_path / init / "adapter" / "README.md").read_text()


def test_cloq_starts_nearer_and_keeps_what_it_made(base, tmp_path, monkeypatch):
  """By the outputs of its own calibration; of the codes of the plain base, which are rounded."""
  cfg = config(base, **{"lora.init": "cloq", "train.steps": 2, "lora.calibration_batches": 2})
  run(cfg, tmp_path / "run")
  _, frozen = hf.load(tmp_path / "run" / "initialized" / "base")
  model, plain = hf.load(base, cfg.quantization)
  jax.tree.map(np.testing.assert_array_equal, frozen, plain)
  rows = trial.load_rows(cfg, base, 256)
  moments = trial.calibration.second_moments(
    model, plain, cfg.lora, trial._calibration_batches(cfg, rows)
  )
  with np.load(tmp_path / "run" / "initialized" / "params.npz") as file:
    params = tree_paths.nest({path: jax.numpy.asarray(file[path]) for path in file})
  started = lora.merge(plain, params, lora.constants(plain, cfg.lora))
  without = lora.merge(plain, {}, {})
  dense = tree_paths.leaves(hf.load(base)[1])

  def error(tree, path):
    e = np.asarray(tree_paths.leaves(tree)[path] - dense[path], np.float64)
    return np.einsum("lkn,lkj,ljn->", e, np.asarray(moments[path], np.float64), e)

  # Rank 4 of 32 and 48.
  for path in moments:
    assert error(started, path) < 0.75 * error(without, path), path
  monkeypatch.setattr(trial.calibration, "second_moments", None)
  assert trial.export_adapter(tmp_path / "run", tmp_path / "exported") == 2


def test_eva_shares_the_ranks_out_and_resumes(base, tmp_path, monkeypatch):
  cfg = config(base, **{"lora.init": "eva", "train.steps": 2, "lora.calibration_batches": 2})
  whole = run(cfg, tmp_path / "run")["qlora"]
  _, frozen = hf.load(base, cfg.quantization)
  params, constants = lora.init(
    jax.random.key(0), frozen, dataclasses.replace(cfg.lora, init="lora")
  )
  assert whole["trained_parameters"] != lora.count(params, constants)
  _, fixed, _ = hf.load_adapter(tmp_path / "run" / "adapter", frozen)
  ranks = {
    path: np.asarray(x) for path, x in tree_paths.leaves(fixed).items() if path.endswith("/rank")
  }
  # Seven projections of two layers, rank 4 each.
  assert sum(int(x.sum()) for x in ranks.values()) == 14 * 4
  assert len(set(np.concatenate(list(ranks.values())))) > 1
  monkeypatch.setattr(trial.calibration, "second_moments", None)
  assert trial.export_adapter(tmp_path / "run", tmp_path / "exported") == 2


def test_another_config_does_not_find_the_old_start(base, tmp_path, monkeypatch):
  """A run that failed before its first step has nothing to protect; nor has it what to reuse."""

  def fails(*_, **__):
    raise OSError("no disk")

  monkeypatch.setattr(trial, "Checkpoints", fails)
  for rank in (4, 2):
    with pytest.raises(OSError, match="no disk"):
      run(config(base, **{"lora.rank": rank}), tmp_path / "run")
    with np.load(tmp_path / "run" / "initialized" / "params.npz") as file:
      assert file["layers/attn/q/lora_a"].shape[-1] == rank


def test_a_disk_too_small_for_the_changed_base_says_so(base, tmp_path, monkeypatch):
  free = SimpleNamespace(free=1000)
  monkeypatch.setattr(trial.shutil, "disk_usage", lambda path: free)
  message = (
    r"the base that lora.init 'loftq' changes is kept, and needs 0 MB \(take lora.init 'lora'"
  )
  with pytest.raises(trial.RunDirectoryError, match=message):
    run(config(base), tmp_path / "run")


def test_the_16bit_stage_is_measured_as_one_of_16_bits(base, tmp_path, monkeypatch):
  """As the trial of `model.quantize=False` is."""
  cfg = config(base, **{"lora.init": "lora", "train.compare_16bit": True, "train.steps": 1})
  configs = []

  def stage(config, *_, quantization, **__):
    configs.append((config, quantization))
    yield from ()
    return trial.Stage(1, 1, 1, 1, 1, 1, 1, 1, {}, [], None)

  monkeypatch.setattr(trial, "run_stage", stage)
  trial.run(cfg, tmp_path / "run")
  ids = [sweeps.base_identity(each) for each, _ in configs]
  assert ids[0] == sweeps.base_identity(cfg)
  assert ids[1] == sweeps.base_identity(
    config(base, **{"model.quantize": False, "lora.init": "lora"})
  )
  assert all(each.base_quantization == quantization for each, quantization in configs)


def test_what_makes_no_sense_is_refused(base, tmp_path):
  with pytest.raises(config_lib.ConfigError, match=r"lora\.init: 'loftq'; model.quantize is False"):
    config(base, **{"model.quantize": False})
  model, frozen = hf.load(base, config(base).quantization)
  hf.save_base(tmp_path / "packed", model, frozen)
  with pytest.raises(ValueError, match=r"packed, and lora\.init 'loftq' starts from the dense"):
    run(config(tmp_path / "packed"), tmp_path / "run")
  with pytest.raises(ValueError, match=r"lora\.init: 'loftq' changes the base; lora_init"):
    lora.init(jax.random.key(0), frozen, config(base).lora)

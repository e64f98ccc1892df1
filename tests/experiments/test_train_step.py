"""The benchmark of a whole train step, at toy size, and what a run does with remat "auto"."""

import json
import types
from typing import Any

import jax
import numpy as np
import pytest

from experiments import trial, trial_group
from experiments.bench import train_step
from qlora_jax import config as config_lib
from qlora_jax import data
from qlora_jax.models.transformer import Transformer


def test_a_row_is_read():
  row = train_step.Row.parse("llama-8b:4x2048:full:16bit")
  assert row == train_step.Row("llama-8b", 4, 2048, "full", quantized=False)
  assert train_step.Row.parse("tiny:1x2:none").quantized
  for text in train_step.ROWS:
    train_step.Row.parse(text)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("llama-8b", "no row; MODEL:BxT:REMAT"),
    ("llama-8b:4x2048:full:8bit", "no row"),
    ("llama-9b:4x2048:full", "no such model; one of llama-8b"),
    ("tiny:0x64:full", "B is at least 1"),
    ("tiny:1x64:half", "REMAT one of offload, offload_pairs, full"),
  ],
)
def test_what_is_no_row(text, message):
  with pytest.raises(ValueError, match=message):
    train_step.Row.parse(text)


def test_operations_of_a_step():
  config = train_step.architecture("tiny")
  none, elementwise, mlp, full = (
    train_step.flops(config, train_step.Row("tiny", 3, 32, remat))
    for remat in ("none", "elementwise", "mlp", "full")
  )
  tokens, d, i = 96, 64, 128
  heads, groups = 4 * 16, 2 * 16
  projections = d * (heads + 2 * groups) + heads * d + 3 * d * i
  pairs = 3 * 32 * 33 // 2
  attention = 4 * pairs * heads
  assert none == 2 * (4 * tokens * projections + attention * 7 // 2) + 4 * tokens * d * 256
  assert elementwise == none
  assert mlp == none + 2 * 2 * tokens * 2 * d * i
  again = 2 * tokens * (projections - d * i) + attention
  assert full == none + 2 * again


@pytest.mark.slow
def test_a_toy_row(capsys):
  assert train_step.main(["tiny:2x32:offload", "--here"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["losses"][-1] < found["losses"][0]
  assert found["gradient_norm"] > 0
  assert found["tokens_per_second"] > 0
  assert 0 < found["limit"] < 1
  assert found["device"] == jax.devices()[0].device_kind


def test_a_row_that_fails_says_why():
  found = train_step.child(["python3", "-c", "int('x')"], {})
  assert found["error"].startswith("ValueError: invalid literal")


def draft():
  config = config_lib.defaults()
  config.name = "auto"
  config.model.dtype = "float32"
  config.model.remat = "auto"
  config.pretrain.steps = 2
  config.data.synthetic = "manuals"
  config.data.packing = True
  config.data.seq_len = 64
  return config


def test_what_auto_stood_for_is_kept(tmp_path, monkeypatch):
  config = config_lib.from_config_dict(draft())
  model = Transformer(train_step.architecture("tiny"))
  arguments = ({"a": np.zeros(3, np.float32)},)
  found = iter(["mlp", "none"])
  monkeypatch.setattr(trial.memory, "fastest_remat", lambda *_: (next(found), {}))

  def chosen(directory):
    directory.mkdir(exist_ok=True)
    return trial._fastest_remat(config, model, None, arguments, directory, trial.Shared())

  assert chosen(tmp_path / "a") == "mlp"
  # As on another card, where it would be another: the run goes on as it began.
  assert chosen(tmp_path / "a") == "mlp"
  assert chosen(tmp_path / "b") == "none"


@pytest.mark.parametrize(("documents", "name"), [(32, None), (33, "blockwise")])
def test_crowded_rows_go_by_blocks(monkeypatch, capsys, documents, name):
  ids = np.minimum(np.arange(64) + 1, documents)[None].astype(np.int32)
  dataset = data.Dataset(ids, ids, np.zeros_like(ids), np.zeros(ids.shape, bool))
  rows = trial.Rows(dataset, dataset)
  monkeypatch.setattr(trial, "attention_name", lambda *_, **__: "cudnn")
  model = Transformer(train_step.architecture("tiny"))
  config = config_lib.from_config_dict(draft())
  assert trial._by_blocks_if_crowded(config, model, rows, "QLoRA").attention == name
  assert ("33 documents, cuDNN's kernel takes 32" in capsys.readouterr().out) == bool(name)
  named = draft()
  named.model.attention = "cudnn"
  if name:
    with pytest.raises(ValueError, match=r"model.attention: 'cudnn'; a row holds 33 documents"):
      trial._by_blocks_if_crowded(config_lib.from_config_dict(named), model, rows, "QLoRA")


def test_the_configs_model_is_what_computes():
  named = draft()
  named.model.remat, named.model.attention, named.model.mlp_chunk = "mlp", "blockwise", 24
  model = Transformer(train_step.architecture("tiny"))
  found = trial.as_configured(config_lib.from_config_dict(named), model)
  assert (found.remat, found.attention, found.mlp_chunk) == ("mlp", "blockwise", 24)
  found = trial.as_configured(config_lib.from_config_dict(draft()), model)
  assert (found.remat, found.attention, found.mlp_chunk) == ("full", None, None)


def test_auto_trains_by_the_step_that_it_compiled(tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(trial, "make_train_step", lambda model, *_: made.append(model.remat) or model)
  monkeypatch.setattr(trial.memory, "fastest_remat", lambda make, *_: (make("mlp").remat, {}))
  config = config_lib.from_config_dict(draft())
  model, shared = Transformer(train_step.architecture("tiny")), trial.Shared()
  arguments = ({"a": np.zeros(3, np.float32)},)
  policy = trial._fastest_remat(config, model, None, arguments, tmp_path, shared)
  trial._train_step(config, model.clone(remat=policy), None, shared)
  assert made == ["mlp"]


def test_layers_in_a_row_are_a_step_of_its_own(tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(
    trial, "make_train_step", lambda model, *_: made.append(model.unroll) or model
  )
  monkeypatch.setattr(trial.memory, "fastest_remat", lambda make, *_: (make("mlp").remat, {}))
  monkeypatch.setattr(
    trial_group.trial_groups, "make_group_step", lambda model, *_: made.append(model.unroll)
  )
  model, shared = Transformer(train_step.architecture("tiny")), trial.Shared()
  arguments = ({"a": np.zeros(3, np.float32)},)
  for unroll in (False, True):
    named = draft()
    named.model.unroll = unroll
    config = config_lib.from_config_dict(named)
    # Of two trials of one process, each has found for itself what remat "auto" stands for.
    directory = tmp_path / str(unroll)
    directory.mkdir()
    trial._fastest_remat(config, model, None, arguments, directory, shared)
    training: Any = types.SimpleNamespace(config=config, model=model)
    trial_group._step(training, shared)
  assert made == [False, False, True, True]
  row = train_step.Row.parse("tiny:1x16:mlp:unroll")
  assert train_step._model(row).unroll and not train_step.Row.parse("tiny:1x16:mlp").unroll

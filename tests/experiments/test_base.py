"""A base that is trained on files: its tokenizer, its directory, what a kill changes (nothing)."""

import dataclasses
import json
import os
import signal

import filelock
import numpy as np
import pytest

from experiments import base
from qlora_jax import data, hf, metrics, tree_paths
from qlora_jax.config import ConfigError, PretrainConfig
from qlora_jax.evaluate import held_out_loss
from qlora_jax.train import Interrupted

# Many programs to compile: for the whole suite, not its quick part.
pytestmark = pytest.mark.slow

TEXT = "the cat sat on the mat; the dog sat on the log. "


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> PretrainConfig:
  """Four steps of a tiny model on two files."""
  folder = tmp_path_factory.mktemp("texts")
  (folder / "cats.txt").write_text(TEXT * 40)
  lines = (json.dumps({"text": f"{i}. {TEXT * 3}"}) for i in range(30))
  (folder / "dogs.jsonl").write_text("\n".join(lines) + "\n")
  return PretrainConfig(
    steps=4,
    batch_size=4,
    paths=(str(folder / "cats.txt"), str(folder / "dogs.jsonl")),
    holdout=0.2,
    vocab_size=280,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    max_position_embeddings=32,
  )


@pytest.fixture(scope="module")
def trained(cfg, tmp_path_factory):
  """The directory of a training that nothing stopped."""
  workdir = tmp_path_factory.mktemp("base")
  assert base.train_in(cfg, workdir) == workdir / "model"
  return workdir


def weights(workdir) -> dict:
  """Path → float32 array."""
  _, frozen = hf.load(workdir / "model", None, dtype="float32", storage_dtype="float32")
  return {path: np.asarray(leaf) for path, leaf in tree_paths.leaves(frozen).items()}


def test_the_base_is_what_its_loss_curve_says(cfg, trained):
  lines = metrics.read(trained)
  curve = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
  assert list(curve) == [1, 2, 3, 4] and curve[4] < curve[1] < np.log(280) + 0.1
  tokenizer = hf.load_tokenizer(trained / "model")
  assert tokenizer.vocab_size == 280 and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
  # The last of each file, each with the end that the tokenizer names, as running text.
  held_out = [
    text
    for path in cfg.paths
    for text in data.split_text(data.load_documents(path), cfg.holdout)[1]
  ]
  ids = [i for text in held_out for i in [*tokenizer.encode(str(text)), tokenizer.eos_id]]
  model, frozen = hf.load(trained / "model", None, dtype="float32", storage_dtype="float32")
  loss = held_out_loss(
    model, {"params": {}, "constants": {}, "frozen": frozen}, data.windows(ids, 32), batch_size=4
  )
  assert loss == pytest.approx(curve[4], abs=2e-3)  # the files are rounded to bfloat16
  assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2  # merges were learned


def test_a_training_that_was_stopped_ends_with_the_same_weights(
  cfg, trained, tmp_path, monkeypatch
):
  original, count = data.Batches.batch, 0

  def counted(self, step):
    nonlocal count
    count += 1
    if count == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(self, step)

  monkeypatch.setattr(data.Batches, "batch", counted)
  with pytest.raises(Interrupted) as stopped:
    base.train_in(cfg, tmp_path)
  assert stopped.value.saved and not (tmp_path / "model").exists()
  base.train_in(cfg, tmp_path)
  assert count == 4  # no step twice
  ours, theirs = weights(tmp_path), weights(trained)
  assert all((ours[path] == theirs[path]).all() for path in theirs)
  # Once it is there it is not trained again.
  base.train_in(cfg, tmp_path)
  assert count == 4


def test_a_directory_is_of_one_recipe(cfg, trained):
  with pytest.raises(ValueError, match=r"another recipe: pretrain\.steps differ"):
    base.train_in(dataclasses.replace(cfg, steps=9), trained)


def test_one_process_at_a_time_trains_in_a_directory(cfg, trained):
  with filelock.FileLock(trained / "lock"):
    with pytest.raises(ValueError, match="another process is training this base"):
      base.train_in(cfg, trained)


def test_a_text_that_changes_is_another_recipe(cfg, trained, tmp_path, monkeypatch):
  original = base.recipe(cfg)
  changed = {**original, "texts": {**original["texts"], cfg.paths[0]: "another"}}
  monkeypatch.setattr(base, "recipe", lambda cfg: changed)
  with pytest.raises(ValueError, match=r"another recipe: texts\..*cats\.txt differ"):
    base.train_in(cfg, trained)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"vocab_size": 256}, "pretrain.vocab_size: 256; at least 257"),
    ({"minor_domain": "manuals"}, "pretrain.minor_domain: 'manuals'; text is generated or"),
    ({"holdout": 0.0}, "pretrain.holdout: 0.0; a share above 0"),
    ({"dtype": "float16"}, "pretrain.dtype: 'float16'; float32 or bfloat16"),
  ],
)
def test_what_a_base_cannot_be_is_refused(values, message):
  with pytest.raises(ConfigError, match=message):
    PretrainConfig(**{"paths": ("a.txt",), "vocab_size": 512, **values})


def test_a_vocabulary_that_the_text_does_not_give_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"pretrain\.vocab_size: 5000; the text gives \d+ tokens"):
    base.train_tokenizer([TEXT], 5000, tmp_path / "tokenizer")

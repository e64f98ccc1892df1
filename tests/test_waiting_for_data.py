"""What the loop says of a slow input pipeline and of compiling; where compiled programs go."""

from typing import Any

import jax
import numpy as np
import pytest

from qlora_jax import config as config_lib
from qlora_jax import environment, metrics, train
from qlora_jax.config import TrainConfig


class Clock:
  """A second passes when somebody sleeps it: how busy the machine is changes no share."""

  def __init__(self):
    self.now = 0.0

  def monotonic(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds


class Batches:
  def __init__(self, clock, seconds):
    self.clock, self.seconds = clock, seconds

  def batch(self, step):
    self.clock.sleep(self.seconds)
    return {}


class Value:
  """A metric of a step that the device takes until `done`."""

  def __init__(self, clock, value, done):
    self.clock, self.value, self.done = clock, value, done

  def __array__(self, dtype=None, copy=None):
    self.clock.sleep(max(self.done - self.clock.monotonic(), 0))
    return np.asarray(self.value, dtype)


def lines(monkeypatch, directory, batch_seconds, step_seconds, steps=8) -> list[dict[str, Any]]:
  """Of a training whose steps and batches take so long, the device working beside the host."""
  clock = Clock()
  monkeypatch.setattr(train, "time", clock)
  free = 0.0

  def train_step(state, frozen, batch):
    nonlocal free
    if state == 0:
      clock.sleep(0.2)  # compiles
    free = max(free, clock.monotonic()) + step_seconds
    names = ("loss", "grad_norm", "loss_scale", "targets", "skipped")
    return state + 1, {name: Value(clock, 1, free) for name in names}

  cfg = TrainConfig(steps=steps, log_every=4, eval_every=100, checkpoint_every=100)
  with train.SignalGuard() as guard, metrics.MetricsWriter(directory) as writer:
    loop = train.fit_loop(
      0,
      batches=Batches(clock, batch_seconds),
      cfg=cfg,
      learning_rate=lambda _: 1.0,
      guard=guard,
      writer=writer,
    )
    train.drive(0, train_step, None, loop)  # pyright: ignore[reportArgumentType]
  return metrics.read(directory)


def test_a_slow_pipeline_shows(tmp_path, monkeypatch, capsys):
  first, last = lines(monkeypatch, tmp_path, batch_seconds=0.06, step_seconds=0.01)
  # From line to line: three batches, each waited for by a device that was done, and the last step.
  assert last["waiting_for_data"] == pytest.approx(3 * 0.06 / (3 * 0.06 + 0.01))
  assert first["compile_seconds"] == pytest.approx(0.2)
  assert "compile_seconds" not in last
  shown = capsys.readouterr().err
  assert f"waiting for data {last['waiting_for_data']:.0%}" in shown
  assert "compiled in 0.2 s" in shown


def test_a_fast_pipeline_does_not(tmp_path, monkeypatch, capsys):
  _, last = lines(monkeypatch, tmp_path, batch_seconds=0.002, step_seconds=0.05)
  assert last["waiting_for_data"] == 0
  assert "waiting" not in capsys.readouterr().err


@pytest.fixture
def cache():
  before = environment.compiled_programs()
  yield before
  environment.keep_compiled_programs(before, environment.Path("unused"))


def test_where_compiled_programs_are_kept(cache, tmp_path):
  environment.keep_compiled_programs("auto", tmp_path / "default")
  assert environment.compiled_programs() == cache  # it was set: by conftest.py
  environment.keep_compiled_programs(str(tmp_path / "own"), tmp_path / "default")
  jax.jit(lambda x: x + np.float32(tmp_path.stat().st_ino))(np.float32(1))
  assert list((tmp_path / "own").iterdir())
  environment.keep_compiled_programs(None, tmp_path / "default")
  jax.jit(lambda x: x - np.float32(tmp_path.stat().st_ino))(np.float32(1))
  environment.keep_compiled_programs("auto", tmp_path / "default")
  jax.jit(lambda x: x * np.float32(tmp_path.stat().st_ino))(np.float32(1))
  assert list((tmp_path / "default").iterdir())


def test_compiled_programs_are_bounded(cache, tmp_path, monkeypatch):
  own = tmp_path / "own"
  own.mkdir()
  # As they lie there from before there was a bound; the newer one written first.
  for name, day in (("newer", 2), ("older", 1)):
    (own / f"{name}-cache").write_bytes(bytes(70_000))
    environment.os.utime(own / f"{name}-cache", (86400 * day, 86400 * day))
  monkeypatch.setattr(environment, "MOST_COMPILED", 140_100)
  environment.keep_compiled_programs(str(own), tmp_path / "default")
  # A program of a few kB is too much beside both.
  jax.jit(lambda x: jax.numpy.sin(x) + np.float32(tmp_path.stat().st_ino))(np.float32(1))
  left = {path.name for path in own.glob("*-cache")}
  assert "newer-cache" in left and "older-cache" not in left and len(left) == 2
  environment.keep_compiled_programs("gs://bucket/own", tmp_path / "default")
  config: Any = jax.config
  assert config.jax_compilation_cache_max_size == -1
  monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
  environment.keep_compiled_programs(str(own), tmp_path / "default")
  assert config.jax_compilation_cache_max_size == -1  # JAX reads it at its import


def test_a_directory_is_the_users_and_is_made(cache, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  environment.keep_compiled_programs("~/own", tmp_path / "default")
  assert environment.compiled_programs() == str(tmp_path / "own")
  environment.keep_compiled_programs("gs://bucket/own", tmp_path / "default")
  assert environment.compiled_programs() == "gs://bucket/own"
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="file"):
    environment.keep_compiled_programs(str(tmp_path / "file" / "own"), tmp_path / "default")


def test_another_place_is_no_other_run():
  draft = config_lib.defaults()
  draft.name, draft.pretrain.steps, draft.data.synthetic, draft.data.seq_len = "x", 2, "tales", 64
  configs = [
    config_lib.from_config_dict(draft, {"train.compiled_programs": place}) for place in ("a", None)
  ]
  assert not config_lib.differences(*configs)

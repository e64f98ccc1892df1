import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import metrics


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def write_steps(directory, steps, resume_step=None):
  with metrics.MetricsWriter(directory, resume_step) as writer:
    for step in steps:
      writer.write(step, {"loss": float(step)})


def steps_of(directory):
  return [line["step"] for line in metrics.read(directory)]


def lines_of(directory):
  return (directory / metrics.METRICS_FILE).read_text().splitlines()


def test_a_line_holds_step_time_and_values(tmp_path):
  with metrics.MetricsWriter(tmp_path / "run") as writer:
    writer.write(10, {"train/loss": jnp.float32(2.5), "tokens": 3, "skipped": np.int32(1)})
    (text,) = lines_of(tmp_path / "run")  # there before the writer is closed
  line = json.loads(text)
  assert line.pop("time") > 1.7e9
  assert line == {"step": 10, "train/loss": 2.5, "tokens": 3, "skipped": 1}


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
  values = {"a": float("nan"), "b": float("inf"), "c": -np.inf, "d": 1.0}
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(1, values)

  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  line = json.loads(lines_of(tmp_path)[0], parse_constant=refuse)
  assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1.0)
  assert line["non_finite"] == {"a": "nan", "b": "inf", "c": "-inf"}
  (line,) = metrics.read(tmp_path)
  np.testing.assert_equal({name: line[name] for name in values}, values)
  assert "non_finite" not in line


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path):
  write_steps(tmp_path, [0, 10, 20, 30])
  write_steps(tmp_path, [30], resume_step=20)
  assert steps_of(tmp_path) == [0, 10, 20, 30]
  write_steps(tmp_path, [1], resume_step=0)
  assert steps_of(tmp_path) == [0, 1]


def test_resuming_keeps_the_other_lines_as_they_were(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(1, {"a": float("nan"), "b": 0.1})
    writer.write(2, {"b": 0.2})
  before = lines_of(tmp_path)
  metrics.MetricsWriter(tmp_path, resume_step=1).close()
  assert lines_of(tmp_path) == before[:1]


def test_a_run_that_starts_over_starts_a_new_file(tmp_path):
  write_steps(tmp_path, [0, 10])
  write_steps(tmp_path, [0])
  assert steps_of(tmp_path) == [0]


@pytest.mark.parametrize("torn", [b"{", b'{"step": 30, "time": 1', b'{"step": 30', b"\0\0\0", b"3"])
def test_a_torn_last_line_is_repaired(tmp_path, torn):
  write_steps(tmp_path, [10, 20])
  with open(tmp_path / metrics.METRICS_FILE, "ab") as file:
    file.write(torn)
  assert steps_of(tmp_path) == [10, 20]
  write_steps(tmp_path, [30], resume_step=20)
  assert steps_of(tmp_path) == [10, 20, 30]
  assert all(json.loads(line) for line in lines_of(tmp_path))


def test_a_last_line_torn_at_its_end_is_kept(tmp_path):
  """All but the line's end was written: it is whole, and the next one does not run into it."""
  write_steps(tmp_path, [10, 20])
  path = tmp_path / metrics.METRICS_FILE
  path.write_bytes(path.read_bytes()[:-1])
  write_steps(tmp_path, [30], resume_step=20)
  assert steps_of(tmp_path) == [10, 20, 30]


def test_a_broken_line_before_the_last_is_reported(tmp_path):
  write_steps(tmp_path, [10, 20])
  path = tmp_path / metrics.METRICS_FILE
  path.write_text("loss: 3\n" + path.read_text())
  before = path.read_text()
  with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: b'loss: 3'; every line is a JSON"):
    metrics.MetricsWriter(tmp_path, resume_step=20)
  assert path.read_text() == before


def test_repair_is_atomic(tmp_path, monkeypatch):
  """Killed between writing the new file and putting it in place: the old one is whole."""
  write_steps(tmp_path, [10, 20])

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    metrics.MetricsWriter(tmp_path, resume_step=10)
  monkeypatch.undo()
  assert steps_of(tmp_path) == [10, 20]
  metrics.MetricsWriter(tmp_path, resume_step=10).close()
  assert steps_of(tmp_path) == [10]


def test_a_killed_writer_leaves_what_it_wrote(tmp_path):
  program = f"""
    import os, signal
    from qlora_jax import metrics
    writer = metrics.MetricsWriter({str(tmp_path)!r})
    for step in range(5):
      writer.write(step, {{"loss": 1.0}})
    os.kill(os.getpid(), signal.SIGKILL)
  """
  result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=120)
  assert result.returncode == -signal.SIGKILL
  assert steps_of(tmp_path) == [0, 1, 2, 3, 4]


def tensorboard_steps(directory):
  """Steps of the scalars in the event files, oldest file first, as TensorBoard would show them."""
  from tensorboardX.proto import event_pb2

  steps = []
  for path in sorted((directory / metrics.TENSORBOARD_DIRECTORY).iterdir()):
    data = path.read_bytes()
    while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
      length = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + length])  # pyright: ignore
      data = data[16 + length :]
      if event.session_log.status == event_pb2.SessionLog.START:  # pyright: ignore
        steps = [step for step in steps if step < event.step]
      if event.summary.value:
        steps.append(event.step)
  return steps


def test_tensorboard_purges_what_is_run_again(tmp_path, monkeypatch):
  write_steps(tmp_path, [10, 20, 30])
  assert tensorboard_steps(tmp_path) == [10, 20, 30]
  # An event file is named by the second it was opened in, and a test takes less.
  (file,) = (tmp_path / metrics.TENSORBOARD_DIRECTORY).iterdir()
  file.rename(file.with_name("events.out.tfevents.0.earlier"))
  write_steps(tmp_path, [30, 40], resume_step=20)
  assert tensorboard_steps(tmp_path) == [10, 20, 30, 40]


def test_closing_twice_and_writing_after(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  writer.close()
  writer.close()
  with pytest.raises(ValueError, match="step 3: the metrics writer is closed"):
    writer.write(3, {})


@pytest.mark.parametrize("name", ["step", "time", "non_finite"])
def test_names_of_the_line_itself_are_refused(tmp_path, name):
  with metrics.MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=f"^{name}: "):
    writer.write(3, {name: 1.0})
  assert lines_of(tmp_path) == []


def test_reading_a_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: no such file"):
    metrics.read(tmp_path)


def test_tensorboard_is_imported_when_it_is_used():
  program = "import sys, qlora_jax.metrics; sys.exit('tensorboardX' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


class Clock:
  def __init__(self):
    self.now = 1000.0

  def monotonic(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(metrics.time, "monotonic", clock.monotonic)
  return clock


def test_progress_without_a_terminal_is_a_line_each_log(clock):
  stream = io.StringIO()
  with metrics.Progress(300, initial_step=20, description="QLoRA", stream=stream) as progress:
    for _ in range(10):
      progress.advance(tokens=1000)
    assert stream.getvalue() == ""
    clock.now += 5
    assert progress.log({"loss": 2.71828}) == 2000.0
    progress.advance(steps=2, tokens=500)
    clock.now += 2
    progress.log({"loss": jnp.float32(2.5)})
  assert stream.getvalue().splitlines() == [
    "QLoRA: step 30/300, loss 2.718, 2,000 tokens/s, 02:15 left",
    "QLoRA: step 32/300, loss 2.5, 250 tokens/s, 04:28 left",
  ]


def test_progress_before_any_step(clock):
  stream = io.StringIO()
  with metrics.Progress(5, stream=stream) as progress:
    assert progress.log({"held-out loss": 3.0}) == 0.0
  assert stream.getvalue() == "train: step 0/5, held-out loss 3\n"


def test_progress_in_a_terminal_is_one_bar(clock):
  stream = Terminal()
  progress = metrics.Progress(10, initial_step=2, description="QLoRA", stream=stream)
  progress.advance(steps=4, tokens=4000)
  clock.now += 2
  progress.log({"loss": 2.5})
  progress.log({"held-out loss": 2.25})
  progress.close()
  progress.close()
  text = stream.getvalue()
  last = text.replace("\n", "").split("\r")[-1]
  assert "QLoRA" in last
  assert "6/10" in last
  assert "loss 2.5, 2,000 tokens/s, held-out loss 2.25" in last
  assert text.count("\n") == 1  # the bar was redrawn in its place, and left by close


def test_progress_goes_to_stderr(capsys):
  with metrics.Progress(2) as progress:
    progress.log({})
  captured = capsys.readouterr()
  assert (captured.out, captured.err) == ("", "train: step 0/2\n")

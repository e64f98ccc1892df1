"""What a run says while it runs: `metrics.jsonl`, TensorBoard events, a progress bar.

`metrics.jsonl` is the record: one JSON object a line,

  {"step": 20, "time": 1767225600.123, "train/loss": 2.71, "train/learning_rate": 0.0002}

`time` is the wall clock in seconds since 1970; everything else is what the trainer passed. JSON has
no NaN or infinity, so such a value is null and its name is listed, with what it was, under one key
more: `"train/loss": null, "non_finite": {"train/loss": "nan"}`.

A run may be killed at any moment and go on from its last checkpoint, so lines may be ahead of the
checkpoint and the last one may be torn. Opening the file again drops what is to be run again.
"""

import io
import json
import math
import numbers
import os
import sys
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, SupportsFloat

import tqdm

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
_RESERVED = ("step", "time", "non_finite")


class MetricsWriter:
  """Appends to `metrics.jsonl` and to TensorBoard events.

  A line is in the file when `write` returns, `kill -9` or not; of the events, which only draw the
  curves, the last second may be lost.

  with MetricsWriter(directory, resume_step=100) as metrics:
    metrics.write(110, {"train/loss": loss})

  Args:
    directory: of the run; made where it is missing.
    resume_step: step of the checkpoint that the run goes on from: lines of later steps are dropped,
      atomically, and so is a torn last line. None: the run starts, and all earlier lines go.

  Raises:
    OSError: the directory cannot be written.
    ValueError: a line before the last one is not a JSON object with a step: not our doing.
  """

  def __init__(self, directory: str | os.PathLike[str], resume_step: int | None = None):
    # Here, not above: `read` and `Progress` do without it (and without protobuf).
    import tensorboardX

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / METRICS_FILE
    last_step = -1 if resume_step is None else resume_step
    kept = [line for line in _read_lines(path) if line["step"] <= last_step]
    write_whole(path, "".join(_dump(line) for line in kept))
    self._file: io.TextIOWrapper | None = open(path, "a", encoding="utf-8")
    # A thread of tensorboardX writes the events; its two minutes between flushes are too long for a
    # run that may be killed. (A flush of our own would miss what that thread has yet to write.)
    self._tensorboard = tensorboardX.SummaryWriter(
      str(directory / TENSORBOARD_DIRECTORY), purge_step=last_step + 1, flush_secs=1
    )

  def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
    """Appends one line and flushes it.

    Args:
      step: optimizer steps done.
      values: name → number (a Python or numpy number, or a jax scalar, which is waited for).

    Raises:
      ValueError: the writer is closed, or a name is one of step, time, non_finite.
      OSError: the disk is full.
    """
    if self._file is None:
      raise ValueError(f"step {step}: the metrics writer is closed")
    for name in _RESERVED:
      if name in values:
        raise ValueError(f"{name}: a name of the line itself; call the metric something else")
    now = time.time()
    scalars = {name: _number(value) for name, value in values.items()}
    non_finite = {name: str(x) for name, x in scalars.items() if not math.isfinite(x)}
    line: dict[str, Any] = {"step": step, "time": now} | scalars
    if non_finite:
      line |= dict.fromkeys(non_finite) | {"non_finite": non_finite}
    self._file.write(_dump(line))
    self._file.flush()
    for name, x in scalars.items():
      self._tensorboard.add_scalar(name, x, step, walltime=now)

  def close(self) -> None:
    """Closes the files; a second call does nothing."""
    if self._file is not None:
      self._file.close()
      self._file = None
      self._tensorboard.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def read(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the lines of a run's `metrics.jsonl`, a running or a killed one's too.

  Args:
    directory: of the run.

  Returns:
    One dictionary a line, NaN and infinities put back; a torn last line is left out.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line before the last one is not a JSON object with a step.
  """
  path = Path(directory) / METRICS_FILE
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file; a run writes it at its first step")
  lines = _read_lines(path)
  for line in lines:
    for name, text in line.pop("non_finite", {}).items():
      line[name] = float(text)
  return lines


def _number(value: SupportsFloat) -> int | float:
  return int(value) if isinstance(value, numbers.Integral) else float(value)


def _dump(line: Mapping[str, Any]) -> str:
  return json.dumps(line, allow_nan=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  raw = path.read_bytes().splitlines()
  lines = []
  for i, text in enumerate(raw):
    try:
      line = json.loads(text)
      if not isinstance(line["step"], int):
        raise TypeError
    except (ValueError, TypeError, KeyError):
      if i == len(raw) - 1:
        break  # torn: the process was killed in the middle of the write
      rule = "every line is a JSON object with a step"
      raise ValueError(f"{path}, line {i + 1}: {text[:80]!r}; {rule}") from None
    lines.append(line)
  return lines


def write_whole(path: Path, text: str) -> None:
  """Writes a whole file so that a reader, or a crash, sees the old one or the new one.

  Raises:
    OSError: the directory cannot be written, or the disk is full; the old file stays.
  """
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


class _Stream(Protocol):
  def write(self, text: str, /) -> Any: ...
  def flush(self) -> Any: ...
  def isatty(self) -> bool: ...


class Progress:
  """How far a loop is: a bar in a terminal, a line at each log elsewhere.

  with Progress(300, description="QLoRA") as progress:
    for step in range(300):
      ...
      progress.advance(tokens=4096)
      if step % 10 == 9:
        progress.log({"loss": loss})

  prints, in a file or a pipe,

    QLoRA: step 10/300, loss 2.71, 12,345 tokens/s, 00:42 left

  Tokens a second are counted between two logs, where the trainer has waited for the device; the
  time before the first log holds the compilation, and counts for that log alone.

  Args:
    total_steps: where the loop ends.
    initial_step: where it starts, when resumed.
    description: what is going on, in a word or two.
    stream: stderr by default.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    initial_step: int = 0,
    description: str = "train",
    stream: _Stream | None = None,
  ):
    # A cast: to pyright, sys.stderr may be None, as it is in a Windows program without a console.
    self._stream = stream = typing.cast(_Stream, sys.stderr if stream is None else stream)
    self._total = total_steps
    self._step = initial_step
    self._description = description
    self._tokens = 0
    self._logged_step = initial_step
    self._logged_at = time.monotonic()
    self._shown: dict[str, str] = {}
    self._bar = None
    if stream.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps,
        initial=initial_step,
        desc=description,
        unit="step",
        file=stream,  # pyright: ignore[reportArgumentType]
        dynamic_ncols=True,
      )

  def advance(self, *, steps: int = 1, tokens: int = 0) -> None:
    """Counts steps that are done and the tokens that were in them."""
    self._step += steps
    self._tokens += tokens
    if self._bar is not None:
      self._bar.update(steps)

  def log(self, values: Mapping[str, SupportsFloat | str]) -> float:
    """Shows the latest values.

    Args:
      values: name → number, or what is to be shown in place of both.

    Returns:
      Tokens a second since the log before (or since the start); 0.0 where there were none.
    """
    now = time.monotonic()
    elapsed = max(now - self._logged_at, 1e-9)
    rate = self._tokens / elapsed
    parts = {
      name: value if isinstance(value, str) else f"{name} {_number(value):.4g}"
      for name, value in values.items()
    }
    if self._tokens:
      parts["tokens/s"] = f"{rate:,.0f} tokens/s"
    if self._bar is not None:
      # The latest of everything: a held-out loss stays beside the losses that follow it.
      self._shown |= parts
      self._bar.set_postfix_str(", ".join(self._shown.values()))
    else:
      done = self._step - self._logged_step
      if done:
        left = (self._total - self._step) * elapsed / done
        parts["left"] = f"{tqdm.tqdm.format_interval(left)} left"
      head = f"{self._description}: step {self._step}/{self._total}"
      self._stream.write(", ".join([head, *parts.values()]) + "\n")
      self._stream.flush()
    self._tokens, self._logged_step, self._logged_at = 0, self._step, now
    return rate

  def close(self) -> None:
    """Leaves the bar as it stands; a second call does nothing."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

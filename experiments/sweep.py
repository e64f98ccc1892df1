"""All trials of a config's `sweep()`: here, one of them (an array job), or on a Ray cluster.

A sweep's directory holds

  sweep.json            its name, and of each trial the index, id, overrides and base
  trials/ID/            a run directory (see experiments/trial.py), and of each trial
    log.txt             what it printed
    error.json          why it failed, where it did
    stopped.json        why it was stopped early, where it was (experiments/halving.py)
  bases/ID.json         what experiments/analysis.py measures of a base, once for its trials
  locks/                who is at work

A trial is known by its resolved config (`sweeps.identity`), so it is finished whatever becomes of
the grid around it. Trials of one process run base by base and share what they load and compile;
with a group size above one, those that one program serves train together
(experiments/trial_group.py).
Any number of processes may work on one directory: a lock that the kernel drops when its process
ends, however it ends, gives each trial to one of them. A trial that failed is tried again when the
command is given again; one whose files are damaged has failed too, and the others go on.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import tqdm

from experiments import analysis, halving, trial, trial_group
from qlora_jax import config as config_lib
from qlora_jax import data, sweeps
from qlora_jax.config import ExperimentConfig
from qlora_jax.hf import checkpoint as hf_checkpoint
from qlora_jax.hf.files import read_json
from qlora_jax.models.transformer import Transformer
from qlora_jax.sweeps import Trial
from qlora_jax.train import Interrupted, Paused, SignalGuard, TrainState

# Of a Ray worker that died (a machine was taken away). A trial that raised would raise again.
RAY_RETRIES = 3

# Seconds between two looks at trials of a rung that other processes are at work on.
_POLL = 5.0


@dataclasses.dataclass(frozen=True)
class Directory:
  """Where a sweep keeps what.

  Attributes:
    path: of the sweep.
  """

  path: Path
  _is_done: dict[str, tuple[list[int], bool]] = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  def trial(self, id: str) -> Path:
    """The run directory of a trial."""
    return self.path / "trials" / id

  def error(self, id: str) -> Path:
    """Why a trial failed."""
    return self.trial(id) / "error.json"

  def base(self, id: str) -> Path:
    """What was measured of a base."""
    return self.path / "bases" / f"{id}.json"

  def lock(self, id: str) -> filelock.BaseFileLock:
    """A lock of the operating system's, by a trial's or a base's id."""
    folder = self.path / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder / f"{id}.lock")

  def running(self, id: str) -> bool:
    """Whether a process is at work on a trial; for those who only look, and make nothing."""
    try:
      file = open(self.path / "locks" / f"{id}.lock", "rb")
    except FileNotFoundError:
      return False
    with file:
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except OSError:
        return True
    return False

  def finished(self, id: str) -> bool:
    """Whether a trial has its summary."""
    return (self.trial(id) / "summary.json").exists()

  def done(self, one: Trial) -> bool:
    """Whether a trial is finished, and with the config that its id stands for now.

    A version that changes a default leaves the id as it was. Such a trial is run, and fails in
    `trial.prepare_directory`, which names the fields. So is one whose config cannot be read; a
    summary that cannot is written again.
    """
    config, summary = (self.trial(one.id) / name for name in ("config.json", "summary.json"))
    try:
      written = [path.stat().st_mtime_ns for path in (config, summary)]
    except FileNotFoundError:
      return False
    # Read once: `done` is asked of all trials after each one.
    if one.id not in self._is_done or self._is_done[one.id][0] != written:
      try:
        read_json(summary)
        found = config_lib.from_json_dict(read_json(config)) == one.config
      except (OSError, ValueError):  # torn, or a field that is no more
        found = False
      self._is_done[one.id] = written, found
    return self._is_done[one.id][1]

  def clear(self, id: str) -> None:
    """Ahead of a trial's run, under its lock: how it ended before counts no more."""
    self.error(id).unlink(missing_ok=True)
    (self.trial(id) / halving.FILE).unlink(missing_ok=True)
    summary = self.trial(id) / "summary.json"
    try:
      read_json(summary)
    except FileNotFoundError:
      pass
    except ValueError:
      summary.unlink()

  def failure(self, id: str) -> str | None:
    """Why a trial failed, in one line; None where it did not."""
    try:
      return str(read_json(self.error(id))["error"])
    except FileNotFoundError:
      return None
    except (ValueError, KeyError):
      return f"{self.error(id)}: cannot be read"

  def damage(self, id: str) -> str | None:
    """Which file of a trial's cannot be read, and why, in one line; None where all can."""
    path = self.trial(id)
    for name in ("config.json", "summary.json", halving.FILE):
      try:
        read_json(path / name)
      except FileNotFoundError:
        if name == "config.json" and self.finished(id):
          return f"{path}: holds summary.json but no config.json"
      except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return None

  def settled(self, one: Trial, failed_before: dict[str, int]) -> bool:
    """Whether a trial is done, or has failed since `failed_before` was taken."""
    return self.done(one) or one.id in self.failures([one], failed_before)

  def stands_at(self, one: Trial, until: int | None, keep: int | None) -> bool:
    """Whether a trial has no more to do up to step `until`: it is there, or was stopped."""
    path = self.trial(one.id)
    if keep is not None and halving.stopped_at(path):
      return True
    return until is not None and trial.saved_step(path) >= until

  def through(
    self, one: Trial, failed_before: dict[str, int], until: int | None, keep: int | None
  ) -> bool:
    """Whether there is nothing to be done of a trial up to step `until`."""
    return self.settled(one, failed_before) or self.stands_at(one, until, keep)

  def failures(
    self, trials: Sequence[Trial], before: Mapping[str, int] | None = None
  ) -> dict[str, int]:
    """Id → when it failed, in nanoseconds since 1970, of each trial that did since `before`."""
    found = {}
    for each in trials:
      with contextlib.suppress(FileNotFoundError):
        at = self.error(each.id).stat().st_mtime_ns
        if before is None or before.get(each.id) != at:
          found[each.id] = at
    return found


def prepare(name: str, trials: Sequence[Trial], workdir: Path) -> Directory:
  """Makes the sweep's directory, or checks that it is one, and writes down what belongs to it.

  Raises:
    RunDirectoryError: it holds something else, or cannot be written.
  """
  path = workdir / "sweep.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # What another process, which starts at the same time, may have made by now is ours too.
    names = {entry.name for entry in workdir.iterdir()} - {"locks", "sweep.json.tmp"}
    if names and "sweep.json" not in names:
      raise trial.RunDirectoryError(
        f"{workdir}: holds files but no sweep.json, so it is no sweep; give another --workdir"
      )
    described = {
      "name": name,
      "trials": [
        {
          "index": each.index,
          "id": each.id,
          "overrides": dict(each.overrides),
          "base": sweeps.base_identity(each.config),
        }
        for each in trials
      ],
    }
    directory = Directory(workdir)
    with directory.lock("sweep"):  # array jobs come all at once
      trial.write_json(path, described)
  except OSError as error:
    raise trial.RunDirectoryError(f"{workdir}: cannot be written: {error.strerror}") from None
  return directory


def by_base(trials: Sequence[Trial]) -> list[list[Trial]]:
  """The trials, those that share a base together, in the order of the sweep."""
  groups: dict[str, list[Trial]] = {}
  for each in trials:
    groups.setdefault(sweeps.base_identity(each.config), []).append(each)
  return list(groups.values())


def _sharing(count: int) -> str:
  return "1 trial has" if count == 1 else f"{count} trials share"


def listing(name: str, trials: Sequence[Trial], workdir: Path) -> str:
  """Names the trials, how each stands in `workdir`, and what they share; makes nothing."""
  directory, groups = Directory(workdir), by_base(trials)
  states: dict[str, str] = {}
  notes: dict[str, str] = {}
  for each in trials:
    if directory.done(each):
      states[each.id] = "finished"
      continue
    path = directory.trial(each.id)
    if directory.running(each.id):
      states[each.id] = "running"
    elif error := directory.failure(each.id) or directory.damage(each.id):
      states[each.id], notes[each.id] = "failed", f"; {error}"
      continue
    elif found := halving.stopped(path):
      notes[each.id] = f"; {halving.described(found)}"
      continue
    if step := trial.saved_step(path):
      notes[each.id] = f"; at step {step}"
  count = collections.Counter(states.values())
  lines = [
    f"{name}: {len(trials)} trials on {len(groups)} base{'s' * (len(groups) > 1)}; "
    f"{count['finished']} finished, {count['failed']} failed, {count['running']} running "
    f"in {workdir}"
  ]
  for group in groups:
    lines += ["", f"{_base(group[0].config)}: {_sharing(len(group))} the base"]
    for each in group:
      state, note = states.get(each.id, ""), notes.get(each.id, "")
      lines.append(f"{each.index:5}  {each.id}  {state:8}  {each.label}{note}")
  return "\n".join(lines)


def _base(config: ExperimentConfig) -> str:
  source = config.model.path or f"base trained for {config.pretrain.steps} steps"
  return f"{source}, {trial.storage(config.base_quantization)}, {config.data.seq_len} tokens"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a sweep stands when a process is through with it.

  Attributes:
    finished: how many trials have their summary.
    failed: each trial that failed, and its error in one line.
    elsewhere: trials that another process is at work on.
    stopped: trials that halving stopped early, and where.
  """

  finished: int
  failed: list[tuple[Trial, str]]
  elsewhere: list[Trial]
  stopped: list[tuple[Trial, str]] = dataclasses.field(default_factory=list)

  def __str__(self) -> str:
    lines = [
      f"{self.finished} finished, {len(self.failed)} failed, "
      f"{len(self.elsewhere)} with other processes"
    ]
    if self.stopped:
      lines.append(f"{len(self.stopped)} stopped early by successive halving, and not finished:")
      lines += [f"  trial {each.index} ({each.label}): {why}" for each, why in self.stopped]
    for each, error in self.failed:
      lines.append(f"  trial {each.index} ({each.id}: {each.label}): {error}")
    if self.failed:
      lines.append("The same command tries the failed ones again.")
    return "\n".join(lines)


def groups(directory: Directory, trials: Sequence[Trial], size: int) -> list[list[Trial]]:
  """The trials in the order of their bases, up to `size` together where one program serves them.

  Those that were stopped at the same step are together, and those of like ranks.
  """
  found: dict[str, list[Trial]] = {}
  for base in by_base(trials):
    for each in base:
      found.setdefault(sweeps.group_identity(each.config), []).append(each)

  def alike(one: Trial) -> tuple[int, int]:
    return trial.saved_step(directory.trial(one.id)), one.config.lora.rank

  parts: list[list[Trial]] = []
  for group in found.values():
    ordered = group if size == 1 else sorted(group, key=alike)
    count = -(-len(ordered) // size)
    # Of like sizes, which are programs of like sizes.
    cuts = [len(ordered) * i // count for i in range(count + 1)]
    parts += [ordered[a:b] for a, b in itertools.pairwise(cuts)]
  return parts


def run(
  name: str,
  trials: Sequence[Trial],
  workdir: Path,
  index: int | None = None,
  group_size: int | None = None,
  keep: int | None = None,
) -> Outcome:
  """Runs the trials that are not finished, or one of them.

  Args:
    name: of the sweep.
    trials: all of them.
    workdir: the sweep's directory.
    index: of the only trial to run, for array jobs.
    group_size: at most so many trials train in one program; None for `trial_group.default_size`.
    keep: successive halving: one setting in so many goes on at each rung (experiments/halving.py);
      None: all run to their end, those too that were stopped before.

  Raises:
    RunDirectoryError: see `prepare`.
    ConfigError: see `halving.check`.
    train.Interrupted: a signal came; the trial that was running has saved.
  """
  rungs = [] if keep is None else halving.check(trials, keep)
  directory = prepare(name, trials, workdir)
  chosen = list(trials) if index is None else [trials[index]]
  before = directory.failures(chosen)
  shared, progress = trial.Shared(), _Progress(name, directory, chosen, before, keep)
  size = trial_group.default_size() if group_size is None else group_size
  waiting: list[Trial] = []
  for until in (*rungs, None):
    waiting = [each for each in chosen if not directory.stands_at(each, until, keep)]
    # Again: what another process was at work on may have been dropped by it meanwhile. At a rung
    # until all have come there, since losses are compared.
    for attempt in itertools.count():
      if not waiting or (until is None and attempt == 2):
        break
      if attempt == 2:
        print(f"{name}: step {until}: waits for {len(waiting)} with other processes", flush=True)
      if attempt >= 2:
        time.sleep(_POLL)
      busy: list[Trial] = []
      for group in groups(directory, waiting, size):
        with contextlib.ExitStack() as locks:
          ours = [
            each
            for each in group
            if locks.enter_context(_ours(directory, each, before, until, keep))
          ]
          busy += [each for each in group if each not in ours]
          if ours:
            elsewhere = sum(not directory.through(each, before, until, keep) for each in busy)
            progress.starts(ours, elsewhere)
            run_group(directory, ours, shared, size, until)
            progress.ended(ours)
      waiting = [each for each in busy if not directory.through(each, before, until, keep)]
    if until is not None and keep is not None:
      stopped = halving.decide(chosen, directory.trial, until, keep)
      print(f"{name}: step {until}: {len(stopped)} trials stopped early", flush=True)
  return outcome(directory, chosen, waiting)


def outcome(directory: Directory, trials: Sequence[Trial], elsewhere: list[Trial]) -> Outcome:
  """How the trials stand on the disk."""
  finished = {each.id for each in trials if directory.done(each)}
  skipped = finished | {each.id for each in elsewhere}
  failed = [
    (each, error)
    for each in trials
    if each.id not in skipped and (error := directory.failure(each.id)) is not None
  ]
  settled = skipped | {each.id for each, _ in failed}
  stopped = [
    (each, halving.described(found))
    for each in trials
    if each.id not in settled and (found := halving.stopped(directory.trial(each.id))) is not None
  ]
  return Outcome(len(finished), failed, elsewhere, stopped)


@contextlib.contextmanager
def _ours(
  directory: Directory,
  one: Trial,
  failed_before: dict[str, int],
  until: int | None = None,
  keep: int | None = None,
) -> Iterator[bool]:
  """Holds a trial's lock; gives whether it is to be run: not through, and no other process's."""
  if directory.through(one, failed_before, until, keep):
    yield False
    return
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(directory.lock(one.id).acquire(blocking=False))
    except filelock.Timeout:
      yield False
      return
    # Looked at again under the lock: another process may be through with it by now.
    yield not directory.through(one, failed_before, until, keep)


def run_trial(
  directory: Directory, one: Trial, shared: trial.Shared, until: int | None = None
) -> None:
  """Runs a trial, of which the caller has the lock; an error goes to its error.json.

  With `until` it pauses at that step, saved.
  """
  path = directory.trial(one.id)
  try:
    directory.clear(one.id)
    trial.prepare_directory(path, one.config)
    with _log(path / "log.txt"):
      trial.run(one.config, path, shared, _measure(directory, shared), until)
  except Interrupted:
    raise
  except Paused:
    pass
  except Exception as reason:
    trial.write_json(directory.error(one.id), _described(reason))


def run_group(
  directory: Directory,
  trials: Sequence[Trial],
  shared: trial.Shared,
  size: int,
  until: int | None = None,
) -> None:
  """`run_trial` of several trials, which train together where they can: see `trial_group`."""
  if len(trials) == 1:
    run_trial(directory, trials[0], shared, until)
    return
  guard, measure = SignalGuard(), _measure(directory, shared)
  with contextlib.ExitStack() as logs:
    started = []
    for one in trials:
      path = directory.trial(one.id)
      try:
        directory.clear(one.id)
        # Before its log is there: a directory with files and no config is refused.
        trial.prepare_directory(path, one.config)
      except Exception as reason:
        trial.write_json(directory.error(one.id), _described(reason))
        continue
      log = logs.enter_context(open(path / "log.txt", "a", encoding="utf-8"))
      started.append((one, (trial.steps(one.config, path, shared, measure, guard, until), log)))
    results = trial_group.run([each for _, each in started], size, shared, guard)
  for (one, _), result in zip(started, results, strict=True):
    if isinstance(result, Exception) and not isinstance(result, Paused):
      trial.write_json(directory.error(one.id), _described(result))


def _described(error: BaseException) -> dict[str, str]:
  return {
    "error": " ".join(f"{type(error).__name__}: {error}".split()),
    "traceback": "".join(traceback.format_exception(error)),
  }


@contextlib.contextmanager
def _log(path: Path) -> Iterator[None]:
  """What is printed meanwhile goes to a file."""
  with open(path, "a", encoding="utf-8") as file:
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
      yield


def _measure(directory: Directory, shared: trial.Shared) -> trial.Measure:
  """What experiments/analysis.py makes of each trained model, and once of its base."""

  def measure(
    config: ExperimentConfig,
    model: Transformer,
    frozen: Any,
    state: TrainState,
    held_out: data.Dataset,
  ) -> dict[str, Any]:
    path = trial.base_directory(config)
    sizes = {"batch_size": config.train.eval_batch_size, "loss_chunk": config.train.loss_chunk}
    reference = None
    # A packed checkpoint has no 16-bit weights to compare with.
    if hf_checkpoint.is_dense(hf_checkpoint.model_directory(path)):
      _, reference = trial.load_base(config, path, None, shared)
    base = sweeps.base_identity(config)
    with directory.lock(f"base-{base}"):
      if not directory.base(base).exists():
        plain = frozen
        if config.lora.changes_base:
          _, plain = trial.load_base(config, path, config.base_quantization, shared)
        found = analysis.of_base(
          model, plain, reference, config.base_quantization, held_out, **sizes
        )
        trial.write_json(directory.base(base), found)
    variables = {"params": state.params, "constants": state.constants, "frozen": frozen}
    sequences = analysis.by_sequence(model, variables, reference, held_out, **sizes)
    return {"base": base, "sequences": dataclasses.asdict(sequences)}

  return measure


class _Progress:
  """A line a trial: how many are done, running, failed, the time left, and what it came to."""

  def __init__(
    self,
    name: str,
    directory: Directory,
    trials: Sequence[Trial],
    failed_before: dict[str, int],
    keep: int | None = None,
  ):
    self._name, self._directory, self._trials, self._keep = name, directory, trials, keep
    self._failed_before = failed_before
    self._started, self._first = time.monotonic(), self._done()

  def _done(self) -> int:
    return sum(self._directory.done(each) for each in self._trials)

  def starts(self, trials: Sequence[Trial], elsewhere: int) -> None:
    """Before `trials`, one or a group; `elsewhere` were found with other processes."""
    line = self._line(len(trials) + elsewhere)
    if len(trials) == 1:
      print(f"{line}; {self._named(trials[0])}", end=" ", flush=True)
    else:
      print(f"{line}; {len(trials)} trials together", flush=True)

  def ended(self, trials: Sequence[Trial]) -> None:
    """After them; of one, on the line that `starts` began."""
    for each in trials:
      name = "" if len(trials) == 1 else f"  {self._named(each)} "
      print(f"{name}→ {self._result(each)}", flush=True)

  def came(self, trials: Sequence[Trial], running: int) -> None:
    """After `trials`, one or a group, where several run at once."""
    for each in trials:
      print(f"{self._line(running)}; {self._named(each)} → {self._result(each)}", flush=True)

  def _named(self, one: Trial) -> str:
    return f"trial {one.index} ({one.label})"

  def _line(self, running: int) -> str:
    done = self._done()
    # Those of before are tried again.
    failed = len(self._directory.failures(self._trials, self._failed_before))
    stopped = 0
    if self._keep is not None:
      stopped = sum(halving.stopped_at(self._directory.trial(each.id)) > 0 for each in self._trials)
    left = ""
    if done > self._first:
      each = (time.monotonic() - self._started) / (done - self._first)
      count = len(self._trials) - done - failed - stopped
      left = f", {tqdm.tqdm.format_interval(count * each)} left"
    return (
      f"{self._name}: {done}/{len(self._trials)} done, {running} running, {failed} failed"
      f"{f', {stopped} stopped early' if stopped else ''}{left}"
    )

  def _result(self, one: Trial) -> str:
    if self._directory.done(one):
      summary = read_json(self._directory.trial(one.id) / "summary.json")
      stage = summary["qlora"] or summary["lora_16bit"]
      return f"held-out loss {stage['loss_before']:.4f}, after {stage['loss_after']:.4f}"
    if error := self._directory.failure(one.id):
      return error
    if step := trial.saved_step(self._directory.trial(one.id)):
      return f"at step {step}"
    return "with another process"


def run_on_ray(
  name: str, trials: Sequence[Trial], workdir: Path, group_size: int | None = None
) -> Outcome:
  """Sends the trials that are not finished to a Ray cluster, one or a group at a time, and waits.

  The cluster is that of `$RAY_ADDRESS`, or one of this machine alone, started here. Its machines
  see `workdir`, and this repository, under the same paths. A trial, or a group, asks for one GPU
  where the cluster has any, else for one CPU core; a worker that runs another one keeps what they
  share. One whose worker dies, or is told to stop, is sent again, and goes on from its checkpoint.
  `group_size` is as in `run`; None for one trial where the cluster has no GPU.

  Raises:
    ImportError: Ray is not installed; the message says how to.
    RunDirectoryError: see `prepare`.
  """
  try:
    import ray  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise ImportError("--ray: Ray is not installed: pip install 'qlora_jax[ray]'") from None

  directory = prepare(name, trials, workdir.absolute())
  before = directory.failures(trials)
  ours = not ray.is_initialized()
  if ours:
    ray.init(logging_level="warning", log_to_driver=False)
  try:
    resources = ray.cluster_resources()
    gpus = 1 if resources.get("GPU") else 0
    slots = int(resources.get("GPU" if gpus else "CPU", 1))
    remote = ray.remote(
      num_cpus=0 if gpus else 1,
      num_gpus=gpus,
      max_retries=RAY_RETRIES,
      # Its machine is taken away, with notice. (What `ray.cancel` stopped is not sent again.)
      retry_exceptions=[Interrupted],
    )(_ray_group)
    size = group_size or (trial_group.MOST_TRIALS if gpus else 1)
    undone = [each for each in trials if not directory.done(each)]
    waiting = {
      remote.remote(directory.path, group, before, size): group
      for group in groups(directory, undone, size)
    }
    progress, elsewhere = _Progress(name, directory, trials, before), []
    try:
      while waiting:
        (first, *_), _ = ray.wait(list(waiting), num_returns=1)
        group = waiting.pop(first)
        try:
          elsewhere += [each for each in group if each.id in ray.get(first)]
        except ray.exceptions.RayError as error:  # its workers died, once too often
          for each in group:
            if not directory.done(each):
              trial.write_json(directory.error(each.id), _described(error))
        progress.came(group, min(len(waiting), slots) + len(elsewhere))
    except BaseException:
      for one in waiting:
        ray.cancel(one)  # a trial that runs gets a SIGINT, and saves
      ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
      raise
  finally:
    if ours:
      ray.shutdown()
  return outcome(directory, trials, elsewhere)


@functools.cache
def _worker_shared() -> trial.Shared:
  """Of a Ray worker, which runs one trial after another."""
  return trial.Shared()


def _ray_group(
  path: Path, trials: list[Trial], failed_before: dict[str, int], size: int
) -> list[str]:
  """Runs trials on a worker; returns the ids of those that another process is at work on."""
  directory = Directory(path)
  with contextlib.ExitStack() as locks:
    ours = [each for each in trials if locks.enter_context(_ours(directory, each, failed_before))]
    if ours:
      run_group(directory, ours, _worker_shared(), size)
  return [
    each.id for each in trials if each not in ours and not directory.settled(each, failed_before)
  ]

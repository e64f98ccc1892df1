"""Trains what a config describes, or all trials of its sweep.

  python -m experiments.run --config configs/quickstart.py [--workdir DIR] [--config.lora.rank=8 …]

`--dry_run` prints the resolved config, the treatment of each weight and the bytes needed;
`--help` lists every field. A run that was stopped, by whatever, goes on when the same command is
given again.

Of a config with `sweep()`, every trial that is not finished runs; `--list` names them, `--index 3`
runs one, `--ray` sends them to a cluster (see experiments/sweep.py), `--group_size=8` trains up to
eight that share a base in one program; `--halving=4` stops the worse settings early, three in four
at each rung (experiments/halving.py).
"""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import command_line


def main(argv: Sequence[str]) -> int:
  """Runs what `argv`, the arguments without the program's name, asks for.

  Returns:
    The exit status: 0, 2 for what the user can mend, 1 for a run that failed, and
    128 + the signal's number where one stopped it; of a sweep 1 where trials failed.
  """
  arguments = command_line.parse(argv)
  previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    return _run(arguments, argv)
  except _Stopped as stopped:
    # Outside of a training loop, which saves first: while something is loaded or compiled.
    name = signal.Signals(stopped.number).name
    print(f"\nstopped by {name}; what was saved stays. To go on: {_command(argv)}", file=sys.stderr)
    return 128 + stopped.number
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


class _Stopped(KeyboardInterrupt):
  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


def _stop(number, frame):
  del frame
  raise _Stopped(number)


def _run(arguments: command_line.Arguments, argv: Sequence[str]) -> int:
  config = arguments.config
  import jax

  if arguments.dry_run:
    # A dry run must not take the accelerator from whoever is using it.
    jax.config.update("jax_platforms", "cpu")
  from experiments import planned, sweep, trial
  from qlora_jax.train import Interrupted, NonFiniteLossError

  workdir = Path(arguments.workdir or f"runs/{config.name}")
  try:
    trials, index = arguments.trials, arguments.index
    if trials is not None and arguments.list:
      print(sweep.listing(config.name, trials, workdir))
      return 0
    if arguments.dry_run:
      print(trial.dry_run(config if trials is None or index is None else trials[index].config))
      return 0
    if trials is not None:
      if arguments.ray:
        outcome = sweep.run_on_ray(config.name, trials, workdir, arguments.group_size)
      else:
        outcome = sweep.run(
          config.name, trials, workdir, index, arguments.group_size, arguments.halving
        )
      print(f"{outcome}\nWritten to {workdir}")
      return 1 if outcome.failed or (index is not None and outcome.elsewhere) else 0
    summary = trial.run(config, workdir)
  except Interrupted as stopped:
    saved = "and saved" if stopped.saved else "of the base's training, which starts again"
    print(f"\nstopped by {stopped}, {saved}. To go on: {_command(argv)}", file=sys.stderr)
    return 128 + stopped.signal_number
  except NonFiniteLossError as error:
    print(
      f"{error}. What was saved before stays in {workdir}; another config wants another --workdir",
      file=sys.stderr,
    )
    return 1
  except planned.OutOfMemoryError as error:
    print(
      f"{error}\nWhat was saved stays in {workdir}; another config wants another --workdir",
      file=sys.stderr,
    )
    return 1
  except (trial.RunDirectoryError, ImportError, ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(trial.closing_table(config, summary, workdir))
  print("\nTo try next:")
  other_base = ("quantization.codebook=int4", "int4")
  if not config.model.quantize:
    other_base = ("model.quantize=True", "4bit")
  for override, suffix in (("lora.rank=2", "rank2"), other_base):
    following = [*_without(argv, f"--config.{override.split('=')[0]}", "--workdir")]
    following += [f"--config.{override}", f"--workdir=runs/{config.name}-{suffix}"]
    print(f"  {_command(following)}")
  return 0


def _command(argv: Sequence[str]) -> str:
  """A command that can be pasted here: with this interpreter, by a short name where it has one."""
  python = Path(sys.executable)
  if python.is_relative_to(Path.cwd()):
    python = python.relative_to(Path.cwd())
  return shlex.join([str(python), "-m", "experiments.run", *argv])


def _without(argv: Sequence[str], *flags: str) -> Iterator[str]:
  """`argv` less the flags named, in either form: `--flag=value`, `--flag value`."""
  words = iter(argv)
  for word in words:
    if word in flags:
      next(words, None)
    elif word.split("=")[0] not in flags:
      yield word


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""Trains what a config describes.

  python -m experiments.run --config configs/quickstart.py [--workdir DIR] [--config.lora.rank=8 …]

`--dry_run` prints the resolved config, the treatment of each weight and the bytes needed;
`--help` lists every field. A run that was stopped, by whatever, goes on when the same command is
given again.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import command_line


def main(argv: Sequence[str]) -> int:
  """Runs what `argv`, the arguments without the program's name, asks for.

  Returns:
    The exit status: 0, 2 for what the user can mend, 1 for a run that failed, and
    128 + the signal's number where one stopped it.
  """
  arguments = command_line.parse(argv)
  config = arguments.config
  import jax

  if arguments.dry_run:
    # A dry run must not take the accelerator from whoever is using it.
    jax.config.update("jax_platforms", "cpu")
  from experiments import trial
  from qlora_jax.checkpoints import BaseChangedError
  from qlora_jax.train import Interrupted, NonFiniteLossError

  workdir = Path(arguments.workdir or f"runs/{config.name}")
  try:
    if arguments.dry_run:
      print(trial.dry_run(config))
      return 0
    summary = trial.run(config, workdir)
  except Interrupted as stopped:
    saved = "and saved" if stopped.saved else "of the base's training, which starts again"
    print(f"\nstopped by {stopped}, {saved}. To go on: {_command(argv)}", file=sys.stderr)
    return 128 + stopped.signal_number
  except NonFiniteLossError as error:
    print(f"{error}. The last good checkpoint is in {workdir}", file=sys.stderr)
    return 1
  except (trial.RunDirectoryError, BaseChangedError, ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(trial.closing_table(config, summary, workdir))
  print("\nTo try next:")
  for override, suffix in (("lora.rank=2", "rank2"), ("quantization.codebook=int4", "int4")):
    following = [*_without(argv, f"--config.{override.split('=')[0]}", "--workdir")]
    following += [f"--config.{override}", f"--workdir=runs/{config.name}-{suffix}"]
    print(f"  {_command(following)}")
  return 0


def _command(argv: Sequence[str]) -> str:
  return shlex.join(["python", "-m", "experiments.run", *argv])


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

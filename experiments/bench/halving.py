"""Does successive halving find the winner of a whole sweep, and for how much less work?

A grid of 48 (eight learning rates × three ranks × two sets of layers) on one NF4 base, trained to
its end and with halving, for each seed; work is optimizer steps, over all trials.

  python -m experiments.bench.halving --config configs/ablate.py --workdir runs/halving

`--seeds=0` and `--only=full` (or halved) run a part of it; parts share the directory, and the table
is of what is there. Its seconds are those of the command that ended a sweep, from that command's
start: no measure of the work where several processes, or a command given again, had a share in it.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import command_line, sweep, trial
from qlora_jax import sweeps
from qlora_jax.hf.files import read_json
from qlora_jax.sweeps import Trial

KEEP = 4
_STEPS, _EVERY = 128, 8
_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
_RANKS = (2, 8, 32)
_TARGETS = (("*/attn/*",), ("*/attn/*", "*/mlp/*"))


@dataclasses.dataclass(frozen=True)
class Found:
  """What a sweep came to.

  Attributes:
    winner: overrides of the finished trial of least loss.
    loss: its, held-out.
    steps: optimizer steps of all trials.
    finished: how many trials ran to their end.
  """

  winner: str
  loss: float
  steps: int
  finished: int


def grid(seed: int) -> Iterator[Mapping[str, Any]]:
  """The 48."""
  ranks = sweeps.zipped({"lora.rank": _RANKS, "lora.alpha": [2.0 * rank for rank in _RANKS]})
  rates = sweeps.grid({"optimizer.learning_rate": _RATES, "lora.targets": _TARGETS})
  return sweeps.cross(rates, ranks, sweeps.grid({"seed": [seed]}))


def found(workdir: Path, trials: Sequence[Trial]) -> Found:
  """Reads a sweep's directory."""
  directory = sweep.Directory(workdir)
  losses: dict[str, float] = {}
  for each in trials:
    if directory.finished(each.id):
      summary = read_json(directory.trial(each.id) / "summary.json")
      losses[each.label] = (summary["qlora"] or summary["lora_16bit"])["loss_after"]
  steps = sum(trial.saved_step(directory.trial(each.id)) for each in trials)
  winner = min(losses, key=losses.__getitem__)
  return Found(winner, losses[winner], steps, len(losses))


def trials_of(config_file: str, seed: int, *, whole: bool) -> list[Trial]:
  """The grid over a config; the whole sweep is evaluated at its end alone."""
  draft, _ = command_line.load(config_file)
  common = {
    "train.steps": _STEPS,
    "train.log_every": _STEPS,
    "train.checkpoint_every": _STEPS,
    "train.eval_every": _STEPS if whole else _EVERY,
    "optimizer.warmup_steps": _EVERY // 2,
  }
  return sweeps.resolve(draft, grid(seed), common)


def line(seed: int, whole: Mapping[str, Any], halved: Mapping[str, Any]) -> str:
  """A row of the table."""
  same = "the same" if halved["winner"] == whole["winner"] else f"{halved['winner']}: another"
  return (
    f"seed {seed}: {whole['winner']} at {whole['loss']:.4f}; halved {same}, {halved['loss']:.4f}, "
    f"for {whole['steps'] / halved['steps']:.1f}× fewer steps "
    f"({whole['seconds']:.0f} and {halved['seconds']:.0f} s)"
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs what `argv` asks for, and prints the table of what is there."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--only", choices=("full", "halved"))
  parser.add_argument("--group_size", type=int)
  arguments = parser.parse_args(argv)
  kinds = ("full", "halved") if arguments.only is None else (arguments.only,)
  for seed in arguments.seeds:
    for kind in kinds:
      path = arguments.workdir / f"{kind}-{seed}"
      if (path / "found.json").exists():
        continue
      trials = trials_of(arguments.config, seed, whole=kind == "full")
      start = time.monotonic()
      keep = None if kind == "full" else KEEP
      outcome = sweep.run("halving", trials, path, group_size=arguments.group_size, keep=keep)
      seconds = time.monotonic() - start
      if outcome.elsewhere:
        print(f"{path}: another process is at work on it", file=sys.stderr)
        return 1
      result = dataclasses.asdict(found(path, trials)) | {"seconds": seconds}
      trial.write_json(path / "found.json", result)
  ratios = []
  for seed in arguments.seeds:
    paths = [arguments.workdir / f"{kind}-{seed}" / "found.json" for kind in ("full", "halved")]
    if all(path.exists() for path in paths):
      whole, halved = map(read_json, paths)
      ratios.append(whole["steps"] / halved["steps"])
      print(line(seed, whole, halved))
  if ratios:
    print(json.dumps({"keep": KEEP, "less_work": float(np.median(ratios))}))
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""Says before a run what it will need: memory, time, the longest rows, the largest batch.

  python -m experiments.plan --config configs/stories.py --model llama-8b --device h100
  python -m experiments.plan --fit train.json [--json errors.json]

Of a config (any field as `--config.section.field=value`) and a device's data sheet, by remat
policy: the peak, with its parts, the tokens a second, the longest row and the largest batch that
fit; the adapter's size on disk; the time of all steps. `--model` takes the shape of a well-known
model in place of the config's own; no weights are needed, and no accelerator.

Of a config with `sweep()`, `--index=3` plans one trial, and without it what the trials differ from.

`--fit` takes what `experiments.bench.train_step` wrote, fits the model's constants on every other
row, and prints how far it is off on each.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from experiments import command_line
from experiments.planned import evaluation, planner, step_of
from experiments.shapes import SHAPES
from qlora_jax import config as config_lib
from qlora_jax import plan
from qlora_jax.config import ExperimentConfig

# What a step may fill of a device's memory: the rest is fragments and the driver's.
USABLE = 0.95
# A row longer than the config's is planned with the MLP in chunks of so many tokens.
LONG_ROWS_CHUNK = 16384


def table(
  config: ExperimentConfig, planned: plan.Planner, device: plan.Device, host_memory: float
) -> list[dict[str, Any]]:
  """A row a policy: bytes and seconds by part, and what fits; None for a time that is not known."""
  step = step_of(config)
  available = USABLE * device.memory
  chunk = config.model.mlp_chunk or LONG_ROWS_CHUNK
  rows = []
  for policy in planned.policies(device):
    each = dataclasses.replace(step, remat=policy)
    one_row = dataclasses.replace(each, batch_size=1, mlp_chunk=chunk)
    memory, seconds = planned.memory(each), planned.seconds(each, device)
    rows.append(
      {
        "remat": policy,
        "bytes": dataclasses.asdict(memory),
        "peak_bytes": memory.total,
        "fits": planned.fits(each, available, host_memory),
        "seconds": {k: plan.known(v) for k, v in dataclasses.asdict(seconds).items()},
        "step_seconds": plan.known(seconds.total),
        "tokens_per_second": plan.known(step.accumulate_steps * step.tokens / seconds.total),
        "longest": planned.longest(one_row, available, host_memory),
        "largest_batch": planned.largest_batch(each, available, host_memory),
      }
    )
  return rows


def text(
  config: ExperimentConfig,
  planned: plan.Planner,
  name: str,
  device: plan.Device,
  host_memory: float,
  rows: Sequence[dict[str, Any]],
) -> str:
  """`rows`, those of `table`, to be read."""
  step = step_of(config)
  base, adapters = planned.memory(step).base, planned.adapter_bytes
  passes = f"{step.accumulate_steps} × " if step.accumulate_steps > 1 else ""
  lines = [
    f"{passes}{step.batch_size} × {step.seq_len} tokens a step, {name}: "
    f"{device.memory / 1e9:.0f} GB, of which {100 * USABLE:.0f}% are planned with; "
    f"{host_memory / 1e9:.0f} GB of the host's",
    "",
    f"{'remat':14}{'peak GB':>9}{'kept':>8}{'working':>9}{'host':>8}  {'fits':6}{'tokens/s':>9}"
    f"{'step s':>9}{'longest row':>13}{'largest batch':>15}",
  ]
  for row in rows:
    parts, speed, seconds = row["bytes"], row["tokens_per_second"], row["step_seconds"]
    times = f"{'-':>9}{'-':>9}" if seconds is None else f"{speed:9,.0f}{seconds:9.3f}"
    lines.append(
      f"{row['remat']:14}{row['peak_bytes'] / 1e9:9.2f}{parts['kept'] / 1e9:8.2f}"
      f"{parts['working'] / 1e9:9.2f}{parts['host'] / 1e9:8.2f}  "
      f"{'yes' if row['fits'] else 'no':6}{times}{row['longest']:13,}{row['largest_batch']:15,}"
    )
  fastest = planned.fastest(step, device, USABLE * device.memory, host_memory)
  lines += [
    "",
    f"base {base / 1e9:.2f} GB, adapters {adapters / 1e9:.3f} GB (as much on disk), optimizer "
    f"{planned.memory(step).optimizer / 1e9:.3f} GB, gradients "
    f"{planned.memory(step).gradients / 1e9:.3f} GB",
    f"longest row: of one, its MLPs in chunks of {config.model.mlp_chunk or LONG_ROWS_CHUNK}",
  ]
  seconds = next((row["step_seconds"] for row in rows if row["remat"] == fastest), None)
  if fastest is None:
    lines.append(f"no policy fits in {USABLE * device.memory / 1e9:.1f} GB")
  elif seconds is None:
    lines.append(f"fastest that fits: {fastest}")
  else:
    total = config.train.steps * seconds
    lines.append(
      f"fastest that fits: {fastest}; {config.train.steps} steps take {_duration(total)}, without "
      "loading, compiling and evaluating"
    )
  if config.model.unroll:
    lines.append("model.unroll: bytes and times are those of a loop over the layers")
  if config.train.compare_16bit:
    lines.append(
      "train.compare_16bit trains on the base in 16 bits as well, which is not counted: plan that "
      "with --config.model.quantize=False --config.train.compare_16bit=False"
    )
  peak = evaluation(planned, config).total
  lines.append(
    f"evaluating {config.train.eval_batch_size} rows at a time takes {peak / 1e9:.2f} GB"
  )
  how = planned.attention(step)
  if planned.config.num_experts:
    lines.append("no step of experts was measured: bytes are the compiler's, times a guess")
  elif how != "cudnn":
    lines.append(f"attention is {how} here, and was cuDNN's where steps were measured: times guess")
  if rows[0]["step_seconds"] is None:
    lines.append(
      f"no time is said: the optimizer's state (optimizer.state) crosses {name}'s link to the "
      "host, whose speed is not known"
    )
  elif rows[0]["step_seconds"] < 0.01:
    lines.append("a step so short takes as long as launching it does, which is not counted here")
  if name != "h100":
    lines.append("the model's constants were fitted on an H100 alone: times here are less sure")
  return "\n".join(lines)


def _duration(seconds: float) -> str:
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes:02} min" if seconds >= 60 else f"{seconds:.1f} s"


def fitted(rows: Sequence[dict[str, Any]]) -> tuple[plan.Constants, list[dict[str, Any]]]:
  """Constants fitted on the rows of a benchmark that are even in order, and each row's errors.

  Args:
    rows: as `experiments.bench.train_step --out` writes them; those that failed are left out.
  """
  from experiments.bench import train_step

  measured: list[tuple[str, plan.Measured]] = []
  for entry in rows:
    found = entry["ours"]
    if "error" in found:
      continue
    row = train_step.Row.parse(entry["row"])
    if row.unroll:
      raise ValueError(f"{entry['row']}: the plan counts a loop over the layers; leave the row out")
    step = train_step.plan_step(row)
    device = train_step.planned_device(found["device"])
    if device is None:
      raise ValueError(f"{entry['row']}: device {found['device']!r}; no data sheet in plan.DEVICES")
    planned = train_step.planner(row).on(device.capability)
    # The step's own: a process's peak may be that of making its base.
    state = sum(getattr(planned.memory(step), part) for part in ("adapters", "optimizer"))
    peak = found["base_bytes"] + state + found["temporary_bytes"]
    seconds = statistics.median(found["step_seconds"])
    measured.append((entry["row"], plan.Measured(planned, step, device, peak, seconds)))
  constants = plan.fit(each for _, each in measured[::2])
  errors = []
  for i, (name, each) in enumerate(measured):
    planned = each.planner.with_constants(constants)
    errors.append(
      {
        "row": name,
        "fitted": i % 2 == 0,
        "peak_error": planned.memory(each.step).total / each.peak - 1,
        "step_error": planned.seconds(each.step, each.device).total / each.seconds - 1,
      }
    )
  return constants, errors


class _Parser(argparse.ArgumentParser):
  """Raises what is wrong, as one line."""

  def error(self, message: str) -> NoReturn:
    raise ValueError(re.sub(r"^argument (--\w+): ", r"\1: ", message))


def _parser() -> argparse.ArgumentParser:
  def positive(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      value = math.nan
    if not 0 < value < math.inf:
      raise argparse.ArgumentTypeError(f"{text!r}; a number above 0")
    return value

  def one_of(known: Mapping[str, Any]) -> Callable[[str], str]:
    def read(text: str) -> str:
      if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r}; one of {', '.join(known)}")
      return text

    return read

  def file(text: str) -> Path:
    if not text or Path(text).is_dir():
      raise argparse.ArgumentTypeError(f"{text!r}; the name of a file")
    return Path(text)

  parser = _Parser(
    prog="python -m experiments.plan",
    description=__doc__,
    epilog="any field of the config as --config.FIELD=VALUE: python -m experiments.run --help",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--config", help="a Python file with get_config()")
  parser.add_argument("--index", type=int, help="of a config with sweep(): the trial to plan")
  parser.add_argument(
    "--device", default="h100", type=one_of(plan.DEVICES), help=", ".join(plan.DEVICES)
  )
  parser.add_argument("--memory_gb", type=positive, help="in place of the device's")
  parser.add_argument("--host_memory_gb", type=positive, default=128.0, help="128")
  parser.add_argument("--model", type=one_of(SHAPES), help=", ".join(SHAPES))
  parser.add_argument("--fit", type=file, help="what experiments.bench.train_step --out wrote")
  parser.add_argument(
    "--json", type=file, help="writes the table, or --fit's errors, there as well"
  )
  return parser


def _known(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
  """Raises ValueError for a flag that is neither a plan's nor a field of the config."""
  own = [name for action in parser._actions for name in action.option_strings]
  for word in words:
    name = word.split("=")[0]
    if not word.startswith("-"):
      raise ValueError(f"{word!r}: not a flag; flags are --name=value, and --help lists them")
    if not name.startswith(("--config.", "--noconfig.")):
      near = difflib.get_close_matches(name, own, n=1)
      # `--lora.rank=8`, where `--config.lora.rank=8` is right
      near = near or [f"--config.{path}" for path in config_lib.fields() if name == f"--{path}"]
      meant = f"did you mean {near[0]}?" if near else "--help lists what there is"
      raise ValueError(f"{name}: no such flag; {meant}")


def _config(own: argparse.Namespace, overrides: Sequence[str]) -> tuple[ExperimentConfig, bool]:
  """What is planned, and whether a sweep's trials may differ from it."""
  words = [] if own.config is None else [f"--config={own.config}"]
  words += [] if own.index is None else [f"--index={own.index}"]
  arguments = command_line.parse([*words, *overrides])
  if arguments.trials is not None and own.index is not None:
    return arguments.trials[own.index].config, False
  return arguments.config, arguments.trials is not None


def _fit(own: argparse.Namespace) -> None:
  constants, errors = fitted(_measured(own.fit))
  print(constants)
  for each in errors:
    print(
      f"{each['row']:40}{'fitted' if each['fitted'] else 'checked':8} "
      f"memory {100 * each['peak_error']:+5.1f}%  time {100 * each['step_error']:+5.1f}%"
    )
  if own.json is not None:
    own.json.write_text(
      json.dumps({"constants": dataclasses.asdict(constants), "rows": errors}, indent=1)
    )


def _measured(path: Path) -> list[dict[str, Any]]:
  """A benchmark's rows, as far as it can be told that they are."""
  try:
    rows = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: no JSON: {error}") from None
  needed = {"base_bytes", "temporary_bytes", "step_seconds", "device"}
  for row in rows if isinstance(rows, list) else [rows]:
    if not isinstance(row, dict) or not isinstance(row.get("row"), str):
      raise ValueError(f"{path}: not what experiments.bench.train_step --out writes: {row!r:.60}")
    ours = row.get("ours")
    if not isinstance(ours, dict) or not ("error" in ours or needed <= ours.keys()):
      raise ValueError(
        f"{path}: {row['row']}: its measures lack some of {', '.join(sorted(needed))}"
      )
  return rows if isinstance(rows, list) else [rows]


def main(argv: Sequence[str]) -> int:
  """Prints the plan that `argv` asks for; 2 for what the user can mend."""
  parser = _parser()
  # Nothing is computed: the accelerator is left to whoever is using it.
  jax.config.update("jax_platforms", "cpu")
  try:
    # A value that stands apart (`--config.lora.rank 8`) is joined: a stray word is then known.
    own, rest = parser.parse_known_args(_joined(argv))
    _known(parser, rest)
    if own.json is not None and not own.json.parent.is_dir():
      raise ValueError(f"--json: {own.json}; there is no directory {own.json.parent}")
    if own.fit is not None:
      given = {word.split("=")[0] for word in _joined(argv)} - {"--fit", "--json"}
      if given:
        raise ValueError(f"--fit: with {min(given)}; it plans nothing, so give it --json alone")
      _fit(own)
      return 0
    device = plan.DEVICES[own.device]
    if own.memory_gb is not None:
      device = dataclasses.replace(device, memory=1e9 * own.memory_gb)
    config, differs = _config(own, rest)
    planned = planner(config, SHAPES[own.model] if own.model else None, device)
    host_memory = 1e9 * own.host_memory_gb
    rows = table(config, planned, device, host_memory)
    print(text(config, planned, own.device, device, host_memory, rows))
    if differs:
      print("the config has a sweep(): its trials may differ from this; --index=N plans one")
    if own.json is not None:
      own.json.write_text(json.dumps(rows, indent=1))
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _joined(argv: Sequence[str]) -> list[str]:
  """`argv` with `--name value` as `--name=value`."""
  words: list[str] = []
  for word in argv:
    if words and not word.startswith("-") and words[-1].startswith("--") and "=" not in words[-1]:
      words[-1] += f"={word}"
    else:
      words.append(word)
  return words


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

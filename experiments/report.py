"""What a sweep found, on one page: HTML, Markdown, CSV and JSON, written into its directory.

  python -m experiments.report runs/ablate
  python -m experiments.report --compare runs/a runs/b

The page stands alone: figures and style are in it, it needs no network, and follows the reader's
light or dark theme. It may be made at any time; a sweep in progress, or one with broken trials, is
reported as it stands. What is behind each number is in experiments/sweep_results.py.

`--compare` pairs the trials of two sweeps and writes `compare-A.html`, `.md` and `.json`, of which
A is the first directory's name, into the second one.
"""

import argparse
import collections
import csv
import dataclasses
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, report_sections, sweep_results
from experiments.report_page import Plot, Section, Table, to_html, to_markdown
from experiments.report_sections import Findings
from experiments.sweep_results import Comparison, ReportError, show
from qlora_jax.metrics import write_whole


def to_csv(findings: Findings) -> str:
  """A row a trial, whatever became of it; a column an overridden field."""
  sweep = findings.sweep
  paths = list(dict.fromkeys(path for each in sweep.trials for path in each.overrides))
  stage = (
    "loss_before",
    "loss_after",
    "bits",
    "base_bytes",
    "adapter_bytes",
    "optimizer_bytes",
    "trained_parameters",
  )
  text = io.StringIO()
  rows = csv.writer(text, lineterminator="\n")
  rows.writerow(["index", "id", "status", "setting", "base", *paths, *stage, "kl_after", "note"])
  for each in sweep.trials:
    kl = None if each.after is None else each.after.kl
    values = (each.config.get(path, each.overrides.get(path)) for path in paths)
    rows.writerow(
      [
        each.index,
        each.id,
        each.status,
        each.setting,
        each.base,
        *(show(value) if isinstance(value, tuple) else value for value in values),
        *(each.stage.get(name) for name in stage),
        None if kl is None or each.after is None else kl.sum() / each.after.targets.sum(),
        each.note,
      ]
    )
  return text.getvalue()


def to_json(findings: Findings) -> str:
  """Every number of the page, in full."""
  sweep = findings.sweep

  def comparison(each: Comparison) -> dict[str, Any]:
    return {**dataclasses.asdict(each), "verdict": each.verdict}

  frontier = {each.number for each in findings.frontier()}
  counts = collections.Counter(each.status for each in sweep.trials)
  found = {
    "sweep": sweep.name,
    "trials": dict(counts),
    "problems": sweep.problems,
    "factors": sweep.factors,
    "settings": [
      {
        "number": each.number,
        "values": each.values,
        "trials": report_sections.ids([each]),
        "seeds": list(each.trials),
        "base": each.first.base,
        "bytes": findings.bytes(each),
        "on_frontier": each.number in frontier,
        "loss_after": findings.loss[each.number],
        "kl_before": findings.kl_before(each),
        "kl_after": findings.kl[each.number],
        "recovery": findings.recovery.get(each.number),
      }
      for each in sweep.settings
    ],
    "against_16bit": [comparison(each) for each in findings.against_16bit],
    "codebooks_against_16bit": [comparison(each) for each in findings.codebooks],
    "by_factor": [
      {
        "field": each.field,
        "along": each.along,
        "reason": each.reason,
        "comparisons": [comparison(one) for one in each.comparisons],
      }
      for each in findings.by_factor
    ],
    "correlations": [
      {
        "where": each.where,
        "settings": [one.number for one in each.settings],
        "rho": each.rho,
        "p": each.p,
        "corrected": each.corrected,
      }
      for each in findings.correlations
    ],
    "bases": {
      id: {**each.found, "weight_error": each.weight_error} for id, each in sweep.bases.items()
    },
  }
  return _dump(found)


def _dump(value: Any) -> str:
  def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
      return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
      return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
      return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

  return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def write(path: Path) -> list[Path]:
  """Makes the report of the sweep in `path`.

  Returns:
    The files: report.html, report.md, trials.csv, report.json. Each is replaced as a whole.

  Raises:
    ReportError: no sweep there.
    ImportError: Matplotlib is not installed.
    OSError: the directory cannot be written.
  """
  figures.require()
  findings = Findings(sweep_results.read(path))
  content = report_sections.sections(findings)
  title = f"{findings.sweep.name}: what the sweep found"
  return _write(
    path,
    {
      "report.html": to_html(title, content),
      "report.md": to_markdown(title, content),
      "trials.csv": to_csv(findings),
      "report.json": to_json(findings),
    },
  )


def _write(path: Path, files: dict[str, str]) -> list[Path]:
  for name, text in files.items():
    write_whole(path / name, text)
  return [path / name for name in files]


def compare(first: Path, second: Path) -> list[Path]:
  """Compares two sweeps; the files go into the second one's directory.

  Raises:
    ReportError: no sweep there, or no two trials match.
    ImportError, OSError: as `write`.
  """
  figures.require()
  pool: dict[bytes, np.ndarray] = {}
  sweeps = [sweep_results.read(path, pool) for path in (first, second)]
  matched = sweep_results.match(*sweeps)
  of_a, of_b = matched.unmatched
  apart = [[field, show(a), show(b)] for field, (a, b) in matched.apart.items()]
  blocks: list[str | Table | Plot] = [
    f"A is {first}, B is {second}. Compared are trials whose resolved configs agree but for the "
    "fields below, each of which has one value throughout A and another throughout B. Settings "
    f"without a counterpart: {of_a} of A, {of_b} of B; the same in both, and so not compared: "
    f"{matched.same}.",
    Table(("field", "A", "B"), apart) if apart else "No field tells A and B apart throughout.",
    report_sections.HOW,
  ]
  if matched.overall is not None:
    blocks += ["Over all matched settings:", report_sections.comparison_table([matched.overall])]
  blocks += [
    report_sections.comparison_plot(
      matched.comparisons, "B less A, by setting. Filled: told apart."
    ),
    report_sections.comparison_table(matched.comparisons),
  ]
  content = [Section("comparisons", "Paired differences", blocks)]
  listed: set[str] = set()
  for i, sweep in enumerate(sweeps):
    table = report_sections.trials_table(sweep, listed)
    content.append(dataclasses.replace(table, id=f"trials-{i}", title=f"Trials of {sweep.path}"))
    listed |= {each.id for each in sweep.trials[: report_sections.TRIAL_ROWS]}
  title = f"{second.resolve().name} (B) less {first.resolve().name} (A)"
  name = f"compare-{first.resolve().name}"
  return _write(
    second,
    {
      f"{name}.html": to_html(title, content),
      f"{name}.md": to_markdown(title, content),
      f"{name}.json": _dump(
        {
          **dataclasses.asdict(matched),
          "verdicts": [each.verdict for each in matched.comparisons],
        }
      ),
    },
  )


def main(argv: Sequence[str]) -> int:
  """Makes the report that `argv`, the arguments without the program's name, asks for.

  Returns:
    The exit status: 0, or 2 for what the user can mend.
  """
  parser = argparse.ArgumentParser(
    prog="python -m experiments.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("workdir", type=Path, nargs="?", help="of a sweep")
  parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="of two sweeps")
  arguments = parser.parse_args(argv)
  if (arguments.workdir is None) == (arguments.compare is None):
    parser.error("give a WORKDIR, or --compare A B")
  try:
    files = compare(*arguments.compare) if arguments.compare else write(arguments.workdir)
  except (ReportError, ImportError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print("\n".join(f"{each}: written" for each in files))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

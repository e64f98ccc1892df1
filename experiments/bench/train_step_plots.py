"""Figures of what `experiments.bench.train_step --out` wrote.

speed-MODEL.svg   tokens a second against the length of a row, a line a policy
memory.svg        each row's peak by part, as the plan has it; what was measured stands in its name
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import figures

_PARTS = ("base", "adapters", "optimizer", "gradients", "kept", "working")


def draw(results: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
  """Writes the figures of the rows that ran.

  Args:
    results: the benchmark's JSON.
    directory: made where it is missing.

  Returns:
    The files; of rows on a device without a data sheet, those of speed alone.

  Raises:
    ImportError: Matplotlib is missing.
    ValueError: no row ran.
  """
  figures.require()
  found = [(entry["row"], entry["ours"]) for entry in results if "error" not in entry["ours"]]
  if not found:
    raise ValueError("no row ran: there is nothing to draw")
  directory.mkdir(parents=True, exist_ok=True)
  drawn = {f"speed-{name}": svg for name, svg in _speeds(found).items()}
  if planned := [(name, ours) for name, ours in found if ours.get("plan")]:
    drawn["memory"] = _memory(planned)
  for name, svg in drawn.items():
    (directory / f"{name}.svg").write_text(svg)
  return [directory / f"{name}.svg" for name in drawn]


def _speeds(rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, str]:
  """By model."""
  found: dict[str, dict[str, list[tuple[int, float]]]] = {}
  for name, ours in rows:
    model, shape, *rest = name.split(":")
    length = int(shape.split("x")[1])
    points = found.setdefault(model, {}).setdefault(" ".join(rest), [])
    points.append((length, ours["tokens_per_second"]))
  device = rows[0][1]["device"]
  svgs = {}
  for model, lines in found.items():
    series = []
    for label, points in list(lines.items())[: figures.MOST_SERIES]:
      lengths, speeds = zip(*sorted(points), strict=True)
      series.append((label, lengths, speeds, None))
    x, y = f"tokens of a row ({model}, {device})", "tokens a second"
    svgs[model] = figures.lines(series, x, y, log_x=True)
  return svgs


def _memory(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
  names = [f"{name} ({ours['step_bytes'] / 1e9:.2f} measured)" for name, ours in rows]
  parts = [(part, [ours["plan"]["bytes"][part] / 1e9 for _, ours in rows]) for part in _PARTS]
  return figures.stacked(names, parts, f"GB ({rows[0][1]['device']})")

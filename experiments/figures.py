"""The report's figures: SVG texts, transparent, that take the page's own colour for ink.

Matplotlib writes ink in a colour that nothing else has; it becomes `currentColor`, so that one
figure serves a light page and a dark one. Lines and points have middling colours, seen on both.
Text stays text. Points link to the page's anchors where an address is given.
"""

import io
import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_INK = "#010203"
_COLOURS = ("#3a86c8", "#d9752b", "#2f9e6e", "#c2569b", "#8a79e0", "#a98a1d", "#d64a4a", "#4a9ea6")
_MARKERS = "osD^vPX*"

LONGEST = 46  # characters of a name in a figure

# Series that are told apart in one figure.
MOST_SERIES = len(_COLOURS)

_STYLE: Any = {
  "svg.fonttype": "none",
  "svg.hashsalt": "qlora_jax",
  "font.family": "sans-serif",
  "font.size": 9.5,
  "axes.titlesize": 9.5,
  "axes.labelsize": 9.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "legend.frameon": False,
  "legend.fontsize": 8.5,
  **dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
  ),
}


def require() -> None:
  """Raises ImportError, with how to install it, where Matplotlib is missing."""
  try:
    import matplotlib  # noqa: F401
  except ImportError:
    raise ImportError(
      "the report draws with Matplotlib, which is not installed: pip install 'qlora_jax[report]'"
    ) from None


def _svg(figure: "Figure") -> str:
  text = io.StringIO()
  figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
  svg = text.getvalue()
  svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
  # Every figure names its parts alike, and on a page a name stands once.
  own, prefix = set(re.findall(r' id="([^"]+)"', svg)), f"f{zlib.crc32(svg.encode()):08x}-"
  return re.sub(
    r'( id="| xlink:href="#|url\(#)([^")]+)',
    lambda found: found[1] + (prefix if found[2] in own else "") + found[2],
    svg,
  )


def _figure(height: float = 3.0, columns: int = 1, rows: int = 1, **rest: Any):
  from matplotlib.figure import Figure

  # What sticks out of a single pair of axes, the legend or long names, makes the figure larger.
  layout = "constrained" if columns * rows > 1 else None
  figure = Figure(figsize=(4.8, height), layout=layout)
  return figure, figure.subplots(rows, columns, squeeze=False, **rest)


def _styled(draw):
  """Of a function that draws: its figure's settings hold for it alone."""

  def drawn(*args: Any, **keywords: Any) -> str:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
      return _svg(draw(*args, **keywords))

  drawn.__doc__ = draw.__doc__
  return drawn


def _legend(axes, names: Sequence[str]) -> None:
  if len(names) > 1:
    short = len(names) > 3 and max(map(len, names)) < 30
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2 if short else 1)


def _cut(name: str) -> str:
  """A name that leaves the figure its room."""
  return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


@_styled
def lines(
  series: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float] | None]],
  x: str,
  y: str,
  *,
  levels: Sequence[float | None] = (),
  log_x: bool = False,
  log_y: bool = False,
  ticks: Sequence[Any] | None = None,
) -> "Figure":
  """Lines of (name, x, y, standard errors or None).

  Args:
    levels: of each series a dashed horizontal line, or None.
    ticks: labels in place of the numbers 0, 1, 2, … of x.
  """
  figure, ((axes,),) = _figure(3.2)
  for i, (name, xs, ys, errors) in enumerate(series):
    style = {"color": _COLOURS[i], "marker": _MARKERS[i], "markersize": 4, "label": _cut(name)}
    if errors is None:
      axes.plot(xs, ys, linewidth=1.3, **style)
    else:
      axes.errorbar(xs, ys, yerr=errors, linewidth=1.3, capsize=2.5, **style)
  for i, level in enumerate(levels):
    if level is not None:
      axes.axhline(level, color=_COLOURS[i], linestyle="--", linewidth=1)
  if log_y:
    axes.set_yscale("log")
  if log_x:
    axes.set_xscale("log", base=2)
    values = sorted({each for _, xs, _, _ in series for each in xs})
    axes.set_xticks(values, [f"{each:g}" for each in values])
  if ticks is not None:
    axes.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=6.5)
  axes.set(xlabel=x, ylabel=y)
  if log_x or ticks is None:
    _legend(axes, [name for name, *_ in series])
  else:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
  return figure


@_styled
def points(
  groups: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[str]]],
  x: str,
  y: str,
  *,
  frontier: Sequence[tuple[float, float]] = (),
  errors: Sequence[Sequence[float]] | None = None,
  level: float | None = None,
  log_x: bool = False,
) -> "Figure":
  """Points of (name, x, y, addresses), each a link.

  Args:
    frontier: corners of a line of steps.
    errors: of each group, standard errors of y.
    level: a dashed horizontal line.
    log_x: a logarithmic axis, where x spans more than a factor of ten.
  """
  figure, ((axes,),) = _figure(3.2)
  for i, (name, xs, ys, addresses) in enumerate(groups):
    if errors is not None:
      axes.errorbar(
        xs, ys, yerr=errors[i], fmt="none", ecolor=_COLOURS[i], elinewidth=0.8, alpha=0.6
      )
    drawn = axes.scatter(
      xs, ys, s=22, color=_COLOURS[i], marker=_MARKERS[i], label=_cut(name), alpha=0.85, zorder=3
    )
    drawn.set_urls(list(addresses))
  if frontier:
    axes.step(*zip(*frontier, strict=True), where="post", color=_INK, linewidth=1, linestyle=":")
  if level is not None:
    axes.axhline(level, color=_INK, linestyle="--", linewidth=0.8)
  every = [each for _, xs, _, _ in groups for each in xs]
  if log_x and max(every) > 10 * min(every) > 0:
    axes.set_xscale("log")
  axes.set(xlabel=x, ylabel=y)
  _legend(axes, [name for name, *_ in groups])
  return figure


@_styled
def heatmaps(
  maps: Sequence[tuple[str, np.ndarray]],
  rows: Sequence[str],
  columns: Sequence[str],
  x: str,
  y: str,
) -> "Figure":
  """Maps of (title, `[rows, columns]` with nan where nothing is), on one scale, values written."""
  import matplotlib

  across = 1 if len(columns) > 4 else min(2, len(maps))
  down = -(-len(maps) // across)
  figure, grid = _figure(down * (0.75 + 0.27 * len(rows)), across, down)
  known = np.concatenate([each[np.isfinite(each)] for _, each in maps])
  low, high = float(known.min()), float(known.max())
  high = high if high > low else low + 1
  colours = matplotlib.colormaps["viridis_r"]
  for axes, (title, values) in zip(grid.flat, maps, strict=False):
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high)
    axes.set_title(title)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0)
    if max(map(len, columns)) > 5:
      axes.tick_params(axis="x", rotation=35)
    for (i, j), value in np.ndenumerate(values):
      if np.isfinite(value):
        red, green, blue, _ = colours((value - low) / (high - low))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        axes.text(
          j + 0.5,
          i + 0.5,
          f"{value:.3f}",
          ha="center",
          va="center",
          fontsize=8,
          color="white" if dark else "black",
        )
  for axes in grid.flat[len(maps) :]:
    axes.set_axis_off()
  figure.supxlabel(x, fontsize=9.5, color=_INK)
  figure.supylabel(y, fontsize=9.5, color=_INK)
  return figure


@_styled
def histograms(bars: Sequence[tuple[str, Sequence[float]]], x: str, y: str) -> "Figure":
  """Small bar charts of (title, heights)."""
  down = -(-len(bars) // 2)
  figure, grid = _figure(0.5 + 1.4 * down, min(2, len(bars)), down, sharey=True)
  for axes, (title, heights) in zip(grid.flat, bars, strict=False):
    axes.bar(range(len(heights)), heights, color=_COLOURS[0], width=0.85)
    axes.set_title(title, fontsize=8)
  for axes in grid.flat[len(bars) :]:
    axes.set_axis_off()
  figure.supxlabel(x, fontsize=9.5, color=_INK)
  figure.supylabel(y, fontsize=9.5, color=_INK)
  return figure


@_styled
def stacked(names: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], x: str) -> "Figure":
  """Horizontal bars of parts (name, length in each bar)."""
  figure, ((axes,),) = _figure(1.1 + 0.26 * len(names))
  left = np.zeros(len(names))
  for i, (name, lengths) in enumerate(parts):
    axes.barh(names, lengths, left=left, color=_COLOURS[i], label=name, height=0.7)
    left += lengths
  axes.invert_yaxis()
  axes.set_xlabel(x)
  axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
  return figure


@_styled
def intervals(
  rows: Sequence[tuple[str, float, tuple[float, float] | None, bool, str]], x: str
) -> "Figure":
  """Values and intervals of (name, value, interval, seen, address); what is not seen is hollow."""
  figure, ((axes,),) = _figure(0.8 + 0.24 * len(rows))
  for i, (_, value, interval, seen, address) in enumerate(rows):
    if interval is not None:
      axes.plot(interval, (i, i), color=_COLOURS[0], linewidth=1.6)
    face = _COLOURS[0] if seen else "none"
    drawn = axes.scatter([value], [i], s=26, facecolor=face, edgecolor=_COLOURS[0], zorder=3)
    drawn.set_urls([address])
  axes.axvline(0, color=_INK, linewidth=0.8, linestyle="--")
  axes.set_yticks(range(len(rows)), [_cut(name) for name, *_ in rows], fontsize=8)
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.set_xlabel(x)
  return figure

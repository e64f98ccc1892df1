"""What the report says of a sweep: its sections, each of paragraphs, figures and tables."""

import collections
import math
import re
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np

from experiments import figures, statistics, sweep_results
from experiments.report_page import ROWS, Ids, Plot, Section, Table, counted
from experiments.sweep_results import Comparison, Setting, Sweep, Trial, show

# Rows of the table of trials, points and bars of a figure: no more are shown.
TRIAL_ROWS, _POINTS, _BARS = 1000, 1000, 30

# Trials in a sentence.
_NAMED = 12

# The paper's block size: where a figure holds a few of many bases, those with it come first.
_BLOCK_SIZE = 64

_RANK, _BLOCK, _CODEBOOK = "lora.rank", "quantization.block_size", "quantization.codebook"


class Findings:
  """Of a sweep, what several sections and files use, computed once."""

  def __init__(self, sweep: Sweep):
    self.sweep = sweep
    self.loss = {each.number: sweep_results.loss_after(each) for each in sweep.settings}
    self.kl = {each.number: sweep_results.kl_after(each) for each in sweep.settings}
    self.full = sweep_results.of_16bit(sweep)
    self.recovery = {
      each.number: sweep_results.recovery(
        each, sweep.bases.get(each.first.base), self.full.get(each.number, {})
      )
      for each in sweep.settings
      if each.first.quantized
    }
    self.against_16bit = sweep_results.against_16bit(
      sweep, self.full, lambda setting: setting.label
    )
    # Over block sizes, ranks and all else: few comparisons, of many trials each.
    self.codebooks = sweep_results.against_16bit(sweep, self.full, _codebook)
    self.by_factor = sweep_results.by_factor(sweep)
    self.correlations = sweep_results.correlations(sweep)
    # By loss, the best first: tables and figures that are cut lose the worst.
    self.ordered = sorted(sweep.settings, key=lambda each: self.loss[each.number].value)
    self.shown = {each.number for each in self.ordered[:ROWS]}

  def bytes(self, setting: Setting) -> int:
    """Of base and adapter."""
    stage = setting.first.stage
    return stage["base_bytes"] + stage["adapter_bytes"]

  def kl_before(self, setting: Setting) -> float | None:
    """Of the untrained base, nats a target."""
    base = self.sweep.bases.get(setting.first.base)
    if base is None or base.before.kl is None:
      return None
    return float(base.before.kl.sum() / base.before.targets.sum())

  def address(self, setting: Setting) -> str:
    """Of the setting's row, or of the table where the row is cut."""
    return f"#s-{setting.number}" if setting.number in self.shown else "#settings"

  def frontier(self) -> list[Setting]:
    """By rising bytes, those that no other beats in both bytes and loss."""
    settings = self.ordered
    chosen = statistics.pareto(
      [self.bytes(each) for each in settings], [self.loss[each.number].value for each in settings]
    )
    return [settings[i] for i in chosen]


def _codebook(setting: Setting) -> str:
  """`nf4`; `nf4, pissa`: what an initialization does is told apart from what a codebook does."""
  config = setting.first.config
  plain = config["lora.init"] == "lora"
  return config[_CODEBOOK] if plain else f"{config[_CODEBOOK]}, {config['lora.init']}"


def ids(settings: Iterable[Setting]) -> list[str]:
  """Of their trials."""
  return [trial.id for each in settings for trial in each.trials.values()]


def _number(value: float | None, digits: int = 4) -> str:
  return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _with_error(ratio: statistics.Ratio | None, digits: int = 4) -> str:
  if ratio is None:
    return "–"
  return f"{_number(ratio.value, digits)} ± {_number(ratio.error, digits)}"


def _shares(count: int, total: int, what: str) -> str:
  return "" if count >= total else f" {count:,} of {total:,} {what} are shown."


def sections(findings: Findings) -> list[Section]:
  """The page, in order."""
  sweep = findings.sweep
  found = [_state(sweep)]
  if sweep.settings:
    found += [
      _losses(findings),
      _comparisons(findings),
      _pareto(findings),
      _factors(findings),
    ]
  if any(each.found["quantization"] for each in sweep.bases.values()):
    found += [_weights(sweep), _correlation(findings)]
  return [*found, trials_table(sweep)]


def _state(sweep: Sweep) -> Section:
  counts = collections.Counter(each.status for each in sweep.trials)
  told = ", ".join(f"{count:,} {status}" for status, count in counts.items())
  seeds = sorted({each.seed for each in sweep.finished})
  blocks: list[str | Table | Plot] = [
    f"{counted(len(sweep.trials), 'trial')}: {told}. Seeds: {seeds}."
  ]
  if counts["finished"] < len(sweep.trials):
    blocks.append("Not all trials are finished: what follows is of those that are.")
  if len(seeds) == 1:
    blocks.append(
      "All finished trials have one seed, so nothing is known of the scatter between seeds: there "
      "are no intervals and no tests, and standard errors are of the held-out text alone."
    )
  environments = {each.environment for each in sweep.finished}
  if len(environments) > 1:
    blocks.append(
      f"The trials come from {len(environments)} environments (devices, versions, commits): see "
      "each trial's summary.json."
    )
  blocks += sweep.problems
  worse = [
    each.id for each in sweep.finished if each.stage["loss_after"] > each.stage["loss_before"]
  ]
  if worse:
    more = f" and {len(worse) - _NAMED:,} more" if len(worse) > _NAMED else ""
    blocks.append(
      f"{counted(len(worse), 'finished trial')} ended with a higher held-out loss than before "
      "training (thrown off rather than trained), which counts in all that follows: "
      f"{', '.join(worse[:_NAMED])}{more}."
    )
  if counts["stopped"]:
    blocks.append(
      f"{counted(counts['stopped'], 'trial')} {'was' if counts['stopped'] == 1 else 'were'} "
      "stopped early by successive halving, in none of the tables and figures below but this one: "
      "those that ran to their end were chosen by their "
      "held-out loss, so what is said of them is said of the best."
    )
  bad = [each for each in sweep.trials if each.status in ("failed", "broken", "stopped", "begun")]
  if bad:
    rows = [[Ids([each.id]), each.status, _label(each), each.note] for each in bad]
    headers = ("trial", "status", "overrides", "error, or how far it is")
    blocks.append(Table(headers, rows, whole="trials.csv"))
  return Section("state", "The sweep", blocks)


def _label(trial: Trial) -> str:
  return ", ".join(f"{path}={value}" for path, value in trial.overrides.items())


def _losses(findings: Findings) -> Section:
  rows = []
  for each in findings.ordered:
    before = [trial.stage["loss_before"] for trial in each.trials.values()]
    recovery = findings.recovery.get(each.number)
    rows.append(
      [
        *map(show, each.values.values()),
        str(len(each.trials)),
        _number(float(np.mean(before))),
        _with_error(findings.loss[each.number]),
        _number(findings.kl_before(each)),
        _with_error(findings.kl[each.number]),
        "" if recovery is None else recovery.reason or _with_error(recovery.ratio, 3),
        f"{findings.bytes(each) / 1e6:,.3f}",
        Ids(ids([each])),
      ]
    )
  headers = [
    *findings.sweep.factors,
    "seeds",
    "loss before",
    "loss after",
    "KL before",
    "KL after",
    "recovery",
    "MB",
    "trials",
  ]
  return Section(
    "settings",
    "Losses, before and after",
    [
      "A row is a setting: trials that differ in their seed alone; the best first. Loss is "
      "held-out cross entropy, KL is KL(16-bit base ‖ model), both in nats a token; ± is a "
      "standard error, of seeds and held-out text together. Before is the base as quantized (with "
      "what an initialization put into the adapters; KL before is without it). Recovery is "
      "(L_q − L_qlora) / (L_q − L_16bit-LoRA), "
      "L_q of the quantized base before training: 1 where QLoRA reaches 16-bit LoRA of the same "
      "seeds; blank where the denominator is under two standard errors. MB are of the base as "
      "stored and the float32 adapter.",
      Table(headers, rows, [f"s-{each.number}" for each in findings.ordered]),
    ],
  )


_COMPARED = ("first", "second", "difference", "95% interval", "p, Holm", "seeds", "settings")


def _compared(comparison: Comparison) -> list[str | Ids]:
  low_high, left = comparison.interval, comparison.left_out
  return [
    comparison.first,
    comparison.second,
    _with_error(comparison.difference),
    "–" if low_high is None else f"{low_high[0]:.4f} … {low_high[1]:.4f}",
    _p(comparison.corrected),
    str(comparison.difference.seeds),
    str(comparison.settings) + (f" ({counted(left, 'trial')} a side left out)" if left else ""),
    comparison.verdict,
    Ids(comparison.trials),
  ]


def _p(corrected: float | None) -> str:
  if corrected is None:
    return "–"
  # `statistics.LEAST_P` stands for all that is less.
  return f"{corrected:.2g}" if corrected > 1e-9 else "under 1e-9"


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
  """A row a comparison."""
  return Table([*_COMPARED, "verdict", "trials"], [_compared(each) for each in comparisons])


def comparison_plot(comparisons: Sequence[Comparison], caption: str, *, both: bool = False) -> Plot:
  """Differences with their intervals; the first ones, where there are many.

  Args:
    both: bars are named by the second as well.
  """
  kept = comparisons[:_BARS]
  names = told_apart([name for each in kept for name in (each.first, each.second)[: 1 + both]])
  svg = figures.intervals(
    [
      (
        " − ".join(names[name] for name in (each.first, each.second)[: 1 + both]),
        each.difference.value,
        each.interval,
        each.corrected is not None and each.corrected < sweep_results.ALPHA,
        "#comparisons",
      )
      for each in kept
    ],
    "difference of held-out loss, nats",
  )
  shown = _shares(len(kept), len(comparisons), "comparisons")
  trials = list(dict.fromkeys(id for each in kept for id in each.trials))
  return Plot(svg, caption + shown, trials)


HOW = (
  "Differences are first less second, trial by trial: same seed, same data, same held-out "
  "sequences; below 0 the first is better. An average is over settings that have the same seeds: "
  "what lacks one is left out. Intervals: 95%, percentile bootstrap over seeds and sequences; of "
  "few seeds they are too narrow, so the verdict rests on p: Student's t of the seeds and of the "
  "text, each with its own degrees of freedom, their squares added, so that at any level no more "
  "null differences than its share are called; corrected by Holm's method for all comparisons of "
  "its table, at 5%. “No difference seen” is no proof of equality, of three seeds least of all."
)


def _comparisons(findings: Findings) -> Section:
  blocks: list[str | Table | Plot] = [HOW]
  if findings.against_16bit:
    if len(findings.codebooks) < len(findings.against_16bit):
      blocks += [
        "QLoRA less 16-bit LoRA, by codebook, averaged over its settings (rows of other numbers of "
        "settings are of other settings, and are not to be compared with one another):",
        comparison_table(findings.codebooks),
      ]
    blocks += [
      "QLoRA less 16-bit LoRA, setting by setting:",
      comparison_plot(
        findings.against_16bit,
        "QLoRA less 16-bit LoRA, by setting. Filled: told apart.",
      ),
      comparison_table(findings.against_16bit),
    ]
  else:
    blocks.append("No finished 16-bit LoRA trial stands beside a QLoRA trial of the same fields.")
  every = [each for factor in findings.by_factor for each in factor.comparisons]
  if every:
    blocks += [
      "Values of a field, all else equal, averaged over the settings that have both:",
      comparison_plot(every, "Values of a field in pairs. Filled: told apart.", both=True),
      comparison_table(every),
    ]
  blocks += [f"{each.field}: {each.reason}." for each in findings.by_factor if each.reason]
  return Section("comparisons", "Paired differences", blocks)


def told_apart(labels: Iterable[str]) -> dict[str, str]:
  """Names as a figure has room for, by label: `short`.

  Where that is longer, without fields that another one tells: alpha and the learning rate, where
  each rank has its own.
  """
  labels = list(dict.fromkeys(labels))
  whole = {label: short(label) for label in labels}
  if all(len(name) <= figures.LONGEST for name in whole.values()):
    return whole
  rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
  for label in labels:
    # A value may have a comma too; a field's path has a point.
    parts = re.split(r", (?=\w+\.[\w.]+ |16 bits)", label)
    fields = tuple(part.partition(" ")[0] for part in parts)
    rows.setdefault(fields, {})[label] = parts
  found = {}
  for own in rows.values():
    columns = list(zip(*own.values(), strict=True))
    kept: list[int] = []
    for i, column in enumerate(columns):
      if not any(
        1 < len(set(columns[j])) == len(set(zip(columns[j], column, strict=True))) for j in kept
      ):
        kept.append(i)
    found |= {label: short(", ".join(parts[i] for i in kept)) for label, parts in own.items()}
  count = collections.Counter(found.values())
  return {label: name if count[name] == 1 else whole[label] for label, name in found.items()}


def short(label: str) -> str:
  """A label without the sections' names: `rank 8, codebook nf4`."""
  for section in ("lora.", "quantization.", "optimizer.", "train.", "model.", "data."):
    label = label.replace(section, "")
  return label


def _pareto(findings: Findings) -> Section:
  frontier = findings.frontier()
  kept = findings.ordered[:_POINTS]
  drawn = {each.number for each in kept}
  kept += [each for each in frontier if each.number not in drawn]
  groups: dict[str, list[Setting]] = collections.defaultdict(list)
  for each in kept:
    quantized = each.first.quantized
    groups[str(each.first.config[_CODEBOOK]) if quantized else "16 bits"].append(each)
  if len(groups) > figures.MOST_SERIES:
    groups = {"settings": kept}
  svg = figures.points(
    [
      (
        name,
        [findings.bytes(each) / 1e6 for each in settings],
        [findings.loss[each.number].value for each in settings],
        [findings.address(each) for each in settings],
      )
      for name, settings in groups.items()
    ],
    "base and adapter, MB",
    "held-out loss, nats",
    frontier=[(findings.bytes(each) / 1e6, findings.loss[each.number].value) for each in frontier],
    errors=[
      [_finite(findings.loss[each.number].error) for each in settings]
      for settings in groups.values()
    ],
  )
  rows = [
    [
      each.label,
      f"{findings.bytes(each) / 1e6:,.3f}",
      _with_error(findings.loss[each.number]),
      Ids(ids([each])),
    ]
    for each in frontier
  ]
  caption = (
    "Bytes against loss; dotted: the frontier, which nothing beats in both. Bars: ± one standard "
    "error; settings within each other's may change places with other seeds."
  )
  return Section(
    "pareto",
    "Bytes against loss",
    [
      Plot(svg, caption + _shares(len(kept), len(findings.ordered), "settings"), ids(kept)),
      Table(("on the frontier", "MB", "loss after", "trials"), rows),
    ],
  )


def _finite(value: float) -> float:
  return value if math.isfinite(value) else 0.0


def _factors(findings: Findings) -> Section:
  blocks: list[str | Table | Plot] = []
  for rows, by in ((_BLOCK, _CODEBOOK), (_CODEBOOK, _BLOCK)):
    blocks += _heatmaps(findings, rows, by)
  blocks += _against_rank(findings)
  if not blocks:
    blocks.append("Neither rank, block size nor codebook varies among the finished trials.")
  return Section("factors", "Rank, block size, codebook", blocks)


def _heatmaps(findings: Findings, row: str, by: str) -> list[str | Table | Plot]:
  """Rank × `row`, a map for each value of `by`."""
  factors = findings.sweep.factors
  if _RANK not in factors or row not in factors:
    return []
  settings = [each for each in findings.sweep.settings if each.first.quantized]
  cells: dict[Any, dict[tuple[Any, Any], list[Setting]]] = collections.defaultdict(
    lambda: collections.defaultdict(list)
  )
  for each in settings:
    config = each.first.config
    cells[each.values.get(by)][config[row], config[_RANK]].append(each)
  names = sorted(cells, key=lambda value: value != _BLOCK_SIZE)[: figures.MOST_SERIES]
  if not names:
    return []
  columns = sorted({each.first.config[_RANK] for each in settings})
  rows = list(dict.fromkeys(each.first.config[row] for each in settings))
  rows = sorted(rows) if row == _BLOCK else rows
  maps = []
  for name in names:
    values = np.full((len(rows), len(columns)), np.nan)
    for (r, c), inside in cells[name].items():
      mean = np.mean([findings.loss[each.number].value for each in inside])
      values[rows.index(r), columns.index(c)] = mean
    maps.append(("" if name is None else f"{short(by)} {show(name)}", values))
  inside = [each for name in names for cell in cells[name].values() for each in cell]
  along = _along_rank(findings)
  others = [
    each
    for each in factors
    if each not in (_RANK, row, by, *along) and len({one.values[each] for one in settings}) > 1
  ]
  caption = f"Held-out loss after training, rank{_with(along)} × {short(row)}"
  if others:
    caption += f", mean over {', '.join(others)}"
    sets = {
      frozenset(tuple(each.values[other] for other in others) for each in cell)
      for name in names
      for cell in cells[name].values()
    }
    if len(sets) > 1:
      caption += " (not the same ones in all cells: compare with care)"
  caption += "." + _shares(len(names), len(cells), "maps")
  svg = figures.heatmaps(
    maps, [show(each) for each in rows], list(map(str, columns)), "rank", short(row)
  )
  return [Plot(svg, caption, ids(inside))]


def _along_rank(findings: Findings) -> list[str]:
  """Fields that follow from the rank, of quantized settings where there are any."""
  settings = [each for each in findings.sweep.settings if each.first.quantized]
  settings = settings or findings.sweep.settings
  factors = findings.sweep.factors
  return [each for each in factors if sweep_results.follows(settings, _RANK, each)]


def _with(along: Sequence[str]) -> str:
  """What changes with a field."""
  return f" (with {', '.join(along)})" if along else ""


def _against_rank(findings: Findings) -> list[str | Table | Plot]:
  factors = findings.sweep.factors
  if _RANK not in factors:
    return []
  along = _along_rank(findings)
  series: dict[str, list[Setting]] = collections.defaultdict(list)
  for each in findings.sweep.settings:
    rest = {
      field: value
      for field, value in each.values.items()
      if field not in (_RANK, "model.quantize", *along) and value is not None
    }
    name = short(sweep_results.describe(rest)) or "all"
    series[name if each.first.quantized else f"16 bits, {name}".removesuffix(", all")].append(each)
  series = {name: each for name, each in series.items() if len(each) > 1}

  def order(name: str) -> tuple[bool, bool]:
    config = series[name][0].first.config
    return bool(config["model.quantize"]), config[_BLOCK] not in (None, _BLOCK_SIZE)

  kept = sorted(series, key=order)[: figures.MOST_SERIES]
  if not kept:
    return []
  drawn = []
  for name in kept:
    settings = sorted(series[name], key=lambda each: each.first.config[_RANK])
    losses = [findings.loss[each.number] for each in settings]
    drawn.append(
      (
        name,
        [each.first.config[_RANK] for each in settings],
        [each.value for each in losses],
        [_finite(each.error) for each in losses],
      )
    )
  svg = figures.lines(drawn, "rank", "held-out loss, nats", log_x=True)
  caption = (
    f"Loss against rank{_with(along)}; ± one standard error, which is mostly of the shared text."
  )
  caption += _shares(len(kept), len(series), "lines")
  return [Plot(svg, caption, ids(each for name in kept for each in series[name]))]


def _weights(sweep: Sweep) -> Section:
  bases = [each for each in sweep.bases.values() if each.found["quantization"]]
  bases.sort(key=lambda each: each.found["quantization"]["block_size"] != _BLOCK_SIZE)
  of_base: dict[str, list[str]] = collections.defaultdict(list)
  adapters: dict[str, list[int]] = collections.defaultdict(list)
  for each in sweep.finished:
    of_base[each.base].append(each.id)
    adapters[each.base].append(each.stage["adapter_bytes"])
  measured = [each for each in bases if each.weight_error is not None]
  blocks: list[str | Table | Plot] = []
  if measured:
    few = [
      each
      for each in measured
      if [layer["path"] for layer in each.found["layers"]]
      == [layer["path"] for layer in measured[0].found["layers"]]
    ][: figures.MOST_SERIES]
    paths = [_layer(each["path"]) for each in measured[0].found["layers"]]
    ratios = [
      (
        layer["kurtosis"],
        layer["relative_mse"] / each.found["normal_relative_mse"],
        f"#b-{each.id}",
      )
      for each in measured
      for layer in each.found["layers"]
    ][:_POINTS]
    blocks += [
      Plot(
        figures.lines(
          [
            (
              each.name,
              range(len(paths)),
              [layer["relative_mse"] for layer in each.found["layers"]],
              None,
            )
            for each in few
          ],
          "" if len(paths) <= 60 else "layer",
          "relative squared error",
          levels=[each.found["normal_relative_mse"] for each in few],
          ticks=paths if len(paths) <= 60 else None,
        ),
        "Error by layer, Σ(ŵ − w)² / Σw². Dashed: the Gaussian oracle, the error of normal weights "
        "treated alike." + _shares(len(few), len(measured), "bases"),
        [id for each in few for id in of_base[each.id]],
      ),
      Plot(
        figures.points(
          [("", *map(list, zip(*ratios, strict=True)))],  # pyright: ignore[reportArgumentType]
          "kurtosis of the layer's weights (normal: 3)",
          "error / Gaussian oracle",
          level=1,
          log_x=True,
        ),
        "A layer whose error is off the oracle's has weights that are not normal, or blocks that "
        "its rows cut short.",
        [id for each in measured for id in of_base[each.id]],
      ),
      Plot(
        figures.histograms(
          [
            (f"{each.name}\n{_entropy(each):.3f} bits", _codes(each) / _codes(each).sum())
            for each in few
          ],
          "code",
          "share of the weights",
        ),
        "Use of the codes, and their entropy: what an ideal coder would need for one."
        + _shares(len(few), len(measured), "bases"),
        [id for each in few for id in of_base[each.id]],
      ),
    ]
  every = sorted(sweep.bases.values(), key=lambda each: each.found["bits_per_parameter"])
  parts = sweep_results.PARTS

  def bits(base: sweep_results.Base, part: str) -> float:
    return 8 * base.found["bytes_by_part"][part] / base.found["parameters"]

  kept = every[:_BARS]
  blocks.append(
    Plot(
      figures.stacked(
        [each.name for each in kept],
        [(part.replace("_", " "), [bits(each, part) for each in kept]) for part in parts],
        "bits a parameter of the whole model",
      ),
      "Exact bits by part." + _shares(len(kept), len(every), "bases"),
      [id for each in kept for id in of_base[each.id]],
    )
  )
  rows = []
  for each in every:
    found = each.found
    sizes = [8 * size / found["parameters"] for size in sorted(adapters[each.id])]
    oracle = found["normal_relative_mse"]
    kurtosis = [layer["kurtosis"] for layer in found["layers"] or []]
    rows.append(
      [
        each.name,
        _number(found["bits_per_quantized_weight"]),
        _number(found["bits_per_parameter"]),
        *(_number(bits(each, part)) for part in parts),
        f"{sizes[0]:.3f} … {sizes[-1]:.3f}" if sizes else "–",
        _number(each.weight_error, 6),
        _number(oracle, 6),
        f"{min(kurtosis):.2f} … {max(kurtosis):.2f}" if kurtosis else "–",
        _number(_entropy(each) if found["layers"] else None, 3),
        Ids(of_base[each.id]),
      ]
    )
  headers = [
    "base",
    "bits a quantized weight",
    "bits a parameter",
    *(part.replace("_", " ") for part in parts),
    "adapters",
    "weight error",
    "Gaussian oracle",
    "kurtosis",
    "entropy",
    "trials",
  ]
  blocks += [
    "Bits a parameter are of the whole base, and the four columns after it are their parts; those "
    "of the adapters (float32, smallest … largest of the sweep) come on top.",
    Table(headers, rows, [f"b-{each.id}" for each in every]),
  ]
  layers = [
    [
      each.name,
      layer["path"],
      " × ".join(map(str, layer["shape"])),
      f"{layer['relative_mse']:.6f}",
      f"{layer['relative_mse'] / each.found['normal_relative_mse']:.3f}",
      f"{layer['kurtosis']:.2f}",
      f"{layer['entropy_bits']:.3f}",
    ]
    for each in measured
    for layer in each.found["layers"]
  ]
  if layers:
    headers = ("base", "layer", "shape", "error", "error / oracle", "kurtosis", "entropy")
    blocks.append(Table(headers, layers))
  return Section("weights", "Weights: error, bits, codes", blocks)


def _layer(path: str) -> str:
  return path.removeprefix("layers/").removesuffix("/kernel")


def _codes(base: sweep_results.Base) -> np.ndarray:
  return np.sum([layer["codes"] for layer in base.found["layers"]], axis=0)


def _entropy(base: sweep_results.Base) -> float:
  """Of the codes of all layers together."""
  share = _codes(base) / _codes(base).sum()
  share = share[share > 0]
  return float(-(share * np.log2(share)).sum())


def _correlation(findings: Findings) -> Section:
  found, bases = findings.correlations, findings.sweep.bases
  if not found:
    text = (
      "Does the weights' error predict the loss after training? Too few bases to say: it takes "
      "four that differ in how they are quantized alone."
    )
    return Section("correlation", "Weight error and final loss", [text])
  kept = found[: figures.MOST_SERIES]
  svg = figures.points(
    [
      (
        short(each.where),
        [bases[one.first.base].weight_error or 0.0 for one in each.settings],
        [findings.loss[one.number].value for one in each.settings],
        [findings.address(one) for one in each.settings],
      )
      for each in kept
    ],
    "relative squared error of the weights",
    "held-out loss, nats",
    log_x=True,
  )
  rows = [
    [
      each.where,
      str(len(each.settings)),
      f"{each.rho:.3f}",
      _p(each.corrected),
      "they go together" if each.corrected < sweep_results.ALPHA else "no relation seen",
      Ids(ids(each.settings)),
    ]
    for each in found
  ]
  headers = ("settings of", "bases", "Spearman's ρ", "p, Holm", "verdict", "trials")
  caption = "Error of the base's weights against the loss after training on it, all else equal."
  return Section(
    "correlation",
    "Weight error and final loss",
    [
      Plot(
        svg,
        caption + _shares(len(kept), len(found), "groups"),
        ids(one for each in kept for one in each.settings),
      ),
      "p by permutation of the bases, corrected by Holm's method for the rows of the table. (Bases "
      "are few and alike; and a loss that hardly differs ranks by chance.)",
      Table(headers, rows),
    ],
  )


def trials_table(sweep: Sweep, listed: Set[str] = frozenset()) -> Section:
  """All of them; those `listed` in another table have their anchor there."""
  rows = [
    [
      str(each.index),
      each.id,
      each.status,
      _label(each),
      _number(each.stage.get("loss_before")),
      _number(each.stage.get("loss_after")),
      each.note,
    ]
    for each in sweep.trials
  ]
  headers = ("index", "id", "status", "overrides", "loss before", "loss after", "note")
  anchors = ["" if each.id in listed else f"t-{each.id}" for each in sweep.trials]
  return Section(
    "trials", "Trials", [Table(headers, rows, anchors, most=TRIAL_ROWS, whole="trials.csv")]
  )

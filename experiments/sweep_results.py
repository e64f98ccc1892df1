"""What a sweep found, from the JSON files in its directory; no array of JAX is made.

Trials that differ in nothing but `seed` are one setting. Whatever is compared is compared trial by
trial: same seed, same data, same held-out sequences. What cannot be had (with one seed, or no
16-bit LoRA beside it) is None, with the reason next to it.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import halving, statistics
from experiments.sweep import Directory
from qlora_jax import config as config_lib
from qlora_jax import metrics
from qlora_jax.hf.files import read_json
from qlora_jax.quantization import details

ALPHA = 1 - statistics.LEVEL

# Values of a factor beyond which they are not compared in pairs.
MOST_VALUES = 12

# Of a base's bytes.
PARTS = ("codes", "scales", "tables", "not_quantized")

# What only says how an adapter starts: 16-bit LoRA that is compared with starts plainly.
_OF_INIT = (
  "lora.init",
  "lora.loftq_iterations",
  "lora.loftq_ignores_scaling",
  "lora.lora_ga_gamma",
  "lora.eva_rho",
  "lora.cloq_damping",
  "lora.svd_iterations",
  "lora.calibration_batches",
)


class ReportError(ValueError):
  """A report that cannot be made; one line says why."""


@dataclasses.dataclass(frozen=True)
class Measured:
  """A trained model on the held-out sequences.

  Attributes:
    targets: `[n]`; one array for all trials that have the same.
    loss: `[n]`, nats, summed over the targets of a sequence.
    kl: `[n]`, of the 16-bit base's predictions to the model's; None without a 16-bit base.
  """

  targets: np.ndarray
  loss: np.ndarray
  kl: np.ndarray | None


# Seed → the trial's id, and what it came to.
Runs: typing.TypeAlias = Mapping[int, tuple[str, Measured]]


@dataclasses.dataclass
class Trial:
  """A trial as it is on the disk.

  Attributes:
    status: finished, failed, broken (what it wrote cannot be read), stopped (early, by halving),
      begun, waiting.
    note: the error, or how far it is.
    config: field → value, `name` left out and, of a 16-bit base, all of `quantization`; empty
      where it was not read.
    stage: of the summary: sizes and losses.
    after: the trained model.
    after_16bit: 16-bit LoRA of the same run (`train.compare_16bit`).
    setting: number of the setting that it belongs to.
  """

  id: str
  index: int
  overrides: dict[str, Any]
  base: str
  status: str = "waiting"
  note: str = ""
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  stage: dict[str, Any] = dataclasses.field(default_factory=dict)
  after: Measured | None = None
  after_16bit: Measured | None = None
  environment: str = ""
  setting: int | None = None

  @property
  def seed(self) -> int:
    """Of adapters and dropout."""
    return self.config["seed"]

  @property
  def quantized(self) -> bool:
    """Whether its base is."""
    return self.config["model.quantize"]


@dataclasses.dataclass(frozen=True)
class Base:
  """A base before training: what experiments/analysis.py wrote of it, and its sequences.

  Attributes:
    weight_error: Σ(ŵ − w)² / Σw² by layer, averaged by the number of weights; None where nothing is
      quantized or there is no 16-bit base.
  """

  id: str
  found: dict[str, Any]
  before: Measured

  @functools.cached_property
  def weight_error(self) -> float | None:
    layers = self.found["layers"]
    if not layers:
      return None
    sizes = [math.prod(each["shape"]) for each in layers]
    return float(np.average([each["relative_mse"] for each in layers], weights=sizes))

  @property
  def name(self) -> str:
    """`nf4, 64, double quantization`; `16 bits`."""
    quantization = self.found["quantization"]
    if quantization is None:
      return "16 bits"
    own = details(quantization)
    return f"{quantization['codebook']}, {quantization['block_size']}{own}"


@dataclasses.dataclass(frozen=True)
class Setting:
  """Finished trials that differ in their seed alone.

  Attributes:
    values: of the fields that differ in the sweep.
    trials: by seed.
  """

  number: int
  values: dict[str, Any]
  trials: dict[int, Trial]

  @property
  def first(self) -> Trial:
    """Any of them: what is asked of it is the same for all."""
    return next(iter(self.trials.values()))

  @property
  def targets(self) -> np.ndarray:
    """`[n]`."""
    return _after(self.first).targets

  @property
  def label(self) -> str:
    """`lora.rank 8, quantization.codebook nf4`; `lora.rank 8, 16 bits`."""
    told = describe(
      {f: v for f, v in self.values.items() if v is not None and f != "model.quantize"}
    )
    if self.first.quantized:
      return told or "the config as it is"
    return f"{told}, 16 bits" if told else "16 bits"

  @property
  def runs(self) -> "Runs":
    """By seed."""
    return {seed: (each.id, _after(each)) for seed, each in self.trials.items()}

  def loss(self, seeds: Sequence[int]) -> np.ndarray:
    """`[S, n]`, after training."""
    return np.stack([_after(self.trials[seed]).loss for seed in seeds])


def _after(trial: Trial) -> Measured:
  assert trial.after is not None, f"{trial.id}: {trial.status}"
  return trial.after


def describe(values: Mapping[str, Any]) -> str:
  """`lora.rank 8, lora.alpha 16`."""
  return ", ".join(f"{path} {show(value)}" for path, value in values.items())


def show(value: Any) -> str:
  """A field's value in a table; fields of quantization are None on a 16-bit base."""
  if value is None:
    return "–"
  if isinstance(value, tuple):
    return " ".join(map(str, value))
  # .30000000000000004 is a slip of binary fractions; six digits tell rates apart.
  return f"{value:g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """All that was read of a directory.

  Attributes:
    name: of the sweep.
    trials: in order.
    bases: by id, those that were measured and can be read.
    problems: what else could not be read.
    settings: of the finished trials.
    factors: field → its values, in the order of the sweep, of those that differ among the finished
      trials, without the seed.
  """

  path: Path
  name: str
  trials: list[Trial]
  bases: dict[str, Base]
  problems: list[str]
  settings: list[Setting]
  factors: dict[str, list[Any]]

  @property
  def finished(self) -> list[Trial]:
    """Those that count."""
    return [each for each in self.trials if each.status == "finished"]


def read(path: Path, pool: dict[bytes, np.ndarray] | None = None) -> Sweep:
  """Reads a sweep's directory, however far it is.

  Args:
    path: of the sweep.
    pool: one for the sweeps that are compared: equal held-out sequences are then one array.

  Raises:
    ReportError: there is no sweep.json, or it cannot be read.
  """
  directory = Directory(path)
  if not (path / "sweep.json").is_file():
    raise ReportError(f"{path}: no sweep.json; give the --workdir of a config with sweep()")
  try:
    described = read_json(path / "sweep.json")
    name = str(described["name"])
    trials = [
      Trial(each["id"], each["index"], each["overrides"], each["base"])
      for each in described["trials"]
    ]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ReportError(f"{path / 'sweep.json'}: cannot be read: {_line(error)}") from None
  pool = {} if pool is None else pool
  for each in trials:
    _read_trial(directory, each, pool)
  problems, bases = [], {}
  for id in dict.fromkeys(each.base for each in trials):
    if directory.base(id).exists():
      try:
        bases[id] = _read_base(directory, id, pool)
      except _UNREADABLE as error:
        problems.append(f"bases/{id}.json: {_line(error)}")
  left = _others(path, trials)
  if left:
    problems.append(f"Run directories in trials/ that are not in sweep.json, left out: {left}")
  finished = [each for each in trials if each.status == "finished"]
  return Sweep(path, name, trials, bases, problems, *_settings(finished))


# What reading a file that another program, or half of one, wrote may come to.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)


def _line(error: BaseException) -> str:
  text = f"no {error}" if isinstance(error, KeyError) else str(error)
  return " ".join(text.split())


def _others(path: Path, trials: Sequence[Trial]) -> int:
  folder = path / "trials"
  known = {each.id for each in trials}
  return sum(each.name not in known for each in folder.iterdir()) if folder.is_dir() else 0


def _read_trial(directory: Directory, trial: Trial, pool: dict[bytes, np.ndarray]) -> None:
  path = directory.trial(trial.id)
  try:
    if directory.finished(trial.id):
      trial.config = _flat(read_json(path / "config.json"))
      _read_summary(trial, read_json(path / "summary.json"), pool)
      trial.status = "finished"
    elif directory.error(trial.id).exists():
      trial.status = "failed"
      trial.note = str(read_json(directory.error(trial.id))["error"])
    elif (found := halving.stopped(path)) is not None:
      trial.status, trial.note = "stopped", halving.described(found)
    elif (path / "config.json").exists():
      trial.status = "begun"
      written = (path / metrics.METRICS_FILE).exists()
      lines = metrics.read(path) if written else []
      trial.note = f"at step {lines[-1]['step']}" if lines else "before its first step"
  except _UNREADABLE as error:
    trial.status, trial.note = "broken", _line(error)
    trial.config, trial.stage, trial.after, trial.after_16bit = {}, {}, None, None


def _read_summary(trial: Trial, summary: dict[str, Any], pool: dict[bytes, np.ndarray]) -> None:
  stage, full = summary["qlora"], summary["lora_16bit"]
  if stage is None:
    stage, full = full, None
  if stage["measured"] is None:
    raise ValueError("summary.json: no measurement of held-out sequences")
  trial.after = _measured(stage["measured"]["sequences"], pool)
  if full is not None and full["measured"] is not None:
    trial.after_16bit = _measured(full["measured"]["sequences"], pool)
  trial.stage = {key: value for key, value in stage.items() if key != "measured"}
  _need(stage, "base_bytes", "adapter_bytes")
  for key in ("loss_before", "loss_after"):
    if not math.isfinite(stage[key]):
      raise ValueError(f"summary.json: {key}: {stage[key]}")
  trial.environment = sys.intern(json.dumps(summary["environment"], sort_keys=True))


def _measured(sequences: dict[str, Any], pool: dict[bytes, np.ndarray]) -> Measured:
  targets = np.array(sequences["targets"], np.float64)
  targets = pool.setdefault(targets.tobytes(), targets)
  loss = np.array(sequences["loss"], np.float64)
  kl = None if sequences["kl"] is None else np.array(sequences["kl"], np.float64)
  for name, each in (("loss", loss), ("kl", kl)):
    if each is not None and not (each.shape == targets.shape and np.isfinite(each).all()):
      raise ValueError(f"sequences.{name}: not {targets.size} finite numbers")
  return Measured(targets, loss, kl)


def _read_base(directory: Directory, id: str, pool: dict[bytes, np.ndarray]) -> Base:
  found = read_json(directory.base(id))
  base = Base(id, found, _measured(found.pop("sequences"), pool))
  # What the report asks for is missed here, where there is a name to it.
  _need(found, "bits_per_parameter", "bits_per_quantized_weight", "parameters")
  _need(found, "normal_relative_mse", "bytes_by_part")
  _need(found["bytes_by_part"], *PARTS)
  for layer in found["layers"] or []:
    _need(layer, "path", "kurtosis", "codes", "entropy_bits")
  _ = base.weight_error, base.name
  return base


def _need(found: Mapping[str, Any], *keys: str) -> None:
  for key in keys:
    if key not in found:
      raise KeyError(key)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
  """Field → value, hashable; what an earlier version did not write has its default."""
  flat = {field: _hashable(each.default) for field, each in config_lib.fields().items()}
  for name, value in config.items():
    if isinstance(value, dict):
      flat |= {sys.intern(f"{name}.{inner}"): _hashable(each) for inner, each in value.items()}
    else:
      flat[name] = _hashable(value)
  del flat["name"]
  if not flat["model.quantize"]:
    for field in flat:
      if field.startswith("quantization."):
        flat[field] = None
  return flat


def _hashable(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(map(_hashable, value))
  return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def varying(configs: Iterable[Mapping[str, Any]]) -> list[str]:
  """The fields that have more than one value, a 16-bit base's lack of `quantization` apart."""
  values: dict[str, set[Any]] = collections.defaultdict(set)
  for config in configs:
    for field, value in config.items():
      values[field].add(value)
  return [
    field
    for field, each in values.items()
    if len(each - {None} if field.startswith("quantization.") else each) > 1
  ]


def _settings(finished: Sequence[Trial]) -> tuple[list[Setting], dict[str, list[Any]]]:
  fields = [field for field in varying(each.config for each in finished) if field != "seed"]
  # In the order in which the sweep names them.
  named = list(dict.fromkeys(path for each in finished for path in each.overrides))
  fields.sort(key=lambda field: named.index(field) if field in named else len(named))
  if "model.quantize" in fields and any(field.startswith("quantization.") for field in fields):
    fields.remove("model.quantize")  # seen by them
  settings: dict[tuple[Any, ...], Setting] = {}
  for each in finished:
    key = tuple(each.config.get(field) for field in fields)
    if key not in settings:
      values = dict(zip(fields, key, strict=True))
      settings[key] = Setting(len(settings), values, {})
    setting = settings[key]
    if setting.trials and _after(each).targets is not setting.targets:
      each.status = "broken"
      each.note = f"measured on other held-out sequences than trial {setting.first.id}"
      continue
    setting.trials[each.seed] = each
    each.setting = setting.number
  found = list(settings.values())
  factors = {field: list(dict.fromkeys(each.values[field] for each in found)) for field in fields}
  return found, factors


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number of a setting, or why there is none.

  Attributes:
    ratio: the number with its error, or None.
    reason: why there is none.
  """

  ratio: statistics.Ratio | None
  reason: str = ""


def loss_after(setting: Setting) -> statistics.Ratio:
  """Held-out loss after training, nats a target."""
  return statistics.ratio(setting.loss(list(setting.trials)), setting.targets)


def kl_after(setting: Setting) -> statistics.Ratio | None:
  """KL to the 16-bit base after training, nats a target."""
  found = [_after(each).kl for each in setting.trials.values()]
  kept = [each for each in found if each is not None]
  return statistics.ratio(np.stack(kept), setting.targets) if len(kept) == len(found) else None


def of_16bit(sweep: Sweep) -> dict[int, Runs]:
  """Setting's number → the 16-bit LoRA beside it, of its seeds.

  That of the same run where there is one, else the trial that agrees in all but how the base is
  kept and how the adapter starts.
  """

  def key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
      (field, value)
      for field, value in sorted(config.items())
      if not field.startswith("quantization.")
      and field not in ("model.quantize", "seed", "train.compare_16bit", *_OF_INIT)
    )

  plain: dict[tuple[Any, ...], Setting] = {}
  for each in sweep.settings:
    if not each.first.quantized and each.first.config["lora.init"] == "lora":
      plain[key(each.first.config)] = each
  found: dict[int, Runs] = {}
  for each in sweep.settings:
    if not each.first.quantized:
      continue
    beside = plain.get(key(each.first.config))
    own = {s: (t.id, t.after_16bit) for s, t in each.trials.items() if t.after_16bit}
    runs = {**(beside.runs if beside else {}), **own}
    found[each.number] = {
      seed: (id, measured)
      for seed, (id, measured) in runs.items()
      if seed in each.trials and measured.targets is each.targets
    }
  return found


def recovery(setting: Setting, base: Base | None, full: Runs) -> Estimate:
  """(L_q − L_qlora) / (L_q − L_16bit-LoRA): 1 where QLoRA reaches 16-bit LoRA.

  L_q is the loss of the quantized base before training. None where the denominator is under two of
  its standard errors.
  """
  if not full:
    return Estimate(None, "no 16-bit LoRA beside it")
  if base is None or base.before.targets is not setting.targets:
    return Estimate(None, "its base was not measured")
  seeds = list(full)
  before = base.before.loss
  possible = before - np.stack([full[seed][1].loss for seed in seeds])
  denominator = statistics.ratio(possible, setting.targets)
  if not denominator.value >= 2 * denominator.error:
    return Estimate(None, "16-bit LoRA wins less than two standard errors")
  return Estimate(statistics.ratio(before - setting.loss(seeds), possible))


@dataclasses.dataclass
class Comparison:
  """A paired difference of held-out losses, nats a target: below 0, the first is better.

  Attributes:
    first, second: what is compared.
    difference: the mean over seeds, sequences and settings.
    interval: bootstrap, or None for one seed.
    settings: how many pairs of settings are averaged, each of which has all the seeds.
    trials: ids of both sides.
    left_out: how many pairs of trials are not averaged, as theirs or others' settings lack a seed,
      or have other held-out sequences.
    corrected: Holm's p, over the table that it stands in; None for one seed.
  """

  first: str
  second: str
  difference: statistics.Ratio
  interval: tuple[float, float] | None
  settings: int
  trials: list[str]
  left_out: int = 0
  corrected: float | None = None

  @property
  def verdict(self) -> str:
    """What the data say."""
    seeds = self.difference.seeds
    if self.corrected is None:
      return "one seed: no test"
    if self.corrected >= ALPHA:
      return f"no difference seen at {seeds} seeds"
    return f"{self.first if self.difference.value < 0 else self.second} is better"


def _compare(first: str, second: str, pairs: Sequence[tuple[Runs, Runs]]) -> Comparison | None:
  """First less second, averaged over pairs that have the same seeds and held-out sequences.

  Were each seed's mean over the pairs that it has, one that lacks some would be of other settings
  than the rest, and a difference between settings would pass for one between seeds. So where some
  pairs lack a seed, it or they are left out: two seeds or more are kept where any pair has them,
  and else what keeps the most trials. None where no pair has a seed in common.
  """
  matched = [
    {
      seed: (a[seed], b[seed])
      for seed in sorted(a.keys() & b.keys())
      if a[seed][1].targets is b[seed][1].targets
    }
    for a, b in pairs
  ]
  # A setting has one held-out text.
  texts = [next((a.targets for (_, a), _ in each.values()), None) for each in matched]
  choices = {
    (id(text), tuple(each)): i for i, (text, each) in enumerate(zip(texts, matched, strict=True))
  }

  def averaged(choice: int) -> list[int]:
    seeds, text = matched[choice].keys(), texts[choice]
    return [i for i, each in enumerate(matched) if texts[i] is text and seeds <= each.keys()]

  def trials(choice: int) -> tuple[bool, int, int]:
    seeds = len(matched[choice])
    return seeds > 1, seeds * len(averaged(choice)), seeds

  best = max(choices.values(), key=trials, default=None)
  if best is None or (targets := texts[best]) is None:
    return None
  seeds, kept = list(matched[best]), [matched[i] for i in averaged(best)]
  used = [[each[seed] for each in kept] for seed in seeds]
  mean = np.stack([np.mean([a.loss - b.loss for (_, a), (_, b) in row], axis=0) for row in used])
  return Comparison(
    first,
    second,
    statistics.ratio(mean, targets),
    statistics.bootstrap(mean, targets),
    settings=len(kept),
    trials=list(dict.fromkeys(id for row in used for pair in row for id, _ in pair)),
    left_out=sum(map(len, matched)) - len(seeds) * len(kept),
  )


def correct(comparisons: Sequence[Comparison]) -> None:
  """Fills in Holm's p of a table."""
  tested = [each for each in comparisons if each.difference.p is not None]
  p = statistics.holm([each.difference.p or 0.0 for each in tested])
  for each, corrected in zip(tested, p, strict=True):
    each.corrected = corrected


def against_16bit(
  sweep: Sweep, full: Mapping[int, Runs], name: Callable[[Setting], str]
) -> list[Comparison]:
  """QLoRA less 16-bit LoRA of the same seeds, averaged over the settings of one name."""
  groups: dict[str, list[tuple[Runs, Runs]]] = collections.defaultdict(list)
  for each in sweep.settings:
    if full.get(each.number):
      groups[name(each)].append((each.runs, full[each.number]))
  found = [_compare(name, "16-bit LoRA", pairs) for name, pairs in groups.items()]
  kept = [each for each in found if each is not None]
  correct(kept)
  return kept


@dataclasses.dataclass(frozen=True)
class Factor:
  """The comparisons of a field's values, all else equal.

  Attributes:
    field: which.
    along: fields that change with it throughout, and so are compared with it.
    comparisons: of each two values.
    reason: why there are none.
  """

  field: str
  along: list[str]
  comparisons: list[Comparison]
  reason: str = ""


def by_factor(sweep: Sweep) -> list[Factor]:
  """Each field's values in pairs, averaged over the settings that have both.

  Of a sweep with quantized bases only those: 16-bit LoRA has a table of its own.
  """
  quantized = [each for each in sweep.settings if each.first.quantized]
  settings = quantized or sweep.settings
  found: list[Factor] = []
  for field in sweep.factors:
    values = list(dict.fromkeys(each.values[field] for each in settings))
    if len(values) < 2 or any(field in each.along for each in found):
      continue
    along = [other for other in sweep.factors if follows(settings, field, other)]
    if len(values) > MOST_VALUES:
      reason = f"{len(values)} values: more than {MOST_VALUES} are not compared in pairs"
      found.append(Factor(field, along, [], reason))
      continue
    comparisons = _pairs(settings, field, along, values)
    reason = "" if comparisons else "no two settings differ in it alone, with a seed in common"
    found.append(Factor(field, along, comparisons, reason))
  correct([each for factor in found for each in factor.comparisons])
  return found


def follows(settings: Sequence[Setting], field: str, other: str) -> bool:
  """Whether the value of `other` is known from that of `field`, and varies."""
  known: dict[Any, Any] = {}
  return (
    field != other
    and all(
      known.setdefault(each.values[field], each.values[other]) == each.values[other]
      for each in settings
    )
    and len(set(known.values())) > 1
  )


def _pairs(
  settings: Sequence[Setting], field: str, along: Sequence[str], values: Sequence[Any]
) -> list[Comparison]:
  rest = [other for other in settings[0].values if other != field and other not in along]
  contexts: dict[tuple[Any, ...], dict[Any, Setting]] = collections.defaultdict(dict)
  for each in settings:
    contexts[tuple(each.values[other] for other in rest)][each.values[field]] = each

  def name(value: Any) -> str:
    one = next(each for each in settings if each.values[field] == value)
    return describe({each: one.values[each] for each in (field, *along)})

  found = []
  for a, b in itertools.combinations(values, 2):
    both = [(each[a].runs, each[b].runs) for each in contexts.values() if a in each and b in each]
    comparison = _compare(name(a), name(b), both)
    if comparison is not None:
      found.append(comparison)
  return found


@dataclasses.dataclass
class Correlation:
  """Spearman's ρ of the bases' weight error with the loss after training on them.

  Attributes:
    where: what the settings have in common.
    settings: that it is over.
    rho, p: by permutation; corrected by Holm over the table.
  """

  where: str
  settings: list[Setting]
  rho: float
  p: float
  corrected: float = 1.0


def correlations(sweep: Sweep) -> list[Correlation]:
  """Of each group of settings that differ in how the base is quantized alone, of four or more."""
  groups: dict[str, list[Setting]] = collections.defaultdict(list)
  for each in sweep.settings:
    base = sweep.bases.get(each.first.base)
    if base is not None and base.weight_error is not None:
      rest = {f: v for f, v in each.values.items() if not f.startswith("quantization.")}
      groups[describe(rest) or "all settings"].append(each)
  found = []
  for where, settings in groups.items():
    errors = [sweep.bases[each.first.base].weight_error or 0.0 for each in settings]
    losses = [loss_after(each).value for each in settings]
    rho = statistics.spearman(errors, losses) if len(settings) >= 4 else None
    if rho is not None:
      found.append(Correlation(where, settings, rho, statistics.spearman_p(errors, losses)))
  for each, corrected in zip(found, statistics.holm([each.p for each in found]), strict=True):
    each.corrected = corrected
  return found


@dataclasses.dataclass(frozen=True)
class Matched:
  """Two sweeps, A and B, setting by setting.

  Attributes:
    apart: field → its value throughout A, and throughout B.
    comparisons: B less A.
    overall: over all of them, or None where there is one alone.
    unmatched: how many settings of each have no counterpart.
    same: how many settings are the same in both, and so are not compared.
  """

  apart: dict[str, tuple[Any, Any]]
  comparisons: list[Comparison]
  overall: Comparison | None
  unmatched: tuple[int, int]
  same: int


def match(first: Sweep, second: Sweep) -> Matched:
  """Pairs the trials whose resolved configs agree, but for what tells the two sweeps apart.

  That is each field that has one value throughout either sweep, another in the other.

  Raises:
    ReportError: no two trials match.
  """
  commons = []
  for sweep in (first, second):
    configs = [each.config for each in sweep.finished]
    if not configs:
      raise ReportError(f"{sweep.path}: no finished trial to compare")
    differing = set(varying(configs))
    common: dict[str, Any] = {}
    for config in configs:
      for field, value in config.items():
        if field not in differing and common.get(field) is None:
          common[field] = value
    commons.append(common)
  a, b = commons
  apart = {field: (a[field], b[field]) for field in a if field in b and a[field] != b[field]}

  def keyed(sweep: Sweep) -> dict[tuple[Any, ...], Setting]:
    return {
      tuple(
        (field, value)
        for field, value in sorted(each.first.config.items())
        if field not in apart and field != "seed" and value is not None
      ): each
      for each in sweep.settings
    }

  ours, theirs = keyed(first), keyed(second)
  both = [(theirs[key], each) for key, each in ours.items() if key in theirs]
  pairs = [(b, a) for b, a in both if b.first.config | {"seed": 0} != a.first.config | {"seed": 0}]
  compared = [_compare(f"B: {b.label}", f"A: {a.label}", [(b.runs, a.runs)]) for b, a in pairs]
  comparisons = [each for each in compared if each is not None]
  same = len(both) - len(pairs)
  if not comparisons:
    told = "; ".join(f"{field}: {show(a)}, {show(b)}" for field, (a, b) in apart.items())
    raise ReportError(
      f"{first.path}, {second.path}: nothing to compare: no two trials match on one held-out text "
      f"and seed (apart throughout: {told or 'nothing'}), but for {same} settings that are the same"
    )
  correct(comparisons)
  overall = None
  if len(comparisons) > 1:
    overall = _compare("B", "A", [(b.runs, a.runs) for b, a in pairs])
    correct([overall] if overall else [])
  unmatched = (len(ours) - len(both), len(theirs) - len(both))
  return Matched(apart, comparisons, overall, unmatched, same)

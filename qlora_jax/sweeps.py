"""Sweeps: which trials a config asks for, and by what name a trial is known again.

A config file may define `sweep()`, a generator of overrides, dotted path → value:

  def sweep():
    yield from grid({"lora.rank": [2, 8, 32], "seed": range(3)})
    yield {"model.quantize": False}

Each is applied over `get_config()`, and the command line's own overrides, to one trial. A trial is
known by a hash of its resolved config: a value added to the grid leaves the other trials what they
were, and finished.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax import config as config_lib
from qlora_jax.config import ConfigError, Draft, ExperimentConfig

Overrides = Mapping[str, Any]
Distribution = Callable[[np.random.Generator], Any]


def grid(values: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
  """Every combination; the last path changes fastest.

  >>> list(grid({"lora.rank": [2, 8], "seed": [0, 1]}))[1]
  {'lora.rank': 2, 'seed': 1}
  """
  for chosen in itertools.product(*map(tuple, values.values())):
    yield dict(zip(values, chosen, strict=True))


def zipped(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
  """The first value of each path, then the second of each, and so on.

  Raises:
    ConfigError: lists of unequal length.
  """
  lengths = {path: len(each) for path, each in values.items()}
  if len(set(lengths.values())) > 1:
    listed = ", ".join(f"{path} has {length}" for path, length in lengths.items())
    raise ConfigError(f"zipped: {listed}; the lists are of one length")
  for chosen in zip(*values.values(), strict=True):
    yield dict(zip(values, chosen, strict=True))


def cross(*sweeps: Iterable[Overrides]) -> Iterator[dict[str, Any]]:
  """Every combination of an override of each sweep, merged; the last sweep changes fastest.

  >>> rates = zipped({"lora.rank": [2, 8], "optimizer.learning_rate": [2e-2, 1e-2]})
  >>> list(cross(rates, grid({"seed": range(3)})))[1]
  {'lora.rank': 2, 'optimizer.learning_rate': 0.02, 'seed': 1}

  Raises:
    ConfigError: two sweeps set one path.
  """
  for parts in itertools.product(*map(tuple, sweeps)):
    merged: dict[str, Any] = {}
    for part in parts:
      for path, value in part.items():
        if path in merged:
          raise ConfigError(f"cross: {path}: set by two of the sweeps, to {merged[path]!r} as well")
        merged[path] = value
    yield merged


def draw(
  count: int, distributions: Mapping[str, Distribution], *, seed: int = 0
) -> Iterator[dict[str, Any]]:
  """`count` random draws, each path's independent of the others.

  Draw i of a path follows from (seed, i, path) alone: a higher count, or one path more, leaves the
  draws of the others as they were.

  Args:
    count: how many.
    distributions: `uniform`, `log_uniform`, `choice`, or any function of a NumPy generator.
    seed: another one, other draws.

  >>> next(draw(1, {"lora.dropout": uniform(0, 0.1)}))["lora.dropout"] < 0.1
  True
  """
  for i in range(count):
    yield {
      path: distribution(np.random.default_rng([seed, i, zlib.crc32(path.encode())]))
      for path, distribution in distributions.items()
    }


def uniform(low: float, high: float) -> Distribution:
  """Evenly between `low` and `high`."""
  return lambda generator: float(generator.uniform(low, high))


def log_uniform(low: float, high: float) -> Distribution:
  """Between `low` and `high`, both above 0, evenly in the logarithm: for learning rates.

  Raises:
    ConfigError: a bound that is not above 0.
  """
  if not (low > 0 and high > 0):
    raise ConfigError(f"log_uniform: {low} to {high}; both bounds are above 0")
  return lambda generator: float(math.exp(generator.uniform(math.log(low), math.log(high))))


def choice(values: Sequence[Any]) -> Distribution:
  """One of `values`, each as likely."""
  return lambda generator: values[int(generator.integers(len(values)))]


@dataclasses.dataclass(frozen=True)
class Trial:
  """One trial of a sweep.

  Attributes:
    id: `identity` of its config; its directory bears it.
    index: its place in the sweep, from 0.
    overrides: what it sets.
    config: resolved; its name is the id, so that renaming a sweep reruns nothing.
  """

  id: str
  index: int
  overrides: Overrides
  config: ExperimentConfig

  @property
  def label(self) -> str:
    """`lora.rank=8, seed=0`."""
    return _label(self.overrides)


def _label(overrides: Overrides) -> str:
  return ", ".join(f"{path}={value}" for path, value in overrides.items()) or "the config as it is"


def resolve(
  draft: Draft, sweep: Iterable[Overrides], overrides: Overrides | None = None
) -> list[Trial]:
  """The trials of a sweep, checked, in order.

  Args:
    draft: from `get_config()`.
    sweep: from `sweep()`.
    overrides: of all trials alike, from the command line.

  Raises:
    ConfigError: an override that makes no config that can be run, one of the name or of what
      `overrides` sets too, two trials that are one, no trial; the message names the trials.
  """
  common = dict(overrides or {})
  found: dict[str, Trial] = {}
  for index, own in enumerate(sweep):
    if not isinstance(own, Mapping):
      raise ConfigError(
        f"sweep(), trial {index}: {own!r}; overrides are a dict of dotted path → value"
      )
    # NumPy's numbers, of an `np.arange` say, are none to json.
    own = {
      path: value.item() if isinstance(value, np.generic) else value for path, value in own.items()
    }
    where = f"trial {index} ({_label(own)})"
    if "name" in own:
      raise ConfigError(f"{where}: name: {own['name']!r}; trials are told apart by their values")
    for path in own.keys() & common.keys():
      raise ConfigError(
        f"{where}: {path}: set by the sweep, and to {common[path]!r} on the command line"
      )
    try:
      config = config_lib.from_config_dict(draft, {**common, **own})
    except ConfigError as error:
      raise ConfigError(f"{where}: {error}") from None
    name = identity(config)
    if name in found:
      other = found[name]
      raise ConfigError(
        f"{where} is trial {other.index} ({other.label}) again: the resolved configs are equal; "
        "leave one out (`draw` may take a `choice` twice: `grid` takes each once, and values of "
        "`uniform` and `log_uniform` do not repeat)"
      )
    found[name] = Trial(name, index, own, dataclasses.replace(config, name=name))
  if not found:
    raise ConfigError("sweep(): no trials; it yields at least one")
  return list(found.values())


def identity(config: ExperimentConfig) -> str:
  """12 hexadecimal digits that name what a config computes: all but its name.

  Fields at their default are left out: a field that a later version adds changes no name. (A
  default that a version changes does not go unseen: a run directory holds the whole config, and
  experiments/sweep.py compares it.)
  """
  return _digest(
    {
      path: functools.reduce(getattr, path.split("."), config)
      for path in config_lib.fields()
      # Without effect on a base that is not quantized.
      if path != "name" and (config.model.quantize or not path.startswith("quantization."))
    }
  )


def base_identity(config: ExperimentConfig) -> str:
  """12 hexadecimal digits that name the base, as it is stored, and the text it is measured on."""
  return _digest(
    {
      path: functools.reduce(getattr, path.split("."), config)
      for path in config_lib.fields()
      if path.startswith(("model.", "pretrain.", "data."))
      or (path.startswith("quantization.") and config.model.quantize)
    }
  )


# In what the trials of a group may differ: data of their program, no part of it.
_OF_A_TRIAL = (
  "name",
  "seed",
  "data.seed",
  "lora.rank",
  "lora.alpha",
  "lora.targets",
  "lora.dropout",
  "lora.rank_stabilized",
  "lora.rank_pattern",
  "lora.alpha_pattern",
  "optimizer.learning_rate",
  "optimizer.schedule",
  "optimizer.warmup_steps",
)


def group_identity(config: ExperimentConfig) -> str:
  """12 hexadecimal digits that trials have in common which one program can train together.

  Those whose init changes the base have each its own, and those whose optimizer keeps its moments
  in a form that padding would change, or on the host.
  """
  alone = config.lora.changes_base or config.optimizer.state != "float32"
  own = () if alone else _OF_A_TRIAL
  return _digest(
    {
      path: functools.reduce(getattr, path.split("."), config)
      for path in config_lib.fields()
      if path not in own
    }
  )


def _digest(values: Mapping[str, Any]) -> str:
  known = config_lib.fields()
  own = {path: value for path, value in values.items() if value != known[path].default}
  return hashlib.sha256(json.dumps(own, sort_keys=True, default=dict).encode()).hexdigest()[:12]

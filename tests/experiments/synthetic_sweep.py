"""Directories of sweeps that were never run, for the report's tests: JSON with numbers made up."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax import config as config_lib
from qlora_jax import sweeps
from qlora_jax.sweeps import Trial

SEQUENCES = 20
_LAYERS = ("layers/0/attn/q/kernel", "layers/0/mlp/up/kernel", "layers/1/attn/q/kernel")

# Σ(ŵ − w)² / Σw² of normal weights, about.
WEIGHT_ERRORS = {"nf4": 0.0085, "fp4": 0.0149, "int4": 0.0116, "e2m1": 0.0112, "nf2": 0.13}

# What a setting's loss is made of, beside the trial's own noise.
BEFORE, TUNED = 3.0, 1.5


def resolve(overrides: Iterable[Mapping[str, Any]], **common: Any) -> list[Trial]:
  """Trials of the default config."""
  draft = config_lib.defaults()
  draft.name = "made"
  draft.train.compare_16bit = False
  draft.model.path = "/nowhere"
  draft.data.path = "/nowhere/text.txt"
  return sweeps.resolve(draft, overrides, common)


def loss_of(trial: Trial) -> float:
  """The expected loss after training: worse with the weight error, better with the rank."""
  error = WEIGHT_ERRORS[trial.config.quantization.codebook] if trial.config.model.quantize else 0.0
  return TUNED + 10 * error - 0.02 * np.log2(trial.config.lora.rank)


def write(
  path: Path, trials: Iterable[Trial], *, noise: float = 0.003, finished: int | None = None
):
  """The directory, as experiments/sweep.py leaves it.

  Args:
    noise: of a trial's loss, standard deviation.
    finished: how many trials are; None for all.
  """
  trials = list(trials)
  described = [
    {
      "index": each.index,
      "id": each.id,
      "overrides": dict(each.overrides),
      "base": sweeps.base_identity(each.config),
    }
    for each in trials
  ]
  path.mkdir(parents=True)
  (path / "sweep.json").write_text(json.dumps({"name": "made", "trials": described}))
  (path / "bases").mkdir()
  for each in trials[:finished]:
    base = path / "bases" / f"{sweeps.base_identity(each.config)}.json"
    if not base.exists():
      base.write_text(json.dumps(_base(each)))
    folder = path / "trials" / each.id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_lib.to_json_dict(each.config)))
    (folder / "summary.json").write_text(json.dumps(_summary(each, noise)))


def _sequences(loss: float, seed: int) -> dict[str, Any]:
  generator = np.random.default_rng(0)  # the text: the same for all
  targets = generator.integers(90, 110, SEQUENCES)
  hard = generator.normal(0, 0.2, SEQUENCES)
  own = np.random.default_rng([seed]).normal(0, 0.01, SEQUENCES)
  hard, own = hard - np.average(hard, weights=targets), own - np.average(own, weights=targets)
  return {
    "targets": targets.tolist(),
    "loss": (targets * (loss + hard + own)).tolist(),
    "kl": (targets * 0.1).tolist(),
  }


def _summary(trial: Trial, noise: float) -> dict[str, Any]:
  config = trial.config
  # Seeds that are lucky are so with every base: that is what pairing takes out.
  luck = np.random.default_rng([config.seed]).normal(0, 0.1)
  own = np.random.default_rng([int(trial.id, 16) % 2**32]).normal(0, noise)
  loss = loss_of(trial) + luck + own
  stage = {
    "loss_before": BEFORE,
    "loss_after": loss,
    "base_bytes": 500_000 if config.model.quantize else 2_000_000,
    "bits": 4.1,
    "adapter_bytes": 1000 * config.lora.rank,
    "optimizer_bytes": 2000 * config.lora.rank,
    "trained_parameters": 250 * config.lora.rank,
    "seconds_this_process": 1.0,
    "measured": {
      "base": sweeps.base_identity(config),
      "sequences": _sequences(loss, int(trial.id, 16) % 2**32),
    },
  }
  quantized = config.model.quantize
  return {
    "name": config.name,
    "seed": config.seed,
    "base": "/nowhere",
    "qlora": stage if quantized else None,
    "lora_16bit": None if quantized else stage,
    "environment": {"device": "none"},
  }


def _base(trial: Trial) -> dict[str, Any]:
  config, layers, error, quantization = trial.config, None, None, None
  parts = {"codes": 0, "scales": 0, "tables": 0, "not_quantized": 2_000_000}
  if config.model.quantize:
    quantization = config_lib.to_json_dict(config)["quantization"]
    error = WEIGHT_ERRORS[config.quantization.codebook]
    parts = {"codes": 400_000, "scales": 20_000, "tables": 1_000, "not_quantized": 79_000}
    layers = [
      {
        "path": path,
        "shape": [64, 64],
        "relative_mse": error * (1 + 0.1 * i),
        "kurtosis": 3 + i,
        "codes": [256] * 16,
        "entropy_bits": 4.0,
      }
      for i, path in enumerate(_LAYERS)
    ]
  return {
    "quantization": quantization,
    "bits_per_quantized_weight": None if quantization is None else 4.127,
    "bits_per_parameter": 8 * sum(parts.values()) / 1e6,
    "parameters": 1_000_000,
    "quantized_parameters": 0 if quantization is None else 800_000,
    "bytes": sum(parts.values()),
    "bytes_by_part": parts,
    "sequences": _sequences(BEFORE, 0),
    "normal_relative_mse": error,
    "layers": layers,
  }

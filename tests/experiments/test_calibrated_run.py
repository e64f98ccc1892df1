"""A trial whose base is quantized by what its data says: kept, shared, resumed, and refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import trial
from qlora_jax import calibration, hf, sweeps, tree_paths
from qlora_jax.config import BaseQuantization, ConfigError
from qlora_jax.memory import quantized_bits
from qlora_jax.quantization import QuantizationConfig, dequantize, quantize_by
from qlora_jax.quantized_tensor import is_quantized
from tests.experiments import tiny_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return tiny_run.save_base(tmp_path_factory.mktemp("base") / "model")


def config(base, **overrides):
  values = {
    "quantization.calibration_sequences": 3,
    "lora.rank": 2,
    "train.steps": 2,
    "train.checkpoint_every": 1,
  }
  dotted = {name.replace("__", "."): value for name, value in overrides.items()}
  return tiny_run.config(base, **values | dotted)


def prepared(cfg, directory, shared):
  """The base of a trial, with nothing trained, and its rows."""
  path = trial.base_directory(cfg)
  rows = trial.load_rows(cfg, path, 256)
  directory.mkdir(exist_ok=True)
  _, frozen, _, _ = trial._start(cfg, path, cfg.base_quantization, directory, shared, rows)
  return frozen, rows


def outputs_error(frozen, dense, moments):
  """Σ ‖X · (Ŵ − W)‖² over the weights whose inputs' moments are given."""
  packed = tree_paths.leaves(frozen, is_leaf=is_quantized)
  originals = tree_paths.leaves(dense)
  total = 0.0
  for path, h in moments.items():
    error = np.asarray(dequantize(packed[path]) - originals[path], np.float64)
    total += np.einsum("lkn,lkj,ljn->", error, np.asarray(h, np.float64), error)
  return total


def test_gptq_from_the_config(base, tmp_path):
  """Its base has smaller errors of the outputs; it is kept, shared, and read again bit for bit."""
  shared = trial.Shared()
  plain, rows = prepared(config(base), tmp_path / "plain", shared)
  cfg = config(base, quantization__gptq=True)
  frozen, _ = prepared(cfg, tmp_path / "run", shared)
  model, dense = hf.load(base, dtype="float32")
  batch = trial.data.Batches(rows.train, 1, 3, seed=0, segments=False).batch(0)
  targets = dataclasses.replace(cfg.lora, rank=1)
  moments = calibration.second_moments(model, dense, targets, [batch])
  assert outputs_error(frozen, dense, moments) < 0.8 * outputs_error(plain, dense, moments)
  # Another trial of the process has the same arrays; one of another process reads the files.
  again, _ = prepared(dataclasses.replace(cfg, seed=1), tmp_path / "other", shared)
  assert again is frozen
  read, _ = prepared(cfg, tmp_path / "run", trial.Shared())
  jax.tree.map(np.testing.assert_array_equal, read, frozen)


@pytest.mark.slow
def test_a_run_with_a_budget_and_a_fisher_diagonal(base, tmp_path, monkeypatch):
  cfg = config(
    base,
    quantization__codebook="nf2+nf3+nf4+int8",
    quantization__bits_per_weight=5.0,
    quantization__importance="fisher",
  )
  summary = trial.run(cfg, tmp_path / "run")
  frozen = hf.load(tmp_path / "run" / "quantized")[1]
  bits = quantized_bits(frozen)
  assert bits is not None and summary["qlora"]["bits"] == bits and 4.5 < bits <= 5
  leaves = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(leaf)]
  assert len({leaf.bits for leaf in leaves}) > 1
  assert "5-bit base (nf2+nf3+nf4+int8, block 16)" in trial.closing_table(cfg, summary, tmp_path)
  assert "counted as int8 throughout" in trial.dry_run(cfg)
  assert trial.storage(cfg.base_quantization).endswith("5 bits a weight, errors weighed by fisher")
  # From its checkpoint, without the data.
  monkeypatch.setattr(calibration, "quantize_base", None)
  assert trial.export_adapter(tmp_path / "run", tmp_path / "exported") == 2


def test_an_importance_is_what_learned_levels_minimize(base, tmp_path):
  cfg = config(base, quantization__codebook="lloyd_max2", quantization__importance="inputs")
  shared = trial.Shared()
  frozen, rows = prepared(cfg, tmp_path / "run", shared)
  plain, _ = prepared(config(base, quantization__codebook="lloyd_max2"), tmp_path / "plain", shared)
  model, dense = hf.load(base, dtype="float32")
  batch = trial.data.Batches(rows.train, 1, 3, seed=0, segments=False).batch(0)
  targets = dataclasses.replace(cfg.lora, rank=1, targets=("*/mlp/down",))
  moments = calibration.second_moments(model, dense, targets, [batch])
  (weight,) = calibration.input_moments(moments).values()

  def error(frozen):
    w = dense["layers"]["mlp"]["down"]["kernel"]
    found = dequantize(frozen["layers"]["mlp"]["down"]["kernel"]) - w
    return float((weight * np.square(found)).sum())

  assert error(frozen) < error(plain)


def test_identities():
  """A base that data makes is another one, and fields at their defaults name no other trial."""
  plain, gptq = (config("/tmp", quantization__gptq=each) for each in (False, True))
  assert sweeps.base_identity(plain) != sweeps.base_identity(gptq)
  full = dataclasses.replace(gptq, model=dataclasses.replace(gptq.model, quantize=False))
  other = dataclasses.replace(plain, model=full.model)
  assert sweeps.identity(full) == sweeps.identity(other)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"quantization__codebook": "nf2+nf4"}, "of several bits_per_weight chooses, which is None"),
    ({"quantization__codebook": "nf2+nf5"}, "quantization.codebook: 'nf2+nf5'; of several"),
    ({"quantization__bits_per_weight": 3.5}, "it chooses from several, such as"),
    (
      {"quantization__bits_per_weight": -1.0, "quantization__codebook": "nf2+nf4"},
      "quantization.bits_per_weight: -1.0; a finite number above 0, or None",
    ),
    ({"quantization__importance": "fisher"}, "importance: 'fisher' weighs nothing"),
    (
      {
        "quantization__importance": "fisher",
        "quantization__codebook": "any4",
        "quantization__rotate": True,
      },
      "'fisher' with rotate",
    ),
    (
      {"quantization__gptq": True, "quantization__outlier_fraction": 0.1},
      "gptq: True with outlier_fraction 0.1",
    ),
    ({"quantization__gptq_damping": 0.0}, "gptq_damping: 0.0; a finite number above 0"),
    ({"quantization__calibration_sequences": 0}, "calibration_sequences: 0; at least 1"),
    (
      {"quantization__gptq": True, "lora__init": "loftq"},
      "quantization.gptq: True; lora.init 'loftq' quantizes the base anew",
    ),
    ({"quantization__importance": "fischer"}, "did you mean fisher?"),
  ],
)
def test_what_makes_no_sense_is_refused(overrides, message):
  with pytest.raises(ConfigError) as error:
    config("/tmp", **overrides)
  assert message in str(error.value)


def test_what_only_the_files_show_is_refused(base, tmp_path):
  cfg = config(base, quantization__gptq=True, quantization__calibration_sequences=10**6)
  with pytest.raises(ValueError, match="calibration_sequences: 1000000; the data has"):
    prepared(cfg, tmp_path / "run", trial.Shared())
  model, frozen = hf.load(base, QuantizationConfig(block_size=16))
  hf.save_base(tmp_path / "packed", model, frozen)
  with pytest.raises(ValueError, match=r"packed; quantization\.importance, gptq and"):
    prepared(
      config(tmp_path / "packed", quantization__gptq=True), tmp_path / "other", trial.Shared()
    )
  with pytest.raises(ValueError, match=r"calibration\.quantize_base has it"):
    quantize_by(jnp.ones((16, 2)), BaseQuantization(gptq=True))

"""What a config's run takes, from shapes alone (see `qlora_jax.plan`), and why it did not fit."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.base import architecture
from qlora_jax import codebooks, memory, optimizers, plan
from qlora_jax import config as config_lib
from qlora_jax.config import BaseQuantization, ExperimentConfig
from qlora_jax.hf import checkpoint
from qlora_jax.matmul import gpu, target
from qlora_jax.models import remat
from qlora_jax.models.remat import RematPolicy
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.quantization import QuantizationConfig, Treatment
from qlora_jax.train import TrainState


def shape_of(config: ExperimentConfig) -> TransformerConfig:
  """The architecture that a config trains on; of a checkpoint, its config.json alone is read."""
  if config.model.path:
    return checkpoint.read_config(Path(config.model.path))
  return architecture(config.pretrain)


def widest(quantization: BaseQuantization) -> QuantizationConfig:
  """Of what a weight may be quantized by, that of the most bits: all there is without a budget."""
  return max(
    quantization.choices, key=lambda each: codebooks.get(each.codebook, each.block_size).bits
  )


def rules(
  config: ExperimentConfig, quantization: QuantizationConfig | None, shape: TransformerConfig
) -> QuantizationConfig | Mapping[str, Treatment] | None:
  """What `hf.load` quantizes a base of this shape by: its projections, and the tables if asked."""
  tables = config_lib.table_rules(config.table_bits, shape.tie_embeddings)
  if quantization is None or not tables:
    return quantization
  return {**checkpoint.default_rules(quantization), **tables}


def abstract_base(config: ExperimentConfig, model: Transformer) -> Any:
  """Shapes of the base; under a budget of bits, of its widest codebook throughout."""
  quantization = config.base_quantization
  counted_as = None if quantization is None else widest(quantization)
  own = checkpoint.default_rules(rules(config, counted_as, model.config))
  return checkpoint.abstract_base(model, own, config.model.storage_dtype)


def planner(
  config: ExperimentConfig,
  shape: TransformerConfig | None = None,
  device: plan.Device | None = None,
) -> plan.Planner:
  """Of a config's base, adapters and optimizer.

  Args:
    shape: of the base; None for that which the config names.
    device: that it is planned for; None for the one that JAX computes on.
  """
  shape = shape_of(config) if shape is None else shape
  attention = None if config.model.attention == "auto" else config.model.attention
  model = Transformer(shape, dtype=np.dtype(config.model.dtype), attention=attention)
  own = plan.Planner.of(
    model,
    abstract_base(config, model),
    config.lora,
    optimizers.make(config.optimizer, config.train.steps),
  )
  return own.on(gpu.capability(target.target()[1]) if device is None else device.capability)


def step_of(config: ExperimentConfig) -> plan.Step:
  """The step that a config describes; of remat "auto", that of "full"."""
  return plan.Step(
    config.train.batch_size,
    config.data.seq_len,
    "full" if config.model.remat == "auto" else config.model.remat,
    config.model.mlp_chunk,
    config.train.loss_chunk,
    config.train.accumulate_steps,
    packed=config.data.packing,
  )


def peaks(config: ExperimentConfig, shape: TransformerConfig) -> dict[RematPolicy, int]:
  """Bytes of the device that the config's step takes under each policy."""
  own, step = planner(config, shape), step_of(config)
  policies = remat.policies(shape.num_layers)
  return {each: own.memory(dataclasses.replace(step, remat=each)).total for each in policies}


class OutOfMemoryError(RuntimeError):
  """What did not fit; the message says what takes the memory, and what would save most of it."""


# (a config's planner, the config) → the bytes that what is done takes.
Count = Callable[[plan.Planner, ExperimentConfig], plan.Memory]


@contextlib.contextmanager
def out_of_memory_explained(explain: Callable[[], str]) -> Iterator[None]:
  """Raises OutOfMemoryError, of what `explain()` says, where memory ran out inside."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise OutOfMemoryError(explain()) from error


def training(planned: plan.Planner, config: ExperimentConfig) -> plan.Memory:
  """Of a step of one trial."""
  return planned.memory(step_of(config))


def evaluation(planned: plan.Planner, config: ExperimentConfig) -> plan.Memory:
  """Of the held-out loss of `train.eval_batch_size` rows.

  Of a trial alone: others that train with it have their adapters and optimizers there as well.
  """
  return planned.evaluation(
    dataclasses.replace(step_of(config), batch_size=config.train.eval_batch_size)
  )


def training_explained(config: ExperimentConfig, model: Transformer) -> str:
  """What a step takes, by part, and the three settings that would save most, by the plan.

  Args:
    config: of the training.
    model: as it trains: its shape, and the remat and attention that "auto" has chosen, are read.
  """
  config = _as_computed(config, model)
  counted = training(planner(config, model.config), config)
  saved = savings(config, model.config, training, _of_training(config))
  return _explanation("the step", counted, saved)


def evaluation_explained(config: ExperimentConfig, model: Transformer) -> str:
  """The same of an evaluation."""
  config = _as_computed(config, model)
  counted = evaluation(planner(config, model.config), config)
  saved = savings(config, model.config, evaluation, _of_evaluation(config))
  what = f"evaluating {config.train.eval_batch_size} rows at a time"
  return _explanation(what, counted, saved)


def group_explained(
  configs: Sequence[ExperimentConfig], model: Transformer, frozen: Any, wide: TrainState
) -> str:
  """The same of a step of trials that train together.

  Args:
    configs: of the trials.
    model, frozen: as they train.
    wide: shapes of a state into which each trial's fits.
  """
  count = len(configs)
  half = -(-count // 2)
  if model.config.num_experts:
    # Each trial has experts of its own decoded in turn, of which the plan does not know.
    return f"out of memory: the step of {count} trials together. Try\n  --group_size={half}"

  def together(planned: plan.Planner, config: ExperimentConfig, trials: int = count) -> plan.Memory:
    return planned.memory(dataclasses.replace(step_of(config), trials=trials))

  # All are padded to the largest rank.
  config = _as_computed(max(configs, key=lambda each: each.lora.rank), model)
  own = plan.Planner(model, frozen, wide.params, wide.constants, wide.opt_state)
  own = own.on(gpu.capability(target.target()[1]))
  counted = together(own, config)
  fewer = (f"--group_size={half}", counted.total - together(own, config, half).total)
  # Ranks are what trials differ in, and of another optimizer.state none trains with others.
  offered = [
    choices
    for choices in _of_training(config)
    if not {"optimizer.state", "lora.rank"} & choices[0].keys()
  ]
  saved = savings(config, model.config, together, offered)
  saved = sorted([fewer, *saved], key=lambda each: -each[1])
  return _explanation(f"the step of {count} trials together", counted, saved)


def _explanation(what: str, counted: plan.Memory, saved: Sequence[tuple[str, int]]) -> str:
  parts = dataclasses.asdict(counted)
  parts.pop("host")
  largest = sorted(parts.items(), key=lambda part: -part[1])
  listed = ", ".join(f"{name} {_size(size)}" for name, size in largest if size)
  limit = memory.device_bytes()
  of = "" if limit is None else f" of {_size(limit)}"
  lines = [f"out of memory: {what} takes about {_size(counted.total)}{of} ({listed}). Try"]
  lines += [f"  {text}: saves about {_size(size)}" for text, size in saved[:3]]
  return "\n".join(lines)


def savings(
  config: ExperimentConfig,
  shape: TransformerConfig,
  count: Count,
  alternatives: Iterable[Sequence[dict[str, Any]]],
) -> list[tuple[str, int]]:
  """(overrides, bytes of the device that they save), the largest first.

  Args:
    config: what they change.
    shape: of the base.
    count: what is to take less.
    alternatives: overrides, those of one field together, of which the best is taken.
  """
  planned = planner(config, shape)
  total = count(planned, config).total
  found = []
  for choices in alternatives:
    best = ("", 0)
    for overrides in choices:
      try:
        other = _with(config, overrides)
        same = all(
          path.startswith(("train.", "data.", "model.remat", "model.mlp")) for path in overrides
        )
        saved = total - count(planned if same else planner(other, shape), other).total
      except ValueError:
        continue  # what this config rules out, or the attention that it names
      if saved > best[1]:
        best = (" ".join(f"--config.{k}={v}" for k, v in overrides.items()), saved)
    if best[1]:
      found.append(best)
  return sorted(found, key=lambda each: -each[1])


def _of_training(config: ExperimentConfig) -> Iterator[list[dict[str, Any]]]:
  """Overrides that may save memory in a step."""
  train = config.train
  yield [{"model.remat": policy} for policy in ("offload", "full")]
  if train.batch_size > 1:
    half = -(-train.batch_size // 2)
    passes = -(-train.batch_size * train.accumulate_steps // half)
    yield [{"train.batch_size": half, "train.accumulate_steps": passes}]
  yield from _of_both(config)


def _of_evaluation(config: ExperimentConfig) -> Iterator[list[dict[str, Any]]]:
  """The same in an evaluation."""
  if config.train.eval_batch_size > 1:
    yield [{"train.eval_batch_size": -(-config.train.eval_batch_size // 2)}]
  yield from _of_both(config)


def _of_both(config: ExperimentConfig) -> Iterator[list[dict[str, Any]]]:
  train, length = config.train, config.data.seq_len
  yield [{"data.seq_len": length // 2}]
  yield [{"model.mlp_chunk": 2048 if length > 4096 else max(length // 4, 1)}]
  yield [{"train.loss_chunk": max(train.loss_chunk // 4, 1)}]
  yield [{"optimizer.state": "host"}, {"optimizer.state": "8bit"}]
  yield [{"model.table_bits": bits} for bits in (4, 8)]
  yield [{"lora.rank": max(config.lora.rank // 2, 1)}]
  yield [{"model.quantize": True, "train.compare_16bit": False}]


def _as_computed(config: ExperimentConfig, model: Transformer) -> ExperimentConfig:
  """`config` with what `model` computes by, where it says "auto"."""
  return _with(config, {"model.remat": model.remat, "model.attention": model.attention or "auto"})


def _with(config: ExperimentConfig, overrides: dict[str, Any]) -> ExperimentConfig:
  return config_lib.from_config_dict(config_lib.to_config_dict(config), overrides)


def _size(count: float) -> str:
  return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"

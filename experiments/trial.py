"""One trial: a base in 4 bits, adapters trained on it, and 16-bit LoRA beside them to compare.

A run directory holds

  config.json       the resolved config; another config is refused
  metrics.jsonl     losses by step (and tensorboard/)
  checkpoints/      adapters, optimizer, data position
  adapter/          the trained adapter, in PEFT's format
  lora_16bit/       the same of 16-bit LoRA, where `train.compare_16bit`
  summary.json      the closing table as numbers, device, versions, seed, git state
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.base import architecture, trained_base
from qlora_jax import (
  codebooks,
  data,
  environment,
  hf,
  lora,
  memory,
  optimizers,
  synthetic,
  tree_paths,
)
from qlora_jax import config as config_lib
from qlora_jax.checkpoints import Checkpoints
from qlora_jax.config import ExperimentConfig
from qlora_jax.evaluate import held_out_loss
from qlora_jax.fingerprint import fingerprint
from qlora_jax.hf import checkpoint as hf_checkpoint
from qlora_jax.hf.files import read_json
from qlora_jax.metrics import METRICS_FILE, MetricsWriter, write_whole
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.train import SignalGuard, TrainState, fit, init_state, make_train_step


class RunDirectoryError(ValueError):
  """A run directory that cannot be used; one line says why."""


@dataclasses.dataclass(frozen=True)
class Rows:
  """The data of a trial: what is trained on, and what is held out."""

  train: data.Dataset
  held_out: data.Dataset


class _Batches:
  """`data.Batches` without what a plain causal model does not need."""

  def __init__(self, rows: data.Dataset, config: ExperimentConfig):
    train = config.train
    self._batches = data.Batches(
      rows, train.batch_size, train.accumulate_steps, seed=config.data.seed
    )
    self._packed = config.data.packing

  def batch(self, step: int, /) -> dict[str, np.ndarray]:
    batch = self._batches.batch(step)
    if not self._packed:
      # One document a row: attention needs no mask of segments.
      del batch["segment_ids"], batch["positions"]
    return batch


def prepare_directory(workdir: Path, config: ExperimentConfig) -> None:
  """Makes the run directory, or checks that it belongs to `config`.

  Raises:
    RunDirectoryError: another config (naming the fields that differ), a directory that cannot
      be written, or a disk that is full.
  """
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
      before = config_lib.from_json_dict(read_json(path))
      differences = config_lib.differences(before, config)
      # One that failed before its first step (a path mistyped, say) has nothing to protect.
      if differences and not (workdir / METRICS_FILE).exists():
        _write_json(path, config_lib.to_json_dict(config))
      elif differences:
        raise RunDirectoryError(
          f"{workdir}: holds a run with another config ({'; '.join(differences)}); "
          "give another --workdir, or the same config"
        )
      return
    if any(workdir.iterdir()):
      raise RunDirectoryError(
        f"{workdir}: holds files but no config.json, so it is no run; give another --workdir"
      )
    _write_json(path, config_lib.to_json_dict(config))
  except OSError as error:
    raise RunDirectoryError(f"{workdir}: cannot be written: {error.strerror}") from None


def _write_json(path: Path, value: Any) -> None:
  write_whole(path, json.dumps(value, indent=2) + "\n")


def check_disk(workdir: Path, needed: int) -> None:
  """Raises RunDirectoryError where `needed` bytes do not fit on the disk."""
  free = shutil.disk_usage(workdir).free
  if free < needed:
    raise RunDirectoryError(
      f"{workdir}: {free / 1e6:,.0f} MB free on its disk; checkpoints need {needed / 1e6:,.0f} MB "
      "(lower train.keep_checkpoints or lora.rank, or give another --workdir)"
    )


def load_rows(config: ExperimentConfig, base: Path, vocab_size: int) -> Rows:
  """Reads or generates the text and cuts it into rows.

  Raises:
    ValueError: a token id outside the model's vocabulary; see also `data`.
  """
  cfg = config.data
  if cfg.tokenizer == "bytes":
    tokenizer = data.ByteTokenizer()
  else:
    tokenizer = hf.load_tokenizer(base)
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f"data.tokenizer: {cfg.tokenizer}: {tokenizer.vocab_size} tokens; the model's vocabulary "
      f"has {vocab_size}"
    )
  if cfg.synthetic is not None:
    documents = synthetic.corpus(cfg.synthetic, cfg.num_documents, cfg.seed)
  else:
    assert cfg.path is not None
    documents = data.load_documents(
      cfg.path,
      text_field=cfg.text_field,
      prompt_field=cfg.prompt_field,
      completion_field=cfg.completion_field,
    )

  def rows(documents) -> data.Dataset:
    def encode(text: str, last: bool) -> list[int]:
      ids = tokenizer.encode(text)
      # The end of a document is learned where the tokenizer can say it.
      return [*ids, tokenizer.eos_id] if last and tokenizer.eos_id is not None else ids

    if cfg.packing:
      return data.pack(
        [
          encode(each, True)
          if isinstance(each, str)
          else (encode(each[0], False), encode(each[1], True))
          for each in documents
        ],
        cfg.seq_len,
      )
    if not all(isinstance(each, str) for each in documents):
      raise ValueError(
        "data.packing: False with data.prompt_field; pairs are packed, so set it to True"
      )
    return data.windows([i for each in documents for i in tokenizer.encode(each)], cfg.seq_len)

  train, held_out = data.split_text(documents, cfg.holdout)
  return Rows(rows(train), rows(held_out))


@dataclasses.dataclass(frozen=True)
class Stage:
  """What one training gave: losses before and after, and its sizes in bytes."""

  loss_before: float
  loss_after: float
  base_bytes: int
  bits: float
  adapter_bytes: int
  optimizer_bytes: int
  trained_parameters: int
  seconds_this_process: float


def run_stage(
  config: ExperimentConfig,
  base: Path,
  rows: Rows,
  directory: Path,
  *,
  quantization: QuantizationConfig | None,
  description: str,
) -> Stage:
  """Loads the base, trains adapters on it from the last checkpoint on, evaluates, saves them."""
  started = time.monotonic()
  model, frozen, optimizer, state = _start(config, base, quantization)
  train = config.train
  directory.mkdir(parents=True, exist_ok=True)
  # Orbax writes a new checkpoint before it drops the oldest.
  check_disk(directory, (train.keep_checkpoints + 1) * tree_paths.tree_bytes(state))

  def loss(params, constants) -> float:
    return held_out_loss(
      model,
      {"params": params, "constants": constants, "frozen": frozen},
      rows.held_out,
      batch_size=train.eval_batch_size,
      loss_chunk=train.loss_chunk,
    )

  evaluated: dict[int, float] = {}

  def evaluate(state: TrainState) -> float:
    """Once for each step: the last one is asked for by the loop and by the table."""
    step = int(state.step)
    if step not in evaluated:
      evaluated[step] = loss(state.params, state.constants)
    return evaluated[step]

  loss_before = loss({}, {})
  with (
    Checkpoints(
      directory / "checkpoints",
      keep=train.keep_checkpoints,
      base_fingerprint=fingerprint(frozen),
    ) as checkpoints,
    SignalGuard() as guard,
  ):
    restored = checkpoints.restore(state)
    if restored is not None:
      state = restored
      print(f"{description}: resumes at step {int(state.step)} of {train.steps}")
    resume_step = None if restored is None else int(state.step)
    with MetricsWriter(directory, resume_step=resume_step) as writer:
      if restored is None:
        writer.write(0, {"held_out_loss": loss_before})
      state = fit(
        state,
        train_step=make_train_step(model, optimizer, train.loss_chunk),
        frozen=frozen,
        batches=_Batches(rows.train, config),
        cfg=train,
        learning_rate=optimizers.schedule(config.optimizer, train.steps),
        guard=guard,
        evaluate=evaluate,
        checkpoints=checkpoints,
        writer=writer,
        description=description,
      )
  adapter = directory / "adapter"
  if not adapter.exists():
    save_adapter(adapter, config, base, model, frozen, state)
  bits = memory.quantized_bits(frozen)
  return Stage(
    loss_before=loss_before,
    loss_after=evaluate(state),
    base_bytes=tree_paths.tree_bytes(frozen),
    bits=float(_bits(config)) if bits is None else bits,
    adapter_bytes=tree_paths.tree_bytes(state.params),
    optimizer_bytes=tree_paths.tree_bytes(state.opt_state),
    trained_parameters=lora.count(state.params, state.constants),
    seconds_this_process=time.monotonic() - started,
  )


def _start(
  config: ExperimentConfig, base: Path, quantization: QuantizationConfig | None
) -> tuple[Transformer, Any, Any, TrainState]:
  """The model, its base, the optimizer, and the state before the first step."""
  model, frozen = load_base(config, base, quantization)
  optimizer = optimizers.make(config.optimizer, config.train.steps)
  params, constants = lora.init(jax.random.key(config.seed), frozen, config.lora)
  state = init_state(params, constants, optimizer, seed=config.seed, dtype=model.dtype)
  return model, frozen, optimizer, state


def save_adapter(
  path: Path, config: ExperimentConfig, base: Path, model: Transformer, frozen: Any, state: Any
) -> None:
  """Writes the adapter of a training, as PEFT keeps them, with what it was trained by."""
  hf.save_adapter(
    path,
    state.params,
    state.constants,
    config.lora,
    model=model,
    frozen=frozen,
    base_model_name=str(base),
    card={
      "run": config.name,
      "steps": f"{int(state.step)} of {config.train.steps}",
      "sequence length": config.data.seq_len,
      "sequences a step": config.train.batch_size * config.train.accumulate_steps,
      "learning rate": config.optimizer.learning_rate,
      "base stored as": _storage(config.quantization),
      "computed in": config.model.dtype,
      "seed": config.seed,
    },
  )


def export_adapter(workdir: Path, path: Path) -> int:
  """Writes the adapter of a run's newest checkpoint to `path`; the run need not be finished.

  Returns:
    The step that it is of.

  Raises:
    RunDirectoryError: no run, or one without a checkpoint.
    BaseChangedError, CheckpointError: see `Checkpoints.restore`.
  """
  if not (workdir / "checkpoints").is_dir():
    raise RunDirectoryError(f"{workdir}: no run with checkpoints")
  config = config_lib.from_json_dict(read_json(workdir / "config.json"))
  base = Path(config.model.path) if config.model.path else trained_base(config.pretrain)
  model, frozen, _, state = _start(config, base, config.quantization)
  with Checkpoints(
    workdir / "checkpoints",
    keep=config.train.keep_checkpoints,
    base_fingerprint=fingerprint(frozen),
  ) as checkpoints:
    state = checkpoints.restore(state)
  if state is None:
    raise RunDirectoryError(f"{workdir}: no checkpoint yet")
  save_adapter(path, config, base, model, frozen, state)
  return int(state.step)


def _storage(quantization: QuantizationConfig | None) -> str:
  """How a base is stored, for a model card."""
  if quantization is None:
    return "16 bits"
  nested = ", double quantization" if quantization.double_quantization else ""
  return f"{quantization.codebook}, blocks of {quantization.block_size}{nested}"


def load_base(
  config: ExperimentConfig, base: Path, quantization: QuantizationConfig | None
) -> tuple[Transformer, Any]:
  """The model and its frozen tree, quantized or, with None, as stored."""
  return hf.load(
    base,
    quantization,
    dtype=config.model.dtype,
    storage_dtype=config.model.storage_dtype,
    remat=config.model.remat,
  )


def run(config: ExperimentConfig, workdir: Path) -> dict[str, Any]:
  """Runs a trial, or what is left of it, and returns its summary.

  Raises:
    RunDirectoryError, ValueError, OSError: see `prepare_directory`, `hf.load`, `data`.
    train.Interrupted, train.NonFiniteLossError: the run can go on from its last checkpoint.
  """
  prepare_directory(workdir, config)
  path = workdir / "summary.json"
  if path.exists():
    print(f"{workdir}: this run is finished; its table again")
    return read_json(path)
  base = Path(config.model.path) if config.model.path else trained_base(config.pretrain)
  rows = load_rows(config, base, hf_checkpoint.read_config(base).vocab_size)

  qlora = run_stage(
    config, base, rows, workdir, quantization=config.quantization, description="QLoRA"
  )
  summary: dict[str, Any] = {
    "name": config.name,
    "seed": config.seed,
    "base": str(base),
    "qlora": dataclasses.asdict(qlora),
    "lora_16bit": None,
    "environment": environment.describe(),
  }
  if config.train.compare_16bit:
    full = run_stage(
      config,
      base,
      rows,
      workdir / "lora_16bit",
      quantization=None,
      description=f"{_bits(config)}-bit LoRA",
    )
    summary["lora_16bit"] = dataclasses.asdict(full)
  _write_json(path, summary)
  return summary


def _bits(config: ExperimentConfig) -> int:
  return 8 * np.dtype(config.model.storage_dtype).itemsize


def closing_table(config: ExperimentConfig, summary: dict[str, Any], workdir: Path) -> str:
  """The table that a run ends with, and what to try next."""
  qlora, full = summary["qlora"], summary["lora_16bit"]
  bits = _bits(config)
  code_bits = codebooks.get(config.quantization.codebook, config.quantization.block_size).bits
  small = f"{config.quantization.codebook}, block {config.quantization.block_size}"
  lines: list[tuple[str, ...]] = [
    ("", "held-out loss", "bits a weight", "base", "adapter", "optimizer")
  ]

  def row(name: str, stage: dict[str, Any], loss: float, trained: bool):
    sizes = (stage["adapter_bytes"], stage["optimizer_bytes"]) if trained else (None, None)
    lines.append(
      (
        name,
        f"{loss:.4f}",
        f"{stage['bits']:.3f}",
        _size(stage["base_bytes"]),
        *("" if size is None else _size(size) for size in sizes),
      )
    )

  if full:
    row(f"{bits}-bit base", full, full["loss_before"], False)
  row(f"{code_bits}-bit base ({small})", qlora, qlora["loss_before"], False)
  row(f"after QLoRA, rank {config.lora.rank}", qlora, qlora["loss_after"], True)
  if full:
    row(f"after {bits}-bit LoRA, same data", full, full["loss_after"], True)
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  text = [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]
  text.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
  text += [
    "",
    "Held-out loss is in nats a token: lower is better. Bits a weight count codes, scales and",
    "tables of the quantized layers; base counts the whole model, its embeddings too.",
    f"Written to {workdir}: config.json, summary.json, metrics.jsonl, tensorboard/, checkpoints/, "
    f"adapter/{', lora_16bit/' if full else ''}",
    f"The base is in {summary['base']}",
  ]
  return "\n".join(text)


def _size(count: int) -> str:
  for unit, size in (("GB", 1e9), ("MB", 1e6)):
    if count >= size:
      return f"{count / size:.2f} {unit}"
  return f"{count / 1e3:.1f} kB"


def dry_run(config: ExperimentConfig) -> str:
  """The resolved config, each weight's treatment, and bytes by part; nothing is loaded."""
  if config.model.path:
    shape = hf_checkpoint.read_config(Path(config.model.path))
  else:
    shape = architecture(config.pretrain)
  model = Transformer(shape, dtype=np.dtype(config.model.dtype), remat=config.model.remat)
  frozen = hf_checkpoint.abstract_base(
    model, hf_checkpoint.default_rules(config.quantization), config.model.storage_dtype
  )
  train = config.train
  counted = memory.footprint(
    model,
    frozen,
    config.lora,
    optimizers.make(config.optimizer, train.steps),
    batch_shape=(train.accumulate_steps, train.batch_size, config.data.seq_len),
    packed_rows=config.data.packing,
    loss_chunk=train.loss_chunk,
  )
  table = memory.weight_table(counted.frozen, counted.state)
  widths = [max(len(row[i]) for row in table) for i in range(3)]
  lines = [json.dumps(config_lib.to_json_dict(config), indent=2), "", "weights"]
  for row in table:
    cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
    lines.append("  " + "  ".join([*cells, row[3]]).rstrip())
  lines += ["", "memory"]
  for name in ("base", "adapters", "optimizer", "activations"):
    lines.append(f"  {name:12}{_size(getattr(counted, name)):>10}")
  lines.append("  (activations: temporaries of the train step, compiled for the CPU)")
  return "\n".join(lines)

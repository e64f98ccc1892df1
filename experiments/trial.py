"""One trial: a base in 4 bits, adapters trained on it, and 16-bit LoRA beside them to compare.

A run directory holds

  config.json       the resolved config; another config is refused
  metrics.jsonl     losses by step (and tensorboard/)
  checkpoints/      adapters, optimizer, data position
  adapter/          the trained adapter, in PEFT's format
  lora_16bit/       the same of 16-bit LoRA, where `train.compare_16bit`
  initialized/      base and adapters at step 0, where `lora.init` takes these out of the base;
                    of EVA the adapters alone
  quantized/        the base, where `quantization` asks data: importance, gptq, bits_per_weight
  summary.json      the closing table as numbers, device, versions, seed, git state

Where `model.quantize` is False the run is one of 16-bit LoRA, in the same places.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Generator, Hashable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from experiments import planned
from experiments.base import cache_directory, trained_base
from qlora_jax import (
  calibration,
  codebooks,
  data,
  environment,
  hf,
  lora,
  lora_init,
  matmul,
  memory,
  metrics,
  optimizers,
  synthetic,
  tree_paths,
)
from qlora_jax import config as config_lib
from qlora_jax.checkpoints import Checkpoints
from qlora_jax.config import BaseQuantization, ExperimentConfig
from qlora_jax.evaluate import held_out_loss
from qlora_jax.fingerprint import fingerprint
from qlora_jax.hf import checkpoint as hf_checkpoint
from qlora_jax.hf import packed
from qlora_jax.hf.files import new_directory, read_json
from qlora_jax.metrics import METRICS_FILE, MetricsWriter, write_whole
from qlora_jax.models.attention import most_segments
from qlora_jax.models.remat import RematPolicy
from qlora_jax.models.transformer import Transformer, attention_name
from qlora_jax.quantization import details
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.train import (
  Batch,
  Done,
  SignalGuard,
  TrainState,
  drive,
  fit_loop,
  init_state,
  make_train_step,
)

T = TypeVar("T")

# (config, model, frozen, state after the last step, held-out rows) → what a sweep wants to know.
Measure = Callable[[ExperimentConfig, Transformer, Any, TrainState, data.Dataset], dict[str, Any]]


_INITIALIZED, _PARAMS = "initialized", "params.npz"
_QUANTIZED = "quantized"


class RunDirectoryError(ValueError):
  """A run directory that cannot be used; one line says why."""


class Shared:
  """What the trials of one process have in common, and it makes once.

  Rows of text, bases, and train steps: a step that is made again is traced and compiled again.
  """

  def __init__(self, bases: int = 2):
    """`bases`: how many stay in memory; of a sweep the quantized and the 16-bit one."""
    self.bases = bases
    self._held: dict[str, dict[Hashable, Any]] = {}

  def once(self, kind: str, key: Hashable, make: Callable[[], T], keep: int = 1) -> T:
    """`make()`, or what it gave for this `key` before; the `keep` used last of a kind are held."""
    held = self._held.setdefault(kind, {})
    if key in held:
      value = held.pop(key)
    else:
      while len(held) >= keep:  # first: two bases may fit in memory where three do not
        del held[next(iter(held))]
      value = make()
    held[key] = value  # the last in order is the one used last
    return value


@dataclasses.dataclass(frozen=True)
class Rows:
  """The data of a trial: what is trained on, and what is held out."""

  train: data.Dataset
  held_out: data.Dataset


def _batches(config: ExperimentConfig, rows: data.Dataset) -> data.Batches:
  train = config.train
  return data.Batches(
    rows,
    train.batch_size,
    train.accumulate_steps,
    seed=config.data.seed,
    segments=config.data.packing,
  )


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
        for kept in (_INITIALIZED, _QUANTIZED):
          shutil.rmtree(workdir / kept, ignore_errors=True)
        write_json(path, config_lib.to_json_dict(config))
      elif differences:
        raise RunDirectoryError(
          f"{workdir}: holds a run with another config ({'; '.join(differences)}); "
          "give another --workdir, or the same config"
        )
      return
    # A kill may have come while config.json was written.
    if {entry.name for entry in workdir.iterdir()} - {"config.json.tmp"}:
      raise RunDirectoryError(
        f"{workdir}: holds files but no config.json, so it is no run; give another --workdir"
      )
    write_json(path, config_lib.to_json_dict(config))
  except OSError as error:
    raise RunDirectoryError(f"{workdir}: cannot be written: {error.strerror}") from None


def saved_step(workdir: Path) -> int:
  """The step that a run directory's newest checkpoint is of; 0 without any."""
  folder = workdir / "checkpoints"
  names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file as a whole, and the directory that it is in if there is none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  write_whole(path, json.dumps(value, indent=2, default=list) + "\n")


def check_disk(
  workdir: Path,
  needed: int,
  what: str = "checkpoints need",
  remedy: str = "lower train.keep_checkpoints or lora.rank, or give another --workdir",
) -> None:
  """Raises RunDirectoryError where `needed` bytes, for `what`, do not fit on the disk."""
  free = shutil.disk_usage(workdir).free
  if free < needed:
    raise RunDirectoryError(
      f"{workdir}: {free / 1e6:,.0f} MB free on its disk; {what} {needed / 1e6:,.0f} MB ({remedy})"
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
  """What one training gave: losses, sizes in bytes, what computed it, what `measure` found.

  `trials_together`: [step, trials, largest rank, to which all are padded] of each group that it was
  in, from that step on; none: alone. (The rank is null of a group that an older version ran.)
  """

  loss_before: float
  loss_after: float
  base_bytes: int
  bits: float
  adapter_bytes: int
  optimizer_bytes: int
  trained_parameters: int
  seconds_this_process: float
  implementations: dict[str, Any]
  trials_together: list[list[int | None]]
  measured: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Training:
  """A training that is ready, whose steps whoever runs the trial takes.

  Attributes:
    config: of the trial.
    model: as it trains.
    frozen: its base.
    optimizer: of `config`.
    state: before the next step.
    loop: what is left of it: see `train.fit_loop`.
    writer: of its metrics.
  """

  config: ExperimentConfig
  model: Transformer
  frozen: Any
  optimizer: Any
  state: TrainState
  loop: Generator[Batch, Done, None]
  writer: MetricsWriter


# A trial, or a part of it: yields each training and is sent the state that it ends with.
Steps = Generator[Training, TrainState, T]


def run_stage(
  config: ExperimentConfig,
  base: Path,
  rows: Rows,
  directory: Path,
  *,
  quantization: BaseQuantization | None,
  description: str,
  shared: Shared,
  measure: Measure | None = None,
  guard: SignalGuard | None = None,
  until: int | None = None,
) -> Steps[Stage]:
  """Loads the base, has adapters trained on it from the last checkpoint on, evaluates, saves them.

  Args:
    guard: of a group, whose trials stop together; None for one of its own.
    until: the step at which it pauses; None for none.
  """
  started = time.monotonic()
  directory.mkdir(parents=True, exist_ok=True)
  model, frozen, optimizer, state = _start(config, base, quantization, directory, shared, rows)
  # A step takes over the memory of the params.
  initial = jax.tree.map(np.array, state.params) if config.lora.changes_base else None
  train = config.train
  batches = _batches(config, rows.train)
  if config.model.remat == "auto":
    arguments = (state, frozen, batches.batch(0))
    model = model.clone(
      remat=_fastest_remat(config, model, optimizer, arguments, directory, shared)
    )
  if config.data.packing:
    model = _by_blocks_if_crowded(config, model, rows, description)
  # Orbax writes a new checkpoint before it drops the oldest.
  check_disk(directory, (train.keep_checkpoints + 1) * tree_paths.tree_bytes(state))

  def loss(params, constants) -> float:
    with planned.out_of_memory_explained(lambda: planned.evaluation_explained(config, model)):
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

  frozen_name = fingerprint(frozen)
  if config.lora.changes_base:
    # The base is not whole without what the adapters took out of it.
    loss_before = loss(state.params, state.constants)
  else:
    # Of each base once: trials of other ranks and seeds start from the same loss.
    loss_before = shared.once(
      "loss_before",
      (model, frozen_name, base, config.data, train.eval_batch_size, train.loss_chunk),
      lambda: loss({}, {}),
      keep=1000,
    )
  with (
    Checkpoints(
      directory / "checkpoints",
      keep=train.keep_checkpoints,
      base_fingerprint=frozen_name,
    ) as checkpoints,
    SignalGuard() if guard is None else contextlib.nullcontext(guard) as guard,
  ):
    restored = checkpoints.restore(state)
    if restored is not None:
      state = restored
      print(f"{description}: resumes at step {int(state.step)} of {train.steps}")
    resume_step = None if restored is None else int(state.step)
    with MetricsWriter(directory, resume_step=resume_step) as writer:
      if restored is None:
        writer.write(0, {"held_out_loss": loss_before})
      loop = fit_loop(
        int(state.step),
        batches=batches,
        cfg=train,
        learning_rate=optimizers.schedule(config.optimizer, train.steps),
        guard=guard,
        evaluate=evaluate,
        checkpoints=checkpoints,
        writer=writer,
        description=description,
        until=until,
      )
      with contextlib.closing(loop):
        state = yield Training(config, model, frozen, optimizer, state, loop, writer)
  adapter = directory / "adapter"
  if not adapter.exists():
    save_adapter(adapter, config, base, model, frozen, state, initial)
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
    implementations=_implementations(config, model, frozen),
    trials_together=[
      [line["step"], line["trials_together"], line.get("padded_rank")]
      for line in metrics.read(directory)
      if "trials_together" in line
    ],
    measured=(None if measure is None else measure(config, model, frozen, state, rows.held_out)),
  )


def train_alone(training: Training, shared: Shared) -> TrainState:
  """Takes the steps of a training; returns its last state."""
  step = _train_step(training.config, training.model, training.optimizer, shared)
  explain = functools.partial(planned.training_explained, training.config, training.model)
  with planned.out_of_memory_explained(explain):
    return drive(training.state, step, training.frozen, training.loop)


def _train_step(
  config: ExperimentConfig, model: Transformer, optimizer: Any, shared: Shared
) -> Any:
  """The jitted step, one for all trials that it serves."""
  train, model = config.train, model.clone(unroll=config.model.unroll)
  return shared.once(
    "train_step",
    (model, config.optimizer, train.steps, train.loss_chunk, train.z_loss),
    lambda: make_train_step(model, optimizer, train.loss_chunk, train.z_loss),
    keep=16,
  )


def _fastest_remat(
  config: ExperimentConfig,
  model: Transformer,
  optimizer: Any,
  arguments: tuple[Any, ...],
  directory: Path,
  shared: Shared,
) -> RematPolicy:
  """What remat "auto" stands for here; kept, since in 16 bits another policy rounds otherwise."""
  kept = directory / "remat.json"
  if kept.exists():
    return read_json(kept)["policy"]

  def make_step(policy: RematPolicy) -> Any:
    # The one that is trained with: what compiling it took is not taken again.
    return _train_step(config, model.clone(remat=policy), optimizer, shared)

  def find() -> RematPolicy:
    available = memory.available_bytes(arguments)
    expected = planned.peaks(config, model.config)
    policy, needed = memory.fastest_remat(make_step, arguments, available, expected)
    tried = ", ".join(f"{each} {_size(size)}" for each, size in needed.items())
    print(f"remat: {policy}, of {tried}, in {_size(available)}")
    return policy

  leaves, structure = jax.tree.flatten(arguments)
  shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
  asked = (model, config.model.unroll, config.optimizer, structure, shapes)
  policy = shared.once("remat", asked, find, keep=16)
  write_json(kept, {"policy": policy})
  return policy


def _by_blocks_if_crowded(
  config: ExperimentConfig, model: Transformer, rows: Rows, description: str
) -> Transformer:
  """`model`, told to go by blocks where rows hold more documents than cuDNN's kernel takes."""
  seq_len = config.data.seq_len
  if attention_name(model, seq_len, packed=True) != "cudnn":
    return model
  parts = [each.segment_ids for each in (rows.train, rows.held_out)]
  most = max(1 + int((ids[:, 1:] != ids[:, :-1]).sum(1).max(initial=0)) for ids in parts)
  if most <= most_segments(seq_len):
    return model
  reason = f"a row holds {most} documents, cuDNN's kernel takes {most_segments(seq_len)}"
  if config.model.attention == "cudnn":
    raise ValueError(f"model.attention: 'cudnn'; {reason}")
  print(f"{description}: attention by blocks, since {reason}")
  return model.clone(attention="blockwise")


def _implementations(config: ExperimentConfig, model: Transformer, frozen: Any) -> dict[str, Any]:
  """What computed the training's products and attention, and what it computed again."""
  seq_len = config.data.seq_len
  packed = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(leaf)]
  product = None
  if packed:
    # The first matrix of the first stack stands for all.
    stack = packed[0]
    first = (0,) * (stack.ndim - 2)
    w = jax.eval_shape(lambda w: jax.tree.map(lambda x: x[first], w), stack)
    x = jax.ShapeDtypeStruct((config.train.batch_size, seq_len, w.shape[0]), model.dtype)
    product = matmul.choose(x, w, model.implementation)
  return {
    "matmul": product,
    "attention": attention_name(model, seq_len, packed=config.data.packing),
    "remat": model.remat,
  }


def _start(
  config: ExperimentConfig,
  base: Path,
  quantization: BaseQuantization | None,
  directory: Path,
  shared: Shared,
  rows: Rows | None = None,
) -> tuple[Transformer, Any, Any, TrainState]:
  """The model, its base, the optimizer, and the state before the first step."""
  optimizer = optimizers.make(config.optimizer, config.train.steps)
  if config.lora.changes_base:
    model, frozen, params, constants = _initialized(
      config, base, quantization, directory, shared, rows
    )
  else:
    if quantization is not None and quantization.calibrated:
      model, frozen = _calibrated_base(config, base, quantization, directory, shared, rows)
    else:
      model, frozen = load_base(config, base, quantization, shared)
    if config.lora.init == "eva":
      params, constants = _eva(config, model, frozen, directory, rows)
    else:
      params, constants = lora.init(jax.random.key(config.seed), frozen, config.lora)
  state = init_state(params, constants, optimizer, seed=config.seed, dtype=model.dtype)
  return model, frozen, optimizer, state


def _calibrated_base(
  config: ExperimentConfig,
  base: Path,
  quantization: BaseQuantization,
  directory: Path,
  shared: Shared,
  rows: Rows | None,
) -> tuple[Transformer, Any]:
  """The model and the base that is quantized by what data says; kept, as that of `_initialized`."""
  kept = directory / _QUANTIZED

  def make() -> tuple[Transformer, Any]:
    if kept.exists():
      return read()
    if not hf_checkpoint.is_dense(hf_checkpoint.model_directory(base)):
      raise ValueError(
        f"{base}: packed; quantization.importance, gptq and bits_per_weight start from the dense "
        "weights: give the checkpoint that it was made from"
      )
    assert rows is not None, "a run with a checkpoint has kept its base"
    # A sequence at a time, whatever a step of the training takes.
    count = quantization.calibration_sequences
    if count > len(rows.train.tokens):
      raise ValueError(
        f"quantization.calibration_sequences: {count}; the data has {len(rows.train.tokens)}"
      )
    batches = data.Batches(
      rows.train, 1, count, seed=config.data.seed, segments=config.data.packing
    )
    model, dense = hf.load(base, dtype=config.model.dtype)
    frozen = calibration.quantize_base(
      model,
      dense,
      quantization,
      tuple(hf_checkpoint.default_rules(quantization)),
      [batches.batch(0)],
      config.train.loss_chunk,
      config.model.storage_dtype,
    )
    return model, frozen

  def read() -> tuple[Transformer, Any]:
    model, frozen = hf.load(kept, dtype=config.model.dtype)
    # As it is where it was made: what is compiled for one serves the other.
    own = dataclasses.replace(model.config, hf_directory=str(hf_checkpoint.model_directory(base)))
    return model.clone(config=own), frozen

  cfg = config.model
  recipe = (base, quantization, config.data, cfg.dtype, cfg.storage_dtype)
  model, frozen = shared.once("base", recipe, make, keep=shared.bases)
  if not kept.exists():
    check_disk(
      directory,
      tree_paths.tree_bytes(frozen),
      "the base that quantization's calibration makes is kept, and needs",
      "give another --workdir",
    )
    hf.save_base(kept, model, frozen)
  elif packed.read_manifest(kept)["fingerprint"] != fingerprint(frozen):
    # Another process made it, and not to the same last bits.
    model, frozen = read()
  return as_configured(config, model), frozen


def _initialized(
  config: ExperimentConfig,
  base: Path,
  quantization: BaseQuantization | None,
  directory: Path,
  shared: Shared,
  rows: Rows | None,
) -> tuple[Transformer, Any, Any, Any]:
  """Model, base, params and constants of an init that changes the base; made once.

  They are kept, since a decomposition that is made again may differ in its last bits, and a run
  that was stopped goes on to the same numbers.
  """
  kept = directory / _INITIALIZED
  if not kept.exists():
    gradients = moments = None
    if config.lora.init == "cloq":
      moments = calibration.second_moments(
        *load_base(config, base, quantization, shared),
        config.lora,
        _calibration_batches(config, rows),
      )
    if config.lora.init == "lora_ga":
      gradients = calibration.weight_gradients(
        *load_base(config, base, quantization, shared),
        config.lora,
        _calibration_batches(config, rows),
        config.train.loss_chunk,
      )
    model, frozen, params, _ = hf.initialize(
      jax.random.key(config.seed),
      base,
      quantization,
      config.lora,
      dtype=config.model.dtype,
      storage_dtype=config.model.storage_dtype,
      gradients=gradients,
      moments=moments,
    )
    check_disk(
      directory,
      tree_paths.tree_bytes((frozen, params)),
      f"the base that lora.init {config.lora.init!r} changes is kept, and needs",
      "take lora.init 'lora', or give another --workdir",
    )
    with new_directory(kept) as temporary:
      hf.save_base(temporary / "base", model, frozen)
      np.savez(temporary / _PARAMS, **tree_paths.leaves(params))
    del model, frozen, params
  model, frozen = hf.load(kept / "base", dtype=config.model.dtype)
  return (
    as_configured(config, model),
    frozen,
    _kept_params(kept),
    lora.constants(frozen, config.lora),
  )


def _eva(
  config: ExperimentConfig, model: Transformer, frozen: Any, directory: Path, rows: Rows | None
) -> tuple[Any, Any]:
  """Params and constants of EVA; kept, as those of `_initialized`, with the ranks that it chose."""
  kept = directory / _INITIALIZED
  if not kept.exists():
    moments = calibration.second_moments(
      model, frozen, config.lora, _calibration_batches(config, rows)
    )
    params, _, chosen = lora_init.eva(jax.random.key(config.seed), frozen, config.lora, moments)
    with new_directory(kept) as temporary:
      np.savez(temporary / _PARAMS, **tree_paths.leaves(params))
      write_json(temporary / "lora.json", dataclasses.asdict(chosen))
  return _kept_params(kept), lora.constants(
    frozen, lora.LoRAConfig(**read_json(kept / "lora.json"))
  )


def _calibration_batches(
  config: ExperimentConfig, rows: Rows | None
) -> list[dict[str, np.ndarray]]:
  assert rows is not None, "a run with a checkpoint has kept what it started from"
  batches = _batches(config, rows.train)
  return [batches.batch(step) for step in range(config.lora.calibration_batches)]


def _kept_params(kept: Path) -> Any:
  with np.load(kept / _PARAMS) as file:
    return tree_paths.nest({path: jax.numpy.asarray(file[path]) for path in file})


def save_adapter(
  path: Path,
  config: ExperimentConfig,
  base: Path,
  model: Transformer,
  frozen: Any,
  state: Any,
  initial: Any,
) -> None:
  """Writes the adapter of a training, as PEFT keeps them, with what it was trained by.

  It is for the original base, also where training had another: see `lora.plain`.
  """
  hf.save_adapter(
    path,
    state.params,
    state.constants,
    config.lora,
    model=model,
    frozen=frozen,
    initial=initial,
    base_model_name=str(base),
    card={
      "run": config.name,
      "steps": f"{int(state.step)} of {config.train.steps}",
      "sequence length": config.data.seq_len,
      "sequences a step": config.train.batch_size * config.train.accumulate_steps,
      "learning rate": config.optimizer.learning_rate,
      "variant": config.lora.variant,
      "initialization": config.lora.init,
      **({"fits": _fits(config)} if _leaves_error_behind(config) else {}),
      "base stored as": storage(config.base_quantization),
      "computed in": config.model.dtype,
      "seed": config.seed,
    },
  )


def _leaves_error_behind(config: ExperimentConfig) -> bool:
  """Whether the adapter's base, the original one, lacks an error that training had: q's."""
  return config.lora.changes_base and config.base_quantization is not None


def _fits(config: ExperimentConfig) -> str:
  return (
    f"the original {_bits(config)}-bit base; the quantized base's error is not in it: the loss "
    "shown is that of initialized/base with the run's checkpoint"
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
  base = base_directory(config)
  model, frozen, _, state = _start(config, base, config.base_quantization, workdir, Shared())
  initial = state.params if config.lora.changes_base else None
  with Checkpoints(
    workdir / "checkpoints",
    keep=config.train.keep_checkpoints,
    base_fingerprint=fingerprint(frozen),
  ) as checkpoints:
    state = checkpoints.restore(state)
  if state is None:
    raise RunDirectoryError(f"{workdir}: no checkpoint yet")
  save_adapter(path, config, base, model, frozen, state, initial)
  return int(state.step)


def storage(quantization: BaseQuantization | None) -> str:
  """How a base is stored, in words."""
  if quantization is None:
    return "16 bits"
  own = details(dataclasses.asdict(quantization))
  return f"{quantization.codebook}, blocks of {quantization.block_size}{own}"


def base_directory(config: ExperimentConfig) -> Path:
  """Where the base is: `model.path`, or that of the one trained for `pretrain`."""
  return Path(config.model.path) if config.model.path else trained_base(config.pretrain)


def load_base(
  config: ExperimentConfig, base: Path, quantization: BaseQuantization | None, shared: Shared
) -> tuple[Transformer, Any]:
  """The model and its frozen tree, quantized or, with None, as stored."""
  cfg = config.model
  table_bits = None if quantization is None else config.table_bits
  model, frozen = shared.once(
    "base",
    (base, quantization, table_bits, cfg.dtype, cfg.storage_dtype),
    lambda: hf.load(
      base,
      planned.rules(config, quantization, hf_checkpoint.read_config(base)),
      dtype=cfg.dtype,
      storage_dtype=cfg.storage_dtype,
    ),
    keep=shared.bases,
  )
  return as_configured(config, model), frozen


def as_configured(config: ExperimentConfig, model: Transformer) -> Transformer:
  """`model` computing as the config says; for remat "auto", which is found later, as "full"."""
  cfg = config.model
  remat = "full" if cfg.remat == "auto" else cfg.remat
  attention = None if cfg.attention == "auto" else cfg.attention
  return model.clone(remat=remat, attention=attention, mlp_chunk=cfg.mlp_chunk)


def run(
  config: ExperimentConfig,
  workdir: Path,
  shared: Shared | None = None,
  measure: Measure | None = None,
  until: int | None = None,
) -> dict[str, Any]:
  """Runs a trial, or what is left of it, and returns its summary.

  Args:
    config: of the trial.
    workdir: its run directory.
    shared: given by a sweep, whose trials use it in turn.
    measure: of each trained model; what it returns stands in the summary under "measured".
    until: the step at which it pauses; None for none.

  Raises:
    RunDirectoryError, ValueError, OSError: see `prepare_directory`, `hf.load`, `data`.
    train.Paused: it is at `until`.
    train.Interrupted, train.NonFiniteLossError: the run can go on from its last checkpoint.
  """
  shared = Shared(bases=1) if shared is None else shared
  with contextlib.closing(steps(config, workdir, shared, measure, until=until)) as trial:
    try:
      training = next(trial)
      while True:
        training = trial.send(train_alone(training, shared))
    except StopIteration as finished:
      return finished.value


def steps(
  config: ExperimentConfig,
  workdir: Path,
  shared: Shared,
  measure: Measure | None = None,
  guard: SignalGuard | None = None,
  until: int | None = None,
) -> Steps[dict[str, Any]]:
  """`run`, with its trainings left to the caller: yields each, and is sent the state it ends with.

  Args:
    config, workdir, shared, measure, until: see `run`.
    guard: of several trials that stop together; None for one of each training's own.
  """
  prepare_directory(workdir, config)
  path = workdir / "summary.json"
  if path.exists():
    print(f"{workdir}: this run is finished; its table again")
    return read_json(path)
  environment.keep_compiled_programs(
    config.train.compiled_programs, cache_directory() / "compiled_programs"
  )
  base = base_directory(config)
  rows = shared.once(
    "rows",
    (config.data, base),
    lambda: load_rows(config, base, hf_checkpoint.read_config(base).vocab_size),
  )
  summary: dict[str, Any] = {
    "name": config.name,
    "seed": config.seed,
    "base": str(base),
    "qlora": None,
    "lora_16bit": None,
    "environment": environment.describe(),
  }

  def stage(
    directory: Path,
    quantization: BaseQuantization | None,
    description: str,
    config: ExperimentConfig = config,
  ) -> Steps[dict[str, Any]]:
    found = yield from run_stage(
      config,
      base,
      rows,
      directory,
      quantization=quantization,
      description=description,
      shared=shared,
      measure=measure,
      guard=guard,
      until=until,
    )
    return dataclasses.asdict(found)

  full = f"{_bits(config)}-bit LoRA"
  if config.base_quantization is None:
    summary["lora_16bit"] = yield from stage(workdir, None, full)
  else:
    summary["qlora"] = yield from stage(workdir, config.base_quantization, "QLoRA")
  if config.train.compare_16bit:
    # Plain, whatever the init: what quantizing cost and an init wins back is measured by it. And
    # QA-LoRA is of packed bases alone.
    variant = "lora" if config.lora.variant == "qa_lora" else config.lora.variant
    plain = dataclasses.replace(
      config,
      model=dataclasses.replace(config.model, quantize=False),
      lora=dataclasses.replace(config.lora, init="lora", variant=variant),
      train=dataclasses.replace(config.train, compare_16bit=False),
    )
    summary["lora_16bit"] = yield from stage(workdir / "lora_16bit", None, full, plain)
  write_json(path, summary)
  return summary


def _bits(config: ExperimentConfig) -> int:
  return 8 * np.dtype(config.model.storage_dtype).itemsize


def closing_table(config: ExperimentConfig, summary: dict[str, Any], workdir: Path) -> str:
  """The table that a run ends with, and what to try next."""
  qlora, full = summary["qlora"], summary["lora_16bit"]
  bits = _bits(config)
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
  if qlora:
    quantization = config.quantization
    code_bits = quantization.bits_per_weight
    if code_bits is None:
      code_bits = codebooks.get(quantization.codebook, quantization.block_size).bits
    small = f"{quantization.codebook}, block {quantization.block_size}"
    start = f", {config.lora.init} adapters" if config.lora.changes_base else ""
    row(f"{code_bits:g}-bit base ({small}){start}", qlora, qlora["loss_before"], False)
    row(f"after QLoRA, rank {config.lora.rank}", qlora, qlora["loss_after"], True)
  if full:
    same = ", same data" if qlora else f", rank {config.lora.rank}"
    row(f"after {bits}-bit LoRA{same}", full, full["loss_after"], True)
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
    f"adapter/{', lora_16bit/' if qlora and full else ''}",
    f"The base is in {summary['base']}",
  ]
  if _leaves_error_behind(config):
    text.append(f"adapter/ is for {_fits(config)}.")
  return "\n".join(text)


def _size(count: int) -> str:
  for unit, size in (("GB", 1e9), ("MB", 1e6)):
    if count >= size:
      return f"{count / size:.2f} {unit}"
  return f"{count / 1e3:.1f} kB"


def dry_run(config: ExperimentConfig) -> str:
  """The resolved config, each weight's treatment, and bytes by part; nothing is loaded."""
  model = as_configured(
    config, Transformer(planned.shape_of(config), dtype=np.dtype(config.model.dtype))
  )
  if model.attention == "cudnn":
    # Of a GPU, and counted on a CPU.
    model = model.clone(attention="blockwise")
  train = config.train
  counted = memory.footprint(
    model,
    planned.abstract_base(config, model),
    # Shapes are those of plain LoRA, whatever the values start as.
    dataclasses.replace(config.lora, init="lora"),
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
  if config.model.unroll:
    lines.append("  (model.unroll: counted as a loop over the layers)")
  if config.model.remat == "auto":
    lines.append("  (remat auto: counted as full; a run keeps more where it fits)")
  quantization = config.base_quantization
  if quantization is not None and quantization.bits_per_weight is not None:
    lines.append(
      f"  (bits_per_weight {quantization.bits_per_weight:g}: counted as "
      f"{planned.widest(quantization).codebook} "
      "throughout; which weight gets which is seen in the data)"
    )
  return "\n".join(lines)

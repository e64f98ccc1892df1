"""The configuration of a run: frozen dataclasses, checked before anything else happens.

The dataclasses are the one source. The fields of `ml_collections.ConfigDict` that a config file
fills in, the flags of the command line, the types, the suggestions in messages and the text of
`--help` are all generated from them:

  config file (ConfigDict)  ──┐
  overrides (flags, sweeps) ──┼─→ from_config_dict ─→ ExperimentConfig ─→ to_json_dict → config.json
  defaults of the dataclasses ┘

A `ConfigDict` is a draft and may be incomplete or contradictory; an `ExperimentConfig` cannot be.
So a config file starts from `defaults()` and says what differs:

  def get_config():
    config = defaults()
    config.name = "stories"
    config.lora.rank = 8
    return config

Every error is a `ConfigError` of one line: the path of the field, its value and the rule.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import ml_collections

from qlora_jax import codebooks, lora
from qlora_jax.lora import LoRAConfig
from qlora_jax.optimizer_state import Storage
from qlora_jax.quantization import QuantizationConfig

FloatDType = Literal["bfloat16", "float32", "float16"]

# What the squared errors of weights are weighed by.
Importance = Literal["none", "fisher", "inputs"]

# A ConfigDict. Its fields are made at run time, so a type checker can only get them wrong.
Draft: typing.TypeAlias = Any


class ConfigError(ValueError):
  """A config that cannot be run; the message is one line: path, value, rule."""


def _require(condition: bool, path: str, value: Any, rule: str) -> None:
  if not condition:
    raise ConfigError(f"{path}: {value!r}; {rule}")


def _require_seed(path: str, seed: int) -> None:
  _require(0 <= seed < 2**32, path, seed, "a seed is a 32-bit number, 0 to 4294967295")


class _Section:
  """A group of fields: types are checked (and ints made floats) first, then `_check` runs."""

  _name: typing.ClassVar[str]  # the section's path in an ExperimentConfig; "" for the root

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
      path = f"{self._name}.{field.name}" if self._name else field.name
      value = _typed(_hints(type(self))[field.name], getattr(self, field.name), path)
      object.__setattr__(self, field.name, value)  # frozen for everyone else
    self._check()

  def _require(self, condition: bool, field: str, rule: str) -> None:
    path = f"{self._name}.{field}" if self._name else field
    _require(condition, path, getattr(self, field), rule)

  def _at_least(self, minimum: int, *fields: str) -> None:
    for field in fields:
      self._require(getattr(self, field) >= minimum, field, f"at least {minimum}")

  def _positive(self, *fields: str) -> None:
    for field in fields:
      value = getattr(self, field)
      self._require(math.isfinite(value) and value > 0, field, "a finite number above 0")

  def _check(self) -> None:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
  """Which base model is loaded, and how it is kept and computed.

  Attributes:
    path: Hugging Face directory (config.json, safetensors), or None to train a base (`pretrain`).
    quantize: as `quantization` says; False keeps every weight in `storage_dtype`: 16-bit LoRA.
    dtype: of activations and products.
    storage_dtype: of the weights that are not quantized (norms, embeddings, and all in 16 bits).
    remat: what the backward pass computes again: all of a layer (full; offload: its input waits in
      the host's memory; offload_pairs: that of every other layer), its MLP (mlp), norms and
      activations (elementwise), nothing (none); auto: the fastest that the device's memory lets,
      found by compiling.
    table_bits: of the token table and the head where the base is quantized: 8 (int8) or 4 (nf4), in
      blocks of 64; None for `storage_dtype`.
    attention: how it is computed; auto: by the fastest that serves the case.
    mlp_chunk: tokens of a row whose wide activations exist at once, at most, for long rows; None
      for all.
    unroll: whether a step that trains adapters computes its layers in a row, not in a loop: faster
      where remat keeps much of each (elementwise), but compiled more slowly; of "full" it only
      takes memory.
  """

  path: str | None = None
  quantize: bool = True
  dtype: FloatDType = "bfloat16"
  storage_dtype: FloatDType = "bfloat16"
  remat: Literal["auto", "offload", "offload_pairs", "full", "mlp", "elementwise", "none"] = "full"
  table_bits: int | None = None
  attention: Literal["auto", "plain", "blockwise", "cudnn"] = "auto"
  mlp_chunk: int | None = None
  unroll: bool = False

  _name: typing.ClassVar[str] = "model"

  def _check(self) -> None:
    self._require(self.path != "", "path", "a directory, or None")
    self._require(self.table_bits in (None, 4, 8), "table_bits", "4, 8 or None")
    if self.mlp_chunk is not None:
      self._at_least(1, "mlp_chunk")
    paired = self.unroll and self.remat == "offload_pairs"
    self._require(
      not paired, "unroll", "False with remat 'offload_pairs', whose pairs are a loop's"
    )


@dataclasses.dataclass(frozen=True)
class PretrainConfig(_Section):
  """A small base model that the run trains itself, from scratch: on generated text, or on files.

  Attributes:
    steps: optimizer steps; 0 means that there is a `model.path` instead.
    batch_size: sequences a step.
    learning_rate: the highest, after warm-up.
    warmup_steps: steps of linear rise to learning_rate, if there are more than these.
    weight_decay: decoupled, times the learning rate.
    dtype: of activations and products; the weights are float32 while they are trained.
    paths: files of documents (.txt, .jsonl, .jsonl.zst) that it learns in place of generated text.
    holdout: share of the documents of each of `paths`, its last ones, that its loss curve is of.
    domain: kind of text that is generated (see qlora_jax/synthetic.py).
    num_documents: documents that are generated.
    minor_domain: kind of text of which the base sees a little as well, or None.
    minor_documents: documents of it.
    vocab_size: tokens: bytes; of `paths` those of a byte-level BPE that is trained on them first.
    hidden_size: width D of the residual stream.
    intermediate_size: width of the SwiGLU.
    num_layers: decoder layers.
    num_heads: query heads.
    num_kv_heads: key and value heads, shared by groups of query heads.
    max_position_embeddings: longest sequence, in tokens.
    seed: of the initial weights, the generated text and its order.
  """

  steps: int = 0
  batch_size: int = 32
  learning_rate: float = 3e-3
  warmup_steps: int = 20
  weight_decay: float = 0.01
  dtype: FloatDType = "float32"
  paths: tuple[str, ...] = ()
  holdout: float = 0.01
  domain: str = "tales"
  num_documents: int = 2000
  minor_domain: str | None = None
  minor_documents: int = 100
  vocab_size: int = 256
  hidden_size: int = 128
  intermediate_size: int = 344
  num_layers: int = 4
  num_heads: int = 4
  num_kv_heads: int = 2
  max_position_embeddings: int = 256
  seed: int = 0

  _name: typing.ClassVar[str] = "pretrain"

  def _check(self) -> None:
    self._at_least(0, "steps", "warmup_steps")
    self._at_least(1, "batch_size", "num_documents", "minor_documents")
    self._at_least(1, "intermediate_size", "num_layers")
    self._at_least(1, "num_heads", "num_kv_heads")
    self._at_least(2, "hidden_size", "max_position_embeddings")
    # With files, all bytes and the end of a document.
    self._at_least(257 if self.paths else 256, "vocab_size")
    self._positive("learning_rate")
    decay = self.weight_decay
    self._require(math.isfinite(decay) and decay >= 0, "weight_decay", "a finite number, 0 or more")
    self._require(
      not self.paths or self.minor_domain is None,
      "minor_domain",
      "text is generated or, with pretrain.paths, read: set this to None",
    )
    self._require(0 < self.holdout < 1, "holdout", "a share above 0 and below 1")
    self._require(self.dtype != "float16", "dtype", "float32 or bfloat16: a base has no loss scale")
    # RoPE turns pairs of coordinates, so a head's width is even.
    self._require(
      self.hidden_size % (2 * self.num_heads) == 0,
      "hidden_size",
      f"a multiple of 2 * pretrain.num_heads = {2 * self.num_heads}",
    )
    self._require(
      self.num_heads % self.num_kv_heads == 0,
      "num_kv_heads",
      f"a divisor of pretrain.num_heads = {self.num_heads}",
    )
    _require_seed("pretrain.seed", self.seed)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
  """The text that the adapters learn, and how it becomes sequences.

  Attributes:
    path: a text (.txt), or JSON lines (.jsonl, .jsonl.zst); or None, with `synthetic`.
    synthetic: kind of text that is generated; or None, with `path`.
    num_documents: documents that are generated, when `synthetic`.
    tokenizer: the model's own (model), or one token a byte (bytes).
    seq_len: tokens a sequence T.
    holdout: share of the text, its last part, that is evaluated on and never trained on.
    packing: whole documents side by side with segment ids, rather than windows over one text.
    text_field: key of a JSON line that holds its text.
    prompt_field: key that holds a prompt; with it the loss is on the completion alone.
    completion_field: key that holds the completion; set together with prompt_field.
    seed: of the order of sequences; of synthetic text also of the text itself, its held-out part
      included, so that trials of two such seeds are measured on different texts.
  """

  path: str | None = None
  synthetic: str | None = None
  num_documents: int = 2000
  tokenizer: Literal["model", "bytes"] = "model"
  seq_len: int = 512
  holdout: float = 0.1
  packing: bool = False
  text_field: str = "text"
  prompt_field: str | None = None
  completion_field: str | None = None
  seed: int = 0

  _name: typing.ClassVar[str] = "data"

  def _check(self) -> None:
    self._require(self.path != "", "path", "a file, or None")
    self._at_least(2, "num_documents", "seq_len")  # a part held out; a token and the next one
    self._require(0 < self.holdout < 1, "holdout", "a share above 0 and below 1")
    self._require(self.text_field != "", "text_field", "a key of the JSON lines")
    both = (self.prompt_field is None) == (self.completion_field is None)
    missing = "prompt_field" if self.prompt_field is None else "completion_field"
    self._require(both, missing, "data.prompt_field and data.completion_field are set together")
    _require_seed("data.seed", self.seed)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Section):
  """AdamW on the adapters.

  Attributes:
    learning_rate: the highest, after warm-up.
    schedule: shape of the decay to 0 after warm-up (constant: no decay).
    warmup_steps: steps of linear rise to learning_rate.
    weight_decay: decoupled, times the learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    clip_norm: largest global norm of a gradient, or None.
    lora_plus_ratio: LoRA+'s λ: the learning rate of B is so many times that of A.
    state: how the moments are kept between steps: float32, bfloat16, in blocks of 8 bits (8bit), or
      in the host's memory (host).
  """

  learning_rate: float = 2e-4
  schedule: Literal["cosine", "linear", "constant"] = "cosine"
  warmup_steps: int = 0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  clip_norm: float | None = 1.0
  lora_plus_ratio: float = 1.0
  state: Storage = "float32"

  _name: typing.ClassVar[str] = "optimizer"

  def _check(self) -> None:
    self._positive("learning_rate", "eps", "lora_plus_ratio")
    self._at_least(0, "warmup_steps")
    decay = self.weight_decay
    self._require(math.isfinite(decay) and decay >= 0, "weight_decay", "a finite number, 0 or more")
    for field in ("b1", "b2"):
      self._require(0 <= getattr(self, field) < 1, field, "0 or more and below 1")
    if self.clip_norm is not None:
      self._positive("clip_norm")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
  """The loop.

  Attributes:
    steps: optimizer steps.
    batch_size: sequences of one forward and backward pass.
    accumulate_steps: passes whose gradients one optimizer step adds up.
    log_every: steps between two lines of metrics.
    eval_every: steps between two evaluations of the held-out text.
    eval_batch_size: sequences at a time in an evaluation.
    checkpoint_every: steps between two checkpoints.
    keep_checkpoints: the last so many stay on disk.
    loss_chunk: tokens whose logits exist at once in the cross entropy.
    z_loss: what the square of the log of the softmax's sum is weighted by in the loss trained on.
    compare_16bit: also train LoRA on the 16-bit base, same data, for the closing table.
    compiled_programs: the directory where they are kept for the next process, at most 4 GiB of
      them (or $JAX_COMPILATION_CACHE_MAX_SIZE bytes), of which the least recently used go; None
      for none. auto: one in the user's cache, unless $JAX_COMPILATION_CACHE_DIR names another,
      which has only the bound that JAX is told of.
  """

  steps: int = 200
  batch_size: int = 8
  accumulate_steps: int = 1
  log_every: int = 10
  eval_every: int = 50
  eval_batch_size: int = 8
  checkpoint_every: int = 50
  keep_checkpoints: int = 2
  loss_chunk: int = 1024
  z_loss: float = 0.0
  compare_16bit: bool = True
  compiled_programs: str | None = "auto"

  _name: typing.ClassVar[str] = "train"

  def _check(self) -> None:
    self._at_least(1, "steps", "batch_size", "accumulate_steps", "log_every", "eval_every")
    self._at_least(1, "eval_batch_size", "checkpoint_every", "keep_checkpoints", "loss_chunk")
    z_loss = self.z_loss
    self._require(math.isfinite(z_loss) and z_loss >= 0, "z_loss", "a finite number, 0 or more")
    self._require(self.compiled_programs != "", "compiled_programs", "a directory, auto, or None")


@dataclasses.dataclass(frozen=True)
class BaseQuantization(QuantizationConfig):
  """How a base is quantized: all of a `QuantizationConfig`, and what asks a few batches of data.

  The batches are the run's own, before any training, and the model that reads them is the dense
  one. What comes of them is kept in the run's directory.

  Attributes:
    codebook: as of `QuantizationConfig`; with bits_per_weight several, as in
      "bof2s+bof3s+bof4s+int8".
    importance: what a weight's squared error is weighed by, where levels, scales or outliers are
      chosen by it, or the codebooks of a budget: "fisher", the diagonal of the empirical Fisher
      information (`calibration.fisher_diagonal`); "inputs", the second moment of what it is
      multiplied by (`calibration.input_moments`); "none", all alike.
    gptq: draw the codes again with GPTQ's error feedback along K (`gptq.feed_back_errors`).
    gptq_damping: λ of GPTQ, as a share of the mean of the diagonal of the second moments.
    bits_per_weight: a budget: the mean of all quantized weights' bits, scales and tables included.
      Each gets the one of the codebooks by which the sum of errors is least (`bit_budget.rules`).
    calibration_sequences: of the training data, in its order, that these choices read.

  Raises:
    ValueError: naming the field, its value and the rule.
  """

  importance: Importance = "none"
  gptq: bool = False
  gptq_damping: float = 0.01
  bits_per_weight: float | None = None
  calibration_sequences: int = 8

  def __post_init__(self):
    names = self.codebook.split("+")
    if len(names) > 1 and self.bits_per_weight is None:
      raise ValueError(
        f"codebook: {self.codebook!r}; of several bits_per_weight chooses, which is None"
      )
    choices = self.choices  # which checks each
    if self.bits_per_weight is not None:
      if len(set(names)) < 2:
        raise ValueError(
          f"bits_per_weight: {self.bits_per_weight} with codebook {self.codebook!r}; it chooses "
          "from several, such as bof2s+bof3s+bof4s+int8"
        )
      if not (math.isfinite(self.bits_per_weight) and self.bits_per_weight > 0):
        raise ValueError(
          f"bits_per_weight: {self.bits_per_weight}; a finite number above 0, or None"
        )
    weighs = self.bits_per_weight is not None or any(each.weighs_errors for each in choices)
    if self.importance != "none" and not weighs:
      raise ValueError(
        f"importance: {self.importance!r} weighs nothing; codebook {self.codebook!r} is not "
        "learned, scale_rule is not 'mse', and there are neither outliers nor bits_per_weight"
      )
    if self.importance != "none" and self.rotate and self.bits_per_weight is None:
      raise ValueError(
        f"importance: {self.importance!r} with rotate; it is of the weights that were not rotated"
      )
    if self.gptq and self.outlier_fraction:
      raise ValueError(
        f"gptq: True with outlier_fraction {self.outlier_fraction}; its feedback runs over rows of "
        "one grid"
      )
    if not (math.isfinite(self.gptq_damping) and self.gptq_damping > 0):
      raise ValueError(
        f"gptq_damping: {self.gptq_damping}; a finite number above 0, since inputs may be fewer "
        "than K"
      )
    if self.calibration_sequences < 1:
      raise ValueError(f"calibration_sequences: {self.calibration_sequences}; at least 1")

  @property
  def choices(self) -> tuple[QuantizationConfig, ...]:
    """What each weight may be quantized by: one for each of the codebooks."""
    return tuple(
      QuantizationConfig(**{**super(BaseQuantization, self).arguments, "codebook": name})
      for name in self.codebook.split("+")
    )

  @property
  def calibrated(self) -> bool:
    """Whether data is asked."""
    return self.bits_per_weight is not None or self.gptq or self.importance != "none"

  @property
  def arguments(self) -> dict[str, Any]:
    """Of `quantize`.

    Raises:
      ValueError: these choices ask data, which `quantize` has none of.
    """
    if self.calibrated:
      raise ValueError(
        "quantization: importance, gptq and bits_per_weight ask data; calibration.quantize_base "
        "has it"
      )
    return super().arguments


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(_Section):
  """One trial, complete and consistent.

  Attributes:
    name: of the experiment; its run directories bear it.
    seed: of the adapters' initial values and dropout.
  """

  name: str
  seed: int = 0
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
  quantization: BaseQuantization = dataclasses.field(default_factory=BaseQuantization)
  lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

  _name: typing.ClassVar[str] = ""

  def __post_init__(self) -> None:
    # One of a weight, as `quantize_by` takes it, asks no data.
    if type(self.quantization) is QuantizationConfig:
      plain = BaseQuantization(**self.quantization.arguments)
      object.__setattr__(self, "quantization", plain)
    super().__post_init__()

  def _check(self) -> None:
    is_file_name = re.fullmatch(r"\w[\w.-]*", self.name) is not None
    self._require(is_file_name, "name", "a file name of letters, digits, '.', '_' and '-'")
    _require_seed("seed", self.seed)

    path, steps = self.model.path, self.pretrain.steps
    _require(
      path is not None or steps > 0,
      "model.path",
      path,
      "a Hugging Face directory is needed, or pretrain.steps above 0 to train a base",
    )
    _require(
      path is None or steps == 0,
      "model.path",
      path,
      f"there is one base: set this to None, or pretrain.steps = {steps} to 0",
    )
    _require(
      self.data.path is not None or self.data.synthetic is not None,
      "data.path",
      None,
      "a file is needed, or the name of generated text in data.synthetic",
    )
    _require(
      self.data.path is None or self.data.synthetic is None,
      "data.path",
      self.data.path,
      f"there is one text: set this, or data.synthetic = {self.data.synthetic!r}, to None",
    )
    _require(
      self.data.prompt_field is None or self.data.path is not None,
      "data.prompt_field",
      self.data.prompt_field,
      "prompts are read from the JSON lines of data.path, which is None",
    )
    _require(
      steps == 0 or self.data.seq_len <= self.pretrain.max_position_embeddings,
      "data.seq_len",
      self.data.seq_len,
      f"at most pretrain.max_position_embeddings = {self.pretrain.max_position_embeddings}",
    )
    _require(
      self.optimizer.warmup_steps < self.train.steps,
      "optimizer.warmup_steps",
      self.optimizer.warmup_steps,
      f"below train.steps = {self.train.steps}",
    )
    _require(
      self.model.quantize or not self.train.compare_16bit,
      "train.compare_16bit",
      True,
      "model.quantize is False, so the run itself is the 16-bit one: set this to False",
    )

    _require(
      self.optimizer.lora_plus_ratio == 1 or not self.lora.has_fixed_matrices,
      "optimizer.lora_plus_ratio",
      self.optimizer.lora_plus_ratio,
      f"lora.variant = {self.lora.variant!r} trains no B: set this to 1",
    )
    _require(
      self.lora.init not in ("loftq", "cloq") or self.model.quantize,
      "lora.init",
      self.lora.init,
      "model.quantize is False, so there is no quantization error to make up for",
    )
    for field, off in (("importance", "none"), ("gptq", False), ("bits_per_weight", None)):
      value = getattr(self.quantization, field)
      _require(
        value == off or not (self.model.quantize and self.lora.changes_base),
        f"quantization.{field}",
        value,
        f"lora.init {self.lora.init!r} quantizes the base anew, a matrix at a time and without "
        f"data: set this to {off!r}, or lora.init to 'lora' or 'eva'",
      )
    if self.lora.variant == "qa_lora":
      self._require_zero_points()
    _require(
      self.table_bits is None or not (self.lora.changes_base or self.quantization.calibrated),
      "model.table_bits",
      self.model.table_bits,
      "None with a lora.init that changes the base, or a quantization that asks data",
    )

  def _require_zero_points(self):
    rule = (
      "lora.variant 'qa_lora' merges into zero-points: quantize by a codebook that has them, such "
      "as int4_zero_point, with nothing around it"
    )
    _require(self.model.quantize, "model.quantize", False, rule)
    for choice in self.quantization.choices:
      codebook = codebooks.get(choice.codebook, choice.block_size)
      _require(codebook.scale == "minmax", "quantization.codebook", codebook.name, rule)
    for field in ("rotate", "outlier_fraction"):
      value = getattr(self.quantization, field)
      _require(not value, f"quantization.{field}", value, rule)

  @property
  def base_quantization(self) -> BaseQuantization | None:
    """How the base is quantized; None where it is not."""
    return self.quantization if self.model.quantize else None

  @property
  def table_bits(self) -> int | None:
    """Of the token table and the head; None where they are not quantized."""
    return self.model.table_bits if self.model.quantize else None


def table_rules(bits: int | None, tie_embeddings: bool) -> dict[str, QuantizationConfig]:
  """What `model.table_bits` quantizes, as rules of a tree; where tables are tied there is one."""
  if bits is None:
    return {}
  quantization = QuantizationConfig({8: "int8", 4: "nf4"}[bits])
  return {path: quantization for path in ("embed/embedding", *([] if tie_embeddings else ["head"]))}


# --- What the dataclasses say of themselves -------------------------------------------------------


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  """Field name → type, in order; of dataclasses from other modules too."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _help(cls: type) -> dict[str, str]:
  """Field name → its text under `Attributes:` in the docstring of `cls`, or of one it extends."""
  found: dict[str, str] = {}
  for each in reversed(cls.__mro__):
    _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
    section = re.split(r"\n(?=\S)", section)[0]  # up to the next section
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, flags=re.MULTILINE)
    found |= {name: " ".join(text.split()) for name, text in entries}
  return found


def _default(field: dataclasses.Field) -> Any:
  if field.default is not dataclasses.MISSING:
    return field.default
  return None if field.default_factory is dataclasses.MISSING else field.default_factory()


@dataclasses.dataclass(frozen=True)
class Field:
  """One leaf of `ExperimentConfig`.

  Attributes:
    type: its type hint.
    default: None where there is none.
    help: one line of text, from the docstring of its section.
  """

  type: Any
  default: Any
  help: str

  @property
  def type_name(self) -> str:
    """The type as a reader would write it, `float | None`."""
    return _type_name(self.type)


def _leaves(cls: type, prefix: str) -> Iterator[tuple[str, Field]]:
  for field in dataclasses.fields(cls):
    hint = _hints(cls)[field.name]
    if dataclasses.is_dataclass(hint):
      yield from _leaves(typing.cast(type, hint), f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, Field(hint, _default(field), _help(cls).get(field.name, ""))


@functools.cache
def fields() -> Mapping[str, Field]:
  """Every field of an `ExperimentConfig` that holds a value: dotted path → `Field`, in order."""
  return types.MappingProxyType(dict(_leaves(ExperimentConfig, "")))


def unknown_field(path: str) -> ConfigError:
  """The error for a dotted path that leads to no field, with what was probably meant.

  Args:
    path: such as `lora.rnak`.

  Returns:
    `lora.rnak: no such field; did you mean rank?`; of a field that another section has,
    `train.learning_rate: no such field; did you mean optimizer.learning_rate?`.
  """
  cls: type = ExperimentConfig
  *parents, name = path.split(".")
  for depth, parent in enumerate(parents):
    hint = _hints(cls).get(parent)
    here = ".".join(parents[: depth + 1])
    if hint is None:
      path, name = here, parent
      break
    if not dataclasses.is_dataclass(hint):
      rule = f"{here} holds one value, a {_type_name(hint)}, and is set whole"
      return ConfigError(f"{path}: no such field; {rule}")
    cls = typing.cast(type, hint)
  near = difflib.get_close_matches(name, _hints(cls), n=1)
  elsewhere = [known for known in fields() if known.rsplit(".", 1)[-1] == name]
  if name in _hints(cls):
    example = next(known for known in fields() if known.startswith(path + "."))
    return ConfigError(f"{path}: a section; set its fields one by one, as in {example}")
  if near or elsewhere:
    meant = " or ".join(elsewhere or near)
    return ConfigError(f"{path}: no such field; did you mean {meant}?")
  return ConfigError(f"{path}: no such field; there are {', '.join(_hints(cls))}")


# --- Values and their types -----------------------------------------------------------------------


def _is_union(hint: Any) -> bool:
  return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _type_name(hint: Any) -> str:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is type(None):
    return "None"
  if _is_union(hint):
    return " | ".join(map(_type_name, args))
  if origin is Literal:
    return " | ".join(map(repr, args))
  if origin is tuple:
    return f"tuple[{_type_name(args[0])}, ...]"
  if origin is not None:  # Mapping
    return f"dict[{', '.join(map(_type_name, args))}]"
  return hint.__name__


def _mismatch(hint: Any, value: Any, path: str) -> ConfigError:
  if typing.get_origin(hint) is Literal:
    if path in ("lora.variant", "lora.init") and value in lora.REFUSED:
      return ConfigError(f"{path}: {value!r}; not offered: {lora.REFUSED[value]}")
    choices = typing.get_args(hint)
    near = difflib.get_close_matches(str(value), choices, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"{path}: {value!r}; one of {', '.join(map(repr, choices))}{meant}")
  return ConfigError(f"{path}: {value!r}; a value of type {_type_name(hint)} is needed")


def _typed(hint: Any, value: Any, path: str) -> Any:
  """`value` as its field holds it: lists become tuples, ints become floats, nothing else changes.

  Raises:
    ConfigError: `value` is not of the type.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if _is_union(hint):  # of the form X | None
    if value is None and type(None) in args:
      return None
    (only,) = (arg for arg in args if arg is not type(None))
    try:
      return _typed(only, value, path)
    except ConfigError:
      raise _mismatch(hint, value, path) from None
  if origin is Literal and isinstance(value, str) and value in args:
    return value
  if origin is tuple and isinstance(value, tuple | list):
    return tuple(_typed(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
  if origin is Mapping and isinstance(value, Mapping):
    return {
      _typed(args[0], key, path): _typed(args[1], item, f"{path}[{key!r}]")
      for key, item in value.items()
    }
  if origin is None:
    # True is an int to Python and never to a reader; numpy's numbers are as good as Python's.
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is float and number:
      return float(value)
    if hint is int and number and isinstance(value, numbers.Integral):
      return int(value)
    if hint not in (int, float) and isinstance(value, hint):
      return value
  raise _mismatch(hint, value, path)


def parse_value(path: str, text: str) -> Any:
  """Reads the value of a field from text, as a command line gives it.

  `None`, `true` and `false` in any case; tuples as `a,b` or `('a', 'b')`; dictionaries as
  `{'*/attn/q': 4}`.

  Args:
    path: dotted path of the field.
    text: what was typed.

  Returns:
    A value of the field's type.

  Raises:
    ConfigError: there is no such field, or the text is not of its type.
  """
  if path not in fields():
    raise unknown_field(path)
  hint = fields()[path].type
  try:
    return _typed(hint, _read(hint, text), path)
  except (ValueError, SyntaxError):
    # Whatever part of it was wrong: the reader typed the whole.
    raise _mismatch(hint, text, path) from None


def _read(hint: Any, text: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if _is_union(hint):
    if text.lower() == "none":
      return None
    (hint,) = (arg for arg in args if arg is not type(None))
    return _read(hint, text)
  if hint is bool:
    return {"true": True, "false": False}.get(text.lower(), text)
  if hint in (int, float):
    return hint(text)
  if origin is tuple and not text.startswith(("(", "[", "'", '"')):
    return tuple(_read(args[0], part.strip()) for part in text.split(",") if part.strip())
  if origin is tuple:
    value = ast.literal_eval(text)
    return (value,) if isinstance(value, str) else value
  if origin is Mapping:
    return ast.literal_eval(text)
  return text


# --- Between dataclasses, ConfigDicts and JSON ----------------------------------------------------


def _refuse_unknown(cls: type, values: Mapping[str, Any], prefix: str) -> None:
  for name, value in values.items():
    hint = _hints(cls).get(name)
    if hint is None:
      raise unknown_field(f"{prefix}{name}")
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
      _refuse_unknown(typing.cast(type, hint), value, f"{prefix}{name}.")


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  """An instance of the dataclass `cls`, whose place in the config is `path`, from `values`."""
  prefix = f"{path}." if path else ""
  hints = _hints(cls)
  arguments = {}
  for field in dataclasses.fields(cls):
    here, hint = prefix + field.name, hints[field.name]
    if field.name not in values:
      no_default = field.default is field.default_factory is dataclasses.MISSING
      if no_default:
        raise ConfigError(f"{here}: missing; a value of type {_type_name(hint)} is needed")
    elif dataclasses.is_dataclass(hint):
      section = values[field.name]
      if not isinstance(section, Mapping):
        known = ", ".join(_hints(typing.cast(type, hint)))
        raise ConfigError(f"{here}: {section!r}; a section with the fields {known} is needed")
      arguments[field.name] = _build(typing.cast(type, hint), section, here)
    else:
      arguments[field.name] = _typed(hint, values[field.name], here)
  try:
    return cls(**arguments)
  except ConfigError:
    raise
  except (ValueError, FileNotFoundError) as error:
    # LoRAConfig and QuantizationConfig are used on their own too, and know no path.
    message = " ".join(str(error).split())
    own_field = re.match(rf"({'|'.join(hints)})\b", message)
    raise ConfigError(f"{prefix}{message}" if own_field else f"{path}: {message}") from None


def _plain(value: Any) -> Any:
  """Dataclasses and mappings as dicts, tuples as lists: what JSON holds."""
  if dataclasses.is_dataclass(value):
    return {name: _plain(getattr(value, name)) for name in _hints(type(value))}
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _draft(cls: type, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  # Patterns (`rank_pattern`) are keys, and may hold a dot.
  draft = ml_collections.ConfigDict(allow_dotted_keys=True)
  for name, hint in _hints(cls).items():
    value = values[name]
    if dataclasses.is_dataclass(hint):
      draft[name] = _draft(typing.cast(type, hint), value)
    elif isinstance(value, Mapping):
      draft[name] = ml_collections.ConfigDict(dict(value), allow_dotted_keys=True)
    elif value is None or _is_union(hint):
      # A reference remembers its type while it holds None.
      optional = [arg for arg in typing.get_args(hint) if arg is not type(None)]
      draft[name] = ml_collections.FieldReference(value, field_type=(optional or [hint])[0])
    else:
      draft[name] = tuple(value) if isinstance(value, list) else value
  return draft


def defaults() -> Draft:
  """A draft, a `ConfigDict`, for config files: every field at its default, unchecked.

  `name` is None, there is no model and no data: a config file fills these in. The draft is not
  locked: a misspelled field is refused by `from_config_dict`, which knows what was meant.
  """

  def of(cls: type) -> dict[str, Any]:
    sections = {
      name: of(typing.cast(type, hint))
      for name, hint in _hints(cls).items()
      if dataclasses.is_dataclass(hint)
    }
    return {field.name: _default(field) for field in dataclasses.fields(cls)} | sections

  return _draft(ExperimentConfig, of(ExperimentConfig))


def to_config_dict(config: ExperimentConfig) -> Draft:
  """The same config as a `ConfigDict` that can be changed; fields that may be None keep a type."""
  return _draft(ExperimentConfig, _plain(config))


def from_config_dict(
  config: ml_collections.ConfigDict, overrides: Mapping[str, Any] | None = None
) -> ExperimentConfig:
  """Completes a draft with the defaults, applies overrides, checks everything.

  Args:
    config: the draft; fields that are missing take their default.
    overrides: dotted path → value, over the draft: `{"lora.rank": 8}`. All are applied before
      anything is checked, so that two of them may depend on each other.

  Returns:
    A config that can be run.

  Raises:
    ConfigError: an unknown field, a value of another type or out of range, a contradiction.
  """
  values = config.to_dict()
  for path, value in (overrides or {}).items():
    if path not in fields():
      raise unknown_field(path)
    *sections, name = path.split(".")
    section = values
    for part in sections:
      section = section.setdefault(part, {}) if isinstance(section, dict) else None
    if isinstance(section, dict):  # otherwise the draft is wrong there, and reported below
      section[name] = value
  return from_json_dict(values)


def to_json_dict(config: ExperimentConfig) -> dict[str, Any]:
  """Nested dictionaries and lists, ready for `json.dump`: the `config.json` of a run."""
  return _plain(config)


def from_json_dict(values: Mapping[str, Any]) -> ExperimentConfig:
  """The inverse of `to_json_dict`; fields that are missing take their default.

  Raises:
    ConfigError: as `from_config_dict`.
  """
  # First, and of all sections: a field that is missing may be one that was misspelled.
  _refuse_unknown(ExperimentConfig, values, "")
  return _build(ExperimentConfig, values, "")


def differences(before: ExperimentConfig, now: ExperimentConfig) -> list[str]:
  """Names every field in which two configs differ.

  Returns:
    Lines such as `lora.rank: 8 before, 16 now`, in the order of the fields. Where compiled programs
    are kept is no difference: it changes nothing that is computed.
  """
  lines = []
  for path in fields():
    if path == "train.compiled_programs":
      continue
    a, b = (functools.reduce(getattr, path.split("."), config) for config in (before, now))
    if a != b:
      lines.append(f"{path}: {_plain(a)!r} before, {_plain(b)!r} now")
  return lines

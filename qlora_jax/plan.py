"""What a training step will take, before anything runs: bytes and seconds, by part.

Bytes of the base, the adapters, their optimizer and what a remat policy keeps of a layer are
counted, from shapes and by tracing the model's VJP. What a layer works on while its gradient is
taken, and what the products, attention and the passes over activations take of a device's peak
speeds, are the six `Constants`, fitted on runs that `experiments.bench.train_step` measured
(`python -m experiments.plan --fit`). No accelerator is needed, and nothing is compiled.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax import tree_paths
from qlora_jax.lora import HEAD, TABLE, LoRAConfig
from qlora_jax.lora import init as init_lora
from qlora_jax.models.remat import REMAT_POLICIES, RematPolicy
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.quantized_tensor import is_quantized


@dataclasses.dataclass(frozen=True)
class Device:
  """What a data sheet says of one accelerator.

  Attributes:
    memory: bytes.
    flop_s: of dense bf16 products summed in float32.
    bytes_s: of its memory.
    host_bytes_s: of its link to the host, one way; None where that is not known, and nothing is
      said of `offload` then.
  """

  memory: float
  flop_s: float
  bytes_s: float
  host_bytes_s: float | None = None


# NVIDIA's data sheets (without sparsity; the link is PCIe's, less a fifth), and
# https://docs.cloud.google.com/tpu/docs/v5e, v5p, v6e.
DEVICES: dict[str, Device] = {
  "h100": Device(80e9, 989e12, 3.35e12, 50e9),
  "h200": Device(141e9, 989e12, 4.8e12, 50e9),
  "a100": Device(80e9, 312e12, 2.04e12, 25e9),
  "a100-40gb": Device(40e9, 312e12, 1.555e12, 25e9),
  "l4": Device(24e9, 121e12, 0.3e12, 25e9),
  "l40s": Device(48e9, 362e12, 0.864e12, 25e9),
  "a6000": Device(48e9, 155e12, 0.768e12, 25e9),
  "rtx3090": Device(24e9, 71e12, 0.936e12, 25e9),
  "rtx4090": Device(24e9, 165e12, 1.008e12, 25e9),
  "v5e": Device(16e9, 197e12, 0.819e12),
  "v5p": Device(95e9, 459e12, 2.765e12),
  "v6e": Device(32e9, 918e12, 1.638e12),
}


@dataclasses.dataclass(frozen=True)
class Constants:
  """What is fitted and not counted; of an H100 80 GB, JAX 0.11.2 (see `fit`).

  Attributes:
    wide: arrays `[tokens, I]` that a layer's backward pass holds at once.
    residual: arrays `[tokens, D]` of it.
    weights: dense copies of the largest matrix of it.
    products: share of the device's peak that the products reach.
    attention: share that attention reaches.
    passes: times that a layer's arrays are read or written, each time that it is gone through.
  """

  wide: float = 4.178
  residual: float = 9.486
  weights: float = 1.608
  products: float = 0.6667
  attention: float = 0.5922
  passes: float = 12.13


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a step's peak, by part; `host` is beside the device's memory, not in it."""

  base: int
  adapters: int
  optimizer: int
  gradients: int
  kept: int
  working: int
  host: int

  @property
  def total(self) -> int:
    """Of the device."""
    return sum(dataclasses.asdict(self).values()) - self.host


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Of a step, by part."""

  products: float
  attention: float
  elementwise: float
  dequantization: float
  host: float

  @property
  def total(self) -> float:
    """Of the step."""
    return sum(dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class Step:
  """The shape of one optimizer step.

  Attributes:
    batch_size, seq_len: B and T of one forward and backward pass.
    remat: a policy's name (see `models.remat`).
    mlp_chunk: see `Transformer`.
    loss_chunk: tokens whose logits exist at once.
    accumulate_steps: passes a step.
  """

  batch_size: int
  seq_len: int
  remat: RematPolicy = "full"
  mlp_chunk: int | None = None
  loss_chunk: int = 1024
  accumulate_steps: int = 1

  @property
  def tokens(self) -> int:
    """Of one pass."""
    return self.batch_size * self.seq_len

  @property
  def _wide_tokens(self) -> int:
    return self.batch_size * min(self.seq_len, self.mlp_chunk or self.seq_len)

  @property
  def _chunked(self) -> bool:
    return self.mlp_chunk is not None and self.seq_len > self.mlp_chunk


def again(step: Step) -> tuple[bool, bool]:
  """Whether the backward pass computes attention's part of a layer again, and the MLP's."""
  whole = step.remat in ("full", "offload")
  # What a chunk of an MLP has kept goes when the policy is to keep everything but names nothing.
  return whole, whole or step.remat == "mlp" or (step.remat == "none" and step._chunked)


def operations(config: TransformerConfig, step: Step) -> tuple[int, int]:
  """(of the products with weights, of attention's): FLOPs of one pass, forward, again, backward.

  2 a weight a token forward, 2 for the input's gradient (the weights have none), 2 for what is
  computed again, which is all but a layer's last product (and that too before a norm). Attention:
  two products of the pairs of tokens that see each other, and five of its backward pass.
  """
  d, tokens = config.hidden_size, step.tokens
  q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  first = d * (q + 2 * kv) + q * d
  last = config.intermediate_size * d * max(config.experts_per_token, 1)
  wide = 2 * last
  attention_again, mlp_again = again(step)
  repeated = attention_again * first + mlp_again * wide
  if step.remat != "none":
    # A norm's gradient is taken at what entered it, and policies keep what left it: q and k after
    # their norms, the sum after a block's.
    if config.qk_norm is not None and not attention_again:
      repeated += d * (q + kv + kv * config.fused_projections)
    if config.post_norms:
      repeated += last + (not attention_again) * q * d
      # A chunk's wide arrays, for its result and once more for its gradient.
      repeated += (step._chunked and mlp_again) * wide
  layer = 4 * (first + wide + last) + 2 * repeated
  head = 4 * d * config.vocab_size
  pairs = sum(_pairs(step.seq_len, config.windows[kind]) for kind in config.kind_of_layer)
  attention = 4 * q * step.batch_size * pairs
  return (
    tokens * (config.num_layers * layer + head),
    attention + attention * 5 // 2 + attention_again * attention,
  )


def _pairs(seq_len: int, window: int | None) -> int:
  """Of a token and one that it sees."""
  window = seq_len if window is None else min(window, seq_len)
  return window * (window + 1) // 2 + (seq_len - window) * window


class Planner:
  """A base, its adapters and their optimizer, by their shapes; answers for any step and device.

  Args:
    model: its config and dtype are read; remat and mlp_chunk are the steps'.
    frozen: arrays or shapes.
    params, constants, opt_state: likewise.
  """

  def __init__(
    self,
    model: Transformer,
    frozen: Any,
    params: Any,
    constants: Any,
    opt_state: Any,
    fitted: Constants = Constants(),
  ):
    # By blocks: as much is kept as by cuDNN's kernel, and it can be traced anywhere.
    self._model = model.clone(attention="blockwise")
    self.frozen, self.params, self._constants = (_shapes(x) for x in (frozen, params, constants))
    self.fitted = fitted
    self._sizes = {
      "base": tree_paths.tree_bytes(frozen),
      "adapters": tree_paths.tree_bytes(params),
      "optimizer": bytes_on_device(opt_state),
    }
    self._host_state = tree_paths.tree_bytes(opt_state) - self._sizes["optimizer"]
    stacked = tree_paths.leaves(self.frozen, is_leaf=is_quantized).items()
    matrices = [
      leaf for path, leaf in stacked if tree_paths.is_stacked(path) and len(leaf.shape) >= 3
    ]
    # A packed head is dequantized for a chunk of the loss; a packed table that is the head too.
    tables = dict(stacked)
    head = tables.get(HEAD, tables.get(TABLE))
    self._dense_head = head.size if head is not None and is_quantized(head) else 0
    self._largest = max((math.prod(leaf.shape[-2:]) for leaf in matrices), default=0)
    packed = [leaf for leaf in matrices if is_quantized(leaf)]
    self._packed_bytes = sum(leaf.nbytes for leaf in packed)
    self._packed_share = sum(leaf.size for leaf in packed) / max(sum(x.size for x in matrices), 1)
    self._packed_bits = 8 * self._packed_bytes / max(sum(leaf.size for leaf in packed), 1)
    self._kept: dict[Any, tuple[float, float]] = {}

  @classmethod
  def of(
    cls,
    model: Transformer,
    frozen: Any,
    lora: LoRAConfig,
    optimizer: optax.GradientTransformation,
    fitted: Constants = Constants(),
  ) -> "Planner":
    """From a config's adapters and optimizer, in place of their arrays."""
    frozen = _shapes(frozen)
    # Shapes are those of plain LoRA, whatever the values start as.
    lora = dataclasses.replace(lora, init="lora")
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, constants = jax.eval_shape(lambda key, base: init_lora(key, base, lora), key, frozen)
    # Traced: shapes alone do not say what lies on the host.
    opt_state = jax.make_jaxpr(optimizer.init)(params).out_avals
    return cls(model, frozen, params, constants, opt_state, fitted)

  def with_constants(self, fitted: Constants) -> "Planner":
    """The same with other constants; what was traced is not traced again."""
    other = copy.copy(self)
    other.fitted = fitted
    return other

  @property
  def config(self) -> TransformerConfig:
    """The model's."""
    return self._model.config

  @property
  def adapter_bytes(self) -> int:
    """Of the adapters, in memory and, but for a file's header, on disk."""
    return self._sizes["adapters"]

  def memory(self, step: Step) -> Memory:
    """The peak of a step, by part."""
    device, host = self._kept_a_token(step)
    return Memory(
      **self._sizes,
      # A sum, and one microbatch's.
      gradients=self._sizes["adapters"] * min(step.accumulate_steps, 2),
      kept=round(device * step.tokens),
      working=round(max(self._layer(step), self._loss(step))),
      host=round(host * step.tokens) + self._host_state,
    )

  def layer_terms(self, step: Step) -> tuple[float, float, float]:
    """Bytes that `Constants.wide`, `residual` and `weights` multiply."""
    config, size = self.config, jnp.dtype(self._model.dtype).itemsize
    wide = config.intermediate_size * max(config.experts_per_token, 1)
    return (
      size * step._wide_tokens * wide,
      size * step.tokens * config.hidden_size,
      size * self._largest,
    )

  def _layer(self, step: Step) -> float:
    fitted = (self.fitted.wide, self.fitted.residual, self.fitted.weights)
    return sum(a * b for a, b in zip(fitted, self.layer_terms(step), strict=True))

  def _loss(self, step: Step) -> float:
    """Logits of a chunk and their gradient, float32; hidden states and theirs; a head unpacked."""
    size = jnp.dtype(self._model.dtype).itemsize
    logits = 4 * min(step.loss_chunk, step.tokens) * self.config.vocab_size
    hidden = step.tokens * self.config.hidden_size
    return 2 * logits + size * (2 * hidden + self._dense_head)

  def _kept_a_token(self, step: Step) -> tuple[float, float]:
    """Bytes (device, host) that all layers keep of a token for the backward pass: traced."""
    key = (step.remat, step.mlp_chunk if step._chunked else None)
    if key not in self._kept:
      chunk = key[1]
      # Whole blocks of attention and chunks of the MLP; long enough that nothing is plain.
      length = 2048 if chunk is None else 2048 * chunk // math.gcd(2048, chunk)
      length = max(length, 2 * chunk) if chunk else length
      self._kept[key] = _kept_bytes(
        self._model.clone(remat=step.remat, mlp_chunk=chunk),
        self.frozen,
        self.params,
        self._constants,
        length,
      )
    return self._kept[key]

  def time_terms(
    self, step: Step, device: Device
  ) -> tuple[tuple[float, float, float], dict[str, float]]:
    """Seconds of one pass at the device's peaks.

    Returns:
      Those of products, of attention, and of going once over the activations of each layer, which
      the constants divide or multiply; and the rest, which nothing is fitted to: reading packed
      weights and writing them dense, and the host's link.
    """
    config, size = self.config, jnp.dtype(self._model.dtype).itemsize
    products, attention = operations(config, step)
    attention_again, mlp_again = again(step)
    wide = config.intermediate_size * max(config.experts_per_token, 1)
    a_token = (3 + attention_again) * config.hidden_size + (3 + mlp_again) * wide
    activations = size * step.tokens * config.num_layers * a_token
    in_layers = products - 4 * step.tokens * config.hidden_size * config.vocab_size
    # A product of N tokens with a weight is 2 N FLOPs, and decodes it once.
    decoded = in_layers / (2 * step.tokens) * self._packed_share
    terms = (products / device.flop_s, attention / device.flop_s, activations / device.bytes_s)
    return terms, {
      "dequantization": decoded * (self._packed_bits / 8 + size) / device.bytes_s,
      # Written while the next layer computes, read while none waits: one way shows.
      "host": self._host_seconds(self._kept_a_token(step)[1] * step.tokens, device),
    }

  def _host_seconds(self, count: float, device: Device) -> float:
    return count / (device.host_bytes_s or math.nan) if count else 0.0

  def seconds(self, step: Step, device: Device) -> Seconds:
    """Of a whole optimizer step, by part; nan of what crosses a link of unknown speed."""
    (products, attention, activations), fixed = self.time_terms(step, device)
    passes = step.accumulate_steps
    return Seconds(
      products=passes * products / self.fitted.products,
      attention=passes * attention / self.fitted.attention,
      elementwise=passes * activations * self.fitted.passes,
      dequantization=passes * fixed["dequantization"],
      # The optimizer's state comes and goes once, and nothing else is there to be done.
      host=passes * fixed["host"] + self._host_seconds(2 * self._host_state, device),
    )

  def fits(self, step: Step, available: float, host: float = math.inf) -> bool:
    """Whether a step needs at most so many bytes of the device, and of the host."""
    memory = self.memory(step)
    return memory.total <= available and memory.host <= host

  def longest(self, step: Step, available: float, host: float = math.inf) -> int:
    """The most tokens a row that fit, in whole 256s; 0 where none do."""
    return 256 * _most(
      lambda n: self.fits(dataclasses.replace(step, seq_len=256 * n), available, host)
    )

  def largest_batch(self, step: Step, available: float, host: float = math.inf) -> int:
    """The most rows that fit; 0 where not one does."""
    return _most(lambda n: self.fits(dataclasses.replace(step, batch_size=n), available, host))

  def fastest(
    self, step: Step, device: Device, available: float, host: float = math.inf
  ) -> RematPolicy | None:
    """The policy of the least time among those that fit; None where none does."""
    steps = [dataclasses.replace(step, remat=policy) for policy in policies(device)]
    fitting = [each for each in steps if self.fits(each, available, host)]
    return min(fitting, key=lambda s: self.seconds(s, device).total).remat if fitting else None


def policies(device: Device) -> tuple[RematPolicy, ...]:
  """Those that the plan can time on a device."""
  return tuple(p for p in REMAT_POLICIES if p != "offload" or device.host_bytes_s is not None)


def _most(fits: Any) -> int:
  """The largest n for which `fits(n)`, which is monotone; 0 where it is not even for 1."""
  low, high = 0, 1
  while fits(high) and high < 2**24:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def _shapes(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def bytes_on_device(tree: Any) -> int:
  """Bytes of the leaves, arrays or avals, that do not lie in the host's memory."""
  return tree_paths.tree_bytes([leaf for leaf in jax.tree.leaves(tree) if not _on_host(leaf)])


def _on_host(leaf: Any) -> bool:
  sharding = getattr(leaf, "sharding", None)
  kind = getattr(sharding, "memory_kind", None) or ""
  return "host" in kind or getattr(leaf, "memory_space", None) == jax.memory.Space.Host


def _kept_bytes(
  model: Transformer, frozen: Any, params: Any, constants: Any, length: int
) -> tuple[float, float]:
  """Bytes a token, (device, host), of what the VJP of `model` keeps of its layers."""

  def residuals(params, frozen, constants, tokens):
    def hidden(params):
      variables = {"params": params, "constants": constants, "frozen": frozen}
      return model.apply(variables, tokens, method="hidden")

    return jax.tree.leaves(jax.vjp(hidden, params)[1])

  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  jaxpr = jax.make_jaxpr(residuals)(params, frozen, constants, tokens).jaxpr
  given = {id(variable) for variable in jaxpr.invars}
  kept: dict[int, Any] = {id(v): v.aval for v in jaxpr.outvars if id(v) not in given}
  device = host = 0
  for aval in kept.values():
    shape = getattr(aval, "shape", ())
    # A scan stacks what its layers keep; the rest is of the final norm, and in the working set.
    if len(shape) < 3 or shape[0] != model.config.num_layers:
      continue
    size = math.prod(shape) * aval.dtype.itemsize
    if _on_host(aval):
      host += size
    else:
      device += size
  return device / length, host / length


@dataclasses.dataclass(frozen=True)
class Measured:
  """One row that was run.

  Attributes:
    planner: of its model.
    step: its shape.
    device: that ran it.
    peak: bytes.
    seconds: a step.
  """

  planner: Planner
  step: Step
  device: Device
  peak: float
  seconds: float


def fit(rows: Iterable[Measured]) -> Constants:
  """The constants of least squared relative error on measured rows.

  Raises:
    ValueError: fewer rows than the constants of either kind, or rows too much alike.
  """
  rows = list(rows)
  bytes_of, seconds_of = [], []
  for row in rows:
    counted = row.planner.memory(row.step)
    rest = row.peak - (counted.total - counted.working)
    bytes_of.append(([x / row.peak for x in row.planner.layer_terms(row.step)], rest / row.peak))
    terms, fixed = row.planner.time_terms(row.step, row.device)
    seconds_of.append(([x / row.seconds for x in terms], 1 - sum(fixed.values()) / row.seconds))
  solutions = []
  for name, equations in (("memory", bytes_of), ("time", seconds_of)):
    solution, _, rank, _ = np.linalg.lstsq(*map(np.array, zip(*equations, strict=True)), rcond=None)
    if rank < 3 or (solution <= 0).any():
      raise ValueError(f"{name}: {len(rows)} rows do not determine three constants above 0")
    solutions.append(solution.tolist())
  (wide, residual, weights), (products, attention, passes) = solutions
  return Constants(wide, residual, weights, 1 / products, 1 / attention, passes)

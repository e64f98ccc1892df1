"""What a training step will take, before anything runs: bytes and seconds, by part.

Bytes of the base, the adapters, their optimizer and what a remat policy keeps of a layer are
counted, from shapes and by tracing the model's VJP. What a layer works on while its gradient is
taken, and what the products, attention and the passes over activations take of a device's peak
speeds, are the six `Constants`, fitted on runs that `experiments.bench.train_step` measured
(`python -m experiments.plan --fit`). No accelerator is needed, and nothing is compiled.
"""

import copy
import dataclasses
import functools
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
from qlora_jax.models import mlp, remat
from qlora_jax.models.attention import AttentionName, cudnn_limits, without_kernels
from qlora_jax.models.remat import RematPolicy
from qlora_jax.models.transformer import Transformer, TransformerConfig, training_case
from qlora_jax.quantized_tensor import is_quantized


@dataclasses.dataclass(frozen=True)
class Device:
  """What a data sheet says of one accelerator.

  Attributes:
    memory: bytes.
    flop_s: of dense bf16 products summed in float32.
    bytes_s: of its memory.
    host_bytes_s: of its link to the host, one way; None where that is not known, and nothing is
      said of `offload` and `offload_pairs` then.
    capability: an NVIDIA GPU's compute capability, which says what cuDNN's attention takes there.
  """

  memory: float
  flop_s: float
  bytes_s: float
  host_bytes_s: float | None = None
  capability: float | None = None


# NVIDIA's data sheets (without sparsity; the link is PCIe's, less a fifth), and
# https://docs.cloud.google.com/tpu/docs/v5e, v5p, v6e.
DEVICES: dict[str, Device] = {
  "h100": Device(80e9, 989e12, 3.35e12, 50e9, 9.0),
  "h200": Device(141e9, 989e12, 4.8e12, 50e9, 9.0),
  "a100": Device(80e9, 312e12, 2.04e12, 25e9, 8.0),
  "a100-40gb": Device(40e9, 312e12, 1.555e12, 25e9, 8.0),
  "l4": Device(24e9, 121e12, 0.3e12, 25e9, 8.9),
  "l40s": Device(48e9, 362e12, 0.864e12, 25e9, 8.9),
  "a6000": Device(48e9, 155e12, 0.768e12, 25e9, 8.6),
  "rtx3090": Device(24e9, 71e12, 0.936e12, 25e9, 8.6),
  "rtx4090": Device(24e9, 165e12, 1.008e12, 25e9, 8.9),
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
  attention: float = 0.5943
  passes: float = 12.14


# Of what the rows of `fit` do not have, by XLA's account for an H100 of steps of a few layers.
# Of plain attention: how often its logits are held, in float32, and of the layer's other arrays
# the share that lies beside them.
_LOGITS, _BESIDE = 3.0, 0.7
# Of attention by blocks: arrays `[tokens, H · h]` more than of cuDNN's.
_BLOCKS = 3.4
# Of experts: float32 arrays of a row of D for each token and expert that it goes through.
_ROUTED = 5.5
# Of a layer that has no gradient, what `wide`, `residual` and `weights` are of one that has; and
# where all logits are held, what these and `residual` are.
_FORWARD = (2.0, 2.0, 1.0)
_FORWARD_PLAIN = (1.5, 3.3)


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
    trials: so many train on one base in one program, each on such batches (see `trial_groups`).
    packed: whether rows hold several documents.
  """

  batch_size: int
  seq_len: int
  remat: RematPolicy = "full"
  mlp_chunk: int | None = None
  loss_chunk: int = 1024
  accumulate_steps: int = 1
  trials: int = 1
  packed: bool = False

  @property
  def rows(self) -> int:
    """Of one pass, of all trials."""
    return self.trials * self.batch_size

  @property
  def tokens(self) -> int:
    """Of one pass, of all trials."""
    return self.rows * self.seq_len

  @property
  def _wide_tokens(self) -> int:
    # At most: chunks that divide the row may be shorter, and a longer row's shorter than another's.
    return self.rows * min(self.seq_len, self.mlp_chunk or self.seq_len)

  @property
  def _paired(self) -> bool:
    return self.remat == "offload_pairs"

  @property
  def _chunked(self) -> bool:
    return self.mlp_chunk is not None and self.seq_len > self.mlp_chunk


def again(step: Step) -> tuple[bool, bool]:
  """Whether the backward pass computes attention's part of a layer again, and the MLP's."""
  whole = step.remat in ("full", *remat.OFFLOADING)
  # What a chunk of an MLP has kept goes when the policy is to keep everything but names nothing.
  return whole, whole or step.remat == "mlp" or (step.remat == "none" and step._chunked)


def operations(config: TransformerConfig, step: Step) -> tuple[int, int]:
  """(of the products with weights, of attention's): FLOPs of one pass, forward, again, backward.

  2 a weight a token forward, 2 for the input's gradient (the weights have none), 2 for what is
  computed again, which is all but a layer's last product (and that too before a norm). Attention:
  two products of the pairs of tokens that see each other, and five of its backward pass.
  """
  head = 4 * config.hidden_size * config.vocab_size
  pairs = sum(_pairs(step.seq_len, config.windows[kind]) for kind in config.kind_of_layer)
  attention = 4 * config.num_heads * config.head_dim * step.rows * pairs
  attention_again, _ = again(step)
  times_again = attention_again + step._paired
  return (
    round(step.tokens * (config.num_layers * sum(_of_a_layer(config, step)) + head)),
    attention + attention * 5 // 2 + times_again * attention,
  )


def _of_a_layer(config: TransformerConfig, step: Step) -> tuple[float, float]:
  """FLOPs a token of a layer's products: with attention's weights, and with the MLP's."""
  d, tokens = config.hidden_size, step.tokens
  q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  first = d * (q + 2 * kv) + q * d
  last = config.intermediate_size * d * max(config.experts_per_token, 1)
  wide = 2 * last
  attention_again, mlp_again = again(step)
  repeated_first, repeated_mlp = attention_again * first, mlp_again * wide
  if config.num_experts:
    pairs = tokens * config.experts_per_token
    tile, count = mlp.tiling(pairs, config.num_experts)
    # Their result is multiplied by the router's weights, whose gradient is taken at it; and each
    # tile's wide arrays are computed once more. Tiles are filled up.
    last, wide = last * tile * count / pairs, wide * tile * count / pairs
    repeated_mlp = (step.remat != "none") * (wide + last) + wide
  if step.remat != "none":
    # A norm's gradient is taken at what entered it, and policies keep what left it: q and k after
    # their norms, the sum after a block's.
    if config.qk_norm is not None and not attention_again:
      repeated_first += d * (q + kv + kv * config.fused_projections)
    if config.post_norms:
      repeated_first += (not attention_again) * q * d
      # A chunk's wide arrays, for its result and once more for its gradient.
      repeated_mlp += last + (step._chunked and mlp_again) * wide
  if step._paired:
    # A pair goes forward once more, whole, for the inputs of its layers.
    repeated_first, repeated_mlp = repeated_first + first, repeated_mlp + wide + last
  return 4 * first + 2 * repeated_first, 4 * (wide + last) + 2 * repeated_mlp


def _pairs(seq_len: int, window: int | None) -> int:
  """Of a token and one that it sees."""
  window = seq_len if window is None else min(window, seq_len)
  return window * (window + 1) // 2 + (seq_len - window) * window


class Planner:
  """A base, its adapters and their optimizer, by their shapes; answers for any step and device.

  Args:
    model: its config, dtype and choice of attention are read; remat and mlp_chunk are the steps'.
      Counted is a loop over its layers, whatever its `unroll`.
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
    self._model = model
    self._capability = DEVICES["h100"].capability
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
    # Experts are read one by one out of a layer's, which are taken out of the stack as a whole.
    self._experts = sum(
      leaf.nbytes if is_quantized(leaf) else leaf.size * leaf.dtype.itemsize
      for leaf in matrices
      if len(leaf.shape) == 4
    ) // max(model.config.num_layers, 1)
    self._largest = max((math.prod(leaf.shape[-2:]) for leaf in matrices), default=0)
    packed = [leaf for leaf in matrices if is_quantized(leaf)]
    self._packed_bytes = sum(leaf.nbytes for leaf in packed)
    self._packed_share = sum(leaf.size for leaf in packed) / max(sum(x.size for x in matrices), 1)
    self._packed_bits = 8 * self._packed_bytes / max(sum(leaf.size for leaf in packed), 1)

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

  def on(self, capability: float | None) -> "Planner":
    """The same for a GPU of this capability, or another device; for an H100 without this."""
    other = copy.copy(self)
    other._capability = capability
    return other

  def attention(self, step: Step) -> AttentionName:
    """How attention is computed: see `models.attention.choose`.

    Raises:
      ValueError: the model names cuDNN's, which does not serve this on the device; with the reason.
    """
    named = self._model.attention
    case = training_case(self._model, step.seq_len, packed=step.packed)
    if self._capability is None or self._capability < 8:
      reason = "the device is no NVIDIA GPU of capability 8.0 or more"
    else:
      reason = cudnn_limits(case, self._capability)
    if named == "cudnn" and reason is not None:
      raise ValueError(f"attention: 'cudnn' cannot serve this: {reason}")
    if named is not None:
      return named
    return "cudnn" if reason is None else without_kernels(case)

  def _logits(self, step: Step) -> int:
    """Bytes of a layer's logits, float32, where they are all held at once."""
    if self.attention(step) != "plain":
      return 0
    return 4 * step.rows * self.config.num_heads * step.seq_len**2

  @property
  def config(self) -> TransformerConfig:
    """The model's."""
    return self._model.config

  @property
  def adapter_bytes(self) -> int:
    """Of the adapters, in memory and, but for a file's header, on disk."""
    return self._sizes["adapters"]

  def memory(self, step: Step) -> Memory:
    """The peak of a step, by part.

    Raises:
      ValueError: trials of experts, of which it does not know.
    """
    if self.config.num_experts and step.trials > 1:
      raise ValueError(f"trials: {step.trials}; of experts, several together are not planned")
    device, host = self._kept_a_token(step)
    return Memory(
      **self._held(step.trials),
      # A sum, and one microbatch's.
      gradients=step.trials * self._sizes["adapters"] * min(step.accumulate_steps, 2),
      kept=round(device * step.tokens),
      working=round(max(self._layer(step), self._loss(step))),
      host=round(host * step.tokens) + step.trials * self._host_state,
    )

  def evaluation(self, step: Step) -> Memory:
    """The peak of a loss of one trial, without a gradient, the optimizer's state lying where it is.

    Args:
      step: its rows, their length, whether they are packed, and the chunks; nothing else is read.
    """
    config = self.config
    terms = self.layer_terms(step)
    layer = sum(a * b for a, b in zip(_FORWARD, terms, strict=True)) + self._routed(step)
    if logits := self._logits(step):
      layer = max(layer, _FORWARD_PLAIN[0] * logits + _FORWARD_PLAIN[1] * terms[1])
    size = jnp.dtype(self._model.dtype).itemsize
    logits = 4 * min(step.loss_chunk, step.tokens) * config.vocab_size
    loss = logits + size * (step.tokens * config.hidden_size + self._dense_head)
    return Memory(
      **self._held(1), gradients=0, kept=0, working=round(max(layer, loss)), host=self._host_state
    )

  def _held(self, trials: int) -> dict[str, int]:
    """Bytes that lie there between steps."""
    return {name: size * (1 if name == "base" else trials) for name, size in self._sizes.items()}

  def layer_terms(self, step: Step) -> tuple[float, float, float]:
    """Bytes that `Constants.wide`, `residual` and `weights` multiply."""
    config, size = self.config, jnp.dtype(self._model.dtype).itemsize
    return (
      # Experts work on a tile at a time.
      0 if config.num_experts else size * step._wide_tokens * config.intermediate_size,
      size * step.tokens * config.hidden_size,
      size * self._largest,
    )

  def _layer(self, step: Step) -> float:
    fitted = (self.fitted.wide, self.fitted.residual, self.fitted.weights)
    layer = sum(a * b for a, b in zip(fitted, self.layer_terms(step), strict=True))
    layer += self.layer_rest(step)
    return max(layer, _LOGITS * self._logits(step) + _BESIDE * layer)

  def layer_rest(self, step: Step) -> float:
    """Bytes of what a layer works on beside `layer_terms`, which `fit` is not about."""
    config, size = self.config, jnp.dtype(self._model.dtype).itemsize
    if config.num_experts:
      return self._routed(step)
    blocks = _BLOCKS * size * step.tokens * config.num_heads * config.head_dim
    return blocks if self.attention(step) == "blockwise" else 0.0

  def _routed(self, step: Step) -> float:
    """Of experts: a layer's, and the rows that go to them and come from them."""
    pairs = step.tokens * self.config.experts_per_token
    return self._experts + _ROUTED * 4 * pairs * self.config.hidden_size

  def _loss(self, step: Step) -> float:
    """Logits of a chunk and their gradient, float32; hidden states and theirs; a head unpacked."""
    size = jnp.dtype(self._model.dtype).itemsize
    logits = min(step.trials * step.loss_chunk, step.tokens) * self.config.vocab_size
    hidden = step.tokens * self.config.hidden_size
    # Of several trials the gradient is in the compute dtype.
    gradient = 4 if step.trials == 1 else size
    return (4 + gradient) * logits + size * (2 * hidden + self._dense_head)

  def _kept_a_token(self, step: Step) -> tuple[float, float]:
    """Bytes (device, host) that all layers keep of a token for the backward pass: traced."""
    config, experts = self.config, self.config.num_experts
    plain = self.attention(step) == "plain"
    chunk = step.mlp_chunk if step._chunked and not experts else None

    def traced(rows: int, length: int) -> tuple[float, float]:
      trees = (self.frozen, self.params, self._constants)
      leaves, structure = jax.tree.flatten([{"layers": tree.get("layers", {})} for tree in trees])
      # By blocks as much is kept as by cuDNN's kernel, and that can be traced anywhere.
      name = "plain" if plain else "blockwise"
      how: dict[str, Any] = {"remat": step.remat, "mlp_chunk": chunk, "attention": name}
      # Counted is a loop, which stacks what it keeps.
      model = self._model.clone(unroll=False, **how)
      return _kept_bytes(model, tuple(leaves), structure, (rows, length))  # pyright: ignore

    if step.remat == "none" and experts:
      # Tiles are kept whole: of one size it is so much a tile, so much a token, and a rest.
      def terms(tokens: int) -> list[int]:
        return [tokens, mlp.tiling(tokens * config.experts_per_token, experts)[1], 1]

      tokens = step.batch_size * step.seq_len
      tile, _ = mlp.tiling(tokens * config.experts_per_token, experts)
      few = tile * experts // config.experts_per_token
      largest, _ = mlp.tiling(4 * few * config.experts_per_token, experts)
      if plain or tile < largest:
        # Logits of all pairs, or tokens so few that their tiles are small.
        return traced(step.batch_size, step.seq_len)
      # Of whole tiles alone, tokens and tiles would go up together, and not be told apart.
      sizes = (few, 4 * few - 1, 4 * few)
      kept = [np.multiply(n, traced(1, n)) for n in sizes]
      solution = np.linalg.solve([terms(n) for n in sizes], kept)
      device, host = (terms(tokens) @ solution / tokens).tolist()
      return device, host
    if step.remat == "none" and plain:
      # And a token's logits: as many as there are tokens.
      short, long = traced(1, 512), traced(1, 1024)
      a_token = (long[0] - short[0]) / 512
      return short[0] + a_token * (step.seq_len - 512), short[1]
    if chunk is None:
      return traced(1, 1024 if plain else 2048)
    # Whole blocks of attention and chunks of the MLP.
    return traced(1, max(2048 * chunk // math.gcd(2048, chunk), 2 * chunk))

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
    a_token = (3 + attention_again + step._paired) * config.hidden_size
    a_token += (3 + mlp_again + step._paired) * wide
    activations = size * step.tokens * config.num_layers * a_token
    # A product of N rows with a weight is 2 N FLOPs, and decodes it once; of experts, of a tile.
    first, of_mlp = (config.num_layers * step.tokens * x for x in _of_a_layer(config, step))
    rows = step.tokens
    if step.mlp_chunk is not None and step._chunked:
      rows = step.rows * mlp.chunk_length(step.seq_len, step.mlp_chunk)
    if config.num_experts:
      rows, _ = mlp.tiling(step.tokens * config.experts_per_token, config.num_experts)
    decoded = (first / (2 * step.tokens) + of_mlp / (2 * rows)) * self._packed_share
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

  def policies(self, device: Device) -> tuple[RematPolicy, ...]:
    """Those that serve the model, and can be timed on a device."""
    known_link = device.host_bytes_s is not None
    serving = remat.policies(self.config.num_layers)
    return tuple(p for p in serving if known_link or p not in remat.OFFLOADING)

  def fastest(
    self, step: Step, device: Device, available: float, host: float = math.inf
  ) -> RematPolicy | None:
    """The policy of the least time among those that fit; None where none does."""
    steps = [dataclasses.replace(step, remat=policy) for policy in self.policies(device)]
    fitting = [each for each in steps if self.fits(each, available, host)]

    def time(each: Step) -> float:
      seconds = self.seconds(each, device)
      # Over a link of unknown speed goes the optimizer's state alone, by each policy alike.
      return (seconds if device.host_bytes_s else dataclasses.replace(seconds, host=0.0)).total

    return min(fitting, key=time).remat if fitting else None


def known(value: float) -> float | None:
  """`value`; None for nan, which JSON does not have."""
  return None if math.isnan(value) else value


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


# A table asks for each policy again and again, and out of memory for one base under many overrides.
# What is held are shapes and two numbers.
@functools.lru_cache(maxsize=256)
def _kept_bytes(
  model: Transformer, leaves: tuple[Any, ...], structure: Any, shape: tuple[int, int]
) -> tuple[float, float]:
  """Bytes a token, (device, host), of what the VJP of `model`'s layers keeps.

  Args:
    leaves: shapes of frozen, params and constants, as `structure` has them, of the layers alone.
    shape: (rows, tokens of each) that are traced.
  """
  frozen, params, constants = structure.unflatten(leaves)

  def residuals(params, frozen, constants, x):
    def through(params):
      variables = {"params": params, "constants": constants, "frozen": frozen}
      return model.apply(variables, x, method="blocks")[0]

    return jax.tree.leaves(jax.vjp(through, params)[1])

  x = jax.ShapeDtypeStruct((*shape, model.config.hidden_size), model.dtype)
  jaxpr = jax.make_jaxpr(residuals)(params, frozen, constants, x).jaxpr
  given = {id(variable) for variable in jaxpr.invars}
  kept: dict[int, Any] = {id(v): v.aval for v in jaxpr.outvars if id(v) not in given}
  device = host = 0
  for aval in kept.values():
    sizes = getattr(aval, "shape", ())
    # A scan stacks what its layers (or pairs of them, whose input alone waits) keep; the rest is
    # in the working set.
    paired = model.remat == "offload_pairs"
    if len(sizes) < 3 or sizes[0] != model.config.num_layers // (1 + paired):
      continue
    if paired and not _on_host(aval):
      continue
    size = math.prod(sizes) * aval.dtype.itemsize
    if _on_host(aval):
      host += size
    else:
      device += size
  return device / math.prod(shape), host / math.prod(shape)


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
    ValueError: fewer rows than the constants of either kind, rows too much alike, or one whose
      attention is plain.
  """
  rows = list(rows)
  for row in rows:
    if row.planner.attention(row.step) == "plain":
      step = row.step
      raise ValueError(
        f"{step.batch_size}x{step.seq_len}:{step.remat}: attention is plain there, and its logits "
        "are in no constant; rows to fit on are longer than 1024 tokens, or cuDNN's"
      )
  if len(rows) < 3:
    raise ValueError(f"{len(rows)} rows do not determine three constants of memory and of time")
  bytes_of, seconds_of = [], []
  for row in rows:
    counted = row.planner.memory(row.step)
    rest = row.peak - (counted.total - counted.working) - row.planner.layer_rest(row.step)
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

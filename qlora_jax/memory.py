"""What a run will hold, by part, counted before anything is loaded."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax import tree_paths
from qlora_jax.lora import LoRAConfig
from qlora_jax.lora import init as init_lora
from qlora_jax.models.remat import RematPolicy
from qlora_jax.models.transformer import Transformer
from qlora_jax.plan import bytes_on_device
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.train import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes of a training run, by part, and the shapes they were counted from.

  Attributes:
    base: the frozen tree: packed weights, and the others as they are stored.
    adapters: the trained parameters.
    optimizer: its state.
    activations: temporaries of the compiled train step. Compiled for the CPU, which keeps
      bfloat16 products in float32: an accelerator needs less.
    frozen: shapes of the base, `jax.ShapeDtypeStruct` leaves.
    state: shapes of the TrainState.
  """

  base: int
  adapters: int
  optimizer: int
  activations: int
  frozen: Any
  state: TrainState


def quantized_bits(frozen: Any) -> float | None:
  """Bits a weight, scales and tables included, over the quantized weights; None without any."""
  packed = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(leaf)]
  if not packed:
    return None
  return 8 * sum(leaf.nbytes for leaf in packed) / sum(leaf.size for leaf in packed)


def footprint(
  model: Transformer,
  frozen: Any,
  lora: LoRAConfig,
  optimizer: optax.GradientTransformation,
  *,
  batch_shape: tuple[int, int, int],
  packed_rows: bool,
  loss_chunk: int,
) -> Footprint:
  """Counts a run's bytes from shapes, compiling its train step for the CPU.

  Args:
    frozen: arrays or shapes; only their shapes are read.
    batch_shape: (accumulate_steps, batch_size, seq_len).
    packed_rows: whether rows hold several documents, with segment ids.
  """

  def make(key, frozen):
    return init_state(*init_lora(key, frozen, lora), optimizer, seed=0, dtype=model.dtype)

  frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), frozen)
  state = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)), frozen)
  ids = jax.ShapeDtypeStruct(batch_shape, jnp.int32)
  batch = {
    "tokens": ids,
    "targets": ids,
    "loss_mask": jax.ShapeDtypeStruct(batch_shape, jnp.bool_),
  }
  if packed_rows:
    batch |= {"segment_ids": ids, "positions": ids}
  step = make_train_step(model, optimizer, loss_chunk)
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    compiled = step.lower(state, frozen, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
  analysis = compiled.memory_analysis()
  return Footprint(
    base=tree_paths.tree_bytes(frozen),
    adapters=tree_paths.tree_bytes(state.params),
    optimizer=tree_paths.tree_bytes(state.opt_state),
    activations=analysis.temp_size_in_bytes,
    frozen=frozen,
    state=state,
  )


# From the fastest on. "none" keeps more than "elementwise" and is no faster: the norms that it does
# not compute again cost less than reading them (8 trials of an 8B model, 512 tokens each, on an
# H100: 12,600 tokens a second against 13,960).
_BY_SPEED: tuple[RematPolicy, ...] = ("elementwise", "mlp", "full", "offload")

# A policy is not compiled where the plan expects it to need so many times what there is.
_HOPELESS = 1.2


def fastest_remat(
  make_step: Callable[[RematPolicy], Any],
  arguments: tuple[Any, ...],
  available: int,
  expected: Mapping[RematPolicy, int],
) -> tuple[RematPolicy, dict[RematPolicy, int]]:
  """The policy that computes least again of those whose step fits, by the compiler's own account.

  Policies are compiled from "elementwise" on, until one fits; those that cannot are left out. One
  that the compiler itself runs out of memory on does not fit, and has no bytes.

  Args:
    make_step: the jitted step of a policy.
    arguments: of the step; arrays or shapes.
    available: bytes of the device.
    expected: bytes that `plan.Planner.memory` expects of each.

  Returns:
    The policy, and the bytes that each one tried needs: arguments, results and temporaries.

  Raises:
    ValueError: none fits; the message has each one's bytes.
  """
  needed: dict[RematPolicy, int] = {}
  tried = []
  for policy in _BY_SPEED:
    if expected[policy] > _HOPELESS * available and policy != _BY_SPEED[-1]:
      continue
    size = compiled_bytes(make_step(policy), *arguments)
    if size is None:
      tried.append(f"{policy} more than the compiler had")
      continue
    needed[policy] = size
    if size <= available:
      return policy, needed
    tried.append(f"{policy} {size / 1e9:.2f} GB")
  raise ValueError(
    f"remat: no policy fits in {available / 1e9:.2f} GB ({', '.join(tried)}); lower "
    "train.batch_size, data.seq_len or train.loss_chunk, or set model.mlp_chunk"
  )


def compiled_bytes(step: Any, *arguments: Any) -> int | None:
  """`step_bytes` of a jitted step, compiled for `arguments`; None: its compiler ran out of memory.

  A compiler may place what it compiles (on a TPU), or time kernels on the device (on a GPU).
  """
  try:
    return step_bytes(step.lower(*arguments).compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None


def step_bytes(compiled: Any) -> int:
  """What a compiled step needs: arguments, results and temporaries, by the compiler's account."""
  analysis = compiled.memory_analysis()
  return (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )


# Of the memory that is free, what a step may be planned to fill: the rest is fragments.
_USABLE = 0.95


def available_bytes(arguments: Any) -> int:
  """What a step may take of JAX's default device, what lies there of its `arguments` included.

  Of a CPU, which does not say, all of the machine's memory.
  """
  limit = device_bytes()
  if limit is None:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  statistics = jax.local_devices()[0].memory_stats() or {}
  others = statistics["bytes_in_use"] - bytes_on_device(arguments)
  return int(_USABLE * (limit - max(others, 0)))


def device_bytes() -> int | None:
  """What JAX may take of its default device; None of a CPU, which does not say."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def weight_table(frozen: Any, state: TrainState) -> list[tuple[str, str, str, str]]:
  """A row a weight: path, shape, how it is stored, its adapter."""
  ranks = {
    path.removesuffix("/lora_a"): leaf.shape[-1]
    for path, leaf in tree_paths.leaves(state.params).items()
    if path.endswith("/lora_a")
  }
  rows = []
  for path, leaf in tree_paths.leaves(frozen, is_leaf=is_quantized).items():
    shape = "×".join(map(str, leaf.shape))
    rank = ranks.get(tree_paths.module(path))
    rows.append((path, shape, _treatment(leaf), "" if rank is None else f"LoRA rank {rank}"))
  return rows


def _treatment(leaf: Any) -> str:
  if not is_quantized(leaf):
    return str(leaf.dtype)
  return f"{leaf.bits}-bit codes, block {leaf.block_size}, {leaf.bits_per_param:.3f} bits a weight"

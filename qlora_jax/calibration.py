"""What some inits and formats ask of the data: weights' gradients, and moments of their inputs.

`quantize_base` makes a base by them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax import bit_budget, gptq, lora, tree_paths
from qlora_jax.config import BaseQuantization
from qlora_jax.linen import QDense
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantization import Treatment, dequantize, quantize_tree, treatments
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.train import Batch, batch_loss


def quantize_base(
  model: Transformer,
  dense: Any,
  quantization: BaseQuantization,
  targets: tuple[str, ...],
  batches: Iterable[Batch],
  loss_chunk: int,
  storage_dtype: DTypeLike | None = None,
) -> Any:
  """Quantizes a base by what some batches say of it: importance, budget, GPTQ's feedback.

  All of the dense base is in memory, with one stack's gradient or moments at a time on the device;
  the importances of all weights, or their moments `[..., K, K]`, lie on the host. The moments that
  GPTQ uses are those of the dense model, of all layers at once: not, as in its paper, of layers
  whose inputs come from layers that are quantized by then.

  Args:
    model, dense: the base that is not quantized.
    quantization: what is asked for.
    targets: patterns of the weights that are quantized.
    batches, loss_chunk: see `weight_gradients`.
    storage_dtype: of the weights that are not quantized; None keeps theirs.

  Returns:
    The packed base.

  Raises:
    ValueError: see `fisher_diagonal`, `second_moments`, `bit_budget.rules`, `quantize_tree` and
      `gptq.feed_back_tree`.
  """
  batches = list(batches)
  cfg = LoRAConfig(rank=1, targets=targets)
  importance: dict[str, np.ndarray] = {}
  moments: dict[str, np.ndarray] = {}
  if quantization.gptq or quantization.importance == "inputs":
    moments = second_moments(model, dense, cfg, batches)
  if quantization.importance == "fisher":
    importance = fisher_diagonal(model, dense, cfg, batches, loss_chunk)
  elif quantization.importance == "inputs":
    importance = input_moments(moments)

  if quantization.bits_per_weight is None:
    rules = dict.fromkeys(targets, quantization.choices[0])
  else:
    rules = bit_budget.rules(
      dense,
      quantization.bits_per_weight,
      targets=targets,
      candidates=quantization.choices,
      importance=importance,
    )
  used: dict[str, Treatment] = treatments(dense, rules)
  weighed = {
    path: value
    for path, value in importance.items()
    if (own := used[path]) is not None and own.weighs_errors and not own.rotate  # pyright: ignore
  }
  frozen = quantize_tree(dense, rules, importance=weighed)
  if quantization.gptq:
    frozen = gptq.feed_back_tree(dense, frozen, moments, damping=quantization.gptq_damping)
  if storage_dtype is None:
    return frozen
  return jax.tree.map(
    lambda x: x if is_quantized(x) else x.astype(storage_dtype), frozen, is_leaf=is_quantized
  )


def weight_gradients(
  model: Transformer, frozen: Any, cfg: LoRAConfig, batches: Iterable[Batch], loss_chunk: int
) -> dict[str, np.ndarray]:
  """G = ∂(mean loss) / ∂W of each weight that the targets match, without any adapter.

  A backward pass of each batch for each of the base's leaves, of which one stack at a time is
  dense, beside its gradient: in time for memory. The results lie on the host.

  Args:
    model, frozen: the base, packed or plain.
    cfg: whose targets are meant.
    batches: `[A, B, T]` arrays, as `train.make_train_step` takes them.
    loss_chunk: see `train.batch_loss`.

  Returns:
    Path of the weight → `[..., K, N]` float32.

  Raises:
    ValueError: a weight without a gradient, as experts' are.
  """
  microbatches = _microbatches(batches)
  targets = sum(int(each["loss_mask"].sum()) for each in microbatches)
  found = _sums_of_gradients(model, frozen, cfg, microbatches, loss_chunk, lambda g: g)
  return {path: total / np.float32(targets) for path, total in found.items()}


def fisher_diagonal(
  model: Transformer, frozen: Any, cfg: LoRAConfig, batches: Iterable[Batch], loss_chunk: int
) -> dict[str, np.ndarray]:
  """The mean of squared gradients, (∂ loss of a sequence / ∂ W)², without any adapter.

  The diagonal of the empirical Fisher information: half of Σ F · (Ŵ − W)² estimates what quantizing
  adds to the loss. It is what `quantize_tree`'s and `bit_budget.rules`'s importance is meant for.

  Args:
    model, frozen, cfg, batches, loss_chunk: see `weight_gradients`; one sequence at a time.

  Returns:
    Path of the weight → `[..., K, N]` float32.

  Raises:
    ValueError: a weight without a gradient, as experts' are.

  References:
    Kim et al., SqueezeLLM, 2023, https://arxiv.org/abs/2306.07629, section 4.1.
  """
  sequences = [
    {name: x[i : i + 1] for name, x in each.items()}
    for each in _microbatches(batches)
    for i in range(len(each["tokens"]))
  ]
  found = _sums_of_gradients(model, frozen, cfg, sequences, loss_chunk, np.square)
  return {path: total / np.float32(len(sequences)) for path, total in found.items()}


def _sums_of_gradients(
  model: Transformer,
  frozen: Any,
  cfg: LoRAConfig,
  microbatches: list[dict[str, jax.Array]],
  loss_chunk: int,
  power: Callable[[np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
  """Path → Σ power(∂ summed loss of a microbatch / ∂ W)."""
  found = {}
  for path in lora.plan(frozen, cfg):
    leaf = lora.base_weight(frozen, path)
    w = dequantize(leaf) if is_quantized(leaf) else jnp.asarray(leaf, jnp.float32)

    @jax.jit
    def gradient(w: jax.Array, frozen: Any, batch: Batch, path: str = path) -> jax.Array:
      def loss(w: jax.Array) -> jax.Array:
        # A full leaf in params takes the weight's place.
        params = tree_paths.nest({path: w})
        variables = {"params": params, "constants": {}, "frozen": frozen}
        return batch_loss(model, variables, batch, loss_chunk)

      return jax.grad(loss)(w)

    total = np.zeros(w.shape, np.float32)
    for each in microbatches:
      total += power(np.asarray(gradient(w, frozen, each)))
    if not total.any():
      raise ValueError(f"{lora.module(path)}: the loss has no gradient with respect to it")
    found[path] = total
  return found


def second_moments(
  model: Transformer, frozen: Any, cfg: LoRAConfig, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
  """Σ x · xᵀ over all tokens (of padding too) of the inputs x of each weight that is a target.

  Args:
    model, frozen, cfg, batches: see `weight_gradients`. Memory holds the moments of one stack at a
      time, and for the head the logits of a microbatch.

  Returns:
    Path of the weight → `[..., K, K]` float32.

  Raises:
    ValueError: a weight that no dense layer of its own reads, as experts' and a tied head's.
  """
  microbatches = _microbatches(batches)
  found = {}
  for path, (leaf, *_) in lora.plan(frozen, cfg).items():
    *leading, k, _ = leaf.shape
    name = f"{lora.module(path)}/{_TAP}"

    @jax.jit
    def moment(zeros: jax.Array, frozen: Any, batch: Batch, name: str = name) -> jax.Array:
      def output(tap: jax.Array) -> jax.Array:
        variables = {"params": {}, "constants": tree_paths.nest({name: tap}), "frozen": frozen}
        inputs = (batch["tokens"], batch.get("segment_ids"), batch.get("positions"))
        method = "__call__" if name.startswith(f"{lora.module(lora.HEAD)}/") else "hidden"
        with nn.intercept_methods(_tapped):
          y: Any = model.apply(variables, *inputs, method=method)
        return y.astype(jnp.float32).sum()

      return jax.grad(output)(zeros)

    zeros = jnp.zeros((*leading, k, k), jnp.float32)
    total = np.zeros(zeros.shape, np.float32)
    for each in microbatches:
      total += np.asarray(moment(zeros, frozen, each))
    if not total.any():
      raise ValueError(f"{lora.module(path)}: no dense layer reads it")
    found[path] = total
  return found


def input_moments(moments: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Of `second_moments`, what each input weighs by itself: path → `[..., K, 1]`, Σ x²."""
  return {path: np.diagonal(h, axis1=-2, axis2=-1)[..., None] for path, h in moments.items()}


def _microbatches(batches: Iterable[Batch]) -> list[dict[str, jax.Array]]:
  return [
    {name: jnp.asarray(x[i]) for name, x in batch.items()}
    for batch in batches
    for i in range(len(batch["tokens"]))
  ]


# The constant whose gradient is made to be the moment: it passes through a scan over layers, and
# through rematerialization, as any gradient does.
_TAP = "second_moment"


def _tapped(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
  """An interceptor of Flax's methods: taps the dense layers that have such a constant."""
  y = call(*args, **kwargs)
  module = context.module
  if not isinstance(module, QDense) or context.method_name != "__call__":
    return y
  if not module.has_variable("constants", _TAP):
    return y
  return _tap(y, args[0], module.get_variable("constants", _TAP))


@jax.custom_vjp
def _tap(y: jax.Array, x: jax.Array, moment: jax.Array) -> jax.Array:
  """y, with xᵀ · x in place of the gradient of `moment`."""
  del x, moment
  return y


def _tap_forward(y: jax.Array, x: jax.Array, moment: jax.Array) -> tuple[jax.Array, jax.Array]:
  del moment
  return y, x


def _tap_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  return dy, jnp.zeros_like(x), jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


_tap.defvjp(_tap_forward, _tap_backward)

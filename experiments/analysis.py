"""What a sweep measures of a base and of a trained trial, beside the loss.

Of a base, once for all trials that share it: each layer's error beside that of normal weights, the
use of its codes, and what quantizing did to the model's predictions. Of a trial: losses and
divergences by sequence, from which a standard error, and paired differences, can be computed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import memory, tree_paths
from qlora_jax.data import Dataset, evaluation_batches
from qlora_jax.losses import token_chunks
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantization import QuantizationConfig, dequantize, quantize_by
from qlora_jax.quantized_tensor import (
  AnyQuantizedTensor,
  OutlierQuantizedTensor,
  innermost,
  is_quantized,
  unpack,
)

# Of the normal weights that a layer's error stands beside: its own scatter is about .2%.
_NORMAL_ROWS, _NORMAL_COLUMNS = 4096, 256


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Sums over the targets of each held-out sequence.

  Attributes:
    targets: how many predictions count, `[rows]`.
    loss: cross entropy in nats, summed over them, `[rows]`.
    kl: KL(16-bit base ‖ model) in nats, summed over them, `[rows]`; None without a 16-bit base.
  """

  targets: list[int]
  loss: list[float]
  kl: list[float] | None


def by_sequence(
  model: Transformer,
  variables: dict[str, Any],
  reference: Any | None,
  dataset: Dataset,
  *,
  batch_size: int,
  loss_chunk: int,
) -> Sequences:
  """Evaluates every sequence of `dataset`.

  Args:
    variables: `params`, `constants` and `frozen` of the model that is measured.
    reference: frozen tree of the 16-bit base, or None where there is none.
    batch_size: sequences at a time.
    loss_chunk: tokens whose logits exist at once, twice: of the model and of the reference.
  """
  loss, kl = [], []
  for batch in evaluation_batches(dataset, batch_size):
    losses, divergences = _by_sequence(model, variables, reference, batch, loss_chunk)
    loss += np.asarray(losses).tolist()
    kl += [] if divergences is None else np.asarray(divergences).tolist()
  count = len(dataset.tokens)  # without the rows that fill the last batch
  return Sequences(
    dataset.loss_mask.sum(1).tolist(), loss[:count], None if reference is None else kl[:count]
  )


@functools.partial(jax.jit, static_argnums=(0, 4))
def _by_sequence(model, variables, reference, batch, loss_chunk):
  shape, mask = batch["tokens"].shape, batch["loss_mask"]
  every = [variables]
  if reference is not None:
    every.append({"params": {}, "constants": {}, "frozen": reference})
  # Both models' states, so that the logits of a chunk of tokens exist at once and no more.
  hidden = [
    model.apply(
      each, batch["tokens"], batch["segment_ids"], batch["positions"], method="hidden"
    ).reshape(mask.size, -1)
    for each in every
  ]
  chunks = functools.partial(token_chunks, loss_chunk)

  def tokens(part):
    hidden, targets = part
    ours, *theirs = (
      jax.nn.log_softmax(model.apply(each, x, method="logits"))
      for each, x in zip(every, hidden, strict=True)
    )
    loss = -jnp.take_along_axis(ours, targets[:, None], axis=-1)[:, 0]
    return loss, [(jnp.exp(p) * (p - ours)).sum(-1) for p in theirs]

  parts = jax.lax.map(tokens, ([chunks(x) for x in hidden], chunks(batch["targets"].reshape(-1))))

  def rows(x):
    return jnp.where(mask, x.reshape(-1)[: mask.size].reshape(shape), 0).sum(1)

  loss, kl = parts
  return rows(loss), rows(kl[0]) if kl else None


def of_base(
  model: Transformer,
  frozen: Any,
  reference: Any | None,
  quantization: QuantizationConfig | None,
  dataset: Dataset,
  *,
  batch_size: int,
  loss_chunk: int,
) -> dict[str, Any]:
  """What is measured of a base, as JSON holds it.

  Returns:
    `quantization`: as given; `bits_per_quantized_weight`, scales and tables counted, and
    `bits_per_parameter` of the whole model; `parameters`, `quantized_parameters`, `bytes`, and
    these by part (`bytes_by_part`); `sequences` before any training;
    `normal_relative_mse`: of normal weights treated alike, without what asks data; `layers`: see
    `weight_errors`. The last two are None where nothing is quantized, where weights have codebooks
    of their own (bits_per_weight), or there is no 16-bit base.
  """
  sequences = by_sequence(
    model,
    {"params": {}, "constants": {}, "frozen": frozen},
    reference,
    dataset,
    batch_size=batch_size,
    loss_chunk=loss_chunk,
  )
  leaves = jax.tree.leaves(frozen, is_leaf=is_quantized)
  parameters, size = sum(leaf.size for leaf in leaves), tree_paths.tree_bytes(frozen)
  normal, layers = None, None
  formats = () if quantization is None else quantization.choices
  if len(formats) == 1 and reference is not None:
    normal, layers = normal_relative_mse(formats[0]), weight_errors(reference, frozen)
  return {
    "quantization": None if quantization is None else dataclasses.asdict(quantization),
    "bits_per_quantized_weight": memory.quantized_bits(frozen),
    "bits_per_parameter": 8 * size / parameters,
    "parameters": parameters,
    "quantized_parameters": sum(leaf.size for leaf in leaves if is_quantized(leaf)),
    "bytes": size,
    "bytes_by_part": bytes_by_part(frozen),
    "sequences": dataclasses.asdict(sequences),
    "normal_relative_mse": normal,
    "layers": layers,
  }


def bytes_by_part(frozen: Any) -> dict[str, int]:
  """Of `codes`, `scales` (zero points and rotations with them), `tables`, and `not_quantized`.

  Outliers are not quantized.
  """
  parts = {"codes": 0, "scales": 0, "tables": 0, "not_quantized": 0}
  for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized):
    if not is_quantized(leaf):
      parts["not_quantized"] += tree_paths.tree_bytes(leaf)
      continue
    if isinstance(leaf, OutlierQuantizedTensor):
      parts["not_quantized"] += tree_paths.tree_bytes((leaf.rows, leaf.values))
      leaf = leaf.inner
    packed = innermost(leaf)
    parts["codes"] += tree_paths.tree_bytes(packed.codes)
    parts["tables"] += tree_paths.tree_bytes(packed.levels)
    parts["scales"] += leaf.nbytes - tree_paths.tree_bytes((packed.codes, packed.levels))
  return parts


def normal_relative_mse(quantization: QuantizationConfig) -> float:
  """Relative squared error of weights from N(0, 1) under `quantization`, from a million draws."""
  rows = -(-_NORMAL_ROWS // quantization.block_size) * quantization.block_size
  w = jax.random.normal(jax.random.key(0), (rows, _NORMAL_COLUMNS), jnp.float32)
  packed = quantize_by(w, quantization)
  return float(_moments(w, dequantize(packed))[0])


def weight_errors(dense: Any, frozen: Any) -> list[dict[str, Any]]:
  """Measures each quantized matrix against the one that it stands for.

  Args:
    dense: the base before it was quantized. Kept in bfloat16, it adds its own rounding, a relative
      squared error of about 3e-6.
    frozen: the tree with its packed weights.

  Returns:
    One dictionary a matrix, each layer of a stack its own: `path` (virtual: `layers/3/mlp/down`),
    `shape` [K, N], `relative_mse` Σ(ŵ − w)² / Σw², `kurtosis` of w (3 for normal weights), `codes`,
    how many weights have each code, and `entropy_bits` of the codes.
  """
  originals = tree_paths.leaves(dense)
  found = []
  for path, packed in tree_paths.leaves(frozen, is_leaf=is_quantized).items():
    if not is_quantized(packed):
      continue
    original = originals[path]
    for i, layer in enumerate(tree_paths.layers(path, packed)):
      w, one = original, packed
      if tree_paths.is_stacked(path):
        # One layer after another: of all at once there would be dense copies.
        w, one = original[i], jax.tree.map(lambda x, i=i: x[i], packed)
      error, kurtosis = _moments(w, dequantize(one))
      codes = np.asarray(_histogram(one))
      found.append(
        {
          "path": layer,
          "shape": list(one.shape),
          "relative_mse": float(error),
          "kurtosis": float(kurtosis),
          "codes": codes.tolist(),
          "entropy_bits": entropy_bits(codes),
        }
      )
  return found


def entropy_bits(counts: np.ndarray) -> float:
  """−Σ p log₂ p of a histogram: what an ideal coder would need for a code."""
  share = counts[counts > 0] / counts.sum()
  return float(-(share * np.log2(share)).sum())


@jax.jit
def _moments(w: jax.Array, approximation: jax.Array) -> tuple[jax.Array, jax.Array]:
  w = w.astype(jnp.float32)
  centered = w - w.mean()
  variance = jnp.square(centered).mean()
  error = jnp.square(approximation - w).mean() / jnp.square(w).mean()
  return error, jnp.square(jnp.square(centered)).mean() / jnp.square(variance)


@jax.jit
def _histogram(w: AnyQuantizedTensor) -> jax.Array:
  """`[2**bits]`: how many weights have each code."""
  w = innermost(w)
  if w.ndim > 2:  # experts
    return jax.vmap(_histogram)(w).sum(0)
  planes = unpack(w.codes, w.bits, w.padding)
  return sum(
    (jnp.bincount(plane.reshape(-1), length=2**w.bits) for plane in planes),
    start=jnp.zeros(2**w.bits, jnp.int32),
  )

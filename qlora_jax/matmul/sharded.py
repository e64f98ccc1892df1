"""The product over a mesh: packed codes cross the wire, not weights.

Kernels see local arrays alone, and `custom_partitioning` has no batching rule, so a layer wraps its
product in a `shard_map`. A weight is cut along "fsdp", which is gathered again, packed, where it is
multiplied; and along "tensor", which stays cut: along N it cuts the result, along K the result is a
sum over the devices, each of whose parts is rounded to x's dtype. Rows of x are cut along "data"
and "fsdp". What is kept for the backward pass is each device's own part, which is gathered again
there.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from qlora_jax.matmul import api, manual_axes, stacked
from qlora_jax.quantized_tensor import (
  GROUP,
  NestedScales,
  QuantizedTensor,
  TwoLevelScales,
  restore_scales,
)

_BATCH, _GATHERED, _KEPT = ("data", "fsdp"), "fsdp", "tensor"

Partition = tuple[str, str]

# Of a projection whose result is cut, and of one whose input is.
COLUMNS: Partition = ("fsdp", "tensor")
ROWS: Partition = ("tensor", "fsdp")


def unsupported(x: Any, w: Any, partition: Partition) -> str | None:
  """Why `sharded_matmul` cannot share this product out, or None. Of x, the shape is read.

  A layer leaves such a product to XLA, as it does all of them where there is no mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return "there is no mesh of several devices"
  if any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
    return "the mesh has axes that are manual or explicit"
  if not isinstance(w, QuantizedTensor) or w.column_tables:
    return "the weight is none of plain codes with one table"
  if x.ndim < 2 or x.shape[0] % math.prod(mesh.shape[name] for name in _present(_BATCH)):
    return (
      f"x {list(x.shape)}: its first axis is not cut evenly along {', '.join(_present(_BATCH))}"
    )
  return _uncut(w, partition)


def _present(names: tuple[str, ...]) -> tuple[str, ...]:
  """Those along which the mesh has several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def _uncut(w: QuantizedTensor, partition: Partition) -> str | None:
  """Why the mesh cannot cut a weight so, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  k, n = w.shape[-2:]
  unit = math.lcm(GROUP, w.block_size)
  k_axis, n_axis = partition
  if k_axis in _present(partition) and k % (unit * mesh.shape[k_axis]):
    return (
      f"K = {k} cut in {mesh.shape[k_axis]} along {k_axis!r}: a part is a multiple of {unit}, "
      f"whole groups of {GROUP} rows and blocks of {w.block_size}"
    )
  if n_axis in _present(partition) and n % mesh.shape[n_axis]:
    return f"N = {n} cut in {mesh.shape[n_axis]} along {n_axis!r}, which do not divide it"
  return None


def weight_specs(w: QuantizedTensor, partition: Partition, leading: int = 0) -> QuantizedTensor:
  """The PartitionSpec of each leaf of a weight, or of a stack with so many leading axes.

  Codes, scales and zero-points are cut alike. What is replicated: levels, and of scales that are
  quantized again what blocks share.

  Raises:
    ValueError: a cut through a group of packed rows or through a block; the message has the rule.
  """
  if reason := _uncut(w, partition):
    raise ValueError(reason)
  k_axis, n_axis = (name if name in _present(partition) else None for name in partition)
  cut = P(*[None] * leading, k_axis, n_axis)
  whole = jax.tree.map(lambda leaf: P(), w)
  scales = cut
  if isinstance(w.scales, NestedScales | TwoLevelScales):
    scales = dataclasses.replace(jax.tree.map(lambda leaf: P(), w.scales), codes=cut)
  zero = None if w.zero is None else cut
  stack = w.stack
  if stack is not None:
    layers = [None] * (stack.codes.ndim - 2)
    stack = dataclasses.replace(whole.stack, codes=P(*layers, k_axis, n_axis))
  return dataclasses.replace(whole, codes=cut, scales=scales, zero=zero, stack=stack)


def sharded_matmul(
  x: jax.Array, w: QuantizedTensor, partition: Partition, *, implementation: str | None = None
) -> jax.Array:
  """`quantized_matmul` over the mesh in use (`jax.set_mesh`), inside `jit`.

  Args:
    x: `[B, ..., K]`; B is cut along "data" and "fsdp".
    w: `[K, N]`.
    partition: the mesh's axes along K and N, `COLUMNS` or `ROWS`. Those that the mesh has not are
      passed over.
    implementation: of the local product.

  Returns:
    `[B, ..., N]` in x's dtype.

  Raises:
    ValueError: what `unsupported` says; see also `quantized_matmul`.
  """
  if reason := unsupported(x, w, partition):
    raise ValueError(f"sharded_matmul: {reason}")
  # The map of nested scales goes by where a block lies in the whole weight.
  w = jax.lax.stop_gradient(dataclasses.replace(w, scales=restore_scales(w.scales)))
  if _GATHERED in _present(partition):
    # What is gathered is no part of a stack.
    w = stacked.without(w)
  elif w.stack is not None:
    # Nor are scales that were restored.
    own = dataclasses.replace(w.stack, scales=None, levels=None, zero=None)
    w = dataclasses.replace(w, stack=own)
  specs = weight_specs(w, partition)
  k_axis, n_axis = specs.codes
  batch = _present(_BATCH)
  middle = [None] * (x.ndim - 2)

  def gathered(w):
    def gather(leaf, spec):
      if _GATHERED not in spec:
        return leaf
      return jax.lax.all_gather(leaf, _GATHERED, axis=spec.index(_GATHERED), tiled=True)

    return jax.tree.map(gather, w, specs)

  # Around the gathering, so that its residual is what was gathered.
  @jax.custom_vjp
  def product(x, w):
    return api.quantized_matmul(x, gathered(w), implementation=implementation)

  def backward(w, g):
    # The barrier keeps XLA from gathering once for both passes, and holding that in between.
    g, w = jax.lax.optimization_barrier((g, w))
    return api.transposed_matmul(g, gathered(w), implementation=implementation), None

  product.defvjp(lambda x, w: (product(x, w), w), backward)

  def local(x, w):
    y = product(*manual_axes.alike(x, w))
    return jax.lax.psum(y, _KEPT) if k_axis == _KEPT else y

  return jax.shard_map(
    local,
    in_specs=(P(batch or None, *middle, _KEPT if k_axis == _KEPT else None), specs),
    out_specs=P(batch or None, *middle, _KEPT if n_axis == _KEPT else None),
  )(x, w)

"""Evaluates a jaxpr with packed weights, and adapters, in the place of dense ones.

The equations are bound as they are but for those that a weight goes into: a move changes what is
known of its axes, a loop slices it, a product or a lookup reads it.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from qlora_jax import lora, tree_paths
from qlora_jax.adapted_product import adapted_product, projection, scaling_of
from qlora_jax.quantization import dequantize
from qlora_jax.quantized_tensor import QuantizedTensor, is_quantized, restore_scales
from qlora_jax.weight_uses import (
  BODIES,
  Dims,
  Part,
  Value,
  aval,
  axes_of,
  enter_scan,
  index_of,
  lookup_axis,
  moved,
  opened,
  scanned,
)


def evaluate(
  jaxpr: Any, constants: Sequence[Any], operands: Sequence[Any], implementation: str | None = None
) -> list[Any]:
  """The jaxpr's results, where an operand may be a weight as a `Value`.

  Args:
    implementation: of `quantized_matmul`.
  """
  env = dict(zip(jaxpr.constvars, constants, strict=True))
  env |= zip(jaxpr.invars, operands, strict=True)
  for eqn in jaxpr.eqns:
    own = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
    if any(isinstance(value, Value) for value in own):
      results = _read(eqn, own, implementation)
    else:
      bound = eqn.primitive.get_bind_params(eqn.params)
      functions, params = bound if isinstance(bound, tuple) else ((), bound)
      with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *own, **params)
      results = results if eqn.primitive.multiple_results else [results]
    env |= zip(eqn.outvars, results, strict=True)
  return [v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]


def _closed(jaxpr: Any, implementation: str | None) -> Callable[..., list[Any]]:
  body, constants = opened(jaxpr)
  return lambda *operands: evaluate(body, constants, operands, implementation)


def _read(eqn: core.JaxprEqn, own: list[Any], implementation: str | None) -> Sequence[Any]:
  """The results of an equation that a weight goes into."""
  closed = functools.partial(_closed, implementation=implementation)
  name, first = eqn.primitive.name, own[0]
  if name in BODIES:
    body = closed(eqn.params[BODIES[name]])
    if name in ("remat2", "checkpoint"):
      kept = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
      return jax.checkpoint(body, **kept)(*own)
    return body(*own)
  if name == "scan":
    return _scan(eqn, own, closed(eqn.params["jaxpr"]))
  if name == "while":
    a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition, body = closed(eqn.params["cond_jaxpr"]), closed(eqn.params["body_jaxpr"])
    return jax.lax.while_loop(
      lambda carry: condition(*own[:a], *carry)[0],
      lambda carry: body(*own[a : a + b], *carry),
      own[a + b :],
    )
  if name == "cond":
    return jax.lax.switch(own[0], [closed(branch) for branch in eqn.params["branches"]], *own[1:])
  if name == "dot_general":
    return [_dot(eqn, own, implementation)]
  if isinstance(first, Value):
    if lookup_axis(eqn, first) is not None:
      return [_look_up(eqn, first, own[1])]
    if (index := index_of(eqn, first)) is not None:
      dim, axis = index
      start = own[1 + dim] if len(own) > 1 else eqn.params["start_indices"][dim]
      dims = (*first.dims[:dim], (), *first.dims[dim + 1 :])
      return [_without(first, axis, start, dims)]
    if len(own) == 1 and (after := moved(eqn, first)) is not None:
      return [after]
  raise unserved(next(value for value in own if isinstance(value, Value)), f"read by {name}")


def unserved(value: Value, why: str) -> ValueError:
  """The error for a use that a packed weight's layout does not serve."""
  return ValueError(
    f"{value.path}: {why}, which the arguments that it was adapted with did not show; "
    "adapt with arguments that do, or leave this weight as it is"
  )


def _without(value: Value, axis: int, index: Any, dims: Dims) -> Value:
  """One of a weight's matrices along a leading axis."""
  if axis not in value.leading:
    raise unserved(value, f"indexed along its axis {axis}")
  place = value.leading.index(axis)
  take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, axis=place, keepdims=False)
  return dataclasses.replace(
    value, data=jax.tree.map(take, value.data), dims=dims, taken=value.taken | {axis}
  )


def _scan(eqn: core.JaxprEqn, own: list[Any], body: Callable[..., list[Any]]) -> Sequence[Any]:
  num_constants, num_carried = scanned(eqn)
  first_sliced = num_constants + num_carried
  constants, carry = own[:num_constants], own[num_constants:first_sliced]
  for value in carry:
    if isinstance(value, Value):
      raise unserved(value, "carried by a loop")
  inside, xs = [], []
  for value in own[first_sliced:]:
    if isinstance(value, Value):
      inner = enter_scan(value)
      if inner is None or (axis := value.dims[0][0][0]) not in value.leading:
        raise unserved(value, "read by scan")
      place = value.leading.index(axis)
      inside.append(inner)
      xs.append(jax.tree.map(lambda leaf, place=place: jnp.moveaxis(leaf, place, 0), value.data))
    else:
      inside.append(None)
      xs.append(value)

  def step(carry, xs):
    each = [
      x if value is None else dataclasses.replace(value, data=x)
      for value, x in zip(inside, xs, strict=True)
    ]
    results = body(*constants, *carry, *each)
    return results[:num_carried], results[num_carried:]

  kept = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
  carry, ys = jax.lax.scan(step, carry, xs, **kept)
  return [*carry, *ys]


def _dot(eqn: core.JaxprEqn, own: list[Any], implementation: str | None) -> jax.Array:
  """A product with a weight: x's axes are put in the order of K, and N's in that of the result."""
  side = 0 if isinstance(own[0], Value) else 1
  w, x = own[side], own[1 - side]
  if isinstance(x, Value):
    raise unserved(w, f"multiplied by {x.path}")
  contracted, batch = eqn.params["dimension_numbers"]
  free_w, free_x = (
    [i for i in range(ndim) if i not in (*contracted[which], *batch[which])]
    for which, ndim in ((side, len(w.dims)), (1 - side, x.ndim))
  )

  def parts(dims: Sequence[int]) -> list[Part]:
    return [part for i in dims for part in w.dims[i]]

  batch_parts, k_parts, n_parts = parts(batch[side]), parts(contracted[side]), parts(free_w)
  layout = w.layout
  if (
    not axes_of([k_parts]) <= set(layout.contracted)
    or not axes_of([n_parts]) <= set(layout.outputs)
    or sorted(batch_parts) != [(axis, (), layout.shape[axis]) for axis in w.leading]
  ):
    raise unserved(w, "multiplied along other axes")

  x = jnp.transpose(x, (*batch[1 - side], *free_x, *contracted[1 - side]))
  free_sizes = x.shape[len(batch[side]) : x.ndim - len(contracted[side])]
  b_order, k_order, n_order = (_sorted(run) for run in (batch_parts, k_parts, n_parts))
  num_b, num_free = len(batch_parts), len(free_sizes)
  # Now the batch, the free axes and the parts of K, each in the weight's order.
  x = x.reshape(*_sizes(batch_parts), *free_sizes, *_sizes(k_parts))
  free = range(num_b, num_b + num_free)
  x = jnp.transpose(x, (*b_order, *free, *(num_b + num_free + i for i in k_order)))
  leading = x.shape[: len(batch_parts)]
  x = x.reshape(*leading, *free_sizes, math.prod(_sizes(k_parts)))

  product = functools.partial(
    _product,
    path=w.path,
    dtype=aval(eqn.outvars[0]).dtype,
    implementation=implementation,
  )
  for _ in leading:
    product = jax.vmap(product)
  with in_precision(eqn.params["precision"]):
    y = product(w.data, x)

  # And the result's as the equation has them.
  y = y.reshape(*leading, *free_sizes, *(n_parts[i][2] for i in n_order))
  outputs = [num_b + num_free + int(i) for i in np.argsort(n_order)]
  order = [*map(int, np.argsort(b_order)), *([*outputs, *free] if side == 0 else [*free, *outputs])]
  return jnp.transpose(y, order).reshape(aval(eqn.outvars[0]).shape)


def _sizes(parts: Sequence[Part]) -> list[int]:
  return [size for *_, size in parts]


def _sorted(parts: Sequence[Part]) -> list[int]:
  """The order that sorts them."""
  return sorted(range(len(parts)), key=lambda i: parts[i])


def in_precision(precision: jax.lax.PrecisionLike) -> contextlib.AbstractContextManager:
  """In which products have the precision that was asked for; JAX's default where none was.

  Args:
    precision: a `jax.lax.Precision` or its name, one for each operand, or None.

  Raises:
    ValueError: any other.
  """
  each = precision if isinstance(precision, tuple) else (precision,)
  found = [jax.lax.Precision(one) if isinstance(one, str) else one for one in each]
  if not all(isinstance(one, jax.lax.Precision | None) for one in found):
    raise ValueError(
      f"precision {precision} of a product with a packed weight; a jax.lax.Precision is wanted"
    )
  wanted = [one for one in found if isinstance(one, jax.lax.Precision)]
  highest = max(wanted, key=lambda one: one.value, default=jax.lax.Precision.DEFAULT)
  if highest == jax.lax.Precision.DEFAULT:
    return contextlib.nullcontext()
  return jax.default_matmul_precision(highest.name.lower())


def _product(
  data: Mapping[str, Any], x: jax.Array, *, path: str, dtype: Any, implementation: str | None
) -> jax.Array:
  """x `[..., K]` times one matrix, with its adapter."""
  kernel = data["kernel"]
  if is_quantized(kernel) and jnp.dtype(dtype).itemsize > x.dtype.itemsize:
    # A wider result was asked for, and a packed product's has x's dtype.
    x = x.astype(dtype)
  return adapted_product(
    x,
    data["params"],
    data["constants"],
    projection(kernel, implementation),
    dtype=dtype,
    kernel=kernel,
    dropout_key=data.get("dropout_key"),
    implementation=implementation,
    name=tree_paths.module(path),
  )


def _look_up(eqn: core.JaxprEqn, w: Value, indices: jax.Array) -> jax.Array:
  """Rows of a table that is laid out `[D, V]`: columns there."""
  layout, axis = w.layout, lookup_axis(eqn, w)
  if (
    layout is None
    or axis is None
    or (axis,) != tuple(i for i in layout.outputs if layout.shape[i] > 1)
    or w.leading
    or axes_of(w.dims[1:]) - set(layout.contracted)
    or sorted(part for dim in w.dims[1:] for part in dim) != [p for d in w.dims[1:] for p in d]
  ):
    raise unserved(w, "looked up along other axes")
  ids = indices[..., 0]
  if ids.dtype.itemsize < 4:
    # The last row's number may be none of theirs.
    ids = ids.astype(jnp.int32)
  inside = jnp.clip(ids, 0, layout.shape[axis] - 1)
  rows = _rows(w.data["kernel"], inside.reshape(-1)).astype(w.dtype)
  rows = rows.reshape(*ids.shape, rows.shape[-1])
  if w.data["params"]:
    scaling = scaling_of(tree_paths.module(w.path), w.data["constants"])
    pair = lora.factors({**w.data["constants"], **w.data["params"]})
    assert pair is not None
    rows = rows + lora.apply_lookup(inside, pair[1].T, pair[0].T, scaling, dtype=w.dtype)
  if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
    fill = eqn.params["fill_value"]
    # Of NumPy: jax_debug_nans would object to one that is made on the device.
    fill = np.asarray(np.nan if fill is None else fill, rows.dtype)
    rows = jnp.where((ids == inside)[..., None], rows, fill)
  return rows.reshape(aval(eqn.outvars[0]).shape)


def _rows(kernel: Any, ids: jax.Array) -> jax.Array:
  """Columns of `[D, V]` as rows `[n, D]`: of a packed one, those alone are decoded."""
  if not is_quantized(kernel):
    return jnp.take(kernel, ids, axis=1).T
  if not isinstance(kernel, QuantizedTensor):
    return dequantize(kernel)[:, ids].T
  taken = dataclasses.replace(
    kernel,
    codes=kernel.codes[:, ids],
    scales=restore_scales(kernel.scales)[:, ids],
    levels=kernel.levels[ids] if kernel.column_tables else kernel.levels,
    zero=None if kernel.zero is None else kernel.zero[:, ids],
  )
  return dequantize(taken).T


def for_all(constants: Mapping[str, jax.Array], leading: tuple[int, ...]) -> dict[str, jax.Array]:
  """Constants of an adapter, of which scalings and rates are repeated for each matrix."""
  repeated = {}
  for name, value in constants.items():
    if name in ("scaling", "dropout"):
      value = value.reshape(*value.shape, *[1] * (len(leading) - value.ndim))
      value = jnp.broadcast_to(value, leading)
    repeated[name] = value
  return repeated

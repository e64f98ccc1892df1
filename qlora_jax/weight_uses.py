"""Who reads a weight, and how: followed through the jaxpr of a function that somebody else wrote.

A weight goes through transposes, reshapes, casts and indices of its stack, into scans, branches and
rematerialized parts, to products and lookups. On its way each axis of a value is known by the parts
of the weight's own axes that it is made of. `seek` notes what is contracted where; `layout_of` says
how the weight then is a stack of matrices `[..., K, N]`, or why it is none.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from qlora_jax import tree_paths

# A part of an axis of a weight: the axis, its place among the parts (a path of splits), its size.
Part = tuple[int, tuple[int, ...], int]
# What an axis of an intermediate value is made of, from major to minor; () for an axis of 1.
Dims = tuple[tuple[Part, ...], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """A weight as matrices `[..., K, N]`; the axes are those of its own shape.

  Attributes:
    shape, dtype: the weight's own.
    leading: axes of separate matrices: scanned over, indexed, or batched (experts).
    contracted: axes that K is made of.
    outputs: axes that N is made of.
    multiplied: whether a product reads it.
    looked_up: whether a lookup of rows does.
  """

  shape: tuple[int, ...]
  dtype: Any
  leading: tuple[int, ...]
  contracted: tuple[int, ...]
  outputs: tuple[int, ...]
  multiplied: bool
  looked_up: bool

  @property
  def _order(self) -> tuple[int, ...]:
    return (*self.leading, *self.contracted, *self.outputs)

  @property
  def matrices_shape(self) -> tuple[int, ...]:
    """`[..., K, N]`."""
    k, n = (math.prod(self.shape[i] for i in axes) for axes in (self.contracted, self.outputs))
    return (*(self.shape[i] for i in self.leading), k, n)

  def matrices(self, w: jax.Array) -> jax.Array:
    """The weight as `[..., K, N]`."""
    return jnp.transpose(w, self._order).reshape(self.matrices_shape)

  def weight(self, matrices: jax.Array) -> jax.Array:
    """The inverse of `matrices`."""
    w = matrices.reshape([self.shape[i] for i in self._order])
    return jnp.transpose(w, [self._order.index(i) for i in range(len(self.shape))])


@dataclasses.dataclass(frozen=True)
class Value:
  """A weight, or what transposes, reshapes and casts make of it, on its way to what reads it.

  Attributes:
    data: of the evaluation: kernel, params, constants and a dropout key; {} when uses are sought.
    path: the weight's.
    dims: what its axes are made of.
    dtype: of the dense value that it stands for.
    taken: axes of the weight that a loop or an index has consumed.
    layout: of the weight; None when uses are sought.
  """

  data: dict[str, Any]
  path: str
  dims: Dims
  dtype: Any
  taken: frozenset[int]
  layout: Layout | None

  @property
  def leading(self) -> list[int]:
    """The leading axes that `data` still has, in order."""
    assert self.layout is not None
    return [axis for axis in self.layout.leading if axis not in self.taken]


jax.tree_util.register_dataclass(
  Value, data_fields=["data"], meta_fields=["path", "dims", "dtype", "taken", "layout"]
)


def whole(shape: Sequence[int]) -> Dims:
  """The axes of a weight as it is."""
  return tuple(((axis, (), size),) for axis, size in enumerate(shape))


def _shape(dims: Dims) -> tuple[int, ...]:
  return tuple(math.prod(size for *_, size in parts) for parts in dims)


def _reshaped(dims: Dims, sizes: Sequence[int]) -> Dims | None:
  """The axes after a reshape that merges and splits them; None where it does anything else."""
  rest = [part for parts in dims for part in parts]
  result = []
  for size in sizes:
    parts = []
    while size > 1 and rest:
      axis, place, own = rest.pop(0)
      if own > size:
        if own % size:
          return None
        rest.insert(0, (axis, (*place, 1), own // size))
        place, own = (*place, 0), size
      if size % own:
        return None
      parts.append((axis, place, own))
      size //= own
    if size > 1:
      return None
    result.append(tuple(parts))
  return tuple(result) if all(part[2] == 1 for part in rest) else None


def moved(eqn: core.JaxprEqn, value: Value) -> Value | None:
  """What a transpose, reshape or cast makes of a weight; None for anything else."""
  dims, dtype = value.dims, value.dtype
  match eqn.primitive.name:
    case "convert_element_type":
      dtype = eqn.params["new_dtype"]
      if not jnp.issubdtype(dtype, jnp.floating):
        return None
    case "transpose":
      dims = tuple(dims[i] for i in eqn.params["permutation"])
    case "squeeze":
      dims = tuple(d for i, d in enumerate(dims) if i not in eqn.params["dimensions"])
    case "reshape" if eqn.params["dimensions"] is None:
      dims = _reshaped(dims, eqn.params["new_sizes"])
    case "broadcast_in_dim":
      places = dict(zip(eqn.params["broadcast_dimensions"], dims, strict=True))
      dims = tuple(places.get(i, ()) for i in range(len(eqn.params["shape"])))
      if _shape(dims) != tuple(eqn.params["shape"]):
        return None
    case "copy" | "copy_p" | "name" | "sharding_constraint":
      pass
    case _:
      return None
  return None if dims is None else dataclasses.replace(value, dims=dims, dtype=dtype)


def index_of(eqn: core.JaxprEqn, value: Value) -> tuple[int, int] | None:
  """(dim, axis of the weight) of a slice that takes one of its matrices; None for anything else."""
  if eqn.primitive.name not in ("slice", "dynamic_slice"):
    return None
  if any(stride != 1 for stride in eqn.params.get("strides") or ()):
    return None
  shape, sizes = _shape(value.dims), aval(eqn.outvars[0]).shape
  cut = [i for i, (old, new) in enumerate(zip(shape, sizes, strict=True)) if old != new]
  if len(cut) != 1 or sizes[cut[0]] != 1 or len(value.dims[cut[0]]) != 1:
    return None
  axis, place, _ = value.dims[cut[0]][0]
  return None if place else (cut[0], axis)


def lookup_axis(eqn: core.JaxprEqn, value: Value) -> int | None:
  """The axis of the weight whose rows a gather takes, each of them whole; None for any other."""
  if eqn.primitive.name != "gather":
    return None
  numbers, dims = eqn.params["dimension_numbers"], value.dims
  out = len(aval(eqn.outvars[0]).shape)
  rows = len(dims) - 1
  if (
    not dims
    or tuple(numbers.collapsed_slice_dims) != (0,)
    or tuple(numbers.start_index_map) != (0,)
    or tuple(numbers.offset_dims) != tuple(range(out - rows, out))
    or tuple(eqn.params["slice_sizes"]) != (1, *_shape(dims)[1:])
    or len(dims[0]) != 1
    or dims[0][0][1]
  ):
    return None
  return dims[0][0][0]


def aval(atom: Any) -> Any:
  """The abstract value of a variable or literal of a jaxpr."""
  return atom.aval


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """(jaxpr, its constants), closed or not."""
  return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


# Of one body, whose operands and results are the equation's.
BODIES = {
  **dict.fromkeys(("jit", "pjit", "remat2", "checkpoint"), "jaxpr"),
  **dict.fromkeys(("closed_call", "core_call"), "call_jaxpr"),
}


def scanned(eqn: core.JaxprEqn) -> tuple[int, int]:
  """How many operands of a scan are constants, and how many are carried; the rest are sliced.

  By the shapes: the parameters that say so differ between versions of JAX.
  """
  body, _ = opened(eqn.params["jaxpr"])
  sliced = [
    len(aval(out).shape) != len(aval(inner).shape)
    for out, inner in zip(eqn.invars, body.invars, strict=True)
  ]
  carried = [
    len(aval(out).shape) == len(aval(inner).shape)
    for out, inner in zip(eqn.outvars, body.outvars, strict=True)
  ]
  unsliced = sliced.index(True) if True in sliced else len(sliced)
  return unsliced - sum(carried), sum(carried)


def enter_scan(value: Value) -> Value | None:
  """A weight as the body of a scan sees it, without its first axis."""
  if len(value.dims[0]) != 1 or value.dims[0][0][1]:
    return None
  axis = value.dims[0][0][0]
  return dataclasses.replace(value, dims=value.dims[1:], taken=value.taken | {axis})


# Finding out who reads a weight.


@dataclasses.dataclass
class Uses:
  """Of one weight. `other` is why it cannot be packed."""

  leading: set[int] = dataclasses.field(default_factory=set)
  contracted: set[int] = dataclasses.field(default_factory=set)
  outputs: set[int] = dataclasses.field(default_factory=set)
  multiplied: bool = False
  looked_up: bool = False
  other: str | None = None


def axes_of(parts: Sequence[Sequence[Part]]) -> set[int]:
  """The axes of the weight that some parts belong to."""
  return {axis for dim in parts for axis, *_ in dim}


def seek(jaxpr: Any, values: Sequence[Value | None], uses: dict[str, Uses]) -> list[Any]:
  """Adds to `uses` what the jaxpr does with each weight; returns its results that are weights."""
  env = {v: value for v, value in zip(jaxpr.invars, values, strict=True) if value is not None}

  def refuse(found: Sequence[Value | None], why: str) -> None:
    for value in found:
      if value is not None:
        uses[value.path].other = uses[value.path].other or why

  def found_at(atoms) -> list[Value | None]:
    return [None if isinstance(v, core.Literal) else env.get(v) for v in atoms]

  for eqn in jaxpr.eqns:
    own = found_at(eqn.invars)
    if not any(value is not None for value in own):
      continue
    name, why = eqn.primitive.name, f"read by {eqn.primitive.name}"
    first = own[0]
    if name in BODIES:
      results = seek(opened(eqn.params[BODIES[name]])[0], own, uses)
      env |= {v: out for v, out in zip(eqn.outvars, results, strict=True) if out is not None}
    elif name == "scan":
      num_constants, num_carried = scanned(eqn)
      first_sliced = num_constants + num_carried
      refuse(own[num_constants:first_sliced], "carried by a loop")
      own[num_constants:first_sliced] = [None] * num_carried
      inner = [
        enter_scan(value) if value is not None and i >= first_sliced else value
        for i, value in enumerate(own)
      ]
      refuse([a for a, b in zip(own, inner, strict=True) if b is None], why)
      refuse(seek(opened(eqn.params["jaxpr"])[0], inner, uses), "returned by a loop")
    elif name == "while":
      counts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
      refuse(own[sum(counts) :], "carried by a loop")
      carry = [None] * (len(own) - sum(counts))
      seek(opened(eqn.params["cond_jaxpr"])[0], [*own[: counts[0]], *carry], uses)
      seek(opened(eqn.params["body_jaxpr"])[0], [*own[counts[0] : sum(counts)], *carry], uses)
    elif name == "cond":
      for branch in eqn.params["branches"]:
        refuse(seek(opened(branch)[0], own[1:], uses), "returned by a branch")
    elif name == "dot_general" and sum(value is not None for value in own) == 1:
      side = 0 if first is not None else 1
      value = own[side]
      assert value is not None
      contracted, batch = (axes[side] for axes in eqn.params["dimension_numbers"])
      use = uses[value.path]
      use.multiplied = True
      use.leading |= value.taken | axes_of([value.dims[i] for i in batch])
      use.contracted |= axes_of([value.dims[i] for i in contracted])
      use.outputs |= axes_of(
        [d for i, d in enumerate(value.dims) if i not in (*contracted, *batch)]
      )
    elif first is not None and (axis := lookup_axis(eqn, first)) is not None:
      use = uses[first.path]
      use.looked_up = True
      use.leading |= first.taken
      use.contracted |= axes_of(first.dims[1:])
      use.outputs.add(axis)
    elif first is not None and (index := index_of(eqn, first)) is not None:
      dim, axis = index
      dims = (*first.dims[:dim], (), *first.dims[dim + 1 :])
      env[eqn.outvars[0]] = dataclasses.replace(first, dims=dims, taken=first.taken | {axis})
    elif len(eqn.invars) == 1 and first is not None and (after := moved(eqn, first)) is not None:
      env[eqn.outvars[0]] = after
    else:
      refuse(own, why)
  return found_at(jaxpr.outvars)


def layout_of(path: str, shape: tuple[int, ...], dtype: Any, uses: Uses) -> Layout | str:
  """The layout that all uses agree on, or why there is none."""
  if not jnp.issubdtype(dtype, jnp.floating):
    return f"of dtype {dtype}"
  if uses.other is not None:
    return uses.other
  if not (uses.multiplied or uses.looked_up):
    return "read by no product"
  sets = uses.leading, uses.contracted, uses.outputs
  for one, other in itertools.combinations(sets, 2):
    if both := one & other:
      return f"its axis {min(both)} is contracted by one use and not by another"
  # Axes of 1 that a reshape has dropped are anyone's.
  outputs = set(range(len(shape))) - uses.leading - uses.contracted
  if any(shape[axis] > 1 for axis in outputs - uses.outputs) or not uses.contracted or not outputs:
    return "no matrix: nothing, or all of it, is contracted"
  if tree_paths.is_stacked(path) and not uses.leading:
    return "its path says a stack of layers (`layers/…`), but nothing runs over its first axis"
  return Layout(
    shape=shape,
    dtype=np.dtype(dtype),
    leading=tuple(sorted(uses.leading)),
    contracted=tuple(sorted(uses.contracted)),
    outputs=tuple(sorted(outputs)),
    multiplied=uses.multiplied,
    looked_up=uses.looked_up,
  )

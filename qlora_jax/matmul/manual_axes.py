"""In a `shard_map`: over which of the mesh's axes the operands of kernels and rules vary."""

from typing import Any

import jax


def varying(*arrays: Any) -> frozenset:
  """The manual axes that any of the arrays varies over."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def cast(x: jax.Array, axes: frozenset) -> jax.Array:
  """`x` as varying over `axes`."""
  return jax.lax.pcast(x, tuple(axes - varying(x)), to="varying")


def alike(*trees: Any) -> Any:
  """The trees with every array varying over the axes that any of them varies over.

  For a kernel, whose result varies as all of its operands do; and for a custom VJP, whose rule must
  give each operand a gradient that varies as it does: what all devices share is cast ahead of it,
  and the cast's own gradient is the sum over the devices.
  """
  axes = varying(*jax.tree.leaves(trees))
  return jax.tree.map(lambda x: cast(x, axes), trees) if axes else trees

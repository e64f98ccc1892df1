"""Kernels in a `shard_map`: over which axes of the mesh their operands and results vary."""

from typing import Any

import jax


def varying(*arrays: Any) -> frozenset:
  """The manual axes that any of the arrays varies over."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def cast(x: jax.Array, axes: frozenset) -> jax.Array:
  """`x` as varying over `axes`."""
  return jax.lax.pcast(x, tuple(axes - varying(x)), to="varying")

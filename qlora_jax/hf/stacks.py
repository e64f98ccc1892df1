"""Stacks of layers that are made once and written in place, a matrix or a part of one at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def empty(leading: tuple[int, ...], one: Any) -> Any:
  """A stack for arrays like those of the tree `one`: `[*leading, *shape]`, zeros."""
  return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), one)


def put(stack: jax.Array, value: jax.Array, index: tuple, at: tuple) -> jax.Array:
  """`stack` with `value` in its part at `index`, from the place `at` in that on."""
  value = value[(None,) * len(index)]
  return jax.lax.dynamic_update_slice(stack, value, (*index, *at))


def put_whole(stack: Any, one: Any, index: tuple) -> Any:
  """`stack` with the whole arrays of the tree `one` at `index`."""
  return jax.tree.map(lambda s, x: put(s, x, index, (0,) * x.ndim), stack, one)


# The stack's memory is overwritten.
write_whole = functools.partial(jax.jit, donate_argnums=0)(put_whole)

"""What the einsum layers of Linen and NNX share: one weight of any arrangement, as matrices.

The weight of `einsum(equation, x, w)` is kept as `[..., K, N]`, whatever the order of its axes, so
that it is quantized, adapted and merged as any kernel is; the equation says which of its axes are
which. A bias is kept as `[..., N]` likewise.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.packed_evaluation import evaluate
from qlora_jax.weight_uses import Layout, Uses, Value, layout_of, opened, seek, whole


def _traced(equation: str, shape: tuple[int, ...], x: Any) -> Any:
  w = jax.ShapeDtypeStruct(shape, x.dtype)
  return opened(jax.make_jaxpr(lambda x, w: jnp.einsum(equation, x, w))(x, w))


def layout(equation: str, shape: tuple[int, ...], path: str = "kernel") -> Layout:
  """How a weight of `shape` is kept as matrices.

  Args:
    equation: of x and the weight, such as "btd,dnh->btnh".
    shape: of the weight, as the equation has it.
    path: of the weight, for messages.

  Raises:
    ValueError: an equation for which it is no matrix.
  """
  terms = _terms(equation)[:-1]
  if len(terms) != 2 or "..." in terms[1] or len(terms[1]) != len(shape):
    raise ValueError(
      f"{path}: equation {equation!r}, weight {list(shape)}; x's term, and a letter for each axis "
      "of the weight"
    )
  sizes = dict(zip(terms[1], shape, strict=True))
  # Other axes of x may have any size.
  x = [sizes.get(letter, 2) for letter in terms[0].replace("...", "")]
  jaxpr, _ = _traced(equation, shape, jax.ShapeDtypeStruct(tuple(x), jnp.float32))
  uses = {path: Uses()}
  value = Value({}, path, whole(shape), jnp.dtype(jnp.float32), frozenset(), None)
  if seek(jaxpr, [None, value], uses) != [None]:
    raise ValueError(f"{path}: equation {equation!r}; nothing is contracted")
  found = layout_of(path, shape, jnp.float32, uses[path])
  if isinstance(found, str):
    raise ValueError(f"{path}: equation {equation!r}; {found}")
  return found


def bias_shape(own: Layout) -> tuple[int, ...]:
  """`[..., N]`."""
  *leading, _, n = own.matrices_shape
  return (*leading, n)


def product(
  equation: str,
  own: Layout,
  data: Mapping[str, Any],
  x: jax.Array,
  path: str,
  *,
  bias: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """`einsum(equation, x, w)` with w's adapter, and a bias, in x's dtype.

  Args:
    equation, own: as `layout` has them.
    data: `kernel` `[..., K, N]`, packed or plain; `params` and `constants` of its adapter; where
      there is dropout a `dropout_key` `[...]`.
    x: as the equation has it.
    path: of the layer, for messages.
    bias: `[..., N]`.
    implementation: of `quantized_matmul`.
  """
  jaxpr, constants = _traced(equation, own.shape, x)
  value = Value(dict(data), path, whole(own.shape), x.dtype, frozenset(), own)
  y = evaluate(jaxpr, constants, [x, value], implementation)[0]
  return y if bias is None else y + _in_result(equation, own, bias.astype(y.dtype), y)


def _in_result(equation: str, own: Layout, bias: jax.Array, y: jax.Array) -> jax.Array:
  """A bias `[..., N]`, with its axes where the result has them."""
  _, w, out = _terms(equation)
  axes = (*own.leading, *own.outputs)
  bias = bias.reshape([own.shape[axis] for axis in axes])
  before, dots, after = out.partition("...")
  place = {letter: i for i, letter in enumerate(before)}
  place |= {letter: y.ndim - len(after) + i for i, letter in enumerate(after)} if dots else {}
  places = [place[w[axis]] for axis in axes]
  order = sorted(range(len(axes)), key=places.__getitem__)
  return jax.lax.broadcast_in_dim(jnp.transpose(bias, order), y.shape, sorted(places))


def _terms(equation: str) -> list[str]:
  """The operands' terms and, last, the result's, as einsum has it where there is no arrow."""
  terms, arrow, out = equation.replace(" ", "").partition("->")
  if not arrow:
    letters = terms.replace(",", "").replace("...", "")
    once = "".join(sorted(c for c in letters if letters.count(c) == 1))
    out = "..." * ("..." in terms) + once
  return [*terms.split(","), out]

"""What the einsum layers of Linen and NNX share: one weight of any arrangement, as matrices.

The weight of `einsum(equation, x, w)` is kept as `[..., K, N]`, whatever the order of its axes, so
that it is quantized, adapted and merged as any kernel is; the equation says which of its axes are
which.
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
  terms = equation.replace(" ", "").partition("->")[0].split(",")
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


def product(
  equation: str, own: Layout, data: Mapping[str, Any], x: jax.Array, path: str
) -> jax.Array:
  """`einsum(equation, x, w)` with w's adapter, in x's dtype.

  Args:
    equation, own: as `layout` has them.
    data: `kernel` `[..., K, N]`, packed or plain; `params` and `constants` of its adapter; where
      there is dropout a `dropout_key` `[...]`.
    x: as the equation has it.
    path: of the layer, for messages.
  """
  jaxpr, constants = _traced(equation, own.shape, x)
  value = Value(dict(data), path, whole(own.shape), x.dtype, frozenset(), own)
  return evaluate(jaxpr, constants, [x, value])[0]

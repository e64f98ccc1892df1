"""One product with a frozen weight and its adapter, as every layer here computes it.

y = x · W + s · (x · A) · B, or what DoRA, VeRA, LoRA-XS and an adapter's bias make of it (see
`lora`), from the two trees' leaves at one layer's path.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax import lora
from qlora_jax.matmul import adapted_matmul, fuses_adapter, quantized_matmul
from qlora_jax.quantized_tensor import AnyQuantizedTensor

# What an adapter may have at its layer's path: in params, and in constants.
TRAINED = (*lora.FACTORS, "lora_bias", "magnitude")
FIXED = (*lora.FACTORS, "scaling", "dropout", "weight_norm")


def scaling_of(name: str, constants: Mapping[str, jax.Array]) -> jax.Array:
  """s of the adapter of the layer `name`.

  Raises:
    ValueError: there is none.
  """
  if "scaling" not in constants:
    raise ValueError(
      f"{name}: an adapter in params without its scaling in constants; "
      "pass the constants that lora.init returned with it"
    )
  return constants["scaling"]


def projection(
  kernel: Any, implementation: str | None = None
) -> Callable[[jax.Array, DTypeLike], jax.Array]:
  """The product with a weight, packed or plain, as `adapted_product` takes it.

  Args:
    kernel: W `[K, N]`.
    implementation: of `quantized_matmul`.
  """

  def project(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    if isinstance(kernel, AnyQuantizedTensor):
      return quantized_matmul(x, kernel, implementation=implementation).astype(dtype)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.dtype(dtype))

  return project


def adapted_product(
  x: jax.Array,
  params: Mapping[str, jax.Array],
  constants: Mapping[str, jax.Array],
  project: Callable[[jax.Array, DTypeLike], jax.Array],
  *,
  dtype: DTypeLike,
  kernel: Any = None,
  dropout_key: jax.Array | None = None,
  implementation: str | None = None,
  name: str = "",
) -> jax.Array:
  """y = x · W as an adapter changes it, if there is one, without the layer's own bias.

  Args:
    x: `[..., K]`.
    params: of TRAINED, what is there at the layer's path. Empty for no adapter.
    constants: of FIXED, likewise.
    project: the product with W, in the dtype of what it is given; and the dtype to return.
    dtype: of y, `[..., N]`.
    kernel: W; packed, it may be multiplied by with the adapter in it.
    dropout_key: of the adapter's dropout, where constants has a rate.
    implementation: of `quantized_matmul`.
    name: the layer's path, for messages.

  Raises:
    ValueError: an adapter without the constants that belong to it.
  """
  trained = [factor for factor in lora.FACTORS if factor in params]
  if not trained:
    return project(x, dtype)
  scaling = scaling_of(name, constants)
  pair = lora.factors({**constants, **params})
  if pair is None:
    raise ValueError(
      f"{name}/{trained[0]}: in params without lora_a and lora_b; pass the "
      "constants that lora.init returned with it"
    )
  a, b = pair
  dropout = constants.get("dropout")
  key = None if dropout is None else dropout_key
  has_magnitude = "magnitude" in params
  if (
    isinstance(kernel, AnyQuantizedTensor)
    and key is None
    and not has_magnitude
    and scaling.ndim == 0
    and fuses_adapter(x, kernel, a.shape[-1], implementation=implementation)
  ):
    y = adapted_matmul(x, kernel, a, b, scaling).astype(dtype)
  else:
    y = project(x, dtype)
    # DoRA multiplies the sum before it is rounded.
    wide = jnp.float32 if has_magnitude else dtype
    y = y.astype(wide) + lora.apply(x, a, b, scaling, dropout=dropout, key=key).astype(wide)
  if has_magnitude:
    scale = _dora_scale(name, params["magnitude"], constants, a, b, scaling, project)
    y = (row(scale, y) * y.astype(jnp.float32)).astype(dtype)
  if "lora_bias" in params:
    y = y + row((scaling * params["lora_bias"].astype(jnp.float32)).astype(y.dtype), y)
  return y


def row(x: jax.Array, like: jax.Array) -> jax.Array:
  """`[N]` for each row of `like`."""
  return jax.lax.broadcast_in_dim(x, like.shape, (like.ndim - 1,))


def _dora_scale(name, magnitude, constants, a, b, scaling, project) -> jax.Array:
  if "weight_norm" not in constants:
    raise ValueError(
      f"{name}: a DoRA magnitude in params without its weight_norm in constants; "
      "pass the constants that lora.init returned with it"
    )
  # In full float32 on every backend: what it is subtracted from may be nearly as large.
  with jax.default_matmul_precision("highest"):
    projected = project(jax.lax.stop_gradient(a).T.astype(jnp.float32), jnp.float32)
  return lora.dora_scale(magnitude, constants["weight_norm"], projected, a, b, scaling)

"""Flax Linen layers that read a frozen, packed base and add an adapter.

Three collections: `frozen` holds the base, `params` the adapters (all that Optax sees), and
`constants` what belongs to an adapter and never trains. A full leaf in `params` at a base
weight's path takes the weight's place: norms or a head trained in full, or a whole base
trained from scratch.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax import lora
from qlora_jax.matmul import quantized_matmul
from qlora_jax.quantized_tensor import QuantizedTensor

Initializer = Callable[..., jax.Array]


def weight(
  module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]
) -> jax.Array | QuantizedTensor:
  """The base weight `name` of `module`: from `params` where it is trained in full, else `frozen`.

  `module.init` makes it in `frozen`, float32.

  Raises:
    ValueError: it has another shape than the module's; the message names its path.
  """
  if module.has_variable("params", name):
    value = module.get_variable("params", name)
  else:
    value = module.variable(
      "frozen", name, lambda: init(module.make_rng("params"), shape, jnp.float32)
    ).value
  if tuple(value.shape) != shape:
    path = "/".join((*module.path, name))
    raise ValueError(f"{path}: shape {tuple(value.shape)}; the model's is {shape}")
  return value


def plain_weight(
  module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]
) -> jax.Array:
  """`weight`, for those that are read other than by a product: tables, biases, norms.

  Raises:
    ValueError: it is packed; the message names its path.
  """
  value = weight(module, name, init, shape)
  if isinstance(value, QuantizedTensor):
    path = "/".join((*module.path, name))
    raise ValueError(f"{path}: packed; only the kernels of products are read packed")
  return value


class QDense(nn.Module):
  """y = x · W + s · (x · A) · B (+ bias), with W packed or plain, and the adapter if there is one.

  Attributes:
    features: N.
    use_bias: whether a frozen `bias` `[N]` is added.
    dtype: x, and the products' operands, are cast to it; products accumulate in float32.
    output_dtype: of y; `dtype` where None.
    implementation: of `quantized_matmul`.
    kernel_init: for `init` alone.
  """

  features: int
  use_bias: bool = False
  dtype: DTypeLike = jnp.bfloat16
  output_dtype: DTypeLike | None = None
  implementation: str | None = None
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., K] → [..., N]`."""
    x = x.astype(self.dtype)
    output_dtype = self.dtype if self.output_dtype is None else self.output_dtype
    kernel = weight(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
    if isinstance(kernel, QuantizedTensor):
      y = quantized_matmul(x, kernel, implementation=self.implementation).astype(output_dtype)
    else:
      y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=output_dtype)
    if self.has_variable("params", "lora_a"):
      y = y + self._adapter(x).astype(output_dtype)
    if self.use_bias:
      bias = plain_weight(self, "bias", nn.initializers.zeros_init(), (self.features,))
      y = y + jax.lax.broadcast_in_dim(bias.astype(output_dtype), y.shape, (y.ndim - 1,))
    return y

  def _adapter(self, x: jax.Array) -> jax.Array:
    if not self.has_variable("constants", "scaling"):
      raise ValueError(
        f"{'/'.join(self.path)}: an adapter in params without its scaling in constants; "
        "pass the constants that lora.init returned with it"
      )
    dropout, key = None, None
    if self.has_variable("constants", "dropout") and self.has_rng("dropout"):
      dropout, key = self.get_variable("constants", "dropout"), self.make_rng("dropout")
    return lora.apply(
      x,
      self.get_variable("params", "lora_a"),
      self.get_variable("params", "lora_b"),
      self.get_variable("constants", "scaling"),
      dropout=dropout,
      key=key,
    )

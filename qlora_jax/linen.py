"""Flax Linen layers that read a frozen, packed base and add an adapter.

Three collections: `frozen` holds the base, `params` the adapters (all that Optax sees), and
`constants` what belongs to an adapter and never trains. A full leaf in `params` at a base
weight's path takes the weight's place: norms or a head trained in full, or a whole base
trained from scratch.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax import lora
from qlora_jax.matmul import adapted_matmul, fuses_adapter, manual_axes, quantized_matmul
from qlora_jax.quantized_tensor import AnyQuantizedTensor

Initializer = Callable[..., jax.Array]


def weight(
  module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]
) -> jax.Array | AnyQuantizedTensor:
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
  if isinstance(value, AnyQuantizedTensor):
    path = "/".join((*module.path, name))
    raise ValueError(f"{path}: packed; only the kernels of products are read packed")
  return value


def _matmul(dtype: DTypeLike, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`[..., K] · [K, N]`, both of one dtype, to `[..., N]` of `dtype`.

  The gradient of a float32 result is rounded to x's dtype before it is multiplied, as if the result
  had that dtype: JAX would make the kernel float32 instead, twice its size, for a product at less
  than half the speed.
  """
  return _rounding_gradient(dtype, *manual_axes.alike(x, kernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounding_gradient(dtype, x, kernel):
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _matmul_forward(dtype, x, kernel):
  return _rounding_gradient(dtype, x, kernel), (x, kernel)


def _matmul_backward(dtype, residuals, g):
  del dtype
  x, kernel = residuals
  g = g.astype(x.dtype)
  rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
  return jnp.matmul(g, kernel.T), jnp.matmul(rows[0].T, rows[1])


_rounding_gradient.defvjp(_matmul_forward, _matmul_backward)


class QDense(nn.Module):
  """y = x · W + s · (x · A) · B (+ bias), with W packed or plain, and the adapter if there is one.

  The adapter is what `params` has at this path: `lora_a` and `lora_b`, a `lora_bias`, a DoRA
  `magnitude`; or what VeRA or LoRA-XS train, with `lora_a` and `lora_b` in `constants` (see
  `lora`).

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

    def project(x: jax.Array, dtype: DTypeLike) -> jax.Array:
      if isinstance(kernel, AnyQuantizedTensor):
        return quantized_matmul(x, kernel, implementation=self.implementation).astype(dtype)
      return _matmul(dtype, x, kernel.astype(x.dtype))

    y = _with_adapter(self, x, output_dtype, project, kernel)
    if self.use_bias:
      bias = plain_weight(self, "bias", nn.initializers.zeros_init(), (self.features,))
      y = y + _row(bias.astype(output_dtype), y)
    return y


class TiedHead(nn.Module):
  """Logits x · tableᵀ of a head that has no weight of its own, and its adapter if there is one.

  The adapter is the head's alone, as QDense has it: the lookup in the table does not see it. A
  full `kernel` `[D, V]` in `params` takes the table's place.

  Attributes:
    dtype: of the products' operands; logits are float32.
  """

  dtype: DTypeLike = jnp.bfloat16

  @nn.compact
  def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
    """`[..., D]`, and the table `[V, D]` without its own adapter, to `[..., V]`."""
    x = x.astype(self.dtype)
    kernel = table.T
    if self.has_variable("params", "kernel"):
      kernel = plain_weight(self, "kernel", nn.initializers.zeros_init(), kernel.shape)

    def project(x: jax.Array, dtype: DTypeLike) -> jax.Array:
      return _matmul(dtype, x, kernel.astype(x.dtype))

    return _with_adapter(self, x, jnp.float32, project)


class Embed(nn.Module):
  """The token table `[V, D]`, looked up: scale · (table[ids] + s · A[ids] · B).

  Attributes:
    vocab_size: V.
    features: D.
    dtype: of the result.
    scale: None for 1; rounded to `dtype` first, as Gemma's files are meant.
  """

  vocab_size: int
  features: int
  dtype: DTypeLike = jnp.bfloat16
  scale: float | None = None

  def setup(self):
    shape = (self.vocab_size, self.features)
    # Without the adapter: what a tied head multiplies by.
    self.embedding = plain_weight(self, "embedding", nn.initializers.normal(0.02), shape)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """`[...]` ids to `[..., D]`."""
    y = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
    if self.has_variable("params", "lora_a"):
      a = self.get_variable("params", "lora_a")
      if a.shape[0] != self.vocab_size:
        # A lookup has no shape that would fail.
        raise ValueError(
          f"{'/'.join((*self.path, 'lora_a'))}: {a.shape[0]} rows; the model's vocabulary has "
          f"{self.vocab_size}"
        )
      b, scaling = self.get_variable("params", "lora_b"), _scaling(self)
      y = y + lora.apply_lookup(tokens, a, b, scaling, dtype=self.dtype)
    return y if self.scale is None else y * jnp.asarray(self.scale, self.dtype)


def _scaling(module: nn.Module) -> jax.Array:
  if not module.has_variable("constants", "scaling"):
    raise ValueError(
      f"{'/'.join(module.path)}: an adapter in params without its scaling in constants; "
      "pass the constants that lora.init returned with it"
    )
  return module.get_variable("constants", "scaling")


def _with_adapter(
  module: nn.Module,
  x: jax.Array,
  dtype: DTypeLike,
  project: Callable[[jax.Array, DTypeLike], jax.Array],
  kernel: Any = None,
) -> jax.Array:
  """y = x · W as the adapter of `module` changes it, if it has one, without the layer's bias.

  Args:
    module: whose params hold the adapter.
    x: `[..., K]`.
    dtype: of y, `[..., N]`.
    project: the product with W, in the dtype of what it is given; and the dtype to return.
    kernel: W; packed, it may be multiplied by with the adapter in it.
  """
  trained = [name for name in lora.FACTORS if module.has_variable("params", name)]
  if not trained:
    return project(x, dtype)
  scaling = _scaling(module)
  fixed = [name for name in lora.FACTORS if module.has_variable("constants", name)]
  pair = lora.factors(
    {name: module.get_variable("constants", name) for name in fixed}
    | {name: module.get_variable("params", name) for name in trained}
  )
  if pair is None:
    raise ValueError(
      f"{'/'.join((*module.path, trained[0]))}: in params without lora_a and lora_b; pass the "
      "constants that lora.init returned with it"
    )
  a, b = pair
  dropout, key = None, None
  if module.has_variable("constants", "dropout") and module.has_rng("dropout"):
    dropout, key = module.get_variable("constants", "dropout"), module.make_rng("dropout")
  has_magnitude = module.has_variable("params", "magnitude")
  implementation = getattr(module, "implementation", None)
  if (
    isinstance(kernel, AnyQuantizedTensor)
    and key is None
    and not has_magnitude
    and fuses_adapter(x, kernel, a.shape[-1], implementation=implementation)
  ):
    y = adapted_matmul(x, kernel, a, b, scaling).astype(dtype)
  else:
    y = project(x, dtype)
    # DoRA multiplies the sum before it is rounded.
    wide = jnp.float32 if has_magnitude else dtype
    y = y.astype(wide) + lora.apply(x, a, b, scaling, dropout=dropout, key=key).astype(wide)
  if has_magnitude:
    scale = _dora_scale(module, a, b, scaling, project)
    y = (_row(scale, y) * y.astype(jnp.float32)).astype(dtype)
  if module.has_variable("params", "lora_bias"):
    bias = module.get_variable("params", "lora_bias").astype(jnp.float32)
    y = y + _row((scaling * bias).astype(y.dtype), y)
  return y


def _row(x: jax.Array, like: jax.Array) -> jax.Array:
  """`[N]` for each row of `like`."""
  return jax.lax.broadcast_in_dim(x, like.shape, (like.ndim - 1,))


def _dora_scale(
  module: nn.Module,
  a: jax.Array,
  b: jax.Array,
  scaling: jax.Array,
  project: Callable[[jax.Array, DTypeLike], jax.Array],
) -> jax.Array:
  path = "/".join(module.path)
  if not module.has_variable("constants", "weight_norm"):
    raise ValueError(
      f"{path}: a DoRA magnitude in params without its weight_norm in constants; "
      "pass the constants that lora.init returned with it"
    )
  if module.has_variable("params", "kernel"):
    raise ValueError(f"{path}: a DoRA magnitude on a weight trained in full; its norm is not kept")
  # In full float32 on every backend: what it is subtracted from may be nearly as large.
  with jax.default_matmul_precision("highest"):
    projected = project(jax.lax.stop_gradient(a).T.astype(jnp.float32), jnp.float32)
  return lora.dora_scale(
    module.get_variable("params", "magnitude"),
    module.get_variable("constants", "weight_norm"),
    projected,
    a,
    b,
    scaling,
  )

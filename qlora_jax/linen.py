"""Flax Linen layers that read a frozen, packed base and add an adapter.

Three collections: `frozen` holds the base, `params` the adapters (all that Optax sees), and
`constants` what belongs to an adapter and never trains. A full leaf in `params` at a base
weight's path takes the weight's place: norms or a head trained in full, or a whole base
trained from scratch.

`adapt` does the same for any other Linen module, without touching it (see `importing`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike

from qlora_jax import einsum_layer, importing, lora
from qlora_jax.adapted_product import FIXED, TRAINED, adapted_product, row, scaling_of
from qlora_jax.matmul import manual_axes, quantized_matmul, sharded, stacked
from qlora_jax.packed_evaluation import for_all
from qlora_jax.quantization import Treatment, dequantize
from qlora_jax.quantized_tensor import AnyQuantizedTensor, QuantizedTensor, is_quantized
from qlora_jax.row_lookup import take_rows

Initializer = Callable[..., jax.Array]

# Collections that `lend_stacks` makes of `frozen`, for a scan that takes the first whole and the
# second along axis 0: what all layers are sliced from, and a layer's own number.
STACKED, NUMBER = "stacks", "layer_number"


def weight(
  module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]
) -> jax.Array | AnyQuantizedTensor:
  """The base weight `name` of `module`: from `params` where it is trained in full, else `frozen`.

  `module.init` makes it in `frozen`, float32.

  Raises:
    ValueError: it has another shape than the module's; the message names its path.
  """
  value: Any
  if module.has_variable("params", name):
    value = module.get_variable("params", name)
  else:
    value = module.variable(
      "frozen", name, lambda: init(module.make_rng("params"), shape, jnp.float32)
    ).value
    if module.has_variable(STACKED, name):
      lent: Any = module.get_variable(STACKED, name)
      # Clamped, though it is within: a bare slice of the numbers would be a copy of its own on a
      # GPU, by another stream, where this joins what else is computed.
      index = jnp.minimum(module.get_variable(NUMBER, name), len(lent.codes) - 1)
      value = dataclasses.replace(value, stack=dataclasses.replace(lent, index=index))
  if tuple(value.shape) != shape:
    path = "/".join((*module.path, name))
    raise ValueError(f"{path}: shape {tuple(value.shape)}; the model's is {shape}")
  return value


def lend_stacks(layers: Any) -> Any:
  """`nn.scan` over layers, each of which remembers the stacks that it is of: `matmul.stacked`."""
  if not stacked.remembers():
    return layers

  def lent(variables):
    frozen = traverse_util.flatten_dict(variables.get("frozen", {}))
    packed = {path: w for path, w in frozen.items() if isinstance(w, QuantizedTensor)}
    stacks = {path: stacked.of(w, None) for path, w in packed.items()}
    numbers = {path: jnp.arange(len(w.codes), dtype=jnp.int32) for path, w in packed.items()}
    found = {STACKED: stacks, NUMBER: numbers}
    return variables | {name: traverse_util.unflatten_dict(tree) for name, tree in found.items()}

  return nn.map_variables(layers, ("frozen", STACKED, NUMBER), lent)


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
    partition: under a mesh, how W is cut (`matmul.sharded`); None, and what that does not serve,
      is left to XLA.
    kernel_init: for `init` alone.
  """

  features: int
  use_bias: bool = False
  dtype: DTypeLike = jnp.bfloat16
  output_dtype: DTypeLike | None = None
  implementation: str | None = None
  partition: sharded.Partition | None = None
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., K] → [..., N]`."""
    x = x.astype(self.dtype)
    output_dtype = self.dtype if self.output_dtype is None else self.output_dtype
    kernel: Any = weight(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
    partition = self.partition

    def shared_out(x: jax.Array) -> bool:
      return partition is not None and sharded.unsupported(x, kernel, partition) is None

    def project(x: jax.Array, dtype: DTypeLike) -> jax.Array:
      if partition is not None and shared_out(x):
        y = sharded.sharded_matmul(x, kernel, partition, implementation=self.implementation)
        return y.astype(dtype)
      if isinstance(kernel, AnyQuantizedTensor):
        return quantized_matmul(x, kernel, implementation=self.implementation).astype(dtype)
      return _matmul(dtype, x, kernel.astype(x.dtype))

    # Over a mesh the adapter's products are XLA's to share out.
    fusible = None if shared_out(x) else kernel
    y = _with_adapter(self, x, output_dtype, project, fusible)
    if self.use_bias:
      bias = plain_weight(self, "bias", nn.initializers.zeros_init(), (self.features,))
      y = y + row(bias.astype(output_dtype), y)
    return y


class QEinsum(nn.Module):
  """y = einsum(equation, x, W) (+ bias), and the adapter's s · A · B in W if there is one.

  Its `kernel` is `[..., K, N]`, packed or plain, whatever the order of the axes in the equation
  (see `einsum_layer`): what is contracted makes K, batches lead, and the rest is N.

  Attributes:
    equation: x's term first, such as "btd,dnh->btnh".
    shape: of W, as the equation has it.
    use_bias: whether a frozen `bias` `[..., N]` is added.
    dtype: x, the products' operands, and y.
    implementation: of `quantized_matmul`.
    kernel_init: for `init` alone.
  """

  equation: str
  shape: tuple[int, ...]
  use_bias: bool = False
  dtype: DTypeLike = jnp.bfloat16
  implementation: str | None = None
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x and y as the equation has them."""
    path = "/".join(self.path)
    layout = einsum_layer.layout(self.equation, self.shape, path)
    kernel = weight(self, "kernel", self.kernel_init, layout.matrices_shape)
    params, constants, key = _adapter(self)
    leading = layout.matrices_shape[:-2]
    data = {"kernel": kernel, "params": params, "constants": for_all(constants, leading)}
    if key is not None:
      data["dropout_key"] = jax.random.split(key, leading)
    bias = None
    if self.use_bias:
      shape = einsum_layer.bias_shape(layout)
      bias = plain_weight(self, "bias", nn.initializers.zeros_init(), shape)
    return einsum_layer.product(
      self.equation,
      layout,
      data,
      x.astype(self.dtype),
      path,
      bias=bias,
      implementation=self.implementation,
    )


class TiedHead(nn.Module):
  """Logits x · tableᵀ of a head that has no weight of its own, and its adapter if there is one.

  The adapter is the head's alone, as QDense has it: the lookup in the table does not see it. A
  full `kernel` `[D, V]` in `params` takes the table's place. What `trainable_tokens` add to rows of
  the table is added here too.

  Attributes:
    dtype: of the products' operands; logits are float32.
  """

  dtype: DTypeLike = jnp.bfloat16

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    table: jax.Array | AnyQuantizedTensor,
    tokens: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    """`[..., D]`, and the table `[V, D]` without its own adapter, to `[..., V]`.

    Args:
      table: where it is packed, it is dequantized as a whole, and there while logits are made.
      tokens: `Embed.tokens` of that table.
    """
    x = x.astype(self.dtype)
    # Packed along V, which is N here: no product reads it so.
    kernel = (dequantize(table, self.dtype) if is_quantized(table) else table).T  # pyright: ignore
    if self.has_variable("params", "kernel"):
      kernel = plain_weight(self, "kernel", nn.initializers.zeros_init(), kernel.shape)

    def project(x: jax.Array, dtype: DTypeLike) -> jax.Array:
      return _matmul(dtype, x, kernel.astype(x.dtype))

    y = _with_adapter(self, x, jnp.float32, project)
    return y if tokens is None else lora.add_token_logits(y, x, *tokens)


class Embed(nn.Module):
  """The token table `[V, D]`, looked up: scale · (table[ids] + s · A[ids] · B).

  It may be packed, along V; a lookup reads its rows alone.

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
    self.embedding = weight(self, "embedding", nn.initializers.normal(0.02), shape)
    # Ids and what is added to their rows, where some tokens are trained alone.
    self.tokens = _tokens(self)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """`[...]` ids to `[..., D]`."""
    table = self.embedding
    if is_quantized(table):
      y = take_rows(table, tokens, self.dtype)  # pyright: ignore[reportArgumentType]
    else:
      y = jnp.take(table, tokens, axis=0)  # pyright: ignore[reportArgumentType]
    if self.tokens is not None:
      y = y.astype(jnp.float32) + lora.token_rows(tokens, *self.tokens)
    y = y.astype(self.dtype)
    if self.has_variable("params", "lora_a"):
      a = self.get_variable("params", "lora_a")
      if a.shape[0] != self.vocab_size:
        # A lookup has no shape that would fail.
        raise ValueError(
          f"{'/'.join((*self.path, 'lora_a'))}: {a.shape[0]} rows; the model's vocabulary has "
          f"{self.vocab_size}"
        )
      b, fixed = self.get_variable("params", "lora_b"), self.variables.get("constants", {})
      scaling = scaling_of("/".join(self.path), fixed)
      y = y + lora.apply_lookup(tokens, a, b, scaling, dtype=self.dtype)
    return y if self.scale is None else y * jnp.asarray(self.scale, self.dtype)


def _with_adapter(
  module: nn.Module,
  x: jax.Array,
  dtype: DTypeLike,
  project: Callable[[jax.Array, DTypeLike], jax.Array],
  kernel: Any = None,
) -> jax.Array:
  """`adapted_product` with what `module` has in its collections."""
  params, constants, key = _adapter(module)
  y = adapted_product(
    x,
    params,
    constants,
    project,
    dtype=dtype,
    kernel=kernel,
    dropout_key=key,
    implementation=getattr(module, "implementation", None),
    name="/".join(module.path),
  )
  tokens = _tokens(module)
  return y if tokens is None else lora.add_token_logits(y, x, *tokens)


def _tokens(module: nn.Module) -> tuple[jax.Array, jax.Array] | None:
  """`token_ids` and `token_delta` of `module`, if it has them (see `lora`)."""
  if not module.has_variable("params", "token_delta"):
    return None
  if not module.has_variable("constants", "token_ids"):
    raise ValueError(
      f"{'/'.join(module.path)}/token_delta: in params without its token_ids in constants; pass "
      "the constants that lora.init returned with it"
    )
  return module.get_variable("constants", "token_ids"), module.get_variable("params", "token_delta")


def _adapter(
  module: nn.Module,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array | None]:
  """The leaves of its adapter in params and constants, and a key for its dropout if it has one."""
  params = {
    name: module.get_variable("params", name)
    for name in TRAINED
    if module.has_variable("params", name)
  }
  constants = {
    name: module.get_variable("constants", name)
    for name in FIXED
    if module.has_variable("constants", name)
  }
  path = "/".join(module.path)
  if "magnitude" in params and module.has_variable("params", "kernel"):
    raise ValueError(f"{path}: a DoRA magnitude on a weight trained in full; its norm is not kept")
  has_key = bool(params) and "dropout" in constants and module.has_rng("dropout")
  return params, constants, module.make_rng("dropout") if has_key else None


# Somebody else's module.

_TREES = ("frozen", "params", "constants")


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
  """A Linen module that reads its params packed, with adapters. Holds no arrays.

  Attributes:
    module: as it was given.
    function: `importing.Adapted`, of the module's params; it has `layouts`, `left_alone`, `tied`.
    boxes: the tree of the module's params, with what `nn.with_partitioning` put around them.
  """

  module: nn.Module
  function: importing.Adapted
  boxes: Any

  @property
  def left_alone(self) -> Mapping[str, str]:
    """Path → why, of the matrices that are as they were."""
    return self.function.left_alone

  def report(self, frozen: Any) -> str:
    """What became of each weight; see `importing.Adapted.report`."""
    return self.function.report(frozen)

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    dropout_key: jax.Array | None = None,
    **kwargs: Any,
  ) -> Any:
    """What `module.apply` returns, of the weights that the three trees stand for.

    Args:
      variables: those three, and the module's other collections, such as `batch_stats`.
      args, kwargs: of `module.apply`: `rngs`, `method` and `mutable` too.
      dropout_key: of the adapters' dropout; where None it is drawn from `rngs["dropout"]`, if that
        is given.

    Raises:
      ValueError: see `importing.Adapted.apply`.
    """
    trees = {name: tree for name, tree in variables.items() if name in _TREES}
    others = {name: tree for name, tree in variables.items() if name not in _TREES}
    rngs = kwargs.get("rngs")
    if dropout_key is None and isinstance(rngs, Mapping) and "dropout" in rngs:
      # Not what any module of its own would draw from it.
      dropout_key = lora.path_key(rngs["dropout"], "qlora_jax/adapters")
    return self.function.apply(trees, others, *args, dropout_key=dropout_key, **kwargs)

  def merge(self, variables: Mapping[str, Any]) -> Any:
    """The module's own params with the adapters added in: its structure, boxes, shapes, dtypes."""
    return jax.tree.map(
      lambda box, w: box.replace_boxed(w) if _is_box(box) else w,
      self.boxes,
      self.function.merge(variables),
      is_leaf=_is_box,
    )


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.meta.AxisMetadata)


def adapt(
  module: nn.Module,
  variables: Mapping[str, Any],
  *args: Any,
  quantize: Mapping[str, Treatment] | None = None,
  adapters: lora.LoRAConfig | None = None,
  key: jax.Array | None = None,
  **kwargs: Any,
) -> tuple[AdaptedModule, Any, dict, dict]:
  """Packs the params of any Linen module, and makes adapters for them.

  Whatever multiplies by a param or looks rows up in it is found by tracing `module.apply`: Dense,
  DenseGeneral, Einsum, Embed, attention, and products that the module writes out itself, in
  `nn.scan`, `nn.vmap` and `nn.remat`, in shared submodules too. Convolutions are left as they are,
  and so are recurrent cells, whose products are read anew in every step.

  Args:
    module, variables: with its `params`, dense.
    args, kwargs: of one `module.apply`, arrays or shapes; see `importing.adapt`.
    quantize: path pattern → treatment; paths are those of `variables["params"]`.
    adapters: which weights get one.
    key: for the adapters' start.

  Returns:
    (adapted, frozen, params, constants). `adapted.apply({"frozen": …, "params": …, "constants": …,
    **others}, *args)` is `module.apply`; an optimizer sees `params` alone.

  Raises:
    ValueError: see `importing.adapt`.

  Warns:
    UserWarning: a rule packs a table that is also the head, and so changes both.

  >>> adapted, frozen, params, constants = linen.adapt(
  ...   module, variables, tokens, quantize={"*/kernel": QuantizationConfig()},
  ...   adapters=LoRAConfig(targets=("*/kernel",)), key=key)
  """
  if "params" not in variables:
    raise ValueError(
      f"variables: {', '.join(map(str, variables)) or 'none'}; `params` is not among them: give "
      "what module.init returns, or {'params': …}"
    )
  boxed, others = variables["params"], {k: v for k, v in variables.items() if k != "params"}
  if taken := [name for name in _TREES if name in others]:
    raise ValueError(f"{taken[0]}: a collection of the module's own; adapt keeps its trees there")
  weights = nn.meta.unbox(boxed)

  def function(weights: Any, others: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    return module.apply({**others, "params": weights}, *args, **kwargs)

  cells = set()

  def note(call, args, kwargs, context):
    if isinstance(context.module, nn.RNNCellBase):
      cells.add("/".join(context.module.path))
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    own, frozen, params, constants = importing.pack(
      function,
      weights,
      (others, *args),
      kwargs,
      quantize=quantize,
      adapters=adapters,
      key=key,
      exclude=lambda path: (
        "of a recurrent cell"
        if isinstance(module, nn.RNNCellBase) or any(path.startswith(f"{cell}/") for cell in cells)
        else None
      ),
    )
  importing.warn_of_tied(own, frozen)
  boxes = jax.tree.map(
    lambda box: box.replace_boxed(False) if _is_box(box) else False, boxed, is_leaf=_is_box
  )
  return AdaptedModule(module, own, boxes), frozen, params, constants

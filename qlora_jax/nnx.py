"""Flax NNX: somebody else's module over packed weights, and drop-in layers for new ones.

Types of variables tell the trees apart: `Frozen` holds the base (no `nnx.Param` filter catches it),
`nnx.LoRAParam` all that is trained, `Constant` what belongs to an adapter and never trains. So
`nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` and `nnx.DiffState(0, nnx.LoRAParam)` see the adapters
alone.

`adapt` takes any module apart and runs it as it is (see `importing`); `QLinear` and `QEinsum` are
layers of our own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes
from jax.typing import DTypeLike

from qlora_jax import einsum_layer, importing, lora, tree_paths
from qlora_jax.adapted_product import adapted_product, projection, row
from qlora_jax.lora import LoRAConfig
from qlora_jax.packed_evaluation import for_all, in_precision
from qlora_jax.quantization import QuantizationConfig, Treatment, quantize_tree
from qlora_jax.quantized_tensor import is_quantized

Initializer = Callable[..., jax.Array]

_INIT = nnx.initializers.lecun_normal()


class Frozen(nnx.Variable):
  """A weight of the base: an array or a QuantizedTensor. Never trained."""


class Constant(nnx.Variable):
  """What belongs to an adapter and never trains: its scaling, rank, dropout rate."""


def _variables(tree: Any, kind: Callable[[Any], nnx.Variable]) -> Any:
  """A tree of dicts with a variable for each leaf."""
  if isinstance(tree, Mapping):
    return {str(name): _variables(each, kind) for name, each in tree.items()}
  return kind(tree)


def _values(tree: Any) -> Any:
  """The inverse of `_variables`."""
  if isinstance(tree, nnx.Variable):
    return tree.get_value()
  return {name: _values(each) for name, each in tree.items()}


class Adapted(nnx.Module):
  """Any NNX module, over packed weights and with adapters; made by `adapt`.

  `__call__` is the module's, traced anew in each call: put an `nnx.jit` around a step. `eval()`,
  `train()` and the like reach the module.

  Attributes:
    module: as it was given, with a Frozen variable, packed or not, in the place of each Param. Its
      other variables (batch statistics, caches, random streams) are what a call reads and writes.
    adapters: LoRAParams. Weights that are trained in full are among them.
    constants: Constants.
    rngs: of the adapters' dropout, or None. Its `dropout` stream is drawn from in each call but
      after `eval()`.
    function: `importing.Adapted`, of the module's Params; it has `layouts`, `left_alone`, `tied`.
  """

  def __init__(
    self,
    function: importing.Adapted,
    module: nnx.Module,
    frozen: Any,
    params: Any,
    constants: Any,
    rngs: nnx.Rngs | None = None,
  ):
    self.function = nnx.static(function)
    graph, weights, others = nnx.split(nnx.clone(module), nnx.Param, ...)
    nnx.replace_by_pure_dict(weights, frozen)
    weights = jax.tree.map(lambda each: Frozen(each.get_value()), weights, is_leaf=_is_variable)
    self.module: Any = nnx.merge(graph, weights, others)
    self.adapters = nnx.data(_variables(params, nnx.LoRAParam))
    self.constants = nnx.data(_variables(constants, Constant))
    self.rngs = nnx.data(rngs)
    self.deterministic = False

  def __call__(
    self,
    *args: Any,
    method: str = "__call__",
    dropout_key: jax.Array | None = None,
    **kwargs: Any,
  ) -> Any:
    """What the module returns; what it writes into its own variables is kept.

    Args:
      args, kwargs: of the module's method. Arrays are traced; all else is as it is.
      method: of the module.
      dropout_key: of the adapters' dropout; where None it is drawn from `rngs`, if there are any.
        The module's own has its streams.

    Raises:
      ValueError: see `importing.Adapted.apply`.
    """
    graph, _, others = nnx.split(self.module, Frozen, ...)
    if dropout_key is None and self.rngs is not None and not self.deterministic:
      dropout_key = self.rngs.dropout()
    out, changed = self.function.apply(
      self._trees(), graph, others, method, *args, dropout_key=dropout_key, **kwargs
    )
    nnx.update(self.module, changed)
    return out

  def merge(self, into: nnx.Module) -> None:
    """Writes the weights with their adapters added in, in their own dtypes, into other Params.

    Args:
      into: a module like that which was adapted.

    Raises:
      ValueError: its Params have other paths or shapes; the message names one.
    """
    state = nnx.state(into, nnx.Param)
    own = {path: w.shape for path, w in self.function.specs.items()}
    theirs = {path: w.shape for path, w in tree_paths.leaves(nnx.to_pure_dict(state)).items()}
    for path in sorted(own.keys() | theirs.keys()):
      if own.get(path) != theirs.get(path):
        raise ValueError(
          f"into: {path}: shape {theirs.get(path)}; the adapted module's is {own.get(path)}"
        )
    nnx.replace_by_pure_dict(state, self.function.merge(self._trees()))
    nnx.update(into, state)

  def report(self) -> str:
    """What became of each weight; see `importing.Adapted.report`."""
    return self.function.report(self._trees()["frozen"])

  def _trees(self) -> dict[str, Any]:
    return {
      "frozen": nnx.to_pure_dict(nnx.state(self.module, Frozen)),
      "params": _values(self.adapters),
      "constants": _values(self.constants),
    }


def _is_variable(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def adapt(
  model: nnx.Module,
  *args: Any,
  quantize: Mapping[str, Treatment] | None = None,
  adapters: LoRAConfig | None = None,
  key: jax.Array | None = None,
  rngs: nnx.Rngs | None = None,
  method: str = "__call__",
  **kwargs: Any,
) -> Adapted:
  """Packs the Params of any NNX module, and makes adapters for them; the module is left as it is.

  Args:
    model: with its Params, dense.
    args, kwargs: of one call, arrays or shapes; see `importing.adapt`.
    quantize: path pattern → treatment; paths are those of `nnx.state(model, nnx.Param)`.
    adapters: which weights get one.
    key: for the adapters' start.
    rngs: of the adapters' dropout: the `dropout` stream, of which the result keeps a copy. Without
      it there is dropout in calls with a `dropout_key` alone.
    method: that is called.

  Returns:
    A module that is called as `model` is. Recurrent cells and convolutions are left as they are.

  Raises:
    ValueError: a call that makes variables; see also `importing.adapt`.

  Warns:
    UserWarning: a rule packs a table that is also the head, and so changes both.

  >>> model = nnx.adapt(model, tokens, quantize={"*/kernel": QuantizationConfig()},
  ...                   adapters=LoRAConfig(targets=("*/kernel",)), key=key)
  >>> optimizer = flax.nnx.Optimizer(model, tx, wrt=flax.nnx.LoRAParam)
  """
  graph, weights, others = nnx.split(model, nnx.Param, ...)
  shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weights)

  def function(
    weights: Any, graph: Any, others: Any, method: str, *args: Any, **kwargs: Any
  ) -> Any:
    own = jax.tree.map(lambda leaf: leaf, shapes)
    nnx.replace_by_pure_dict(own, weights)
    again = nnx.merge(graph, own, others)
    out = getattr(again, method)(*args, **kwargs)
    _, _, after = nnx.split(again, nnx.Param, ...)
    before, now = (set(dict(nnx.to_flat_state(state))) for state in (others, after))
    if before != now:
      path = "/".join(map(str, min(before ^ now, key=str)))
      raise ValueError(f"{path}: a variable that a call makes or drops; make it before adapting")
    return out, after

  cells = [
    "/".join(map(str, path))
    for path, node in nnx.iter_graph(model)
    if isinstance(node, nnx.RNNCellBase)
  ]
  own, frozen, params, constants = importing.pack(
    function,
    nnx.to_pure_dict(weights),
    (graph, others, method, *args),
    kwargs,
    quantize=quantize,
    adapters=adapters,
    key=key,
    exclude=lambda path: (
      # The model itself may be a cell: its path is empty.
      "of a recurrent cell"
      if any(not cell or path.startswith(f"{cell}/") for cell in cells)
      else None
    ),
  )
  importing.warn_of_tied(own, frozen)
  # A stream that two modules shared would be split from the one by the other's call.
  return Adapted(own, model, frozen, params, constants, None if rngs is None else nnx.clone(rngs))


# Layers of our own.


class _Product(nnx.Module):
  """One frozen kernel and its adapter, for the layers below."""

  def _own(
    self,
    kernel: jax.Array,
    quantization: QuantizationConfig | None,
    adapter: LoRAConfig | None,
    rngs: nnx.Rngs,
  ) -> None:
    if quantization is not None:
      kernel = quantize_tree({"w": kernel}, {"w": quantization})["w"]
    params, constants = {}, {}
    if adapter is not None:
      # The patterns are for trees; here is one weight.
      own = dataclasses.replace(
        adapter, targets=("w",), rank_pattern={}, alpha_pattern={}, modules_to_save=()
      )
      params, constants = (
        tree["w"] for tree in lora.init(rngs.params(), {"w": {"kernel": kernel}}, own)
      )
    self.kernel = Frozen(kernel)
    self.adapter = nnx.data(_variables(params, nnx.LoRAParam))
    self.constants = nnx.data(_variables(constants, Constant))


class QLinear(_Product):
  """y = x · W + s · (x · A) · B (+ bias), with W packed or plain; takes `nnx.Linear`'s place.

  Attributes:
    kernel: W `[K, N]`, Frozen. bias: `[N]`, Frozen, or None.
    adapter: LoRAParams by name, `lora_a` `[K, r]` and `lora_b` `[r, N]` of plain LoRA.
    constants: the adapter's Constants.
    dtype: x, the products' operands, and y; None for what JAX promotes those of x and of W, as
      it was drawn or given to `of`, to.
    precision, preferred_element_type: as `nnx.Linear` has them; the second is y's dtype.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    dtype: DTypeLike | None = jnp.bfloat16,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    quantization: QuantizationConfig | None = None,
    adapter: LoRAConfig | None = None,
    implementation: str | None = None,
    kernel_init: Initializer = _INIT,
    rngs: nnx.Rngs,
  ):
    """Makes a layer of random weights.

    Args:
      in_features, out_features: K and N.
      use_bias: whether a frozen bias is added.
      dtype, precision, preferred_element_type: see the attributes.
      quantization: how W is packed; None for not at all.
      adapter: of which the rank, alpha, variant and dropout count; None for none.
      implementation: of `quantized_matmul`.
      kernel_init: of W, float32.
      rngs: its `params` stream is drawn from.
    """
    kernel = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
    self._own(kernel, quantization, adapter, rngs)
    self.bias = nnx.data(Frozen(jnp.zeros(out_features, jnp.float32)) if use_bias else None)
    self.dtype, self.implementation = dtype, implementation
    self.param_dtype = jnp.dtype(kernel.dtype)
    self.precision = precision
    self.preferred_element_type = preferred_element_type

  @classmethod
  def of(
    cls,
    linear: nnx.Linear,
    *,
    quantization: QuantizationConfig | None = None,
    adapter: LoRAConfig | None = None,
    implementation: str | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> "QLinear":
    """A layer with the weights of an `nnx.Linear`, to be put in its place.

    Raises:
      ValueError: an adapter without rngs for its start; a product or a promotion of dtypes that the
        layer was given by its author.
    """
    if adapter is not None and rngs is None:
      raise ValueError("adapter: given without rngs for its start")
    usual = {"dot_general": jax.lax.dot_general, "promote_dtype": flax_dtypes.promote_dtype}
    for name, function in usual.items():
      if (own := getattr(linear, name)) is not function:
        raise ValueError(f"{name}: {own} of the layer; QLinear has its own product")
    kernel = linear.kernel.get_value()
    self = cls(
      *kernel.shape,
      use_bias=False,
      dtype=linear.dtype,
      precision=linear.precision,
      preferred_element_type=linear.preferred_element_type,
      quantization=quantization,
      adapter=adapter,
      implementation=implementation,
      kernel_init=lambda *_: kernel,
      rngs=rngs or nnx.Rngs(0),
    )
    if linear.bias is not None:
      self.bias = nnx.data(Frozen(linear.bias.get_value()))
    return self

  def __call__(self, x: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
    """`[..., K] → [..., N]`."""
    dtype = self.dtype
    if dtype is None:
      dtype = jnp.promote_types(x.dtype, self.param_dtype)
    wanted = self.preferred_element_type
    out = jnp.dtype(dtype if wanted is None else wanted)
    x = x.astype(dtype)
    kernel = self.kernel.get_value()
    if is_quantized(kernel) and out.itemsize > x.dtype.itemsize:
      # A packed product's result has x's dtype.
      x = x.astype(out)
    with in_precision(self.precision):
      y = adapted_product(
        x,
        _values(self.adapter),
        _values(self.constants),
        projection(kernel, self.implementation),
        dtype=out,
        kernel=kernel,
        dropout_key=dropout_key,
        implementation=self.implementation,
        name="QLinear",
      )
    return y if self.bias is None else y + row(self.bias.get_value().astype(y.dtype), y)


class QEinsum(_Product):
  """y = einsum(equation, x, W) (+ bias), and the adapter's s · A · B in W if there is one.

  Attributes:
    kernel: W as `[..., K, N]`, Frozen, whatever the order of the axes in the equation (see
      `einsum_layer`).
    bias: `[..., N]`, Frozen, or None.
    adapter, constants: as QLinear's.
  """

  def __init__(
    self,
    equation: str,
    shape: tuple[int, ...],
    *,
    use_bias: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    quantization: QuantizationConfig | None = None,
    adapter: LoRAConfig | None = None,
    implementation: str | None = None,
    kernel_init: Initializer = _INIT,
    rngs: nnx.Rngs,
  ):
    """Makes a layer of random weights.

    Args:
      equation: x's term first, such as "btd,dnh->btnh".
      shape: of W, as the equation has it.
      use_bias, quantization, adapter, implementation, kernel_init, rngs: as QLinear's.
      dtype: x, the products' operands, and y.
    """
    self.equation = equation
    self.layout = nnx.static(einsum_layer.layout(equation, tuple(shape)))
    kernel = kernel_init(rngs.params(), self.layout.matrices_shape, jnp.float32)
    self._own(kernel, quantization, adapter, rngs)
    shape = einsum_layer.bias_shape(self.layout)
    self.bias = nnx.data(Frozen(jnp.zeros(shape, jnp.float32)) if use_bias else None)
    self.dtype, self.implementation = dtype, implementation

  def __call__(self, x: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
    """x and y as the equation has them."""
    leading = self.layout.matrices_shape[:-2]
    data = {
      "kernel": self.kernel.get_value(),
      "params": _values(self.adapter),
      "constants": for_all(_values(self.constants), leading),
    }
    if dropout_key is not None and "dropout" in data["constants"]:
      data["dropout_key"] = jax.random.split(dropout_key, leading)
    return einsum_layer.product(
      self.equation,
      self.layout,
      data,
      x.astype(self.dtype),
      "QEinsum",
      bias=None if self.bias is None else self.bias.get_value(),
      implementation=self.implementation,
    )

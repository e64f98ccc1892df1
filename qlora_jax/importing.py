"""Quantizing and adapting a function of weights that somebody else wrote.

`adapt(function, weights, *args)` asks for nothing but `function(weights, *args)`: a module's apply,
a model taken apart, plain code. It is traced to a jaxpr, where every weight can be followed through
transposes, reshapes and casts, into scans, branches and rematerialized parts, to what reads it: a
product, or a lookup of rows. Which axes are contracted there says how the weight is laid out as
matrices `[..., K, N]`, so that it can be packed and have an adapter. Running it evaluates the same
jaxpr with the packed weights in place of the dense ones: a `dot_general` that reads one becomes a
`quantized_matmul` with the adapter beside it. No dense weight is made, nothing global is touched,
and the code stays its author's. What reads a weight in any other way (a convolution, a
concatenation of gates) leaves it as it is, and is listed.

The trees are those of the rest of the library. `frozen` has the function's own tree, with a
QuantizedTensor `[..., K, N]` for each packed leaf; `params` and `constants` are the adapters, at
the weights' paths. Below a key `layers` a stack that the function scans over is spoken of by
virtual paths, as `tree_paths` has it; any other stack is one weight, whose layers share a rank.

Experts under a `vmap` over an input of their own are matrices, with an adapter each; over one that
all share, XLA has one product of all their columns, and so has this, with one adapter.

A table that is looked up is laid out `[D, V]`, whether or not it is also the head: its blocks run
along D, and both the lookup and the product read them. Its adapter changes the table, and so
both (this library's own models tell the two apart); a rule that packs a tied table warns of it.

Weights that are sharded over a mesh of automatic axes are packed as they lie: the codes are cut as
the weight is, and XLA shares the products out. How `merge` cuts its results is XLA's choice too, or
`out_shardings` of a `jax.jit` around it.
Explicit axes are refused: a product's result has no place there without its author's word.

No adapter goes into PEFT's format from here. PEFT finds a weight by the name and the layout that a
torch module has for it, which are not to be read off a Flax tree; `hf.save_adapter` knows them for
the families in `models`. The trees are plain arrays, for Orbax or any other writer; or `merge`,
and use the exporter of the code that the weights are for.

Not taken: `nn.intercept_methods`, with packed weights in the module's own collection, as Linen has
it and NNX does not. It sees calls of Flax's own layers; the weights of gemma, Tunix and Equinox are
in einsum modules of their own, which read a param and call `jnp.einsum` on it.
"""

import dataclasses
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import lora, lora_init, tree_paths
from qlora_jax.adapted_product import FIXED, TRAINED
from qlora_jax.lora import LoRAConfig
from qlora_jax.packed_evaluation import evaluate, for_all, unserved
from qlora_jax.quantization import QuantizationConfig, Treatment, quantize_tree, treatments
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.weight_uses import Layout, Uses, Value, layout_of, opened, seek, whole


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A function of weights that reads them packed, with adapters. Holds no arrays.

  Attributes:
    function: `function(weights, *args, **kwargs)`, as it was given.
    layouts: path → Layout, of the weights that can be packed.
    left_alone: path → why, of the matrices that are as they were.
    specs: path → shape and dtype, of all weights.
    structure: of the tree of weights.
    implementation: of `quantized_matmul`, for all products with packed weights; another one by
      `dataclasses.replace`.
  """

  function: Callable[..., Any]
  layouts: Mapping[str, Layout]
  left_alone: Mapping[str, str]
  specs: Mapping[str, jax.ShapeDtypeStruct]
  structure: Any
  implementation: str | None = None

  @property
  def tied(self) -> tuple[str, ...]:
    """Tables that are looked up and multiplied by: rules and adapters change both."""
    return tuple(path for path, each in self.layouts.items() if each.looked_up and each.multiplied)

  def report(self, frozen: Any) -> str:
    """What became of each weight, a line each; of a tied table, what that means."""
    lines = []
    for path, leaf in tree_paths.leaves(frozen, is_leaf=is_quantized).items():
      if is_quantized(leaf):
        what = f"packed as {list(leaf.shape)}, {leaf.bits_per_param:.3f} bits a weight"
      elif path in self.left_alone:
        what = f"{leaf.dtype} as it was: {self.left_alone[path]}"
      else:
        what = f"{leaf.dtype}"
      if path in self.tied:
        what += "; tied: the lookup and the head read this one table, and an adapter changes both"
      lines.append(f"{path} {list(self.specs[path].shape)}: {what}")
    return "\n".join(lines)

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    dropout_key: jax.Array | None = None,
    **kwargs: Any,
  ) -> Any:
    """What `function` returns, of the weights that the three trees stand for.

    It is traced anew in each call: put a `jax.jit` around a step.

    Args:
      variables: `frozen`, `params` and `constants`; the last two may be missing.
      args, kwargs: of `function`. Arrays are traced; all else is as it is.
      dropout_key: of the adapters' dropout; without one there is none.

    Raises:
      ValueError: a leaf that fits no weight, or a use of a packed weight that the arguments given
        to `adapt` did not show.
    """
    flat = self._leaves(variables)
    full = tree_paths.leaves(variables.get("params", {}))
    fixed = tree_paths.leaves(variables.get("constants", {}))
    used, operands = set(), []
    for path, spec in self.specs.items():
      leaf, layer = flat[path], lora.module(path)
      if path in full:
        # It takes the weight's place.
        used.add(path)
        leaf = full[path]
      params = {name: full[f"{layer}/{name}"] for name in TRAINED if f"{layer}/{name}" in full}
      used.update(f"{layer}/{name}" for name in params)
      if not params and not is_quantized(leaf):
        if tuple(leaf.shape) != spec.shape:
          raise ValueError(f"{path}: shape {list(leaf.shape)}; the weight's is {list(spec.shape)}")
        operands.append(jnp.asarray(leaf, spec.dtype))
        continue
      layout = self.layouts[path]
      if is_quantized(leaf):
        if leaf.shape != layout.matrices_shape:
          raise ValueError(
            f"{path}: packed as {list(leaf.shape)}; its matrices are {list(layout.matrices_shape)}"
          )
      else:
        leaf = layout.matrices(leaf)
      leading = layout.matrices_shape[:-2]
      constants = {name: fixed[f"{layer}/{name}"] for name in FIXED if f"{layer}/{name}" in fixed}
      data = {"kernel": leaf, "params": params, "constants": for_all(constants, leading)}
      if dropout_key is not None and "dropout" in constants:
        data["dropout_key"] = jax.random.split(lora.path_key(dropout_key, path), leading)
      operands.append(Value(data, path, whole(spec.shape), spec.dtype, frozenset(), layout))
    for path in full:
      if path not in used:
        raise ValueError(f"params: {path}: fits no weight of the function")
    layers = {lora.module(path) for path in self.specs}
    for path in fixed:
      if path.rpartition("/")[0] not in layers:
        raise ValueError(f"constants: {path}: fits no weight of the function")
    jaxpr, constants, dynamic, tree = _trace(self, args, kwargs)
    results = evaluate(jaxpr, constants, [*operands, *dynamic], self.implementation)
    for value in results:
      if isinstance(value, Value):
        raise unserved(value, "returned")
    return jax.tree.unflatten(tree(), results)

  def merge(self, variables: Mapping[str, Any]) -> Any:
    """The function's own tree of weights, with the adapters added in: its shapes and dtypes.

    Computed in float32, rounded once.

    Args:
      variables: as `apply` reads them.
    """
    flat = self._leaves(variables)
    full = tree_paths.leaves(variables.get("params", {}))
    whole = {path: full.pop(path) for path in self.specs if path in full}
    matrices = {
      path: flat[path] if is_quantized(flat[path]) else layout.matrices(flat[path])
      for path, layout in self.layouts.items()
      if path not in whole
    }
    merged = lora.merge(matrices, full, variables.get("constants", {}), tied=False)
    leaves = []
    for path, spec in self.specs.items():
      leaf = self.layouts[path].weight(merged[path]) if path in merged else flat[path]
      leaves.append(jnp.asarray(whole.get(path, leaf), spec.dtype))
    return jax.tree.unflatten(self.structure, leaves)

  def _leaves(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Of `frozen`, by path."""
    if "frozen" not in variables:
      raise ValueError(f"variables: {', '.join(variables) or 'none'}; `frozen` is not among them")
    flat = tree_paths.leaves(variables["frozen"], is_leaf=is_quantized)
    if flat.keys() != self.specs.keys():
      odd = sorted(flat.keys() ^ self.specs.keys())
      raise ValueError(f"frozen: {odd[0]}: not in both this tree and the function's own")
    return flat


def _trace(adapted: Adapted, args: Any, kwargs: Any) -> Any:
  """(jaxpr, its constants, its operands after the weights, the results' structure when called)."""
  leaves, structure = jax.tree.flatten((args, kwargs))
  # Python's numbers and flags steer the function; only arrays are traced.
  traced = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
  is_traced = [isinstance(leaf, traced) for leaf in leaves]
  results = []

  def flat(weights, dynamic):
    dynamic = iter(dynamic)
    own = [next(dynamic) if d else leaf for d, leaf in zip(is_traced, leaves, strict=True)]
    args, kwargs = jax.tree.unflatten(structure, own)
    out = adapted.function(jax.tree.unflatten(adapted.structure, weights), *args, **kwargs)
    out, tree = jax.tree.flatten(out)
    results.append(tree)
    return out

  dynamic = [leaf for d, leaf in zip(is_traced, leaves, strict=True) if d]
  jaxpr, constants = opened(jax.make_jaxpr(flat)(list(adapted.specs.values()), dynamic))
  return jaxpr, constants, dynamic, lambda: results[-1]


def adapt(
  function: Callable[..., Any],
  weights: Any,
  *args: Any,
  quantize: Mapping[str, Treatment] | None = None,
  adapters: LoRAConfig | None = None,
  key: jax.Array | None = None,
  **kwargs: Any,
) -> tuple[Adapted, Any, dict, dict]:
  """Packs the weights of somebody else's function, and makes adapters for them.

  Args:
    function: `function(weights, *args, **kwargs)`, of arrays; any pytrees.
    weights: its weights, dense.
    args, kwargs: of one call, arrays or `jax.ShapeDtypeStruct`s; the function is traced with them,
      not run. They show how each weight is read: of several methods, adapt the one that reads
      all of them.
    quantize: path pattern → treatment, as in `quantize_tree`. Matrices that cannot be packed stay
      as they are, and `left_alone` says why.
    adapters: which weights get one, by the same paths. Tables that are only looked up, or tied
      to the head, are meant by their own name alone, no wildcard takes them in.
    key: for the adapters' start.

  Returns:
    (adapted, frozen, params, constants). `adapted.apply({"frozen": …, "params": …, "constants": …},
    *args)` is the function; `frozen` has the tree of `weights`; `params` is what an optimizer sees.

  Raises:
    ValueError: a pattern that matches no weight, with near paths, or none that can be packed or
      adapted, with the reasons; a weight on explicit axes of a mesh; see also `quantize_tree` and
      `lora.init`.

  Warns:
    UserWarning: a rule packs a table that is also the head, and so changes both.

  >>> adapted, frozen, params, constants = adapt(
  ...   f, weights, x, quantize={"*/w": QuantizationConfig()}, adapters=cfg, key=key)
  """
  found = pack(function, weights, args, kwargs, quantize=quantize, adapters=adapters, key=key)
  warn_of_tied(*found[:2])
  return found


def warn_of_tied(adapted: Adapted, frozen: Any) -> None:
  """Warns the caller's caller of each tied table that is packed."""
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  for path in adapted.tied:
    if is_quantized(flat[path]):
      warnings.warn(
        f"quantize: {path}: tied: the lookup and the head read this one table, so packing it "
        "rounds both the embeddings and the logits' weights, and an adapter on it changes both; "
        "patterns that leave it out keep it as it is",
        UserWarning,
        stacklevel=3,
      )


def pack(
  function: Callable[..., Any],
  weights: Any,
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
  *,
  quantize: Mapping[str, Treatment] | None,
  adapters: LoRAConfig | None,
  key: jax.Array | None,
  exclude: Callable[[str], str | None] | None = None,
) -> tuple[Adapted, Any, dict, dict]:
  """`adapt`, for the modules that have one of their own; it does not warn.

  Args:
    exclude: path → why a weight is to be left alone, or None; asked after the function was traced.
  """
  if not isinstance(quantize, Mapping | None):
    raise ValueError(
      f"quantize: {quantize}; path pattern → treatment is wanted, such as "
      "{'*/kernel': QuantizationConfig()}"
    )
  rules = dict(quantize or {})
  flat = tree_paths.leaves(weights)
  for path, w in flat.items():
    _refuse_explicit(path, w)
  specs = {path: jax.ShapeDtypeStruct(jnp.shape(w), jnp.result_type(w)) for path, w in flat.items()}
  bare = Adapted(function, {}, {}, specs, jax.tree.structure(weights))
  jaxpr, _, dynamic, _ = _trace(bare, args, kwargs)
  uses = {path: Uses() for path in flat}
  values = [
    Value({}, path, whole(spec.shape), spec.dtype, frozenset(), None)
    for path, spec in specs.items()
  ]
  for value in seek(jaxpr, [*values, *[None] * len(dynamic)], uses):
    if value is not None:
      uses[value.path].other = "returned"
  found = {
    path: layout_of(path, spec.shape, spec.dtype, uses[path]) for path, spec in specs.items()
  }
  if exclude is not None:
    found |= {path: why for path in found if (why := exclude(path)) is not None}
  layouts = {path: each for path, each in found.items() if isinstance(each, Layout)}
  refused = {path: each for path, each in found.items() if isinstance(each, str)}

  tree = {path: layouts[path].matrices(w) if path in layouts else w for path, w in flat.items()}
  packing = [pattern for pattern, treatment in rules.items() if _packs(treatment)]
  _check("quantize", packing, layouts, refused, tree, _is_meant)
  chosen = treatments(tree, rules)
  for pattern in rules:
    if not any(_is_meant(pattern, path, leaf) for path, leaf in tree.items()):
      raise ValueError(f"quantize: {tree_paths.no_match(pattern, flat)}")
  left_alone = {
    path: refused.get(path, "no rule for it")
    for path, spec in specs.items()
    if len(spec.shape) >= 2 and not (path in layouts and _packs(chosen[path]))
  }
  adapted = dataclasses.replace(bare, layouts=layouts, left_alone=left_alone)

  base = {path: _treated(path, leaf, chosen[path], layouts) for path, leaf in tree.items()}
  params, constants = {}, {}
  if adapters is not None:
    if key is None:
      raise ValueError("adapt: adapters without a key for their start")
    if adapters.trainable_tokens:
      raise ValueError(
        "adapt: trainable_tokens; only this package's models read them: modules_to_save trains the "
        "whole table"
      )
    candidates = _candidates(adapters, adapted, refused, tree)
    if adapters.changes_base:
      changed, params, constants = lora_init.initialize(
        key,
        {path: leaf for path, leaf in candidates.items() if path in layouts},
        {p: t for p, t in rules.items() if any(_is_meant(p, q, tree[q]) for q in candidates)},
        adapters,
      )
      base |= tree_paths.leaves(changed, is_leaf=is_quantized)
    else:
      params, constants = lora.init(key, {path: base[path] for path in candidates}, adapters)
    _refuse_own_adapters(flat, constants)
    params = _in_own_shape(params, layouts)
  leaves = [
    layouts[path].weight(leaf) if path in layouts and not is_quantized(leaf) else leaf
    for path, leaf in base.items()
  ]
  return adapted, jax.tree.unflatten(adapted.structure, leaves), params, constants


def _refuse_own_adapters(weights: Mapping[str, Any], constants: Any) -> None:
  """Raises where a leaf of an adapter would have the path of a weight that the function has."""
  fixed = tree_paths.leaves(constants)
  for path in weights:
    layer, _, name = path.rpartition("/")
    if name in TRAINED and (f"{layer}/scaling" if layer else "scaling") in fixed:
      raise ValueError(
        f"{path}: a weight of the function's own, at the path of an adapter's; leave {layer!r} out "
        "of targets, or merge its own adapter first"
      )


def _refuse_explicit(path: str, w: Any) -> None:
  sharding = jax.typeof(w).sharding
  for axis in jax.tree.leaves(tuple(sharding.spec)):
    # What is cut along automatic axes has no such axis in its type.
    raise ValueError(
      f"{path}: cut along {axis!r}, an explicit axis of its mesh; make the mesh with "
      "axis_types=(jax.sharding.AxisType.Auto, …), under which XLA shares the products out"
    )


def _packs(treatment: Treatment) -> bool:
  return isinstance(treatment, QuantizationConfig)


def _is_meant(pattern: str, path: str, leaf: Any) -> bool:
  return any(tree_paths.matches(pattern, layer) for layer in tree_paths.layers(path, leaf))


def _is_target(pattern: str, path: str, leaf: Any) -> bool:
  """As `_is_meant`; a table goes by its layer's name too."""
  return _is_meant(pattern, path, leaf) or tree_paths.matches(pattern, lora.module(path))


def _check(
  field: str,
  patterns: Sequence[str],
  able: Container[str],
  refused: Mapping[str, str],
  tree: Mapping[str, Any],
  matches: Callable[[str, str, Any], bool],
) -> None:
  """Raises where a pattern matches nothing, or nothing of `able`."""
  for pattern in patterns:
    hit = [path for path, leaf in tree.items() if matches(pattern, path, leaf)]
    if not hit:
      raise ValueError(f"{field}: {tree_paths.no_match(pattern, tree)}")
    if not any(path in able for path in hit):
      reasons = ", ".join(f"{path} ({refused.get(path, 'a table')})" for path in hit[:3])
      raise ValueError(f"{field}: pattern {pattern!r} matches none that this can be: {reasons}")


def _treated(path: str, leaf: Any, treatment: Treatment, layouts: Mapping[str, Layout]) -> Any:
  """A leaf, laid out as matrices where it can be, as a rule wants it."""
  if treatment is None or (_packs(treatment) and path not in layouts):
    return leaf
  return quantize_tree({path: leaf}, {"*": treatment})[path]


def _candidates(
  cfg: LoRAConfig, adapted: Adapted, refused: Mapping[str, str], tree: Mapping[str, Any]
) -> dict[str, Any]:
  """The leaves that `lora.init` may see: what patterns must not take in is not there."""
  if cfg.lora_bias:
    raise ValueError(
      "lora.lora_bias: True; the biases of a function of others' are weights of its own "
      "(modules_to_save trains them)"
    )
  named = {
    path
    for path, layout in adapted.layouts.items()
    if not layout.looked_up or {path, lora.module(path)} & set(cfg.targets)
  }
  for path in named:
    if adapted.layouts[path].looked_up and cfg.variant != "lora":
      raise ValueError(f"lora.variant: {cfg.variant!r}; {path}, a lookup, takes plain LoRA only")
  _check("lora.targets", cfg.targets, named, refused, tree, _is_target)

  def is_saved(path: str, leaf: Any) -> bool:
    above = [layer.rpartition("/")[0] for layer in tree_paths.layers(path, leaf)]
    return any(
      _is_meant(pattern, path, leaf) or any(tree_paths.matches(pattern, each) for each in above)
      for pattern in cfg.modules_to_save
    )

  return {
    path: leaf
    for path, leaf in tree.items()
    if path in named or is_saved(path, leaf) or not tree_paths.is_matrix(path, leaf)
  }


def _in_own_shape(params: Any, layouts: Mapping[str, Layout]) -> dict:
  """The adapters' tree with weights that are trained in full in their own shape."""
  flat = tree_paths.leaves(params)
  return tree_paths.nest(
    {path: layouts[path].weight(leaf) if path in layouts else leaf for path, leaf in flat.items()}
  )

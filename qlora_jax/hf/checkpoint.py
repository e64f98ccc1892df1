"""Checkpoints as Hugging Face keeps them: config.json and safetensors.

A checkpoint is read one tensor at a time: a matrix is quantized on the device as it arrives and
written into its place in the stack of layers, which is updated in place. So neither the host nor
the device holds more than the packed model and one tensor.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from qlora_jax import lora, tree_paths
from qlora_jax.hf.files import new_directory, read_json, write_json
from qlora_jax.models import families
from qlora_jax.models.transformer import RematPolicy, Transformer, TransformerConfig
from qlora_jax.quantization import (
  QuantizationConfig,
  Treatment,
  quantize,
  quantize_tree,
  treatments,
)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# Buffers that old checkpoints carry, which follow from config.json.
_IGNORED_ENDINGS = (".rotary_emb.inv_freq",)


def load(
  path: str | os.PathLike[str],
  quantization: QuantizationConfig | Mapping[str, Treatment] | None = None,
  *,
  dtype: DTypeLike | None = None,
  storage_dtype: DTypeLike | None = None,
  remat: RematPolicy = "none",
  implementation: str | None = None,
) -> tuple[Transformer, dict[str, Any]]:
  """Reads a model, quantizing its weights as they come.

  Args:
    path: a directory with config.json and safetensors.
    quantization: of every linear layer of the decoder's blocks; or rules for `quantize_tree`;
      or None. Embeddings, norms and the head stay in 16 bits unless a rule says otherwise.
    dtype: of the computation; None takes the checkpoint's own.
    storage_dtype: of the weights that are not quantized; None keeps the file's.
    remat, implementation: see `Transformer`.

  Returns:
    (model, frozen): `model.apply({"params": {}, "constants": {}, "frozen": frozen}, tokens)`.

  Raises:
    FileNotFoundError: the directory, or a file in it, is missing; says what was looked for.
    ValueError: an unsupported config; a tensor that is missing, unexpected, of another shape or
      not finite; a file that is cut short. One line with the file and the tensor.
  """
  directory = _directory(path)
  raw = read_json(directory / "config.json")
  if "quantization_config" in raw:
    method = raw["quantization_config"].get("quant_method")
    raise ValueError(
      f"{directory}: quantized already ({method}); give the 16-bit checkpoint it was made from"
    )
  config = _read_config(directory, raw)
  if dtype is None:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
  model = Transformer(config, jnp.dtype(dtype), remat, implementation)

  shapes = _shapes(model)
  rules = default_rules(quantization)
  quantize_tree_abstract(shapes, rules)
  chosen = treatments(shapes, rules)
  with _Tensors(directory) as tensors:
    frozen = {}
    for leaf, like in tree_paths.leaves(shapes).items():
      name = families.family(config.model_type).names[leaf]
      treatment = chosen[leaf] or storage_dtype
      frozen[leaf] = _read_leaf(tensors, leaf, name, like.shape, treatment)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    tensors.check_all_read(ignored=tied)
  return model, tree_paths.nest(frozen)


def default_rules(
  quantization: QuantizationConfig | Mapping[str, Treatment] | None,
) -> Mapping[str, Treatment]:
  """The rules that `load` quantizes by: its argument as a mapping of patterns."""
  if quantization is None:
    return {}
  if isinstance(quantization, QuantizationConfig):
    return {"layers/*/attn/*": quantization, "layers/*/mlp/*": quantization}
  return quantization


def read_config(path: str | os.PathLike[str]) -> TransformerConfig:
  """The architecture of the checkpoint at `path`.

  Raises:
    FileNotFoundError, ValueError: as `load`.
  """
  directory = _directory(path)
  return _read_config(directory, read_json(directory / "config.json"))


def _read_config(directory: Path, raw: Mapping[str, Any]) -> TransformerConfig:
  try:
    return families.read_config(raw)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{directory}: {error}") from None


def _directory(path: str | os.PathLike[str]) -> Path:
  directory = Path(path).absolute()
  if not directory.is_dir():
    raise FileNotFoundError(
      f"{directory}: no such directory; a model is a directory with config.json and "
      f"{_SINGLE} (or {_INDEX})"
    )
  if not (directory / "config.json").exists():
    raise FileNotFoundError(f"{directory}: not a model: config.json was looked for")
  return directory


def _shapes(model: Transformer) -> Any:
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["frozen"]


def abstract_base(
  model: Transformer, rules: Mapping[str, Treatment], storage_dtype: DTypeLike
) -> Any:
  """The shapes of the base that `load` would make, with nothing read or allocated."""
  shapes = jax.tree.map(
    lambda like: jax.ShapeDtypeStruct(like.shape, jnp.dtype(storage_dtype)), _shapes(model)
  )
  return quantize_tree_abstract(shapes, rules)


def quantize_tree_abstract(shapes: Any, rules: Mapping[str, Treatment]) -> Any:
  """`quantize_tree` of shapes: the shapes of the result, or its errors, before anything is read."""
  return jax.eval_shape(functools.partial(quantize_tree, rules=rules), shapes)


class _Tensors:
  """The tensors of a checkpoint by name, whichever file they lie in."""

  def __init__(self, directory: Path):
    self._directory = directory
    self._open: dict[Path, Any] = {}
    index = directory / _INDEX
    if (directory / _SINGLE).exists():
      single = directory / _SINGLE
      self._files = dict.fromkeys(self._handle(single).keys(), single)
    elif index.exists():
      weight_map = read_json(index).get("weight_map")
      if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: has no weight_map; it says which file holds which tensor")
      self._files = {name: directory / file for name, file in weight_map.items()}
    else:
      pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
      reason = (
        f"only {pickled[0].name}, which is pickled and could run code; convert it to safetensors"
        if pickled
        else f"{_SINGLE} and {_INDEX} were looked for"
      )
      raise FileNotFoundError(f"{directory}: no weights: {reason}")
    # Some files leave the prefix off.
    self._prefix = "" if any(name.startswith("model.") for name in self._files) else "model."
    self._read: set[str] = set()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._open.clear()

  def _handle(self, file: Path) -> Any:
    if file not in self._open:
      if not file.exists():
        raise FileNotFoundError(f"{file}: missing; {_INDEX} names it")
      try:
        self._open[file] = safetensors.safe_open(file, framework="numpy")
      except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    return self._open[file]

  def where(self, name: str) -> str:
    """File and tensor, for a message."""
    stored = name.removeprefix(self._prefix)
    return f"{self._files.get(stored, self._directory)}: {stored}"

  def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `name`, of that shape."""
    stored = name.removeprefix(self._prefix)
    if stored not in self._files:
      raise ValueError(f"{self.where(name)}: missing tensor; the config asks for it")
    handle = self._handle(self._files[stored])
    try:
      found = tuple(handle.get_slice(stored).get_shape())
      if found != shape:
        raise ValueError(
          f"{self.where(name)}: shape {list(found)}; the config asks for {list(shape)}"
        )
      value = handle.get_tensor(stored)
    except safetensors.SafetensorError as error:
      raise ValueError(f"{self.where(name)}: cannot be read ({error})") from None
    self._read.add(stored)
    return value

  def check_all_read(self, ignored: set[str]) -> None:
    for stored in sorted(set(self._files) - self._read):
      if stored not in ignored and not stored.endswith(_IGNORED_ENDINGS):
        raise ValueError(
          f"{self._files[stored]}: {stored}: unexpected tensor; the config has no place for it"
        )


def _read_leaf(
  tensors: _Tensors, leaf: str, name: str, shape: tuple[int, ...], treatment: Treatment
) -> Any:
  kernel = leaf.endswith("/kernel")

  def read(name: str, shape: tuple[int, ...]) -> Any:
    stored = shape[::-1] if kernel else shape
    w = jnp.asarray(tensors.get(name, stored))
    try:
      return _treat(w, treatment, kernel)
    except (ValueError, TypeError) as error:
      raise ValueError(f"{tensors.where(name)}: {error}") from None

  if not tree_paths.is_stacked(leaf):
    return read(name, shape)
  layers, *shape_of_one = shape
  stack = None
  for layer in range(layers):
    one = read(name.format(layer=layer), tuple(shape_of_one))
    if stack is None:
      stack = jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), one)
    stack = _write(stack, one, layer)
  return stack


def _treat(w: jax.Array, treatment: Treatment, kernel: bool) -> Any:
  if not jnp.issubdtype(w.dtype, jnp.floating):
    raise TypeError(f"dtype {w.dtype}; a weight is of a float dtype")
  if kernel:
    w = w.T
  if isinstance(treatment, QuantizationConfig) and w.ndim >= 2:
    return quantize(w, **dataclasses.asdict(treatment))
  if not bool(jnp.isfinite(w).all()):
    index = np.argwhere(~np.isfinite(np.asarray(w, np.float32)))[0]
    raise ValueError(f"the value at index {index.tolist()} is not finite")
  dtype = w.dtype if treatment is None or isinstance(treatment, QuantizationConfig) else treatment
  return w.astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: Any, one: Any, layer: int) -> Any:
  def write(stack, one):
    return jax.lax.dynamic_update_index_in_dim(stack, one, layer, 0)

  return jax.tree.map(write, stack, one)


def save(
  path: str | os.PathLike[str],
  model: Transformer,
  frozen: Any,
  *,
  dtype: DTypeLike = jnp.float32,
) -> None:
  """Writes a dense base as a Hugging Face directory, whole or not at all.

  Args:
    path: must not exist.
    model: whose config is written.
    frozen: plain arrays, as `lora.merge` returns them.
    dtype: of the file.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: a leaf that has no name in the family's files.
  """
  names = families.family(model.config.model_type).names
  tensors = {}
  for leaf, w in tree_paths.leaves(frozen).items():
    if leaf not in names:
      raise ValueError(f"{leaf}: {model.config.model_type} files have no name for it")
    layers = range(w.shape[0]) if tree_paths.is_stacked(leaf) else (None,)
    for layer in layers:
      one = w if layer is None else w[layer]
      one = np.asarray(one.astype(dtype))
      if leaf.endswith("/kernel"):
        one = np.ascontiguousarray(one.T)
      tensors[names[leaf].format(layer=layer)] = one
  with new_directory(path) as temporary:
    write_json(temporary / "config.json", families.hf_config(model.config, jnp.dtype(dtype).name))
    safetensors.numpy.save_file(tensors, temporary / _SINGLE, metadata={"format": "pt"})


def save_merged(
  path: str | os.PathLike[str],
  model: Transformer,
  frozen: Any,
  params: Any,
  constants: Any,
  *,
  dtype: DTypeLike = jnp.float32,
) -> None:
  """Writes the base with its adapters merged in, dense, rounded once to `dtype`.

  Args:
    path: must not exist.
    model, frozen, params, constants: as `model.apply` takes them.
    dtype: of the file.

  Raises:
    FileExistsError, ValueError: see `save` and `lora.merge`.
  """
  save(path, model, lora.merge(frozen, params, constants), dtype=dtype)

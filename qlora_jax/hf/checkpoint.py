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
from qlora_jax.quantized_tensor import is_quantized

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

_DTYPES = ("bfloat16", "float16", "float32")

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
  if quantized := raw.get("quantization_config"):
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    raise ValueError(
      f"{directory}: quantized already ({method}); give the 16-bit checkpoint it was made from"
    )
  config = _read_config(directory, raw)
  if dtype is None:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    # Some files spell it as torch prints it.
    dtype = str(dtype).removeprefix("torch.")
    compute = _float_dtype(f"{directory}: config.json: dtype", dtype)
  else:
    compute = _float_dtype("dtype", dtype)
  if storage_dtype is not None:
    storage_dtype = _float_dtype("storage_dtype", storage_dtype)
  model = Transformer(config, compute, remat, implementation)

  shapes = _shapes(model)
  rules = default_rules(quantization)
  quantize_tree_abstract(shapes, rules)
  chosen = treatments(shapes, rules)
  names = families.family(config.model_type).names
  flat = tree_paths.leaves(shapes)
  with _Tensors(directory) as tensors:
    tensors.check_names(
      {
        names[leaf].format(layer=layer)
        for leaf, like in flat.items()
        for layer in (range(like.shape[0]) if tree_paths.is_stacked(leaf) else (None,))
      },
      ignored={names["head/kernel"]} if config.tie_embeddings else set(),
    )
    if config.tie_embeddings:
      table = "embed/embedding"
      tensors.check_tied(names["head/kernel"], names[table], flat[table].shape)
    frozen = {
      leaf: _read_leaf(tensors, leaf, names[leaf], like.shape, chosen[leaf], storage_dtype)
      for leaf, like in flat.items()
    }
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


def _float_dtype(name: str, value: DTypeLike) -> np.dtype:
  try:
    dtype = jnp.dtype(value)
  except TypeError:
    dtype = None
  if dtype is None or dtype.name not in _DTYPES:
    raise ValueError(f"{name}: {value!r} is not supported; {', '.join(_DTYPES)} are")
  return dtype


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
      if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map; it says which file holds which tensor")
      self._files = {name: directory / file for name, file in weight_map.items()}
      # A shard that is missing or cut short is found now, not after half an hour of the others.
      for file in sorted(set(self._files.values())):
        self._handle(file)
    else:
      pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
      reason = (
        f"only {pickled[0].name}, which is pickled and could run code; convert it to safetensors: "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('NEW_DIRECTORY')\""
        if pickled
        else f"{_SINGLE} and {_INDEX} were looked for"
      )
      raise FileNotFoundError(f"{directory}: no weights: {reason}")
    # Some files leave the prefix off.
    self._prefix = "" if any(name.startswith("model.") for name in self._files) else "model."

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
    return value

  def dtype(self, name: str) -> np.dtype:
    """Of the tensor `name`, from the header."""
    stored = name.removeprefix(self._prefix)
    try:
      # An empty slice: the header's own names of dtypes are not numpy's.
      return self._handle(self._files[stored]).get_slice(stored)[:0].dtype
    except safetensors.SafetensorError as error:
      raise ValueError(f"{self.where(name)}: cannot be read ({error})") from None

  def check_names(self, wanted: set[str], ignored: set[str]) -> None:
    """Compares the names that are there with those the config asks for, before any is read."""
    for name in sorted(wanted):
      if name.removeprefix(self._prefix) not in self._files:
        raise ValueError(f"{self.where(name)}: missing tensor; the config asks for it")
    wanted = {name.removeprefix(self._prefix) for name in wanted}
    for stored in sorted(set(self._files) - wanted - ignored):
      if not stored.endswith(_IGNORED_ENDINGS):
        raise ValueError(
          f"{self._files[stored]}: {stored}: unexpected tensor; the config has no place for it"
        )

  def check_tied(self, head: str, table: str, shape: tuple[int, ...]) -> None:
    """Refuses a head that the config ties to `table` and that is there with other weights."""
    # Bytes, so that a NaN equals itself here and is named where the table is read.
    if head in self._files and self.get(head, shape).tobytes() != self.get(table, shape).tobytes():
      raise ValueError(
        f"{self.where(head)}: differs from {table}, to which tie_word_embeddings ties it; set that "
        "to false in config.json, or leave the tensor out"
      )


def _read_leaf(
  tensors: _Tensors,
  leaf: str,
  name: str,
  shape: tuple[int, ...],
  treatment: Treatment,
  storage_dtype: DTypeLike | None,
) -> Any:
  kernel = leaf.endswith("/kernel")

  def read(name: str, shape: tuple[int, ...]) -> Any:
    stored = shape[::-1] if kernel else shape
    w = jnp.asarray(tensors.get(name, stored))
    try:
      return _treat(w, treatment, storage_dtype, kernel)
    except (ValueError, TypeError) as error:
      raise ValueError(f"{tensors.where(name)}: {error}") from None

  if not tree_paths.is_stacked(leaf):
    return read(name, shape)
  layers, *shape_of_one = shape
  if (
    storage_dtype is None and len({tensors.dtype(name.format(layer=i)) for i in range(layers)}) > 1
  ):
    # Layers of unlike dtypes share the one that holds them all.
    storage_dtype = jnp.float32
  stack = None
  for layer in range(layers):
    one = read(name.format(layer=layer), tuple(shape_of_one))
    if stack is None:
      stack = jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), one)
    stack = _write(stack, one, layer)
    del one  # else it would be held while the next is read
  return stack


def _treat(
  w: jax.Array, treatment: Treatment, storage_dtype: DTypeLike | None, kernel: bool
) -> Any:
  if not jnp.issubdtype(w.dtype, jnp.floating):
    raise TypeError(f"dtype {w.dtype}; a weight is of a float dtype")
  # Before the transpose, so that the index is the file's.
  if not bool(_all_finite(w)):
    index = np.argwhere(~np.isfinite(np.asarray(w, np.float32)))[0]
    raise ValueError(f"the value at index {index.tolist()} is not finite")
  if kernel:
    w = w.T
  if isinstance(treatment, QuantizationConfig):
    if w.ndim >= 2:
      return quantize(w, **dataclasses.asdict(treatment))
    treatment = None  # a bias beside a quantized kernel
  dtype = storage_dtype if treatment is None else treatment
  return w if dtype is None else w.astype(dtype)


@jax.jit
def _all_finite(w: jax.Array) -> jax.Array:
  return jnp.isfinite(w).all()


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
    ValueError: a leaf that is packed, missing, of another shape than the model's, or that has no
      name in the family's files.
  """
  with new_directory(path) as temporary:
    _write_model(temporary, model, frozen, dtype)


def _write_model(directory: Path, model: Transformer, frozen: Any, dtype: DTypeLike) -> None:
  names = families.family(model.config.model_type).names
  shapes = tree_paths.leaves(_shapes(model))
  flat = tree_paths.leaves(frozen, is_leaf=is_quantized)
  for leaf, like in shapes.items():
    if leaf not in flat:
      raise ValueError(f"{leaf}: missing; the model has it")
    if flat[leaf].shape != like.shape:
      raise ValueError(f"{leaf}: shape {flat[leaf].shape}; the model's is {like.shape}")
  tensors = {}
  for leaf, w in flat.items():
    if leaf not in shapes or leaf not in names:
      raise ValueError(f"{leaf}: a {model.config.model_type} file of this model has no name for it")
    if is_quantized(w):
      raise ValueError(f"{leaf}: packed; a dense base is written, as lora.merge returns it")
    layers = range(w.shape[0]) if tree_paths.is_stacked(leaf) else (None,)
    for layer in layers:
      one = w if layer is None else w[layer]
      one = np.asarray(one.astype(dtype))
      if leaf.endswith("/kernel"):
        one = one.T
      # safetensors writes the memory as it lies.
      tensors[names[leaf].format(layer=layer)] = np.ascontiguousarray(one)
  write_json(directory / "config.json", families.hf_config(model.config, jnp.dtype(dtype).name))
  safetensors.numpy.save_file(tensors, directory / _SINGLE, metadata={"format": "pt"})


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
  with new_directory(path) as temporary:
    _write_model(temporary, model, lora.merge(frozen, params, constants), dtype)

"""Models written as Hugging Face directories: dense, merged, or in bitsandbytes' 4 bits.

Tensors are made and written in parts: beside the base that is given, a dense layer is held, or the
token table, or the head, one after another; of a tied pair both.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.typing import DTypeLike

from qlora_jax import lora, tree_paths
from qlora_jax.hf import bitsandbytes, stacks
from qlora_jax.hf.checkpoint import float_dtype, model_shapes
from qlora_jax.hf.files import copy_tokenizer, new_directory, write_json
from qlora_jax.hf.tensor_file import TensorFile, entry_bytes
from qlora_jax.hf.tensors import INDEX, SINGLE
from qlora_jax.models import families
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantization import (
  QuantizationConfig,
  Treatment,
  quantize_by,
  quantize_tree,
  treatments,
)
from qlora_jax.quantized_tensor import NestedScales, is_quantized

# Of a file; a larger model is cut into several.
FILE_BYTES = 2 << 30


def save(
  path: str | os.PathLike[str],
  model: Transformer,
  frozen: Any,
  *,
  dtype: DTypeLike = jnp.float32,
  file_bytes: int = FILE_BYTES,
) -> None:
  """Writes a dense base as a Hugging Face directory, whole or not at all.

  Args:
    path: must not exist.
    model: whose config is written, with the tokenizer of the directory that it was read from.
    frozen: plain arrays.
    dtype: of the files.
    file_bytes: of tensors in a file.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: a leaf that is packed, missing, of another shape than the model's, or that has no
      name in the family's files; a value that is not finite, or that `dtype` cannot hold.
  """
  for leaf, w in tree_paths.leaves(frozen, is_leaf=is_quantized).items():
    if is_quantized(w):
      raise ValueError(
        f"{leaf}: packed; save_merged writes it dense, save_base and save_bitsandbytes packed"
      )
  save_merged(path, model, frozen, {}, {}, dtype=dtype, file_bytes=file_bytes)


def save_merged(
  path: str | os.PathLike[str],
  model: Transformer,
  frozen: Any,
  params: Any,
  constants: Any,
  *,
  dtype: DTypeLike = jnp.float32,
  file_bytes: int = FILE_BYTES,
) -> None:
  """Writes the base with its adapters merged in, dense, in float32 rounded once to `dtype`.

  A tied head with an adapter of its own (or a table with one) is written untied.

  Args:
    path: must not exist.
    model, frozen, params, constants: as `model.apply` takes them. A base that `open_stored` left
      in its files is read in the same parts as it is written.
    dtype: of the files.
    file_bytes: of tensors in a file.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: see `save` and `lora.merge`; a value that `dtype` cannot hold.
  """
  dtype = float_dtype("dtype", dtype)
  trees = _flat(frozen, params, constants)
  parts = _parts(trees)
  abstract = _abstract(trees)
  shapes = [
    jax.eval_shape(functools.partial(_merged, part=part, dtype=dtype), abstract) for part in parts
  ]
  model = untied(model, {path: like for shape in shapes for path, like in shape.items()})
  config = model.config
  names = _names(model, shapes)
  groups = (
    _tensors(_merged(trees, part, dtype), functools.partial(_dense, names=names)) for part in parts
  )
  with new_directory(path) as directory:
    write_json(directory / "config.json", families.hf_config(config, dtype.name))
    _write(directory, groups, shapes, names, file_bytes)
    if config.hf_directory:
      copy_tokenizer(Path(config.hf_directory), directory)


def save_bitsandbytes(
  path: str | os.PathLike[str],
  model: Transformer,
  frozen: Any,
  *,
  dtype: DTypeLike | None = None,
  file_bytes: int = FILE_BYTES,
) -> None:
  """Writes a packed base as a bitsandbytes 4-bit checkpoint, code for code; transformers opens it.

  Args:
    path: must not exist.
    model, frozen: as `load` made them. All layers' projections are packed, in NF4 or FP4.
    dtype: of the weights that are not packed, and that transformers computes in; the model's own
      where None.
    file_bytes: of tensors in a file.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: a projection that is not packed, or packed as bitsandbytes cannot have it; experts,
      whose weights transformers 5 keeps in one tensor that bitsandbytes does not pack.
  """
  dtype = float_dtype("dtype", model.dtype if dtype is None else dtype)
  if model.config.num_experts:
    raise ValueError("save_bitsandbytes: a mixture of experts; bitsandbytes packs linear layers")
  trees = _flat(frozen)
  parts = _parts(trees)
  kinds, nested = set(), set()
  for leaf, w in trees[0].items():
    inner = tree_paths.is_stacked(leaf) and leaf.endswith("/kernel")
    if is_quantized(w) != inner:
      state = "packed" if is_quantized(w) else "not packed"
      raise ValueError(
        f"save_bitsandbytes: {leaf}: {state}; the layers' projections are, no others"
      )
    if is_quantized(w):
      kinds.add(bitsandbytes.quant_type(jax.tree.map(lambda x: x[0], w)))
      nested.add(isinstance(w.scales, NestedScales))
  if len(kinds) > 1 or len(nested) > 1:
    raise ValueError("save_bitsandbytes: projections packed in several ways; config.json has one")
  abstract = _abstract(trees)
  shapes = [jax.eval_shape(functools.partial(_part, part=part), abstract)[0] for part in parts]
  names = _names(model, shapes)

  def write(path: str, w: Any) -> dict[str, np.ndarray]:
    if is_quantized(w):
      return bitsandbytes.arrays(names[path][0], w, dtype.name)
    return _dense(path, w.astype(dtype), names)

  groups = (_tensors(_part(trees, part)[0], write) for part in parts)
  with new_directory(path) as directory:
    config = families.hf_config(model.config, dtype.name)
    config["quantization_config"] = {
      "quant_method": "bitsandbytes",
      "load_in_4bit": True,
      "load_in_8bit": False,
      "bnb_4bit_compute_dtype": dtype.name,
      "bnb_4bit_quant_storage": "uint8",
      "bnb_4bit_quant_type": kinds.pop(),
      "bnb_4bit_use_double_quant": nested.pop(),
      "llm_int8_enable_fp32_cpu_offload": False,
      "llm_int8_has_fp16_weight": False,
      "llm_int8_skip_modules": None,
      "llm_int8_threshold": 6.0,
    }
    write_json(directory / "config.json", config)
    _write(directory, groups, shapes, names, file_bytes)
    if model.config.hf_directory:
      copy_tokenizer(Path(model.config.hf_directory), directory)


def untied(model: Transformer, merged: Any) -> Transformer:
  """The model that reads `merged`: untied where that has a head of its own.

  Args:
    merged: a base, nested or by path.
  """
  paths = tree_paths.leaves(merged, is_leaf=is_quantized)
  if not model.config.tie_embeddings or "head/kernel" not in paths:
    return model
  return model.clone(config=dataclasses.replace(model.config, tie_embeddings=False))


def merge_into_bits(
  frozen: Any, params: Any, constants: Any, rules: Mapping[str, Treatment]
) -> Any:
  """The base with its adapters merged in, quantized again, one dense layer at a time.

  Each is put into a stack that is made once: beside the base that is given, the new one is held and
  a dense layer.

  What an adapter changed is mostly smaller than the rounding to 4 bits: compare logits before
  trusting the result.

  Args:
    frozen, params, constants: as the model reads them; an untied head stays.
    rules: of `quantize_tree`.

  Returns:
    A tree as `frozen`, with a QuantizedTensor for each leaf that a rule quantizes.
  """
  trees = _flat(frozen, params, constants)
  shapes = merged_shapes(frozen, params, constants)
  chosen = treatments(shapes, rules)
  counts = {
    leaf: like.shape[0]
    for leaf, like in tree_paths.leaves(shapes).items()
    if tree_paths.is_stacked(leaf)
  }
  made: dict[str, Any] = {}
  for part in _parts(trees):
    for path, w in _merged(trees, part, jnp.float32).items():
      leaf = path.replace(f"layers/{part}/", "layers/", 1) if isinstance(part, int) else path
      treatment = chosen[leaf]
      if isinstance(treatment, QuantizationConfig) and tree_paths.is_matrix(path, w):
        w = quantize_by(w, treatment)
      elif treatment is not None and not isinstance(treatment, QuantizationConfig):
        w = w.astype(treatment)
      if isinstance(part, int):
        stack = made.pop(leaf) if leaf in made else stacks.empty((counts[leaf],), w)
        w = stacks.write_whole(stack, w, (part,))
      # Waits, so that no more than a layer is dense at once.
      made[leaf] = jax.block_until_ready(w)
  return tree_paths.nest(made)


def merged_shapes(
  frozen: Any,
  params: Any,
  constants: Any,
  dtype: DTypeLike = jnp.float32,
  rules: Mapping[str, Treatment] | None = None,
) -> Any:
  """The shapes of what `save_merged` writes, or given rules of `merge_into_bits`; reads nothing.

  Raises:
    ValueError: as those do for what the shapes show; see `lora.merge`.
  """
  merge = functools.partial(lora.merge, dtype=dtype)
  shapes = jax.eval_shape(merge, *map(_abstract, (frozen, params, constants)))
  if rules is None:
    return shapes
  return jax.eval_shape(functools.partial(quantize_tree, rules=rules), shapes)


def _tensors(
  leaves: dict[str, Any], write: Callable[[str, Any], dict[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
  for path, w in leaves.items():
    yield from write(path, w).items()


# Leaves by path, of frozen, params and constants.
_Trees = tuple[dict[str, Any], ...]


def _flat(*trees: Any) -> _Trees:
  return tuple(tree_paths.leaves(tree, is_leaf=is_quantized) for tree in trees)


# What of a base is held at a time: a layer's index, or the first keys of what is in no stack.
_Part = int | tuple[str, ...]


def _parts(trees: _Trees) -> list[_Part]:
  counts = {w.shape[0] for leaf, w in trees[0].items() if tree_paths.is_stacked(leaf)}
  around = dict.fromkeys(
    path.partition("/")[0] for tree in trees for path in tree if not tree_paths.is_stacked(path)
  )
  keys = [(key,) for key in around]
  if lora.is_tied(trees[0]):
    # The one is made of the other.
    pair = (lora.module(lora.TABLE), lora.module(lora.HEAD))
    keys = [pair, *(key for key in keys if key[0] not in pair)]
  return [*range(max(counts, default=0)), *keys]


def _part(trees: _Trees, part: _Part) -> _Trees:
  """The leaves of a part, sliced or read now; those of a layer under their virtual paths."""
  if isinstance(part, tuple):
    return tuple(
      {
        path: jax.tree.map(lambda x: x[()], w)
        for path, w in tree.items()
        if not tree_paths.is_stacked(path) and path.partition("/")[0] in part
      }
      for tree in trees
    )
  return tuple(
    {
      tree_paths.per_layer(path, part + 1)[part]: jax.tree.map(lambda x: x[part], w)
      for path, w in tree.items()
      if tree_paths.is_stacked(path)
    }
    for tree in trees
  )


def _merged(trees: _Trees, part: _Part, dtype: DTypeLike) -> dict[str, Any]:
  """The leaves of a part with its adapters merged in."""
  group = map(tree_paths.nest, _part(trees, part))
  return tree_paths.leaves(lora.merge(*group, dtype=dtype, tied=lora.is_tied(trees[0])))


def _abstract(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _names(model: Transformer, found: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
  """The files' names of each virtual path: one, or one an expert.

  Raises:
    ValueError: a leaf that is missing, of another shape, or that the family has no name for.
  """
  names = families.family(model.config.model_type).names
  expected = {}
  for path, like in tree_paths.leaves(model_shapes(model)).items():
    stacked = tree_paths.is_stacked(path)
    for layer, virtual in enumerate(tree_paths.layers(path, like)):
      shape = like.shape[1:] if stacked else like.shape
      expected[virtual] = (names[path], layer, shape)
  flat = {path: w for group in found for path, w in group.items()}
  for path in sorted(set(expected) | set(flat)):
    if path not in expected:
      raise ValueError(f"{path}: a {model.config.model_type} file of this model has no name for it")
    if path not in flat:
      raise ValueError(f"{path}: missing; the model has it")
    if tuple(flat[path].shape) != expected[path][2]:
      raise ValueError(f"{path}: shape {flat[path].shape}; the model's is {expected[path][2]}")
  return {
    path: [
      name.format(layer=layer, expert=expert)
      for expert in range(shape[0] if "{expert}" in name else 1)
    ]
    for path, (name, layer, shape) in expected.items()
  }


def _dense(path: str, w: Any, names: dict[str, list[str]]) -> dict[str, np.ndarray]:
  """The tensors of a file that a dense leaf becomes.

  Raises:
    ValueError: a value that is not finite in the dtype of the leaf.
  """
  w = np.asarray(w)
  if path.endswith("/kernel"):
    w = np.swapaxes(w, -1, -2)
  parts = w if len(names[path]) > 1 else [w.reshape(w.shape[-2:]) if w.ndim > 2 else w]
  tensors = dict(zip(names[path], parts, strict=True))
  for name, x in tensors.items():
    finite = np.isfinite(x)
    if not finite.all():
      at = tuple(int(i) for i in np.argwhere(~finite)[0])
      hint = "; write bfloat16 or float32, which reach further" if x.dtype == np.float16 else ""
      raise ValueError(f"{name}: the value at index {[*at]} is {x[at]} in {x.dtype}{hint}")
  return tensors


def _write(
  directory: Path,
  groups: Iterable[Iterable[tuple[str, np.ndarray]]],
  shapes: list[dict[str, Any]],
  names: dict[str, list[str]],
  file_bytes: int,
) -> None:
  """Writes the tensors of each group as they come; a group is not cut.

  Args:
    shapes: of each group's leaves, by whose size groups are put together in files.
    names: of each leaf's tensors.
  """
  sizes = [tree_paths.tree_bytes(shape) for shape in shapes]
  files: list[list[int]] = []
  filled = 0
  for group, size in enumerate(sizes):
    if not files or filled + size > file_bytes:
      files.append([])
      filled = 0
    files[-1].append(group)
    filled += size
  weight_map, total = {}, 0
  bar = tqdm.tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="writing", disable=None)
  made = iter(groups)
  with bar:
    for number, members in enumerate(files, 1):
      file = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else SINGLE
      header_bytes = sum(
        entry_bytes(name) * (bitsandbytes.MOST_ARRAYS if is_quantized(leaf) else 1)
        for group in members
        for path, leaf in shapes[group].items()
        for name in names[path]
      )
      with TensorFile(directory / file, header_bytes) as out:
        for name, tensor in itertools.chain.from_iterable(itertools.islice(made, len(members))):
          out.write(name, tensor)
          weight_map[name] = file
          total += tensor.nbytes
          bar.update(tensor.nbytes)
          del tensor  # else it would be held while the next is made
  if len(files) > 1:
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

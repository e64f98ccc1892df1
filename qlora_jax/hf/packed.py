"""A quantized base on disk, as it lies in memory: opened without quantizing again.

A directory with the model's config.json, a manifest, and one safetensors file for each leaf of
the base, stacked over layers, with its arrays (`codes`, `scales`, …) under their paths in the
leaf.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from qlora_jax import codebooks, tree_paths
from qlora_jax.fingerprint import fingerprint
from qlora_jax.hf.files import copy_tokenizer, new_directory, read_json, write_json
from qlora_jax.hf.tensors import FLOATS
from qlora_jax.models import families
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantized_tensor import (
  FlatQuantizedTensor,
  NestedScales,
  OutlierQuantizedTensor,
  QuantizedTensor,
  RotatedQuantizedTensor,
  Scales,
  TwoLevelScales,
  is_quantized,
)

MANIFEST = "qlora_jax.json"
_FORMAT = 1

# safetensors' names of what a base has.
_DTYPES = {"U8": np.uint8, "I8": np.int8, "I32": np.int32, **FLOATS}

# Floats of 8 bits are written as the bytes that they are, which safetensors' own reader for NumPy
# does not know; the manifest says which they are.
_BYTE_FLOATS = ("float8_e4m3fn", "float8_e8m0fnu")

# What stands around a packed weight: the manifest's word for it, and the arrays beside `inner`.
_WRAPPERS: dict[str, tuple[Any, tuple[str, ...]]] = {
  "outliers": (OutlierQuantizedTensor, ("rows", "values")),
  "rotated": (RotatedQuantizedTensor, ("signs",)),
}


def is_packed(directory: Path) -> bool:
  """Whether `save_base` wrote this directory."""
  return (directory / MANIFEST).exists()


def save_base(
  path: str | os.PathLike[str],
  model: Transformer,
  frozen: Any,
  *,
  source: str | None = None,
) -> None:
  """Writes a base, packed weights and all, whole or not at all; `load` opens it.

  Args:
    path: must not exist.
    model, frozen: as `load` made them.
    source: where the weights are from, for the manifest; the directory that the model was read
      from where None.

  Raises:
    FileExistsError: there is something at `path`.
  """
  source = source or model.config.hf_directory
  dtype = jnp.dtype(model.dtype).name
  leaves = {}
  with new_directory(path) as directory:
    for leaf, value in tree_paths.leaves(frozen, is_leaf=is_quantized).items():
      file = f"{leaf.replace('/', '.')}.safetensors"
      arrays = {name or "array": _bytes(x) for name, x in tree_paths.leaves(value).items()}
      safetensors.numpy.save_file(arrays, directory / file)
      leaves[leaf] = {"file": file, "shape": list(value.shape), **_statics(value)}
    write_json(directory / "config.json", families.hf_config(model.config, dtype))
    if model.config.hf_directory:
      copy_tokenizer(Path(model.config.hf_directory), directory)
    write_json(
      directory / MANIFEST,
      {
        "format": _FORMAT,
        "source": source,
        "revision": _revision(model.config.hf_directory),
        "fingerprint": fingerprint(frozen),
        "leaves": leaves,
      },
    )


def _bytes(x: Any) -> np.ndarray:
  array = np.asarray(x)
  return array.view(np.uint8) if array.dtype.name in _BYTE_FLOATS else array


def _revision(directory: str | None) -> str | None:
  """The commit of a directory in huggingface_hub's cache, `…/snapshots/COMMIT`."""
  path = Path(directory or "")
  return path.name if path.parent.name == "snapshots" else None


def _statics(value: Any) -> dict[str, Any]:
  """What of a leaf is not in its arrays."""
  if not is_quantized(value):
    return {}
  if isinstance(value, FlatQuantizedTensor):
    return {"features": value.features, **_statics(value.flat)}
  for wrapper, (kind, _) in _WRAPPERS.items():
    if isinstance(value, kind):
      inner = _statics(value.inner)
      return {**inner, "around": [wrapper, *inner.get("around", [])]}
  statics = {name: getattr(value, name) for name in ("bits", "block_size", "padding")}
  # For readers: the table itself is among the arrays.
  statics["codebook"] = codebooks.name_of(np.asarray(value.levels), value.block_size) or "custom"
  if isinstance(value.scales, NestedScales):
    statics["nested_block_size"] = value.scales.block_size
  elif isinstance(value.scales, TwoLevelScales):
    statics["scale_dtype"] = value.scales.codes.dtype.name
  else:
    statics["scale_dtype"] = value.scales.dtype.name
  return statics


def read_manifest(directory: Path) -> dict[str, Any]:
  """The manifest of a packed base.

  Raises:
    ValueError: it is of another format than this version writes, or has no fingerprint.
  """
  manifest = read_json(directory / MANIFEST)
  if manifest.get("format") != _FORMAT or not isinstance(manifest.get("leaves"), dict):
    raise ValueError(
      f"{directory / MANIFEST}: format {manifest.get('format')!r}; this version reads {_FORMAT}"
    )
  if not isinstance(manifest.get("fingerprint"), str):
    raise ValueError(
      f"{directory / MANIFEST}: fingerprint {manifest.get('fingerprint')!r}; a string is wanted, "
      "by which the files are checked; quantize the original again"
    )
  return manifest


def read(
  directory: Path,
  shapes: Any,
  place: Callable[[str, Any], Any],
  *,
  progress: bool,
  headers_only: bool = False,
) -> dict[str, Any]:
  """The tree that `save_base` wrote, bit for bit.

  Args:
    shapes: of the model's dense tree, which the leaves must have.
    place: where a leaf goes, from its path and value; or its arrays' `fingerprint.checksum`s, for
      a look at each that holds none.
    headers_only: gives shapes in place of arrays, and reads none.

  Raises:
    FileNotFoundError, ValueError: a file or array that is missing, cut short or of another shape;
      bits that are not those of the manifest's fingerprint.
  """
  manifest = read_manifest(directory)
  leaves = manifest["leaves"]
  wanted = {path: list(like.shape) for path, like in tree_paths.leaves(shapes).items()}
  for path in sorted(set(wanted) | set(leaves)):
    found = leaves.get(path, {}).get("shape")
    if found != wanted.get(path):
      raise ValueError(
        f"{directory / MANIFEST}: {path}: shape {found}; config.json asks for {wanted.get(path)}"
      )
  files = {path: directory / entry["file"] for path, entry in leaves.items()}
  for path, file in files.items():
    if not file.exists():
      raise FileNotFoundError(f"{file}: missing; it holds {path}")
  total = sum(file.stat().st_size for file in files.values())
  frozen = {}
  bar = tqdm.tqdm(
    total=total, unit="B", unit_scale=True, desc="opening", disable=None if progress else True
  )
  with bar:
    for path, entry in leaves.items():
      value = _leaf(files[path], entry, headers_only)
      if list(value.shape) != entry["shape"]:
        raise ValueError(
          f"{files[path]}: shape {list(value.shape)}; {MANIFEST} says {entry['shape']}"
        )
      frozen[path] = place(path, value)
      bar.update(files[path].stat().st_size)
  tree = tree_paths.nest(frozen)
  if not headers_only and (found := fingerprint(tree)) != manifest["fingerprint"]:
    raise ValueError(
      f"{directory / MANIFEST}: fingerprint {manifest['fingerprint']}; that of the files is "
      f"{found}: they are not as they were written; quantize the original again"
    )
  return tree


def _leaf(file: Path, entry: dict[str, Any], headers_only: bool) -> Any:
  try:
    if headers_only:
      with safetensors.safe_open(file, framework="numpy") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}
      arrays: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(tuple(x.get_shape()), _DTYPES[x.get_dtype()])
        for name, x in slices.items()
      }
    else:
      arrays = safetensors.numpy.load_file(file)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
  if "bits" not in entry:
    return arrays["array"]
  if features := entry.get("features"):
    arrays = {name.removeprefix("flat/"): x for name, x in arrays.items()}
    return FlatQuantizedTensor(_packed_leaf(file, entry, arrays), features)
  return _wrapped_leaf(file, entry, arrays, entry.get("around", []))


def _wrapped_leaf(
  file: Path, entry: dict[str, Any], arrays: dict[str, Any], around: list[str]
) -> Any:
  if not around:
    return _packed_leaf(file, entry, arrays)
  if around[0] not in _WRAPPERS:
    raise ValueError(f"{file}: stands in {around[0]!r}; this version knows {', '.join(_WRAPPERS)}")
  kind, names = _WRAPPERS[around[0]]
  within = {name.removeprefix("inner/"): x for name, x in arrays.items() if name not in names}
  inner = _wrapped_leaf(file, entry, within, around[1:])
  try:
    beside = {name: arrays[name] for name in names}
  except KeyError as error:
    raise ValueError(f"{file}: {error} is missing") from None
  *leading, k, n = inner.shape
  count = beside["rows"].shape[-1:] if "rows" in beside else ()
  shapes = {"signs": (k,), "rows": count, "values": (*count, n)}
  for name, x in beside.items():
    if tuple(x.shape) != (*leading, *shapes[name]):
      raise ValueError(f"{file}: {name} {list(x.shape)} beside a weight {list(inner.shape)}")
  return kind(inner, **beside)


def _packed_leaf(file: Path, entry: dict[str, Any], arrays: dict[str, Any]) -> QuantizedTensor:
  try:
    scales = _scales(entry, arrays)
    leaf = QuantizedTensor(
      codes=arrays["codes"],
      scales=scales,
      levels=arrays["levels"],
      zero=arrays.get("zero"),
      **{name: entry[name] for name in ("bits", "block_size", "padding")},
    )
  except KeyError as error:
    raise ValueError(f"{file}: {error} is missing") from None
  *leading, k, n = leaf.shape
  blocks = -(-k // leaf.block_size)
  fits = tuple(scales.shape) == (*leading, blocks, n) and leaf.levels.shape[-1] == 2**leaf.bits
  fits = fits and tuple(leaf.levels.shape[:-1]) in (tuple(leading), (*leading, n))
  if isinstance(scales, NestedScales):
    fits = fits and scales.absmax.shape[-1] == -(-blocks * n // scales.block_size)
  if isinstance(scales, TwoLevelScales):
    fits = fits and tuple(scales.factor.shape) == tuple(leading)
  if not fits:
    raise ValueError(f"{file}: its arrays do not fit {MANIFEST}, block_size {leaf.block_size}")
  return leaf


def _scales(entry: dict[str, Any], arrays: dict[str, Any]) -> Scales:
  if nested := entry.get("nested_block_size"):
    return NestedScales(
      *(arrays[f"scales/{name}"] for name in ("codes", "absmax", "offset")), block_size=nested
    )
  if "scales/codes" in arrays:
    codes = _as_dtype(arrays["scales/codes"], entry["scale_dtype"])
    return TwoLevelScales(codes, arrays["scales/factor"])
  # A manifest without the word is of a version that had no others.
  dtype = entry.get("scale_dtype", "")
  return _as_dtype(arrays["scales"], dtype) if dtype in _BYTE_FLOATS else arrays["scales"]


def _as_dtype(x: Any, dtype: str) -> Any:
  """Bytes, or a shape of them, as floats of 8 bits."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype))
  return x.view(jnp.dtype(dtype))

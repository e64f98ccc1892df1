"""What is in a directory: a model, an adapter, or files of tensors, and whether it is whole."""

import collections
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors

from qlora_jax import tree_paths
from qlora_jax.fingerprint import checksum
from qlora_jax.hf import bitsandbytes, checkpoint, packed
from qlora_jax.hf.files import read_json
from qlora_jax.hf.tensors import Tensors
from qlora_jax.models import families
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantized_tensor import is_quantized

_ADAPTER = "adapter_config.json"


def inspect(path: str | os.PathLike[str]) -> str:
  """Describes a directory in a few lines: kind, family, sizes, which tensors in how many bits.

  Reads headers, and a tied head that is there beside its table, to compare them; of a packed base
  all files, a leaf at a time, for its fingerprint. A model or an adapter that is not whole is
  described with the reason.

  Raises:
    FileNotFoundError: no such directory.
  """
  directory = Path(path).absolute()
  if not directory.is_dir():
    raise FileNotFoundError(f"{directory}: no such directory")
  if (directory / _ADAPTER).exists():
    lines = _adapter(directory)
  elif (directory / "config.json").exists():
    lines = _model(directory)
  else:
    lines = _files(directory)
  return "\n".join([str(directory), *(f"  {line}" for line in lines)])


def _model(directory: Path) -> Iterator[str]:
  try:
    raw = read_json(directory / "config.json")
  except ValueError as error:
    yield f"not whole: {error}"
    return
  try:
    config = checkpoint.read_config(directory)
  except ValueError as error:
    yield f"a model that is not supported: {error}"
    return
  given = raw.get("quantization_config") or {}
  method = given.get("quant_method") if isinstance(given, dict) else given
  kind = "packed base of qlora_jax" if packed.is_packed(directory) else "checkpoint"
  architecture = families.family(config.model_type).architecture
  yield f"{kind}{f', {method}' if method else ''}: {architecture}"
  layers = collections.Counter(
    f"window {kind.window}" if kind.window else "full attention"
    for kind in (config.kinds[index] for index in config.kind_of_layer)
  )
  experts = f", {config.num_experts} experts" if config.num_experts else ""
  yield (
    f"{config.num_layers} layers ({', '.join(f'{n} {name}' for name, n in layers.items())}), "
    f"width {config.hidden_size}, MLP {config.intermediate_size}{experts}, "
    f"{config.num_heads} heads of {config.head_dim} ({config.num_kv_heads} of keys), "
    f"vocabulary {config.vocab_size}{', tied head' if config.tie_embeddings else ''}"
  )
  model, is_packed = Transformer(config), packed.is_packed(directory)
  try:
    yield from _packed(directory, model) if is_packed else _tensors(directory, model)
  except (ValueError, OSError) as error:
    yield f"cannot be read: {error}"
    return
  if is_packed:
    try:
      _check_bits(directory, model)
    except (ValueError, OSError) as error:
      yield f"not whole: {error}"
      return
  written = ", bit for bit as it was written" if is_packed else ""
  yield f"whole: every tensor that the config asks for is there, in its shape{written}"


def _tensors(directory: Path, model: Transformer) -> Iterator[str]:
  from_bitsandbytes = bool(checkpoint.packing(directory))
  with Tensors(directory) as tensors:
    matrices = checkpoint.matrices(tensors, model, from_bitsandbytes)
    rows = []
    for name, shape in matrices.items():
      if from_bitsandbytes and bitsandbytes.is_packed(tensors, name):
        state = bitsandbytes.state(tensors, name)
        nested = ", double quantization" if "nested_offset" in state else ""
        kind = f"{state['quant_type']}, block {state['blocksize']}{nested}"
        arrays = bitsandbytes.names(tensors, name)
        nbytes = sum(tensors.nbytes(key) for key in arrays)
      else:
        dtype = tensors.float_dtype(name)
        kind, nbytes = dtype.name, math.prod(shape) * dtype.itemsize
      rows.append((kind, math.prod(shape), nbytes))
  yield from _table(rows)


def _packed(directory: Path, model: Transformer) -> Iterator[str]:
  manifest = packed.read_manifest(directory)
  shapes = checkpoint.model_shapes(model)
  frozen = packed.read(directory, shapes, lambda _, leaf: leaf, progress=False, headers_only=True)
  rows = []
  for leaf in tree_paths.leaves(frozen, is_leaf=is_quantized).values():
    kind = checkpoint.describe(leaf) if is_quantized(leaf) else jnp.dtype(leaf.dtype).name
    rows.append((kind, leaf.size, tree_paths.tree_bytes(leaf)))
  yield f"made from {manifest.get('source')}, fingerprint {manifest['fingerprint']}"
  yield from _table(rows)


def _check_bits(directory: Path, model: Transformer) -> None:
  """Reads all files, of which a leaf is held at a time."""
  packed.read(
    directory,
    checkpoint.model_shapes(model),
    lambda _, leaf: jax.tree.map(checksum, leaf),
    progress=True,
  )


def _table(rows: list[tuple[str, int, int]]) -> Iterator[str]:
  """A line a kind, from (kind, weights, bytes) of each tensor."""
  for kind in dict.fromkeys(kind for kind, _, _ in rows):
    sizes = [(weights, nbytes) for own, weights, nbytes in rows if own == kind]
    weights, nbytes = (sum(each) for each in zip(*sizes, strict=True))
    yield (
      f"{len(sizes)} tensors, {weights:,} weights, {_size(nbytes)}: {kind} "
      f"({8 * nbytes / weights:.3f} bits a weight)"
    )


def _size(nbytes: float) -> str:
  for unit in ("B", "KB", "MB", "GB"):
    if nbytes < 1000 or unit == "GB":
      return f"{nbytes:.3g} {unit}"
    nbytes /= 1000
  raise AssertionError


def _adapter(directory: Path) -> Iterator[str]:
  try:
    raw = read_json(directory / _ADAPTER)
    sizes = list(_headers([directory / "adapter_model.safetensors"]))
  except (ValueError, OSError) as error:
    yield f"an adapter that is not whole: {error}"
    return
  kinds = [raw.get("peft_type", "?")]
  kinds += [
    name
    for field, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA"), ("lora_bias", "biases"))
    if raw.get(field)
  ]
  if raw.get("modules_to_save"):
    kinds.append(f"in full: {', '.join(raw['modules_to_save'])}")
  yield f"PEFT adapter: {', '.join(kinds)}, rank {raw.get('r')}, alpha {raw.get('lora_alpha')}"
  for field in ("rank_pattern", "alpha_pattern"):
    if raw.get(field):
      yield f"{field}: {raw[field]}"
  targets = raw.get("target_modules")
  yield f"targets: {targets if isinstance(targets, str) else ', '.join(sorted(targets or []))}"
  yield f"base: {raw.get('base_model_name_or_path')}"
  yield from _summary(sizes)


def _files(directory: Path) -> Iterator[str]:
  yield "neither a model (config.json) nor an adapter (adapter_config.json)"
  for file in sorted(directory.iterdir()):
    if file.suffix != ".safetensors":
      yield f"{file.name}{'/' if file.is_dir() else ''}"
      continue
    try:
      yield f"{file.name}: {'; '.join(_summary(_headers([file])))}"
    except ValueError as error:
      yield f"{file.name}: {error}"


def _headers(files: Iterable[Path]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
  """(name, dtype, shape) of each tensor of the files."""
  for file in files:
    try:
      with safetensors.safe_open(file, framework="numpy") as handle:
        for name in handle.keys():
          tensor = handle.get_slice(name)
          yield name, tensor.get_dtype(), tuple(tensor.get_shape())
    except FileNotFoundError:
      raise FileNotFoundError(f"{file}: missing") from None
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def _summary(headers: Iterable[tuple[str, str, tuple[int, ...]]]) -> Iterator[str]:
  headers = list(headers)
  by_dtype = collections.Counter(dtype for _, dtype, _ in headers)
  numbers: collections.Counter[str] = collections.Counter()
  for _, dtype, shape in headers:
    numbers[dtype] += math.prod(shape)
  for dtype, count in sorted(by_dtype.items()):
    yield f"{count} tensors of {dtype}, {numbers[dtype]:,} numbers"
  if any(".quant_state.bitsandbytes__" in name for name, _, _ in headers):
    kinds = {name.rpartition("__")[2] for name, _, _ in headers if "bitsandbytes__" in name}
    yield f"of them weights packed by bitsandbytes in {', '.join(sorted(kinds))}"

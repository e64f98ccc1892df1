"""Checkpoints as Hugging Face keeps them, read: config.json and safetensors.

A checkpoint is read in runs of output rows. Each is quantized on the device as it arrives and
written into its place in the stack of layers, which is made once and updated in place, while the
next one is read. So neither the host nor the device holds more than the packed model and a few
such runs.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.typing import DTypeLike

from qlora_jax import codebooks, lora_init, tree_paths
from qlora_jax.hf import bitsandbytes, hub, packed, stacks
from qlora_jax.hf.files import read_json
from qlora_jax.hf.stored import StoredArray
from qlora_jax.hf.tensors import Tensors
from qlora_jax.lora import LoRAConfig
from qlora_jax.models import families
from qlora_jax.models.transformer import RematPolicy, Transformer, TransformerConfig
from qlora_jax.quantization import (
  QuantizationConfig,
  Treatment,
  in_range,
  nest_scales,
  quantize_by,
  quantize_tree,
  treatments,
)
from qlora_jax.quantized_tensor import (
  NestedScales,
  OutlierQuantizedTensor,
  RotatedQuantizedTensor,
  TwoLevelScales,
  is_quantized,
)

_DTYPES = ("bfloat16", "float16", "float32")

# Of the file, read at once. Smaller ones cost a dispatch each, larger ones memory.
_CHUNK_BYTES = 64 << 20

# Runs of rows that are read ahead, by as many threads, and those whose quantization may be under
# way.
_READ_AHEAD = 3
_IN_FLIGHT = 2

_REQUANTIZED = {
  "gptq": "GPTQ's order of weights is not read",
  "awq": "AWQ's order of weights is not read",
}

# A sharding for all arrays of the base, or one by path and shape.
Shardings = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


def load(
  path: str | os.PathLike[str],
  quantization: QuantizationConfig | Mapping[str, Treatment] | None = None,
  *,
  dtype: DTypeLike | None = None,
  storage_dtype: DTypeLike | None = None,
  remat: RematPolicy = "none",
  implementation: str | None = None,
  sharding: Shardings | None = None,
  progress: bool = True,
) -> tuple[Transformer, dict[str, Any]]:
  """Reads a model, quantizing its weights as they come.

  Args:
    path: a directory with config.json and safetensors, dense or of bitsandbytes' 4 bits; one that
      `save_base` wrote; or a hub id, org/name[@revision].
    quantization: of every linear layer of the decoder's blocks; or rules for `quantize_tree`;
      or None. Embeddings, norms and the head stay in 16 bits unless a rule says otherwise. Of a
      base that is packed already, None takes it as it is, and anything else must agree with it.
    dtype: of the computation; None takes the checkpoint's own.
    storage_dtype: of the weights that are not quantized; None keeps the file's.
    remat, implementation: see `Transformer`.
    sharding: of the base: one for all its arrays, or a function of the path (of a leaf of the
      packed tree, `layers/attn/q/kernel/codes`) and the shape. JAX's default device where None.
    progress: a bar that counts bytes, where stderr is a terminal.

  Returns:
    (model, frozen): `model.apply({"params": {}, "constants": {}, "frozen": frozen}, tokens)`.

  Raises:
    FileNotFoundError: the directory, or a file in it, is missing; says what was looked for.
    ValueError: an unsupported config; a tensor that is missing, unexpected, of another shape or
      not finite; a file that is cut short; a base that is packed otherwise than asked. One line
      with the file and the tensor.
  """
  directory = model_directory(path)
  model = _model(directory, dtype, remat, implementation)
  if storage_dtype is not None:
    storage_dtype = float_dtype("storage_dtype", storage_dtype)
  rules = default_rules(quantization)
  planned = abstract_base(model, rules, storage_dtype or jnp.float32)
  place = functools.partial(_place, sharding=sharding)

  if packed.is_packed(directory):
    frozen = packed.read(directory, model_shapes(model), place, progress=progress)
    if storage_dtype is not None:
      frozen = _stored_as(storage_dtype, directory, frozen)
    if quantization is not None:
      _check_agreement(directory, frozen, planned, rules)
    return model, frozen
  from_bitsandbytes = bool(packing(directory))
  with Tensors(directory) as tensors:
    reader = _Reader(tensors, model, rules, storage_dtype, place, from_bitsandbytes)
    frozen = reader.read(progress)
  if from_bitsandbytes and quantization is not None:
    _check_agreement(directory, frozen, planned, rules)
  return model, frozen


def open_stored(
  path: str | os.PathLike[str], *, dtype: DTypeLike | None = None
) -> tuple[Transformer, dict[str, Any]]:
  """As `load`, of a dense checkpoint, but its weights stay in their files until they are indexed.

  For what goes through a base in parts: `load_adapter`, `save_merged`, `stored.logits`.

  Args:
    path: a directory with config.json and dense safetensors, or a hub id.
    dtype: of the computation; None takes the checkpoint's own.

  Returns:
    (model, frozen), the leaves of `frozen` being `StoredArray`s.

  Raises:
    FileNotFoundError, ValueError: as `load`; a base that is packed.
  """
  directory = model_directory(path)
  if not is_dense(directory):
    raise ValueError(f"{directory}: packed; `load` opens it")
  model = _model(directory, dtype)
  return model, _Reader(Tensors(directory), model, {}, None, lambda _, value: value, False).stored()


def initialize(
  key: jax.Array,
  path: str | os.PathLike[str],
  quantization: QuantizationConfig | Mapping[str, Treatment] | None,
  cfg: LoRAConfig,
  *,
  dtype: DTypeLike | None = None,
  storage_dtype: DTypeLike | None = None,
  remat: RematPolicy = "none",
  implementation: str | None = None,
  gradients: Mapping[str, Any] | None = None,
  moments: Mapping[str, Any] | None = None,
) -> tuple[Transformer, dict[str, Any], dict[str, Any], dict[str, Any]]:
  """`load` and `lora_init.initialize` in one: the dense weights are read one at a time.

  Args:
    key, gradients, moments: see `lora_init.initialize`.
    path: of a dense checkpoint, as `open_stored` takes it.
    quantization, dtype, storage_dtype, remat, implementation: see `load`.
    cfg: the adapters.

  Returns:
    (model, frozen, params, constants).

  Raises:
    FileNotFoundError, ValueError: as `load` and `lora_init.initialize`; a base that is packed.
  """
  directory = model_directory(path)
  if not is_dense(directory):
    raise ValueError(
      f"{directory}: packed, and lora.init {cfg.init!r} starts from the dense weights; give the "
      "checkpoint that it was made from, or lora.init 'lora'"
    )
  if storage_dtype is not None:
    storage_dtype = float_dtype("storage_dtype", storage_dtype)
  model, dense = open_stored(directory, dtype=dtype)
  model = model.clone(remat=remat, implementation=implementation)
  rules = default_rules(quantization)
  made = lora_init.initialize(
    key, dense, rules, cfg, storage_dtype=storage_dtype, gradients=gradients, moments=moments
  )
  return model, *made


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
  directory = model_directory(path)
  return _read_config(directory, read_json(directory / "config.json"))


def _model(
  directory: Path,
  dtype: DTypeLike | None,
  remat: RematPolicy = "none",
  implementation: str | None = None,
) -> Transformer:
  """The model of a checkpoint's config."""
  raw = read_json(directory / "config.json")
  config = dataclasses.replace(_read_config(directory, raw), hf_directory=str(directory))
  if dtype is None:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    # Some files spell it as torch prints it.
    dtype = str(dtype).removeprefix("torch.")
    compute = float_dtype(f"{directory}: config.json: dtype", dtype)
  else:
    compute = float_dtype("dtype", dtype)
  return Transformer(config, compute, remat, implementation)


def float_dtype(name: str, value: DTypeLike) -> np.dtype:
  """`value` as a dtype; refuses, as the argument `name`, what is no float dtype of weights."""
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


def model_directory(path: str | os.PathLike[str]) -> Path:
  """The directory of a model, from its path or hub id.

  Raises:
    FileNotFoundError: there is none, or it has no config.json.
  """
  directory = hub.resolve(path)
  if not (directory / "config.json").exists():
    raise FileNotFoundError(f"{directory}: not a model: config.json was looked for")
  return directory


def _stored_as(dtype: np.dtype, directory: Path, frozen: Any) -> Any:
  """A base with the leaves that are not quantized in another dtype."""

  def cast(path, leaf):
    if is_quantized(leaf):
      return leaf
    value = leaf.astype(dtype)
    if not bool(jnp.isfinite(value).all()):
      raise ValueError(f"{directory}: {tree_paths.path_string(path)}: beyond what {dtype} holds")
    return value

  return jax.tree_util.tree_map_with_path(cast, frozen, is_leaf=is_quantized)


def is_dense(directory: Path) -> bool:
  """Whether a checkpoint is of plain weights.

  Raises:
    ValueError: see `packing`.
  """
  return not packed.is_packed(directory) and packing(directory) is None


def packing(directory: Path) -> str | None:
  """Whose 4 bits a checkpoint is in, "bitsandbytes", or None of a dense one.

  Raises:
    ValueError: it is quantized in a way that is not read, with what to do instead.
  """
  given = read_json(directory / "config.json").get("quantization_config")
  if not given:
    return None
  method = given.get("quant_method") if isinstance(given, dict) else given
  if method == "bitsandbytes" and isinstance(given, dict) and given.get("load_in_4bit"):
    return method
  if method == "bitsandbytes":
    method = "bitsandbytes in 8 bits"
  reason = _REQUANTIZED.get(str(method), "not read here")
  raise ValueError(
    f"{directory}: quantized already ({method}): {reason}; give the 16-bit checkpoint that it was "
    "made from, and a quantization of its own"
  )


def model_shapes(model: Transformer) -> Any:
  """The tree of the model's dense base, of `jax.ShapeDtypeStruct`."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  # A kernel that the model names may not take so few; no weight depends on it.
  model = model.clone(attention=None)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["frozen"]


def matrices(
  tensors: Tensors, model: Transformer, from_bitsandbytes: bool
) -> dict[str, tuple[int, ...]]:
  """The weights of a checkpoint by name, with their shapes, once all are known to be there.

  Raises:
    ValueError: a tensor that is missing, unexpected or of another shape.
  """
  reader = _Reader(tensors, model, {}, None, lambda _, value: value, from_bitsandbytes)
  return {matrix.name: matrix.shape for matrix in reader.queue}


def abstract_base(
  model: Transformer, rules: Mapping[str, Treatment], storage_dtype: DTypeLike
) -> Any:
  """The shapes of the base that `load` would make, with nothing read or allocated.

  Raises:
    ValueError: rules that match nothing or disagree.
  """
  shapes = jax.tree.map(
    lambda like: jax.ShapeDtypeStruct(like.shape, jnp.dtype(storage_dtype)), model_shapes(model)
  )
  return jax.eval_shape(functools.partial(quantize_tree, rules=rules), shapes)


def _check_agreement(
  directory: Path, frozen: Any, planned: Any, rules: Mapping[str, Treatment]
) -> None:
  """Refuses a packed base that is packed otherwise than was asked."""
  found = tree_paths.leaves(frozen, is_leaf=is_quantized)
  chosen = treatments(planned, rules)
  for path, like in tree_paths.leaves(planned, is_leaf=is_quantized).items():
    asked = chosen[path] if is_quantized(like) else None
    have, want = describe(found[path]), describe(like)
    if isinstance(asked, QuantizationConfig):
      want = f"{asked.codebook}, {want}"
      codebook = codebooks.get(asked.codebook, asked.block_size)
      same = is_quantized(found[path]) and _is_of(codebook, found[path])
      have = f"{asked.codebook if same else 'another codebook'}, {have}"
    if have != want:
      raise ValueError(
        f"{directory}: {tree_paths.module(path)}: stored as {have}; the quantization that was "
        f"asked for is {want}; leave it out to take the base as it is, or quantize the original"
      )


def _is_of(codebook: codebooks.Codebook, leaf: Any) -> bool:
  """Whether the levels of a packed leaf may be the codebook's: a learned one has its own."""
  if codebook.learned:
    return codebooks.name_of(np.asarray(leaf.levels), leaf.block_size) is None
  return codebooks.is_table(leaf.levels, codebook.table)


def describe(leaf: Any) -> str:
  """How a leaf of a base is stored, in words."""
  if not is_quantized(leaf):
    return "16 or 32 bits"
  if isinstance(leaf, OutlierQuantizedTensor):
    return f"{describe(leaf.inner)}, {leaf.rows.shape[-1]} inputs in 16 bits"
  if isinstance(leaf, RotatedQuantizedTensor):
    return f"{describe(leaf.inner)}, rotated"
  scales = leaf.scales
  if isinstance(scales, NestedScales):
    kind = f"double quantization in blocks of {scales.block_size}"
  elif isinstance(scales, TwoLevelScales):
    kind = f"{scales.codes.dtype} scales times {scales.factor.dtype}"
  else:
    kind = f"{scales.dtype} scales"
  return f"{leaf.bits}-bit codes in blocks of {leaf.block_size}, {kind}"


def _place(path: str, tree: Any, sharding: Shardings | None) -> Any:
  """`tree`, the value of the base at `path`, where it belongs."""
  if sharding is None:
    return jax.tree.map(jnp.asarray, tree)

  def put(below, array):
    full = "/".join(filter(None, (path, tree_paths.path_string(below))))
    like = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return jax.device_put(array, sharding(full, like) if callable(sharding) else sharding)

  return jax.tree_util.tree_map_with_path(put, tree)


@dataclasses.dataclass(frozen=True)
class _Matrix:
  """One tensor of the files and its place: the indices of layer (and expert) in our leaf."""

  leaf: str
  name: str
  index: tuple[int, ...]
  shape: tuple[int, ...]
  last: bool


@dataclasses.dataclass(frozen=True)
class _Rows:
  """A run of rows of a tensor, read from the file."""

  matrix: _Matrix
  start: int
  stop: int | None
  last: bool


class _Reader:
  """Reads a whole checkpoint into the tree of `model`."""

  def __init__(
    self,
    tensors: Tensors,
    model: Transformer,
    rules: Mapping[str, Treatment],
    storage_dtype: DTypeLike | None,
    place: Callable[[str, Any], Any],
    from_bitsandbytes: bool,
  ):
    shapes = model_shapes(model)
    self._tensors = tensors
    self._place = place
    self._treatments = treatments(shapes, rules)
    self._shapes = {path: like.shape for path, like in tree_paths.leaves(shapes).items()}
    self._names = families.family(model.config.model_type).names
    self._from_bitsandbytes = from_bitsandbytes
    matrices = {leaf: self._matrices(leaf) for leaf in self._shapes}
    self._check(model.config, matrices)
    self._dtypes = {leaf: self._dtype(leaf, own, storage_dtype) for leaf, own in matrices.items()}
    self.queue = list(itertools.chain.from_iterable(matrices.values()))
    self._flags: collections.deque[tuple[_Rows, jax.Array]] = collections.deque()

  def _matrices(self, leaf: str) -> list[_Matrix]:
    shape, name = self._shapes[leaf], self._names[leaf]
    own = shape[len(families.axes_of(name)) :]
    stored = own[::-1] if leaf.endswith("/kernel") else own
    named = list(families.tensor_names(name, shape))
    return [_Matrix(leaf, one, index, stored, last=index == named[-1][0]) for index, one in named]

  def _check(self, config: TransformerConfig, matrices: Mapping[str, list[_Matrix]]) -> None:
    wanted: dict[str, tuple[int, ...] | None] = {}
    for matrix in itertools.chain.from_iterable(matrices.values()):
      wanted[matrix.name] = matrix.shape
      if self._packed(matrix.name):
        wanted |= dict.fromkeys(bitsandbytes.names(self._tensors, matrix.name))
    tied = self._names["head/kernel"] if config.tie_embeddings else None
    self._tensors.check(wanted, ignored=[tied] if tied else ())
    if self._from_bitsandbytes and not any(map(self._packed, wanted)):
      raise ValueError(
        f"{self._tensors.directory}: config.json says bitsandbytes' 4 bits, and no tensor is packed"
      )
    for matrix in itertools.chain.from_iterable(matrices.values()):
      if not self._packed(matrix.name):
        self._tensors.float_dtype(matrix.name)
    if tied:
      self._tensors.check_tied(tied, self._names["embed/embedding"])

  def _packed(self, name: str) -> bool:
    return self._from_bitsandbytes and bitsandbytes.is_packed(self._tensors, name)

  def _dtype(
    self, leaf: str, matrices: list[_Matrix], storage_dtype: DTypeLike | None
  ) -> np.dtype | None:
    """What a leaf that is not quantized is stored in; None of one that is."""
    treatment = self._treatments[leaf]
    packed_ones = [self._packed(matrix.name) for matrix in matrices]
    if any(packed_ones):
      if not all(packed_ones):
        name = matrices[packed_ones.index(False)].name
        raise ValueError(
          f"{self._tensors.where(name)}: not packed, where other layers of {leaf} are; layers of "
          "one stack share a form"
        )
      return None
    is_matrix = len(matrices[0].shape) >= 2
    if isinstance(treatment, QuantizationConfig) and is_matrix:
      return None
    if treatment is not None and not isinstance(treatment, QuantizationConfig):
      return jnp.dtype(treatment)
    if storage_dtype is not None:
      return jnp.dtype(storage_dtype)
    # Layers of unlike dtypes share the one that holds them all.
    dtypes = {self._tensors.float_dtype(matrix.name) for matrix in matrices}
    return dtypes.pop() if len(dtypes) == 1 else jnp.dtype(jnp.float32)

  def stored(self) -> dict[str, Any]:
    """The tree of a dense checkpoint, left in its files."""
    names: dict[str, dict[tuple[int, ...], str]] = {}
    for matrix in self.queue:
      names.setdefault(matrix.leaf, {})[matrix.index] = matrix.name
    leaves = {}
    for leaf, own in names.items():
      dtype = self._dtypes[leaf]
      assert dtype is not None
      shape, transposed = self._shapes[leaf], leaf.endswith("/kernel")
      leaves[leaf] = StoredArray(self._tensors, own, shape, dtype, transposed)
    return tree_paths.nest(leaves)

  def read(self, progress: bool) -> dict[str, Any]:
    """The tree."""
    frozen: dict[str, Any] = {}
    stack: Any = None
    total = sum(self._bytes(matrix) for matrix in self.queue)
    bar = tqdm.tqdm(
      total=total, unit="B", unit_scale=True, desc="reading", disable=None if progress else True
    )
    with bar, contextlib.closing(self._ahead(self._runs())) as runs:
      for rows, value in runs:
        matrix = rows.matrix
        if stack is None:
          stack = self._stack(matrix)
        stack.write(rows, value, self._flags)
        del value  # else it would be held while the next is read
        self._settle(_IN_FLIGHT)
        if rows.last:
          bar.update(self._bytes(matrix))
          if matrix.last:
            frozen[matrix.leaf] = self._place(matrix.leaf, stack.value)
            stack = None
    self._settle(0)
    return tree_paths.nest(frozen)

  def _bytes(self, matrix: _Matrix) -> int:
    if self._packed(matrix.name):
      return math.prod(matrix.shape) // 2
    return math.prod(matrix.shape) * self._tensors.float_dtype(matrix.name).itemsize

  def _stack(self, matrix: _Matrix) -> "_Stack":
    shape, leaf = self._shapes[matrix.leaf], matrix.leaf
    if self._packed(matrix.name):
      return _PackedStack(shape[: len(matrix.index)])
    dtype = self._dtypes[leaf]
    transposed = leaf.endswith("/kernel")
    if dtype is not None:
      return _DenseStack(shape, dtype, transposed)
    treatment = self._treatments[leaf]
    assert isinstance(treatment, QuantizationConfig)
    return _QuantizedStack(shape, treatment, transposed)

  def _runs(self) -> Iterator[_Rows]:
    """The runs of rows in the order in which they are written."""
    for matrix in self.queue:
      if self._packed(matrix.name) or not self._by_rows(matrix):
        yield _Rows(matrix, 0, None, True)
        continue
      rows, *rest = matrix.shape
      size = math.prod(rest) * self._tensors.float_dtype(matrix.name).itemsize
      # Of one size, where it can be: each size is a program of its own.
      parts = -(-rows // max(1, _CHUNK_BYTES // max(size, 1)))
      step = -(-rows // parts)
      for start in range(0, rows, step):
        yield _Rows(matrix, start, min(start + step, rows), start + step >= rows)

  def _by_rows(self, matrix: _Matrix) -> bool:
    """Whether rows of the file can be treated a few at a time.

    Those of a quantized kernel are columns of ours, which most formats treat each by itself.
    """
    treatment = self._treatments[matrix.leaf]
    if self._dtypes[matrix.leaf] is not None:
      return True
    assert isinstance(treatment, QuantizationConfig)
    return matrix.leaf.endswith("/kernel") and treatment.by_columns

  def _read_rows(self, rows: _Rows) -> Any:
    name = rows.matrix.name
    if self._packed(name):
      return bitsandbytes.read(self._tensors, name, rows.matrix.shape)
    return self._tensors.rows(name, rows.start, rows.stop)

  def _ahead(self, runs: Iterable[_Rows]) -> Generator[tuple[_Rows, Any]]:
    """The runs with what was read of each, reading the next ones meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(_READ_AHEAD, "reader") as pool:
      pending: collections.deque[tuple[_Rows, concurrent.futures.Future]] = collections.deque()
      try:
        for rows in runs:
          pending.append((rows, pool.submit(self._read_rows, rows)))
          if len(pending) > _READ_AHEAD:
            rows, future = pending.popleft()
            yield rows, future.result()
            del future
        while pending:
          rows, future = pending.popleft()
          yield rows, future.result()
          del future
      finally:
        for _, future in pending:
          future.cancel()

  def _settle(self, in_flight: int) -> None:
    """Waits until at most so many runs are under way, and refuses those that were out of range."""
    while len(self._flags) > in_flight:
      rows, good = self._flags.popleft()
      if not bool(good):
        self._refuse(rows)

  def _refuse(self, rows: _Rows) -> None:
    values = np.asarray(self._read_rows(rows), np.float32)
    dtype = self._dtypes[rows.matrix.leaf]
    if dtype is None:
      bad, limit = ~np.asarray(in_range(jnp.asarray(values))), "2^106"
    else:
      with np.errstate(over="ignore"):
        bad, limit = ~np.isfinite(values.astype(dtype)), f"what {dtype} holds"
    row, *rest = (int(i) for i in np.argwhere(bad)[0])
    found = float(values[(row, *rest)])
    rule = "is not finite" if not math.isfinite(found) else f"is {found}, beyond {limit}"
    raise ValueError(
      f"{self._tensors.where(rows.matrix.name)}: the value at index {[rows.start + row, *rest]} "
      f"{rule}"
    )


class _Stack:
  """A leaf of the base that is being written."""

  value: Any

  def write(self, rows: _Rows, value: Any, flags: collections.deque) -> None:
    """Writes a run of rows, and appends (rows, whether all values were good) to `flags`."""
    raise NotImplementedError


class _DenseStack(_Stack):
  """Of plain arrays."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, transposed: bool):
    self.value = jnp.zeros(shape, dtype)
    self._transposed = transposed

  def write(self, rows, value, flags):
    start = rows.matrix.index, rows.start
    self.value, good = _write_dense(self.value, jnp.asarray(value), *start, self._transposed)
    flags.append((rows, good))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write_dense(stack, rows, index, start, transposed):
  value = (rows.T if transposed else rows).astype(stack.dtype)
  good = jnp.isfinite(value).all()
  at = (0, start) if transposed else (start, *[0] * (value.ndim - 1))
  return stacks.put(stack, value, index, at), good


class _QuantizedStack(_Stack):
  """Of packed weights."""

  def __init__(
    self,
    shape: tuple[int, ...],
    config: QuantizationConfig,
    transposed: bool,
  ):
    like = jax.eval_shape(
      lambda w: quantize_by(w, config), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    self.value = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    self._config = config
    self._transposed = transposed
    self._scales: jax.Array | None = None

  def write(self, rows, value, flags):
    index = rows.matrix.index
    value = jnp.asarray(value)
    if rows.last and rows.start == 0:
      self.value, good = _write_matrix(self.value, value, index, self._config, self._transposed)
    elif not self._config.double_quantization:
      self.value, good = _write_columns(self.value, value, index, rows.start, self._config)
    else:
      # The scales of a matrix are quantized together, once all are there.
      if self._scales is None:
        *_, blocks, n = self.value.scales.shape
        self._scales = jnp.zeros((blocks, n), jnp.float32)
      single = dataclasses.replace(self._config, double_quantization=False)
      self.value, self._scales, good = _write_columns_beside(
        self.value, self._scales, value, index, rows.start, single
      )
      if rows.last:
        self.value = _write_scales(self.value, self._scales, index)
    flags.append((rows, good))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _write_matrix(stack, rows, index, config, transposed):
  good = in_range(rows).all()
  one = quantize_by(rows.T if transposed else rows, config)
  return stacks.put_whole(stack, one, index), good


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write_columns(stack, rows, index, start, config):
  good = in_range(rows).all()
  one = quantize_by(rows.T, config)
  return _put_columns(stack, one, index, start), good


def _put_columns(stack: Any, one: Any, index: tuple, start: Any) -> Any:
  def put(stack, x):
    # All have the weight's columns last, but the table.
    return stacks.put(stack, x, index, (0, start) if x.ndim == 2 else (0,))

  return jax.tree.map(put, stack, one)


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=5)
def _write_columns_beside(stack, scales, rows, index, start, config):
  """`_write_columns`, but for the scales, which go to an array of their own."""
  good = in_range(rows).all()
  one = quantize_by(rows.T, config)
  assert isinstance(one.scales, jax.Array)
  scales = stacks.put(scales, one.scales, (), (0, start))
  rest = _put_columns(
    dataclasses.replace(stack, scales=None), dataclasses.replace(one, scales=None), index, start
  )
  return dataclasses.replace(rest, scales=stack.scales), scales, good


@functools.partial(jax.jit, donate_argnums=0)
def _write_scales(stack, scales, index):
  nested = nest_scales(scales, stack.scales.block_size)
  return dataclasses.replace(stack, scales=stacks.put_whole(stack.scales, nested, index))


class _PackedStack(_Stack):
  """Of weights that the file has packed."""

  def __init__(self, leading: tuple[int, ...]):
    self.value = None
    self._leading = leading

  def write(self, rows, value, flags):
    del flags
    if self.value is None:
      self.value = stacks.empty(self._leading, value)
    try:
      self.value = stacks.write_whole(self.value, value, rows.matrix.index)
    except ValueError as error:
      # Unlike tree structures: the layers are packed in different ways.
      raise ValueError(
        f"{rows.matrix.name}: packed otherwise than the layers before it: {error}"
      ) from None

"""bitsandbytes' 4-bit weights, to and from ours: the one place that converts their order.

bitsandbytes flattens torch's weight `[out, in]` row by row, cuts the flat array into blocks and
packs two codes a byte, the first in the high nibble. Where the block size divides `in`, such a
block is B weights along K of our `[K, N] = [in, out]`, so that the two hold the same codes and
scales in another order, and nothing is rounded again.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax import codebooks
from qlora_jax.hf.tensors import Tensors
from qlora_jax.quantized_tensor import (
  AnyQuantizedTensor,
  FlatQuantizedTensor,
  NestedScales,
  OutlierQuantizedTensor,
  QuantizedTensor,
  RotatedQuantizedTensor,
  innermost,
  is_quantized,
  join_rows,
  pack,
  restore_scales,
  unpack,
)

# Our codes index levels in ascending order → bitsandbytes' code of the same level.
_CODES = {
  "nf4": np.arange(16, dtype=np.uint8),
  # Its FP4 codes are sign and magnitude: 8 is −0, and 0 … 7 do not ascend.
  "fp4": np.asarray([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def quant_type(q: AnyQuantizedTensor) -> str:
  """bitsandbytes' name of the table of `q`: "nf4" or "fp4".

  Raises:
    ValueError: another table, by its name where it is one of ours. bitsandbytes ignores the table
      in a file and decodes by its own. Outliers or a rotation, which its files have no place for.
  """
  q = _codes_of(q)
  levels = np.asarray(q.levels)
  if q.zero is None and q.bits == 4:
    for name in _CODES:
      if np.array_equal(levels, codebooks.get(name).table):
        return name
  name = codebooks.name_of(levels, q.block_size) or "a custom table"
  raise ValueError(f"to_bitsandbytes: codebook {name}: bitsandbytes decodes nf4 and fp4 alone")


def _codes_of(q: AnyQuantizedTensor) -> QuantizedTensor:
  if isinstance(q, OutlierQuantizedTensor | RotatedQuantizedTensor):
    what = "outliers in 16 bits" if isinstance(q, OutlierQuantizedTensor) else "a rotation"
    raise ValueError(f"to_bitsandbytes: {what} beside the codes; its files have no place for that")
  return innermost(q)


def to_bitsandbytes(q: AnyQuantizedTensor) -> dict[str, np.ndarray]:
  """The arrays of a packed weight in bitsandbytes' order.

  Args:
    q: one matrix `[K, N]`, NF4 or FP4. It stands for torch's `[out, in] = [N, K]`.

  Returns:
    `packed` uint8 `[ceil(K · N / 2), 1]`; `absmax` float32 `[ceil(K / B) · N]`, or, doubly
    quantized, its codes in uint8 with `nested_absmax` float32 and `nested_offset` float32 `[]`.

  Raises:
    TypeError: not a QuantizedTensor.
    ValueError: a stack, another table, a block size that bitsandbytes lacks, or one that does not
      divide K where N > 1.
  """
  if not is_quantized(q):
    raise TypeError(f"to_bitsandbytes: {type(q).__name__}; a QuantizedTensor is wanted")
  if q.ndim != 2:
    raise ValueError(f"to_bitsandbytes: {list(q.shape)}; one matrix [K, N] at a time")
  kind = quant_type(q)
  q = _codes_of(q)
  _check_block_size("to_bitsandbytes", q.block_size)
  if q.shape[0] % q.block_size and q.shape[1] > 1:
    raise ValueError(
      f"to_bitsandbytes: in {q.shape[0]} is not a multiple of block_size {q.block_size}: "
      "bitsandbytes' blocks then cross from row to row, and this weight's end with each; quantize "
      "with a block size that divides it"
    )
  codes = np.asarray(join_rows(unpack(q.codes, q.bits, q.padding), 0))
  flat = _CODES[kind][codes].T.reshape(-1)
  if len(flat) % 2:
    # bitsandbytes fills the last byte up with a quantized 0.
    zero = _CODES[kind][codebooks.get(kind).levels.index(0.0)]
    flat = np.append(flat, zero)
  arrays = {"packed": ((flat[::2] << 4) | flat[1::2])[:, None]}
  if not isinstance(q.scales, NestedScales):
    return {**arrays, "absmax": np.asarray(restore_scales(q.scales)).T.reshape(-1)}
  return {
    **arrays,
    "absmax": np.asarray(q.scales.codes).T.reshape(-1),
    # Ours is already in this order.
    "nested_absmax": np.asarray(q.scales.absmax),
    "nested_offset": np.asarray(q.scales.offset),
  }


def from_bitsandbytes(
  packed: np.ndarray,
  absmax: np.ndarray,
  *,
  shape: Sequence[int],
  quant_type: str,
  block_size: int,
  nested_absmax: np.ndarray | None = None,
  nested_offset: float | np.ndarray | None = None,
  nested_block_size: int = 256,
) -> AnyQuantizedTensor:
  """The packed weight that bitsandbytes' arrays stand for, code for code.

  Args:
    packed: the bytes, in any shape and dtype.
    absmax: float32, or uint8 where doubly quantized.
    shape: torch's, `[out, in]`.
    quant_type: "nf4" or "fp4".
    block_size: weights that share an absmax.
    nested_absmax, nested_offset: both, where absmax is uint8.
    nested_block_size: scales that share a nested absmax.

  Returns:
    `[K, N] = [in, out]`; a FlatQuantizedTensor where blocks cross from row to row.

  Raises:
    ValueError: another table; arrays whose sizes or dtypes do not fit.
  """
  if quant_type not in _CODES:
    raise ValueError(f"from_bitsandbytes: quant_type {quant_type!r}; one of {', '.join(_CODES)}")
  if len(shape) != 2 or min(shape) < 1:
    raise ValueError(f"from_bitsandbytes: shape {list(shape)}; a weight is [out, in]")
  n, k = shape
  _check_block_size("from_bitsandbytes", block_size)
  if k % block_size and n > 1:
    flat = from_bitsandbytes(
      packed,
      absmax,
      shape=(1, n * k),
      quant_type=quant_type,
      block_size=block_size,
      nested_absmax=nested_absmax,
      nested_offset=nested_offset,
      nested_block_size=nested_block_size,
    )
    assert isinstance(flat, QuantizedTensor)
    return FlatQuantizedTensor(flat, n)
  count, blocks = n * k, -(-k // block_size)
  # Files may hold the bytes as another dtype (bnb_4bit_quant_storage).
  packed = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
  absmax = np.asarray(absmax).reshape(-1)
  nested = nested_absmax is not None
  sizes = [("packed", packed, np.uint8, -(-count // 2))]
  sizes += [("absmax", absmax, np.uint8 if nested else np.float32, blocks * n)]
  if nested:
    nested_absmax = np.asarray(nested_absmax).reshape(-1)
    expected = -(-blocks * n // nested_block_size)
    sizes += [("nested_absmax", nested_absmax, np.float32, expected)]
  for name, array, dtype, size in sizes:
    if array.dtype != dtype or array.size != size:
      raise ValueError(
        f"from_bitsandbytes: {name}: {array.dtype} [{array.size}]; {list(shape)} in blocks of "
        f"{block_size} takes {np.dtype(dtype)} [{size}]"
      )
  if nested != (nested_offset is not None):
    raise ValueError("from_bitsandbytes: nested_absmax and nested_offset come together")

  flat = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
  codes = np.argsort(_CODES[quant_type]).astype(np.uint8)[flat].reshape(n, k).T
  own, padding = pack(jnp.asarray(codes), 4)
  scales = jnp.asarray(absmax.reshape(n, blocks).T)
  if nested_absmax is not None:
    offset = jnp.asarray(nested_offset, jnp.float32)
    scales = NestedScales(scales, jnp.asarray(nested_absmax), offset, nested_block_size)
  return QuantizedTensor(
    codes=own,
    scales=scales,
    levels=jnp.asarray(codebooks.get(quant_type).table),
    zero=None,
    bits=4,
    block_size=block_size,
    padding=padding,
  )


def _check_block_size(where: str, block_size: int) -> None:
  if block_size not in BLOCK_SIZES:
    raise ValueError(
      f"{where}: block_size {block_size}; bitsandbytes has {', '.join(map(str, BLOCK_SIZES))}"
    )


# What lies beside a packed weight in a file, under its name.
_STATE = "quant_state.bitsandbytes__"
_ARRAYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# Of a packed weight in a file, with itself and its state.
MOST_ARRAYS = len(_ARRAYS) + 2


def _table(kind: str) -> np.ndarray:
  """The levels in the order of bitsandbytes' codes."""
  return codebooks.get(kind).table[np.argsort(_CODES[kind])]


def is_packed(tensors: Tensors, name: str) -> bool:
  """Whether the weight `name` of a checkpoint is one that bitsandbytes packed."""
  return any(f"{name}.{_STATE}{kind}" in tensors for kind in _CODES)


def names(tensors: Tensors, name: str) -> list[str]:
  """The tensors that a packed weight consists of, itself included."""
  beside = [f"{name}.{key}" for key in (*_ARRAYS, *(_STATE + kind for kind in _CODES))]
  return [name, *(key for key in beside if key in tensors)]


def state(tensors: Tensors, name: str) -> dict[str, Any]:
  """What bitsandbytes says of the packed weight `name`: its table, blocks and shape."""
  key = next(key for key in names(tensors, name) if _STATE in key)
  try:
    told = json.loads(bytes(tensors.get(key)).decode())
  except ValueError as error:
    raise ValueError(f"{tensors.where(key)}: not JSON ({error})") from None
  if not isinstance(told, dict):
    raise ValueError(f"{tensors.where(key)}: a JSON {type(told).__name__}; an object is wanted")
  return told


def read(tensors: Tensors, name: str, shape: tuple[int, ...]) -> AnyQuantizedTensor:
  """The packed weight `name`, code for code.

  Args:
    shape: `[out, in]`, which its state must agree with.

  Returns:
    `[K, N] = [in, out]`.

  Raises:
    ValueError: a state that is not whole or does not fit; the message names file and tensor.
  """
  where = tensors.where(name)
  told = state(tensors, name)
  try:
    if tuple(told["shape"]) != tuple(shape):
      raise ValueError(f"shape {told['shape']}; the config asks for {list(shape)}")
    nested = f"{name}.nested_absmax" in tensors
    kind = told["quant_type"]
    beside = {}
    for key in _ARRAYS if nested else _ARRAYS[:2]:
      if f"{name}.{key}" not in tensors:
        raise ValueError(f"{key} is missing beside it")
      beside[key] = tensors.get(f"{name}.{key}")
      if not np.isfinite(beside[key]).all():
        raise ValueError(f"{key} holds a value that is not finite")
    if nested and not np.allclose(beside["nested_quant_map"], codebooks.dynamic_map(), atol=1e-6):
      raise ValueError("its nested_quant_map is not bitsandbytes' dynamic map")
    # bitsandbytes decodes by its own table, whatever the file says.
    if kind in _CODES and not np.allclose(beside["quant_map"], _table(kind), atol=1e-6):
      raise ValueError(f"its quant_map is not the table of {kind}")
    return from_bitsandbytes(
      tensors.get(name),
      beside["absmax"],
      shape=told["shape"],
      quant_type=kind,
      block_size=told["blocksize"],
      nested_absmax=beside.get("nested_absmax"),
      nested_offset=told["nested_offset"] if nested else None,
      nested_block_size=told.get("nested_blocksize", 256),
    )
  except KeyError as error:
    raise ValueError(f"{where}: its quant_state lacks {error}") from None
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None


def arrays(name: str, q: AnyQuantizedTensor, dtype: str) -> dict[str, np.ndarray]:
  """The tensors of a file for the packed weight `name`: the inverse of `read`.

  Args:
    q: `[K, N]`.
    dtype: that bitsandbytes is to decode to, "bfloat16", "float16" or "float32".

  Raises:
    ValueError: see `to_bitsandbytes`.
  """
  kind = quant_type(q)
  own = to_bitsandbytes(q)
  n, k = q.shape[::-1]
  told = {"quant_type": kind, "blocksize": q.block_size, "dtype": dtype, "shape": [n, k]}
  tensors = {
    name: own["packed"],
    f"{name}.absmax": own["absmax"],
    f"{name}.quant_map": _table(kind),
  }
  if isinstance(q.scales, NestedScales):
    if q.scales.block_size != 256:
      raise ValueError(
        f"{name}: nested blocks of {q.scales.block_size}; bitsandbytes computes with 256 alone"
      )
    told |= {
      "nested_blocksize": q.scales.block_size,
      "nested_dtype": "float32",
      "nested_offset": float(own["nested_offset"]),
    }
    tensors[f"{name}.nested_absmax"] = own["nested_absmax"]
    tensors[f"{name}.nested_quant_map"] = codebooks.dynamic_map()
  text = json.dumps(told).encode()
  tensors[f"{name}.{_STATE}{kind}"] = np.frombuffer(text, np.uint8)
  return tensors

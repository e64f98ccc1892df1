"""quantized_matmul on a GPU: which kernel serves which rows.

Few rows are multiplied by codes that are decoded in registers: up to `MOST_FEW_ROWS` by warps
(`gpu_few_rows`), up to `MOST_TILED_ROWS` by warpgroups on a Hopper (`gpu_tiles`). For more, and
where these kernels do not serve the case, the weight is dequantized once (`gpu_dequantize`) and the
library multiplies. Both directions read the same codes. Shapes that were measured on the device are
served as was fastest there (`tuning`).

The library's products of 16 bits are asked for results of 16 bits: asked for float32, to be rounded
after it, they took 15% longer on an H100.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.matmul import stacked, target, tuning
from qlora_jax.quantized_tensor import AnyQuantizedTensor, QuantizedTensor

# Up to which each takes the least time (`python -m experiments.bench.matmul`), by the rule.
MOST_FEW_ROWS = 16
MOST_TILED_ROWS = 512
# As `MOST_FEW_ROWS`, where tiles do not serve.
_MOST_BY_WARPS = 64


def unsupported(x: jax.Array, w: AnyQuantizedTensor) -> str | None:
  """Why these kernels cannot serve the product, or None."""
  del x
  if reason := target.unsupported(w, "gpu", "cuda"):
    return reason
  device = target.target()[1]
  if capability(device) is None:
    return f"{device.device_kind} is no NVIDIA GPU"
  return None


def forward(x: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., K] · [K, N] → [..., N]`, accumulated in float32, in x's dtype."""
  k, n = w.shape
  rows = x.reshape(-1, k)
  assert isinstance(w, QuantizedTensor)
  kernel, reason = fused(rows, w)
  if kernel is not None:
    return kernel(rows, w).reshape(*x.shape[:-1], n)
  if reason is not None:
    _announce(reason)
  return _dequantized_product(x, w)


def input_gradient(g: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., N] · [K, N]ᵀ → [..., K]`, in g's dtype."""
  return _dequantized_product(g, w, transposed=True)


def fuses_adapter(x: jax.Array, w: AnyQuantizedTensor, rank: int) -> bool:
  """Whether `adapted_forward` serves these: where the weight is written down, and rank is small."""
  from qlora_jax.matmul import gpu_dequantize

  return (
    x.dtype != jnp.float32
    and isinstance(w, QuantizedTensor)
    and _rows(x) > _MOST_BY_WARPS
    # The rule alone: what was measured on the device was a weight without an adapter.
    and by_rule(jax.ShapeDtypeStruct((_rows(x), w.shape[0]), x.dtype), w)[0] is None
    and gpu_dequantize.takes_adapter(w, rank)
  )


def adapted_forward(x: jax.Array, w: AnyQuantizedTensor, a: jax.Array, b: jax.Array) -> jax.Array:
  """`[..., K] · ([K, N] + [K, r] · [r, N]) → [..., N]`, in x's dtype."""
  return _dequantized_product(x, w, (a, b))


def adapted_input_gradient(
  g: jax.Array, w: AnyQuantizedTensor, a: jax.Array, b: jax.Array
) -> jax.Array:
  """`[..., N] · ([K, N] + [K, r] · [r, N])ᵀ → [..., K]`, in g's dtype."""
  return _dequantized_product(g, w, (a, b), transposed=True)


def _rows(x: jax.Array) -> int:
  return x.size // x.shape[-1]


def _dequantized_product(
  x: jax.Array,
  w: AnyQuantizedTensor,
  adapter: tuple[jax.Array, jax.Array] | None = None,
  *,
  transposed: bool = False,
) -> jax.Array:
  """The library's product of x and the dequantized weight, in x's dtype."""
  from qlora_jax.matmul import gpu_dequantize

  assert isinstance(w, QuantizedTensor)
  tiles = dequantize_tiles(w) if adapter is None else gpu_dequantize.Tiles()
  # The barrier ties the weight to this x: see `xla.forward`. Of a layer that is read from its
  # stack, the number alone: the slice is not to be made.
  stack = gpu_dequantize.readable_stack(w)
  if stack is None:
    x, tied, adapter = jax.lax.optimization_barrier((x, stacked.without(w), adapter))
  else:
    x, index, adapter = jax.lax.optimization_barrier((x, stack.index, adapter))
    tied = dataclasses.replace(w, stack=dataclasses.replace(stack, index=index))
  dense = gpu_dequantize.dequantize(tied, x.dtype, tiles, adapter=adapter)
  # One row, asked for 16 bits, was off by more than their rounding (XLA, on an H100).
  wanted = jnp.float32 if _rows(x) <= _MOST_BY_WARPS else x.dtype
  product = jnp.matmul(x, dense.T if transposed else dense, preferred_element_type=wanted)
  return product.astype(x.dtype)


def dequantize_tiles(w: QuantizedTensor) -> Any:
  """The tiles that `w`, `[K, N]`, is dequantized by: as was measured on this device, or any."""
  from qlora_jax.matmul import gpu_dequantize

  tuned = tuning.find(target.target()[1].device_kind, w)
  return gpu_dequantize.Tiles(**({} if tuned is None else tuned.tiles))


def fused(x: Any, w: QuantizedTensor) -> tuple[Callable | None, str | None]:
  """The kernel that decodes what it multiplies, `kernel(x, w)`; or why few rows have none.

  Neither, where dequantizing first takes less time. As was measured on this device (`tuning`), or
  by the rule.

  Args:
    x: `[M, K]`, of a shape and dtype. w: `[K, N]`.
  """
  from qlora_jax.matmul import gpu_few_rows, gpu_tiles

  tuned = tuning.find(target.target()[1].device_kind, w, x.shape[0])
  if tuned is None:
    return by_rule(x, w)
  if tuned.kernel == "dequantize":
    return None, None
  kernels = {"few_rows": gpu_few_rows, "tiles": gpu_tiles}
  kernel: Any = kernels[tuned.kernel]
  tiles = kernel.Tiles(**tuned.tiles)
  if kernel.unsupported(x, w, tiles) is not None:
    return by_rule(x, w)
  return functools.partial(kernel.product, tiles=tiles), None


def by_rule(x: Any, w: QuantizedTensor) -> tuple[Callable | None, str | None]:
  """As `fused`, of shapes and devices that were not measured."""
  from qlora_jax.matmul import gpu_few_rows, gpu_tiles

  rows = x.shape[0]
  device = target.target()[1]
  version = capability(device) or 0.0
  if MOST_FEW_ROWS < rows <= MOST_TILED_ROWS and 9 <= version < 10:
    tiles = gpu_tiles.default_tiles(rows, w)
    reason = gpu_tiles.unsupported(x, w, tiles)
    if reason is None:
      return functools.partial(gpu_tiles.product, tiles=tiles), None
    if rows > _MOST_BY_WARPS:
      return None, reason
  if not 1 <= rows <= _MOST_BY_WARPS:
    return None, None
  if not runs_thread_programs(device):
    return None, f"{device.device_kind}: its kernel is for Hopper and the data centre's Blackwell"
  tiles = gpu_few_rows.default_tiles(rows, w)
  if reason := gpu_few_rows.unsupported(x, w, tiles):
    return None, reason
  return functools.partial(gpu_few_rows.product, tiles=tiles), None


def runs_thread_programs(device: Any) -> bool:
  """Whether kernels that are said by thread (`gpu_threads`) can be compiled for it."""
  return 9 <= (capability(device) or 0.0) < 12


# Of devices that are not there, which cannot be asked.
_CAPABILITIES = {"H100": 9.0, "H200": 9.0, "H800": 9.0, "H20": 9.0, "B200": 10.0, "B300": 10.3}


def capability(device: Any) -> float | None:
  """An NVIDIA GPU's compute capability; None of any other device."""
  present = [each for each in jax.devices() if each.device_kind == device.device_kind]
  for each in (device, *present):
    if text := getattr(each, "compute_capability", None):
      try:
        return float(text)
      except ValueError:  # AMD's are names.
        return None
  if "NVIDIA" not in device.device_kind:
    return None
  return next((value for name, value in _CAPABILITIES.items() if name in device.device_kind), 8.0)


@functools.cache
def _announce(reason: str) -> None:
  """Says once why few rows take longer than they could."""
  warnings.warn(
    f"quantized_matmul: a product of few rows dequantizes its weight first ({reason})", stacklevel=2
  )

"""quantized_matmul on a GPU: which kernel serves which rows.

Few rows are multiplied by codes that are decoded in registers (`gpu_few_rows`). For more the weight
is dequantized once (`gpu_dequantize`) and the library multiplies. Both directions read the same
codes. The library's products of 16 bits accumulate in float32; asked for a float32 result, to be
rounded after it, they took 15% longer on an H100.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax.quantized_tensor import AnyQuantizedTensor, QuantizedTensor

# The first JAX whose Pallas these kernels were written for and run with.
_LEAST_JAX = (0, 11, 2)

# Above it, dequantizing once and the library's product take less time
# (`python -m experiments.bench.matmul`).
MOST_FEW_ROWS = 64


def unsupported(x: jax.Array, w: AnyQuantizedTensor) -> str | None:
  """Why these kernels cannot serve the product, or None."""
  del x
  if jax.__version_info__ < _LEAST_JAX:
    least = ".".join(map(str, _LEAST_JAX))
    return f"it needs JAX {least}; this is {jax.__version__}"
  platform, _ = _device()
  if platform not in ("gpu", "cuda"):
    return f"the computation is for a {platform}"
  if not isinstance(w, QuantizedTensor):
    return "blocks cross from output to output (a bitsandbytes weight whose K they do not divide)"
  if w.size >= 2**31:
    return f"{w.size} weights; fewer than 2^31, which its indices count to"
  return None


def forward(x: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., K] · [K, N] → [..., N]`, accumulated in float32, in x's dtype."""
  k, n = w.shape
  rows = x.reshape(-1, k)
  if kernel := _few_rows(rows, w):
    return kernel(rows, w).reshape(*x.shape[:-1], n)
  # The barrier ties the weight to this x: see `xla.forward`.
  x, w = jax.lax.optimization_barrier((x, w))
  return jnp.matmul(x, _dequantize(w, x.dtype))


def input_gradient(g: jax.Array, w: AnyQuantizedTensor) -> jax.Array:
  """`[..., N] · [K, N]ᵀ → [..., K]`, in g's dtype."""
  g, w = jax.lax.optimization_barrier((g, w))
  return jnp.matmul(g, _dequantize(w, g.dtype).T)


def _dequantize(w: AnyQuantizedTensor, dtype: DTypeLike) -> jax.Array:
  from qlora_jax.matmul import gpu_dequantize

  assert isinstance(w, QuantizedTensor)
  return gpu_dequantize.dequantize(w, dtype)


def _few_rows(x: jax.Array, w: AnyQuantizedTensor) -> Any:
  """The kernel for a few rows, or None where it does not serve these."""
  assert isinstance(w, QuantizedTensor)
  if not 1 <= x.shape[0] <= MOST_FEW_ROWS:
    return None
  from qlora_jax.matmul import gpu_few_rows

  tiles = gpu_few_rows.default_tiles(x.shape[0], w)
  if gpu_few_rows.unsupported(x, w, tiles):
    return None
  kind = _device()[1]
  if not _has_mosaic(kind):
    _announce(kind)
    return None
  return functools.partial(gpu_few_rows.product, tiles=tiles)


def _device() -> tuple[str, Any]:
  """The platform that is traced for, and its device."""
  # A program can be lowered for a GPU that is not there.
  if device := jax.sharding.get_abstract_mesh().abstract_device:
    return device.platform or jax.default_backend(), device
  return jax.default_backend(), jax.devices()[0]


def _has_mosaic(device: Any) -> bool:
  """Whether Pallas' Mosaic route serves the GPU: Hopper and later."""
  if capability := getattr(device, "compute_capability", None):
    return float(capability) >= 9
  return any(
    name in device.device_kind for name in ("H100", "H200", "GH200", "H800", "H20", "B200")
  )


@functools.cache
def _announce(device: Any) -> None:
  warnings.warn(
    f"quantized_matmul: {device.device_kind} is older than Hopper: products of few rows dequantize "
    "the weight first, and take several times as long as they could",
    stacklevel=2,
  )

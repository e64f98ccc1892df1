"""Which implementation serves which codebook: the README's table, from the registry.

  python -m experiments.served

Each implementation is asked about a weight of each codebook, on a device of its own that need not
be there. Kernels need the JAX that they were written for; below it this says so.
"""

import collections
import sys

import jax
import jax.numpy as jnp

from qlora_jax import codebooks, quantize
from qlora_jax.matmul import gpu
from qlora_jax.matmul.api import IMPLEMENTATIONS

# Columns: the title, the registry's name, the device, and rows of x.
_GPU = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
_TPU = jax.sharding.AbstractDevice("TPU v5e", num_cores=1, platform="tpu")
_CPU = jax.sharding.AbstractDevice("cpu", num_cores=None, platform="cpu")
_COLUMNS = (
  (f"`gpu`, to {gpu.MOST_FEW_ROWS} rows", "gpu", _GPU, 16),
  (f"to {gpu.MOST_TILED_ROWS}", "gpu", _GPU, 256),
  ("more", "gpu", _GPU, gpu.MOST_TILED_ROWS + 1),
  ("`tpu`", "tpu", _TPU, 256),
  ("`xla`", "xla", _CPU, 256),
)
_SIZE = 256


def answer(codebook: str, name: str, device: jax.sharding.AbstractDevice, rows: int) -> str:
  """ "yes", or what happens instead."""
  block_size = next(size for size in (64, 32, 16) if _has(codebook, size))
  shape = jax.ShapeDtypeStruct((_SIZE, _SIZE), jnp.float32)
  w = jax.eval_shape(
    lambda w: quantize(w, codebook=codebook, block_size=block_size, double_quantization=False),
    shape,
  )
  x = jax.ShapeDtypeStruct((rows, _SIZE), jnp.bfloat16)
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    if IMPLEMENTATIONS[name].unsupported(x, w) is not None:  # pyright: ignore[reportArgumentType]
      return "no"
    if name == "gpu" and rows <= gpu.MOST_TILED_ROWS and gpu.fused(x, w)[0] is None:
      return "as more"
  return "yes"


def _has(codebook: str, block_size: int) -> bool:
  try:
    codebooks.get(codebook, block_size)
  except ValueError:
    return False
  return True


def table() -> str:
  """Markdown: a row for the codebooks that are served alike."""
  groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
  for codebook in codebooks.names():
    answers = tuple(answer(codebook, *column[1:]) for column in _COLUMNS)
    groups[answers].append(f"`{codebook}`")
  lines = [
    f"| codebook | {' | '.join(title for title, *_ in _COLUMNS)} |",
    "| --- " * (len(_COLUMNS) + 1) + "|",
  ]
  for answers, names in groups.items():
    lines.append(f"| {', '.join(names)} | {' | '.join(answers)} |")
  return "\n".join(lines)


def main() -> int:
  """Prints it."""
  print(table())
  return 0


if __name__ == "__main__":
  sys.exit(main())

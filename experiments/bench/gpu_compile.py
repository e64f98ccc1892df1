"""What the GPU's compiler makes of the kernels and of a training step, where there is no GPU.

  python -m experiments.bench.gpu_compile --out gpu_compile.json [--rows 1,64,…] [--steps ROW …]

XLA compiles for an H100 that is only described, on any machine with the wheels jax-cuda12-plugin,
jax-cuda12-pjrt (of JAX's version) and nvidia-cuda-nvcc-cu12, best in an environment of their own.
Of a kernel it prints registers and bytes spilled, as ptxas counts them; of a step
(`experiments.bench.train_step`'s rows, as llama-8b:4x2048:full) the bytes by `memory_analysis`.
Nothing runs: times are not to be had so.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax import quantize
from qlora_jax.matmul import gpu, specs

_DEVICE = "NVIDIA H100 80GB HBM3"
# XLA's GpuTargetConfigProto, as text: what an H100 SXM reports of itself.
_TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84000000000
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{_DEVICE}"
"""
_ROWS = (1, 4, 16, 32, 64, 128, 256, 512)


def unavailable() -> str | None:
  """Why nothing can be compiled for a GPU here, or None."""
  wanted = {
    "jax_cuda12_plugin": "jax-cuda12-plugin",
    "jax_plugins.xla_cuda12": "jax-cuda12-pjrt",
    "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12",
  }
  try:
    missing = [wheel for name, wheel in wanted.items() if importlib.util.find_spec(name) is None]
  except ModuleNotFoundError as e:  # The package around it.
    missing = [wanted.get(str(e.name), str(e.name))]
  return f"not installed: {', '.join(missing)}" if missing else None


@functools.cache
def _mesh() -> Mesh:
  """Of the one device that is described."""
  if reason := unavailable():
    raise RuntimeError(reason)
  compiler = Path(importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations[0])  # pyright: ignore
  os.environ["PATH"] = f"{compiler / 'bin'}{os.pathsep}{os.environ['PATH']}"
  devices = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config=_TARGET
  ).devices
  return Mesh(devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def compile_for_h100(function: Callable, *arguments: Any) -> Any:
  """`function`, jitted or not, of arguments (arrays, or their shapes), compiled for an H100.

  Raises:
    RuntimeError: the compiler is not installed.
  """
  here = NamedSharding(_mesh(), PartitionSpec())
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), arguments
  )
  # By it the kernels know what they are lowered for.
  device = jax.sharding.AbstractDevice(device_kind=_DEVICE, num_cores=132, platform="gpu")
  abstract = jax.sharding.AbstractMesh(
    (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
  )
  jitted = function if hasattr(function, "trace") else jax.jit(function)
  with jax.sharding.use_abstract_mesh(abstract):
    lowered = jitted.trace(*shapes).lower(lowering_platforms=("cuda",))
  return lowered.compile()


def kernel(function: Callable, *arguments: Any) -> dict[str, int]:
  """Registers a thread and bytes spilled of the one Mosaic kernel of `function`."""
  with tempfile.TemporaryDirectory() as folder:
    asked = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
    os.environ |= asked
    try:
      compile_for_h100(function, *arguments)
    finally:
      for name in asked:
        del os.environ[name]
    (report,) = [path.read_text() for path in Path(folder).glob("*.ptxas")]
  (registers,) = re.findall(r"Used (\d+) registers", report)
  (spilled,) = re.findall(r"stack frame, (\d+) bytes spill stores", report)
  return {"registers": int(registers), "spilled": int(spilled)}


def kernels(rows: Sequence[int]) -> list[dict[str, Any]]:
  """Of all real shapes and those rows that codes decoded in registers are multiplied by."""
  results = []
  for k, n in sorted({(spec.k, spec.n) for spec in specs.REAL}):
    w = jax.eval_shape(lambda k=k, n=n: quantize(jnp.zeros((k, n))))
    for m in rows:
      if m > gpu.MOST_TILED_ROWS:
        raise ValueError(f"rows {m}: at most {gpu.MOST_TILED_ROWS} are multiplied by a kernel")
      x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
      found = {"k": k, "n": n, "m": m, **kernel(gpu.forward, x, w)}
      print(json.dumps(found), flush=True)
      results.append(found)
  return results


def step(row: str) -> dict[str, Any]:
  """The bytes of a training step, a row of `experiments.bench.train_step`."""
  from experiments.bench import train_step

  compiled = compile_for_h100(*train_step.abstract(train_step.Row.parse(row)))
  memory = compiled.memory_analysis()
  found = {
    "row": row,
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "host_temporaries": memory.host_temp_size_in_bytes,
    "peak": memory.peak_memory_in_bytes,
  }
  print(json.dumps(found), flush=True)
  return found


def main(argv: Sequence[str]) -> int:
  """Compiles what `argv` asks for, and writes the JSON."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench.gpu_compile",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--rows", default=",".join(map(str, _ROWS)), help="of x; '' for no kernels")
  parser.add_argument("--steps", nargs="*", default=[], metavar="ROW")
  arguments = parser.parse_args(argv)
  if reason := unavailable():
    print(f"error: {reason}", file=sys.stderr)
    return 2
  names = ("jax", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
  print(
    f"compiled for an H100 with {', '.join(f'{n} {importlib.metadata.version(n)}' for n in names)}"
  )
  report = {
    "compiled_for": _DEVICE,
    "versions": {name: importlib.metadata.version(name) for name in names},
    "kernels": kernels([int(m) for m in arguments.rows.split(",") if m]),
    "steps": [step(row) for row in arguments.steps],
  }
  arguments.out.write_text(json.dumps(report, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

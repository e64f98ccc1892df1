"""The TPU's kernel as its compiler sees it: memory, schedule, decodes, a whole train step.

  python -m experiments.bench.tpu_compile --out tpu.json [--chips v5e,v6e] [--parts specs,decodes]

Compiled, on any machine where libtpu is installed; nothing runs on a TPU. The parts:

  specs    every small case of `matmul.specs` and real ones of Llama's MLP, forward and input
           gradient: seconds to compile, VMEM, and of the real ones the bundles of a step for 1,024
           weights, beside what XLA's own program (dequantize, then dot) holds in HBM.
  decodes  ways to turn codes into levels: bundles, and vector operations, for 1,024 weights.
  steps    a train step of Llama-3.1-8B's shape, 4 × 2048 tokens on 2 × 2 chips (fsdp × tensor),
           with the kernel and with XLA's product: bytes on each chip.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qlora_jax as ql
from experiments.bench import tpu_compiler
from experiments.bench.train_step import architecture
from qlora_jax import lora, tree_paths
from qlora_jax.hf import checkpoint
from qlora_jax.matmul import quantized_matmul, sharded, specs, tpu_tiles
from qlora_jax.memory import step_bytes
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.train import init_state, make_train_step

PARTS = ("specs", "decodes", "steps")
# Of the real cases: a minute each to compile, all of them.
REAL = [spec for spec in specs.REAL if {spec.k, spec.n} == {4096, 14336} and spec.rows != (1,)]
# Chips that a step of 8B is compiled for.
_STEP_CHIPS = ("v5e", "v6e")
_WEIGHTS = 1024


def measure_spec(chip: str, spec: specs.ArgumentSpec) -> Iterator[dict[str, Any]]:
  """Forward and input gradient of one case."""
  mesh = tpu_compiler.one_chip(chip)
  x, w = jax.eval_shape(lambda key: (spec.x(key), spec.w(key)), jax.random.key(0))
  g = jax.ShapeDtypeStruct((*spec.rows, spec.n), x.dtype)
  layout = tpu_tiles.Layout.of(w, tpu_tiles.Tiles())
  weights = layout.k * layout.n / _WEIGHTS

  def gradient(implementation, g, x, w):
    product = functools.partial(quantized_matmul, implementation=implementation)
    return jax.vjp(lambda x: product(x, w), x)[1](g)

  for work, kernel, function, arguments in (
    (
      "forward",
      "quantized_matmul",
      lambda name, x, w: quantized_matmul(x, w, implementation=name),
      (x, w),
    ),
    ("input gradient", "quantized_matmul_gradient", gradient, (g, x, w)),
  ):
    started = time.perf_counter()
    compiled = tpu_compiler.compile_for(mesh, functools.partial(function, "tpu"), *arguments)
    result = {
      "chip": chip,
      "spec": str(spec),
      "work": work,
      "seconds": time.perf_counter() - started,
      "vmem_bytes": vmem_bytes(compiled),
      "hbm_temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
    if spec in specs.REAL:
      schedule = tpu_compiler.schedule(kernel)
      result["bundles_for_1024_weights"] = schedule.bundles / weights
      result["slots_used"] = {
        unit: used / (schedule.bundles * schedule.slots[unit])
        for unit, used in schedule.units.items()
      }
      plain = tpu_compiler.compile_for(mesh, functools.partial(function, "xla"), *arguments)
      result["xla_hbm_temporaries"] = plain.memory_analysis().temp_size_in_bytes
      result["xla_bytes_accessed"] = plain.cost_analysis()["bytes accessed"]
      result["xla_optimal_seconds"] = plain.cost_analysis()["optimal_seconds"]
    yield result


def vmem_bytes(compiled: Any) -> int:
  """What the largest kernel of a program takes of VMEM, as the compiler wrote it beside it."""
  pattern = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
  kernels = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
  sizes = [int(size) for line in kernels for size in re.findall(pattern, line)]
  if not sizes:
    raise RuntimeError(f"no kernel with {pattern!r}: the text is another than libtpu 0.0.48's")
  return max(sizes)


# Ways to look a code up. Each takes `word` `[8, 128]`, bytes of two codes with their signs, the
# first bit of the code, and the 16 levels in three forms: along the sublanes of two registers,
# along the lanes of one, and a register each.

Registers = tuple[list[jax.Array], jax.Array, list[jax.Array]]
Decode = Callable[[jax.Array, int, Registers], jax.Array]


def _by_sublane(word, first, registers):
  """What the kernel does."""
  return tpu_tiles.lookup(registers[0], word, 4, first)


def _by_lane(word, first, registers):
  code = (word >> first) & 15
  return tpu_tiles.gather(registers[1], code, 1)


def _by_selects(word, first, registers):
  levels = registers[2]
  for bit in range(first, first + 4):
    chosen = (word & (1 << bit)) != 0
    pairs = zip(levels[::2], levels[1::2], strict=True)
    levels = [jnp.where(chosen, high, low) for low, high in pairs]
  return levels[0]


# With the width of the registers in which it is done.
DECODES: dict[str, tuple[Decode, Any, Any]] = {
  "by sublane, two registers": (_by_sublane, jnp.int32, jnp.float32),
  "by lane, one register": (_by_lane, jnp.int32, jnp.float32),
  "selects, float32": (_by_selects, jnp.int32, jnp.float32),
  "selects, bfloat16": (_by_selects, jnp.int16, jnp.bfloat16),
}


def measure_decode(chip: str, name: str) -> dict[str, Any]:
  """The cost of decoding four more groups of 128 × 256 weights, and of their scales."""
  decode, integer, dtype = DECODES[name]
  strip = 8 * 4 // dtype.dtype.itemsize
  columns = 256
  found = []
  for groups in (2, 6):
    rows = 64 * groups

    def kernel(codes, scales, sublanes, lanes, each, out, groups=groups):
      registers = ([sublanes[0], sublanes[1]], lanes[...], [each[i] for i in range(16)])
      for group, plane in itertools.product(range(groups), range(2)):
        word = codes[64 * group : 64 * group + 64].astype(integer)
        scale = scales[2 * group + plane : 2 * group + plane + 1].astype(dtype)
        pieces = [
          [
            decode(word[i : i + strip, j : j + 128], 4 * plane, registers) * scale[:, j : j + 128]
            for j in range(0, columns, 128)
          ]
          for i in range(0, 64, strip)
        ]
        levels = jnp.concatenate([jnp.concatenate(row, 1) for row in pieces])
        first = 128 * group + 64 * plane
        out[first : first + 64] = levels.astype(jnp.bfloat16)

    label = f"decode_{re.sub('[^a-z0-9]', '_', name)}_{groups}"
    call = pl.pallas_call(
      kernel, out_shape=jax.ShapeDtypeStruct((2 * rows, columns), jnp.bfloat16), name=label
    )
    shapes = (
      jax.ShapeDtypeStruct((rows, columns), jnp.int8),
      jax.ShapeDtypeStruct((2 * groups, columns), jnp.float32),
      jax.ShapeDtypeStruct((2, 8, 128), jnp.float32),
      jax.ShapeDtypeStruct((8, 128), jnp.float32),
      jax.ShapeDtypeStruct((16, strip, 128), dtype),
    )
    tpu_compiler.compile_for(tpu_compiler.one_chip(chip), call, *shapes)
    found.append(tpu_compiler.schedule(label))
  weights = 4 * 128 * 256 / _WEIGHTS
  return {
    "chip": chip,
    "decode": name,
    "bundles": (found[1].bundles - found[0].bundles) / weights,
    "vector_operations": (found[1].units["VALU"] - found[0].units["VALU"]) / weights,
    "permutes": (found[1].units["XLU"] - found[0].units["XLU"]) / weights,
  }


def measure_step(chip: str, model_name: str, implementation: str | None) -> dict[str, Any]:
  """A whole train step over 2 × 2 chips: what it holds on each."""
  devices = np.array(tpu_compiler.topology(chip)).reshape(2, 2)
  mesh = Mesh(devices, ("fsdp", "tensor"))
  model = Transformer(architecture(model_name), remat="full", implementation=implementation)

  def put(leaf, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  def place(path, leaf):
    path = tree_paths.path_string(path)
    if is_quantized(leaf):
      by_rows = path.split("/")[-2] in ("o", "down")
      cuts = sharded.weight_specs(leaf, sharded.ROWS if by_rows else sharded.COLUMNS, leading=1)
      return jax.tree.map(lambda leaf, cut: put(leaf, *cut), leaf, cuts)
    if path.startswith("embed/"):
      return put(leaf, None, ("fsdp", "tensor"))
    return put(leaf, "fsdp", "tensor") if path.startswith("head/") else put(leaf)

  started = time.perf_counter()
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    rules = checkpoint.default_rules(ql.QuantizationConfig())
    base = checkpoint.abstract_base(model, rules, jnp.bfloat16)
    frozen = jax.tree_util.tree_map_with_path(place, base, is_leaf=is_quantized)
    optimizer = optax.adamw(2e-4)

    def start():
      params, constants = lora.init(jax.random.key(1), base, lora.LoRAConfig(rank=16))
      return init_state(params, constants, optimizer, seed=0, dtype=model.dtype)

    state = jax.tree.map(put, jax.eval_shape(start))
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "loss_mask": bool}
    batch = {
      name: put(jax.ShapeDtypeStruct((1, 4, 2048), kind), None, "fsdp")
      for name, kind in kinds.items()
    }
    traced = make_train_step(model, optimizer).trace(state, frozen, batch)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  memory = compiled.memory_analysis()
  return {
    "chip": chip,
    "model": model_name,
    "product": implementation or "tpu",
    "seconds": time.perf_counter() - started,
    "kernels": compiled.as_text().count("tpu_custom_call"),
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "bytes_a_chip": step_bytes(compiled),
  }


def main(argv: Sequence[str]) -> int:
  """Compiles what `argv` asks for, and writes the JSON."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench.tpu_compile",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--chips", default=",".join(tpu_compiler.TOPOLOGIES))
  parser.add_argument("--parts", default=",".join(PARTS))
  parser.add_argument("--model", default="llama-8b", help="of the steps")
  arguments = parser.parse_args(argv)
  chips, parts = arguments.chips.split(","), arguments.parts.split(",")
  for given, known, what in ((chips, tpu_compiler.TOPOLOGIES, "chips"), (parts, PARTS, "parts")):
    if unknown := set(given) - set(known):
      parser.error(f"--{what}: {', '.join(sorted(unknown))}; there is {', '.join(known)}")
  if reason := tpu_compiler.unavailable():
    print(f"error: {reason}", file=sys.stderr)
    return 2
  tpu_compiler.keep_schedules()
  names = ("jax", "libtpu")
  report: dict[str, Any] = {
    "compiled_for": chips,
    "ran_on": None,
    "versions": {name: importlib.metadata.version(name) for name in names},
  }

  def record(part: str, result: dict[str, Any]) -> None:
    report.setdefault(part, []).append(result)
    print(json.dumps(result), flush=True)
    # Again after each: what was measured is kept, whatever the next one does.
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")

  print(f"compiled for {', '.join(chips)}; run on none of them")
  for chip in chips:
    if "decodes" in parts:
      for name in DECODES:
        record("decodes", measure_decode(chip, name))
    if "specs" in parts:
      for spec in (*specs.SMALL, *REAL):
        if spec.dtype != "float16":
          for result in measure_spec(chip, spec):
            record("specs", result)
    if "steps" in parts and chip in _STEP_CHIPS:
      for implementation in (None, "xla"):
        record("steps", measure_step(chip, arguments.model, implementation))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""The TPU's kernel as its compiler sees it: memory, schedule, decodes, a whole train step.

  python -m experiments.bench.tpu_compile --out tpu.json [--chips v5e,v6e] [--parts specs,decodes]
    [--cases 16x4096x14336,…] [--without-xla] [--model llama-8b]

Compiled, on any machine where libtpu is installed; nothing runs on a TPU. The parts:

  specs    every small case of `matmul.specs`, forward and input gradient: seconds to compile, VMEM.
  real     Llama 3's projections with 1 to 4,096 rows: the same, bundles of a step (of a whole
           tile) for 1,024 weights, and the compiler's account of cost and memory beside that of
           XLA's own program: dequantize, then dot. All of them take hours; `--cases` those whose
           names start so, or any other [rows]x[K]x[N] (NF4 in blocks of 64; bf16, or with -float32
           behind it); `--without-xla` the kernel alone.
  decodes  ways to turn codes into levels: bundles, and vector operations, for 1,024 weights.
  strips   bundles of a step of the whole kernel, 4096 → 14336, by which strips go by lane.
  steps    a train step of Llama-3.1-8B's shape, 4 × 2048 tokens on 2 × 2 chips (fsdp × tensor),
           with the kernel and with XLA's product: bytes on each chip.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

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

PARTS = ("decodes", "real", "specs", "steps", "strips")
# Bytes of a TensorCore's VMEM, by `pltpu.get_tpu_info_for_chip` of JAX 0.11.2.
VMEM = {"v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20, "v7x": 64 << 20}
# Chips that a step of 8B is compiled for, with options of their compiler. v6e's crashes on it while
# it moves what it has placed in VMEM (BestFitRepacker, libtpu 0.0.48.1): it may not, there.
_STEP_OPTIONS: dict[str, dict[str, int]] = {
  "v5e": {},
  "v6e": {"xla_gf_vmem_max_repacks": 0, "xla_msa_max_repacks": 0},
}
BATCH = (4, 2048)
_WEIGHTS = 1024


def measure_spec(
  chip: str, spec: specs.ArgumentSpec, *, schedules: bool, beside_xla: bool = False
) -> Iterator[dict[str, Any]]:
  """Forward and input gradient of one case.

  Args:
    schedules: count the bundles too, and tell the compiler's account of the program.
    beside_xla: and that of XLA's own.
  """
  mesh = tpu_compiler.one_chip(chip)
  x, w = jax.eval_shape(lambda key: (spec.x(key), spec.w(key)), jax.random.key(0))
  g = jax.ShapeDtypeStruct((*spec.rows, spec.n), x.dtype)
  layout = tpu_tiles.Layout.of(w, tpu_tiles.Tiles())
  weights = layout.k * layout.n / _WEIGHTS

  def gradient(product, g, x, w):
    return jax.vjp(lambda x: product(x, w), x)[1](g)

  for work, kernel, arguments in (
    ("forward", "quantized_matmul", (x, w)),
    ("input gradient", "quantized_matmul_gradient", (g, x, w)),
  ):

    def compiled(name, work=work, arguments=arguments):
      product = functools.partial(quantized_matmul, implementation=name)
      function = product if work == "forward" else functools.partial(gradient, product)
      return tpu_compiler.compile_for(mesh, function, *arguments)

    started = time.perf_counter()
    ours = compiled("tpu")
    vmem = vmem_bytes(ours)
    result = {
      "chip": chip,
      "spec": str(spec),
      "work": work,
      "seconds": round(time.perf_counter() - started, 1),
      "vmem_bytes": vmem,
      "share_of_vmem": round(vmem / VMEM[chip], 4),
    }
    if schedules:
      schedule = tpu_compiler.schedule(kernel)
      result["bundles_for_1024_weights"] = round(schedule.bundles / weights, 3)
      result["slots_used"] = {
        unit: round(used / (schedule.bundles * schedule.slots[unit]), 3)
        for unit, used in schedule.units.items()
      }
      result["tpu"] = analysis(ours)
      if beside_xla:
        result["xla"] = analysis(compiled("xla"))
    yield result


def analysis(compiled: Any) -> dict[str, Any]:
  """What the compiler says of a program's cost and of its memory.

  Its estimate of the time counts −1 for what it does not estimate (a kernel; some of its own
  fusions): None then.
  """
  cost = compiled.cost_analysis()
  seconds = cost["optimal_seconds"]
  return {
    "flops": cost["flops"],
    "bytes_accessed": cost["bytes accessed"],
    "optimal_seconds": seconds if seconds > 0 else None,
    "hbm_temporaries": compiled.memory_analysis().temp_size_in_bytes,
  }


def select(levels: list[jax.Array], bits: list[jax.Array]) -> jax.Array:
  """The level of each code, of which `bits` are the bits, the lowest first: 15 selects of 16."""
  for bit in bits:
    pairs = zip(levels[::2], levels[1::2], strict=True)
    levels = [jnp.where(bit, high, low) for low, high in pairs]
  return levels[0]


def vmem_bytes(compiled: Any) -> int:
  """What the largest kernel of a program takes of VMEM, as the compiler wrote it beside it."""
  pattern = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
  kernels = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
  sizes = [int(size) for line in kernels for size in re.findall(pattern, line)]
  if not sizes:
    raise RuntimeError(f"no kernel with {pattern!r}: the text is another than libtpu 0.0.48's")
  return max(sizes)


# Ways to look a code up. Each takes `word` `[8, 128]`, bytes of two codes with their signs, the
# first bit of the code, the number of the strip of 8 rows, and the 16 levels in three forms: along
# the sublanes of two registers, along the lanes of one, and a register each.

Registers = tuple[list[jax.Array], jax.Array, list[jax.Array]]
Decode = Callable[[jax.Array, int, int, Registers], jax.Array]


def _by_sublane(word, first, strip, registers):
  return tpu_tiles.lookup(registers[0], word, 4, first)


def _by_lane(word, first, strip, registers):
  return tpu_tiles.lookup([registers[1]], word, 4, first, by_lane=True)


def _shared(word, first, strip, registers, *, every):
  """What the kernel does, for each fourth strip."""
  way = _by_lane if strip % every == every - 1 else _by_sublane
  return way(word, first, strip, registers)


def _by_selects(word, first, strip, registers):
  return select(registers[2], [word & (1 << bit) != 0 for bit in range(first, first + 4)])


# With the width of the registers in which it is done.
DECODES: dict[str, tuple[Decode, Any, Any]] = {
  "by sublane, two registers": (_by_sublane, jnp.int32, jnp.float32),
  "by sublane, each fourth by lane": (functools.partial(_shared, every=4), jnp.int32, jnp.float32),
  "by sublane, each third by lane": (functools.partial(_shared, every=3), jnp.int32, jnp.float32),
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
            decode(
              word[i : i + strip, j : j + 128],
              4 * plane,
              (128 * group + 64 * plane + i) // strip,
              registers,
            )
            * scale[:, j : j + 128]
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


def measure_strips(chip: str, every: int | None, rows: int) -> dict[str, Any]:
  """A step of the kernel, forward, where every so many strips go by lane; None: no strip does."""
  spec = specs.ArgumentSpec(4096, 14336, (rows,), "bfloat16")
  # What was traced would be taken again, here and by what follows.
  jax.clear_caches()
  with mock.patch.object(tpu_tiles, "BY_LANE", every or math.inf):
    result = next(measure_spec(chip, spec, schedules=True))
  jax.clear_caches()
  bundles = result["bundles_for_1024_weights"]
  return {"chip": chip, "rows": rows, "each_strip_by_lane": every, "bundles": bundles}


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
      name: put(jax.ShapeDtypeStruct((1, *BATCH), kind), None, "fsdp")
      for name, kind in kinds.items()
    }
    traced = make_train_step(model, optimizer).trace(state, frozen, batch)
    lowered = traced.lower(lowering_platforms=("tpu",))
    compiled = lowered.compile(compiler_options=dict(_STEP_OPTIONS[chip]))
  memory = compiled.memory_analysis()
  return {
    "chip": chip,
    "model": model_name,
    "product": implementation or "tpu",
    "compiler_options": _STEP_OPTIONS[chip],
    "seconds": time.perf_counter() - started,
    "kernels": compiled.as_text().count("tpu_custom_call"),
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "bytes_a_chip": step_bytes(compiled),
  }


def chosen(cases: str, parts: Sequence[str]) -> dict[str, list[specs.ArgumentSpec]]:
  """What `--cases` asks of "real" and "specs".

  Raises:
    ValueError: a case is in none of `parts`.
  """
  small = [spec for spec in specs.SMALL if spec.dtype != "float16"]
  listed = {"real": list(specs.REAL), "specs": small}
  found: dict[str, list[specs.ArgumentSpec]] = {part: [] for part in listed}
  for case in dict.fromkeys(cases.split(",")):
    shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(-float32)?", case)
    start = f"{case}-" if shape else case
    named = {part: [s for s in listed[part] if str(s).startswith(start)] for part in listed}
    if shape:
      rows, k, n = map(int, shape.groups()[:3])
      dtype = "float32" if shape[4] else "bfloat16"
      named["real"] = [specs.ArgumentSpec(k, n, (rows,), dtype)]
    if case and not any(named[part] for part in named if part in parts):
      raise ValueError(
        f"--cases: no case of {', '.join(parts)} starts with {case!r}; one of specs is {small[0]}, "
        "and real takes any [rows]x[K]x[N]"
      )
    for part in found:
      found[part] += [spec for spec in named[part] if spec not in found[part]]
  return found


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
  parser.add_argument("--cases", default="", help="of specs and real: how their names start")
  parser.add_argument("--without-xla", action="store_true", help="of real: the kernel alone")
  parser.add_argument("--model", default="llama-8b", help="of the steps")
  arguments = parser.parse_args(argv)
  chips, parts = arguments.chips.split(","), arguments.parts.split(",")
  for given, known, what in ((chips, tpu_compiler.TOPOLOGIES, "chips"), (parts, PARTS, "parts")):
    if unknown := set(given) - set(known):
      parser.error(f"--{what}: {', '.join(sorted(unknown))}; there is {', '.join(known)}")
  try:
    cases = chosen(arguments.cases, parts)
  except ValueError as error:
    parser.error(str(error))
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
    if "strips" in parts:
      for every, rows in itertools.product((None, 2, 3, 4, 5), (16, 1024)):
        record("strips", measure_strips(chip, every, rows))
    for part in [each for each in cases if each in parts]:
      counted = part == "real"
      beside_xla = counted and not arguments.without_xla
      for spec in cases[part]:
        for result in measure_spec(chip, spec, schedules=counted, beside_xla=beside_xla):
          record(part, result)
    if "steps" in parts and chip in _STEP_OPTIONS:
      for implementation in (None, "xla"):
        record("steps", measure_step(chip, arguments.model, implementation))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""The packed product beside its peers: time, share of the floor, error.

  python -m experiments.bench.matmul --out matmul.json [--shapes 4096x14336,…] [--rows 1,16,…]
    [--peer-rows 1,512,…] [--plots DIR]

On one GPU or TPU, NF4 in blocks of 64 with double quantization, bf16. The calls of a timed program
take weights in turn, so many that the L2 cache does not hold them (at most one a call). `us` is
what the device was busy, by the profiler; `call_us` is the program's time by its calls, launches
included.
The floor is the larger of the packed bytes at the speed of a copy and the products at that of a
large bf16 one, both measured in the same run. `served` says which kernel and tiles ours were, and
whether `qlora_jax.matmul.tuning`'s table has them (else the rule chose them).

Peers run where they are installed (torch with bitsandbytes; Qwix; ejkernel, its Triton kernel, on a
GPU), the JAX ones on the same weights, in bf16, in blocks of 64 along K, packed by their own
quantizers with scales of bf16, which none quantizes once more. `own_format_error` is theirs against
float64 with the weight that their codes stand for, as `error` is ours with ours. What a peer
refuses is a result with its reason.

`--plots` draws a shape's times against the rows, the floor beside them; with `--draw matmul.json`
nothing runs. It has not run on a TPU: where a profile lies there is from the format's description,
and a profile without it raises.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from experiments import figures
from qlora_jax import dequantize, quantize, quantized_matmul

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))
ROWS = (1, 4, 16, 64, 512, 4096, 8192)
# Peers in JAX: ejkernel's kernels take seconds to compile.
PEER_ROWS = (1, 16, 64, 512, 4096)
# More than the 50 MB of an H100's L2.
_ROTATED_BYTES = 192 << 20
_CALLS = 12
# A program's runs before it is profiled, and the seconds that they take at least.
_LEAST_RUNS, _STEADY = 7, 0.2
# Of the outputs whose error is taken: odd, so that it passes through all places of a tile.
STRIDE = 61


def busy(function: Callable[[], Any], calls: int) -> dict[str, float]:
  """Runs `function`, which makes `calls` calls: their device and wall time in µs, medians."""
  jax.block_until_ready(function())
  walls = []
  # Until the card's clock is where large products hold it, not where it is after a rest.
  while len(walls) < _LEAST_RUNS or sum(walls) < _STEADY:
    start = time.perf_counter()
    jax.block_until_ready(function())
    walls.append(time.perf_counter() - start)
  # The device's events are all that is read; Python's would fill the trace with our own threads'.
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory, profiler_options=options):
      for _ in range(3):
        jax.block_until_ready(function())
    by_name = collections.defaultdict(list)
    for file in Path(directory).rglob("*.xplane.pb"):
      for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        # A GPU's kernels by stream; of a TPU the whole program.
        wanted = {"/device:GPU": "Stream", "/device:TPU": "XLA Modules"}.get(plane.name[:11])
        if wanted is None:
          continue
        for line in plane.lines:
          if line.name and wanted in line.name:
            for event in line.events:
              by_name[event.name].append(event.duration_ns)
    # A kernel may run several times a call; those of one call are alike.
    totals = [
      statistics.median(durations) * len(durations) / (3 * calls) for durations in by_name.values()
    ]
  if not totals:
    raise RuntimeError("the profile has no device events: its layout is another than JAX 0.11.2's")
  return {"us": sum(totals) / 1e3, "call_us": statistics.median(walls) / calls * 1e6}


def program(function: Callable) -> Any:
  """One program that makes a call with each of its arguments, `[(x, w), …]`."""
  # Jitted within, so that it is lowered, and a Mosaic kernel compiled, once and not once a call.
  call = jax.jit(function)
  return jax.jit(lambda arguments: [call(*each) for each in arguments])


def time_jax(function: Callable, arguments: Sequence[tuple]) -> tuple[dict[str, float], Any]:
  """`busy` of a call with each of `arguments`, and what the first gives."""
  calls = program(function)
  return busy(lambda: calls(arguments), len(arguments)), calls(arguments)[0]


def inputs(m: int, k: int) -> list[jax.Array]:
  """An x for each call, `[m, k]`."""
  return [jax.random.normal(jax.random.key(i), (m, k), jnp.bfloat16) for i in range(_CALLS)]


def weight(key: jax.Array, k: int, n: int) -> jax.Array:
  """`[k, n]`, float32: what every implementation quantizes."""
  return jax.random.normal(key, (k, n)) * 0.02


def error(y: Any, x: Any, dense: np.ndarray) -> float:
  """‖y − x · W‖ / ‖x · W‖ by float64, of the outputs that `dense` has: each `STRIDE`th."""
  expected = np.asarray(x, np.float64) @ dense
  found = np.asarray(y[:, ::STRIDE], np.float64)
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def rotated(nbytes: int) -> int:
  """How many weights of so many bytes the calls of a program take in turn."""
  return min(_CALLS, max(2, -(-_ROTATED_BYTES // nbytes)))


def measure_ceilings() -> dict[str, float]:
  """Bytes a second of a copy, read and write, and FLOP a second of a large bf16 product."""
  x = jnp.ones((512 << 20,), jnp.bfloat16)
  copy = busy(functools.partial(jax.jit(lambda x: x + 1), x), 1)["us"]
  a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
  product = busy(functools.partial(jax.jit(lambda a: a @ a), a), 1)["us"]
  return {"bytes_s": 2 * x.nbytes / copy * 1e6, "flop_s": 2 * 8192**3 / product * 1e6}


def measure(
  k: int, n: int, rows: Sequence[int], peer_rows: Sequence[int], ceilings: dict[str, float]
) -> list[dict]:
  """All implementations in JAX, of one weight's shape; peers with some of the rows."""
  count = rotated(k * n // 2)
  pack = jax.jit(lambda key: quantize(weight(key, k, n)))
  packed = [pack(jax.random.key(i)) for i in range(count)]
  plain = [dequantize(w, jnp.bfloat16) for w in packed[: rotated(2 * k * n)]]
  exact = np.asarray(dequantize(packed[0])[:, ::STRIDE], np.float64)
  results = []

  def record(work, m, name, timing, floor=None, **more):
    result = {"work": work, "k": k, "n": n, "m": m, "implementation": name, **timing, **more}
    if floor:
      result["share_of_floor"] = floor / timing["us"]
    results.append(result)
    print(json.dumps(result), flush=True)

  peers: dict[str, Peer] = {}
  for name, make in PEERS.items():
    if importlib.util.find_spec(name) is not None:
      try:
        peers[name] = make(k, n, count)
      except Exception as e:  # Whatever a peer raises, its reason is recorded and the others run.
        record("quantize", 0, name, {"refused": first_line(e)})

  copied = packed[0].nbytes + 2 * k * n
  dequantizers: dict[str, Callable] = {"xla": functools.partial(dequantize, dtype=jnp.bfloat16)}
  if jax.default_backend() == "gpu":
    dequantizers = {"gpu": _gpu_dequantize} | dequantizers
  for name, function in dequantizers.items():
    timing, _ = time_jax(function, [(w,) for w in packed])
    more = {"served": served(None, packed[0])} if name == "gpu" else {}
    record("dequantize", 0, name, timing, copied / ceilings["bytes_s"] * 1e6, **more)

  for m in rows:
    xs = inputs(m, k)
    few = [(x, packed[i % count]) for i, x in enumerate(xs)]
    dense = [(x, plain[i % len(plain)]) for i, x in enumerate(xs)]
    floor = max(
      (packed[0].nbytes + 2 * m * (k + n)) / ceilings["bytes_s"], 2 * m * k * n / ceilings["flop_s"]
    )
    candidates: dict[str, tuple[Callable, list]] = {
      name: (functools.partial(quantized_matmul, implementation=name), few)
      for name in (jax.default_backend(), "xla")
    }
    candidates["bf16 library"] = (jnp.matmul, dense)
    for name, (function, arguments) in candidates.items():
      timing, y = time_jax(function, arguments)
      more = {"served": served(xs[0], packed[0])} if name == "gpu" else {}
      record("forward", m, name, timing, floor * 1e6, error=error(y, xs[0], exact), **more)
    for name, peer in peers.items() if m in peer_rows else ():
      arguments = [(x, peer.weights[i % count]) for i, x in enumerate(xs)]
      try:
        timing, y = time_jax(peer.product, arguments)
      except Exception as e:  # As above.
        record("forward", m, name, {"refused": first_line(e)})
      else:
        err = error(y, xs[0], peer.exact)
        record("forward", m, name, timing, floor * 1e6, own_format_error=err)
    if m >= 512:
      for name, (function, arguments) in candidates.items():
        step = functools.partial(_forward_and_gradient, function)
        record("forward and dx", m, name, time_jax(step, arguments)[0], 2e6 * floor)
  return results


def served(x: Any, w: Any) -> dict[str, Any]:
  """The kernel and tiles of `gpu`'s product, or for no x of dequantizing; whether it was tuned."""
  from qlora_jax.matmul import gpu, target, tuning

  kernel = None if x is None else gpu.fused(x, w)[0]
  if kernel is None:
    name, tiles = "dequantize", gpu.dequantize_tiles(w)
  else:
    assert isinstance(kernel, functools.partial)
    name, tiles = kernel.func.__module__.rpartition("gpu_")[2], kernel.keywords["tiles"]
  found = {"kernel": name, "tiles": dataclasses.asdict(tiles)}
  entry = tuning.find(target.target()[1].device_kind, w, None if x is None else x.shape[0])
  return found | {"tuned": entry is not None and dataclasses.asdict(entry) == found}


def first_line(e: Exception) -> str:
  """An error's, with its type."""
  return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"


def _gpu_dequantize(w: Any) -> jax.Array:
  from qlora_jax.matmul import gpu, gpu_dequantize

  return gpu_dequantize.dequantize(w, jnp.bfloat16, gpu.dequantize_tiles(w))


def _forward_and_gradient(function: Callable, x: jax.Array, w: Any) -> Any:
  y, pullback = jax.vjp(lambda x: function(x, w), x)
  return y, pullback(y)


@dataclasses.dataclass(frozen=True)
class Peer:
  """Another library's product.

  Attributes:
    product: of x and one of `weights`, as it packs them.
    exact: float64, what the first of them stands for, each `STRIDE`th output.
  """

  product: Callable[[jax.Array, Any], jax.Array]
  weights: list[Any]
  exact: np.ndarray


def _qwix(k: int, n: int, count: int) -> Peer:
  from qwix._src.core import qarray  # pyright: ignore[reportMissingImports]
  from qwix._src.core.dot import dot  # pyright: ignore[reportMissingImports]

  how = qarray.HowToQuantize(qtype="nf4", channelwise_axes=[1], tiled_axes={0: 64})
  make = jax.jit(lambda key: qarray.quantize(weight(key, k, n).astype(jnp.bfloat16), how))
  weights = [make(jax.random.key(i)) for i in range(count)]
  # It dequantizes to the scales' dtype.
  first = dataclasses.replace(weights[0], scale=weights[0].scale.astype(jnp.float32))
  exact = jax.jit(lambda w: qarray.dequantize(w)[:, ::STRIDE])(first)
  return Peer(dot, weights, np.asarray(exact, np.float64))


def _ejkernel(k: int, n: int, count: int) -> Peer:
  # It is written for JAX 0.10, and asks for one name that has moved since.
  name = "concrete_or_error"
  if not hasattr(jax.core, name):
    setattr(jax.core, name, getattr(jax.extend.core, name))
  from ejkernel import quantization  # pyright: ignore[reportMissingImports]
  from ejkernel.modules.operations.quantized_matmul import (  # pyright: ignore[reportMissingImports]
    quantized_matmul as product,
  )

  # Blocks along K; of its kernels, the one that serves these and needs no compiler of its own.
  how: dict[str, Any] = {"mode": "nf4", "group_size": 64, "axis": "col"}
  platform = "triton" if jax.default_backend() == "gpu" else "auto"

  @jax.jit
  def make(key):
    return quantization.prepack_quantized_weights(weight(key, k, n).T.astype(jnp.bfloat16), **how)

  weights = [make(jax.random.key(i)) for i in range(count)]
  # Float16 by default; asked for float32, the product of level and scale is as good as exact.
  precise = quantization.QuantRuntimeConfig(
    prefer_compute_dtype="fp32", dequant_output_dtype="fp32"
  )

  @jax.jit
  def decode(codes, scales):
    return quantization.dequantize(codes, scales, **how, runtime_config=precise)[::STRIDE].T

  exact = np.asarray(decode(*weights[0]), np.float64)
  return Peer(lambda x, w: product(x, *w, **how, platform=platform), weights, exact)


PEERS: dict[str, Callable[[int, int, int], Peer]] = {"qwix": _qwix, "ejkernel": _ejkernel}


def measure_bitsandbytes(k: int, n: int, rows: Sequence[int]) -> list[dict]:
  """bitsandbytes' product, timed as ours, in torch; of its own weights."""
  # In a process of its own: once torch has profiled in one, JAX's profiles have no device events.
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    try:
      results = pool.submit(_bitsandbytes, k, n, rows).result()
    except concurrent.futures.BrokenExecutor as e:
      # What it had measured, it has printed.
      results = [_refused(k, n, e)]
      print(json.dumps(results[0]), flush=True)
  return results


def _bitsandbytes(k: int, n: int, rows: Sequence[int]) -> list[dict]:
  results = []
  try:
    _measure_bitsandbytes(k, n, rows, results)
  except Exception as e:  # As of the other peers.
    results.append(_refused(k, n, e))
    print(json.dumps(results[-1]), flush=True)
  return results


def _refused(k: int, n: int, e: Exception) -> dict:
  return {
    "work": "forward",
    "k": k,
    "n": n,
    "implementation": "bitsandbytes",
    "refused": first_line(e),
  }


def _measure_bitsandbytes(k: int, n: int, rows: Sequence[int], results: list[dict]) -> None:
  import bitsandbytes  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]
  from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

  count = rotated(k * n // 2)
  packed = [
    functional.quantize_4bit(
      torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02,
      quant_type="nf4",
      blocksize=64,
      compress_statistics=True,
    )
    for _ in range(count)
  ]

  def record(work, m, function):
    def program():
      for i in range(_CALLS):
        function(*packed[i % count])

    program()
    torch.cuda.synchronize()
    walls = []
    while len(walls) < _LEAST_RUNS or sum(walls) < _STEADY:
      start = time.perf_counter()
      program()
      torch.cuda.synchronize()
      walls.append(time.perf_counter() - start)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
      for _ in range(3):
        program()
      torch.cuda.synchronize()
    device = sum(event.self_device_time_total for event in profile.key_averages())
    result = {"work": work, "k": k, "n": n, "m": m, "implementation": "bitsandbytes"}
    calls = 3 * _CALLS
    result |= {"us": device / calls, "call_us": statistics.median(walls) / _CALLS * 1e6}
    results.append(result)
    print(json.dumps(result), flush=True)

  record("dequantize", 0, lambda codes, state: functional.dequantize_4bit(codes, state))
  for m in rows:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    record("forward", m, lambda codes, state, x=x: bitsandbytes.matmul_4bit(x, codes.t(), state))


def draw(report: dict[str, Any], directory: Path) -> list[Path]:
  """Writes `forward-KxN.svg` for each weight: µs against rows, a line an implementation.

  Raises:
    ImportError: Matplotlib is missing.
  """
  figures.require()
  directory.mkdir(parents=True, exist_ok=True)
  lines: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
  for found in report["results"]:
    if found["work"] != "forward" or "refused" in found:
      continue
    own = lines.setdefault((found["k"], found["n"]), {})
    own.setdefault(found["implementation"], {})[found["m"]] = found["us"]
    if share := found.get("share_of_floor"):
      own.setdefault("floor", {})[found["m"]] = share * found["us"]
  paths = []
  for (k, n), own in lines.items():
    series = []
    for name, times in list(own.items())[: figures.MOST_SERIES]:
      rows, us = zip(*sorted(times.items()), strict=True)
      series.append((name, rows, us, None))
    label = f"rows ({k} → {n}, {report['device']})"
    svg = figures.lines(series, label, "µs", log_x=True, log_y=True)
    paths.append(directory / f"forward-{k}x{n}.svg")
    paths[-1].write_text(svg)
  return paths


def main(argv: Sequence[str]) -> int:
  """Measures what `argv` asks for, and writes the JSON."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench.matmul",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", type=Path)
  parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES))
  parser.add_argument("--rows", default=",".join(map(str, ROWS)))
  parser.add_argument(
    "--peer-rows", default=",".join(map(str, PEER_ROWS)), help="of --rows, for Qwix and ejkernel"
  )
  parser.add_argument("--plots", type=Path, help="a directory for figures")
  parser.add_argument("--draw", type=Path, help="draws what an earlier --out wrote; runs nothing")
  arguments = parser.parse_args(argv)
  if arguments.draw is not None:
    draw(json.loads(arguments.draw.read_text()), arguments.plots or Path())
    return 0
  if arguments.out is None:
    parser.error("--out is wanted, or --draw")
  if arguments.plots is not None:
    figures.require()
  if jax.default_backend() not in ("gpu", "tpu"):
    backend = jax.default_backend()
    print(f"error: the device is a {backend}; a GPU or a TPU is wanted", file=sys.stderr)
    return 2
  print(f"on {jax.devices()[0].device_kind} ({jax.default_backend()}), JAX {jax.__version__}")
  shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
  rows = [int(m) for m in arguments.rows.split(",")]
  ceilings = measure_ceilings()
  print(json.dumps(ceilings), flush=True)
  names = ("jax", "torch", "bitsandbytes", *PEERS)
  installed = [name for name in names if importlib.util.find_spec(name) is not None]
  for name in names:
    if name not in installed:
      print(f"{name}: not installed")
  report = {
    "device": jax.devices()[0].device_kind,
    "versions": {name: importlib.metadata.version(name) for name in installed},
    "ceilings": ceilings,
    "results": [],
  }
  peer_rows = [int(m) for m in arguments.peer_rows.split(",") if m]
  work = []
  for k, n in shapes:
    work.append(functools.partial(measure, k, n, rows, peer_rows, ceilings))
    if {"torch", "bitsandbytes"} <= set(installed):
      work.append(functools.partial(measure_bitsandbytes, k, n, rows))
  for each in work:
    report["results"] += each()
    # Again after each: what was measured is kept, whatever the next one does.
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
  if arguments.plots is not None:
    draw(report, arguments.plots)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

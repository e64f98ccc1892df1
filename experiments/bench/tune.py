"""Which kernel and tiles take the least time on this GPU: the table that ships with the package.

  python -m experiments.bench.tune --out qlora_jax/matmul/tuning.json [--seconds 60]
    [--shapes 4096x14336,…] [--rows 1,16,…]

Of each real shape (`matmul.specs`) and class of rows (`matmul.tuning`), NF4 in blocks of 64 with
double quantization, bf16, candidates are timed by the device's own time, on weights that rotate
past its L2 cache. Threads compile all of them first. Then they run in turn under few traces of the
profiler, a marker's kernel before each, by which the trace is cut into candidates: a trace of its
own for each took 2.5 s a candidate. What beats the rule (`gpu.by_rule`) by more than 3% is timed
once more, in turns with it, and is written if it does so again and its error is that of the
library's product; other classes have no entry, and keep the rule. Each timing is printed, as a
line of JSON.

Left out before they are compiled:
- tiles that leave two thirds of the multiprocessors idle, or that make more than four blocks for
  each (every block fills its own tables);
- a tile for few rows that is half empty, or that reads the codes twice, but 8 rows for 16;
- of the tiles for more rows, all but the rule's rows (for 128 and 256 also half of them) with
  splits and stages together, and from the rule's tiles one other change at a time: those that
  helped are then tried together, on the best splits and stages;
- the library's product, where dequantizing alone takes longer than the best kernel.

What is not compiled in `--seconds` is printed as refused. The entries of what was timed replace
those that ship; the device's others, and other devices', stay.

  python -m experiments.bench.tune --spills spills.json [--shapes …] [--rows …]

times nothing: it has the kernels' candidates compiled for an H100 that need not be there
(`experiments.bench.gpu_compile`), and writes registers and bytes spilled.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import gpu_compile, matmul
from qlora_jax import dequantize, quantize
from qlora_jax.matmul import gpu, specs, tuning

_MULTIPROCESSORS = 132
# Of the time: less is not written.
_GAIN = 0.03
# What a candidate's error may be, of that of the library's product with the dequantized weight.
_MOST_ERROR = 1.1
# Of a candidate, in a row.
_CALLS = 16
# Times that a rule and what beat it are timed in turns.
_TURNS = 3
# Candidates of a trace: one that the profiler spoils does not cost the others.
_TRACED = 128
# XLA's name of the kernel of a lone cosine, which nothing that is timed has.
_MARKER = "cosine"


@functools.cache
def _abstract(k: int, n: int) -> Any:
  return jax.eval_shape(lambda: quantize(jnp.zeros((k, n))))


@dataclasses.dataclass(frozen=True)
class Case:
  """A shape of the weight, and a class by its most rows; None: dequantizing alone."""

  k: int
  n: int
  m: int | None

  def x(self) -> jax.ShapeDtypeStruct:
    """Of the class's rows."""
    return jax.ShapeDtypeStruct((self.m or 0, self.k), jnp.bfloat16)

  def w(self) -> Any:
    """Its shapes."""
    return _abstract(self.k, self.n)

  @property
  def shape(self) -> str:
    """As the table names it."""
    return f"{self.k}x{self.n}"


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A kernel and its tiles, as `tuning.Entry`."""

  kernel: str
  tiles: Any

  def as_json(self) -> dict[str, Any]:
    """As an entry has it."""
    return {"kernel": self.kernel, "tiles": dataclasses.asdict(self.tiles)}

  def function(self, m: int | None) -> Callable:
    """`f(x, w)`; without rows `f(w)`."""
    from qlora_jax.matmul import gpu_dequantize

    if self.kernel != "dequantize":
      return functools.partial(_module(self.kernel).product, tiles=self.tiles)
    if m is None:
      return lambda w: gpu_dequantize.dequantize(w, jnp.bfloat16, self.tiles)

    def product(x, w):
      # As `gpu`'s own: one call's weight is not the next one's.
      x, w = jax.lax.optimization_barrier((x, w))
      dense = gpu_dequantize.dequantize(w, x.dtype, self.tiles)
      wanted = jnp.float32 if m <= gpu._MOST_BY_WARPS else x.dtype
      return jnp.matmul(x, dense, preferred_element_type=wanted).astype(x.dtype)

    return product


def _module(kernel: str) -> Any:
  from qlora_jax.matmul import gpu_dequantize, gpu_few_rows, gpu_tiles

  return {"few_rows": gpu_few_rows, "tiles": gpu_tiles, "dequantize": gpu_dequantize}[kernel]


def library(case: Case, found: dict[str, dict[str, Any]]) -> Candidate:
  """Dequantizing, of rows' cases with the tiles that were found; the library multiplies."""
  entry = {} if case.m is None else found.get(case.shape, {}).get("dequantize", {})
  return Candidate("dequantize", _module("dequantize").Tiles(**entry.get("tiles", {})))


def rule(case: Case, found: dict[str, dict[str, Any]]) -> Candidate:
  """What serves the case without an entry."""
  kernel = None if case.m is None else gpu.by_rule(case.x(), case.w())[0]
  if kernel is None:
    return library(case, found)
  assert isinstance(kernel, functools.partial)
  return Candidate(kernel.func.__module__.rpartition("gpu_")[2], kernel.keywords["tiles"])


def candidates(case: Case) -> list[Candidate]:
  """What is timed first: kernels, without the library's product."""
  found: Iterable[Candidate]
  if case.m is None:
    found = _dequantizing(case)
  else:
    found = (*_few_rows(case), *_tiled(case))
  return list(dict.fromkeys(found))


def _dequantizing(case: Case) -> Iterable[Candidate]:
  for rows, columns, warps in (
    *((16, columns, warps) for columns in (128, 256, 512) for warps in (4, 8)),
    *((32, columns, warps) for columns in (128, 256) for warps in (4, 8)),
    (64, 128, 8),
  ):
    # Columns that do not divide N are masked.
    if case.n % columns == 0:
      yield Candidate("dequantize", _module("dequantize").Tiles(rows, columns, warps))


def _few_rows(case: Case) -> Iterable[Candidate]:
  module, w, m = _module("few_rows"), case.w(), case.m or 0
  for rows in (4, 8, 16):
    if (rows > 4 and m <= rows // 2) or m > (16 if rows == 8 else rows):
      continue
    # Wide lanes of 16 warps have registers for 4 rows alone.
    for warps, lane_columns in ((16, 4), (8, 8), *(((16, 8),) if rows == 4 else ())):
      for column_warps in (1, 2, 4, 8):
        tiles = module.Tiles(rows, column_warps, warps, lane_columns)
        blocks = -(-m // rows) * -(-case.n // tiles.columns)
        if _occupies(blocks) and module.unsupported(case.x(), w, tiles) is None:
          yield Candidate("few_rows", tiles)


def _tiled(case: Case) -> Iterable[Candidate]:
  module, x, w, m = _module("tiles"), case.x(), case.w(), case.m or 0
  if m < 16:
    return
  usual = _usual(case)
  found = [usual, *(dataclasses.replace(usual, **change) for change in _changes(usual))]
  for rows in (usual.rows, *((usual.rows // 2,) if m in (128, 256) else ())):
    # As the rule has it for so many.
    tiles = dataclasses.replace(module.default_tiles(rows, w), rows=rows)
    blocks = -(-m // rows) * -(-case.n // module.COLUMNS)
    least = max(1, _MULTIPROCESSORS // blocks)
    # Fewer stages leave room for a second block on the multiprocessor, which wants more splits.
    stages = (4, 6, 8) if usual.rows <= 64 else dict.fromkeys((tiles.stages, 4))
    for splits in (least, 2 * least, 4 * least):
      if splits == least or (splits <= 8 and _occupies(blocks * splits)):
        found += [
          dataclasses.replace(tiles, splits=min(splits, 8), stages=count) for count in stages
        ]
  for tiles in found:
    if module.unsupported(x, w, tiles) is None:
      yield Candidate("tiles", tiles)


def _usual(case: Case) -> Any:
  """The rule's tiles, of no more rows than there are."""
  assert case.m is not None
  tiles = _module("tiles").default_tiles(case.m, case.w())
  return dataclasses.replace(tiles, rows=min(tiles.rows, -(-case.m // 8) * 8))


def _changes(usual: Any) -> list[dict[str, Any]]:
  """From the rule's tiles, one at a time."""
  # More rows leave too few registers to 512 threads; promoted, 128 rows spill 56 bytes.
  return [{"k_sets": 2}, {"promoted": not usual.promoted}] if usual.rows <= 64 else []


def _occupies(blocks: int) -> bool:
  return _MULTIPROCESSORS // 3 <= blocks <= 4 * _MULTIPROCESSORS


def combined(case: Case, times: dict[Candidate, float]) -> Candidate | None:
  """What helped the rule's tiles of rows, together, on the best of the others; if it is new."""
  tiled = {each.tiles: us for each, us in times.items() if each.kernel == "tiles"}
  if case.m is None or (usual := _usual(case)) not in tiled:
    return None
  one = {dataclasses.replace(usual, **change): change for change in _changes(usual)}
  best = min((tiles for tiles in tiled if tiles not in one), key=lambda tiles: tiled[tiles])
  helped = {
    name: value
    for tiles, change in one.items()
    if tiled.get(tiles, float("inf")) < tiled[usual]
    for name, value in change.items()
  }
  tiles = dataclasses.replace(best, **helped)
  if tiles in tiled or _module("tiles").unsupported(case.x(), case.w(), tiles) is not None:
    return None
  return Candidate("tiles", tiles)


Item = tuple[Case, Candidate]


class Timer(Protocol):
  """What measures candidates."""

  def time(self, items: Sequence[Item]) -> list[float | str]:
    """µs of a call of each, which run in this order; or why there are none."""
    ...

  def errors(self, items: Sequence[Item]) -> list[float]:
    """Of each that was timed, of that of the library's product with the dequantized weight."""
    ...


def cut(events: Iterable[tuple[float, float, str]], calls: int) -> list[float | str]:
  """A trace's events as µs of a call, or why there are none, of each candidate that ran in turn.

  Args:
    events: start and duration in ns, and name, in any order. A marker's kernel comes before each
      candidate's; what comes before the first marker is no candidate's.
    calls: of a candidate, each of as many kernels as the others.
  """
  pieces: list[dict[str, list[float]]] = []
  for _, duration, name in sorted(events):
    if _MARKER in name:
      pieces.append(collections.defaultdict(list))
    elif pieces:
      pieces[-1][name].append(duration)
  return [_us(piece, calls) for piece in pieces]


def _us(piece: dict[str, list[float]], calls: int) -> float | str:
  for name, durations in piece.items():
    if len(durations) % calls:
      return f"the trace has {len(durations)} events of {name} in {calls} calls"
  if not piece:
    return "the trace has no events of it"
  # A kernel may run several times a call; those of one call are alike.
  totals = [statistics.median(each) * len(each) / calls for each in piece.values()]
  return sum(totals) / 1e3


class DeviceTimer:
  """Measures on the device that is there."""

  def __init__(self, threads: int, seconds: float):
    self._pool = concurrent.futures.ThreadPoolExecutor(threads)
    self._seconds = seconds
    # A program, or why there is none.
    self._compiled: dict[Item, Any] = {}
    self._packed = functools.cache(self._make_packed)
    self._x = functools.cache(self._make_x)
    self._dense: dict[tuple[int, int], tuple[jax.Array, np.ndarray]] = {}

  def time(self, items: Sequence[Item]) -> list[float | str]:
    """µs of a call of each, which run in this order; or why there are none."""
    # While the threads compile, the weights are made here.
    self._compile(dict.fromkeys(items), weights={(case.k, case.n) for case, _ in items})
    # Before the traces: what the device refuses, and the first call's own time, are not in them.
    refused = {}
    for item in dict.fromkeys(items):
      if isinstance(self._compiled[item], str):
        refused[item] = self._compiled[item]
        continue
      try:
        jax.block_until_ready(self._compiled[item](*self._arguments(item[0], 0)))
      except Exception as e:  # As in `_compile`.
        refused[item] = matmul.first_line(e)
    begun = time.monotonic()
    run = [i for i, item in enumerate(items) if item not in refused]
    found: list[float | str] = [refused.get(item, "") for item in items]
    for start in range(0, len(run), _TRACED):
      part = run[start : start + _TRACED]
      try:
        us = self._trace([items[i] for i in part])
      except Exception as e:  # What the other traces gave is kept.
        us = [matmul.first_line(e)] * len(part)
      for i, own in zip(part, us, strict=True):
        found[i] = own
    print(f"{len(run)} timed in {time.monotonic() - begun:.1f} s", flush=True)
    return found

  def _compile(self, items: Iterable[Item], weights: Iterable[tuple[int, int]]) -> None:
    start = time.monotonic()
    futures = {
      item: self._pool.submit(self._program, *item) for item in items if item not in self._compiled
    }
    for shape in weights:
      self._packed(*shape)
    left = self._seconds - (time.monotonic() - start)
    _, late = concurrent.futures.wait(futures.values(), max(0.0, left))
    for future in late:
      future.cancel()
    # Those under way would disturb what is timed.
    concurrent.futures.wait(late)
    for item, future in futures.items():
      if future.cancelled():
        self._compiled[item] = f"not compiled in {self._seconds:.0f} s"
      elif e := future.exception():  # What a compiler refuses is a result.
        self._compiled[item] = matmul.first_line(e)  # pyright: ignore[reportArgumentType]
      else:
        self._compiled[item] = future.result()
    if futures:
      print(f"{len(futures)} compiled in {time.monotonic() - start:.1f} s", flush=True)

  @staticmethod
  def _program(case: Case, candidate: Candidate) -> Any:
    arguments = (case.w(),) if case.m is None else (case.x(), case.w())
    return jax.jit(candidate.function(case.m)).lower(*arguments).compile()

  def _trace(self, items: Sequence[Item]) -> list[float | str]:
    one = jnp.ones(1)
    marker = jax.jit(jnp.cos).lower(one).compile()
    jax.block_until_ready(marker(one))
    # The device's events are all that is read; Python's would fill the trace with our own threads'.
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
      with jax.profiler.trace(directory, profiler_options=options):
        for case, candidate in items:
          marker(one)
          compiled, result = self._compiled[case, candidate], None
          for i in range(_CALLS):
            result = compiled(*self._arguments(case, i))
          jax.block_until_ready(result)
      events = _device_events(Path(directory))
    found = cut(events, _CALLS)
    if len(found) == len(items):
      return found
    names = collections.Counter(name for _, _, name in events).most_common(8)
    reason = f"the trace has {len(found)} markers for {len(items)} candidates; most events: {names}"
    return [reason] * len(items)

  def errors(self, items: Sequence[Item]) -> list[float]:
    """Of each that was timed, of that of the library's product with the dequantized weight."""
    for case, _ in items:
      # Here: they are made once, not by several threads.
      self._exact(case.k, case.n)
    return list(self._pool.map(lambda item: self._error(*item), items))

  def _error(self, case: Case, candidate: Candidate) -> float:
    compiled, arguments = self._compiled[case, candidate], self._arguments(case, 0)
    found = compiled(*arguments)
    # The kernels give the same bits at every run; with a race they would not.
    if candidate.kernel != "dequantize" and not jnp.array_equal(found, compiled(*arguments)):
      return float("inf")
    w, exact = self._exact(case.k, case.n)
    if case.m is None:
      # The weight itself, which is the definition's to the bit.
      return 1.0 if bool(jnp.array_equal(found, w)) else float("inf")
    x = arguments[0]
    return matmul.error(found, x, exact) / matmul.error(jnp.matmul(x, w), x, exact)

  def _exact(self, k: int, n: int) -> tuple[jax.Array, np.ndarray]:
    """The first weight in bf16, and, as `matmul.error` takes it, in float64."""
    if (k, n) not in self._dense:
      w = self._packed(k, n)[0]
      rounded = jax.jit(functools.partial(dequantize, dtype=jnp.bfloat16))(w)
      exact = jax.jit(lambda w: dequantize(w)[:, :: matmul.STRIDE])(w)
      self._dense[k, n] = rounded, np.asarray(exact, np.float64)
    return self._dense[k, n]

  @staticmethod
  def _make_packed(k: int, n: int) -> list:
    pack = jax.jit(lambda key: quantize(matmul.weight(key, k, n)))
    return [pack(jax.random.key(i)) for i in range(matmul.rotated(k * n // 2))]

  @staticmethod
  def _make_x(m: int, k: int) -> jax.Array:
    # NumPy's: a program for each shape would have to be compiled.
    return jnp.asarray(np.random.default_rng(m).standard_normal((m, k), np.float32), jnp.bfloat16)

  def _arguments(self, case: Case, i: int) -> tuple:
    """Of a candidate's call number i."""
    packed = self._packed(case.k, case.n)
    w = packed[i % len(packed)]
    return (w,) if case.m is None else (self._x(case.m, case.k), w)


def _device_events(directory: Path) -> list[tuple[float, float, str]]:
  """Start and duration in ns, and name, of what ran on the GPU, by a trace's file."""
  events = []
  for file in directory.rglob("*.xplane.pb"):
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
      for line in plane.lines if plane.name.startswith("/device:GPU") else ():
        if line.name and "Stream" in line.name:
          events += [(event.start_ns, event.duration_ns, event.name) for event in line.events]
  return events


def tune(cases: Sequence[Case], timer: Timer, found: dict[str, dict[str, Any]]) -> None:
  """Times the cases, and writes into `found`, by shape and class, what beats the rule."""
  times: dict[Case, dict[Candidate, float]] = {case: {} for case in cases}

  def measure(items: Sequence[Item]) -> list[float]:
    """Infinity where there are none: what a compiler or a device refuses is a result."""
    found = timer.time(items) if items else []
    for (case, candidate), us in zip(items, found, strict=True):
      print(_line(case, candidate, **{"refused" if isinstance(us, str) else "us": us}), flush=True)
    return [float("inf") if isinstance(us, str) else us for us in found]

  def first(items: Sequence[Item]) -> None:
    for (case, candidate), us in zip(items, measure(items), strict=True):
      if us < float("inf"):
        times[case][candidate] = us

  def kernels(case: Case) -> Iterable[Candidate]:
    usual = rule(case, found)
    by_library = case.m is not None and usual.kernel == "dequantize"
    return dict.fromkeys((*(() if by_library else (usual,)), *candidates(case)))

  def later(case: Case) -> Iterable[Candidate]:
    """What is timed when the kernels have been."""
    own = times[case]
    if (candidate := combined(case, own)) is not None:
      yield candidate
    # Which takes as long as dequantizing at least.
    least = min(times.get(Case(case.k, case.n, None), {}).values(), default=0.0)
    product = library(case, found)
    if rule(case, found) == product or least < min(own.values(), default=float("inf")):
      yield product

  def confirm(cases: Sequence[Case]) -> None:
    pairs: list[tuple[Case, list[Candidate]]] = []
    for case in cases:
      own, usual = times[case], rule(case, found)
      if usual in own:
        best = min(own, key=lambda each: own[each])
        if own[best] <= (1 - _GAIN) * own[usual]:
          pairs.append((case, [usual, best]))
    us = measure([(case, each) for case, both in pairs for each in both * _TURNS])
    again = []
    for i, (case, (_, best)) in enumerate(pairs):
      turns = us[2 * _TURNS * i :][: 2 * _TURNS]
      usual_us, best_us = statistics.median(turns[::2]), statistics.median(turns[1::2])
      # Also where one was refused, and is infinite.
      if best_us <= (1 - _GAIN) * usual_us < float("inf"):
        again.append((case, best, best_us, usual_us))
    errors = timer.errors([(case, best) for case, best, *_ in again])
    for (case, best, best_us, usual_us), error in zip(again, errors, strict=True):
      if not error <= _MOST_ERROR:
        print(_line(case, best, refused=f"its error is {error:.3g} of the library's"), flush=True)
        continue
      entry = best.as_json() | {"us": round(best_us, 2), "rule_us": round(usual_us, 2)}
      name = "dequantize" if case.m is None else str(case.m)
      found.setdefault(case.shape, {})[name] = entry

  alone = [case for case in cases if case.m is None]
  by_rows = [case for case in cases if case.m is not None]
  # The rule's first: without them the others are compared with nothing.
  lists = [(case, list(kernels(case))) for case in cases]
  first(
    [(case, each[0]) for case, each in lists if each]
    + [(case, candidate) for case, each in lists for candidate in each[1:]]
  )
  # XLA's products, as the rule has them, dequantize as was found to be fastest.
  confirm(alone)
  first([(case, candidate) for case in by_rows for candidate in later(case)])
  confirm(by_rows)


def _line(case: Case, candidate: Candidate, **more: Any) -> str:
  return json.dumps({"k": case.k, "n": case.n, "m": case.m, **candidate.as_json(), **more})


def spills(cases: Sequence[Case]) -> list[dict[str, Any]]:
  """Registers and bytes spilled of the candidates that multiply, compiled for an H100."""
  results = []
  for case in cases:
    for candidate in () if case.m is None else candidates(case):
      line = {"k": case.k, "n": case.n, "m": case.m, **candidate.as_json()}
      try:
        line |= gpu_compile.kernel(candidate.function(case.m), case.x(), case.w())
      except Exception as e:  # As in `tune`.
        line["refused"] = matmul.first_line(e)
      print(json.dumps(line), flush=True)
      results.append(line)
  return results


def merged(
  earlier: Mapping[str, Any], found: Mapping[str, Any], cases: Iterable[Case]
) -> dict[str, Any]:
  """A device's entries: those found, and the earlier ones but of the cases that were tuned."""
  tuned = {(case.shape, "dequantize" if case.m is None else str(case.m)) for case in cases}
  shapes = {
    shape: {name: entry for name, entry in entries.items() if (shape, name) not in tuned}
    for shape, entries in earlier.items()
  }
  for shape, entries in found.items():
    shapes[shape] = shapes.get(shape, {}) | entries
  return {shape: entries for shape, entries in shapes.items() if entries}


def main(argv: Sequence[str]) -> int:
  """Measures what `argv` asks for, and writes the table."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench.tune",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  shapes = dict.fromkeys((spec.k, spec.n) for spec in specs.REAL)
  to = parser.add_mutually_exclusive_group(required=True)
  to.add_argument("--out", type=Path)
  to.add_argument("--spills", type=Path)
  parser.add_argument("--seconds", type=float, default=60, help="for compiling, at a time")
  parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 2))
  parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in shapes))
  parser.add_argument("--rows", default=",".join(map(str, tuning.ROWS)))
  arguments = parser.parse_args(argv)
  rows = [int(m) for m in arguments.rows.split(",")]
  if strange := set(rows) - set(tuning.ROWS):
    parser.error(f"--rows: no class of rows ends at {min(strange)}; {tuning.ROWS}")
  cases = [
    Case(int(k), int(n), m)
    for m in (None, *rows)
    for k, _, n in (shape.partition("x") for shape in arguments.shapes.split(","))
  ]
  if arguments.spills is not None:
    if reason := gpu_compile.unavailable():
      print(f"error: {reason}", file=sys.stderr)
      return 2
    arguments.spills.write_text(json.dumps(spills(cases), indent=1) + "\n")
    return 0
  if not arguments.out.resolve().parent.is_dir():
    print(f"error: --out {arguments.out}: there is no such directory", file=sys.stderr)
    return 2
  if jax.default_backend() != "gpu":
    print(f"error: the device is a {jax.default_backend()}; a GPU is wanted", file=sys.stderr)
    return 2
  device = jax.devices()[0].device_kind
  print(f"on {device}, JAX {jax.__version__}, {arguments.threads} threads", flush=True)
  found: dict[str, dict[str, Any]] = {}
  finished = False
  try:
    tune(cases, DeviceTimer(arguments.threads, arguments.seconds), found)
    finished = True
  finally:
    # Also if it stops early: what was measured is kept.
    entries = merged(tuning.table().get(device, {}), found, cases if finished else ())
    arguments.out.write_text(json.dumps(tuning.table() | {device: entries}, indent=1) + "\n")
  count = sum(map(len, found.values()))
  print(f"{count} of {len(cases)} classes are served better than by the rule: {arguments.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""The benchmarks of generation and of the GPU's kernels, as far as they go without a GPU."""

import contextlib
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import generate, gpu_compile, matmul, tune
from qlora_jax import dequantize, quantize, quantized_matmul
from qlora_jax.matmul import gpu, tuning


@pytest.mark.slow
def test_generation_is_timed(tmp_path, capsys):
  out = tmp_path / "generate.json"
  arguments = ["--out", str(out), "--model", "tiny", "--context", "48", "--batch", "1,2"]
  assert generate.main(arguments) == 0
  report = json.loads(out.read_text())
  assert [found["batch"] for found in report["results"]] == [1, 2]
  for found in report["results"]:
    assert found["tokens_per_second"] == pytest.approx(found["batch"] / found["step_seconds"])
  assert "on cpu" in capsys.readouterr().out


def test_a_context_that_holds_no_prompt_is_refused(tmp_path, capsys):
  with pytest.raises(SystemExit):
    generate.main(["--out", str(tmp_path / "x"), "--context", "40"])
  assert "--context 40; more than 40" in capsys.readouterr().err


@pytest.mark.parametrize("batch", ["1,x", "0", ""])
def test_a_batch_that_is_none_is_refused(batch, tmp_path, capsys):
  with pytest.raises(SystemExit):
    generate.main(["--out", str(tmp_path / "x"), "--model", "tiny", f"--batch={batch}"])
  assert "argument --batch" in capsys.readouterr().err


@pytest.mark.skipif(gpu_compile.unavailable() is None, reason="the GPU's compiler is installed")
def test_without_the_compiler_it_says_what_is_missing(tmp_path, capsys):
  assert gpu_compile.main(["--out", str(tmp_path / "x.json")]) == 2
  assert "not installed: jax" in capsys.readouterr().err
  assert not (tmp_path / "x.json").exists()


@pytest.mark.skipif(gpu_compile.unavailable() is not None, reason="needs the GPU's compiler")
@pytest.mark.parametrize("rows", [1, 64, 256])
def test_kernels_compile_for_an_h100_without_spills(rows):
  w = jax.eval_shape(lambda: quantize(jnp.zeros((4096, 4096))))
  found = gpu_compile.kernel(gpu.forward, jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16), w)
  assert found["spilled"] == 0
  assert 64 < found["registers"] <= 255


@pytest.mark.skipif(gpu_compile.unavailable() is not None, reason="needs the GPU's compiler")
def test_a_layer_is_read_where_it_lies_in_its_stack():
  stack = jax.eval_shape(lambda: jax.vmap(lambda _: quantize(jnp.zeros((1024, 1024))))(jnp.ones(4)))

  def scan(x, stack):
    return jax.lax.scan(lambda x, w: (quantized_matmul(x, w), None), x, stack)[0]

  x = jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16)
  compiled = gpu_compile.compile_for_h100(scan, x, stack)
  # XLA's fusion of the kernel with the slice of its operand; else the codes were temporaries.
  assert "dynamic_slice_fusion" in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 1024 // 2


def test_times_are_drawn_from_the_json(tmp_path):
  pytest.importorskip("matplotlib")
  row = {"work": "forward", "k": 64, "n": 128}
  report = {
    "device": "a card",
    "results": [
      row | {"m": m, "implementation": name, "us": float(m), "share_of_floor": 0.5}
      for m in (16, 1)
      for name in ("gpu", "xla")
    ],
  }
  (tmp_path / "matmul.json").write_text(json.dumps(report))
  assert (
    matmul.main(["--draw", str(tmp_path / "matmul.json"), "--plots", str(tmp_path / "to")]) == 0
  )
  svg = (tmp_path / "to" / "forward-64x128.svg").read_text()
  assert all(f">{name}<" in svg for name in ("gpu", "xla", "floor")) and "a card" in svg


def test_a_benchmark_without_a_place_for_its_result_is_refused(capsys):
  with pytest.raises(SystemExit):
    matmul.main([])
  assert "--out is wanted, or --draw" in capsys.readouterr().err


def test_a_peer_in_another_process_that_cannot_run_is_refused(capfd):
  # torch, bitsandbytes or a GPU is missing here.
  (result,) = matmul.measure_bitsandbytes(64, 64, (1,))
  assert result["implementation"] == "bitsandbytes"
  assert result["refused"]
  assert json.loads(capfd.readouterr().out) == result


# Products beside their peers


def test_a_peer_that_fails_is_a_result(monkeypatch, capsys):
  def make(k, n, count):
    weights = [jnp.ones((k, n)) * (i + 1) for i in range(count)]
    return matmul.Peer(jnp.matmul, weights, np.ones((k, n))[:, :: matmul.STRIDE])

  def not_made(k, n, count):
    raise ImportError("no name\nof many lines")

  def refusing(x, w):
    raise NotImplementedError("one row") if len(x) == 1 else ValueError("many")

  def timed(function, arguments):
    return {"us": 2.0}, function(*arguments[0])

  # Modules that are installed; one that is not is passed over.
  made = {
    "json": make,
    "csv": not_made,
    "ast": lambda *shape: dataclasses.replace(make(*shape), product=refusing),
    "not_installed": not_made,
  }
  monkeypatch.setattr(matmul, "PEERS", made)
  monkeypatch.setattr(matmul, "_CALLS", 2)
  monkeypatch.setattr(matmul, "time_jax", timed)
  monkeypatch.setattr(matmul.jax, "default_backend", lambda: "xla")
  results = matmul.measure(128, 256, [1, 2, 3], [1, 2], {"bytes_s": 1e12, "flop_s": 1e15})
  rows = {(r["implementation"], r["m"]): r for r in results if r["work"] != "dequantize"}
  assert rows["csv", 0]["refused"] == "ImportError: no name"
  assert rows["ast", 1]["refused"] == "NotImplementedError: one row"
  assert rows["ast", 2]["refused"] == "ValueError: many"
  assert {m for name, m in rows if name == "json"} == {1, 2}
  # Of its own weight, in which ours has no part.
  assert rows["json", 2]["own_format_error"] < 1e-2
  assert {m for name, m in rows if name == "xla"} == {1, 2, 3}
  assert rows["xla", 2]["error"] < 1e-2
  assert capsys.readouterr().out.count("refused") == 3


def on_an_h200():
  device = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


needs_kernels = pytest.mark.skipif(
  jax.__version_info__ < (0, 11, 2), reason="the GPU's kernels need JAX 0.11.2"
)


@needs_kernels
def test_what_served_is_named(monkeypatch):
  tiles = {"rows": 4, "column_warps": 2, "warps": 8, "lane_columns": 4}
  tuned = {"kernel": "few_rows", "tiles": tiles}
  table = {"NVIDIA H200": {"256x512": {"1": tuned | {"us": 1.0, "rule_us": 2.0}}}}
  monkeypatch.setattr(tuning, "table", lambda: table)
  w = jax.eval_shape(lambda: quantize(jnp.zeros((256, 512))))

  def served(rows):
    x = None if rows is None else jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
    with on_an_h200():
      return matmul.served(x, w)

  assert served(1) == tuned | {"tuned": True}
  assert served(4) == {
    "kernel": "few_rows",
    "tiles": {"rows": 4, "column_warps": 1, "warps": 16, "lane_columns": 4},
    "tuned": False,
  }
  assert served(100)["kernel"] == "tiles" and not served(100)["tuned"]
  assert served(4096) == served(None)
  assert served(None) == {
    "kernel": "dequantize",
    "tiles": {"rows": 16, "columns": 256, "warps": 4},
    "tuned": False,
  }


# The tuner


class StubTimer:
  """Takes the times from a function of the case, the candidate and how often it was asked."""

  def __init__(self, us, error=lambda case, candidate: 1.0):
    self.us, self.error, self.asked, self.rounds = us, error, [], []

  def time(self, items):
    self.rounds.append(list(items))
    found = []
    for item in items:
      self.asked.append(item)
      found.append(self.us(*item, self.asked.count(item)))
    return found

  def errors(self, items):
    return [self.error(*item) for item in items]


def tuned(cases, timer):
  found = {}
  with on_an_h200():
    tune.tune(cases, timer, found)
  return found


def only_faster(kernel, us, **fields):
  """100 µs, but for candidates with these fields."""

  def time(case, candidate, times):
    own = dataclasses.asdict(candidate.tiles)
    fits = candidate.kernel == kernel and fields.items() <= own.items()
    return us if fits else 100.0

  return time


@needs_kernels
@pytest.mark.parametrize(
  ("m", "kernel", "fields"),
  [
    (1, "few_rows", {"column_warps": 2, "warps": 16, "lane_columns": 8}),
    (4, "few_rows", {"rows": 4, "column_warps": 4, "warps": 16, "lane_columns": 4}),
    (16, "few_rows", {"rows": 8, "column_warps": 2, "warps": 8, "lane_columns": 8}),
    # The rule would take the other kernel.
    (16, "tiles", {"rows": 16, "splits": 1}),
    (32, "tiles", {"rows": 32, "splits": 4, "stages": 4, "promoted": True}),
    (64, "tiles", {"rows": 64, "splits": 2, "stages": 6}),
    (128, "tiles", {"rows": 64, "splits": 1}),
    (256, "dequantize", {}),
    (1024, "tiles", {"rows": 256, "stages": 4}),
    (None, "dequantize", {"rows": 32, "columns": 128, "warps": 8}),
  ],
)
def test_the_fastest_is_written(m, kernel, fields):
  case = tune.Case(4096, 14336, m)
  found = tuned([case], StubTimer(only_faster(kernel, 90.0, **fields)))
  entry = found["4096x14336"]["dequantize" if m is None else str(m)]
  assert (entry["kernel"], entry["us"], entry["rule_us"]) == (kernel, 90.0, 100.0)
  assert fields.items() <= entry["tiles"].items()


@needs_kernels
def test_it_is_timed_in_turns_with_the_rule():
  case = tune.Case(4096, 14336, 1)
  timer = StubTimer(only_faster("few_rows", 90.0, column_warps=4, warps=16, lane_columns=4))
  tuned([case, tune.Case(4096, 4096, 1)], timer)
  # All kernels first; of the other shape nothing was faster.
  kernels, products, turns = timer.rounds
  assert {each for each, _ in kernels} == {case, tune.Case(4096, 4096, 1)}
  assert [candidate.kernel for _, candidate in products] == ["dequantize"] * 2
  assert len(turns) == 6 and turns == turns[:2] * 3
  with on_an_h200():
    assert turns[0] == (case, tune.rule(case, {}))


def wide(us):
  """What the rule takes of no shape."""
  return only_faster("few_rows", us, warps=16, lane_columns=8)


@needs_kernels
@pytest.mark.parametrize(
  "timer",
  [
    # Too little; luck, which does not come again; wrong numbers, or none.
    StubTimer(wide(97.5)),
    StubTimer(
      lambda case, candidate, times: wide(50.0 if times < 2 else 100.0)(case, candidate, 0)
    ),
    StubTimer(wide(50.0), lambda case, candidate: 1.2),
    StubTimer(wide(50.0), lambda case, candidate: float("nan")),
  ],
)
def test_what_is_no_better_is_not_written(timer):
  assert tuned([tune.Case(4096, 4096, 1), tune.Case(4096, 14336, 1)], timer) == {}


@needs_kernels
def test_a_candidate_that_is_refused_is_printed(capsys):
  def us(case, candidate, times):
    if candidate.kernel == "dequantize":
      return 200.0
    if candidate.tiles.column_warps == 8:
      return "RuntimeError: too many registers"
    return {4: 50.0, 2: 100.0}.get(candidate.tiles.column_warps, 200.0)

  found = tuned([tune.Case(4096, 14336, 1)], StubTimer(us))
  assert found["4096x14336"]["1"]["tiles"]["column_warps"] == 4
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  refused = [line for line in lines if "refused" in line]
  assert [line["refused"] for line in refused] == ["RuntimeError: too many registers"]
  assert refused[0]["tiles"]["column_warps"] == 8


@needs_kernels
def test_what_helped_is_tried_together():
  def us(case, candidate, times):
    tiles = candidate.tiles
    if candidate.kernel != "tiles":
      return 200.0
    return 100.0 - 10 * (tiles.splits == 2) - 10 * (tiles.k_sets == 2) + 10 * (not tiles.promoted)

  entry = tuned([tune.Case(4096, 14336, 32)], StubTimer(us))["4096x14336"]["32"]
  assert entry["us"] == 80.0
  assert (entry["tiles"]["splits"], entry["tiles"]["k_sets"]) == (2, 2)
  assert entry["tiles"]["promoted"]


@needs_kernels
@pytest.mark.parametrize("refused", ["first", "again"])
def test_a_rule_that_was_not_timed_is_not_beaten(refused):
  case = tune.Case(4096, 14336, 1)
  with on_an_h200():
    usual = tune.rule(case, {})

  def us(case, candidate, times):
    if candidate == usual and times >= {"first": 1, "again": 2}[refused]:
      return "refused"
    return 50.0 if candidate.kernel == "few_rows" and candidate != usual else 100.0

  assert tuned([case], StubTimer(us)) == {}


@needs_kernels
@pytest.mark.parametrize(("alone", "asked"), [(90.0, True), (110.0, False)])
def test_the_library_is_timed_where_it_may_be_faster(alone, asked):
  def us(case, candidate, times):
    return alone if case.m is None else 80.0 if candidate.kernel == "dequantize" else 100.0

  timer = StubTimer(us)
  found = tuned([tune.Case(4096, 14336, m) for m in (None, 512)], timer)
  products = [(case, each) for case, each in timer.asked if case.m and each.kernel == "dequantize"]
  assert bool(products) == asked
  assert found == ({"4096x14336": {"512": found["4096x14336"]["512"]}} if asked else {})


@needs_kernels
def test_dequantizing_as_found_is_the_rule_of_more_rows():
  timer = StubTimer(only_faster("dequantize", 50.0, rows=32, columns=128, warps=8))
  found = tuned([tune.Case(4096, 14336, m) for m in (None, 1024)], timer)
  assert found["4096x14336"].keys() == {"dequantize"}
  assert tune.Candidate("dequantize", tune.rule(tune.Case(4096, 14336, 1024), found).tiles) in [
    candidate for case, candidate in timer.asked if case.m
  ]


# A marker, and kernels of a candidate's two calls: of one name, of two, of one twice a call.
def events_of_three():
  names = ["wrapped_cosine", "mosaic", "mosaic"]
  names += ["wrapped_cosine", *("dequantize", "gemm") * 2]
  names += ["wrapped_cosine", *("gemm", "gemm", "sum") * 2]
  durations = {"wrapped_cosine": 9e9, "mosaic": 1e3, "dequantize": 2e3, "gemm": 5e3, "sum": 250.0}
  return [(100.0 * i, durations[name], name) for i, name in enumerate(names)]


def test_a_trace_is_cut_at_its_markers():
  events = events_of_three()
  assert tune.cut(events, 2) == [1.0, 7.0, 10.25]
  # The order is that of the starts; what came before is nobody's; a call may take longer once.
  assert tune.cut([*reversed(events), (-1.0, 5e3, "gemm")], 2) == [1.0, 7.0, 10.25]
  slow = [(start, 1e6 if start == 100.0 else us, name) for start, us, name in events]
  slow += [(250.0, 1e3, "mosaic"), (260.0, 1e3, "mosaic")]
  assert tune.cut(slow, 2)[0] == 2.0
  assert tune.cut([], 2) == []


def test_a_trace_that_lost_events_gives_no_times():
  events = events_of_three()
  lost = [event for i, event in enumerate(events) if i not in (1, 2, 5)]
  nothing, too_few, whole = tune.cut(lost, 2)
  assert nothing == "the trace has no events of it"
  assert too_few == "the trace has 1 events of gemm in 2 calls"
  assert whole == 10.25


@pytest.fixture
def on_this_device(monkeypatch):
  """Items of products by name, that run here; and the events of a trace, to be filled."""
  products = {
    "right": quantized_matmul,
    "wrong": lambda x, w: x @ dequantize(w, x.dtype) * 1.5,
    "refused": lambda x, w: x @ x,
    "slow": lambda x, w: time.sleep(1),
  }
  events = []
  monkeypatch.setattr(tune, "_CALLS", 2)
  monkeypatch.setattr(tune.Candidate, "function", lambda self, m: products[self.kernel])
  monkeypatch.setattr(tune.jax.profiler, "trace", lambda *_, **__: contextlib.nullcontext())
  monkeypatch.setattr(tune, "_device_events", lambda directory: events)
  case = tune.Case(256, 128, 4)
  return {name: (case, tune.Candidate(name, None)) for name in products}, events


def test_the_tuner_measures_what_candidates_compute(on_this_device):
  items, events = on_this_device
  names = ["wrapped_cosine", "one", "one", "wrapped_cosine", "other", "other"]
  durations = {"wrapped_cosine": 5.0, "one": 1e3, "other": 2e3}
  events += [(float(i), durations[name], name) for i, name in enumerate(names)]
  timer = tune.DeviceTimer(threads=2, seconds=600)
  right, refused, wrong = timer.time([items["right"], items["refused"], items["wrong"]])
  assert (right, wrong) == (1.0, 2.0)
  assert "dot_general" in str(refused)
  right, wrong = timer.errors([items["right"], items["wrong"]])
  assert right == pytest.approx(1, rel=0.3) and wrong > 10


def test_a_trace_without_its_markers_gives_no_times(on_this_device):
  items, events = on_this_device
  events += [(0.0, 5.0, "a kernel"), (1.0, 5.0, "wrapped_cosine")]
  (found,) = set(tune.DeviceTimer(2, 600).time([items["right"], items["wrong"]]))
  assert "1 markers for 2 candidates" in str(found) and "a kernel" in str(found)


def test_a_trace_that_fails_gives_no_times(on_this_device, monkeypatch):
  def fails(directory):
    raise RuntimeError(f"no {next(failures)}")

  items, _ = on_this_device
  failures = iter(("first", "second"))
  monkeypatch.setattr(tune, "_TRACED", 1)
  monkeypatch.setattr(tune, "_device_events", fails)
  found = tune.DeviceTimer(2, 600).time([items["right"], items["wrong"]])
  assert found == ["RuntimeError: no first", "RuntimeError: no second"]


def test_what_is_not_compiled_in_time_is_not_timed(on_this_device):
  items, _ = on_this_device
  timer = tune.DeviceTimer(threads=1, seconds=0)
  timer._packed(256, 128)
  (_, late) = timer.time([items["slow"], items["right"]])
  assert late == "not compiled in 0 s"


@needs_kernels
@pytest.mark.parametrize("kernel", ["few_rows", "tiles", "dequantize"])
def test_candidates_lower_for_a_gpu(kernel):
  case = tune.Case(256, 8192, 16)
  with on_an_h200():
    candidate = next(
      (each for each in tune.candidates(case) if each.kernel == kernel),
      tune.Candidate("dequantize", tune.library(case, {}).tiles),
    )
    program = matmul.program(candidate.function(case.m))
    text = program.trace([(case.x(), case.w())] * 2).lower(lowering_platforms=("cuda",)).as_text()
  # Once, for both calls.
  name = "__gpu$xla.gpu.triton" if kernel == "dequantize" else "mosaic_gpu_v2"
  assert text.count(f"custom_call @{name}(") == 1


@needs_kernels
def test_the_table_keeps_other_devices(tmp_path, monkeypatch, capsys):
  earlier = {"1x1": {"1": {}}, "4096x14336": {"dequantize": {}, "8": {}}}
  monkeypatch.setattr(tuning, "table", lambda: {"another": {}, "cpu": earlier})
  monkeypatch.setattr(tune.jax, "default_backend", lambda: "gpu")
  timer = StubTimer(only_faster("few_rows", 50.0, column_warps=4))
  monkeypatch.setattr(tune, "DeviceTimer", lambda threads, seconds: timer)
  out = tmp_path / "tuning.json"
  with on_an_h200():
    arguments = ["--out", str(out), "--shapes", "4096x14336", "--rows", "1,4"]
    assert tune.main(arguments) == 0
  table = json.loads(out.read_text())
  assert table.keys() == {"another", "cpu"}
  # Of the device's own, those that were not timed again stay.
  assert table["cpu"]["4096x14336"].keys() == {"1", "4", "8"}
  assert table["cpu"]["1x1"].keys() == {"1"}
  assert "2 of 3 classes are served better than by the rule" in capsys.readouterr().out


def test_the_tuner_refuses_what_it_cannot_do(tmp_path, capsys):
  out = ["--out", str(tmp_path / "x.json")]
  assert tune.main(out) == 2
  assert "the device is a cpu; a GPU is wanted" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    tune.main([*out, "--rows", "1,5"])
  assert "no class of rows ends at 5" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    tune.main([])
  assert "--out" in capsys.readouterr().err
  assert not (tmp_path / "x.json").exists()

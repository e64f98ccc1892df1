"""The TPU's benchmarks, without one: the model's arithmetic, what was compiled, the timing."""

import functools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import matmul, tpu_compile, tpu_compiler, tpu_model
from qlora_jax.matmul import api, specs, tpu_tiles
from qlora_jax.models.transformer import TransformerConfig

ROOT = Path(__file__).resolve().parents[2]
needs_kernel = pytest.mark.skipif(
  jax.__version_info__ < (0, 11, 2), reason="the kernel needs JAX 0.11.2"
)
compiles = pytest.mark.skipif(
  tpu_compiler.unavailable() is not None, reason=str(tpu_compiler.unavailable())
)


def test_the_model_names_what_bounds_a_product(tmp_path, capsys):
  few, many = (tpu_model.predict("v5e", 4096, 14336, rows) for rows in (16, 4096))
  assert (few["bound"], many["bound"]) == ("decoding", "products")
  # 2 · M · K · N at the published peak.
  assert many["bf16_seconds"] == pytest.approx(2 * 4096 * 4096 * 14336 / 197e12)
  # 1.5 GHz is what four units of 128 × 128 take for it.
  assert tpu_model.CHIPS["v5e"].cycles_s == pytest.approx(1.5e9, rel=0.01)
  weights = 4096 * 14336
  assert few["seconds"] == pytest.approx(weights / 1024 * 2.57 / 1.503e9, rel=1e-3)
  assert many["seconds"] == pytest.approx(4 * weights / 1024 * 16.96 / 1.503e9, rel=1e-3)
  assert few["parts"]["bytes"] > weights * 4.127 / 8 / 819e9
  # On the line between 256 and 1,024, of which 640 is the middle; two passes of as many.
  middle = tpu_model.predict("v6e", 4096, 14336, 1280)
  assert middle["parts"]["steps"] == pytest.approx(
    2 * weights / 1024 * (2.74 + 5.19) / 2 / tpu_model.CHIPS["v6e"].cycles_s
  )
  # 11 tiles of 1,024, 2 of 768.
  for n, decoded in ((11008, 11 * 1024), (1536, 1536)):
    found = tpu_model.predict("v5e", 4096, n, 16)["parts"]["steps"]
    assert found == pytest.approx(few["seconds"] * decoded / 14336)
  out = tmp_path / "model.json"
  assert tpu_model.main(["--shapes", "4096x14336", "--rows", "16,4096", "--out", str(out)]) == 0
  report = json.loads(out.read_text())
  assert len(report["results"]) == 2 * len(tpu_model.CHIPS)
  assert report["ran_on"] is None
  assert "nothing here was run" in capsys.readouterr().out


@needs_kernel
def test_one_command_fills_the_table_on_a_tpu(tmp_path, monkeypatch, capsys):
  def busy(function, calls):
    jax.block_until_ready(function())
    return {"us": 50.0, "call_us": 60.0}

  kernel: Any = functools.partial(tpu_tiles.product, interpret=True)
  gradient: Any = functools.partial(kernel, transposed=True)
  implementation = api.Implementation(kernel, gradient, lambda x, w: None)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "tpu", implementation)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(matmul, "busy", busy)
  monkeypatch.setattr(matmul, "measure_ceilings", lambda: {"bytes_s": 1e9, "flop_s": 1e12})
  monkeypatch.setattr(matmul, "_CALLS", 1)
  monkeypatch.setattr(matmul, "measure_bitsandbytes", lambda k, n, rows: [])
  out = tmp_path / "matmul.json"
  assert matmul.main(["--shapes", "256x128", "--rows", "2,512", "--out", str(out)]) == 0
  assert capsys.readouterr().out.startswith(f"on {jax.devices()[0].device_kind} (tpu), JAX ")
  found = {
    (each["work"], each["m"], each["implementation"]): each
    for each in json.loads(out.read_text())["results"]
  }
  for name in ("tpu", "xla", "bf16 library"):
    assert found["forward", 2, name]["error"] < 4e-3, name  # rounding y to bfloat16
    assert ("forward and dx", 512, name) in found
  # 2 rows: the packed bytes, and those of x and y, at 1 GB/s.
  packed = 256 * 128 * (4 + 8 / 64) / 8 + 2 * 4 + 4 + 16 * 4
  expected = (packed + 2 * 2 * (256 + 128)) / 1e9 / 50e-6
  assert found["forward", 2, "tpu"]["share_of_floor"] == pytest.approx(expected, rel=0.01)


def test_a_tpus_time_is_that_of_its_programs(monkeypatch):
  def line(name, *durations):
    events = [types.SimpleNamespace(name=f"jit_{name}", duration_ns=each) for each in durations]
    return types.SimpleNamespace(name=name, events=events)

  # What they consist of is listed below them, and the host's own lines stand beside.
  device = [line("XLA Modules", 4000, 6000, 9000), line("XLA Ops", 3000, 3000), line("Steps", 9)]
  planes = [
    types.SimpleNamespace(name="/device:TPU:0", lines=device),
    types.SimpleNamespace(name="/host:CPU", lines=[line("XLA Modules", 7)]),
  ]
  profile = types.SimpleNamespace(planes=planes)
  monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: profile)
  # A median of 6000 ns for a program of two calls.
  assert matmul.busy(lambda: jnp.zeros(()), 2)["us"] == pytest.approx(3.0)


def test_the_models_table_is_what_it_predicts():
  table = json.loads((ROOT / "experiments/results/tpu_model.json").read_text())["results"]
  assert len(table) == len(tpu_model.CHIPS) * len(tpu_model.SHAPES) * len(tpu_model.ROWS)
  for row in table:
    assert row == tpu_model.predict(row["chip"], row["k"], row["n"], row["rows"])


@pytest.mark.parametrize("chip", tpu_model.CHIPS)
def test_the_model_takes_what_was_compiled(chip):
  report = json.loads((ROOT / "experiments/results/tpu_real.json").read_text())
  for rows, bundles in tpu_model.BUNDLES[chip].items():
    # A step takes 1,024 of 4,096.
    name = f"{4096 if rows == 1024 else rows}x4096x14336-bfloat16-nf4-b64-double"
    (found,) = (
      each
      for each in report["real"]
      if (each["chip"], each["spec"], each["work"]) == (chip, name, "forward")
    )
    assert bundles == round(found["bundles_for_1024_weights"], 2)
    # A matrix unit's products take as long as they take: no fewer bundles than they fill.
    least = rows * 1024 / tpu_model.CHIPS[chip].products
    assert found["bundles_for_1024_weights"] > least


def test_bundles_that_wait_are_of_a_step(tmp_path, monkeypatch):
  def write(number, name, text):
    (tmp_path / f"17-product.1-{number}-{name}.txt").write_text(text)

  def utilization(bundles):
    rows = "\n".join(" ".join(map(str, row)) for row in bundles)
    return f"== CAPACITY:\nMXU, VALU\n 2 4\n== UTILIZATION:\n{rows}\n"

  # A step of three bundles between two branches, the second of which waits for the product.
  issued = [(0, 1), (2, 3), (2, 4), (0, 2)]
  waiting = [issued[0], (0, 0), *issued[1:2], (2, 0), *issued[2:]]
  write(69, "final_hlo-static-per-bundle-utilization", utilization(issued))
  write(67, "pre-delay_hlo-static-per-bundle-utilization", utilization(waiting))
  write(71, "final_bundles", " 0   :  { }\n 0x1 PF: > { }\n 0x2   : > { }\n 0x3 PF: > { }\n")
  monkeypatch.setattr(tpu_compiler, "_folder", tmp_path)
  found = tpu_compiler.schedule("product")
  assert (found.bundles, found.units) == (3, {"MXU": 6, "VALU": 7})
  assert found.slots == {"MXU": 2, "VALU": 4}
  issued[:2] = [(2, 3), (0, 1)]
  write(69, "final_hlo-static-per-bundle-utilization", utilization(issued))
  with pytest.raises(RuntimeError, match="'product': another order of bundles"):
    tpu_compiler.schedule("product")


@pytest.mark.slow
@compiles
@needs_kernel
def test_a_train_step_is_compiled_over_four_chips(monkeypatch):
  small = TransformerConfig(512, 256, 512, 2, 4, 2, 64)
  monkeypatch.setattr(tpu_compile, "architecture", lambda name: small)
  monkeypatch.setattr(tpu_compile, "BATCH", (4, 128))
  ours, plain = (tpu_compile.measure_step("v6e", "small", name) for name in (None, "xla"))
  # 7 projections, forward, again for the backward pass, and their gradients, less what is not used.
  assert (ours["product"], plain["kernels"]) == ("tpu", 0)
  assert 14 <= ours["kernels"] <= 21
  # A quarter of the packed base and of the embeddings, and all of the adapters, on each chip.
  assert 0 < ours["argument_bytes"] == plain["argument_bytes"] < ours["bytes_a_chip"] < 2**27


@pytest.mark.slow
@compiles
@needs_kernel
def test_the_compilers_schedules_are_read(tmp_path):
  out = tmp_path / "tpu.json"
  command = [sys.executable, "-m", "experiments.bench.tpu_compile", "--parts", "decodes,real"]
  cases = "16x2048x2048,16x384x1664-float32"
  command += ["--chips", "v6e", "--cases", cases, "--without-xla"]
  # In a process of its own: the compiler is told at its start to write them.
  subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=True)
  report = json.loads(out.read_text())
  assert (report["compiled_for"], report["ran_on"]) == (["v6e"], None)
  bundles = {each["decode"]: each["bundles"] for each in report["decodes"]}
  # What the kernel rests on: two units share the work.
  assert min(bundles, key=bundles.__getitem__).startswith("by sublane, each")
  assert 1 < min(bundles.values()) < 3
  works = [each["work"] for each in report["real"]]
  assert works == 2 * ["forward", "input gradient"]
  assert all("xla" not in each for each in report["real"])
  assert [each["spec"].split("-")[1] for each in report["real"][::2]] == ["bfloat16", "float32"]
  assert all(each["bundles_for_1024_weights"] > 2 for each in report["real"])
  # Of the kernel as it is what the model and README have.
  found = report["real"][0]["bundles_for_1024_weights"]
  assert found == pytest.approx(tpu_model.BUNDLES["v6e"][16], rel=0.01)


@needs_kernel
def test_a_case_is_a_spec_or_a_shape(tmp_path, capsys):
  def names(cases, parts=("real", "specs")):
    return {part: [*map(str, found)] for part, found in tpu_compile.chosen(cases, parts).items()}

  everything = names("")
  assert len(everything["real"]) == len(specs.REAL)
  assert len(everything["specs"]) == sum(spec.dtype != "float16" for spec in specs.SMALL)
  # No beginning of a listed one; that one itself; twice.
  for n in (1433, 14336):
    case = f"16x4096x{n}"
    assert names(f"{case},{case}")["real"] == [f"{case}-bfloat16-nf4-b64-double"]
  assert names("16x128x128-float32")["real"] == ["16x128x128-float32-nf4-b64-double"]
  assert len(names("16x4096")["real"]) == 2 and names("5x129")["specs"]
  for case, parts in (("16x25", ["real"]), ("7x7x7", ["specs", "strips"])):
    with pytest.raises(ValueError, match=f"no case of {', '.join(parts)} starts with '{case}'"):
      tpu_compile.chosen(case, parts)
  with pytest.raises(SystemExit):
    tpu_compile.main(["--out", str(tmp_path / "tpu.json"), "--cases", "x"])
  assert "starts with 'x'; one of specs is" in capsys.readouterr().err


@pytest.mark.parametrize("chip", tpu_model.CHIPS)
def test_the_strips_that_go_by_lane_are_backed_by_their_count(chip):
  report = json.loads((ROOT / "experiments/results/tpu_strips.json").read_text())
  bundles = {
    each["each_strip_by_lane"]: each["bundles"]
    for each in report["strips"]
    if (each["chip"], each["rows"]) == (chip, 16)
  }
  assert len(bundles) == 5
  assert min(bundles, key=bundles.__getitem__) == tpu_tiles.BY_LANE
  assert bundles[tpu_tiles.BY_LANE] == pytest.approx(tpu_model.BUNDLES[chip][16], abs=0.005)

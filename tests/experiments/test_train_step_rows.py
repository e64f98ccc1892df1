"""Rows of the benchmark: their options and bases, what the plan says beside them, figures."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qlora_jax as ql
from experiments.bench import train_step, train_step_plots
from qlora_jax import plan
from qlora_jax.hf import checkpoint, stacks
from qlora_jax.models.transformer import Transformer

ROOT = Path(__file__).parents[2]


def results():
  rows = json.loads((ROOT / "experiments/bench/train_step_h100.json").read_text())[:2]
  for entry in rows:
    ours, row = entry["ours"], train_step.Row.parse(entry["row"])
    ours.setdefault("step_bytes", ours["peak_bytes"])
    ours["plan"] = train_step.planned(row, ours)
  return rows


def test_the_plan_stands_beside_a_row():
  first = results()[0]["ours"]
  said = first["plan"]
  assert said["peak_bytes"] == sum(v for k, v in said["bytes"].items() if k != "host")
  assert said["peak_error"] == said["peak_bytes"] / first["step_bytes"] - 1
  assert abs(said["peak_error"]) < 0.05
  assert abs(said["step_error"]) < 0.15
  assert train_step.planned_device("cpu") is None
  for kind, name in (
    ("TPU v5 lite", "v5e"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ("NVIDIA RTX A6000", "a6000"),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ("NVIDIA H100 80GB HBM3", "h100"),
  ):
    assert train_step.planned_device(kind) == plan.DEVICES[name], kind


def test_a_link_of_unknown_speed_gives_no_time_of_a_row():
  measured = {"device": "TPU v5 lite", "step_bytes": 10**10, "step_seconds": [1.0]}
  row = train_step.Row.parse("tiny:1x64:full:adam-host")
  said = train_step.planned(row, measured)
  assert said is not None
  assert said["step_seconds"] is said["step_error"] is said["seconds"]["host"] is None
  found = {"tokens_per_second": 1.0, "peak_bytes": 1, "plan": said}
  assert train_step.line("row", "ours", found).rstrip().endswith("%, no time")


def test_figures_are_drawn(tmp_path):
  pytest.importorskip("matplotlib")
  rows = [*results(), {"row": "llama-70b:1x2048:full", "ours": {"error": "x", "log": ""}}]
  (tmp_path / "train.json").write_text(json.dumps(rows))
  arguments = ["--draw", str(tmp_path / "train.json"), "--plots", str(tmp_path / "figures")]
  assert train_step.main(arguments) == 0
  drawn = {path.stem: path.read_text() for path in (tmp_path / "figures").iterdir()}
  assert sorted(drawn) == ["memory", "speed-llama-8b"]
  assert all(svg.startswith("<svg") for svg in drawn.values())
  assert "llama-8b:4x2048:full (10.38 measured)" in drawn["memory"]
  with pytest.raises(ValueError, match="no row ran"):
    train_step_plots.draw(rows[-1:], tmp_path)


def test_options_of_a_row():
  row = train_step.Row.parse("llama-8b:1x64:full:tables4:adam-8bit")
  assert (row.table_bits, row.adam, row.quantized) == (4, "8bit", True)
  assert not row.is_plain
  plain = train_step.planner(train_step.Row.parse("llama-8b:1x64:full"))
  small = train_step.planner(row)
  step = train_step.plan_step(row)
  # Two tables of 16 bits in a little over 4; two moments of 32 bits in a little over 8.
  tables = 2 * 128256 * 4096
  assert plain.memory(step).base - small.memory(step).base == pytest.approx(1.48 * tables, rel=0.01)
  assert small.memory(step).optimizer == pytest.approx(plain.memory(step).optimizer / 4, rel=0.03)


def test_a_random_base_is_written_in_place():
  model = Transformer(train_step.architecture("tiny"))
  base = train_step.random_base(model, True, 8)
  like = checkpoint.abstract_base(model, train_step.rules(model.config, True, 8), jnp.bfloat16)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), base) == jax.tree.map(
    lambda x: (x.shape, x.dtype), like
  )
  up = ql.dequantize(base["layers"]["mlp"]["up"]["kernel"])
  assert 0.015 < float(up.std()) < 0.025
  assert float(jnp.abs(up[0] - up[1]).mean()) > 0.01
  # What writes a layer: the stack is its own result, and nothing of its size lies beside it.
  stack = base["layers"]["mlp"]["up"]["kernel"]
  one = jax.tree.map(lambda x: x[0], stack)
  found: Any = stacks.write_whole.lower(stack, one, (1,)).compile().memory_analysis()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
  assert found.alias_size_in_bytes >= size
  assert found.temp_size_in_bytes < size / 2


class Clock:
  """Stands for a step that takes so many seconds, and for the clock that it is timed by."""

  def __init__(self, seconds, losses, norm=1.0):
    self.seconds, self.losses, self.norm, self.now = seconds, iter(losses), norm, 0.0

  def perf_counter(self):
    return self.now

  def __call__(self, state):
    self.now += self.seconds
    return state, {"loss": jnp.float32(next(self.losses)), "grad_norm": jnp.float32(self.norm)}


@pytest.mark.parametrize(("seconds", "count"), [(1.0, 20), (11.0, 2), (119.0, 2), (276.0, 1)])
def test_a_step_of_minutes_is_taken_once(monkeypatch, seconds, count):
  clock = Clock(seconds, range(99, 0, -1))
  monkeypatch.setattr(train_step, "time", clock)
  losses, groups, norms = train_step.timed(clock, None, (), 2.5)
  assert clock.now == count * seconds
  assert len(losses) == count
  assert set(groups) == {seconds}
  assert norms == [1.0]
  found = {"losses": losses, "tokens_per_second": 1.0, "peak_bytes": 1}
  said = train_step.line("row", "ours", found)
  assert ("one step, compared with none" in said, "two steps" in said) == (count == 1, count == 2)


@pytest.mark.parametrize(
  ("seconds", "losses", "norm"),
  [(276.0, [float("nan")], 1.0), (276.0, [2.0], 0.0), (11.0, [2.0, 2.0], 1.0)],
)
def test_what_does_not_learn_fails(monkeypatch, seconds, losses, norm):
  clock = Clock(seconds, losses, norm)
  monkeypatch.setattr(train_step, "time", clock)
  with pytest.raises(RuntimeError, match="does not learn"):
    train_step.timed(clock, None, (), 2.5)


def test_what_waits_on_the_host_may_be_pinned(monkeypatch):
  asked = []
  monkeypatch.setattr(
    train_step, "child", lambda _, environment: asked.append(environment) or {"error": ""}
  )
  rows = ["llama-8b:1x350208:offload", "llama-8b:1x350208:full", "llama-70b:1x90112:offload"]
  monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
  assert train_step.main(rows) == 1
  assert all(each["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5" for each in asked)
  limits = [int(each["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) for each in asked]
  # 32 · 350,208 · 4096 and 80 · 90,112 · 8192 in 16 bits are 85.5 and 110 GiB.
  assert limits == [86 + 4, 64, 110 + 4]

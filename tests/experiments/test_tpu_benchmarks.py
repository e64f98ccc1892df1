"""The benchmarks that stand in for a TPU: the model's arithmetic, and what the compiler wrote."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.bench import tpu_compiler, tpu_model

ROOT = Path(__file__).resolve().parents[2]


def test_the_model_names_what_bounds_a_product(tmp_path, capsys):
  few, many = (tpu_model.predict("v5e", 4096, 14336, rows) for rows in (16, 4096))
  assert (few["bound"], many["bound"]) == ("decoding", "products")
  # 2 · M · K · N at the published peak.
  assert many["seconds"] == pytest.approx(2 * 4096 * 4096 * 14336 / 197e12)
  # 1.5 GHz is what four units of 128 × 128 take for it.
  assert tpu_model.CHIPS["v5e"].cycles_s == pytest.approx(1.5e9, rel=0.01)
  weights = 4096 * 14336
  assert few["seconds"] == pytest.approx(weights / 1024 * 2.55 / 1.503e9, rel=1e-3)
  assert few["parts"]["bytes"] > weights * 4.127 / 8 / 819e9
  out = tmp_path / "model.json"
  assert tpu_model.main(["--shapes", "4096x14336", "--rows", "16,4096", "--out", str(out)]) == 0
  assert len(json.loads(out.read_text())) == 2 * len(tpu_model.CHIPS)
  assert "nothing here was run" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(tpu_compiler.unavailable() is not None, reason=str(tpu_compiler.unavailable()))
@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernel needs JAX 0.11.2")
def test_the_compilers_schedules_are_read(tmp_path):
  out = tmp_path / "tpu.json"
  command = [sys.executable, "-m", "experiments.bench.tpu_compile", "--parts", "decodes"]
  # In a process of its own: the compiler is told at its start to write them.
  subprocess.run([*command, "--chips", "v6e", "--out", str(out)], cwd=ROOT, check=True)
  report = json.loads(out.read_text())
  assert (report["compiled_for"], report["ran_on"]) == (["v6e"], None)
  bundles = {each["decode"]: each["bundles"] for each in report["decodes"]}
  # The choice that the kernel rests on.
  assert min(bundles, key=bundles.__getitem__) == "by sublane, two registers"
  assert 1 < min(bundles.values()) < 3

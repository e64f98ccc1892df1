"""The benchmarks of generation and of the GPU's compiler, as far as they go without a GPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import generate, gpu_compile
from qlora_jax import quantize
from qlora_jax.matmul import gpu


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

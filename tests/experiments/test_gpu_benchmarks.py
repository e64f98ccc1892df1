"""The benchmarks of generation and of the GPU's compiler, as far as they go without a GPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import generate, gpu_compile, matmul
from qlora_jax import quantize, quantized_matmul
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

"""The table of what was measured: that it can be served, and that nothing else is served by it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import quantize, quantized_matmul
from qlora_jax.matmul import gpu, tuning

if jax.__version_info__ < (0, 11, 2):
  pytest.skip("the GPU's kernels need JAX 0.11.2", allow_module_level=True)

from qlora_jax.matmul import gpu_dequantize, gpu_few_rows, gpu_tiles

K, N = 256, 512
TILES = {"rows": 16, "k_sets": 1, "splits": 2, "stages": 6, "promoted": True}
TABLE = {
  "NVIDIA H200": {
    f"{K}x{N}": {
      "dequantize": {"kernel": "dequantize", "tiles": {"rows": 32, "columns": 128, "warps": 8}},
      "4": {"kernel": "few_rows", "tiles": {"rows": 4, "column_warps": 8}},
      "16": {"kernel": "tiles", "tiles": TILES},
      "64": {"kernel": "dequantize", "tiles": {}},
      "1024": {"kernel": "tiles", "tiles": TILES},
    }
  }
}
MODULES = {"few_rows": gpu_few_rows, "tiles": gpu_tiles, "dequantize": gpu_dequantize}


def on(device_kind):
  device = jax.sharding.AbstractDevice(device_kind, num_cores=132, platform="gpu")
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  )


def weight(k=K, n=N, **how):
  return jax.eval_shape(lambda: quantize(jnp.zeros((k, n)), **how))


def chosen(choose, rows, w, device_kind="NVIDIA H200", dtype="bfloat16"):
  """The kernel's tiles and why there is none, as `choose` has it."""
  with on(device_kind):
    kernel, reason = choose(jax.ShapeDtypeStruct((rows, w.shape[0]), dtype), w)
  return kernel and kernel.keywords["tiles"], reason


@pytest.fixture
def table(monkeypatch):
  monkeypatch.setattr(tuning, "table", lambda: TABLE)


@pytest.mark.usefixtures("table")
def test_an_entry_serves_its_class():
  for rows in (2, 4):
    assert chosen(gpu.fused, rows, weight()) == (gpu_few_rows.Tiles(4, 8), None)
  # 1,000: more than the rule lets it serve.
  for rows in (9, 16, 1000):
    assert chosen(gpu.fused, rows, weight()) == (gpu_tiles.Tiles(**TILES), None)
  assert chosen(gpu.fused, 33, weight()) == (None, None)
  with on("NVIDIA H200"):
    assert gpu.dequantize_tiles(weight()) == gpu_dequantize.Tiles(32, 128, 8)


OTHERS = {
  "a class below": (1, weight()),
  "a class between": (5, weight()),
  "no rows": (0, weight()),
  "more rows": (1025, weight()),
  "another shape": (16, weight(n=1024)),
  "other blocks": (16, weight(block_size=32)),
  "another width": (16, weight(codebook="nf3")),
  "other scales": (16, weight(double_quantization=False)),
  "another device": (16, weight(), "NVIDIA H100 80GB HBM3"),
  "what no kernel serves": (16, weight(), "NVIDIA H200", "float32"),
}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_the_rule_serves(case):
  tiles, reason = chosen(gpu.fused, *case)
  assert (tiles, reason) == chosen(gpu.by_rule, *case)
  assert tiles not in (gpu_tiles.Tiles(**TILES), gpu_few_rows.Tiles(4, 8))


@pytest.mark.usefixtures("table")
def test_the_product_is_lowered_with_the_entry():
  def text(rows):
    x = jax.ShapeDtypeStruct((rows, K), jnp.bfloat16)
    with on("NVIDIA H200"):
      lowered = jax.jit(quantized_matmul).trace(x, weight()).lower(lowering_platforms=("cuda",))
    return lowered.as_text()

  # Two splits, which are added.
  assert "tensor<2x16x512xf32>" in text(16)
  assert "triton" in text(64) and "mosaic_gpu" not in text(64)


def test_what_ships_can_be_served():
  for shapes in tuning.table().values():
    for shape, classes in shapes.items():
      w = weight(*map(int, shape.split("x")))
      for name, entry in classes.items():
        tiles = MODULES[entry["kernel"]].Tiles(**entry["tiles"])
        assert dataclasses.asdict(tiles) == entry["tiles"]
        assert entry["us"] < entry["rule_us"]
        if name != "dequantize":
          assert int(name) in tuning.ROWS
          x = jax.ShapeDtypeStruct((int(name), w.shape[0]), jnp.bfloat16)
          module = MODULES[entry["kernel"]]
          assert module is gpu_dequantize or module.unsupported(x, w, tiles) is None

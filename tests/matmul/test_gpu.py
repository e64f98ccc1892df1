"""The GPU's kernels: their logic here, their lowering here, and on a GPU the kernels themselves.

On a machine with one: `JAX_PLATFORMS=cuda,cpu python -m pytest tests/matmul/test_gpu.py`.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax import dequantize, quantize, quantized_matmul
from qlora_jax.matmul import api, gpu, specs, stacked
from qlora_jax.matmul.specs import ArgumentSpec
from tests.matmul.gpu_simulator import simulate, simulate_tiles

if jax.__version_info__ < (0, 11, 2):
  pytest.skip("the GPU's kernels need JAX 0.11.2", allow_module_level=True)

from qlora_jax.matmul import gpu_dequantize, gpu_few_rows, gpu_tiles
from qlora_jax.matmul.gpu_few_rows import Tiles

HAS_GPU = jax.default_backend() == "gpu"
on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")

H100 = jax.sharding.AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
)


def arguments(spec, seed=0):
  keys = jax.random.split(jax.random.key(seed))
  return spec.x(keys[0]), spec.w(keys[1])


def error(y, x, w) -> float:
  """‖y − x · W‖ / ‖x · W‖ by float64, of the weight that `w` stands for; of at most 256 outputs."""
  chosen = slice(None, None, max(1, w.shape[1] // 256 + 1 | 1))
  expected = np.asarray(x, np.float64) @ np.asarray(dequantize(w)[:, chosen], np.float64)
  found = np.asarray(y, np.float64)[..., chosen]
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def library_error(x, w) -> float:
  """Of the product with the weight dequantized to x's dtype."""
  dense = dequantize(w, x.dtype)
  return error(jnp.matmul(x, dense, preferred_element_type=jnp.float32).astype(x.dtype), x, w)


# Few rows

# K in parts that the warps do not share evenly; N that the tile does not divide; every block size
# and kind of scale; both ways to tell the planes apart.
FEW_ROWS = [
  ArgumentSpec(256, 64, (1,), "bfloat16"),
  ArgumentSpec(384, 36, (4,), "bfloat16", block_size=128),
  ArgumentSpec(128, 132, (3,), "float16", block_size=32, double_quantization=False),
  ArgumentSpec(2176, 32, (2,), "bfloat16", block_size=4096),
  ArgumentSpec(384, 28, (4,), "bfloat16", block_size=192, codebook="fp4"),
  ArgumentSpec(256, 40, (5,), "bfloat16", block_size=16),
  ArgumentSpec(640, 32, (16,), "bfloat16"),
  ArgumentSpec(256, 132, (19,), "bfloat16", block_size=32),
  ArgumentSpec(256, 32, (9,), "float16", codebook="equal_mass16"),
  ArgumentSpec(256, 32, (4,), "bfloat16", block_size=16, codebook="int4_signed"),
]


@pytest.mark.parametrize("column_warps", [1, 4])
@pytest.mark.parametrize("spec", FEW_ROWS, ids=str)
def test_few_rows_thread_by_thread(spec, column_warps):
  x, w = arguments(spec)
  tiles = Tiles(gpu_few_rows.default_tiles(len(x), w).rows, column_warps)
  assert gpu_few_rows.unsupported(x, w, tiles) is None
  y = simulate(x, w, tiles)
  # The levels are rounded where the library's weights are, so that the errors are alike; both
  # are of a few hundred outputs alone.
  assert error(y, x, w) < 1.3 * library_error(x, w)


WIDE = [
  (ArgumentSpec(384, 72, (4,), "bfloat16"), Tiles(4, 1, 8, 8)),
  (ArgumentSpec(256, 64, (5,), "float16", block_size=16), Tiles(8, 1, 8, 8)),
  (ArgumentSpec(256, 136, (16,), "bfloat16", block_size=32), Tiles(16, 2, 8, 8)),
]


@pytest.mark.parametrize(("spec", "tiles"), WIDE, ids=str)
def test_few_rows_by_wide_lanes(spec, tiles):
  x, w = arguments(spec)
  assert error(simulate(x, w, tiles), x, w) < 1.3 * library_error(x, w)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("rows", [1, 8])
def test_few_rows_reads_each_code_at_its_place(rows, block_size):
  # A row of x that picks one weight of each output, every place of K in turn.
  w = quantize(jax.random.normal(jax.random.key(0), (256, 36)), block_size=block_size)
  tiles = gpu_few_rows.default_tiles(rows, w)
  dense = np.asarray(dequantize(w))
  places = range(0, 256, rows) if rows > 1 else range(0, 256, 5)
  for first in places:
    x = jnp.eye(256, dtype=jnp.float16)[first : first + rows]
    y = simulate(x, w, tiles)
    np.testing.assert_allclose(y, dense[first : first + rows], rtol=2e-3)
  assert set(np.unique(w.codes & 15)) == set(range(16))


def test_few_rows_says_what_it_does_not_serve():
  def reason(spec, tiles=None):
    x, w = jax.eval_shape(lambda: arguments(spec))
    return str(gpu_few_rows.unsupported(x, w, tiles or gpu_few_rows.default_tiles(1, w)))

  assert "x is float32" in reason(ArgumentSpec(256, 16))
  assert "K = 172 and N = 64" in reason(ArgumentSpec(172, 64, dtype="bfloat16"))
  assert "K = 256 and N = 6;" in reason(ArgumentSpec(256, 6, dtype="bfloat16"))
  wide = Tiles(4, 1, 8, 8)
  assert "N = 36; multiples of 128 and 8" in reason(ArgumentSpec(256, 36, dtype="bfloat16"), wide)
  assert "other than 4 bits" in reason(ArgumentSpec(256, 16, dtype="bfloat16", codebook="nf3"))
  assert "block size 48" in reason(ArgumentSpec(256, 16, dtype="bfloat16", block_size=48))
  large = ArgumentSpec(28672, 8192, dtype="bfloat16", block_size=16)
  assert "of shared memory" in reason(large, Tiles(4, 2))
  for spec in specs.REAL:
    assert reason(spec) == "None", spec
  # Fewer columns, where the scales of more would not fit.
  _, w = jax.eval_shape(lambda: arguments(ArgumentSpec(28672, 28672, dtype="bfloat16")))
  assert gpu_few_rows.default_tiles(1, w) == Tiles(4, 2)


# Tiles of rows

# Products that are scaled by block, and weights that are; K that sets and splits do not share
# evenly; N and M that tiles do not divide; every block size and kind of scale.
TILED = [
  (ArgumentSpec(256, 64, (5,), "bfloat16"), gpu_tiles.Tiles(8, 1, 1, 4, True)),
  (ArgumentSpec(640, 144, (70,), "bfloat16"), gpu_tiles.Tiles(64, 2, 1, 4, True)),
  (ArgumentSpec(640, 144, (70,), "bfloat16"), gpu_tiles.Tiles(128, 1, 1, 4, False)),
  (ArgumentSpec(1280, 144, (130,), "float16", block_size=32), gpu_tiles.Tiles(128, 1, 2, 5, False)),
  (
    ArgumentSpec(1280, 144, (30,), "bfloat16", block_size=16, double_quantization=False),
    gpu_tiles.Tiles(16, 2, 2, 8, True),
  ),
  (
    ArgumentSpec(384, 48, (30,), "bfloat16", block_size=192, codebook="fp4"),
    gpu_tiles.Tiles(32, 2, 1, 8, True),
  ),
  (
    ArgumentSpec(1024, 48, (200,), "bfloat16", block_size=4096, codebook="equal_mass16"),
    gpu_tiles.Tiles(192, 1, 1, 5, False),
  ),
]


@pytest.mark.parametrize(("spec", "tiles"), TILED, ids=str)
def test_tiles_thread_by_thread(spec, tiles):
  x, w = arguments(spec)
  assert gpu_tiles.unsupported(x, w, tiles) is None
  assert error(simulate_tiles(x, w, tiles), x, w) < 1.1 * library_error(x, w)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("rows", [64, 128])
def test_tiles_read_each_code_at_its_place(rows, block_size):
  # A row of x that picks one weight of each output, every place of K in turn.
  w = quantize(jax.random.normal(jax.random.key(0), (256, 144)), block_size=block_size)
  dense = np.asarray(dequantize(w))
  for first in range(0, 256, rows):
    x = jnp.eye(256, dtype=jnp.float16)[first : first + rows]
    y = simulate_tiles(x, w, gpu_tiles.Tiles(rows, 1, 1, 4, rows == 64))
    np.testing.assert_allclose(y, dense[first : first + rows], rtol=2e-3)
    # Zero is zero.
    assert not y[dense[first : first + rows] == 0].any()
  assert (dense == 0).any()
  assert set(np.unique(w.codes & 15)) == set(range(16))


def test_tiles_say_what_they_do_not_serve():
  def reason(spec, tiles=None):
    x, w = jax.eval_shape(lambda: arguments(spec))
    return str(gpu_tiles.unsupported(x, w, tiles or gpu_tiles.default_tiles(x.shape[0], w)))

  assert "x is float32" in reason(ArgumentSpec(256, 16))
  assert "K = 172 and N = 64" in reason(ArgumentSpec(172, 64, dtype="bfloat16"))
  assert "K = 256 and N = 8;" in reason(ArgumentSpec(256, 8, dtype="bfloat16"))
  assert "other than 4 bits" in reason(ArgumentSpec(256, 16, dtype="bfloat16", codebook="nf3"))
  assert "block size 48" in reason(ArgumentSpec(256, 16, dtype="bfloat16", block_size=48))
  assert "offsets have 32 bits" in reason(ArgumentSpec(28672, 16, (40000,), dtype="bfloat16"))
  assert "weights; offsets have" in reason(ArgumentSpec(65536, 1 << 17, (20,), dtype="bfloat16"))
  wide = gpu_tiles.Tiles(256, 1, 1, 8, promoted=False)
  assert "of shared memory wanted" in reason(ArgumentSpec(256, 16, dtype="bfloat16"), wide)
  for spec in specs.REAL:
    assert reason(spec) == "None", spec


# Dequantizing


# Each width on whole groups and on a ragged K; blocks that tiles share and that they do not; N
# that the tile does not divide; zero-points; each kind of scale.
DEQUANTIZED = [
  *(
    ArgumentSpec(k, n, codebook=codebook)
    for codebook in ("nf2", "nf3", "nf4", "int8")
    for k, n in ((256, 256), (172, 5))
  ),
  ArgumentSpec(384, 300, dtype="bfloat16", block_size=48, double_quantization=False),
  ArgumentSpec(384, 16, block_size=1),
  ArgumentSpec(512, 33, dtype="bfloat16", block_size=4096),
  ArgumentSpec(171, 16, codebook="int4_zero_point", block_size=32, double_quantization=False),
  ArgumentSpec(256, 256, codebook="int4_zero_point", block_size=32, double_quantization=False),
]


@pytest.mark.parametrize("spec", [*DEQUANTIZED, *(specs.SMALL if HAS_GPU else ())], ids=str)
def test_dequantize_is_the_definition(spec):
  _, w = arguments(spec)
  found = gpu_dequantize.dequantize(w, spec.dtype, interpret=not HAS_GPU)
  np.testing.assert_array_equal(found, dequantize(w, spec.dtype))


# Lowering


@pytest.mark.parametrize(
  "kwargs",
  [{}, {"double_quantization": False}, {"n": 256}, {"n": 256, "codebook": "int4_zero_point"}],
  ids=str,
)
def test_a_layer_is_read_in_its_stack(kwargs):
  spec = ArgumentSpec(**{"k": 256, "n": 64, "rows": (2,), "dtype": "bfloat16", **kwargs})
  stack = spec.w(jax.random.key(1), (2, 3))
  layer = jax.tree.map(lambda leaf: leaf[1, 0], stack)
  # Its own codes and scales say nothing, so what is found is the stack's.
  own = jax.tree.map(jnp.zeros_like, layer)
  layered = dataclasses.replace(own, stack=stacked.of(stack, jnp.int32(3)))
  found = gpu_dequantize.dequantize(layered, jnp.float32, interpret=not HAS_GPU)
  np.testing.assert_array_equal(found, dequantize(layer))
  for rows, by_threads in ((2, simulate), (17, simulate_tiles)) if spec.n == 64 else ():
    x = dataclasses.replace(spec, rows=(rows,)).x(jax.random.key(2))
    tiles = (gpu_few_rows if rows == 2 else gpu_tiles).default_tiles(rows, layer)
    assert error(by_threads(x, layered, tiles), x, layer) < 1.1 * library_error(x, layer)


@pytest.mark.parametrize(("layers", "in_place"), [(16, True), (17, False), (32, False), (33, True)])
def test_stacks_that_the_dequantizing_kernel_counts_through(layers, in_place):
  # Of 2**27 codes a layer.
  stack = jax.eval_shape(lambda: ArgumentSpec(8192, 32768).w(jax.random.key(0), (layers,)))
  layer = jax.eval_shape(
    lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), stack)
  )
  layer = dataclasses.replace(layer, stack=stacked.of(stack, jnp.int32(0)))
  assert (gpu_dequantize.readable_stack(layer) is not None) == in_place


def test_scales_that_the_dequantizing_kernel_cannot_count_through():
  spec = ArgumentSpec(8192, 32768, block_size=16)
  stack = jax.eval_shape(lambda: spec.w(jax.random.key(0), (200,)))
  layer = jax.eval_shape(lambda: spec.w(jax.random.key(0)))
  layer = dataclasses.replace(layer, stack=stacked.of(stack, jnp.int32(0)))
  assert stack.codes.size > 1 << 32 > stack.scales.codes.size > 1 << 31
  assert gpu_dequantize.readable_stack(layer) is None


def lowered(f, *args) -> str:
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("spec", specs.REAL, ids=str)
def test_every_real_shape_lowers_for_an_h100(spec):
  x, w = jax.eval_shape(lambda: arguments(spec))
  few = x.shape[0] <= gpu.MOST_TILED_ROWS
  text = lowered(quantized_matmul, x, w)
  assert ("mosaic_gpu" in text) == few
  assert ("triton" in text) != few
  gradient = lowered(jax.grad(lambda x, w: quantized_matmul(x, w).astype(jnp.float32).sum()), x, w)
  assert "triton" in gradient


@pytest.mark.filterwarnings("ignore:quantized_matmul. a product of few rows dequantizes")
@pytest.mark.parametrize("spec", specs.SMALL, ids=str)
def test_every_small_case_lowers_for_an_h100(spec):
  x, w = jax.eval_shape(lambda: arguments(spec))
  text = lowered(functools.partial(quantized_matmul, implementation="gpu"), x, w)
  assert "mosaic_gpu" in text or "triton" in text


def test_stacks_lower_under_scan_and_vmap():
  spec = ArgumentSpec(256, 64, (3,), "bfloat16")
  x = jax.ShapeDtypeStruct((4, 3, 256), jnp.bfloat16)
  stack = jax.eval_shape(lambda: spec.w(jax.random.key(0), (4,)))
  assert "mosaic_gpu" in lowered(jax.vmap(quantized_matmul), x, stack)

  def scanned(x, stack):
    return jax.lax.scan(lambda c, w: (c, quantized_matmul(c, w)), x[0], stack)

  assert "mosaic_gpu" in lowered(scanned, x, stack)
  many = jax.ShapeDtypeStruct((4, gpu.MOST_TILED_ROWS + 1, 256), jnp.bfloat16)
  assert "triton" in lowered(jax.vmap(quantized_matmul), many, stack)


# The choice


def test_a_cpu_is_named_where_it_cannot_serve():
  if HAS_GPU:
    pytest.skip("a GPU can")
  x, w = arguments(ArgumentSpec(128, 16))
  with pytest.raises(ValueError, match="'gpu' cannot serve this: the computation is for a cpu"):
    quantized_matmul(x, w, implementation="gpu")


def test_an_older_gpu_is_announced_once():
  gpu._announce.cache_clear()
  older = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=older)
  x, w = jax.eval_shape(lambda: arguments(ArgumentSpec(256, 64, (1,), "bfloat16")))
  with jax.sharding.use_abstract_mesh(mesh):
    with pytest.warns(UserWarning, match="dequantizes its weight first .NVIDIA A100: its kernel"):
      text = str(jax.make_jaxpr(quantized_matmul)(x, w))
    assert "dequantize" in text and "few_rows" not in text
    jax.make_jaxpr(lambda x, w: quantized_matmul(x + 1, w))(x, w)  # says nothing more


def test_what_the_kernel_of_few_rows_does_not_serve_is_announced():
  gpu._announce.cache_clear()
  x, w = jax.eval_shape(lambda: arguments(ArgumentSpec(172, 64, (1,), "bfloat16")))
  with pytest.warns(UserWarning, match=r"dequantizes its weight first \(K = 172 and N = 64"):
    assert "triton" in lowered(quantized_matmul, x, w)


def device(kind, **fields):
  return types.SimpleNamespace(device_kind=kind, platform="gpu", **fields)


def test_what_a_gpu_can_do():
  assert gpu.capability(device("NVIDIA H100 80GB HBM3", compute_capability="9.0")) == 9
  assert gpu.capability(device("NVIDIA RTX PRO 6000", compute_capability="12.0")) == 12
  assert gpu.capability(device("AMD Instinct MI300X", compute_capability="gfx942")) is None
  # Of GPUs that are not there the names must do.
  assert gpu.capability(H100) == 9
  assert gpu.capability(device("NVIDIA A100-SXM4-80GB")) == 8
  assert gpu.capability(device("AMD Instinct MI300X")) is None


def test_the_default_device_decides(monkeypatch):
  if HAS_GPU:
    pytest.skip("simulates a GPU")
  x, w = arguments(ArgumentSpec(128, 16))
  there = device("NVIDIA H100 80GB HBM3", compute_capability="9.0")
  cpus = jax.devices("cpu")
  monkeypatch.setattr(gpu.jax, "devices", lambda which=None: cpus if which == "cpu" else [there])
  assert gpu.unsupported(x, w) is None
  for default in ("cpu", cpus[0]):
    with jax.default_device(default):
      assert gpu.unsupported(x, w) == "the computation is for a cpu"


@pytest.mark.parametrize("rows", [4, 300])
def test_shard_map_lowers_for_an_h100(rows):
  spec = ArgumentSpec(512, 512, (rows,), "bfloat16", double_quantization=False)
  x, w = jax.eval_shape(lambda: arguments(spec))
  mesh = jax.sharding.AbstractMesh(
    (2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=H100
  )
  by_columns = jax.tree.map(lambda leaf: P(None, "d") if len(leaf.shape) == 2 else P(), w)

  def gradient(x, w):
    return jax.grad(lambda x: quantized_matmul(x, w).astype(jnp.float32).sum())(x)

  product = functools.partial(quantized_matmul, implementation="gpu")
  for f, of_x, of_w, out in (
    (product, P(), by_columns, P(None, "d")),
    (product, P("d"), P(), P("d")),
    (gradient, P("d"), P(), P("d")),
    (gradient, P(), by_columns, P()),
  ):
    with jax.sharding.use_abstract_mesh(mesh):
      sharded = jax.shard_map(f, in_specs=(of_x, of_w), out_specs=out)
      text = jax.jit(sharded).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text or "mosaic_gpu" in text


def test_axes_that_are_not_manual_are_left_to_xla():
  mesh = jax.sharding.AbstractMesh((2,), ("d",), abstract_device=H100)
  x, w = jax.eval_shape(lambda: arguments(ArgumentSpec(256, 64, (4,), "bfloat16")))
  with jax.sharding.use_abstract_mesh(mesh):
    reason = gpu.unsupported(x, w)
    text = jax.jit(quantized_matmul).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
  assert reason and "not manual" in reason
  assert "triton" not in text and "mosaic_gpu" not in text


@pytest.mark.filterwarnings("ignore:quantized_matmul. a product of few rows dequantizes")
def test_a_stack_that_indices_cannot_count_through_goes_one_by_one(monkeypatch):
  monkeypatch.setattr(api, "_MOST_INDICES", 4 * 128 * 8)
  spec = ArgumentSpec(256, 8, (3,), "float32")
  x = jax.random.normal(jax.random.key(0), (4, 3, 256))
  stack = spec.w(jax.random.key(1), (4,))
  assert "while" in jax.jit(jax.vmap(quantized_matmul)).lower(x, stack).as_text()
  expected = x @ dequantize(stack)
  np.testing.assert_allclose(jax.vmap(quantized_matmul)(x, stack), expected, rtol=1e-4, atol=1e-4)
  one = jax.vmap(quantized_matmul, (None, 0))(x[0], stack)
  np.testing.assert_allclose(one, x[0] @ dequantize(stack), rtol=1e-4, atol=1e-4)


def test_leaves_of_other_float_dtypes():
  spec = ArgumentSpec(256, 256, (2,), "bfloat16")
  x, w = arguments(spec)
  cast = jax.tree.map(
    lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, w
  )
  found = gpu_dequantize.dequantize(cast, jnp.float32, interpret=not HAS_GPU)
  with jax.numpy_dtype_promotion("standard"):
    np.testing.assert_array_equal(found, dequantize(cast))
    if not HAS_GPU:
      y = simulate(x, cast, gpu_few_rows.default_tiles(2, w))
      assert error(y, x, cast) < 1.3 * library_error(x, cast)


@pytest.mark.parametrize(
  "kind",
  [
    {"scale_dtype": "bfloat16"},
    {"scale_dtype": "e4m3"},
    {"scale_dtype": "e8m0"},
    {"nested_block_size": 7},
  ],
)
def test_other_kinds_of_scales(kind):
  double = "scale_dtype" not in kind
  w = jax.random.normal(jax.random.key(0), (256, 256))
  w = quantize(w, double_quantization=double, **kind)
  x = jax.random.normal(jax.random.key(1), (3, 256), jnp.bfloat16)
  found = gpu_dequantize.dequantize(w, jnp.float32, interpret=not HAS_GPU)
  np.testing.assert_array_equal(found, dequantize(w))
  if not HAS_GPU:
    y = simulate(x, w, gpu_few_rows.default_tiles(3, w))
    assert error(y, x, w) < 1.3 * library_error(x, w)


# On a GPU


def gpu_matmul(x, w):
  return jax.jit(functools.partial(quantized_matmul, implementation="gpu"))(x, w)


@on_a_gpu
@pytest.mark.filterwarnings("ignore:quantized_matmul. a product of few rows dequantizes")
@pytest.mark.parametrize("spec", [*specs.SMALL, *FEW_ROWS, *specs.REAL], ids=str)
def test_on_a_gpu(spec):
  x, w = arguments(spec)
  y = gpu_matmul(x, w)
  assert (y.shape, y.dtype) == ((*spec.rows, spec.n), x.dtype)
  if spec.dtype == "float32":
    with jax.default_matmul_precision("highest"):
      assert error(gpu_matmul(x, w), x, w) < 1e-5
  # Of outputs so few that chance rules, more is allowed.
  slack = 1.1 if y.size >= 4096 else 1.5
  assert error(y, x, w) < slack * library_error(x, w)
  np.testing.assert_array_equal(gpu_matmul(x, w), y)
  g = jax.random.normal(jax.random.key(2), y.shape, y.dtype)
  (dx,) = jax.vjp(lambda x: quantized_matmul(x, w, implementation="gpu"), x)[1](g)
  dense = dequantize(w, x.dtype)
  library = jnp.matmul(g, dense.T, preferred_element_type=jnp.float32).astype(g.dtype)
  np.testing.assert_allclose(
    np.asarray(dx, np.float32), np.asarray(library, np.float32), rtol=2e-2, atol=1e-2
  )


@on_a_gpu
@pytest.mark.parametrize(("spec", "tiles"), TILED, ids=str)
def test_tiles_on_a_gpu(spec, tiles):
  x, w = arguments(spec)
  product = jax.jit(functools.partial(gpu_tiles.product, tiles=tiles))
  y = product(x, w)
  assert error(y, x, w) < 1.1 * library_error(x, w)
  np.testing.assert_array_equal(product(x, w), y)


@on_a_gpu
@pytest.mark.parametrize("rows", [1, 3, 7, 16, 30, 200, 1024])
def test_a_stack_on_a_gpu(rows):
  spec = ArgumentSpec(384, 176, (rows,), "bfloat16")
  x = jax.random.normal(jax.random.key(0), (5, rows, 384), jnp.bfloat16)
  stack = spec.w(jax.random.key(1), (5,))
  layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(5)]
  expected = jnp.stack([gpu_matmul(row, layer) for row, layer in zip(x, layers, strict=True)])
  # The library multiplies many rows, by an algorithm that it chooses for the program.
  atol = 0 if rows <= gpu.MOST_TILED_ROWS else 0.02 * float(jnp.abs(expected).max())
  check = functools.partial(np.testing.assert_allclose, rtol=0, atol=atol)
  check(jax.jit(jax.vmap(quantized_matmul))(x, stack), expected)

  @functools.partial(jax.jit, static_argnums=0)
  def scan(in_place, x, stack):
    def step(_, part):
      i, x, w = part
      w = stacked.remembering(w, stack, i) if in_place else w
      y, gradient = jax.vjp(lambda x: quantized_matmul(x, w), x)
      return None, (y, *gradient(y))

    return jax.lax.scan(step, None, (jnp.arange(5), x, stack))[1]

  y, dx = scan(False, x, stack)
  check(y, expected)
  in_place = scan(True, x, stack)
  check(in_place[0], y)
  np.testing.assert_allclose(in_place[1], dx, rtol=0, atol=0.02 * float(jnp.abs(dx).max()))


@on_a_gpu
def test_a_stack_of_more_than_4_gib_on_a_gpu():
  spec = ArgumentSpec(4096, 8192, (1024,), "bfloat16")
  layers, last = 257, 256
  x, w = arguments(spec)
  # The others are zeros.
  stack = jax.jit(
    lambda w: jax.tree.map(
      lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype).at[last].set(leaf), w
    )
  )(w)
  assert stack.codes.size > 1 << 32

  @jax.jit
  def layer(x, stack, index):
    return quantized_matmul(x, stacked.layer_of(stack, index))

  expected = gpu_matmul(x, w)
  atol = 0.02 * float(jnp.abs(expected).max())
  np.testing.assert_allclose(layer(x, stack, last), expected, rtol=0, atol=atol)
  assert not layer(x, stack, 128).any()


def test_the_registry_prefers_the_gpu():
  assert next(iter(api.IMPLEMENTATIONS)) == "gpu"

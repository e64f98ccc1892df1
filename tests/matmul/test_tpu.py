"""The TPU's kernel: its numbers in interpret mode, and the real compiler's programs, where it is.

Nothing here has run on a TPU.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qlora_jax as ql
from experiments.bench import tpu_compile, tpu_compiler
from qlora_jax import dequantize, quantize, quantized_matmul, traced_for
from qlora_jax.matmul import api, sharded, specs, stacked, target, tpu
from qlora_jax.matmul.specs import ArgumentSpec
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.quantization import decode
from qlora_jax.quantized_tensor import Stack, join_rows
from tests.matmul.test_quantized_matmul import assert_product

if jax.__version_info__ < (0, 11, 2):
  pytest.skip("the TPU's kernel needs JAX 0.11.2", allow_module_level=True)

from qlora_jax.matmul import tpu_tiles
from qlora_jax.matmul.tpu_tiles import Tiles

compiles = pytest.mark.skipif(
  tpu_compiler.unavailable() is not None, reason=str(tpu_compiler.unavailable())
)
DEFAULT = Tiles()
CHIPS = tuple(tpu_compiler.TOPOLOGIES)


def arguments(spec, seed=0):
  """x, w, and a gradient of the product."""
  keys = jax.random.split(jax.random.key(seed), 3)
  g = jax.random.normal(keys[2], (*spec.rows, spec.n), spec.dtype)
  return spec.x(keys[0]), spec.w(keys[1]), g


@functools.partial(jax.jit, static_argnames="tiles")
def interpreted(x, w, g, tiles=DEFAULT):
  product = functools.partial(tpu_tiles.product, tiles=tiles, interpret=True)
  return product(x, w), product(g, w, transposed=True)


def assert_definition(x, w, g, tiles=DEFAULT):
  """Forward and input gradient, by float64, of the weight rounded to x's dtype."""
  y, dx = interpreted(x, w, g, tiles)
  assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
  dense = dequantize(w, x.dtype)
  assert_product(y, x, dense)
  assert_product(dx, g, np.asarray(dense).T)


# Numbers

# Each width on whole groups and on a ragged K, scales of every kind and of blocks of every relation
# to a tile, zero-points, a table without a zero, rows from none to several axes.
QUICK = (
  *(ArgumentSpec(256, 16, (3,), codebook=codebook) for codebook in ("nf2", "nf3", "nf4", "int8")),
  *(ArgumentSpec(k, 5, (2,), codebook="nf3") for k in (3, 172)),
  ArgumentSpec(172, 130, (2, 2), "bfloat16"),
  ArgumentSpec(384, 16, (), block_size=48),
  ArgumentSpec(384, 16, block_size=512),
  # Scales written down again for less than a block: of 16 rows, of 8 of a ragged K.
  ArgumentSpec(256, 16, codebook="int4_zero_point", block_size=48),
  ArgumentSpec(144, 16, block_size=32),
  ArgumentSpec(256, 8, (1,), "bfloat16", block_size=1, double_quantization=False),
  ArgumentSpec(129, 3, codebook="equal_mass16"),
)
REST = [spec for spec in specs.SMALL if spec.dtype != "float16"]


@pytest.mark.parametrize(
  "spec", [*QUICK, *(pytest.param(spec, marks=pytest.mark.slow) for spec in REST)], ids=str
)
def test_the_kernel_is_the_definition(spec):
  assert_definition(*arguments(spec))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
  k=st.integers(1, 5).map(lambda n: 128 * n) | st.integers(1, 300),
  n=st.integers(1, 300),
  rows=st.integers(1, 40),
  block=st.sampled_from([16, 32, 64, 100, 128, 256]),
  codebook=st.sampled_from(["nf4", "nf3", "bof4s", "int4_zero_point"]),
  dtype=st.sampled_from(["float32", "bfloat16"]),
  # A shape of several tiles needs small ones.
  tiles=st.sampled_from([DEFAULT, Tiles(32, 256, 128), Tiles(32, 384, 256)]),
)
def test_the_kernel_is_the_definition_of_any_shape(k, n, rows, block, codebook, dtype, tiles):
  assert_definition(*arguments(ArgumentSpec(k, n, (rows,), dtype, codebook, block)), tiles)


def test_several_tiles_of_every_axis():
  spec = ArgumentSpec(512, 384, (70,), "bfloat16")
  tiles = Tiles(rows=32, k=256, n=128)
  assert_definition(*arguments(spec), tiles)
  # One run of absmax over several tiles of K, and several tiles in one block.
  assert_definition(*arguments(ArgumentSpec(512, 128, (3,), block_size=256)), Tiles(32, 128, 128))


# Interpret mode fills what lies beyond an array with NaN.
@pytest.mark.parametrize(
  ("spec", "cuts"),
  [
    # Of K 3/4 of a tile, of N a part of a register, of x two passes that are as long.
    (ArgumentSpec(896, 600, (100,), "bfloat16"), (512, 384)),
    # Two runs of absmax in a tile; a single run is 256 rows.
    (ArgumentSpec(1280, 130, (3,), "bfloat16"), (512, 256)),
    (ArgumentSpec(640, 5, (3,), block_size=512), (256, 128)),
    pytest.param(
      ArgumentSpec(640, 700, (3,), codebook="int4_zero_point"), (384, 384), marks=pytest.mark.slow
    ),
    pytest.param(
      ArgumentSpec(640, 700, (3,), codebook="nf3", double_quantization=False),
      (256, 384),
      marks=pytest.mark.slow,
    ),
    pytest.param(ArgumentSpec(172, 700, (3,)), (192, 384), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_the_last_tile_may_hold_less(spec, cuts):
  x, w, g = arguments(spec)
  tiles = Tiles(rows=96, k=512, n=512)
  layout = tpu_tiles.Layout.of(w, tiles)
  assert (layout.k, layout.n) == cuts
  assert_definition(x, w, g, tiles)


def test_tiles_are_nearly_as_wide_as_meant():
  # Llama-2-7B's MLP, a vocabulary of Qwen's: 2 · 43 and a prime of registers.
  for k, n in ((4096, 11008), (11008, 4096), (4096, 151_936)):
    w = jax.eval_shape(lambda k=k, n=n: ArgumentSpec(k, n).w(jax.random.key(0)))
    layout = tpu_tiles.Layout.of(w, Tiles())
    assert (layout.k, layout.n, layout.nested) == (1024, 1024, True)


@pytest.mark.parametrize("k", [640, 1152, 1280, 2560, 8960])
def test_a_tile_of_3_bits_is_of_whole_registers_or_all(k):
  spec = ArgumentSpec(k, 256, codebook="nf3", double_quantization=False)
  layout = tpu_tiles.Layout.of(jax.eval_shape(lambda: spec.w(jax.random.key(0))), Tiles())
  assert layout.k == k or layout.byte_rows % 32 == 0


def test_what_the_compiler_is_told_to_move():
  """x for each tile of N, the weight for each pass over it, the result once."""

  def moved(rows, k, n):
    spec = ArgumentSpec(k, n, (rows,), "bfloat16", double_quantization=False)
    x, w = jax.eval_shape(lambda: (spec.x(jax.random.key(0)), spec.w(jax.random.key(0))))
    jaxpr = jax.make_jaxpr(tpu_tiles.product)(x, w)
    (call,) = [each for each in jaxpr.eqns if each.primitive.name == "pallas_call"]
    packed = k * n * (4 + 32 / 64) / 8
    # Less the levels' tables.
    return call.params["cost_estimate"].bytes_accessed, packed, 2 * rows * k, 2 * rows * n

  for case, passes, times in (
    ((16, 2048, 1024), 1, 1),
    ((16, 2048, 4096), 1, 4),
    ((1040, 2048, 4096), 2, 4),
    # x stays in VMEM while the tiles of N pass; so does a weight of one tile.
    ((1040, 1024, 4096), 2, 1),
    ((1040, 1024, 1024), 1, 1),
  ):
    found, packed, x, y = moved(*case)
    assert found == pytest.approx(passes * packed + times * x + y, abs=passes * 20e3), case


@pytest.mark.slow
def test_a_long_ragged_k_is_one_tile():
  x, w, g = arguments(ArgumentSpec(2050, 256, (40,), "bfloat16"))
  layout = tpu_tiles.Layout.of(w, Tiles())
  assert (layout.ragged, layout.k, layout.n) == (True, 2 * 1056, 256)
  assert layout.rows < Tiles().rows
  assert_definition(x, w, g)


def test_formats_of_scales():
  x, _, g = arguments(ArgumentSpec(256, 16))
  dense = jax.random.normal(jax.random.key(3), (256, 16))
  for codebook, block, scale_dtype in (
    ("nvfp4", 16, "auto"),
    ("mxfp4", 32, "auto"),
    ("nf4", 64, "bfloat16"),
  ):
    w = quantize(
      dense,
      codebook=codebook,
      block_size=block,
      double_quantization=False,
      scale_dtype=scale_dtype,
    )
    assert_definition(x, w, g)


def test_no_rows():
  _, w, _ = arguments(ArgumentSpec(128, 16))
  assert tpu_tiles.product(jnp.zeros((2, 0, 128)), w).shape == (2, 0, 16)


def test_a_layers_codes_are_read_in_its_stack():
  # Of whole groups, of any N; of a ragged K the codes are padded, and so the layer's own.
  for spec, tiles, in_place in (
    (ArgumentSpec(128, 128), DEFAULT, True),
    (ArgumentSpec(384, 200), Tiles(32, 256, 128), True),
    (ArgumentSpec(12, 128), DEFAULT, False),
  ):
    x, _, g = arguments(spec)
    stack = spec.w(jax.random.key(1), (2, 2))
    layer = jax.tree.map(lambda leaf: leaf[1, 0], stack)
    own = jnp.zeros_like(layer.codes) if in_place else layer.codes
    where = Stack(stack.codes if in_place else jnp.zeros_like(stack.codes), jnp.int32(2))
    found = interpreted(x, dataclasses.replace(layer, codes=own, stack=where), g, tiles)
    jax.tree.map(np.testing.assert_array_equal, found, interpreted(x, layer, g, tiles))


def test_a_layer_of_a_layer_remembers_the_whole_stack(monkeypatch):
  stack = ArgumentSpec(128, 8).w(jax.random.key(1), (2, 3))
  assert stacked.layer_of(stack, jnp.int32(1)).stack is None
  monkeypatch.setattr(stacked, "remembers", lambda: True)
  layers = stacked.layer_of(stack, jnp.int32(1))
  expert = stacked.layer_of(layers, jnp.int32(2))
  assert expert.stack.codes is stack.codes and int(expert.stack.index) == 5
  np.testing.assert_array_equal(expert.codes, stack.codes[1, 2])
  dense = jnp.arange(6.0).reshape(3, 2)
  np.testing.assert_array_equal(stacked.layer_of(dense, jnp.int32(2)), dense[2])


def transformer(width, intermediate, experts=0, dtype=jnp.float32, **kwargs):
  config = TransformerConfig(
    64, width, intermediate, 2, 1, 1, 128, num_experts=experts, experts_per_token=min(experts, 2)
  )
  return Transformer(config, dtype, remat="full", **kwargs)


def base_of(model):
  base = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  # A router stays dense.
  return ql.quantize_tree(base, dict.fromkeys(("*/attn/*", "*/mlp/*"), ql.QuantizationConfig()))


@pytest.mark.parametrize(
  "kwargs",
  [
    {"experts": 0},
    pytest.param({"experts": 0, "mlp_chunk": 2}, marks=pytest.mark.slow),
    pytest.param({"experts": 3}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_model_reads_the_layers_of_its_stacks(kwargs, monkeypatch):
  model = transformer(128, 128, **kwargs)
  base, x = base_of(model), jax.random.normal(jax.random.key(1), (2, 4, 128))

  def both(x):
    def loss(x):
      y, _ = model.apply({"frozen": base}, x, method="blocks")
      return jnp.square(y).mean()

    return jax.value_and_grad(loss)(x)

  expected = jax.jit(both)(x)
  device = types.SimpleNamespace(device_kind="TPU v5 lite")
  monkeypatch.setattr(target, "target", lambda: ("tpu", device))
  read = []

  def product(x, w, **kwargs):
    read.append(w.stack)
    # Not the slice.
    w = dataclasses.replace(w, codes=jnp.zeros_like(w.codes))
    return kernel(x, w, interpret=True, **kwargs)

  kernel = tpu_tiles.product
  monkeypatch.setattr(tpu_tiles, "product", product)
  found = jax.jit(lambda x: both(x))(x)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)
  assert read and None not in read


@pytest.mark.parametrize(
  ("k", "n", "tiles"), [(128, 16, DEFAULT), (384, 300, Tiles(32, 256, 256))], ids=str
)
def test_a_batch_of_weights(k, n, tiles):
  spec = ArgumentSpec(k, n, (3,))
  x = jax.random.normal(jax.random.key(0), (2, 3, k))
  g = jax.random.normal(jax.random.key(2), (2, 3, n))
  w = spec.w(jax.random.key(1), (2,))
  y, dx = jax.vmap(functools.partial(interpreted, tiles=tiles))(x, w, g)
  for i in range(2):
    dense = np.asarray(dequantize(w)[i])
    assert_product(y[i], x[i], dense)
    assert_product(dx[i], g[i], dense.T)


# The choice


def tpu_mesh():
  device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
  return AbstractMesh((1,), ("x",), abstract_device=device)


def test_a_tpu_takes_the_kernel_and_others_are_refused():
  x, w, _ = arguments(ArgumentSpec(256, 16, dtype="bfloat16"))
  with pytest.raises(ValueError, match="'tpu' cannot serve this: the computation is for a cpu"):
    quantized_matmul(x, w, implementation="tpu")
  with jax.sharding.use_abstract_mesh(tpu_mesh()):
    assert api.choose(x, w) == "tpu"
    half = jax.ShapeDtypeStruct(x.shape, jnp.float16)
    assert "float16" in str(tpu.unsupported(half, w))
    assert api.choose(half, w) == "xla"
    long = jax.eval_shape(lambda: ArgumentSpec(8200, 16).w(jax.random.key(0)))
    assert "K = 8200, which 128 does not divide" in str(tpu.unsupported(x, long))
    odd = jax.eval_shape(lambda: ArgumentSpec(2048, 1024, block_size=100).w(jax.random.key(0)))
    assert "in blocks of 100: 8 rows that are decoded together" in str(tpu.unsupported(x, odd))
    # In parts that fall on tiles, of blocks or of a ragged K.
    for spec in (ArgumentSpec(2048, 1024, block_size=96), ArgumentSpec(1600, 1024)):
      w = jax.eval_shape(lambda spec=spec: spec.w(jax.random.key(0)))
      assert tpu.unsupported(x, w) is None
    columns = dataclasses.replace(odd, levels=jax.ShapeDtypeStruct((16, 16), jnp.float32))
    assert "a table for each output" in str(tpu.unsupported(x, columns))


def traced(function, *arguments):
  """The jaxpr's text, as for a TPU."""
  with jax.sharding.use_abstract_mesh(tpu_mesh()):
    return str(jax.make_jaxpr(function)(*arguments))


def test_trials_are_rows_of_one_product():
  spec = ArgumentSpec(256, 16, (4, 3), "bfloat16")
  x, w, g = jax.eval_shape(lambda: arguments(spec))

  def both(x, w, g):
    y, pullback = jax.vjp(lambda x: quantized_matmul(x, w), x)
    return y, pullback(g)

  text = traced(jax.vmap(both, (0, None, 0)), x, w, g)
  assert text.count("pallas_call[") == 2
  assert "bf16[12,128]" in text and "bf16[12,256]" in text


def test_float32_is_multiplied_as_float32():
  x, w, _ = jax.eval_shape(lambda: arguments(ArgumentSpec(256, 128)))
  assert "Precision.HIGHEST" in traced(quantized_matmul, x, w)
  with jax.default_matmul_precision("bfloat16"):
    assert "Precision.HIGHEST" not in traced(quantized_matmul, x, w)
  half = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
  for setting in (None, "highest"):  # Mosaic refuses the latter of bfloat16
    with jax.default_matmul_precision(setting):
      assert "Precision.HIGHEST" not in traced(quantized_matmul, half, w)


@pytest.mark.parametrize("codebook", ["nf4", "nf3", "int8", "any4"])
def test_xla_finds_levels_without_a_lookup(codebook, monkeypatch):
  spec = ArgumentSpec(130, 6, codebook=codebook, double_quantization=codebook != "any4")
  w = spec.w(jax.random.key(0))
  expected = dequantize(w)
  monkeypatch.setattr(traced_for, "target", lambda: ("tpu", None))

  def decoded(w):
    return join_rows(decode(w, jnp.float32), 0)

  np.testing.assert_array_equal(jax.jit(decoded)(w), expected)
  assert "gather" not in str(jax.make_jaxpr(decoded)(w))


# The compiler's programs


@compiles
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
  "spec",
  [
    ArgumentSpec(256, 128, (16,), "bfloat16"),
    pytest.param(ArgumentSpec(172, 64), marks=pytest.mark.slow),
    pytest.param(ArgumentSpec(256, 128, codebook="nf3"), marks=pytest.mark.slow),
    # Several tiles of 3 bits.
    pytest.param(
      ArgumentSpec(2560, 128, codebook="nf3", double_quantization=False), marks=pytest.mark.slow
    ),
    pytest.param(ArgumentSpec(256, 128, codebook="int8"), marks=pytest.mark.slow),
    pytest.param(ArgumentSpec(2048, 2048, (16,), "bfloat16"), marks=pytest.mark.slow),
    pytest.param(ArgumentSpec(2176, 2112, (16,), "bfloat16"), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_forward_and_gradient_compile(chip, spec):
  x, w, g = jax.eval_shape(lambda: arguments(spec))

  def both(x, w, g):
    y, pullback = jax.vjp(lambda x: quantized_matmul(x, w), x)
    return y, pullback(g)

  compiled = tpu_compiler.compile_for(tpu_compiler.one_chip(chip), both, x, w, g)
  text = compiled.as_text()
  assert text.count("tpu_custom_call") >= 2
  assert tpu_compile.vmem_bytes(compiled) < tpu_compile.VMEM[chip] / 2
  if spec.k * spec.n > 2**19:
    # No weight is written, neither of x's dtype nor packed, as of another type.
    # (v5p lays out the absmax of short runs ahead of the kernel, a register of lanes an output.)
    most = w.codes.size if (chip, spec.k) == ("v5p", 2176) else w.codes.size / 2
    assert compiled.memory_analysis().temp_size_in_bytes < most
    assert not re.search(rf"(s8|s32|bf16)\[({w.codes.shape[0]}|{spec.k}),{spec.n}\]", text)
    if spec.n % 128:
      # Nor padded.
      padded = spec.n + -spec.n % 128
      assert not re.search(rf"\[{w.codes.shape[0]},{padded}\]", text)


def sliced(text, codes):
  """What a program makes of the size of one layer's codes."""
  rows, columns = codes.shape[-2:]
  return re.findall(rf"\S+ = u8\[(?:1,)*{rows},{columns}\].*", text)


@compiles
@pytest.mark.parametrize(
  ("chip", "k", "n", "layers"),
  [
    *((chip, 128, 136, 4) for chip in CHIPS),
    # 70B's, of 9.4 GB.
    pytest.param("v5p", 8192, 28672, 80, marks=pytest.mark.slow),
  ],
)
def test_a_stack_is_read_where_it_lies(chip, k, n, layers):
  spec, key = ArgumentSpec(k, n, (16,), "bfloat16"), jax.random.key(0)
  x, stack = jax.eval_shape(lambda: (spec.x(key), spec.w(key, (layers,))))

  def scanned(remembering, x, stack):
    def layer(x, each):
      i, w = each
      return x + quantized_matmul(x, remembering(w, stack, i)).sum(), None

    return jax.lax.scan(layer, x, (jnp.arange(layers), stack))[0].astype(jnp.float32).sum()

  def text(remembering):
    both = jax.value_and_grad(functools.partial(scanned, remembering))
    return tpu_compiler.compile_for(tpu_compiler.one_chip(chip), both, x, stack).as_text()

  found = text(stacked.remembering)
  assert sliced(found, stack.codes) == []
  assert found.count("tpu_custom_call") >= 2
  if chip == "v5p" and layers == 4:
    # XLA's own slice, in both directions.
    assert len(sliced(text(lambda w, *_: w), stack.codes)) >= 2


@pytest.mark.slow
@compiles
def test_a_models_layers_are_read_where_they_lie():
  model = transformer(256, 128, 3, jnp.bfloat16)
  base = jax.eval_shape(functools.partial(base_of, model))
  x = jax.ShapeDtypeStruct((1, 16, 256), jnp.bfloat16)

  def blocks(x, base):
    return model.apply({"frozen": base}, x, method="blocks")[0]

  text = tpu_compiler.compile_for(tpu_compiler.one_chip("v5p"), blocks, x, base).as_text()
  assert text.count("tpu_custom_call") >= 7
  for module, name in (("attn", "q"), ("mlp", "up"), ("mlp", "down")):
    codes = base["layers"][module][name]["kernel"].codes
    assert sliced(text, codes) == [], name
  # Nor all experts of a layer.
  assert not re.findall(rf"= u8\[(?:1,)*{','.join(map(str, codes.shape[1:]))}\]", text)


@compiles
@pytest.mark.parametrize("partition", [sharded.COLUMNS, sharded.ROWS], ids=["columns", "rows"])
def test_codes_cross_the_wire_packed(partition):
  devices = np.array(tpu_compiler.topology("v5e")).reshape(2, 2)
  mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"))
  x, w, _ = jax.eval_shape(lambda: arguments(ArgumentSpec(1024, 512, (16,), "bfloat16")))

  def place(leaf, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    specs_of_w = sharded.weight_specs(w, partition)
  w = jax.tree.map(place, w, specs_of_w)
  product = functools.partial(sharded.sharded_matmul, partition=partition)
  text = tpu_compiler.compile_for(mesh, product, place(x, P("fsdp")), w).as_text()
  assert "tpu_custom_call" in text
  # Codes, and the scales: no decoded weight.
  gathered = [
    line.split(" = ")[1].split("{")[0] for line in text.splitlines() if " all-gather(" in line
  ]
  assert any(each.startswith("u8[") for each in gathered), gathered
  assert not any(each.startswith("bf16[") for each in gathered), gathered

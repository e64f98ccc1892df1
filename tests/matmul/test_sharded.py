"""The product over simulated devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax import lora, quantize, quantized_matmul
from qlora_jax.linen import QDense
from qlora_jax.matmul import sharded
from qlora_jax.matmul.specs import ArgumentSpec


def mesh():
  return jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def placed(w, partition, x):
  def put(leaf, spec):
    return jax.device_put(leaf, NamedSharding(mesh(), spec))

  return jax.tree.map(put, w, sharded.weight_specs(w, partition)), put(x, P("fsdp"))


@pytest.mark.parametrize("partition", [sharded.COLUMNS, sharded.ROWS], ids=["columns", "rows"])
@pytest.mark.parametrize("codebook", ["nf4", "int4_zero_point"])
def test_product_and_gradient_are_those_of_one_device(partition, codebook):
  spec = ArgumentSpec(512, 256, (4, 3), codebook=codebook)
  x, w = spec.x(jax.random.key(0)), spec.w(jax.random.key(1))
  g = jax.random.normal(jax.random.key(2), (4, 3, 256))

  def both(product, x, w, g):
    y, pullback = jax.vjp(lambda x: product(x, w), x)
    return y, pullback(g)[0]

  expected = both(quantized_matmul, x, w, g)
  with jax.set_mesh(mesh()):
    x, w = placed(w, partition, x)[::-1]
    product = functools.partial(sharded.sharded_matmul, partition=partition)
    function = jax.jit(functools.partial(both, product))
    found = function(x, w, g)
    text = function.lower(x, w, g).compile().as_text()
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-4)
  # Codes are gathered, and no decoded weight.
  lines = [line for line in str(text).splitlines() if " all-gather(" in line]
  gathers = [line.split("all-gather")[0] for line in lines]
  assert any("u8[" in line for line in gathers)
  assert not any(f"f32[{n}" in line for line in gathers for n in ("512,", "256,256"))


@pytest.mark.parametrize("partition", [sharded.COLUMNS, sharded.ROWS], ids=["columns", "rows"])
def test_each_device_keeps_its_own_part_for_the_backward_pass(partition):
  spec = ArgumentSpec(512, 256, (4, 3))

  def residuals(x, w):
    product = functools.partial(sharded.sharded_matmul, w=w, partition=partition)
    return jax.tree.leaves(jax.vjp(product, x)[1])

  with jax.set_mesh(mesh()):
    x, w = spec.x(jax.random.key(0)), spec.w(jax.random.key(1))
    kept = jax.eval_shape(residuals, x, w)
  # Over all devices: gathered codes would be twice as many.
  assert sum(leaf.size for leaf in kept if leaf.dtype == jnp.uint8) == w.codes.size


def test_a_layer_with_an_adapter():
  spec = ArgumentSpec(512, 256, (4, 3))
  x, w = spec.x(jax.random.key(0)), spec.w(jax.random.key(1))
  frozen = {"kernel": w}
  config = lora.LoRAConfig(rank=4, targets=("*",), variant="dora")
  params, constants = lora.init(jax.random.key(2), {"up": frozen}, config)
  layer = QDense(256, dtype=jnp.float32, partition=sharded.COLUMNS)

  def loss(params, frozen, x):
    variables = {"params": params, "constants": constants["up"], "frozen": frozen}
    y: Any = layer.apply(variables, x)
    return jnp.square(y).mean()

  value_and_grad = jax.jit(jax.value_and_grad(loss))
  expected = value_and_grad(params["up"], frozen, x)
  with jax.set_mesh(mesh()):
    w, x = placed(w, sharded.COLUMNS, x)
    found = jax.jit(jax.value_and_grad(loss))(params["up"], {"kernel": w}, x)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("rows", "k", "codebook", "kind", "reason"),
  [
    (3, 512, "nf4", "Auto", "its first axis is not cut evenly along fsdp"),
    (4, 384, "nf4", "Auto", "K = 384 cut in 2"),
    (4, 512, "any4", "Auto", "plain codes with one table"),
    (4, 512, "nf4", "Explicit", "manual or explicit"),
  ],
)
def test_what_it_does_not_serve_is_left_to_xla(rows, k, codebook, kind, reason):
  spec = ArgumentSpec(k, 256, (rows, 2), codebook=codebook)
  x, w = spec.x(jax.random.key(0)), spec.w(jax.random.key(1))
  layer = QDense(256, dtype=jnp.float32, partition=sharded.COLUMNS)
  apply = jax.jit(lambda w, x: layer.apply({"frozen": {"kernel": w}}, x))
  expected = apply(w, x)
  kinds = (getattr(jax.sharding.AxisType, kind),) * 2
  with jax.set_mesh(jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=kinds)):
    assert reason in str(sharded.unsupported(x, w, sharded.COLUMNS))
    with pytest.raises(ValueError, match=f"sharded_matmul: .*{reason}"):
      jax.jit(functools.partial(sharded.sharded_matmul, partition=sharded.COLUMNS))(x, w)
    # As if the layer had none.
    if kind == "Auto":
      np.testing.assert_allclose(apply(w, x), expected, rtol=2e-5, atol=2e-4)


def test_scales_of_two_levels_are_cut_with_the_codes():
  w = quantize(jnp.ones((512, 256)), codebook="nvfp4", block_size=16, double_quantization=False)
  with jax.set_mesh(mesh()):
    cuts = sharded.weight_specs(w, sharded.ROWS)
  # A tree of the weight's own structure.
  scales: Any = jax.tree.map(lambda leaf, cut: cut, w, cuts).scales
  assert (scales.codes, scales.factor) == (P("tensor", "fsdp"), P())


def test_cuts_through_a_group_are_refused():
  with jax.set_mesh(mesh()):
    for k, n, message in (
      (384, 256, "K = 384 cut in 2 along 'fsdp': a part is a multiple of 128"),
      (256, 255, "N = 255 cut in 2 along 'tensor'"),
    ):
      w = ArgumentSpec(k, n).w(jax.random.key(0))
      with pytest.raises(ValueError, match=message):
        sharded.weight_specs(w, sharded.COLUMNS)
    # One device along an axis cuts nothing.
  with jax.set_mesh(jax.make_mesh((1, 2), ("fsdp", "tensor"))):
    w = ArgumentSpec(384, 256).w(jax.random.key(0))
    assert sharded.weight_specs(w, sharded.COLUMNS).codes == P(None, "tensor")

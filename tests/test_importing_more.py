"""Importing: meshes, tied tables, the adapters' dropout, and what layers of others' ask of ours."""

import dataclasses
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx as fnnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax import QuantizationConfig, adapt, dequantize, einsum_layer, linen, lora, nnx
from qlora_jax.quantized_tensor import is_quantized

# Many programs to compile: for the whole suite, not its quick part.
pytestmark = pytest.mark.slow

PACK = QuantizationConfig(block_size=8)
LORA = lora.LoRAConfig(rank=2, targets=("*",))
WIDTH = 16
TOKENS = jnp.asarray([[3, 0, 19], [1, 1, 7]])


def trained(params):
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(4)
  leaves = [jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
  return jax.tree.unflatten(tree, leaves)


def two_products(weights, x):
  return jnp.tanh(x @ weights["up"]["kernel"]) @ weights["down"]["kernel"]


def weights_on(mesh):
  shapes = {"up": (256, 64), "down": (64, 256)}
  specs = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
  return {
    name: {
      "kernel": jax.device_put(
        jax.random.normal(jax.random.key(i), shape) / 8, NamedSharding(mesh, specs[name])
      )
    }
    for i, (name, shape) in enumerate(shapes.items())
  }


def test_sharded_weights_stay_sharded():
  mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
  weights, x = weights_on(mesh), jax.random.normal(jax.random.key(5), (4, 256))
  alone = jax.device_put(weights, jax.devices()[0])
  arguments = {"quantize": {"*": PACK}, "adapters": LORA, "key": jax.random.key(1)}
  single, whole, _, _ = adapt(two_products, alone, x, **arguments)

  def gradient(adapted, frozen, params, x):
    trees = {"frozen": frozen, "constants": constants}
    loss = lambda params: jnp.square(adapted.apply({**trees, "params": params}, x)).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(params)

  with jax.set_mesh(mesh):
    adapted, frozen, params, constants = adapt(two_products, weights, x, **arguments)
    params = trained(params)
    cut = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
    ours = gradient(adapted, frozen, params, cut)
    trees = {"frozen": frozen, "params": params, "constants": constants}
    shardings = jax.tree.map(lambda w: w.sharding, weights)
    merged = jax.jit(adapted.merge, out_shardings=shardings)(trees)
  for name in ("up", "down"):
    codes = frozen[name]["kernel"].codes
    # A quarter of the codes on each of four devices, and the same as on one.
    assert [shard.data.size for shard in codes.addressable_shards] == [codes.size // 4] * 4
    np.testing.assert_array_equal(codes, whole[name]["kernel"].codes)
  params = jax.device_put(params, jax.devices()[0])
  constants = jax.device_put(constants, jax.devices()[0])
  expected = gradient(single, whole, params, x)
  own = single.merge({"frozen": whole, "params": params, "constants": constants})
  pairs = zip(jax.tree.leaves((ours, merged)), jax.tree.leaves((expected, own)), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_explicit_axes_are_refused():
  mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    weights = weights_on(mesh)
    with pytest.raises(ValueError, match="down/kernel: cut along 'tensor', an explicit axis"):
      adapt(two_products, weights, jnp.ones((4, 256)), quantize={"*": PACK})


class Tied(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    table = nn.Embed(20, WIDTH, name="embed")
    return table.attend(nn.Dense(WIDTH, name="dense")(table(tokens)))


class TiedNNX(fnnx.Module):
  def __init__(self, rngs):
    self.embed = fnnx.Embed(20, WIDTH, rngs=rngs)
    self.dense = fnnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, tokens):
    return self.embed.attend(self.dense(self.embed(tokens)))


def by_function(rules):
  weights = {"embed": jnp.ones((20, WIDTH)), "dense": jnp.ones((WIDTH, WIDTH))}

  def function(weights, tokens):
    return weights["embed"][tokens] @ weights["dense"] @ weights["embed"].T

  return adapt(function, weights, TOKENS, quantize=rules)


def by_linen(rules):
  variables = jax.jit(Tied().init)(jax.random.key(0), TOKENS)
  return linen.adapt(Tied(), variables, TOKENS, quantize=rules)


def by_nnx(rules):
  return nnx.adapt(TiedNNX(fnnx.Rngs(0)), TOKENS, quantize=rules)


@pytest.mark.parametrize("by", [by_function, by_linen, by_nnx])
def test_a_rule_that_packs_a_tied_table_says_so(by):
  with pytest.warns(UserWarning, match="quantize: embed.*: tied: the lookup and the head") as seen:
    by({"*": PACK})
  # It is the user's line that is told, once.
  assert [warning.filename for warning in seen] == [__file__]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    by({"dense*": PACK})
    by({"dense*": PACK, "embed*": jnp.bfloat16})


def test_a_stacks_own_path_is_told_the_pattern():
  def scanned(weights, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights["layers"]["up"]["kernel"])[0]

  weights = {"layers": {"up": {"kernel": jnp.ones((2, WIDTH, WIDTH))}}}
  with pytest.raises(ValueError, match=r"'layers/up' matches no weight; near paths: layers/\*/up"):
    adapt(scanned, weights, jnp.ones((2, WIDTH)), quantize={"layers/up": PACK})
  _, frozen, *_ = adapt(scanned, weights, jnp.ones((2, WIDTH)), quantize={"layers/*/up": PACK})
  assert is_quantized(frozen["layers"]["up"]["kernel"])


def test_linens_dropout_key_is_the_adapters_too():
  module, x = nn.Dense(WIDTH), jax.random.normal(jax.random.key(0), (2, WIDTH))
  config = dataclasses.replace(LORA, dropout=0.5)
  adapted, frozen, params, constants = linen.adapt(
    module,
    module.init(jax.random.key(1), x),
    x,
    quantize={"*": PACK},
    adapters=config,
    key=jax.random.key(1),
  )
  trees = {"frozen": frozen, "params": trained(params), "constants": constants}
  plain = adapted.apply(trees, x)
  first, second = (
    adapted.apply(trees, x, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)
  )
  assert not np.array_equal(plain, first) and not np.array_equal(first, second)
  np.testing.assert_array_equal(first, adapted.apply(trees, x, rngs={"dropout": jax.random.key(0)}))
  np.testing.assert_array_equal(plain, adapted.apply(trees, x, rngs={"other": jax.random.key(0)}))


def test_nnx_draws_the_adapters_dropout_from_a_stream():
  model, x = fnnx.Linear(WIDTH, WIDTH, rngs=fnnx.Rngs(0)), jnp.ones((2, WIDTH))
  rngs = fnnx.Rngs(dropout=3)
  adapted = nnx.adapt(
    model,
    x,
    quantize={"*": PACK},
    adapters=dataclasses.replace(LORA, dropout=0.5),
    key=jax.random.key(1),
    rngs=rngs,
  )
  fnnx.update(adapted, trained(fnnx.state(adapted, fnnx.LoRAParam)))
  run = fnnx.jit(lambda model: model(x))
  first, second = run(adapted), run(adapted)
  assert not np.array_equal(first, second)
  adapted.eval()
  plain = run(adapted)
  np.testing.assert_array_equal(plain, run(adapted))
  assert not np.array_equal(plain, first)
  adapted.train()
  assert not np.array_equal(plain, run(adapted))
  # The given streams are the caller's still.
  assert rngs.dropout.count.get_value() == 0


@pytest.mark.parametrize(
  ("equation", "shape", "x", "bias"),
  [
    ("btd,dnh->btnh", (16, 2, 8), (2, 3, 16), "nh"),
    ("...nh,nhd->...d", (2, 8, 6), (2, 3, 2, 8), "d"),
    ("td,dnh->hnt", (16, 2, 4), (3, 16), "nh"),
    ("etd,edf->tef", (3, 16, 6), (3, 2, 16), "ef"),
    ("td,df", (16, 6), (2, 16), "f"),
  ],
)
def test_einsum_layers_with_a_bias(equation, shape, x, bias):
  """As `nn.Einsum` places it: by letter."""
  x = jax.random.normal(jax.random.key(0), x)
  module = linen.QEinsum(equation, shape, use_bias=True, dtype=jnp.float32)
  frozen: Any = module.init(jax.random.key(1), x)["frozen"]
  assert frozen["bias"].shape == einsum_layer.bias_shape(einsum_layer.layout(equation, shape))
  frozen["bias"] = jax.random.normal(jax.random.key(2), frozen["bias"].shape)
  layout = einsum_layer.layout(equation, shape)
  sizes = dict(zip(equation.partition(",")[2].partition("->")[0], shape, strict=True))
  added = np.asarray(frozen["bias"]).reshape([sizes[letter] for letter in bias])
  y = np.einsum(equation, x, layout.weight(frozen["kernel"]))
  out = equation.partition("->")[2] or "ft"
  dims = out.replace("...", "bt")
  places = [dims.index(letter) for letter in bias]
  order = np.argsort(places)
  wide = [sizes.get(letter, 1) if letter in bias else 1 for letter in dims]
  expected = y + added.transpose(order).reshape(wide)
  found: Any = module.apply({"frozen": frozen}, x)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  ours = nnx.QEinsum(equation, shape, use_bias=True, dtype=jnp.float32, rngs=fnnx.Rngs(0))
  ours.kernel.set_value(frozen["kernel"])
  assert ours.bias is not None
  ours.bias.set_value(frozen["bias"])
  np.testing.assert_allclose(ours(x), expected, atol=1e-5)


def test_an_implementation_that_is_named_reaches_the_product():
  x = jnp.ones((2, WIDTH))
  module = linen.QEinsum("td,df->tf", (WIDTH, 8), dtype=jnp.float32, implementation="none such")
  packed = {"kernel": by_function({"dense": PACK})[1]["dense"]}
  with pytest.raises(ValueError, match="'none such'"):
    dataclasses.replace(module, shape=(WIDTH, WIDTH)).apply({"frozen": packed}, x)
  layer = nnx.QEinsum(
    "td,df->tf", (WIDTH, 8), quantization=PACK, implementation="none such", rngs=fnnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="'none such'"):
    layer(x)
  adapted, frozen, *_ = by_function({"dense": PACK})
  adapted = dataclasses.replace(adapted, implementation="none such")
  with pytest.raises(ValueError, match="'none such'"):
    adapted.apply({"frozen": frozen}, TOKENS)


def test_a_linear_layers_own_dtypes_and_precision():
  x = jax.random.normal(jax.random.key(1), (4, WIDTH), jnp.bfloat16)

  def linear(**more):
    return fnnx.Linear(WIDTH, 6, use_bias=False, rngs=fnnx.Rngs(0), **more)

  for theirs in (
    linear(dtype=jnp.bfloat16, preferred_element_type=jnp.float32),
    linear(param_dtype=jnp.bfloat16),
    linear(),
  ):
    ours = nnx.QLinear.of(theirs)
    for each in (x, x.astype(jnp.float32)):
      with jax.numpy_dtype_promotion("standard"):
        found, expected = ours(each), theirs(each)
      assert found.dtype == expected.dtype
      np.testing.assert_array_equal(found, expected)
  # Not rounded to bfloat16 on its way.
  wide = linear(dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
  packed = nnx.QLinear.of(wide, quantization=PACK)
  expected = x.astype(jnp.float32) @ dequantize(packed.kernel.get_value())
  np.testing.assert_allclose(packed(x), expected, rtol=1e-5, atol=1e-6)

  exact = nnx.QLinear.of(linear(precision="highest", dtype=jnp.float32), quantization=PACK)
  jaxpr = str(jax.make_jaxpr(lambda x: exact(x))(x.astype(jnp.float32)))
  assert "Precision.HIGHEST" in jaxpr and "Precision.HIGHEST" not in str(
    jax.make_jaxpr(lambda x: packed(x))(x)
  )
  with pytest.raises(
    ValueError, match=r"dot_general: .* of the layer; QLinear has its own product"
  ):
    nnx.QLinear.of(linear(dot_general=lambda *args, **more: jax.lax.dot_general(*args, **more)))


class Experts(fnnx.Module):
  """Layers that are made, and called, by `nnx.vmap`."""

  def __init__(self, rngs):
    self.experts = fnnx.vmap(lambda rngs: fnnx.Linear(WIDTH, 8, rngs=rngs))(rngs.fork(split=3))

  def __call__(self, x):
    return fnnx.vmap(lambda expert, x: expert(x))(self.experts, x)


def test_experts_of_nnx_and_a_checkpoint_of_the_adapters_alone(tmp_path):
  model, x = Experts(fnnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, 2, WIDTH))

  def make():
    return nnx.adapt(model, x, quantize={"*": PACK}, adapters=LORA, key=jax.random.key(1))

  adapted, run = make(), fnnx.jit(lambda model: model(x))
  kernel = adapted.module.experts.kernel.get_value()
  assert is_quantized(kernel) and kernel.shape == (3, WIDTH, 8)
  fnnx.update(adapted, trained(fnnx.state(adapted, fnnx.LoRAParam)))
  ours = run(adapted)
  adapters = fnnx.to_pure_dict(fnnx.state(adapted, fnnx.LoRAParam))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "adapters", adapters)
    checkpointer.wait_until_finished()
    read = checkpointer.restore(tmp_path / "adapters", jax.tree.map(jnp.zeros_like, adapters))
  again = make()
  assert not np.array_equal(run(again), ours)
  state = fnnx.state(again, fnnx.LoRAParam)
  fnnx.replace_by_pure_dict(state, read)
  fnnx.update(again, state)
  np.testing.assert_array_equal(run(again), ours)
  adapted.merge(model)
  np.testing.assert_allclose(ours, run(model), rtol=0, atol=2e-5 * float(jnp.abs(ours).max()))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_ids_that_cannot_count_the_rows(dtype):
  table = {"embedding": jax.random.normal(jax.random.key(0), (300, WIDTH))}
  ids = jnp.asarray([1, 100], dtype)
  lookup = lambda weights, ids: jnp.take(weights["embedding"], ids, axis=0)  # noqa: E731
  adapted, frozen, _, _ = adapt(lookup, table, ids, quantize={"embedding": PACK})
  merged = adapted.merge({"frozen": frozen})
  np.testing.assert_array_equal(adapted.apply({"frozen": frozen}, ids), lookup(merged, ids))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_stack_that_lax_indexes(axis):
  def function(weights, x):
    for i in (2, 0):
      x = x @ jax.lax.index_in_dim(weights["kernel"], i, axis, keepdims=False)
    return x

  shape = [WIDTH, WIDTH]
  shape.insert(axis, 3)
  weights = {"kernel": jax.random.normal(jax.random.key(0), shape)}
  x = jax.random.normal(jax.random.key(1), (4, WIDTH))
  adapted, frozen, params, constants = adapt(
    function, weights, x, quantize={"*": PACK}, adapters=LORA, key=jax.random.key(2)
  )
  assert is_quantized(frozen["kernel"])
  trees = {"frozen": frozen, "params": trained(params), "constants": constants}
  want = function(adapted.merge(trees), x)
  np.testing.assert_allclose(
    adapted.apply(trees, x), want, rtol=1e-4, atol=1e-4 * np.abs(want).max()
  )


def test_what_is_missing_or_taken_is_named():
  dense, x = nn.Dense(WIDTH), jnp.ones((2, WIDTH))
  variables = dense.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="kernel, bias; `params` is not among them"):
    linen.adapt(dense, variables["params"], x, quantize={"kernel": PACK})
  with pytest.raises(ValueError, match=r"quantize: QuantizationConfig.*; path pattern"):
    linen.adapt(dense, variables, x, quantize=PACK)  # pyright: ignore[reportArgumentType]
  adapted, *_ = linen.adapt(dense, variables, x, quantize={"kernel": PACK})
  for method in (lambda trees: adapted.apply(trees, x), adapted.merge):
    with pytest.raises(ValueError, match="variables: params; `frozen` is not among them"):
      method(variables)

  def function(weights, x):
    a, b = weights["q"]["lora_a"], weights["q"]["lora_b"]
    return x @ weights["q"]["kernel"] + (x @ a) @ b

  own = {"kernel": (WIDTH, WIDTH), "lora_a": (WIDTH, 2), "lora_b": (2, WIDTH)}
  own = {"q": {name: jnp.ones(shape) for name, shape in own.items()}}
  lora_of_kernel = dataclasses.replace(LORA, targets=("*/kernel",))
  with pytest.raises(ValueError, match="q/lora_a: a weight of the function's own"):
    adapt(function, own, x, adapters=lora_of_kernel, key=jax.random.key(0))

  lookup = lambda weights, ids: weights["embedding"][ids]  # noqa: E731
  by_name = dataclasses.replace(LORA, targets=("embedding",))
  adapted, frozen, params, _ = adapt(
    lookup, {"embedding": jnp.ones((20, WIDTH))}, TOKENS, adapters=by_name, key=jax.random.key(0)
  )
  with pytest.raises(ValueError, match="embedding: an adapter in params without its scaling"):
    adapted.apply({"frozen": frozen, "params": params}, TOKENS)


@pytest.mark.parametrize(("rows", "use_bias"), [(8, True), (WIDTH, False)])
def test_nnx_merges_into_a_module_like_its_own_alone(rows, use_bias):
  linear = fnnx.Linear(WIDTH, WIDTH, rngs=fnnx.Rngs(0))
  adapted = nnx.adapt(linear, jnp.ones((2, WIDTH)), quantize={"kernel": PACK})
  into = fnnx.Linear(rows, WIDTH, use_bias=use_bias, rngs=fnnx.Rngs(0))
  with pytest.raises(ValueError, match=r"into: (kernel|bias): shape .*; the adapted module's is"):
    adapted.merge(into)

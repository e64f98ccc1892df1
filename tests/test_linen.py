import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax import dequantize, lora, quantize, quantized_matmul
from qlora_jax.linen import Embed, QDense, TiedHead

K, N = 40, 24


def layer(use_bias=False, **kwargs) -> QDense:
  return QDense(N, use_bias=use_bias, **{"dtype": jnp.float32, **kwargs})


def x_of(*leading, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(0), (*leading, K), dtype)


def run(module: nn.Module, variables, *args, **kwargs) -> jax.Array:
  y = module.apply(variables, *args, **kwargs)
  assert isinstance(y, jax.Array)
  return y


def dense():
  return jax.random.normal(jax.random.key(1), (K, N))


def adapter(dropout=0.0):
  """An adapter that changes the output, and its constants."""
  cfg = lora.LoRAConfig(rank=4, targets=("kernel",), dropout=dropout)
  params, constants = lora.init(jax.random.key(2), {"kernel": dense()}, cfg)
  # init nests by the path of the layer, which for a bare kernel is its own name.
  params, constants = params["kernel"], constants["kernel"]
  return {**params, "lora_b": jax.random.normal(jax.random.key(3), (4, N))}, constants


def test_init_makes_frozen_alone():
  variables = layer(use_bias=True).init(jax.random.key(0), x_of(2))
  assert {name: dict(tree) for name, tree in jax.tree.map(jnp.shape, variables).items()} == {
    "frozen": {"kernel": (K, N), "bias": (N,)}
  }
  kernel = np.asarray(variables["frozen"]["kernel"])
  assert abs(kernel.std() * np.sqrt(K) - 1) < 0.1 and kernel.dtype == np.float32
  assert not np.asarray(variables["frozen"]["bias"]).any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_packed_and_plain_kernels(leading):
  q = quantize(dense())
  x = x_of(*leading)
  ours = run(layer(), {"frozen": {"kernel": q}}, x)
  np.testing.assert_array_equal(ours, quantized_matmul(x, q))
  plain = run(layer(), {"frozen": {"kernel": dequantize(q)}}, x)
  assert ours.shape == plain.shape == (*leading, N)
  np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pack", [lambda w: w, quantize], ids=["plain", "packed"])
def test_adapter_and_bias(pack):
  params, constants = adapter()
  bias = jax.random.normal(jax.random.key(4), (N,))
  frozen = {"kernel": pack(dense()), "bias": bias}
  x = x_of(3)
  ours = run(layer(use_bias=True), {"frozen": frozen, "params": params, "constants": constants}, x)
  base = dense() if pack is not quantize else dequantize(quantize(dense()))
  w, a, b, x64 = (np.asarray(v, np.float64) for v in (base, params["lora_a"], params["lora_b"], x))
  # alpha 16, rank 4.
  expected = x64 @ w + 4 * (x64 @ a) @ b + np.asarray(bias)
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_zero_b_changes_not_a_bit(dtype):
  params, constants = adapter()
  params = {**params, "lora_b": jnp.zeros((4, N))}
  frozen, x = {"kernel": quantize(dense())}, x_of(5)
  base = run(layer(dtype=dtype), {"frozen": frozen}, x)
  adapted = run(layer(dtype=dtype), {"frozen": frozen, "params": params, "constants": constants}, x)
  assert base.dtype == dtype
  np.testing.assert_array_equal(base, adapted)


@pytest.mark.parametrize("name, shape", [("kernel", (K, N)), ("bias", (N,))])
def test_a_full_leaf_in_params_takes_the_weights_place(name, shape):
  other = jax.random.normal(jax.random.key(9), shape)
  frozen = {"kernel": quantize(dense()), "bias": jnp.ones(N)}
  module, x = layer(use_bias=True), x_of(3)
  ours = run(module, {"frozen": frozen, "params": {name: other}}, x)
  np.testing.assert_array_equal(ours, run(module, {"frozen": {**frozen, name: other}}, x))
  assert not np.array_equal(ours, run(module, {"frozen": frozen}, x))
  # It is trained: it has a gradient, and the base has none to have.
  gradient = jax.grad(
    lambda params: jnp.square(run(module, {"frozen": frozen, "params": params}, x)).sum()
  )({name: other})
  assert gradient[name].any()


@pytest.mark.parametrize("pack", [lambda w: w, quantize], ids=["plain", "packed"])
def test_output_dtype(pack):
  x = x_of(3)
  variables = {"frozen": {"kernel": pack(dense())}}
  default = run(QDense(N), variables, x)
  assert default.dtype == jnp.bfloat16
  wide = run(QDense(N, output_dtype=jnp.float32), variables, x)
  assert wide.dtype == jnp.float32
  np.testing.assert_allclose(wide, default.astype(jnp.float32), rtol=2**-8, atol=1e-6)
  if pack is not quantize:
    # A plain kernel's float32 sums are not rounded to bfloat16 on the way.
    assert not np.array_equal(wide.astype(jnp.bfloat16).astype(jnp.float32), wide)


def test_dropout_only_with_a_key_and_a_rate():
  frozen, x = {"kernel": quantize(dense())}, x_of(6)
  params, constants = adapter(dropout=0.5)
  variables = {"frozen": frozen, "params": params, "constants": constants}
  plain = run(layer(), variables, x)
  np.testing.assert_array_equal(plain, run(layer(), {**variables, "constants": adapter()[1]}, x))

  def dropped(seed):
    return run(layer(), variables, x, rngs={"dropout": jax.random.key(seed)})

  np.testing.assert_array_equal(dropped(0), dropped(0))
  assert not np.array_equal(dropped(0), dropped(1))
  assert not np.array_equal(dropped(0), plain)
  # The base's own path is not dropped: without B nothing changes.
  zero = {**variables, "params": {**params, "lora_b": jnp.zeros((4, N))}}
  np.testing.assert_array_equal(
    run(layer(), zero, x, rngs={"dropout": jax.random.key(0)}),
    run(layer(), {"frozen": frozen}, x),
  )


class Outer(nn.Module):
  """QDense below a name, for the paths in messages."""

  use_bias: bool = False

  @nn.compact
  def __call__(self, x):
    return QDense(N, use_bias=self.use_bias, dtype=jnp.float32, name="q")(x)


def test_missing_constants_are_an_error():
  params, _ = adapter()
  variables = {"frozen": {"q": {"kernel": dense()}}, "params": {"q": params}}
  with pytest.raises(ValueError) as error:
    run(Outer(), variables, x_of(2))
  assert "q: an adapter in params without its scaling in constants" in str(error.value)


def test_a_missing_base_is_an_error():
  with pytest.raises(Exception, match="kernel"):
    run(Outer(), {"frozen": {}}, x_of(2))


@pytest.mark.parametrize("collection", ["frozen", "params"])
@pytest.mark.parametrize("pack", [lambda w: w, quantize], ids=["plain", "packed"])
def test_a_wrong_shape_names_its_path(pack, collection):
  with pytest.raises(ValueError) as error:
    run(Outer(), {collection: {"q": {"kernel": pack(jnp.ones((K + 1, N)))}}}, x_of(2))
  assert str(error.value) == f"q/kernel: shape ({K + 1}, {N}); the model's is ({K}, {N})"


def test_a_packed_bias_is_refused():
  # As a vector it could not be packed: the nearest thing has two axes, and so another shape.
  frozen = {"q": {"kernel": dense(), "bias": quantize(jnp.ones((1, N)))}}
  with pytest.raises(ValueError, match="q/bias: shape"):
    run(Outer(use_bias=True), {"frozen": frozen}, x_of(2))


def test_the_implementation_is_handed_on():
  with pytest.raises(ValueError, match="implementation 'none such'"):
    run(layer(implementation="none such"), {"frozen": {"kernel": quantize(dense())}}, x_of(2))


def test_gradients_are_those_of_the_dense_layer():
  q = quantize(dense())
  params, constants = adapter()
  x = x_of(5)

  def gradients(kernel):
    def loss(params, x):
      variables = {"frozen": {"kernel": kernel}, "params": params, "constants": constants}
      return jnp.tanh(run(layer(), variables, x)).sum()

    return jax.grad(loss, (0, 1))(params, x)

  packed, plain = gradients(q), gradients(dequantize(q))
  for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
    assert b.any()


# Embeddings and tied heads.

V, WIDTH = 30, 16


def table():
  return jax.random.normal(jax.random.key(20), (V, WIDTH))


def tied_adapter(*targets):
  """Of the table or the head tied to it, and its constants."""
  cfg = lora.LoRAConfig(rank=4, targets=targets)
  params, constants = lora.init(jax.random.key(0), {"embed": {"embedding": table()}}, cfg)
  keys = iter(jax.random.split(jax.random.key(21), 4))
  return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params), constants


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [None, 32**0.5])
def test_an_embedding_and_its_adapter(scale, dtype):
  params, constants = tied_adapter("embed")
  ids = jnp.asarray([[3, 0, 29], [3, 3, 7]])
  module = Embed(V, WIDTH, dtype, scale=scale)
  variables = {
    "frozen": {"embedding": table()},
    "params": params["embed"],
    "constants": constants["embed"],
  }
  ours = run(module, variables, ids)
  assert ours.dtype == dtype
  merged = lora.merge({"embed": {"embedding": table()}}, params, constants)["embed"]["embedding"]
  # As Gemma has it: the scale is rounded to dtype first.
  factor = 1 if scale is None else float(jnp.asarray(scale, dtype))
  expected = factor * np.asarray(merged, np.float64)[ids]
  # Table, A, B, h, the product, the sum and the scaled sum each round.
  atol = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0, atol=atol)
  bare = run(module, {"frozen": {"embedding": table()}}, ids)
  plain = jnp.take(table(), ids, axis=0).astype(dtype)
  np.testing.assert_array_equal(bare, plain if scale is None else plain * jnp.asarray(scale, dtype))
  assert np.abs(np.asarray(ours - bare)).max() > 0.1


def test_an_embedding_has_gradients_of_its_adapter():
  params, constants = tied_adapter("embed")
  ids = jnp.asarray([[3, 0, 29], [3, 3, 7]])

  def loss(params, scale=2.0):
    variables = {
      "frozen": {"embedding": table()},
      "params": params,
      "constants": constants["embed"],
    }
    return jnp.tanh(run(Embed(V, WIDTH, jnp.float32, scale=scale), variables, ids)).sum()

  def dense(params):
    a, b = params["lora_a"], params["lora_b"]
    w = table() + constants["embed"]["scaling"] * (a @ b)
    return jnp.tanh(2 * w[ids]).sum()

  ours, expected = jax.grad(loss)(params["embed"]), jax.grad(dense)(params["embed"])
  for name in ours:
    np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, atol=1e-4)
  # Rows that were not looked up have none.
  rows = np.flatnonzero(np.asarray(ours["lora_a"]).any(1))
  assert rows.tolist() == [0, 3, 7, 29]


def test_an_embedding_refuses_another_vocabulary():
  params, constants = tied_adapter("embed")
  params = {"lora_a": params["embed"]["lora_a"][:20], "lora_b": params["embed"]["lora_b"]}
  variables = {
    "frozen": {"embedding": table()},
    "params": params,
    "constants": constants["embed"],
  }
  with pytest.raises(ValueError, match="lora_a: 20 rows; the model's vocabulary has 30"):
    run(Embed(V, WIDTH), variables, jnp.zeros((1, 2), jnp.int32))
  with pytest.raises(ValueError, match="an adapter in params without its scaling"):
    run(
      Embed(20, WIDTH),
      {**variables, "frozen": {"embedding": table()[:20]}, "constants": {}},
      jnp.zeros((1, 2), jnp.int32),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tied_head_and_its_adapter(dtype):
  params, constants = tied_adapter("head")
  x = jax.random.normal(jax.random.key(5), (2, 3, WIDTH), dtype)
  bare = run(TiedHead(dtype), {}, x, table())
  assert bare.dtype == jnp.float32
  x64 = np.asarray(x, np.float64)
  stored = np.asarray(table().astype(dtype), np.float64)
  # The products are exact in float32, and their sums are not rounded to dtype.
  np.testing.assert_allclose(bare, x64 @ stored.T, rtol=1e-5, atol=1e-5)
  variables = {"params": params["head"], "constants": constants["head"]}
  ours = run(TiedHead(dtype), variables, x, table())
  merged = lora.merge({"embed": {"embedding": table()}}, params, constants)["head"]["kernel"]
  expected = x64 @ np.asarray(merged, np.float64)
  atol = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
  np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)
  # A kernel of its own takes the table's place.
  other = jax.random.normal(jax.random.key(6), (WIDTH, V))
  own = run(TiedHead(dtype), {"params": {"kernel": other}}, x, table())
  np.testing.assert_array_equal(own, run(TiedHead(dtype), {}, x, other.T))
  with pytest.raises(ValueError, match="kernel: shape"):
    run(TiedHead(dtype), {"params": {"kernel": other.T}}, x, table())


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_devices_that_share_the_layer_add_up(packed):
  params, constants = adapter()
  kernel = quantize(dense()) if packed else dense()
  module, x = layer(output_dtype=jnp.float32), x_of(8)

  def gradient(params, kernel, x):
    def loss(params):
      variables = {"params": params, "constants": constants, "frozen": {"kernel": kernel}}
      return jnp.square(run(module, variables, x)).sum()

    return jax.grad(loss)(params)

  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P())
  found, expected = jax.jit(split)(params, kernel, x), gradient(params, kernel, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_a_kernel_trained_in_full_on_several_devices():
  def gradient(kernel, x):
    def loss(kernel):
      module = layer(dtype=jnp.bfloat16, output_dtype=jnp.float32)
      return jnp.square(run(module, {"params": {"kernel": kernel}}, x)).sum()

    return jax.grad(loss)(kernel)

  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
  x = x_of(8)
  found, expected = jax.jit(split)(dense(), x), gradient(dense(), x)
  # Each device rounds its own part to bfloat16.
  np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2 * float(jnp.abs(expected).max()))

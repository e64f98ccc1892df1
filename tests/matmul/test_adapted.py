"""The product whose weight has the adapter in it, against the products apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax import dequantize, lora, quantize
from qlora_jax.linen import QDense
from qlora_jax.matmul import adapted_matmul, fuses_adapter, gpu, gpu_dequantize

HAS_GPU = jax.default_backend() == "gpu"
# More rows than are multiplied by codes decoded in registers.
M, K, N = gpu.MOST_TILED_ROWS + 8, 256, 512
SCALING = jnp.float32(2)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  if not HAS_GPU:
    interpreted = functools.partial(gpu_dequantize.dequantize, interpret=True)
    monkeypatch.setattr(gpu_dequantize, "dequantize", interpreted)


def arguments(rank, trials=None):
  keys = jax.random.split(jax.random.key(0), 4)
  lead = () if trials is None else (trials,)
  w = quantize(jax.random.normal(keys[0], (K, N)))
  a = jax.random.normal(keys[1], (*lead, K, rank)) / 16
  b = jax.random.normal(keys[2], (*lead, rank, N)) / 4
  x = jax.random.normal(keys[3], (*lead, M, K), jnp.bfloat16)
  return x, w, a, b


def with_gradients(x, w, a, b, g):
  y, pull = jax.vjp(lambda x, a, b: adapted_matmul(x, w, a, b, SCALING), x, a, b)
  return y, *pull(g)


def deviation(found, exact):
  return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_value_and_gradients(rank):
  x, w, a, b = arguments(rank)
  g = jax.random.normal(jax.random.key(1), (M, N), jnp.bfloat16)
  y, dx, da, db = jax.jit(with_gradients)(x, w, a, b, g)
  assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (x.dtype, x.dtype, a.dtype, b.dtype)
  apart = jnp.matmul(x, gpu_dequantize.dequantize(w, x.dtype)) + lora.apply(x, a, b, SCALING)
  x, a, b, g = (np.asarray(each, np.float64) for each in (x, a, b, g))
  whole = np.asarray(dequantize(w), np.float64) + 2 * a @ b
  # Roundings of the weight, of the result, and of A and B: each 2⁻⁹ at most, a third of it on
  # average.
  for found, exact in ((y, x @ whole), (dx, g @ whole.T)):
    assert deviation(found, exact) < 4e-3
  assert deviation(y, x @ whole) < deviation(apart, x @ whole)
  assert deviation(da, 2 * x.T @ (g @ b.T)) < 4e-3
  assert deviation(db, 2 * (x @ a).T @ g) < 4e-3


def test_a_zero_adapter_changes_no_bit():
  x, w, a, b = arguments(8)
  bare = gpu_dequantize.dequantize(w, jnp.bfloat16)
  np.testing.assert_array_equal(
    gpu_dequantize.dequantize(w, jnp.bfloat16, adapter=(a, 0 * b)), bare
  )
  np.testing.assert_array_equal(
    adapted_matmul(x, w, a, 0 * b, SCALING), jnp.matmul(x, bare).astype(x.dtype)
  )


def test_what_is_smaller_than_a_weights_rounding_is_not_lost():
  """Of an adapter a third of the weights' last bit, what the sum over K makes of it."""
  x, w, a, b = arguments(16)
  x = jnp.abs(x)
  b = b * 1e-2
  dense = dequantize(w)
  exact = np.asarray(x, np.float64) @ (2 * np.asarray(a, np.float64) @ np.asarray(b, np.float64))
  found = gpu_dequantize.dequantize(w, jnp.bfloat16, adapter=(a, 2 * b)).astype(jnp.float32)
  bare = dense.astype(jnp.bfloat16).astype(jnp.float32)
  moved = np.asarray(x, np.float64) @ np.asarray(found - bare, np.float64)
  # Each weight moves by a whole step or not at all, in the right share of cases.
  slope = (moved * exact).sum() / (exact * exact).sum()
  assert 0.9 < slope < 1.1


@pytest.mark.parametrize("batched", ["x", "all"])
def test_vmap(batched):
  x, w, a, b = arguments(4, trials=3)
  if batched == "x":
    a, b = a[0], b[0]
  axes = (0, None, *(0 if batched == "all" else None,) * 2, 0)
  g = jax.random.normal(jax.random.key(1), (3, M, N), jnp.bfloat16)
  found = jax.jit(jax.vmap(with_gradients, axes))(x, w, a, b, g)
  for t in range(3):
    own = (a[t], b[t]) if batched == "all" else (a, b)
    alone = with_gradients(x[t], w, *own, g[t])
    for ours, one in zip(found, alone, strict=True):
      assert deviation(ours[t], np.asarray(one, np.float64)) < 6e-3


def test_trials_share_one_decoded_weight():
  x, w, a, b = arguments(4, trials=3)

  def loss(a, b):
    return adapted_matmul(x[0], w, a, b, SCALING).astype(jnp.float32).sum()

  program = str(jax.make_jaxpr(jax.vmap(jax.grad(loss, (0, 1))))(a, b))
  # Forward and backward, each [K, N], never [3, K, N].
  assert f"bf16[{K},{N}]" in program
  assert f"bf16[3,{K},{N}]" not in program


@pytest.mark.parametrize(
  ("change", "served"),
  [
    ({}, True),
    ({"rank": 64}, True),
    ({"rank": 65}, False),
    ({"rows": 64}, False),
    ({"dtype": jnp.float32}, False),
    ({"n": 500}, False),
    ({"k": 200}, False),
  ],
)
def test_what_is_served(change, served):
  case = {"rank": 16, "rows": M, "dtype": jnp.bfloat16, "k": K, "n": N} | change
  w = quantize(jnp.ones((case["k"], case["n"])))
  x = jnp.ones((case["rows"], case["k"]), case["dtype"])
  assert gpu.fuses_adapter(x, w, case["rank"]) == served
  if not served:
    a, b = jnp.ones((case["k"], case["rank"])), jnp.ones((case["rank"], case["n"]))
    with pytest.raises(ValueError, match=f"adapted_matmul: .*rank {case['rank']}; only what fuses"):
      adapted_matmul(x, w, a, b, SCALING)


def test_a_layer_takes_it_where_it_is_served_and_says_the_same(monkeypatch):
  x, w, _, b = arguments(8)
  key = jax.random.key(0)
  layer = QDense(N, dtype=jnp.bfloat16)
  frozen = {"kernel": w}
  params, constants = lora.init(key, {"p": frozen}, lora.LoRAConfig(rank=8, targets=("p/*",)))
  params, constants = params["p"] | {"lora_b": b}, constants["p"]
  variables = {"params": params, "constants": constants, "frozen": frozen}
  apart = layer.apply(variables, x)
  calls = []
  monkeypatch.setattr(
    "qlora_jax.adapted_product.fuses_adapter", lambda *args, **_: gpu.fuses_adapter(*args)
  )
  monkeypatch.setattr(
    "qlora_jax.adapted_product.adapted_matmul",
    lambda *args: calls.append(args) or adapted_matmul(*args),
  )
  fused = layer.apply(variables, x)
  assert calls
  assert deviation(fused, np.asarray(apart, np.float64)) < 6e-3


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need JAX 0.11.2")
@pytest.mark.parametrize("of_x", [P(), P("d")])
def test_lowers_for_an_h100_alone_and_in_shard_map(monkeypatch, of_x):
  monkeypatch.undo()  # compiled, not interpreted
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((2,), ("d",), axis_types=auto, abstract_device=device)
  x, w, a, b = jax.eval_shape(lambda: arguments(8))
  x = jax.ShapeDtypeStruct((2 * M, K), x.dtype)

  def gradients(x, w, a, b):
    assert fuses_adapter(x, w, a.shape[-1])

    def total(x, a, b):
      return adapted_matmul(x, w, a, b, SCALING).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))(x, a, b)

  with jax.sharding.use_abstract_mesh(mesh):
    sharded = jax.shard_map(gradients, in_specs=(of_x, P(), P(), P()), out_specs=(of_x, P(), P()))
    text = jax.jit(sharded).trace(x, w, a, b).lower(lowering_platforms=("cuda",)).as_text()
  assert "triton" in text
  # A's and B's gradients are summed over the devices.
  assert ("all_reduce" in text) == (of_x == P("d"))

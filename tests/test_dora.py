"""DoRA and LoRA's bias: against PEFT's numbers, a numpy oracle, and in stacks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import dequantize, lora, quantize, quantize_tree, tree_paths
from qlora_jax.linen import QDense, TiedHead
from qlora_jax.lora import LoRAConfig
from qlora_jax.quantization import QuantizationConfig

K, N, R, L = 40, 24, 4, 3

# Float32 sums over at most 64 products of size 1, at outputs of size 1 to 10.
RTOL, ATOL = 2e-5, 2e-5


def apply(module: nn.Module, variables, *args) -> jax.Array:
  y = module.apply(variables, *args)
  assert isinstance(y, jax.Array)
  return y


def normal(seed, *shape, scale=1.0):
  return jax.random.normal(jax.random.key(seed), shape) * np.float32(scale)


def dense(seed=1):
  return normal(seed, K, N)


def adapter(frozen, cfg, seed=0):
  """As training leaves it: B, m and b all moved."""
  params, constants = lora.init(jax.random.key(seed), frozen, cfg)
  flat = tree_paths.leaves(params)
  for i, (path, leaf) in enumerate(flat.items()):
    name = path.rpartition("/")[2]
    if name in ("lora_b", "lora_bias"):
      flat[path] = normal(100 + i, *leaf.shape, scale=0.3)
    if name == "magnitude":
      flat[path] = leaf * jax.random.uniform(jax.random.key(i), leaf.shape, minval=0.5, maxval=1.5)
  return tree_paths.nest(flat), constants


def oracle(x, w, params, constants):
  """In float64, from the dense definition."""
  x, w, a, b = (np.asarray(v, np.float64) for v in (x, w, params["lora_a"], params["lora_b"]))
  merged = w + float(constants["scaling"]) * a @ b
  if "magnitude" in params:
    merged = merged * np.asarray(params["magnitude"], np.float64) / np.linalg.norm(merged, axis=0)
  y = x @ merged
  if "lora_bias" in params:
    y = y + float(constants["scaling"]) * np.asarray(params["lora_bias"], np.float64)
  return y


# PEFT's numbers.


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
def test_golden(shared, pack):
  golden = np.load(shared / "golden" / "peft_linear" / "golden.npz")
  x, dy, w, bias = (jnp.asarray(golden[name]) for name in ("x", "dy", "W", "bias"))
  kernel = w.T
  if pack:
    # Each weight with a scale of its own is kept to a rounding: the packed path, the same numbers.
    kernel = quantize(w.T, codebook="int8", block_size=1, double_quantization=False)
    np.testing.assert_allclose(dequantize(kernel), w.T, rtol=1e-6)
  params = {
    "lora_a": jnp.asarray(golden["dora.A"].T),
    "lora_b": jnp.asarray(golden["dora.B"].T),
    "magnitude": jnp.asarray(golden["dora.magnitude"]),
  }
  _, constants = lora.init(
    jax.random.key(0),
    {"q": {"kernel": kernel}},
    LoRAConfig(rank=8, alpha=8 * float(golden["dora.scaling"]), targets=("q",), variant="dora"),
  )
  constants = constants["q"]
  np.testing.assert_allclose(
    constants["weight_norm"], golden["dora.magnitude_init"], rtol=1e-6, atol=0
  )
  frozen = {"kernel": kernel, "bias": bias}
  module = QDense(48, use_bias=True, dtype=jnp.float32)

  def f(x, params):
    return apply(module, {"frozen": frozen, "params": params, "constants": constants}, x)

  y, pullback = jax.vjp(f, x, params)
  dx, grads = pullback(dy)
  merged = lora.merge({"q": frozen}, {"q": params}, {"q": constants})
  ours = {
    "y": y,
    "dx": dx,
    "dA": grads["lora_a"].T,
    "dB": grads["lora_b"].T,
    "dmagnitude": grads["magnitude"],
    "merged": merged["q"]["kernel"].T,
  }
  # PEFT's magnitude moved away from its start: else it would not matter.
  assert np.abs(golden["dora.magnitude"] - golden["dora.magnitude_init"]).max() > 1e-2
  for name, value in ours.items():
    expected = golden[f"dora.{name}"]
    np.testing.assert_allclose(value, expected, rtol=RTOL, atol=ATOL, err_msg=name)


# The layer.

CASES = {
  "dora": LoRAConfig(rank=R, targets=("q",), variant="dora"),
  "bias": LoRAConfig(rank=R, targets=("q",), lora_bias=True),
  "dora and bias": LoRAConfig(rank=R, targets=("q",), variant="dora", lora_bias=True),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("pack", [lambda w: w, quantize], ids=["plain", "packed"])
@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_layer_and_merge(cfg, pack, dtype):
  bias = normal(5, N)
  frozen = {"q": {"kernel": pack(dense()), "bias": bias}}
  params, constants = adapter(frozen, cfg)
  x = normal(0, 6, K).astype(dtype)
  module = QDense(N, use_bias=True, dtype=dtype)
  variables = {"frozen": frozen["q"], "params": params["q"], "constants": constants["q"]}
  ours = apply(module, variables, x)
  assert ours.dtype == dtype
  w = dequantize(frozen["q"]["kernel"]) if pack is quantize else dense()
  expected = oracle(x, w, params["q"], constants["q"]) + np.asarray(bias, np.float64)
  # Operands, x · W, the delta and y each round to dtype.
  atol = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0, atol=atol)

  merged = lora.merge(frozen, params, constants)
  assert set(merged["q"]) == {"kernel", "bias"}
  np.testing.assert_allclose(
    x.astype(jnp.float32) @ merged["q"]["kernel"] + merged["q"]["bias"][None],
    expected,
    rtol=0,
    atol=1e-5 * np.abs(expected).max(),
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_at_the_start_not_a_bit_changes(cfg, dtype):
  frozen = {"q": {"kernel": quantize(dense())}}
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  module, x = QDense(N, dtype=dtype), normal(0, 6, K)
  variables = {"frozen": frozen["q"], "params": params["q"], "constants": constants["q"]}
  np.testing.assert_array_equal(
    apply(module, variables, x), apply(module, {"frozen": frozen["q"]}, x)
  )


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0], ids=["small", "equal", "large"])
@pytest.mark.parametrize("pack", [lambda w: w, quantize], ids=["plain", "packed"])
def test_the_norm_is_that_of_the_dense_weight(pack, size):
  kernel = pack(dense())
  w = dequantize(kernel) if pack is quantize else kernel
  a, b = normal(2, K, R, scale=1 / np.sqrt(K)), normal(3, R, N)
  b = b * np.float32(size * np.linalg.norm(w) / np.linalg.norm(a @ b))
  constants = lora.constants({"q": {"kernel": kernel}}, CASES["dora"])["q"]
  scale = lora.dora_scale(
    jnp.ones(N), constants["weight_norm"], a.T @ w, a, b, jnp.asarray(1.0, jnp.float32)
  )
  exact = np.linalg.norm(np.asarray(w, np.float64) + np.asarray(a, np.float64) @ b, axis=0)
  np.testing.assert_allclose(1 / scale, exact, rtol=2e-6)


def test_a_row_of_zeros_is_the_base():
  # PEFT divides 0 by 0 here.
  w = dense().at[:, [0, 5]].set(0)
  for kernel in (w, quantize(w)):
    frozen = {"q": {"kernel": kernel}}
    params, constants = lora.init(jax.random.key(0), frozen, CASES["dora"])
    module, x = QDense(N, dtype=jnp.float32), normal(0, 6, K)

    def f(params, x, module=module, frozen=frozen, constants=constants):
      variables = {"frozen": frozen["q"], "params": params, "constants": constants["q"]}
      return jnp.tanh(apply(module, variables, x)).sum()

    params = params["q"]
    plain = {name: params[name] for name in ("lora_a", "lora_b")}
    y, (grads, dx) = jax.value_and_grad(f, (0, 1))(params, x)
    base, (base_grads, base_dx) = jax.value_and_grad(f, (0, 1))(plain, x)
    assert y == base
    np.testing.assert_array_equal(dx, base_dx)
    for name in plain:
      np.testing.assert_array_equal(grads[name], base_grads[name])
    assert np.asarray(grads["lora_b"][:, 0]).any()
    magnitude = np.asarray(grads["magnitude"])
    assert np.isfinite(magnitude).all() and not magnitude[[0, 5]].any() and magnitude[1:5].all()
    merged = lora.merge(frozen, {"q": params}, constants)["q"]["kernel"]
    assert np.isfinite(np.asarray(merged)).all() and not np.asarray(merged[:, 0]).any()


def test_the_norm_is_detached():
  # Scaling B scales the norm: with it attached, the output along W + sAB would not move at all.
  params, constants = adapter({"q": {"kernel": jnp.zeros((K, N))}}, CASES["dora"])
  params, constants = params["q"], constants["q"]
  params["magnitude"] = jnp.ones(N)
  module, x = QDense(N, dtype=jnp.float32), normal(0, 6, K)

  def f(size):
    scaled = {**params, "lora_b": params["lora_b"] * size}
    variables = {
      "frozen": {"kernel": jnp.zeros((K, N))},
      "params": scaled,
      "constants": constants,
    }
    return jnp.square(apply(module, variables, x)).sum()

  one = jnp.ones(())
  np.testing.assert_allclose(f(one), f(2 * one), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(f)(one), 2 * f(one), rtol=1e-5)


# Stacks.

STACKED = LoRAConfig(
  rank=R,
  targets=("layers/[02]/up", "*/down"),
  rank_pattern={"layers/2/up": 2},
  variant="dora",
  lora_bias=True,
)


def stack():
  w = {
    name: {"kernel": normal(i, L, K, N, scale=0.15), "bias": normal(i + 9, L, N)}
    for i, name in enumerate(("up", "down"))
  }
  return quantize_tree({"layers": w}, {"layers/*": QuantizationConfig(block_size=8)})


def test_stacks_have_the_layer_axis():
  params, constants = lora.init(jax.random.key(0), stack(), STACKED)
  shapes = {path: leaf.shape for path, leaf in tree_paths.leaves(params).items()}
  assert shapes["layers/up/magnitude"] == shapes["layers/down/lora_bias"] == (L, N)
  norm = np.asarray(constants["layers"]["up"]["weight_norm"])
  exact = np.linalg.norm(np.asarray(dequantize(stack()["layers"]["up"]["kernel"])), axis=1)
  np.testing.assert_allclose(norm[[0, 2]], exact[[0, 2]], rtol=1e-6)
  # A layer that is no target: its scale is 1 by its norm of 0.
  assert not norm[1].any()
  np.testing.assert_array_equal(params["layers"]["up"]["magnitude"], norm)
  adapters = (4 + 0 + 2) * (K + N) + (4 + 4 + 4) * (K + N)
  assert lora.count(params, constants) == adapters + 2 * (2 + 3) * N


def test_the_magnitude_is_no_alias_of_the_constant():
  # A train step is given params to overwrite.
  params, constants = lora.init(jax.random.key(0), stack(), STACKED)
  step = jax.jit(lambda p: jax.tree.map(lambda x: x + np.float32(1), p), donate_argnums=0)
  step(params)
  assert np.isfinite(np.asarray(constants["layers"]["down"]["weight_norm"])).all()


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    up = QDense(N, use_bias=True, dtype=jnp.float32, name="up")(x)
    down = QDense(N, use_bias=True, dtype=jnp.float32, name="down")(jnp.tanh(x))
    return jnp.pad(up * jnp.tanh(down), ((0, 0), (0, K - N))) + x, None


class Scanned(nn.Module):
  """Blocks under the key `layers`."""

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      Block,
      variable_axes={"params": 0, "frozen": 0, "constants": 0},
      split_rngs={"params": True},
      length=L,
    )
    return scan(name="layers")(x, None)[0]


def test_scan_and_merge_agree_and_untargeted_layers_stay():
  frozen = stack()
  params, constants = adapter(frozen, STACKED)
  # The untargeted layer's own leaves hold what training would leave: nothing.
  for name in ("lora_b", "lora_bias"):
    params["layers"]["up"][name] = params["layers"]["up"][name].at[1].set(0)
  params["layers"]["up"]["lora_b"] = params["layers"]["up"]["lora_b"].at[2, 2:].set(0)
  x = normal(0, 5, K)

  @jax.jit
  def f(params):
    return apply(Scanned(), {"frozen": frozen, "params": params, "constants": constants}, x)

  merged = lora.merge(frozen, params, constants)
  expected = jax.jit(lambda frozen: apply(Scanned(), {"frozen": frozen}, x))(merged)
  np.testing.assert_allclose(f(params), expected, rtol=1e-5, atol=1e-4)
  np.testing.assert_array_equal(
    merged["layers"]["up"]["kernel"][1], dequantize(frozen["layers"]["up"]["kernel"])[1]
  )
  loss = jax.jit(jax.grad(lambda params: jnp.square(f(params)).sum()))
  grads = loss(params)["layers"]["up"]
  for name, grad in grads.items():
    assert np.isfinite(np.asarray(grad)).all()
    assert not np.asarray(grad[1]).any(), name
    assert np.asarray(grad[0]).any() and np.asarray(grad[2]).any(), name


def test_experts_have_magnitudes_of_their_own():
  w = normal(0, L, 2, K, N)
  frozen = {"layers": {"experts": {"kernel": quantize(w)}}}
  cfg = LoRAConfig(rank=R, targets=("*/experts",), variant="dora")
  params, constants = adapter(frozen, cfg)
  own, fixed = params["layers"]["experts"], constants["layers"]["experts"]
  assert own["magnitude"].shape == fixed["weight_norm"].shape == (L, 2, N)
  merged = lora.merge(frozen, params, constants)["layers"]["experts"]["kernel"]
  one = {name: leaf[1, 1] for name, leaf in own.items()}
  expected = oracle(np.eye(K), dequantize(quantize(w))[1, 1], one, {"scaling": fixed["scaling"][1]})
  np.testing.assert_allclose(merged[1, 1], expected, rtol=1e-5, atol=1e-5)


# A tied head.


def test_a_tied_head():
  frozen = {"embed": {"embedding": normal(0, N, K)}}
  cfg = LoRAConfig(rank=R, targets=("head",), variant="dora")
  params, constants = adapter(frozen, cfg)
  x = normal(7, 5, K)
  variables = {"params": params["head"], "constants": constants["head"]}
  ours = apply(TiedHead(jnp.float32), variables, x, frozen["embed"]["embedding"])
  expected = oracle(x, frozen["embed"]["embedding"].T, params["head"], constants["head"])
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)
  merged = lora.merge(frozen, params, constants)
  np.testing.assert_allclose(x @ merged["head"]["kernel"], expected, rtol=1e-5, atol=1e-4)
  np.testing.assert_array_equal(merged["embed"]["embedding"], frozen["embed"]["embedding"])


# Errors.


def test_a_bias_needs_a_place_to_be_merged_into():
  frozen = {"q": {"kernel": dense()}}
  params, constants = lora.init(jax.random.key(0), frozen, CASES["bias"])
  with pytest.raises(ValueError, match="merge: q/lora_bias: the base's layer has no bias"):
    lora.merge(frozen, params, constants)


def test_a_magnitude_needs_its_constant_and_a_frozen_weight():
  frozen = {"kernel": dense()}
  params, constants = lora.init(jax.random.key(0), {"q": frozen}, CASES["dora"])
  params, constants = params["q"], constants["q"]
  module, x = QDense(N, dtype=jnp.float32, name="q"), normal(0, 6, K)
  without = {name: x for name, x in constants.items() if name != "weight_norm"}
  with pytest.raises(ValueError, match="without its weight_norm in constants"):
    apply(module, {"frozen": frozen, "params": params, "constants": without}, x)
  full = {**params, "kernel": dense(2)}
  with pytest.raises(ValueError, match="a DoRA magnitude on a weight trained in full"):
    apply(module, {"frozen": frozen, "params": full, "constants": constants}, x)

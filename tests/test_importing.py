"""Plain functions of others' weights: what they may be made of. (Modes of JAX: test_modes.py.)"""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import QuantizationConfig, adapt, lora, quantize, quantized_matmul
from qlora_jax.quantized_tensor import is_quantized

PACK = QuantizationConfig(block_size=8)
LORA = lora.LoRAConfig(rank=2, targets=("*",))


def random(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def trained(params):
  leaves, tree = jax.tree.flatten(params)
  return jax.tree.unflatten(tree, [0.3 * random(*w.shape, seed=i) for i, w in enumerate(leaves)])


def adapted_of(function, weights, *args, quantize=("*",), adapters=LORA, **more):
  rules = dict.fromkeys(quantize, PACK)
  return adapt(
    function, weights, *args, quantize=rules, adapters=adapters, key=jax.random.key(1), **more
  )


def check(function, weights, *args, num_packed=1):
  """Packed and adapted, it is the function of the merged weights."""
  adapted, frozen, params, constants = adapted_of(function, weights, *args)
  found = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(leaf)]
  assert len(found) == num_packed, adapted.report(frozen)
  trees = {"frozen": frozen, "params": trained(params), "constants": constants}
  ours = jax.jit(adapted.apply)(trees, *args)
  expected = jax.jit(function)(adapted.merge(trees), *args)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))
  return adapted


def branches(w, x, flag):
  return jax.lax.cond(flag, lambda w, x: x @ w["w"], lambda w, x: -2 * (x @ w["w"]), w, x)


def iterated(w, x):
  def body(carry):
    i, x = carry
    return i + 1, jnp.tanh(x @ w["w"])

  return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def indexed(w, x):
  """A stack that a loop indexes by its counter, and two of its matrices by themselves."""
  x = jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ w["w"][i]), x)
  return x @ w["w"][0] + x @ w["w"][1]


def second_axis(w, x):
  """A scan over an axis that is not the first."""
  step = lambda x, w: (jnp.tanh(x @ w), x.sum())  # noqa: E731
  return jax.lax.scan(step, x, jnp.moveaxis(w["w"], 1, 0))


def split(w, x):
  """One axis made of several, and taken apart again."""
  heads = w["w"].reshape(16, 4, 4).transpose(1, 0, 2)
  return x @ heads.swapaxes(0, 1).reshape(16, 16) + jnp.einsum("bd,hdk->bkh", x, heads).reshape(
    -1, 16
  )


def custom(w, x):
  """Derivative rules of the function's own stay in force."""

  @jax.custom_jvp
  def twice(x):
    return 2 * x

  twice.defjvp(lambda primals, tangents: (2 * primals[0], 5 * tangents[0]))
  return twice(x @ w["w"])


@pytest.mark.parametrize(
  ("function", "weight", "args"),
  [
    (branches, (16, 16), (random(3, 16), True)),
    (iterated, (16, 16), (random(3, 16),)),
    (indexed, (2, 16, 16), (random(3, 16),)),
    (second_axis, (16, 2, 16), (random(3, 16),)),
    (split, (16, 16), (random(3, 16),)),
    (custom, (16, 16), (random(3, 16),)),
  ],
  ids=lambda value: getattr(value, "__name__", ""),
)
def test_functions(function, weight, args):
  args = tuple(jnp.asarray(each) for each in args)
  check(function, {"w": 0.3 * random(*weight, seed=5)}, *args)


def test_a_functions_own_derivatives():
  x = random(3, 16)
  adapted, frozen, params, constants = adapted_of(custom, {"w": random(16, 16)}, x)
  params = trained(params)

  def loss(params):
    return adapted.apply({"frozen": frozen, "params": params, "constants": constants}, x).sum()

  ours = jax.grad(loss)(params)["w"]["lora_b"]
  expected = 5 * constants["w"]["scaling"] * (x @ params["w"]["lora_a"]).sum(0)
  np.testing.assert_allclose(ours, jnp.broadcast_to(expected[:, None], ours.shape), rtol=1e-4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
  """As Equinox has it: a pytree whose leaves are its weights, `[out, in]`."""

  weight: jax.Array
  bias: jax.Array

  def __call__(self, x):
    return self.weight @ x + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Packed:
  """A module written for a packed leaf."""

  weight: ql.QuantizedTensor
  bias: jax.Array

  def __call__(self, x):
    return quantized_matmul(x, self.weight) + self.bias


def test_modules_that_are_pytrees():
  model = Linear(random(8, 16), random(8))
  x = random(3, 16)
  adapted = check(lambda model, x: jax.vmap(model)(x), model, x)
  assert adapted.layouts["weight"].contracted == (1,)
  packed = Packed(quantize(model.weight.T, block_size=8), model.bias)

  @jax.jit
  def both(packed, x):
    return jax.vmap(packed)(x), jax.grad(lambda x: packed(x).sum())(x[0])

  y, gradient = both(packed, x)
  dense = ql.dequantize(packed.weight)
  np.testing.assert_allclose(y, x @ dense + model.bias[None], atol=1e-5)
  np.testing.assert_allclose(gradient, dense.sum(1), atol=1e-5)


@pytest.mark.parametrize(
  ("function", "why"),
  [
    (lambda w, x: x @ w["w"] + w["w"].sum(), "read by reduce_sum"),
    (lambda w, x: x @ w["w"] + x @ w["w"].T, "contracted by one use and not by another"),
    (lambda w, x: (x, w["w"]), "returned"),
    (lambda w, x: x * 2, "read by no product"),
    (lambda w, x: x @ (w["w"] @ w["w"]), "read by dot_general"),
    (lambda w, x: jnp.einsum("bd,de->bd", x, w["w"]), "read by reduce_sum"),
    (lambda w, x: x @ jnp.concatenate([w["w"], w["w"]], 1), "read by concatenate"),
    (
      lambda w, x: jax.lax.fori_loop(0, 2, lambda _, c: (c[0] @ c[1], 2 * c[1]), (x, w["w"]))[0],
      "carried by a loop",
    ),
  ],
)
def test_other_uses_leave_a_weight_alone(function, why):
  weights = {"w": random(16, 16), "other": random(16, 16)}
  adapted, frozen, params, _ = adapted_of(
    lambda w, x: (function(w, x), x @ w["other"]), weights, random(3, 16)
  )
  assert why in adapted.left_alone["w"]
  np.testing.assert_array_equal(frozen["w"], weights["w"])
  assert is_quantized(frozen["other"]) and list(params) == ["other"]


def test_rules_that_cast_and_a_base_that_is_not_packed():
  x = random(3, 16)
  weights = {"a": random(16, 16), "b": random(16, 16, dtype=jnp.bfloat16)}

  def function(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"].astype(jnp.float32)

  adapted, frozen, params, constants = adapt(
    function, weights, x, quantize={"a": jnp.bfloat16}, adapters=LORA, key=jax.random.key(0)
  )
  assert frozen["a"].dtype == jnp.bfloat16 and adapted.left_alone["b"] == "no rule for it"
  trees = {"frozen": frozen, "params": trained(params), "constants": constants}
  merged = adapted.merge(trees)
  assert (merged["a"].dtype, merged["b"].dtype) == (jnp.float32, jnp.bfloat16)
  ours = jax.jit(adapted.apply)(trees, x)
  # The merged b is rounded to bfloat16 once more.
  np.testing.assert_allclose(ours, function(merged, x), rtol=0, atol=0.02 * np.abs(ours).max())


def test_arguments_keywords_and_static_ones():
  def function(weights, x, *, scale, train=True, names=("a",)):
    y = x @ weights["w"]
    return {"y": y * scale if train else y, "n": len(names)}

  x, scale = random(3, 16), np.float32(3)
  adapted, frozen, _, _ = adapted_of(
    function, {"w": random(16, 8)}, jax.ShapeDtypeStruct((1, 16), jnp.float32), scale=scale
  )
  trees = {"frozen": frozen}
  out = adapted.apply(trees, x, scale=scale, names=("a", "b"))
  assert out["n"] == 2
  plain = adapted.apply(trees, x, scale=scale, train=False)
  np.testing.assert_allclose(out["y"], 3 * plain["y"], rtol=1e-6)


def test_lookups_out_of_range():
  ids = jnp.asarray([0, 7, -1, 8, 100])
  x = random(3, 16)

  def function(w, ids, x):
    return jnp.take(w["t"], ids, axis=0), w["t"].at[ids].get(mode="clip"), x @ w["w"]

  weights = {"t": random(8, 16), "w": random(16, 4)}
  adapted, frozen, _, _ = adapted_of(function, weights, ids, x)
  ours = jax.jit(adapted.apply)({"frozen": frozen}, ids, x)
  expected = jax.jit(function)(adapted.merge({"frozen": frozen}), ids, x)
  for a, b in zip(ours[:2], expected[:2], strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.isnan(ours[0][4]).all() and not np.isnan(ours[1]).any()


def test_layouts_are_pickled():
  adapted, *_ = adapted_of(custom, {"w": random(16, 16)}, random(3, 16))
  assert pickle.loads(pickle.dumps(adapted.layouts)) == adapted.layouts


def test_adapters_need_a_key():
  with pytest.raises(ValueError, match="adapters without a key"):
    adapt(custom, {"w": random(16, 16)}, random(3, 16), adapters=LORA)


def test_a_wider_result_is_not_rounded_on_the_way():
  def wide(w, x):
    return jnp.dot(x, w["w"].astype(x.dtype), preferred_element_type=jnp.float32)

  weights, x = {"w": random(16, 8)}, random(4, 16, dtype=jnp.bfloat16)
  adapted, frozen, params, constants = adapted_of(wide, weights, x)
  y = adapted.apply({"frozen": frozen, "params": params, "constants": constants}, x)
  assert y.dtype == jnp.float32
  assert (y != y.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.5
  np.testing.assert_allclose(y, x.astype(jnp.float32) @ ql.dequantize(frozen["w"]), rtol=1e-4)


def test_constants_that_fit_nothing_are_refused():
  weights, x = {"w": random(16, 8)}, random(4, 16)
  adapted, frozen, params, constants = adapted_of(lambda w, x: x @ w["w"], weights, x)
  stray = {**constants, "other": {"scaling": jnp.ones(())}}
  with pytest.raises(ValueError, match="constants: other/scaling: fits no weight"):
    adapted.apply({"frozen": frozen, "params": params, "constants": stray}, x)

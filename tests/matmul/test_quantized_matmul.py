import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import dequantize, quantize, quantized_matmul
from qlora_jax.matmul import api, specs

SMALL = specs.ArgumentSpec(256, 16)


def x_of(spec: specs.ArgumentSpec) -> jax.Array:
  return spec.x(jax.random.key(0))


def w_of(spec: specs.ArgumentSpec, stack: tuple[int, ...] = ()):
  return spec.w(jax.random.key(1), stack)


# Those that need a machine of their own have tests of their own.
IMPLEMENTATIONS = ["xla"]


def tolerance(dtype, terms: int, magnitude: np.ndarray, y: np.ndarray) -> np.ndarray:
  """A float32 sum of `terms` products, worst case, and one rounding to `dtype`.

  `magnitude` is the sum of the products' absolute values. Weights are compared as rounded to
  `dtype`: their products are then exact to float32.
  """
  half_ulp = float(jnp.finfo(dtype).eps) / 2
  return (terms + 2) * 2.0**-24 * magnitude + half_ulp * np.abs(y) * (1 + 2.0**-7)


def assert_product(ours: jax.Array, a, b):
  """`ours ≈ a · b` within `tolerance`, by float64."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  expected = a @ b
  error = np.abs(np.asarray(ours, np.float64) - expected)
  bound = tolerance(ours.dtype, len(b), np.abs(a) @ np.abs(b), expected)
  assert ours.shape == expected.shape
  assert (error <= bound).all(), f"largest error over bound: {(error / bound).max()}"


def gathered(f, *args) -> int:
  """How many elements are looked up in tables, in all equations of `f`'s jaxpr."""

  def count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
      if equation.primitive.name == "gather":
        total += sum(out.aval.size for out in equation.outvars)
      for inner in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
      ):
        if hasattr(inner, "jaxpr"):
          inner = inner.jaxpr
        if hasattr(inner, "eqns"):
          total += count(inner)
    return total

  return count(jax.make_jaxpr(f)(*args).jaxpr)


# Numbers


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", specs.SMALL, ids=str)
def test_product_and_gradient(spec, implementation):
  x, w = x_of(spec), w_of(spec)
  g = jax.random.normal(jax.random.key(2), (*spec.rows, spec.n), spec.dtype)

  @jax.jit
  def f(x, w, g):
    y, pullback = jax.vjp(lambda x: quantized_matmul(x, w, implementation=implementation), x)
    return y, pullback(g)[0]

  y, dx = f(x, w, g)
  assert (y.dtype, y.shape) == (x.dtype, (*spec.rows, spec.n))
  assert (dx.dtype, dx.shape) == (x.dtype, x.shape)
  dense = dequantize(w, x.dtype)
  assert_product(y, x, dense)
  assert_product(dx, g, np.asarray(dense).T)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jit_equals_eager(implementation):
  x, w = x_of(SMALL), w_of(SMALL)
  eager = quantized_matmul(x, w, implementation=implementation)
  assert_product(eager, x, dequantize(w))
  assert_product(jax.jit(quantized_matmul)(x, w), x, dequantize(w))


def test_numpy_x():
  w = w_of(SMALL)
  assert_product(quantized_matmul(np.asarray(x_of(SMALL)), w), x_of(SMALL), dequantize(w))  # pyright: ignore[reportArgumentType]


def test_specs_are_told_apart_by_their_names():
  names = [str(spec) for spec in (*specs.SMALL, *specs.REAL)]
  assert len(set(names)) == len(names)


@pytest.mark.parametrize("spec", specs.REAL, ids=str)
def test_real_shapes(spec):
  # Traced alone: no kernel of these sizes runs here.
  x, w = jax.eval_shape(lambda key: (spec.x(key), spec.w(key)), jax.random.key(0))
  y = jax.eval_shape(quantized_matmul, x, w)
  assert (y.shape, y.dtype) == ((*spec.rows, spec.n), jnp.bfloat16)


# Transformations


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_batch_of_x_decodes_the_weight_once(axis):
  w = w_of(SMALL)
  x = jax.random.normal(jax.random.key(0), (7, 3, 256))
  batched = jax.vmap(quantized_matmul, (axis, None), axis)
  xs = jnp.moveaxis(x, 0, axis)
  assert_product(jnp.moveaxis(batched(xs, w), axis, 0), x, dequantize(w))
  once = gathered(quantized_matmul, x[0], w)
  # Levels for each weight, and the doubly quantized scales.
  assert once >= w.size
  assert gathered(batched, xs, w) == once

  def gradient(x, w):
    return jax.grad(lambda x: quantized_matmul(x, w).sum())(x)

  once = gathered(gradient, x[0], w)
  assert once >= 2 * w.size
  assert gathered(jax.vmap(gradient, (axis, None)), xs, w) == once


def test_nested_batches_of_x_decode_the_weight_once():
  w = w_of(SMALL)
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 256))
  nested = jax.vmap(jax.vmap(quantized_matmul, (0, None)), (1, None), 1)
  assert_product(nested(x, w), x, dequantize(w))
  assert gathered(nested, x, w) == gathered(quantized_matmul, x[0, 0], w)


def test_a_batch_of_x_reaches_the_implementation_as_rows(monkeypatch):
  # Under a plain vmap it would see one example, and a kernel would be launched for each.
  seen = []
  xla = api.IMPLEMENTATIONS["xla"]

  def recorded(product):
    def call(x, w):
      seen.append((x.shape, w.shape))
      return product(x, w)

    return call

  spy = api.Implementation(recorded(xla.forward), recorded(xla.input_gradient), xla.unsupported)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", {"spy": spy})
  w = w_of(SMALL)
  x = jax.random.normal(jax.random.key(0), (7, 3, 256))

  def batched(f):
    seen.clear()
    jax.make_jaxpr(jax.vmap(f))(x)
    return seen[-1]

  assert batched(lambda x: quantized_matmul(x, w)) == ((7, 3, 256), (256, 16))
  # Squared: the cotangent of a bare sum is the same for all, and would have no batch.
  gradient = batched(jax.grad(lambda x: jnp.square(quantized_matmul(x, w)).sum()))
  assert gradient == ((7, 3, 16), (256, 16))


def test_a_stack_of_weights():
  x = jax.random.normal(jax.random.key(0), (3, 5, 256))
  w = w_of(SMALL, stack=(3,))
  y = jax.vmap(quantized_matmul)(x, w)
  shared = jax.vmap(quantized_matmul, (None, 0))(x[0], w)
  dense = dequantize(w)
  for i in range(3):
    assert_product(y[i], x[i], dense[i])
    assert_product(shared[i], x[0], dense[i])
  assert gathered(jax.vmap(quantized_matmul), x, w) >= 3 * w_of(SMALL).size


def test_a_batch_of_one_leaf_of_the_weight():
  # Trials that differ in their table alone.
  w, x = w_of(SMALL), x_of(SMALL)
  levels = jnp.stack([w.levels, w.levels * 2])
  y = jax.vmap(lambda levels: quantized_matmul(x, dataclasses.replace(w, levels=levels)))(levels)
  assert_product(y[0], x, dequantize(w))
  np.testing.assert_array_equal(y[1], 2 * y[0])


def test_vmap_of_grad():
  w = w_of(SMALL)
  xs = jax.random.normal(jax.random.key(0), (3, 5, 256))
  g = jax.random.normal(jax.random.key(1), (3, 5, 16))

  def loss(x, w, g):
    return (quantized_matmul(x, w) * g).sum()

  dx = jax.vmap(jax.grad(loss), (0, None, 0))(xs, w, g)
  assert_product(dx, g, np.asarray(dequantize(w)).T)
  ws = w_of(SMALL, stack=(3,))
  dx = jax.vmap(jax.grad(loss))(xs, ws, g)
  for i in range(3):
    assert_product(dx[i], g[i], np.asarray(dequantize(ws)[i]).T)


def test_grad_of_nested_vmap():
  w = w_of(SMALL)
  x = jax.random.normal(jax.random.key(0), (2, 3, 5, 256))
  g = jax.random.normal(jax.random.key(1), (2, 3, 5, 16))

  def loss(x):
    y = jax.vmap(jax.vmap(quantized_matmul, (0, None)), (0, None))(x, w)
    return (y * g).sum()

  assert_product(jax.grad(loss)(x), g, np.asarray(dequantize(w)).T)


# Float32 layers, gradients of order 1.
LAYERS_RTOL = 1e-5


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat):
  k, layers = 128, 4
  spec = specs.ArgumentSpec(k, k)
  x, w = x_of(spec), w_of(spec, stack=(layers,))

  def run(product, x, w):
    def layer(x, w):
      return jnp.tanh(product(x, w) / np.float32(np.sqrt(k))), None

    y, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)
    return jnp.square(y).sum()  # of one sign: no order of the sum cancels more than another

  y, dx = jax.jit(jax.value_and_grad(lambda x, w: run(quantized_matmul, x, w)))(x, w)
  expected, expected_dx = jax.value_and_grad(lambda x, w: run(jnp.matmul, x, w))(x, dequantize(w))
  np.testing.assert_allclose(y, expected, rtol=LAYERS_RTOL)
  scale = float(jnp.abs(expected_dx).max())
  np.testing.assert_allclose(dx, expected_dx, rtol=0, atol=LAYERS_RTOL * scale)


def test_the_base_gets_no_gradient():
  x, w = x_of(SMALL), w_of(SMALL)
  dw = jax.grad(lambda w: quantized_matmul(x, w).sum(), allow_int=True)(w)
  for leaf, cotangent in zip(jax.tree.leaves(w), jax.tree.leaves(dw), strict=True):
    assert cotangent.shape == leaf.shape
    if leaf.dtype == jnp.uint8:
      assert cotangent.dtype == jax.dtypes.float0
    else:
      assert cotangent.dtype == leaf.dtype and not cotangent.any()


def test_reverse_mode_only():
  x, w = x_of(SMALL), w_of(SMALL)
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda x: quantized_matmul(x, w), (x,), (x,))


# Memory


# JAX 0.10.2's own scheduler for the CPU minds no memory: it decodes all unrolled layers first.
SCHEDULERS = ["CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"]
if jax.__version_info__ >= (0, 11, 2):
  SCHEDULERS.append("CPU_SCHEDULER_TYPE_DEFAULT")


# Temporaries in weights, over both schedulers on 0.11.2, and the first on 0.10.2 as well: at most
# 1.5. Without the barriers: unrolled 9 to 17 with either scheduler. With the first scheduler one
# of the two barriers does; with the other the forward's alone gives 9.3, the backward's 8.1.
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("form", ["unrolled", "scanned", "unrolled-remat", "scanned-remat"])
def test_training_holds_few_dequantized_weights(form, scheduler):
  k, layers = 512, 8
  spec = specs.ArgumentSpec(k, k, rows=(16,))
  x, stack = x_of(spec), w_of(spec, stack=(layers,))

  def layer(x, w):
    return jnp.tanh(quantized_matmul(x, w)), None

  if form.endswith("remat"):
    layer = jax.checkpoint(layer)

  def unrolled(x, ws):
    for w in ws:
      x, _ = layer(x, w)
    return x.sum()

  def scanned(x, w):
    return jax.lax.scan(layer, x, w)[0].sum()

  ws = stack
  if form.startswith("unrolled"):
    ws = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(layers)]
  loss = unrolled if form.startswith("unrolled") else scanned
  lowered = jax.jit(jax.grad(loss)).lower(x, ws)
  compiled = lowered.compile(compiler_options={"xla_cpu_scheduler_type": scheduler})
  memory = compiled.memory_analysis()
  assert memory is not None
  weight = 4 * k * k
  # The packed weights are no part of the temporaries, and none is among them.
  assert memory.temp_size_in_bytes <= 3 * weight
  assert memory.argument_size_in_bytes < layers * weight * 0.15


# Errors


@pytest.mark.parametrize(
  "x, w, kind, message",
  [
    ((2, 8), (8, 4), TypeError, "w is a ArrayImpl; a QuantizedTensor is wanted"),
    ((2, 9), None, ValueError, "x [2, 9] and w [8, 4]; x's last axis is w's first"),
    ((), None, ValueError, "x [] and w [8, 4]"),
    ((2, 8), "stack", ValueError, "w stands for [3, 8, 4]; a matrix [K, N] is wanted, so vmap"),
  ],
)
def test_what_cannot_be_multiplied(x, w, kind, message):
  if w in (None, "stack"):
    w = quantize(jnp.ones((8, 4) if w is None else (3, 8, 4)))
  else:
    w = jnp.ones(w)
  with pytest.raises(kind) as error:
    quantized_matmul(jnp.ones(x), w)  # pyright: ignore[reportArgumentType]
  assert message in str(error.value)


def test_x_of_another_dtype():
  with pytest.raises(TypeError, match="x is int32; bfloat16, float16 or float32 is wanted"):
    quantized_matmul(jnp.ones((2, 256), jnp.int32), w_of(SMALL))


# The choice of implementation


def reason(x, w):
  return "K is 8; a multiple of 128 is wanted" if w.shape[0] % 128 else None


@pytest.fixture
def picky(monkeypatch):
  """An implementation that is preferred, serves only K % 128 == 0, and gives nothing but ones."""
  ones = api.Implementation(
    forward=lambda x, w: jnp.ones((*x.shape[:-1], w.shape[1]), x.dtype),
    input_gradient=lambda g, w: jnp.full((*g.shape[:-1], w.shape[0]), 2, g.dtype),
    unsupported=reason,
  )
  monkeypatch.setattr(api, "IMPLEMENTATIONS", {"picky": ones, **api.IMPLEMENTATIONS})


def test_the_first_that_supports_the_case_serves_it(picky):
  x, w = x_of(SMALL), w_of(SMALL)
  assert (quantized_matmul(x, w) == 1).all()
  assert (jax.grad(lambda x: quantized_matmul(x, w).sum())(x) == 2).all()
  assert_product(quantized_matmul(x, w, implementation="xla"), x, dequantize(w))
  small = quantize(jnp.ones((8, 4)))
  np.testing.assert_allclose(quantized_matmul(jnp.ones((2, 8)), small), 8, rtol=1e-6)


def test_one_that_was_named_and_cannot_says_why(picky):
  with pytest.raises(ValueError) as error:
    quantized_matmul(jnp.ones((2, 8)), quantize(jnp.ones((8, 4))), implementation="picky")
  assert str(error.value) == (
    "quantized_matmul: implementation 'picky' cannot serve this: "
    "K is 8; a multiple of 128 is wanted"
  )


def test_an_unknown_one_names_those_that_are(picky):
  with pytest.raises(
    ValueError, match="'gpuu': not in this version; there is picky, gpu, tpu, xla"
  ):
    quantized_matmul(x_of(SMALL), w_of(SMALL), implementation="gpuu")

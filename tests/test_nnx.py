"""NNX modules as somebody else would write them, and the layers of our own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx as fnnx

from qlora_jax import QuantizationConfig, dequantize, lora, nnx
from qlora_jax.quantized_tensor import is_quantized

PACK = QuantizationConfig(block_size=8)
LORA = lora.LoRAConfig(rank=2, targets=("*",))
WIDTH = 16
TOKENS = jnp.asarray([[3, 0, 19], [1, 1, 7]])
LORA_STATE = fnnx.DiffState(0, fnnx.LoRAParam)


class Layer(fnnx.Module):
  """With state of its own: batch statistics and a stream of random numbers."""

  def __init__(self, rngs):
    self.attn = fnnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
    self.norm = fnnx.BatchNorm(WIDTH, rngs=rngs)
    self.dropout = fnnx.Dropout(0.5, rngs=rngs)
    self.up = fnnx.Linear(WIDTH, 24, rngs=rngs)
    self.down = fnnx.Einsum("btd,fd->btf", (WIDTH, 24), None, rngs=rngs)

  def __call__(self, x):
    y = self.norm(self.attn(x))
    return x + self.dropout(self.down(fnnx.gelu(self.up(y))))


class Model(fnnx.Module):
  """Tied embeddings, a list of layers, a convolution and a recurrent cell."""

  def __init__(self, rngs):
    self.embed = fnnx.Embed(20, WIDTH, rngs=rngs)
    self.layers = fnnx.List([Layer(rngs) for _ in range(2)])
    self.conv = fnnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)
    self.cell = fnnx.SimpleCell(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for layer in self.layers:
      x = layer(x)
    carry = jnp.zeros((x.shape[0], WIDTH))
    carry, _ = self.cell(carry, self.conv(x)[:, -1])
    return self.embed.attend(x + carry[:, None])


class Scanned(fnnx.Module):
  """Layers made by `nnx.vmap` and run by `nnx.scan`."""

  def __init__(self, rngs, make, count=3):
    @fnnx.split_rngs(splits=count)
    @fnnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
      return make(rngs)

    self.layers = stack(rngs)

  def __call__(self, x):
    @fnnx.scan(in_axes=(fnnx.Carry, 0), out_axes=fnnx.Carry)
    def run(x, layer):
      return jnp.tanh(layer(x))

    return run(x, self.layers)


def adapted_model(**more):
  model = Model(fnnx.Rngs(0))
  arguments = {"quantize": {"*": PACK}, "adapters": LORA, "key": jax.random.key(1), **more}
  return model, nnx.adapt(model, TOKENS, **arguments)


def randomized(model):
  state = fnnx.state(model, fnnx.LoRAParam)
  rng = np.random.default_rng(2)
  fnnx.update(
    model, jax.tree.map(lambda w: jnp.asarray(0.3 * rng.standard_normal(w.shape), w.dtype), state)
  )


def close(ours, expected):
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * scale)


def test_a_module_runs_as_it_is():
  _, adapted = adapted_model()
  # No nnx.Param but the adapters.
  params = fnnx.to_flat_state(fnnx.state(adapted, fnnx.Param))
  assert {type(each) for _, each in params} == {fnnx.LoRAParam}
  assert len(params) == 2 * 2 * 6
  packed = [each for _, each in fnnx.to_flat_state(fnnx.state(adapted, nnx.Frozen))]
  assert sum(is_quantized(each.get_value()) for each in packed) == 1 + 2 * 6
  alone = adapted.function.left_alone
  assert alone["conv/kernel"] == "read by conv_general_dilated"
  assert alone["cell/dense_h/kernel"] == alone["cell/dense_i/kernel"] == "of a recurrent cell"
  assert "the lookup and the head read this one table" in adapted.report()

  randomized(adapted)
  ours = fnnx.jit(lambda model: model(TOKENS))(adapted)
  # Written into a model of the same kind, at the same place in its streams.
  again = Model(fnnx.Rngs(0))
  adapted.merge(again)
  expected = fnnx.jit(lambda model: model(TOKENS))(again)
  close(ours, expected)
  for name in ("mean", "var"):
    found, expected = (getattr(m.layers[1].norm, name) for m in (adapted.module, again))
    close(found.get_value(), expected.get_value())
  # A second call draws anew, as the module's own does; and dropout and statistics can be stopped.
  close(fnnx.jit(lambda m: m(TOKENS))(adapted), fnnx.jit(lambda m: m(TOKENS))(again))
  adapted.eval()
  again.eval()
  first = fnnx.jit(lambda m: m(TOKENS))(adapted)
  close(first, fnnx.jit(lambda m: m(TOKENS))(again))
  np.testing.assert_array_equal(first, fnnx.jit(lambda m: m(TOKENS))(adapted))
  assert again.embed.embedding.get_value().shape == (20, WIDTH)


def test_a_module_that_is_a_cell_is_left_alone():
  cell = fnnx.LSTMCell(8, 8, rngs=fnnx.Rngs(0))
  x = jnp.ones((2, 8))
  carry = cell.initialize_carry(x.shape, fnnx.Rngs(0))
  with pytest.raises(ValueError, match="of a recurrent cell"):
    nnx.adapt(cell, carry, x, quantize={"*": PACK}, key=jax.random.key(1))


def test_training_sees_the_adapters_alone(tmp_path):
  _, adapted = adapted_model()
  with jax.numpy_dtype_promotion("standard"):
    optimizer = fnnx.Optimizer(adapted, optax.adam(1e-2), wrt=fnnx.LoRAParam)
  before = jax.tree.map(jnp.copy, fnnx.state(adapted, nnx.Frozen))

  @fnnx.jit
  def step(model, optimizer):
    def loss(model):
      logits = model(TOKENS)
      return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

    value, gradient = fnnx.value_and_grad(loss, argnums=LORA_STATE)(model)
    with jax.numpy_dtype_promotion("standard"):
      optimizer.update(model, gradient)
    return value, gradient

  (_, gradient), _ = step(adapted, optimizer), step(adapted, optimizer)
  assert {type(each) for _, each in fnnx.to_flat_state(gradient)} == {fnnx.LoRAParam}
  jax.tree.map(np.testing.assert_array_equal, before, fnnx.state(adapted, nnx.Frozen))
  moments = jax.tree.leaves(fnnx.state(optimizer, fnnx.optimizer.OptState)["opt_state"])
  assert len(moments) == 2 * 24 + 1

  # Taken apart and put together; written and read, all of it and the adapters alone.
  adapted.eval()
  logits = fnnx.jit(lambda m: m(TOKENS))(adapted)
  graph, trained, rest = fnnx.split(adapted, fnnx.LoRAParam, ...)
  again = fnnx.merge(graph, trained, rest)
  np.testing.assert_array_equal(logits, fnnx.jit(lambda m: m(TOKENS))(again))
  state = fnnx.to_pure_dict(fnnx.state(adapted, fnnx.Any(fnnx.LoRAParam, nnx.Frozen)))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "all", state)
    checkpointer.wait_until_finished()
    read = checkpointer.restore(tmp_path / "all", jax.tree.map(jnp.zeros_like, state))
  assert is_quantized(read["module"]["embed"]["embedding"])
  jax.tree.map(np.testing.assert_array_equal, read, state)


def test_a_stack_that_the_module_scans():
  def make(rngs):
    return fnnx.Linear(WIDTH, WIDTH, rngs=rngs)

  model = Scanned(fnnx.Rngs(0), make)
  x = jax.random.normal(jax.random.key(1), (2, WIDTH))
  targets = ("layers/0", "layers/2")
  adapted = nnx.adapt(
    model,
    x,
    quantize={"*": PACK},
    adapters=lora.LoRAConfig(rank=2, targets=targets),
    key=jax.random.key(1),
  )
  assert adapted.module.layers.kernel.get_value().shape == (3, WIDTH, WIDTH)
  assert adapted.constants["layers"]["rank"].get_value().tolist() == [2, 0, 2]
  randomized(adapted)
  ours = fnnx.jit(lambda model: model(x))(adapted)
  adapted.merge(model)
  close(ours, fnnx.jit(lambda model: model(x))(model))


@pytest.mark.parametrize("kind", ["linear", "einsum"])
def test_layers_of_our_own_in_a_stack(kind):
  def make(rngs):
    more = {"dtype": jnp.float32, "quantization": PACK, "adapter": LORA, "rngs": rngs}
    if kind == "linear":
      return nnx.QLinear(WIDTH, WIDTH, **more)
    return nnx.QEinsum("bd,nhd->bnh", (2, 8, WIDTH), **more)

  class Flat(Scanned):
    def __call__(self, x):
      @fnnx.scan(in_axes=(fnnx.Carry, 0), out_axes=fnnx.Carry)
      def run(x, layer):
        return jnp.tanh(layer(x)).reshape(x.shape)

      return run(x, self.layers)

  model = Flat(fnnx.Rngs(0), make)
  randomized(model)
  x = jax.random.normal(jax.random.key(1), (2, WIDTH))
  kernel = model.layers.kernel.get_value()
  assert kernel.shape == (3, WIDTH, WIDTH) and is_quantized(kernel)

  def loss(model):
    return (model(x) ** 2).sum()

  value, gradient = fnnx.jit(fnnx.value_and_grad(loss, argnums=LORA_STATE))(model)
  own = {name: each.get_value() for name, each in model.layers.adapter.items()}

  def dense(own):
    y = x
    for i in range(3):
      w = dequantize(kernel)[i] + 8 * own["lora_a"][i] @ own["lora_b"][i]
      y = jnp.tanh(y @ w)
    return (y**2).sum()

  expected, expected_gradient = jax.jit(jax.value_and_grad(dense))(own)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for name, each in expected_gradient.items():
    close(gradient["layers"]["adapter"][name].get_value(), each)


def test_a_linear_layers_place():
  linear = fnnx.Linear(WIDTH, 6, rngs=fnnx.Rngs(0))
  assert linear.bias is not None
  linear.bias.set_value(jnp.arange(6.0))
  x = jax.random.normal(jax.random.key(1), (2, WIDTH))
  plain = nnx.QLinear.of(linear)
  np.testing.assert_allclose(plain(x), linear(x), atol=1e-6)
  dora = nnx.QLinear.of(
    linear,
    quantization=PACK,
    adapter=lora.LoRAConfig(rank=2, variant="dora", dropout=0.5),
    rngs=fnnx.Rngs(1),
  )
  assert {"lora_a", "lora_b", "magnitude"} == set(dora.adapter)
  expected = x @ dequantize(dora.kernel.get_value()) + linear.bias.get_value()[None]
  np.testing.assert_allclose(dora(x), expected, atol=1e-5)
  randomized(dora)
  key = jax.random.key(3)
  np.testing.assert_array_equal(dora(x, dropout_key=key), dora(x, dropout_key=key))
  assert not np.array_equal(dora(x, dropout_key=key), dora(x))
  with pytest.raises(ValueError, match="adapter: given without rngs"):
    nnx.QLinear.of(linear, adapter=LORA)
  with pytest.raises(ValueError, match="implementation 'none such'"):
    nnx.QLinear.of(linear, quantization=PACK, implementation="none such")(x)
  with pytest.raises(ValueError, match="a letter for each axis of the weight"):
    nnx.QEinsum("bd,dn->bn", (WIDTH,), rngs=fnnx.Rngs(0))
  with pytest.raises(ValueError, match="no matrix: nothing, or all of it, is contracted"):
    nnx.QEinsum("bd,bd->b", (2, WIDTH), rngs=fnnx.Rngs(0))


def test_a_call_that_makes_variables_is_refused():
  class Growing(fnnx.Module):
    def __init__(self, rngs):
      self.linear = fnnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
      self.seen = fnnx.BatchStat(x.mean())
      return self.linear(x)

  with pytest.raises(ValueError, match=r"seen.*a variable that a call makes or drops"):
    nnx.adapt(Growing(fnnx.Rngs(0)), jnp.ones((2, WIDTH)), quantize={"*": PACK})

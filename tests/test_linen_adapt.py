"""Linen modules as somebody else would write them, packed and adapted without a change."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax import (
  QuantizationConfig,
  dequantize,
  einsum_layer,
  linen,
  lora,
  quantize_tree,
)
from qlora_jax.quantized_tensor import is_quantized

PACK = QuantizationConfig(block_size=8)
WIDTH = 16


class Setup(nn.Module):
  """Written in setup style; one submodule is used twice."""

  def setup(self):
    self.shared = nn.Dense(WIDTH)
    self.head = nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=False)

  def __call__(self, x):
    x = self.shared(nn.gelu(self.shared(x)))
    return self.head(x.reshape(*x.shape[:-1], 2, 8))


class Einsums(nn.Module):
  """Contracted in the middle, over two axes, out of order, on the left."""

  @nn.compact
  def __call__(self, x):
    x = nn.Einsum((3, WIDTH, 4), "btd,ndh->btnh")(x)
    x = nn.Einsum((4, WIDTH, 3), "btnh,hdn->btd", use_bias=False)(x)
    w = self.param("w", nn.initializers.normal(), (2, 5, 2, 8))
    x = jnp.einsum("nmab,cab->nmc", w, x.reshape(-1, 2, 8))
    return jnp.matmul(x, self.param("left", nn.initializers.normal(), (x.shape[-1], WIDTH)))


class Inner(nn.Module):
  """Takes over its parent's scope."""

  def setup(self):
    self.up = nn.Dense(WIDTH)

  def __call__(self, x):
    return self.up(x)


class Shared(nn.Module):
  """`nn.share_scope`: the submodule's params are at this module's own path."""

  def setup(self):
    self.inner = Inner()
    nn.share_scope(self, self.inner)
    self.down = nn.Dense(WIDTH)

  def __call__(self, x):
    return self.down(nn.relu(self.inner(x)))


class Layer(nn.Module):
  """Of a stack: attention, and an MLP that is rematerialized."""

  @nn.compact
  def __call__(self, x, mask):
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x, mask=mask)
    up = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    y = nn.remat(nn.Dense)(3 * WIDTH, kernel_init=up, name="up")(nn.LayerNorm()(x))
    return x + nn.Dense(WIDTH, name="down")(nn.gelu(y)), None


class Model(nn.Module):
  """Tied embeddings around a scan over layers."""

  @nn.compact
  def __call__(self, tokens):
    table = nn.Embed(20, WIDTH, name="embed")
    mask = nn.make_causal_mask(tokens)
    stack = nn.scan(
      Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
      length=2,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x, _ = stack(name="layers")(table(tokens), mask)
    return table.attend(x)


class Experts(nn.Module):
  """`nn.vmap` over modules."""

  @nn.compact
  def __call__(self, x):
    dense = nn.vmap(
      nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, axis_size=3
    )
    return dense(WIDTH, name="experts")(jnp.broadcast_to(x, (3, *x.shape)))


class Convolutional(nn.Module):
  """What is not guessed at: convolutions and a recurrent cell; and batch statistics."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3,), name="conv")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    x = nn.RNN(nn.LSTMCell(8), name="lstm")(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(WIDTH, name="head")(x)


X = jax.random.normal(jax.random.key(0), (2, 3, WIDTH))
TOKENS = jnp.asarray([[3, 0, 19], [1, 1, 7]])


def variables_of(module, *args):
  """Weights that are all random, biases too."""
  variables = jax.jit(module.init)(jax.random.key(1), *args)
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(2)
  leaves = [jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
  return jax.tree.unflatten(tree, leaves)


def adapted_of(module, *args, variables=None, targets=("*",), quantize=("*",), rank=2, **more):
  variables = variables_of(module, *args) if variables is None else variables
  config = lora.LoRAConfig(rank=rank, targets=targets, **more)
  rules = dict.fromkeys(quantize, PACK)
  return linen.adapt(
    module, variables, *args, quantize=rules, adapters=config, key=jax.random.key(3)
  )


def trained(params):
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(4)
  leaves = [jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
  return jax.tree.unflatten(tree, leaves)


def close(ours, expected):
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize(
  ("module", "x", "packed"),
  [
    (Setup(), X, {"shared/kernel": (16, 16), "head/kernel": (16, 6)}),
    (
      Einsums(),
      X,
      {
        "Einsum_0/kernel": (16, 12),
        "Einsum_1/kernel": (12, 16),
        "w": (16, 10),
        "left": (6, 16),
      },
    ),
    (Shared(), X, {"up/kernel": (16, 16), "down/kernel": (16, 16)}),
    (Experts(), X, {"experts/kernel": (3, 16, 16)}),
    (
      Model(),
      TOKENS,
      {
        "embed/embedding": (16, 20),
        **{f"layers/attn/{name}/kernel": (2, 16, 16) for name in ("query", "key", "value", "out")},
        "layers/up/kernel": (2, 16, 48),
        "layers/down/kernel": (2, 48, 16),
      },
    ),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_runs_as_it_is(module, x, packed):
  variables = variables_of(module, x)
  adapted, frozen, params, constants = adapted_of(module, x, variables=variables)
  flat = jax.tree_util.tree_leaves_with_path(frozen, is_leaf=is_quantized)
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in flat
    if is_quantized(leaf)
  }
  assert found == packed
  assert not any("kernel" in path for path in adapted.left_alone)

  def run(params, frozen=frozen):
    return adapted.apply({"frozen": frozen, "params": params, "constants": constants}, x)

  # B = 0: the packed base alone.
  start = adapted.merge({"frozen": frozen})
  first = jax.jit(run)(params)
  close(first, jax.jit(module.apply)({"params": start}, x))
  params = trained(params)
  trees = {"frozen": frozen, "params": params, "constants": constants}
  merged = adapted.merge(trees)
  assert jax.tree.structure(merged) == jax.tree.structure(variables["params"])
  jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a.shape} {b.shape}"),
    merged,
    variables["params"],
  )
  ours, expected = jax.jit(run)(params), jax.jit(module.apply)({"params": merged}, x)
  close(ours, expected)
  assert float(jnp.abs(ours - first).max()) > 0.01 * float(jnp.abs(ours).max())


def test_gradients_are_those_of_the_merged_module():
  module = Model()
  adapted, frozen, params, constants = adapted_of(module, TOKENS)
  params = trained(params)

  def loss(params, run):
    return jnp.tanh(run({"frozen": frozen, "params": params, "constants": constants})).sum()

  ours = jax.jit(jax.grad(lambda p: loss(p, lambda v: adapted.apply(v, TOKENS))))(params)
  expected = jax.jit(
    jax.grad(lambda p: loss(p, lambda v: module.apply({"params": adapted.merge(v)}, TOKENS)))
  )(params)
  assert jax.tree.structure(ours) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    assert b.any()
    # Two layers of large random weights: float32's roundings grow to about 1.5e-4 (JAX 0.12.0.1).
    np.testing.assert_allclose(a, b, rtol=0, atol=5e-4 * float(jnp.abs(b).max()))


def test_no_dense_weight_is_made():
  class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
      for _ in range(4):
        x = nn.Dense(512, use_bias=False)(x)
      return x

  x = jnp.ones((1, 512))
  adapted, frozen, params, constants = adapted_of(Wide(), x)

  def loss(params, frozen):
    return adapted.apply({"frozen": frozen, "params": params, "constants": constants}, x).sum()

  # JAX 0.10.2's default decodes all first, whatever the code (see tests/matmul).
  options: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  lowered = jax.jit(jax.grad(loss)).lower(params, frozen)
  stats = lowered.compile(compiler_options=options).memory_analysis()
  assert stats is not None
  # Not even three of the four at a time.
  assert stats.temp_size_in_bytes < 3 * 4 * 512 * 512


def test_convolutions_and_cells_are_left_alone_and_listed():
  module = Convolutional()
  variables = variables_of(module, X)
  adapted, frozen, params, constants = adapted_of(module, X, variables=variables)
  assert adapted.left_alone["conv/kernel"] == "read by conv_general_dilated"
  cells = {path for path in adapted.left_alone if path != "conv/kernel"}
  assert cells == {
    f"LSTMCell_0/{gate}/kernel" for gate in ("hf", "hg", "hi", "ho", "if", "ig", "ii", "io")
  }
  assert all(adapted.left_alone[path] == "of a recurrent cell" for path in cells)
  assert is_quantized(frozen["head"]["kernel"]) and list(params) == ["head"]
  for path in ("conv", "LSTMCell_0"):
    jax.tree.map(np.testing.assert_array_equal, frozen[path], variables["params"][path])
  lines = adapted.report(frozen)
  assert "conv/kernel [3, 16, 8]: float32 as it was: read by conv_general_dilated" in lines

  # Its own collections, random keys, keywords and mutable state go through.
  def both(params, x):
    trees = {"frozen": frozen, "params": params, "constants": constants}
    stats = {"batch_stats": variables["batch_stats"]}
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(5)}}
    ours = adapted.apply({**trees, **stats}, x, **options)
    return ours, module.apply({"params": adapted.merge(trees), **stats}, x, **options)

  (ours, state), (expected, expected_state) = jax.jit(both)(trained(params), X)
  close(ours, expected)
  assert list(state) == ["batch_stats"]
  jax.tree.map(np.testing.assert_array_equal, state, expected_state)
  assert not np.array_equal(
    state["batch_stats"]["norm"]["mean"], variables["batch_stats"]["norm"]["mean"]
  )


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"quantize": ("hed/*",)}, "quantize: pattern 'hed/*' matches no weight; near paths: head"),
    ({"targets": ("hed",)}, "lora.targets: pattern 'hed' matches no weight; near paths: head"),
    (
      {"quantize": ("conv",)},
      "quantize: pattern 'conv' matches none that this can be: conv/kernel (read by conv_general",
    ),
    (
      {"targets": ("LSTM*",)},
      "lora.targets: pattern 'LSTM*' matches none that this can be: LSTMCell_0/hf/bias",
    ),
    ({"lora_bias": True}, "lora.lora_bias: True; the biases"),
  ],
)
def test_patterns_that_choose_nothing(more, message):
  with pytest.raises(ValueError) as error:
    adapted_of(Convolutional(), X, **more)
  assert message in str(error.value)


def test_tables_are_meant_by_name_alone_and_tied_ones_change_both():
  adapted, frozen, params, constants = adapted_of(Model(), TOKENS)
  assert "embed" not in params
  assert adapted.function.tied == ("embed/embedding",)
  assert "the lookup and the head read this one table" in adapted.report(frozen)
  adapted, frozen, params, constants = adapted_of(Model(), TOKENS, targets=("embed",))
  assert list(params) == ["embed"]
  params = trained(params)
  trees = {"frozen": frozen, "params": params, "constants": constants}
  merged = adapted.merge(trees)
  a, b = params["embed"]["lora_a"], params["embed"]["lora_b"]
  table = dequantize(frozen["embed"]["embedding"]) + constants["embed"]["scaling"] * (a @ b)
  np.testing.assert_allclose(merged["embed"]["embedding"], table.T, atol=1e-5)
  close(jax.jit(adapted.apply)(trees, TOKENS), jax.jit(Model().apply)({"params": merged}, TOKENS))
  with pytest.raises(ValueError, match="takes plain LoRA only"):
    adapted_of(Model(), TOKENS, targets=("embed",), variant="dora")


def test_virtual_paths_and_ranks_by_layer():
  targets = ("layers/0/attn/query", "layers/1/up")
  pattern = {"layers/1/up": 3}
  adapted, frozen, params, constants = adapted_of(
    Model(), TOKENS, targets=targets, rank_pattern=pattern
  )
  layers = constants["layers"]
  np.testing.assert_array_equal(layers["attn"]["query"]["rank"], [2, 0])
  np.testing.assert_array_equal(layers["up"]["rank"], [0, 3])
  params = jax.tree.map(jnp.ones_like, params)
  trees = {"frozen": frozen, "params": params, "constants": constants}
  merged, base = adapted.merge(trees), adapted.merge({"frozen": frozen})
  change = nn.meta.unbox(jax.tree.map(jnp.subtract, merged, base))["layers"]
  assert change["up"]["kernel"][1].any() and not change["up"]["kernel"][0].any()
  close(jax.jit(adapted.apply)(trees, TOKENS), jax.jit(Model().apply)({"params": merged}, TOKENS))


@pytest.mark.parametrize(
  "more",
  [{"variant": "dora"}, {"init": "pissa"}],
  ids=lambda more: next(iter(more.values())),
)
def test_variants_and_inits(more):
  adapted, frozen, params, constants = adapted_of(Model(), TOKENS, targets=("layers/*",), **more)
  if "variant" in more:
    params = jax.tree.map(lambda a, b: a + b, params, trained(params))
  trees = {"frozen": frozen, "params": params, "constants": constants}
  merged = adapted.merge(trees)
  close(jax.jit(adapted.apply)(trees, TOKENS), jax.jit(Model().apply)({"params": merged}, TOKENS))
  if "init" in more:
    # W itself, but for the rounding of what is left of it.
    variables = variables_of(Model(), TOKENS)["params"]["layers"]["up"]["kernel"].unbox()
    base = merged["layers"]["up"]["kernel"].unbox()
    plain = dequantize(frozen["layers"]["up"]["kernel"])
    assert jnp.linalg.norm(base - variables) < 0.7 * jnp.linalg.norm(plain - variables)


def test_dropout_is_each_layers_own_and_only_with_a_key():
  adapted, frozen, params, constants = adapted_of(Model(), TOKENS, dropout=0.5)
  trees = {"frozen": frozen, "params": trained(params), "constants": constants}

  @jax.jit
  def run(seed):
    return adapted.apply(trees, TOKENS, dropout_key=jax.random.key(seed))

  np.testing.assert_array_equal(run(0), run(0))
  assert not np.array_equal(run(0), run(1))
  without = jax.jit(adapted.apply)(trees, TOKENS)
  assert not np.array_equal(run(0), without)
  close(without, jax.jit(Model().apply)({"params": adapted.merge(trees)}, TOKENS))


def test_weights_trained_in_full_take_their_places():
  saved = ("*/LayerNorm_0", "layers/*/down")
  adapted, frozen, params, constants = adapted_of(
    Model(), TOKENS, targets=("*/attn/*",), modules_to_save=saved
  )
  assert params["layers"]["down"]["kernel"].shape == (2, 48, 16)
  params = trained(params)
  trees = {"frozen": frozen, "params": params, "constants": constants}
  merged = adapted.merge(trees)
  for name in ("down", "LayerNorm_0"):
    jax.tree.map(np.testing.assert_array_equal, merged["layers"][name], params["layers"][name])
  close(jax.jit(adapted.apply)(trees, TOKENS), jax.jit(Model().apply)({"params": merged}, TOKENS))


def test_a_step_of_optax_changes_the_adapters_alone():
  adapted, frozen, params, constants = adapted_of(Shared(), X)
  optimizer = optax.adam(1e-2)
  with jax.numpy_dtype_promotion("standard"):
    state = optimizer.init(params)

  @jax.jit
  def step(params, state, frozen):
    def loss(params):
      trees = {"frozen": frozen, "params": params, "constants": constants}
      return jnp.square(adapted.apply(trees, X) - 1).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  values = []
  for _ in range(20):
    params, state, value = step(params, state, frozen)
    values.append(float(value))
  assert values[-1] < 0.7 * values[0]
  # Of the two moments and a count, for A and B of two matrices, and nothing else.
  assert len(jax.tree.leaves(params)) == 2 * 2
  assert len(jax.tree.leaves(state)) == 2 * 2 * 2 + 1


@pytest.mark.parametrize(
  ("equation", "shape", "x"),
  [
    ("btd,dnh->btnh", (16, 2, 8), (2, 3, 16)),
    ("...nh,nhd->...d", (2, 8, 6), (2, 3, 2, 8)),
    ("etd,edf->etf", (3, 16, 6), (3, 2, 16)),
  ],
)
def test_an_einsum_layer_of_our_own(equation, shape, x):
  module = linen.QEinsum(equation, shape, dtype=jnp.float32)
  x = jax.random.normal(jax.random.key(0), x)
  dense = module.init(jax.random.key(1), x)["frozen"]
  frozen = quantize_tree({"e": dense}, {"e": PACK})
  # Experts are a leading axis of separate matrices.
  assert frozen["e"]["kernel"].ndim == 2 + equation.startswith("e")
  params, constants = lora.init(
    jax.random.key(2), frozen, lora.LoRAConfig(rank=2, targets=("e",), dropout=0.5)
  )
  params = trained(params)
  variables = {"params": params["e"], "constants": constants["e"], "frozen": frozen["e"]}
  ours = jax.jit(module.apply)(variables, x)
  layout = einsum_layer.layout(equation, shape)
  merged = layout.weight(lora.merge(frozen, params, constants)["e"]["kernel"])
  close(ours, jnp.einsum(equation, x, merged))
  dropped = jax.jit(lambda key: module.apply(variables, x, rngs={"dropout": key}))
  assert not np.array_equal(dropped(jax.random.key(3)), ours)
  assert not np.array_equal(dropped(jax.random.key(3)), dropped(jax.random.key(4)))


@pytest.mark.parametrize("around", [{"outlier_fraction": 0.1}, {"rotate": True}])
def test_outliers_and_rotations_stand_around_a_packed_weight(around):
  variables = variables_of(Model(), TOKENS)
  config = dataclasses.replace(PACK, **around)
  adapted, frozen, params, constants = linen.adapt(
    Model(),
    variables,
    TOKENS,
    quantize={"*/up": config, "embed/*": config},
    adapters=lora.LoRAConfig(rank=2, targets=("*/up",)),
    key=jax.random.key(3),
  )
  trees = {"frozen": frozen, "params": trained(params), "constants": constants}
  merged = adapted.merge(trees)
  close(jax.jit(adapted.apply)(trees, TOKENS), jax.jit(Model().apply)({"params": merged}, TOKENS))


def test_what_was_not_seen_is_refused_by_path():
  class Two(nn.Module):
    def setup(self):
      self.dense = nn.Dense(WIDTH, use_bias=False)

    def __call__(self, x):
      return self.dense(x)

    def transposed(self, x):
      return x @ self.dense.variables["params"]["kernel"].T

    def convolved(self, x):
      return self.dense.variables["params"]["kernel"].sum() + x

  adapted, frozen, params, constants = adapted_of(Two(), X)
  trees = {"frozen": frozen, "params": params, "constants": constants}
  with pytest.raises(ValueError, match="dense/kernel: multiplied along other axes, which the arg"):
    adapted.apply(trees, X, method="transposed")
  with pytest.raises(ValueError, match="dense/kernel: read by reduce_sum"):
    adapted.apply(trees, X, method="convolved")
  with pytest.raises(ValueError, match="params: other/lora_a: fits no weight"):
    adapted.apply({**trees, "params": {"other": {"lora_a": X}}}, X)
  with pytest.raises(ValueError, match="frozen: dense/kernel: not in both"):
    adapted.apply({**trees, "frozen": {}}, X)
  with pytest.raises(ValueError, match="frozen: a collection of the module's own"):
    linen.adapt(Two(), {"params": {}, "frozen": {}}, X)

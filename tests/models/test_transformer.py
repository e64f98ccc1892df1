import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import lora
from qlora_jax.models.rope import Llama3, Rope
from qlora_jax.models.transformer import (
  LayerKind,
  Transformer,
  TransformerConfig,
  init_cache,
  restarting_positions,
)

# Grouped queries, and widths that no group of 128 rows or block of 32 divides.
CONFIG = TransformerConfig(
  vocab_size=50,
  hidden_size=36,
  intermediate_size=52,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
)
# Of the four frequencies one stays, one lies on the ramp, two are divided.
ROPE = Rope(1e4, None, Llama3(8.0, 1.0, 4.0, 100))
VARIANTS = {
  "plain": CONFIG,
  "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
  "biased": dataclasses.replace(CONFIG, attention_bias=True, output_bias=True, mlp_bias=True),
  "rope_scaling": dataclasses.replace(CONFIG, layer_pattern=(LayerKind(None, ROPE),)),
  "one key head": dataclasses.replace(CONFIG, num_kv_heads=1, norm_eps=1e-2),
}
# Logits here are of size 5; three layers of float32 sums over at most 52 products.
ATOL = 5e-5


def dense_base(config):
  """A float32 base whose logits vary: norms, biases and scales away from 1 and 0."""
  shapes = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )["frozen"]
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    name = path[-1].key
    if name == "scale":
      return jnp.asarray(1 + 0.2 * rng.standard_normal(shape.shape), jnp.float32)
    width = {"embedding": 1.0, "bias": 0.3}.get(name, 1.3 / np.sqrt(shape.shape[-2]))
    return jnp.asarray(width * rng.standard_normal(shape.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def packed_base():
  return ql.quantize_tree(dense_base(CONFIG), {"layers/*": ql.QuantizationConfig(block_size=32)})


@functools.cache
def variables_of(config=CONFIG, dropout=0.0):
  """A base, packed for CONFIG, and adapters that change it, of another rank in the last layer."""
  frozen = packed_base() if config == CONFIG else dense_base(config)
  cfg = lora.LoRAConfig(
    rank=3, targets=("layers/*",), rank_pattern={"layers/2/*": 2}, dropout=dropout
  )
  params, constants = lora.init(jax.random.key(1), frozen, cfg)
  rng = np.random.default_rng(1)
  used = np.arange(3)[None, :] < np.asarray(constants["layers"]["attn"]["q"]["rank"])[:, None]

  def leaf(path, p):
    if path[-1].key == "lora_b":
      p = jnp.asarray(0.1 * rng.standard_normal(p.shape) * used[..., None], jnp.float32)
    return p

  params = jax.tree_util.tree_map_with_path(leaf, params)
  return {"params": params, "constants": constants, "frozen": frozen}


@functools.cache
def merged(config=CONFIG):
  variables = variables_of(config)
  return lora.merge(variables["frozen"], variables["params"], variables["constants"])


def model_of(config=CONFIG, **kwargs) -> Any:
  return Transformer(config, **{"dtype": jnp.float32, **kwargs})


@functools.cache
def compiled(config=CONFIG, dtype: Any = jnp.float32) -> Any:
  return jax.jit(model_of(config, dtype=dtype).apply, static_argnames=("method", "fresh"))


def tokens_of(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(1, 50, shape), jnp.int32)


# A decoder in numpy and float64


def numpy_rotate(x, positions, config):
  half = config.head_dim // 2
  rope = config.layer_pattern[0].rope
  frequencies = rope.theta ** (-np.arange(half) / half)
  if (scaling := rope.scaling) is not None:
    for i, frequency in enumerate(frequencies):
      turns = scaling.original_max_position_embeddings * frequency / (2 * np.pi)
      if turns < scaling.low_freq_factor:
        frequencies[i] = frequency / scaling.factor
      elif turns < scaling.high_freq_factor:
        smooth = (turns - scaling.low_freq_factor) / (
          scaling.high_freq_factor - scaling.low_freq_factor
        )
        frequencies[i] = (1 - smooth) * frequency / scaling.factor + smooth * frequency
  turned = np.exp(1j * positions[:, None, None] * frequencies)
  turned = (x[..., :half] + 1j * x[..., half:]) * turned
  return np.concatenate([turned.real, turned.imag], -1)


def numpy_decoder(config, dense, tokens, positions=None):
  """Logits `[T, V]` of one document, one head and layer at a time."""
  dense = jax.tree.map(lambda w: np.asarray(w, np.float64), dense)
  positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)

  def norm(x, weights):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weights["scale"]

  def project(x, weights):
    return x @ weights["kernel"] + weights.get("bias", 0)

  causal = np.tril(np.ones((len(tokens),) * 2, bool))
  x = dense["embed"]["embedding"][np.asarray(tokens)]
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda w, i=i: w[i], dense["layers"])
    y = norm(x, layer["attn_norm"])
    q, k, v = (
      project(y, layer["attn"][name]).reshape(len(tokens), -1, config.head_dim) for name in "qkv"
    )
    q, k = (numpy_rotate(z, positions, config) for z in (q, k))
    heads = []
    for head in range(config.num_heads):
      group = head // (config.num_heads // config.num_kv_heads)
      logits = q[:, head] @ k[:, group].T / np.sqrt(config.head_dim)
      weights = np.where(causal, np.exp(logits - logits.max()), 0)
      heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, group])
    x = x + project(np.concatenate(heads, -1), layer["attn"]["o"])
    y = norm(x, layer["mlp_norm"])
    gate = project(y, layer["mlp"]["gate"])
    x = x + project(
      gate / (1 + np.exp(-gate)) * project(y, layer["mlp"]["up"]), layer["mlp"]["down"]
    )
  x = norm(x, dense["final_norm"])
  head = dense["embed"]["embedding"].T if config.tie_embeddings else dense["head"]["kernel"]
  return x @ head


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_a_decoder_in_numpy(name):
  config = VARIANTS[name]
  variables, tokens = variables_of(config), tokens_of(2, 40)
  logits = compiled(config)(variables, tokens)
  assert logits.shape == (2, 40, 50) and logits.dtype == jnp.float32
  expected = np.stack([numpy_decoder(config, merged(config), row) for row in tokens])
  np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)
  # The adapters matter: without them it is another function.
  base = numpy_decoder(config, lora.merge(variables["frozen"], {}, {}), tokens[0])
  assert np.abs(base - expected[0]).max() > 0.1


def test_explicit_positions():
  variables, tokens = variables_of(), tokens_of(1, 12)
  positions = jnp.asarray([[3, 4, 5, 9, 10, 20, 21, 22, 23, 24, 25, 40]])
  logits = compiled()(variables, tokens, positions=positions)
  expected = numpy_decoder(CONFIG, merged(), tokens[0], positions[0])
  np.testing.assert_allclose(logits[0], expected, rtol=0, atol=ATOL)


def test_rotary_frequencies_of_a_published_model():
  # Llama 3.1 8B: its first frequencies stay, its last are divided by 8.
  scaled, _ = Rope(500000.0, None, Llama3(8.0, 1.0, 4.0, 8192)).frequencies(128)
  plain, _ = Rope(500000.0).frequencies(128)
  assert scaled.dtype == plain.dtype == np.float32 and scaled.shape == (64,)
  ratio = plain / scaled
  wavelengths = 2 * np.pi / plain
  np.testing.assert_allclose(ratio[wavelengths < 8192 / 4], 1, rtol=1e-6)
  np.testing.assert_allclose(ratio[wavelengths > 8192], 8, rtol=1e-6)
  assert (np.diff(ratio) >= -1e-5).all() and ((ratio > 1.01) & (ratio < 7.99)).any()


# Collections


def test_init_makes_a_frozen_base_and_nothing_to_train():
  variables = model_of().init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  assert set(variables) == {"frozen"}
  shapes = {path: leaf.shape for path, leaf in ql.tree_paths.leaves(variables["frozen"]).items()}
  assert shapes == {
    "embed/embedding": (50, 36),
    "final_norm/scale": (36,),
    "head/kernel": (36, 50),
    "layers/attn/k/kernel": (3, 36, 16),
    "layers/attn/o/kernel": (3, 32, 36),
    "layers/attn/q/kernel": (3, 36, 32),
    "layers/attn/v/kernel": (3, 36, 16),
    "layers/attn_norm/scale": (3, 36),
    "layers/mlp/down/kernel": (3, 52, 36),
    "layers/mlp/gate/kernel": (3, 36, 52),
    "layers/mlp/up/kernel": (3, 36, 52),
    "layers/mlp_norm/scale": (3, 36),
  }
  q = variables["frozen"]["layers"]["attn"]["q"]["kernel"]
  assert float(jnp.abs(q[0] - q[1]).max()) > 0.1  # each layer has its own draw


def test_a_fresh_adapter_changes_not_a_bit():
  frozen, tokens = packed_base(), tokens_of(2, 9)
  params, constants = lora.init(jax.random.key(0), frozen, lora.LoRAConfig())
  apply = compiled(dtype=jnp.bfloat16)
  base = apply({"params": {}, "constants": {}, "frozen": frozen}, tokens)
  adapted = apply({"params": params, "constants": constants, "frozen": frozen}, tokens)
  np.testing.assert_array_equal(base, adapted)


def test_a_full_leaf_in_params_takes_the_weights_place():
  dense, tokens = dense_base(CONFIG), tokens_of(1, 9)
  other = jax.tree.map(lambda w: 1.1 * w + 0.05, dense)
  apply = compiled()
  everything = apply({"params": other, "frozen": dense}, tokens)
  np.testing.assert_array_equal(everything, apply({"frozen": other}, tokens))
  for part in ({"final_norm": other["final_norm"]}, {"head": other["head"]}):
    ours = apply({"params": part, "frozen": packed_base()}, tokens)
    expected = apply({"frozen": {**packed_base(), **part}}, tokens)
    np.testing.assert_array_equal(ours, expected)
    assert float(jnp.abs(ours - apply({"frozen": packed_base()}, tokens)).max()) > 0.01


def test_hidden_then_logits_is_the_model():
  variables, tokens = variables_of(), tokens_of(2, 9)
  apply = compiled()
  hidden = apply(variables, tokens, method="hidden")
  assert hidden.shape == (2, 9, 36)
  np.testing.assert_array_equal(apply(variables, hidden, method="logits"), apply(variables, tokens))


def test_only_adapters_get_a_gradient():
  variables, tokens = variables_of(), tokens_of(1, 9)
  model = model_of()

  def loss(params):
    return jnp.square(model.apply({**variables, "params": params}, tokens)).mean()

  gradients = jax.jit(jax.grad(loss))(variables["params"])
  assert jax.tree.structure(gradients) == jax.tree.structure(variables["params"])
  for path, gradient in ql.tree_paths.leaves(gradients).items():
    gradient = np.asarray(gradient)
    assert gradient.any(axis=(1, 2)).all(), path
    # The last layer has rank 2 of 3: its padding stays zero.
    padding = gradient[2, :, 2:] if path.endswith("lora_a") else gradient[2, 2:]
    assert not padding.any(), path


# Segments and padding

SEGMENTS = [[1] * 5 + [2] * 4 + [3] * 3, [7] * 2 + [3] * 6 + [0] * 4]


def test_restarting_positions():
  segments = jnp.asarray([[1, 1, 2, 2, 2, 1], [0, 0, 4, 4, 0, 0]])
  expected = [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1]]
  np.testing.assert_array_equal(restarting_positions(segments), expected)


def test_packed_documents_are_separate_documents():
  variables, tokens = variables_of(), tokens_of(2, 12)
  packed = compiled()(variables, tokens, segment_ids=jnp.asarray(SEGMENTS))
  for row, segments in enumerate(SEGMENTS):
    segments = np.asarray(segments)
    for segment in set(segments.tolist()) - {0}:
      where = segments == segment
      alone = numpy_decoder(CONFIG, merged(), tokens[row][where])
      np.testing.assert_allclose(packed[row][where], alone, rtol=0, atol=ATOL)
  whole = compiled()(variables, tokens)
  np.testing.assert_allclose(packed[0, :5], whole[0, :5], rtol=0, atol=ATOL)
  assert float(jnp.abs(packed[0, 5:] - whole[0, 5:]).max()) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_exact_on_either_side(side):
  document = tokens_of(1, 7)
  width = ((0, 0), (5, 0) if side == "left" else (0, 5))
  segments = jnp.pad(jnp.ones_like(document), width)
  alone = numpy_decoder(CONFIG, merged(), document[0])
  results = [
    compiled()(
      variables_of(), jnp.pad(document, width, constant_values=filler), segment_ids=segments
    )
    for filler in (0, 17)
  ]
  where = np.asarray(segments[0] == 1)
  np.testing.assert_allclose(results[0][0, where], alone, rtol=0, atol=ATOL)
  # What the padding holds does not reach a single bit of the others.
  np.testing.assert_array_equal(results[0][0, where], results[1][0, where])
  assert all(bool(jnp.isfinite(result).all()) for result in results)


# The cache


def cached(variables, tokens, segment_ids, chunks, length, dtype=jnp.float32):
  """Logits `[B, T, V]` of the tokens, fed in chunks of the sizes given."""
  apply = compiled()
  cache = init_cache(CONFIG, tokens.shape[0], length, dtype)
  logits, start = [], 0
  for size in chunks:
    end = start + size
    part = None if segment_ids is None else segment_ids[:, start:end]
    # A first chunk as a prompt's is, a first token as any other.
    fresh = start == 0 and size > 1
    y, cache = apply(variables, tokens[:, start:end], segment_ids=part, cache=cache, fresh=fresh)
    logits.append(y)
    start = end
  assert start == tokens.shape[1] == int(cache["index"])
  return jnp.concatenate(logits, 1), cache


CHUNKS = {"token by token": [1] * 12, "one prefill": [12], "chunked prefill": [5, 4, 1, 1, 1]}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_cache_equals_the_full_forward(chunks):
  variables, tokens = variables_of(), tokens_of(2, 12)
  full = compiled()(variables, tokens)
  logits, cache = cached(variables, tokens, None, chunks, length=15)
  np.testing.assert_allclose(logits, full, rtol=0, atol=ATOL)
  assert cache["k"].shape == cache["v"].shape == (3, 2, 2, 15, 8)
  assert not np.asarray(cache["k"][:, :, :, 12:]).any()
  np.testing.assert_array_equal(cache["segment_ids"], [[1] * 12 + [0] * 3] * 2)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_cache_with_padding_on_either_side_of_the_prompt(chunks):
  # Row 0 is a prompt padded left, row 1 one padded right; both then go on to 12.
  segments = jnp.asarray([[0, 0, 1, 1, 1] + [1] * 7, [1, 1, 0, 0, 0] + [1] * 7])
  variables, tokens = variables_of(), tokens_of(2, 12)
  logits, _ = cached(variables, tokens, segments, chunks, length=12)
  for row in range(2):
    where = np.asarray(segments[row] == 1)
    alone = numpy_decoder(CONFIG, merged(), tokens[row][where])
    np.testing.assert_allclose(logits[row][where], alone, rtol=0, atol=ATOL)


def test_cache_with_several_segments():
  variables, tokens = variables_of(), tokens_of(2, 12)
  segments = jnp.asarray(SEGMENTS)
  full = compiled()(variables, tokens, segment_ids=segments)
  logits, _ = cached(variables, tokens, segments, [4, 4, 4], length=12)
  where = np.asarray(segments != 0)
  np.testing.assert_allclose(logits[where], full[where], rtol=0, atol=ATOL)


def test_a_bfloat16_cache_is_close():
  variables, tokens = variables_of(), tokens_of(2, 12)
  full = compiled()(variables, tokens)
  logits, cache = cached(variables, tokens, None, [6, 6], length=12, dtype=jnp.bfloat16)
  assert cache["k"].dtype == cache["v"].dtype == jnp.bfloat16
  error = float(jnp.abs(logits - full).max())
  assert 0 < error < 0.2


# dtypes, remat, dropout


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_close_and_its_logits_are_float32(dtype):
  variables, tokens = variables_of(), tokens_of(2, 12)
  expected = compiled()(variables, tokens)
  logits = compiled(dtype=dtype)(variables, tokens)
  assert logits.dtype == jnp.float32
  error = np.asarray(jnp.abs(logits - expected))
  spread = float(jnp.std(expected))
  # A few roundings a layer, each of eps / 2.
  assert 0 < np.sqrt((error**2).mean()) < 4 * float(jnp.finfo(dtype).eps) * spread
  # Not rounded to the compute dtype.
  assert (np.asarray(logits.astype(dtype).astype(jnp.float32)) != np.asarray(logits)).any()


@pytest.mark.slow
def test_remat_changes_neither_values_nor_gradients_and_keeps_less():
  variables, tokens = variables_of(), tokens_of(4, 64)

  def run(remat):
    model = model_of(remat=remat)

    def loss(params):
      return jax.nn.logsumexp(model.apply({**variables, "params": params}, tokens), -1).mean()

    program = jax.jit(jax.value_and_grad(loss)).lower(variables["params"]).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    return *program(variables["params"]), analysis.temp_size_in_bytes

  (value, gradients, kept), (again, others, less) = run("none"), run("full")
  np.testing.assert_allclose(value, again, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))
  assert less < 0.7 * kept


def test_dropout_only_with_a_key():
  variables, tokens = variables_of(dropout=0.5), tokens_of(2, 12)
  apply = compiled()
  plain = apply(variables, tokens)
  # Not to the bit: what drew the weights of either may have been compiled otherwise.
  np.testing.assert_allclose(plain, apply(variables_of(), tokens), rtol=0, atol=2e-5)

  def dropped(seed):
    return apply(variables, tokens, rngs={"dropout": jax.random.key(seed)})

  np.testing.assert_array_equal(dropped(0), dropped(0))
  assert float(jnp.abs(dropped(0) - dropped(1)).max()) > 1e-3
  assert float(jnp.abs(dropped(0) - plain).max()) > 1e-3
  # A key without a rate in constants drops nothing.
  without = apply(variables_of(), tokens, rngs={"dropout": jax.random.key(0)})
  np.testing.assert_allclose(plain, without, rtol=0, atol=2e-5)


def test_each_layer_has_a_dropout_key_of_its_own():
  def apply(variables):
    return model_of().apply(variables, tokens_of(1, 4), rngs={"dropout": jax.random.key(0)})

  jaxpr = jax.make_jaxpr(apply)(variables_of(dropout=0.5))
  (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
  # A slice a layer; one key for all would be a constant of shape [] here.
  avals: list[Any] = [v.aval for v in scan.invars]
  keys = [aval for aval in avals if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)]
  assert [key.shape for key in keys] == [(3,)]


# Structure


def test_layers_lower_to_one_loop():
  def text(num_layers):
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    variables = {
      collection: {
        **tree,
        "layers": jax.tree.map(
          lambda a: jax.ShapeDtypeStruct((num_layers, *a.shape[1:]), a.dtype), tree["layers"]
        ),
      }
      for collection, tree in variables_of().items()
    }
    return jax.jit(model_of(config).apply).lower(variables, tokens_of(1, 8)).as_text()

  short, long = text(3), text(7)
  assert short.count("stablehlo.while") == long.count("stablehlo.while") == 1
  assert len(long) < 1.01 * len(short)
  cached_text = (
    jax.jit(model_of().apply)
    .lower(variables_of(), tokens_of(1, 8), cache=init_cache(CONFIG, 1, 8))
    .as_text()
  )
  assert cached_text.count("stablehlo.while") == 1


def test_trials_share_the_base_under_vmap():
  variables, tokens = variables_of(), tokens_of(2, 9)
  scales = jnp.asarray([0.0, 1.0, -2.0])
  stacked = jax.tree.map(lambda p: jnp.stack([scale * p for scale in scales]), variables["params"])

  def apply(params):
    return model_of().apply({**variables, "params": params}, tokens)

  together = jax.jit(jax.vmap(apply))(stacked)
  for i in range(3):
    params = jax.tree.map(lambda p, i=i: p[i], stacked)
    alone = compiled()({**variables, "params": params}, tokens)
    np.testing.assert_allclose(together[i], alone, rtol=0, atol=2 * ATOL)


# Errors


def replaced(path, value):
  """The dense base with another leaf at `path`."""
  flat = ql.tree_paths.leaves(dense_base(CONFIG))
  assert path in flat
  return {"frozen": ql.tree_paths.nest({**flat, path: value})}


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("head/kernel", jnp.zeros((36, 51)), "head/kernel: shape (36, 51); the model's is (36, 50)"),
    ("embed/embedding", jnp.zeros((50, 35)), "embed/embedding: shape (50, 35)"),
    ("final_norm/scale", jnp.zeros((35,)), "final_norm/scale: shape (35,)"),
    (
      "layers/mlp/up/kernel",
      jnp.zeros((3, 36, 51)),
      "layers/mlp/up/kernel: shape (36, 51); the model's is (36, 52)",
    ),
  ],
)
def test_a_wrong_shape_names_its_path(path, value, message):
  with pytest.raises(ValueError) as error:
    jax.eval_shape(model_of().apply, replaced(path, value), tokens_of(1, 4))
  assert message in str(error.value)


def test_only_kernels_and_tables_are_read_packed():
  path = "layers/mlp_norm/scale"
  layers, n = ql.tree_paths.leaves(dense_base(CONFIG))[path].shape
  packed = ql.quantize(jnp.ones((layers, 1, n)))
  with pytest.raises(ValueError) as error:
    jax.eval_shape(model_of().apply, replaced(path, packed), tokens_of(1, 4))
  assert path in str(error.value)


def test_missing_scaling_names_its_path():
  variables = {**variables_of(), "constants": {}}
  with pytest.raises(ValueError, match=r"layers/attn/[qkv]: an adapter in params without its scal"):
    jax.eval_shape(model_of().apply, variables, tokens_of(1, 4))


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(num_layers=0), "num_layers: 0; at least 1"),
    (dict(num_kv_heads=3), "num_kv_heads: 3; divides num_heads, which is 4"),
    (dict(head_dim=7), "head_dim: 7; rotary embeddings rotate pairs"),
  ],
)
def test_impossible_configs(kwargs, message):
  with pytest.raises(ValueError) as error:
    dataclasses.replace(CONFIG, **kwargs)
  assert message in str(error.value)


def test_unknown_remat_policy():
  model = model_of(remat="half")
  with pytest.raises(ValueError, match="remat: 'half'; one of offload, offload_pairs, full"):
    jax.eval_shape(model.apply, {"frozen": dense_base(CONFIG)}, tokens_of(1, 4))


def test_the_named_implementation_reaches_every_product():
  model = model_of(implementation="none such")
  with pytest.raises(ValueError, match="none such"):
    jax.eval_shape(model.apply, variables_of(), tokens_of(1, 4))

"""What each policy keeps, and that none changes a number."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from qlora_jax import lora, quantize
from qlora_jax.models.mlp import chunk_length
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.models.transformer import LayerKind, Transformer, TransformerConfig

LAYERS, WIDTH, WIDE = 12, 16, 112
CONFIG = TransformerConfig(
  vocab_size=64,
  hidden_size=WIDTH,
  intermediate_size=WIDE,
  num_layers=LAYERS,
  num_heads=2,
  num_kv_heads=1,
  head_dim=10,
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 48), 0, CONFIG.vocab_size)


@functools.cache
def trees(config):
  """(frozen, params, constants) of random weights."""
  frozen = jax.jit(Transformer(config, jnp.float32).init)(jax.random.key(1), TOKENS)["frozen"]
  params, constants = lora.init(jax.random.key(2), frozen, lora.LoRAConfig(rank=3))
  return frozen, jax.tree.map(lambda x: x + 0.01, params), constants


def gradient_of(remat, config=CONFIG, **options):
  """(function of the adapters, the adapters)."""
  model = Transformer(config, jnp.float32, remat, **options)
  frozen, params, constants = trees(config)

  def loss(params):
    variables = {"params": params, "constants": constants, "frozen": frozen}
    hidden: Any = model.apply(variables, TOKENS, method="hidden")
    return jnp.square(hidden).sum() / 100

  return jax.value_and_grad(loss), params


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [{}, {"attention": "blockwise"}, {"mlp_chunk": 20}],
  ids=["plain", "blockwise", "mlp_chunk"],
)
def test_no_policy_changes_a_number(options):
  function, params = gradient_of("none")
  expected, gradients = jax.jit(function)(params)
  for policy in REMAT_POLICIES:
    function, params = gradient_of(policy, **options)
    value, found = jax.jit(function)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, gradients
    )


FEW = dataclasses.replace(CONFIG, num_layers=3)


# Of two kinds of layers, with norms whose gradient is taken at what entered them.
KINDS = dataclasses.replace(
  FEW, layer_pattern=(LayerKind(window=8), LayerKind(rope=None)), post_norms=True, num_layers=4
)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("policy", "config"),
  [("offload", FEW), ("elementwise", KINDS)],
  ids=["offload", "kinds-elementwise"],
)
def test_layers_in_a_row_compute_what_a_loop_does(policy, config):
  function, params = gradient_of(policy, config)
  expected, gradients = jax.jit(function)(params)
  function, params = gradient_of(policy, config, unroll=True)
  value, found = jax.jit(function)(params)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, gradients
  )


def test_layers_in_a_row_are_in_no_stack():
  function, params = gradient_of("elementwise", FEW, unroll=True)
  program: Any = jax.jit(function).lower(params).compile().as_text()
  assert "while" not in str(jax.make_jaxpr(function)(params))
  assert "dynamic-update-slice" not in program
  with pytest.raises(ValueError, match="unroll: True with remat 'offload_pairs'"):
    gradient_of("offload_pairs", FEW, unroll=True)[0](params)


@pytest.mark.parametrize("policy", ["full", "elementwise", "none"])
def test_layers_in_a_row_keep_no_weight_that_was_decoded(policy):
  """Merged by the compiler, the forward pass's would wait for the backward pass."""
  config = dataclasses.replace(
    CONFIG, num_layers=6, hidden_size=64, intermediate_size=512, head_dim=32
  )
  frozen, params, constants = trees(config)
  frozen = jax.tree.map(lambda w: quantize(w) if w.ndim == 3 else w, frozen)
  model = Transformer(config, jnp.float32, policy, unroll=True)
  tokens = TOKENS[:1, :8]

  def loss(params):
    variables = {"params": params, "constants": constants, "frozen": frozen}
    hidden: Any = model.apply(variables, tokens, method="hidden")
    return jnp.square(hidden).sum()

  # So that no compiler merges the two (the suite's does not try: see tests/conftest.py).
  assert str(jax.make_jaxpr(jax.grad(loss))(params)).count("prevent_cse=True") == 6
  if jax.__version__.startswith("0.10."):
    return  # Its CPU decodes first of all what waits for nothing.
  analysis: Any = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()
  layer = 4 * 64 * (3 * 512 + 4 * 64)
  assert analysis.temp_size_in_bytes < 3.5 * layer


def test_layers_in_a_row_are_named_in_messages():
  frozen, params, constants = trees(FEW)
  short = jax.tree.map(lambda x: x, frozen)
  short["layers"]["mlp"]["up"]["kernel"] = short["layers"]["mlp"]["up"]["kernel"][:, :, 1:]
  model = Transformer(FEW, jnp.float32, unroll=True)
  with pytest.raises(ValueError, match="layers/mlp/up/kernel: shape"):
    model.apply({"params": params, "constants": constants, "frozen": short}, TOKENS)


def test_layers_in_a_row_draw_masks_of_their_own(monkeypatch):
  frozen, params, _ = trees(FEW)
  _, constants = lora.init(jax.random.key(2), frozen, lora.LoRAConfig(rank=3, dropout=0.5))
  model = Transformer(FEW, jnp.float32, "full", unroll=True)
  plain, keys = lora.apply, []

  def recording(*operands, key, **options):
    jax.debug.callback(lambda bits: keys.append(tuple(bits.tolist())), jax.random.key_data(key))
    return plain(*operands, key=key, **options)

  monkeypatch.setattr(lora, "apply", recording)
  variables = {"params": params, "constants": constants, "frozen": frozen}
  rngs = {"dropout": jax.random.key(1)}
  jax.block_until_ready(model.apply(variables, TOKENS, method="hidden", rngs=rngs))
  jax.effects_barrier()
  assert len(keys) == len(set(keys)) == FEW.num_layers * 7


def test_layers_in_a_row_round_an_adapter_once():
  frozen, params, constants = trees(FEW)

  def rounded(policy):
    model = Transformer(FEW, jnp.bfloat16, policy, unroll=True)

    def loss(params):
      variables = {"params": params, "constants": constants, "frozen": frozen}
      hidden: Any = model.apply(variables, TOKENS, method="hidden")
      return hidden.astype(jnp.float32).sum()

    # Of down, whose A alone has this shape.
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    return len(re.findall(rf":bf16\[{WIDE},3\] = convert_element_type", program))

  assert rounded("elementwise") == FEW.num_layers
  assert rounded("full") == 2 * FEW.num_layers


def test_layers_in_a_row_take_weights_where_they_lie():
  """Outside of what is computed again, a layer's slice of the base would be kept for it."""
  function, params = gradient_of("full", FEW, unroll=True)
  program: Any = jax.make_jaxpr(function)(params).jaxpr
  layers = [eqn for eqn in program.eqns if str(eqn.primitive) in ("checkpoint", "remat2", "remat")]
  stack = (FEW.num_layers, WIDTH, WIDE)
  taken = [sum(v.aval.shape == stack for v in eqn.invars) for eqn in layers]
  assert len(layers) >= FEW.num_layers and all(count == 2 for count in taken[-FEW.num_layers :])


def test_an_odd_layer_has_no_pair():
  model = Transformer(dataclasses.replace(CONFIG, num_layers=3), remat="offload_pairs")
  with pytest.raises(ValueError, match="remat: 'offload_pairs' of 3 layers; an even number"):
    jax.eval_shape(lambda: model.apply({}, TOKENS))
  with pytest.raises(ValueError, match="an even number"):
    jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def products(jaxpr, shapes) -> int:
  """How many products of the program have a kernel `[K, N]` of one of these shapes."""
  count = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      count += any(tuple(each.aval.shape) in shapes for each in equation.invars)
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        count += products(inner if hasattr(inner, "eqns") else inner.jaxpr, shapes)
  return count


@pytest.mark.parametrize(
  ("policy", "of_q", "of_gate_and_up"),
  [
    ("none", 2, 3),
    ("elementwise", 2, 3),
    ("mlp", 2, 5),
    ("full", 3, 5),
    ("offload", 3, 5),
    ("offload_pairs", 4, 7),
  ],
)
def test_what_is_computed_again(policy, of_q, of_gate_and_up):
  """Products forward and again; o's and down's for their input's gradient have the same shapes."""
  function, params = gradient_of(policy)
  program = jax.make_jaxpr(function)(params).jaxpr
  assert products(program, {(WIDTH, 20)}) == of_q
  assert products(program, {(WIDTH, WIDE)}) == of_gate_and_up


def temporaries(policy, **options) -> int:
  function, params = gradient_of(policy, **options)
  analysis: Any = jax.jit(function).lower(params).compile().memory_analysis()
  return analysis.temp_size_in_bytes


def test_what_is_kept():
  layer = TOKENS.size * 4
  full, mlp, elementwise, none = map(temporaries, ("full", "mlp", "elementwise", "none"))
  # What one layer works on at a time is less, the more is kept.
  fewest, most = LAYERS - 3, LAYERS + 2
  # q, k, v, attention's result (20 + 10 + 10 + 20), the middle of the layer; and x · A of five.
  kept = layer * (60 + WIDTH + 5 * 3)
  assert fewest * kept < mlp - full < most * kept
  wide = layer * 2 * WIDE
  assert fewest * wide < elementwise - mlp < most * wide
  assert none > elementwise + fewest * wide / 2


def test_chunks_of_an_mlp_divide_a_row_where_they_can():
  # The first two are as long as were padded by 8,000 and 1,000 tokens.
  lengths = [(350_208, 16_384), (13_312, 2048), (81_920, 16_384), (50, 8), (53, 8), (9, 1)]
  found = [chunk_length(*each) for each in lengths]
  assert found == [14_592, 1664, 16_384, 5, 8, 1]


def test_an_mlp_in_chunks_of_a_row_that_none_divides():
  frozen, params, constants = trees(CONFIG)
  variables = {"params": params, "constants": constants, "frozen": frozen}
  tokens = TOKENS[:, :23]
  found: Any = [
    Transformer(CONFIG, jnp.float32, mlp_chunk=chunk).apply(variables, tokens, method="hidden")
    for chunk in (None, 8)
  ]
  np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_mlp_in_chunks_holds_a_chunks_activations():
  wide = dataclasses.replace(CONFIG, num_layers=2, intermediate_size=2048)
  whole, chunks = (temporaries("full", config=wide, mlp_chunk=each) for each in (None, 8))
  assert whole > 3 * TOKENS.size * 2048 * 4
  # A sixth of the tokens; the rest is what the adapters' own gradients take.
  assert chunks < 0.4 * whole


@pytest.mark.slow
def test_experts_under_every_policy():
  config = dataclasses.replace(CONFIG, num_layers=2, num_experts=4, experts_per_token=2)
  expected = None
  for policy in ("none", "elementwise", "full"):
    function, params = gradient_of(policy, config)
    value, gradients = jax.jit(function)(params)
    norm = sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(gradients))
    expected = expected or (value, norm)
    np.testing.assert_allclose((value, norm), expected, rtol=1e-5)


@pytest.mark.parametrize("policy", ["full", "mlp"])
def test_no_masks_of_all_pairs_are_kept(policy):
  """They are known before the first layer: JAX would compute them there, and keep them."""
  length = 4096
  model = Transformer(CONFIG, jnp.float32, policy, attention="blockwise")
  shapes = jax.eval_shape(lambda: trees.__wrapped__(CONFIG))

  def loss(params, frozen, constants):
    variables = {"params": params, "constants": constants, "frozen": frozen}
    tokens = jnp.zeros((1, length), jnp.int32)
    return model.apply(variables, tokens, method="hidden").sum()  # pyright: ignore

  frozen, params, constants = shapes
  jaxpr: Any = jax.make_jaxpr(jax.grad(loss))(params, frozen, constants)
  assert _largest(jaxpr.jaxpr, jnp.bool_) < length**2 / 4


def _largest(jaxpr: Any, dtype: Any) -> int:
  """Elements of the largest array of a dtype that is computed anywhere."""
  found = [0]
  for equation in jaxpr.eqns:
    found += [v.aval.size for v in equation.outvars if getattr(v.aval, "dtype", None) == dtype]
    found += [_largest(inner, dtype) for inner in jaxprs_in_params(equation.params)]
  return max(found)

"""Every layer of the library in JAX's other modes: 64-bit types, NaN checks, promotion, threads.

Each part is run as its users would run it, in these modes, and compared with itself in the
ordinary one. (That strict promotion holds, all tests show that do not need Optax: see conftest.py.)
"""

import concurrent.futures
import copy
import dataclasses
import pickle
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnnx

import qlora_jax as ql
from qlora_jax import QuantizationConfig, config, linen, lora, nnx
from qlora_jax.models.attention import AttentionName
from qlora_jax.models.transformer import Transformer, TransformerConfig

# Many programs to compile: for the whole suite, not its quick part.
pytestmark = pytest.mark.slow

PACK = QuantizationConfig(block_size=8)
LORA = lora.LoRAConfig(rank=2, targets=("*",))


def array(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numbers():
  """Packed and decoded, a K that the block does not divide, nested scales, a zero-point."""
  w = jnp.asarray(array(21, 6))
  nested = ql.quantize(w, codebook="nf4", block_size=8, double_quantization=True)
  shifted = ql.quantize(w, codebook="int4_zero_point", block_size=8, double_quantization=False)
  return {"codes": nested.codes, "nested": ql.dequantize(nested), "zero": ql.dequantize(shifted)}


def op():
  """Forward and backward, alone and by an equation, with experts."""
  w = ql.quantize(jnp.asarray(array(3, 16, 8)), block_size=8)
  x = jnp.asarray(array(3, 4, 16, seed=1))

  def loss(x):
    first = ql.quantized_matmul(x[0], jax.tree.map(lambda leaf: leaf[0], w))
    return jnp.square(first).sum() + ql.quantized_einsum("etk,ekn->etn", x, w).sum()

  return jax.jit(jax.value_and_grad(loss))(x)


def adapters():
  frozen = ql.quantize_tree({"up": {"kernel": jnp.asarray(array(16, 8))}}, {"*": PACK})
  params, constants = lora.init(
    jax.random.key(0), frozen, dataclasses.replace(LORA, variant="dora")
  )
  params["up"]["lora_b"] = jnp.asarray(array(2, 8, seed=2))
  return params, lora.merge(frozen, params, constants)


def layers():
  x = jnp.asarray(array(3, 16))
  dense = linen.QDense(8, dtype=jnp.float32)
  frozen = {"kernel": ql.quantize(jnp.asarray(array(16, 8)), block_size=8)}
  theirs = nnx.QEinsum(
    "td,dnh->tnh",
    (16, 2, 4),
    use_bias=True,
    dtype=jnp.float32,
    quantization=PACK,
    adapter=LORA,
    rngs=fnnx.Rngs(0),
  )
  gradient = fnnx.value_and_grad(
    lambda model: jnp.square(model(x)).sum(), argnums=fnnx.DiffState(0, fnnx.LoRAParam)
  )
  value, grads = fnnx.jit(gradient)(theirs)
  return dense.apply({"frozen": frozen}, x), value, fnnx.to_pure_dict(grads)


def imported():
  """A lookup, a product and a scan of somebody else's."""
  x, ids = jnp.asarray(array(3, 16)), jnp.asarray(np.asarray([1, 3, 0], np.int32))

  def function(weights, x, ids):
    body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return jax.lax.scan(body, x + jnp.take(weights["table"], ids, axis=0), weights["stack"])[0]

  weights = {"table": jnp.asarray(array(8, 16)), "stack": jnp.asarray(array(2, 16, 16))}
  adapted, frozen, params, constants = ql.adapt(
    function, weights, x, ids, quantize={"*": PACK}, adapters=LORA, key=jax.random.key(1)
  )

  def loss(params):
    trees = {"frozen": frozen, "params": params, "constants": constants}
    return jnp.square(adapted.apply(trees, x, ids)).sum()

  return jax.jit(jax.value_and_grad(loss))(params)


def model(attention: AttentionName = "plain", run=jax.value_and_grad, **experts):
  """The decoder over a packed base, with padding."""
  cfg = TransformerConfig(32, 16, 16, 1, 2, 1, 8, **experts)
  decoder = Transformer(cfg, dtype=jnp.float32, attention=attention)
  tokens = jnp.asarray(np.asarray([[5, 7, 9, 3], [1, 2, 0, 0]], np.int32))
  shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["frozen"]
  dense = jax.tree.map(lambda w: jnp.asarray(0.1 * array(*w.shape)), shapes)
  frozen = ql.quantize_tree(dense, {"layers/*": PACK})
  params, constants = lora.init(
    jax.random.key(1), frozen, lora.LoRAConfig(rank=2, targets=("layers/*",))
  )

  def loss(params):
    variables = {"frozen": frozen, "params": params, "constants": constants}
    logits: Any = decoder.apply(variables, tokens, segment_ids=(tokens > 0).astype(jnp.int32))
    return jnp.square(logits).mean()

  return jax.jit(run(loss))(params)


def experts():
  """The same with experts, and attention by blocks; the loss alone, for the sake of time."""
  return model("blockwise", lambda loss: loss, num_experts=2, experts_per_token=1)


PARTS = [numbers, op, adapters, layers, imported, model, experts]


def same(found, expected):
  """Nothing became wider, and the numbers are the same but for roundings."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_modes(part):
  expected = part()
  # Both at once, since either compiles all anew; that each is on is seen first.
  with jax.enable_x64(True), jax.debug_nans(True):
    assert jnp.asarray(0.5).dtype == jnp.float64
    with pytest.raises(FloatingPointError):
      jnp.log(-jnp.ones(2))
    same(part(), expected)


def test_threads():
  """Several parts at once, in two threads that start together, one of them with 64-bit types."""
  parts = [adapters, layers, imported]
  expected = [part() for part in parts]
  together = threading.Barrier(2)

  def run(wide):
    together.wait()
    with jax.enable_x64(wide):
      return [part() for part in parts]

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    plain, wide = pool.map(run, (False, True))
  jax.tree.map(np.testing.assert_array_equal, plain, expected)
  same(wide, expected)


def configs():
  """An instance of each dataclass of a config, and what adapt returns beside arrays."""
  for name, value in vars(config).items():
    if dataclasses.is_dataclass(value) and isinstance(value, type):
      fields = dataclasses.fields(value)
      missing = dataclasses.MISSING
      if all(f.default is not missing or f.default_factory is not missing for f in fields):
        yield pytest.param(value(), id=name)
  yield pytest.param(QuantizationConfig("nf3", block_size=32, double_quantization=False), id="nf3")
  yield pytest.param(lora.LoRAConfig(rank_pattern={"a": 2}, variant="dora"), id="dora")
  yield pytest.param(TransformerConfig(32, 16, 16, 1, 2, 1, 8), id="transformer")


@pytest.mark.parametrize("value", list(configs()))
def test_configs_are_pickled(value):
  for again in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
    assert again is not value and again == value and type(again) is type(value)
    assert dataclasses.asdict(again) == dataclasses.asdict(value)

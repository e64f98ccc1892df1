import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.losses import chunked_cross_entropy, cross_entropy

TOKENS, WIDTH, VOCABULARY = 24, 8, 50


@pytest.fixture
def case():
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (4, 6, WIDTH))
  head = jax.random.normal(keys[1], (WIDTH, VOCABULARY))
  targets = jax.random.randint(keys[2], (4, 6), 0, VOCABULARY)
  mask = jax.random.bernoulli(keys[3], 0.6, (4, 6))
  return hidden, head, targets, mask


def chunked(hidden, head, targets, mask, chunk, z_loss=0.0):
  """With a head `[D, V]` that is trained."""

  def logits(head, fixed, hidden):
    del fixed
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)

  return chunked_cross_entropy(logits, chunk, z_loss, head, (), hidden, targets, mask)


def oracle(hidden, head, targets, mask) -> float:
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  logits -= logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
  return -picked[np.asarray(mask)].sum()


def test_cross_entropy_is_a_masked_sum(case):
  hidden, head, targets, mask = case
  loss = cross_entropy(hidden @ head, targets, mask)
  np.testing.assert_allclose(loss, oracle(*case), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 1000])
def test_chunks_change_neither_value_nor_gradients(case, chunk):
  hidden, head, targets, mask = case

  def whole(hidden, head):
    return cross_entropy(hidden @ head, targets, mask)

  value, grads = jax.value_and_grad(chunked, (0, 1))(hidden, head, targets, mask, chunk)
  assert chunked(hidden, head, targets, mask, chunk) == value
  expected, expected_grads = jax.value_and_grad(whole, (0, 1))(hidden, head)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_z_loss(case):
  hidden, head, targets, mask = case

  def whole(hidden, head):
    totals = jax.nn.logsumexp(hidden @ head, axis=-1)
    return cross_entropy(hidden @ head, targets, mask) + 0.1 * jnp.where(mask, totals**2, 0).sum()

  value, grads = jax.value_and_grad(chunked, (0, 1))(hidden, head, targets, mask, 5, 0.1)
  expected, expected_grads = jax.value_and_grad(whole, (0, 1))(hidden, head)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_scaled_as_the_loss_is(case):
  hidden, head, targets, mask = case

  def gradients(scale):
    return jax.grad(lambda x, y: scale * chunked(x, y, targets, mask, 5), (0, 1))(hidden, head)

  for grad, doubled in zip(gradients(1.0), gradients(2.0), strict=True):
    np.testing.assert_array_equal(2 * grad, doubled)


def test_no_targets_is_zero_and_finite(case):
  hidden, head, targets, mask = case
  value, grad = jax.value_and_grad(lambda h: chunked(h, head, targets, jnp.zeros_like(mask), 7))(
    hidden
  )
  assert value == 0
  assert not grad.any()


def test_bfloat16_hidden_states_under_strict_promotion(case):
  hidden, head, targets, mask = case
  hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)

  def loss(hidden, head):
    return chunked(hidden, head, targets, mask, 5)

  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)
  assert value.dtype == jnp.float32
  assert {grad.dtype for grad in grads} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_allclose(value, oracle(hidden, head, targets, mask), rtol=1e-6)


@pytest.mark.parametrize("ignored", [-100, VOCABULARY, 2**31 - 1])
def test_targets_that_do_not_count_may_be_anything(case, ignored):
  hidden, head, targets, mask = case

  def loss(hidden, targets):
    return chunked(hidden, head, targets, mask, 7)

  value, grad = jax.value_and_grad(loss)(hidden, jnp.where(mask, targets, ignored))
  expected, expected_grad = jax.value_and_grad(loss)(hidden, targets)
  np.testing.assert_array_equal(value, expected)
  np.testing.assert_array_equal(grad, expected_grad)
  assert not grad[~mask].any()


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
  """Of all results of the program, inner ones (loops, branches) too."""
  shapes = set()
  for equation in jaxpr.eqns:
    shapes |= {tuple(each.aval.shape) for each in equation.outvars}
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        shapes |= shapes_in(inner if hasattr(inner, "eqns") else inner.jaxpr)
  return shapes


def test_no_result_of_the_program_has_the_size_of_all_logits(case):
  hidden, head, targets, mask = case

  def largest(chunk: int) -> int:
    def loss(hidden, head):
      return chunked(hidden, head, targets, mask, chunk)

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head).jaxpr
    return max(math.prod(shape) for shape in shapes_in(program))

  assert largest(TOKENS) == TOKENS * VOCABULARY  # so that the line below says something
  assert largest(4) == WIDTH * VOCABULARY  # the head's own gradient


def test_logits_of_all_tokens_never_exist():
  tokens, chunk, vocabulary = 4096, 64, 4096
  targets, mask = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, bool)

  def temporaries(chunk: int) -> int:
    def loss(hidden, head):
      return chunked(hidden, head, targets, mask, chunk)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 16), (16, vocabulary))]
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes

  all_logits = tokens * vocabulary * 4
  assert temporaries(chunk) < all_logits / 8
  assert temporaries(tokens) > all_logits / 2  # so that the bound above says something

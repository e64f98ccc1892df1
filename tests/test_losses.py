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

  def chunked(hidden, head):
    return chunked_cross_entropy(lambda h: h @ head, hidden, targets, mask, chunk)

  value, grads = jax.value_and_grad(chunked, (0, 1))(hidden, head)
  expected, expected_grads = jax.value_and_grad(whole, (0, 1))(hidden, head)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_no_targets_is_zero_and_finite(case):
  hidden, head, targets, mask = case
  value, grad = jax.value_and_grad(
    lambda h: chunked_cross_entropy(lambda x: x @ head, h, targets, jnp.zeros_like(mask), 7)
  )(hidden)
  assert value == 0
  assert not grad.any()


def test_logits_of_all_tokens_never_exist():
  tokens, chunk, vocabulary = 4096, 64, 4096
  targets, mask = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, bool)

  def temporaries(chunk: int) -> int:
    def loss(hidden, head):
      return chunked_cross_entropy(lambda h: h @ head, hidden, targets, mask, chunk)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 16), (16, vocabulary))]
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  all_logits = tokens * vocabulary * 4
  assert temporaries(chunk) < all_logits / 8
  assert temporaries(tokens) > all_logits / 2  # so that the bound above says something

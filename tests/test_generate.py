import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import lora
from qlora_jax.generate import generate
from qlora_jax.models.transformer import Transformer, TransformerConfig

MODEL = Transformer(TransformerConfig(48, 32, 48, 2, 4, 2, 8), dtype=jnp.float32)


@pytest.fixture(scope="module")
def variables():
  dense = MODEL.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  # Weights of a size at which the likeliest token varies.
  dense = jax.tree.map(lambda w: 3 * w, dense)
  frozen = ql.quantize_tree(dense, {"layers/*/mlp/*": ql.QuantizationConfig()})
  params, constants = lora.init(jax.random.key(1), frozen, lora.LoRAConfig(rank=2))
  params = jax.tree.map(lambda p: p + 0.02, params)
  return {"params": params, "constants": constants, "frozen": frozen}


_forward = jax.jit(MODEL.apply)


def greedy(variables, ids: list[int], count: int) -> list[int]:
  """One document, the full forward for every token."""
  start = len(ids)
  for _ in range(count):
    # Filled up to one length, so that it compiles once; what comes later is not seen.
    filled = jnp.asarray([ids + [0] * (16 - len(ids))])
    ids = [*ids, int(_forward(variables, filled)[0, len(ids) - 1].argmax())]
  return ids[start:]


def test_greedy_equals_the_full_forward_with_padding_on_either_side(variables):
  prompts = [[5, 6, 7, 8, 9], [11, 12, 13], [20, 21]]
  padded = [prompts[0], [0, 0, *prompts[1]], [*prompts[2], 0, 0, 0]]
  segments = [[1] * 5, [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
  new = generate(
    MODEL, variables, jnp.asarray(padded), max_new_tokens=7, segment_ids=jnp.asarray(segments)
  )
  expected = [greedy(variables, ids, 7) for ids in prompts]
  assert np.asarray(new).tolist() == expected
  assert len({token for row in expected for token in row}) > 5  # else it says little


def test_one_token_and_no_segments(variables):
  new = generate(MODEL, variables, jnp.asarray([[5, 6, 7]]), max_new_tokens=1)
  assert np.asarray(new).tolist() == [greedy(variables, [5, 6, 7], 1)]


def test_sampling_follows_its_key_and_the_distribution(variables):
  prompt = jnp.tile(jnp.asarray([[5, 6, 7]]), (4000, 1))

  def draw(seed, temperature):
    return np.asarray(
      generate(
        MODEL, variables, prompt, max_new_tokens=1, temperature=temperature,
        key=jax.random.key(seed),
      )
    )[:, 0]  # fmt: skip

  np.testing.assert_array_equal(draw(0, 0.7), draw(0, 0.7))
  assert (draw(0, 0.7) != draw(1, 0.7)).any()
  logits = MODEL.apply(variables, jnp.asarray([[5, 6, 7]]))[0, -1]
  expected = np.asarray(jax.nn.softmax(logits / 0.7))
  counts = np.bincount(draw(0, 0.7), minlength=48) / 4000
  assert np.abs(counts - expected).max() < 5 * np.sqrt(0.25 / 4000)


def test_a_row_that_ended_goes_on_with_eos(variables):
  first, second, *_ = greedy(variables, [5, 6, 7], 6)
  assert first != second
  new = generate(MODEL, variables, jnp.asarray([[5, 6, 7]]), max_new_tokens=6, eos_id=second)
  assert np.asarray(new).tolist() == [[first, *[second] * 5]]


@pytest.mark.parametrize(
  ("prompt", "arguments", "message"),
  [
    ([1, 2], {}, r"prompt \[2\]"),
    ([[1, 2]], {"max_new_tokens": 0}, "max_new_tokens 0"),
    ([[1, 2]], {"temperature": 0.5}, r"temperature 0\.5; .*key"),
    ([[1, 2]], {"temperature": -1.0}, r"temperature -1\.0"),
    ([[1, 2]], {"segment_ids": [[1]]}, r"segment_ids \[1, 1\]"),
    ([[1, 2], [3, 4]], {"segment_ids": [[1, 1], [0, 0]]}, "row 1 of the prompt is all padding"),
  ],
)
def test_errors(variables, prompt, arguments, message):
  with pytest.raises(ValueError, match=message):
    generate(MODEL, variables, jnp.asarray(prompt), **{"max_new_tokens": 2, **arguments})

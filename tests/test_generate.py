import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import hf, lora
from qlora_jax.generate import generate
from qlora_jax.models.transformer import Transformer, TransformerConfig

MODEL = Transformer(TransformerConfig(48, 32, 48, 2, 4, 2, 8), dtype=jnp.float32)
LONGEST = 12  # prompts and what follows them


@pytest.fixture(scope="module")
def variables():
  dense = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  # Weights of a size at which the likeliest token varies.
  dense = jax.tree.map(lambda w: 3 * w, dense)
  frozen = ql.quantize_tree(dense, {"layers/*/mlp/*": ql.QuantizationConfig()})
  params, constants = lora.init(jax.random.key(1), frozen, lora.LoRAConfig(rank=2))
  params = jax.tree.map(lambda p: p + 0.02, params)
  return {"params": params, "constants": constants, "frozen": frozen}


@functools.partial(jax.jit, static_argnums=0)
def full_forward(model, variables, ids):
  return model.apply(variables, ids)


def greedy(variables, ids: list[int], count: int) -> list[int]:
  """One document, the full forward for every token."""
  for _ in range(count):
    # A causal model's logits do not see what stands behind them: one shape, compiled once.
    padded = jnp.asarray([ids + [0] * (LONGEST - len(ids))])
    ids = [*ids, int(full_forward(MODEL, variables, padded)[0, len(ids) - 1].argmax())]
  return ids[-count:]


def test_greedy_equals_the_full_forward_with_padding_on_either_side(variables):
  prompts = [[5, 6, 7, 8, 9], [11, 12, 13], [20, 21], [40, 3, 2]]
  padded = [prompts[0], [0, 0, *prompts[1]], [*prompts[2], 0, 0, 0], [0, *prompts[3], 0]]
  segments = [[1] * 5, [0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]
  new = generate(
    MODEL, variables, jnp.asarray(padded), max_new_tokens=7, segment_ids=jnp.asarray(segments)
  )
  expected = [greedy(variables, ids, 7) for ids in prompts]
  assert new.dtype == jnp.int32
  assert np.asarray(new).tolist() == expected
  assert len({token for row in expected for token in row}) > 5  # else it says little
  base = {"params": {}, "constants": {}, "frozen": variables["frozen"]}
  assert expected != [greedy(base, ids, 7) for ids in prompts]  # the adapter takes part


def test_one_token_and_no_segments(variables):
  new = generate(MODEL, variables, jnp.asarray([[5, 6, 7]]), max_new_tokens=1)
  assert np.asarray(new).tolist() == [greedy(variables, [5, 6, 7], 1)]


def test_sampling_follows_its_key_and_the_distribution(variables):
  draws = 4000
  prompt = jnp.tile(jnp.asarray([[5, 6, 7]]), (draws, 1))

  def draw(seed):
    key = jax.random.key(seed)
    new = generate(MODEL, variables, prompt, max_new_tokens=1, temperature=4.0, key=key)
    return np.asarray(new)[:, 0]

  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()
  logits = full_forward(MODEL, variables, jnp.asarray([[5, 6, 7, *[0] * (LONGEST - 3)]]))[0, 2]
  frequencies = np.bincount(draw(0), minlength=48) / draws

  def deviations(temperature: float) -> np.ndarray:
    """In standard deviations of a count."""
    p = np.asarray(jax.nn.softmax(logits / temperature))
    return np.abs(frequencies - p) / np.sqrt(p * (1 - p) / draws + 1e-6)

  assert deviations(4.0).max() < 5
  assert deviations(3.5).max() > 5  # so that the line above says something


def test_each_step_draws_anew_and_a_cold_one_takes_the_likeliest(variables):
  prompt, key = jnp.asarray([[5, 6, 7]]), jax.random.key(0)
  hot = generate(MODEL, variables, prompt, max_new_tokens=8, temperature=1e4, key=key)
  assert len(set(np.asarray(hot)[0].tolist())) > 4
  cold = generate(MODEL, variables, prompt, max_new_tokens=8, temperature=1e-4, key=key)
  assert np.asarray(cold).tolist() == [greedy(variables, [5, 6, 7], 8)]


def test_a_row_that_ended_goes_on_with_eos(variables):
  rows = [greedy(variables, prompt, 6) for prompt in ([5, 6, 7], [11, 12, 13])]
  first, eos, *_ = rows[0]
  assert first != eos
  assert eos not in rows[1]
  prompts = jnp.asarray([[5, 6, 7], [11, 12, 13]])
  new = generate(MODEL, variables, prompts, max_new_tokens=6, eos_id=eos)
  assert np.asarray(new).tolist() == [[first, *[eos] * 5], rows[1]]
  new = generate(MODEL, variables, prompts, max_new_tokens=6, eos_id=first)
  assert np.asarray(new)[0].tolist() == [first] * 6


@pytest.mark.parametrize(
  ("prompt", "arguments", "message"),
  [
    ([1, 2], {}, r"prompt \[2\]"),
    ([[]], {}, r"prompt \[1, 0\]"),
    ([[1, 2]], {"max_new_tokens": 0}, "max_new_tokens 0"),
    ([[1, 2]], {"temperature": 0.5}, r"temperature 0\.5; .*key"),
    ([[1, 2]], {"temperature": -1.0}, r"temperature -1\.0"),
    ([[1, 2]], {"temperature": float("nan")}, "temperature nan"),
    ([[1, 2]], {"segment_ids": [[1]]}, r"segment_ids \[1, 1\]"),
    ([[1, 2], [3, 4]], {"segment_ids": [[1, 1], [0, 0]]}, "row 1 of the prompt is all padding"),
  ],
)
def test_errors(variables, prompt, arguments, message):
  with pytest.raises(ValueError, match=message):
    generate(MODEL, variables, jnp.asarray(prompt), **{"max_new_tokens": 2, **arguments})


def test_greedy_tokens_of_the_golden_model(shared):
  directory = shared / "golden" / "tiny_llama"
  golden = np.load(directory / "golden.npz")
  prompt, expected = golden["input_ids"][:1], golden["greedy_ids"]
  length = prompt.shape[1]
  model, frozen = hf.load(directory / "hf_fp32")
  variables = {"params": {}, "constants": {}, "frozen": frozen}
  new = generate(model, variables, prompt, max_new_tokens=expected.shape[1] - length)
  np.testing.assert_array_equal(expected[:, :length], prompt)
  np.testing.assert_array_equal(new, expected[:, length:])

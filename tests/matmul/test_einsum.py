import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import dequantize, quantize, quantized_einsum
from qlora_jax.matmul import stacked

SIZES = {"b": 2, "t": 3, "k": 16, "n": 6, "e": 4, "l": 2}


def operand(letters, seed):
  return jax.random.normal(jax.random.key(seed), [SIZES[letter] for letter in letters])


@pytest.mark.parametrize(
  ("equation", "x", "w"),
  [
    ("btk,kn->btn", "btk", "kn"),
    ("kn,btk->nbt", "btk", "kn"),
    ("kbt,kn->nbt", "kbt", "kn"),
    ("...k,kn->...n", "btk", "kn"),
    ("k,kn", "k", "kn"),
    ("tk,kn", "tk", "kn"),
    ("etk,ekn->etn", "etk", "ekn"),
    ("tek,ekn->tne", "tek", "ekn"),
    ("tk,ekn->ten", "tk", "ekn"),
    ("elk,lekn->n", "elk", "lekn"),
    ("tek,elkn->ltn", "tek", "elkn"),
    ("bte k, ekn -> bn", "btek", "ekn"),
    ("...k,kn->n...", "btk", "kn"),
    ("tk,kn->t", "tk", "kn"),
  ],
)
def test_any_contraction_along_the_blocks(equation, x, w):
  x, w = operand(x, 0), quantize(operand(w, 1), block_size=8)
  first_is_packed = equation.replace(" ", "").startswith("kn")

  def run(multiply, w):
    return multiply(equation, *((w, x) if first_is_packed else (x, w)))

  ours = jax.jit(lambda w: run(quantized_einsum, w))(w)
  expected = run(np.einsum, np.asarray(dequantize(w), np.float64))
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_gradient_and_a_dtype():
  w = quantize(operand("ekn", 1), block_size=8)
  x = operand("etk", 0)

  def loss(multiply, w):
    return lambda x: jnp.tanh(multiply("etk,ekn->tn", x, w)).sum()

  ours = jax.grad(loss(quantized_einsum, w))(x)
  np.testing.assert_allclose(ours, jax.grad(loss(jnp.einsum, dequantize(w)))(x), atol=1e-5)
  assert quantized_einsum("etk,ekn->tn", x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="implementation 'none such'"):
    quantized_einsum("etk,ekn->tn", x, w, implementation="none such")


@pytest.mark.parametrize(
  ("equation", "x", "w", "message"),
  [
    ("tn,kn->tk", "tn", "kn", "quantize jnp.swapaxes(w, -1, -2) and write 'nk' for it"),
    ("ek,ken->en", "ek", "ken", "quantize jnp.moveaxis(w, 0, -2) and write 'ekn' for it"),
    ("bkn,kn->bn", "bkn", "kn", "no way to pack it serves this"),
    ("bkn,kn->b", "bkn", "kn", "no way to pack it serves this"),
    ("tk,kn->tkn", "tk", "kn", "no way to pack it serves this"),
    ("tk,kn,kn->tn", "tk", "kn", "an equation of two operands"),
    ("tk,kn->tm", "tk", "kn", "output 'tm'; the operands' letters, once"),
    ("tek,kn->tn", "tk", "kn", "'tek' for an operand [3, 16]"),
    ("kt,kn->tn", "tk", "kn", "'k' is 3 and 16"),
    ("tk,...n->tn", "tk", "kn", "'...' in the packed operand"),
    ("tk,kn->...tn", "tk", "kn", "'...' in the output alone"),
    ("tk,k1->t1", "tk", "kn", "letters and one"),
  ],
)
def test_what_is_refused(equation, x, w, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    quantized_einsum(equation, operand(x, 0), quantize(operand(w, 1), block_size=8))


def test_the_transposition_that_is_named_serves():
  w, x = operand("kn", 1), operand("tn", 0)
  packed = quantize(jnp.swapaxes(w, -1, -2), block_size=2)
  ours = quantized_einsum("tn,nk->tk", x, packed)
  np.testing.assert_allclose(ours, x @ dequantize(packed), rtol=0, atol=1e-5)


def test_one_packed_operand_and_one_plain():
  w = quantize(operand("kn", 1), block_size=8)
  with pytest.raises(TypeError, match="ArrayImpl and ArrayImpl; one QuantizedTensor"):
    quantized_einsum("tk,kn->tn", operand("tk", 0), operand("kn", 1))
  with pytest.raises(TypeError, match="QuantizedTensor and QuantizedTensor; one"):
    quantized_einsum("kn,kn->", w, w)


def test_experts_of_a_layer_that_remembers_its_stack(monkeypatch):
  stack = quantize(jax.random.normal(jax.random.key(0), (2, 3, 64, 16)), block_size=32)
  x = jax.random.normal(jax.random.key(1), (3, 5, 64))
  layer = jax.tree.map(lambda leaf: leaf[1], stack)
  monkeypatch.setattr(stacked, "remembers", lambda: True)
  remembering = stacked.remembering(layer, stack, 1)
  assert remembering.stack is not None
  found, expected = (quantized_einsum("ecd,edf->ecf", x, w) for w in (remembering, layer))
  np.testing.assert_array_equal(found, expected)

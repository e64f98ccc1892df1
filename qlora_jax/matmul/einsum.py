"""quantized_einsum: a contraction of two operands, one of them packed, by its equation."""

import string

import jax
import jax.numpy as jnp

from qlora_jax.matmul import stacked
from qlora_jax.matmul.api import quantized_matmul
from qlora_jax.quantized_tensor import AnyQuantizedTensor, is_quantized


def quantized_einsum(
  equation: str,
  a: jax.Array | AnyQuantizedTensor,
  b: jax.Array | AnyQuantizedTensor,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """`jnp.einsum(equation, a, b)`, with one operand packed and contracted along its blocks.

  The packed one stands for `[..., K, N]`. Its letter of K is contracted with the other operand; its
  leading letters may be batches, contracted too, or its own alone (experts). Products are
  `quantized_matmul`'s, one for each matrix, in the array's dtype; what else is summed is summed in
  float32, of those.

  Args:
    equation: as of einsum. "..." may stand in the plain operand, and the output.
    a, b: one QuantizedTensor, and one array that `quantized_matmul` takes as x.
    implementation: of `quantized_matmul`.

  Returns:
    In the array's dtype.

  Raises:
    TypeError: not one packed and one plain operand.
    ValueError: an equation that is none of two operands, sizes that disagree, or a contraction that
      does not run along the packed operand's blocks: the message says how to pack it instead.

  >>> quantized_einsum("btd,df->btf", x, w)        # x · W
  >>> quantized_einsum("etd,edf->etf", x, experts)  # one matrix an expert
  """
  if is_quantized(a) == is_quantized(b):
    raise TypeError(
      f"quantized_einsum: {type(a).__name__} and {type(b).__name__}; one QuantizedTensor and one "
      "array are wanted"
    )
  terms, out = _parsed(equation)
  x_term, w_term = terms if is_quantized(b) else terms[::-1]
  x, w = (a, b) if is_quantized(b) else (b, a)
  assert is_quantized(w) and not is_quantized(x)
  x = jnp.asarray(x)
  x_term, out = _without_ellipsis(equation, x_term, w_term, out, x.ndim)
  sizes: dict[str, int] = {}
  for term, shape in ((x_term, x.shape), (w_term, w.shape)):
    if len(term) != len(shape) or len(set(term)) != len(term):
      raise ValueError(
        f"quantized_einsum: {equation!r}: {term!r} for an operand {list(shape)}; one letter for "
        "each axis, each once"
      )
    for letter, size in zip(term, shape, strict=True):
      if sizes.setdefault(letter, size) != size:
        raise ValueError(
          f"quantized_einsum: {equation!r}: {letter!r} is {sizes[letter]} and {size}"
        )
  if not set(out) <= set(sizes) or len(set(out)) != len(out):
    raise ValueError(f"quantized_einsum: {equation!r}: output {out!r}; the operands' letters, once")
  *leading, k, n = w_term
  if k not in x_term or k in out or n in x_term:
    raise ValueError(f"quantized_einsum: {equation!r}: {_transposition(x_term, w_term, out)}")

  gone = [i for i, letter in enumerate(x_term) if letter not in out and letter not in w_term]
  if gone:
    x = jnp.sum(x, gone, dtype=jnp.float32).astype(x.dtype)
    x_term = "".join(letter for i, letter in enumerate(x_term) if i not in gone)
  batch = [letter for letter in leading if letter in x_term]
  free = [letter for letter in x_term if letter not in w_term]
  x = jnp.transpose(x, [x_term.index(letter) for letter in (*batch, *free, k)])

  def product(x, w):
    return quantized_matmul(x, w, implementation=implementation)

  if leading:
    w = stacked.without(w)
  for letter in reversed(leading):
    product = jax.vmap(product, (0 if letter in batch else None, 0))
  y, term = product(x, w), [*leading, *free, n]
  summed = [i for i, letter in enumerate(term) if letter not in out]
  if summed:
    y = jnp.sum(y, summed, dtype=jnp.float32).astype(x.dtype)
    term = [letter for letter in term if letter in out]
  return jnp.transpose(y, [term.index(letter) for letter in out])


def _parsed(equation: str) -> tuple[list[str], str]:
  """The two operands' terms, and the output's."""
  terms, arrow, out = equation.replace(" ", "").partition("->")
  operands = terms.split(",")
  if len(operands) != 2:
    raise ValueError(f"quantized_einsum: {equation!r}; an equation of two operands is wanted")
  if not arrow:
    letters = "".join(operands).replace("...", "")
    out = "..." * ("..." in terms) + "".join(sorted(c for c in letters if letters.count(c) == 1))
  for term in (*operands, out):
    if not set(term.replace("...", "", 1)) <= set(string.ascii_letters):
      raise ValueError(f"quantized_einsum: {equation!r}: {term!r}; letters and one '...'")
  return operands, out


def _without_ellipsis(
  equation: str, x_term: str, w_term: str, out: str, ndim: int
) -> tuple[str, str]:
  """x's term and the output's, with letters in the place of "..."."""
  if "..." in w_term:
    raise ValueError(f"quantized_einsum: {equation!r}: '...' in the packed operand; write letters")
  if ("..." in out) and ("..." not in x_term):
    raise ValueError(f"quantized_einsum: {equation!r}: '...' in the output alone")
  count = ndim - len(x_term.replace("...", ""))
  unused = [c for c in string.ascii_letters if c not in x_term + w_term + out]
  letters = "".join(unused[: max(count, 0)])
  return x_term.replace("...", letters), out.replace("...", letters)


def _transposition(x_term: str, w_term: str, out: str) -> str:
  """Why a contraction is not served, and how the weight would have to be packed for it."""
  *leading, k, n = w_term
  why = f"the packed {w_term!r} has its blocks along {k!r}"
  contracted = [letter for letter in w_term if letter in x_term and letter not in out]
  if n in contracted and k not in contracted:
    return (
      f"{why}, and {n!r} is contracted; quantize jnp.swapaxes(w, -1, -2) and write "
      f"{''.join([*leading, n, k])!r} for it"
    )
  if contracted and k not in contracted:
    letter, rest = contracted[-1], [each for each in w_term if each != contracted[-1]]
    return (
      f"{why}, and {letter!r} is contracted; quantize "
      f"jnp.moveaxis(w, {w_term.index(letter)}, -2) and write "
      f"{''.join([*rest[:-1], letter, rest[-1]])!r} for it"
    )
  return f"{why}, and no way to pack it serves this; dequantize it"

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax.fingerprint import fingerprint

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
  "other",
  [
    {"a": jnp.asarray([1.0, 2.0, 3.5])},
    {"a": jnp.asarray([2.0, 1.0, 3.0])},
    {"a": jnp.asarray([1.0, 2.0, -3.0])},
    {"a": jnp.asarray([1.0, 2.0, 3.0], jnp.bfloat16)},
    {"a": jnp.asarray([[1.0, 2.0, 3.0]])},
    {"b": jnp.asarray([1.0, 2.0, 3.0])},
    {"a": jnp.asarray([1.0, -2.0, -3.0])},
  ],
  ids=["value", "order", "sign", "dtype", "shape", "path", "two signs"],
)
def test_fingerprint_tells_bases_apart(other):
  assert fingerprint({"a": jnp.asarray([1.0, 2.0, 3.0])}) != fingerprint(other)


def test_fingerprint_of_a_negated_or_permuted_weight_is_another():
  w = jax.random.normal(jax.random.key(0), (64, 32))
  others = [w, -w, w[::-1], w[:, ::-1], w.at[0, 0].set(w[0, 1]).at[0, 1].set(w[0, 0])]
  # The hard case of a checksum: x and −x change places.
  pair = jnp.asarray([1.0, -1.0])
  assert len({fingerprint({"a": other}) for other in others}) == len(others)
  assert fingerprint({"a": pair}) != fingerprint({"a": -pair})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "int32", "uint32"])
def test_fingerprint_sees_each_bit_of_each_dtype(dtype):
  def of(words: np.ndarray) -> str:
    return fingerprint({"a": jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.dtype(dtype))})

  bits = 8 * jnp.dtype(dtype).itemsize
  words = np.arange(1, 6, dtype=f"uint{bits}")
  seen = {of(words)}
  for place, bit in [(0, 0), (4, bits - 1), *((2, bit) for bit in range(bits))]:
    flipped = words.copy()
    flipped[place] ^= np.asarray(1, words.dtype) << np.asarray(bit, words.dtype)
    seen.add(of(flipped))
  assert len(seen) == 3 + bits


def test_fingerprint_of_flags_scalars_and_nothing():
  trees = [
    {"a": jnp.asarray([True, False])},
    {"a": jnp.asarray([False, True])},
    {"a": jnp.asarray(1.0)},
    {"a": jnp.asarray(-1.0)},
    {"a": jnp.zeros((0, 4))},
    {"a": jnp.zeros((4, 0))},
    {},
  ]
  assert len({fingerprint(tree) for tree in trees}) == len(trees)


def test_fingerprint_is_the_same_in_every_process():
  tree = {
    "q": ql.quantize(jnp.linspace(-1, 1, 512).reshape(64, 8)),
    "norm": jnp.ones(3, jnp.bfloat16),
    "scalar": jnp.asarray(2.0),
    "empty": jnp.zeros((0, 4)),
  }
  program = """
import jax.numpy as jnp, qlora_jax as ql
from qlora_jax.fingerprint import fingerprint
print(fingerprint({
  "q": ql.quantize(jnp.linspace(-1, 1, 512).reshape(64, 8)),
  "norm": jnp.ones(3, jnp.bfloat16),
  "scalar": jnp.asarray(2.0),
  "empty": jnp.zeros((0, 4)),
}))"""
  result = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == fingerprint(tree)

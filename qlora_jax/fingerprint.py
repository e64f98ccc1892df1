"""A short name of a tree's content, by which a run knows its base again."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import tree_paths


@dataclasses.dataclass(frozen=True)
class Checksum:
  """All that `fingerprint` takes of an array."""

  shape: tuple[int, ...]
  dtype: np.dtype
  bits: int


def checksum(x: Any) -> Checksum:
  """Of an array, that stands for it in a tree, so that arrays can be read one after another."""
  return Checksum(x.shape, x.dtype, int(_checksum(x)))


def fingerprint(tree: Any) -> str:
  """16 hexadecimal digits that name a tree's paths, shapes, dtypes and bits.

  A checksum a leaf is computed where the leaf lies, so that a base of gigabytes is not fetched.
  """
  digest = hashlib.sha256()
  for path, leaf in tree_paths.leaves(tree).items():
    own = leaf if isinstance(leaf, Checksum) else checksum(leaf)
    digest.update(f"{path} {own.shape} {own.dtype} {own.bits}\n".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(x, unsigned).reshape(-1).astype(jnp.uint32)
  # Each word is mixed with its place, so that a permutation shows; integer sums wrap around and
  # do not depend on the order. (Words times odd weights would not do: two float32 signs that
  # flip cancel, so W and −W would be one base.)
  places = jax.lax.iota(jnp.uint32, words.size)
  return _mix(words ^ _mix(places + np.uint32(0x9E3779B9))).sum(dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """MurmurHash3's finalizer: a bijection of 32 bits in which every bit moves half of them."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))

"""Paths of a parameter tree, and the patterns that choose among them.

A path is the keys from the root joined by "/": `layers/attn/q/kernel`. Layers that are
scanned over are stacked along a leading axis, under a key `layers`; patterns and errors
speak of each layer by a virtual path, `layers/3/attn/q/kernel`, though one array holds all.

A pattern is a shell pattern (`*`, `?`, `[0-9]`), matched against the whole path; `*` crosses
"/". The name of a projection's weight may be left off: `layers/*/attn/q` and
`layers/*/attn/q/kernel` choose the same arrays.
"""

import difflib
import fnmatch
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

_STACK = "layers"
_WEIGHT = "/kernel"


def leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """The leaves of `tree` by path, in the tree's order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {path_string(path): leaf for path, leaf in flat}


def path_string(path: tuple[Any, ...]) -> str:
  """JAX's key path as `a/b/c`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def module(path: str) -> str:
  """The path of the layer that a weight belongs to: `layers/attn/q` for `layers/attn/q/kernel`."""
  return path.removesuffix(_WEIGHT)


def is_stacked(path: str) -> bool:
  """Whether the leaf at `path` has a leading axis of layers.

  So it is below a key `layers` that is not itself a list of layers (`layers/0/…`).
  """
  return _stack(path.split("/")) is not None


def _stack(parts: list[str]) -> int | None:
  """Where the key of the stack stands, if there is one."""
  for i, (part, following) in enumerate(itertools.pairwise(parts)):
    if part == _STACK and not following.isdigit():
      return i
  return None


def per_layer(path: str, num_layers: int) -> list[str]:
  """The virtual paths of a stacked leaf: `layers/0/attn/q`, `layers/1/attn/q`, …"""
  parts = path.split("/")
  stack = _stack(parts)
  assert stack is not None, path
  head, tail = parts[: stack + 1], parts[stack + 1 :]
  return ["/".join([*head, str(layer), *tail]) for layer in range(num_layers)]


def _any_layer(path: str) -> str:
  """The pattern for all layers of a stack."""
  parts = path.split("/")
  stack = _stack(parts)
  return path if stack is None else "/".join([*parts[: stack + 1], "*", *parts[stack + 1 :]])


def layers(path: str, leaf: Any) -> list[str]:
  """The virtual paths of a leaf, one a layer; its own path where it is no stack."""
  if is_stacked(path) and leaf.ndim > 0:
    return per_layer(path, leaf.shape[0])
  return [path]


def is_matrix(path: str, leaf: Any) -> bool:
  """Whether a leaf is of `[..., K, N]` weights, the axis of layers not counted; else a vector."""
  return leaf.ndim - is_stacked(path) >= 2


def matches(pattern: str, path: str) -> bool:
  """Whether `pattern` chooses the (virtual) path of a leaf."""
  return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(module(path), pattern)


def no_match(pattern: str, paths: Iterable[str]) -> str:
  """The message for a pattern that chooses none of `paths`, with the nearest of them.

  A stack's own path is no pattern for it: `layers/attn/q` is near `layers/*/attn/q`.
  """
  modules = sorted({_any_layer(module(path)) for path in paths})
  near = difflib.get_close_matches(pattern, modules, 3, 0.3) or modules[:3]
  return f"pattern {pattern!r} matches no weight; near paths: {', '.join(near) or 'none'}"


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts from values by path: the inverse of `leaves` for trees of dicts."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def tree_bytes(tree: Any) -> int:
  """Of all leaves, arrays or shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax import quantize, tree_paths
from qlora_jax.quantized_tensor import is_quantized


def test_leaves_and_paths():
  tree = {"b": {"kernel": 1}, "a": [2, {"c": 3}]}
  assert tree_paths.leaves(tree) == {"a/0": 2, "a/1/c": 3, "b/kernel": 1}
  assert list(tree_paths.leaves(tree)) == ["a/0", "a/1/c", "b/kernel"]


def test_a_packed_weight_is_one_leaf_where_asked():
  tree = {"q": {"kernel": quantize(jnp.ones((8, 2)))}}
  assert list(tree_paths.leaves(tree, is_leaf=is_quantized)) == ["q/kernel"]
  assert "q/kernel/scales/offset" in tree_paths.leaves(tree)


@pytest.mark.parametrize(
  "path, expected",
  [
    ("layers/attn/q/kernel", "layers/attn/q"),
    ("kernel", "kernel"),
    ("layers/q/bias", "layers/q/bias"),
    ("layers/mykernel", "layers/mykernel"),
  ],
)
def test_module(path, expected):
  assert tree_paths.module(path) == expected


@pytest.mark.parametrize(
  "path, stacked",
  [
    ("layers/attn/q/kernel", True),
    ("model/layers/q", True),
    ("layers/0/attn/q/kernel", False),
    ("embed/embedding", False),
    ("layers", False),
    ("my_layers/q", False),
  ],
)
def test_is_stacked(path, stacked):
  assert tree_paths.is_stacked(path) is stacked


def test_per_layer():
  assert tree_paths.per_layer("model/layers/q/kernel", 2) == [
    "model/layers/0/q/kernel",
    "model/layers/1/q/kernel",
  ]
  # The stack is the key that no number follows.
  assert tree_paths.per_layer("layers/0/layers/q", 2) == [
    "layers/0/layers/0/q",
    "layers/0/layers/1/q",
  ]


@pytest.mark.parametrize(
  "pattern, path, hit",
  [
    ("layers/*/attn/q", "layers/3/attn/q/kernel", True),
    ("layers/*/attn/q/kernel", "layers/3/attn/q/kernel", True),
    ("*/q", "layers/3/attn/q/kernel", True),
    ("layers/[01]/*", "layers/1/mlp/up/kernel", True),
    ("layers/[01]/*", "layers/2/mlp/up/kernel", False),
    ("layers/?/*", "layers/10/mlp/up/kernel", False),
    ("q", "layers/3/attn/q/kernel", False),
    ("*/Q", "layers/3/attn/q/kernel", False),
    ("*/q", "layers/3/attn/q/bias", False),
  ],
)
def test_matches(pattern, path, hit):
  assert tree_paths.matches(pattern, path) is hit


def test_no_match_names_the_nearest():
  message = tree_paths.no_match("layers/*/atn/q", ["layers/0/attn/q/kernel", "embed/embedding"])
  assert message.startswith("pattern 'layers/*/atn/q' matches no weight; near paths: layers/0/attn")
  assert tree_paths.no_match("x", []).endswith("near paths: none")


KEYS = st.text("abc", min_size=1, max_size=3)
TREES = st.recursive(
  st.dictionaries(KEYS, st.integers(), min_size=1, max_size=3),
  lambda node: st.dictionaries(KEYS, node, min_size=1, max_size=3),
)


@given(TREES)
def test_nest_inverts_leaves(tree):
  assert tree_paths.nest(tree_paths.leaves(tree)) == tree
  assert list(tree_paths.leaves(tree).values()) == jax.tree.leaves(tree)

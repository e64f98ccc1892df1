import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax.checkpoints import BaseChangedError, Checkpoints, fingerprint

ROOT = Path(__file__).resolve().parents[1]


def state_of(value: float):
  return {
    "step": jnp.asarray(3, jnp.int32),
    "key": jnp.asarray([1, 2**32 - 1], jnp.uint32),
    "adapter": jnp.full((3, 4), value, jnp.float32),
    "moment": jnp.full((3, 4), value, jnp.bfloat16),
    "packed": ql.quantize(jnp.full((64, 8), value)),
  }


def opened(directory, keep=2, base="base") -> Checkpoints:
  return Checkpoints(directory, keep=keep, base_fingerprint=base)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_restores_the_newest_to_the_bit_and_keeps_the_last_ones(tmp_path):
  with opened(tmp_path) as checkpoints:
    assert checkpoints.restore(state_of(0.0)) is None
    for step in (1, 2, 5):
      checkpoints.save(step, state_of(0.1 * step))
    checkpoints.wait()
  with opened(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 5
    # Shapes are enough to say what is wanted.
    like = jax.eval_shape(lambda: state_of(0.0))
    assert_equal(checkpoints.restore(like), state_of(0.5))
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "5"]


def test_another_base_is_refused_naming_both(tmp_path):
  with opened(tmp_path, base="one") as checkpoints:
    checkpoints.save(1, state_of(1.0))
    checkpoints.wait()
  with (
    opened(tmp_path, base="two") as checkpoints,
    pytest.raises(BaseChangedError, match=r"base one, and this is base two"),
  ):
    checkpoints.restore(state_of(0.0))


def test_what_a_killed_write_leaves_is_no_checkpoint(tmp_path):
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, state_of(1.0))
    checkpoints.save(2, state_of(2.0))
    checkpoints.wait()
  shutil.move(tmp_path / "2", tmp_path / "2.orbax-checkpoint-tmp-0")
  with opened(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    assert_equal(checkpoints.restore(state_of(0.0)), state_of(1.0))
    checkpoints.save(2, state_of(4.0))
    checkpoints.wait()
    assert_equal(checkpoints.restore(state_of(0.0)), state_of(4.0))


@pytest.mark.parametrize(
  "other",
  [
    {"a": jnp.asarray([1.0, 2.0, 3.5])},
    {"a": jnp.asarray([2.0, 1.0, 3.0])},
    {"a": jnp.asarray([1.0, 2.0, -3.0])},
    {"a": jnp.asarray([1.0, 2.0, 3.0], jnp.bfloat16)},
    {"a": jnp.asarray([[1.0, 2.0, 3.0]])},
    {"b": jnp.asarray([1.0, 2.0, 3.0])},
  ],
  ids=["value", "order", "sign", "dtype", "shape", "path"],
)
def test_fingerprint_tells_bases_apart(other):
  assert fingerprint({"a": jnp.asarray([1.0, 2.0, 3.0])}) != fingerprint(other)


def test_fingerprint_is_the_same_in_every_process():
  tree = {
    "q": ql.quantize(jnp.linspace(-1, 1, 512).reshape(64, 8)),
    "norm": jnp.ones(3, jnp.bfloat16),
    "scalar": jnp.asarray(2.0),
    "empty": jnp.zeros((0, 4)),
  }
  program = """
import jax.numpy as jnp, qlora_jax as ql
from qlora_jax.checkpoints import fingerprint
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

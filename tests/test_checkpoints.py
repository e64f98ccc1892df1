import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax.checkpoints import BaseChangedError, CheckpointError, Checkpoints

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


def test_another_base_is_refused_even_where_the_state_has_other_shapes(tmp_path):
  with opened(tmp_path, base="one") as checkpoints:
    checkpoints.save(1, {"adapter": jnp.ones((3, 4))})
    checkpoints.wait()
  with (
    opened(tmp_path, base="two") as checkpoints,
    pytest.raises(BaseChangedError, match=r"base one, and this is base two"),
  ):
    checkpoints.restore({"adapter": jnp.ones((5, 4)), "more": jnp.ones(2)})


# An event loop of Orbax's, closed while files are still read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lost", ["state", "position", "state/manifest.ocdbt", "state/d", "."])
def test_a_checkpoint_with_files_missing_says_what_to_do(tmp_path, lost):
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, state_of(1.0))
    checkpoints.save(2, state_of(2.0))
    checkpoints.wait()
  path = tmp_path / "2" / lost
  path.unlink() if path.is_file() else shutil.rmtree(path)
  path.parent.mkdir(exist_ok=True)
  if lost == ".":
    path.mkdir()
  with opened(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError) as raised:
      checkpoints.restore(state_of(0.0))
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / '2'}: ")
    assert message.endswith("remove that directory to go on from step 1")
    assert "\n" not in message
  shutil.rmtree(tmp_path / "2")
  with opened(tmp_path) as checkpoints:
    assert_equal(checkpoints.restore(state_of(0.0)), state_of(1.0))


def test_a_state_of_another_structure_is_one_line_too(tmp_path):
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, {"adapter": jnp.ones((3, 4))})
    checkpoints.wait()
    for other in ({"adapter": jnp.ones((5, 4))}, {"other": jnp.ones((3, 4))}):
      with pytest.raises(CheckpointError, match=r"/1: state cannot be read .* from the start$"):
        checkpoints.restore(other)


def test_a_state_that_the_next_step_donates_is_saved_as_it_was(tmp_path):
  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    return jax.tree.map(lambda x: x + 1, state)

  state = {str(i): jnp.zeros((500, 1000)) for i in range(4)}
  with opened(tmp_path, keep=4) as checkpoints:
    for i in range(1, 5):
      state = step(state)
      checkpoints.save(i, state)
      for _ in range(5):
        state = step(state)
      state = jax.tree.map(lambda x, i=i: jnp.full_like(x, i), state)
    checkpoints.wait()
  for i in range(4, 0, -1):
    with opened(tmp_path) as checkpoints:
      restored = checkpoints.restore(state)
    assert restored is not None
    for leaf in restored.values():
      assert (np.asarray(leaf) == i).all()
    shutil.rmtree(tmp_path / str(i))

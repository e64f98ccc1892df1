"""Checkpoints of a run: adapters, optimizer and data position, through Orbax.

The base is not in them: it is named by a fingerprint, which a resumed run must match.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax import tree_paths


class BaseChangedError(ValueError):
  """The checkpoint belongs to another base."""


class Checkpoints:
  """The checkpoints of one run directory.

  Saving is asynchronous and atomic: a checkpoint appears under its step's name when it is
  whole, and a process killed while it writes leaves the one before as the latest.

  Args:
    directory: made where it is missing.
    keep: the latest so many stay.
    base_fingerprint: of the frozen tree (`fingerprint`), stored in each checkpoint.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int, base_fingerprint: str):
    self.directory = Path(directory).absolute()
    self._fingerprint = base_fingerprint
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest_step(self) -> int | None:
    """The step of the newest whole checkpoint; None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any) -> None:
    """Saves `state` after `step` optimizer steps; returns before it is on the disk."""
    position = {"next_batch": step, "base_fingerprint": self._fingerprint}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
      ),
    )

  def restore(self, like: Any) -> Any | None:
    """The newest state, or None where there is none.

    Args:
      like: a state of the same structure, of arrays or shapes.

    Raises:
      BaseChangedError: it was trained on another base; the message names both fingerprints.
    """
    step = self.latest_step()
    if step is None:
      return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
      ),
    )
    stored = restored["position"]["base_fingerprint"]
    if stored != self._fingerprint:
      raise BaseChangedError(
        f"{self.directory}: step {step} was trained on base {stored}, and this is base "
        f"{self._fingerprint}; give the original base, or another directory"
      )
    return restored["state"]

  def wait(self) -> None:
    """Returns when all that was saved is on the disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def fingerprint(tree: Any) -> str:
  """16 hexadecimal digits that name a tree's paths, shapes, dtypes and bits.

  A checksum a leaf is computed where the leaf lies, so that a base of gigabytes is not fetched.
  """
  digest = hashlib.sha256()
  for path, leaf in tree_paths.leaves(tree).items():
    digest.update(f"{path} {leaf.shape} {leaf.dtype} {int(_checksum(leaf))}\n".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(x, unsigned).reshape(-1).astype(jnp.uint32)
  # Odd weights that differ by place, so that a permutation shows; integer sums wrap around and
  # do not depend on the order.
  places = jax.lax.iota(jnp.uint32, words.size) * np.uint32(2654435761) | np.uint32(1)
  return (words * places).sum(dtype=jnp.uint32)

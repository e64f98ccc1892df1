"""Checkpoints of a run: adapters, optimizer and data position, through Orbax.

The base is not in them: it is named by a fingerprint, which a resumed run must match.
"""

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class BaseChangedError(ValueError):
  """The checkpoint belongs to another base."""


class CheckpointError(ValueError):
  """The newest checkpoint cannot be read; the message names its directory and what to do."""


class Checkpoints:
  """The checkpoints of one run directory.

  Saving is asynchronous and atomic: a checkpoint appears under its step's name when it is
  whole, and a process killed while it writes leaves the one before as the latest.

  Args:
    directory: made where it is missing.
    keep: the latest so many stay.
    base_fingerprint: of the frozen tree (`qlora_jax.fingerprint`), stored in each checkpoint.
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
      CheckpointError: it is damaged, or of another structure than `like`.
    """
    step = self.latest_step()
    if step is None:
      return None
    # First and apart: a state of another base may not even have the shapes of `like`.
    position = self._read(step, "position", ocp.args.JsonRestore())
    stored = position["base_fingerprint"]
    if stored != self._fingerprint:
      raise BaseChangedError(
        f"{self.directory}: step {step} was trained on base {stored}, and this is base "
        f"{self._fingerprint}; give the original base, or another directory"
      )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._read(step, "state", ocp.args.StandardRestore(abstract))

  def _read(self, step: int, item: str, args: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:
      # Orbax raises all kinds, some of many lines.
      reason = (str(error).splitlines() or [""])[0][:200]
      earlier = [other for other in self._manager.all_steps() if other < step]
      start = f"step {max(earlier)}" if earlier else "the start"
      raise CheckpointError(
        f"{self.directory / str(step)}: {item} cannot be read ({type(error).__name__}: {reason}); "
        f"remove that directory to go on from {start}"
      ) from error

  def wait(self) -> None:
    """Returns when all that was saved is on the disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

"""Several trials of a sweep in one process, those that share a base trained in one program.

Each trial is its own run: the generator of `trial.steps`, which loads, resumes, evaluates, records
and saves as it does alone, and leaves the steps of its trainings to the caller. Here these are
taken for several trials at once (`qlora_jax.trial_groups`). So a trial's directory is the same,
whether it ran alone or in a group, and it may go on either way from where it was stopped: a
checkpoint holds the trial's own shapes, without the group's padding. Alone or with others, it
computes the same but for the order of float additions; to the last bit it does so again in a group
of the same size and the same padded ranks.

A trial that fails, or whose loss is not finite, leaves the group, and so does one that is ahead
of the others because it was stopped later. Its place in the program stays, masked, and the others
do not notice: a program of another size would be another one to compile, and would round otherwise.
Groups are made anew only from checkpoints (a later rung of halving, or the command given again);
a trial's summary says in which ones it was, and of which rank (`trials_together`).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from experiments import planned, trial
from experiments.trial import Shared, Steps, Training
from qlora_jax import memory, optimizers, sweeps, trial_groups
from qlora_jax.train import Interrupted, SignalGuard, TrainState

# Of an accelerator; on a CPU see `default_size`.
MOST_TRIALS = 64


def default_size() -> int:
  """How many trials a group has where nothing is said: as many as fit, on an accelerator.

  On a CPU one. There a step's products take the time, which grows with the trials, and padding
  adapters to the largest rank costs as much as it saves (README, Ablations).
  """
  return 1 if jax.default_backend() == "cpu" else MOST_TRIALS


class _Member:
  """A trial that runs with others, and where what it prints goes."""

  def __init__(self, steps: Steps[dict[str, Any]], log: TextIO):
    self._steps, self._log = steps, log
    self.training: Training | None = None
    self.result: dict[str, Any] | Exception | None = None

  @contextlib.contextmanager
  def printing(self) -> Iterator[None]:
    """What is printed meanwhile goes to its log."""
    with contextlib.redirect_stdout(self._log), contextlib.redirect_stderr(self._log):
      yield

  def go(self, state: TrainState | None = None) -> None:
    """On to the next training, from the last one's end."""
    self.training = None
    try:
      with self.printing():
        training = next(self._steps) if state is None else self._steps.send(state)
        self.training = dataclasses.replace(training, state=_on_the_host(training.state))
    except StopIteration as finished:
      self.result = finished.value
    except Interrupted:  # of the training of a base
      raise
    except Exception as error:
      self.result = error

  def fail(self, error: Exception) -> None:
    """Ends it."""
    self.training, self.result = None, error
    with self.printing():
      self._steps.close()

  def close(self) -> None:
    with self.printing():
      self._steps.close()


def _on_the_host(state: TrainState) -> TrainState:
  """A copy; what trials that wait, or the stack is made of, had on the device is freed."""
  copy = jax.tree.map(np.array, state)
  for leaf in jax.tree.leaves((state.params, state.opt_state)):
    leaf.delete()
  return copy


def run(
  trials: Sequence[tuple[Steps[dict[str, Any]], TextIO]],
  size: int,
  shared: Shared,
  guard: SignalGuard,
) -> list[dict[str, Any] | Exception]:
  """Runs trials together.

  Args:
    trials: of each `trial.steps`, with this guard, and what its output goes to.
    size: at most so many train in one program; fewer where the memory asks for it.
    shared: of the trials.
    guard: entered while they train.

  Returns:
    The summary of each, or the error that ended it.

  Raises:
    train.Interrupted: a signal came; all trials that were training have saved.
  """
  members = [_Member(*each) for each in trials]
  with contextlib.ExitStack() as stack:
    for member in members:
      stack.callback(member.close)
    for member in members:
      member.go()
    while ready := [member for member in members if member.training is not None]:
      together: dict[Hashable, list[_Member]] = {}
      for member in ready:
        assert member.training is not None
        together.setdefault(_program(member.training), []).append(member)
      _train(next(iter(together.values())), size, shared, guard)
  results = [member.result for member in members]
  assert all(result is not None for result in results)
  return results  # pyright: ignore[reportReturnType]


def _program(training: Training) -> Hashable:
  """Equal for trainings that one program serves, but for what is padded."""
  return sweeps.group_identity(training.config), training.model, id(training.frozen)


def _train(members: Sequence[_Member], size: int, shared: Shared, guard: SignalGuard) -> None:
  """Trains the first of `members`, as many as fit in one program, and lets them go on."""
  program = _program(_trainings(members)[0])
  # What did not fit is not compiled again for those that come after.
  sizes: dict[Hashable, int] = shared.once("group_sizes", None, dict)
  # Of like sizes, so that they are one program: 9 trials in threes rather than in fours and one.
  count = _largest_part(len(members), min(size, sizes.get(program, size)))
  try:
    while count > 1 and not _fits(members[:count], shared):
      sizes[program] = (count + 1) // 2
      count = _largest_part(len(members), sizes[program])
    with guard:
      train = _train_alone if count == 1 else _train_together
      ended = train(members[:count], shared)
  except Interrupted:
    raise
  except Exception as error:  # of the program, which is that of all
    for member in members[:count]:
      if member.training is not None:
        member.fail(error)
    return
  for member, state in ended:
    member.go(state)


def _largest_part(count: int, most: int) -> int:
  """Of `count` in equal parts of at most `most`, the larger ones where they differ by one."""
  return -(-count // -(-count // most))


def _train_alone(members: Sequence[_Member], shared: Shared) -> list[tuple[_Member, TrainState]]:
  (member,), (training,) = members, _trainings(members)
  with member.printing():
    return [(member, trial.train_alone(training, shared))]


def _trainings(members: Sequence[_Member]) -> list[Training]:
  found = [member.training for member in members]
  assert all(training is not None for training in found)
  return found  # pyright: ignore[reportReturnType]


def _wide(trainings: Sequence[Training]) -> TrainState:
  first = trainings[0]
  return trial_groups.widest([each.state for each in trainings], first.optimizer, first.model.dtype)


def _step(training: Training, shared: Shared) -> trial_groups.GroupStep:
  """The step of a group, one for all groups that it serves."""
  train = training.config.train
  model = training.model.clone(unroll=training.config.model.unroll)
  # Learning rates are data, so those of the config stand in no program.
  cfg = dataclasses.replace(
    training.config.optimizer, learning_rate=1.0, schedule="constant", warmup_steps=0
  )
  return shared.once(
    "group_step",
    (model, cfg, train.steps, train.loss_chunk, train.z_loss),
    lambda: trial_groups.make_group_step(
      model,
      functools.partial(optimizers.make, cfg, train.steps),
      train.loss_chunk,
      train.z_loss,
    ),
    keep=16,
  )


def _fits(members: Sequence[_Member], shared: Shared) -> bool:
  """Whether the group's step fits in memory, by the compiler's own account."""
  trainings = _trainings(members)
  first, count = trainings[0], len(trainings)
  train, seq_len = first.config.train, first.config.data.seq_len
  states = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), _wide(trainings)
  )
  shape = (count, train.accumulate_steps, train.batch_size, seq_len)
  ids = jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = {"tokens": ids, "targets": ids, "loss_mask": jax.ShapeDtypeStruct(shape, jnp.bool_)}
  if first.config.data.packing:
    batch |= {"segment_ids": ids, "positions": ids}
  rates = jax.ShapeDtypeStruct((count, train.steps), jnp.float32)
  learning = jax.ShapeDtypeStruct((count,), jnp.bool_)
  arguments = (states, rates, learning, first.frozen, batch)
  available = memory.available_bytes(first.frozen)
  needed = memory.compiled_bytes(_step(first, shared), *arguments)
  if needed is None:
    print(f"{count} trials together: more than the compiler had, of {available / 1e9:.2f} GB")
    return False
  print(f"{count} trials together: {needed / 1e9:.2f} GB, of {available / 1e9:.2f} GB")
  return needed <= available


def _read(metrics: Any, explain: Callable[[], str]) -> Any:
  with planned.out_of_memory_explained(explain):
    return jax.device_get(metrics)


def _train_together(members: Sequence[_Member], shared: Shared) -> list[tuple[_Member, TrainState]]:
  """Takes the steps of several trainings at once; those that came to their end, and how."""
  trainings = _trainings(members)
  first, likes = trainings[0], [each.state for each in trainings]
  step = _step(first, shared)
  wide = _wide(trainings)
  configs = [each.config for each in trainings]
  explain = functools.cache(
    lambda: planned.group_explained(configs, first.model, first.frozen, wide)
  )
  with planned.out_of_memory_explained(explain):
    states = trial_groups.stack([each.state for each in trainings], wide)
  rates = jnp.asarray(
    np.stack(
      [optimizers.rates(each.config.optimizer, each.config.train.steps) for each in trainings]
    )
  )
  batches: dict[int, Any] = {}
  learning = set(range(len(members)))
  ended: dict[int, TrainState] = {}
  stopped: Interrupted | None = None

  def advance(i: int, take: Callable[[], Any]) -> None:
    nonlocal stopped
    try:
      with members[i].printing():
        batches[i] = take()
      return
    except StopIteration:
      # To the host: all of a group may end at once, and the stack is there until they have.
      ended[i] = jax.device_get(trial_groups.unstack(states, i, likes[i]))
    except Interrupted as error:
      stopped = error  # once each of the others has saved too
    except Exception as error:
      members[i].fail(error)
    learning.discard(i)

  group = {"trials_together": len(members), "padded_rank": trial_groups.rank(wide)}
  for i, training in enumerate(trainings):
    training.writer.write(int(training.state.step), group)
    advance(i, functools.partial(next, training.loop))
  while learning:
    # One that has left is given what another one learns from.
    some = batches[min(learning)]
    together = trial_groups.stack_batches(
      [batches[i] if i in learning else some for i in range(len(members))]
    )
    mask = jnp.asarray([i in learning for i in range(len(members))])
    with planned.out_of_memory_explained(explain):
      states, metrics = step(states, rates, mask, first.frozen, together)
    # Read once for all trials, when the first one asks.
    read = functools.cache(functools.partial(_read, metrics, explain))
    for i in sorted(learning):
      done = (
        functools.partial(trial_groups.unstack, states, i, likes[i]),
        lambda i=i, read=read: {name: value[i] for name, value in read().items()},
      )
      advance(i, functools.partial(trainings[i].loop.send, done))
  if stopped is not None:
    raise stopped
  return [(members[i], ended[i]) for i in sorted(ended)]

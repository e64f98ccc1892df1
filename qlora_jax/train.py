"""The train step and the loop around it.

`train_step(state, frozen, batch)` is pure and jitted; it donates `state`, which holds the
adapters and their optimizer and nothing of the base. A step's randomness comes from the
state's key and step number, its batch from the seed and the step number, so that a run that
was killed goes on to the same numbers.
"""

import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from qlora_jax.checkpoints import Checkpoints
from qlora_jax.config import TrainConfig
from qlora_jax.losses import chunked_cross_entropy
from qlora_jax.metrics import MetricsWriter, Progress
from qlora_jax.models.transformer import Transformer

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]

# float16 starts here, doubles after so many good steps and halves at an overflow.
_FIRST_LOSS_SCALE = 2.0**15
_LOSS_SCALE_PERIOD = 200

# Seconds: metrics that are read in less were there already.
_AT_ONCE = 1e-3


class NonFiniteLossError(RuntimeError):
  """A loss or the gradient became NaN or infinite; the message names the step."""


class Paused(Exception):
  """Training stands at `step`, which is saved, as it was asked to."""

  def __init__(self, step: int):
    super().__init__(f"paused at step {step}")
    self.step = step


class Interrupted(Exception):
  """SIGINT or SIGTERM came, after `step`; `saved` says whether a checkpoint holds that step."""

  def __init__(self, signal_number: int, step: int, *, saved: bool):
    super().__init__(f"{signal.Signals(signal_number).name} at step {step}")
    self.signal_number = signal_number
    self.step = step
    self.saved = saved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a step changes, and what a checkpoint holds.

  Attributes:
    step: optimizer steps done, int32, skipped ones included.
    params: the adapters, float32.
    constants: their scalings, ranks and dropout rates; never trained.
    opt_state: Optax's, of params alone.
    key: `[2]` uint32, the raw data of the dropout key.
    loss_scale: float32; 1 but for float16.
    good_steps: int32, since the loss scale last changed.
    skipped: int32, steps whose gradient overflowed and was thrown away (float16 alone).
  """

  step: jax.Array
  params: Any
  constants: Any
  opt_state: Any
  key: jax.Array
  loss_scale: jax.Array
  good_steps: jax.Array
  skipped: jax.Array


def init_state(
  params: Any,
  constants: Any,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  dtype: DTypeLike,
) -> TrainState:
  """A state at step 0.

  Args:
    params, constants: from `lora.init`, or a whole float32 base as params.
    seed: of dropout.
    dtype: the model's compute dtype; float16 gets a loss scale.
  """
  scale = _FIRST_LOSS_SCALE if jnp.dtype(dtype) == jnp.float16 else 1.0
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    constants=constants,
    opt_state=optimizer.init(params),
    key=jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
    loss_scale=jnp.asarray(scale, jnp.float32),
    good_steps=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
  )


def _head(model: Transformer, trained: Any, fixed: Mapping[str, Any], hidden: jax.Array) -> Any:
  return model.apply({**fixed, "params": trained}, hidden, method="logits")


def batch_loss(
  model: Transformer,
  variables: Mapping[str, Any],
  batch: Batch,
  loss_chunk: int,
  dropout_key: jax.Array | None = None,
  z_loss: float = 0.0,
) -> jax.Array:
  """The summed cross entropy of a `[B, T]` batch, in nats.

  Args:
    batch: `tokens`, `targets`, `loss_mask`, and `segment_ids` and `positions` where rows hold
      several documents.
    loss_chunk: tokens whose logits exist at once.
    z_loss: see `losses.cross_entropy`.
  """
  hidden: Any = model.apply(
    variables,
    batch["tokens"],
    batch.get("segment_ids"),
    batch.get("positions"),
    method="hidden",
    rngs=None if dropout_key is None else {"dropout": dropout_key},
  )
  # What the head reads: its own, or the table that it is tied to.
  names = ("embed", "head") if model.config.tie_embeddings else ("head",)
  read = {
    collection: {name: tree[name] for name in names if name in tree}
    for collection, tree in variables.items()
  }
  return chunked_cross_entropy(
    functools.partial(_head, model),
    loss_chunk,
    z_loss,
    read.pop("params"),
    read,
    hidden,
    batch["targets"],
    batch["loss_mask"],
  )


TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def make_train_step(
  model: Transformer,
  optimizer: optax.GradientTransformation,
  loss_chunk: int = 1024,
  z_loss: float = 0.0,
) -> TrainStep:
  """`step_function`, jitted; it donates the state."""
  return jax.jit(step_function(model, optimizer, loss_chunk, z_loss), donate_argnums=0)


def step_function(
  model: Transformer,
  optimizer: optax.GradientTransformation,
  loss_chunk: int = 1024,
  z_loss: float = 0.0,
) -> TrainStep:
  """Builds `train_step(state, frozen, batch) → (state, metrics)`, to be jitted or mapped.

  The batch's arrays are `[A, B, T]`: A microbatches, whose gradients are summed and divided
  once by the count of all their targets, so that accumulation is exact for unequal counts
  (never a mean of means).

  Under float16 the loss is multiplied by a scale; a step whose gradient overflows changes
  nothing but halves the scale and is counted in `skipped`.

  Metrics: `loss` (nats a target, the z-loss with it), `grad_norm` (before clipping), `targets`,
  `loss_scale`, `skipped`, all scalars.
  """
  scaled = jnp.dtype(model.dtype) == jnp.float16

  def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
    targets = batch["loss_mask"].sum(dtype=jnp.int32)
    # 1 in place of 0: a batch without targets has loss and gradient 0.
    share = state.loss_scale / jnp.maximum(targets, 1).astype(jnp.float32)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)

    def loss(params, microbatch, i):
      variables = {"params": params, "constants": state.constants, "frozen": frozen}
      dropout_key = jax.random.fold_in(key, i)
      total = batch_loss(model, variables, microbatch, loss_chunk, dropout_key, z_loss)
      return total * share

    def accumulate(sums, microbatch):
      loss_sum, grads, i = sums
      value, grad = jax.value_and_grad(loss)(state.params, microbatch, i)
      return (loss_sum + value, jax.tree.map(jnp.add, grads, grad), i + 1), None

    zeros = (
      jnp.zeros((), jnp.float32),
      jax.tree.map(jnp.zeros_like, state.params),
      jnp.zeros((), jnp.int32),
    )
    (value, grads, _), _ = jax.lax.scan(accumulate, zeros, dict(batch))
    value = value / state.loss_scale
    grads = jax.tree.map(lambda g: g / state.loss_scale.astype(g.dtype), grads)
    grad_norm = optax.tree.norm(grads)
    # Optax mixes dtypes freely.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    if scaled:
      new = _keep_if_finite(state, new, jnp.isfinite(grad_norm) & jnp.isfinite(value))
    metrics = {
      "loss": value,
      "grad_norm": grad_norm,
      "targets": targets,
      "loss_scale": new.loss_scale,
      "skipped": new.skipped,
    }
    return new, metrics

  return train_step


def _keep_if_finite(old: TrainState, new: TrainState, finite: jax.Array) -> TrainState:
  """`new` where its gradient was finite, else `old` with half the loss scale, one step on."""

  def pick(new, old):
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  grow = new.good_steps + 1 >= _LOSS_SCALE_PERIOD
  grown = jnp.where(grow, old.loss_scale * 2, old.loss_scale)
  return dataclasses.replace(
    new,
    params=pick(new.params, old.params),
    opt_state=pick(new.opt_state, old.opt_state),
    loss_scale=jnp.where(finite, grown, old.loss_scale / 2),
    good_steps=jnp.where(finite & ~grow, old.good_steps + 1, 0),
    skipped=old.skipped + (~finite).astype(jnp.int32),
  )


class BatchSource(Protocol):
  """What `fit` trains on: `data.Batches`, or one's own."""

  def batch(self, step: int, /) -> Batch:
    """The `[A, B, T]` arrays of one optimizer step, a pure function of its number."""
    ...


class SignalGuard:
  """Turns the first SIGINT or SIGTERM into a flag; a second one ends the process as usual.

  with SignalGuard() as guard: … guard.received
  """

  def __init__(self):
    self.received: int | None = None
    self._previous: dict[int, Any] = {}

  def _receive(self, number, frame):
    del frame
    self.received = number
    self.__exit__()
    # Not print: a handler may run in the middle of another print.
    os.write(2, b"\nstopping after this step; once more to stop at once\n")

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous.clear()


def fit(
  state: TrainState,
  *,
  train_step: TrainStep,
  frozen: Any,
  batches: BatchSource,
  cfg: TrainConfig,
  learning_rate: Callable[[int], Any],
  guard: SignalGuard,
  evaluate: Callable[[TrainState], float] | None = None,
  checkpoints: Checkpoints | None = None,
  writer: MetricsWriter | None = None,
  description: str = "train",
) -> TrainState:
  """Trains from `state.step` to `cfg.steps`.

  Saves every `cfg.checkpoint_every` steps, at the end, and when a signal came; a state is
  saved only once its loss is known to be finite. Metrics are read one step late, so that the
  host never waits for the device but to log, to evaluate and to save.

  With a step's metrics go `tokens_per_second` and `waiting_for_data`, both since the line before;
  the latter is the share of the time in which batches were made while no step was under way, at
  most. With the first, `compile_seconds`: what tracing and compiling the step took.

  Args:
    batches: of step i is `batches.batch(i)`.
    learning_rate: by step, for the record.
    evaluate: held-out loss of a state, in nats a token.
    writer: gets `loss`, `grad_norm`, …, `held_out_loss`.

  Raises:
    NonFiniteLossError: a loss, held-out or trained on, or a gradient was NaN or infinite; the
      last good checkpoint stays.
    Interrupted: a signal came; the state was saved, if there are `checkpoints`.
  """
  loop = fit_loop(
    int(state.step),
    batches=batches,
    cfg=cfg,
    learning_rate=learning_rate,
    guard=guard,
    evaluate=evaluate,
    checkpoints=checkpoints,
    writer=writer,
    description=description,
  )
  return drive(state, train_step, frozen, loop)


# What a loop is told of a step: the state, and the metrics, each when it asks.
Done = tuple[Callable[[], TrainState], Callable[[], Mapping[str, Any]]]


def drive(
  state: TrainState, train_step: TrainStep, frozen: Any, loop: Generator[Batch, Done, None]
) -> TrainState:
  """Takes the steps that a `fit_loop` wants; returns the state after the last."""
  try:
    batch = next(loop)
    while True:
      state, metrics = train_step(state, frozen, batch)
      batch = loop.send((lambda state=state: state, lambda metrics=metrics: metrics))
  except StopIteration:
    return state


def fit_loop(
  start: int,
  *,
  batches: BatchSource,
  cfg: TrainConfig,
  learning_rate: Callable[[int], Any],
  guard: SignalGuard,
  evaluate: Callable[[TrainState], float] | None = None,
  checkpoints: Checkpoints | None = None,
  writer: MetricsWriter | None = None,
  description: str = "train",
  until: int | None = None,
) -> Generator[Batch, Done, None]:
  """All of `fit` but its steps, which whoever drives it takes: of one training, or of several.

  Yields the batch of each step after `start`, and is sent what it came to.

  Args:
    start: steps that are done.
    batches, …: see `fit`.
    until: the step at which it saves and pauses, if it is not the last; None for none.

  Raises:
    NonFiniteLossError, Interrupted: see `fit`.
    Paused: it is at `until`.
  """
  if until is not None and until <= start < cfg.steps:
    raise Paused(start)
  pending: tuple[int, Callable[[], Mapping[str, Any]]] | None = None
  compiling: float | None = None  # seconds, until they are written
  made = waited = 0.0  # seconds: of the last batch; of all since the line before
  line_at = time.monotonic()

  def next_batch(step: int) -> Batch:
    nonlocal made
    start = time.monotonic()
    batch = batches.batch(step)
    made = time.monotonic() - start
    return batch

  def settle(progress: Progress) -> None:
    nonlocal pending, compiling, waited, line_at
    if pending is None:
      return
    step, metrics = pending
    pending = None
    start = time.monotonic()
    values = {name: np.asarray(value).item() for name, value in metrics().items()}
    now = time.monotonic()
    if now - start < _AT_ONCE < made:
      # The step was done before the batch after it, which this one waited for.
      waited += made
    _check(step, values)
    progress.advance(tokens=values["targets"])
    if step % cfg.log_every == 0 or step == cfg.steps:
      share = waited / max(now - line_at, waited, 1e-9)
      waited, line_at = 0.0, now
      shown: dict[str, Any] = {"loss": values["loss"]}
      if share >= 0.01:
        shown["waiting for data"] = f"waiting for data {share:.0%}"
      values["waiting_for_data"] = share
      if compiling is not None:
        shown["compiling"] = f"compiled in {compiling:.1f} s"
        values["compile_seconds"], compiling = compiling, None
      speed = progress.log(shown)
      if writer is not None:
        # A skipped step does not move the schedule on.
        rate = float(learning_rate(max(step - 1 - values["skipped"], 0)))
        writer.write(step, {**values, "learning_rate": rate, "tokens_per_second": speed})

  with Progress(cfg.steps, initial_step=start, description=description) as progress:
    for step in range(start + 1, cfg.steps + 1):
      batch = next_batch(step - 1)
      asked = time.monotonic()
      state, metrics = yield batch
      if step == start + 1:
        # A step is only begun when it is called, but for the first, which is compiled.
        compiling = time.monotonic() - asked
      settle(progress)
      pending = (step, metrics)
      last = step == cfg.steps
      # Evaluated before it is saved: a run that resumes here has the line already.
      if evaluate is not None and (last or step % cfg.eval_every == 0):
        settle(progress)
        loss = evaluate(state())
        _check_finite(step, "held-out loss", loss)
        progress.log({"held-out loss": loss})
        if writer is not None:
          writer.write(step, {"held_out_loss": loss})
      # Read once: a signal between two looks would raise without having saved.
      received = guard.received
      pause = step == until and not last
      if received is not None or last or pause or step % cfg.checkpoint_every == 0:
        settle(progress)
        if checkpoints is not None:
          checkpoints.save(step, state())
      if received is not None:
        if checkpoints is not None:
          checkpoints.wait()
        raise Interrupted(received, step, saved=checkpoints is not None)
      if pause:
        if checkpoints is not None:
          checkpoints.wait()
        raise Paused(step)
  if checkpoints is not None:
    checkpoints.wait()
  if guard.received is not None:
    # It came while the last checkpoint was written: what would follow this training does not.
    raise Interrupted(guard.received, cfg.steps, saved=checkpoints is not None)


def _check(step: int, values: Mapping[str, float]) -> None:
  if values["loss_scale"] != 1.0 and values["loss_scale"] >= 1.0:
    # float16: an overflow was skipped and halves the scale; only its end is an error.
    return
  for name in ("loss", "grad_norm"):
    _check_finite(step, name, values[name])


def _check_finite(step: int, name: str, value: float) -> None:
  if not math.isfinite(value):
    raise NonFiniteLossError(
      f"step {step}: {name} is {value}; training stopped. Lower "
      "optimizer.learning_rate, or set optimizer.clip_norm; float16 may need model.dtype=bfloat16"
    )

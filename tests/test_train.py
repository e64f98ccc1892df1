import dataclasses
import os
import signal
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as ql
from qlora_jax import data, lora, metrics, optimizers, train
from qlora_jax.checkpoints import Checkpoints
from qlora_jax.config import OptimizerConfig, TrainConfig
from qlora_jax.losses import cross_entropy
from qlora_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(64, 32, 48, 2, 2, 1, 16)
LENGTH = 12


def model_of(dtype=jnp.float32) -> Transformer:
  return Transformer(CONFIG, dtype=dtype)


@pytest.fixture(scope="module")
def dense():
  return jax.jit(model_of().init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]


@pytest.fixture(scope="module")
def frozen(dense):
  rules = {"layers/*/attn/*": ql.QuantizationConfig(), "layers/*/mlp/*": ql.QuantizationConfig()}
  return ql.quantize_tree(dense, rules)


def optimizer_of(**kwargs) -> optax.GradientTransformation:
  return optimizers.make(
    OptimizerConfig(**{"learning_rate": 1e-2, "schedule": "constant", **kwargs}), 100
  )


def state_of(frozen, optimizer, dtype=jnp.float32, **kwargs) -> train.TrainState:
  params, constants = lora.init(jax.random.key(1), frozen, lora.LoRAConfig(rank=4, **kwargs))
  return train.init_state(params, constants, optimizer, seed=3, dtype=dtype)


@pytest.fixture(scope="module")
def rows() -> data.Dataset:
  rng = np.random.default_rng(0)
  return data.pack([rng.integers(0, 64, rng.integers(3, 12)).tolist() for _ in range(40)], LENGTH)


@pytest.fixture(scope="module")
def step():
  return train.make_train_step(model_of(), optimizer_of(), loss_chunk=16)


def copy(tree):
  return jax.tree.map(jnp.copy, tree)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_state_holds_nothing_of_the_base(frozen):
  state = state_of(frozen, optimizer_of())
  assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)} == {
    "lora_a",
    "lora_b",
  }
  adapters = len(jax.tree.leaves(state.params))
  # Two moments of each adapter, and the counts of Adam and of the schedule.
  assert len(jax.tree.leaves(state.opt_state)) == 2 * adapters + 2
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def test_pure_and_donates_only_the_state(frozen, rows, step):
  batch = jax.tree.map(jnp.asarray, data.Batches(rows, 2, seed=0).batch(0))
  state = state_of(frozen, optimizer_of())
  first, second = copy(state), copy(state)
  a, metrics_a = step(first, frozen, batch)
  b, metrics_b = step(second, frozen, batch)
  assert_equal(a, b)
  assert_equal(metrics_a, metrics_b)
  assert first.params["layers"]["attn"]["q"]["lora_a"].is_deleted()
  for leaf in jax.tree.leaves((frozen, batch)):
    assert not leaf.is_deleted()
  # A donated argument that no result can take over survives on a CPU: so what was asked for.
  given, _ = step.lower(state, frozen, batch).args_info
  donated = [{arg.donated for arg in jax.tree.leaves(each)} for each in given]
  assert donated == [{True}, {False}, {False}]
  assert int(a.step) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_step_keeps_to_strict_promotion(frozen, rows, dtype):
  optimizer = optimizer_of(weight_decay=0.1, schedule="cosine", warmup_steps=2)
  step = train.make_train_step(model_of(dtype), optimizer, 16)
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    state = state_of(frozen, optimizer, dtype, dropout=0.1)
    new, _ = jax.eval_shape(step, state, frozen, data.Batches(rows, 2, seed=0).batch(0))
  like = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == like


def test_first_loss_is_the_bases(frozen, rows, step):
  batch = data.Batches(rows, 3, seed=0).batch(0)
  _, values = step(state_of(frozen, optimizer_of()), frozen, batch)
  one = {name: value[0] for name, value in batch.items()}
  logits: Any = model_of().apply(
    {"params": {}, "constants": {}, "frozen": frozen},
    one["tokens"],
    one["segment_ids"],
    one["positions"],
  )
  expected = float(cross_entropy(logits, one["targets"], one["loss_mask"]))
  expected /= one["loss_mask"].sum()
  np.testing.assert_allclose(values["loss"], expected, rtol=1e-6)
  assert values["targets"] == one["loss_mask"].sum()


def test_accumulation_is_exact_for_unequal_counts(frozen, rows, step):
  batch = data.Batches(rows, 2, accumulate_steps=3, seed=0).batch(0)
  batch["loss_mask"] = batch["loss_mask"].copy()
  batch["loss_mask"][0, :, 3:] = False  # far fewer targets in the first microbatch
  counts = batch["loss_mask"].sum((1, 2))
  assert counts[0] < counts[1] / 2
  whole = {name: value.reshape(1, 6, LENGTH) for name, value in batch.items()}
  a, metrics_a = step(state_of(frozen, optimizer_of()), frozen, batch)
  b, metrics_b = step(state_of(frozen, optimizer_of()), frozen, whole)
  np.testing.assert_allclose(metrics_a["loss"], metrics_b["loss"], rtol=1e-6)
  np.testing.assert_allclose(metrics_a["grad_norm"], metrics_b["grad_norm"], rtol=1e-5)
  moments = [optax.tree.get(state.opt_state, "mu") for state in (a, b)]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), *moments)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a.params, b.params)
  # A mean of the microbatches' means is another number.
  means = []
  for i in range(3):
    one = {name: value[i : i + 1] for name, value in batch.items()}
    means.append(float(step(state_of(frozen, optimizer_of()), frozen, one)[1]["loss"]))
  assert abs(np.mean(means) - float(metrics_b["loss"])) > 1e-4


@pytest.mark.slow
def test_packed_rows_have_the_loss_and_gradient_of_separate_documents(frozen):
  rng = np.random.default_rng(2)
  documents = rng.integers(0, 64, (6, LENGTH // 3)).tolist()
  packed, apart = data.pack(documents, LENGTH), data.pack(documents, LENGTH // 3)
  assert (len(packed.tokens), len(apart.tokens)) == (2, 6)
  params, constants = lora.init(jax.random.key(1), frozen, lora.LoRAConfig(rank=4))
  params = jax.tree.map(lambda p: p + 0.05, params)

  def value_and_grad(rows: data.Dataset, keys: tuple[str, ...]):
    batch = data.Batches(rows, len(rows.tokens), seed=0).batch(0)
    batch = {key: batch[key][0] for key in keys}

    def loss(params):
      variables = {"params": params, "constants": constants, "frozen": frozen}
      return train.batch_loss(model_of(), variables, batch, 16)

    return jax.jit(jax.value_and_grad(loss))(params)

  plain = ("tokens", "targets", "loss_mask")
  value, grad = value_and_grad(packed, (*plain, "segment_ids", "positions"))
  expected, expected_grad = value_and_grad(apart, plain)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), grad, expected_grad
  )
  unaware, _ = value_and_grad(packed, plain)
  assert abs(unaware - expected) > 1e-2


def test_loss_falls_on_repeated_data_and_the_base_stays(frozen, rows, step):
  batch = data.Batches(rows, 4, seed=0).batch(0)
  before = copy(frozen)
  state, losses = state_of(frozen, optimizer_of()), []
  for _ in range(30):
    state, values = step(state, frozen, batch)
    assert values["grad_norm"] > 0
    losses.append(float(values["loss"]))
  assert losses[-1] < 0.8 * losses[0]
  assert_equal(before, frozen)


@pytest.mark.slow
def test_dropout_follows_the_key_the_step_and_the_microbatch(frozen, rows, step):
  one = data.Batches(rows, 2, seed=0).batch(0)
  three = {name: np.repeat(value, 3, axis=0) for name, value in one.items()}

  def grad_norm(dropout: float, seed: int = 3, at: int = 0, batch=one) -> float:
    state = state_of(frozen, optimizer_of(), dropout=dropout)
    params = jax.tree.map(lambda p: p + 0.05, state.params)
    key = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    at_step = jnp.asarray(at, jnp.int32)
    state = dataclasses.replace(state, params=params, key=key, step=at_step)
    return float(step(state, frozen, batch)[1]["grad_norm"])

  assert grad_norm(0.5) == grad_norm(0.5)
  assert grad_norm(0.5) != grad_norm(0.5, seed=4)
  assert grad_norm(0.5) != grad_norm(0.5, at=1)
  assert grad_norm(0.0) == grad_norm(0.0, seed=4, at=1)
  # The same microbatch three times: the mean gradient is one's own, but for dropout's draws.
  np.testing.assert_allclose(grad_norm(0.0, batch=three), grad_norm(0.0), rtol=1e-5)
  assert abs(grad_norm(0.5, batch=three) / grad_norm(0.5) - 1) > 1e-3


def test_a_whole_base_trains_as_overriding_leaves(dense, rows):
  optimizer = optimizer_of()
  step = train.make_train_step(model_of(), optimizer, 16)
  state = train.init_state(copy(dense), {}, optimizer, seed=0, dtype=jnp.float32)
  batch, losses = data.Batches(rows, 4, seed=0).batch(0), []
  for _ in range(10):
    state, values = step(state, {}, batch)
    losses.append(float(values["loss"]))
  assert losses[-1] < 0.5 * losses[0]
  for (path, new), old in zip(
    jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(dense), strict=True
  ):
    assert (np.asarray(new) != np.asarray(old)).any(), path


def test_padding_of_unequal_ranks_stays_zero(frozen, rows):
  optimizer = optimizer_of(weight_decay=0.1)
  step = train.make_train_step(model_of(), optimizer, 16)
  state = state_of(frozen, optimizer, rank_pattern={"layers/0/attn/q": 1})
  for i in range(3):
    state, _ = step(state, frozen, data.Batches(rows, 2, seed=0).batch(i))
  q = state.params["layers"]["attn"]["q"]
  assert not q["lora_a"][0, :, 1:].any()
  assert not q["lora_b"][0, 1:].any()
  assert q["lora_a"][1, :, 1:].any()
  assert q["lora_b"][1, 1:].any()


@pytest.mark.slow
def test_bfloat16_computes_with_float32_adapters(frozen, rows):
  optimizer = optimizer_of()
  step = train.make_train_step(model_of(jnp.bfloat16), optimizer, 16)
  state, batch, losses = state_of(frozen, optimizer), data.Batches(rows, 4, seed=0).batch(0), []
  for _ in range(20):
    state, values = step(state, frozen, batch)
    losses.append(float(values["loss"]))
  assert losses[-1] < 0.9 * losses[0]
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def test_float16_skips_overflows_and_counts_them(frozen, rows, monkeypatch):
  monkeypatch.setattr(train, "_LOSS_SCALE_PERIOD", 5)
  optimizer = optimizer_of()
  step = train.make_train_step(model_of(jnp.float16), optimizer, 16)
  batch = data.Batches(rows, 4, seed=0).batch(0)
  state = state_of(frozen, optimizer, jnp.float16)
  assert state.loss_scale == 2.0**15
  # A scale that float16 cannot hold: the gradient overflows.
  huge = dataclasses.replace(copy(state), loss_scale=jnp.asarray(2.0**40, jnp.float32))
  after, values = step(huge, frozen, batch)
  assert not np.isfinite(values["grad_norm"])
  assert_equal(after.params, state.params)
  assert_equal(after.opt_state, state.opt_state)
  assert after.loss_scale == 2.0**39
  assert (after.skipped, after.step, after.good_steps) == (1, 1, 0)

  losses, scales = [], []
  for _ in range(20):
    state, values = step(state, frozen, batch)
    losses.append(float(values["loss"]))
    scales.append(float(state.loss_scale))
  assert losses[-1] < 0.9 * losses[0]
  assert max(scales) >= 2.0**16  # it grew after five good steps
  assert int(state.skipped) < 10


# The loop.


class NanAt:
  """Batches of `rows`; from step `at` on, of ids whose embedding is NaN."""

  def __init__(self, rows, at):
    self._batches, self._at = data.Batches(rows, 2, seed=0), at

  def batch(self, step, /):
    batch = self._batches.batch(step)
    if step >= self._at:
      # An id out of range: jnp.take fills with NaN.
      batch["tokens"] = np.full_like(batch["tokens"], 10_000)
    return batch


@dataclasses.dataclass
class Loop:
  """`fit` on the tiny model, with everything that a run has."""

  frozen: object
  step: object
  rows: data.Dataset
  cfg: TrainConfig

  def run(self, directory, batches=None, state=None, evaluate=lambda state: int(state.step) / 2):
    optimizer = optimizer_of()
    with (
      Checkpoints(directory / "checkpoints", keep=2, base_fingerprint="base") as checkpoints,
      train.SignalGuard() as guard,
    ):
      state = state_of(self.frozen, optimizer, dropout=0.2) if state is None else state
      restored = checkpoints.restore(state)
      resume_step = None if restored is None else int(restored.step)
      with metrics.MetricsWriter(directory, resume_step=resume_step) as writer:
        return train.fit(
          state if restored is None else restored,
          train_step=self.step,  # pyright: ignore[reportArgumentType]
          frozen=self.frozen,
          batches=data.Batches(self.rows, 2, seed=0) if batches is None else batches,
          cfg=self.cfg,
          learning_rate=lambda step: 1e-2,
          guard=guard,
          evaluate=evaluate,
          checkpoints=checkpoints,
          writer=writer,
        )

  def latest(self, directory) -> train.TrainState:
    with Checkpoints(directory / "checkpoints", keep=2, base_fingerprint="base") as checkpoints:
      state = checkpoints.restore(state_of(self.frozen, optimizer_of(), dropout=0.2))
      assert state is not None
      return state


def loop_of(frozen, rows, step) -> Loop:
  return Loop(
    frozen, step, rows, TrainConfig(steps=9, log_every=2, eval_every=4, checkpoint_every=3)
  )


@pytest.fixture
def loop(frozen, rows, step):
  return loop_of(frozen, rows, step)


def lines(directory):
  clock = ("time", "tokens_per_second", "waiting_for_data", "compile_seconds")
  return [
    {name: value for name, value in line.items() if name not in clock}
    for line in metrics.read(directory)
  ]


def test_the_record_is_complete(loop, tmp_path):
  state = loop.run(tmp_path)
  assert int(state.step) == 9
  record = lines(tmp_path)
  # The last step is there too, logged and evaluated, though neither period divides it.
  trained = [line for line in record if "loss" in line]
  assert [line["step"] for line in trained] == [2, 4, 6, 8, 9]
  assert set(trained[0]) == {
    *("step", "loss", "grad_norm", "targets", "loss_scale", "skipped", "learning_rate")
  }
  assert [(line["step"], line["held_out_loss"]) for line in record if "held_out_loss" in line] == [
    (4, 2.0),
    (8, 4.0),
    (9, 4.5),
  ]
  assert_equal(loop.latest(tmp_path), state)


class Interrupting:
  """Sends this process a signal while the batch of one step is made."""

  def __init__(self, rows, at, number):
    self._batches, self._at, self._number = data.Batches(rows, 2, seed=0), at, number

  def batch(self, step, /):
    if step == self._at:
      os.kill(os.getpid(), self._number)
    return self._batches.batch(step)


@pytest.fixture(scope="module")
def reference(frozen, rows, step, tmp_path_factory):
  """The directory and the end of a run that nothing stopped."""
  directory = tmp_path_factory.mktemp("reference")
  return directory, loop_of(frozen, rows, step).run(directory)


# After 1 step, after one that is evaluated, amid the run, after the last.
@pytest.mark.parametrize(
  ("number", "at"),
  [(signal.SIGINT, 0), (signal.SIGTERM, 3), (signal.SIGINT, 6), (signal.SIGTERM, 8)],
)
def test_a_signal_saves_and_resuming_equals_not_stopping(loop, reference, tmp_path, number, at):
  before = signal.getsignal(number)
  with pytest.raises(train.Interrupted) as stopped:
    loop.run(tmp_path / "run", Interrupting(loop.rows, at, number))
  assert (stopped.value.step, stopped.value.signal_number) == (at + 1, number)
  assert signal.getsignal(number) is before
  assert int(loop.latest(tmp_path / "run").step) == at + 1
  directory, state = reference
  assert_equal(loop.run(tmp_path / "run"), state)
  assert lines(tmp_path / "run") == lines(directory)


def test_the_second_signal_acts_as_usual():
  # Python's own handler: in a shell's background job (`pytest &`) SIGINT is ignored from the start.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with train.SignalGuard() as guard:
      os.kill(os.getpid(), signal.SIGINT)
      assert guard.received == signal.SIGINT
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back(number):
  before = signal.getsignal(number)
  with train.SignalGuard():
    assert signal.getsignal(number) is not before
  assert signal.getsignal(number) is before


def test_a_signal_while_the_last_checkpoint_is_written_stops_what_would_follow(
  loop, tmp_path, monkeypatch
):
  wait = Checkpoints.wait

  def interrupted_wait(self):
    os.kill(os.getpid(), signal.SIGTERM)
    wait(self)

  monkeypatch.setattr(Checkpoints, "wait", interrupted_wait)
  with pytest.raises(train.Interrupted, match="SIGTERM at step 9"):
    loop.run(tmp_path)
  assert int(loop.latest(tmp_path).step) == 9


def fit_with(metrics_of, cfg, guard=None, **kwargs):
  """`fit` around a step that computes nothing: `metrics_of(step)` are its metrics."""

  def step(state, frozen, batch):
    del frozen
    defaults = {"loss": 1.0, "grad_norm": 1.0, "targets": 1, "loss_scale": 1.0, "skipped": 0}
    return types.SimpleNamespace(step=state.step + 1), {**defaults, **metrics_of(batch + 1)}

  class Steps:
    def batch(self, step, /):
      return step

  with train.SignalGuard() as usual:
    return train.fit(
      types.SimpleNamespace(step=0),  # pyright: ignore[reportArgumentType]
      **{
        "train_step": step,
        "frozen": {},
        "batches": Steps(),
        "cfg": cfg,
        "learning_rate": lambda step: 10.0 * step,
        "guard": usual if guard is None else guard,
        **kwargs,
      },
    )


class Recorder:
  """A writer, or checkpoints: keeps what it is given."""

  def __init__(self):
    self.record = []

  def write(self, step, values):
    self.record.append((step, values))

  def save(self, step, state):
    self.record.append((step, state))

  def wait(self):
    pass


def test_a_signal_between_two_looks_is_saved():
  class Late:
    """Comes right after the first look at it."""

    looks = 0

    @property
    def received(self):
      self.looks += 1
      return signal.SIGINT if self.looks > 1 else None

  saved = Recorder()
  with pytest.raises(train.Interrupted) as stopped:
    fit_with(lambda step: {}, TrainConfig(steps=10), guard=Late(), checkpoints=saved)
  assert saved.record[-1][0] == stopped.value.step


def test_the_recorded_rate_is_the_optimizers_after_skipped_steps():
  written = Recorder()
  fit_with(
    lambda step: {"skipped": int(step >= 3)}, TrainConfig(steps=5, log_every=1), writer=written
  )
  rates = {step: values["learning_rate"] for step, values in written.record}
  assert {step: rates[step] for step in (1, 2, 4, 5)} == {1: 0.0, 2: 10.0, 4: 20.0, 5: 30.0}


def test_float16_overflows_stop_the_run_only_once_the_scale_is_spent():
  def overflow(step):
    return {"grad_norm": np.inf, "loss_scale": 2.0 ** (4 - step), "skipped": step}

  with pytest.raises(train.NonFiniteLossError, match="step 4: grad_norm is inf"):
    fit_with(overflow, TrainConfig(steps=10))


@pytest.mark.parametrize("at", [4, 5])
def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(loop, reference, tmp_path, at):
  with pytest.raises(train.NonFiniteLossError, match=rf"step {at + 1}: loss is nan"):
    loop.run(tmp_path, NanAt(loop.rows, at))
  state = loop.latest(tmp_path)
  assert int(state.step) == 3
  for leaf in jax.tree.leaves(state.params):
    assert jnp.isfinite(leaf).all()
  # As after a `kill -9`: lines are ahead of the checkpoint. Good batches go on from there.
  directory, state = reference
  assert_equal(loop.run(tmp_path), state)
  assert lines(tmp_path) == lines(directory)


def test_nan_in_the_adapters_stops_before_anything_is_saved(loop, tmp_path):
  state = state_of(loop.frozen, optimizer_of(), dropout=0.2)
  params = jax.tree.map(lambda p: p.at[0].set(jnp.nan), state.params)
  with pytest.raises(train.NonFiniteLossError, match="step 1: loss is nan"):
    loop.run(tmp_path, state=dataclasses.replace(state, params=params))
  with Checkpoints(tmp_path / "checkpoints", keep=2, base_fingerprint="base") as checkpoints:
    assert checkpoints.latest_step() is None


def test_a_held_out_loss_that_is_not_finite_stops_before_its_state_is_saved(loop, tmp_path):
  cfg = dataclasses.replace(loop.cfg, checkpoint_every=2)
  loop = dataclasses.replace(loop, cfg=cfg)

  def evaluate(state):
    return np.inf if int(state.step) == 4 else 1.0

  with pytest.raises(train.NonFiniteLossError, match="step 4: held-out loss is inf"):
    loop.run(tmp_path, evaluate=evaluate)
  assert int(loop.latest(tmp_path).step) == 2

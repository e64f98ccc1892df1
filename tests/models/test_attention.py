"""The ways to compute attention against the plain one, and that against float64."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models import attention
from qlora_jax.models.attention import Case, Visible, attend, choose

HAS_GPU = jax.default_backend() == "gpu"
on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")

T = 70


@pytest.fixture(autouse=True)
def full_precision():
  # A GPU's float32 products are TF32 otherwise.
  with jax.default_matmul_precision("highest"):
    yield


def arguments(queries=T, keys=T, batch=2, heads=4, groups=2, width=8, dtype=jnp.float32):
  shapes = ((queries, heads), (keys, groups), (keys, groups))
  draws = jax.random.split(jax.random.key(0), 3)
  return tuple(
    jax.random.normal(key, (batch, *shape, width), dtype)
    for key, shape in zip(draws, shapes, strict=True)
  )


def ids(*runs, batch=2):
  row = np.concatenate([np.full(length, segment) for segment, length in runs])
  return jnp.asarray(np.stack([row] * batch), jnp.int32)


def both(x):
  return x, x


PACKED = ids((1, 20), (2, 3), (3, 40), (0, 7))
COMING_BACK = ids((1, 20), (2, 10), (1, 40))
COUNTED_UP = jnp.arange(T, dtype=jnp.int32)[None]
CASES = {
  "causal": {},
  "scaled": {"scale": 0.3},
  "capped": {"softcap": 1.5},
  "packed": {"visible": Visible(None, both(PACKED))},
  "coming_back": {"visible": Visible(None, both(COMING_BACK))},
  "window": {"windows": (9,)},
  "second_kind": {"windows": (None, 5), "kind": jnp.int32(1)},
  "first_kind": {"windows": (None, 5), "kind": jnp.int32(0)},
  "window_of_positions": {"windows": (9,), "visible": Visible(None, None, both(2 * COUNTED_UP))},
  "window_in_segments": {"windows": (9,), "visible": Visible(None, both(PACKED))},
}


def oracle(q, k, v, visible=Visible(), windows=(None,), kind=0, scale=None, softcap=None):  # noqa: B008
  """In float64, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  start = 0 if visible.start is None else int(visible.start)
  window = windows[int(kind)]
  shared = q.shape[2] // k.shape[2]
  y = np.zeros_like(q)
  for b, t, h in np.ndindex(*q.shape[:3]):
    seen = np.arange(k.shape[1]) <= start + t
    if visible.segment_ids is not None:
      mine, theirs = (np.asarray(x)[b] for x in visible.segment_ids)
      seen &= mine[t] == theirs
    if window is not None:
      mine, theirs = start + np.arange(q.shape[1]), np.arange(k.shape[1])
      if visible.positions is not None:
        mine, theirs = (np.broadcast_to(x, (len(q), x.shape[1]))[b] for x in visible.positions)
      seen &= mine[t] - theirs < window
    logits = k[b, :, h // shared] @ q[b, t, h]
    logits = logits * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    weights = np.where(seen, np.exp(logits - logits.max(where=seen, initial=-np.inf)), 0)
    y[b, t, h] = weights / weights.sum() @ v[b, :, h // shared]
  return y


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(attention, "_BLOCK", 16)


def with_gradients(name, qkv, case, real: Any = True):
  g = jax.random.normal(jax.random.key(1), qkv[0].shape, qkv[0].dtype)
  g = jnp.where(jnp.asarray(real)[..., None, None], g, 0)
  case = {"visible": Visible(), **case}

  static = {key: case.pop(key) for key in ("windows", "scale", "softcap") if key in case}

  @jax.jit
  def run(q, k, v, case):
    y, pull = jax.vjp(lambda *x: attend(*x, implementation=name, **case, **static), q, k, v)
    return y, *pull(g)

  return run(*qkv, case)


@pytest.mark.parametrize("name", CASES)
def test_plain_is_the_definition(name):
  q, k, v = arguments()
  y = attend(q, k, v, implementation="plain", **{"visible": Visible(), **CASES[name]})
  np.testing.assert_allclose(y, oracle(q, k, v, **CASES[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_blockwise_equals_plain(small_blocks, name):
  q, k, v = arguments()
  found = with_gradients("blockwise", (q, k, v), CASES[name])
  expected = with_gradients("plain", (q, k, v), CASES[name])
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_blockwise_with_a_cache(small_blocks):
  q, k, v = arguments(queries=21, keys=T)
  start = jnp.int32(30)
  slots = jnp.where(jnp.arange(T) < 51, 1, 0)[None] * jnp.ones((2, 1), jnp.int32)
  visible = Visible(start, (jnp.ones((2, 21), jnp.int32), slots))
  y = attend(q, k, v, visible, implementation="blockwise")
  np.testing.assert_allclose(y, oracle(q, k, v, visible), rtol=1e-5, atol=1e-5)


def test_blockwise_rounds_as_its_inputs_do(small_blocks):
  q, k, v = arguments(dtype=jnp.bfloat16)
  found = with_gradients("blockwise", (q, k, v), {})
  exact = with_gradients("plain", [x.astype(jnp.float32) for x in (q, k, v)], {})
  rounded = with_gradients("plain", (q, k, v), {})
  for ours, theirs, right in zip(found, rounded, exact, strict=True):
    assert ours.dtype == jnp.bfloat16
    error, allowed = (
      np.linalg.norm(np.asarray(x, np.float64) - right) / np.linalg.norm(right)
      for x in (ours, theirs)
    )
    assert error < 1.5 * allowed


def temporaries(name, tokens):
  q, k, v = (jax.ShapeDtypeStruct((1, tokens, heads, 16), jnp.float32) for heads in (2, 1, 1))

  def loss(q, k, v):
    return attend(q, k, v, Visible(), implementation=name).sum()

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
  analysis: Any = compiled.memory_analysis()
  return analysis.temp_size_in_bytes


def test_blockwise_memory_is_linear_in_the_tokens():
  logits = 2 * 4096 * 4096 * 4
  assert temporaries("plain", 4096) > logits
  # A block's logits are 2 MB; what the arguments are, 0.5.
  assert temporaries("blockwise", 4096) < logits / 8
  assert temporaries("blockwise", 8192) < 1.6 * temporaries("blockwise", 4096)


def test_vmap_over_trials(small_blocks):
  q, k, v = arguments()
  stack = jnp.stack([q, q + 1])
  visible = Visible(None, both(PACKED))
  y = jax.vmap(lambda q: attend(q, k, v, visible, implementation="blockwise"))(stack)
  for each, one in zip(y, stack, strict=True):
    alone = attend(one, k, v, visible, implementation="plain")
    np.testing.assert_allclose(each, alone, rtol=2e-5, atol=2e-5)


LONG = Case(queries=2048, keys=2048, width=128, dtype=jnp.dtype("bfloat16"))


def test_the_choice_without_a_gpu():
  if HAS_GPU:
    pytest.skip("there is a GPU")
  assert choose(LONG) == "blockwise"
  assert choose(dataclasses.replace(LONG, queries=1)) == "plain"
  assert choose(dataclasses.replace(LONG, queries=1024, keys=1024)) == "plain"
  assert choose(LONG, "plain") == "plain"
  with pytest.raises(ValueError, match="'cudnn' cannot serve this: the computation is for a cpu"):
    choose(LONG, "cudnn")
  with pytest.raises(ValueError, match="attention: 'flash'; one of plain, blockwise, cudnn"):
    choose(LONG, "flash")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"dtype": jnp.dtype("float32")}, "q is float32"),
    ({"softcap": True}, "capped"),
    ({"cached": True}, "cache"),
    ({"queries": 8, "keys": 8}, "8 queries"),
    ({"width": 132}, "heads of width 132"),
    ({"width": 512}, "heads of width 512"),
    ({"windowed": True, "moved": True}, "positions that do not count up"),
    ({"windowed": True, "packed": True}, "windows in rows of several segments"),
    ({}, "no NVIDIA H100 80GB HBM3 is here"),
  ],
)
def test_what_cudnn_does_not_serve(monkeypatch, change, reason):
  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
  )
  monkeypatch.setattr(attention.target, "target", lambda: ("gpu", device))
  with pytest.raises(ValueError, match=reason):
    choose(dataclasses.replace(LONG, **change), "cudnn")
  assert choose(dataclasses.replace(LONG, **change)) != "cudnn"


def test_segments():
  segment_ids = jnp.asarray([[0, 0, 3, 3, 3, 7], [1, 2, 2, 0, 4, 4]], jnp.int32)
  starts, lengths, fits = attention._segments(segment_ids, 4)
  np.testing.assert_array_equal(starts, [[0, 2, 5, -1, -1], [0, 1, 3, 4, -1]])
  np.testing.assert_array_equal(lengths, [[2, 3, 1, -1], [1, 2, 1, 2]])
  assert fits
  assert not attention._segments(segment_ids, 3)[2]
  assert not attention._segments(COMING_BACK, 8)[2]


# On a GPU

GPU_CASES = {
  "causal": {},
  "scaled": {"scale": 0.05},
  "window": {"windows": (130,)},
  "kinds": {"windows": (None, 130), "kind": jnp.int32(1)},
  "packed": {"visible": Visible(None, both(ids((0, 5), (1, 300), (2, 3), (5, 400), (0, 60))))},
  "too_many": {"visible": Visible(None, both(ids(*((i + 1, 16) for i in range(48)))))},
  "coming_back": {"visible": Visible(None, both(ids((1, 300), (2, 168), (1, 300))))},
}


@on_a_gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("name", GPU_CASES)
def test_cudnn_equals_plain(name, width):
  case = GPU_CASES[name]
  q, k, v = arguments(768, 768, heads=8, groups=2, width=width, dtype=jnp.bfloat16)
  segment_ids = case["visible"].segment_ids if "visible" in case else None
  # Of padding, each run sees itself alone there: it is of no consequence.
  real = jnp.ones(q.shape[:2], bool) if segment_ids is None else segment_ids[0] != 0
  found = with_gradients("cudnn", (q, k, v), case, real)
  exact = with_gradients("plain", [x.astype(jnp.float32) for x in (q, k, v)], case, real)
  rounded = with_gradients("plain", (q, k, v), case, real)
  for ours, theirs, right in zip(found, rounded, exact, strict=True):
    error, allowed = (
      np.linalg.norm((np.asarray(x, np.float64) - right)[real]) / np.linalg.norm(right[real])
      for x in (ours, theirs)
    )
    assert error < 2 * allowed


@on_a_gpu
def test_the_choice_on_a_gpu():
  assert choose(LONG) == "cudnn"
  assert choose(dataclasses.replace(LONG, packed=True)) == "cudnn"
  assert choose(dataclasses.replace(LONG, softcap=True)) == "blockwise"

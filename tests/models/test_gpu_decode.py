"""Attention of one token over the cache: its kernel's logic and lowering here, itself on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.attention import Case, Visible, attend, choose
from tests.matmul.gpu_simulator import simulate_decode

if jax.__version_info__ < (0, 11, 2):
  pytest.skip("the GPU's kernels need JAX 0.11.2", allow_module_level=True)

from qlora_jax.models import gpu_decode

HAS_GPU = jax.default_backend() == "gpu"
H100 = jax.sharding.AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
)


@dataclasses.dataclass(frozen=True)
class Spec:
  """Of a cache of three layers, and a token at slot `start`."""

  batch: int
  groups: int
  shared: int
  width: int
  slots: int
  start: int
  window: int | None = None
  dtype: str = "bfloat16"

  def arguments(self):
    """`gpu_decode.attend`'s; what lies behind the token's slot is not to be read."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (self.batch, 1, self.groups * self.shared, self.width))
    shape = (3, self.batch, self.groups, self.slots, self.width)
    k, v = (
      jax.random.normal(key, shape).at[..., self.start + 1 :, :].set(jnp.nan) for key in keys[1:]
    )
    slot = jnp.broadcast_to(jnp.arange(self.slots), (self.batch, self.slots))
    # Padding to the left of each row but the first, of its own length.
    segments = (slot >= 7 * jnp.arange(self.batch)[:, None]).astype(jnp.int32)
    own = jnp.ones((self.batch, 1), bool)
    window = None if self.window is None else jnp.int32(self.window)
    q, k, v = (x.astype(self.dtype) for x in (q, k, v))
    start = jnp.int32(self.start)
    of_start = jnp.full((self.batch, 1), self.start)
    return (q, k, v, jnp.int32(1), start, (own, segments), (of_start, slot), window, 0.11)


SPECS = [
  Spec(2, 2, 4, 64, 200, 150),
  Spec(1, 1, 9, 128, 300, 299, window=40),
  Spec(2, 1, 1, 256, 130, 13, dtype="float16"),
]
# Real ones: Llama-3.1-8B's and Gemma's heads, and slots that no block divides.
ON_A_GPU = [
  Spec(2, 8, 4, 128, 2048, 1999),
  Spec(1, 4, 2, 256, 1100, 1000, window=512),
  Spec(3, 2, 16, 128, 700, 640),
  Spec(5, 8, 7, 64, 129, 128),
]


def expected(q, k, v, layer, start, segments, positions, window, scale):
  """By the definition, in float32."""
  own, of_slots = segments
  visible = Visible(start, (own.astype(jnp.int32), of_slots), positions)
  k, v = (jnp.nan_to_num(x[layer].astype(jnp.float32)).swapaxes(1, 2) for x in (k, v))
  windows = (None,) if window is None else (int(window),)
  q = q.astype(jnp.float32)
  return attend(q, k, v, visible, windows=windows, scale=scale, implementation="plain")


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_thread_by_thread(spec):
  arguments = spec.arguments()
  found = simulate_decode(*arguments)
  # Weights are rounded to 16 bits before they are multiplied.
  np.testing.assert_allclose(found, expected(*arguments), rtol=0, atol=1e-2)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("spec", [*SPECS, *ON_A_GPU], ids=str)
def test_on_a_gpu(spec):
  arguments = spec.arguments()
  run = jax.jit(functools.partial(gpu_decode.attend, scale=arguments[-1]))
  found = run(*arguments[:-1])
  np.testing.assert_allclose(found.astype(jnp.float32), expected(*arguments), rtol=0, atol=1.5e-2)
  np.testing.assert_array_equal(found, run(*arguments[:-1]))


CASE = Case(
  1, 4096, 128, jnp.bfloat16, cached=True, shared=4, stacked=True, packed=True, moved=True
)


def test_it_is_chosen_and_lowers_for_an_h100():
  reason = "'decode' cannot serve this: the computation is for a cpu"
  with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match=reason):
    choose(CASE, "decode")
  with jax.default_device(jax.devices("cpu")[0]):
    assert choose(CASE) == "plain"
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
  spec = ON_A_GPU[0]
  q, k, v, layer, start, segments, positions, _, scale = spec.arguments()

  def run(q, k, v, layer, start, segments, positions):
    own_k, own_v = (x[layer].swapaxes(1, 2) for x in (k, v))
    visible = Visible(start, segments, positions)
    return attend(q, own_k, own_v, visible, scale=scale, cache=(k, v, layer))

  several = jax.sharding.AbstractMesh(
    (2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=H100
  )
  with jax.sharding.use_abstract_mesh(several):
    assert choose(CASE) == "plain"  # XLA's to share out
  with jax.sharding.use_abstract_mesh(mesh):
    assert choose(CASE) == "decode"
    for change, reason in (
      ({"queries": 2}, "2 queries; it takes one"),
      ({"stacked": False}, "not those of a cache of all layers"),
      ({"width": 80}, "heads of width 80; one of"),
      ({"shared": 17}, "17 heads share a key; at most 16"),
      ({"softcap": True}, "the logits are capped"),
      ({"packed": False}, "the cache's segments and positions are not given"),
      ({"dtype": jnp.float32}, "q is float32"),
    ):
      case = dataclasses.replace(CASE, **change)
      assert choose(case) == "plain"
      with pytest.raises(ValueError, match=f"'decode' cannot serve this: .*{reason}"):
        choose(case, "decode")
    traced = jax.jit(run).trace(q, k, v, layer, start, segments, positions)
    assert "decode_attention" in traced.lower(lowering_platforms=("cuda",)).as_text()

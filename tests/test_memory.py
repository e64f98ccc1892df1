import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qlora_jax as ql
from qlora_jax import lora, memory, optimizers, train, tree_paths
from qlora_jax.config import OptimizerConfig
from qlora_jax.hf import checkpoint
from qlora_jax.models.transformer import Transformer, TransformerConfig

MODEL = Transformer(TransformerConfig(64, 32, 48, 2, 2, 1, 16), dtype=jnp.float32)
RULES = {"layers/*/attn/*": ql.QuantizationConfig(), "layers/*/mlp/*": ql.QuantizationConfig()}


@pytest.fixture(scope="module")
def frozen():
  dense = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  dense = jax.tree.map(lambda w: w.astype(jnp.bfloat16), dense)
  return ql.quantize_tree(dense, RULES)


def test_what_waits_on_the_host_fills_no_device(monkeypatch):
  class Card:
    def memory_stats(self):
      return {"bytes_limit": 1000, "bytes_in_use": 400}

  here = jnp.zeros(25)
  arguments = here, jax.device_put(here, jax.memory.Space.Host)
  monkeypatch.setattr(jax, "local_devices", lambda: [Card()])
  assert memory.available_bytes(arguments) == int(0.95 * (1000 - (400 - 100)))


def test_bytes_and_bits_are_counted():
  packed = ql.quantize(jnp.ones((128, 64)), double_quantization=False)
  # 4096 bytes of codes, 2 × 64 float32 scales, 16 levels.
  assert tree_paths.tree_bytes({"a": packed, "b": jnp.ones(3)}) == 4096 + 512 + 64 + 12
  assert memory.quantized_bits({"a": packed, "b": jnp.ones(3)}) == 8 * (4096 + 512 + 64) / 8192
  assert memory.quantized_bits({"b": jnp.ones(3)}) is None


@functools.cache
def footprint(batch_size: int) -> memory.Footprint:
  return memory.footprint(
    MODEL,
    checkpoint.abstract_base(MODEL, RULES, jnp.bfloat16),
    lora.LoRAConfig(rank=4),
    optimizers.make(OptimizerConfig(), 10),
    batch_shape=(1, batch_size, 32),
    packed_rows=True,
    loss_chunk=16,
  )


def test_shapes_alone_give_the_real_bytes(frozen):
  abstract = checkpoint.abstract_base(MODEL, RULES, jnp.bfloat16)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
    lambda x: (x.shape, x.dtype), frozen
  )
  counted = footprint(2)
  params, constants = lora.init(jax.random.key(0), frozen, lora.LoRAConfig(rank=4))
  optimizer = optimizers.make(OptimizerConfig(), 10)
  state = train.init_state(params, constants, optimizer, seed=0, dtype=jnp.float32)
  assert counted.base == tree_paths.tree_bytes(frozen)
  assert counted.adapters == tree_paths.tree_bytes(state.params)
  assert counted.optimizer == tree_paths.tree_bytes(state.opt_state)


def test_shapes_of_a_base_that_no_machine_here_holds():
  llama = TransformerConfig(128256, 8192, 28672, 80, 64, 8, 128)
  abstract = checkpoint.abstract_base(Transformer(llama), RULES, jnp.bfloat16)
  layers = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
  others = 2 * 128256 * 8192 + 80 * 2 * 8192 + 8192
  bits = memory.quantized_bits(abstract)
  assert bits is not None
  assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
  assert tree_paths.tree_bytes(abstract) == layers * bits / 8 + 2 * others


def test_activations_grow_with_the_batch():
  small, large = (footprint(batch_size).activations for batch_size in (2, 8))
  assert 0 < small
  assert 2 * small < large


def test_the_table_names_each_weight(frozen):
  rows = memory.weight_table(frozen, footprint(2).state)
  by_path = {path: rest for path, *rest in rows}
  shape, treatment, adapter = by_path["layers/mlp/up/kernel"]
  assert shape == "2×32×48"
  assert treatment.startswith("4-bit codes, block 64, ")
  assert adapter == "LoRA rank 4"
  assert by_path["embed/embedding"] == ["64×32", "bfloat16", ""]


class Compiled:
  """Stands for a step, and for its compiled form, that needs so many bytes."""

  def __init__(self, needed):
    self.argument_size_in_bytes, self.output_size_in_bytes = 100, 40
    self.alias_size_in_bytes, self.temp_size_in_bytes = 30, needed

  def lower(self, *_):
    return self

  def compile(self):
    return self

  def memory_analysis(self):
    return self


NEEDED = {"none": 500, "elementwise": 300, "mlp": 200, "full": 90, "offload": 20}


EXPECTED: Any = {name: size + 110 for name, size in NEEDED.items()}


@pytest.mark.parametrize(
  ("available", "policy"),
  [(10000, "elementwise"), (410, "elementwise"), (409, "mlp"), (200, "full"), (130, "offload")],
)
def test_the_fastest_policy_that_fits(available, policy):
  tried = []

  def make_step(name):
    tried.append(name)
    return Compiled(NEEDED[name])

  found, needed = memory.fastest_remat(make_step, (), available, EXPECTED)
  assert found == policy == tried[-1]
  assert needed == {name: NEEDED[name] + 110 for name in tried}
  # What is expected to need far more is not compiled; what might fit is.
  assert all(EXPECTED[name] <= 1.2 * available for name in tried)
  assert available != 409 or tried == ["elementwise", "mlp"]


class RunsOut(Compiled):
  """A step whose compiler fails."""

  def __init__(self, message):
    self.message = message

  def compile(self):
    raise jax.errors.JaxRuntimeError(self.message)


def test_what_the_compiler_runs_out_on_does_not_fit():
  exhausted = RunsOut("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
  steps = {"elementwise": exhausted, "mlp": exhausted, "full": Compiled(90)}
  assert memory.fastest_remat(steps.__getitem__, (), 10000, EXPECTED) == ("full", {"full": 200})
  with pytest.raises(ValueError, match=r"\(elementwise more than the compiler had, mlp more"):
    memory.fastest_remat(lambda _: exhausted, (), 10000, EXPECTED)
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    memory.fastest_remat(lambda _: RunsOut("INTERNAL: a bug"), (), 10000, EXPECTED)


def test_no_policy_fits():
  with pytest.raises(ValueError, match=r"no policy fits in 0.00 GB \(offload.*batch_size"):
    memory.fastest_remat(lambda name: Compiled(NEEDED[name]), (), 100, EXPECTED)

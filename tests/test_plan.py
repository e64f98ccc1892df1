"""The plan's memory against the compiler's account, and against what an H100 measured."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

import qlora_jax as ql
from qlora_jax import lora, optimizer_state, plan, train, tree_paths
from qlora_jax.hf import checkpoint
from qlora_jax.models.transformer import LayerKind, Transformer, TransformerConfig

LAYERS, BATCH, LENGTH = 12, 1, 2048
CONFIG = TransformerConfig(64, 16, 112, LAYERS, 2, 1, 10)
MODEL = Transformer(CONFIG, dtype=jnp.float32, attention="blockwise")
H100 = plan.DEVICES["h100"]
MEASURED = Path(__file__).parents[1] / "experiments/bench/train_step_h100.json"


@functools.cache
def planner() -> plan.Planner:
  rules = {"layers/*/attn/*": ql.QuantizationConfig(), "layers/*/mlp/*": ql.QuantizationConfig()}
  frozen = checkpoint.abstract_base(MODEL, rules, jnp.bfloat16)
  return plan.Planner.of(MODEL, frozen, lora.LoRAConfig(rank=3), optax.adam(1e-3))


@functools.cache
def analysis(remat) -> Any:
  """The compiler's account of a train step."""
  model = MODEL.clone(remat=remat)
  planned, optimizer = planner(), optax.adam(1e-3)

  def make(key, frozen):
    params, constants = lora.init(key, frozen, lora.LoRAConfig(rank=3))
    return train.init_state(params, constants, optimizer, seed=0, dtype=model.dtype)

  state = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)), planned.frozen)
  ids = jax.ShapeDtypeStruct((1, BATCH, LENGTH), jnp.int32)
  mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_)
  batch = {"tokens": ids, "targets": ids, "loss_mask": mask}
  step: Any = train.make_train_step(model, optimizer, 256)
  return step.lower(state, planned.frozen, batch).compile().memory_analysis()


def memory(remat) -> plan.Memory:
  return planner().memory(plan.Step(BATCH, LENGTH, remat, loss_chunk=256))


def test_what_is_given_is_counted():
  counted, found = memory("full"), analysis("full")
  batch = BATCH * LENGTH * (4 + 4 + 1)
  given = counted.base + counted.adapters + counted.optimizer + batch
  # The scalings, ranks, counts and keys beside them.
  assert given <= found.argument_size_in_bytes <= 1.02 * given


@pytest.mark.parametrize("policy", ["mlp", pytest.param("elementwise", marks=pytest.mark.slow)])
def test_what_is_kept_is_the_compilers(policy):
  """Between policies, since what one layer works on is another compiler's on another device."""
  expected = memory(policy).kept - memory("full").kept
  found = analysis(policy).temp_size_in_bytes - analysis("full").temp_size_in_bytes
  assert expected > 1e6
  # What a layer keeps need not be in its working set as well.
  assert 1 - 3 / LAYERS < found / expected < 1 + 1 / LAYERS


def test_a_loop_is_counted_whatever_the_models_form():
  step, held = plan.Step(3, 128, "elementwise"), planner()
  trees = (held.frozen, held.params, held._constants, {})
  loop, row = (plan.Planner(MODEL.clone(unroll=unroll), *trees) for unroll in (False, True))
  assert row.memory(step) == loop.memory(step) and loop.memory(step).kept > 0


def test_what_waits_on_the_host():
  full, offload = memory("full"), memory("offload")
  assert full.host == 0
  assert offload.host == full.kept == LAYERS * BATCH * LENGTH * 16 * 4
  assert offload.kept == 0
  assert full.total - offload.total == full.kept
  pairs = memory("offload_pairs")
  assert (pairs.kept, pairs.host, pairs.total) == (0, offload.host // 2, offload.total)


def test_products_and_pairs_are_counted():
  windowed = dataclasses.replace(CONFIG, layer_pattern=(LayerKind(5), LayerKind(None)))
  pairs = sum(
    1
    for window, i, j in itertools.product((5, 99), range(30), range(30))
    if j <= i and i - j < window
  )
  step = plan.Step(2, 30, "none")
  products, attention = plan.operations(windowed, step)
  weights = 16 * (20 + 2 * 10) + 20 * 16 + 3 * 16 * 112
  assert products == 2 * 30 * (LAYERS * 4 * weights + 4 * 16 * 64)
  # Two products forward, five backward; each of 2 · H · h a pair.
  assert attention == 2 * (LAYERS // 2) * pairs * 2 * 20 * 7
  _, again = plan.operations(windowed, dataclasses.replace(step, remat="full"))
  assert again == attention * 9 // 7


def _dots(jaxpr: Any) -> int:
  """FLOPs of all dot products, those of a scan by its length."""
  count = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      each = math.prod(shape[axis] for axis in contracted)
      count += 2 * each * math.prod(equation.outvars[0].aval.shape)
    inner = sum(_dots(sub) for sub in jaxprs_in_params(equation.params))
    count += equation.params.get("length", 1) * inner
  return count


def traced(config: TransformerConfig, policy: Any, chunk: int | None = None) -> int:
  """FLOPs of the products of 64 tokens' gradient."""
  model = Transformer(config, jnp.float32, policy, attention="plain", mlp_chunk=chunk)
  frozen = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]

  def gradient(x, frozen):
    return jax.grad(lambda x: model.apply({"frozen": frozen}, x, method="blocks")[0].sum())(x)

  x = jax.ShapeDtypeStruct((1, 64, config.hidden_size), jnp.float32)
  jaxpr: Any = jax.make_jaxpr(gradient)(x, frozen).jaxpr
  return _dots(partial_eval.dce_jaxpr(jaxpr, [True], True)[0])


def test_an_odd_number_of_layers_has_no_pairs():
  model = MODEL.clone(config=dataclasses.replace(CONFIG, num_layers=3))
  frozen = checkpoint.abstract_base(model, {}, jnp.float32)
  planned = plan.Planner.of(model, frozen, lora.LoRAConfig(rank=3), optax.adam(1e-3))
  assert "offload_pairs" in planner().policies(H100)
  assert "offload_pairs" not in planned.policies(H100)
  step = plan.Step(1, 512)
  assert planned.fastest(step, H100, 1e12) == "elementwise"
  with pytest.raises(ValueError, match="'offload_pairs' of 3 layers"):
    planned.memory(dataclasses.replace(step, remat="offload_pairs"))


def test_pairs_go_forward_once_more():
  config = TransformerConfig(64, 32, 96, 4, 4, 2, 8)
  pairs, offload = (
    plan.operations(config, plan.Step(1, 64, policy)) for policy in ("offload_pairs", "offload")
  )
  products, attention = (more - less for more, less in zip(pairs, offload, strict=True))
  assert products == 4 * 64 * 2 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 96)
  # What is traced has logits of all pairs of tokens.
  expected = products + attention * 64**2 / (64 * 65 / 2)
  assert traced(config, "offload_pairs") - traced(config, "offload") == expected


@pytest.mark.parametrize("policy", ["full", "mlp", "elementwise", "none"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_what_a_norm_has_computed_again(policy, chunk):
  """Products of a traced gradient, beyond those of a model without that norm."""

  def counts(**fields):
    config = TransformerConfig(64, 32, 96, 3, 4, 2, 8, **fields)
    operations, _ = plan.operations(config, plan.Step(1, 64, policy, chunk))
    return traced(config, policy, chunk), operations

  norms: Any = (
    {"qk_norm": "head"},
    {"qk_norm": "full", "fused_projections": True},
    {"post_norms": True},
    {"qk_norm": "head", "post_norms": True},
  )
  found, expected = counts()
  for fields in norms:
    other, planned = counts(**fields)
    assert other - found == planned - expected, fields


@pytest.mark.parametrize("policy", ["full", "mlp", "none"])
@pytest.mark.parametrize("tokens", [6, 64])
def test_experts_compute_whole_tiles_and_once_more(policy, tokens):
  """Products of a traced gradient, beyond those of as many layers without any MLP."""

  def counts(**fields):
    config = TransformerConfig(64, 32, 16, 3, 4, 2, 8, **fields)
    model = Transformer(config, jnp.float32, policy, attention="plain")
    frozen = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]

    def gradient(x, frozen):
      return jax.grad(lambda x: model.apply({"frozen": frozen}, x, method="blocks")[0].sum())(x)

    x = jax.ShapeDtypeStruct((1, tokens, 32), jnp.float32)
    jaxpr: Any = jax.make_jaxpr(gradient)(x, frozen).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True], True)
    return _dots(needed), plan.operations(config, plan.Step(1, tokens, policy))[0]

  dense, planned_dense = counts()
  found, planned = counts(num_experts=4, experts_per_token=2)
  # The router's own, forward and backward, and again but where all is kept.
  router = 3 * 2 * tokens * 32 * 4 * (3 if policy != "none" else 2)
  assert found - router - dense == planned - planned_dense


@pytest.mark.parametrize(
  ("fields", "step", "capability", "name"),
  [
    ({}, plan.Step(1, 512), 9.0, "cudnn"),
    ({}, plan.Step(1, 512), None, "plain"),
    ({}, plan.Step(1, 1280), None, "blockwise"),
    ({}, plan.Step(1, 512), 7.5, "plain"),
    ({}, plan.Step(1, 2048, packed=True), 8.0, "blockwise"),
    ({"attention_softcap": 3.0}, plan.Step(1, 1024), 9.0, "plain"),
  ],
)
def test_how_attention_is_computed(fields, step, capability, name):
  model = Transformer(dataclasses.replace(CONFIG, head_dim=16, **fields))

  def planned(attention):
    return plan.Planner(model.clone(attention=attention), {}, {}, {}, {}).on(capability)

  assert planned(None).attention(step) == name
  assert planned("blockwise").attention(step) == "blockwise"
  if name == "cudnn":
    assert planned("cudnn").attention(step) == "cudnn"
    return
  reason = "the logits are capped" if fields else "rows of several segments"
  reason = reason if capability and capability >= 8 else "the device is no NVIDIA GPU"
  with pytest.raises(ValueError, match=f"attention: 'cudnn' cannot serve this: {reason}"):
    planned("cudnn").attention(step)


# By XLA for an H100, JAX 0.11.2: (MB of arguments, of temporaries) of rows of the benchmark, as
# `experiments.bench.gpu_compile --steps` gives them. Where no GPU is, attention goes without cuDNN.
# Behind @ stand layers, where they are not the model's: `gpu_compile.step`, once the shape of that
# name in `SHAPES` has so many. `plan._ROUTED`, `_LOGITS` and `_BLOCKS` are fitted on these:
COMPILED = {
  "llama-8b:4x1024:full": (6206, 3154),
  "llama-8b:4x1024:mlp": (6206, 7310),
  "llama-1b:8x1024:full": (1163, 4728),
  "mixtral-8x7b@2:1x2048:full": (2202, 1612),
  "mixtral-8x7b@2:4x2048:full": (2202, 3276),
  "qwen3-30b-a3b@2:1x2048:full": (2310, 1522),
  "qwen3-30b-a3b@2:4x2048:full": (2310, 3759),
  "llama-8b:1x350208:offload": (6209, 39180),
  # And not fitted on.
  "llama-8b:1x350208:offload_pairs": (6209, 39199),
  "llama-3b:2x4096:full": (2534, 2795),
  "qwen3-32b:1x8192:full": (20822, 9369),
  "llama-3b:8x512:elementwise": (2534, 8123),
  "mixtral-8x7b:4x2048:mlp": (27365, 13352),
  "qwen3-30b-a3b:1x8192:elementwise": (26821, 17596),
}


@pytest.mark.parametrize("row", COMPILED)
def test_experts_and_plain_attention_by_the_compilers_account(row, monkeypatch):
  from experiments.bench import train_step

  model, rest = row.split(":", 1)
  model, _, layers = model.partition("@")
  if layers:
    shape = dataclasses.replace(train_step.SHAPES[model], num_layers=int(layers))
    monkeypatch.setitem(train_step.SHAPES, model, shape)
  parsed = train_step.Row.parse(f"{model}:{rest}")
  planned = train_step._planner.__wrapped__(model, True, None, "float32").on(None)
  expected = planned.memory(train_step.plan_step(parsed)).total
  assert abs(expected / (sum(COMPILED[row]) * 1e6) - 1) < 0.05


@pytest.mark.parametrize(
  ("rows", "length", "attention"),
  [(1, 2049, "blockwise"), (3, 1365, "blockwise"), (1, 130, "blockwise"), (2, 700, "plain")],
)
def test_whole_tiles_of_experts_are_kept(rows, length, attention):
  """Where all is kept: what a trace of the very shape keeps."""
  planned = experts(attention)
  trees = (planned.frozen, planned.params, planned._constants)
  leaves, structure = jax.tree.flatten([{"layers": tree.get("layers", {})} for tree in trees])
  model = planned._model.clone(remat="none")
  device, _ = plan._kept_bytes(model, tuple(leaves), structure, (rows, length))  # pyright: ignore
  kept = planned.memory(plan.Step(rows, length, "none")).kept
  # But for what fills up attention's blocks.
  assert kept == pytest.approx(device * rows * length, rel=0.003)


def test_more_tokens_of_experts_keep_more():
  kept = [
    experts("blockwise").memory(plan.Step(1, length, "none")).kept
    for length in range(1920, 2304, 64)
  ]
  assert kept == sorted(kept)


@functools.cache
def experts(attention) -> plan.Planner:
  config = dataclasses.replace(CONFIG, num_experts=32, experts_per_token=2, num_layers=2)
  model = MODEL.clone(config=config, attention=attention)
  frozen = checkpoint.abstract_base(model, {"layers/*/mlp/*": ql.QuantizationConfig()}, jnp.float32)
  return plan.Planner.of(model, frozen, lora.LoRAConfig(rank=3), optax.adam(1e-3))


def test_an_expert_is_decoded_for_each_tile():
  few, many = (
    experts("blockwise").seconds(plan.Step(1, length, "none"), H100).dequantization
    for length in (2048, 8192)
  )
  # 128 rows a tile, and one part empty for each of the 32 experts. But for attention's weights.
  assert many / few == pytest.approx((8192 * 2 / 128 + 32) / (2048 * 2 / 128 + 32), rel=0.1)


def test_the_longest_and_the_largest():
  planned, step = planner(), plan.Step(1, 512, "mlp")
  available = 20e6
  longest = planned.longest(step, available)
  assert longest % 256 == 0
  assert planned.fits(dataclasses.replace(step, seq_len=longest), available)
  assert not planned.fits(dataclasses.replace(step, seq_len=longest + 256), available)
  largest = planned.largest_batch(step, available)
  assert planned.fits(dataclasses.replace(step, batch_size=largest), available)
  assert not planned.fits(dataclasses.replace(step, batch_size=largest + 1), available)
  assert planned.longest(step, 1e3) == planned.largest_batch(step, 1e3) == 0
  # The host's memory bounds what waits there.
  offload = dataclasses.replace(step, remat="offload")
  assert planned.longest(offload, 1e9, host=LAYERS * 16 * 4 * 1024) == 1024


def test_the_fastest_that_fits():
  planned, step = planner(), plan.Step(1, 4096)
  peaks = {each: planned.memory(dataclasses.replace(step, remat=each)).total for each in ("mlp",)}
  assert planned.fastest(step, H100, 1e12) == "elementwise"
  assert planned.fastest(step, H100, peaks["mlp"]) == "mlp"
  assert planned.fastest(step, H100, 1e3) is None


def test_a_chunked_mlp_works_on_less():
  planned, step = planner(), plan.Step(2, 8192)
  chunked = dataclasses.replace(step, mlp_chunk=1024)
  saved = planned.memory(step).working - planned.memory(chunked).working
  assert saved == pytest.approx(planned.fitted.wide * 2 * (8192 - 1024) * 112 * 4, rel=1e-6)


def test_trials_share_a_base_and_its_decoded_weights():
  planned, step = planner(), plan.Step(2, 1024, "mlp", loss_chunk=1)
  one, four = (planned.memory(dataclasses.replace(step, trials=n)) for n in (1, 4))
  assert four.base == one.base
  for part in ("adapters", "optimizer", "gradients", "kept"):
    assert getattr(four, part) == 4 * getattr(one, part), part
  weight = planned.fitted.weights * planned.layer_terms(step)[2]
  assert four.working == pytest.approx(4 * one.working - 3 * weight, rel=1e-6)
  products = [plan.operations(CONFIG, dataclasses.replace(step, trials=n))[0] for n in (1, 4)]
  assert products[1] == 4 * products[0]


def test_trials_of_experts_are_not_planned():
  model = Transformer(dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2))
  with pytest.raises(ValueError, match="trials: 2; of experts, several together are not planned"):
    plan.Planner(model, {}, {}, {}, {}).memory(plan.Step(1, 8, trials=2))


def test_plain_attention_keeps_all_logits_of_a_token():
  planned = plan.Planner(
    MODEL.clone(attention="plain"), planner().frozen, planner().params, planner()._constants, {}
  )
  kept = [planned.memory(plan.Step(2, length, "none")).kept for length in (256, 512, 768)]
  linear, rest = 2 * kept[1] - kept[0] - kept[2], planned.config.num_heads
  # The second difference: of so many arrays of a float32 a pair of tokens, at least one.
  arrays = -linear / (2 * 256**2 * 2 * LAYERS * rest * 4)
  assert 1 <= arrays < 4
  full = [planned.memory(plan.Step(2, length, "full")).working for length in (4096, 8192)]
  assert full[1] / full[0] == pytest.approx(4, rel=0.05)


def test_accumulation_takes_time_and_a_sum():
  planned, step = planner(), plan.Step(1, 512)
  four = dataclasses.replace(step, accumulate_steps=4)
  assert planned.memory(four).total - planned.memory(step).total == planned.adapter_bytes
  assert planned.seconds(four, H100).total == pytest.approx(4 * planned.seconds(step, H100).total)


def test_an_unknown_link_gives_no_time():
  step = plan.Step(1, 512, "offload")
  v5e = plan.DEVICES["v5e"]
  assert math.isnan(planner().seconds(step, v5e).host)
  assert planner().seconds(dataclasses.replace(step, remat="full"), v5e).host == 0
  # The optimizer's state crosses it by each policy: which is the fastest is known all the same.
  held = (planner()._model, planner().frozen, planner().params, planner()._constants)
  optimizer = optimizer_state.stored(optax.adam(1e-3), "host")
  waiting = plan.Planner(*held, jax.make_jaxpr(optimizer.init)(planner().params).out_avals)
  assert math.isnan(waiting.seconds(plan.Step(1, 4096), v5e).total)
  assert waiting.fastest(plan.Step(1, 4096), v5e, 1e12) == "elementwise"


def test_constants_come_back_from_what_they_gave():
  true = plan.Constants(3.0, 8.0, 2.0, 0.5, 0.4, 9.0)
  planned = planner().with_constants(true)
  steps = (plan.Step(1, 512), plan.Step(4, 8192, "mlp"), plan.Step(1, 65536, mlp_chunk=1024))
  rows = []
  for step in steps:
    peak, seconds = planned.memory(step).total, planned.seconds(step, H100).total
    rows.append(plan.Measured(planner(), step, H100, peak, seconds))
  found = plan.fit(rows)
  for name, value in dataclasses.asdict(true).items():
    assert getattr(found, name) == pytest.approx(value, rel=0.02), name
  with pytest.raises(ValueError, match="1 rows do not determine three constants"):
    plan.fit(rows[:1])
  plain = plan.Planner(MODEL.clone(attention="plain"), {}, {}, {}, {})
  with pytest.raises(ValueError, match="2x512:mlp: attention is plain there"):
    plan.fit([*rows, plan.Measured(plain, plan.Step(2, 512, "mlp"), H100, 1, 1)])


def test_an_h100s_rows():
  """5% of the peak and 15% of the time, on rows that nothing was fitted on as well."""
  from experiments import plan as command

  constants, errors = command.fitted(json.loads(MEASURED.read_text()))
  for name, value in dataclasses.asdict(plan.Constants()).items():
    assert value == pytest.approx(getattr(constants, name), rel=1e-3), name
  assert sum(not each["fitted"] for each in errors) >= 3
  for each in errors:
    assert abs(each["peak_error"]) < 0.05, each
    assert abs(each["step_error"]) < 0.15, each


def test_optimizer_states_are_counted_as_they_are():
  planned = planner()
  opt_state = jax.eval_shape(optax.adam(1e-3).init, planned.params)
  assert planned.memory(plan.Step(1, 512)).optimizer == tree_paths.tree_bytes(opt_state)

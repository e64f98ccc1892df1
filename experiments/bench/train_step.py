"""A whole train step at real size: tokens a second, peak memory, share of what the card could do.

  python -m experiments.bench.train_step --out train.json [ROW …] [--peer]

A row is MODEL:BxT:REMAT, such as llama-8b:4x2048:full (see `shapes` and `qlora_jax.models.remat`),
with :16bit behind it for a base that is not quantized, :tables8 or :tables4 for a token table and a
head that are, too, :adam-8bit and the like for how Adam's moments are kept, :chunk2048 for MLPs in
chunks, :unroll for layers in a row and not in a loop; without any, those of `ROWS`. Each runs in a
process of its own, so that peaks are its own: random weights of that shape, made and quantized (NF4
in blocks of 64, double quantization) layer by layer on the device, LoRA of rank 16 on every
projection, bf16, AdamW, the same batch again and again, at least 20 steps; two where one takes over
ten seconds, the second timed; one where it takes over two minutes, which is timed as it is, the
first of its process. The loss must fall where there are two, and the gradient not be zero; the line
says of how few steps it is.

The last column is the share of the time that the step's products, attention's included, would take
at the speed of a large bf16 product measured in the same process. `--peer` runs the same step in
torch with bitsandbytes and PEFT, gradient checkpointing on, where they are installed. Beside each
row that is on a device with a data sheet in `qlora_jax.plan` stands what the plan said of it, and
how far that is off. `--plots DIR` draws speed and memory; with `--draw train.json` nothing runs.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qlora_jax as ql
from experiments.bench import train_step_plots
from experiments.shapes import SHAPES
from qlora_jax import config as config_lib
from qlora_jax import lora, memory, plan, tree_paths
from qlora_jax.hf import checkpoint, stacks
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.optimizer_state import Storage, stored
from qlora_jax.quantization import Treatment, treatments
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.train import init_state, make_train_step

# Every other one is what `experiments.plan --fit` fits the plan's constants on: of each kind one.
ROWS = (
  "llama-8b:4x2048:full",
  "llama-8b:4x2048:mlp",
  "llama-8b:4x2048:elementwise",
  "llama-8b:4x2048:elementwise:16bit",
  "llama-70b:1x2048:full",
  "llama-8b:4x2048:offload",
  "llama-70b:4x2048:offload",
  "llama-8b:1x8192:full",
  "llama-8b:1x81920:offload",
  "llama-3b:2x4096:full",
  "llama-70b:1x2048:offload",
  "llama-3b:2x4096:offload",
)

# Rows of more tokens take an MLP in chunks of so many.
_LONG, _MLP_CHUNK = 32768, 16384
_LORA = lora.LoRAConfig(rank=16)
# Groups of steps are timed, each of about so many seconds, and so many steps in all at least.
_WARM_UP, _GROUPS, _SECONDS, _STEPS = 2, 3, 2.5, 20
# A step that takes longer is warmed up by one, and timed once; one of minutes is taken once.
_SLOW, _ONCE = 10.0, 120.0
# GiB of the host's memory that a process may pin beyond what waits there.
_HOST_SPARE = 4


@dataclasses.dataclass(frozen=True)
class Row:
  """What one process runs."""

  model: str
  batch_size: int
  seq_len: int
  remat: str
  quantized: bool = True
  table_bits: int | None = None
  adam: Storage = "float32"
  mlp_chunk: int | None = None
  unroll: bool = False

  @classmethod
  def parse(cls, text: str) -> "Row":
    """From MODEL:BxT:REMAT, with any of `OPTIONS` behind it.

    Raises:
      ValueError: it is none.
    """
    try:
      model, shape, remat, *options = text.split(":")
      batch_size, seq_len = map(int, shape.split("x"))
      chosen = {name: value for option in options for name, value in OPTIONS[option].items()}
    except (ValueError, KeyError):
      raise ValueError(
        f"{text!r}: no row; MODEL:BxT:REMAT, such as {ROWS[0]}, and behind it any of "
        f"{', '.join(OPTIONS)}"
      ) from None
    if batch_size < 1 or seq_len < 2 or remat not in REMAT_POLICIES:
      raise ValueError(
        f"{text!r}: B is at least 1, T at least 2, and REMAT one of {', '.join(REMAT_POLICIES)}"
      )
    if model not in SHAPES:
      raise ValueError(f"{text!r}: no such model; one of {', '.join(SHAPES)}")
    return cls(model, batch_size, seq_len, remat, **chosen)

  @property
  def is_plain(self) -> bool:
    """Whether it is what a peer runs: a base in 4 bits, and nothing else that differs."""
    return self.quantized and self.table_bits is None and self.adam == "float32"


# What may stand behind a row: fields of `Row`.
OPTIONS: dict[str, dict[str, Any]] = {
  "16bit": {"quantized": False},
  "tables8": {"table_bits": 8},
  "tables4": {"table_bits": 4},
  "adam-bfloat16": {"adam": "bfloat16"},
  "adam-8bit": {"adam": "8bit"},
  "adam-host": {"adam": "host"},
  "chunk2048": {"mlp_chunk": 2048},
  "unroll": {"unroll": True},
}


def architecture(name: str) -> TransformerConfig:
  """The TransformerConfig of a key of `SHAPES`."""
  return SHAPES[name]


def rules(
  shape: TransformerConfig, quantized: bool, table_bits: int | None = None
) -> Mapping[str, Treatment]:
  """What a base is quantized by: projections, and the tables if asked."""
  projections = checkpoint.default_rules(ql.QuantizationConfig() if quantized else None)
  return {**projections, **config_lib.table_rules(table_bits, shape.tie_embeddings)}


def random_base(model: Transformer, quantized: bool, table_bits: int | None = None) -> Any:
  """A frozen tree of random weights; making it takes no more than it and one layer, dense."""
  own = rules(model.config, quantized, table_bits)
  chosen = treatments(checkpoint.model_shapes(model), own)
  shapes = checkpoint.abstract_base(model, own, jnp.bfloat16)

  def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

  def make(key: jax.Array, path: str, like: Any) -> Any:
    if not is_quantized(like):
      return (
        jnp.ones(like.shape, like.dtype)
        if "norm" in path
        else jax.jit(draw, static_argnums=1)(key, like.shape)
      )
    *layers, k, n = like.shape
    treatment = chosen[path]
    assert isinstance(treatment, ql.QuantizationConfig)
    one = jax.jit(lambda key: ql.quantize(draw(key, (k, n)), **treatment.arguments))
    if not layers:
      return one(key)
    # In place: what a `lax.map` gives lay there twice, and 70B's base took 10 GB more than it is.
    stack = stacks.empty(tuple(layers), jax.eval_shape(one, key))
    # Of layers, or of their experts.
    keys = jax.random.split(key, math.prod(layers))
    for index, own_key in zip(np.ndindex(*layers), keys, strict=True):
      # One at a time, or a fast host would have the matrices of many layers made ahead.
      stack = jax.block_until_ready(stacks.write_whole(stack, one(own_key), index))
    return stack

  leaves = tree_paths.leaves(shapes, is_leaf=is_quantized)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  made = {
    path: make(key, path, like) for key, (path, like) in zip(keys, leaves.items(), strict=True)
  }
  return tree_paths.nest(made)


def plan_step(row: Row) -> plan.Step:
  """The row as the plan has it."""
  return plan.Step(row.batch_size, row.seq_len, row.remat, _mlp_chunk(row))  # pyright: ignore


def _mlp_chunk(row: Row) -> int | None:
  return row.mlp_chunk or (_MLP_CHUNK if row.seq_len > _LONG else None)


@functools.cache
def _planner(model: str, quantized: bool, table_bits: int | None, adam: Storage) -> plan.Planner:
  transformer = Transformer(architecture(model))
  own = rules(transformer.config, quantized, table_bits)
  frozen = checkpoint.abstract_base(transformer, own, jnp.bfloat16)
  return plan.Planner.of(transformer, frozen, _LORA, _optimizer(adam))


def planner(row: Row) -> plan.Planner:
  """Of the row's base, adapters and optimizer."""
  return _planner(row.model, row.quantized, row.table_bits, row.adam)


def planned_device(kind: str) -> plan.Device | None:
  """The data sheet of a device by JAX's name for it; None without one."""
  # "TPU v5 lite" is sold as v5e; JAX says "GeForce RTX 4090".
  name = re.sub(r"\b(v\d) lite\b", r"\1e", kind.lower()).replace("rtx ", "rtx")
  words = re.sub(r"[^a-z0-9]+", "-", name.replace("rtxa6000", "a6000")).split("-")
  names = {"a100": "a100-40gb" if "40gb" in words else "a100"}
  found = [names.get(word, word) for word in words]
  return next((plan.DEVICES[name] for name in found if name in plan.DEVICES), None)


def flops(config: TransformerConfig, row: Row) -> int:
  """Of one step: see `plan.operations`."""
  return sum(plan.operations(config, plan_step(row)))


def product_speed() -> float:
  """FLOP/s of a large bf16 product."""
  size = 256 if jax.default_backend() == "cpu" else 8192
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

  @jax.jit
  def chain(x):
    return jax.lax.fori_loop(0, 20, lambda _, y: jnp.matmul(y, x) * jnp.bfloat16(size**-0.5), x)

  seconds = []
  for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready(chain(x))
    seconds.append(time.perf_counter() - start)
  return 20 * 2 * size**3 / min(seconds)


def _optimizer(storage: Storage) -> optax.GradientTransformation:
  return stored(optax.adamw(2e-4), storage)


def _model(row: Row) -> Transformer:
  how: dict[str, Any] = {"remat": row.remat, "mlp_chunk": _mlp_chunk(row), "unroll": row.unroll}
  return Transformer(architecture(row.model), **how)


def build(row: Row) -> tuple[Any, Any, Any, Any]:
  """The jitted step, and its state, base and batch."""
  model = _model(row)
  frozen = random_base(model, row.quantized, row.table_bits)
  optimizer = _optimizer(row.adam)
  params, constants = lora.init(jax.random.key(1), frozen, _LORA)
  state = init_state(params, constants, optimizer, seed=0, dtype=model.dtype)
  batch = random_batch((1, row.batch_size, row.seq_len), model.config.vocab_size)
  return make_train_step(model, optimizer), state, frozen, batch


def abstract(row: Row) -> tuple[Any, Any, Any, Any]:
  """What `build` gives, as shapes."""
  model = _model(row)
  own = rules(model.config, row.quantized, row.table_bits)
  frozen = checkpoint.abstract_base(model, own, jnp.bfloat16)
  optimizer = _optimizer(row.adam)

  def start(key, frozen):
    params, constants = lora.init(key, frozen, _LORA)
    return init_state(params, constants, optimizer, seed=0, dtype=model.dtype)

  state = jax.eval_shape(start, jax.eval_shape(lambda: jax.random.key(1)), frozen)
  shape = (1, row.batch_size, row.seq_len)
  batch = jax.eval_shape(lambda: random_batch(shape, model.config.vocab_size))
  return make_train_step(model, optimizer), state, frozen, batch


def random_batch(shape: tuple[int, ...], vocab_size: int) -> dict[str, jax.Array]:
  """Random tokens `[..., A, B, T]` and what follows them, as a step takes them."""
  tokens = jax.random.randint(jax.random.key(2), shape, 0, vocab_size)
  return {
    "tokens": tokens,
    "targets": jnp.roll(tokens, -1, -1),
    "loss_mask": jnp.ones(shape, bool),
  }


def timed(
  compiled: Any, state: Any, rest: Sequence[Any], seconds_a_group: float
) -> tuple[list[np.ndarray], list[float], np.ndarray]:
  """Repeats a step on one batch, so that its loss must fall.

  Args:
    compiled: `(state, *rest) → (state, metrics)`, which takes over the state.
    seconds_a_group: about how long a group of steps, which is timed as a whole, shall take.

  Returns:
    Losses of each step, `[trials]` (one of a single training), one step's alone where that took
    over two minutes; seconds a step of each group; the last gradient norms.

  Raises:
    RuntimeError: a loss that did not fall or is not finite, or a gradient of zero.
  """
  losses, groups, metrics, seconds = [], [], {}, 0.0
  for _ in range(_WARM_UP):
    start = time.perf_counter()
    state, metrics = compiled(state, *rest)
    losses.append(np.asarray(metrics["loss"]).reshape(-1))
    seconds = time.perf_counter() - start
    if seconds > _SLOW:
      break
  if seconds > _ONCE:
    norms = np.asarray(metrics["grad_norm"]).reshape(-1)
    if not np.isfinite(losses[0]).all() or not (norms > 0).all():
      raise RuntimeError(f"loss {losses[0]}, gradient norm {norms}: what is trained does not learn")
    return losses, [seconds], norms
  steps = max(1, round(seconds_a_group / seconds))
  if seconds < _SLOW:
    steps = max(steps, -(-(_STEPS - _WARM_UP) // _GROUPS))
  for _ in range(_GROUPS if seconds < _SLOW else 1):
    start = time.perf_counter()
    found = []
    for _ in range(steps):
      state, metrics = compiled(state, *rest)
      found.append(metrics["loss"])
    jax.block_until_ready(metrics)
    groups.append((time.perf_counter() - start) / steps)
    losses += [np.asarray(loss).reshape(-1) for loss in found]
  norms = np.asarray(metrics["grad_norm"]).reshape(-1)
  if not (losses[-1] < losses[0]).all() or not (norms > 0).all():
    raise RuntimeError(f"losses {losses}, gradient norms {norms}: what is trained does not learn")
  return losses, groups, norms


def measure(row: Row) -> dict[str, Any]:
  """Runs a row in this process: what was measured, and under `plan` what was said of it."""
  speed = product_speed()
  step, state, frozen, batch = build(row)
  jax.block_until_ready((state, frozen))
  before = _peak_bytes()
  start = time.perf_counter()
  compiled = step.lower(state, frozen, batch).compile()
  compile_seconds = time.perf_counter() - start
  analysis = compiled.memory_analysis()
  base_bytes = tree_paths.tree_bytes(frozen)
  losses, groups, norms = timed(compiled, state, (frozen, batch), _SECONDS)
  seconds = statistics.median(groups)
  device = jax.devices()[0]
  found = {
    "tokens_per_second": row.batch_size * row.seq_len / seconds,
    "step_seconds": groups,
    "peak_bytes": _peak_bytes(),
    # Of what came before: where it is the peak, the step's own is lower.
    "peak_bytes_before": before,
    "step_bytes": memory.step_bytes(compiled),
    "base_bytes": base_bytes,
    "temporary_bytes": analysis.temp_size_in_bytes,
    "host_temporary_bytes": analysis.host_temp_size_in_bytes,
    "limit": flops(architecture(row.model), row) / speed / seconds,
    "product_flop_s": speed,
    "compile_seconds": compile_seconds,
    "losses": [loss.item() for loss in losses],
    "gradient_norm": norms.item(),
    "device": device.device_kind,
    "jax": jax.__version__,
  }
  return found | {"plan": planned(row, found)}


def _peak_bytes() -> int | None:
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def planned(row: Row, found: dict[str, Any]) -> dict[str, Any] | None:
  """What the plan says of a row, and how far off it is; None for a device without a data sheet.

  And None for a time in which a link of unknown speed is crossed.
  """
  device = planned_device(found["device"])
  if device is None:
    return None
  expected, step = planner(row).on(device.capability), plan_step(row)
  needed, seconds = expected.memory(step), expected.seconds(step, device)
  return {
    "bytes": dataclasses.asdict(needed),
    "seconds": {k: plan.known(v) for k, v in dataclasses.asdict(seconds).items()},
    "peak_bytes": needed.total,
    "peak_error": needed.total / found["step_bytes"] - 1,
    "step_seconds": plan.known(seconds.total),
    "step_error": plan.known(seconds.total / statistics.median(found["step_seconds"]) - 1),
  }


PEER = """
import json, statistics, sys, time
import torch, transformers, bitsandbytes as bnb, peft
v, d, i, layers, heads, groups, h, tied, batch, length, warm_up, repeats = map(
  int, sys.argv[1:-1])
config = transformers.LlamaConfig(vocab_size=v, hidden_size=d, intermediate_size=i,
  num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups, head_dim=h,
  max_position_embeddings=length, rope_theta=500000.0, tie_word_embeddings=bool(tied))
config._attn_implementation = "sdpa"
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
  model = transformers.LlamaForCausalLM(config)
for name, module in list(model.named_modules()):
  if isinstance(module, torch.nn.Linear) and name != "lm_head":
    packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False,
      compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True, device="meta")
    packed.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False,
      quant_type="nf4", compress_statistics=True).to("cuda")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, packed)
for parameter in model.parameters():
  parameter.requires_grad_(False)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=names))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
tokens = torch.randint(0, v, (batch, length), device="cuda")
torch.cuda.empty_cache()
torch.cuda.reset_peak_memory_stats()
def step():
  loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
  loss.backward()
  optimizer.step()
  optimizer.zero_grad()
  return loss
for _ in range(warm_up):
  start = time.perf_counter()
  step()
  torch.cuda.synchronize()
  steps = max(1, round(float(sys.argv[-1]) / (time.perf_counter() - start)))
seconds = []
for _ in range(repeats):
  torch.cuda.synchronize()
  start = time.perf_counter()
  for _ in range(steps):
    loss = step()
  torch.cuda.synchronize()
  seconds.append((time.perf_counter() - start) / steps)
print(json.dumps({"tokens_per_second": batch * length / statistics.median(seconds),
  "peak_bytes": torch.cuda.max_memory_allocated(), "loss": float(loss),
  "step_seconds": seconds, "torch": torch.__version__, "transformers": transformers.__version__,
  "bitsandbytes": bnb.__version__, "peft": peft.__version__}))
"""


def child(command: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
  """The JSON that a process prints last, or the end of its error."""
  result = subprocess.run(
    command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
  )
  if result.returncode:
    # JAX ends with a note on tracebacks; what went wrong stands before it.
    lines = [line for line in result.stderr.splitlines() if re.match(r"[\w.]+(Error|Exit)\b", line)]
    return {
      "error": (lines or [f"exit status {result.returncode}"])[-1],
      "log": result.stderr[-4000:],
    }
  return json.loads(result.stdout.strip().splitlines()[-1])


def peer(row: Row) -> dict[str, Any]:
  """The row in torch with bitsandbytes and PEFT, in a process of its own."""
  for package in ("torch", "bitsandbytes", "peft", "transformers"):
    try:
      importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return {"error": f"{package} is not installed"}
  config = architecture(row.model)
  if config.model_type != "llama":
    return {"error": f"{row.model}: the peer is written for Llamas"}
  shape = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers)
  heads = (config.num_heads, config.num_kv_heads, config.head_dim, int(config.tie_embeddings))
  numbers = (*shape, *heads, row.batch_size, row.seq_len, _WARM_UP, _GROUPS, _SECONDS)
  return child([sys.executable, "-c", PEER, *map(str, numbers)], {})


def line(text: str, who: str, found: dict[str, Any]) -> str:
  """A row of the table."""
  if "error" in found:
    return f"{text:32} {who:14} failed: {found['error'][:200]}"
  share = f"{found['limit']:.2f}" if "limit" in found else ""
  peak = found["peak_bytes"]
  size = "" if peak is None else f"{peak / 1e9:8.2f} GB"
  off = found.get("plan")
  errors = ""
  if off is not None:
    time_off = off["step_error"]
    errors = f"  plan {100 * off['peak_error']:+.1f}%"
    errors += ", no time" if time_off is None else f", {100 * time_off:+.1f}%"
  speed = f"{found['tokens_per_second']:10,.0f} tok/s"
  few = len(found.get("losses", ()))
  of = {1: "  one step, compared with none", 2: "  two steps"}.get(few, "")
  return f"{text:32} {who:14} {speed} {size} {share:>6}{errors}{of}"


def _environment(row: Row) -> dict[str, str]:
  """Of the row's process: nearly all of the card, and of the host what waits there.

  What the user's own environment says of either stays.
  """
  config = architecture(row.model)
  waiting = 2 * config.num_layers * row.batch_size * row.seq_len * config.hidden_size
  layers_a_wait = {"offload": 1, "offload_pairs": 2}.get(row.remat)
  gib = 0 if layers_a_wait is None else -(-waiting // (layers_a_wait * 2**30)) + _HOST_SPARE
  # XLA pins 64 GiB at most where it is not told. Not all of the host's by default: what it pins it
  # takes in powers of two, up to this.
  own = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": str(max(gib, 64)),
  }
  return {name: os.environ.get(name, value) for name, value in own.items()}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the rows that `argv` asks for; 1 if one of ours failed."""
  parser = argparse.ArgumentParser(description="A whole train step at real size.")
  parser.add_argument("rows", nargs="*", metavar="MODEL:BxT:REMAT")
  parser.add_argument("--out", type=Path)
  parser.add_argument("--peer", action="store_true", help="torch with bitsandbytes and PEFT too")
  parser.add_argument("--plots", type=Path, help="a directory for figures")
  parser.add_argument("--draw", type=Path, help="draws what an earlier --out wrote; runs nothing")
  parser.add_argument("--here", action="store_true", help="one row, in this process; prints JSON")
  arguments = parser.parse_args(argv)
  try:
    rows = {text: Row.parse(text) for text in arguments.rows or ROWS}
  except ValueError as error:
    parser.error(str(error))
  if arguments.draw is not None:
    train_step_plots.draw(json.loads(arguments.draw.read_text()), arguments.plots or Path())
    return 0
  if arguments.here and len(rows) != 1:
    parser.error(f"--here: {len(rows)} rows; one is run")
  if arguments.here:
    print(json.dumps(measure(next(iter(rows.values())))))
    return 0
  results, failed = [], False
  for text, row in rows.items():
    command = [sys.executable, "-m", "experiments.bench.train_step", text, "--here"]
    found = {"ours": child(command, _environment(row))}
    if arguments.peer and row.is_plain:
      found["peer"] = peer(row)
    for who, each in found.items():
      print(line(text, who, each), flush=True)
    failed |= "error" in found["ours"]
    results.append({"row": text, **found})
    if arguments.out:
      # After each: what was measured stays if a later row takes the process down.
      arguments.out.write_text(json.dumps(results, indent=1))
  if arguments.plots:
    train_step_plots.draw(results, arguments.plots)
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())

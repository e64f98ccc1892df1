"""A whole train step at real size: tokens a second, peak memory, share of what the card could do.

  python -m experiments.bench.train_step --out train.json [ROW …] [--peer]

A row is MODEL:BxT:REMAT, such as llama-8b:4x2048:full (see `MODELS` and `qlora_jax.models.remat`),
with :16bit behind it for a base that is not quantized; without any, those of `ROWS`. Each runs in a
process of its own, so that peaks are its own: random weights of that shape, made and quantized (NF4
in blocks of 64, double quantization) layer by layer on the device, LoRA of rank 16 on every
projection, bf16, AdamW, the same batch again and again. The loss must fall and the gradient not be
zero.

The last column is the share of the time that the step's products, attention's included, would take
at the speed of a large bf16 product measured in the same process. `--peer` runs the same step in
torch with bitsandbytes and PEFT, gradient checkpointing on, where they are installed.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qlora_jax as ql
from qlora_jax import lora, tree_paths
from qlora_jax.hf import checkpoint
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.train import init_state, make_train_step

# vocabulary, D, I, layers, heads, groups, h
MODELS: dict[str, tuple[int, int, int, int, int, int, int]] = {
  "llama-8b": (128256, 4096, 14336, 32, 32, 8, 128),
  "llama-70b": (128256, 8192, 28672, 80, 64, 8, 128),
  "llama-3b": (128256, 3072, 8192, 28, 24, 8, 128),
  "llama-1b": (128256, 2048, 8192, 16, 32, 8, 64),
  "tiny": (256, 64, 128, 2, 4, 2, 16),
}
TIED = ("llama-3b", "llama-1b")

ROWS = (
  "llama-8b:4x2048:full",
  "llama-8b:4x2048:mlp",
  "llama-8b:4x2048:elementwise",
  "llama-8b:4x2048:elementwise:16bit",
  "llama-8b:1x8192:full",
  "llama-3b:2x4096:full",
  "llama-70b:1x2048:full",
)

# Rows of more tokens take an MLP in chunks of so many.
_LONG, _MLP_CHUNK = 32768, 16384
# Groups of steps are timed, each of about so many seconds.
_WARM_UP, _GROUPS, _SECONDS = 2, 3, 2.5


@dataclasses.dataclass(frozen=True)
class Row:
  """What one process runs."""

  model: str
  batch_size: int
  seq_len: int
  remat: str
  quantized: bool = True

  @classmethod
  def parse(cls, text: str) -> "Row":
    """From MODEL:BxT:REMAT or MODEL:BxT:REMAT:16bit.

    Raises:
      ValueError: it is none.
    """
    try:
      model, shape, remat, *kind = text.split(":")
      batch_size, seq_len = map(int, shape.split("x"))
      if kind not in ([], ["16bit"]):
        raise ValueError
    except ValueError:
      raise ValueError(f"{text!r}: no row; MODEL:BxT:REMAT, such as {ROWS[0]}") from None
    if batch_size < 1 or seq_len < 2 or remat not in REMAT_POLICIES:
      raise ValueError(
        f"{text!r}: B is at least 1, T at least 2, and REMAT one of {', '.join(REMAT_POLICIES)}"
      )
    if model not in MODELS:
      raise ValueError(f"{text!r}: no such model; one of {', '.join(MODELS)}")
    return cls(model, batch_size, seq_len, remat, not kind)


def architecture(name: str) -> TransformerConfig:
  """The TransformerConfig of a key of `MODELS`."""
  v, d, i, layers, heads, groups, h = MODELS[name]
  return TransformerConfig(v, d, i, layers, heads, groups, h, tie_embeddings=name in TIED)


def random_base(model: Transformer, quantized: bool) -> Any:
  """A frozen tree of random weights, packed a layer at a time, so that no stack is ever dense."""
  rules = checkpoint.default_rules(ql.QuantizationConfig() if quantized else None)
  shapes = checkpoint.abstract_base(model, rules, jnp.bfloat16)

  def make(key: jax.Array, path: str, like: Any) -> Any:
    def draw(key, shape):
      return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    if is_quantized(like):
      layers, *shape = like.shape
      return jax.lax.map(lambda key: ql.quantize(draw(key, shape)), jax.random.split(key, layers))
    return jnp.ones(like.shape, like.dtype) if "norm" in path else draw(key, like.shape)

  leaves = tree_paths.leaves(shapes, is_leaf=is_quantized)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  made = {
    path: jax.jit(functools.partial(make, path=path, like=like))(key)
    for key, (path, like) in zip(keys, leaves.items(), strict=True)
  }
  return tree_paths.nest(made)


def flops(config: Any, row: Row) -> int:
  """Of one step: the products with the base, and attention's, with what `remat` computes again.

  2 a weight a token forward, 2 for the input's gradient; attention's two products of T · T / 2
  pairs, and the five of its backward pass.
  """
  tokens = row.batch_size * row.seq_len
  d, i = config.hidden_size, config.intermediate_size
  q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  first = d * (q + 2 * kv) + q * d
  wide, last = 2 * d * i, i * d
  pairs = tokens * (row.seq_len + 1) // 2
  attention = 2 * 2 * pairs * q
  layer = 4 * tokens * (first + wide + last) + attention + attention * 5 // 2
  if row.remat in ("full", "offload"):
    layer += 2 * tokens * (first + wide) + attention
  elif row.remat == "mlp" or row.seq_len > _LONG:
    layer += 2 * tokens * wide
  return config.num_layers * layer + 4 * tokens * d * config.vocab_size


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


def build(row: Row) -> tuple[Any, Any, Any, Any]:
  """The jitted step, and its state, base and batch."""
  config = architecture(row.model)
  mlp_chunk = _MLP_CHUNK if row.seq_len > _LONG else None
  model = Transformer(config, remat=row.remat, mlp_chunk=mlp_chunk)  # pyright: ignore
  frozen = random_base(model, row.quantized)
  optimizer = optax.adamw(2e-4)
  params, constants = lora.init(jax.random.key(1), frozen, lora.LoRAConfig(rank=16))
  state = init_state(params, constants, optimizer, seed=0, dtype=model.dtype)
  batch = random_batch((1, row.batch_size, row.seq_len), config.vocab_size)
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
    Losses after each step of the warm-up and each group, `[trials]` (one of a single training);
    seconds a step of each group; the last gradient norms.

  Raises:
    RuntimeError: a loss that did not fall, or a gradient of zero.
  """
  losses, groups, metrics, seconds = [], [], {}, 0.0
  for _ in range(_WARM_UP):
    start = time.perf_counter()
    state, metrics = compiled(state, *rest)
    losses.append(np.asarray(metrics["loss"]).reshape(-1))
    seconds = time.perf_counter() - start
  steps = max(1, round(seconds_a_group / seconds))
  for _ in range(_GROUPS):
    start = time.perf_counter()
    for _ in range(steps):
      state, metrics = compiled(state, *rest)
    losses.append(np.asarray(metrics["loss"]).reshape(-1))
    groups.append((time.perf_counter() - start) / steps)
  norms = np.asarray(metrics["grad_norm"]).reshape(-1)
  if not (losses[-1] < losses[0]).all() or not (norms > 0).all():
    raise RuntimeError(f"losses {losses}, gradient norms {norms}: what is trained does not learn")
  return losses, groups, norms


def measure(row: Row) -> dict[str, Any]:
  """Runs a row in this process."""
  speed = product_speed()
  step, state, frozen, batch = build(row)
  start = time.perf_counter()
  compiled = step.lower(state, frozen, batch).compile()
  compile_seconds = time.perf_counter() - start
  analysis = compiled.memory_analysis()
  losses, groups, norms = timed(compiled, state, (frozen, batch), _SECONDS)
  seconds = statistics.median(groups)
  device = jax.devices()[0]
  statistics_of_device = device.memory_stats() or {}
  return {
    "tokens_per_second": row.batch_size * row.seq_len / seconds,
    "step_seconds": groups,
    "peak_bytes": statistics_of_device.get("peak_bytes_in_use"),
    "base_bytes": tree_paths.tree_bytes(frozen),
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
  tied = int(row.model in TIED)
  numbers = (*MODELS[row.model], tied, row.batch_size, row.seq_len, _WARM_UP, _GROUPS, _SECONDS)
  return child([sys.executable, "-c", PEER, *map(str, numbers)], {})


def line(text: str, who: str, found: dict[str, Any]) -> str:
  """A row of the table."""
  if "error" in found:
    return f"{text:32} {who:14} failed: {found['error'][:200]}"
  share = f"{found['limit']:.2f}" if "limit" in found else ""
  peak = found["peak_bytes"]
  memory = "" if peak is None else f"{peak / 1e9:8.2f} GB"
  return f"{text:32} {who:14} {found['tokens_per_second']:10,.0f} tok/s {memory} {share:>6}"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the rows that `argv` asks for; 1 if one of ours failed."""
  parser = argparse.ArgumentParser(description="A whole train step at real size.")
  parser.add_argument("rows", nargs="*", metavar="MODEL:BxT:REMAT")
  parser.add_argument("--out", type=Path)
  parser.add_argument("--peer", action="store_true", help="torch with bitsandbytes and PEFT too")
  parser.add_argument("--here", action="store_true", help="one row, in this process; prints JSON")
  arguments = parser.parse_args(argv)
  try:
    rows = {text: Row.parse(text) for text in arguments.rows or ROWS}
  except ValueError as error:
    parser.error(str(error))
  if arguments.here and len(rows) != 1:
    parser.error(f"--here: {len(rows)} rows; one is run")
  if arguments.here:
    print(json.dumps(measure(next(iter(rows.values())))))
    return 0
  results, failed = [], False
  for text, row in rows.items():
    command = [sys.executable, "-m", "experiments.bench.train_step", text, "--here"]
    found = {"ours": child(command, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"})}
    if arguments.peer and row.quantized:
      found["peer"] = peer(row)
    for who, each in found.items():
      print(line(text, who, each), flush=True)
    failed |= "error" in found["ours"]
    results.append({"row": text, **found})
    if arguments.out:
      # After each: what was measured stays if a later row takes the process down.
      arguments.out.write_text(json.dumps(results, indent=1))
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())

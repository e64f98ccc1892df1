"""Many trials in one program at real size: tokens a second summed over trials, by their number.

  python -m experiments.bench.trial_groups --out groups.json [ROW …] [--peer]

A row is MODEL:TRIALSxT:REMAT, such as llama-1b:32x128:elementwise (see `experiments.shapes` and
`qlora_jax.models.remat`), each trial with a batch of one sequence of T tokens; behind it may stand
:r8 for adapters of that rank (16), :c256 for the tokens of a trial whose logits exist at once
(1024), :f32 to compute in float32, and :unroll for layers in a row (`Transformer.unroll`). Without
any, those of `ROWS`. One trial is trained by the step of a single training
(`train.make_train_step`), more by that of a group (`trial_groups.make_group_step`). Each row runs
in a process of its own: random weights made and quantized on the device as by `train_step`, AdamW,
a learning rate and a seed for each trial, the same batch again and again. Each trial's loss must
fall and its gradient not be zero.

Beside the speed stand its ratio to the model's fastest row of one trial before it (or, `compiled`,
with the seconds to compile counted into `--steps` steps of each), the share of the time that the
base's products would take at the speed of a large bf16 product, and what takes most of the rest of
the time, as far as bytes tell: the optimizer, which reads and writes each trial's own state, the
logits, or else the adapters' own products and what is computed an element at a time.

`--peer` trains one such trial in torch with bitsandbytes and PEFT: the trials one after another.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import train_step
from qlora_jax import lora, optimizers, tree_paths, trial_groups
from qlora_jax.config import OptimizerConfig
from qlora_jax.models.transformer import Transformer
from qlora_jax.train import init_state, make_train_step

ROWS = (
  "llama-1b:1x128:elementwise",
  *(f"llama-1b:{trials}x128:elementwise:unroll" for trials in (1, 2, 4, 8, 16, 32, 64)),
  "llama-1b:32x128:elementwise",
  "llama-1b:32x128:elementwise:unroll:r8",
  "llama-1b:32x128:elementwise:unroll:r4",
  "llama-1b:1x512:elementwise",
  "llama-1b:1x512:elementwise:unroll",
  "llama-1b:16x512:elementwise:unroll",
  "llama-8b:1x512:elementwise",
  "llama-8b:8x512:elementwise:unroll",
  "llama-8b:8x512:elementwise",
)

_OPTIONS: dict[str, dict[str, Any]] = {"f32": {"dtype": "float32"}, "unroll": {"unroll": True}}
_STEPS = 1000
_OPTIMIZER = OptimizerConfig(schedule="constant", warmup_steps=0, clip_norm=1.0)
# Of a group of steps that is timed.
_SECONDS = 1.2


@dataclasses.dataclass(frozen=True)
class Row:
  """What one process runs."""

  model: str
  trials: int
  seq_len: int
  remat: str
  rank: int = 16
  loss_chunk: int = 1024
  dtype: str = "bfloat16"
  unroll: bool = False

  @classmethod
  def parse(cls, text: str) -> "Row":
    """From MODEL:TRIALSxT:REMAT, with :rR, :cC, :f32 and :unroll behind it.

    Raises:
      ValueError: it is none.
    """
    options = {}
    parts = text.split(":")
    for part in parts[3:]:
      if part in _OPTIONS:
        options |= _OPTIONS[part]
        continue
      name = {"r": "rank", "c": "loss_chunk"}.get(part[:1])
      if name is None or not part[1:].isdigit() or int(part[1:]) < 1:
        raise ValueError(
          f"{text!r}: {part!r}; behind it stand :rR and :cC, of 1 or more, :f32, :unroll"
        )
      options[name] = int(part[1:])
    # Trials take the place of a batch's sequences.
    one = train_step.Row.parse(":".join(parts[:3]))
    return cls(one.model, one.batch_size, one.seq_len, one.remat, **options)

  @property
  def as_batch(self) -> train_step.Row:
    """The row of one training on as many tokens."""
    return train_step.Row(self.model, self.trials, self.seq_len, self.remat)

  @property
  def single(self) -> tuple[str, int, int, str]:
    """What it shares with the row of one trial that it is compared with."""
    return self.model, self.seq_len, self.rank, self.dtype


def build(row: Row, frozen: Any = None) -> tuple[Any, Any]:
  """The jitted step, and its arguments; `frozen`: shapes, for a step that is only lowered."""
  config = train_step.architecture(row.model)
  model = Transformer(config, jnp.dtype(row.dtype), row.remat, unroll=row.unroll)  # pyright: ignore[reportArgumentType]
  frozen = train_step.random_base(model, quantized=True) if frozen is None else frozen
  cfg = lora.LoRAConfig(rank=row.rank)
  optimizer = optimizers.make(_OPTIMIZER, _STEPS)

  def start(seed):
    params, constants = lora.init(jax.random.key(seed), frozen, cfg)
    return init_state(params, constants, optimizer, seed=0, dtype=model.dtype)

  batch = train_step.random_batch((row.trials, 1, 1, row.seq_len), config.vocab_size)
  if row.trials == 1:
    step = make_train_step(model, optimizer, row.loss_chunk)
    return step, (jax.jit(start)(0), frozen, jax.tree.map(lambda x: x[0], batch))
  step = trial_groups.make_group_step(
    model, lambda rates: optimizers.make(_OPTIMIZER, _STEPS, rates), row.loss_chunk
  )
  rates = np.geomspace(1e-4, 4e-4, row.trials, dtype=np.float32)
  rates = jnp.asarray(np.repeat(rates[:, None], _STEPS, 1))
  states = jax.jit(jax.vmap(start))(jnp.arange(row.trials))
  learning = jnp.ones(row.trials, jnp.bool_)
  return step, (states, rates, learning, frozen, batch)


def copy_speed() -> float:
  """Bytes a second, read and written, of a large copy."""
  x = jnp.ones((2**20 if jax.default_backend() == "cpu" else 2**28,), jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(copy(x))
    seconds.append(time.perf_counter() - start)
  return 2 * x.nbytes / min(seconds)


def measure(row: Row, steps: int) -> dict[str, Any]:
  """Runs a row in this process."""
  speed, bandwidth = train_step.product_speed(), copy_speed()
  step, (state, *rest) = build(row)
  start = time.perf_counter()
  compiled = step.lower(state, *rest).compile()
  compile_seconds = time.perf_counter() - start
  analysis = compiled.memory_analysis()
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  losses, groups, norms = train_step.timed(compiled, state, rest, _SECONDS)
  seconds = statistics.median(groups)
  tokens = row.trials * row.seq_len
  config = train_step.architecture(row.model)
  parts = {
    "products": train_step.flops(config, row.as_batch) / speed,
    # Gradient, parameter and two moments are read, the last three written; float32.
    "optimizer": 7 * 4 * parameters / bandwidth,
    # Written and read, and their gradient, at the least; float32.
    "logits": 4 * 4 * tokens * config.vocab_size / bandwidth,
  }
  parts["adapters and elementwise"] = max(seconds - sum(parts.values()), 0.0)
  device = jax.devices()[0]
  return {
    "tokens_per_second": tokens / seconds,
    "tokens_per_second_with_compiling": tokens * steps / (steps * seconds + compile_seconds),
    "step_seconds": groups,
    "compile_seconds": compile_seconds,
    "limit": parts["products"] / seconds,
    "parts_seconds": parts,
    "next": max((name for name in parts if name != "products"), key=parts.__getitem__),
    "product_flop_s": speed,
    "copy_bytes_s": bandwidth,
    "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    "temporary_bytes": analysis.temp_size_in_bytes,
    "base_bytes": tree_paths.tree_bytes(rest[-2]),
    "trained_parameters": parameters,
    "first_losses": losses[0].tolist(),
    "last_losses": losses[-1].tolist(),
    "least_gradient_norm": float(norms.min()),
    "device": device.device_kind,
    "jax": jax.__version__,
  }


def line(text: str, found: dict[str, Any], single: dict[str, Any] | None) -> str:
  """A row of the table; `single`: of the one trial that it is compared with, where there is one."""
  if "error" in found:
    return f"{text:34} failed: {found['error'][:200]}"
  ratios = ""
  if single is not None:
    names = ("tokens_per_second", "tokens_per_second_with_compiling")
    plain, compiled = (found[name] / single[name] for name in names)
    ratios = f"{plain:6.2f}× {compiled:6.2f}× compiled"
  peak = found["peak_bytes"]
  memory = "" if peak is None else f"{peak / 1e9:6.2f} GB"
  return (
    f"{text:34} {found['tokens_per_second']:10,.0f} tok/s {ratios:26} {memory} "
    f"products {found['limit']:.2f}, then {found['next']} "
    f"{found['parts_seconds'][found['next']] / statistics.median(found['step_seconds']):.2f}"
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the rows that `argv` asks for; 1 if one of ours failed."""
  parser = argparse.ArgumentParser(description="Many trials in one program at real size.")
  parser.add_argument("rows", nargs="*", metavar="MODEL:TRIALSxT:REMAT")
  parser.add_argument("--out", type=Path)
  parser.add_argument("--steps", type=int, default=300, help="of a trial, to share the compiling")
  parser.add_argument("--peer", action="store_true", help="torch with bitsandbytes and PEFT too")
  parser.add_argument("--here", action="store_true", help="one row, in this process; prints JSON")
  arguments = parser.parse_args(argv)
  try:
    rows = {text: Row.parse(text) for text in arguments.rows or ROWS}
  except ValueError as error:
    parser.error(str(error))
  if arguments.here:
    if len(rows) != 1:
      parser.error(f"--here: {len(rows)} rows; one is run")
    print(json.dumps(measure(next(iter(rows.values())), arguments.steps)))
    return 0
  results, singles, failed = [], {}, False
  # A loop and a row are one to it.
  run_peer = functools.cache(train_step.peer)
  for text, row in rows.items():
    command = [sys.executable, "-m", "experiments.bench.trial_groups", text, "--here"]
    found = train_step.child(
      [*command, f"--steps={arguments.steps}"], {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    )
    if row.trials == 1 and "error" not in found:
      before = singles.get(row.single, found)
      singles[row.single] = max(before, found, key=lambda each: each["tokens_per_second"])
    print(line(text, found, singles.get(row.single)), flush=True)
    result = {"row": text, **found}
    if arguments.peer and row.trials == 1:
      result["peer"] = peer = run_peer(row.as_batch)
      print(train_step.line(text, "bitsandbytes", peer), flush=True)
    failed |= "error" in found
    results.append(result)
    if arguments.out:
      # After each: what was measured stays if a later row takes the process down.
      arguments.out.write_text(json.dumps(results, indent=1))
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())

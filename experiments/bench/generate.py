"""Tokens a second of generation: the whole decode step of a model at real size.

  python -m experiments.bench.generate --out generate.json [--model llama-8b] [--context 2048]
    [--batch 1,…]

Random weights of that shape, packed in NF4 blocks of 64 with double quantization, without adapters,
bf16. A prompt fills the context; what 32 tokens more take, greedily, is the difference between two
programs' times, each one call of `qlora_jax.generate`: so the prompt's own time drops out. The
floor is the time in which the weights that a step reads are copied.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import train_step
from experiments.bench.matmul import measure_ceilings
from experiments.shapes import SHAPES
from qlora_jax import tree_paths
from qlora_jax.generate import generate
from qlora_jax.models.transformer import Transformer

_SHORT, _MORE = 8, 32


def seconds(model: Transformer, variables: Any, prompt: jax.Array, count: int) -> float:
  """Of a call that makes `count` tokens, median of 5."""
  found = []
  for _ in range(6):
    start = time.perf_counter()
    jax.block_until_ready(generate(model, variables, prompt, max_new_tokens=count))
    found.append(time.perf_counter() - start)
  return statistics.median(found[1:])


def measure(model: Transformer, frozen: Any, batch: int, context: int) -> dict[str, Any]:
  """Of one batch: seconds a step and tokens a second."""
  variables = {"frozen": frozen}
  vocab = model.config.vocab_size
  prompt = jax.random.randint(jax.random.key(0), (batch, context - _SHORT - _MORE), 0, vocab)
  short = seconds(model, variables, prompt, _SHORT)
  step = (seconds(model, variables, prompt, _SHORT + _MORE) - short) / _MORE
  return {
    "batch": batch,
    "context": context,
    "step_seconds": step,
    "tokens_per_second": batch / step,
    "prompt_seconds": short - _SHORT * step,
  }


def batches(text: str) -> tuple[int, ...]:
  """What `--batch` lists; argparse makes its ValueError one of the user's."""
  found = tuple(map(int, text.split(",")))
  if min(found) < 1:
    raise ValueError(f"{text}: a batch has at least one row")
  return found


def main(argv: Sequence[str]) -> int:
  """Measures what `argv` asks for, and writes the JSON."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--model", default="llama-8b", choices=SHAPES)
  parser.add_argument("--context", type=int, default=2048)
  parser.add_argument("--batch", type=batches, default="1", help="sizes, with commas between")
  arguments = parser.parse_args(argv)
  if arguments.context <= _SHORT + _MORE:
    parser.error(f"--context {arguments.context}; more than {_SHORT + _MORE}")
  device = jax.devices()[0].device_kind
  print(f"on {device} ({jax.default_backend()}), JAX {jax.__version__}")
  model = Transformer(SHAPES[arguments.model], dtype=jnp.bfloat16)
  frozen = train_step.random_base(model, quantized=True)
  copied = measure_ceilings()["bytes_s"] if jax.default_backend() != "cpu" else None
  # Of the token table a step reads a row a sequence, unless it is the head too.
  table = 0 if model.config.tie_embeddings else frozen["embed"]["embedding"].nbytes
  read = tree_paths.tree_bytes(frozen) - table
  results = []
  for batch in arguments.batch:
    found = measure(model, frozen, batch, arguments.context) | {"bytes_read": read}
    if copied is not None:
      found["share_of_floor"] = read / copied / found["step_seconds"]
    print(json.dumps(found), flush=True)
    results.append(found)
  report = {
    "model": arguments.model,
    "device": device,
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
    "results": results,
  }
  arguments.out.write_text(json.dumps(report, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""One NNX model that nobody here wrote, adapted over 4 bits by Qwix and by ours.

  python -m experiments.bench.importing [--out FILE.json]

google-tunix's Llama 3 of a small size with random weights, NF4 in blocks of 64, an adapter of rank
8 on every projection of the layers, Adam; needs the extra `interop-test`. (Tunix 0.1.7's Qwen2 and
Qwen3 cast their weights with `jnp.astype`, which Qwix 0.1.8's packed ones refuse.)
Compared are the lines that a user writes, from the dense model to the step (below, each in a
function of its own); the memory of the compiled step (`memory_analysis`): what it is given and what
it needs besides; what the optimizer sees; and the bytes of the base and of the adapter, in memory
and as Orbax writes them.
"""

import argparse
import inspect
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

BATCH, TIME, VOCAB = 2, 128, 1024


def dense_model() -> Any:
  """Tunix's Llama 3: 4 layers of width 256."""
  from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

  config = llama3.ModelConfig(
    num_layers=4,
    vocab_size=VOCAB,
    embed_dim=256,
    hidden_dim=768,
    num_heads=4,
    head_dim=64,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-6,
    weight_tying=True,
  )
  return llama3.Llama3(config, rngs=flax.nnx.Rngs(0))


def inputs() -> tuple[Any, ...]:
  """Of one call of the model: tokens, positions, no cache, a causal mask."""
  tokens = jax.random.randint(jax.random.key(1), (BATCH, TIME), 0, VOCAB)
  positions = jnp.broadcast_to(jnp.arange(TIME), (BATCH, TIME))
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((TIME, TIME), bool)), (BATCH, TIME, TIME))
  return tokens, positions, None, mask


def loss(model: Any, args: tuple[Any, ...]) -> jax.Array:
  """Of the next token."""
  logits, _ = model(*args)
  labels = args[0][:, 1:]
  return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], labels).mean()


def by_qwix(model: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
  """The user's lines with Qwix."""
  import qwix  # pyright: ignore[reportMissingImports]

  provider = qwix.LoraProvider(
    module_path=".*attn.*|.*mlp.*", weight_qtype="nf4", tile_size=64, rank=8, alpha=16.0
  )
  model = qwix.apply_lora_to_model(model, provider, *args, rngs=flax.nnx.Rngs(2))
  optimizer = flax.nnx.Optimizer(model, optax.adam(1e-3), wrt=flax.nnx.LoRAParam)
  return model, optimizer


def by_ours(model: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
  """The user's lines with ours."""
  import qlora_jax as ql

  rules = {"*attn*/w": ql.QuantizationConfig(), "*mlp*": ql.QuantizationConfig()}
  config = ql.LoRAConfig(rank=8, alpha=16.0, targets=tuple(rules))
  model = ql.nnx.adapt(model, *args, quantize=rules, adapters=config, key=jax.random.key(2))
  optimizer = flax.nnx.Optimizer(model, optax.adam(1e-3), wrt=flax.nnx.LoRAParam)
  return model, optimizer


def user_lines(function: Callable[..., Any]) -> int:
  """Lines of a function's body, but for its docstring, blank ones and the return."""
  body = inspect.getsource(function).split('"""')[2]
  lines = [line.strip() for line in body.splitlines() if line.strip()]
  return len([line for line in lines if not line.startswith("return")])


def _leaves(model: Any, kind: Any) -> list[Any]:
  return jax.tree.leaves(flax.nnx.state(model, kind))


def _bytes(leaves: list[Any]) -> int:
  # A device packs two 4-bit numbers into a byte; NumPy's itemsize does not say so.
  bits = [4 if leaf.dtype in (jnp.int4, jnp.uint4) else 8 * leaf.dtype.itemsize for leaf in leaves]
  return sum(leaf.size * each // 8 for leaf, each in zip(leaves, bits, strict=True))


def _written(leaves: list[Any]) -> int:
  """Bytes of files, of an Orbax checkpoint; 4-bit numbers as bytes, which is all that it takes."""
  own = [leaf.astype(jnp.uint8) if leaf.dtype == jnp.uint4 else leaf for leaf in leaves]
  with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
    path = Path(directory) / "state"
    checkpointer.save(path, dict(enumerate(map(jnp.asarray, own))))
    checkpointer.wait_until_finished()
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def measure(adapt: Callable[..., tuple[Any, Any]]) -> dict[str, Any]:
  """One row: what `adapt` makes, and its step compiled and run."""
  args = inputs()
  dense = float(flax.nnx.jit(loss)(dense_model(), args))
  model, optimizer = adapt(dense_model(), args)
  wrt = flax.nnx.DiffState(0, flax.nnx.LoRAParam)
  graph, state = flax.nnx.split((model, optimizer))

  def step(state: Any, args: tuple[Any, ...]) -> Any:
    model, optimizer = flax.nnx.merge(graph, state)
    value, gradient = flax.nnx.value_and_grad(loss, argnums=wrt)(model, args)
    optimizer.update(model, gradient)
    return value, flax.nnx.state((model, optimizer))

  compiled = jax.jit(step, donate_argnums=0).lower(state, args).compile()
  memory = compiled.memory_analysis()
  assert memory is not None
  adapters = _leaves(model, flax.nnx.LoRAParam)
  rest = _leaves(model, flax.nnx.Not(flax.nnx.LoRAParam))
  row = {
    "user_lines": user_lines(adapt),
    "given_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "trained_leaves": len(adapters),
    "trained_params": int(sum(leaf.size for leaf in adapters)),
    "base_bytes": _bytes(rest),
    "base_written": _written(rest),
    "adapter_bytes": _bytes(adapters),
    "adapter_written": _written(adapters),
    "loss_dense": dense,
  }
  # It overwrites what it is given.
  values = []
  for _ in range(20):
    value, state = compiled(state, args)
    values.append(float(value))
  return {**row, "loss_first": values[0], "loss_last": values[-1]}


def main(argv: list[str] | None = None) -> int:
  """The command line."""
  parser = argparse.ArgumentParser(description="Qwix and ours, side by side.")
  parser.add_argument("--out", help="write the rows as JSON there")
  options = parser.parse_args(argv)
  rows = {"qwix": measure(by_qwix), "qlora_jax": measure(by_ours)}
  print(f"{'':18}{'qwix':>14}{'qlora_jax':>14}")
  for name in rows["qwix"]:
    cells = [row[name] for row in rows.values()]
    shown = [f"{cell:14,.4f}" if isinstance(cell, float) else f"{cell:14,}" for cell in cells]
    print(f"{name:18}{''.join(shown)}")
  if options.out:
    packages = ("jax", "flax", "qwix", "google-tunix", "optax", "orbax-checkpoint", "numpy")
    record = {
      "rows": rows,
      "device": jax.devices()[0].device_kind,
      "python": platform.python_version(),
      "versions": {name: metadata.version(name) for name in packages},
      "shape": {"batch": BATCH, "time": TIME, "vocabulary": VOCAB},
    }
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())

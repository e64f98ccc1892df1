"""Converts models and adapters between the forms that other tools read.

  python -m experiments.convert inspect PATH
  python -m experiments.convert quantize MODEL OUT [--codebook nf4] [--format packed|bitsandbytes]
  python -m experiments.convert merge MODEL ADAPTER OUT [--dtype bfloat16 | --quantize nf4]
  python -m experiments.convert adapter SOURCE OUT [--base MODEL]

MODEL is a directory (Hugging Face's, bitsandbytes', or one that `quantize` wrote) or a hub id.
Nothing is overwritten without --overwrite, and what is written is whole or not there.
"""

import argparse
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors

PROGRAM = "python -m experiments.convert"


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=PROGRAM,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name: str, summary: str, *paths: tuple[str, str]) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    for path, meaning in paths:
      sub.add_argument(path, help=meaning)
    if name != "inspect":
      sub.add_argument("out", type=Path, help="the directory to write")
      sub.add_argument("--overwrite", action="store_true", help="replace what is at OUT")
      sub.add_argument("--dry_run", action="store_true", help="say what would be written, and stop")
    return sub

  model = ("model", "a directory or a hub id, org/name[@revision]")
  command("inspect", "what is in a directory, and whether it is whole", ("path", "a directory"))

  quantize = command("quantize", "a model's layers in few bits, written once to be opened", model)
  quantize.add_argument("--codebook", default="nf4")
  quantize.add_argument("--block_size", type=int, default=64)
  quantize.add_argument("--nested_block_size", type=int, default=256)
  quantize.add_argument(
    "--double_quantization", action=argparse.BooleanOptionalAction, default=True
  )
  quantize.add_argument("--scale_dtype", default="auto", help="float32, bfloat16, e4m3 or e8m0")
  quantize.add_argument("--scale_rule", default="auto", help="absmax, mse, …")
  quantize.add_argument("--outlier_fraction", type=float, default=0.0, help="kept in 16 bits")
  quantize.add_argument("--rotate", action="store_true", help="by a random Hadamard matrix")
  quantize.add_argument(
    "--dtype",
    choices=("float32", "bfloat16", "float16"),
    help="of the weights that stay; the files' own by default",
  )
  quantize.add_argument(
    "--format",
    choices=("packed", "bitsandbytes"),
    default="packed",
    help="packed: of this framework; bitsandbytes: transformers opens it",
  )

  adapter = ("adapter", "a PEFT directory")
  merge = command("merge", "a model with an adapter added in", model, adapter)
  form = merge.add_mutually_exclusive_group()
  form.add_argument(
    "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the files"
  )
  form.add_argument(
    "--quantize", metavar="CODEBOOK", help="merge into few bits, and say what that moves"
  )
  merge.add_argument(
    "--check",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="compare logits of a sample with those of model and adapter",
  )

  source = ("source", "a run's directory, for its newest checkpoint, or a PEFT directory")
  convert = command("adapter", "an adapter as PEFT keeps it", source)
  convert.add_argument("--base", help="the model of a PEFT directory")
  return parser


def main(argv: Sequence[str]) -> int:
  """Does what `argv`, the arguments without the program's name, asks for.

  Returns:
    The exit status: 0, or 2 for what the user can mend.
  """
  arguments = _parser().parse_args(argv)
  commands = {"inspect": _inspect, "quantize": _quantize, "merge": _merge, "adapter": _adapter}
  try:
    if arguments.command != "inspect":
      _check_out(arguments)
    commands[arguments.command](arguments)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


# What a directory that may be replaced holds at least one of.
_OURS = ("config.json", "adapter_config.json")


def _check_out(arguments: argparse.Namespace) -> None:
  """Refuses an OUT whose replacement would lose something else.

  Raises:
    FileExistsError: it is there, and --overwrite was not given.
    ValueError: it is no model or adapter, or it holds what is to be read.
  """
  out = arguments.out
  if not os.path.lexists(out):
    return
  if not arguments.overwrite:
    raise FileExistsError(f"{out}: exists already; give another, or --overwrite")
  if out.is_symlink() or not any((out / name).is_file() for name in _OURS):
    raise ValueError(f"{out}: --overwrite replaces a directory with a model or an adapter alone")
  for name in ("model", "adapter", "source", "base"):
    source = getattr(arguments, name, None)
    if source and Path(source).resolve().is_relative_to(out.resolve()):
      raise ValueError(f"{out}: holds {source}, which is to be read; give another OUT")


def _inspect(arguments: argparse.Namespace) -> None:
  from qlora_jax.hf import hub
  from qlora_jax.hf.inspect import inspect

  print(inspect(hub.resolve(arguments.path)))


def _quantize(arguments: argparse.Namespace) -> None:
  import jax.numpy as jnp

  from qlora_jax import QuantizationConfig, hf, memory, tree_paths
  from qlora_jax.hf import checkpoint
  from qlora_jax.models.transformer import Transformer

  config = QuantizationConfig(
    codebook=arguments.codebook,
    block_size=arguments.block_size,
    double_quantization=arguments.double_quantization,
    nested_block_size=arguments.nested_block_size,
    scale_dtype=arguments.scale_dtype,
    scale_rule=arguments.scale_rule,
    outlier_fraction=arguments.outlier_fraction,
    rotate=arguments.rotate,
  )
  if arguments.format == "bitsandbytes" and config.codebook not in ("nf4", "fp4"):
    raise ValueError(f"--codebook: {config.codebook!r}; bitsandbytes has nf4 and fp4 alone")
  if arguments.dry_run:
    directory = checkpoint.model_directory(arguments.model)
    model = Transformer(checkpoint.read_config(directory))
    checkpoint.packing(directory)
    rules = checkpoint.default_rules(config)
    planned = checkpoint.abstract_base(model, rules, arguments.dtype or jnp.bfloat16)
    size = _size(tree_paths.tree_bytes(planned))
    what = arguments.dtype or "bfloat16"
    print(f"{arguments.out}: {size} would be written, with the weights that stay in {what}")
    return
  model, frozen = hf.load(arguments.model, config, storage_dtype=arguments.dtype)
  save = hf.save_bitsandbytes if arguments.format == "bitsandbytes" else hf.save_base
  _write(arguments, lambda path: save(path, model, frozen))
  bits = memory.quantized_bits(frozen)
  print(
    f"{arguments.out}: {_size(tree_paths.tree_bytes(frozen))}, {bits:.3f} bits a quantized weight"
  )


def _merge(arguments: argparse.Namespace) -> None:
  import jax.numpy as jnp

  from qlora_jax import QuantizationConfig, hf, tree_paths
  from qlora_jax.hf import checkpoint, saving

  rules = None
  if arguments.quantize:
    rules = checkpoint.default_rules(QuantizationConfig(arguments.quantize))
  directory = checkpoint.model_directory(arguments.model)
  # A dense base stays in its files. float32: the sample's logits are to show the files' rounding,
  # not the computation's.
  opened = hf.open_stored if checkpoint.is_dense(directory) else hf.load
  model, frozen = opened(directory, dtype=jnp.float32)
  params, constants, _ = hf.load_adapter(arguments.adapter, frozen, model=model)
  # What cannot be merged is refused here, before an hour of logits.
  dtype = jnp.float32 if rules else arguments.dtype
  planned = saving.merged_shapes(frozen, params, constants, dtype, rules)
  if arguments.dry_run:
    size = _size(tree_paths.tree_bytes(planned))
    print(f"{arguments.out}: {size} would be written, {arguments.model} with {arguments.adapter}")
    return
  live = _logits(model, frozen, params, constants) if arguments.check else None
  if rules:
    merged = saving.merge_into_bits(frozen, params, constants, rules)
    model = saving.untied(model, merged)
    if live is not None:
      # Before anything is written.
      print(_shift(live, _logits(model, merged, {}, {})))
    _write(arguments, lambda path: hf.save_base(path, model, merged, source=str(arguments.model)))
    return
  _write(
    arguments,
    lambda path: hf.save_merged(path, model, frozen, params, constants, dtype=arguments.dtype),
  )
  if live is not None:
    print(_shift(live, _logits(*hf.open_stored(arguments.out, dtype=jnp.float32), {}, {})))


def _adapter(arguments: argparse.Namespace) -> None:
  from qlora_jax import hf

  if not (Path(arguments.source) / "adapter_config.json").exists():
    from experiments import trial

    if arguments.dry_run:
      print(f"{arguments.out}: the newest checkpoint of {arguments.source} would be written")
      return
    stage = Path(arguments.source)
    step: list[int] = []
    _write(arguments, lambda path: step.append(trial.export_adapter(stage, path)))
    print(f"{arguments.out}: the adapter of step {step[0]}")
    return
  if arguments.base is None:
    raise ValueError("--base: missing; a PEFT directory is read against its model")
  model, frozen = hf.load(arguments.base)
  params, constants, cfg = hf.load_adapter(arguments.source, frozen, model=model)
  if arguments.dry_run:
    print(f"{arguments.out}: {arguments.source} would be written again")
    return
  _write(
    arguments,
    lambda path: hf.save_adapter(
      path,
      params,
      constants,
      cfg,
      model=model,
      frozen=frozen,
      base_model_name=str(arguments.base),
    ),
  )
  print(f"{arguments.out}: written")


def _logits(model: Any, frozen: Any, params: Any, constants: Any) -> Any:
  """Of a sample: four rows of 64 tokens, drawn at random."""
  import jax

  from qlora_jax.hf import stored

  tokens = jax.random.randint(jax.random.key(0), (4, 64), 0, model.config.vocab_size)
  return stored.logits(model, frozen, params, constants, tokens)


def _shift(live: Any, other: Any) -> str:
  import jax
  import jax.numpy as jnp

  # Compiled: nothing as large as the logits is made, and what gave them may not be freed yet.
  @jax.jit
  def statistics(live: Any, other: Any) -> Any:
    return jnp.abs(live - other).max(), live.std()

  moved, std = statistics(live, other)
  return f"logits of a sample move by up to {moved:.3g} (their standard deviation {std:.3g})"


def _size(nbytes: int) -> str:
  return f"{nbytes / 1e9:,.3f} GB" if nbytes > 1e8 else f"{nbytes / 1e6:,.3f} MB"


def _write(arguments: argparse.Namespace, write: Callable[[Path], None]) -> None:
  """Writes to OUT; what is there already is replaced once the new is whole.

  Raises:
    OSError: a full disk, say; the message names OUT.
  """
  try:
    _replace(arguments.out.absolute(), write)
  except (OSError, safetensors.SafetensorError) as error:
    # Ours name a path, and so do those of opening a file; those of writing to it do not.
    if isinstance(error, OSError) and (error.errno is None or error.filename):
      raise
    raise OSError(f"{arguments.out}: not written: {error}") from None


def _replace(out: Path, write: Callable[[Path], None]) -> None:
  if not out.exists():
    write(out)
    return
  token = secrets.token_hex(4)
  new, old = (out.with_name(f".{out.name}.{token}.{state}") for state in ("new", "old"))
  write(new)
  os.rename(out, old)
  try:
    os.rename(new, out)
  except BaseException:
    os.rename(old, out)
    raise
  shutil.rmtree(old)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

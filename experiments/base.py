"""A small base model that is trained here, from scratch, by the trainer that trains adapters.

The quickstart's is of generated text; it is trained once and kept in a cache. One of real text
(`pretrain.paths`) is trained by a command of its own, which goes on where it was stopped:

  python -m experiments.base --config configs/own.py --workdir runs/own_base

  recipe.json       how it is trained, the texts' digests with it; another recipe is refused
  tokenizer/        a byte-level BPE, trained on the texts first
  metrics.jsonl     losses by step (and tensorboard/)
  checkpoints/      all weights and the optimizer
  model/            the base, a Hugging Face directory, in bfloat16, in files of at most 16 MiB

Give `model/` as `--config.model.path`, with `--config.pretrain.steps=0`.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import qlora_jax
from experiments import command_line
from qlora_jax import data, hf, optimizers, synthetic
from qlora_jax.checkpoints import Checkpoints
from qlora_jax.config import OptimizerConfig, PretrainConfig, TrainConfig
from qlora_jax.evaluate import held_out_loss
from qlora_jax.hf.files import new_directory, read_json
from qlora_jax.metrics import MetricsWriter, write_whole
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.train import Interrupted, SignalGuard, fit, init_state, make_train_step

END_OF_DOCUMENT = "<|endoftext|>"

# Of a base that is trained to be kept: it travels in pieces.
_FILE_BYTES = 15 << 20
# Tokens whose logits exist at once: with a vocabulary of a few thousand, a quarter of a gigabyte.
_LOSS_CHUNK = 8192
# Lines of the loss curve.
_EVALUATIONS = 12


def cache_directory() -> Path:
  """`$QLORA_JAX_CACHE`, else `qlora_jax` in the user's cache directory."""
  if chosen := os.environ.get("QLORA_JAX_CACHE"):
    return Path(chosen)
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_jax"


def architecture(cfg: PretrainConfig) -> TransformerConfig:
  """What is trained: a Llama with tied embeddings."""
  return TransformerConfig(
    vocab_size=cfg.vocab_size,
    hidden_size=cfg.hidden_size,
    intermediate_size=cfg.intermediate_size,
    num_layers=cfg.num_layers,
    num_heads=cfg.num_heads,
    num_kv_heads=cfg.num_kv_heads,
    head_dim=cfg.hidden_size // cfg.num_heads,
    tie_embeddings=True,
    max_position_embeddings=cfg.max_position_embeddings,
  )


def recipe(cfg: PretrainConfig) -> dict[str, Any]:
  """All that the trained base follows from: `cfg`, its texts, the version.

  Raises:
    FileNotFoundError: one of the texts is not there.
  """
  # The text's source is part of the recipe: a change of either trains anew.
  texts: dict[str, str] = {}
  for path in cfg.paths:
    with open(path, "rb") as file:
      texts[path] = hashlib.file_digest(file, "sha256").hexdigest()
  if not cfg.paths:
    source = inspect.getsource(synthetic)
    texts["synthetic"] = hashlib.sha256(source.encode()).hexdigest()
  return {
    "pretrain": dataclasses.asdict(cfg),
    "texts": texts,
    "qlora_jax": qlora_jax.__version__,
  }


def trained_base(cfg: PretrainConfig) -> Path:
  """The Hugging Face directory of the base that `cfg` describes, trained now if it is not cached.

  A killed training starts again. Of processes that want one base at once, one trains it, and the
  others wait.
  """
  name = hashlib.sha256(json.dumps(recipe(cfg), sort_keys=True).encode()).hexdigest()[:12]
  path = cache_directory() / f"base-{name}"
  if path.exists():
    print(f"base model: {path} (trained by an earlier run)")
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(f"{path}.lock"):
    if path.exists():
      print(f"base model: {path} (another process trained it meanwhile)")
    else:
      print(f"base model: training one on {_described(cfg)}, to be kept in {path}")
      _train(cfg, path)
  return path


def _described(cfg: PretrainConfig) -> str:
  return ", ".join(cfg.paths) if cfg.paths else f"generated {cfg.domain!r}"


def train_in(cfg: PretrainConfig, workdir: Path) -> Path:
  """Trains the base that `cfg` describes, or what is left of it, in a directory of its own.

  Returns:
    Its Hugging Face directory.

  Raises:
    ValueError: the directory holds a base of another recipe, or another process is at work there.
    train.Interrupted: a signal came; the training has saved.
  """
  # As JSON has it: tuples are lists there.
  ours = json.loads(json.dumps(recipe(cfg)))
  path = workdir / "recipe.json"
  if path.exists() and (before := read_json(path)) != ours:
    parts = [f"{part}.{key}" for part in ours for key in _differing(before.get(part), ours[part])]
    raise ValueError(f"{workdir}: holds a base of another recipe: {', '.join(parts)} differ")
  workdir.mkdir(parents=True, exist_ok=True)
  try:
    lock = filelock.FileLock(workdir / "lock").acquire(blocking=False)
  except filelock.Timeout:
    raise ValueError(f"{workdir}: another process is training this base") from None
  with lock:
    write_whole(path, json.dumps(ours, indent=2) + "\n")
    model = workdir / "model"
    if not model.exists():
      _train(cfg, model, workdir)
  return model


def _differing(before: Any, now: Any) -> list[str]:
  if not (isinstance(before, dict) and isinstance(now, dict)):
    return ["*"] if before != now else []
  return [key for key in now if before.get(key) != now[key]]


def _train(cfg: PretrainConfig, path: Path, workdir: Path | None = None) -> None:
  """Trains a base and writes it to `path`; with a `workdir`, in steps that can be gone on from."""
  directory = path.parent / f"{path.name}.tokenizer" if workdir is None else workdir / "tokenizer"
  rows = _rows(cfg, directory)
  shape = architecture(cfg)
  if cfg.paths:
    shape = dataclasses.replace(shape, hf_directory=str(directory))
  model = Transformer(shape, dtype=jnp.dtype(cfg.dtype))
  # From scratch is training with every leaf overridden: the whole tree is in `params`.
  params = model.init(jax.random.key(cfg.seed), jnp.zeros((1, 2), jnp.int32))["frozen"]
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  every = max(cfg.steps // _EVALUATIONS, 1)
  train = TrainConfig(
    steps=cfg.steps,
    batch_size=cfg.batch_size,
    log_every=20,
    eval_every=every,
    checkpoint_every=every,
    keep_checkpoints=1,
    loss_chunk=_LOSS_CHUNK if cfg.paths else TrainConfig().loss_chunk,
  )
  optimizer_cfg = OptimizerConfig(
    learning_rate=cfg.learning_rate,
    warmup_steps=min(cfg.warmup_steps, cfg.steps - 1),
    weight_decay=cfg.weight_decay,
  )
  optimizer = optimizers.make(optimizer_cfg, train.steps)
  state = init_state(params, {}, optimizer, seed=cfg.seed, dtype=model.dtype)

  def evaluate(state) -> float:
    return held_out_loss(
      model,
      {"params": state.params, "frozen": {}},
      rows.held_out,  # pyright: ignore[reportArgumentType]
      batch_size=cfg.batch_size,
      loss_chunk=train.loss_chunk,
    )

  with contextlib.ExitStack() as stack:
    guard = stack.enter_context(SignalGuard())
    checkpoints = writer = None
    if workdir is not None:
      name = hashlib.sha256((workdir / "recipe.json").read_bytes()).hexdigest()[:16]
      folder = workdir / "checkpoints"
      checkpoints = stack.enter_context(Checkpoints(folder, keep=1, base_fingerprint=name))
      restored = checkpoints.restore(state)
      if restored is not None:
        print(f"base: resumes at step {int(restored.step)} of {train.steps}")
        state = restored
      resume_step = None if restored is None else int(restored.step)
      writer = stack.enter_context(MetricsWriter(workdir, resume_step=resume_step))
    state = fit(
      state,
      train_step=make_train_step(model, optimizer, train.loss_chunk),
      frozen={},
      batches=data.Batches(rows.train, train.batch_size, seed=cfg.seed, segments=not cfg.paths),
      cfg=train,
      learning_rate=optimizers.schedule(optimizer_cfg, train.steps),
      guard=guard,
      evaluate=None if rows.held_out is None else evaluate,
      checkpoints=checkpoints,
      writer=writer,
      description="base",
    )
  try:
    if workdir is None:
      hf.save(path, model, state.params, dtype=jnp.float32)
    else:
      hf.save(path, model, state.params, dtype=jnp.bfloat16, file_bytes=_FILE_BYTES)
  except FileExistsError:
    # Another process was faster, with the same recipe, where the file system has no locks.
    print(f"base model: {path} was made by another process meanwhile, and is used")


@dataclasses.dataclass(frozen=True)
class _Rows:
  train: data.Dataset
  held_out: data.Dataset | None  # of files alone


def _rows(cfg: PretrainConfig, directory: Path) -> _Rows:
  """What is trained on; of files, with their tokenizer in `directory`, trained if it is not there.

  Generated documents are packed whole; files are running text, cut into windows.
  """
  if not cfg.paths:
    tokenizer = data.ByteTokenizer()
    documents = synthetic.corpus(cfg.domain, cfg.num_documents, cfg.seed)
    if cfg.minor_domain is not None:
      # From far-off seeds: a trial fine-tunes on, and holds out, documents of its own.
      seed = (cfg.seed + 2**31) % 2**32
      documents += synthetic.corpus(cfg.minor_domain, cfg.minor_documents, seed)
    encoded = [tokenizer.encode(text) for text in documents]
    return _Rows(data.pack(encoded, cfg.max_position_embeddings), None)
  train: list[str] = []
  held_out: list[str] = []
  for path in cfg.paths:
    first, last = data.split_text(data.load_documents(path), cfg.holdout)
    # Texts all of them, and no pairs, which have fields of their own.
    train += map(str, first)
    held_out += map(str, last)
  if not directory.exists():
    train_tokenizer(train, cfg.vocab_size, directory)
  tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
  end = tokenizer.token_to_id(END_OF_DOCUMENT)

  def windows(documents: list[str]) -> data.Dataset:
    ids = []
    for encoding in tokenizer.encode_batch_fast(documents):
      ids += [np.asarray(encoding.ids, np.int32), np.asarray([end], np.int32)]
    return data.windows(np.concatenate(ids), cfg.max_position_embeddings)

  rows = _Rows(windows(train), windows(held_out))
  tokens = cfg.steps * cfg.batch_size * cfg.max_position_embeddings
  print(
    f"base: {rows.train.tokens.size:,} tokens, seen {tokens / rows.train.tokens.size:.2f} times"
  )
  return rows


def train_tokenizer(documents: Sequence[str], vocab_size: int, directory: Path) -> None:
  """Trains a byte-level BPE and writes it as `tokenizer.json`, with the file that names its roles.

  Raises:
    ValueError: the text has too few merges for `vocab_size` tokens.
  """
  tokenizer: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer: Any = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_DOCUMENT],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(documents, trainer=trainer, length=len(documents))
  found = tokenizer.get_vocab_size()
  if found != vocab_size:
    raise ValueError(
      f"pretrain.vocab_size: {vocab_size}; the text gives {found} tokens: set this to {found}"
    )
  roles = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT}
  with new_directory(directory) as temporary:
    tokenizer.save(str(temporary / "tokenizer.json"))
    write_whole(temporary / "tokenizer_config.json", json.dumps(roles, indent=2) + "\n")


def main(argv: Sequence[str]) -> int:
  """Trains the base of a config; the exit status, as `experiments.run` has it."""
  arguments = command_line.parse(argv)
  cfg = arguments.config.pretrain
  workdir = Path(arguments.workdir or f"runs/{arguments.config.name}_base")
  if cfg.steps == 0:
    print("error: pretrain.steps: 0; a base is trained for at least 1", file=sys.stderr)
    return 2
  try:
    path = train_in(cfg, workdir)
  except Interrupted as stopped:
    print(f"\nstopped by {stopped}, and saved; the same command goes on", file=sys.stderr)
    return 128 + stopped.signal_number
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"Written to {path}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""The small base model that the quickstart trains itself, once, and keeps in a cache."""

import dataclasses
import hashlib
import inspect
import json
import os
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp

import qlora_jax
from qlora_jax import data, hf, optimizers, synthetic
from qlora_jax.config import OptimizerConfig, PretrainConfig, TrainConfig
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.train import SignalGuard, fit, init_state, make_train_step


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


def trained_base(cfg: PretrainConfig) -> Path:
  """The Hugging Face directory of the base that `cfg` describes, trained now if it is not cached.

  A killed training starts again. Of processes that want one base at once, one trains it, and the
  others wait.
  """
  # The text's source and the version are part of the recipe: a change of either trains anew.
  sources = [inspect.getsource(synthetic), qlora_jax.__version__]
  recipe = json.dumps([dataclasses.asdict(cfg), *sources], sort_keys=True)
  path = cache_directory() / f"base-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
  if path.exists():
    print(f"base model: {path} (trained by an earlier run)")
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(f"{path}.lock"):
    if path.exists():
      print(f"base model: {path} (another process trained it meanwhile)")
    else:
      _train(cfg, path)
  return path


def _train(cfg: PretrainConfig, path: Path) -> None:
  print(f"base model: training one on generated {cfg.domain!r}, to be kept in {path}")

  model = Transformer(architecture(cfg), dtype=jnp.float32)
  tokenizer = data.ByteTokenizer()
  documents = synthetic.corpus(cfg.domain, cfg.num_documents, cfg.seed)
  if cfg.minor_domain is not None:
    # From far-off seeds: a trial fine-tunes on, and holds out, documents of its own.
    seed = (cfg.seed + 2**31) % 2**32
    documents += synthetic.corpus(cfg.minor_domain, cfg.minor_documents, seed)
  rows = data.pack([tokenizer.encode(text) for text in documents], cfg.max_position_embeddings)
  # From scratch is training with every leaf overridden: the whole tree is in `params`.
  params = model.init(jax.random.key(cfg.seed), jnp.zeros((1, 2), jnp.int32))["frozen"]
  train = TrainConfig(steps=cfg.steps, batch_size=cfg.batch_size, log_every=20)
  optimizer_cfg = OptimizerConfig(
    learning_rate=cfg.learning_rate, warmup_steps=min(20, cfg.steps - 1), weight_decay=0.01
  )
  optimizer = optimizers.make(optimizer_cfg, train.steps)
  with SignalGuard() as guard:
    state = fit(
      init_state(params, {}, optimizer, seed=cfg.seed, dtype=model.dtype),
      train_step=make_train_step(model, optimizer, train.loss_chunk),
      frozen={},
      batches=data.Batches(rows, train.batch_size, seed=cfg.seed),
      cfg=train,
      learning_rate=optimizers.schedule(optimizer_cfg, train.steps),
      guard=guard,
      description="base",
    )
  try:
    hf.save(path, model, state.params, dtype=jnp.float32)
  except FileExistsError:
    # Another process was faster, with the same recipe, where the file system has no locks.
    print(f"base model: {path} was made by another process meanwhile, and is used")

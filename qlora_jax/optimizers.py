"""The Optax optimizer of a config. It only ever sees the adapters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.config import OptimizerConfig
from qlora_jax.optimizer_state import stored


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate by step: a linear rise over `warmup_steps`, then the decay, to 0 at `steps`.

  The rise ends at step `warmup_steps`, and its first step is not wasted on a rate of 0.
  """
  decay_steps = max(steps - cfg.warmup_steps, 1)
  decay = {
    "constant": lambda: optax.constant_schedule(cfg.learning_rate),
    "linear": lambda: optax.linear_schedule(cfg.learning_rate, 0.0, decay_steps),
    "cosine": lambda: optax.cosine_decay_schedule(cfg.learning_rate, decay_steps),
  }[cfg.schedule]()
  if cfg.warmup_steps == 0:
    return decay
  first = cfg.learning_rate / (cfg.warmup_steps + 1)
  rise = optax.linear_schedule(first, cfg.learning_rate, cfg.warmup_steps)
  return optax.join_schedules([rise, decay], [cfg.warmup_steps])


def rates(cfg: OptimizerConfig, steps: int) -> np.ndarray:
  """`schedule` as a table, `[steps]` float32."""
  return np.asarray(jax.vmap(schedule(cfg, steps))(jnp.arange(steps)), np.float32)


def make(
  cfg: OptimizerConfig, steps: int, learning_rates: jax.Array | None = None
) -> optax.GradientTransformation:
  """AdamW with clipping by the global norm, for `steps` optimizer steps.

  Args:
    cfg: of the optimizer.
    steps: over which the learning rate decays.
    learning_rates: `[steps]`, `rates` of another cfg perhaps, in place of cfg's own: data, where a
      program serves trainings of several rates. The state is of the same structure.

  LoRA+ multiplies B's whole update, of its weight decay too, as a group of its own with that
  learning rate would: Hayou et al., LoRA+, 2024, https://arxiv.org/abs/2402.12354.
  """
  rate = schedule(cfg, steps)
  if learning_rates is not None:
    # Past the end there are steps that nobody reads.
    rate = functools.partial(jnp.take, learning_rates, mode="clip")
  adamw = optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
  adamw = stored(adamw, cfg.state)
  parts = [] if cfg.clip_norm is None else [optax.clip_by_global_norm(cfg.clip_norm)]
  parts.append(adamw)
  if cfg.lora_plus_ratio != 1:
    parts.append(_faster_b(cfg.lora_plus_ratio))
  return optax.chain(*parts) if len(parts) > 1 else adamw


def _faster_b(ratio: float) -> optax.GradientTransformation:
  """Multiplies the updates of B and of its bias."""

  def update(updates: Any, params: Any = None) -> Any:
    del params
    flat, tree = jax.tree_util.tree_flatten_with_path(updates)
    names = [jax.tree_util.keystr(path[-1:], simple=True) for path, _ in flat]
    if "lora_b" not in names:
      raise ValueError(
        f"optimizer.lora_plus_ratio: {ratio}; nothing that is trained is a lora_b, as it is of "
        "lora.variant lora and dora: set it to 1"
      )
    return tree.unflatten(
      ratio * u if name in ("lora_b", "lora_bias") else u
      for name, (_, u) in zip(names, flat, strict=True)
    )

  return optax.stateless(update)

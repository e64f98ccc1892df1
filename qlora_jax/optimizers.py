"""The Optax optimizer of a config. It only ever sees the adapters."""

import optax

from qlora_jax.config import OptimizerConfig


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


def make(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """AdamW with clipping by the global norm, for `steps` optimizer steps."""
  adamw = optax.adamw(
    schedule(cfg, steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay
  )
  if cfg.clip_norm is None:
    return adamw
  return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw)

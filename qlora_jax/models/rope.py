"""Rotary position embeddings: their frequencies, and the ways of stretching them.

Each class below is one `rope_type` of transformers, with the fields of config.json under their
names there. h is the rotated width of a head, L the longest position of a row plus one.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _plain(theta: float, width: int) -> np.ndarray:
  return np.float32(theta) ** (-np.arange(0, width, 2, dtype=np.float32) / np.float32(width))


@dataclasses.dataclass(frozen=True)
class Linear:
  """Positions divided by `factor` (Chen et al., 2023, https://arxiv.org/abs/2306.15595)."""

  factor: float

  def __call__(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
    """`[h / 2]` radians a position, and what cosines and sines are multiplied by."""
    return _plain(theta, width) / np.float32(self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """A base that grows with the length of the call, past `max_position_embeddings` (NTK).

  Each row by its own length. (transformers takes the longest of a batch, padding included, so that
  a row's logits depend on its neighbours.) Past that length, a KV cache of several layers holds
  what they made of shorter rows: only one layer's generation is the full forward to the digit.
  """

  factor: float
  max_position_embeddings: int

  def __call__(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
    """As `Linear`."""
    length = jnp.maximum(jnp.atleast_1d(length)[:, None], self.max_position_embeddings)
    length = length.astype(jnp.float32)
    stretch = self.factor * length / self.max_position_embeddings - (self.factor - 1)
    base = theta * stretch ** (width / (width - 2))
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32)[None] / width), 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Interpolation of the slow frequencies alone, and hotter logits.

  References:
    Peng et al., YaRN, 2023, https://arxiv.org/abs/2309.00071.
  """

  original_max_position_embeddings: int
  factor: float
  attention_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  def __call__(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
    """As `Linear`."""

    def dimension(rotations: float) -> float:
      """Where a frequency turns so many times within the original context."""
      turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
      return width * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(self.beta_fast), dimension(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
      high += 0.001
    ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    slow = np.clip(ramp, 0, 1)
    plain = _plain(theta, width)
    return plain / np.float32(self.factor) * slow + plain * (1 - slow), self._attention_factor()

  def _attention_factor(self) -> float:
    if self.attention_factor is not None:
      return self.attention_factor

    def scale(weight: float) -> float:
      return 0.1 * weight * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    if self.mscale and self.mscale_all_dim:
      return scale(self.mscale) / scale(self.mscale_all_dim)
    return scale(1)


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Llama 3.1's: only the slow frequencies are stretched.

  Wavelengths below original / high_freq_factor stay, those above original / low_freq_factor are
  multiplied by `factor`, with a ramp between.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int

  def __call__(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
    """As `Linear`."""
    frequencies = _plain(theta, width)
    turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
    ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    ramp = np.clip(ramp, 0, 1)
    return (1 - ramp) * frequencies / self.factor + ramp * frequencies, 1.0


@dataclasses.dataclass(frozen=True)
class LongRope:
  """A factor for each frequency: one list up to the original context, another past it.

  Each row by its own length; see `Dynamic`.

  References:
    Ding et al., LongRoPE, 2024, https://arxiv.org/abs/2402.13753.
  """

  short_factor: tuple[float, ...]
  long_factor: tuple[float, ...]
  original_max_position_embeddings: int
  factor: float
  attention_factor: float | None = None

  def __call__(self, theta: float, width: int, length: Any) -> tuple[Any, float]:
    """As `Linear`."""
    long, short = np.asarray([self.long_factor, self.short_factor], np.float32)
    is_long = jnp.atleast_1d(length)[:, None] > self.original_max_position_embeddings
    factors = jnp.where(is_long, long[None], short[None])
    scale = self.attention_factor
    if scale is None:
      original = math.log(self.original_max_position_embeddings)
      scale = math.sqrt(1 + math.log(self.factor) / original) if self.factor > 1 else 1.0
    return _plain(theta, width)[None] / factors, scale


RopeScaling = Linear | Dynamic | Yarn | Llama3 | LongRope

# transformers' rope_type → its class; "su" is LongRoPE's name of old Phi-3 files.
SCALINGS: dict[str, type[RopeScaling]] = {
  "linear": Linear,
  "dynamic": Dynamic,
  "yarn": Yarn,
  "llama3": Llama3,
  "longrope": LongRope,
  "su": LongRope,
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions of a layer.

  Attributes:
    theta: the base.
    width: elements of a head that are rotated, the first ones; None for all.
    scaling: how the frequencies are stretched; None for not at all.
  """

  theta: float = 10000.0
  width: int | None = None
  scaling: RopeScaling | None = None

  def __post_init__(self):
    factor = getattr(self.scaling, "factor", 1.0)
    for name, value in {"rope_theta": self.theta, "factor": factor}.items():
      if not 0 < value < math.inf:
        raise ValueError(f"{name}: {value}; above 0")
    if self.width is not None and (self.width < 2 or self.width % 2):
      raise ValueError(f"rope.width: {self.width}; pairs are rotated, so it is even and at least 2")
    if isinstance(self.scaling, LongRope) and self.width is not None:
      for name in ("short_factor", "long_factor"):
        count = len(getattr(self.scaling, name))
        if count != self.width // 2:
          raise ValueError(f"{name}: {count} factors; {self.width // 2} pairs are rotated")

  @property
  def depends_on_length(self) -> bool:
    """Whether a longer call turns the same position otherwise."""
    return isinstance(self.scaling, Dynamic | LongRope)

  def frequencies(self, head_dim: int, length: Any = 1) -> tuple[jax.Array, float]:
    """(`[h / 2]` float32 radians a position, what cosines and sines are multiplied by).

    Args:
      head_dim: of the head.
      length: L, one number or `[B]`, may be traced; read only where `depends_on_length`. The
        frequencies are then `[1 or B, h / 2]`.
    """
    width = self.width or head_dim
    if self.scaling is None:
      return jnp.asarray(_plain(self.theta, width), jnp.float32), 1.0
    frequencies, factor = self.scaling(self.theta, width, length)
    return jnp.asarray(frequencies, jnp.float32), factor

  def angles(
    self, positions: jax.Array, head_dim: int, length: Any = 1
  ) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines of `[B, T]` positions, `[B, T, h / 2]` float32; see `frequencies`."""
    frequencies, factor = self.frequencies(head_dim, length)
    # [1 or B, 1, h / 2]
    frequencies = frequencies.reshape(-1, 1, frequencies.shape[-1])
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * np.float32(factor), jnp.sin(angles) * np.float32(factor)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary embedding of `[B, T, H, w]` by `[B, T, h / 2]` cosines and sines, in float32.

  The first h elements of a head are rotated. Pairs lie h / 2 apart (Hugging Face's order, not the
  original interleaved one).
  """
  cos, sin = cos[:, :, None], sin[:, :, None]
  half = cos.shape[-1]
  rotated, rest = jnp.split(x, [2 * half], axis=-1)
  first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)

"""Gated MLPs, and mixtures of them: each token goes through the k that its router likes best.

N tokens, E experts, k of them for a token, D model width, I width of an expert, m rows of a tile.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax import lora
from qlora_jax.linen import NUMBER, STACKED, Initializer, QDense, weight
from qlora_jax.matmul import quantized_matmul, sharded, stacked
from qlora_jax.models import remat
from qlora_jax.quantized_tensor import is_quantized

# By transformers' names.
ACTIVATIONS = {
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

# Rows of the largest tile: an expert is decoded once for so many tokens.
_LARGEST_TILE = 128


class MLP(nn.Module):
  """down(act(gate(x)) · up(x)).

  Attributes:
    intermediate_size: I.
    activation: a key of `ACTIVATIONS`.
    use_bias: of each projection.
    fused: gate and up are one projection `gate_up`, gate's outputs first.
    dtype, implementation: as QDense.
  """

  intermediate_size: int
  activation: str
  use_bias: bool
  fused: bool
  dtype: DTypeLike
  implementation: str | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., D] → [..., D]`."""

    def project(name: str, features: int, x: jax.Array) -> jax.Array:
      return QDense(
        features,
        use_bias=self.use_bias,
        dtype=self.dtype,
        implementation=self.implementation,
        partition=sharded.ROWS if name == "down" else sharded.COLUMNS,
        name=name,
      )(x)

    if self.fused:
      wide = remat.named(remat.WIDE, project("gate_up", 2 * self.intermediate_size, x))
      gate, up = jnp.split(wide, 2, axis=-1)
    else:
      gate, up = (
        remat.named(remat.WIDE, project(name, self.intermediate_size, x)) for name in ("gate", "up")
      )
    return project("down", x.shape[-1], ACTIVATIONS[self.activation](gate) * up)


def chunk_length(tokens: int, most: int) -> int:
  """The longest chunk of at most `most` that divides a row, in at most twice as many as it takes.

  Where none does, `most`, to which the row is padded; then it is copied, once or twice.
  """
  least = -(-tokens // most)
  parts = next((n for n in range(least, 2 * least + 1) if tokens % n == 0), None)
  return most if parts is None else tokens // parts


def in_chunks(mlp: nn.Module, x: jax.Array, most: int) -> jax.Array:
  """mlp(x), `[B, T, D] → [B, T, D]`, of at most `most` tokens of each row at a time.

  A chunk's activations are not kept: the backward pass computes them again.
  """
  tokens = x.shape[1]
  if tokens <= most:
    return mlp(x)
  chunk = chunk_length(tokens, most)
  parts = jnp.pad(x, ((0, 0), (0, -tokens % chunk), (0, 0)))
  parts = parts.reshape(x.shape[0], -1, chunk, x.shape[2])

  @functools.partial(nn.remat, prevent_cse=False)
  def one(mlp, part):
    return mlp(part)

  scan = nn.scan(
    lambda mlp, carry, part: (carry, one(mlp, part)),
    variable_broadcast=("params", "frozen", "constants", NUMBER, STACKED),
    split_rngs={"params": False, "dropout": True},
    in_axes=1,
    out_axes=1,
  )
  _, y = scan(mlp, (), parts)
  return y.reshape(x.shape[0], -1, x.shape[2])[:, :tokens]


class Projection(nn.Module):
  """One projection of all experts, `[E, K, N]`, and its adapters if there are any."""

  features: int
  kernel_init: Initializer = nn.initializers.lecun_normal(batch_axis=0)

  @nn.compact
  def __call__(self, num_experts: int, width: int) -> dict[str, Any]:
    """The arrays of `num_experts` projections of K = `width`."""
    shape = (num_experts, width, self.features)
    arrays: dict[str, Any] = {"kernel": weight(self, "kernel", self.kernel_init, shape)}
    for name in ("magnitude", "lora_bias"):
      if self.has_variable("params", name):
        raise ValueError(f"{'/'.join((*self.path, name))}: experts take plain LoRA adapters only")
    if self.has_variable("params", "lora_a"):
      arrays["lora_a"] = self.get_variable("params", "lora_a")
      arrays["lora_b"] = self.get_variable("params", "lora_b")
      arrays["scaling"] = self.get_variable("constants", "scaling")
      if self.has_variable("constants", "dropout") and self.has_rng("dropout"):
        arrays["dropout"] = self.get_variable("constants", "dropout")
        arrays["key"] = self.make_rng("dropout")
    return arrays


def tiling(pairs: int, num_experts: int) -> tuple[int, int]:
  """(rows of a tile, tiles) into which so many pairs of a token and its expert go."""
  mean = -(-pairs // num_experts)
  tile = min(_LARGEST_TILE, int(2 ** np.ceil(np.log2(mean))))
  # An expert's last tile may be part empty: at most one tile each more than the pairs fill.
  return tile, min(pairs, pairs // tile + num_experts)


class Experts(nn.Module):
  """SwiGLU experts: Σ over the chosen e of weight_e · down_e(act(gate_e(x)) · up_e(x)).

  Tokens are sorted by expert into tiles of m rows, and a scan takes the tiles one by one, so that
  one expert's weight is decoded at a time and the work is that of the chosen experts alone, but
  for the tiles' last rows. No token is dropped.

  Attributes:
    num_experts: E.
    experts_per_token: k.
    intermediate_size: I.
    normalize: whether the k weights are made to sum to 1.
    activation: a key of `ACTIVATIONS`.
    dtype, implementation: as QDense.
  """

  num_experts: int
  experts_per_token: int
  intermediate_size: int
  normalize: bool
  activation: str
  dtype: DTypeLike
  implementation: str | None

  @nn.compact
  def __call__(self, x: jax.Array, router_logits: jax.Array) -> jax.Array:
    """`[..., D]`, and float32 logits `[..., E]`, to `[..., D]`."""
    width = x.shape[-1]
    tokens = x.reshape(-1, width).astype(self.dtype)
    weights = jax.nn.softmax(router_logits.reshape(-1, self.num_experts), axis=-1)
    weights, chosen = jax.lax.top_k(weights, self.experts_per_token)
    if self.normalize:
      weights = weights / weights.sum(-1, keepdims=True)
    tile, expert_of_tile, order, slot = self._tiles(chosen.reshape(-1))

    shapes = {
      "gate": (width, self.intermediate_size),
      "up": (width, self.intermediate_size),
      "down": (self.intermediate_size, width),
    }
    arrays = {
      name: Projection(n, name=name)(self.num_experts, k) for name, (k, n) in shapes.items()
    }
    # The base gets no gradient; without this, a scan would add up zeros for its scales.
    kernels = jax.lax.stop_gradient({name: own.pop("kernel") for name, own in arrays.items()})
    # An adapter's rows are taken for each tile outside of the scan: its gradient is then one sum.
    per_tile = {
      name: {key: own[key][expert_of_tile] for key in ("lora_a", "lora_b") if key in own}
      for name, own in arrays.items()
    }

    rows = jnp.zeros((len(expert_of_tile) * tile, width), self.dtype)
    rows = rows.at[slot].set(tokens[order // self.experts_per_token], unique_indices=True)

    def project(name: str, x: jax.Array, expert: jax.Array, adapter: Any, index: jax.Array):
      kernel = stacked.layer_of(kernels[name], expert)
      if is_quantized(kernel):
        y = quantized_matmul(x, kernel, implementation=self.implementation)
      else:
        y = jnp.matmul(x, kernel.astype(x.dtype))
      if adapter:
        own = arrays[name]
        key = jax.random.fold_in(own["key"], index) if "key" in own else None
        y = y + lora.apply(
          x,
          adapter["lora_a"],
          adapter["lora_b"],
          own["scaling"],
          dropout=own.get("dropout"),
          key=key,
        )
      return y

    # Kept for the backward pass are a tile's rows, not a copy of its expert's packed weight.
    @jax.checkpoint
    def mlp(x, expert, adapters, index):
      gate, up = (project(name, x, expert, adapters[name], index) for name in ("gate", "up"))
      hidden = ACTIVATIONS[self.activation](gate) * up
      return project("down", hidden, expert, adapters["down"], index)

    def step(_, inputs):
      return None, mlp(*inputs)

    tiles = rows.reshape(-1, tile, width)
    _, y = jax.lax.scan(
      step, None, (tiles, expert_of_tile, per_tile, jnp.arange(len(expert_of_tile)))
    )
    y = y.reshape(-1, width)[slot].astype(jnp.float32)
    # Back in the tokens' order: slot belongs to the sorted pairs of token and expert.
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    y = y.reshape(len(tokens), self.experts_per_token, width) * weights[..., None]
    return y.sum(1).astype(self.dtype).reshape(x.shape)

  def _tiles(self, chosen: jax.Array) -> tuple[int, jax.Array, jax.Array, jax.Array]:
    """Where each of the N · k pairs of token and expert goes.

    Returns:
      m; the expert of each tile; the pairs sorted by expert; and the row of the tiles that each
      sorted pair takes.
    """
    pairs = len(chosen)
    tile, count = tiling(pairs, self.num_experts)
    order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(self.num_experts, jnp.int32).at[chosen].add(1)
    needed = (sizes + tile - 1) // tile
    end_of_tiles = jnp.cumsum(needed, dtype=jnp.int32)
    experts = jnp.arange(count, dtype=jnp.int32)[:, None] >= end_of_tiles[None]
    # Tiles behind the last one in use are empty: any expert will do.
    experts = jnp.minimum(experts.sum(-1, dtype=jnp.int32), self.num_experts - 1)
    sorted_experts = chosen[order]
    before = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    within = jnp.arange(pairs, dtype=jnp.int32) - before[sorted_experts]
    slot = (end_of_tiles - needed)[sorted_experts] * tile + within
    return tile, experts, order, slot

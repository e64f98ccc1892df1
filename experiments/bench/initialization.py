"""How long an init that decomposes the weights takes, LoftQ or PiSSA, on a model's real shapes.

  python -m experiments.bench.initialization [--model llama-8b] [--inits loftq,pissa] [--out FILE]

The weights of all layers are drawn from N(0, 1/K) on the device, a matrix when it is asked for: a
flat spectrum, the hard case of a randomized SVD. An init is run twice, the first time with all that
is to be compiled; what drawing the weights alone takes, and what one matrix of each shape takes,
stand beside. Of the smallest shape the relative error ‖W′ + s · A · B − W‖ / ‖W‖ is compared with
that of full SVDs.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shapes import SHAPES
from qlora_jax import codebooks, environment, lora_init, tree_paths
from qlora_jax.hf import checkpoint
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantization import QuantizationConfig, dequantize


@dataclasses.dataclass(frozen=True)
class Drawn:
  """A leaf of a base whose matrices are drawn when they are indexed: `x[layer]` is an array.

  Attributes:
    key: of the draws.
    shape: `[..., K, N]`.
  """

  key: jax.Array
  shape: tuple[int, ...]

  @property
  def dtype(self) -> Any:
    """Of the weights."""
    return jnp.dtype(jnp.float32)

  @property
  def ndim(self) -> int:
    """How many axes it has."""
    return len(self.shape)

  def __getitem__(self, index: Any) -> jax.Array:
    """The matrix at an index of all leading axes."""
    index = index if isinstance(index, tuple) else (index,)
    place = int(np.ravel_multi_index(index, self.shape[:-2])) if index else 0
    return _draw(jax.random.fold_in(self.key, place), *self.shape[-2:])


@jax.jit
def _unit(x: jax.Array) -> jax.Array:
  return x * np.float32(x.shape[0] ** -0.5)


def _draw(key: jax.Array, k: int, n: int) -> jax.Array:
  return _unit(jax.random.normal(key, (k, n), jnp.float32))


def base(model: str) -> dict[str, Any]:
  """The dense projections of all layers of a model, by path."""
  shapes = checkpoint.model_shapes(Transformer(SHAPES[model]))
  rules = checkpoint.default_rules(QuantizationConfig())
  return {
    path: Drawn(jax.random.fold_in(jax.random.key(0), i), like.shape)
    for i, (path, like) in enumerate(tree_paths.leaves(shapes).items())
    if tree_paths.is_matrix(path, like)
    and any(
      tree_paths.matches(pattern, layer)
      for pattern in rules
      for layer in tree_paths.layers(path, like)
    )
  }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
  """What it gives, once the device is done with it, and the seconds that this took."""
  start = time.perf_counter()
  found = jax.block_until_ready(work())
  return found, time.perf_counter() - start


def initialize(leaves: dict[str, Any], quantization: QuantizationConfig, cfg: LoRAConfig) -> Any:
  """(frozen, params) of a base."""
  rules = dict.fromkeys(leaves, quantization)
  dense = tree_paths.nest(leaves)
  return lora_init.initialize(jax.random.key(0), dense, _by_layer(rules), cfg)[:2]


def _by_layer(rules: dict[str, Any]) -> dict[str, Any]:
  return {path.replace("layers/", "layers/*/", 1): value for path, value in rules.items()}


def relative_error(leaf: Drawn, frozen: Any, params: Any, scaling: float) -> float:
  """‖W′ + s · A · B − W‖ / ‖W‖ of a leaf's first matrix."""
  first = (0,) * (leaf.ndim - 2)
  w = np.asarray(leaf[first], np.float64)
  whole = np.asarray(dequantize(jax.tree.map(lambda x: x[first], frozen)), np.float64)
  a, b = (np.asarray(params[name][first], np.float64) for name in ("lora_a", "lora_b"))
  return float(np.linalg.norm(whole + scaling * a @ b - w) / np.linalg.norm(w))


def measure(
  leaves: dict[str, Any], quantization: QuantizationConfig, cfg: LoRAConfig
) -> dict[str, Any]:
  """Times of an init on a base, and its error beside that of full SVDs."""
  (frozen, params), first = timed(lambda: initialize(leaves, quantization, cfg))
  smallest = min(leaves, key=lambda path: np.prod(leaves[path].shape[-2:]))
  place = smallest.removesuffix("/kernel")
  packed = tree_paths.leaves(frozen, is_leaf=lambda x: hasattr(x, "codes"))[smallest]
  adapters = tree_paths.leaves(params)
  own = {name: adapters[f"{place}/{name}"] for name in ("lora_a", "lora_b")}
  error = relative_error(leaves[smallest], packed, own, cfg.scaling(cfg.rank, cfg.alpha))
  stats = jax.devices()[0].memory_stats()
  peak = None if stats is None else stats.get("peak_bytes_in_use")
  del frozen, params, packed, adapters, own
  _, again = timed(lambda: initialize(leaves, quantization, cfg))

  by_shape: dict[str, float] = {}
  for path, leaf in leaves.items():
    k, n = leaf.shape[-2:]
    if f"{k} x {n}" not in by_shape:
      # A stack of one layer, compiled first.
      one = {path: Drawn(leaf.key, (1, *leaf.shape[1:]))}
      timed(lambda one=one: initialize(one, quantization, cfg))
      by_shape[f"{k} x {n}"] = timed(lambda one=one: initialize(one, quantization, cfg))[1]

  leaf = leaves[smallest]
  one = {smallest: Drawn(leaf.key, (1, *leaf.shape[1:]))}
  full = dataclasses.replace(cfg, svd_iterations=None)
  frozen, params = initialize(one, quantization, full)
  exact = relative_error(
    one[smallest],
    tree_paths.leaves(frozen, is_leaf=lambda x: hasattr(x, "codes"))[smallest],
    {name: tree_paths.leaves(params)[f"{place}/{name}"] for name in ("lora_a", "lora_b")},
    cfg.scaling(cfg.rank, cfg.alpha),
  )
  return {
    "init": cfg.init,
    "seconds_with_compiling": first,
    "seconds": again,
    "seconds_of_a_matrix": by_shape,
    "peak_bytes": peak,
    "relative_error": error,
    "relative_error_of_full_svds": exact,
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Measures, prints JSON, and writes it where `--out` says so."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench.initialization",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--model", choices=SHAPES, default="llama-8b")
  parser.add_argument("--inits", default="loftq,pissa")
  parser.add_argument("--rank", type=int, default=64)
  parser.add_argument("--codebook", choices=codebooks.names(), default="nf4")
  parser.add_argument("--out", type=Path)
  arguments = parser.parse_args(argv)
  quantization = QuantizationConfig(arguments.codebook)
  leaves = base(arguments.model)
  try:
    configs = [
      LoRAConfig(rank=arguments.rank, targets=("layers/*",), init=init)
      for init in arguments.inits.split(",")
    ]
    if wrong := [each.init for each in configs if each.init not in ("loftq", "pissa", "olora")]:
      parser.error(
        f"--inits: {', '.join(wrong)}; of those that weights alone give: loftq, pissa, olora"
      )
  except ValueError as error:
    parser.error(str(error))

  def draw_all() -> jax.Array:
    total = jnp.float32(0)
    for leaf in leaves.values():
      for index in np.ndindex(*leaf.shape[:-2]):
        total = total + leaf[index].sum()
    return total

  timed(draw_all)
  report: dict[str, Any] = {
    **environment.describe(),
    "model": arguments.model,
    "rank": arguments.rank,
    "codebook": arguments.codebook,
    "matrices": sum(int(np.prod(leaf.shape[:-2])) for leaf in leaves.values()),
    "weights": sum(int(np.prod(leaf.shape)) for leaf in leaves.values()),
    "seconds_drawing": timed(draw_all)[1],
    "inits": [measure(leaves, quantization, cfg) for cfg in configs],
  }
  print(json.dumps(report, indent=1))
  if arguments.out:
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())

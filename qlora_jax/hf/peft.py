"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

PEFT's A is `[r, in]` and its B `[out, r]`, one pair a layer; ours are transposed and stacked,
with ranks that differ by layer padded with zeros.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qlora_jax import tree_paths
from qlora_jax.hf.files import new_directory, read_json, write_json
from qlora_jax.lora import LoRAConfig
from qlora_jax.models import families
from qlora_jax.quantized_tensor import is_quantized

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of adapter_config.json that are read here, and those that do not change what is computed.
# Any other must be empty: a later PEFT's new kind of adapter is refused, not taken for plain LoRA.
_KNOWN = frozenset(
  "alpha_pattern lora_alpha lora_dropout peft_type r rank_pattern use_rslora "
  "auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules "
  "inference_mode layers_pattern layers_to_transform loftq_config megatron_core peft_version "
  "qalora_group_size revision runtime_config target_modules task_type".split()
)

# Values under which a field leaves plain LoRA. The starts that are missing here (PiSSA, LoftQ, …)
# also change the base: what was trained beside it fits the original one no longer.
_PLAIN: dict[str, tuple[Any, ...]] = {
  "bias": ("none",),
  "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def load_adapter(
  path: str | os.PathLike[str], frozen: Any
) -> tuple[dict[str, Any], dict[str, Any], LoRAConfig]:
  """Reads a PEFT adapter for the base `frozen`.

  Args:
    path: a directory with adapter_config.json and adapter_model.safetensors.
    frozen: the base, packed or plain.

  Returns:
    (params, constants, cfg): trees as `lora.init` makes them, and the config that would.

  Raises:
    FileNotFoundError: the directory or a file is missing.
    ValueError: a kind of adapter that is not supported, named; a tensor that fits no weight of
      the base, or not its shape.
  """
  directory = Path(path).absolute()
  for name in (_CONFIG, _WEIGHTS):
    if not (directory / name).exists():
      raise FileNotFoundError(f"{directory}: not a PEFT adapter: {name} was looked for")
  raw = read_json(directory / _CONFIG)
  _check_plain(directory, raw)
  file = directory / _WEIGHTS
  try:
    tensors = safetensors.numpy.load_file(file)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{file}: not a whole safetensors file ({error})") from None

  weights = {
    tree_paths.module(leaf): w
    for leaf, w in tree_paths.leaves(frozen, is_leaf=is_quantized).items()
    if leaf.endswith("/kernel")
  }
  places = _places(weights)
  found: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
  for key in sorted(tensors):
    if base := re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.base_layer\.weight", key):
      _check_base(f"{file}: {key}", tensors[key], weights, places.get(base[1]))
      continue
    match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
    if match is None:
      raise ValueError(f"{file}: {key}: not a LoRA matrix; only lora_A and lora_B are supported")
    if match[1] not in places:
      raise ValueError(f"{file}: {key}: the base has no such layer")
    layer_path, layer = places[match[1]]
    found.setdefault(layer_path, {}).setdefault(layer, {})[match[2]] = tensors[key]
  if not found:
    raise ValueError(f"{file}: holds no tensor")

  modules = {place: name for name, place in places.items()}
  params, constants = {}, {}
  ranks: dict[str, int] = {}
  alphas: dict[str, float] = {}
  for layer_path, by_layer in found.items():
    w = weights[layer_path]
    k, n = w.shape[-2:]
    layers = range(w.shape[0]) if None not in by_layer else (None,)
    own = {
      layer: _rank(file, modules[layer_path, layer], pair, k, n) for layer, pair in by_layer.items()
    }
    rank = max(own.values())
    a = np.zeros((len(layers), k, rank), np.float32)
    b = np.zeros((len(layers), rank, n), np.float32)
    own_ranks = np.zeros(len(layers), np.int32)
    scalings = np.zeros(len(layers), np.float32)
    for i, layer in enumerate(layers):
      if layer not in by_layer:
        continue
      module = modules[layer_path, layer]
      pair, r = by_layer[layer], own[layer]
      declared, alpha = _declared(raw, module)
      if r != declared:
        raise ValueError(f"{file}: {module}: rank {r}; {_CONFIG} says {declared}")
      a[i, :, :r] = pair["A"].astype(np.float32).T
      b[i, :r] = pair["B"].astype(np.float32).T
      own_ranks[i] = r
      scalings[i] = alpha / (math.sqrt(r) if raw.get("use_rslora") else r)
      virtual = layer_path if layer is None else _virtual(layer_path, layer)
      ranks[virtual], alphas[virtual] = r, alpha
    stacked = None not in by_layer
    values = {"lora_a": a, "lora_b": b}
    for name, value in values.items():
      params[f"{layer_path}/{name}"] = jnp.asarray(value if stacked else value[0])
    fixed = {"scaling": scalings, "rank": own_ranks}
    if raw.get("lora_dropout"):
      fixed["dropout"] = np.full(len(layers), raw["lora_dropout"], np.float32)
    for name, value in fixed.items():
      constants[f"{layer_path}/{name}"] = jnp.asarray(value if stacked else value[0])

  cfg = LoRAConfig(
    rank=raw["r"],
    alpha=float(raw["lora_alpha"]),
    targets=tuple(ranks),
    rank_stabilized=bool(raw.get("use_rslora")),
    dropout=float(raw.get("lora_dropout") or 0.0),
    rank_pattern={path: rank for path, rank in ranks.items() if rank != raw["r"]},
    alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != raw["lora_alpha"]},
  )
  return tree_paths.nest(params), tree_paths.nest(constants), cfg


def save_adapter(
  path: str | os.PathLike[str],
  params: Any,
  constants: Any,
  cfg: LoRAConfig,
  *,
  base_model_name: str | None = None,
) -> None:
  """Writes an adapter that PEFT opens.

  Ranks and scalings are those in `constants`; where they differ from `cfg`'s, they go into
  PEFT's rank and alpha patterns.

  Args:
    path: must not exist.
    params, constants, cfg: as `lora.init` made them, trained.
    base_model_name: the base that PEFT is to look for.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: an adapter PEFT's LoRA cannot express, or a path that the files of no family name.
  """
  flat = tree_paths.leaves(params)
  fixed = tree_paths.leaves(constants)
  if not flat:
    raise ValueError("save_adapter: params is empty; there is no adapter to write")
  for leaf in flat:
    if not leaf.endswith(("/lora_a", "/lora_b")):
      raise ValueError(f"{leaf}: trained in full; only LoRA matrices can be written as an adapter")
    layer_path = leaf.rpartition("/")[0]
    for needed in (f"{layer_path}/lora_a", f"{layer_path}/lora_b"):
      if needed not in flat:
        raise ValueError(f"{needed}: missing beside {leaf}")
    for needed in (f"{layer_path}/rank", f"{layer_path}/scaling"):
      if needed not in fixed:
        raise ValueError(f"{needed}: missing; pass the constants that lora.init returned")
  tensors: dict[str, np.ndarray] = {}
  targets: list[str] = []
  ranks: dict[str, int] = {}
  alphas: dict[str, float] = {}
  for leaf, a in flat.items():
    layer_path, _, which = leaf.rpartition("/")
    if which != "lora_a":
      continue
    a, b = np.asarray(a, np.float32), np.asarray(flat[f"{layer_path}/lora_b"], np.float32)
    own_ranks = np.atleast_1d(np.asarray(fixed[f"{layer_path}/rank"]))
    scalings = np.atleast_1d(np.asarray(fixed[f"{layer_path}/scaling"], np.float64))
    stacked = a.ndim == 3
    name = _module_name(layer_path)
    a, b = (a, b) if stacked else (a[None], b[None])
    # One short name where all layers have it; else each layer by its full name.
    if own_ranks.all():
      targets.append(name.rsplit(".", 1)[-1])
    for layer, (rank, scaling) in enumerate(zip(own_ranks.tolist(), scalings, strict=True)):
      if rank == 0:
        continue
      module = name.format(layer=layer)
      if not own_ranks.all():
        targets.append(module)
      tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a[layer, :, :rank].T)
      tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b[layer, :rank].T)
      if rank != cfg.rank:
        ranks[module] = rank
      if (alpha := _alpha(scaling, rank, cfg)) != cfg.alpha:
        alphas[module] = alpha
  with new_directory(path) as temporary:
    write_json(
      temporary / _CONFIG,
      {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": cfg.rank,
        "lora_alpha": int(cfg.alpha) if float(cfg.alpha).is_integer() else cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rank_stabilized,
        "target_modules": sorted(set(targets)),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "lora_bias": False,
      },
    )
    safetensors.numpy.save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})


def _alpha(scaling: float, rank: int, cfg: LoRAConfig) -> float:
  """The alpha that gives this float32 scaling back to the bit: `cfg`'s, or a short one."""
  exact = float(scaling) * (math.sqrt(rank) if cfg.rank_stabilized else rank)
  for alpha in (cfg.alpha, *(float(f"{exact:.{digits}g}") for digits in range(1, 17))):
    if np.float32(cfg.scaling(rank, alpha)) == np.float32(scaling):
      return alpha
  return exact


def _check_plain(directory: Path, raw: Mapping[str, Any]) -> None:
  kind = raw.get("peft_type")
  if kind != "LORA":
    raise ValueError(f"{directory / _CONFIG}: peft_type: {kind!r} is not supported; 'LORA' is")
  for name, kind in (("r", int), ("lora_alpha", int | float)):
    if not isinstance(raw.get(name), kind):
      raise ValueError(f"{directory / _CONFIG}: {name}: {raw.get(name)!r}; a number is wanted")
  for name, value in raw.items():
    if value and name not in _KNOWN and value not in _PLAIN.get(name, ()):
      raise ValueError(f"{directory / _CONFIG}: {name}: {value!r} is not supported")


def _places(weights: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
  """The file's name of each layer → our path of it, and its place in the stack."""
  places = {}
  for layer_path, w in weights.items():
    name = _module_name(layer_path)
    if tree_paths.is_stacked(f"{layer_path}/kernel"):
      for layer in range(w.shape[0]):
        places[name.format(layer=layer)] = (layer_path, layer)
    else:
      places[name] = (layer_path, None)
  return places


def _module_name(layer_path: str) -> str:
  for family in families.FAMILIES.values():
    if name := family.names.get(f"{layer_path}/kernel"):
      return name.removesuffix(".weight")
  raise ValueError(f"{layer_path}: the files of no known family have a name for it")


def _virtual(layer_path: str, layer: int) -> str:
  return tree_paths.per_layer(layer_path, layer + 1)[layer]


def _check_base(
  where: str,
  stored: np.ndarray,
  weights: Mapping[str, Any],
  place: tuple[str, int | None] | None,
) -> None:
  """PEFT writes a copy of the head's base weight beside its adapter: it must be the base's own."""
  if place is None:
    raise ValueError(f"{where}: the base has no such layer")
  layer_path, layer = place
  w = weights[layer_path]
  if is_quantized(w):
    return  # the copy is of before the packing
  w = w if layer is None else w[layer]
  if stored.shape != w.shape[::-1] or not np.array_equal(stored.T.astype(w.dtype), w):
    raise ValueError(f"{where}: differs from the base's; the adapter belongs to another base")


def _rank(file: Path, module: str, pair: Mapping[str, np.ndarray], k: int, n: int) -> int:
  for which in ("A", "B"):
    if which not in pair:
      raise ValueError(f"{file}: {module}: lora_{which} is missing")
  for which, matrix in pair.items():
    # astype: numpy alone does not know bfloat16.
    if not np.isfinite(matrix.astype(np.float32)).all():
      raise ValueError(f"{file}: {module}: lora_{which} holds a value that is not finite")
  a, b = pair["A"].shape, pair["B"].shape
  if len(a) != 2 or a[0] < 1 or len(b) != 2 or a[0] != b[1] or a[1] != k or b[0] != n:
    raise ValueError(
      f"{file}: {module}: lora_A {list(a)}, lora_B {list(b)}; the base asks for [r, {k}], [{n}, r]"
    )
  return a[0]


def _declared(raw: Mapping[str, Any], module: str) -> tuple[int, float]:
  """Rank and alpha of a module; a pattern's key is matched as PEFT does, `(.*\\.)?key$`."""

  def by_pattern(name: str, default: Any) -> Any:
    for key, value in (raw.get(name) or {}).items():
      if re.match(rf"(.*\.)?({key})$", module):
        return value
    return default

  return by_pattern("rank_pattern", raw["r"]), float(by_pattern("alpha_pattern", raw["lora_alpha"]))

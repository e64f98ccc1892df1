"""PEFT's adapter files, sorted into the trees of `lora`; what they are not read as is refused."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import lora, tree_paths
from qlora_jax.hf.peft_names import (
  CONFIG,
  PREFIX,
  TENSORS,
  TOKEN_ROWS,
  Names,
  Place,
  ends_with,
)
from qlora_jax.lora import HEAD, TABLE, LoRAConfig
from qlora_jax.quantized_tensor import is_quantized

# Fields of adapter_config.json that are read here, and those that do not change what is computed.
# Any other must be empty: a later PEFT's new kind of adapter is refused, not taken for plain LoRA.
_KNOWN = frozenset(
  "alpha_pattern bias ensure_weight_tying exclude_modules init_lora_weights layers_pattern "
  "layers_to_transform lora_alpha lora_bias lora_dropout modules_to_save peft_type r rank_pattern "
  "target_modules trainable_token_indices use_dora use_rslora "
  "auto_mapping base_model_name_or_path eva_config inference_mode loftq_config megatron_core "
  "peft_version qalora_group_size revision runtime_config task_type".split()
)

_BIASES = ("none", "all", "lora_only")

# Starts that leave the base as it is.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# And some that do not: what was trained beside the changed base fits the original one no longer.
_CHANGED_BASE = {
  **dict.fromkeys(
    ("pissa", "olora", "corda", "lora_ga"),
    "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) makes plain LoRA "
    "of it",
  ),
  "loftq": "merge it with PEFT into the base that it was made with, and read that",
}


class Reader:
  """Sorts the tensors of a file, and makes the trees of them.

  Whatever fits no place of the base, or contradicts adapter_config.json, is a ValueError that
  names file and tensor.
  """

  def __init__(self, file: Path, raw: Mapping[str, Any], frozen: Any, names: Names):
    self._file, self._raw, self._frozen, self._names = file, raw, frozen, names
    self._modules = names.modules
    # Leaf of the base → index → our name → tensor.
    self._adapters: dict[str, dict[tuple[int, ...], dict[str, np.ndarray]]] = {}
    # Leaf of the base → index → tensor.
    self._full: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    # The table and the head → their rows of tokens that are trained alone, `[T, D]`.
    self._tokens: dict[str, np.ndarray] = {}

  def add(self, key: str, tensor: np.ndarray) -> None:
    """Takes in one tensor, or refuses it."""
    where = f"{self._file}: {key}"
    name = key.removeprefix(PREFIX)
    endings = "|".join(map(re.escape, TENSORS))
    adapter = re.fullmatch(rf"(.+)\.({endings})", name)
    base = re.fullmatch(r"(.+)\.base_layer(\.weight|\.bias)", name)
    if base:
      name = base[1] + base[2]
    rows = name != key and name.endswith(f".{TOKEN_ROWS}")
    if name == key or not (adapter or rows or name.endswith((".weight", ".bias"))):
      raise ValueError(f"{where}: not a tensor of a LoRA adapter")
    # astype: numpy alone does not know bfloat16.
    if not np.isfinite(tensor.astype(np.float32)).all():
      raise ValueError(f"{where}: holds a value that is not finite")
    if rows:
      place = self._modules.get(name.removesuffix(f".{TOKEN_ROWS}"))
      if place is None or place.path not in (TABLE, HEAD):
        raise ValueError(f"{where}: the base has no such table of tokens")
      self._tokens[place.path] = tensor
      return
    if adapter:
      place = self._modules.get(adapter[1])
      if place is None:
        raise ValueError(f"{where}: the base has no such layer")
      if lora.is_lookup(place.path) and TENSORS[adapter[2]] == "magnitude":
        raise ValueError(f"{where}: DoRA on an embedding is not supported; plain LoRA is")
      if lora.is_lookup(place.path) != ("embedding" in adapter[2]):
        kind = "is" if lora.is_lookup(place.path) else "is not"
        raise ValueError(f"{where}: the base's layer {kind} an embedding")
      # A lookup's A is stored as [r, V]: transposed, like the others.
      value = tensor.T if tensor.ndim == 2 else tensor
      own = self._adapters.setdefault(place.path, {}).setdefault(place.index, {})
      own[TENSORS[adapter[2]]] = value
      return
    place = self._names.places.get(name)
    if place is None:
      raise ValueError(f"{where}: the base has no such tensor")
    value = tensor.T if place.path.endswith("/kernel") else tensor
    self._check_full(where, place, value)
    trained = base is None
    if base and base[2] == ".bias":
      trained = self._raw.get("bias", "none") != "none"
    if not trained:
      # PEFT keeps a copy of an adapted embedding and head; of a packed one, as it was before.
      if not is_quantized(self._names.flat[place.path]) and not self._is_base(place, value):
        raise ValueError(f"{where}: differs from the base's; the adapter belongs to another base")
    elif self._is_saved(name) or not self._is_base(place, value):
      self._full.setdefault(place.path, {})[place.index] = value

  def _is_saved(self, name: str) -> bool:
    """Whether the config says that a tensor was trained in full; else it may be a mere copy."""
    if name.endswith(".bias") and self._raw.get("bias", "none") != "none":
      return True
    module = name.rpartition(".")[0]
    saved = self._raw.get("modules_to_save") or ()
    return any(module.endswith(each) or f"{each}." in module for each in saved)

  def _check_full(self, where: str, place: Place, value: np.ndarray) -> None:
    shape = tuple(self._names.flat[place.path].shape[len(place.index) :])
    if value.shape == shape:
      return
    axis = {TABLE: 0, HEAD: 1}.get(place.path)
    if axis is not None and value.ndim == 2:
      self._check_vocabulary(where, value.shape[axis], shape[axis])
    stored = value.shape[::-1] if place.path.endswith("/kernel") else value.shape
    wanted = shape[::-1] if place.path.endswith("/kernel") else shape
    raise ValueError(f"{where}: shape {list(stored)}; the base asks for {list(wanted)}")

  def _check_vocabulary(self, where: str, rows: int, vocabulary: int) -> None:
    if rows != vocabulary:
      raise ValueError(
        f"{where}: is for a vocabulary of {rows}; the base's has {vocabulary} rows. Give the base "
        "the rows that it was trained with"
      )

  def _is_base(self, place: Place, value: np.ndarray) -> bool:
    """Whether a tensor is the base's own, at the precision of the coarser of the two."""
    w = lora.base_weight(self._frozen, place.path)
    if is_quantized(w):
      return False
    w = np.asarray(w[place.index])
    dtype = min(w.dtype, value.dtype, key=lambda dtype: dtype.itemsize)
    return np.array_equal(w.astype(dtype), value.astype(dtype))

  def finish(self) -> tuple[dict[str, Any], dict[str, Any], LoRAConfig]:
    """(params, constants, cfg)."""
    raw = self._raw
    if not self._adapters:
      raise ValueError(f"{self._file}: holds no LoRA matrix")
    ranks: dict[str, dict[str, int]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for path, by_index in self._adapters.items():
      for index, tensors in by_index.items():
        place = Place(path, index)
        rank, alpha = self._checked(place, tensors)
        layer = place.virtual()
        own = ranks.setdefault(path, {}).setdefault(layer, rank)
        if (own, alphas.setdefault(path, {}).setdefault(layer, alpha)) != (rank, alpha):
          raise ValueError(
            f"{self._file}: {layer}: experts of unlike rank or alpha are not supported"
          )
    self._check_experts()
    self._check_targets()
    self._tie()
    tokens = self._token_ids()
    everything = [
      layer for path, leaf in self._names.flat.items() for layer in tree_paths.layers(path, leaf)
    ]

    def patterns(values: Mapping[str, Mapping[str, Any]], default: Any) -> dict[str, Any]:
      chosen = {}
      for own in values.values():
        for value in dict.fromkeys(own.values()):
          if value != default:
            layers = [layer for layer in own if own[layer] == value]
            chosen |= dict.fromkeys(_patterns(layers, everything), value)
      return chosen

    try:
      cfg = LoRAConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        targets=tuple(
          pattern for own in ranks.values() for pattern in _patterns(list(own), everything)
        ),
        rank_stabilized=bool(raw.get("use_rslora")),
        dropout=float(raw.get("lora_dropout") or 0.0),
        rank_pattern=patterns(ranks, raw["r"]),
        alpha_pattern=patterns(alphas, float(raw["lora_alpha"])),
        variant="dora" if raw.get("use_dora") else "lora",
        lora_bias=bool(raw.get("lora_bias")),
        modules_to_save=tuple(
          pattern
          for path in self._full
          for pattern in _patterns(
            tree_paths.layers(path, self._names.flat[path]), everything, weight=True
          )
        ),
        trainable_tokens=tuple(tokens),
      )
      constants = lora.constants(self._frozen, cfg)
    except ValueError as error:
      raise ValueError(f"{self._file.parent / CONFIG}: {error}") from None
    params = self._params()
    for path in (TABLE, HEAD):
      if f"{lora.module(path)}/token_ids" in tree_paths.leaves(constants):
        params[f"{lora.module(path)}/token_delta"] = self._token_delta(path, tokens)
    return tree_paths.nest(params), constants, cfg

  def _token_ids(self) -> list[int]:
    """The tokens that are trained alone, in the order of their rows."""
    given = self._raw.get("trainable_token_indices") or {}
    lists = list(given.values()) if isinstance(given, dict) else [given]
    if any(each != lists[0] for each in lists):
      raise ValueError(
        f"{self._file.parent / CONFIG}: trainable_token_indices: {given!r}; table and head of the "
        "same tokens are supported"
      )
    ids = lists[0] if lists else []
    if bool(ids) != bool(self._tokens):
      raise ValueError(
        f"{self._file}: {len(self._tokens)} tensors of {TOKEN_ROWS}, with trainable_token_indices "
        f"{given!r}"
      )
    return ids

  def _token_delta(self, path: str, ids: list[int]) -> jax.Array:
    """`[T, D]` in ascending order of the tokens; zeros where the file leaves the rows alone."""
    w = np.asarray(lora.dense_part(lora.base_weight(self._frozen, path), ()))
    base = w[sorted(ids)] if path == TABLE else w[:, sorted(ids)].T
    if path not in self._tokens:
      return jnp.zeros(base.shape, jnp.float32)
    rows = self._tokens[path]
    if rows.shape != base.shape:
      raise ValueError(
        f"{self._file}: {TOKEN_ROWS} {list(rows.shape)} of {path}; {list(base.shape)} by "
        "trainable_token_indices"
      )
    return jnp.asarray(rows.astype(np.float32)[np.argsort(ids)] - base)

  def _params(self) -> dict[str, jax.Array]:
    params = {}
    for path, by_index in self._adapters.items():
      leading = self._names.flat[path].shape[:-2]
      for name in next(iter(by_index.values())):
        values = {index: tensors[name] for index, tensors in by_index.items()}
        shape = tuple(np.max([value.shape for value in values.values()], axis=0))
        stack = np.zeros((*leading, *shape), _dtype(values.values()))
        for index, value in values.items():
          stack[(*index, *map(slice, value.shape))] = value
        params[f"{lora.module(path)}/{name}"] = jnp.asarray(stack)
    for path, values in self._full.items():
      leaf = self._names.flat[path]
      leading = next(len(index) for index in values)
      if len(values) < math.prod(leaf.shape[:leading]):
        w = lora.base_weight(self._frozen, path)
        w = lora.merge({"w": w}, {}, {})["w"] if is_quantized(w) else w
        values = {
          index: np.asarray(w[index]) for index in np.ndindex(*leaf.shape[:leading])
        } | values
      stack = np.zeros(leaf.shape, _dtype(values.values()))
      for index, value in values.items():
        stack[index] = value
      params[path] = jnp.asarray(stack)
    return params

  def _checked(self, place: Place, tensors: Mapping[str, np.ndarray]) -> tuple[int, float]:
    """Rank and alpha of one adapter, its tensors being all there and of the right shapes."""
    *_, k, n = self._names.flat[place.path].shape
    module = self._names.names[place]
    where = f"{self._file}: {module}"
    wanted = {"lora_a": "lora_A", "lora_b": "lora_B"}
    optional = {"lora_bias": ("lora_bias", "lora_B.bias"), "magnitude": ("use_dora", "magnitude")}
    for name, (field, theirs) in optional.items():
      if self._raw.get(field):
        wanted[name] = theirs
      elif name in tensors:
        raise ValueError(f"{where}: has a {theirs}; {CONFIG}: {field} says that there is none")
    if lora.is_lookup(place.path):
      wanted = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
    for name, theirs in wanted.items():
      if name not in tensors:
        raise ValueError(f"{where}: {theirs} is missing")
    a, b = tensors["lora_a"].shape, tensors["lora_b"].shape
    if len(a) == len(b) == 2:
      if place.path == TABLE:
        self._check_vocabulary(where, a[0], k)
      if place.path == HEAD:
        self._check_vocabulary(where, b[1], n)
    if len(a) != 2 or a[1] < 1 or len(b) != 2 or a[1] != b[0] or a[0] != k or b[1] != n:
      raise ValueError(
        f"{where}: lora_A {list(a[::-1])}, lora_B {list(b[::-1])}; the base asks for [r, {k}], "
        f"[{n}, r]"
      )
    for name in wanted.keys() - {"lora_a", "lora_b"}:
      if tensors[name].shape != (n,):
        shape = list(tensors[name].shape)
        raise ValueError(f"{where}: {wanted[name]} {shape}; the base asks for [{n}]")
    declared, alpha = _declared(self._raw, module)
    if a[1] != declared:
      raise ValueError(f"{where}: rank {a[1]}; {CONFIG} says {declared}")
    return a[1], alpha

  def _check_experts(self) -> None:
    for path, by_index in self._adapters.items():
      for index in by_index:
        if len(index) < 2:
          continue
        for expert in range(self._names.flat[path].shape[1]):
          if (index[0], expert) not in by_index:
            layer = Place(path, index).virtual()
            raise ValueError(
              f"{self._file}: {layer}: expert {expert} has no adapter, and expert {index[1]} has "
              "one; all of a layer's experts have one, or none"
            )

  def _check_targets(self) -> None:
    """What the config names has its tensors: else a part of a file would be read as the whole."""
    for name in self._raw.get("modules_to_save") or ():
      full = [Place(path, index) for path, own in self._full.items() for index in own]
      modules = [name for name, place in self._names.places.items() if place in full]
      if not any(f".{name}." in f".{module}" or f"{name}." in module for module in modules):
        raise ValueError(
          f"{self._file}: holds no tensor of {name}, which modules_to_save of {CONFIG} names"
        )
    targets = self._raw.get("target_modules")
    if targets is None:
      return
    if not isinstance(targets, str):
      for target in targets:
        if not any(ends_with(name, target) for name in self._modules):
          raise ValueError(
            f"{self._file.parent / CONFIG}: target_modules: {target!r} matches no layer of the base"
          )
    for module, place in self._modules.items():
      if _is_target(self._raw, module, place) and place.index not in self._adapters.get(
        place.path, {}
      ):
        raise ValueError(
          f"{self._file}: holds no tensor of {module}, which target_modules of {CONFIG} choose"
        )

  def _tie(self) -> None:
    """What a full token table means for the head that is tied to it."""
    if not lora.is_tied(self._frozen) or TABLE not in self._full | self._adapters:
      return
    where = f"{self._file.parent / CONFIG}: ensure_weight_tying"
    ensured = bool(self._raw.get("ensure_weight_tying"))
    if TABLE in self._adapters:
      if ensured:
        raise ValueError(
          f"{where}: True with an adapter on the embedding is not supported: the head and the "
          "lookup cannot share one"
        )
      return
    if ensured or not self._is_saved(self._names.templates[TABLE]):
      # One weight, that both read.
      head = self._full.pop(HEAD, None)
      if head is not None and not np.array_equal(head[()].T, self._full[TABLE][()]):
        raise ValueError(f"{where}: {ensured}, and the file's head differs from its embedding")
    elif HEAD not in self._full:
      # PEFT trains a copy for the lookup, and the head keeps reading the base's table.
      head = np.asarray(lora.base_weight(self._frozen, HEAD))
      self._full[HEAD] = {(): head}


def _dtype(arrays: Any) -> np.dtype:
  dtypes = {array.dtype for array in arrays}
  return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def check_config(raw: Mapping[str, Any]) -> None:
  """Refuses, by the field's name, an adapter that is no LoRA, or of a kind that is not known."""
  kind = raw.get("peft_type")
  if kind != "LORA":
    raise ValueError(f"peft_type: {kind!r} is not supported; 'LORA' is")
  for name, kind in (("r", int), ("lora_alpha", int | float)):
    if not isinstance(raw.get(name), kind):
      raise ValueError(f"{name}: {raw.get(name)!r}; a number is wanted")
  for name, value in raw.items():
    if value and name not in _KNOWN:
      raise ValueError(f"{name}: {value!r} is not supported")
  if raw.get("bias", "none") not in _BIASES:
    raise ValueError(f"bias: {raw['bias']!r} is not supported; {', '.join(_BIASES)} are")
  start = raw.get("init_lora_weights")
  for name, remedy in _CHANGED_BASE.items():
    if str(start).lower().startswith(name):
      raise ValueError(
        f"init_lora_weights: {start!r} is not supported: it changed the base that the adapter was "
        f"trained beside; {remedy}"
      )
  if start not in _STARTS:
    raise ValueError(f"init_lora_weights: {start!r} is not supported")
  for name in ("rank_pattern", "alpha_pattern"):
    for key, value in (raw.get(name) or {}).items():
      _compiled(name, key)
      if not isinstance(value, int if name == "rank_pattern" else int | float):
        raise ValueError(f"{name}: {key!r}: {value!r}; a number is wanted")
  for name in ("target_modules", "exclude_modules"):
    value = raw.get(name)
    if isinstance(value, str):
      _compiled(name, value)


def _compiled(field: str, pattern: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(f"{field}: {pattern!r} is no regular expression ({error})") from None


def _is_target(raw: Mapping[str, Any], module: str, place: Place) -> bool:
  """Whether PEFT's rules give a module an adapter."""
  excluded = raw.get("exclude_modules") or ()
  if isinstance(excluded, str):
    if re.fullmatch(excluded, module):
      return False
  elif any(ends_with(module, name) for name in excluded):
    return False
  for name in raw.get("modules_to_save") or ():
    if re.match(rf"(^|.*\.){name}($|\..*)", module):
      return False
  targets = raw["target_modules"]
  if isinstance(targets, str):
    if targets.lower() == "all-linear":
      return place.path not in (TABLE, HEAD)
    return re.fullmatch(targets, module) is not None
  layers = raw.get("layers_to_transform")
  if layers is not None and layers != []:
    layers = [layers] if isinstance(layers, int) else layers
    patterns = raw.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    hits = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns]
    if not any(hit and int(hit[1]) in layers for hit in hits):
      return False
  return any(ends_with(module, target) for target in targets)


def _declared(raw: Mapping[str, Any], module: str) -> tuple[int, float]:
  """Rank and alpha of a module; a pattern's key is matched as PEFT does, `(.*\\.)?key$`."""

  def by_pattern(name: str, default: Any) -> Any:
    for key, value in (raw.get(name) or {}).items():
      if re.match(rf"(.*\.)?({key})$", module):
        return value
    return default

  return by_pattern("rank_pattern", raw["r"]), float(by_pattern("alpha_pattern", raw["lora_alpha"]))


def _patterns(layers: list[str], everything: list[str], weight: bool = False) -> list[str]:
  """Few patterns that choose these virtual paths, all of one leaf, and none besides."""
  parts = [layer.split("/") for layer in layers]
  stacked = next((i for i, part in enumerate(parts[0]) if part.isdigit()), None)
  leave = (lambda path: path) if weight else lora.module
  if stacked is None:
    return [leave(layers[0])]

  def around(middle: str) -> str:
    return leave("/".join([*parts[0][:stacked], middle, *parts[0][stacked + 1 :]]))

  every = around("*")
  if sorted(layers) == sorted(path for path in everything if tree_paths.matches(every, path)):
    return [every]
  # Of a number all but the last digit, which is one of a set: layers/1[0246]/…
  tens: dict[str, str] = {}
  for part in parts:
    number = part[stacked]
    tens[number[:-1]] = tens.get(number[:-1], "") + number[-1]
  return [
    around(f"{ten}{_digits(digits)}")
    for ten, digits in sorted(tens.items(), key=lambda x: len(x[0]))
  ]


def _digits(digits: str) -> str:
  digits = "".join(sorted(digits))
  if len(digits) == 1:
    return digits
  return "[0-9]" if len(digits) == 10 else f"[{digits}]"

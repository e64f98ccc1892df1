"""The trees of `lora`, turned into PEFT's adapter files and a model card."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax import lora
from qlora_jax.hf.peft_names import PREFIX, TENSORS, TOKEN_ROWS, ends_with, families_of
from qlora_jax.lora import HEAD, TABLE, LoRAConfig
from qlora_jax.models.families import axes_of, tensor_names
from qlora_jax.models.transformer import Transformer


class Writer:
  """Turns our leaves into PEFT's tensors, and into the fields of its config that speak of them.

  Attributes:
    tensors: by the file's names, once `write` has run.
  """

  def __init__(
    self,
    flat: Mapping[str, Any],
    fixed: Mapping[str, Any],
    cfg: LoRAConfig,
    frozen: Any,
    model: Transformer | None,
  ):
    self._flat, self._fixed, self._cfg = flat, fixed, cfg
    self.tensors: dict[str, np.ndarray] = {}
    # Of the base itself, where it is given.
    self._base = {} if frozen is None else lora.weights(frozen)
    self._tied = None
    if frozen is not None:
      self._tied = lora.is_tied(frozen)
    elif model is not None:
      self._tied = model.config.tie_embeddings
    ending = "/token_delta"
    self._tokens = {
      TABLE if lora.module(TABLE) + ending == leaf else HEAD: x
      for leaf, x in flat.items()
      if leaf.endswith(ending)
    }
    flat = {leaf: x for leaf, x in flat.items() if not leaf.endswith(ending)}
    kinds = set(TENSORS.values())
    self._full = {leaf: x for leaf, x in flat.items() if leaf.rpartition("/")[2] not in kinds}
    # The weights that have adapters.
    self._weights = {}
    for leaf in flat:
      layer, _, name = leaf.rpartition("/")
      if name in kinds:
        lookup = f"{layer}/{TABLE.rpartition('/')[2]}"
        self._weights[layer] = lookup if lookup == TABLE else f"{layer}/kernel"
    paths = [*self._full, *self._weights.values()]
    candidates = families_of(self._base or paths, model)
    if not self._base:
      # Experts have an axis more.
      axes = {
        weight: np.ndim(flat.get(f"{layer}/lora_a", 0)) - 2
        for layer, weight in self._weights.items()
      }
      candidates = [
        names
        for names in candidates
        if all(len(axes_of(names[weight])) == count for weight, count in axes.items())
      ] or candidates
      for leaf in paths:
        if len({names[leaf] for names in candidates}) > 1:
          raise ValueError(
            f"{leaf}: families differ in their name for it; give save_adapter the model, or frozen"
          )
    self._templates = candidates[0]
    for leaf in paths:
      if leaf not in self._templates:
        raise ValueError(f"{leaf}: the base's files have no name for it")

  def write(self) -> dict[str, Any]:
    """Fills `tensors`; returns the fields.

    Raises:
      ValueError: what PEFT cannot express.
    """
    for layer, weight in self._weights.items():
      self._check(layer, weight)
    fields: dict[str, Any] = {}
    for field, name in (("use_dora", "magnitude"), ("lora_bias", "lora_bias")):
      without = [layer for layer in self._weights if f"{layer}/{name}" not in self._flat]
      fields[field] = not without
      if without and len(without) < len(self._weights):
        raise ValueError(
          f"{without[0]}/{name}: missing, and other adapters have one; PEFT's {field} is of all"
        )
    if all(fields.values()):
      raise ValueError("lora_bias: beside DoRA's magnitude; PEFT has no adapter with both")
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer, weight in self._weights.items():
      own_ranks = np.atleast_1d(np.asarray(self._fixed[f"{layer}/rank"]))
      scalings = np.atleast_1d(np.asarray(self._fixed[f"{layer}/scaling"], np.float64))
      if own_ranks.all():
        targets.append(self._short_name(weight))
      for index, name in tensor_names(
        self._templates[weight], np.shape(self._flat[f"{layer}/lora_a"])
      ):
        # What is not stacked has one of each, and experts of a layer share theirs.
        layer_index = index[0] if index else 0
        rank, scaling = int(own_ranks[layer_index]), float(scalings[layer_index])
        if rank == 0:
          continue
        module = name.removesuffix(".weight")
        # One short name where all layers have it; else each layer by its full name.
        if not own_ranks.all():
          targets.append(module)
        self._write_adapter(layer, index, module, rank)
        if rank != self._cfg.rank:
          ranks[module] = rank
        if (alpha := _alpha(scaling, rank, self._cfg)) != self._cfg.alpha:
          alphas[module] = alpha
    return {
      "target_modules": sorted(set(targets)),
      "rank_pattern": ranks,
      "alpha_pattern": alphas,
      **fields,
      **self._write_full(),
      **self._write_tokens(),
    }

  def _check(self, layer: str, weight: str) -> None:
    flat, fixed = self._flat, self._fixed
    for name in ("lora_a", "lora_b"):
      if f"{layer}/{name}" not in flat:
        raise ValueError(f"{layer}/{name}: missing; an adapter has both matrices")
    for name in ("rank", "scaling"):
      if f"{layer}/{name}" not in fixed:
        raise ValueError(
          f"{layer}/{name}: missing; pass the constants that lora.init returned with the params"
        )
    if weight in self._full:
      raise ValueError(f"{weight}: trained in full, and has an adapter; PEFT has one or the other")
    axes = len(axes_of(self._templates[weight]))
    shape, scalings = np.shape(flat[f"{layer}/lora_a"]), np.shape(fixed[f"{layer}/scaling"])
    if len(shape) != axes + 2 or len(scalings) != min(axes, 1):
      raise ValueError(
        f"{layer}: lora_a {list(shape)} with scaling {list(scalings)}: several trials; slice one "
        "out of params and constants first"
      )

  def _write_adapter(self, layer: str, index: tuple[int, ...], module: str, rank: int) -> None:
    embedding = self._weights[layer] == TABLE
    ours = {
      "lora_embedding_A" if embedding else "lora_A.weight": "lora_a",
      "lora_embedding_B" if embedding else "lora_B.weight": "lora_b",
      "lora_B.bias": "lora_bias",
      "lora_magnitude_vector": "magnitude",
    }
    for theirs, name in ours.items():
      if f"{layer}/{name}" in self._flat:
        x = np.asarray(self._flat[f"{layer}/{name}"])[index]
        x = {"lora_a": x[..., :rank], "lora_b": x[:rank]}.get(name, x).T
        self.tensors[f"{PREFIX}{module}.{theirs}"] = np.ascontiguousarray(x)

  def _short_name(self, path: str, *, dotted: bool = True) -> str:
    """The end of a module's name that no other module of the family has.

    Args:
      dotted: whether PEFT asks for a dot before it, as it does of targets and not of
        modules_to_save.
    """
    names = {template.rpartition(".")[0] for template in self._templates.values()}
    own = self._templates[path].rpartition(".")[0]
    parts = own.split(".")
    for i in reversed(range(len(parts))):
      short = ".".join(parts[i:])
      ends = ends_with if dotted else str.endswith
      if "{" not in short and [name for name in names if ends(name, short)] == [own]:
        return short
    raise ValueError(f"{path}: no name of its own to give PEFT")

  def _write_full(self) -> dict[str, Any]:
    """The weights that are trained in full, and the fields that name them."""
    # PEFT saves modules with all their weights; a bias alone goes by another field.
    whole = {path for path in self._full if not path.endswith("/bias")}
    saved, biases = set(), set()
    for path in self._full:
      layer = lora.module(path).removesuffix("/bias")
      if path in whole or f"{layer}/kernel" in whole:
        saved.add(path)
      else:
        biases.add(path)
    base = {}
    for path in whole:
      bias = f"{lora.module(path)}/bias"
      if bias in self._base and bias not in self._full:
        base[bias] = self._base[bias]
    for path, x in {**self._full, **base}.items():
      layer = path.removesuffix("/bias")
      inner = ".base_layer" if path in biases and layer in self._weights else ""
      for index, name in tensor_names(self._templates[path], np.shape(x)):
        one = np.asarray(x)[index]
        one = one.T if path.endswith("/kernel") else one
        module, _, kind = name.rpartition(".")
        self.tensors[f"{PREFIX}{module}{inner}.{kind}"] = np.ascontiguousarray(one)
    tied = self._ties(saved)
    if tied:
      # PEFT asks for the head's copy.
      head = self._templates[HEAD]
      self.tensors[f"{PREFIX}{head}"] = self.tensors[f"{PREFIX}{self._templates[TABLE]}"]
    adapted = all(path.removesuffix("/bias") in self._weights for path in biases)
    return {
      "modules_to_save": sorted({self._short_name(path, dotted=False) for path in saved}) or None,
      "bias": ("lora_only" if adapted else "all") if biases else "none",
      "ensure_weight_tying": tied,
    }

  def _write_tokens(self) -> dict[str, Any]:
    """The rows of tokens that are trained alone, which PEFT keeps whole, and the field for them."""
    indices = {}
    for path, delta in self._tokens.items():
      if not self._base:
        raise ValueError(
          f"{path}: PEFT keeps trainable_tokens' whole rows; give save_adapter frozen"
        )
      for layer in {lora.module(path), *([lora.module(HEAD)] if self._tied else [])}:
        if layer in self._weights:
          raise ValueError(
            f"{layer}: has an adapter, and trainable_tokens; PEFT has one or the other"
          )
      ids = np.asarray(self._fixed[f"{lora.module(path)}/token_ids"])
      rows = np.asarray(lora.dense_part(self._base[path], ()))
      rows = rows[ids] if path == TABLE else rows[:, ids].T
      name = self._templates[path].removesuffix(".weight")
      self.tensors[f"{PREFIX}{name}.{TOKEN_ROWS}"] = rows + np.asarray(delta, np.float32)
      indices[self._short_name(path)] = ids.tolist()
    return {"trainable_token_indices": indices} if indices else {}

  def _ties(self, saved: set[str]) -> bool:
    """Whether PEFT is to let a tied head read the table that was trained in full."""
    if TABLE not in saved or HEAD in saved or self._tied is False:
      return False
    if self._tied is None:
      raise ValueError(
        f"{TABLE}: trained in full, and PEFT has to know whether the head is tied to it; give "
        "save_adapter the model, or frozen"
      )
    if lora.module(HEAD) in self._weights:
      raise ValueError(
        f"{HEAD}: has an adapter, and the embedding that it is tied to is trained in full; PEFT "
        "has no such adapter"
      )
    return True


def _alpha(scaling: float, rank: int, cfg: LoRAConfig) -> float:
  """The alpha that gives this float32 scaling back to the bit: `cfg`'s, or a short one."""
  exact = float(scaling) * (math.sqrt(rank) if cfg.rank_stabilized else rank)
  for alpha in (cfg.alpha, *(float(f"{exact:.{digits}g}") for digits in range(1, 17))):
    if np.float32(cfg.scaling(rank, alpha)) == np.float32(scaling):
      return alpha
  return exact


def card_text(
  config: Mapping[str, Any], cfg: LoRAConfig, trained: int, card: str | Mapping[str, Any] | None
) -> str:
  """The model card: Markdown behind a front matter of YAML, of which JSON is a part."""
  base = config["base_model_name_or_path"]
  kind = "DoRA" if config["use_dora"] else "LoRA"
  front = {
    **({"base_model": base} if base else {}),
    "library_name": "peft",
    "pipeline_tag": "text-generation",
    "tags": ["lora", *(["dora"] if config["use_dora"] else []), "qlora_jax"],
  }
  revision = f", revision {config['revision']}" if config["revision"] else ""
  facts: dict[str, Any] = {
    "Base model": f"{base}{revision}" if base else "not named",
    "Adapter": kind + (", rank-stabilized (rsLoRA)" if cfg.rank_stabilized else ""),
    "Rank": _with_patterns(cfg.rank, cfg.rank_pattern),
    "Alpha": _with_patterns(cfg.alpha, cfg.alpha_pattern),
    "Targets": ", ".join(f"`{target}`" for target in config["target_modules"]),
    "Dropout": cfg.dropout,
    "LoRA biases": "yes" if config["lora_bias"] else "no",
    "Trained in full": ", ".join(f"`{name}`" for name in config["modules_to_save"] or ()) or "none",
    "Biases trained": config["bias"],
    "Trained parameters": f"{trained:,}",
  }
  training = ""
  if isinstance(card, str):
    training = f"{card.strip()}\n"
  elif card:
    training = _list(card)
  return "\n".join(
    [
      "---",
      *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()),
      "---",
      "",
      f"# {kind} adapter" + (f" for {base}" if base else ""),
      "",
      "Written by qlora_jax for PEFT.",
      "",
      "## Adapter",
      "",
      _list(facts),
      "## Training",
      "",
      training or "Not described.\n",
    ]
  )


def _with_patterns(default: Any, patterns: Mapping[str, Any]) -> str:
  own = [f"`{pattern}` {value}" for pattern, value in patterns.items()]
  return f"{default}; {', '.join(own)}" if own else str(default)


def _list(facts: Mapping[str, Any]) -> str:
  return "".join(f"- {name}: {' '.join(str(value).split())}\n" for name, value in facts.items())

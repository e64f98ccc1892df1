"""How PEFT's files name the modules and tensors of an adapter, and where in a base they belong."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_jax import lora, tree_paths
from qlora_jax.models import families
from qlora_jax.models.families import tensor_names
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantized_tensor import is_quantized

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# The file's names of what is below an adapted module, and ours.
TENSORS = {
  "lora_A.weight": "lora_a",
  "lora_B.weight": "lora_b",
  "lora_B.bias": "lora_bias",
  "lora_magnitude_vector": "magnitude",
  "lora_magnitude_vector.weight": "magnitude",
  "lora_embedding_A": "lora_a",
  "lora_embedding_B": "lora_b",
}

# The file's name, below a module, of the rows of tokens that are trained alone: whole, no deltas.
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor of the file belongs: a leaf of the base, and the index in its stack."""

  path: str
  index: tuple[int, ...]

  def virtual(self) -> str:
    """The layer's path, `layers/3/attn/q/kernel`."""
    if not tree_paths.is_stacked(self.path):
      return self.path
    return tree_paths.per_layer(self.path, self.index[0] + 1)[self.index[0]]


class Names:
  """The tensors of a base by their names in its family's files.

  Attributes:
    flat: the base's leaves by path (`lora.weights`).
    templates: path → the file's name, with `{layer}` and `{expert}`.
    places: the file's name of a tensor → its place.
    modules: those that may have an adapter, by name; `names` is the inverse.
  """

  def __init__(self, flat: Mapping[str, Any], templates: Mapping[str, str]):
    self.flat, self.templates = flat, templates
    self.places = {
      name: Place(path, index)
      for path, leaf in flat.items()
      for index, name in tensor_names(templates[path], leaf.shape)
    }
    self.modules = {
      name.removesuffix(".weight"): place
      for name, place in self.places.items()
      if tree_paths.is_matrix(place.path, flat[place.path])
    }
    self.names = {place: name for name, place in self.modules.items()}


def base_names(frozen: Any, model: Transformer | None) -> Names:
  """Of a base, by its model's family, or the first that has names for all of it.

  Raises:
    ValueError: no family has; the message names the leaf.
  """
  paths = tree_paths.leaves(frozen, is_leaf=is_quantized)
  return Names(lora.weights(frozen), families_of(paths, model)[0])


def families_of(paths: Iterable[str], model: Transformer | None) -> list[Mapping[str, str]]:
  """The names of the families that have one for each of these paths.

  Raises:
    ValueError: see `base_names`.
  """
  if model is None:
    every = [family.names for family in families.FAMILIES.values()]
  else:
    every = [families.family(model.config.model_type).names]
  missing = {i: [path for path in paths if path not in names] for i, names in enumerate(every)}
  if all(missing.values()):
    path = min(missing.values(), key=len)[0]
    family = "no known family" if model is None else f"the family {model.config.model_type}"
    raise ValueError(f"{path}: the files of {family} have no name for it")
  return [names for i, names in enumerate(every) if not missing[i]]


def ends_with(module: str, name: str) -> bool:
  """Whether an entry of PEFT's target_modules chooses a module."""
  return module == name or module.endswith(f".{name}")

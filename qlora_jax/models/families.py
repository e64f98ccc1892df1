"""What differs between model families: a table of config readers and tensor names.

A family is one row of `FAMILIES`: how its config.json becomes a TransformerConfig, and under
which names its files keep our leaves. The decoder itself is one for all.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.models.transformer import RopeScaling, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """One row of the table.

  Attributes:
    model_type: as config.json says it.
    architecture: transformers' class, for the config.json that we write.
    config: its fields → the architecture; refuses what it does not support, by name.
    names: our leaf's path → the tensor's name in the file, with `{layer}` in a stack. A kernel
      is stored transposed there, [out, in].
  """

  model_type: str
  architecture: str
  config: Callable[[Mapping[str, Any]], TransformerConfig]
  names: Mapping[str, str]


def _field(raw: Mapping[str, Any], name: str, kind: str | None = None) -> Any:
  if raw.get(name) is None:
    kind = kind or f"a {raw.get('model_type')} config"
    raise ValueError(f"config.json: {name}: missing; {kind} has it")
  return raw[name]


def _typed(raw: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
  """A field of this type; the default where it is absent or null, and required where that is None.

  "false" is true in Python: what has another type is refused, not converted.
  """
  value = raw.get(name)
  if value is None:
    return _field(raw, name) if default is None else default
  accepted = (int, float) if kind is float else kind
  if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
    raise ValueError(f"config.json: {name}: {value!r}; a value of type {kind.__name__} is wanted")
  return kind(value)


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
  return _typed(raw, name, int, default)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
  return _typed(raw, name, bool, False)


def _only(raw: Mapping[str, Any], name: str, *supported: Any) -> None:
  if name in raw and raw[name] not in supported:
    choices = ", ".join(map(repr, supported))
    raise ValueError(f"config.json: {name}: {raw[name]!r} is not supported; {choices} is")


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """(theta, scaling), from transformers 5's `rope_parameters` or 4's two fields."""
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  if any(isinstance(value, Mapping) for value in rope.values()):
    raise ValueError(
      f"config.json: rope_parameters: one for each of {', '.join(rope)} is not supported; one for "
      "all layers is"
    )
  theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
  kind = rope.get("rope_type", rope.get("type", "default"))
  for fields in (raw, rope):
    _only(fields, "partial_rotary_factor", 1.0, None)
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ValueError(f"config.json: rope_type: {kind!r} is not supported; 'default', 'llama3' are")
  return theta, RopeScaling(
    **{
      field.name: _field(rope, field.name, "rope_type 'llama3'")
      for field in dataclasses.fields(RopeScaling)
    }
  )


def _llama(raw: Mapping[str, Any]) -> TransformerConfig:
  _only(raw, "hidden_act", "silu", "swish")
  _only(raw, "attention_dropout", 0.0, None)
  _only(raw, "is_causal", True, None)
  hidden_size = _integer(raw, "hidden_size")
  num_heads = _integer(raw, "num_attention_heads")
  theta, scaling = _rope(raw)
  return TransformerConfig(
    vocab_size=_integer(raw, "vocab_size"),
    hidden_size=hidden_size,
    intermediate_size=_integer(raw, "intermediate_size"),
    num_layers=_integer(raw, "num_hidden_layers"),
    num_heads=num_heads,
    num_kv_heads=_integer(raw, "num_key_value_heads", num_heads),
    # max: the zero is refused below, by its name.
    head_dim=_integer(raw, "head_dim", hidden_size // max(num_heads, 1)),
    norm_eps=_typed(raw, "rms_norm_eps", float, 1e-6),
    rope_theta=theta,
    rope_scaling=scaling,
    tie_embeddings=_flag(raw, "tie_word_embeddings"),
    max_position_embeddings=_integer(raw, "max_position_embeddings", 2048),
    attention_bias=_flag(raw, "attention_bias"),
    mlp_bias=_flag(raw, "mlp_bias"),
  )


_ATTENTION = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
_MLP = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}

_LLAMA_NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "layers/attn_norm/scale": "model.layers.{layer}.input_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
  "final_norm/scale": "model.norm.weight",
  "head/kernel": "lm_head.weight",
  **{
    f"layers/{part}/{ours}/{leaf}": f"model.layers.{{layer}}.{theirs}.{kind}"
    for part, modules in (("attn", _ATTENTION), ("mlp", _MLP))
    for ours, theirs in modules.items()
    for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
  },
}

FAMILIES = {
  family.model_type: family
  for family in (Family("llama", "LlamaForCausalLM", _llama, _LLAMA_NAMES),)
}


def family(model_type: str) -> Family:
  """The row of `model_type`.

  Raises:
    ValueError: an unknown one, listing the known.
  """
  if model_type not in FAMILIES:
    near = difflib.get_close_matches(str(model_type), FAMILIES, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
      f"config.json: model_type: {model_type!r} is not supported; {hint}"
      f"known: {', '.join(FAMILIES)}"
    )
  return FAMILIES[model_type]


def read_config(raw: Mapping[str, Any]) -> TransformerConfig:
  """The architecture that the fields of a config.json describe.

  Raises:
    ValueError: an unknown model_type, a missing field, or one that is not supported.
  """
  return family(_field(raw, "model_type", "a model's config")).config(raw)


def hf_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
  """config.json of a model saved in `dtype`, in transformers 5's terms."""
  rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
  if config.rope_scaling is not None:
    rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
  # What transformers 4 reads in place of rope_parameters and dtype; 5 takes either.
  version_4: dict[str, Any] = {"rope_theta": config.rope_theta, "torch_dtype": dtype}
  if config.rope_scaling is not None:
    version_4["rope_scaling"] = rope
  return {
    "architectures": [family(config.model_type).architecture],
    "model_type": config.model_type,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": rope,
    **version_4,
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_position_embeddings,
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
    "dtype": dtype,
    # Not known here, and not left out: transformers would take 1 and 2, the ids of Llama 2.
    "bos_token_id": None,
    "eos_token_id": None,
  }

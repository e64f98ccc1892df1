"""What differs between model families: a table of config readers and tensor names.

A family is one row of `FAMILIES`: how its config.json becomes a TransformerConfig, and under
which names its files keep our leaves. The decoder itself is one for all.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from qlora_jax.models.mlp import ACTIVATIONS
from qlora_jax.models.rope import SCALINGS, Dynamic, LongRope, Rope, RopeScaling, Yarn
from qlora_jax.models.transformer import LayerKind, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """One row of the table.

  Attributes:
    model_type: as config.json says it.
    architecture: transformers' class.
    config: its fields → the architecture; refuses what it does not support, by name.
    names: our leaf's path → the tensor's name in the file, with `{layer}` in a stack and
      `{expert}` in a mixture of experts. A kernel is stored transposed there, [out, in].
  """

  model_type: str
  architecture: str
  config: Callable[[Mapping[str, Any]], TransformerConfig]
  names: Mapping[str, str]


# Fields.


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
  return _checked(name, value, kind)


def _checked(name: str, value: Any, kind: type) -> Any:
  accepted = (int, float) if kind is float else kind
  if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
    raise ValueError(f"config.json: {name}: {value!r}; a value of type {kind.__name__} is wanted")
  return kind(value)


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
  return _typed(raw, name, int, default)


def _flag(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
  return _typed(raw, name, bool, default)


def _optional(raw: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
  """A field that null turns off; the default where it is absent."""
  value = raw.get(name, default)
  return None if value is None else _checked(name, value, kind)


def _only(raw: Mapping[str, Any], name: str, *supported: Any) -> None:
  if name in raw and raw[name] not in supported:
    choices = ", ".join(map(repr, supported))
    raise ValueError(f"config.json: {name}: {raw[name]!r} is not supported; {choices} is")


# Rotary positions.


def _rope_fields(raw: Mapping[str, Any], kind_of_layer: str | None = None) -> Mapping[str, Any]:
  """transformers 5's `rope_parameters`, of a kind of layer, or 4's `rope_scaling`."""
  fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
  if isinstance(fields, Mapping) and kind_of_layer is not None and kind_of_layer in fields:
    fields = fields[kind_of_layer] or {}
  if not isinstance(fields, Mapping):
    raise ValueError(f"config.json: rope_parameters: {fields!r}; an object is wanted")
  return fields


def _rope(
  raw: Mapping[str, Any],
  head_dim: int,
  kind_of_layer: str | None = None,
  theta: float = 10000.0,
  partly: bool = False,
) -> Rope:
  """Of a kind of layer; `partly` where the family may rotate a part of a head."""
  fields = _rope_fields(raw, kind_of_layer)
  if nested := [name for name, value in fields.items() if isinstance(value, Mapping)]:
    raise ValueError(
      f"config.json: rope_parameters: one for each of {', '.join(nested)} is not supported in a "
      f"{raw.get('model_type')} model; one for all layers is"
    )
  theta = fields.get("rope_theta") or raw.get("rope_theta") or theta
  theta = _checked("rope_theta", theta, float)
  if not partly:
    # transformers applies it in phi3 alone, of these families.
    for each in (raw, fields):
      _only(each, "partial_rotary_factor", 1.0, None)
  partial = fields.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
  width = int(head_dim * _checked("partial_rotary_factor", partial, float))
  kind = fields.get("rope_type", fields.get("type", "default"))
  if not isinstance(kind, str) or kind not in ("default", *SCALINGS):
    known = ", ".join(["default", *SCALINGS])
    raise ValueError(f"config.json: rope_type: {kind!r} is not supported; known: {known}")
  rest = {
    name: value
    for name, value in fields.items()
    if name not in ("rope_theta", "partial_rotary_factor", "rope_type", "type")
    and value is not None
  }
  scaling = None
  if kind != "default":
    scaling = _scaling(raw, SCALINGS[kind], kind, rest)
  elif rest:
    raise ValueError(
      f"config.json: rope_parameters: {next(iter(rest))}: unknown of rope_type default"
    )
  try:
    # LongRope has a list of factors as long as its width.
    whole = width == head_dim and not isinstance(scaling, LongRope)
    return Rope(theta, None if whole else width, scaling)
  except ValueError as error:
    raise ValueError(f"config.json: {error}") from None


def _scaling(
  raw: Mapping[str, Any], scaling: type[RopeScaling], kind: str, given: dict[str, Any]
) -> RopeScaling:
  own = {field.name: field for field in dataclasses.fields(scaling)}
  longest = raw.get("max_position_embeddings")
  original = "original_max_position_embeddings"
  if original in own:
    # Phi-3 keeps it beside the others, and it wins there, as in transformers.
    given[original] = raw.get(original) or given.get(original) or longest
    if given.get("factor") is None and longest and scaling in (Yarn, LongRope):
      given["factor"] = longest / given[original]
  if scaling is Dynamic:
    given = {name: value for name, value in given.items() if name != original}
    given["max_position_embeddings"] = longest
  for name in given:
    if name not in own:
      raise ValueError(f"config.json: rope_parameters: {name}: unknown of rope_type {kind!r}")
  values = {}
  for name, field in own.items():
    required = field.default is dataclasses.MISSING
    if given.get(name) is None and not required:
      continue
    value = _field(given, name, f"rope_type {kind!r}")
    if scaling is LongRope and name.endswith("_factor") and name != "attention_factor":
      if not isinstance(value, list):
        raise ValueError(f"config.json: rope_parameters: {name}: {value!r}; a list is wanted")
      values[name] = tuple(_checked(name, each, float) for each in value)
    else:
      hint: Any = field.type
      values[name] = _checked(name, value, (typing.get_args(hint) or (hint,))[0])
  return scaling(**values)


# Architectures.


def _decoder(
  raw: Mapping[str, Any],
  *,
  layer_pattern: tuple[LayerKind, ...] | None = None,
  head_dim: int | None = None,
  tied: bool = False,
  norm_eps: float = 1e-6,
  activation: str = "hidden_act",
  **own: Any,
) -> TransformerConfig:
  """The fields that all families share.

  Args:
    layer_pattern: one kind of layer, with `_rope`'s positions, where None.
    head_dim, tied, norm_eps: where the file does not say.
    activation: the field that names it.
    own: fields of TransformerConfig.
  """
  _only(raw, "attention_dropout", 0.0, None)
  _only(raw, "is_causal", True, None)
  name = raw.get(activation) or own.pop("default_activation", "silu")
  if not isinstance(name, str) or name not in ACTIVATIONS:
    known = ", ".join(ACTIVATIONS)
    raise ValueError(f"config.json: {activation}: {name!r} is not supported; {known} are")
  own.pop("default_activation", None)
  width = _head_dim(raw, head_dim)
  return TransformerConfig(
    vocab_size=_integer(raw, "vocab_size"),
    hidden_size=_integer(raw, "hidden_size"),
    num_layers=_integer(raw, "num_hidden_layers"),
    num_heads=_integer(raw, "num_attention_heads"),
    num_kv_heads=_integer(raw, "num_key_value_heads", _integer(raw, "num_attention_heads")),
    head_dim=width,
    norm_eps=_typed(raw, "rms_norm_eps", float, norm_eps),
    layer_pattern=layer_pattern or (LayerKind(None, _rope(raw, width)),),
    tie_embeddings=_flag(raw, "tie_word_embeddings", tied),
    max_position_embeddings=_integer(raw, "max_position_embeddings", 2048),
    activation=name,
    model_type=raw["model_type"],
    **({"intermediate_size": _integer(raw, "intermediate_size"), **own}),
  )


def _head_dim(raw: Mapping[str, Any], default: int | None = None) -> int:
  if default is None:
    # max: a zero is refused later, by its name.
    default = _integer(raw, "hidden_size") // max(_integer(raw, "num_attention_heads"), 1)
  return _integer(raw, "head_dim", default)


def _layer_types(raw: Mapping[str, Any], default: Callable[[int], bool]) -> list[bool]:
  """Whether each layer has the sliding window; by `default` of its index where no field says."""
  count = _integer(raw, "num_hidden_layers")
  named = raw.get("layer_types")
  if named is None:
    return [default(layer) for layer in range(count)]
  known = {"sliding_attention": True, "full_attention": False}
  if not isinstance(named, list) or len(named) != count:
    raise ValueError(
      f"config.json: layer_types: {named!r}; one for each of {count} layers is wanted"
    )
  for name in named:
    if not isinstance(name, str) or name not in known:
      raise ValueError(
        f"config.json: layer_types: {name!r} is not supported; {', '.join(known)} are"
      )
  return [known[name] for name in named]


def _interval(raw: Mapping[str, Any], name: str, default: int) -> int:
  every = _integer(raw, name, default)
  if every < 1:
    raise ValueError(f"config.json: {name}: {every}; at least 1")
  return every


def _query_scale(raw: Mapping[str, Any]) -> float:
  scalar = _typed(raw, "query_pre_attn_scalar", float, 256.0)
  if not scalar > 0:
    raise ValueError(f"config.json: query_pre_attn_scalar: {scalar}; above 0")
  return scalar**-0.5


def _windowed(raw: Mapping[str, Any], sliding: list[bool], window: int | None, head_dim: int):
  rope = _rope(raw, head_dim)
  return tuple(LayerKind(window if slides else None, rope) for slides in sliding)


def _llama(raw: Mapping[str, Any]) -> TransformerConfig:
  bias = _flag(raw, "attention_bias")
  return _decoder(raw, attention_bias=bias, output_bias=bias, mlp_bias=_flag(raw, "mlp_bias"))


def _mistral(raw: Mapping[str, Any]) -> TransformerConfig:
  _only(raw, "layer_types", None)
  window = _optional(raw, "sliding_window", int, 4096)
  return _decoder(raw, layer_pattern=(LayerKind(window, _rope(raw, _head_dim(raw))),))


def _qwen_pattern(raw: Mapping[str, Any], head_dim: int) -> tuple[LayerKind, ...]:
  window = None
  if _flag(raw, "use_sliding_window"):
    window = _optional(raw, "sliding_window", int, 4096)
  first = _integer(raw, "max_window_layers", 28)
  sliding = _layer_types(raw, lambda layer: window is not None and layer >= first)
  return _windowed(raw, sliding, window, head_dim)


def _qwen2(raw: Mapping[str, Any]) -> TransformerConfig:
  return _decoder(raw, layer_pattern=_qwen_pattern(raw, _head_dim(raw)), attention_bias=True)


def _qwen3(raw: Mapping[str, Any]) -> TransformerConfig:
  bias = _flag(raw, "attention_bias")
  return _decoder(
    raw,
    head_dim=128,
    layer_pattern=_qwen_pattern(raw, _head_dim(raw, 128)),
    attention_bias=bias,
    output_bias=bias,
    qk_norm="head",
  )


def _gemma_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
  """What the three Gemmas share."""
  _only(raw, "use_bidirectional_attention", False, None)
  bias = _flag(raw, "attention_bias")
  return {
    "head_dim": 256,
    "tied": True,
    "default_activation": "gelu_pytorch_tanh",
    "attention_bias": bias,
    "output_bias": bias,
    "unit_offset": True,
    "embedding_scale": _integer(raw, "hidden_size") ** 0.5,
  }


def _gemma(raw: Mapping[str, Any]) -> TransformerConfig:
  # Old files say "gelu", and mean its tanh form; transformers reads them so.
  named = raw.get("hidden_activation") or raw.get("hidden_act")
  if named in (None, "gelu"):
    named = "gelu_pytorch_tanh"
  return _decoder({**raw, "hidden_act": named}, **_gemma_fields(raw))


def _gemma2(raw: Mapping[str, Any]) -> TransformerConfig:
  window = _optional(raw, "sliding_window", int, 4096)
  sliding = _layer_types(raw, lambda layer: layer % 2 == 0)
  return _decoder(
    raw,
    activation="hidden_activation",
    layer_pattern=_windowed(raw, sliding, window, _head_dim(raw, 256)),
    post_norms=True,
    query_scale=_query_scale(raw),
    attention_softcap=_optional(raw, "attn_logit_softcapping", float, 50.0),
    final_softcap=_optional(raw, "final_logit_softcapping", float, 30.0),
    **_gemma_fields(raw),
  )


def _gemma3(raw: Mapping[str, Any]) -> TransformerConfig:
  # transformers 5.24 has the field and does not apply it; no published Gemma 3 sets it.
  _only(raw, "attn_logit_softcapping", None)
  width = _head_dim(raw, 256)
  every = _interval(raw, "sliding_window_pattern", _interval(raw, "_sliding_window_pattern", 6))
  sliding = _layer_types(raw, lambda layer: (layer + 1) % every != 0)
  if raw.get("rope_parameters"):
    far, near = (
      _rope(raw, width, kind, theta)
      for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
    )
  else:
    far = _rope(raw, width, theta=1e6)
    near = Rope(_typed(raw, "rope_local_base_freq", float, 1e4))
  window = _optional(raw, "sliding_window", int, 4096)
  return _decoder(
    raw,
    activation="hidden_activation",
    layer_pattern=tuple(
      LayerKind(window, near) if slides else LayerKind(None, far) for slides in sliding
    ),
    post_norms=True,
    qk_norm="head",
    query_scale=_query_scale(raw),
    final_softcap=_optional(raw, "final_logit_softcapping", float, None),
    **_gemma_fields(raw),
  )


def _phi3(raw: Mapping[str, Any]) -> TransformerConfig:
  for name in ("resid_pdrop", "embd_pdrop"):
    _only(raw, name, 0.0, None)
  fields = _rope_fields(raw)
  if fields.get("rope_type", fields.get("type", "default")) not in ("default", "longrope", "su"):
    raise ValueError("config.json: rope_type: a phi3 model has 'longrope' or none")
  raw = {"original_max_position_embeddings": 4096, **raw}
  window = _optional(raw, "sliding_window", int, None)
  return _decoder(
    raw,
    norm_eps=1e-5,
    layer_pattern=(LayerKind(window, _rope(raw, _head_dim(raw), partly=True)),),
    fused_projections=True,
  )


def _olmo2(raw: Mapping[str, Any]) -> TransformerConfig:
  bias = _flag(raw, "attention_bias")
  return _decoder(
    raw,
    norm_eps=1e-5,
    attention_bias=bias,
    output_bias=bias,
    pre_norms=False,
    post_norms=True,
    qk_norm="full",
  )


def _smollm3(raw: Mapping[str, Any]) -> TransformerConfig:
  count = _integer(raw, "num_hidden_layers")
  every = _interval(raw, "no_rope_layer_interval", 4)
  rotated = raw.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(count)]
  if len(rotated) != count:
    raise ValueError(f"config.json: no_rope_layers: {rotated}; one for each of {count} layers")
  window = None
  if _flag(raw, "use_sliding_window"):
    window = _optional(raw, "sliding_window", int, None)
  sliding = _layer_types(raw, lambda layer: window is not None and not rotated[layer])
  rope = _rope(raw, _head_dim(raw))
  bias = _flag(raw, "attention_bias")
  return _decoder(
    raw,
    tied=True,
    layer_pattern=tuple(
      LayerKind(window if slides else None, rope if turns else None)
      for slides, turns in zip(sliding, rotated, strict=True)
    ),
    attention_bias=bias,
    output_bias=bias,
    mlp_bias=_flag(raw, "mlp_bias"),
  )


def _mixtral(raw: Mapping[str, Any]) -> TransformerConfig:
  window = _optional(raw, "sliding_window", int, None)
  return _decoder(
    raw,
    norm_eps=1e-5,
    layer_pattern=(LayerKind(window, _rope(raw, _head_dim(raw))),),
    num_experts=_integer(raw, "num_local_experts", 8),
    experts_per_token=_integer(raw, "num_experts_per_tok", 2),
  )


def _qwen3_moe(raw: Mapping[str, Any]) -> TransformerConfig:
  _only(raw, "decoder_sparse_step", 1, None)
  _only(raw, "mlp_only_layers", [], None)
  window = None
  if _flag(raw, "use_sliding_window"):
    window = _optional(raw, "sliding_window", int, 4096)
  bias = _flag(raw, "attention_bias")
  return _decoder(
    raw,
    layer_pattern=(LayerKind(window, _rope(raw, _head_dim(raw))),),
    attention_bias=bias,
    output_bias=bias,
    qk_norm="head",
    intermediate_size=_integer(raw, "moe_intermediate_size", 768),
    # transformers 4 and 5 name it differently.
    num_experts=_integer(raw, "num_experts", _integer(raw, "num_local_experts", 128)),
    experts_per_token=_integer(raw, "num_experts_per_tok", 8),
    normalize_experts=_flag(raw, "norm_topk_prob"),
  )


# Names.


_TWO_NORMS = types.MappingProxyType(
  {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
)


def _names(
  attention: str = "q k v o",
  mlp: str = "gate up down",
  norms: Mapping[str, str] = _TWO_NORMS,
  own: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, str]:
  """The names of a family's tensors.

  Args:
    attention, mlp: our names of the projections; the files add `_proj` to each.
    norms: ours → the files', of a layer.
    own: others, ours → the files', below a layer.
  """
  layer = "model.layers.{layer}."
  names = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
  }
  for part, module, projections in (("attn", "self_attn", attention), ("mlp", "mlp", mlp)):
    for name in projections.split():
      for leaf, kind in (("kernel", "weight"), ("bias", "bias")):
        names[f"layers/{part}/{name}/{leaf}"] = f"{layer}{module}.{name}_proj.{kind}"
  names |= {f"layers/{ours}/scale": f"{layer}{theirs}.weight" for ours, theirs in norms.items()}
  return names | {f"layers/{ours}": layer + theirs for ours, theirs in own.items()}


_QK_NORMS = {
  "attn/q_norm/scale": "self_attn.q_norm.weight",
  "attn/k_norm/scale": "self_attn.k_norm.weight",
}
_FOUR_NORMS = {
  "attn_norm": "input_layernorm",
  "attn_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_POST_NORMS = {name: theirs for name, theirs in _FOUR_NORMS.items() if "post" in name}


def _experts(module: str, gate: str, up: str, down: str) -> dict[str, str]:
  own = {"gate": gate, "up": up, "down": down}
  return {"router/kernel": f"{module}.gate.weight"} | {
    f"mlp/{name}/kernel": f"{module}.experts.{{expert}}.{theirs}.weight"
    for name, theirs in own.items()
  }


_ROWS = (
  Family("llama", "LlamaForCausalLM", _llama, _names()),
  Family("mistral", "MistralForCausalLM", _mistral, _names()),
  Family("qwen2", "Qwen2ForCausalLM", _qwen2, _names()),
  Family("qwen3", "Qwen3ForCausalLM", _qwen3, _names(own=_QK_NORMS)),
  Family("gemma", "GemmaForCausalLM", _gemma, _names()),
  Family("gemma2", "Gemma2ForCausalLM", _gemma2, _names(norms=_FOUR_NORMS)),
  Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, _names(norms=_FOUR_NORMS, own=_QK_NORMS)),
  Family("phi3", "Phi3ForCausalLM", _phi3, _names("qkv o", "gate_up down")),
  Family("olmo2", "Olmo2ForCausalLM", _olmo2, _names(norms=_POST_NORMS, own=_QK_NORMS)),
  Family("smollm3", "SmolLM3ForCausalLM", _smollm3, _names()),
  Family(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral,
    _names(mlp="", own=_experts("block_sparse_moe", "w1", "w3", "w2")),
  ),
  Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe,
    _names(mlp="", own=_QK_NORMS | _experts("mlp", "gate_proj", "up_proj", "down_proj")),
  ),
)

FAMILIES = {family.model_type: family for family in _ROWS}


def axes_of(template: str) -> list[str]:
  """The leading axes of a leaf with this name."""
  return [axis for axis in ("layer", "expert") if f"{{{axis}}}" in template]


def tensor_names(template: str, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
  """(index in the stack, name) of each tensor of a leaf of this shape."""
  axes = axes_of(template)
  for index in np.ndindex(*shape[: len(axes)]):
    yield index, template.format(**dict(zip(axes, index, strict=True)))


def family(model_type: str) -> Family:
  """The row of `model_type`.

  Raises:
    ValueError: an unknown one, listing the known.
  """
  if not isinstance(model_type, str) or model_type not in FAMILIES:
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
  config = family(_field(raw, "model_type", "a model's config")).config(raw)
  return dataclasses.replace(config, hf_json=json.dumps(raw))


def hf_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
  """config.json of a dense model saved in `dtype`.

  The file that `config` was read from, where it was; else a Llama's, in the terms of
  transformers 4 and 5.

  Raises:
    ValueError: an architecture that was changed after it was read, or that was never in a file
      and is no plain Llama's.
  """
  raw = _llama_json(config) if config.hf_json is None else json.loads(config.hf_json)
  raw = {name: value for name, value in raw.items() if name != "quantization_config"}
  # What transformers 5 and 4 read.
  raw |= {"dtype": dtype, "torch_dtype": dtype, "tie_word_embeddings": config.tie_embeddings}
  if read_config(raw) != config:
    origin = "a plain Llama" if config.hf_json is None else "the config.json it was read from"
    raise ValueError(f"this architecture differs from {origin}: {config}")
  return raw


def _llama_json(config: TransformerConfig) -> dict[str, Any]:
  if config.model_type != "llama":
    raise ValueError(
      f"model_type: {config.model_type!r}: its config.json is not made up here, only one that was "
      "read is written again"
    )
  rope = config.layer_pattern[0].rope or Rope()
  fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
  if rope.scaling is not None:
    name = next(name for name, scaling in SCALINGS.items() if isinstance(rope.scaling, scaling))
    fields |= {"rope_type": name, **dataclasses.asdict(rope.scaling)}
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": config.activation,
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": fields,
    # transformers 4 reads these two in place of it.
    "rope_theta": rope.theta,
    **({} if rope.scaling is None else {"rope_scaling": fields}),
    "max_position_embeddings": config.max_position_embeddings,
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
    # Not known here, and not left out: transformers would take 1 and 2, the ids of Llama 2.
    "bos_token_id": None,
    "eos_token_id": None,
  }

import dataclasses
import json
import re

import ml_collections
import numpy as np
import pytest

from qlora_jax import config as config_lib
from qlora_jax.config import ConfigError, ExperimentConfig
from qlora_jax.lora import LoRAConfig
from qlora_jax.quantization import QuantizationConfig


def make(**sections) -> ExperimentConfig:
  """A config that is valid, but for what `sections` changes."""
  required = {
    "name": "test",
    "model": config_lib.ModelConfig(path="some/model"),
    "data": config_lib.DataConfig(path="text.txt"),
  }
  return ExperimentConfig(**(required | sections))


def override(**overrides) -> ExperimentConfig:
  """The same, through a draft; a double underscore stands for the dot."""
  changes = {path.replace("__", "."): value for path, value in overrides.items()}
  return config_lib.from_config_dict(config_lib.to_config_dict(make()), changes)


# Every field at another value than its default, patterns with the signs that paths have.
EVERYTHING_CHANGED = {
  "name": "other-name.1",
  "seed": 3,
  "model": {
    "path": None,
    "quantize": False,
    "dtype": "float16",
    "storage_dtype": "float32",
    "remat": "none",
    "table_bits": 8,
    "attention": "plain",
    "mlp_chunk": 100,
    "unroll": True,
  },
  "pretrain": {
    "steps": 7,
    "batch_size": 3,
    "learning_rate": 0.5,
    "warmup_steps": 3,
    "weight_decay": 0.2,
    "dtype": "bfloat16",
    "paths": [],
    "holdout": 0.3,
    "domain": "manuals",
    "num_documents": 9,
    "minor_domain": "tales",
    "minor_documents": 4,
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "max_position_embeddings": 32,
    "seed": 5,
  },
  "quantization": {
    "codebook": "int4+int8",
    "block_size": 32,
    "double_quantization": False,
    "nested_block_size": 128,
    "scale_dtype": "bfloat16",
    "scale_rule": "mse",
    "percentile": 98.0,
    "outlier_fraction": 0.01,
    "rotate": True,
    "rotation_seed": 3,
    "importance": "fisher",
    "gptq": False,  # as outliers ask
    "gptq_damping": 0.5,
    "bits_per_weight": 6.5,
    "calibration_sequences": 2,
  },
  "lora": {
    "rank": 4,
    "alpha": 2.5,
    "targets": ["*/attn/q", "layers/[01]/mlp/*"],
    "rank_stabilized": True,
    "dropout": 0.25,
    "rank_pattern": {"*/q": 2, "layers/*/a.b": 3},
    "alpha_pattern": {"*/attn/*": 4.0},
    "variant": "dora",
    "init": "eva",
    "loftq_iterations": 2,
    "loftq_ignores_scaling": True,
    "lora_ga_gamma": 64.0,
    "eva_rho": 3.0,
    "calibration_batches": 2,
    "cloq_damping": 0.5,
    "svd_iterations": None,
    "lora_bias": True,
    "modules_to_save": ["head"],
    "trainable_tokens": [1, 3],
  },
  "data": {
    "path": "rows.jsonl",
    "synthetic": None,
    "num_documents": 11,
    "tokenizer": "bytes",
    "seq_len": 16,
    "holdout": 0.5,
    "packing": True,
    "text_field": "body",
    "prompt_field": "question",
    "completion_field": "answer",
    "seed": 6,
  },
  "optimizer": {
    "learning_rate": 0.25,
    "schedule": "linear",
    "warmup_steps": 2,
    "weight_decay": 0.5,
    "b1": 0.5,
    "b2": 0.75,
    "eps": 0.125,
    "clip_norm": None,
    "lora_plus_ratio": 16.0,
    "state": "8bit",
  },
  "train": {
    "steps": 4,
    "batch_size": 2,
    "accumulate_steps": 2,
    "log_every": 1,
    "eval_every": 2,
    "eval_batch_size": 5,
    "checkpoint_every": 3,
    "keep_checkpoints": 1,
    "loss_chunk": 64,
    "z_loss": 1e-4,
    "compare_16bit": False,
    "compiled_programs": "runs/compiled",
  },
}


def test_everything_changed_changes_everything():
  """The table above names every field, and none at its default: the round trips rely on it."""
  config = config_lib.from_json_dict(EVERYTHING_CHANGED)
  # The one choice that leaves the other at None, and what outliers refuse.
  default_paths = {"data.synthetic", "model.path", "pretrain.paths", "quantization.gptq"}
  for path, field in config_lib.fields().items():
    value = config
    for part in path.split("."):
      value = getattr(value, part)
    assert (value == field.default) == (path in default_paths), path


def test_json_round_trip():
  config = config_lib.from_json_dict(EVERYTHING_CHANGED)
  assert config_lib.to_json_dict(config) == EVERYTHING_CHANGED
  through_a_file = json.loads(json.dumps(config_lib.to_json_dict(config), allow_nan=False))
  assert config_lib.from_json_dict(through_a_file) == config
  assert config.lora.targets == ("*/attn/q", "layers/[01]/mlp/*")


def test_config_dict_round_trip():
  config = config_lib.from_json_dict(EVERYTHING_CHANGED)
  draft = config_lib.to_config_dict(config)
  assert draft.lora.rank_pattern.to_dict() == {"*/q": 2, "layers/*/a.b": 3}
  assert config_lib.from_config_dict(draft) == config


def test_a_default_draft_becomes_the_default_config():
  draft = config_lib.defaults()
  draft.name = "test"
  draft.model.path = "some/model"
  draft.data.path = "text.txt"
  assert config_lib.from_config_dict(draft) == make()


def test_a_draft_keeps_the_type_of_a_field_that_holds_none():
  draft = config_lib.defaults()
  assert draft.model.path is None
  with pytest.raises(TypeError):
    draft.model.path = 3
  with pytest.raises(TypeError):
    draft.optimizer.clip_norm = "a"
  draft.optimizer.clip_norm = None
  draft.optimizer.clip_norm = 2  # an int for a float
  draft.name, draft.model.path, draft.data.path = "test", "some/model", "text.txt"
  assert config_lib.from_config_dict(draft).optimizer.clip_norm == 2.0


def test_patterns_are_set_in_a_draft():
  draft = config_lib.to_config_dict(make())
  draft.lora.rank_pattern = {"*/mlp/down": 2}
  draft.lora.alpha_pattern = {"*/mlp/down": 4}  # an int for a float
  lora = config_lib.from_config_dict(draft).lora
  assert lora.rank_pattern == {"*/mlp/down": 2}
  assert lora.alpha_pattern == {"*/mlp/down": 4.0}
  assert isinstance(lora.alpha_pattern["*/mlp/down"], float)


def test_a_partial_draft_takes_the_defaults():
  draft = ml_collections.ConfigDict({"name": "test", "lora": {"rank": 3}})
  overrides = {"model.path": "some/model", "data.path": "text.txt"}
  expected = make(lora=LoRAConfig(rank=3))
  assert config_lib.from_config_dict(draft, overrides) == expected


def test_overrides_are_applied_together_and_leave_the_draft_alone():
  draft = config_lib.to_config_dict(make())
  overrides = {"data.path": None, "data.synthetic": "tales", "lora.rank": 2}
  config = config_lib.from_config_dict(draft, overrides)
  assert (config.data.synthetic, config.lora.rank) == ("tales", 2)
  assert config_lib.from_config_dict(draft) == make()


def test_values_are_made_canonical():
  config = override(
    optimizer__learning_rate=1,
    train__steps=np.int64(5),
    optimizer__b1=np.float32(0.5),
    lora__targets=["*/q"],
  )
  assert isinstance(config.optimizer.learning_rate, float)
  assert type(config.train.steps) is int
  assert type(config.optimizer.b1) is float
  assert config.lora.targets == ("*/q",)
  assert isinstance(config_lib.OptimizerConfig(learning_rate=1).learning_rate, float)


def test_a_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    make().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
  ("path", "meant"),
  [
    ("lora.rnak", "lora.rnak: no such field; did you mean rank?"),
    ("trian.steps", "trian: no such field; did you mean train?"),
    (
      "train.weight_decay",
      "train.weight_decay: no such field; did you mean pretrain.weight_decay or "
      "optimizer.weight_decay?",
    ),
    ("rank", "rank: no such field; did you mean lora.rank?"),
    ("lora.zzz", "lora.zzz: no such field; there are rank, alpha, targets, rank_stabilized"),
    ("lora", "lora: a section; set its fields one by one, as in lora.rank"),
    ("lora.rank_pattern.q", "lora.rank_pattern.q: no such field; lora.rank_pattern holds one"),
  ],
)
def test_unknown_fields(path, meant):
  draft = config_lib.to_config_dict(make())
  with pytest.raises(ConfigError, match="^" + re.escape(meant)) as error:
    config_lib.from_config_dict(draft, {path: 1})
  assert "\n" not in str(error.value)
  with pytest.raises(ConfigError, match="^" + re.escape(meant)):
    config_lib.parse_value(path, "1")


def test_a_misspelled_field_of_a_draft():
  draft = config_lib.defaults()
  draft.lora.rnak = 8
  with pytest.raises(ConfigError, match=r"^lora\.rnak: no such field; did you mean rank\?$"):
    config_lib.from_config_dict(draft)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("lora.rank", "8", "lora.rank: '8'; a value of type int is needed"),
    ("lora.rank", 8.0, "lora.rank: 8.0; a value of type int is needed"),
    ("lora.rank", True, "lora.rank: True; a value of type int is needed"),
    ("lora.rank", None, "lora.rank: None; a value of type int is needed"),
    ("lora.targets", "*/q", "lora.targets: '*/q'; a value of type tuple[str, ...] is needed"),
    ("lora.targets", ("*/q", 3), "lora.targets[1]: 3; a value of type str is needed"),
    ("lora.rank_pattern", {"*/q": 1.5}, "lora.rank_pattern['*/q']: 1.5; a value of type int"),
    ("lora.rank_pattern", 3, "lora.rank_pattern: 3; a value of type dict[str, int] is needed"),
    ("optimizer.clip_norm", "1", "optimizer.clip_norm: '1'; a value of type float | None is"),
    ("train.compare_16bit", 1, "train.compare_16bit: 1; a value of type bool is needed"),
    (
      "optimizer.schedule",
      "cosin",
      "optimizer.schedule: 'cosin'; one of 'cosine', 'linear', 'constant'; did you mean cosine?",
    ),
    ("model.dtype", "int8", "model.dtype: 'int8'; one of 'bfloat16', 'float32', 'float16'"),
    ("name", None, "name: None; a value of type str is needed"),
  ],
)
def test_types(path, value, message):
  with pytest.raises(ConfigError, match="^" + re.escape(message)) as error:
    override(**{path: value})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("name", ""),
    ("name", "a/b"),
    ("name", "a b"),
    ("seed", -1),
    ("seed", 2**32),
    ("model.path", ""),
    ("pretrain.steps", -1),
    ("pretrain.batch_size", 0),
    ("pretrain.learning_rate", 0.0),
    ("pretrain.num_documents", 0),
    ("pretrain.vocab_size", 255),
    ("pretrain.hidden_size", 0),
    ("pretrain.hidden_size", 36),  # 4 heads of 9: RoPE takes pairs
    ("pretrain.intermediate_size", 0),
    ("pretrain.num_layers", 0),
    ("pretrain.num_heads", 0),
    ("pretrain.num_kv_heads", 0),
    ("pretrain.num_kv_heads", 3),
    ("pretrain.max_position_embeddings", 1),
    ("pretrain.seed", -1),
    ("quantization.codebook", "nf5"),
    ("quantization.block_size", 0),
    ("quantization.scale_dtype", "float16"),
    ("lora.rank", 0),
    ("lora.alpha", -1.0),
    ("lora.targets", ()),
    ("lora.dropout", 1.0),
    ("lora.rank_pattern", {"*/q": 0}),
    ("data.path", ""),
    ("data.num_documents", 1),
    ("data.seq_len", 1),
    ("data.holdout", 0.0),
    ("data.holdout", 1.0),
    ("data.holdout", float("nan")),
    ("data.text_field", ""),
    ("data.seed", -1),
    ("optimizer.learning_rate", 0.0),
    ("optimizer.learning_rate", float("inf")),
    ("optimizer.learning_rate", float("nan")),
    ("optimizer.warmup_steps", -1),
    ("optimizer.warmup_steps", 200),  # of 200 steps
    ("optimizer.weight_decay", -0.1),
    ("optimizer.b1", 1.0),
    ("optimizer.b2", -0.1),
    ("optimizer.eps", 0.0),
    ("optimizer.clip_norm", 0.0),
    ("train.steps", 0),
    ("train.batch_size", 0),
    ("train.accumulate_steps", 0),
    ("train.log_every", 0),
    ("train.eval_every", 0),
    ("train.eval_batch_size", 0),
    ("train.checkpoint_every", 0),
    ("train.keep_checkpoints", 0),
    ("train.loss_chunk", 0),
  ],
)
def test_ranges(path, value):
  """Each message opens with the dotted path, shows the value and is one line with a rule."""
  with pytest.raises(ConfigError, match=rf"^{re.escape(path)}\b") as error:
    override(**{path: value})
  shown = next(iter(value.values())) if isinstance(value, dict) else value
  assert str(shown) in str(error.value) or value == ()
  assert ";" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"model.path": None}, "model.path: None; a Hugging Face directory is needed, or pretrain"),
    ({"pretrain.steps": 5}, "model.path: 'some/model'; there is one base"),
    ({"data.path": None}, "data.path: None; a file is needed, or the name of generated text"),
    ({"data.synthetic": "tales"}, "data.path: 'text.txt'; there is one text"),
    ({"data.prompt_field": "q"}, "data.completion_field: None; data.prompt_field and"),
    ({"data.completion_field": "a"}, "data.prompt_field: None; data.prompt_field and"),
    (
      {
        "data.path": None,
        "data.synthetic": "tales",
        "data.prompt_field": "q",
        "data.completion_field": "a",
      },
      "data.prompt_field: 'q'; prompts are read from the JSON lines",
    ),
    (
      {"model.path": None, "pretrain.steps": 5, "data.seq_len": 257},
      "data.seq_len: 257; at most pretrain.max_position_embeddings = 256",
    ),
    (
      {"train.steps": 5, "optimizer.warmup_steps": 5},
      "optimizer.warmup_steps: 5; below train.steps = 5",
    ),
    (
      {"quantization.scale_dtype": "bfloat16"},
      "quantization.scale_dtype: 'bfloat16' with double_quantization",
    ),
  ],
)
def test_contradictions(overrides, message):
  with pytest.raises(ConfigError, match="^" + re.escape(message)) as error:
    override(**overrides)
  assert "\n" not in str(error.value)


def test_a_codebook_s_file_that_is_not_there():
  with pytest.raises(ConfigError, match=r"^quantization: absent\.json: no such file"):
    override(**{"quantization.codebook": "absent.json"})


def test_sections_know_their_path_without_a_config():
  with pytest.raises(ConfigError, match=r"^train\.steps: 0; at least 1$"):
    config_lib.TrainConfig(steps=0)
  with pytest.raises(ConfigError, match=r"^lora: TrainConfig\(.*; a value of type LoRAConfig is"):
    make(lora=config_lib.TrainConfig())
  assert make(quantization=QuantizationConfig(block_size=32)).quantization.block_size == 32


def test_a_section_that_is_no_section():
  with pytest.raises(ConfigError, match=r"^lora: 3; a section with the fields rank, alpha"):
    config_lib.from_json_dict({"name": "test", "lora": 3})
  draft = ml_collections.ConfigDict({"name": "test", "lora": 3})
  with pytest.raises(ConfigError, match=r"^lora: 3; a section"):
    config_lib.from_config_dict(draft, {"lora.rank": 3})


def test_a_missing_name():
  with pytest.raises(ConfigError, match=r"^name: missing; a value of type str is needed$"):
    config_lib.from_json_dict({})


@pytest.mark.parametrize(
  ("path", "text", "value"),
  [
    ("lora.rank", "16", 16),
    ("optimizer.learning_rate", "1e-4", 1e-4),
    ("optimizer.learning_rate", "1", 1.0),
    ("optimizer.clip_norm", "None", None),
    ("optimizer.clip_norm", "0.5", 0.5),
    ("model.path", "none", None),
    ("model.path", "../a b/None", "../a b/None"),
    ("name", "None", "None"),  # a name is never None, so this is a word
    ("name", "3", "3"),
    ("train.compare_16bit", "false", False),
    ("train.compare_16bit", "True", True),
    ("lora.targets", "*/q,*/k", ("*/q", "*/k")),
    ("lora.targets", "*/q", ("*/q",)),
    ("lora.targets", "'[ab]/q'", ("[ab]/q",)),
    ("lora.targets", "('*/q', '*/k')", ("*/q", "*/k")),
    ("lora.targets", "['*/q']", ("*/q",)),
    ("lora.rank_pattern", "{'*/q': 4, 'layers/*/[ud]*': 2}", {"*/q": 4, "layers/*/[ud]*": 2}),
    ("lora.rank_pattern", "{}", {}),
    ("lora.alpha_pattern", '{"*/q": 4}', {"*/q": 4.0}),
    ("optimizer.schedule", "constant", "constant"),
  ],
)
def test_parse_value(path, text, value):
  parsed = config_lib.parse_value(path, text)
  assert parsed == value
  assert type(parsed) is type(value)


@pytest.mark.parametrize(
  ("path", "text"),
  [
    ("lora.rank", "8.0"),
    ("lora.rank", ""),
    ("lora.rank", "None"),
    ("optimizer.clip_norm", "x"),
    ("train.compare_16bit", "1"),
    ("lora.targets", "(3,)"),
    ("lora.targets", "('*/q'"),
    ("lora.targets", "[ab]/q"),  # a bracket opens a list; quoted, it is a pattern
    ("lora.rank_pattern", "q: 4"),
    ("lora.rank_pattern", "{'q': 'x'}"),
    ("lora.rank_pattern", "['q']"),
    ("lora.rank_pattern", "__import__('os')"),
  ],
)
def test_parse_value_shows_what_was_typed(path, text):
  with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {text!r}; ')}"):
    config_lib.parse_value(path, text)


def test_differences():
  before = make()
  assert config_lib.differences(before, make()) == []
  now = override(
    lora__rank=16, lora__rank_pattern={"*/q": 2}, optimizer__clip_norm=None, lora__targets=("*/q",)
  )
  assert config_lib.differences(before, now) == [
    "lora.rank: 8 before, 16 now",
    "lora.targets: ['*/attn/*', '*/mlp/*'] before, ['*/q'] now",
    "lora.rank_pattern: {} before, {'*/q': 2} now",
    "optimizer.clip_norm: 1.0 before, None now",
  ]


def test_fields_say_what_they_are():
  fields = config_lib.fields()
  assert fields["optimizer.clip_norm"].type_name == "float | None"
  assert fields["optimizer.clip_norm"].default == 1.0
  assert fields["optimizer.clip_norm"].help == "largest global norm of a gradient, or None."
  assert fields["lora.rank"].type_name == "int"
  assert fields["lora.variant"].type_name == "'lora' | 'dora' | 'vera' | 'lora_xs' | 'qa_lora'"
  assert fields["lora.rank_pattern"].type_name == "dict[str, int]"
  assert all(field.help for field in fields.values()), "a docstring lacks a field"
  assert not any("\n" in field.help or "Raises" in field.help for field in fields.values())

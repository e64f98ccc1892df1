import dataclasses
import json
import math

import numpy as np
import pytest

from qlora_jax import config as config_lib
from qlora_jax import sweeps
from qlora_jax.config import ConfigError


@pytest.fixture
def draft():
  draft = config_lib.defaults()
  draft.name = "test"
  draft.pretrain.steps = 10
  draft.data.synthetic = "manuals"
  draft.data.seq_len = 128
  draft.train.compare_16bit = False
  return draft


def test_grid():
  assert list(sweeps.grid({"a": [1, 2], "b": (x for x in "xy")})) == [
    {"a": 1, "b": "x"},
    {"a": 1, "b": "y"},
    {"a": 2, "b": "x"},
    {"a": 2, "b": "y"},
  ]
  assert list(sweeps.grid({})) == [{}]


def test_zipped():
  assert list(sweeps.zipped({"a": [1, 2], "b": "xy"})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
  with pytest.raises(ConfigError, match="a has 1, b has 2; the lists are of one length"):
    list(sweeps.zipped({"a": [1], "b": "xy"}))


def test_cross():
  pairs = sweeps.zipped({"a": [1, 2], "b": "xy"})
  assert list(sweeps.cross(pairs, sweeps.grid({"c": [7, 8]}))) == [
    {"a": 1, "b": "x", "c": 7},
    {"a": 1, "b": "x", "c": 8},
    {"a": 2, "b": "y", "c": 7},
    {"a": 2, "b": "y", "c": 8},
  ]
  with pytest.raises(ConfigError, match="cross: a: set by two of the sweeps"):
    list(sweeps.cross([{"a": 1}], [{"a": 2}]))


def test_draws_keep_what_they_were():
  spread = {"rate": sweeps.log_uniform(1e-4, 1e-2), "kind": sweeps.choice(["x", "y", "z"])}
  first = list(sweeps.draw(4, spread))
  assert list(sweeps.draw(9, spread))[:4] == first
  more = list(sweeps.draw(4, {"dropout": sweeps.uniform(0.0, 0.5), **spread}))
  assert [{path: each[path] for path in spread} for each in more] == first
  assert list(sweeps.draw(4, spread, seed=1)) != first


def test_draws_have_their_distribution():
  draws = list(
    sweeps.draw(
      2000,
      {
        "rate": sweeps.log_uniform(1e-4, 1e-2),
        "dropout": sweeps.uniform(0.25, 0.5),
        "kind": sweeps.choice(["x", "y"]),
      },
    )
  )
  logs = np.array([math.log10(each["rate"]) for each in draws])
  # Four standard errors of the mean of a uniform distribution.
  assert abs(logs.mean() + 3) < 4 * 2 / math.sqrt(12 * len(logs))
  assert -4 <= logs.min() and logs.max() <= -2 and logs.std() > 0.5
  dropout = np.array([each["dropout"] for each in draws])
  assert 0.25 <= dropout.min() < 0.26 and 0.49 < dropout.max() <= 0.5
  assert abs(sum(each["kind"] == "x" for each in draws) - 1000) < 4 * math.sqrt(500)
  assert type(draws[0]["rate"]) is float
  with pytest.raises(ConfigError, match="log_uniform: 0 to 1; both bounds are above 0"):
    sweeps.log_uniform(0, 1)


def test_resolve(draft):
  trials = sweeps.resolve(
    draft, sweeps.grid({"lora.rank": [2, 8], "seed": [0, 1]}), {"train.steps": 7}
  )
  assert [each.index for each in trials] == [0, 1, 2, 3]
  assert trials[1].overrides == {"lora.rank": 2, "seed": 1}
  assert trials[1].label == "lora.rank=2, seed=1"
  config = trials[1].config
  assert (config.lora.rank, config.seed, config.train.steps) == (2, 1, 7)
  assert len({each.id for each in trials}) == 4
  assert all(each.config.name == each.id for each in trials)


@pytest.mark.parametrize(
  ("sweep", "message"),
  [
    ([{}, {"lora.rank": 0}], r"trial 1 \(lora.rank=0\): lora.rank: 0; a rank is at least 1"),
    ([{"lora.rnak": 2}], r"trial 0 \(lora.rnak=2\): lora.rnak: no such field; did you mean rank"),
    ([{"lora.rank": "x"}], r"trial 0 \(lora.rank=x\): lora.rank: 'x'; a value of type int"),
    (
      [{"train.steps": 9}],
      r"trial 0 \(train.steps=9\): train.steps: set by the sweep, and to 7 on",
    ),
    ([{"name": "x"}], "name: 'x'; trials are told apart by their values"),
    ([("lora.rank", 2)], r"trial 0: \('lora.rank', 2\); overrides are a dict"),
    ([], "no trials; it yields at least one"),
    (
      [{"seed": 3}, {"seed": 0}, {"lora.rank": 5}, {}],
      r"trial 3 \(the config as it is\) is trial 1 \(seed=0\) again: .* leave one out",
    ),
    (
      [
        {"model.quantize": False, "quantization.codebook": "nf4"},
        {"model.quantize": False, "quantization.codebook": "fp4"},
      ],
      r"trial 1 \(model.quantize=False, quantization.codebook=fp4\) is trial 0 .* again",
    ),
  ],
)
def test_a_sweep_that_cannot_be_run_names_the_trial(draft, sweep, message):
  with pytest.raises(ConfigError, match=message) as caught:
    sweeps.resolve(draft, sweep, {"train.steps": 7})
  assert "\n" not in str(caught.value)


def test_a_trial_is_known_by_its_resolved_config(draft):
  (one,) = sweeps.resolve(draft, [{"lora.rank": 4}])
  # However it comes about: in another sweep, at another place, under another name.
  draft.name, draft.lora.rank = "other", 4
  wider = sweeps.resolve(draft, sweeps.grid({"lora.rank": [2, 4]}))
  assert [each.id == one.id for each in wider] == [False, True]
  assert sweeps.resolve(draft, [{}])[0].id == one.id
  # Written out and read again.
  again = config_lib.from_json_dict(config_lib.to_json_dict(one.config))
  assert sweeps.identity(again) == one.id


def test_numbers_of_numpy_are_taken_as_pythons(draft):
  own = sweeps.resolve(
    draft, sweeps.grid({"seed": np.arange(2), "optimizer.learning_rate": np.array([0.5])})
  )
  plain = sweeps.resolve(draft, sweeps.grid({"seed": range(2), "optimizer.learning_rate": [0.5]}))
  assert json.dumps([each.overrides for each in own]) == json.dumps(
    [each.overrides for each in plain]
  )
  assert own == plain


def test_every_field_but_the_name_is_part_of_the_identity(draft):
  draft.lora.rank_pattern = {"*/q": 4}
  config = config_lib.from_config_dict(draft)
  assert sweeps.identity(dataclasses.replace(config, name="other")) == sweeps.identity(config)
  for path, value in {
    "seed": 1,
    "lora.alpha": 3.0,
    "lora.rank_pattern": {"*/q": 5},
    "lora.targets": ("*/attn/q",),
    "quantization.block_size": 32,
    "data.seed": 1,
    "optimizer.clip_norm": None,
    "model.quantize": False,
    "train.steps": 3,
  }.items():
    other = config_lib.from_config_dict(draft, {path: value})
    assert sweeps.identity(other) != sweeps.identity(config), path


def test_trials_share_a_base(draft):
  def base(**overrides):
    return sweeps.base_identity(config_lib.from_config_dict(draft, overrides))

  assert base(**{"lora.rank": 3, "seed": 4, "optimizer.learning_rate": 1.0}) == base()
  for path, value in (
    ("quantization.codebook", "fp4"),
    ("model.quantize", False),
    ("pretrain.seed", 1),
    ("data.seed", 1),
  ):
    assert base(**{path: value}) != base()
  fp4 = base(**{"model.quantize": False, "quantization.codebook": "fp4"})
  assert fp4 == base(**{"model.quantize": False})

"""A packed token table: its rows, its head, and what it costs in loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from experiments import planned
from qlora_jax import config as config_lib
from qlora_jax import hf
from qlora_jax.models.transformer import Transformer, TransformerConfig
from qlora_jax.row_lookup import take_rows

# Many programs to compile: for the whole suite, not its quick part.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rows", [256, 100])
@pytest.mark.parametrize(("codebook", "double"), [("nf4", True), ("int8", False)])
def test_rows_are_those_of_the_whole(codebook, double, rows):
  w = jax.random.normal(jax.random.key(0), (rows, 24))
  packed = ql.quantize(w, codebook=codebook, double_quantization=double)
  ids = jax.random.permutation(jax.random.key(1), rows).reshape(2, -1).astype(jnp.int32)
  found = jax.jit(take_rows)(packed, ids)
  np.testing.assert_array_equal(found, ql.dequantize(packed)[ids])


@pytest.mark.parametrize("options", [{"codebook": "nf3"}, {"codebook": "int4_zero_point"}])
def test_forms_that_are_refused(options):
  packed = ql.quantize(jnp.ones((128, 8)), **options)
  with pytest.raises(ValueError, match="a packed table: rows are looked up in plain codes"):
    take_rows(packed, jnp.zeros(3, jnp.int32))


def config(**overrides):
  draft = config_lib.defaults()
  draft.name, draft.pretrain.steps, draft.data.synthetic, draft.data.seq_len = "x", 2, "tales", 64
  return config_lib.from_config_dict(draft, overrides)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_base_with_packed_tables(tied, tmp_path):
  shape = TransformerConfig(300, 64, 48, 2, 2, 1, 16, tie_embeddings=tied)
  model = Transformer(shape, dtype=jnp.float32)
  tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 300)
  dense = jax.jit(model.init)(jax.random.key(0), tokens)["frozen"]
  hf.save(tmp_path / "dense", model, dense, dtype=jnp.float32)

  @jax.jit
  def logits(frozen):
    return model.apply({"params": {}, "constants": {}, "frozen": frozen}, tokens)

  moved, sizes = {}, {}
  for bits in (None, 4) if tied else (None, 8, 4):
    cfg = config(**{"model.table_bits": bits})
    rules = planned.rules(cfg, cfg.base_quantization, shape)
    _, frozen = hf.load(tmp_path / "dense", rules, dtype="float32")
    names = [] if bits is None else ["embed"] if tied else ["embed", "head"]
    for name in ("embed", *([] if tied else ["head"])):
      (table,) = frozen[name].values()
      assert hasattr(table, "codes") == (name in names)
      # As is a table that was dequantized, to float32's rounding.
      if name in names and bits == 4:
        plain = {name: {key: ql.dequantize(w) for key, w in frozen[name].items()}}
        np.testing.assert_allclose(logits(frozen), logits({**frozen, **plain}), atol=2e-5)
    moved[bits] = float(jnp.abs(logits(frozen) - logits(dense)).mean())
    sizes[bits] = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
  assert 1.2 * moved[None] < 2 * moved[4]
  assert sizes[4] < sizes[None]
  if not tied:
    assert moved[8] < 1.2 * moved[None]
    assert sizes[4] < sizes[8] < sizes[None]


def test_the_plan_counts_packed_tables():
  shape = TransformerConfig(300, 64, 48, 2, 2, 1, 16)
  wide, narrow = (
    planned.planner(cfg, shape).memory(planned.step_of(cfg))
    for cfg in (config(), config(**{"model.table_bits": 8}))
  )
  # 16 bits became 8, two scales' and offset's bytes in 64 and 256, and a table of 256 levels.
  saved = 2 * (2 - 1 - 1 / 64 - 4 / (64 * 256)) * 300 * 64 - 2 * 4 * 256
  assert wide.base - narrow.base == pytest.approx(saved, rel=0.03)
  assert wide.adapters == narrow.adapters


def test_tables_are_not_packed_where_the_base_is_not():
  assert config(**{"model.table_bits": 4}).table_bits == 4
  dense = {"model.table_bits": 4, "model.quantize": False, "train.compare_16bit": False}
  assert config(**dense).table_bits is None
  with pytest.raises(config_lib.ConfigError, match=r"table_bits: 8; None with a lora.init"):
    config(**{"model.table_bits": 8, "lora.init": "pissa"})

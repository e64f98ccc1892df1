"""The README's lists of names: each is offered as it says, or refused as it says."""

import re
from pathlib import Path

import pytest

from qlora_jax import codebooks
from qlora_jax import config as config_lib
from qlora_jax.config import ConfigError
from qlora_jax.quantization import QuantizationConfig

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()

# Formats of one block size.
BLOCK_SIZE = {"nvfp4": 16, "mxfp4": 32}


def tables(header: str) -> list[list[list[str]]]:
  """The rows of each table whose first line has `header`, as cells."""
  found = re.findall(rf"^\|[^\n]*{re.escape(header)}[^\n]*\n\| ---.*\n((?:\|.*\n)+)", README, re.M)
  return [
    [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    for text in found
  ]


def quoted(cell: str) -> list[str]:
  return re.findall(r"`([^`]+)`", cell)


def config(**overrides):
  draft = config_lib.defaults()
  draft.name = "names"
  draft.model.path = "/tmp"
  draft.data.synthetic = "manuals"
  return config_lib.from_config_dict(draft, overrides)


def test_all_codebooks_and_no_others():
  (rows,) = tables("`quantization.codebook=`")
  names = [name for _, cell in rows for name in quoted(cell)]
  assert sorted(names) == sorted(codebooks.names())
  for name in names:
    codebook = codebooks.get(name, BLOCK_SIZE.get(name, 64))
    assert codebook.reference, name


@pytest.mark.parametrize("name", ["nvfp4", "any4", "lloyd_max2", "int8_zero_point", "bof4s"])
def test_a_codebook_is_asked_for_in_a_config(name):
  own = config(
    **{
      "quantization.codebook": name,
      "quantization.block_size": BLOCK_SIZE.get(name, 64),
      "quantization.double_quantization": name not in BLOCK_SIZE,
    }
  )
  assert own.base_quantization is not None and own.base_quantization.codebook == name


def setting(text: str) -> dict[str, object]:
  path, value = text.split("=")
  return {path: config_lib.parse_value(path, value)}


def test_all_adapters_and_inits_and_no_others():
  (rows,) = tables("in a config | what it does")
  given = [text for row in rows for text in quoted(row[1])]
  for text in given:
    overrides = setting(text)
    if text == "lora.variant=qa_lora":
      overrides |= setting("quantization.codebook=int4_zero_point")
    config(**overrides)
  fields = config_lib.fields()
  for path in ("lora.variant", "lora.init"):
    offered = {f"{path}={value}" for value in fields[path].type.__args__}
    # An init of "lora" is LoRA's own.
    assert {text for text in given if text.startswith(path)} == offered - {"lora.init=lora"}


def test_all_that_is_refused_says_why():
  rows = [row for rows in tables("refused | because") for row in rows]
  assert all(reason for _, reason in rows)
  refused = [name for names, _ in rows for name in quoted(names)]
  assert len(refused) == 6 + 4
  for text in refused:
    if "=" in text:
      path, value = text.split("=")
      with pytest.raises(ConfigError, match="not offered: "):
        config(**{path: value})
    else:
      with pytest.raises(ValueError, match=f"'{text}': not offered; "):
        QuantizationConfig(text)
  assert {text for text in refused if "=" not in text} == codebooks._REFUSED.keys()

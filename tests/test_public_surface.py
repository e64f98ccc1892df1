"""What other codebases rely on does not change unless `qlora_jax.SURFACE` does."""

import importlib
import inspect
import subprocess
import sys
import types
import warnings

import pytest

import qlora_jax as ql
from qlora_jax import deprecations
from qlora_jax.deprecations import Deprecation

# Without an underscore, since our own modules use them; promised to nobody.
INTERNAL = {
  "qlora_jax.codebooks": {"dynamic_map", "is_table", "name_of", "normal_float", "student_ppf"},
  "qlora_jax.linen": {"lend_stacks", "plain_weight", "weight"},
  "qlora_jax.lora": {
    "add_token_logits",
    "base_weight",
    "dense_part",
    "dora_scale",
    "factors",
    "factors_at",
    "is_lookup",
    "is_tied",
    "module",
    "path_key",
    "plan",
    "refuse_eva",
    "taken_out",
    "token_rows",
    "weights",
  },
}


def public_names(name: str) -> set[str]:
  """What a module defines or hands on without an underscore: our own functions and classes."""
  module = importlib.import_module(name)
  hands_on = hasattr(module, "__path__")  # a package's surface is what it imports
  names = set()
  for key, value in vars(module).items():
    own = getattr(value, "__module__", "") or ""
    if key.startswith("_") or isinstance(value, types.ModuleType):
      continue
    if own == name or (hands_on and own.startswith("qlora_jax.")):
      names.add(key)
  return names


@pytest.mark.parametrize("name", ql.SURFACE)
def test_names_appear_and_vanish_with_the_list(name):
  listed = ql.SURFACE[name]
  assert list(listed) == sorted(set(listed))
  module = importlib.import_module(name)
  for each in listed:
    assert hasattr(module, each), f"{name}.{each}: in SURFACE, and not there"
  found = public_names(name) - INTERNAL.get(name, set())
  modules = {each for each in listed if isinstance(getattr(module, each), types.ModuleType)}
  assert found == set(listed) - modules - {"SURFACE"}
  # A module that is handed on is listed itself.
  assert {f"qlora_jax.{each}" for each in modules} == (
    ql.SURFACE.keys() - {"qlora_jax"} if name == "qlora_jax" else set()
  )


def listed_callables():
  for name, listed in ql.SURFACE.items():
    for each in listed:
      value = getattr(importlib.import_module(name), each)
      if inspect.isfunction(value) or inspect.isclass(value):
        yield pytest.param(value, id=f"{name}.{each}")


@pytest.mark.parametrize("value", listed_callables())
def test_what_is_listed_is_typed_and_documented(value):
  assert inspect.getdoc(value)
  functions = [value]
  if inspect.isclass(value):
    functions = [
      member
      for key, member in vars(value).items()
      if inspect.isfunction(member) and (key == "__call__" or not key.startswith("_"))
    ]
  for function in functions:
    if function.__module__ != value.__module__:
      continue  # a framework's own
    signature = inspect.signature(function)
    for parameter in list(signature.parameters.values())[inspect.isclass(value) :]:
      assert parameter.annotation is not inspect.Parameter.empty, f"{function}: {parameter}"
    if function.__name__ != "setup":
      assert signature.return_annotation is not inspect.Signature.empty, function


def test_an_old_name_warns_its_user_and_works(monkeypatch):
  table = {"qlora_jax": {"pack": Deprecation("0.1.0", "qlora_jax.quantization.quantize")}}
  monkeypatch.setattr(deprecations, "DEPRECATED", table)
  with pytest.warns(
    DeprecationWarning, match=r"qlora_jax\.pack is qlora_jax\.quanti.*0\.1\.0"
  ) as seen:
    found = ql.pack  # pyright: ignore[reportAttributeAccessIssue]
  assert found is ql.quantize
  # It is the line above that is told.
  assert [warning.filename for warning in seen] == [__file__]
  with pytest.raises(AttributeError, match="'qlora_jax' has no attribute 'pick'"):
    ql.pick  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def faults(table, version: str) -> list[str]:
  """What is wrong with a table of old names."""
  found = []
  for name, entries in table.items():
    module = importlib.import_module(name)
    for old, entry in entries.items():
      if entry.version != version:
        found.append(f"{name}.{old}: warned in {entry.version}; take it out")
      if old in ql.SURFACE.get(name, ()):
        found.append(f"{name}.{old}: in SURFACE, and deprecated")
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if not hasattr(module, old):
          found.append(f"{name}.{old}: not handed on; see deprecations")
  return found


def test_old_names_warn_for_one_version():
  assert not faults(deprecations.DEPRECATED, ql.__version__)
  entry = Deprecation("0.0.9", "qlora_jax.quantize")
  assert faults({"qlora_jax": {"adapt": entry}}, "0.1.0") == [
    "qlora_jax.adapt: warned in 0.0.9; take it out",
    "qlora_jax.adapt: in SURFACE, and deprecated",
  ]
  assert faults(
    {"qlora_jax.nnx": {"no_such": Deprecation("0.1.0", "qlora_jax.nnx.adapt")}}, "0.1.0"
  ) == ["qlora_jax.nnx.no_such: not handed on; see deprecations"]


def test_importing_makes_no_arrays_and_changes_no_settings():
  program = """
import jax, sys
before = dict(jax.config.values)
import qlora_jax as ql
ql.linen, ql.nnx, ql.hf
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was started"
assert before == dict(jax.config.values), "settings changed"
"""
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr

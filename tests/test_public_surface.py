"""What other codebases rely on does not change unless `qlora_jax.SURFACE` does."""

import importlib
import inspect
import subprocess
import sys
import types

import pytest

import qlora_jax as ql

# Without an underscore, since our own modules use them; promised to nobody.
INTERNAL = {
  "qlora_jax.codebooks": {"dynamic_map", "is_table", "name_of", "normal_float", "student_ppf"},
  "qlora_jax.linen": {"plain_weight", "weight"},
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

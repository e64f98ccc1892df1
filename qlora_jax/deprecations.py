"""Names of the public surface that have another one now.

A name that leaves `qlora_jax.SURFACE` stands in DEPRECATED for one version, in which it still works
and warns; with the next version a test fails until it is taken out. The module that it was in hands
it on from its `__getattr__`:

  def __getattr__(name: str):
    return deprecations.handed_on(__name__, name)
"""

import dataclasses
import importlib
import warnings
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Deprecation:
  """One name on its way out.

  Attributes:
    version: of the package, the only one in which it warns.
    instead: the whole name of what took its place, "qlora_jax.lora.merge".
  """

  version: str
  instead: str


# Module → old name → what became of it.
DEPRECATED: Mapping[str, Mapping[str, Deprecation]] = {}


def handed_on(module: str, name: str) -> Any:
  """What an old name stands for; warns the code that asks for it.

  Args:
    module, name: of the old name.

  Raises:
    AttributeError: there is no such name, and was none in the last version.

  Warns:
    DeprecationWarning: with the name to use instead.
  """
  old = DEPRECATED.get(module, {}).get(name)
  if old is None:
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
  warnings.warn(
    f"{module}.{name} is {old.instead} now; the old name goes with the version after {old.version}",
    DeprecationWarning,
    stacklevel=3,
  )
  owner, _, own = old.instead.rpartition(".")
  return getattr(importlib.import_module(owner), own)

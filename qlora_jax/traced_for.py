"""What a program is traced for: the kernels' choice goes by it, and how levels are looked up."""

from typing import Any

import jax


def target() -> tuple[str, Any]:
  """The platform that is traced for, and its device.

  The one that JAX takes by default: a trace does not know of arrays that are committed to another.
  """
  # A program can be lowered for a device that is not there.
  if device := jax.sharding.get_abstract_mesh().abstract_device:
    return device.platform or jax.default_backend(), device
  config: Any = jax.config
  default = config.jax_default_device
  device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
  return device.platform, device

"""What every Pallas kernel of the op needs."""

import jax

from qlora_jax.quantized_tensor import AnyQuantizedTensor, QuantizedTensor
from qlora_jax.traced_for import target as target

# The first JAX whose Pallas the kernels were written for and run with.
_LEAST_JAX = (0, 11, 2)


def unavailable(*platforms: str) -> str | None:
  """Why no kernel for these platforms can run here, or None."""
  if jax.__version_info__ < _LEAST_JAX:
    least = ".".join(map(str, _LEAST_JAX))
    return f"it needs JAX {least}; this is {jax.__version__}"
  platform, _ = target()
  if platform not in platforms:
    return f"the computation is for a {platform}"
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual:
    return "the mesh has axes that are not manual: call it in a shard_map over them"
  return None


def unsupported(w: AnyQuantizedTensor, *platforms: str) -> str | None:
  """Why no kernel for these platforms can read `w` here, or None."""
  if reason := unavailable(*platforms):
    return reason
  if not isinstance(w, QuantizedTensor):
    return "blocks cross from output to output (a bitsandbytes weight whose K they do not divide)"
  if w.column_tables:
    return "a table for each output (any2 to any4); its kernels keep one"
  if w.size >= 2**31:
    return f"{w.size} weights; fewer than 2^31, which its indices count to"
  return None

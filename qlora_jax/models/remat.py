"""What the backward pass of a layer computes again, and what it keeps: policies by name.

From the least memory to the most, of a decoder layer:

  policy         keeps on the device                              computes again
  offload        nothing: the layer's input waits on the host     all but what ends the layer
  offload_pairs  as offload, of every other layer: half as much   all, and then as offload
                 on the host; two layers' inputs on the device
  full           the layer's input                                all but what ends the layer
  mlp            and q, k, v, attention's result, the sum after   the MLP's first products
  elementwise    and what the MLP's first products gave           norms, activations, no product
  none           everything                                       nothing

No policy changes a result but by rounding: what is computed again may be fused otherwise, and what
XLA fuses is not rounded to 16 bits on the way. (In pairs each layer draws other dropout masks.)
"All but what ends the layer": the last product's result enters nothing that has a gradient, so
XLA drops it. Not so before a norm, whose gradient is taken at what entered it: where q and k have
norms, or a block's result has one, the products before those are computed again as well.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.lora import LOW_RANK, ROUNDED
from qlora_jax.models.attention import ATTENTION

RematPolicy = Literal["offload", "offload_pairs", "full", "mlp", "elementwise", "none"]
REMAT_POLICIES: tuple[RematPolicy, ...] = get_args(RematPolicy)
# Those under which something waits in the host's memory.
OFFLOADING: tuple[RematPolicy, ...] = ("offload", "offload_pairs")

# Names of what a policy may keep.
INPUT = "input"  # of a layer, or of a pair of layers, [B, T, D]
QKV = "qkv"  # what enters attention
MIDDLE = "middle"  # the residual stream between attention and MLP
WIDE = "wide"  # of an MLP, before its activation

_MLP_KEEPS = (QKV, ATTENTION, MIDDLE, LOW_RANK)


def policies(num_layers: int) -> tuple[RematPolicy, ...]:
  """Those that serve a model of so many layers: an odd number of them has no pairs."""
  return tuple(p for p in REMAT_POLICIES if p != "offload_pairs" or num_layers % 2 == 0)


def named(name: str, *arrays: jax.Array) -> Any:
  """The arrays under a name that policies know them by; of one array, it alone."""
  found = tuple(checkpoint_name(x, name) for x in arrays)
  return found if len(arrays) > 1 else found[0]


def block(module: type[nn.Module], policy: str, *, scanned: bool = True) -> Any:
  """`module`, a layer (or of "offload_pairs" a pair), under a policy by name.

  Args:
    scanned: whether a scan runs it, which by itself keeps XLA from merging a layer's computations
      in the two passes, and so from keeping the weights that the first has decoded. Elsewhere the
      policy does so, and those that keep products keep A and B as they are rounded for them too.

  Raises:
    ValueError: no such policy.
  """
  if policy not in REMAT_POLICIES:
    raise ValueError(f"remat: {policy!r}; one of {', '.join(REMAT_POLICIES)}")
  if policy == "none" and scanned:
    return module
  return nn.remat(module, prevent_cse=not scanned, policy=_policy(policy, scanned))


def _policy(name: str, scanned: bool) -> Callable[..., Any] | None:
  if name == "full":
    return None
  if name == "none":
    return jax.checkpoint_policies.everything_saveable
  if name in OFFLOADING:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=(),
      names_which_can_be_offloaded=(INPUT,),
      offload_src="device",
      offload_dst="pinned_host",
    )
  names = _MLP_KEEPS if name == "mlp" else (*_MLP_KEEPS, WIDE)
  if not scanned:
    # In a loop they would be copied to a stack, and read again as the float32 ones are.
    names = (*names, ROUNDED)
  return jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(*names), _is_fused_attention
  )


def _is_fused_attention(primitive, *_, **__) -> bool:
  # What cuDNN's kernel gives has no name, and it is a kernel that one does not run again.
  return primitive.name.startswith("dot_product_attention_fwd")

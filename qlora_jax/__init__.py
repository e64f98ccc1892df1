"""qlora_jax: fine-tune large language models in JAX over weights frozen in 4 bits.

`import qlora_jax as ql` gives the numbers, the op and the adapters, with jax and numpy alone.
`ql.hf`, `ql.linen`, `ql.nnx` and the training modules need flax, optax and orbax, and load on first
use.
"""

import importlib
from typing import TYPE_CHECKING

from qlora_jax import codebooks as codebooks
from qlora_jax import deprecations as _deprecations
from qlora_jax import lora as lora
from qlora_jax.codebooks import Codebook as Codebook
from qlora_jax.importing import Adapted as Adapted
from qlora_jax.importing import adapt as adapt
from qlora_jax.lora import LoRAConfig as LoRAConfig
from qlora_jax.matmul import quantized_einsum as quantized_einsum
from qlora_jax.matmul import quantized_matmul as quantized_matmul
from qlora_jax.quantization import QuantizationConfig as QuantizationConfig
from qlora_jax.quantization import dequantize as dequantize
from qlora_jax.quantization import quantize as quantize
from qlora_jax.quantization import quantize_tree as quantize_tree
from qlora_jax.quantized_tensor import QuantizedTensor as QuantizedTensor

if TYPE_CHECKING:
  from qlora_jax import hf as hf
  from qlora_jax import linen as linen
  from qlora_jax import nnx as nnx

__version__ = "0.1.0"

# What other codebases may rely on, here and in the modules that it names; a test compares. All else
# may change with any version. A name that leaves the list works, and warns, for one version more
# (see `deprecations`).
SURFACE: dict[str, tuple[str, ...]] = {
  "qlora_jax": (
    "Adapted",
    "Codebook",
    "LoRAConfig",
    "QuantizationConfig",
    "QuantizedTensor",
    "SURFACE",
    "adapt",
    "codebooks",
    "dequantize",
    "hf",
    "linen",
    "lora",
    "nnx",
    "quantize",
    "quantize_tree",
    "quantized_einsum",
    "quantized_matmul",
  ),
  "qlora_jax.codebooks": ("Codebook", "custom", "get", "load", "names"),
  "qlora_jax.hf": (
    "initialize",
    "load",
    "load_adapter",
    "load_chat_template",
    "load_tokenizer",
    "open_stored",
    "save",
    "save_adapter",
    "save_base",
    "save_bitsandbytes",
    "save_merged",
  ),
  "qlora_jax.linen": ("AdaptedModule", "Embed", "QDense", "QEinsum", "TiedHead", "adapt"),
  "qlora_jax.lora": (
    "LoRAConfig",
    "apply",
    "apply_lookup",
    "combine",
    "constants",
    "count",
    "init",
    "merge",
    "merge_zero_points",
    "plain",
  ),
  "qlora_jax.nnx": ("Adapted", "Constant", "Frozen", "QEinsum", "QLinear", "adapt"),
}

_LAZY = ("hf", "linen", "nnx")


def __getattr__(name: str):
  if name in _LAZY:
    return importlib.import_module(f"qlora_jax.{name}")
  return _deprecations.handed_on("qlora_jax", name)

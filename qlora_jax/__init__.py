"""qlora_jax: fine-tune large language models in JAX over weights frozen in 4 bits.

`import qlora_jax as ql` gives the numbers, the op and the adapters, with jax and numpy alone.
`ql.hf`, `ql.linen` and the training modules need flax, optax and orbax, and load on first use.
"""

import importlib
from typing import TYPE_CHECKING

from qlora_jax import codebooks as codebooks
from qlora_jax import lora as lora
from qlora_jax.codebooks import Codebook as Codebook
from qlora_jax.lora import LoRAConfig as LoRAConfig
from qlora_jax.matmul import quantized_matmul as quantized_matmul
from qlora_jax.quantization import QuantizationConfig as QuantizationConfig
from qlora_jax.quantization import dequantize as dequantize
from qlora_jax.quantization import quantize as quantize
from qlora_jax.quantization import quantize_tree as quantize_tree
from qlora_jax.quantized_tensor import QuantizedTensor as QuantizedTensor

if TYPE_CHECKING:
  from qlora_jax import hf as hf
  from qlora_jax import linen as linen

__version__ = "0.1.0"

_LAZY = ("hf", "linen")


def __getattr__(name: str):
  if name in _LAZY:
    return importlib.import_module(f"qlora_jax.{name}")
  raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}")

"""The product of an array and a packed weight."""

from qlora_jax.matmul.api import adapted_matmul as adapted_matmul
from qlora_jax.matmul.api import choose as choose
from qlora_jax.matmul.api import fuses_adapter as fuses_adapter
from qlora_jax.matmul.api import quantized_matmul as quantized_matmul
from qlora_jax.matmul.einsum import quantized_einsum as quantized_einsum

"""The product of an array and a packed weight."""

from qlora_jax.matmul.api import quantized_matmul as quantized_matmul

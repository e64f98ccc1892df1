"""The cases of the op: one list for every implementation's tests, the tuner and the benchmark.

`SMALL` covers what an implementation has to get right, in shapes that are quick on a CPU;
`REAL` is what it has to be fast on. What an implementation does not serve, its `unsupported`
says.
"""

import dataclasses
import itertools

import jax

from qlora_jax.quantization import quantize
from qlora_jax.quantized_tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class ArgumentSpec:
  """Arguments of `quantized_matmul`, without their values.

  Attributes:
    k, n: of the weight.
    rows: leading axes of x, `[*rows, k]`.
    dtype: of x.
    codebook, block_size, double_quantization: of the weight, as `quantize` takes them.
  """

  k: int
  n: int
  rows: tuple[int, ...] = (5,)
  dtype: str = "float32"
  codebook: str = "nf4"
  block_size: int = 64
  double_quantization: bool = True

  def __str__(self):
    shape = "x".join(map(str, (*self.rows, self.k, self.n)))
    scales = "double" if self.double_quantization else "single"
    return f"{shape}-{self.dtype}-{self.codebook}-b{self.block_size}-{scales}"

  def x(self, key: jax.Array) -> jax.Array:
    """`[*rows, k]`, normal."""
    return jax.random.normal(key, (*self.rows, self.k), self.dtype)

  def w(self, key: jax.Array, stack: tuple[int, ...] = ()) -> QuantizedTensor:
    """`[*stack, k, n]`, normal, packed."""
    return quantize(
      jax.random.normal(key, (*stack, self.k, self.n)),
      codebook=self.codebook,
      block_size=self.block_size,
      double_quantization=self.double_quantization,
    )


_WIDTHS = ("nf2", "nf3", "nf4", "int8")

SMALL: tuple[ArgumentSpec, ...] = (
  # Widths by precision, on whole groups.
  *(
    ArgumentSpec(256, 48, dtype=dtype, codebook=codebook)
    for codebook, dtype in itertools.product(_WIDTHS, ("float32", "bfloat16", "float16"))
  ),
  # K that the group, the unit or the block does not divide.
  *(
    ArgumentSpec(k, 5, codebook=codebook, double_quantization=False)
    for codebook, k in itertools.product(_WIDTHS, (3, 127, 172))
  ),
  *(ArgumentSpec(k, 7, dtype="bfloat16") for k in (129, 172)),
  *(ArgumentSpec(384, 16, block_size=block_size) for block_size in (1, 32, 48, 100, 512)),
  # The other ways of drawing a scale.
  ArgumentSpec(256, 16, codebook="fp4"),
  ArgumentSpec(256, 16, dtype="bfloat16", codebook="int4_signed", block_size=32),
  ArgumentSpec(256, 16, codebook="int4_zero_point", block_size=32, double_quantization=False),
  ArgumentSpec(171, 16, dtype="bfloat16", codebook="int4_zero_point", block_size=32),
  # Scales of 8 bits.
  ArgumentSpec(
    256, 16, dtype="bfloat16", codebook="nvfp4", block_size=16, double_quantization=False
  ),
  ArgumentSpec(160, 16, codebook="mxfp4", block_size=32, double_quantization=False),
  # A table with no zero, with padding.
  ArgumentSpec(129, 3, codebook="equal_mass16"),
  # Rows: none, several axes, a single one.
  ArgumentSpec(128, 16, rows=()),
  ArgumentSpec(128, 16, rows=(2, 3, 1), dtype="bfloat16"),
  ArgumentSpec(128, 1, rows=(1,)),
  # A long sum.
  ArgumentSpec(2048, 24, dtype="bfloat16"),
)

# [K, N] of Llama 3's projections: 8B attention out, up and down; 70B up and down.
_LLAMA = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192))

REAL: tuple[ArgumentSpec, ...] = tuple(
  ArgumentSpec(k, n, rows=(rows,), dtype="bfloat16")
  for (k, n), rows in itertools.product(_LLAMA, (1, 16, 256, 4096))
)

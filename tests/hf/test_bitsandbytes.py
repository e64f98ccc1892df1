import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

from qlora_jax import codebooks, dequantize, quantize, quantized_matmul
from qlora_jax.codebooks import dynamic_map
from qlora_jax.hf.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from qlora_jax.quantized_tensor import FlatQuantizedTensor, restore_scales

# bitsandbytes' own tables, by its codes.
NF4 = codebooks.get("nf4").levels
FP4 = [level / 12 for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
TABLES = {
  "nf4": np.asarray(NF4, np.float32),
  "fp4": np.asarray([*FP4, *(-x for x in FP4)], np.float32),
}


def weight(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def nibbles(packed):
  """The codes of packed bytes, the high nibble first."""
  codes = [code for byte in packed.reshape(-1).tolist() for code in (byte >> 4, byte & 15)]
  return np.asarray(codes, np.uint8)


def rebuild(arrays, q, kind):
  """A QuantizedTensor from what `to_bitsandbytes` gave."""
  k, n = q.shape
  nested = {name: value for name, value in arrays.items() if name.startswith("nested_")}
  if nested:
    nested["nested_block_size"] = q.scales.block_size
  return from_bitsandbytes(
    arrays["packed"],
    arrays["absmax"],
    shape=(n, k),
    quant_type=kind,
    block_size=q.block_size,
    **nested,
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
  ("shape", "block_size"), [((128, 3), 64), ((64, 5), 32), ((96, 6), 32), ((33, 1), 32)]
)
def test_order_is_that_of_the_flat_torch_weight(kind, double, shape, block_size):
  q = quantize(
    weight(shape),
    codebook=kind,
    block_size=block_size,
    double_quantization=double,
    nested_block_size=4,
  )
  arrays = to_bitsandbytes(q)
  k, n = shape
  count, blocks = k * n, -(-k // block_size) * n
  assert arrays["packed"].shape == (-(-count // 2), 1)
  if double:
    assert sorted(arrays) == ["absmax", "nested_absmax", "nested_offset", "packed"]
    assert arrays["absmax"].dtype == np.uint8
    assert arrays["nested_absmax"].shape == (-(-blocks // 4),)
    index = np.arange(blocks) // 4
    absmax = dynamic_map()[arrays["absmax"]] * arrays["nested_absmax"][index]
    absmax = absmax + arrays["nested_offset"]
  else:
    assert sorted(arrays) == ["absmax", "packed"]
    absmax = arrays["absmax"]
  assert absmax.shape == (blocks,) and absmax.dtype == np.float32

  # Decoded as bitsandbytes does it: blocks over the flat [out, in] array.
  codes = nibbles(arrays["packed"])
  if count % 2:
    assert TABLES[kind][codes[-1]] == 0
    codes = codes[:-1]
  values = TABLES[kind][codes] * np.repeat(absmax, block_size)[:count]
  np.testing.assert_array_equal(values.reshape(n, k).T, dequantize(q))
  assert_same(rebuild(arrays, q, kind), q)


def test_both_zeros_of_fp4_keep_their_codes():
  q = quantize(
    jnp.asarray([0.0, 0.001, 0.002, 1.0] * 8, jnp.float32)[:, None],
    codebook="fp4",
    block_size=32,
    double_quantization=False,
  )
  arrays = to_bitsandbytes(q)
  assert nibbles(arrays["packed"])[:4].tolist() == [0, 8, 8, 3]
  assert_same(rebuild(arrays, q, "fp4"), q)


@pytest.mark.parametrize(
  "name",
  [
    "nf4_dq",
    "nf4_single",
    "fp4_dq",
    "nf4_dq_storage_bf16",
    "nf4_dq_storage_f32",
    "nf4_dq_bs128",
    "nf4_dq_bs32",
    "nf4_dq_ragged",
  ],
)
def test_files_that_bitsandbytes_wrote(shared, name):
  with safetensors.safe_open(
    shared / "golden" / "ondisk_formats" / f"{name}.safetensors", framework="numpy"
  ) as file:
    tensors = {key.removeprefix("layer."): file.get_tensor(key) for key in file.keys()}
  state_key = next(key for key in tensors if "quant_state" in key)
  state = json.loads(bytes(tensors[state_key]))
  kind = state["quant_type"]
  arrays = {
    "packed": tensors["weight"],
    "absmax": tensors["weight.absmax"],
  }
  nested = {}
  if "nested_offset" in state:
    arrays["nested_absmax"] = tensors["weight.nested_absmax"]
    arrays["nested_offset"] = np.float32(state["nested_offset"])
    nested = {
      "nested_absmax": arrays["nested_absmax"],
      "nested_offset": state["nested_offset"],
      "nested_block_size": state["nested_blocksize"],
    }
    np.testing.assert_array_equal(tensors["weight.nested_quant_map"], dynamic_map())
  np.testing.assert_array_equal(tensors["weight.quant_map"], TABLES[kind])
  q = from_bitsandbytes(
    arrays["packed"],
    arrays["absmax"],
    shape=state["shape"],
    quant_type=kind,
    block_size=state["blocksize"],
    **nested,
  )
  expected = tensors["expected.dequant"]
  assert q.shape == expected.shape[::-1]
  actual = np.asarray(dequantize(q, state["dtype"]))
  assert actual.dtype == expected.dtype
  np.testing.assert_array_equal(actual.T, expected)

  written = to_bitsandbytes(q)
  assert sorted(written) == sorted(arrays)
  for key, value in arrays.items():
    # Bytes, as the storage dtype may be another.
    assert np.asarray(value).tobytes() == written[key].tobytes(), key


# (input, block sizes that divide its rows; ragged_1000 is one row)
CASES = [
  ("normal_256x192", (32, 64)),
  ("student3_64x192", (32, 64)),
  ("zeroblock_64x128", (32, 64, 128)),
  ("midpoints_nf4", (32, 64)),
  ("midpoints_fp4", (32, 64)),
  ("ragged_1000", (64, 256)),
]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("name", "block_size"), [(n, b) for n, sizes in CASES for b in sizes])
def test_golden_vectors_are_written_to_the_byte(shared, name, block_size, kind):
  folder = shared / "golden" / "quant4bit"
  with np.load(folder / "inputs.npz") as inputs, np.load(folder / "vectors.npz") as vectors:
    x = inputs[name]
    prefix = f"{name}.f32.{kind}.bs{block_size}."
    keys = ("packed", "absmax", "dq.absmax_u8_cuda_emul", "dq.nested_absmax", "dq.offset")
    golden = {key: vectors[prefix + key] for key in keys}
  x = x.reshape(-1, x.shape[-1])
  q = quantize(jnp.asarray(x).T, codebook=kind, block_size=block_size, double_quantization=False)
  arrays = to_bitsandbytes(q)
  # XLA's CPU backend flushes subnormals, such as an ulp above FP4's midpoint 0: code 0 for 8, −0.
  ours, theirs = (nibbles(each["packed"]) for each in (arrays, golden))
  flushed = ((x != 0) & (np.abs(x) < 2.0**-126)).reshape(-1)
  assert flushed.sum() == (4 if name == "midpoints_fp4" else 0)
  np.testing.assert_array_equal(ours[~flushed], theirs[~flushed])
  assert (TABLES[kind][ours[flushed]] == 0).all()
  np.testing.assert_array_equal(arrays["absmax"], golden["absmax"])

  nested = {
    "absmax": golden["dq.absmax_u8_cuda_emul"],
    "nested_absmax": golden["dq.nested_absmax"],
    "nested_offset": golden["dq.offset"],
  }
  q = from_bitsandbytes(
    golden["packed"], **nested, shape=x.shape, quant_type=kind, block_size=block_size
  )
  arrays = to_bitsandbytes(q)
  for key, value in {"packed": golden["packed"], **nested}.items():
    np.testing.assert_array_equal(arrays[key].reshape(-1), value.reshape(-1), err_msg=key)


def test_bfloat16_scales_are_written_as_float32():
  q = quantize(weight((64, 4)), double_quantization=False, scale_dtype="bfloat16")
  absmax = to_bitsandbytes(q)["absmax"]
  assert absmax.dtype == np.float32
  np.testing.assert_array_equal(absmax, restore_scales(q.scales)[0])
  np.testing.assert_array_equal(absmax, absmax.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("name", ["nf3", "int4", "int8", "equal_mass16", "int4_zero_point"])
def test_other_tables_are_refused_by_name(name):
  q = quantize(weight((64, 4)), codebook=name, double_quantization=False)
  with pytest.raises(ValueError, match=f"codebook {name}: bitsandbytes decodes nf4 and fp4 alone"):
    to_bitsandbytes(q)


def test_a_custom_table_is_refused():
  q = quantize(weight((64, 4)), codebook=codebooks.custom(np.linspace(-1, 1, 16).tolist()))
  with pytest.raises(ValueError, match="codebook a custom table: bitsandbytes decodes"):
    to_bitsandbytes(q)
  # NF4's with one level moved.
  q = quantize(weight((64, 4)))
  q = dataclasses.replace(q, levels=q.levels.at[3].add(0.01))
  with pytest.raises(ValueError, match="a custom table"):
    to_bitsandbytes(q)


def test_what_is_not_one_matrix_is_refused():
  with pytest.raises(TypeError, match="a QuantizedTensor is wanted"):
    to_bitsandbytes(weight((64, 4)))  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match=r"\[2, 64, 4\]; one matrix \[K, N\] at a time"):
    to_bitsandbytes(quantize(weight((2, 64, 4))))


def test_our_blocks_do_not_cross_rows_as_those_of_bitsandbytes_would():
  with pytest.raises(ValueError, match="in 100 is not a multiple of block_size 64: bitsandbytes'"):
    to_bitsandbytes(quantize(weight((100, 5))))
  q = quantize(weight((96, 5)), block_size=48)
  with pytest.raises(ValueError, match="block_size 48; bitsandbytes has 32, 64"):
    to_bitsandbytes(q)


def test_blocks_that_cross_rows_are_decoded_and_multiplied(shared):
  with safetensors.safe_open(
    shared / "golden" / "ondisk_formats" / "nf4_dq_ragged.safetensors", framework="numpy"
  ) as file:
    tensors = {key.removeprefix("layer."): file.get_tensor(key) for key in file.keys()}
  state = json.loads(bytes(next(x for key, x in tensors.items() if "quant_state" in key)))
  q = from_bitsandbytes(
    tensors["weight"],
    tensors["weight.absmax"],
    shape=state["shape"],
    quant_type="nf4",
    block_size=state["blocksize"],
    nested_absmax=tensors["weight.nested_absmax"],
    nested_offset=state["nested_offset"],
  )
  assert isinstance(q, FlatQuantizedTensor)
  dense = tensors["expected.dequant"].T
  assert q.shape == dense.shape and q.size == dense.size
  np.testing.assert_array_equal(dequantize(q), dense)
  x = weight((3, q.shape[0]))
  y, pull = jax.vjp(lambda x: quantized_matmul(x, q), x)
  np.testing.assert_allclose(y, x @ dense, rtol=0, atol=1e-5)
  np.testing.assert_allclose(pull(y)[0], y @ dense.T, rtol=0, atol=1e-5)
  # A stack of two, in a scan.
  stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
  assert stack.shape == (2, *q.shape)
  _, ys = jax.lax.scan(lambda c, w: (c, quantized_matmul(x, w)), None, stack)
  np.testing.assert_array_equal(ys[1], ys[0])
  # Another program than y's: JAX newer than 0.11.2 may add its products in another order.
  np.testing.assert_allclose(ys[1], y, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"quant_type": "int8"}, "quant_type 'int8'; one of nf4, fp4"),
    ({"shape": (256,)}, r"shape \[256\]; a weight is \[out, in\]"),
    ({"packed": np.zeros(127, np.uint8)}, r"packed: uint8 \[127\].*takes uint8 \[128\]"),
    ({"absmax": np.zeros(3, np.float32)}, r"absmax: float32 \[3\].*takes float32 \[4\]"),
    ({"absmax": np.zeros(4, np.uint8)}, r"absmax: uint8 \[4\].*takes float32 \[4\]"),
    ({"nested_absmax": np.zeros(1, np.float32)}, r"absmax: float32 \[4\].*takes uint8 \[4\]"),
    (
      {"absmax": np.zeros(4, np.uint8), "nested_absmax": np.zeros(1, np.float32)},
      "nested_absmax and nested_offset come together",
    ),
    (
      {
        "absmax": np.zeros(4, np.uint8),
        "nested_absmax": np.zeros(2, np.float32),
        "nested_offset": 0.0,
      },
      r"nested_absmax: float32 \[2\].*takes float32 \[1\]",
    ),
  ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
  arguments = {
    "packed": np.zeros(128, np.uint8),
    "absmax": np.zeros(4, np.float32),
    "shape": (4, 64),
    "quant_type": "nf4",
    "block_size": 64,
  }
  assert from_bitsandbytes(**arguments).shape == (64, 4)
  with pytest.raises(ValueError, match=message):
    from_bitsandbytes(**{**arguments, **changes})


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_decodes_what_we_write(kind, double):
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("bitsandbytes.functional")
  q = quantize(weight((128, 24)), codebook=kind, double_quantization=double)
  arrays = {name: torch.from_numpy(np.array(x)) for name, x in to_bitsandbytes(q).items()}
  state2 = None
  if double:
    state2 = functional.QuantState(
      absmax=arrays["nested_absmax"],
      code=torch.from_numpy(dynamic_map()),
      blocksize=256,
      dtype=torch.float32,
    )
  state = functional.QuantState(
    absmax=arrays["absmax"],
    shape=torch.Size([24, 128]),
    code=torch.from_numpy(TABLES[kind]),
    blocksize=64,
    quant_type=kind,
    dtype=torch.float32,
    offset=arrays.get("nested_offset"),
    state2=state2,
  )
  theirs = functional.dequantize_4bit(arrays["packed"], state)
  np.testing.assert_array_equal(theirs.numpy().T, dequantize(q))

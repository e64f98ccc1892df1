"""The error of every codebook on Gaussian weights, and of LoftQ and QPiSSA, beside an oracle's.

  python -m experiments.bench.quantization_error [--out FILE.json] [--oracle PATH] [--plots FOLDER]

First the mean squared error on weights from N(0, 1) of every name in `codebooks.names()`, scales of
float32 or of the format's own, by block size, with its standard error (blocks are independent,
weights of a block are not); then with bfloat16, E8M0 and doubly quantized scales. All see the same
weights, so their deviations go together. Then the relative squared error on normal weights and on
Student's t of 3 degrees of freedom of what is done beside a table: other scales, learned tables,
outliers kept in 16 bits, a rotation; in blocks of 64. Then the relative error in the Frobenius
norm, ‖W′ + s · A · B − W‖ / ‖W‖, of a quantized base without adapters, of LoftQ after one step and
after five, and of QPiSSA, in blocks of 64, on Gaussian matrices and on ones whose singular values
are k^-½; by full SVDs, as their definitions have it.

`--oracle` is the path of an `oracle.json` (its schema: shared/reference/quantization.md). Expected
values and deviations in standard errors then stand beside all but what is done beside a table. The
oracle's initializations are of two draws, which are ours too: there the largest relative difference
of the same draw stands in place of a deviation.

`--plots` writes figures (SVG; Matplotlib is needed): errors by block size, bits against errors on
either kind of weights, and all deviations in their order beside those of a normal distribution.
"""

import argparse
import functools
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from qlora_jax import codebooks, dequantize, lora_init, quantize
from qlora_jax.codebooks import Codebook
from qlora_jax.lora import Init, LoRAConfig
from qlora_jax.quantization import QuantizationConfig, quantize_by

BLOCK_SIZES = (32, 64, 128, 256)
_SEED = 0
_INITIALIZED_BLOCK = 64
# Rows of the matrix of weights: a block size divides them.
_K = 4096

# Ours → the name in the reference's codebooks.json and oracle.json.
REFERENCE = {
  "nf4": "nf4",
  "nf3": "nf3",
  "nf2": "nf2",
  "nf2_loftq": "nf2_loftq_asym",
  "nf3_loftq": "nf3_loftq_asym",
  "nf2_symmetric": "nf2_sym_loftq_irqlora",
  "nf4_symmetric": "nf4_sym_loftq",
  "fp4": "fp4_bnb",
  "e2m1": "fp4_e2m1_ocp",
  "e3m0": "fp4_e3m0",
  "e2m1_super_precision": "fp4_e2m1_sp",
  "e2m1_super_range": "fp4_e2m1_sr",
  "apot4": "apot4",
  "apot4_super_precision": "apot4_sp",
  "sf4": "sf4_nu5",
  "iq4_nl": "iq4_nl",
  "int2": "int2_sym1",
  "int2_signed": "int2_full2_signed",
  "int2_no_zero": "int2_uniform_nozero",
  "int3": "int3_sym3",
  "int3_signed": "int3_full4_signed",
  "int4": "int4_sym7",
  "int4_signed": "int4_full8_signed",
  "int4_absmax8": "int4_full8_absmax",
  "int4_absmax7_5": "int4_75",
  "int8": "int8_sym127",
  "equal_mass16": "equal_mass16_midppf",
  "equal_mass16_means": "equal_mass16_centroid",
}

# Those of which each block size has its own: ours → the oracle's family.
BY_BLOCK = {
  "af4": "af4",
  "bof4": "bof4_mse",
  "bof4s": "bof4s_mse",
  "bof4_mae": "bof4_mae",
  "bof4s_mae": "bof4s_mae",
  "bof3": "bof3_mse",
  "bof3s": "bof3s_mse",
  "bof2": "bof2_mse",
  "bof2s": "bof2s_mse",
}

# Those of which the oracle has a Monte Carlo mean alone: ours → the oracle's name and scales.
SAMPLED = {
  "int4_zero_point": ("int4_asym_intzp", "fp32"),
  "nvfp4": ("nvfp4", "e4m3+fp32 tensor"),
  "mxfp4": ("mxfp4_floor", "e8m0"),
}

# Formats of one block size.
OWN_BLOCK_SIZE = {"nvfp4": 16, "mxfp4": 32}

# Other scales: codebooks → what is asked of `quantize` → the oracle's name of it. Codes are drawn
# with the exact scale where bitsandbytes does so.
_BFLOAT16 = {"double_quantization": False, "scale_dtype": "bfloat16"}
_E8M0 = {"double_quantization": False, "scale_dtype": "e8m0"}
_DOUBLE = {"double_quantization": True}
SCALES: tuple[tuple[tuple[str, ...], dict[str, Any], str], ...] = (
  (
    ("nf4", "int4", "fp4", "e2m1", "af4", "bof4", "bof4_mae", "bof4s", "bof4s_mae"),
    _BFLOAT16,
    "bf16",
  ),
  (("nf4",), _DOUBLE, "dq_bnb_dynamic8_256_encode_fp32"),
  (("bof4s",), _DOUBLE, "dq_bnb_dynamic8_256"),
  (("nf4", "e2m1"), _E8M0, "e8m0_ceil"),
)

# What is done beside a table.
VARIANTS = {
  "NF4": {},
  "scales of least error": {"scale_rule": "mse"},
  "scales at percentile 98": {"scale_rule": "percentile", "percentile": 98.0},
  "Lloyd–Max": {"codebook": "lloyd_max4"},
  "any4": {"codebook": "any4"},
  "1% of inputs in 16 bits": {"outlier_fraction": 0.01},
  "rotated": {"rotate": True},
}
_VARIANT_COLUMNS = 256

# Of the codebooks, those that a figure has: as many as it tells apart.
_PLOTTED = ("nf4", "bof4s", "bof4", "af4", "int4", "int4_signed", "e2m1", "fp4")
_TAILS = ("normal", "student")

# The columns of the second table: the oracle's name → what it is.
METHODS = {
  "qlora": "plain",
  "loftq_T1": "LoftQ, 1 step",
  "loftq_T5": "LoftQ, 5 steps",
  "qpissa": "QPiSSA",
}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _block_errors(
  w: jax.Array, codebook: Codebook, block_size: int, scales: tuple[tuple[str, Any], ...]
) -> jax.Array:
  """The mean squared error of each block of w `[K, N]`: `[K / block_size, N]`."""
  packed = quantize(w, codebook=codebook, block_size=block_size, **dict(scales))
  return jnp.square(dequantize(packed) - w).reshape(-1, block_size, w.shape[1]).mean(1)


def codebook_error(
  w: jax.Array, codebook: Codebook, block_size: int, scales: dict[str, Any] | None = None
) -> tuple[float, float]:
  """The mean squared error on w `[K, N]`, and its standard error.

  Args:
    scales: arguments of `quantize`; the codebook's own scales where None.
  """
  given = scales or {"double_quantization": False}
  blocks = np.asarray(_block_errors(w, codebook, block_size, tuple(given.items())), np.float64)
  return float(blocks.mean()), float(blocks.std(ddof=1) / math.sqrt(blocks.size))


def expected_error(
  oracle: Any, name: str, block_size: int, scales: str | None = None
) -> tuple[float, float] | None:
  """The oracle's mean squared error and that value's standard error; None where it has no row.

  Args:
    scales: the oracle's name of the scales; the codebook's own where None.
  """
  size = str(block_size)
  if name in SAMPLED or scales:
    if name in SAMPLED:
      key, scales = SAMPLED[name]
    else:
      key = f"{BY_BLOCK[name]}_{size}" if name in BY_BLOCK else REFERENCE[name]
    row = oracle["mc"]["results"].get(key, {}).get(size, {}).get(scales)
    return row and (row["mse"], row["mse_se"])
  key = f"{BY_BLOCK[name]}(B-matched)" if name in BY_BLOCK else REFERENCE.get(name)
  row = oracle["analytic"].get(key, {}).get(size)
  return row and (row["mse"], 0.0)


def codebook_row(
  w: jax.Array,
  name: str,
  block_size: int,
  oracle: Any,
  scales: dict[str, Any] | None = None,
  family: str | None = None,
) -> dict[str, Any]:
  """What is known of a codebook at a block size; `oracle` may be None.

  Args:
    scales, family: see `SCALES`; of the codebook's own scales None.
  """
  mse, standard_error = codebook_error(w, codebooks.get(name, block_size), block_size, scales)
  row: dict[str, Any] = {
    "codebook": name if family is None else f"{name} {family.split('_')[0]}",
    "block_size": block_size,
    "mse": mse,
    "standard_error": standard_error,
  }
  if oracle and (expected := expected_error(oracle, name, block_size, family)):
    deviation = (mse - expected[0]) / math.hypot(standard_error, expected[1])
    row |= {"expected": expected[0], "deviation": deviation}
  return row


def variant_row(name: str, columns: int) -> dict[str, Any]:
  """Relative squared errors and bits of a variant; on normal weights, and with heavy tails."""
  how = {"codebook": "nf4", "double_quantization": False} | VARIANTS[name]
  config = QuantizationConfig(**how)
  found: dict[str, Any] = {"variant": name}
  for label, w in (
    ("normal", jax.random.normal(jax.random.key(_SEED), (_K, columns))),
    ("student", jax.random.t(jax.random.key(_SEED), 3.0, (_K, columns))),
  ):
    packed = quantize_by(w, config)
    error = np.square(np.asarray(dequantize(packed) - w, np.float64)).sum()
    found[label] = float(error / np.square(np.asarray(w, np.float64)).sum())
    found["bits"] = packed.bits_per_param
  return found


def matrix(size: int, spectrum: str, seed: int) -> np.ndarray:
  """`[size, size]` float32 from N(0, 1), or U · diag(k^-½) · V, U and V orthonormal.

  At 512 and seeds 0 and 1 it is the oracle's own draw, transposed: its blocks run along rows.
  """
  rng = np.random.default_rng(seed)

  def normal() -> np.ndarray:
    return rng.normal(size=(size, size))

  w = normal()
  if spectrum != "gauss":
    normal()  # The oracle draws one more ahead of the factors.
    u, v = (np.linalg.qr(normal())[0] for _ in range(2))
    w = u * np.arange(1, size + 1) ** -0.5 @ v
  return np.ascontiguousarray(w.T, np.float32)


def initialization_errors(w: np.ndarray, codebook: str, rank: int) -> dict[str, float]:
  """Relative errors of one matrix, by the names in `METHODS`."""
  rules = {"w": QuantizationConfig(codebook, _INITIALIZED_BLOCK, double_quantization=False)}

  def relative(x: np.ndarray) -> float:
    return float(np.linalg.norm(x - w) / np.linalg.norm(w))

  def start(init: Init, iterations: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The dequantized base, and it with its adapters."""
    # alpha is the rank, so that s = 1: A · B is the same for any other.
    cfg = LoRAConfig(
      rank=rank,
      alpha=float(rank),
      targets=("w",),
      init=init,
      loftq_iterations=iterations,
      svd_iterations=None,
    )
    frozen, params, _ = lora_init.initialize(
      jax.random.key(_SEED), {"w": jnp.asarray(w)}, rules, cfg
    )
    a, b = (np.asarray(params["w"][name], np.float64) for name in ("lora_a", "lora_b"))
    base = np.asarray(dequantize(frozen["w"]), np.float64)
    return base, base + a @ b

  # LoftQ's first base is q(W).
  plain, once = start("loftq")
  return {
    "qlora": relative(plain),
    "loftq_T1": relative(once),
    "loftq_T5": relative(start("loftq", 5)[1]),
    "qpissa": relative(start("pissa")[1]),
  }


def initialization_row(
  size: int, rank: int, draws: int, spectrum: str, codebook: str, oracle: Any
) -> dict[str, Any]:
  """Relative errors of each draw, and the oracle's of its own; `oracle` may be None."""
  found = [
    initialization_errors(matrix(size, spectrum, seed), codebook, rank) for seed in range(draws)
  ]
  row: dict[str, Any] = {"codebook": codebook, "spectrum": spectrum, "rank": rank, "size": size}
  row |= {name: [each[name] for each in found] for name in METHODS}
  # The oracle's matrices are 512 × 512.
  keys = [f"{spectrum}|{codebook}|r{rank}|seed{seed}" for seed in range(draws)]
  theirs = [oracle["loftq"][key] for key in keys if key in oracle["loftq"]] if oracle else []
  if theirs and size == 512:
    row["expected"] = {name: [each[name] for each in theirs] for name in METHODS}
    row["difference"] = {
      name: largest_difference(row[name], row["expected"][name]) for name in METHODS
    }
  return row


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
  """Relative, of the draws that both have, which come first."""
  return max(abs(own / other - 1) for own, other in zip(ours, theirs, strict=False))


def codebook_line(row: dict[str, Any]) -> str:
  """A row of the first table, with two dashes where nothing is expected."""
  line = f"{row['codebook']:22}{row['block_size']:5}{row['mse']:13.5g}{row['standard_error']:10.1e}"
  if "expected" not in row:
    return f"{line}{'-':>13}{'-':>8}"
  return f"{line}{row['expected']:13.5g}{row['deviation']:+8.1f}"


def initialization_lines(row: dict[str, Any]) -> list[str]:
  """A row of the second table: the mean of our draws, then the oracle's and the differences."""
  lines = []
  for whose, values in (("", row), (" (oracle)", row.get("expected"))):
    if values:
      label = f"{row['codebook']}, {row['spectrum']}{whose}"
      means = (statistics.fmean(values[name]) for name in METHODS)
      lines.append(f"{label:32}" + "".join(f"{mean:16.4f}" for mean in means))
  if "difference" in row:
    own = (row["difference"][name] for name in METHODS)
    lines.append(f"{'  largest difference':32}" + "".join(f"{value:16.0e}" for value in own))
  return lines


def plots(report: dict[str, Any]) -> dict[str, str]:
  """Name → SVG of what a report holds."""
  by_name: dict[str, list[dict[str, Any]]] = {}
  for row in report["codebooks"]:
    by_name.setdefault(row["codebook"], []).append(row)
  chosen = [name for name in _PLOTTED if len(by_name.get(name, [])) > 1]
  found = {}
  if chosen:
    found["block_sizes"] = figures.lines(
      [
        (
          name,
          [row["block_size"] for row in by_name[name]],
          [row["mse"] for row in by_name[name]],
          [row["standard_error"] for row in by_name[name]],
        )
        for name in chosen
      ],
      "block size",
      "mean squared error, N(0, 1)",
      log_x=True,
    )
  for tails in _TAILS:
    found[f"bits_{tails}"] = figures.points(
      [(row["variant"], [row["bits"]], [row[tails]], [""]) for row in report["variants"]],
      "bits a weight",
      f"relative squared error, {tails}",
    )
  deviations = sorted(
    row["deviation"] for row in report["codebooks"] + report["scales"] if "deviation" in row
  )
  if len(deviations) > 1:
    normal = statistics.NormalDist()
    places = [normal.inv_cdf((i + 0.5) / len(deviations)) for i in range(len(deviations))]
    found["deviations"] = figures.lines(
      [("found", places, deviations, None), ("normal", places, places, None)],
      "of a normal distribution",
      "deviation from the oracle, standard errors",
    )
  return found


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list]:
  def parse(text: str) -> list:
    return [kind(part) for part in text.split(",")]

  return parse


def main(argv: Sequence[str]) -> int:
  """Measures, prints both tables, and writes the JSON where `--out` says so."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench.quantization_error",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", type=Path)
  parser.add_argument("--oracle", type=Path)
  parser.add_argument("--codebooks", type=_list_of(str), default=list(codebooks.names()))
  parser.add_argument("--block_sizes", type=_list_of(int), default=list(BLOCK_SIZES))
  parser.add_argument("--weights", type=int, default=2**22, help=f"a multiple of {_K}")
  parser.add_argument("--initialized", type=_list_of(str), default=["nf4", "nf2"])
  parser.add_argument("--size", type=int, default=512, help="K and N of the initialized matrices")
  parser.add_argument("--rank", type=int, default=64)
  parser.add_argument("--draws", type=int, default=2, help="of the initialized matrices")
  parser.add_argument("--plots", type=Path, help="a folder for figures")
  arguments = parser.parse_args(argv)
  if arguments.weights < _K or arguments.weights % _K:
    parser.error(f"--weights: {arguments.weights}; a multiple of {_K}")
  if not 1 <= arguments.rank <= arguments.size:
    parser.error(f"--rank: {arguments.rank}; from 1 to --size, {arguments.size}")
  if arguments.draws < 1:
    parser.error(f"--draws: {arguments.draws}; at least 1")
  for block_size in arguments.block_sizes:
    if block_size < 1 or _K % block_size:
      parser.error(f"--block_sizes: {block_size}; a divisor of {_K}")
  # Ahead of all work. Constructed tables take a second each, and are kept.
  wanted = [
    (name, size)
    for name in arguments.codebooks
    for size in ([OWN_BLOCK_SIZE[name]] if name in OWN_BLOCK_SIZE else arguments.block_sizes)
  ]
  for name, block_size in [(name, _INITIALIZED_BLOCK) for name in arguments.initialized] + wanted:
    try:
      codebooks.get(name, block_size)
    except (ValueError, FileNotFoundError) as error:
      parser.error(str(error))
  oracle = json.loads(arguments.oracle.read_text()) if arguments.oracle else None
  if arguments.plots:
    figures.require()

  report: dict[str, Any] = {
    "command": f"{parser.prog} {' '.join(argv)}".rstrip(),
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "python": platform.python_version(),
    "seed": _SEED,
    "weights": arguments.weights,
    "codebooks": [],
    "scales": [],
    "variants": [],
    "initializations": [],
  }
  print(f"{report['device']}, JAX {report['jax']}, Python {report['python']}")
  print(f"\n{'codebook':22}{'block':>5}{'MSE':>13}{'± s.e.':>10}{'expected':>13}{'in s.e.':>8}")
  w = jax.random.normal(jax.random.key(_SEED), (_K, arguments.weights // _K))
  for name, block_size in wanted:
    report["codebooks"].append(codebook_row(w, name, block_size, oracle))
    print(codebook_line(report["codebooks"][-1]), flush=True)
  print()
  for names, scales, family in SCALES:
    for name in (name for name in names if name in arguments.codebooks):
      for block_size in arguments.block_sizes:
        row = codebook_row(w, name, block_size, oracle, scales, family)
        report["scales"].append(row)
        print(codebook_line(row), flush=True)

  print(f"\n{'':26}{'bits':>8}{'normal':>12}{'Student 3':>12}")
  for name in VARIANTS:
    row = variant_row(name, min(_VARIANT_COLUMNS, arguments.weights // _K))
    report["variants"].append(row)
    print(f"{name:26}{row['bits']:8.3f}{row['normal']:12.5f}{row['student']:12.5f}", flush=True)

  label = f"{arguments.size} × {arguments.size}, rank {arguments.rank}"
  print(f"\n{label:32}" + "".join(f"{method:>16}" for method in METHODS.values()))
  for spectrum in ("gauss", "lowrank+gauss"):
    for codebook in arguments.initialized:
      row = initialization_row(
        arguments.size, arguments.rank, arguments.draws, spectrum, codebook, oracle
      )
      report["initializations"].append(row)
      print("\n".join(initialization_lines(row)), flush=True)
  if arguments.out:
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
  if arguments.plots:
    arguments.plots.mkdir(parents=True, exist_ok=True)
    for name, svg in plots(report).items():
      (arguments.plots / f"{name}.svg").write_text(svg)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""The bench of every codebook's error, at small sizes."""

import json
import math

import jax
import numpy as np
import pytest

from experiments.bench import quantization_error
from qlora_jax import codebooks

SMALL = ["--codebooks=nf4,fp4,int4_zero_point,bof4s", "--block_sizes=64", "--weights=262144"]
SMALL += ["--initialized=nf4", "--size=64", "--rank=8", "--draws=3"]


def oracle_of(mse):
  """An oracle that is right about nothing but its schema."""
  analytic = {"nf4": mse, "fp4_bnb": 2 * mse, "bof4s_mse(B-matched)": 3 * mse}
  return {
    "analytic": {name: {"64": {"mse": value}} for name, value in analytic.items()},
    "mc": {"results": {"int4_asym_intzp": {"64": {"fp32": {"mse": mse, "mse_se": mse / 10}}}}},
    "loftq": {},
  }


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench")
  (folder / "oracle.json").write_text(json.dumps(oracle_of(0.008)))
  arguments = [*SMALL, f"--oracle={folder / 'oracle.json'}", f"--out={folder / 'out.json'}"]
  assert quantization_error.main(arguments) == 0
  return json.loads((folder / "out.json").read_text())


def test_errors_of_codebooks(report):
  rows = {row["codebook"]: row for row in report["codebooks"]}
  assert list(rows) == ["nf4", "fp4", "int4_zero_point", "bof4s"]
  # shared/reference/quantization.md, exact scales, block 64.
  assert rows["nf4"]["mse"] == pytest.approx(0.00846, rel=0.02)
  assert rows["bof4s"]["mse"] == pytest.approx(0.007352, rel=0.02)
  assert rows["fp4"]["mse"] > 1.5 * rows["nf4"]["mse"]
  assert all(0 < row["standard_error"] < 0.01 * row["mse"] for row in rows.values())


def test_deviations_are_in_standard_errors(report):
  rows = {row["codebook"]: row for row in report["codebooks"]}
  for name, expected, own in (
    ("nf4", 0.008, 0),
    ("fp4", 0.016, 0),
    ("bof4s", 0.024, 0),
    ("int4_zero_point", 0.008, 0.0008),
  ):
    row = rows[name]
    assert row["expected"] == pytest.approx(expected)
    units = math.sqrt(row["standard_error"] ** 2 + own**2)
    assert row["deviation"] == pytest.approx((row["mse"] - expected) / units)


def test_other_scales_and_variants(report):
  """Rounded scales cost little; against heavy tails a rotation and better scales help."""
  rows = {row["codebook"]: row for row in report["scales"]}
  assert rows.keys() == {
    *(f"{name} bf16" for name in ("nf4", "fp4", "bof4s")),
    *("nf4 dq", "bof4s dq", "nf4 e8m0"),
  }
  plain = {row["codebook"]: row["mse"] for row in report["codebooks"]}
  assert rows["nf4 bf16"]["mse"] == pytest.approx(plain["nf4"], rel=0.002)
  assert 1.2 < rows["nf4 e8m0"]["mse"] / plain["nf4"] < 1.6
  variants = {row["variant"]: row for row in report["variants"]}
  assert variants.keys() == quantization_error.VARIANTS.keys()
  nf4 = variants["NF4"]
  assert variants["rotated"]["student"] < 0.9 * nf4["student"]
  assert variants["rotated"]["normal"] == pytest.approx(nf4["normal"], rel=0.05)
  for name in ("scales of least error", "any4"):
    assert variants[name]["student"] < nf4["student"]
  assert variants["1% of inputs in 16 bits"]["bits"] > nf4["bits"]


def test_the_standard_error_is_that_of_repeated_draws():
  """Of the mean over blocks: what 64 draws of 128 blocks scatter by."""
  draws = [
    quantization_error.codebook_error(
      jax.random.normal(jax.random.key(i), (1024, 8)), codebooks.get("nf4"), 64
    )
    for i in range(64)
  ]
  means, errors = np.asarray(draws).T
  # The scatter of 64 is known to 9%.
  assert errors.mean() == pytest.approx(means.std(ddof=1), rel=0.3)


def test_initializations(report):
  rows = report["initializations"]
  assert [(row["codebook"], row["spectrum"]) for row in rows] == [
    ("nf4", "gauss"),
    ("nf4", "lowrank+gauss"),
  ]
  for row in rows:
    draws = zip(row["loftq_T5"], row["loftq_T1"], row["qlora"], strict=True)
    assert all(five < one < plain for five, one, plain in draws) and len(row["qlora"]) == 3
    assert "expected" not in row  # of another size than the oracle's
  # Where the spectrum falls, what is left to quantize is smaller.
  assert rows[1]["qpissa"][0] < rows[1]["loftq_T5"][0]


def test_the_matrix_has_the_spectrum_that_it_names():
  w = quantization_error.matrix(32, "lowrank+gauss", 0)
  found = np.linalg.svd(w, compute_uv=False)
  np.testing.assert_allclose(found, np.arange(1, 33) ** -0.5, rtol=1e-5)


def test_the_reference_s_oracle_has_a_row_for_every_name(shared):
  oracle = json.loads((shared / "reference" / "oracle.json").read_text())
  mapped = quantization_error.REFERENCE | quantization_error.BY_BLOCK | quantization_error.SAMPLED
  assert mapped.keys() <= set(codebooks.names())
  for name in mapped:
    own = quantization_error.OWN_BLOCK_SIZE.get(name)
    for block_size in [own] if own else quantization_error.BLOCK_SIZES:
      assert quantization_error.expected_error(oracle, name, block_size), (name, block_size)
  for names, _, family in quantization_error.SCALES:
    for name in names:
      # The oracle has powers of two at 32 and 64 alone.
      assert quantization_error.expected_error(oracle, name, 64, family), (name, family)
  assert quantization_error.expected_error(oracle, "nf4", 64) == (
    pytest.approx(0.00846, rel=1e-3),
    0,
  )
  assert quantization_error.expected_error(oracle, "mine", 64) is None


def test_without_a_row_there_are_dashes():
  row = {"codebook": "mine", "block_size": 64, "mse": 0.01, "standard_error": 1e-5}
  assert quantization_error.codebook_line(row).split() == [
    "mine",
    "64",
    "0.01",
    "1.0e-05",
    "-",
    "-",
  ]


def test_a_line_for_the_mean_of_draws_the_oracle_s_and_their_difference():
  ours = {name: [1.0, 2.0, 3.0] for name in quantization_error.METHODS}
  row = {"codebook": "nf4", "spectrum": "gauss", **ours}
  (line,) = quantization_error.initialization_lines(row)
  assert line.split() == ["nf4,", "gauss", *4 * ["2.0000"]]
  row |= {"expected": {name: [0.25, 0.75] for name in quantization_error.METHODS}}
  row |= {"difference": {name: 8.4e-8 for name in quantization_error.METHODS}}
  _, theirs, difference = quantization_error.initialization_lines(row)
  assert theirs.split() == ["nf4,", "gauss", "(oracle)", *4 * ["0.5000"]]
  assert difference.split() == ["largest", "difference", *4 * ["8e-08"]]
  assert quantization_error.largest_difference([2.0, 3.0, 9.0], [1.0, 4.0]) == 1


@pytest.mark.parametrize(
  ("spectrum", "codebook", "draws"),
  [
    ("gauss", "nf4", 2),
    *(
      pytest.param(spectrum, codebook, 1, marks=pytest.mark.slow)
      for spectrum in ("gauss", "lowrank+gauss")
      for codebook in ("nf2", "nf4")
      if (spectrum, codebook) != ("gauss", "nf4")
    ),
  ],
)
def test_the_oracle_s_own_draws_have_its_errors(shared, spectrum, codebook, draws):
  """To float32's rounding, of which a code on a tie makes more in five rounds."""
  oracle = json.loads((shared / "reference" / "oracle.json").read_text())
  row = quantization_error.initialization_row(512, 64, draws, spectrum, codebook, oracle)
  assert all(len(values) == draws for values in row["expected"].values())
  assert row["difference"].pop("loftq_T5") < 1e-3
  assert max(row["difference"].values()) < 1e-5


def test_plots(report):
  pytest.importorskip("matplotlib")
  rows = report["codebooks"]
  larger = [{**row, "block_size": 128} for row in rows]
  found = quantization_error.plots({**report, "codebooks": rows + larger})
  assert found.keys() == {"block_sizes", "bits_normal", "bits_student", "deviations"}
  assert "int4_zero_point" not in found["block_sizes"] and "bof4s" in found["block_sizes"]
  assert "any4" in found["bits_normal"]


@pytest.mark.parametrize(
  "argument, message",
  [
    ("--weights=5000", "--weights: 5000; a multiple of 4096"),
    ("--block_sizes=48", "--block_sizes: 48; a divisor of 4096"),
    ("--codebooks=nf5", "codebook 'nf5': no such table; did you mean nf4?"),
    ("--rank=600", "--rank: 600; from 1 to --size, 512"),
    ("--draws=0", "--draws: 0; at least 1"),
  ],
)
def test_arguments_that_make_no_sense(argument, message, capsys):
  with pytest.raises(SystemExit):
    quantization_error.main([argument])
  assert message in capsys.readouterr().err

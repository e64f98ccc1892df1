"""The bench of inits that decompose weights, on a tiny model's shapes."""

import json

import jax
import numpy as np
import pytest

from experiments.bench import initialization


@pytest.mark.slow
def test_a_report(tmp_path):
  out = tmp_path / "out.json"
  arguments = ["--model=tiny", "--inits=loftq", "--rank=4", "--codebook=nf2", f"--out={out}"]
  assert initialization.main(arguments) == 0
  report = json.loads(out.read_text())
  # q, k, v, o, gate, up, down of two layers; k and v are 64 × 32.
  assert report["matrices"] == 14
  assert report["weights"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
  (found,) = report["inits"]
  assert found["seconds_of_a_matrix"].keys() == {"64 x 64", "64 x 32", "64 x 128", "128 x 64"}
  assert 0 < found["seconds"] < found["seconds_with_compiling"]
  # LoftQ's error is below that of rounding alone (.57 in blocks of 64), and randomized SVDs of
  # so small matrices lose nothing to speak of.
  assert found["relative_error"] < 0.56
  assert found["relative_error"] == pytest.approx(found["relative_error_of_full_svds"], rel=0.02)


def test_a_matrix_is_drawn_again_alike():
  leaf = initialization.Drawn(jax.random.key(0), (3, 256, 16))
  np.testing.assert_array_equal(leaf[(1,)], leaf[1])
  assert not np.array_equal(leaf[0], leaf[1])
  assert float(leaf[2].std()) == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--inits=eva", "--inits: eva; of those that weights alone give"),
    ("--inits=loftk", "did you mean loftq?"),
    ("--rank=0", "rank: 0; a rank is at least 1"),
  ],
)
def test_arguments_that_make_no_sense(argument, message, capsys):
  with pytest.raises(SystemExit):
    initialization.main(["--model=tiny", argument])
  assert message in capsys.readouterr().err

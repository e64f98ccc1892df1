"""The plan's command line."""

import json

import pytest

from experiments import plan

ARGUMENTS = [
  "--config=configs/quickstart.py",
  "--model=tiny",
  "--config.train.batch_size=3",
  "--config.data.seq_len=512",
  "--config.pretrain.max_position_embeddings=512",
]


def test_a_plan_is_printed_and_written(tmp_path, capsys):
  out = tmp_path / "plan.json"
  assert plan.main([*ARGUMENTS, "--device=v5e", "--memory_gb=0.03", f"--json={out}"]) == 0
  text = capsys.readouterr().out
  rows = {row["remat"]: row for row in json.loads(out.read_text())}
  # A link of unknown speed: nothing is said of what waits on the host.
  assert list(rows) == ["full", "mlp", "elementwise", "none"]
  assert "3 × 512 tokens a step, v5e" in text
  assert "fitted on an H100 alone" in text
  for row in rows.values():
    assert row["fits"] == (row["peak_bytes"] <= plan.USABLE * 0.03e9)
    assert row["fits"] == (row["largest_batch"] >= 3)
    assert row["tokens_per_second"] == pytest.approx(3 * 512 / row["step_seconds"])
  assert rows["full"]["longest"] > rows["none"]["longest"]
  fastest = min((r for r in rows.values() if r["fits"]), key=lambda row: row["step_seconds"])
  assert f"fastest that fits: {fastest['remat']}; 100 steps" in text


def test_what_is_not_counted_is_named(capsys):
  assert plan.main([*ARGUMENTS, "--config.train.eval_batch_size=4"]) == 0
  text = capsys.readouterr().out
  assert "train.compare_16bit trains on the base in 16 bits as well" in text
  assert "evaluations of 4 rows" in text
  alone = ["--config.model.quantize=False", "--config.train.compare_16bit=False"]
  assert plan.main([*ARGUMENTS, *alone, "--config.train.eval_batch_size=3"]) == 0
  assert "not counted" not in capsys.readouterr().out.replace("which is not counted here", "")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--device=h1000", "--device: 'h1000'; one of h100, "),
    ("--model=llama-9b", "--model: 'llama-9b'; one of llama-8b, "),
    ("--fit=/nowhere/train.json", "No such file"),
  ],
)
def test_what_cannot_be_planned(argument, message, capsys):
  assert plan.main([*ARGUMENTS, argument]) == 2
  assert message in capsys.readouterr().err

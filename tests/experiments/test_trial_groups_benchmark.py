"""The benchmark of many trials in one program: its rows, and one at toy size."""

import json

import pytest

from experiments.bench import train_step, trial_groups


def test_a_row_is_read():
  row = trial_groups.Row.parse("llama-1b:32x128:elementwise:r8:c256")
  assert row == trial_groups.Row("llama-1b", 32, 128, "elementwise", rank=8, loss_chunk=256)
  assert (row.as_batch.batch_size, row.as_batch.seq_len) == (32, 128)
  one, other = (trial_groups.Row.parse(f"tiny:{n}x128:none") for n in (1, 4))
  assert one.single == other.single != row.single
  assert trial_groups.Row.parse("tiny:1x128:none:f32").single != one.single
  for text in trial_groups.ROWS:
    trial_groups.Row.parse(text)


@pytest.mark.parametrize("trials", [1, 2])
def test_a_row_whose_layers_are_in_a_row(trials):
  def layers(option):
    row = trial_groups.Row.parse(f"tiny:{trials}x16:elementwise:r2:c8:f32{option}")
    step, arguments = trial_groups.build(row)
    return str(step.trace(*arguments).jaxpr).count("prevent_cse=True")

  assert layers("") == 0
  assert layers(":unroll") == train_step.architecture("tiny").num_layers


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("tiny:4x32", "no row; MODEL:BxT:REMAT"),
    ("tiny:4x32:none:r0", "'r0'; behind it stand :rR and :cC"),
    ("tiny:4x32:none:16bit", "'16bit'; behind it"),
  ],
)
def test_what_is_no_row(text, message):
  with pytest.raises(ValueError, match=message):
    trial_groups.Row.parse(text)


def test_a_line_compares_with_one_trial():
  found = {
    "tokens_per_second": 600.0,
    "tokens_per_second_with_compiling": 90.0,
    "limit": 0.25,
    "next": "optimizer",
    "parts_seconds": {"optimizer": 1.0},
    "step_seconds": [3.9, 4.0, 4.1],
    "peak_bytes": 2e9,
  }
  single = {"tokens_per_second": 200.0, "tokens_per_second_with_compiling": 10.0}
  line = trial_groups.line("tiny:4x32:none", found, single)
  assert (
    line.split()
    == (
      "tiny:4x32:none 600 tok/s 3.00× 9.00× compiled 2.00 GB products 0.25, then optimizer 0.25"
    ).split()
  )
  assert "×" not in trial_groups.line("tiny:4x32:none", found, None)
  assert "failed: no memory" in trial_groups.line("tiny", {"error": "no memory"}, None)


def test_a_group_is_compared_with_the_fastest_trial_before_it(monkeypatch, capsys):
  speeds = {"1x16:none": 100.0, "1x16:full": 50.0, "4x16:full": 300.0, "1x16:none:f32": 40.0}

  def child(command, environment):
    speed = speeds[command[3].removeprefix("tiny:")]
    return {
      "tokens_per_second": speed,
      "tokens_per_second_with_compiling": speed,
      "limit": 0.5,
      "next": "logits",
      "parts_seconds": {"logits": 0.1},
      "step_seconds": [1.0],
      "peak_bytes": None,
    }

  monkeypatch.setattr(trial_groups.train_step, "child", child)
  asked = []
  monkeypatch.setattr(
    trial_groups.train_step, "peer", lambda row: asked.append(row) or {"error": "none here"}
  )
  rows = ["tiny:1x16:none", "tiny:1x16:none:unroll", "tiny:1x32:none"]
  speeds |= {"1x16:none:unroll": 90.0, "1x32:none": 1.0}
  assert trial_groups.main([*rows, "--peer"]) == 0
  assert [row.seq_len for row in asked] == [16, 32]
  capsys.readouterr()
  speeds = {row: speed for row, speed in speeds.items() if f"tiny:{row}" not in rows[1:]}
  assert trial_groups.main([f"tiny:{row}" for row in speeds]) == 0
  ratios = [line.split()[3] for line in capsys.readouterr().out.splitlines()]
  assert ratios == ["1.00×", "0.50×", "3.00×", "1.00×"]


@pytest.mark.slow
def test_a_toy_group(capsys):
  assert trial_groups.main(["tiny:3x16:elementwise:r2:c8:f32", "--here"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert len(found["first_losses"]) == 3
  assert all(b < a for a, b in zip(found["first_losses"], found["last_losses"], strict=True))
  assert found["least_gradient_norm"] > 0
  assert found["tokens_per_second_with_compiling"] < found["tokens_per_second"]
  # Adapters of rank 2 on seven projections of two layers, for each trial.
  widths = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
  assert found["trained_parameters"] == 3 * 2 * 2 * widths

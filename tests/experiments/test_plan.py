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
  assert plan.main([*ARGUMENTS, "--device=v5e", "--memory_gb=0.1", f"--json={out}"]) == 0
  text = capsys.readouterr().out
  rows = {row["remat"]: row for row in json.loads(out.read_text())}
  # A link of unknown speed: nothing is said of what waits on the host.
  assert list(rows) == ["full", "mlp", "elementwise", "none"]
  assert "3 × 512 tokens a step, v5e" in text
  assert "fitted on an H100 alone" in text
  for row in rows.values():
    assert row["fits"] == (row["peak_bytes"] <= plan.USABLE * 0.1e9)
    assert row["fits"] == (row["largest_batch"] >= 3)
    assert row["tokens_per_second"] == pytest.approx(3 * 512 / row["step_seconds"])
  assert rows["full"]["longest"] > rows["none"]["longest"]
  fastest = min((r for r in rows.values() if r["fits"]), key=lambda row: row["step_seconds"])
  assert f"fastest that fits: {fastest['remat']}; 100 steps" in text


def test_a_time_that_is_not_known(tmp_path, capsys):
  out = tmp_path / "plan.json"
  words = ["--device=v5e", "--config.optimizer.state=host", "--config.model.attention=blockwise"]
  assert plan.main([*ARGUMENTS, *words, f"--json={out}"]) == 0
  text = capsys.readouterr().out
  assert "fastest that fits: elementwise\n" in text
  assert "no time is said: the optimizer's state (optimizer.state) crosses v5e's link" in text
  assert "NaN" not in out.read_text() and "nan" not in text
  for row in json.loads(out.read_text()):
    assert row["step_seconds"] is row["tokens_per_second"] is row["seconds"]["host"] is None
    assert row["seconds"]["products"] > 0


def test_cudnn_by_name(capsys):
  words = [*ARGUMENTS, "--config.model.attention=cudnn", "--config.model.dtype=bfloat16"]
  assert plan.main([*words, "--config.data.packing=False"]) == 0
  assert "attention is" not in capsys.readouterr().out
  for device, packing, reason in (
    ("v5e", False, "the device is no NVIDIA GPU of capability 8.0 or more"),
    ("l4", True, "rows of several segments, which it takes on Hopper and later"),
  ):
    assert plan.main([*words, f"--device={device}", f"--config.data.packing={packing}"]) == 2
    assert f"error: attention: 'cudnn' cannot serve this: {reason}" in capsys.readouterr().err


def test_what_is_not_counted_is_named(capsys):
  assert plan.main([*ARGUMENTS, "--config.train.eval_batch_size=4"]) == 0
  text = capsys.readouterr().out
  assert "train.compare_16bit trains on the base in 16 bits as well" in text
  assert "evaluating 4 rows at a time takes 0.0" in text
  assert "attention is plain here" in text
  alone = ["--config.model.quantize=False", "--config.train.compare_16bit=False"]
  assert "model.unroll" not in text
  row = "--config.model.unroll=True"
  assert plan.main([*ARGUMENTS, *alone, row, "--config.train.eval_batch_size=3"]) == 0
  assert "bytes and times are those of a loop over the layers" in capsys.readouterr().out
  assert plan.main([*ARGUMENTS, *alone, "--config.train.eval_batch_size=3"]) == 0
  assert "not counted" not in capsys.readouterr().out.replace("which is not counted here", "")


MEASURED = "experiments/bench/train_step_h100.json"


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--device=h1000", "--device: 'h1000'; one of h100, "),
    ("--model=llama-9b", "--model: 'llama-9b'; one of llama-8b, "),
    ("--memory_gb=-3", "--memory_gb: '-3'; a number above 0"),
    ("--memory_gb=nan", "--memory_gb: 'nan'; a number above 0"),
    ("--host_memory_gb=x", "--host_memory_gb: 'x'; a number above 0"),
    ("--memory_gb", "--memory_gb: expected one argument"),
    ("--memory=24", "--memory: no such flag; did you mean --memory_gb?"),
    ("--workdir=runs/x", "--workdir: no such flag"),
    ("--lora.rank=8", "--lora.rank: no such flag; did you mean --config.lora.rank?"),
    ("--json=", "--json: ''; the name of a file"),
    ("--json=/", "--json: '/'; the name of a file"),
    ("--json=/nowhere/plan.json", "--json: /nowhere/plan.json; there is no directory /nowhere"),
    (f"--fit={MEASURED}", "--fit: with --config"),
  ],
)
def test_what_cannot_be_planned(argument, message, capsys):
  assert plan.main([*ARGUMENTS, argument]) == 2
  assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--fit=/nowhere/train.json"], "No such file"),
    (["--fit="], "--fit: ''; the name of a file"),
    (["--fit=README.md"], "README.md: no JSON: Expecting value"),
    ([f"--fit={MEASURED}", "--device=h100"], "--fit: with --device; it plans nothing"),
    ([f"--fit={MEASURED}", "--config.lora.rank", "8"], "--fit: with --config.lora.rank"),
    ([f"--fit={MEASURED}", "stray"], "'stray': not a flag"),
    (["--fit", "{other}"], "not what experiments.bench.train_step --out writes: 'rows'"),
    (["--fit", "{lacking}"], "tiny:1x2:none: its measures lack some of base_bytes, "),
    (["--fit", "{row}"], "tiny:1x2:none:unroll: the plan counts a loop over the layers"),
    (["--fit", "{failed}"], "0 rows do not determine three constants"),
  ],
)
def test_what_cannot_be_fitted(words, message, tmp_path, capsys):
  whole = {"device": "x", "base_bytes": 1, "temporary_bytes": 1, "step_seconds": [1.0]}
  files = {
    "other": ["rows"],
    "lacking": [{"row": "tiny:1x2:none", "ours": {"device": "x"}}],
    "row": [{"row": "tiny:1x2:none:unroll", "ours": whole}],
    "failed": [{"row": "tiny:1x2:none", "ours": {"error": "x"}}],
  }
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  assert plan.main([w.format(**{n: tmp_path / n for n in files}) for w in words]) == 2
  assert message in capsys.readouterr().err


def test_a_trial_of_a_sweep_is_planned(tmp_path, monkeypatch, capsys):
  config = tmp_path / "sweep.py"
  config.write_text(
    "from configs import quickstart\n"
    "get_config = quickstart.get_config\n"
    "def sweep():\n"
    "  yield {'train.batch_size': 3}\n"
    "  yield {'train.batch_size': 5}\n"
  )
  monkeypatch.setattr(plan, "planner", lambda *_: None)
  monkeypatch.setattr(plan, "table", lambda *_: [])
  monkeypatch.setattr(plan, "text", lambda config, *_: f"{config.train.batch_size} rows")
  for words, rows, differs in (([], 8, True), (["--index", "1"], 5, False)):
    assert plan.main([f"--config={config}", "--model", "tiny", *words]) == 0
    found = capsys.readouterr().out
    assert found.startswith(f"{rows} rows")
    assert ("its trials may differ" in found) == differs


def test_help_is_the_plans(capsys):
  with pytest.raises(SystemExit) as stopped:
    plan.main(["--help"])
  assert not stopped.value.code
  assert "python -m experiments.plan [-h]" in capsys.readouterr().out

"""Every code block of the README runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import convert
from qlora_jax import hf
from qlora_jax.models import families
from qlora_jax.models.transformer import Transformer, TransformerConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHORT = ["--config.train.steps=2", "--config.optimizer.warmup_steps=1"]


def test_no_block_escapes():
  assert {language for language, _ in BLOCKS} == {"bash", "python", "text"}
  for language, text in BLOCKS:
    if language == "bash" and "-m experiments." not in text:
      # Set-up: .ci/run runs the marked blocks as they stand.
      assert re.search(rf"<!-- ci: [\w-]+ -->\n```bash\n{re.escape(text)}", README)
  assert not re.search(r"\b[A-Z]+_(TABLE|LINE)\b", README), "a placeholder"


@pytest.mark.slow
def test_python_blocks(tmp_path, monkeypatch, capsys, request):
  monkeypatch.chdir(tmp_path)
  # A block adds a family.
  request.addfinalizer(lambda: families.FAMILIES.pop("seed_oss", None))
  config = TransformerConfig(64, 32, 48, 2, 2, 1, 16)
  model = Transformer(config, dtype=jnp.float32)
  dense = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["frozen"]
  (tmp_path / "path/to").mkdir(parents=True)
  hf.save(tmp_path / "path/to/llama", model, dense, dtype=jnp.float32)
  namespace = {}
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Optax mixes
    for language, text in BLOCKS:
      # tests/interop runs the block that needs a package of others'.
      if language == "python" and "from gemma" not in text:
        exec(text, namespace)
  assert capsys.readouterr().out.startswith("4.")
  assert namespace["logits"].shape == (1, 4, 64)
  raw = {"model_type": "seed_oss", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 9}
  raw |= {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
  added = families.read_config(raw)
  assert added.attention_bias and not added.output_bias and added.head_dim == 8
  assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
  assert (tmp_path / "merged" / "model.safetensors").exists()


def commands() -> list[list[str]]:
  """The commands of the bash blocks but those that install and run pytest, which CI runs."""
  lines = []
  for language, text in BLOCKS:
    if language == "bash":
      lines += [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
  return [line for line in lines if "-m" in line and line[2] == "experiments.run"]


# The first of them: the block that .ci/run runs by its mark.
MAIN_JOB = commands()[0]


def test_conversions(shared, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  text = next(text for language, text in BLOCKS if "experiments.convert" in text)
  for line in text.replace("\\\n", " ").splitlines():
    words = shlex.split(line)[3:]
    words = [str(tmp_path / word) if word.startswith("runs/") else word for word in words]
    words = [word.replace("../shared", str(shared)) for word in words]
    assert convert.main(words) == 0, capsys.readouterr().err
  found = capsys.readouterr().out
  block = next(text for language, text in BLOCKS if "logits of a sample" in text)
  # The figures that the README shows; the last digit may differ by machine.
  for shown, printed in zip(
    re.findall(r"up to (\S+)", block), re.findall(r"up to (\S+)", found), strict=True
  ):
    assert abs(float(shown) / float(printed) - 1) < 0.02


def test_the_commands_are_found():
  block = README.partition("<!-- ci: main-job -->\n```bash\n")[2].partition("```")[0]
  assert shlex.join(MAIN_JOB) in block
  assert [line[4] for line in commands()] == [
    "configs/quickstart.py",
    "configs/stories.py",
    "configs/quickstart.py",
    *["configs/ablate.py"] * 3,
    "configs/ablate_own.py",
  ]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands(), ids=lambda line: Path(line[4]).stem)
def test_bash_blocks(command, tmp_path):
  if os.environ.get("CI") == "true" and command == MAIN_JOB:
    pytest.skip("CI=true: .ci/run has run the main job as it stands, before it runs the tests")
  for argument in command:
    _, _, path = argument.partition("=")
    if path.startswith("../shared") and not (ROOT / path).exists():
      pytest.skip(f"{path} is not here")
  extra = SHORT if "--dry_run" in command else [*SHORT, "--workdir", str(tmp_path / "run")]
  if "quickstart" in command[4]:
    extra = [*extra, "--config.pretrain.steps=2", "--config.pretrain.num_documents=50"]
    extra = [*extra, "--config.data.num_documents=50"]
  if "stories" in command[4]:
    extra = [*extra, "--config.data.holdout=0.01"]
  if "ablate" in command[4]:
    # tests/experiments/test_sweep.py runs a sweep, and an index of one.
    command = [*command[:7], *([] if "--index" in command else command[7:])]
    extra = [] if "--list" in command else ["--list"]
  result = subprocess.run(
    [sys.executable, *command[1:], *extra],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "QLORA_JAX_CACHE": str(tmp_path / "cache")},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  expected = "adapters" if "--dry_run" in command else "after QLoRA, rank 8"
  listed = "--list" in [*command, *extra]
  assert ("trials share the base" if listed else expected) in result.stdout

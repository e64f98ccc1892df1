import dataclasses
import os
import re
import subprocess
import sys
import textwrap

import pytest

from experiments import command_line
from qlora_jax import config as config_lib

CONFIG = """
  from qlora_jax import config as config_lib

  def get_config():
    config = config_lib.defaults()
    config.name = "test"
    config.pretrain.steps = 10
    config.data.synthetic = "manuals"
    config.data.seq_len = 128
    config.lora.alpha = 3.0
    return config
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes config files into a directory of their own, which is where the command is run."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()

  def write(name, text=CONFIG):
    (tmp_path / "configs" / name).write_text(textwrap.dedent(text).lstrip())
    return f"configs/{name}"

  return write


@pytest.fixture
def file(write):
  return write("small.py")


def error_of(capsys, *argv):
  """The one line on stderr that a command ends with, without its `error: `."""
  with pytest.raises(SystemExit) as exit:
    command_line.parse(argv)
  captured = capsys.readouterr()
  assert exit.value.code == 2
  assert captured.out == ""
  assert captured.err.count("\n") == 1
  assert captured.err.startswith("error: ")
  return captured.err.removeprefix("error: ").rstrip("\n")


def test_a_config_file(file):
  arguments = command_line.parse(["--config", file])
  assert arguments == command_line.Arguments(
    config=arguments.config, config_file=file, workdir=None, dry_run=False
  )
  config = arguments.config
  assert (config.name, config.pretrain.steps, config.lora.alpha) == ("test", 10, 3.0)
  assert config.train == config_lib.TrainConfig()
  assert command_line.parse([f"--config={file}"]) == arguments


def test_everything_else(file):
  arguments = command_line.parse(["--workdir", "runs/a b", "--dry_run", f"--config={file}"])
  assert (arguments.workdir, arguments.dry_run) == ("runs/a b", True)
  assert command_line.parse([f"--config={file}", "--nodry_run"]).dry_run is False


def test_a_config_file_that_returns_a_finished_config(write):
  file = write(
    "finished.py",
    """
    from qlora_jax.config import DataConfig, ExperimentConfig, ModelConfig

    def get_config():
      return ExperimentConfig(
        name="x", model=ModelConfig(path="m"), data=DataConfig(path="t.txt")
      )
    """,
  )
  config = command_line.parse(["--config", file, "--config.model.path=n"]).config
  assert (config.model.path, config.data.path) == ("n", "t.txt")


@pytest.mark.parametrize(
  ("arguments", "path", "value"),
  [
    (["--config.lora.rank=16"], "lora.rank", 16),
    (["--config.lora.rank", "16"], "lora.rank", 16),
    (["--config.lora.rank=4", "--config.lora.rank=16"], "lora.rank", 16),
    (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
    (["--config.optimizer.clip_norm=None"], "optimizer.clip_norm", None),
    (["--config.train.compare_16bit=false"], "train.compare_16bit", False),
    (["--config.data.packing"], "data.packing", True),
    (["--noconfig.train.compare_16bit"], "train.compare_16bit", False),
    (["--config.lora.targets=*/q,*/k"], "lora.targets", ("*/q", "*/k")),
    (["--config.lora.rank_pattern={'*/q': 4}"], "lora.rank_pattern", {"*/q": 4}),
    (["--config.name=other"], "name", "other"),
  ],
)
def test_overrides(file, arguments, path, value):
  """Ahead of --config and after it; nothing else changes."""
  before = command_line.parse(["--config", file]).config
  now = command_line.parse([*arguments, "--config", file]).config
  assert command_line.parse(["--config", file, *arguments]).config == now
  found = now
  for part in path.split("."):
    found = getattr(found, part)
  assert found == value
  (line,) = config_lib.differences(before, now)
  assert line.startswith(f"{path}: ")


def test_every_field_is_a_flag(file):
  """Given its own value again, as text, each field stays as it was."""
  config = command_line.parse(["--config", file]).config
  argv = ["--config", file]
  for path in config_lib.fields():
    value = config
    for part in path.split("."):
      value = getattr(value, part)
    argv.append(f"--config.{path}={value}")
  assert command_line.parse(argv).config == config


def test_overrides_that_need_each_other(file):
  config = command_line.parse(
    ["--config", file, "--config.data.path=a.txt", "--config.data.synthetic=None"]
  ).config
  assert (config.data.path, config.data.synthetic) == ("a.txt", None)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.lora.rnak=8", "lora.rnak: no such field; did you mean rank?"),
    ("--noconfig.train.compare_16bits", "train.compare_16bits: no such field; did you mean com"),
    ("--config.lora=8", "lora: a section; set its fields one by one, as in lora.rank"),
    ("--config.rank=8", "rank: no such field; did you mean lora.rank?"),
    ("--config.lora.rank=x", "lora.rank: 'x'; a value of type int is needed"),
    ("--config.lora.rank=0", "lora.rank: 0; a rank is at least 1"),
    ("--config.lora.rank_pattern=x", "lora.rank_pattern: 'x'; a value of type dict[str, int]"),
    ("--config.train.compare_16bit=maybe", "train.compare_16bit: 'maybe'; a value of type bool"),
    ("--config.model.dtype=bf16", "model.dtype: 'bf16'; one of 'bfloat16', 'float32', 'float16'"),
    ("--config.lora.rank", "Missing value for flag --config.lora.rank"),
    ("--noconfig.lora.rank", "--noconfig.lora.rank: only a bool is switched off; lora.rank is int"),
    ("--config.data.path=x", "data.path: 'x'; there is one text"),
    ("--wrokdir=x", "--wrokdir: no such flag; did you mean --workdir?"),
    ("--lora.rank=8", "--lora.rank: no such flag; did you mean --config.lora.rank?"),
    ("--zzz", "--zzz: no such flag; --help lists what there is"),
    ("--workdir=", "--workdir: ''; a path is needed"),
    ("--dry_run=maybe", "flag --dry_run=maybe; true or false is needed"),
    ("stray", "'stray': not a flag; flags are --name=value, and --help lists them"),
    ("--flagfile=missing", "ERROR:: Unable to open flagfile"),
  ],
)
def test_wrong_arguments(file, capsys, argument, message):
  assert error_of(capsys, "--config", file, argument).startswith(message)
  assert error_of(capsys, argument, "--config", file).startswith(message) or argument in (
    "--config.lora.rank",  # takes the next argument for its value
  )


def test_no_config(capsys):
  assert error_of(capsys).startswith("--config: missing; a Python file with get_config()")
  assert error_of(capsys, "--config=").startswith("--config: ''; a path is needed")


def test_a_missing_config_file(write, capsys):
  write("quickstart.py")
  write("stories.py")
  write("__init__.py", "")
  assert error_of(capsys, "--config=configs/quikstart.py") == (
    "configs/quikstart.py: no such file; did you mean configs/quickstart.py?"
  )
  assert error_of(capsys, "--config=configs/zzzzzz") == (
    "configs/zzzzzz: no such file; configs has quickstart.py, stories.py"
  )
  assert error_of(capsys, "--config=configs") == (
    "configs: a directory; a config is a Python file; configs has quickstart.py, stories.py"
  )
  assert error_of(capsys, "--config=cfg/a.py") == (
    f"cfg/a.py: no such file; there is no directory cfg, seen from {os.getcwd()}"
  )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1", ": no get_config(); a config file defines one"),
    ("def getconfig(): pass", ": no get_config(); a config file defines one; did you mean getc"),
    ("get_config = 3", ": no get_config(); a config file defines one"),
    ("def get_config():\n  return 3", ": int; get_config() returns a ConfigDict, such as"),
    ("def get_config(): pass", ": NoneType; get_config() returns a ConfigDict, such as"),
    ("x = (", ":1: SyntaxError: '(' was never closed"),
    ("x = 1\nimport no_such_module", ":2: ModuleNotFoundError: No module named 'no_such_module'"),
    (
      "def f():\n  raise ValueError('a\\nb')\n\ndef get_config():\n  f()",
      ":2: ValueError: a b",
    ),
    (
      "import ml_collections\n\ndef get_config():\n"
      "  config = ml_collections.ConfigDict({'lora': {}})\n  config.lroa.rank = 3",
      ":5: AttributeError: 'lroa' Did you mean",
    ),
    (
      "from qlora_jax import config\n\ndef get_config():\n"
      "  return config.ExperimentConfig(name='x')",
      ":4: ConfigError: model.path: None; a Hugging Face directory is needed",
    ),
    (
      "from qlora_jax import config\n\ndef get_config():\n"
      "  draft = config.defaults()\n  draft.lora.rnak = 3\n  return draft",
      "lora.rnak: no such field; did you mean rank?",
    ),
  ],
)
def test_a_config_file_that_does_not_work(write, capsys, text, message):
  file = write("broken.py", text)
  expected = file + message if message.startswith(":") else message
  assert error_of(capsys, "--config", file).startswith(expected)


def test_a_file_that_is_not_python(write, capsys):
  file = write("notes.txt", "x")
  assert error_of(capsys, "--config", file) == f"{file}: not a Python file; its name ends in .py"


@pytest.mark.parametrize("flag", ["--help", "-h", "--help=true"])
def test_help_lists_every_field(capsys, flag):
  with pytest.raises(SystemExit) as exit:
    command_line.parse([flag])
  assert exit.value.code == 0
  text = capsys.readouterr().out
  for path, field in config_lib.fields().items():
    line = rf"^  --config\.{re.escape(path)} +{re.escape(field.type_name)}, "
    assert re.search(line + re.escape(repr(field.default)) + "$", text, re.MULTILINE), path
    assert field.help in text
  names = {field.name for field in dataclasses.fields(command_line.Arguments)}
  for name in names - {"trials"}:  # of the config file
    assert f"--{name.removesuffix('_file')}" in text


def test_help_shows_the_values_of_a_config_file(file, capsys):
  with pytest.raises(SystemExit):
    command_line.parse(["--config", file, "--help"])
  text = capsys.readouterr().out
  assert re.search(r"--config\.lora\.alpha +float, 3\.0$", text, re.MULTILINE)
  assert f"value in {file}" in text


def test_in_a_process_of_its_own(file, tmp_path):
  """No global flag of absl's, and none of another library's, is in the way."""
  program = """
    import sys
    from experiments import command_line
    print(command_line.parse(sys.argv[1:]).config.lora.rank)
  """
  root = os.path.dirname(os.path.dirname(os.path.abspath(command_line.__file__)))

  def run(*argv):
    return subprocess.run(
      [sys.executable, "-c", textwrap.dedent(program), *argv],
      capture_output=True,
      text=True,
      timeout=120,
      env=os.environ | {"PYTHONPATH": root},
      cwd=tmp_path,
    )

  good = run("--config.lora.rank=5", "--config", file)
  assert (good.returncode, good.stdout, good.stderr) == (0, "5\n", "")
  bad = run("--config", file, "--config.lora.rnak=5")
  message = "error: lora.rnak: no such field; did you mean rank?\n"
  assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", message)

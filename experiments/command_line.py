"""The command line of an experiment: one config file, and overrides of single fields.

  python -m experiments.run --config configs/quickstart.py --config.lora.rank=8 --workdir runs/a

Every field of `ExperimentConfig` is an absl flag, generated from the dataclasses, so that names,
types, defaults and suggestions have one source. absl splits the arguments (`--name=value`, `--name
value`, `--flag`, `--noflag`, in any order); `qlora_jax.config` reads the values.

`ml_collections.config_flags` does the same for any ConfigDict, and was tried first (1.1.0). It
cannot set a float field back to None; it refuses an override ahead of `--config`; it lets
`--config.lora="{'rank': 3}"` replace a section, and so drops what the config file said of the
rest; and a misspelled key ends in a traceback.
"""

import dataclasses
import difflib
import importlib.util
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from qlora_jax import config as config_lib
from qlora_jax import sweeps

PROGRAM = "python -m experiments.run"

_FLAGS = {
  "config": "a Python file with get_config(), such as configs/quickstart.py",
  "config.FIELD": "sets one field of the config; the fields are listed below",
  "workdir": "directory of the run; an existing one goes on where it stopped",
  "dry_run": "print the config, every weight's treatment and the bytes, and stop",
  "list": "of a config with sweep(): name the trials, how they stand, what they share, and stop",
  "index": "of a config with sweep(): run one trial, by its place, as an array job does",
  "ray": "of a config with sweep(): send the trials to the Ray cluster at $RAY_ADDRESS, or here",
  "group_size": "of a config with sweep(): at most so many trials train in one program, or 'auto'",
  "halving": "of a config with sweep(): one setting in so many goes on at each rung",
  "help": "print this text and stop; after --config, with that file's values",
}


class UsageError(Exception):
  """What a user typed cannot be run; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Arguments:
  """What the command line asks for.

  Attributes:
    config: complete and checked; of a sweep, what its trials differ from.
    config_file: path it came from, as typed.
    workdir: directory of the run, as typed, or None.
    dry_run: describe the run instead of running it.
    trials: of the config's `sweep()`, or None where it has none.
    list: name the trials instead of running them.
    index: of the only trial to run, or None.
    ray: run the trials on a Ray cluster.
    group_size: of trials that train in one program at most; None to choose it.
    halving: of the settings one in so many goes on at each rung; None: all do.
  """

  config: config_lib.ExperimentConfig
  config_file: str
  workdir: str | None
  dry_run: bool
  trials: tuple[sweeps.Trial, ...] | None = None
  list: bool = False
  index: int | None = None
  ray: bool = False
  group_size: int | None = None
  halving: int | None = None


def parse(argv: Sequence[str]) -> Arguments:
  """Reads the command line.

  Args:
    argv: the arguments, without the program's name: `sys.argv[1:]`.

  Returns:
    The arguments, with the config file run and the overrides applied and checked.

  Raises:
    SystemExit: status 2, after one line on stderr, for whatever the user got wrong; status 0, after
      the help on stdout, for `--help`.
  """
  try:
    return _parse(argv)
  except (UsageError, config_lib.ConfigError) as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def _parse(argv: Sequence[str]) -> Arguments:
  values = _split(argv)
  config_file = values["config"]
  # Overrides are read before the config file runs: a slip in them is the cheaper error.
  overrides = {
    path: config_lib.parse_value(path, text)
    for path in config_lib.fields()
    if (text := values[f"config.{path}"]) is not None
  }
  if values["help"]:
    draft = config_lib.defaults() if config_file is None else load(config_file)[0]
    print(_help(draft, config_file))
    raise SystemExit(0)
  if config_file is None:
    raise UsageError(f"--config: missing; {_FLAGS['config']}")
  draft, sweep = load(config_file)
  arguments = Arguments(
    config=config_lib.from_config_dict(draft, overrides),
    config_file=config_file,
    workdir=values["workdir"],
    dry_run=values["dry_run"],
    trials=None if sweep is None else _trials(config_file, draft, sweep, overrides),
    list=values["list"],
    index=values["index"],
    ray=values["ray"],
    group_size=_group_size(values["group_size"]),
    halving=values["halving"],
  )
  _check_sweep(arguments)
  return arguments


def _group_size(text: str | None) -> int | None:
  if text is None or text == "auto":
    return None
  if not text.isdigit() or int(text) < 1:
    raise UsageError(f"--group_size: {text}; a number of trials, 1 or more, or auto")
  return int(text)


def _trials(
  config_file: str,
  draft: ml_collections.ConfigDict,
  sweep: Callable[[], Iterable[Mapping[str, Any]]],
  overrides: Mapping[str, Any],
) -> tuple[sweeps.Trial, ...]:
  try:
    return tuple(sweeps.resolve(draft, sweep(), overrides))
  except config_lib.ConfigError:
    raise
  except Exception as error:
    raise UsageError(_blame(config_file, error)) from None


def _check_sweep(arguments: Arguments) -> None:
  if arguments.trials is None:
    for name in ("list", "index", "ray", "group_size", "halving"):
      given = getattr(arguments, name)
      if given is not None and given is not False:  # --index=0 is equal to False
        raise UsageError(f"--{name}: {arguments.config_file} has no sweep(), so it is one trial")
    return
  count = len(arguments.trials)
  if arguments.index is not None and not 0 <= arguments.index < count:
    raise UsageError(f"--index: {arguments.index}; the sweep's trials are 0 to {count - 1}")
  index = arguments.index is not None
  for name, other, both, does in (
    ("index", "ray", index and arguments.ray, "runs all trials"),
    ("index", "list", index and arguments.list, "names all trials"),
    ("halving", "index", arguments.halving is not None and index, "runs one trial"),
    ("halving", "ray", arguments.halving is not None and arguments.ray, "compares no trials"),
    ("dry_run", "ray", arguments.dry_run and arguments.ray, "runs all trials"),
  ):
    if both:
      raise UsageError(f"--{name}: with --{other}, which {does}; give one of the two")


def _split(argv: Sequence[str]) -> dict[str, Any]:
  """Flag → what was typed, a string; None where it was not."""
  values = flags.FlagValues()  # our own: nothing global, and none of the flags of other libraries
  values.set_gnu_getopt(True)  # flags may follow a stray word, which is then reported as such
  flags.DEFINE_string("config", None, _FLAGS["config"], flag_values=values)
  flags.DEFINE_string("workdir", None, _FLAGS["workdir"], flag_values=values)
  flags.DEFINE_boolean("dry_run", False, _FLAGS["dry_run"], flag_values=values)
  flags.DEFINE_boolean("list", False, _FLAGS["list"], flag_values=values)
  flags.DEFINE_integer("index", None, _FLAGS["index"], flag_values=values)
  flags.DEFINE_boolean("ray", False, _FLAGS["ray"], flag_values=values)
  flags.DEFINE_string("group_size", None, _FLAGS["group_size"], flag_values=values)
  flags.DEFINE_integer("halving", None, _FLAGS["halving"], flag_values=values)
  flags.DEFINE_boolean("help", False, _FLAGS["help"], short_name="h", flag_values=values)
  for path, field in config_lib.fields().items():
    flags.DEFINE_string(f"config.{path}", None, field.help, flag_values=values)
    values[f"config.{path}"].boolean = field.type is bool  # so that --noconfig.train.x is known
  try:
    _, *rest = values([PROGRAM, *argv])
  except flags.UnrecognizedFlagError as error:
    name = error.flagname
    if name.startswith(("config.", "noconfig.")):
      path = name.split(".", 1)[1]
      if path in config_lib.fields():
        type_name = config_lib.fields()[path].type_name
        raise UsageError(f"--{name}: only a bool is switched off; {path} is {type_name}") from None
      raise config_lib.unknown_field(path) from None
    known = [flag for flag in _FLAGS if "." not in flag]
    near = difflib.get_close_matches(name, known, n=1)
    # `--lora.rank=8`, where `--config.lora.rank=8` is right
    near = near or [f"config.{name}" for path in config_lib.fields() if path == name]
    meant = f"did you mean --{near[0]}?" if near else "--help lists what there is"
    raise UsageError(f"--{name}: no such flag; {meant}") from None
  except flags.IllegalFlagValueError as error:  # of a bool or a number: all others are strings
    numbers = any(name in str(error) for name in ("--index", "--halving"))
    needed = "a whole number" if numbers else "true or false"
    raise UsageError(f"{str(error).partition(': ')[0]}; {needed} is needed") from None
  except flags.Error as error:
    raise UsageError(_line(error)) from None
  if rest:
    raise UsageError(f"{rest[0]!r}: not a flag; flags are --name=value, and --help lists them")
  for name in ("config", "workdir"):
    if values[name].value == "":
      raise UsageError(f"--{name}: ''; a path is needed")
  return values.flag_values_dict()


def load(
  config_file: str,
) -> tuple[ml_collections.ConfigDict, Callable[[], Iterable[Mapping[str, Any]]] | None]:
  """Runs a config file.

  Args:
    config_file: path of a Python file whose `get_config()` returns a `ConfigDict` or an
      `ExperimentConfig`.

  Returns:
    The draft, not yet checked, and `sweep`, or None where the file defines none.

  Raises:
    UsageError: there is no such file, it does not run, or it has no `get_config()`; the message
      names the file and, where it was the file's own doing, the line.
  """
  module = _module(config_file)
  get_config = getattr(module, "get_config", None)
  if not callable(get_config):
    names = [name for name, value in vars(module).items() if isinstance(value, types.FunctionType)]
    near = difflib.get_close_matches("get_config", names, n=1)
    meant = f"; did you mean {near[0]}()?" if near else ""
    raise UsageError(f"{config_file}: no get_config(); a config file defines one{meant}")
  try:
    draft = get_config()
  except Exception as error:
    raise UsageError(_blame(config_file, error)) from None
  sweep = getattr(module, "sweep", None)
  if isinstance(draft, config_lib.ExperimentConfig):
    return config_lib.to_config_dict(draft), sweep
  if not isinstance(draft, ml_collections.ConfigDict):
    rule = "get_config() returns a ConfigDict, such as qlora_jax.config.defaults()"
    raise UsageError(f"{config_file}: {type(draft).__name__}; {rule}")
  return draft, sweep


def _module(config_file: str) -> types.ModuleType:
  path = pathlib.Path(config_file)
  if not path.is_file():
    raise UsageError(_missing(path))
  spec = importlib.util.spec_from_file_location(f"_config_file_{path.stem}", path.absolute())
  if spec is None or spec.loader is None:
    raise UsageError(f"{config_file}: not a Python file; its name ends in .py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise UsageError(_blame(config_file, error)) from None
  return module


def _missing(path: pathlib.Path) -> str:
  folder = path.parent
  if path.is_dir():
    folder, problem = path, "a directory; a config is a Python file"
  elif not folder.is_dir():
    return f"{path}: no such file; there is no directory {folder}, seen from {pathlib.Path.cwd()}"
  else:
    problem = "no such file"
  names = sorted(p.name for p in folder.glob("*.py") if p.name != "__init__.py")
  near = difflib.get_close_matches(path.name, names, n=3)
  if near:
    return f"{path}: {problem}; did you mean {' or '.join(str(folder / name) for name in near)}?"
  listed = ", ".join(names) if names else "no Python file"
  return f"{path}: {problem}; {folder} has {listed}"


def _line(error: BaseException) -> str:
  # ConfigDict raises AttributeError(KeyError(message)), which prints as the repr of the message.
  cause = error.args[0] if len(error.args) == 1 else None
  if isinstance(cause, BaseException):
    return _line(cause)
  return " ".join((cause if isinstance(cause, str) else str(error)).split())


def _blame(config_file: str, error: Exception) -> str:
  """`configs/x.py:7: NameError: ...`, the line being the last one run in that file."""
  own = str(pathlib.Path(config_file).absolute())
  if isinstance(error, SyntaxError) and error.filename is not None:
    file = config_file if error.filename == own else error.filename
    return f"{file}:{error.lineno}: {type(error).__name__}: {error.msg}"
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
  place = f"{config_file}:{lines[-1]}" if lines else config_file
  return f"{place}: {type(error).__name__}: {_line(error)}"


def _help(draft: ml_collections.ConfigDict, config_file: str | None) -> str:
  """Flags, then every field with its type and its value in `draft`."""
  values = draft.to_dict()

  def value_of(path: str, field: config_lib.Field) -> Any:
    value: Any = values
    for part in path.split("."):
      if not isinstance(value, Mapping) or part not in value:
        return field.default
      value = value[part]
    return value

  lines = [f"usage: {PROGRAM} --config FILE [--workdir DIR] [--config.FIELD=VALUE ...]", ""]
  lines += [f"  --{name:14} {text}" for name, text in _FLAGS.items()]
  lines += ["", f"fields: type, {'default' if config_file is None else 'value in ' + config_file}"]
  section = None
  for path, field in config_lib.fields().items():
    if path.rpartition(".")[0] != section:
      section = path.rpartition(".")[0]
      lines.append("")
    head = f"  --config.{path}"
    lines.append(f"{head:44} {field.type_name}, {value_of(path, field)!r}")
    if field.help:
      lines.append(f"      {field.help}")
  lines += [
    "",
    "None sets a field back to None. A tuple is written a,b; a dictionary \"{'*/attn/q': 4}\";",
    "a bool also as --config.train.compare_16bit and --noconfig.train.compare_16bit.",
  ]
  return "\n".join(lines)

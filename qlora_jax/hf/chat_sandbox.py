"""Renders chat templates for `chat.py`, as a program in a process of its own.

A chat template is a program that comes with a download. jinja2's sandbox keeps it from Python's
internals and from changing what it is given, but bounds neither its time nor its memory: two nested
loops of 100,000 steps, or a string that doubles, would hold up a training run or fill the machine.
Limits inside of jinja2 (on loops, on operators, on the length of the output) leave out what its
filters and the methods of strings can do, `"%0999999999d" % 1` for one. So the operating system
sets them: an address space of `MEMORY` bytes, and an alarm that ends the process, in whatever call
it is. A render takes 0.03 ms, the way to the process included, and the first one 40 ms more to
start it. The process has no other business: it reads a request, a line of JSON, writes an answer,
another one, and ends with its input. It imports jinja2 and nothing of the library.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 2**30
# More characters than any chat has; the caller need not take in a gigabyte.
MOST_CHARACTERS = 2**24
# The status with which the process ends when MEMORY is used up.
OUT_OF_MEMORY = 3


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """jinja2 as transformers sets it up, but that a forbidden attribute is an error where it stands.

  There, as in jinja2, it is an undefined value, which prints as nothing.
  """

  def __init__(self):
    super().__init__(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    self.filters["tojson"] = _tojson
    self.globals |= {
      "raise_exception": _raise_exception,
      "strftime_now": lambda form: datetime.now().strftime(form),
      # The class dict itself would have attributes.
      "dict": lambda *args, **kwargs: dict(*args, **kwargs),
      "namespace": Namespace,
    }
    self.position = 0  # characters rendered so far
    self.generated: list[tuple[int, str]] = []

  def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
    """Raises SecurityError."""
    kind = type(obj).__name__
    raise jinja2.exceptions.SecurityError(
      f"attribute {attribute!r} of a {kind} is not for templates"
    )


class Generation(jinja2.ext.Extension):
  """`{% generation %} … {% endgeneration %}`: around what the assistant says. Printed as it is."""

  tags: ClassVar[set[str]] = {"generation"}

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    """The block, as a call whose body is the block's."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body)
    return call.set_lineno(line)

  def _note(self, caller: Any) -> str:
    text = caller()
    environment: Any = self.environment
    environment.generated.append((environment.position, text))
    return text


class Namespace(jinja2.utils.Namespace):
  """`namespace(…)`, without attributes that begin with an underscore."""

  def __init__(*args: Any, **kwargs: Any):
    jinja2.utils.Namespace.__init__(*args, **kwargs)
    for name in dict(*args[1:], **kwargs):
      _check_name(name)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: str) -> None:
  if name.startswith("_"):
    raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # jinja2's own writes < and & as escapes, for HTML; a model was trained without.
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _render(environment: Environment, template: jinja2.Template, variables: dict[str, Any]) -> str:
  environment.position, environment.generated = 0, []
  parts = []
  for part in template.generate(**variables):
    parts.append(part)
    environment.position += len(part)
    if environment.position > MOST_CHARACTERS:
      raise ValueError(f"more than {MOST_CHARACTERS:,} characters")
  return "".join(parts)


def _answer(
  environment: Environment, compiled: dict[str, jinja2.Template], request: dict[str, Any]
) -> dict[str, Any]:
  source = request["template"]
  try:
    if source not in compiled:
      compiled[source] = environment.from_string(source)
    text = _render(environment, compiled[source], request["variables"])
  except MemoryError:
    raise
  except jinja2.TemplateSyntaxError as error:
    return {"error": f"line {error.lineno}: {error.message}"}
  except jinja2.TemplateError as error:
    return {"error": str(error)}
  except Exception as error:  # whatever the template did wrong, it is the template's error
    return {"error": f"{type(error).__name__}: {error}"}
  generated = [(start, start + len(each)) for start, each in environment.generated]
  misplaced = any(text[start : start + len(each)] != each for start, each in environment.generated)
  return {"text": text, "generated": generated, "misplaced": misplaced}


def main() -> None:
  """Answers the requests of standard input until it ends.

  A request is `{"template": source, "variables": {…}, "seconds": s}`. An answer is `{"text": …,
  "generated": [[start, stop], …], "misplaced": bool}`, the last if a generation block is not where
  its characters should be (its text was caught by a macro or a set block), or `{"error": …}`. No
  answer comes where the process ended: by SIGALRM when the seconds were over, with the status
  OUT_OF_MEMORY, or otherwise.
  """
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  # Ctrl-C reaches every process of the terminal; whether this one goes on is its parent's to say.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # A handler in Python would wait for the end of the call that is to be stopped.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
  environment, compiled = Environment(), {}
  for line in sys.stdin.buffer:
    try:
      request = json.loads(line)
      # Compiling counts: jinja2 computes constants then.
      signal.setitimer(signal.ITIMER_REAL, request["seconds"])
      answer = json.dumps(_answer(environment, compiled, request))
      signal.setitimer(signal.ITIMER_REAL, 0)
    except MemoryError:
      sys.exit(OUT_OF_MEMORY)
    sys.stdout.buffer.write(answer.encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main()

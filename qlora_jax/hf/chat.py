"""Chat templates: from a conversation to the text and ids that a model was trained on.

A checkpoint's directory says in a jinja2 template how its model writes system prompts, turns and
tools. Text and ids are those of transformers' `apply_chat_template` on the same directory. A
template is a program that somebody else wrote, so it runs in another process, which stops one that
loops, fills the memory or reaches for Python's internals (`chat_sandbox`).

    tokenizer = load_tokenizer(directory)
    template = load_chat_template(directory, tokenizer)
    template.encode([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
"""

import json
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qlora_jax.hf import chat_sandbox
from qlora_jax.hf.files import read_json

Message = Mapping[str, Any]


class ChatTokenizer(Protocol):
  """What a template asks of a tokenizer; those of `hf.tokenizers` have it."""

  special_tokens: dict[str, str]

  def encode(self, text: str) -> list[int]:
    """The ids of `text` alone; text that spells a special token becomes that token."""
    ...

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The same, and the (start, stop) of the characters that each id stands for."""
    ...


class ChatTemplate:
  """The chat templates of a checkpoint.

  What a template sees: `messages`, `tools`, `documents`, `add_generation_prompt`, the special
  tokens by role (`bos_token`), and the variables of the call. All of it is copied as JSON first, so
  a template changes nothing of the caller's. As in transformers, a message's keys whose value is
  None are left out, and reasoning given as `thinking` or `reasoning` is there as
  `reasoning_content` too.

  Every method raises ValueError, with the template's file in its one line, for a template that
  raises an exception, uses something undefined, reaches for what the sandbox forbids, or is stopped
  because it takes more than `seconds` or 1 GiB.

  Args:
    templates: source by name; `default` is the one that is used unless another is named, or
      `tool_use` is there and tools are given.
    origins: for messages, where each template was read.
    tokenizer: encodes what is rendered, and names the special tokens.
    seconds: how long a render may take; a chat takes less than a millisecond.
  """

  def __init__(
    self,
    templates: Mapping[str, str],
    origins: Mapping[str, str],
    tokenizer: ChatTokenizer,
    *,
    seconds: float = 5.0,
  ) -> None:
    self.templates = dict(templates)
    self._origins = dict(origins)
    self._tokenizer = tokenizer
    self._seconds = seconds
    self._lock = threading.Lock()
    self._process: subprocess.Popen[bytes] | None = None
    self._stop = None

  def render(
    self,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_name: str | None = None,
    **variables: Any,
  ) -> str:
    """The text of a conversation.

    Args:
      messages: one at least; `{"role": "user", "content": "Hi"}`, and whatever else the template
        reads (`tool_calls`).
      add_generation_prompt: ends with what opens the assistant's turn.
      tools: JSON schemas of functions.
      template_name: which of several templates.
      **variables: for this template (`enable_thinking=False`), or in place of a special token.

    Raises:
      ValueError: as the class says; no messages; what is no message, or no JSON; no such template.
    """
    name = self._name(template_name, tools)
    return self._ask(name, messages, add_generation_prompt, tools, variables)["text"]

  def render_with_spans(
    self,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_name: str | None = None,
    **variables: Any,
  ) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the (start, stop) of its characters that the assistant says.

    Those are the ones inside the template's `{% generation %}` blocks.

    Args:
      messages: and the rest as for `render`.

    Raises:
      ValueError: as for `render`; a template without such a block, or one whose text is caught by
        a macro or a `set` block, so that its place in the whole is not known.
    """
    name = self._name(template_name, tools)
    if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.templates[name]):
      raise ValueError(
        f"{self._origins[name]}: no {{% generation %}} block; it does not tell which text is the "
        "assistant's"
      )
    answer = self._ask(name, messages, add_generation_prompt, tools, variables)
    if answer["misplaced"]:
      raise ValueError(
        f"{self._origins[name]}: a {{% generation %}} block inside of a macro, call, filter or set "
        "block; where its text comes to stand is not known"
      )
    return answer["text"], [(start, stop) for start, stop in answer["generated"]]

  def encode(self, messages: Sequence[Message], **options: Any) -> list[int]:
    """The ids of a conversation, with what the template writes and nothing else (no second BOS).

    Args:
      messages: and the rest as for `render`.

    Raises:
      ValueError: as for `render`.
    """
    return self._tokenizer.encode(self.render(messages, **options))

  def encode_with_mask(
    self, messages: Sequence[Message], **options: Any
  ) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and for each whether it holds a character of the assistant's.

    Args:
      messages: and the rest as for `render`.

    Raises:
      ValueError: as for `render_with_spans`.
    """
    text, spans = self.render_with_spans(messages, **options)
    ids, offsets = self._tokenizer.encode_with_offsets(text)
    return ids, token_mask(offsets, spans)

  def _name(self, name: str | None, tools: Any) -> str:
    if name is None:
      name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
    if name not in self.templates:
      raise ValueError(
        f"template_name: no chat template {name!r}; there are {', '.join(sorted(self.templates))}"
      )
    return name

  def _ask(
    self,
    name: str,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Any,
    variables: Mapping[str, Any],
  ) -> dict[str, Any]:
    origin = self._origins[name]
    everything = {
      "documents": None,
      **self._tokenizer.special_tokens,
      **variables,
      "messages": _plain_messages(messages),
      "tools": tools if tools is None else list(tools),
      "add_generation_prompt": add_generation_prompt,
    }
    try:
      request = json.dumps(
        {"template": self.templates[name], "variables": everything, "seconds": self._seconds},
        default=_as_mapping,
      )
    except (TypeError, ValueError) as error:
      raise ValueError(f"{origin}: a template is given JSON values alone: {error}") from None
    with self._lock:
      process = self._running()
      assert process.stdin is not None and process.stdout is not None
      try:
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
      except BrokenPipeError:
        line = b""
      except BaseException:
        # Its answer would be taken for that of the next request.
        self._end()
        raise
      if not line.endswith(b"\n"):
        status = process.wait()
        self._end()
        raise ValueError(f"{origin}: {self._why(status)}")
    answer = json.loads(line)
    if "error" in answer:
      raise ValueError(f"{origin}: {' '.join(answer['error'].split())}")
    return answer

  def _why(self, status: int) -> str:
    if status == -signal.SIGALRM:
      return f"stopped; the template was not done after {self._seconds:g} s"
    if status == chat_sandbox.OUT_OF_MEMORY:
      return f"stopped; the template took more than {chat_sandbox.MEMORY / 2**30:g} GiB of memory"
    return f"the process that renders the template ended with status {status}"

  def _running(self) -> subprocess.Popen[bytes]:
    if self._process is None or self._process.poll() is not None:
      self._end()
      # -P: the folder of the script, with a tokenizers.py, is not to be searched for modules.
      self._process = subprocess.Popen(
        [sys.executable, "-P", chat_sandbox.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
      )
      self._stop = weakref.finalize(self, _stop, self._process)
    return self._process

  def _end(self) -> None:
    if self._stop is not None:
      self._stop()
    self._process, self._stop = None, None


def load_chat_template(
  directory: str | Path, tokenizer: ChatTokenizer, *, seconds: float = 5.0
) -> ChatTemplate:
  """Loads the chat templates of a checkpoint.

  They are `chat_template.jinja` (the default) with `additional_chat_templates/NAME.jinja`; where
  there is none of these, `chat_template` in `tokenizer_config.json`, a template or a list of
  `{"name": …, "template": …}`; and where that is missing, the same in `chat_template.json`.

  Args:
    directory: the checkpoint's directory.
    tokenizer: its tokenizer.
    seconds: how long a render may take.

  Raises:
    FileNotFoundError: no chat template there.
    ValueError: a file that does not hold one as said above.
  """
  directory = Path(directory).absolute()
  templates: dict[str, str] = {}
  origins: dict[str, str] = {}
  files = {path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
  if (directory / "chat_template.jinja").is_file():
    files.setdefault("default", directory / "chat_template.jinja")
  for name, path in files.items():
    templates[name] = path.read_text(encoding="utf-8")
    origins[name] = str(path)
  for path in (directory / "tokenizer_config.json", directory / "chat_template.json"):
    value = read_json(path).get("chat_template") if not templates and path.is_file() else None
    if isinstance(value, str):
      templates["default"], origins["default"] = value, f"{path}: chat_template"
    elif value is not None:
      templates = _named_templates(value, path)
      origins = {name: f"{path}: chat_template {name!r}" for name in templates}
  if not templates:
    raise FileNotFoundError(
      f"{directory}: no chat template; looked for chat_template.jinja, "
      "additional_chat_templates/*.jinja, and chat_template in tokenizer_config.json and in "
      "chat_template.json"
    )
  return ChatTemplate(templates, origins, tokenizer, seconds=seconds)


def token_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
  """Which tokens hold a character of some span.

  Args:
    offsets: (start, stop) in characters of each token, ascending.
    spans: (start, stop) in characters, ascending and apart.
  """
  mask = []
  which = 0
  for start, stop in offsets:
    while which < len(spans) and spans[which][1] <= start:
      which += 1
    mask.append(which < len(spans) and spans[which][0] < stop)
  return mask


def _named_templates(value: Any, path: Path) -> dict[str, str]:
  named = {}
  for entry in value if isinstance(value, list) else [None]:
    pair = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
    if not all(isinstance(each, str) for each in pair):
      raise ValueError(
        f"{path}: chat_template is {value!r:.80}; it is a string, or a list of objects with name "
        "and template"
      )
    named[pair[0]] = pair[1]
  return named


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
  if not messages:
    raise ValueError("messages: none; a conversation has at least one")
  plain = []
  for index, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(f"messages[{index}]: {message!r:.80}; a message is a mapping")
    message = {key: value for key, value in message.items() if value is not None}
    fields = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[field] for field in fields if field in message), None)
    if reasoning is not None:
      message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    plain.append(message)
  return plain


def _as_mapping(value: Any) -> dict[Any, Any]:
  if isinstance(value, Mapping):
    return dict(value)
  raise TypeError(f"a {type(value).__name__}")


def _stop(process: subprocess.Popen[bytes]) -> None:
  process.kill()
  process.wait()
  for pipe in (process.stdin, process.stdout):
    if pipe is not None:
      try:
        pipe.close()
      except BrokenPipeError:  # what was not sent yet
        pass

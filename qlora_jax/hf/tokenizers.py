"""Tokenizers of Hugging Face checkpoints, read from the files beside the weights.

A checkpoint's directory holds `tokenizer.json` (the whole pipeline, run by the package tokenizers),
or `tokenizer.model` (a SentencePiece model), or both. Either is given back as one small object with
the members of `qlora_jax.data.Tokenizer`, and its ids are those of transformers' `AutoTokenizer` on
the same directory. Which texts are special tokens is said in up to four more files:
`tokenizer_config.json` names their roles and, under `added_tokens_decoder`, their ids and how they
match; directories without that list say the same in `special_tokens_map.json` and
`added_tokens.json`. By default `encode` gives the ids of the text alone; what else a document
begins and ends with is the caller's to add, or `add_special_tokens=True` asks for it.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken

from qlora_jax.hf.files import read_json

# Appended to a serialized model, a second `normalizer_spec` is merged into the first, field by
# field, as protobuf reads a message given twice. It is the one way to change a setting of a model
# without its schema: the package has no call for it.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec.add_dummy_prefix = false
_NO_NORMALIZATION = b"\x1a\x04\x12\x00\x20\x00"  # no charsmap, remove_extra_whitespaces = false

_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class JsonTokenizer:
  """A `tokenizer.json`, and the special tokens of the files beside it.

  Text that spells an added token (`<|endoftext|>`) becomes that token. A directory that declares
  the class LlamaTokenizer is read as transformers 5 does: its `tokenizer.json` gives the vocabulary
  and merges, and text is split as `_llama_class` tells.

  Attributes:
    vocab_size: the largest id + 1, added tokens included.
    special_tokens: the text of each role that the files name: `{"bos_token": "<s>", ...}`.
    bos_token, eos_token, pad_token: texts of three of those roles; None where not named.
    bos_id, eos_id, pad_id: their ids.
    add_bos_token, add_eos_token: what `encode(text, add_special_tokens=True)` adds. The
      post-processor of `tokenizer.json` says so; the flags of that name in
      `tokenizer_config.json` do not count beside it, in transformers neither.

  Raises:
    ValueError: a file that the package cannot read; a BOS, EOS or padding token that has no id; an
      added token whose id in `tokenizer_config.json` or `added_tokens.json` is not that of
      `tokenizer.json` (transformers would go on with the latter).
  """

  def __init__(self, path: str | Path) -> None:
    path = Path(path).absolute()
    files = _read_files(path.parent)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
      raise ValueError(f"{path}: not a tokenizer ({error})") from error
    padding = self._tokenizer.padding
    # A file may carry the lengths of its training set-up, and would then cut and pad every text.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    roles = dict(files.roles)
    # Every vocabulary of LlamaTokenizer is SentencePiece's; a byte-level one declares it wrongly.
    if files.llama_class and '"ByteLevel"' not in path.read_text(encoding="utf-8"):
      self._split_as_llama_class(files.config)
      defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
      roles = {
        r: t for r, t in defaults.items() if self._tokenizer.token_to_id(t) is not None
      } | roles
    if padding and self._tokenizer.token_to_id(padding["pad_token"]) is not None:
      roles.setdefault("pad_token", AddedToken(padding["pad_token"], special=True))
    self._add_tokens(files, roles)
    self._split: bool = bool(files.config.get("split_special_tokens"))
    self._tokenizer.encode_special_tokens = self._split

    # Not the number of entries: ids may have holes, and an embedding needs a row up to the last.
    self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self.special_tokens: dict[str, str] = {r: str(t) for r, t in roles.items() if t is not None}
    self.bos_token, self.bos_id = self._role(files, "bos_token")
    self.eos_token, self.eos_id = self._role(files, "eos_token")
    self.pad_token, self.pad_id = self._role(files, "pad_token")
    framed = self._tokenizer.encode("a", add_special_tokens=True)
    mask = framed.special_tokens_mask
    added = [token_id for token_id, special in zip(framed.ids, mask, strict=True) if special]
    self.add_bos_token: bool = mask[:1] == [1] and added[0] == self.bos_id
    self.add_eos_token: bool = mask[-1:] == [1] and added[-1] == self.eos_id

  def encode(
    self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool | None = None
  ) -> list[int]:
    """The ids of `text`.

    Args:
      text: any text.
      add_special_tokens: puts the frame of `tokenizer.json` around it, a BOS for instance.
      split_special_tokens: takes text that spells a special token for text. None does as
        `tokenizer_config.json` says, which next to always is False.
    """
    split = self._split if split_special_tokens is None else split_special_tokens
    tokenizer = self._tokenizer if split == self._split else self._other
    return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of `text`, and the (start, stop) of the characters that each stands for."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  @functools.cached_property
  def _other(self) -> tokenizers.Tokenizer:
    """The tokenizer that splits special tokens where the first does not, or the reverse.

    A copy: the switch is a property of the whole, and another thread may be encoding.
    """
    other = copy.deepcopy(self._tokenizer)
    other.encode_special_tokens = not self._split
    return other

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; special tokens are not shown."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=True)

  def _split_as_llama_class(self, config: Mapping[str, Any]) -> None:
    prefix = "never"
    if config.get("add_prefix_space") is not False:
      prefix = "always" if config.get("legacy", False) else "first"
    # pyright sees no setter: the package is written in Rust and its stubs leave it out.
    pipeline: Any = self._tokenizer
    pipeline.normalizer = None
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
      "▁", prepend_scheme=prefix, split=False
    )
    decoders: list[Any] = [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
    if prefix != "never":
      decoders.append(tokenizers.decoders.Strip(content=" ", left=1))
    pipeline.decoder = tokenizers.decoders.Sequence(decoders)

  def _add_tokens(self, files: "_Files", roles: Mapping[str, Any]) -> None:
    """Adds the files' tokens to those of `tokenizer.json`, or gives those other flags."""
    named = {str(token) for token in roles.values() if token is not None}
    # By repr, which spells the flags: two tokens of one text are equal to the package.
    present = {repr(token) for token in self._tokenizer.get_added_tokens_decoder().values()}
    tokens = []
    for token in (token for _, token in sorted(files.added.items(), key=lambda item: item[0])):
      if repr(token) not in present:
        token.special = token.special or str(token) in named
        tokens.append(token)
    known = {str(token) for token in self._tokenizer.get_added_tokens_decoder().values()}
    known |= {str(token) for token in tokens}
    for token in [*roles.values(), *files.extra]:
      # One that has no id yet would get the next, for which no checkpoint has a row.
      if token is None or self._tokenizer.token_to_id(str(token)) is None or str(token) in known:
        continue
      known.add(str(token))
      tokens.append(AddedToken(token, special=True) if isinstance(token, str) else token)
      tokens[-1].special = tokens[-1].special or str(token) in named
    self._tokenizer.add_tokens(tokens)
    for token_id, token in files.added.items():
      found = self._tokenizer.token_to_id(str(token))
      if found != token_id:
        raise ValueError(
          f"{files.added_path}: token {str(token)!r} has id {token_id}, and tokenizer.json "
          f"makes it {found}"
        )

  def _role(self, files: "_Files", role: str) -> tuple[str | None, int | None]:
    token = self.special_tokens.get(role)
    if token is None:
      return None, None
    found = self._tokenizer.token_to_id(token)
    if found is None:
      raise ValueError(
        f"{files.role_paths[role]}: {role} {token!r} is not in the vocabulary of tokenizer.json"
      )
    return token, found


class SentencePieceTokenizer:
  """A `tokenizer.model`, and the special tokens of the files beside it.

  Text that spells a control token (`<s>`, `</s>`), the unknown token or an added one becomes that
  token, as in transformers; what stands between is SentencePiece's. A model that puts a space
  before a text (its dummy prefix) does so before every such stretch. `"legacy": false` in
  `tokenizer_config.json` keeps it to a stretch that begins the text, and one that begins with a
  space of its own gets no second, which is again what transformers does. A directory that declares
  the class LlamaTokenizer is read as `_llama_class` tells.

  Two differences from transformers are left, where it departs from SentencePiece: a model that
  strips spaces also strips a literal ▁ at the end of a stretch, and see `_llama_class` for merges.

  Attributes:
    vocab_size: the pieces of the model, or the largest id of an added token + 1.
    special_tokens: the text of each role that the files, or else the model, name:
      `{"bos_token": "<s>", ...}`.
    bos_token, eos_token, pad_token: texts of three of those roles; None where not named. Padding
      is not taken from the model, in transformers neither.
    bos_id, eos_id, pad_id: their ids.
    add_bos_token, add_eos_token: what `encode(text, add_special_tokens=True)` adds: the flags of
      that name in `tokenizer_config.json`, False where it has none (transformers 5 likewise).

  Raises:
    ValueError: a file that is no SentencePiece model; a BOS, EOS or padding token that has no id.
  """

  def __init__(self, path: str | Path) -> None:
    path = Path(path).absolute()
    files = _read_files(path.parent)
    model = path.read_bytes()
    if files.llama_class:
      model += _NO_NORMALIZATION
    self._processor = _processor(model, path)
    self._without_prefix = _processor(model + _NO_DUMMY_PREFIX, path)
    size = self._processor.GetPieceSize()
    # Whether each stretch gets the dummy prefix, and whether one that has a space goes without.
    legacy = bool(files.config.get("legacy", not files.llama_class))
    never = files.llama_class and files.config.get("add_prefix_space") is False
    self._prefix_every, self._prefix_first = legacy and not never, not never
    self._prefix_beside_space = legacy and not files.llama_class

    roles = dict(files.roles)
    # SentencePiece says -1 for a token that the model was trained without.
    for role, piece in (
      ("bos_token", self._processor.bos_id()),
      ("eos_token", self._processor.eos_id()),
      ("unk_token", self._processor.unk_id()),
    ):
      if piece >= 0:
        roles.setdefault(role, self._processor.IdToPiece(piece))
    self.special_tokens: dict[str, str] = {r: str(t) for r, t in roles.items() if t is not None}

    self._ids: dict[str, int] = {}
    for i, token in files.added.items():
      piece = self._processor.PieceToId(str(token))
      if piece != i and self._processor.IdToPiece(piece) == str(token):
        raise ValueError(
          f"{files.added_path}: token {str(token)!r} has id {i}, and is piece {piece} of "
          "tokenizer.model"
        )
      self._ids[str(token)] = i
    matched = {str(token): token for token in files.added.values()}
    for i in range(size):
      if self._processor.IsControl(i) and i not in files.added:
        self._ids[self._processor.IdToPiece(i)] = i
    for token in [*roles.values(), *files.extra]:
      piece = None if token is None else self._processor.PieceToId(str(token))
      if piece is not None and self._processor.IdToPiece(piece) == str(token):
        self._ids.setdefault(str(token), piece)
        if isinstance(token, AddedToken):
          matched.setdefault(str(token), token)
    shown = {str(t) for t in files.added.values() if not t.special}
    shown -= set(self.special_tokens.values())
    self._hidden = {i for token, i in self._ids.items() if token not in shown}
    self._shown = {i: token for token, i in self._ids.items() if token in shown}
    self._split: bool = bool(files.config.get("split_special_tokens"))
    self._added = _pattern([matched.get(t, AddedToken(t, special=True)) for t in self._ids])
    self._added_shown = _pattern([matched[t] for t in shown])

    self.vocab_size: int = max([size - 1, *self._ids.values()]) + 1
    self.bos_token, self.bos_id = self._role(files, "bos_token")
    self.eos_token, self.eos_id = self._role(files, "eos_token")
    self.pad_token, self.pad_id = self._role(files, "pad_token")
    self.add_bos_token: bool = bool(files.config.get("add_bos_token")) and self.bos_id is not None
    self.add_eos_token: bool = bool(files.config.get("add_eos_token")) and self.eos_id is not None

  def encode(
    self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool | None = None
  ) -> list[int]:
    """The ids of `text`.

    Args:
      text: any text.
      add_special_tokens: adds the BOS and EOS of the flags.
      split_special_tokens: takes text that spells a special token for text, and so gives
        SentencePiece's own ids. None does as `tokenizer_config.json` says, which next to always is
        False.
    """
    split = self._split if split_special_tokens is None else split_special_tokens
    ids = []
    for start, stop, token_id in self._stretches(text, split):
      if token_id is None:
        ids += self._processor_of(text, start).EncodeAsIds(text[start:stop])
      else:
        ids.append(token_id)
    if add_special_tokens and self.add_bos_token:
      ids.insert(0, self.bos_id)
    if add_special_tokens and self.add_eos_token:
      ids.append(self.eos_id)
    return ids

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of `text`, and the (start, stop) of the characters that each stands for."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, stop, token_id in self._stretches(text, self._split):
      if token_id is not None:
        ids.append(token_id)
        offsets.append((start, stop))
        continue
      mapping = self._processor_of(text, start).EncodeAsOffsetMapping(text[start:stop])
      ids += mapping["ids"]
      # The dummy prefix, and all but the last byte of a character, have no characters of their own
      # there; each is a part of the one that follows.
      offsets += [(start + a, start + max(b, a + 1)) for a, b in mapping["offsets"]]
    return ids, offsets

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; special tokens are not shown."""
    parts: list[str] = []
    run: list[int] = []

    def flush():
      processor = self._processor if self._prefix_first and not parts else self._without_prefix
      if run:
        parts.append(processor.DecodeIds(run))
      run.clear()

    for token_id in ids:
      if token_id in self._shown:
        flush()
        parts.append(self._shown[token_id])
      elif token_id not in self._hidden:
        run.append(int(token_id))
    flush()
    return "".join(parts)

  def _stretches(self, text: str, split: bool) -> Iterator[tuple[int, int, int | None]]:
    """(start, stop, id) of the added tokens in `text`, and of what is between them (id None)."""
    added = self._added_shown if split else self._added
    end = 0
    for match in added.finditer(text) if added.pattern else ():
      if match.start() > end:
        yield end, match.start(), None
      yield match.start(), match.end(), self._ids[match[match.lastindex or 0]]
      end = match.end()
    if end < len(text):
      yield end, len(text), None

  def _processor_of(self, text: str, start: int) -> Any:
    """The model with or without its dummy prefix, as the stretch from `start` on asks for."""
    prefix = self._prefix_every or (self._prefix_first and start == 0)
    if prefix and not self._prefix_beside_space and text[start] in " ▁":
      prefix = False
    return self._processor if prefix else self._without_prefix

  def _role(self, files: "_Files", role: str) -> tuple[str | None, int | None]:
    token = self.special_tokens.get(role)
    if token is None:
      return None, None
    if token not in self._ids:
      raise ValueError(
        f"{files.role_paths[role]}: {role} {token!r} is not in the vocabulary of tokenizer.model"
      )
    return token, self._ids[token]


def load_tokenizer(directory: str | Path) -> JsonTokenizer | SentencePieceTokenizer:
  """Loads the tokenizer of a checkpoint: `tokenizer.json`, else `tokenizer.model`.

  Args:
    directory: the checkpoint's directory.

  Returns:
    An object with the members of `qlora_jax.data.Tokenizer`. Whether the model has a row for each
    of its `vocab_size` ids is for whoever puts the two together to check.

  Raises:
    FileNotFoundError: no such directory, or neither file in it.
    ValueError: a file that cannot be read as what its name says.
  """
  directory = Path(directory).absolute()
  if not directory.is_dir():
    raise FileNotFoundError(
      f"{directory}: no such directory; looked there for tokenizer.json and tokenizer.model"
    )
  if (directory / "tokenizer.json").is_file():
    return JsonTokenizer(directory / "tokenizer.json")
  if (directory / "tokenizer.model").is_file():
    return SentencePieceTokenizer(directory / "tokenizer.model")
  held = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
  raise FileNotFoundError(
    f"{directory}: no tokenizer; looked for tokenizer.json, then tokenizer.model, "
    f"and it holds {held}"
  )


@dataclasses.dataclass
class _Files:
  """What the files beside a vocabulary say of it."""

  config: dict[str, Any]  # tokenizer_config.json
  roles: dict[str, Any]  # role: str, AddedToken, or None where a file says null
  role_paths: dict[str, Path]  # role: the file that names it
  added: dict[int, AddedToken]
  added_path: Path
  extra: list[Any]  # special tokens without a role, str or AddedToken
  llama_class: bool


def _read_files(directory: Path) -> _Files:
  config_path = directory / "tokenizer_config.json"
  config = _read_if_there(config_path)
  values = dict(config)
  paths = dict.fromkeys(values, config_path)
  added_path = config_path
  if "added_tokens_decoder" in config:
    listed = config["added_tokens_decoder"]
    if not isinstance(listed, dict):
      raise ValueError(f"{config_path}: added_tokens_decoder is no object of ids and tokens")
    added = {}
    for token_id, token in listed.items():
      if not token_id.isdigit():
        raise ValueError(f"{config_path}: added_tokens_decoder: {token_id!r} is no id")
      added[int(token_id)] = _token(token, f"{config_path}: added_tokens_decoder[{token_id}]")
  else:
    # Written before 2023; transformers reads these two only where there is no list.
    map_path = directory / "special_tokens_map.json"
    mapped = _read_if_there(map_path)
    values |= mapped
    paths |= dict.fromkeys(mapped, map_path)
    added = None

  roles: dict[str, Any] = {}
  extra: list[Any] = []
  for key, value in values.items():
    where = f"{paths[key]}: {key}"
    if key in ("additional_special_tokens", "extra_special_tokens"):
      if isinstance(value, dict):
        roles |= {name: _role_token(token, where) for name, token in value.items()}
      elif isinstance(value, list):
        extra += [_role_token(token, where) for token in value]
    # Of other names, add_bos_token is a flag and num_image_token a number.
    elif key in _ROLES or (key.endswith("_token") and isinstance(value, str | dict)):
      roles[key] = _role_token(value, where)
  special = {str(token) for token in [*roles.values(), *extra] if token is not None}

  if added is None:
    added_path = directory / "added_tokens.json"
    added = {}
    for token, token_id in _read_if_there(added_path).items():
      if not isinstance(token_id, int):
        raise ValueError(f"{added_path}: {token!r}: {token_id!r}; an id is an integer")
      added[token_id] = AddedToken(token, special=token in special, normalized=token not in special)
  flags = {str(token): token for token in added.values()}
  roles = {r: flags.get(str(t), t) if t is not None else None for r, t in roles.items()}
  role_paths = {role: paths.get(role, config_path) for role in roles}
  llama_class = _llama_class(config, _read_if_there(directory / "config.json"))
  return _Files(config, roles, role_paths, added, added_path, extra, llama_class)


def _llama_class(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> bool:
  """Whether transformers 5 would read a directory with its own LlamaTokenizer.

  It does where the class is declared, unless it holds the declaration of a model's type for wrong,
  as of mistral, mixtral and phi3. That class splits by the rules below and not by those of
  `tokenizer.json` or of the SentencePiece model, so the same vocabulary gives other ids:
  spaces are not normalized; a space is put before the text, or with `"legacy": true` before every
  stretch between special tokens; none is put before one that begins with a space.

  With `tokenizer.model` alone, transformers also merges in the order of the ids. SentencePiece
  keeps to its scores; Llama's models have one and the same order, so their ids agree.
  """
  declared = config.get("tokenizer_class") or model_config.get("tokenizer_class") or ""
  llama = str(declared).removesuffix("Fast") == "LlamaTokenizer"
  return llama and model_config.get("model_type") in (None, "", "llama")


def _read_if_there(path: Path) -> dict[str, Any]:
  return read_json(path) if path.is_file() else {}


def _token(value: Any, where: str) -> AddedToken:
  """An AddedToken as JSON writes it out."""
  flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
  if not isinstance(value, dict) or not isinstance(value.get("content"), str):
    raise ValueError(f"{where}: {value!r:.80}; a token is an object with content, a string")
  return AddedToken(value["content"], **{key: bool(value[key]) for key in flags if key in value})


def _role_token(value: Any, where: str) -> Any:
  if value is None or isinstance(value, str):
    return value
  token = _token(value, where)
  token.special = True
  return token


def _processor(model: bytes, path: Path) -> Any:
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
  except (OSError, RuntimeError) as error:
    raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
  return processor


def _pattern(tokens: list[AddedToken]) -> re.Pattern[str]:
  """Finds added tokens in text: the leftmost, and of those the longest; a group each."""
  branches = []
  space = r"[^\S\x1c-\x1f]*"  # four control characters are white space to Python, not to Unicode
  for token in sorted(tokens, key=lambda token: len(token.content), reverse=True):
    branch = f"({re.escape(token.content)})"
    if token.single_word:
      branch = rf"(?<!\w){branch}(?!\w)"
    branches.append((space if token.lstrip else "") + branch + (space if token.rstrip else ""))
  return re.compile("|".join(branches))

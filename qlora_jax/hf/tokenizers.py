"""Tokenizers of Hugging Face checkpoints, read from the files beside the weights.

A checkpoint's directory holds `tokenizer.json` (the whole pipeline, run by the package tokenizers),
or `tokenizer.model` (a SentencePiece model), or both. Either is given back as one small object with
the members of `qlora_jax.data.Tokenizer`. It encodes text alone: what a document or a chat begins
and ends with is for the caller to add, from `bos_id` and `eos_id`.
"""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from qlora_jax.hf.files import read_json


class JsonTokenizer:
  """A `tokenizer.json`; ids as transformers' `encode(text, add_special_tokens=False)` gives them.

  Text that spells a special token (`<|endoftext|>`) becomes that token, as it does there.

  Attributes:
    vocab_size: the largest id + 1, added tokens included.
    bos_id: the id of the `bos_token` that `tokenizer_config.json` or, where that names none,
      `special_tokens_map.json` names; None where neither does.
    eos_id: the same of `eos_token`.

  Raises:
    ValueError: a file that the package cannot read, or a BOS or EOS token that has no id.
  """

  def __init__(self, path: str | Path) -> None:
    path = Path(path).absolute()
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
      raise ValueError(f"{path}: not a tokenizer ({error})") from error
    # A file may carry the lengths of its training set-up, and would then cut and pad every text.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    # Not the number of entries: ids may have holes, and an embedding needs a row up to the last.
    self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self.bos_id: int | None = self._special_id(path.parent, "bos_token")
    self.eos_id: int | None = self._special_id(path.parent, "eos_token")

  def encode(self, text: str) -> list[int]:
    """The ids of `text`, no BOS or EOS."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; special tokens are not shown."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=True)

  def _special_id(self, directory: Path, role: str) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
      path = directory / name
      token = read_json(path).get(role) if path.is_file() else None
      if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
      if token is None:
        continue
      found = self._tokenizer.token_to_id(token)
      if found is None:
        raise ValueError(f"{path}: {role} {token!r} is not in the vocabulary of tokenizer.json")
      return found
    return None


class SentencePieceTokenizer:
  """A `tokenizer.model`; ids are SentencePiece's own.

  They are those of transformers' `encode(text, add_special_tokens=False)`, except that text which
  spells a control token (`</s>`, or the `<unk>` that wikitext is full of) stays text.

  Attributes:
    vocab_size: the pieces of the model.
    bos_id: the model's BOS, None where it has none.
    eos_id: the model's EOS, None where it has none.

  Raises:
    ValueError: a file that is no SentencePiece model.
  """

  def __init__(self, path: str | Path) -> None:
    path = Path(path).absolute()
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
      raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
    self.vocab_size: int = self._processor.GetPieceSize()
    # SentencePiece says -1 for a token that the model was trained without.
    self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
    self.eos_id: int | None = self._processor.eos_id() if self._processor.eos_id() >= 0 else None

  def encode(self, text: str) -> list[int]:
    """The ids of `text`, no BOS or EOS."""
    return self._processor.EncodeAsIds(text)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; control tokens are not shown."""
    return self._processor.DecodeIds(list(ids))


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

"""From text to batches: documents, tokens, rows of one length, batches that a step number names.

Text becomes ids (a tokenizer), ids become a `Dataset` of rows of `seq_len` tokens (`windows` for
running text, `pack` for documents), and rows become batches. Everything a model or a loss needs
to keep documents apart is in the rows: `segment_ids` says which document of the row a token is
of, `positions` counts from 0 in each, and `loss_mask` says which predictions count. There is no
iterator to save: `Batches.batch` is a function of the seed and the step, so a run that resumes at
step 1,000 sees what it would have seen. NumPy alone; nothing here touches a device.
"""

import dataclasses
import difflib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

# One document as text, and the same as ids: whole, or a prompt and the completion to learn.
Text: TypeAlias = str | tuple[str, str]
Ids: TypeAlias = Sequence[int] | np.ndarray
Document: TypeAlias = Ids | tuple[Ids, Ids]

# How many unfinished rows `pack` keeps in sight. GSM8K's 7,473 training pairs, bytes in rows of
# 1,024, leave 26 % padding with 1 row, 8.7 % with 16, 6.5 % with 64 and 5.7 % with 256, all in a
# quarter of a second; more rows move documents further from their neighbours.
_OPEN_ROWS = 64


@runtime_checkable
class Tokenizer(Protocol):
  """What a tokenizer is here: `ByteTokenizer`, `hf.tokenizers.load_tokenizer`, or your own."""

  @property
  def vocab_size(self) -> int:
    """Every id is below it."""
    ...

  @property
  def bos_id(self) -> int | None:
    """The id that begins a document, None where the tokenizer has none."""
    ...

  @property
  def eos_id(self) -> int | None:
    """The id that ends a document, None where the tokenizer has none."""
    ...

  def encode(self, text: str) -> list[int]:
    """The ids of `text` alone: no BOS, no EOS."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`."""
    ...


class ByteTokenizer:
  """UTF-8 bytes as ids: 256 of them, no training, no file, nothing it cannot encode."""

  vocab_size: int = 256
  bos_id: int | None = None
  eos_id: int | None = None

  def encode(self, text: str) -> list[int]:
    """The bytes of `text`, one id each."""
    return list(text.encode("utf-8"))

  def decode(self, ids: Sequence[int]) -> str:
    """The text of the bytes; what is not UTF-8 (a model may write it) becomes U+FFFD.

    Raises:
      ValueError: an id outside [0, 256).
    """
    return bytes(ids).decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Rows of `T` tokens, and what keeps the documents in a row apart.

  Attributes:
    tokens: int32 `[rows, T]`.
    segment_ids: int32 `[rows, T]`; the documents of a row count from 1, 0 is padding.
    positions: int32 `[rows, T]`; from 0 in each segment.
    loss_mask: bool `[rows, T]`; `loss_mask[r, t]` says that `tokens[r, t + 1]` is predicted from
      position `t`: both are of one segment, neither is padding and, where only completions are
      learned, `tokens[r, t + 1]` is in one. The last column is always False.

  Raises:
    ValueError: arrays of another shape or dtype, or a mask that breaks its rule.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  loss_mask: np.ndarray

  def __post_init__(self):
    if self.tokens.ndim != 2:
      raise ValueError(f"tokens: shape {self.tokens.shape}; a dataset's arrays are [rows, T]")
    for field in dataclasses.fields(self):
      array = getattr(self, field.name)
      dtype = np.bool_ if field.name == "loss_mask" else np.int32
      if array.shape != self.tokens.shape or array.dtype != dtype:
        raise ValueError(
          f"{field.name}: {array.dtype} {array.shape}; it must be {np.dtype(dtype)} of the shape "
          f"of tokens, {self.tokens.shape}"
        )
    segments = self.segment_ids
    same = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != 0)
    wrong = self.loss_mask.copy()
    wrong[:, :-1] &= ~same
    if wrong.any():
      row, column = np.argwhere(wrong)[0]
      raise ValueError(
        f"loss_mask[{row}, {column}]: True, but the next token is not of the same segment; "
        "a prediction stays in its document"
      )

  @property
  def targets(self) -> np.ndarray:
    """int32 `[rows, T]`: at each position the token after it; 0 in the last column."""
    return _next_tokens(self.tokens)

  @property
  def num_targets(self) -> int:
    """How many predictions count, over all rows."""
    return int(np.count_nonzero(self.loss_mask))


def windows(ids: Ids, seq_len: int) -> Dataset:
  """Cuts running text into rows of `seq_len` ids that do not overlap.

  `tokens[r] = ids[r·T : (r + 1)·T]`: one segment a row, `T − 1` predictions a row. The tail that
  does not fill a row is dropped, and the first id of each window is never predicted.

  Args:
    ids: the text's ids, in order.
    seq_len: T, the tokens of a row; at least 2.

  Raises:
    ValueError: fewer than `seq_len` ids; ids that are no integers from 0 on.
  """
  _check_seq_len(seq_len)
  ids = _as_ids(ids, "ids")
  rows = len(ids) // seq_len
  if rows == 0:
    raise ValueError(f"ids: {len(ids)} of them; one window of seq_len {seq_len} takes {seq_len}")
  shape = (rows, seq_len)
  # Every row has the same of these three, so one row is stored and seen `rows` times.
  return Dataset(
    tokens=ids[: rows * seq_len].reshape(shape),
    segment_ids=np.broadcast_to(np.int32(1), shape),
    positions=np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape),
    loss_mask=np.broadcast_to(np.arange(seq_len) < seq_len - 1, shape),
  )


def pack(documents: Iterable[Document], seq_len: int) -> Dataset:
  """Lays whole documents side by side in rows of `seq_len` tokens.

  First fit, in the order given: a document goes to the oldest unfinished row that has room for
  it, else it opens a row; 64 unfinished rows are kept in sight. Nothing is shuffled or sorted, so
  the same documents give the same rows, and those of one row are in order.

  A document longer than `seq_len` is cut into pieces of `seq_len` and a shorter last one. Each
  piece is a segment of its own, whose positions start at 0 and which does not see the pieces
  before it. Every token is kept, but the first token of a piece is predicted by nothing: that one
  target is lost at each cut, as it is at each document's start.

  Of a `(prompt, completion)` pair only the completion is learned; its first token is predicted
  from the prompt's last. The mask follows the pieces of a long pair, so pieces of the prompt alone
  are there but teach nothing: shorten prompts first, where that matters.

  Args:
    documents: each one a sequence of ids, or a tuple of two of them, (prompt, completion). BOS and
      EOS are the caller's to add.
    seq_len: T, the tokens of a row; at least 2.

  Returns:
    Rows whose padding is on the right, token 0 in segment 0.

  Raises:
    ValueError: no documents; ids that are no integers from 0 on; documents that would teach
      nothing, all of them listed by index (from 0): those with no ids or no completion, and those
      all of whose targets are lost, such as a document of one id, or a pair whose one completion
      token starts a piece.
  """
  _check_seq_len(seq_len)
  pieces: list[tuple[np.ndarray, np.ndarray]] = []
  nothing_to_learn: dict[int, str] = {}
  for index, document in enumerate(documents):
    ids, prompt_length = _join(document, f"documents[{index}]")
    learned = np.arange(len(ids)) >= prompt_length
    # The first token of a piece has no token before it to be predicted from.
    learned[::seq_len] = False
    if not learned.any():
      nothing_to_learn[index] = f"{prompt_length} + {len(ids) - prompt_length}"
    for start in range(0, len(ids), seq_len):
      pieces.append((ids[start : start + seq_len], learned[start : start + seq_len]))
  if nothing_to_learn:
    listed = ", ".join(f"{i} ({lengths})" for i, lengths in list(nothing_to_learn.items())[:8])
    raise ValueError(
      f"documents: {len(nothing_to_learn)} with nothing to learn at seq_len {seq_len}; remove them "
      f"or change seq_len. By index (prompt + learned ids): {listed}"
      + (", …" if len(nothing_to_learn) > 8 else "")
    )
  if not pieces:
    raise ValueError("documents: none; a dataset has at least one")

  rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
  room: dict[int, int] = {}  # unfinished rows, oldest first, and the tokens that each still takes
  for ids, learned in pieces:
    row = next((r for r, left in room.items() if left >= len(ids)), None)
    if row is None:
      row = len(rows)
      rows.append([])
      room[row] = seq_len
      if len(room) > _OPEN_ROWS:
        del room[next(iter(room))]
    rows[row].append((ids, learned))
    room[row] -= len(ids)
    if room[row] == 0:
      del room[row]

  tokens, segment_ids, positions = np.zeros((3, len(rows), seq_len), np.int32)
  loss_mask = np.zeros((len(rows), seq_len), np.bool_)
  for r, row_pieces in enumerate(rows):
    start = 0
    for segment, (ids, learned) in enumerate(row_pieces, start=1):
      stop = start + len(ids)
      tokens[r, start:stop] = ids
      segment_ids[r, start:stop] = segment
      positions[r, start:stop] = np.arange(len(ids))
      loss_mask[r, start : stop - 1] = learned[1:]
      start = stop
  return Dataset(tokens, segment_ids, positions, loss_mask)


class Batches:
  """Training batches, each a pure function of (seed, step).

  Epoch e visits the rows in the order of a permutation drawn from (seed, e). The epochs stand one
  after another and a step takes the next `accumulate_steps · batch_size` rows, across the seam
  too: no row is dropped, and each is seen once an epoch. A dataset smaller than a batch works
  (one batch holds several epochs). To resume, ask for the next step.

  Args:
    dataset: the rows.
    batch_size: B, rows of one forward pass.
    accumulate_steps: how many such batches one optimizer step takes.
    seed: orders the rows, on every machine and NumPy version alike; at least 0.
    segments: False leaves `segment_ids` and `positions` out: where each row is one document, a
      causal model's attention needs no mask of them.

  Raises:
    ValueError: no rows, or a size or a seed that is too small.
  """

  def __init__(
    self,
    dataset: Dataset,
    batch_size: int,
    accumulate_steps: int = 1,
    *,
    seed: int,
    segments: bool = True,
  ) -> None:
    _check_at_least("batch_size", batch_size, 1)
    _check_at_least("accumulate_steps", accumulate_steps, 1)
    _check_at_least("seed", seed, 0)
    _check_at_least("rows of the dataset", len(dataset.tokens), 1)
    self._dataset = dataset
    self._shape = (accumulate_steps, batch_size)
    self._seed = seed
    self._segments = segments
    # The orders that the latest batch needed: a cache, never a state.
    self._orders: dict[int, np.ndarray] = {}

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """The batch of `step`, counted from 0; steps may be asked for in any order, or again.

    Returns:
      `tokens`, `targets`, `segment_ids`, `positions` int32 and `loss_mask` bool, each
      `[accumulate_steps, batch_size, T]`.

    Raises:
      ValueError: a negative step.
    """
    _check_at_least("step", step, 0)
    num_rows = len(self._dataset.tokens)
    size = self._shape[0] * self._shape[1]
    # Python integers, which do not overflow however long the run.
    places = [divmod(i, num_rows) for i in range(step * size, (step + 1) * size)]
    # Replaced, never changed in place: a thread may fetch the next batch meanwhile.
    cached = self._orders
    self._orders = orders = {
      epoch: cached[epoch] if epoch in cached else _shuffled(num_rows, self._seed, epoch)
      for epoch in range(places[0][0], places[-1][0] + 1)
    }
    rows = np.array([orders[epoch][offset] for epoch, offset in places])
    batch = _take(self._dataset, rows.reshape(self._shape))
    if not self._segments:
      del batch["segment_ids"], batch["positions"]
    return batch


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  """Every row once and in order, in batches of one shape.

  The last batch is filled up with rows of padding (token 0, segment 0, nothing in `loss_mask`), so
  sums over `loss_mask` are those of the dataset and a jitted step compiles once.

  Yields:
    Arrays as `Batches.batch` gives them, `[batch_size, T]`.

  Raises:
    ValueError: a batch size below 1.
  """
  _check_at_least("batch_size", batch_size, 1)
  return _evaluation_batches(dataset, batch_size)


def _evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  for start in range(0, len(dataset.tokens), batch_size):
    batch = _take(dataset, np.arange(start, min(start + batch_size, len(dataset.tokens))))
    missing = batch_size - len(batch["tokens"])
    yield {name: np.pad(array, ((0, missing), (0, 0))) for name, array in batch.items()}


def load_documents(
  path: str | Path,
  *,
  text_field: str = "text",
  prompt_field: str | None = None,
  completion_field: str | None = None,
) -> list[Text]:
  """Reads documents from a file, UTF-8, as they stand.

  Args:
    path: `.txt`, one document; `.jsonl` or `.jsonl.zst`, one JSON object a line (blank lines are
      passed over). `.zst` takes the package zstandard.
    text_field: the field of a line that holds its document.
    prompt_field: with `completion_field`, instead of `text_field`: the two fields of a pair.
    completion_field: see `prompt_field`.

  Returns:
    A string a document, or a `(prompt, completion)` tuple of strings where those were asked for.

  Raises:
    FileNotFoundError: nothing at the path.
    ValueError: a file of another kind, not UTF-8, cut short or with no documents; a line that is
      no JSON object, lacks a field or holds no text in it. Messages name the file and the line.
    ModuleNotFoundError: a `.zst` file without zstandard.
  """
  path = Path(path).absolute()
  if (prompt_field is None) != (completion_field is None):
    raise ValueError(
      f"prompt_field {prompt_field!r}, completion_field {completion_field!r}: give both or neither"
    )
  pair = prompt_field is not None and completion_field is not None
  kind = next((k for k in (".txt", ".jsonl", ".jsonl.zst") if path.name.endswith(k)), None)
  if kind is None:
    raise ValueError(f"{path}: documents are read from .txt, .jsonl and .jsonl.zst files")
  if kind == ".txt" and pair:
    raise ValueError(
      f"{path}: a .txt file is one document and has no fields {prompt_field!r}, "
      f"{completion_field!r}; pairs are read from .jsonl"
    )
  if not path.is_file():
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    raise FileNotFoundError(
      f"{path}: no such file; looked there for a {kind} file of documents"
      + (f"; did you mean {near[0]}?" if near else "")
    )

  data = _decompress(path) if kind == ".jsonl.zst" else path.read_bytes()
  documents: list[Text] = []
  if kind == ".txt":
    text = _decode(data, str(path))
    if text:
      documents.append(text)
  else:
    # Lines of bytes end at \n alone; lines of str would end at U+2028 inside a JSON string too.
    for number, line in enumerate(io.BytesIO(data), start=1):
      if not line.strip():
        continue
      where = f"{path}:{number}"
      record = _parse(line, where)
      if prompt_field is not None and completion_field is not None:
        prompt = _field(record, prompt_field, where)
        documents.append((prompt, _field(record, completion_field, where)))
      else:
        documents.append(_field(record, text_field, where))
  if not documents:
    raise ValueError(f"{path}: no documents; the file is empty")
  return documents


def split_text(documents: Sequence[Text], holdout: float) -> tuple[list[Text], list[Text]]:
  """Parts the end of a corpus from the rest: (training documents, held-out documents).

  One document is cut at character `int((1 − holdout) · n)`, several are parted at document
  `int((1 − holdout) · n)`. Nothing is shuffled, and no document or character is in both parts
  (a text that the corpus holds twice may be: repeats are the corpus's own).

  Args:
    documents: text, as from `load_documents`.
    holdout: the fraction held out, between 0 and 1.

  Raises:
    ValueError: a fraction that is not between 0 and 1, or that leaves either part empty; one
      (prompt, completion) pair, which cannot be cut.
  """
  if not 0 < holdout < 1:
    raise ValueError(f"holdout: {holdout}; the fraction held out is between 0 and 1, both excluded")
  single = documents[0] if len(documents) == 1 else None
  if isinstance(single, tuple):
    raise ValueError(
      "documents: one (prompt, completion) pair; it takes two or more to hold one out"
    )
  whole = documents if single is None else single
  # As the decimal that was written: in floats 1 − 0.9 is 0.09999999999999998, and 1,000 characters
  # would be cut at 99.
  cut = int((1 - Fraction(str(holdout))) * len(whole))
  if not 0 < cut < len(whole):
    unit = "documents" if single is None else "characters"
    raise ValueError(
      f"holdout: {holdout} of {len(whole)} {unit} parts them {cut} to {len(whole) - cut}; "
      "both parts need one"
    )
  if single is None:
    return list(documents[:cut]), list(documents[cut:])
  return [single[:cut]], [single[cut:]]


def _check_at_least(name: str, value: int, least: int) -> None:
  if value < least:
    raise ValueError(f"{name}: {value}; it is at least {least}")


def _check_seq_len(seq_len: int) -> None:
  if seq_len < 2:
    raise ValueError(f"seq_len: {seq_len}; it is at least 2, one token to predict another from")


def _next_tokens(tokens: np.ndarray) -> np.ndarray:
  """`tokens` moved left by one along the last axis, 0 coming in."""
  targets = np.zeros_like(tokens)
  targets[..., :-1] = tokens[..., 1:]
  return targets


def _take(dataset: Dataset, rows: np.ndarray) -> dict[str, np.ndarray]:
  """The rows of `dataset` at `rows`, any shape `[...]`, as a batch of arrays `[..., T]`."""
  tokens = dataset.tokens[rows]
  return {
    "tokens": tokens,
    "targets": _next_tokens(tokens),
    "loss_mask": dataset.loss_mask[rows],
    "segment_ids": dataset.segment_ids[rows],
    "positions": dataset.positions[rows],
  }


def _shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
  """The numbers below n in the order of an epoch."""
  # Sorting raw draws, not Generator.permutation: NumPy promises that the raw stream never changes,
  # and makes no such promise for what a Generator derives from it. A run may resume years later.
  draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
  return np.argsort(draws, kind="stable")


def _as_ids(ids: Any, name: str) -> np.ndarray:
  """`ids` as an int32 vector, checked."""
  try:
    array = np.asarray(ids)
  except ValueError:  # sequences of several lengths
    array = np.asarray(ids, dtype=object)
  if array.size == 0:
    return np.zeros(0, np.int32)
  if array.ndim != 1 or array.dtype.kind not in "iu":
    raise ValueError(
      f"{name}: {array.dtype} of shape {array.shape}; ids are a sequence of integers "
      "(encode text first; a pair is a tuple)"
    )
  least, most = array.min(), array.max()
  if least < 0 or most >= 2**31:
    raise ValueError(f"{name}: {least if least < 0 else most}; an id is in [0, 2³¹)")
  return array.astype(np.int32)


def _join(document: Any, name: str) -> tuple[np.ndarray, int]:
  """A document's ids, and how many of them are a prompt."""
  if not isinstance(document, tuple) or not any(np.ndim(part) for part in document):
    return _as_ids(document, name), 0
  if len(document) != 2:
    raise ValueError(
      f"{name}: a tuple of {len(document)} sequences; a pair is (prompt, completion)"
    )
  prompt = _as_ids(document[0], f"{name} prompt")
  completion = _as_ids(document[1], f"{name} completion")
  return np.concatenate([prompt, completion]), len(prompt)


def _decompress(path: Path) -> bytes:
  """The content of a .zst file of one frame or more."""
  try:
    import zstandard
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{path}: a .zst file is read with the package zstandard, which is not installed; "
      "pip install zstandard"
    ) from error
  data = path.read_bytes()
  frames = []
  while data:
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
      frames.append(frame.decompress(data))
    except zstandard.ZstdError as error:
      raise ValueError(f"{path}: not zstd data ({error})") from error
    # A frame that stops in the middle is no error to zstandard: half a corpus would pass for one.
    if not frame.eof:
      raise ValueError(
        f"{path}: the zstd data ends in the middle of a frame; the file is cut short"
      )
    data = frame.unused_data
  return b"".join(frames)


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{where}: not UTF-8 at byte {error.start} ({error.reason})") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
  try:
    record = json.loads(_decode(line.rstrip(b"\r\n"), where))
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
  if not isinstance(record, dict):
    raise ValueError(f"{where}: a JSON {type(record).__name__}; each line holds an object")
  return record


def _field(record: dict[str, Any], name: str, where: str) -> str:
  if name not in record:
    raise ValueError(f"{where}: no field {name!r}; the fields are {', '.join(map(repr, record))}")
  value = record[name]
  if not isinstance(value, str):
    raise ValueError(f"{where}: field {name!r} is {value!r:.80}; it must be a string")
  return value

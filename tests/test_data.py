import builtins
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax import data

CORPORA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "corpora"
ARRAYS = ("tokens", "segment_ids", "positions", "loss_mask")


def columns(rows, seq_len):
  """A dataset whose token [r, t] is r · T + t + 1, so that a row can be told by its first token."""
  return data.windows(np.arange(1, rows * seq_len + 1), seq_len)


# Tokenizers


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
  tokenizer = data.ByteTokenizer()
  ids = tokenizer.encode(text)
  assert ids == list(text.encode())
  assert tokenizer.decode(ids) == text
  assert isinstance(tokenizer, data.Tokenizer)
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (256, None, None)


def test_bytes_decode_what_a_model_may_write():
  assert data.ByteTokenizer().decode([0xC3, 0x41]) == "\N{REPLACEMENT CHARACTER}A"
  with pytest.raises(ValueError, match="256"):
    data.ByteTokenizer().decode([256])


# Dataset


def test_targets_are_the_next_tokens():
  dataset = data.windows([3, 1, 4, 1, 5, 9], 3)
  np.testing.assert_array_equal(dataset.targets, [[1, 4, 0], [5, 9, 0]])
  assert dataset.targets.dtype == np.int32
  assert dataset.num_targets == 4


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"positions": np.zeros((2, 3), np.int64)}, r"positions: int64 \(2, 3\); it must be int32"),
    ({"segment_ids": np.ones((2, 2), np.int32)}, r"segment_ids: int32 \(2, 2\)"),
    ({"tokens": np.zeros(3, np.int32)}, r"tokens: shape \(3,\)"),
    ({"loss_mask": np.ones((2, 3), np.bool_)}, r"loss_mask\[0, 2\]: True"),
    ({"segment_ids": np.array([[1, 1, 1], [1, 2, 2]], np.int32)}, r"loss_mask\[1, 0\]: True"),
    ({"segment_ids": np.array([[0, 0, 0], [1, 1, 1]], np.int32)}, r"loss_mask\[0, 0\]: True"),
  ],
)
def test_dataset_refuses_arrays_that_break_its_rules(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(columns(2, 3), **change)


# windows


def test_windows_do_not_overlap_and_drop_the_tail():
  dataset = data.windows(range(11), 4)
  np.testing.assert_array_equal(dataset.tokens, [[0, 1, 2, 3], [4, 5, 6, 7]])
  np.testing.assert_array_equal(dataset.segment_ids, np.ones((2, 4)))
  np.testing.assert_array_equal(dataset.positions, [[0, 1, 2, 3]] * 2)
  np.testing.assert_array_equal(dataset.loss_mask, [[True, True, True, False]] * 2)


def test_windows_say_what_is_wrong():
  with pytest.raises(ValueError, match="ids: 7 of them; one window of seq_len 8 takes 8"):
    data.windows(range(7), 8)
  with pytest.raises(ValueError, match="seq_len: 1; it is at least 2"):
    data.windows(range(7), 1)
  with pytest.raises(ValueError, match=r"ids: -3; an id is in \[0, 2³¹\)"):
    data.windows([1, -3], 2)
  with pytest.raises(ValueError, match=r"ids: 4294967296; an id"):
    data.windows([1, 2**32], 2)
  with pytest.raises(ValueError, match=r"ids: float64 of shape \(2,\); ids are .* integers"):
    data.windows(np.ones(2), 2)
  with pytest.raises(ValueError, match="encode text first"):
    data.windows("text", 2)  # pyright: ignore[reportArgumentType]


# pack

ids_lists = st.lists(st.integers(0, 99), min_size=0, max_size=20)
whole = st.lists(st.integers(0, 99), min_size=2, max_size=20)
pairs = st.tuples(ids_lists, ids_lists)
seq_lens = st.integers(2, 9)


def learned_targets(document, seq_len):
  """The targets that a document is to teach, in order, by the rule in `pack`'s docstring."""
  prompt, completion = document if isinstance(document, tuple) else ([], document)
  return [
    (i % seq_len, token)
    for i, token in enumerate([*prompt, *completion])
    if i % seq_len and i >= len(prompt)
  ]


@st.composite
def packable(draw):
  seq_len = draw(seq_lens)
  document = st.one_of(whole, pairs.filter(lambda pair: learned_targets(pair, seq_len)))
  return draw(st.lists(document, min_size=1, max_size=12)), seq_len


def pieces_of(dataset):
  """Each segment of each row: (tokens, positions, the targets that count there)."""
  for r in range(len(dataset.tokens)):
    for segment in range(1, dataset.segment_ids[r].max() + 1):
      at = np.flatnonzero(dataset.segment_ids[r] == segment)
      # A segment is contiguous.
      assert at[-1] - at[0] + 1 == len(at)
      predicted = at[dataset.loss_mask[r, at]]
      yield (
        dataset.tokens[r, at].tolist(),
        dataset.positions[r, at].tolist(),
        [(int(i - at[0]) + 1, int(dataset.tokens[r, i + 1])) for i in predicted],
      )


@given(packable())
def test_pack_keeps_every_token_and_every_target_but_those_at_starts(case):
  documents, seq_len = case
  expected = []
  for document in documents:
    ids = [*document[0], *document[1]] if isinstance(document, tuple) else document
    learned = dict.fromkeys(range(0, len(ids), seq_len), ())
    targets = iter(learned_targets(document, seq_len))
    prompt_length = len(document[0]) if isinstance(document, tuple) else 0
    for start in learned:
      piece = ids[start : start + seq_len]
      counted = sum(start + i >= prompt_length for i in range(1, len(piece)))
      expected.append((piece, list(range(len(piece))), [next(targets) for _ in range(counted)]))
    assert next(targets, None) is None
  assert sorted(pieces_of(data.pack(documents, seq_len))) == sorted(expected)


@given(packable())
def test_pack_pads_right_and_masks_within_segments(case):
  documents, seq_len = case
  dataset = data.pack(documents, seq_len)
  segments = dataset.segment_ids
  padding = segments == 0
  assert not (padding[:, :-1] & ~padding[:, 1:]).any()
  assert (segments[:, 0] == 1).all()
  assert not dataset.tokens[padding].any() and not dataset.positions[padding].any()
  assert not dataset.loss_mask[:, -1].any()
  crosses = (segments[:, :-1] != segments[:, 1:]) | padding[:, :-1]
  assert not (dataset.loss_mask[:, :-1] & crosses).any()


@given(packable())
def test_pack_is_deterministic(case):
  documents, seq_len = case
  first, second = data.pack(documents, seq_len), data.pack(iter(documents), seq_len)
  for name in ARRAYS:
    np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@given(packable())
def test_pack_opens_a_row_only_for_what_fits_in_no_other(case):
  documents, seq_len = case
  dataset = data.pack(documents, seq_len)
  room = (dataset.segment_ids == 0).sum(1)
  first_piece = (dataset.segment_ids == 1).sum(1)
  # Room only shrinks: what is left at the end was there when each later row was opened.
  for r in range(1, len(room)):
    assert (room[:r] < first_piece[r]).all()


def test_pack_fits_documents_in_order():
  dataset = data.pack([[1, 1, 1], [2, 2], [3, 3, 3], [4, 4]], 5)
  np.testing.assert_array_equal(dataset.tokens, [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]])
  np.testing.assert_array_equal(dataset.segment_ids, [[1, 1, 1, 2, 2]] * 2)
  np.testing.assert_array_equal(dataset.positions, [[0, 1, 2, 0, 1]] * 2)
  np.testing.assert_array_equal(dataset.loss_mask, np.array([[1, 1, 0, 1, 0]] * 2, bool))


def test_pack_learns_completions_alone():
  dataset = data.pack([([1, 2, 3], [4, 5]), ([6], [7])], 8)
  np.testing.assert_array_equal(dataset.tokens, [[1, 2, 3, 4, 5, 6, 7, 0]])
  np.testing.assert_array_equal(dataset.targets[dataset.loss_mask], [4, 5, 7])


def test_pack_cuts_long_documents_and_their_masks():
  dataset = data.pack([([1, 2, 3], [4, 5, 6])], 4)
  np.testing.assert_array_equal(dataset.tokens, [[1, 2, 3, 4], [5, 6, 0, 0]])
  np.testing.assert_array_equal(dataset.segment_ids, [[1, 1, 1, 1], [1, 1, 0, 0]])
  np.testing.assert_array_equal(dataset.positions, [[0, 1, 2, 3], [0, 1, 0, 0]])
  # 5 starts a piece: nothing predicts it.
  np.testing.assert_array_equal(dataset.targets[dataset.loss_mask], [4, 6])


def test_pack_keeps_few_rows_in_sight():
  """A document that fits only a row opened long ago goes to a row of its own."""
  long_ago = [[1] * 8, *[[2] * 9] * data._OPEN_ROWS]
  assert data.pack([*long_ago[:-1], [3, 3]], 10).tokens[0, -1] == 3
  assert data.pack([*long_ago, [3, 3]], 10).tokens[0, -1] == 0


@pytest.mark.parametrize(
  ("documents", "listed"),
  [
    ([[1, 2], [], [3, 4]], r"documents: 1 with .*: 1 \(0 \+ 0\)"),
    ([[1, 2], [7]], r"1 \(0 \+ 1\)"),
    ([([1, 2, 3], [])], r"0 \(3 \+ 0\)"),
    ([([], [5])], r"0 \(0 \+ 1\)"),
    ([([], [])], r"0 \(0 \+ 0\)"),
    # The only completion token starts the second piece.
    ([([1, 2, 3, 4], [5])], r"seq_len 4; remove .* 0 \(4 \+ 1\)"),
    ([[]] * 9, r"documents: 9 with .*: 0 \(0 \+ 0\), .*, 7 \(0 \+ 0\), …"),
  ],
)
def test_pack_lists_all_documents_with_nothing_to_learn(documents, listed):
  with pytest.raises(ValueError, match=listed):
    data.pack(documents, 4)


def test_pack_says_what_is_wrong():
  with pytest.raises(ValueError, match="documents: none"):
    data.pack([], 4)
  with pytest.raises(ValueError, match=r"documents\[1\]: <U3 of shape \(\); ids are"):
    data.pack([[1, 2], "abc"], 4)  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match=r"documents\[0\]: <U6 of shape \(2,\); ids are"):
    data.pack([("prompt", "answer")], 4)  # pyright: ignore[reportArgumentType]
  with pytest.raises(
    ValueError, match=r"documents\[0\]: object of shape \(2,\); .*a pair is a tup"
  ):
    data.pack([[[1, 2], [3]]], 4)  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match=r"documents\[0\]: a tuple of 3 sequences"):
    data.pack([([1], [2], [3])], 4)  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match=r"documents\[0\] completion: -1; an id"):
    data.pack([([1], [2, -1])], 4)
  with pytest.raises(ValueError, match="seq_len: 0"):
    data.pack([[1, 2]], 0)


def test_pack_takes_tuples_and_arrays_of_ids():
  expected = data.pack([[1, 2]], 2).tokens
  np.testing.assert_array_equal(data.pack([(1, 2)], 2).tokens, expected)
  np.testing.assert_array_equal(data.pack(np.array([[1, 2]]), 2).tokens, expected)


# Batches


@given(
  rows=st.integers(1, 12),
  batch_size=st.integers(1, 7),
  accumulate_steps=st.integers(1, 3),
  seed=st.integers(0, 2**40),
)
def test_each_row_is_seen_once_an_epoch(rows, batch_size, accumulate_steps, seed):
  batches = data.Batches(columns(rows, 2), batch_size, accumulate_steps, seed=seed)
  epochs = 3
  steps = -(-epochs * rows // (batch_size * accumulate_steps))
  seen = np.concatenate([batches.batch(step)["tokens"][..., 0].ravel() for step in range(steps)])
  for epoch in range(epochs):
    order = seen[epoch * rows : (epoch + 1) * rows]
    np.testing.assert_array_equal(np.sort(order), columns(rows, 2).tokens[:, 0])


@given(
  rows=st.integers(1, 9),
  steps=st.lists(st.integers(0, 10**12), min_size=1, max_size=6),
  seed=st.integers(0, 2**31),
)
@settings(max_examples=50)
def test_a_batch_does_not_depend_on_earlier_calls(rows, steps, seed):
  used = data.Batches(columns(rows, 3), 2, 2, seed=seed)
  for step in steps:
    fresh = data.Batches(columns(rows, 3), 2, 2, seed=seed).batch(step)
    for name, array in used.batch(step).items():
      np.testing.assert_array_equal(array, fresh[name])


def test_a_batch_holds_whole_rows():
  dataset = data.pack([([1, 2], [3, 4]), [5, 6, 7], [8, 9, 10], [11, 12]], 6)
  batch = data.Batches(dataset, 2, 3, seed=0).batch(4)
  assert batch.keys() == {*ARRAYS, "targets"}
  rows = {row.tobytes(): r for r, row in enumerate(dataset.tokens)}
  for name, array in batch.items():
    assert array.shape == (3, 2, 6)
    assert array.dtype == (np.bool_ if name == "loss_mask" else np.int32)
    for index in np.ndindex(3, 2):
      r = rows[batch["tokens"][index].tobytes()]
      np.testing.assert_array_equal(array[index], getattr(dataset, name)[r])


def test_epochs_and_seeds_differ_and_the_order_never_changes():
  def order(seed, epoch):
    batches = data.Batches(columns(10, 2), 10, seed=seed)
    return (batches.batch(epoch)["tokens"][0, :, 0] // 2).tolist()

  assert order(0, 0) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
  assert order(0, 1) == [7, 4, 5, 1, 9, 8, 6, 2, 0, 3]
  assert order(1, 0) == [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]


def test_only_the_current_orders_are_kept():
  batches = data.Batches(columns(5, 2), 4, seed=0)
  for step in range(20):
    batches.batch(step)
    assert len(batches._orders) <= 2


def test_batches_say_what_is_wrong():
  dataset = columns(2, 2)
  with pytest.raises(ValueError, match="batch_size: 0; it is at least 1"):
    data.Batches(dataset, 0, seed=0)
  with pytest.raises(ValueError, match="accumulate_steps: 0; it is at least 1"):
    data.Batches(dataset, 1, 0, seed=0)
  with pytest.raises(ValueError, match="seed: -1; it is at least 0"):
    data.Batches(dataset, 1, seed=-1)
  with pytest.raises(ValueError, match="step: -1; it is at least 0"):
    data.Batches(dataset, 1, seed=0).batch(-1)
  empty = data.Dataset(*(getattr(dataset, name)[:0] for name in ARRAYS))
  with pytest.raises(ValueError, match="rows of the dataset: 0; it is at least 1"):
    data.Batches(empty, 1, seed=0)


# evaluation_batches


@given(rows=st.integers(1, 12), batch_size=st.integers(1, 7))
def test_evaluation_sees_each_row_once_and_fills_with_padding(rows, batch_size):
  dataset = columns(rows, 3)
  batches = list(data.evaluation_batches(dataset, batch_size))
  assert len(batches) == -(-rows // batch_size)
  for name in (*ARRAYS, "targets"):
    arrays = [batch[name] for batch in batches]
    assert all(array.shape == (batch_size, 3) for array in arrays)
    everything = np.concatenate(arrays)
    assert everything.dtype == getattr(dataset, name).dtype
    np.testing.assert_array_equal(everything[:rows], getattr(dataset, name))
    assert not everything[rows:].any()
  assert sum(batch["loss_mask"].sum() for batch in batches) == dataset.num_targets


def test_evaluation_refuses_no_batch_size_at_the_call():
  with pytest.raises(ValueError, match="batch_size: 0"):
    data.evaluation_batches(columns(1, 2), 0)


# load_documents


def write_lines(path, *records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def test_load_text_as_it_stands(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes("é\r\nb\n\u2028c".encode())
  assert data.load_documents(path) == ["é\r\nb\n\u2028c"]


def test_load_json_lines(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "one\\n"}\n\n{"text": "\u2028two", "n": 2}\n{"text": ""}', "utf-8")
  assert data.load_documents(str(path)) == ["one\n", "\u2028two", ""]


def test_load_other_fields_and_pairs(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", {"q": "1+1?", "a": "2"}, {"q": "2+2?", "a": "4"})
  assert data.load_documents(path, text_field="a") == ["2", "4"]
  pairs = data.load_documents(path, prompt_field="q", completion_field="a")
  assert pairs == [("1+1?", "2"), ("2+2?", "4")]


def test_load_zst_of_several_frames(tmp_path):
  zstandard = pytest.importorskip("zstandard")
  lines = [json.dumps({"text": f"{i}" * 50}).encode() + b"\n" for i in range(2000)]
  compress = zstandard.ZstdCompressor().compress
  content = compress(b"".join(lines[:700])) + compress(b"".join(lines[700:]))
  path = tmp_path / "a.jsonl.zst"
  path.write_bytes(content)
  assert data.load_documents(path) == [f"{i}" * 50 for i in range(2000)]
  # Half a file must not pass for a small corpus.
  path.write_bytes(content[:-5])
  with pytest.raises(ValueError, match=r"a\.jsonl\.zst: the zstd data ends .* cut short"):
    data.load_documents(path)
  path.write_bytes(b"plain text")
  with pytest.raises(ValueError, match=r"a\.jsonl\.zst: not zstd data"):
    data.load_documents(path)


def test_zst_without_zstandard_names_the_package(tmp_path, monkeypatch):
  (tmp_path / "a.jsonl.zst").write_bytes(b"")
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "zstandard":
      raise ModuleNotFoundError(f"No module named {name!r}")
    return real(name, *args, **kwargs)

  monkeypatch.delitem(sys.modules, "zstandard", raising=False)
  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(ModuleNotFoundError, match="pip install zstandard"):
    data.load_documents(tmp_path / "a.jsonl.zst")


def test_missing_file_names_the_absolute_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "corpus.txt").write_text("x")
  with pytest.raises(FileNotFoundError) as error:
    data.load_documents("corpsu.txt")
  assert str(tmp_path / "corpsu.txt") in str(error.value)
  assert "looked there for a .txt file" in str(error.value)
  assert "did you mean corpus.txt?" in str(error.value)
  with pytest.raises(FileNotFoundError, match=r"nowhere/a\.jsonl: no such file; looked"):
    data.load_documents("nowhere/a.jsonl")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"text": "x"', r"a\.jsonl:2: not JSON: .* at column 13"),
    (b'["x"]', r"a\.jsonl:2: a JSON list; each line holds an object"),
    (b'{"txt": "x", "n": 1}', r"a\.jsonl:2: no field 'text'; the fields are 'txt', 'n'"),
    (b'{"text": null}', r"a\.jsonl:2: field 'text' is None; it must be a string"),
    (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 at byte 10"),
  ],
)
def test_bad_line_names_file_line_and_fault(tmp_path, line, message):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
  with pytest.raises(ValueError, match=message) as error:
    data.load_documents(path)
  assert str(error.value).startswith(f"{path}:2: ")


def test_load_refuses_what_it_cannot_mean(tmp_path):
  with pytest.raises(ValueError, match=r"a\.csv: documents are read from \.txt, \.jsonl"):
    data.load_documents(tmp_path / "a.csv")
  with pytest.raises(ValueError, match="prompt_field 'q', completion_field None: give both"):
    data.load_documents(tmp_path / "a.jsonl", prompt_field="q")
  with pytest.raises(ValueError, match=r"a\.txt: a \.txt file is one document"):
    data.load_documents(tmp_path / "a.txt", prompt_field="q", completion_field="a")
  for name in ("a.txt", "a.jsonl"):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"no documents; the file is empty"):
      data.load_documents(tmp_path / name)
  (tmp_path / "a.txt").write_bytes(b"ab\xff")
  with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 at byte 2"):
    data.load_documents(tmp_path / "a.txt")


# split_text


@given(st.integers(2, 10**6))
@settings(max_examples=30)
def test_one_document_is_cut_at_the_documented_character(n):
  text = "ab" * (n // 2 + 1)
  for holdout in (0.1, 0.25, 0.5):
    cut = int((1 - holdout) * n)
    training, held_out = data.split_text([text[:n]], holdout)
    assert training == [text[:cut]]
    assert held_out == [text[cut:n]]


def test_holdout_is_read_as_the_decimal_it_was_written_as():
  # In floats, int((1 - 0.9) * 1000) is 99.
  assert [len(part[0]) for part in data.split_text(["x" * 1000], 0.9)] == [100, 900]


@given(documents=st.lists(st.text(max_size=2), min_size=2, max_size=30))
def test_documents_are_parted_in_order(documents):
  training, held_out = data.split_text(documents, 0.5)
  assert training + held_out == documents
  assert len(training) == len(documents) // 2


def test_pairs_are_parted():
  pairs = [("a", "1"), ("b", "2"), ("c", "3")]
  assert data.split_text(pairs, 0.3) == (pairs[:2], pairs[2:])


def test_split_says_what_is_wrong():
  for holdout in (0.0, 1.0, -0.1):
    with pytest.raises(ValueError, match=f"holdout: {holdout}; .* between 0 and 1"):
      data.split_text(["text"], holdout)
  with pytest.raises(ValueError, match=r"holdout: 0\.9 of 3 documents parts them 0 to 3"):
    data.split_text(["a", "b", "c"], 0.9)
  with pytest.raises(ValueError, match=r"holdout: 0\.5 of 1 characters parts them 0 to 1"):
    data.split_text(["a"], 0.5)
  with pytest.raises(ValueError, match=r"one .* pair"):
    data.split_text([("a", "b")], 0.5)
  with pytest.raises(ValueError, match="of 0 documents"):
    data.split_text([], 0.5)


@pytest.mark.skipif(not CORPORA.is_dir(), reason=f"the shared corpora are not at {CORPORA}")
def test_real_files_load():
  text = data.load_documents(CORPORA / "tinyshakespeare.txt")[0]
  training, held_out = data.split_text([text], 0.1)
  assert (len(training[0]), len(held_out[0])) == (int(0.9 * len(text)), 111540)
  pytest.importorskip("zstandard")
  pages = data.load_documents(CORPORA / "msdocs.jsonl.zst")
  assert len(pages) == 15262
  assert pages[0][:20] == "# OPTION AVXENCODING"

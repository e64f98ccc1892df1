import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from qlora_jax import data
from qlora_jax.hf.tokenizers import JsonTokenizer, SentencePieceTokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
STORIES = SHARED / "models" / "stories260K"
MISTRAL = SHARED / "tokenizers" / "mistral-v1"
GPT2 = SHARED / "tokenizers" / "gpt2"
SHAKESPEARE = SHARED / "corpora" / "tinyshakespeare.txt"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data is not at {SHARED}")

TEXTS = ("Once upon a time", " hello  world\n\n x", "ünïcödé 日本 🙂")
# transformers 5.24, encode(text, add_special_tokens=False): the ids of TEXTS, then how many ids the
# last tenth of tinyshakespeare has, and the sha256 of those as little-endian int32.
# fmt: off
EXPECTED = {
  "stories260K": (
    [403, 407, 261, 378],
    [281, 306, 414, 263, 304, 341, 13, 13, 410, 444],
    [410, 198, 191, 416, 198, 178, 429, 198, 185, 418, 485, 410, 233, 154, 168, 233, 159, 175, 410,
     243, 162, 156, 133],
    (70021, "4393b24b54a3b3ea375d31904841a920f103befccd4a3acab6d6efef25359350"),
  ),
  "mistral-v1": (
    [5713, 3714, 264, 727],
    [28705, 6312, 28709, 28705, 1526, 13, 13, 1318],
    [4675, 28711, 28920, 28717, 14697, 28797, 28705, 29142, 29119, 28705, 29340],
    (38071, "082fbe4bcd33322c0a444a73d2a215faecd4bb984b959f79c1cab98066bccc65"),
  ),
  "gpt2": (
    [7454, 2402, 257, 640],
    [23748, 220, 995, 628, 2124],
    [9116, 77, 26884, 66, 9101, 67, 2634, 10545, 245, 98, 17312, 105, 32485],
    (36059, "7a0f95164147aed251e312b0af08991176d34ee1767785208c2bdc124880d6d5"),
  ),
}
# fmt: on


def check_against_transformers(tokenizer, name):
  *expected, (count, digest) = EXPECTED[name]
  assert [tokenizer.encode(text) for text in TEXTS] == expected
  _, held_out = data.split_text(data.load_documents(SHAKESPEARE), 0.1)
  ids = tokenizer.encode(held_out[0])
  assert len(ids) == count
  assert hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest() == digest
  assert tokenizer.decode(ids) == held_out[0]
  assert isinstance(tokenizer, data.Tokenizer)


@needs_shared
@pytest.mark.parametrize(("directory", "vocab_size"), [(STORIES, 512), (MISTRAL, 32000)])
def test_sentencepiece_gives_the_ids_of_transformers(directory, vocab_size):
  tokenizer = load_tokenizer(directory)
  check_against_transformers(tokenizer, directory.name)
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (vocab_size, 1, 2)
  # BOS and EOS are not shown, and text that spells one is text.
  assert tokenizer.decode([1, *tokenizer.encode("hi"), 2]) == "hi"
  assert 2 not in tokenizer.encode("a</s>")


@needs_shared
@pytest.mark.parametrize(
  ("holdout", "corpus", "count"),
  [(0.1, "tinyshakespeare.txt", 136), (None, "wikitext-2/test.txt", 246)],
)
def test_windows_are_those_of_the_reference_losses(holdout, corpus, count):
  documents = data.load_documents(SHARED / "corpora" / corpus)
  text = data.split_text(documents, holdout)[1][0] if holdout else documents[0][:200_000]
  assert isinstance(text, str)
  dataset = data.windows(load_tokenizer(STORIES).encode(text), 512)
  assert dataset.tokens.shape == (count, 512)
  assert dataset.num_targets == count * 511


def gpt2_directory(directory):
  """A checkpoint's directory with a tokenizer.json, built from GPT-2's vocabulary and merges."""
  model = tokenizers.models.BPE.from_file(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt"))
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(["<|endoftext|>"])
  tokenizer.save(str(directory / "tokenizer.json"))
  return directory


@needs_shared
def test_tokenizer_json_gives_the_ids_of_transformers(tmp_path):
  tokenizer = load_tokenizer(gpt2_directory(tmp_path))
  check_against_transformers(tokenizer, "gpt2")
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, None, None)
  assert tokenizer.encode("a<|endoftext|>b") == [64, 50256, 65]
  assert tokenizer.decode([64, 50256, 65]) == "ab"


def word_tokenizer(directory, **config):
  """A tokenizer.json of three words that adds BOS, cuts and pads, as files in the wild do."""
  vocabulary = {"[UNK]": 0, "<s>": 1, "hello": 2, "world": 9}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  tokenizer.add_special_tokens(["<s>"])
  tokenizer.enable_truncation(3)
  tokenizer.enable_padding(length=8)
  tokenizer.save(str(directory / "tokenizer.json"))
  for name, content in config.items():
    (directory / f"{name}.json").write_text(json.dumps(content))
  return directory


def test_text_is_encoded_alone_and_whole(tmp_path):
  tokenizer = load_tokenizer(word_tokenizer(tmp_path))
  assert tokenizer.encode("hello world hello world hello") == [2, 9, 2, 9, 2]
  assert tokenizer.encode("") == []


def test_vocab_size_is_above_every_id(tmp_path):
  assert load_tokenizer(word_tokenizer(tmp_path)).vocab_size == 10


@pytest.mark.parametrize(
  "config",
  [
    {"tokenizer_config": {"bos_token": "<s>", "eos_token": None}},
    {"tokenizer_config": {"bos_token": {"content": "<s>", "lstrip": False}}},
    {"tokenizer_config": {}, "special_tokens_map": {"bos_token": "<s>"}},
  ],
)
def test_special_ids_are_read_from_the_files_beside(tmp_path, config):
  tokenizer = load_tokenizer(word_tokenizer(tmp_path, **config))
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, None)


def test_a_special_token_without_an_id_is_an_error(tmp_path):
  word_tokenizer(tmp_path, tokenizer_config={"eos_token": "</s>"})
  with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token '</s>' is not in"):
    load_tokenizer(tmp_path)


@needs_shared
def test_tokenizer_json_comes_first(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes((STORIES / "tokenizer.model").read_bytes())
  assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
  assert isinstance(load_tokenizer(word_tokenizer(tmp_path)), JsonTokenizer)


def test_errors_list_what_was_looked_for_and_where(tmp_path):
  (tmp_path / "vocab.json").write_text("{}")
  message = (
    f"{tmp_path}: no tokenizer; looked for tokenizer.json, then tokenizer.model, "
    "and it holds vocab.json"
  )
  with pytest.raises(FileNotFoundError, match=re.escape(message)):
    load_tokenizer(tmp_path)
  missing = tmp_path / "missing"
  with pytest.raises(FileNotFoundError, match=re.escape(f"{missing}: no such directory; looked")):
    load_tokenizer(missing)


@pytest.mark.parametrize(
  ("name", "message"),
  [("tokenizer.json", "not a tokenizer"), ("tokenizer.model", "not a SentencePiece model")],
)
def test_broken_files_are_named(tmp_path, name, message):
  (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: {message}")):
    load_tokenizer(tmp_path)
  word_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
    load_tokenizer(tmp_path)

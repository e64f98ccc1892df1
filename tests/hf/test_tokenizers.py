import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
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
  # BOS and EOS are not shown, and text that spells one is that token unless asked otherwise.
  assert tokenizer.decode([1, *tokenizer.encode("hi"), 2]) == "hi"
  assert tokenizer.encode("</s>") == [2]
  assert 2 not in tokenizer.encode("a</s>", split_special_tokens=True)


@needs_shared
@pytest.mark.parametrize(
  ("holdout", "corpus", "count"),
  [(0.1, "tinyshakespeare.txt", 136), (None, "wikitext-2/test.txt", 246)],
)
def test_windows_are_those_of_the_reference_losses(holdout, corpus, count):
  documents = data.load_documents(SHARED / "corpora" / corpus)
  text = data.split_text(documents, holdout)[1][0] if holdout else documents[0][:200_000]
  assert isinstance(text, str)
  # The `<unk>` that wikitext is full of is text there.
  ids = load_tokenizer(STORIES).encode(text, split_special_tokens=True)
  dataset = data.windows(ids, 512)
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
    {"tokenizer_config": {"bos_token": "<s>", "num_image_token": 256, "add_bos_token": True}},
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


def token(content, **flags):
  """An AddedToken as tokenizer_config.json spells it."""
  off = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
  return {"content": content, "special": True, **off, **flags}


def variants(n):
  """The files beside a vocabulary of `n` ids, by the name of the variant."""
  llama = {"model_type": "llama"}
  chat_tokens = {
    str(n): token("<|eot|>"),
    str(n + 1): token("<|im_start|>", rstrip=True),
    str(n + 2): token("<|im_end|>", lstrip=True),
    str(n + 3): token("userx", special=False, single_word=True),
  }
  roles = {"bos_token": "<|eot|>", "eos_token": token("<|im_end|>"), "unk_token": None}
  # transformers takes a token that is written out only with its type.
  roles["eos_token"]["__type"] = "AddedToken"
  return {
    "bare": {},
    "model": {"config": llama},
    "flags": {
      "config": {"model_type": "mistral"},
      "tokenizer_config": {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": True,
        "pad_token": "<unk>",
      },
    },
    "decoder": {
      "config": {"model_type": "phi3"},
      "tokenizer_config": {"legacy": False, "added_tokens_decoder": chat_tokens, **roles},
    },
    "maps": {
      "special_tokens_map": {"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>"]},
      "added_tokens": {"[PAD]": n, "<|im_start|>": n + 1, "userx": n + 2},
    },
    "llama": {
      "config": llama,
      "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
    },
    "llama-legacy": {
      "config": llama,
      "tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    },
    "llama-no-prefix": {
      "config": llama,
      "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    },
  }


def vocabulary_of_gpt2(directory):
  gpt2_directory(directory)
  return 50257


def vocabulary_of_mistral(directory):
  shutil.copy(MISTRAL / "tokenizer.model", directory)
  return 32000


def vocabulary_of_stories(directory):
  shutil.copy(STORIES / "tokenizer.model", directory)
  return 512


def vocabulary_of_mistral_as_json(directory):
  """Mistral's vocabulary with the pipeline of Llama 2's tokenizer.json, which adds BOS."""
  model = sentencepiece.SentencePieceProcessor(str(MISTRAL / "tokenizer.model"))
  pieces = {model.IdToPiece(i): i for i in range(len(model))}
  merges = [
    (-model.GetScore(i), i, piece[:cut], piece[cut:])
    for piece, i in pieces.items()
    if i > 258  # special tokens and bytes
    for cut in range(1, len(piece))
    if pieces.get(piece[:cut], 0) > 258 and pieces.get(piece[cut:], 0) > 258
  ]
  pairs = [(left, right) for _, _, left, right in sorted(merges)]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(pieces, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(content=" ", left=1),
    ]
  )
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  tokenizer.save(str(directory / "tokenizer.json"))
  return 32000


VOCABULARIES = {
  "gpt2": vocabulary_of_gpt2,
  "mistral": vocabulary_of_mistral,
  "mistral-json": vocabulary_of_mistral_as_json,
  "stories": vocabulary_of_stories,
}
# LlamaTokenizer is not for byte-level vocabularies, and Mistral's pieces, read from
# tokenizer.model, are not in the order of their scores (`_llama_class`).
CASES = {
  "gpt2": ("bare", "decoder", "maps"),
  "mistral": ("bare", "model", "flags", "decoder", "maps"),
  "mistral-json": ("bare", "flags", "decoder", "llama", "llama-legacy", "llama-no-prefix"),
  "stories": ("bare", "decoder", "llama", "llama-legacy", "llama-no-prefix"),
}
# sha256 of the ids that transformers 5.24 gives for `mixed_lines`, -1 after each.
DIGESTS = {
  "gpt2-bare": "ffac3385d13a2718",
  "gpt2-decoder": "a0fe4a7ebd273f94",
  "gpt2-maps": "1936ff9374abb662",
  "mistral-bare": "27abfea8cfb42ac5",
  "mistral-model": "27abfea8cfb42ac5",
  "mistral-flags": "27abfea8cfb42ac5",
  "mistral-decoder": "d126023f848747ea",
  "mistral-maps": "acf8815edd86e267",
  "mistral-json-bare": "27abfea8cfb42ac5",
  "mistral-json-flags": "27abfea8cfb42ac5",
  "mistral-json-decoder": "9d0f714402e7fcf2",
  "mistral-json-llama": "f2a14f1738eeb673",
  "mistral-json-llama-legacy": "dcea3e0f88eb96e9",
  "mistral-json-llama-no-prefix": "c42b2a904889ac1a",
  "stories-bare": "b54936d11fd20498",
  "stories-decoder": "db5b3132bcaa6d5d",
  "stories-llama": "1ced676999740da2",
  "stories-llama-legacy": "1ba8abd485e54e7f",
  "stories-llama-no-prefix": "18790067185b5b00",
}


def mixed_lines(data_folder):
  """1,000 lines: prose, code, tens of languages, emoji, control characters, special tokens."""

  def rows(path):
    return [json.loads(line) for line in (data_folder / path).open(encoding="utf-8")]

  draw = random.Random(0)
  corpora = data_folder / "corpora"
  pool = (corpora / "wikitext-2" / "test.txt").read_text(encoding="utf-8").split("\n")[:800]
  pool += SHAKESPEARE.read_text(encoding="utf-8").split("\n")[:200]
  pool += [row["input"] + row["output"] for row in rows("instruct/oasst/oa_questions.jsonl")[:300]]
  pool += [row["answer"] for row in rows("instruct/gsm8k/test.jsonl")[:100]]
  pool = [text for text in pool if text.strip()]
  # fmt: off
  bits = [
    "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[PAD]",
    "userx", "<|eot|>", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\0", "\x01", "\x1f", "\x7f",
    "\u200b", "\ufeff", "\xa0", "\u3000", "\u2028", "▁", "Ġ", "🙂", "👩\u200d👩\u200d👧", "🇩🇪", "é",
    "e\u0301", "ﬁ", "日本語", "한국어", "العربية", "हिन्दी", "ไทย", "Ω", "ß", "ꙮ", "\U0001f9ff",
    "Hello", "world", "don't", "1234567", "3.14", "{}", "def f(x):", "    return x[1:] != -1  # y",
    "</", "<", ">", "|", "s",
  ]
  # fmt: on
  lines = []
  for i in range(1000):
    text = draw.choice(pool)[:300]
    cut = draw.randint(0, len(text))
    salad = [draw.choice(bits) for _ in range(draw.randint(1, 12))]
    lines.append((text, "".join(salad), text[:cut] + salad[0] + text[cut:] + salad[-1])[i % 3])
  return lines


@pytest.fixture(params=[(v, f) for v in CASES for f in CASES[v]], ids="-".join, scope="module")
def case(request, shared, tmp_path_factory):
  """(name, directory, lines) of a vocabulary with one variant of the files beside it."""
  vocabulary, files = request.param
  directory = tmp_path_factory.mktemp(f"{vocabulary}-{files}")
  size = VOCABULARIES[vocabulary](directory)
  for name, content in variants(size)[files].items():
    (directory / f"{name}.json").write_text(json.dumps(content))
  lines = mixed_lines(shared / "data")
  if vocabulary == "stories":
    # A model that strips spaces: SentencePiece strips this character with them.
    lines = [line.replace("▁", "") for line in lines]
  return f"{vocabulary}-{files}", directory, lines


def test_a_thousand_lines_give_the_ids_of_transformers(case):
  name, directory, lines = case
  tokenizer = load_tokenizer(directory)
  ids = [tokenizer.encode(line) for line in lines]
  flat = np.array([i for each in ids for i in [*each, -1]], "<i4")
  assert hashlib.sha256(flat.tobytes()).hexdigest()[:16] == DIGESTS[name]
  assert all(0 <= i < tokenizer.vocab_size for each in ids for i in each)
  for line, each in zip(lines, ids, strict=True):
    same, offsets = tokenizer.encode_with_offsets(line)
    assert same == each
    assert all(0 <= start <= stop <= len(line) for start, stop in offsets)


def test_a_thousand_lines_against_transformers(case):
  transformers = pytest.importorskip("transformers")
  name, directory, lines = case
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  ours = load_tokenizer(directory)
  assert ours.vocab_size == len(theirs)
  assert ours.special_tokens == theirs.special_tokens_map
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
    theirs.bos_token_id,
    theirs.eos_token_id,
    theirs.pad_token_id,
  )
  different = [
    line for line in lines if ours.encode(line) != theirs.encode(line, add_special_tokens=False)
  ]
  framed = [
    line for line in lines if ours.encode(line, add_special_tokens=True) != theirs.encode(line)
  ]
  assert (different, framed) == ([], [])
  if not name.startswith("stories-bare") and not name.startswith("stories-decoder"):
    # Of spaces that are stripped, the two give offsets each in its way.
    for line in lines:
      encoding = theirs(line, add_special_tokens=False).encodings[0]
      assert ours.encode_with_offsets(line)[1] == encoding.offsets


def test_bos_and_eos_are_added_on_request(tmp_path):
  word_tokenizer(tmp_path, tokenizer_config={"bos_token": "<s>", "add_eos_token": True})
  tokenizer = load_tokenizer(tmp_path)
  # tokenizer.json says what is added; the flag does not count beside it.
  assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (True, False)
  assert tokenizer.encode("hello", add_special_tokens=True) == [1, 2]
  assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", None, None)


@needs_shared
def test_bos_and_eos_of_sentencepiece_follow_the_flags(tmp_path):
  vocabulary_of_stories(tmp_path)
  bare = load_tokenizer(tmp_path)
  assert bare.encode("hi", add_special_tokens=True) == bare.encode("hi")
  flags = {"add_bos_token": True, "add_eos_token": True, "pad_token": "<unk>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(flags))
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.encode("hi", add_special_tokens=True) == [1, *tokenizer.encode("hi"), 2]
  assert (tokenizer.pad_token, tokenizer.pad_id) == ("<unk>", 0)


def test_special_tokens_become_text_on_request(tmp_path):
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  alphabet = {letter: i for i, letter in enumerate(sorted(byte_level.alphabet()))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(["<x>"])
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  loaded = load_tokenizer(tmp_path)
  assert loaded.encode("a<x>") == [alphabet["a"], 256]
  split = [alphabet[letter] for letter in "a<x>"]
  assert loaded.encode("a<x>", split_special_tokens=True) == split
  assert loaded.encode("a<x>") == [alphabet["a"], 256]
  (tmp_path / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
  assert load_tokenizer(tmp_path).encode("a<x>") == split


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"added_tokens_decoder": {"2": token("world")}}, r"'world' has id 2, .* makes it 9"),
    ({"added_tokens_decoder": {"12": token("new")}}, r"'new' has id 12, .* makes it"),
    ({"added_tokens_decoder": {"x": token("new")}}, r"added_tokens_decoder: 'x' is no id"),
    ({"added_tokens_decoder": {"10": "new"}}, r"added_tokens_decoder\[10\]: 'new'; a token is"),
    ({"added_tokens_decoder": []}, r"added_tokens_decoder is no object"),
    ({"bos_token": 7}, r"bos_token: 7; a token is an object"),
    ({"pad_token": "[PAD]"}, r"pad_token '\[PAD\]' is not in the vocabulary of tokenizer.json"),
  ],
)
def test_files_that_contradict_each_other_are_named(tmp_path, config, message):
  word_tokenizer(tmp_path, tokenizer_config=config)
  with pytest.raises(ValueError, match=rf"tokenizer_config\.json: .*{message}"):
    load_tokenizer(tmp_path)


@needs_shared
def test_files_that_contradict_sentencepiece_are_named(tmp_path):
  vocabulary_of_stories(tmp_path)
  (tmp_path / "added_tokens.json").write_text('{"▁a": 600}')
  with pytest.raises(ValueError, match=r"added_tokens\.json: token '▁a' has id 600, and is piece"):
    load_tokenizer(tmp_path)
  (tmp_path / "added_tokens.json").write_text('{"[PAD]": 600}')
  assert load_tokenizer(tmp_path).vocab_size == 601
  (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[pad]"}')
  with pytest.raises(ValueError, match=r"config\.json: pad_token '\[pad\]' is not in the vocabu"):
    load_tokenizer(tmp_path)

import hashlib
import itertools
import math
import re

import pytest

from qlora_jax import synthetic

NUMBERS = {word: n for n, word in enumerate(synthetic._NUMBERS)}
DOMAINS = ("tales", "manuals")


@pytest.mark.parametrize(
  ("domain", "digest"),
  [
    ("tales", "2c693eb943b5327b82d8e296562f2f1368bc950dda16ed812efa82d4a619cccb"),
    ("manuals", "9f386624eaa11ecd7c555d1b4f03ca22985a9af2e05bc6294cc8b17c5a5e76b9"),
  ],
)
def test_text_never_changes(domain, digest):
  """A base trained last year is evaluated on the same held-out text today."""
  text = "\n\n".join(synthetic.corpus(domain, 50, seed=7))
  assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_short_ascii(domain):
  documents = synthetic.corpus(domain, 2000, seed=0)
  assert all(document.isascii() and 100 <= len(document) <= 400 for document in documents)


@pytest.mark.parametrize("domain", DOMAINS)
def test_seeds_share_no_document_and_fewer_are_a_prefix_of_more(domain):
  training = synthetic.corpus(domain, 2000, seed=0)
  held_out = synthetic.corpus(domain, 2000, seed=1)
  assert len({*training, *held_out}) == 4000
  assert synthetic.corpus(domain, 10, seed=0) == training[:10]


def test_domains_differ_in_vocabulary():
  words = [
    set(re.findall("[a-z]{3,}", " ".join(synthetic.corpus(domain, 500, seed=0)).lower()))
    for domain in DOMAINS
  ]
  assert len(words[0] & words[1]) < 0.1 * min(map(len, words))


def test_tales_add_up():
  for tale in synthetic.corpus("tales", 500, seed=2):
    held = NUMBERS[re.findall(r"[SH]h?e had (\w+)", tale)[0]]
    found, after = re.findall(r"(\w+) more, so s?he had (\w+)\.", tale)[0]
    held += NUMBERS[found]
    assert held == NUMBERS[after], tale
    for lost, left in re.findall(r"(\w+), leaving (\w+)\.", tale):
      held -= NUMBERS[lost]
      assert held == NUMBERS[left], tale
    given, kept = re.findall(r"gave h\w+ (\w+) .* and kept (\w+)\.", tale)[0]
    assert held - NUMBERS[given] == NUMBERS[kept] >= 1 <= NUMBERS[given], tale


def test_tales_agree():
  plural = {many for one, many in synthetic._THINGS if one != many}
  for tale in synthetic.corpus("tales", 500, seed=3):
    hero = re.findall(r"^(?:In the .* named )?([A-Z]\w+)", tale)[0]
    she = hero in synthetic._SHE
    assert f". {'She' if she else 'He'} had " in tale
    assert f"{hero} put on {'her' if she else 'his'} " in tale
    # What is put on is what the hero had, and where they end is where the hero lived.
    assert tale.count(re.findall(r"put on h\w+ (\w+ \w+),", tale)[0]) == 2
    assert tale.count(re.findall(r"in the (\w+ \w+) until", tale)[0]) == 2
    for number, noun in re.findall(r"(?:had|gave h\w+) (\w+) (\w+) and", tale):
      if number == "one":
        assert noun not in plural, tale
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", tale), tale


def test_manuals_count_and_reverse_and_add_up():
  plurals = dict(synthetic._PARTS)
  for manual in synthetic.corpus("manuals", 500, seed=4):
    title, *steps = manual.split("\n")
    assert [int(step.split(".")[0]) for step in steps] == list(range(1, len(steps) + 1))
    machine = re.findall(r"^(\w+ \w+)\.", title)[0].lower()
    assert steps[0].lower().endswith(f"{machine}.")
    assert f"restart {machine};" in steps[-1].lower()
    removed = re.findall(r"the (\w+)", next(s for s in steps if "Remove" in s))
    refitted = re.findall(r"the (\w+)", next(s for s in steps if "Refit" in s))
    assert refitted == removed[::-1]
    checks = re.findall(r"Check that the (\w+) (is|are)", manual)
    assert [part for part, _ in checks] == removed[:2]
    assert all((verb == "are") == plurals[part] for part, verb in checks)
    for a, b, total in re.findall(r"Add (\d+) .* and (\d+) .*: (\d+) ml", manual):
      assert int(a) + int(b) == int(total)
    assert 2 <= int(re.findall(r"repeat step (\d+)", manual)[0]) < len(steps)


@pytest.mark.parametrize(("domain", "stated"), [("tales", 0.144), ("manuals", 0.132)])
def test_entropy_is_what_the_docstring_states(domain, stated, monkeypatch):
  """The draws can be read off the text, so their entropy is the least loss a model can reach."""
  nats = 0.0
  below = synthetic._Draw.below

  def counted(self, n):
    nonlocal nats
    nats += math.log(n)
    return below(self, n)

  monkeypatch.setattr(synthetic._Draw, "below", counted)
  documents = synthetic.corpus(domain, 2000, seed=5)
  assert nats / sum(map(len, documents)) == pytest.approx(stated, rel=0.01)
  assert f"{stated} " in str(synthetic.__doc__)


def test_draws_are_even():
  draw = synthetic._Draw(3)
  counts = [0] * 7
  for _ in range(14000):
    counts[draw.below(7)] += 1
  assert all(abs(count - 2000) < 5 * math.sqrt(2000) for count in counts)
  orders = {tuple(draw.some("abc", 3)) for _ in range(200)}
  assert orders == set(itertools.permutations("abc"))
  assert {draw.between(2, 4) for _ in range(100)} == {2, 3, 4}


def test_errors_name_value_and_rule():
  with pytest.raises(
    ValueError, match=r"domain: 'tails'; there are tales, manuals; did you mean tales\?"
  ):
    synthetic.corpus("tails", 1, seed=0)
  with pytest.raises(ValueError, match="num_documents: 0; it is at least 1"):
    synthetic.corpus("tales", 0, seed=0)
  with pytest.raises(ValueError, match="seed: -1; it is at least 0"):
    synthetic.corpus("tales", 1, seed=-1)

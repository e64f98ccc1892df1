"""Generated text for a quickstart that needs no download: two small worlds with rules to learn.

Fine-tuning is worth showing only where there is something to learn twice: once by the base model,
and again, different, by the adapters. Two grammars provide it. "tales" are little stories in the
past tense; a base is trained on them. "manuals" are numbered maintenance instructions; they share
the alphabet with the tales and little else, so a base that knows tales is lost there until an
adapter has learned them.

Each draws from a short lexicon, so that a byte-level model of under a million parameters learns to
spell in seconds, and each has rules that reach across a document and take longer:

  tales     she or he, her or his, one plum or two plums, a or an; the hero's name, place and red
            hat come back; what is found, stolen and given adds up ("had two ... found three more,
            so she had five ... gave him four plums and kept one").
  manuals   steps count up; parts come off in one order and go back in the reverse of it; is or
            are; a total is the sum of two fills; the machine and its code come back.

What the rules leave open is drawn at random, so the loss falls towards the entropy of those draws
and not to 0: 0.144 nats a byte for tales, 0.132 for manuals. (A Llama-like model of 0.84 million
parameters, trained on tales for 200 steps of 16 · 256 bytes, 50 seconds on two CPU cores, was at
0.31 on held-out tales and at 5.6 on manuals.)

Documents of different seeds are different draws from the same grammar: train with one seed, hold
out with another. A document is one of some 10¹⁸, so no held-out one was trained on.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

_T = TypeVar("_T")


def corpus(domain: str, num_documents: int, seed: int) -> list[str]:
  """Generates documents of 100 to 400 ASCII characters.

  The same arguments give the same text on every machine and version of Python and NumPy, and
  fewer documents are the first ones of more.

  Args:
    domain: "tales" or "manuals".
    num_documents: how many; at least 1.
    seed: which ones, at least 0. Held-out documents take another seed than training documents.

  Raises:
    ValueError: another domain, or a number that is too small.
  """
  if domain not in _GRAMMARS:
    near = difflib.get_close_matches(domain, _GRAMMARS, n=1)
    raise ValueError(
      f"domain: {domain!r}; there are {', '.join(_GRAMMARS)}"
      + (f"; did you mean {near[0]}?" if near else "")
    )
  if num_documents < 1:
    raise ValueError(f"num_documents: {num_documents}; it is at least 1")
  if seed < 0:
    raise ValueError(f"seed: {seed}; it is at least 0")
  draw = _Draw(seed)
  return [_GRAMMARS[domain](draw) for _ in range(num_documents)]


class _Draw:
  """Random choices that stay the same for good.

  NumPy promises that the raw stream of PCG64 never changes; what a Generator makes of it may, and
  so does what Python's `random` makes of its own.
  """

  def __init__(self, seed: int) -> None:
    self._bits = np.random.PCG64(np.random.SeedSequence(seed))

  def below(self, n: int) -> int:
    """An integer in [0, n)."""
    return ((int(self._bits.random_raw()) >> 32) * n) >> 32

  def between(self, low: int, high: int) -> int:
    """An integer in [low, high]."""
    return low + self.below(high - low + 1)

  def pick(self, options: Sequence[_T]) -> _T:
    """One of the options."""
    return options[self.below(len(options))]

  def some(self, options: Sequence[_T], n: int) -> list[_T]:
    """`n` different options, in the order drawn."""
    left = list(options)
    return [left.pop(self.below(len(left))) for _ in range(n)]


# Tales.

_SHE = ("Anna", "Clara", "Ella", "Flora", "Ida", "Lucy", "Mary", "Nora", "Rosa", "Vera")
_HE = ("Arthur", "Ben", "Carl", "Felix", "Hugo", "Jack", "Oliver", "Peter", "Simon", "Tom")
_ANIMALS = ("bear", "cat", "crow", "duck", "fox", "goat", "hare", "mouse", "owl", "wolf")
_TEMPERS = ("brave", "clever", "gentle", "happy", "kind", "old", "proud", "quiet", "shy", "young")
_LOOKS = ("dark", "deep", "empty", "far", "green", "high", "silent", "sunny", "warm", "wide")
_PLACES = ("cave", "field", "forest", "garden", "meadow", "mill", "tower", "town", "valley", "wood")
_THINGS = (
  ("apple", "apples"),
  ("berry", "berries"),
  ("cherry", "cherries"),
  ("egg", "eggs"),
  ("fish", "fish"),
  ("loaf", "loaves"),
  ("nut", "nuts"),
  ("pear", "pears"),
  ("plum", "plums"),
  ("shell", "shells"),
)
_COLOURS = ("black", "blue", "brown", "golden", "grey", "red", "silver", "white", "yellow")
_CLOTHES = ("belt", "cap", "cloak", "coat", "hat", "ribbon", "scarf", "shirt")
_TIMES = ("After lunch", "At noon", "Before dark", "In spring", "One day", "One morning", "Soon")
_GAINS = ("bought", "dug up", "found", "gathered", "picked", "was given", "won")
_LOSSES = ("ate", "broke", "hid", "lost", "spoiled", "stole", "took")
_NEEDS = ("cold", "hungry", "ill", "lonely", "lost", "poor", "sad", "thirsty", "tired", "wet")
_ENDINGS = ("danced", "laughed", "played", "rested", "sang", "talked", "waited", "walked")
_UNTIL = ("bedtime", "midnight", "moonrise", "sunset", "the rain stopped", "winter")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _with_article(word: str) -> str:
  return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _tale(draw: _Draw) -> str:
  hero_is_she, friend_is_she = draw.below(2) == 0, draw.below(2) == 0
  hero = draw.pick(_SHE if hero_is_she else _HE)
  friend = draw.pick([name for name in (_SHE if friend_is_she else _HE) if name != hero])
  she, her = ("she", "her") if hero_is_she else ("he", "his")
  animal, thief, friend_animal = draw.some(_ANIMALS, 3)
  temper, friend_temper = draw.some(_TEMPERS, 2)
  place = f"{draw.pick(_LOOKS)} {draw.pick(_PLACES)}"
  one, many = draw.pick(_THINGS)
  garment = f"{draw.pick(_COLOURS)} {draw.pick(_CLOTHES)}"

  def things(n: int) -> str:
    return f"{_NUMBERS[n]} {one if n == 1 else many}"

  if draw.below(2):
    opening = f"{hero} the {temper} {animal} lived in the {place}."
  else:
    opening = f"In the {place} lived {_with_article(temper)} {animal} named {hero}."
  held = draw.between(1, 4)
  sentences = [opening, f"{she.capitalize()} had {things(held)} and a {garment}."]

  found = draw.between(2, 5)
  held += found
  sentences.append(
    f"{draw.pick(_TIMES)} {she} {draw.pick(_GAINS)} {_NUMBERS[found]} more, "
    f"so {she} had {_NUMBERS[held]}."
  )
  if draw.below(2):
    # At least one is left to give and one to keep.
    lost = draw.between(1, held - 2)
    held -= lost
    sentences.append(
      f"{_with_article(thief).capitalize()} {draw.pick(_LOSSES)} {_NUMBERS[lost]}, "
      f"leaving {_NUMBERS[held]}."
    )

  given = draw.between(1, held - 1)
  held -= given
  sentences.append(
    f"Then {friend} the {friend_temper} {friend_animal} came. "
    f"{'She' if friend_is_she else 'He'} was {draw.pick(_NEEDS)}, so {hero} gave "
    f"{'her' if friend_is_she else 'him'} {things(given)} and kept {_NUMBERS[held]}."
  )
  sentences.append(
    f"{hero} put on {her} {garment}, and they {draw.pick(_ENDINGS)} in the {place} "
    f"until {draw.pick(_UNTIL)}."
  )
  return " ".join(sentences)


# Manuals.

_MACHINES = (
  "boiler",
  "crane",
  "drill",
  "engine",
  "lathe",
  "mixer",
  "press",
  "pump",
  "saw",
  "winch",
)
# A part, and whether its name is a plural.
_PARTS = (
  ("bolts", True),
  ("bracket", False),
  ("brushes", True),
  ("clamps", True),
  ("cover", False),
  ("filter", False),
  ("fuses", True),
  ("gasket", False),
  ("hoses", True),
  ("nozzle", False),
  ("rotor", False),
  ("screws", True),
  ("springs", True),
  ("valve", False),
)
_TOOLS = ("gauge", "hammer", "key", "lamp", "mallet", "pliers", "probe", "solvent", "wrench")
_STATES = ("aligned", "clean", "dry", "flat", "free of dust", "level", "not worn", "tight", "whole")
_FLUIDS = ("acid", "coolant", "glycol", "grease", "oil", "resin", "water", "wax")
_UNITS = ("amps", "bar", "kPa", "Nm", "rpm", "volts")
_CONTROLS = ("dial", "fan", "heater", "knob", "lever", "relay", "switch", "timer")
_SHUTDOWNS = ("Close", "Depressurize", "Drain", "Isolate", "Lock", "Switch off", "Unplug", "Vent")


def _manual(draw: _Draw) -> str:
  machine = draw.pick(_MACHINES)
  code = f"{draw.pick('BCDFGHJKLM')}{draw.below(10)}{draw.below(10)}"
  parts = draw.some(_PARTS, draw.between(2, 3))

  steps = [f"{draw.pick(_SHUTDOWNS)} {machine} {code}"]
  steps.append("Remove " + ", then ".join(f"the {part}" for part, _ in parts))
  for part, several in parts[:2]:
    steps.append(f"Check that the {part} {'are' if several else 'is'} {draw.pick(_STATES)}")
  if draw.below(2):
    first, second = draw.between(1, 9), draw.between(1, 9)
    steps.append(
      f"Add {first}0 ml {draw.pick(_FLUIDS)} and {second}0 ml {draw.pick(_FLUIDS)}: "
      f"{first + second}0 ml"
    )
  steps.append("Refit " + ", then ".join(f"the {part}" for part, _ in reversed(parts)))
  steps.append(f"Set the {draw.pick(_CONTROLS)} to {draw.between(10, 99)} {draw.pick(_UNITS)}")
  steps.append(f"Restart {machine} {code}; if it fails, repeat step {draw.between(2, len(steps))}")

  tools = ", ".join(draw.some(_TOOLS, 2))
  lines = [f"{machine.upper()} {code}. Tools: {tools}."]
  lines += [f"{number}. {step}." for number, step in enumerate(steps, start=1)]
  return "\n".join(lines)


_GRAMMARS: dict[str, Callable[[_Draw], str]] = {"tales": _tale, "manuals": _manual}

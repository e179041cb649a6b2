"""What RULER's thirteen tasks share: a sample, its randomness, and filling it to a length."""

import functools
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from freqkv_jax.evals.corpora import Source

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Sample:
    """A question over a long text.

    Attributes:
      user: what the user says. prefix: how the answer begins.
      targets: what the answer must hold.
      marks: where in `user` (characters) each target first stands; for a question whose answer
        follows from several places, those.
    """

    user: str
    prefix: str
    targets: tuple[str, ...]
    marks: tuple[int, ...]


class Maker(Protocol):
    """Makes the samples of one task at one length.

    Attributes:
      max_new_tokens: of the answer. match_all: every target counts, else one is enough.
      least, most: units of filler; None is without end.
      slack: shorter than the target by fewer tokens than this, a sample is not tried with one
        unit more. At most what the smallest unit takes.
    """

    max_new_tokens: int
    match_all: bool
    least: int
    most: int | None
    slack: int

    def build(self, index: int, units: int) -> Sample:
        """Sample number `index` with so many units of filler; the same on every machine."""
        ...

    def describe(self) -> list[dict[str, str]]:
        """Corpora and word lists that it reads."""
        ...


@dataclass(frozen=True)
class Dice:
    """Randomness by name: what is drawn for one purpose does not depend on any other."""

    seed: int
    task: str
    length: int

    def __call__(self, index: int, purpose: str) -> random.Random:
        """A generator that is the same on every machine (a str seed goes through SHA-512)."""
        return random.Random(f"{self.seed}/{self.task}/{self.length}/{index}/{purpose}")


class TooShort(ValueError):
    """A task that does not fit a length even with the least filler."""


def fit(
    read: Callable[[int], Sequence[int]],
    budget: int,
    guess: int,
    least: int,
    most: int | None,
    slack: int,
) -> tuple[int, Sequence[int]]:
    """The number of units with which a sample takes at most `budget` tokens and one more would not.

    Args:
      read: tokens of the sample with so many units; more units, more tokens.
      guess: where to begin. least, most, slack: as `Maker` has them.

    Returns:
      Units, and the tokens.

    Raises:
      TooShort: `least` units take more than `budget`.
    """
    ceiling = math.inf if most is None else most + 1
    best: tuple[int, Sequence[int]] | None = None
    counts: dict[int, int] = {}
    units = max(least, guess if most is None else min(guess, most))
    while True:
        tokens = read(units)
        counts[units] = len(tokens)
        if len(tokens) <= budget:
            best = (units, tokens)
            if budget - len(tokens) < slack or units + 1 >= ceiling:
                return best
        elif units <= least:
            raise TooShort(f"{len(tokens)} tokens with the least filler, allowed {budget}")
        else:
            ceiling = units
            if best is not None and ceiling - best[0] == 1:
                return best
        units = _next_units(counts, budget, units, best[0] if best else least - 1, ceiling)


def _next_units(counts: dict[int, int], budget: int, units: int, low: int, ceiling: float) -> int:
    """By the line through the two tries nearest to the budget, kept strictly between bounds."""
    near = sorted(counts, key=lambda tried: abs(counts[tried] - budget))[:2]
    slope = 0.0
    if len(near) == 2:
        slope = (counts[near[0]] - counts[near[1]]) / (near[0] - near[1])
    if slope <= 0:  # one try only, or too near to each other
        slope = max(1.0, counts[units] / max(units, 1))
    guess = near[0] + math.floor((budget - counts[near[0]]) / slope)
    if len(counts) > 8 and math.isfinite(ceiling):
        guess = (low + int(ceiling)) // 2
    return int(max(low + 1, min(guess, ceiling - 1)))


@dataclass(frozen=True)
class Words:
    """English words of the wonderwords package."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    source: Source

    @functools.cached_property
    def all(self) -> tuple[str, ...]:
        """Every word once, sorted."""
        return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))


@functools.cache
def read_words() -> Words:
    """The lists of the installed wonderwords.

    Raises:
      ImportError: it is not installed.
    """
    try:
        from importlib.metadata import version

        from wonderwords import RandomWord
    except ImportError:
        raise ImportError(
            "the words of this task come with the package wonderwords;"
            " pip install 'freqkv-jax[eval]'"
        ) from None
    nouns, adjectives, verbs = (
        tuple(dict.fromkeys(RandomWord.read_words(f"{kind}list.txt")))
        for kind in ("noun", "adjective", "verb")
    )
    text = "\n\n".join("\n".join(words) for words in (nouns, adjectives, verbs))
    digest = hashlib.sha256(text.encode()).hexdigest()
    source = Source("words", f"wonderwords {version('wonderwords')}", digest)
    return Words(nouns, adjectives, verbs, source)

"""RULER's needle tasks (niah_*): key and value sentences in noise, essays or other needles.

Rules and templates are those of NVIDIA's RULER (arXiv 2404.06654, Apache-2.0).
"""

import functools
import random
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from freqkv_jax.evals.corpora import Source, read_essays
from freqkv_jax.evals.ruler_sample import NOISE, Dice, Sample, Words, read_words

TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I"
    " will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind}"
    " for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# Haystack, what keys and values are, and how many keys, values of a key, and keys asked for.
TASKS = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent, where needles go in essays
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass
class Needles:
    """Makes one of the eight. A unit of filler is a line of noise, a needle, or a word of essay."""

    task: str
    dice: Dice
    corpus: str | None
    max_new_tokens: int = 128
    match_all: bool = True
    most: int | None = None
    least: int = 1
    slack: int = 8  # fewer tokens than a line, a needle or a sentence has
    _essay: tuple[list[str], Source] | None = field(default=None, init=False)
    _words: Words | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        haystack, keys, values, num_keys, num_values, _ = TASKS[self.task]
        if haystack == "essay":
            self._essay = _essay_words(self.corpus)
        else:
            self.least = num_keys * num_values
        if "words" in (keys, values):
            self._words = read_words()

    def describe(self) -> list[dict[str, str]]:
        """Corpora and word lists that it reads."""
        sources = [self._essay[1] if self._essay else None, self._words and self._words.source]
        return [source.describe() for source in sources if source]

    def build(self, index: int, units: int) -> Sample:
        """Sample number `index` with so many units of filler."""
        haystack, key_kind, kind, num_keys, num_values, num_asked = TASKS[self.task]
        rng = self.dice(index, "needles")
        keys = _distinct(num_keys, self._draws(key_kind, rng))
        drawn = _distinct(num_keys * num_values, self._draws(kind, rng))
        values = {key: drawn[i * num_values :][:num_values] for i, key in enumerate(keys)}
        needles = [
            NEEDLE.format(kind=kind, key=key, value=value) for key in keys for value in values[key]
        ]
        rng.shuffle(needles)
        asked = rng.sample(keys, num_asked)
        places = self.dice(index, "places")
        if haystack == "essay":
            context = self._in_essay(needles, units, places)
        else:
            lines = [NOISE] * units
            if haystack == "needle":
                lines = self._other_needles(index, units, {*keys, *drawn})
            context = _in_lines(needles, lines, places)
        template, prefix, noun = TEMPLATE, PREFIX, kind
        if num_asked * num_values == 1:
            template, prefix, noun = _singular(TEMPLATE), _singular(PREFIX), kind[:-1]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if asked[1:] else asked[0]
        user = template.format(kind=noun, context=context, query=query)
        targets = tuple(value for key in asked for value in values[key])
        return Sample(
            user=user,
            prefix=prefix.format(kind=noun, query=query),
            targets=targets,
            marks=tuple(user.index(f"is: {value}.") + 4 for value in targets),
        )

    def _draws(self, kind: str, rng: random.Random) -> Iterator[str]:
        while True:
            if kind == "numbers":
                yield str(rng.randint(10**6, 10**7 - 1))
            elif kind == "uuids":
                yield str(uuid.UUID(int=rng.getrandbits(128), version=4))
            else:
                assert self._words is not None
                yield f"{rng.choice(self._words.adjectives)}-{rng.choice(self._words.nouns)}"

    def _other_needles(self, index: int, count: int, taken: set[str]) -> list[str]:
        """Needles that nobody asks for; a longer list begins as a shorter one does."""
        _, key_kind, kind, *_ = TASKS[self.task]
        rng = self.dice(index, "haystack")
        keys, values = self._draws(key_kind, rng), self._draws(kind, rng)
        lines = []
        while len(lines) < count:
            key, value = next(keys), next(values)
            if key not in taken and value not in taken:
                lines.append(NEEDLE.format(kind=kind, key=key, value=value))
        return lines

    def _in_essay(self, needles: list[str], num_words: int, places: random.Random) -> str:
        """At sentence borders, at distinct depths of the grid, in the order given."""
        assert self._essay is not None
        words = self._essay[0]
        rounds, rest = divmod(num_words, len(words))
        sentences = SENTENCE_END.split(" ".join(words * rounds + words[:rest]))
        depths = sorted(places.sample(DEPTHS, len(needles)))
        pieces, done = [], 0
        for needle, depth in zip(needles, depths, strict=True):
            border = int(len(sentences) * depth / 100)
            pieces += [*sentences[done:border], needle]
            done = border
        return " ".join(pieces + sentences[done:])


@functools.lru_cache(maxsize=2)
def _essay_words(corpus: str | None) -> tuple[list[str], Source]:
    text, source = read_essays(corpus)
    return text.split(), source


def _in_lines(needles: list[str], lines: list[str], places: random.Random) -> str:
    """Before distinct lines, every line as likely as another; in the order given."""
    at = sorted(places.sample(range(len(lines)), len(needles)))
    pieces, done = [], 0
    for needle, line in zip(needles, at, strict=True):
        pieces += [*lines[done:line], needle]
        done = line
    return "\n".join(pieces + lines[done:])


def _singular(template: str) -> str:
    """One thing instead of several, by replacing words wherever they stand, as RULER does."""
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")


def _distinct(count: int, draws: Iterator[str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[next(draws)] = None
    return list(found)

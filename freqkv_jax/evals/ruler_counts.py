"""RULER's counting tasks: the most common words of a list (cwe) and of a coded text (fwe).

Rules and templates are those of NVIDIA's RULER (arXiv 2404.06654, Apache-2.0).
"""

import itertools
import math
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, field

from freqkv_jax.evals.ruler_sample import Dice, Sample, Words, read_words

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common"
    " words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FREQUENT_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most"
    " frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please"
    " ignore the dots '....'. What are the three most frequently appeared words in the above coded"
    " text?"
)
FREQUENT_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
NUM_COMMON = 10
SHORT = 4096  # below it, the word list repeats its words less often
DOTS = "..."
ZETA_2 = math.pi**2 / 6  # sum of 1/n^2


@dataclass
class CommonWords:
    """cwe: ten words stand more often than the others; a unit of filler is one of the others.

    After all English words of the lists (at about 128K tokens) pairs of them follow.
    """

    dice: Dice
    max_new_tokens: int = 120
    match_all: bool = True
    least: int = 1
    most: int | None = None
    slack: int = 3
    _words: Words = field(init=False)

    def __post_init__(self) -> None:
        self._words = read_words()

    def describe(self) -> list[dict[str, str]]:
        """Word lists that it reads."""
        return [self._words.source.describe()]

    def build(self, index: int, units: int) -> Sample:
        """Sample number `index` with so many of the rarer words."""
        often, seldom = (6, 1) if self.dice.length < SHORT else (30, 3)
        shown_words, shown_often, shown_seldom = (
            (20, 3, 1) if self.dice.length < SHORT else (40, 10, 3)
        )
        rng = self.dice(index, "example")
        shown = list(itertools.islice(self._drawn(rng), shown_words))
        example = COMMON_TEMPLATE.format(context=_list(rng, shown, shown_often, shown_seldom))
        example += COMMON_PREFIX + " " + _numbered(shown[:NUM_COMMON])
        rng = self.dice(index, "words")
        words = list(itertools.islice(self._drawn(rng), NUM_COMMON + units))
        context = _list(self.dice(index, "order"), words, often, seldom)
        user = f"{example}\n{COMMON_TEMPLATE.format(context=context)}"
        begin = len(example)
        return Sample(
            user=user,
            prefix=COMMON_PREFIX,
            targets=tuple(words[:NUM_COMMON]),
            # Blanks around a word: none is found within another.
            marks=tuple(
                user.replace("\n", " ").index(f". {word} ", begin) + 2
                for word in words[:NUM_COMMON]
            ),
        )

    def _drawn(self, rng: random.Random) -> Iterator[str]:
        """Words in random order without end; no word twice."""
        words = list(self._words.all)
        rng.shuffle(words)
        yield from words
        seen = set(words)
        while True:
            pair = f"{rng.choice(self._words.adjectives)}-{rng.choice(self._words.nouns)}"
            if pair not in seen:
                seen.add(pair)
                yield pair


def _list(rng: random.Random, words: list[str], often: int, seldom: int) -> str:
    """The first ten words `often` times, the others `seldom`, shuffled and numbered."""
    repeated = words[:NUM_COMMON] * often + words[NUM_COMMON:] * seldom
    rng.shuffle(repeated)
    return _numbered(repeated)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclass
class FrequentWords:
    """fwe: words of random letters, the word of rank r at a share of r^-2 / zeta(2).

    Rank 1 is written as dots and does not count; ranks 2 to 4 are the answer. A unit of filler is
    one word of the total that the shares are of.
    """

    dice: Dice
    max_new_tokens: int = 50
    match_all: bool = True
    # Rank 4 must stand more often than rank 5: from here on it always does.
    least: int = 53
    most: int | None = None
    slack: int = 1
    letters: int = 6

    def describe(self) -> list[dict[str, str]]:
        """Nothing is read."""
        return []

    def build(self, index: int, units: int) -> Sample:
        """Sample number `index` with shares of so many words."""
        rng = self.dice(index, "vocabulary")
        words: dict[str, None] = {}
        while len(words) < max(5, self.dice.length // 50):
            words["".join(rng.choices(string.ascii_lowercase, k=self.letters))] = None
        ranked = [DOTS, *list(words)[1:]]
        text = [
            word
            for rank, word in enumerate(ranked, 1)
            for _ in range(int(units / (rank * rank * ZETA_2)))
        ]
        self.dice(index, "order").shuffle(text)
        user = FREQUENT_TEMPLATE.format(context=" ".join(text))
        targets = tuple(ranked[1:4])
        return Sample(
            user=user,
            prefix=FREQUENT_PREFIX,
            targets=targets,
            marks=tuple(user.index(word) for word in targets),
        )

"""RULER's variable tracking (vt): a chain of assignments between lines of noise.

Rules and templates are those of NVIDIA's RULER (arXiv 2404.06654, Apache-2.0).
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from freqkv_jax.evals.ruler_sample import NOISE, Dice, Sample, TooShort, fit

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables"
    " are assigned the value {value}, they are: "
)
HOPS = 4
EXAMPLE_TOKENS = 500  # the example has at most so many, answer included


@dataclass
class Chains:
    """One chain of five variables; a unit of filler is a line of noise.

    An example with three-letter names stands before it, made anew for every sample; where the
    budget is below 1000 tokens it takes at most half of that.
    """

    dice: Dice
    count_tokens: Callable[[str], Sequence[int]]
    max_new_tokens: int = 30
    match_all: bool = True
    least: int = 1
    most: int | None = None
    slack: int = 8
    example_lines: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        budget = min(EXAMPLE_TOKENS, self.dice.length // 2)
        try:
            # Names of the same kind give nearly the same length: a few tokens are left for them.
            found, _ = fit(
                lambda n: self.count_tokens(_example(self.dice(0, "example"), n)),
                budget - 10,
                guess=12,
                least=1,
                most=None,
                slack=self.slack,
            )
        except TooShort:
            found = 1
        self.example_lines = found

    def describe(self) -> list[dict[str, str]]:
        """Nothing is read."""
        return []

    def build(self, index: int, units: int) -> Sample:
        """Sample number `index` with so many lines of noise."""
        example = _example(self.dice(index, "example"), self.example_lines)
        names, value, context = _chain(self.dice(index, "chain"), units, letters=5)
        user = f"{example}\n\n{TEMPLATE.format(context=context, value=value)}"
        return Sample(
            user=user,
            prefix=PREFIX.format(count=len(names), value=value),
            targets=tuple(names),
            marks=tuple(user.index(f"VAR {name} =") for name in names),
        )


def _example(rng: random.Random, num_lines: int) -> str:
    names, value, context = _chain(rng, num_lines, letters=3)
    question = TEMPLATE.format(context=context, value=value)
    return question + PREFIX.format(count=len(names), value=value) + " ".join(names) + "\n\n"


def _chain(rng: random.Random, num_lines: int, letters: int) -> tuple[list[str], int, str]:
    """Names in the order of their assignment, the value, and the text that holds them."""
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    chain, value = list(names), rng.randint(10000, 99999)
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old}" for old, new in zip(chain, chain[1:], strict=False)]
    noise = [NOISE] * num_lines
    if num_lines <= len(lines):  # too few to choose from: between sentences then
        noise = [f"{sentence}." for text in noise for sentence in text.rstrip(".").split(". ")]
    at = sorted(rng.sample(range(len(noise)), len(lines)))
    pieces, done = [], 0
    for line, place in zip(lines, at, strict=True):
        pieces += [*noise[done:place], line]
        done = place
    return chain, value, "\n".join(pieces + noise[done:])

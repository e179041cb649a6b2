"""LongBench v1 (arXiv 2308.14508): its 16 English data sets, answered greedily and scored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from freqkv_jax.evals import scorers
from freqkv_jax.evals.chat_wrap import TEMPLATES, prompt_tokens
from freqkv_jax.evals.longbench_data import (
    Sample,
    file_digests,
    format_prompt,
    read_prompts,
    read_samples,
)
from freqkv_jax.evals.task import Answer, Engine, Item, Prompt, Record
from freqkv_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataSet:
    """How a data set is run: `few_shot` ones are answered by one line."""

    category: str
    metric: Callable[[str, str], float] | None  # None: labels, which the record brings
    max_new_tokens: int
    chat: bool = True
    few_shot: bool = False


_QA, _ROUGE, _EDIT = scorers.qa_f1, scorers.rouge_l, scorers.edit_similarity
DATA_SETS = {
    "narrativeqa": DataSet("single_doc_qa", _QA, 128),
    "qasper": DataSet("single_doc_qa", _QA, 128),
    "multifieldqa_en": DataSet("single_doc_qa", _QA, 64),
    "hotpotqa": DataSet("multi_doc_qa", _QA, 32),
    "2wikimqa": DataSet("multi_doc_qa", _QA, 32),
    "musique": DataSet("multi_doc_qa", _QA, 32),
    "gov_report": DataSet("summarization", _ROUGE, 512),
    "qmsum": DataSet("summarization", _ROUGE, 512),
    "multi_news": DataSet("summarization", _ROUGE, 512),
    "trec": DataSet("few_shot", None, 64, chat=False, few_shot=True),
    "triviaqa": DataSet("few_shot", _QA, 32, chat=False, few_shot=True),
    "samsum": DataSet("few_shot", _ROUGE, 128, chat=False, few_shot=True),
    "lcc": DataSet("code", _EDIT, 64, chat=False),
    "repobench-p": DataSet("code", _EDIT, 64, chat=False),
    "passage_count": DataSet("synthetic", scorers.count_share, 32),
    "passage_retrieval_en": DataSet("synthetic", scorers.retrieval_share, 32),
}
CATEGORIES = tuple(dict.fromkeys(about.category for about in DATA_SETS.values()))
FLAT14 = tuple(name for name, about in DATA_SETS.items() if about.category != "synthetic")


@dataclass(frozen=True, kw_only=True)
class LongBench:
    """Answers questions about long texts, summarises them, completes code.

    Prompts longer than `max_length` lose their middle, before chat markers are put around them, so
    a prompt may be a little longer than that in the end. With a `max_length` below the cache size
    nothing is ever compressed.
    """

    data: str = field(
        default="THUDM/LongBench",
        metadata={"help": "folder of NAME.jsonl files, data.zip, or a hub id with data.zip"},
    )
    subsets: tuple[str, ...] = field(
        default=tuple(DATA_SETS), metadata={"help": "data sets", "choices": tuple(DATA_SETS)}
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "records of each data set, evenly spaced (default: all)"}
    )
    max_length: int = field(
        default=7500,
        metadata={"help": "tokens of a prompt, middle cut out (Llama 2: 3500; Llama 3: 7500)"},
    )
    chat_template: str = field(
        default="none",
        metadata={"help": "around prompts, few-shot and code aside", "choices": TEMPLATES},
    )
    prompts: str | None = field(
        default=None, metadata={"help": "dataset2prompt.json (default: of --data, else lm-eval's)"}
    )
    other_prompts: bool = field(
        default=False, metadata={"help": "allow prompts with other wording than the benchmark's"}
    )

    name: ClassVar[str] = "longbench"
    protocol: ClassVar[str] = "longbench-v1"

    def __post_init__(self) -> None:
        unknown = [name for name in self.subsets if name not in DATA_SETS]
        if unknown or not self.subsets or len(set(self.subsets)) < len(self.subsets):
            raise ValueError(
                f"--subsets must be different data sets out of {', '.join(DATA_SETS)}; got"
                f" {', '.join(self.subsets) or 'none'}"
            )
        if self.max_length < 2:
            raise ValueError(f"--max-length must be at least 2, got {self.max_length}")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"--num-samples must be at least 1, got {self.num_samples}")
        if self.chat_template not in TEMPLATES:
            allowed = ", ".join(TEMPLATES)
            raise ValueError(f"--chat-template {self.chat_template!r}: allowed are {allowed}")

    def items(self, engine: Engine) -> list[Prompt]:
        """The prompts of all data sets, one data set after the other."""
        prompts = read_prompts(self.subsets, self.data, self.prompts, self.other_prompts)
        samples = read_samples(self.data, self.subsets)
        tokenizer = engine.tokenizer
        # One int object for each id: millions of tokens are held.
        shared = tuple(range(tokenizer.vocab_size))
        items = []
        for subset in self.subsets:
            for sample in evenly(samples[subset], self.num_samples):
                text = format_prompt(prompts, sample, self.data)
                items.append(self._prompt(tokenizer, sample, text, shared))
        return items

    def _prompt(
        self, tokenizer: Tokenizer, sample: Sample, text: str, shared: Sequence[int]
    ) -> Prompt:
        about = DATA_SETS[sample.subset]
        text, full_tokens = cut_middle(tokenizer, text, self.max_length)
        template = self.chat_template if about.chat else "none"
        tokens = tuple(shared[token] for token in prompt_tokens(tokenizer, text, template))
        # The benchmark rules a line break out as first token; here one does not end the answer yet.
        is_samsum = sample.subset == "samsum"
        return Prompt(
            key=f"{sample.subset}/{sample.index}",
            length=len(tokens),
            # Summaries take 16 times as long as one-line answers: batches of their own.
            group=f"{about.max_new_tokens:04d}{'-line' * is_samsum}",
            tokens=tokens,
            max_new_tokens=about.max_new_tokens,
            targets=sample.answers,
            stop=("\n",) if is_samsum else (),
            min_new_tokens=1 if is_samsum else 0,
            about={
                "subset": sample.subset,
                "full_tokens": full_tokens,
                "truncated": full_tokens > self.max_length,
                **({"all_classes": sample.all_classes} if about.metric is None else {}),
            },
        )

    def describe(self, engine: Engine) -> dict[str, Any]:
        """Where records and prompts are from, and their SHA-256."""
        del engine
        prompts = read_prompts(self.subsets, self.data, self.prompts, self.other_prompts)
        digests = file_digests(self.data, self.subsets)
        return {"path": self.data, "sha256": digests, "prompts": prompts.describe()}

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """Answers and their scores."""
        prompts = [item for item in batch if isinstance(item, Prompt)]
        answers = engine.generate(prompts)
        return [_record(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """Scores x 100 by data set and category, and the means that papers print.

        `macro6` is the mean of the six categories (LongBench's own), `flat14` that of the data sets
        that are not synthetic (FreqKV's table), `flat16` that of all; None where a set is missing.
        """
        del engine
        shares: dict[str, list[float]] = {}
        for record in records:
            shares.setdefault(record["subset"], []).append(record["score"])
        means = {name: float(np.mean(shares[name])) for name in self.subsets if name in shares}
        categories = {
            category: _mean(means, [n for n, s in DATA_SETS.items() if s.category == category])
            for category in CATEGORIES
        }
        macro6 = _mean(categories, CATEGORIES)
        rows = [
            [
                name,
                DATA_SETS[name].category,
                len(shares[name]),
                _percent(mean),
                _error(shares[name]),
            ]
            for name, mean in means.items()
        ]
        return {
            "score": _percent(_mean(means, list(means))),
            "scores": {name: _percent(mean) for name, mean in means.items()},
            "standard_errors": {name: _error(shares[name]) for name in means},
            "categories": {name: _percent(mean) for name, mean in categories.items()},
            "macro6": _percent(macro6),
            "flat14": _percent(_mean(means, FLAT14)),
            "flat16": _percent(_mean(means, list(DATA_SETS))),
            "num_truncated": sum(record["truncated"] for record in records),
            "table": {
                "columns": ["data set", "category", "records", "score", "standard error"],
                "rows": rows,
            },
        }


def cut_middle(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[str, int]:
    """The text, its middle cut out if it has more than `max_length` tokens, and how many it has.

    Special tokens count, but are not in what is put together again (LongBench's pred.py).
    """
    ids = tokenizer.encode(text, add_special_tokens=True)
    if len(ids) <= max_length:
        return text, len(ids)
    half = max_length // 2
    parts = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return "".join(parts), len(ids)


def score_answer(
    subset: str, answer: str, gold_answers: Sequence[str], all_classes: Sequence[str] = ()
) -> float:
    """Score of an answer, 0 to 1: the best over the gold answers, after LongBench's clean-up."""
    about = DATA_SETS[subset]
    if about.few_shot:
        answer = scorers.first_line(answer)
    if about.metric is not None:
        return scorers.best(about.metric, answer, gold_answers)
    return max(scorers.class_accuracy(answer, gold, all_classes) for gold in gold_answers)


def evenly(things: Sequence[Any], count: int | None) -> Sequence[Any]:
    """`count` of the things, evenly spaced, first and last among them; all where it is None."""
    if count is None or count >= len(things):
        return things
    places = np.linspace(0, len(things) - 1, count).round().astype(int)
    return [things[place] for place in places]


def _record(prompt: Prompt, answer: Answer) -> Record:
    about = dict(prompt.about)
    classes = about.pop("all_classes", ())
    return {
        **about,
        "score": score_answer(about["subset"], answer.text, prompt.targets, classes),
        "answer": answer.text,
        "targets": list(prompt.targets),
        "num_new_tokens": answer.num_tokens,
        "finished": answer.finished,
    }


def _mean(values: dict[str, Any], names: Sequence[str]) -> float | None:
    """Mean of the values of these names; None where one is missing."""
    found = [values.get(name) for name in names]
    if not found or None in found:
        return None
    return float(np.mean([value for value in found if value is not None]))


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _error(shares: Sequence[float]) -> float | None:
    """Standard error of the mean, x 100."""
    if len(shares) < 2:
        return None
    return round(100 * float(np.std(shares, ddof=1)) / math.sqrt(len(shares)), 2)

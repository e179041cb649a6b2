"""LongGenBench of Wu et al. (ICLR 2025, arXiv 2409.02076): one long text under many instructions.

The data are read at run time and never kept here; the judge's question is in our own words.
"""

import ast
import functools
import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from freqkv_jax.evals.chat_wrap import TEMPLATES, prompt_tokens
from freqkv_jax.evals.longbench import cut_middle, evenly
from freqkv_jax.evals.result import model_fingerprint
from freqkv_jax.evals.task import Answer, Engine, Item, Prompt, Record
from freqkv_jax.tokenizer import load_tokenizer

KINDS = ("once", "range", "periodic")
SEPARATOR = "#*#"
STOP = "*** finished"
SHORT_TOKENS, LONG_TOKENS = 16000, 32000
_FETCH = (
    "fetch Dataset/Dataset_short.json (or Dataset_long.json) of mozhu621/LongGenBench on GitHub and"
    " name it with --data"
)
_NOT_WORDS = re.compile(rf"[{re.escape(string.punctuation)}\s]+")


@dataclass(frozen=True)
class Assignment:
    """A record: `checks` has, for each kind, the event that a unit (its number) must tell of."""

    scenario: str
    index: int
    prompt: str
    prefix: str
    unit: str
    number: int
    checks: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True, kw_only=True)
class Text(Prompt):
    """The prompt of an assignment."""

    assignment: Assignment


@dataclass(frozen=True, kw_only=True)
class LongGenBench:
    """Diaries, menus, skyscrapers and cities: are all units there, and do they hold what they must?

    `completion_rate` is the share of units that were written. Accuracy counts only the units that
    are there, so a short text is not punished by it: read both, or `accuracy_x_completion`.
    Without a judge only `string_check` is known, the share of events that stand in their unit word
    for word, which no published figure can be compared with. Reference runs sample; this is greedy.
    """

    data: str = field(metadata={"help": "Dataset_short.json or Dataset_long.json"})
    num_samples: int | None = field(
        default=None, metadata={"help": "records, evenly spaced (default: all)"}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": f"of a text (default: {SHORT_TOKENS}, or {LONG_TOKENS} for long data)"},
    )
    chat_template: str = field(
        default="none", metadata={"help": "around the prompt", "choices": TEMPLATES}
    )
    judge: str | None = field(
        default=None, metadata={"help": "model that says whether a unit tells of an event"}
    )
    judge_template: str = field(
        default="tokenizer",
        metadata={"help": "around the judge's questions", "choices": TEMPLATES},
    )
    judge_max_length: int = field(
        default=4096, metadata={"help": "tokens of a unit that the judge reads, middle cut out"}
    )
    judge_batch_size: int = field(default=16, metadata={"help": "questions asked together"})

    name: ClassVar[str] = "longgenbench"
    protocol: ClassVar[str] = "lgb-a"

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "judge_max_length", "judge_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("chat_template", "judge_template"):
            if getattr(self, name) not in TEMPLATES:
                flag, allowed = "--" + name.replace("_", "-"), ", ".join(TEMPLATES)
                raise ValueError(f"{flag} {getattr(self, name)!r}: allowed are {allowed}")

    def items(self, engine: Engine) -> list[Text]:
        """A prompt for each record."""
        tokenizer = engine.tokenizer
        prompts = []
        if self.judge is not None:  # better now than after hours of writing
            prompt_tokens(load_tokenizer(self.judge), "", self.judge_template)
        for it in evenly(read_assignments(self.data), self.num_samples):
            text, prefix = it.prompt, ""
            # Within chat markers the first words of the text belong to the answer.
            if self.chat_template != "none" and text.endswith(it.prefix):
                text, prefix = text.removesuffix(it.prefix).rstrip(), it.prefix
            tokens = tuple(prompt_tokens(tokenizer, text, self.chat_template, prefix))
            prompts.append(
                Text(
                    key=f"{it.scenario}/{it.index}",
                    length=len(tokens),
                    tokens=tokens,
                    max_new_tokens=self.max_new_tokens
                    or (SHORT_TOKENS if it.number <= 100 else LONG_TOKENS),
                    stop=(STOP,),
                    assignment=it,
                )
            )
        return prompts

    def describe(self, engine: Engine) -> dict[str, Any]:
        """The data file, and who judges."""
        del engine
        digest = hashlib.sha256(Path(self.data).expanduser().read_bytes()).hexdigest()
        about = {"path": self.data, "sha256": digest}
        if self.judge is not None:
            about |= {"judge": self.judge, "judge_fingerprint": model_fingerprint(self.judge)}
            about |= {"judge_policy": "full", "judge_decoding": "greedy"}
        return about

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """Texts and what they hold."""
        prompts = [item for item in batch if isinstance(item, Text)]
        answers = engine.generate(prompts)
        records = [self._record(p, answer) for p, answer in zip(prompts, answers, strict=True)]
        if self.judge is not None:
            judge = load_judge(self.judge, engine.model.dtype, self.judge_batch_size)
            for prompt, record in zip(prompts, records, strict=True):
                self._judge(judge, prompt.assignment, record)
        return records

    def _record(self, prompt: Text, answer: Answer) -> Record:
        assignment = prompt.assignment
        blocks = units(assignment, answer.text)
        checks = [
            {
                "kind": kind,
                "unit": number,
                "found": number in blocks,
                "string_check": number in blocks and says(blocks[number], event),
            }
            for kind in KINDS
            for number, event in assignment.checks[kind].items()
        ]
        completion = len(blocks) / assignment.number
        return {
            "scenario": assignment.scenario,
            "score": _share([check["string_check"] for check in checks]),
            "scores": {
                "completion_rate": completion,
                "string_check": _share([c["string_check"] for c in checks if c["found"]]),
            },
            "completion_rate": completion,
            "num_units": assignment.number,
            "checks": checks,
            "answer": answer.text,
            "num_new_tokens": answer.num_tokens,
            "finished": answer.finished,
        }

    def _judge(self, judge: Engine, assignment: Assignment, record: Record) -> None:
        """Adds "judge" to the checks of units that are there, and makes it the score."""
        blocks = units(assignment, record["answer"])
        checks = [check for check in record["checks"] if check["found"]]
        questions = [
            self._question(
                judge, blocks[check["unit"]], assignment.checks[check["kind"]][check["unit"]]
            )
            for check in checks
        ]
        order = sorted(range(len(questions)), key=lambda i: questions[i].length)
        for i, answer in zip(order, judge.generate([questions[i] for i in order]), strict=True):
            checks[i]["judge"] = "yes" in answer.text.lower()
        record["score"] = _share([check.get("judge", False) for check in record["checks"]])
        record["scores"]["judge"] = _share([check["judge"] for check in checks])

    def _question(self, judge: Engine, block: str, event: str) -> Prompt:
        tokenizer = judge.tokenizer
        block, _ = cut_middle(tokenizer, block.strip(), self.judge_max_length)
        question = f"Does this text tell of the following: {event}? Say yes or no, nothing else."
        tokens = prompt_tokens(tokenizer, f"{block}\n\n{question}", self.judge_template)
        return Prompt(key=question, length=len(tokens), tokens=tuple(tokens), max_new_tokens=8)

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """Completion rate (mean over texts), accuracy by kind of check (share of all checks whose
        unit is there), and their product, x 100; `score` is the share of all checks met."""
        del engine
        if not records:
            return {"score": None, "completion_rate": None, "string_check": None, "judge": None}
        judged = self.judge is not None
        scenarios = dict.fromkeys(record["scenario"] for record in records)
        groups = {name: [r for r in records if r["scenario"] == name] for name in scenarios}
        groups["all"] = list(records)
        figures = {name: _figures(group, judged) for name, group in groups.items()}
        accuracy = "judge" if judged else "string_check"
        columns = ["scenario", "texts", "CR", *KINDS, "mean", "accuracy x CR"]
        rows = [
            [
                name,
                len(groups[name]),
                found["completion_rate"],
                *(found[accuracy][kind] for kind in KINDS),
                found[accuracy]["mean"],
                found["accuracy_x_completion"],
            ]
            for name, found in figures.items()
        ]
        return {
            **figures["all"],
            "score": _percent([record["score"] for record in records]),
            "accuracy_by": accuracy,
            "scores": {name: found["accuracy_x_completion"] for name, found in figures.items()},
            "num_unfinished": sum(not record["finished"] for record in records),
            "table": {"columns": columns, "rows": rows},
        }


def read_assignments(data: str) -> list[Assignment]:
    """The records of a data file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON list of such records (the record is named).
    """
    file = Path(data).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"--data {data} is not a file; {_FETCH}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{data} is not JSON: {error}; {_FETCH}") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"{data} must hold a JSON list of records; {_FETCH}")
    return [_assignment(f"{data}, record {i}", record, i) for i, record in enumerate(content)]


def _assignment(where: str, record: Any, index: int) -> Assignment:
    try:
        unit, number = str(record["type"]), int(record["number"])
        prompt, prefix = record["prompt"], record["prefix"]
        if not (isinstance(prompt, str) and isinstance(prefix, str) and number > 0):
            raise ValueError("prompt and prefix must be texts, number positive")
        checks = {kind: _checks(record[f"checks_{kind}"]) for kind in KINDS}
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: not a LongGenBench record: {reason}; {_FETCH}") from None
    scenario = re.sub(r"\W+", "-", unit.lower())
    return Assignment(scenario, index, prompt, prefix, unit, number, checks)


def _checks(value: Any) -> dict[int, str]:
    if isinstance(value, str):  # some records hold the dict as Python would print it
        value = ast.literal_eval(value)
    return {int(number): str(event) for number, event in value.items()}


def units(assignment: Assignment, generated: str) -> dict[int, str]:
    """The text of each unit asked for that is there, by its number; the first of a number counts.

    The text is the prefix and what was generated, cut at the separators; a unit is a piece that
    names itself ("Floor 7").
    """
    name = re.compile(re.escape(assignment.unit) + r" (\d+)")
    found: dict[int, str] = {}
    for piece in (assignment.prefix + generated.partition(STOP)[0]).split(SEPARATOR):
        match = name.search(piece)
        if match and 1 <= int(match[1]) <= assignment.number:
            found.setdefault(int(match[1]), piece)
    return found


def says(block: str, event: str) -> bool:
    """Whether the event stands in the block, whatever the case, punctuation and blanks."""
    return f" {_plain(event)} " in f" {_plain(block)} "


def _plain(text: str) -> str:
    return _NOT_WORDS.sub(" ", text.lower()).strip()


@functools.lru_cache(maxsize=1)
def load_judge(path: str, dtype: str, rows: int) -> Engine:
    """The judge with a full cache, answering `rows` questions together; loaded once and kept.

    Raises:
      ValueError, OSError: as `load_pretrained`.
    """
    import freqkv_jax as fk
    from freqkv_jax.evals.engine import ModelEngine

    model, params = fk.load_pretrained(path, kv=fk.FullConfig(), dtype=dtype)
    return ModelEngine(model, params, lambda: load_tokenizer(path), rows)


def _figures(records: Sequence[Record], judged: bool) -> dict[str, Any]:
    completion = [record["completion_rate"] for record in records]
    accuracy = {
        by: _by_kind(records, by) for by in ("string_check", *(("judge",) if judged else ()))
    }
    mean = accuracy["judge" if judged else "string_check"]["mean"]
    return {
        "completion_rate": _percent(completion),
        "string_check": accuracy["string_check"],
        "judge": accuracy.get("judge"),
        "accuracy_x_completion": None if mean is None else round(mean * np.mean(completion), 2),
    }


def _by_kind(records: Sequence[Record], by: str) -> dict[str, float | None]:
    checks = [check for record in records for check in record["checks"] if check["found"]]
    shares: dict[str, float | None] = {
        kind: _percent([check[by] for check in checks if check["kind"] == kind]) for kind in KINDS
    }
    known = [share for share in shares.values() if share is not None]
    shares["mean"] = round(float(np.mean(known)), 2) if len(known) == len(KINDS) else None
    return shares


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else 0.0


def _percent(values: Sequence[float]) -> float | None:
    return round(100 * float(np.mean(values)), 2) if values else None

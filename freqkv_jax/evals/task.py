"""What an evaluation task is: items of work, a record for each, and a summary of the records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from freqkv_jax.model.llama import Llama
from freqkv_jax.tokenizer import Tokenizer

Record = dict[str, Any]  # what JSON can hold


@dataclass(frozen=True, kw_only=True)
class Item:
    """One piece of a task's work.

    Attributes:
      key: names it within the run, the same in every run: "vt/8192/17".
      length: tokens that are read; items of near lengths are run together.
      group: items of different groups are never run together.
    """

    key: str
    length: int
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Prompt(Item):
    """A prompt to be continued greedily.

    Attributes:
      tokens: ids of the whole prompt, begin token and chat markers included.
      max_new_tokens: the answer has at most so many.
      targets: gold answers.
      stop: the answer ends before the first of these texts.
      min_new_tokens: end tokens and `stop` do not count before so many.
      about: what the record says of it besides (depth, position of the answer in tokens, ...).
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    targets: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a model made of a prompt; `finished` is False where the number of tokens ended it."""

    text: str
    num_tokens: int
    finished: bool


class Engine(Protocol):
    """A model with a policy, as tasks see it. Rows are padded inside; padding changes nothing."""

    model: Llama
    params: Any

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded when it is first asked for; ValueError where the model has none."""
        ...

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Greedy answers, in order, all prompts as one batch."""
        ...

    def log_probs(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each pair, of every token of the continuation (at least one context token before
        it): log p float64 [n], and whether it is the most likely one bool [n]. One batch."""
        ...


class Task(Protocol):
    """A task with its options: a frozen dataclass.

    Every field is an option: `--num-samples` on the command line, `num_samples` in a suite file.
    `field(metadata={"help": ..., "choices": ...})` describes it; its type (str, int, float, bool,
    tuple[...] of these, or one of these | None) says how it is read.

    Attributes:
      name: as on the command line. protocol: an id that changes whenever results would.
      measures_time: a task may say that its records are times of its own, which depend on mesh and
        device; see `measures_time`.
    """

    @property
    def name(self) -> str: ...
    @property
    def protocol(self) -> str: ...

    def items(self, engine: Engine) -> Sequence[Item]:
        """All items in a fixed order; made from options, data and tokenizer only. Everything that
        can be wrong with options or data is said here (ValueError, FileNotFoundError)."""
        ...

    def describe(self, engine: Engine) -> dict[str, Any]:
        """What the result file says about the data (paths, sha256), after `items`."""
        ...

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """A record for each item, in order. The driver adds key, length and compressions. An
        exception makes the driver try the items one by one and record those that fail."""
        ...

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """Top-level fields of the result file, of records without an error (maybe none). It may
        hold "table": {"columns": [...], "rows": [[...]]}, which is printed."""
        ...


def measures_time(task: Task) -> bool:
    """Whether a task's records are times: then a run on another device is another run."""
    return getattr(task, "measures_time", False)

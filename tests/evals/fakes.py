"""Engines and tasks without a model, for what is measured around one."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

import freqkv_jax as fk
from freqkv_jax.evals.task import Item
from freqkv_jax.model.llama import Llama
from tests.tiny import tiny_config

KV = fk.FreqKVConfig(cache_size=16, sink_size=2)
MODEL = Llama(tiny_config(), KV)


class FakeEngine:
    """Log-probabilities that follow from the tokens alone; remembers the batches."""

    def __init__(self, model=MODEL):
        self.model, self.params, self.calls = model, None, []

    @property
    def tokenizer(self):
        raise ValueError("this model has no tokenizer")

    def log_probs(self, contexts, continuations):
        self.calls.append([len(c) for c in continuations])
        rows = [np.asarray(c) for c in continuations]
        return [(-(row % 7).astype(np.float64), row % 2 == 0) for row in rows]


@dataclass(frozen=True, kw_only=True)
class FakeTask:
    """Squares numbers; those in `bad` fail, and `stop_at` ends the process's patience."""

    count: int = field(default=7, metadata={"help": "how many"})
    bad: tuple[int, ...] = ()
    kinds: int = 1
    stop_at: int | None = field(default=None, init=False)
    log: list = field(default_factory=list, init=False, compare=False)

    name: ClassVar[str] = "fake"
    protocol: ClassVar[str] = "fake-v1"

    def items(self, engine):
        numbers = [(i % self.kinds, i) for i in range(self.count)]
        return [
            Item(key=f"k{kind}/{i}", length=10 + (5 * i) % 13, group=str(kind))
            for kind, i in numbers
        ]

    def describe(self, engine):
        return {"sha256": "abc"}

    def run(self, engine, batch):
        numbers = [int(item.key.split("/")[1]) for item in batch]
        self.log.append(numbers)
        if self.stop_at is not None and len(self.log) > self.stop_at:
            raise KeyboardInterrupt
        for number in numbers:
            if number in self.bad:
                raise ValueError(f"{number} is\nbad")
        return [{"score": number**2 / 7, "num_new_tokens": 3} for number in numbers]

    def summarize(self, engine, records):
        return {"score": sum(record["score"] for record in records)}


def stopping(task, batches):
    """A copy of the task that is interrupted after so many batches."""
    task = dataclasses.replace(task)
    object.__setattr__(task, "stop_at", batches)
    return task

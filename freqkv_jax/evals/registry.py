"""The tasks by name. A task's module is loaded when the task is used."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

TASKS = {
    "perplexity": "freqkv_jax.evals.perplexity:Perplexity",
    "needle": "freqkv_jax.evals.needle:Needle",
    "ruler": "freqkv_jax.evals.ruler:Ruler",
    "longbench": "freqkv_jax.evals.longbench:LongBench",
    "longgenbench": "freqkv_jax.evals.longgenbench:LongGenBench",
    "cost": "freqkv_jax.evals.cost:Cost",
    "spectrum": "freqkv_jax.evals.spectrum:Spectrum",
    "choices": "freqkv_jax.evals.choices:Choices",
    "lm-eval": "freqkv_jax.evals.lm_eval_task:LmEval",
}
SUMMARIES = {
    "perplexity": "perplexity of long text",
    "needle": "find a sentence or a number hidden in a long text",
    "ruler": "the 13 RULER tasks",
    "longbench": "the 16 English LongBench tasks",
    "longgenbench": "long answers that keep to a plan",
    "cost": "time and memory against length",
    "spectrum": "energy of keys and values over frequency",
    "choices": "which tokens a policy keeps of a text, and for how long",
    "lm-eval": "tasks of the lm-eval harness",
}

NAMES = 8  # that a message lists of many


def task_class(name: str) -> type[Any]:
    """The class of a task; ValueError for an unknown name, with the nearest one."""
    if name not in TASKS:
        raise ValueError(f"no task is named {name!r}" + nearest(name, TASKS))
    module, _, cls = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def nearest(given: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, and all of them, or a few
    of many."""
    known = list(known)
    near = difflib.get_close_matches(str(given), known, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = known if len(known) <= NAMES + 2 else known[:NAMES]
    names = ", ".join(shown) or "none"
    more = f" and {len(known) - len(shown)} more" if len(shown) < len(known) else ""
    return f"{hint} (allowed: {names}{more})"

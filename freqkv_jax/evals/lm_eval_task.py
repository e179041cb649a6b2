"""`freqkv eval lm-eval`: tasks of the lm-eval harness as a task of ours.

lm-eval makes the requests and the metrics; between them the driver answers the requests, so that
a run that was stopped goes on, batches are of near length, and a failing request stops nothing.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from freqkv_jax.evals.task import Engine, Item, Record

NUMPY_SEED = 1234  # these two as lm-eval's own command line has them
FEWSHOT_SEED = 1234
BOOTSTRAP = 1000
EXTRA = "lm-eval is not installed: pip install 'freqkv-jax[eval]'"


@dataclass(frozen=True, kw_only=True)
class Document(Item):
    """What lm-eval asks of a document: requests (kind, arguments), and an item for each.

    All choices of a question are one document; a document has one answer to be written.
    """

    requests: tuple[tuple[str, Sequence[Any]], ...]
    items: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class LmEval:
    """Runs tasks of the lm-eval harness (its package is in the extra `eval`).

    Most tasks fetch their data from the Hugging Face hub when they are first used; --include-path
    adds tasks of your own. --limit counts documents of each task. Answers are greedy; a task that
    samples is refused unless --gen-kwargs do_sample=false overrules it.
    """

    tasks: tuple[str, ...] = field(metadata={"help": "names of tasks, groups, or globs"})
    include_path: str | None = field(default=None, metadata={"help": "folder of more task files"})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "examples before each question (default: the task's own)"}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "tokens of a prompt, the middle of longer ones cut out (default: all)"},
    )
    gen_kwargs: str = field(
        default="", metadata={"help": "generation settings over the task's: max_gen_toks=32,..."}
    )
    chat_template: str = field(
        default="none",
        metadata={"help": "the model's own chat markers", "choices": ("none", "tokenizer")},
    )
    fewshot_as_multiturn: bool = field(
        default=False, metadata={"help": "examples as turns of a conversation"}
    )
    system: str | None = field(default=None, metadata={"help": "system instruction"})
    lengths: tuple[int, ...] = field(
        default=(), metadata={"help": "for tasks that make their texts (ruler): tokens of each"}
    )
    seed: int = field(default=0, metadata={"help": "of Python's random, for such texts"})

    name: ClassVar[str] = "lm-eval"

    @property
    def protocol(self) -> str:
        """Names the harness's version: tasks change with it."""
        try:
            return "lm-eval-" + importlib.metadata.version("lm_eval")
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(EXTRA) from None

    def items(self, engine: Engine) -> list[Item]:
        """The documents of all tasks with their requests."""
        from freqkv_jax.evals import lm_eval_adapter

        lm = lm_eval_adapter.FreqKVLM(engine, self.max_length)
        if self.chat_template != "none":
            lm.apply_chat_template([{"role": "user", "content": "x"}])  # says if there is none
        with _tokenizer_folder(engine) as folder:
            loaded = self._load(folder)
        self._build(loaded["tasks"], lm)
        items: list[Item] = []
        requests: dict[str, list[str]] = {}  # digests of each item's requests
        for name, task in loaded["tasks"].items():
            try:
                for document in _documents(name, task.instances, lm):
                    items.append(document)
                    requests[document.key] = [_digest(*request) for request in document.requests]
            except ValueError as error:
                raise ValueError(f"lm-eval task {name}: {error}") from None
        about = {"_of": engine.tokenizer, "_loaded": loaded, "_requests": requests}
        self.__dict__.update(about, _lm=lm, _asked=set())
        return items

    def describe(self, engine: Engine) -> dict[str, Any]:
        """Digest of all requests, and documents of each task; makes them where `items` did not."""
        if self.__dict__.get("_of") is not engine.tokenizer:
            self.items(engine)
        tasks = self.__dict__["_loaded"]["tasks"]
        requests = [text for texts in self.__dict__["_requests"].values() for text in texts]
        return {
            "requests_sha256": _digest("all", requests),
            "num_documents": {name: len(task.eval_docs) for name, task in tasks.items()},
        }

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """log_probs and greedy of a document's requests, or the answer to its only one."""
        documents = [item for item in batch if isinstance(item, Document)]
        self.__dict__["_asked"].update(document.key for document in documents)
        found = iter(self.__dict__["_lm"].measure([i for d in documents for i in d.items]))
        records = []
        for document in documents:
            parts = [next(found) for _ in document.items]
            if "answer" in parts[0]:
                records += parts
                continue
            columns = {"log_probs": "log_prob", "greedy": "greedy"}
            records.append({new: [part[old] for part in parts] for new, old in columns.items()})
        return records

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """lm-eval's own metrics of the answers; a request that failed counts as a wrong answer."""
        import lm_eval

        requests, loaded = self.__dict__["_requests"], self.__dict__["_loaded"]
        answers: dict[str, Record] = {}
        for record in records:
            answers.update(zip(requests[record["key"]], _parts(record), strict=True))
        # Those that failed have no record here, and were asked in this process.
        keys = {record["key"] for record in records} | self.__dict__["_asked"]
        limit = 1 + max((int(key.rpartition("/")[2]) for key in keys), default=0)
        self._seed(loaded["tasks"])
        with _one_process():
            found: Any = lm_eval.evaluate(
                _replay(engine, self.max_length, answers),
                loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
                **self._chat(),
            )
        metrics = {name: dict(row) for name, row in found["results"].items()}
        return _plain(
            {
                "results": metrics,
                "groups": found.get("groups", {}),
                "task_versions": found.get("versions", {}),
                "num_fewshot": found.get("n-shot", {}),
                "higher_is_better": found.get("higher_is_better", {}),
                "num_documents": found.get("n-samples", {}),
                "samples": _values(found.get("samples") or {}),
                "table": _table(metrics),
            }
        )

    def _chat(self) -> dict[str, Any]:
        return {
            "system_instruction": self.system,
            "apply_chat_template": self.chat_template != "none",
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
        }

    def _load(self, tokenizer: str) -> Any:
        """The task objects, with their data."""
        from lm_eval.utils import simple_parse_args_string

        if self.include_path is not None and not os.path.isdir(self.include_path):
            raise FileNotFoundError(f"--include-path {self.include_path} is no folder")
        about: dict[str, Any] = {"tokenizer": tokenizer, "pretrained": tokenizer}
        if self.lengths:
            about["max_seq_lengths"] = list(self.lengths)
        manager, names = self._find(about)
        self._seed({})
        try:
            loaded = manager.load(names)
        except ImportError:
            raise
        except Exception as error:  # of the many packages that may fetch or read data
            raise OSError(
                f"lm-eval cannot load {', '.join(names)}: {type(error).__name__}: {error} (most"
                " tasks fetch their data from the Hugging Face hub: run once with network, or put"
                " the data where HF_HOME points)"
            ) from error
        if not loaded["tasks"]:
            raise ValueError(f"--tasks {' '.join(self.tasks)} names no task")
        settings = simple_parse_args_string(self.gen_kwargs) if self.gen_kwargs else {}
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ValueError(f"{name} runs code that the model writes; it is not run here")
            if settings and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value=settings, update=True)
            own = task.get_config("num_fewshot")
            if own != 0:  # a task that says 0 means it
                given = self.num_fewshot if self.num_fewshot is not None else own or 0
                task.set_config(key="num_fewshot", value=given)
        return loaded

    def _find(self, about: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """Where the tasks are defined, and the names of all that were asked for."""
        from lm_eval.tasks import TaskManager

        options: dict[str, Any] = {"include_path": self.include_path, "metadata": dict(about)}
        if self.include_path is not None:
            manager = TaskManager(include_defaults=False, **options)
            if set(self.tasks) <= set(manager.all_subtasks):  # a group may name others' tasks
                return manager, list(dict.fromkeys(self.tasks))
        manager = TaskManager(**options)  # reads thousands of files
        return manager, _known_names(manager, self.tasks)

    def _build(self, tasks: Mapping[str, Any], lm: Any) -> None:
        self._seed(tasks)
        chat = self._chat()
        markers = lm.apply_chat_template if chat["apply_chat_template"] else None
        for task in tasks.values():
            task.build_all_requests(chat_template=markers, **chat)

    def _seed(self, tasks: Mapping[str, Any]) -> None:
        """Requests are made twice, and come out the same."""
        random.seed(self.seed)
        np.random.seed(NUMPY_SEED)
        for task in tasks.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _documents(name: str, instances: Sequence[Any], lm: Any) -> Iterator[Document]:
    """lm-eval's requests of one task, document by document, keyed TASK/NUMBER."""
    held: dict[tuple[int, int], list[Any]] = {}
    for request in instances:
        place = 0
        # A second text to be written stands by itself.
        while request.request_type == "generate_until" and (place, request.doc_id) in held:
            place += 1
        held.setdefault((place, request.doc_id), []).append(request)
    for (place, number), requests in held.items():
        key = f"{name}/{number}" if place == 0 else f"{name}/{place}/{number}"
        items = tuple(lm.plan(r.request_type, r.args, f"{key}/{i}") for i, r in enumerate(requests))
        if len({item.group for item in items}) > 1:
            raise ValueError(f"document {number} asks for both scores and texts")
        yield Document(
            key=key,
            length=max(item.length for item in items),
            group=items[0].group,
            requests=tuple((r.request_type, r.args) for r in requests),
            items=items,
        )


def _parts(record: Record) -> list[Record]:
    """A document's record as one for each of its requests."""
    if "answer" in record:
        return [record]
    pairs = zip(record["log_probs"], record["greedy"], strict=True)
    return [{"log_prob": log_prob, "greedy": greedy} for log_prob, greedy in pairs]


def _known_names(manager: Any, names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        matched = manager.match_tasks([name])
        if not matched:
            near = difflib.get_close_matches(name, manager.all_tasks, 3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"lm-eval has no task {name!r}{hint} (`lm-eval ls tasks` lists all of them;"
                " --include-path adds a folder of your own)"
            )
        found += matched
    return list(dict.fromkeys(found))


def _replay(engine: Engine, max_length: int | None, answers: Mapping[str, Record]) -> Any:
    """A model that knows its answers already."""
    from freqkv_jax.evals.lm_eval_adapter import FreqKVLM, response

    class Replay(FreqKVLM):
        def _respond(self, kind: str, requests: Sequence[Any]) -> list[Any]:
            return [response(kind, answers.get(_digest(kind, r.args))) for r in requests]

    return Replay(engine, max_length)


def _digest(kind: str, arguments: Sequence[Any]) -> str:
    text = json.dumps([kind, *arguments], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _tokenizer_folder(engine: Engine) -> Iterator[str]:
    """The tokenizer where transformers finds it: tasks that make their texts count tokens."""
    with tempfile.TemporaryDirectory(prefix="freqkv-tokenizer-") as folder:
        engine.tokenizer.save(folder)
        yield folder


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """No forks for bootstrapping: the device belongs to this process."""
    name, before = "DISABLE_MULTIPROC", os.environ.get("DISABLE_MULTIPROC")
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _values(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Each metric of each document, in order: {task: {"metric,filter": [...]}}."""
    out: dict[str, Any] = {}
    for name, rows in samples.items():
        of_task: dict[str, list[Any]] = out.setdefault(name, {})
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            for metric in row["metrics"]:
                of_task.setdefault(f"{metric},{row['filter']}", []).append(row[metric])
    return out


def _table(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for name, row in results.items():
        for key, value in row.items():
            metric, _, which = key.partition(",")
            if not which or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            if value == -1 and metric.isdigit():  # RULER's lengths that were not run
                continue
            error = row.get(f"{metric}_stderr,{which}")
            shown = float(error) if isinstance(error, (int, float)) else ""
            rows.append([name, metric, which, float(value), shown])
    columns = ["task", "metric", "filter", "value", "standard error"]
    return _plain({"columns": columns, "rows": rows})


def _plain(value: Any) -> Any:
    """What JSON can hold; None for numbers that are none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)

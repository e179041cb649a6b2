"""Suites: a YAML file of tasks, models, policies and options, a result file for each cell."""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from freqkv_jax.evals.options import build_task, options_of
from freqkv_jax.evals.registry import nearest, task_class
from freqkv_jax.evals.task import Task
from freqkv_jax.kv.policy import KVPolicy, policy_from_dict

RUN_FLAGS = ("model", "adapter", "dtype", "mesh", "batch_size", "limit")
MODEL_KEYS = ("model", "adapter", "dtype", "mesh")
SUITE_KEYS = ("output", "common", "options", "models", "policies", "runs")
RUN_KEYS = ("task", "name", "models", "policies", "options", "grid")
# What a cell's row of the final table shows, the first that the result has.
HEADLINES = ("perplexity", "score", "nats_per_digit", "nats_per_token", "completion_rate")
FAILURES = (ValueError, OSError, ImportError, MemoryError, KeyError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a suite. `flags`: of the model and the run, as on the command line (RUN_FLAGS)."""

    name: str
    task: Task
    model_name: str
    policy_name: str
    kv: KVPolicy | None  # None: the policy that the model remembers
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_key(self) -> tuple[Any, ...]:
        """Cells with one key share a loaded model."""
        return tuple(self.flags.get(key) for key in MODEL_KEYS)


@dataclass(frozen=True)
class Suite:
    """All cells, those of one model together, and the folder of their results."""

    output: str | None
    cells: tuple[Cell, ...]


def find_suite(name: str) -> tuple[str, str]:
    """A suite file's text and name: a path, or the name of a packaged suite."""
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    folder = resources.files("freqkv_jax") / "configs" / "suites"
    known = sorted(f.name[:-5] for f in folder.iterdir()) if folder.is_dir() else []
    if name in known:
        return (folder / f"{name}.yaml").read_text(encoding="utf-8"), name
    raise FileNotFoundError(
        f"--suite {name} is neither a file nor a packaged suite" + nearest(name, known)
    )


def read_suite(
    text: str, name: str, flags: Mapping[str, Any], settings: Sequence[str] = ()
) -> Suite:
    """Reads and checks a whole suite before anything runs.

    Args:
      flags: of the command line (RUN_FLAGS that were given); they win over the file's `common`.
      settings: KEY=VALUE of task options; they win over the file.

    Raises:
      ValueError: what is wrong, where, and what is allowed.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    data = _mapping(data, name, SUITE_KEYS)
    runs = data.get("runs")
    if not isinstance(runs, list) or not runs:
        raise ValueError(f"{name}: runs must be a list of runs, each with a task")
    runs = [_mapping(run, f"{name}, run {i + 1}", RUN_KEYS) for i, run in enumerate(runs)]
    for i, run in enumerate(runs):
        if "task" not in run:
            raise ValueError(f"{name}, run {i + 1} has no task")
    reader = _Reader(name, data, runs, flags, _parse_settings(settings))
    cells = [
        cell for i, run in enumerate(runs) for cell in reader.cells(f"{name}, run {i + 1}", run)
    ]
    _check_names(name, cells)
    order = list(dict.fromkeys(cell.model_key for cell in cells))
    cells.sort(key=lambda cell: order.index(cell.model_key))
    return Suite(data.get("output"), tuple(cells))


class _Reader:
    """What all runs of a suite share."""

    def __init__(
        self,
        name: str,
        data: Mapping[str, Any],
        runs: Sequence[Mapping[str, Any]],
        flags: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        known = {n for run in runs for n in options_of(task_class(run["task"]))}
        common = _mapping(data.get("common") or {}, f"{name}, common", {*RUN_FLAGS, *known})
        options = _mapping(data.get("options") or {}, f"{name}, options", known)
        self.settings = _mapping(settings, "--set", known)
        self.flags = {k: v for k, v in common.items() if k in RUN_FLAGS} | dict(flags)
        # Keys of `common` that are options of tasks (seed, ...) go to the tasks that have them.
        self.options = {k: v for k, v in common.items() if k not in RUN_FLAGS} | options
        self.one_model = not data.get("models")
        lone = {Path(str(self.flags.get("model") or "model")).stem: {}}
        models = _mapping(data.get("models") or lone, f"{name}, models")
        self.models = {
            label: self.flags | _mapping(about or {}, f"{name}, model {label}", MODEL_KEYS)
            for label, about in models.items()
        }
        for label, about in self.models.items():
            if not about.get("model"):
                raise ValueError(f"{name}: model {label} has no path; give --model")
        if flags.get("model") not in (None, *(m["model"] for m in self.models.values())):
            raise ValueError(f"--model is of no use: {name} names the path of each of its models")
        policies = _mapping(data.get("policies") or {"freqkv": {}}, f"{name}, policies")
        self.policies = {k: _policy(f"{name}, policy {k}", v) for k, v in policies.items()}

    def cells(self, where: str, run: Mapping[str, Any]) -> Iterable[Cell]:
        """The cells of one run."""
        cls = task_class(run["task"])
        fields = options_of(cls)
        shared = {k: v for k, v in {**self.options, **self.settings}.items() if k in fields}
        fixed = _mapping(run.get("options") or {}, f"{where}, options", fields)
        grid = _mapping(run.get("grid") or {}, f"{where}, grid", fields)
        fixed = {**shared, **fixed, **{k: v for k, v in self.settings.items() if k in fields}}
        for key, values in grid.items():
            if key in self.settings:
                grid = grid | {key: _listed(self.settings[key])}
            elif not isinstance(values, list) or not values:
                raise ValueError(f"{where}: grid {key} must be a list of values, got {values!r}")
        models = _chosen(run.get("models"), self.models, f"{where}, models")
        policies = _chosen(run.get("policies"), self.policies, f"{where}, policies")
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            try:
                task = build_task(cls, {**fixed, **point})
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            for model, policy in itertools.product(models, policies):
                words = [str(run.get("name") or run["task"])]
                words += [policy] if self.one_model else [model, policy]
                words += [f"{key}{_word(value)}" for key, value in point.items()]
                yield Cell(
                    name="-".join(re.sub(r"[^\w.+]+", "_", word) for word in words),
                    task=task,
                    model_name=model,
                    policy_name=policy,
                    kv=self.policies[policy],
                    flags=self.models[model],
                )


def _mapping(value: Any, where: str, allowed: Iterable[str] | None = None) -> dict[str, Any]:
    """`value` as a dict with known keys, ValueError naming `where` if it is none."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of keys and values, got {value!r}")
    if allowed is not None:
        known = sorted(allowed)
        for key in value:
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}" + nearest(key, known))
    return {str(key): held for key, held in value.items()}


def _policy(where: str, about: Any) -> KVPolicy | None:
    if about is None:
        return None
    about = _mapping(about, where)
    if "compress_method" in about:  # the flag's name
        about["method"] = about.pop("compress_method")
    try:
        return policy_from_dict({"policy": "freqkv"} | about)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _chosen(names: Any, known: Mapping[str, Any], where: str) -> list[str]:
    if names is None:
        return list(known)
    for name in _listed(names):
        if name not in known:
            raise ValueError(f"{where}: {name!r} is not defined" + nearest(name, known))
    return _listed(names)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    found = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} is not of the form KEY=VALUE")
        found[key.strip().replace("-", "_")] = yaml.safe_load(value)
    return found


def _word(value: Any) -> str:
    """A value within a file name: "a/b.txt" -> "b"."""
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return Path(value).stem if isinstance(value, str) else str(value)


def select(suite: Suite, only: str) -> Suite:
    """The cells whose names match one of the patterns (*, ?, [...]), separated by commas.

    Raises:
      ValueError: a pattern that matches none.
    """
    patterns = [word.strip() for word in only.split(",")]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in suite.cells):
            known = [cell.name for cell in suite.cells]
            raise ValueError(f"--only {pattern!r} matches no cell" + nearest(pattern, known))
    chosen = (c for c in suite.cells if any(fnmatch.fnmatchcase(c.name, p) for p in patterns))
    return Suite(suite.output, tuple(chosen))


def _check_names(name: str, cells: Sequence[Cell]) -> None:
    seen = set()
    for cell in cells:
        if cell.name in seen:
            raise ValueError(
                f"{name}: two cells would write {cell.name}.json; give one of their runs a name:"
            )
        seen.add(cell.name)


def run_cells(
    suite: Suite,
    measure: Callable[[Cell, str], dict[str, Any]],
    folder: str,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Runs every cell; one that fails is noted, and the others go on.

    Args:
      measure: runs a cell, writing its result to the path given, or gives the result there.

    Returns:
      A row for each cell: name, file, and headline and value, or error.
    """
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(suite.cells):
        output = str(Path(folder) / f"{cell.name}.json")
        note(f"[{number + 1}/{len(suite.cells)}] {cell.name}")
        row: dict[str, Any] = {"name": cell.name, "file": output}
        try:
            row |= headline(measure(cell, output))
        except FAILURES as error:
            row["error"] = " ".join(f"{error}".split()) or type(error).__name__
            note(f"{cell.name} failed: {row['error']}")
        rows.append(row)
    return rows


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """The number that stands for a result in the table of a suite."""
    row = {
        "nothing_compressed": result.get("nothing_compressed", False),
        "num_failed": result.get("num_failed", 0),
    }
    for key in HEADLINES:
        if isinstance(result.get(key), (int, float)):
            return row | {"headline": key, "value": result[key]}
    return row

"""Runs a task: batches of near-equal length, a ledger to go on from, and the result."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from freqkv_jax.evals.ledger import Ledger, finished_result, ledger_path
from freqkv_jax.evals.options import option_values
from freqkv_jax.evals.progress import progress
from freqkv_jax.evals.result import (
    check_output,
    describe_model,
    environment,
    model_fingerprint,
    write_result,
)
from freqkv_jax.evals.task import Engine, Item, Record, Task, measures_time
from freqkv_jax.sharding import wait_for_all

COMPILE_EVENTS = "/jax/core/compile/"


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a task is run.

    Attributes:
      model_path, adapter, mesh: as given on the command line; for the result file.
      names: labels for the result's config (a suite's names of model and policy).
      command: words of the command line.
      limit: at most so many items of a kind, that is of keys alike before their last "/".
      output: the result file; None writes none.
      force: whether to replace another run's file, and to measure again what is there.
      note: told what goes on.
    """

    model_path: str
    adapter: str | None = None
    mesh: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()
    batch_size: int = 1
    limit: int | None = None
    output: str | None = None
    force: bool = False
    note: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def run_task(task: Task, engine: Engine, run: Run) -> dict[str, Any]:
    """Measures every item that the ledger does not hold, and writes the result.

    Returns:
      The result; of a file that is there already if it is this run's.

    Raises:
      ValueError, OSError: options, data or output are at fault, or every item failed.
    """
    if run.output:
        check_output(run.output)
    items = limited(task.items(engine), run.limit)
    data = task.describe(engine)
    identity, run_id = _identity(task, engine, run, data)
    found = _found(run, identity)
    if found is not None:
        return found
    run.note(f"{task.name}: {len(items)} items of {_span([item.length for item in items])} tokens")
    path = ledger_path(run.output) if run.output else None
    ledger = Ledger(path, identity, run.force)
    wait_for_all("the ledger is read")
    _measure(task, engine, run, items, ledger)
    records = [ledger.records[item.key] for item in items]
    good = [record for record in records if "error" not in record]
    if not good:
        raise ValueError(f"all {len(items)} items failed; the first: {records[0]['error']}")
    result = {
        "task": task.name,
        "protocol": task.protocol,
        "run_id": run_id,
        "config": _config(task, engine, run),
        **{name: identity[name] for name in ("model_fingerprint", "adapter_fingerprint")},
        "data": data,
        **environment(run.command),
        **_speed(ledger.times),
        **compressions(engine, good),
        **task.summarize(engine, good),
        "num_items": len(items),
        "num_failed": len(records) - len(good),
        "records": records,
    }
    if measures_time(task):  # its own figures know rows, repeats and what was written; these do not
        for name in ("num_tokens", "tokens_per_second", "kv_bytes"):
            del result[name]
    if run.output and jax.process_index() == 0:
        write_result(run.output, result)
        ledger.remove()
    return result


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of each kind (keys alike before the last "/"), in order."""
    if not items:
        raise ValueError("the task has no items: its options or data leave nothing to measure")
    kinds: dict[str, int] = {}
    out = []
    for item in items:
        kind = item.key.rpartition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
        if limit is None or kinds[kind] <= limit:
            out.append(item)
    assert len({item.key for item in out}) == len(out), "a task's keys must differ"
    return out


def batches(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Items of one group and near length together: few programs, little padding."""
    out: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (item.group, item.length)):
        if not out or len(out[-1]) == batch_size or out[-1][0].group != item.group:
            out.append([])
        out[-1].append(item)
    return out


def _span(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def finished(task: Task, engine: Engine, run: Run) -> dict[str, Any] | None:
    """The result of a run that ended before, None if there is none.

    Args:
      engine: its model and tokenizer are looked at, weights it need not have.

    Raises:
      ValueError, OSError: as `run_task`.
    """
    if not run.output or run.force or not Path(run.output).is_file():
        return None
    return _found(run, _identity(task, engine, run, task.describe(engine))[0])


def _found(run: Run, identity: dict[str, Any]) -> dict[str, Any] | None:
    if not run.output:
        return None
    found = finished_result(run.output, lambda result: _is_of(result, identity), run.force)
    if found is not None:
        run.note(f"{run.output} holds this run's result already (--force measures it again)")
        if jax.process_index() == 0:  # a kill may have come between the result and this
            ledger_path(run.output).unlink(missing_ok=True)
    return found


def _identity(
    task: Task, engine: Engine, run: Run, data: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """What must agree for records to belong together, and its digest. A batch size changes no
    result, and a device only what is timed."""
    about = describe_model(engine.model)
    fingerprint = model_fingerprint(run.model_path)
    identity = {
        "task": task.name,
        "protocol": task.protocol,
        "options": option_values(task),
        "limit": run.limit,
        "model": about["model"],
        # A path may change its name; a hub id has no fingerprint.
        "model_path": None if fingerprint else run.model_path,
        "model_fingerprint": fingerprint,
        "adapter_fingerprint": model_fingerprint(run.adapter) if run.adapter else None,
        "policy": about["policy"],
        "dtype": about["dtype"],
        "data": data,
    }
    if measures_time(task):
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        identity["device"] = {"mesh": run.mesh, "kind": kind, "count": count}
    identity = json.loads(json.dumps(identity, allow_nan=False))
    return identity, _run_id(identity)


def _run_id(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _is_of(result: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a result is that of a run."""
    if result.get("run_id") == _run_id(identity):
        return True
    # Versions up to 0.1.0 left out what a timed run was on; the result says it elsewhere.
    before = {key: value for key, value in identity.items() if key != "device"}
    device = result.get("device") or {}
    on = {"mesh": (result.get("config") or {}).get("mesh")}
    on |= {name: device.get(name) for name in ("kind", "count")}
    return identity.get("device") == on and result.get("run_id") == _run_id(before)


def _config(task: Task, engine: Engine, run: Run) -> dict[str, Any]:
    return {
        "model_path": run.model_path,
        "adapter": run.adapter,
        "mesh": run.mesh,
        "batch_size": run.batch_size,
        "limit": run.limit,
        **option_values(task),
        **describe_model(engine.model),
        **run.names,
    }


def _measure(task: Task, engine: Engine, run: Run, items: list[Item], ledger: Ledger) -> None:
    """Fills the ledger. The batches are those of an unbroken run, so that results are its too."""

    def missing(item: Item) -> bool:
        record = ledger.records.get(item.key)
        return record is None or "error" in record

    todo = [batch for batch in batches(items, run.batch_size) if any(map(missing, batch))]
    left = sum(map(missing, items))
    before = len(items) - left
    if before and left:
        run.note(f"going on: {before} of {len(items)} items are measured")
    work = sum(item.length for batch in todo for item in batch)
    done, worked = before, 0
    writes = jax.process_index() == 0
    with ledger.open(writes), progress(task.name, len(items), before) as update:
        for batch in todo:
            fresh = list(map(missing, batch))
            with _stopwatch() as times:
                records = _records(task, engine, batch, run.note)
            times["tokens"] = sum(map(_tokens, records))
            ledger.add([r for r, new in zip(records, fresh, strict=True) if new], times)
            done, worked = done + sum(fresh), worked + sum(item.length for item in batch)
            update(done, worked / max(work, 1))


def _records(
    task: Task, engine: Engine, batch: list[Item], note: Callable[[str], None]
) -> list[Record]:
    """A record for each item; items that fail are found by trying them one by one."""
    try:
        made = task.run(engine, batch)
        return [_checked(engine, i, r) for i, r in zip(batch, made, strict=True)]
    except ImportError:
        raise  # nothing will go until the package is there
    except Exception as error:
        if len(batch) > 1:
            return [r for item in batch for r in _records(task, engine, [item], note)]
        message = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        note(f"{batch[0].key} failed: {message}")
        return [{"key": batch[0].key, "length": batch[0].length, "error": message}]


def _checked(engine: Engine, item: Item, record: Record) -> Record:
    """The record with what the driver knows of it, as JSON gives it back."""
    kv = engine.model.kv
    rounds = kv.num_compressions(item.length + record.get("num_new_tokens", 0))
    full = {"key": item.key, "length": item.length, "compressions": rounds} | record
    return json.loads(json.dumps(full, allow_nan=False))


def _tokens(record: Record) -> int:
    """Tokens read and written."""
    return 0 if "error" in record else record["length"] + record.get("num_new_tokens", 0)


def compressions(engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
    """What the records say of the cache: rounds, bytes, and whether it was put to the test."""
    model = engine.model
    seen = list(map(_tokens, records))
    rounds = [model.kv.num_compressions(tokens) for tokens in seen]
    slots = max(seen) if model.kv.capacity is None else min(max(seen), model.kv.capacity)
    return {
        "num_compressions": {
            "min": min(rounds),
            "mean": sum(rounds) / len(rounds),
            "max": max(rounds),
        },
        "nothing_compressed": not any(rounds),
        "beyond_native_window": slots > model.config.max_position_embeddings,
        "kv_bytes": model.kv.kv_bytes(model.config, model.dtype, max(seen)),
    }


def _speed(times: Mapping[str, float]) -> dict[str, Any]:
    seconds, compiling = times.get("seconds", 0.0), times.get("compile_seconds", 0.0)
    tokens = int(times.get("tokens", 0))
    return {
        "seconds": round(seconds, 3),
        "compile_seconds": round(compiling, 3),
        "num_tokens": tokens,
        "tokens_per_second": round(tokens / max(seconds - compiling, 1e-9), 1),
    }


@contextlib.contextmanager
def _stopwatch() -> Iterator[dict[str, float]]:
    """Seconds in all, and those in which programs were traced and compiled."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event.startswith(COMPILE_EVENTS):
            spans.append((start_time, end_time))

    jax.monitoring.register_event_time_span_listener(listen)
    times: dict[str, float] = {}
    begin = time.monotonic()
    try:
        yield times
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)
        times |= {"seconds": time.monotonic() - begin, "compile_seconds": covered(spans)}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals: tracing nests."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total

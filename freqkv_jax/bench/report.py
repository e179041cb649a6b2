"""Running cases into rows of plain data, and rows into a table."""

import dataclasses
import fnmatch
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from freqkv_jax.bench.cases import Case
from freqkv_jax.bench.ceilings import Ceilings
from freqkv_jax.bench.timing import (
    OverBudgetError,
    Program,
    Timing,
    compile_program,
    measure,
    measure_host,
    program_bytes,
)

Row = dict[str, Any]
COLUMNS = (
    ("case", "case", "{}"),
    ("batch", "batch", "{}"),
    ("ms", "ms", "{:.4g}"),
    ("spread", "spread", "{:.1%}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("tflops", "TFLOP/s", "{:.3g}"),
    ("gbytes_per_s", "GB/s", "{:.4g}"),
    ("roofline_ms", "roofline ms", "{:.3g}"),
    ("bound", "bound", "{}"),
    ("share", "share", "{:.1%}"),
    ("mfu", "MFU", "{:.1%}"),
    ("program_gib", "program GiB", "{:.2f}"),
    ("peak_gib", "peak GiB", "{:.2f}"),
    ("compile_seconds", "compile s", "{:.1f}"),
)


def run_cases(
    cases: Iterable[Case],
    params: Callable[[], Any],
    ceilings: Ceilings,
    repeats: int,
    deadline: float | None,
    only: str | None = None,
    profile: str | None = None,
    on_row: Callable[[Row], Any] = lambda row: None,
) -> list[Row]:
    """Measures every case whose name matches `only`; a row without "ms" says why in "skipped".

    Args:
      params: makes the parameters, when the first case needs them.
      deadline: `time.monotonic()` after which nothing is begun.
      profile: folder in which each case gets a folder with a trace.
      on_row: called with each row as soon as it is there.
    """
    rows = []
    for case in _chosen(cases, only):
        row = _run(case, params, ceilings, repeats, deadline, profile)
        rows.append(row)
        on_row(row)
        # What the case held must be gone before the next one makes its arrays.
        gc.collect()
    return rows


def _chosen(cases: Iterable[Case], only: str | None) -> Iterator[Case]:
    for case in cases:
        if not only or any(fnmatch.fnmatch(case.name, p.strip()) for p in only.split(",")):
            yield case


def _run(
    case: Case,
    params: Callable[[], Any],
    ceilings: Ceilings,
    repeats: int,
    deadline: float | None,
    profile: str | None,
) -> Row:
    if deadline is not None and time.monotonic() > deadline:
        return _about(case) | {"skipped": "the time budget is spent"}
    trace = None if profile is None else str(Path(profile) / case.name.replace("/", "-"))
    try:
        built = case.build(params())
        if isinstance(built, Program):
            timing = measure(built, repeats, deadline, trace)
        else:
            timing = measure_host(built, repeats, deadline, trace)
    except OverBudgetError as error:
        return _about(case) | {"skipped": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _about(case) | {"skipped": "does not fit the device's memory"}
    return make_row(case, timing, ceilings, peak_bytes())


def compile_cases(
    cases: Iterable[Case],
    params: Callable[[], Any],
    only: str | None = None,
    on_row: Callable[[Row], Any] = lambda row: None,
) -> list[Row]:
    """`run_cases` without running: each program compiled from shapes; `params` gives theirs."""
    rows = []
    for case in _chosen(cases, only):
        rows.append(_compile(case, params()))
        on_row(rows[-1])
    return rows


def _compile(case: Case, params: Any) -> Row:
    built: list[Any] = []

    def arguments(params: Any) -> Any:
        built.append(case.build(params))
        return built[0].first if isinstance(built[0], Program) else None

    first = jax.eval_shape(arguments, params)
    if first is None:
        return _about(case) | {"skipped": "many programs, driven from the host: run it"}
    if built[0].shapes is not None:
        first = built[0].shapes()
    compiled, seconds = compile_program(dataclasses.replace(built[0], first=first))
    return _about(case) | {"compile_seconds": seconds, "program_bytes": program_bytes(compiled)}


def _about(case: Case) -> Row:
    return {
        "case": case.name,
        "work": case.work,
        "policy": case.model.kv.name,
        "attention": case.model.attention,
        "dtype": case.model.dtype,
        "batch": case.batch,
        "length": case.length,
        "tokens": case.tokens,
        "steps": case.steps,
    }


def make_row(case: Case, timing: Timing, ceilings: Ceilings, peak: int | None) -> Row:
    """What was measured, beside what the device could do (times in ms; in decode, of a step).

    Rates count useful FLOPs and bytes; the roofline and MFU count the policy's map, too.
    """
    amount, steps = case.amount, case.steps
    flops = amount.useful_flops + amount.map_flops
    floor, bound = ceilings.floor(flops, amount.num_bytes)
    scale = 1e3 / steps
    return _about(case) | {
        "repeats": len(timing.seconds),
        "times_ms": [scale * seconds for seconds in timing.seconds],
        "ms": scale * timing.median,
        "spread": timing.spread,
        "tokens_per_s": case.tokens / timing.median,
        "useful_flops": amount.useful_flops,
        "map_flops": amount.map_flops,
        "bytes": amount.num_bytes,
        "tflops": (amount.useful_flops or amount.map_flops) / timing.median / 1e12,
        "gbytes_per_s": amount.num_bytes / timing.median / 1e9,
        "roofline_ms": scale * floor,
        "bound": bound,
        "share": floor / timing.median,
        "mfu": flops / timing.median / case.peak_flops if case.peak_flops else None,
        "compile_seconds": timing.compile_seconds,
        "program_bytes": timing.program_bytes,
        "peak_bytes": peak,
    }


def peak_bytes() -> int | None:
    """The most that this process has held on the device so far; None where that is not counted."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown: those that were measured, then the others with their reasons."""
    # MFU is a training step's.
    columns = [c for c in COLUMNS if c[0] != "mfu" or any(row.get("mfu") for row in rows)]
    lines = [
        "| " + " | ".join(title for _, title, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += [_line(row, columns) for row in rows if "skipped" not in row]
    lines += [
        "",
        *(f"{row['case']}: skipped, {row['skipped']}" for row in rows if "skipped" in row),
    ]
    return "\n".join(lines).rstrip()


def _line(row: Row, columns: Sequence[tuple[str, str, str]]) -> str:
    gib = {
        name.replace("_bytes", "_gib"): None if row.get(name) is None else row[name] / 2**30
        for name in ("program_bytes", "peak_bytes")
    }
    cells = []
    for key, _, form in columns:
        value = (row | gib).get(key)
        cells.append("-" if value is None else form.format(value))
    return "| " + " | ".join(cells) + " |"

#!/usr/bin/env python3
"""Perplexity results of the same windows beside the first of them, whatever their dtype and bytes.

    python scripts/compare_windows.py RESULT.json OTHER.json ... [--behind TOKENS]

`freqkv report` compares what is alike but for the policy; this, for checks by other means (say, in
float32 on a CPU), anything that read some of the same windows. Differences are of these, paired,
with their 95 % interval; `--behind` leaves the first tokens of each window out (no interval).
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freqkv_jax.evals.report_blocks import Table, to_markdown
from freqkv_jax.evals.report_compare import Series, difference_text, series_of
from freqkv_jax.evals.report_runs import load_runs


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--behind", type=int, metavar="TOKENS")
    args = parser.parse_args()
    print(to_markdown([table([losses(path) for path in args.results], args.behind)]))


def losses(path: Path) -> Series:
    """The losses of a result's windows."""
    found = [one for one in series_of(load_runs([path])[0]) if one.metric.field == "loss"]
    if len(found) != 1:
        raise SystemExit(f"{path} is no result of freqkv eval perplexity")
    return found[0]


def table(series: Sequence[Series], behind: int | None) -> Table:
    """One row each."""
    base = series[0]
    columns = ["result", "windows", "perplexity", "against the first, % (windows of both)"]
    if behind is not None:
        columns.append(f"behind the first {behind:,} tokens")
    rows = []
    for one in series:
        row = [Path(one.run.path).name, str(one.count), one.metric.shown(one.mean), "-"]
        if one is not base:
            found = one.difference(base)
            if found is None or places(one)[: found.count] != places(base)[: found.count]:
                raise SystemExit(f"{one.run.path} and {base.run.path} read different windows")
            row[-1] = f"{difference_text(found)} ({found.count})"
        if behind is not None:
            shift = loss_behind(one.run.data, behind) - loss_behind(base.run.data, behind)
            row.append(f"{100 * math.expm1(shift):+.2f}")
        rows.append(row)
    return Table(columns, rows, f"perplexity, {base.column}")


def places(series: Series) -> list[tuple[str, int]]:
    """Text and start of each window; samples are known by their number alone."""
    text = series.run.data["data"]["sha256"]
    return [(text, start) for start in series.run.data["window_starts"]]


def loss_behind(result: Mapping[str, Any], first: int) -> float:
    """Mean loss of the tokens from `first` on."""
    parts = [part for part in result["losses_by_position"] if part["from"] >= first]
    counts = [part["to"] - part["from"] for part in parts]
    if not parts:
        raise SystemExit(f"no range of positions begins at {first:,} or behind")
    return sum(n * part["loss"] for n, part in zip(counts, parts, strict=True)) / sum(counts)


if __name__ == "__main__":
    main()

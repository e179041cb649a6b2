"""The report's sections, a task each: tables, pictures, and what they say."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from freqkv_jax.evals.plots import (
    Curve,
    HeatMap,
    Panel,
    curves_figure,
    needle_figure,
    points_figure,
    top_of,
)
from freqkv_jax.evals.report_blocks import Block, Figure, Heading, Lines, Paragraph, Table
from freqkv_jax.evals.report_compare import GUESSING, Comparison, Series, compare
from freqkv_jax.evals.report_runs import Run, finite

TITLES = {
    "perplexity": "Perplexity of long text",
    "needle": "Needle in a haystack",
    "ruler": "RULER",
    "longbench": "LongBench",
    "longgenbench": "LongGenBench",
}
MANY = 16  # curves that a picture takes, with eight colours
COLUMN_OPTIONS = ("seq_len", "lengths", "min_length", "max_length", "step")
# Of a result's top level, what a task's own table must say besides (a dot goes one level down).
EXTRAS = {
    "longbench": (("macro6", "macro6"), ("flat14", "flat14"), ("flat16", "flat16")),
    "longgenbench": (
        ("completion_rate", "completion rate %"),
        ("string_check.mean", "string check %"),
        ("judge.mean", "judge %"),
        ("accuracy_x_completion", "accuracy x completion %"),
    ),
}


def comparison_section(
    title: str, runs: Sequence[Run], name: str, baseline: str | None
) -> list[Block]:
    """Tables and pictures of runs of one task and setting.

    Args:
      name: begins the names of the pictures' files.
      baseline: the policy that others are compared with; None chooses.
    """
    blocks: list[Block] = [Heading(2, title)]
    comparisons = compare(runs, baseline)
    for number, comparison in enumerate(comparisons):
        tag = name if len(comparisons) == 1 else f"{name}_{comparison.metric.field}"
        if number or len(comparisons) > 1:
            words = comparison.title.partition(" (")[0]
            blocks.append(Heading(3, words[0].upper() + words[1:]))
        blocks += _comparison(comparison, tag)
    blocks += _extras(runs)
    if runs[0].task == "perplexity":
        blocks += _positions(runs, name)
    blocks += _needle_maps(runs, name)
    if not comparisons:
        blocks += generic_tables(runs)
    return blocks


def _comparison(comparison: Comparison, name: str) -> list[Block]:
    blocks: list[Block] = [comparison.values()]
    differences, parts = comparison.differences(), comparison.parts()
    tables = (differences, parts, _by_rounds(comparison))
    blocks += [table for table in tables if table is not None]
    verdicts = comparison.verdicts()
    if verdicts:
        every = [line for lines in verdicts for line in lines]
        blocks.append(Lines(every, short=verdicts[-1]))
    if not comparison.metric.has_plots:
        return blocks
    if len(comparison.cells) > MANY:
        return [*blocks, _too_many(len(comparison.cells))]
    title = comparison.title
    if len(comparison.columns) > 1:
        caption = f"{title} against length, with standard errors"
        blocks.append(Figure(f"{name}_length", caption, _length_figure(comparison)))
    points = _bytes_figure(comparison)
    if points is not None:
        at = comparison.columns[-1]
        at = "" if at == "all" else f" at {at} tokens"
        blocks.append(Figure(f"{name}_bytes", f"{title} against bytes{at}", points))
    return blocks


def _too_many(count: int) -> Block:
    return Paragraph(
        f"No curves: {count} cannot be told apart. `freqkv report --policies A B ...` draws a few."
    )


def _by_rounds(comparison: Comparison) -> Table | None:
    """The metric by how many rounds the place of the answer goes through (of several answers, the
    first one's); None where records do not tell or nothing was compressed."""
    metric, found = comparison.metric, {}
    for row, cells in comparison.cells.items():
        for run in {one.run.path: one.run for one in cells.values()}.values():
            for record in run.records:
                rounds, value = record.get("answer_compressions"), record.get(metric.field)
                if rounds and finite(value):
                    # Ranges 0, 1, 2 to 3, 4 to 7, ...
                    place = int(max(rounds)).bit_length()
                    found.setdefault(row, {}).setdefault(place, []).append(float(value))
    places = sorted({place for values in found.values() for place in values})
    if len(places) < 2:
        return None

    def words(place: int) -> str:
        low, high = (1 << place) >> 1, (1 << place) - 1
        return str(low) if low >= high else f"{low} to {high}"

    rows = [
        [row, *(metric.shown(float(np.mean(v[p]))) if p in v else "-" for p in places)]
        for row, v in found.items()
    ]
    caption = f"{comparison.title}, by the rounds that the answer's place goes through, all lengths"
    return Table(["policy", *map(words, places)], rows, caption)


def _extras(runs: Sequence[Run]) -> list[Block]:
    """A table of the means that a benchmark publishes."""
    fields = EXTRAS.get(runs[0].task, ())
    rows = []
    for run in sorted(runs, key=lambda r: (r.model_label, r.policy_label)):
        cells = []
        for path, _ in fields:
            value = run.data
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            cells.append(f"{value:.4g}" if finite(value) else "-")
        rows.append([run.model_label, run.policy_label, *cells])
    if not fields:
        return []
    return [Table(["model", "policy", *(title for _, title in fields)], rows, "means")]


def _length_figure(comparison: Comparison) -> bytes:
    metric, curves = comparison.metric, []
    for row, cells in comparison.cells.items():
        shown = sorted(cells.values(), key=lambda s: s.length)
        y = [metric.value(s.mean) for s in shown]
        errors = [_standard_error(s, value) for s, value in zip(shown, y, strict=True)]
        full = shown[0].run.policy_name == "full"
        curves.append(Curve(row, [s.length for s in shown], y, errors, full))
    runs = [s.run for cells in comparison.cells.values() for s in cells.values()]
    top = top_of(curves) if metric.low_is_better else None
    panel = Panel(curves, "tokens of the text", metric.title, marks=limit_marks(runs), top=top)
    return curves_figure([panel])


def _standard_error(one: Series, value: float) -> float | None:
    """Of a cell in the unit that is shown; parts count alike."""
    parts = [np.asarray(list(part.values())) for part in one.samples.values()]
    if any(part.size // one.block < 2 for part in parts):
        return None
    variance = sum(part.var(ddof=1) * one.block / part.size for part in parts) / len(parts) ** 2
    error = float(np.sqrt(variance))
    return value * error if one.metric.is_loss else error * one.metric.scale


def limit_marks(runs: Iterable[Run]) -> list[tuple[float, str]]:
    """Lines at the cache sizes and at the native window."""
    runs = list(runs)
    marks: list[tuple[float, str]] = []
    sizes = {run.policy.capacity for run in runs if run.policy is not None}
    marks += [(size, "cache is full") for size in sorted(size for size in sizes if size)]
    windows = {run.native_window for run in runs}
    marks += [(window, "native window") for window in sorted(w for w in windows if w)]
    return marks


def _bytes_figure(comparison: Comparison) -> bytes | None:
    column, curves = comparison.columns[-1], []
    for row, cells in comparison.cells.items():
        size = comparison.bytes_of(row, column) if column in cells else None
        if size:
            y = comparison.metric.value(cells[column].mean)
            curves.append(Curve(row, [size], [y], is_full=cells[column].run.policy_name == "full"))
    sizes = [curve.x[0] for curve in curves]
    if len(curves) < 2 or max(sizes) <= 1.02 * min(sizes):  # equal bytes are no axis
        return None
    title = "" if column == "all" else f"{column} tokens"
    return points_figure(curves, comparison.metric.title, title)


def _positions(runs: Sequence[Run], name: str) -> list[Block]:
    """Loss by position, of the longest windows."""
    longest = max(run.config.get("seq_len") or 0 for run in runs)
    many = len({run.model_label for run in runs}) > 1
    curves = []
    for run in runs:
        ranges = run.data.get("losses_by_position") or []
        if run.config.get("seq_len") != longest or len(ranges) < 2:
            continue
        label = f"{run.model_label}: {run.policy_label}" if many else run.policy_label
        x, y = [r["to"] for r in ranges], [math.exp(r["loss"]) for r in ranges]
        curves.append(Curve(label, x, y, is_full=run.policy_name == "full"))
    if not curves:
        return []
    if len(curves) > MANY:
        return [_too_many(len(curves))]
    curves.sort(key=lambda curve: (not curve.is_full, curve.label))
    panel = Panel(
        curves, "tokens read before, up to", "perplexity in the range (lower is better)",
        marks=limit_marks(runs), top=top_of(curves), title=f"windows of {longest:,} tokens",
    )  # fmt: skip
    caption = f"Perplexity by position in windows of {longest:,} tokens (doubling ranges)"
    return [Figure(f"{name}_position", caption, curves_figure([panel]))]


def _needle_maps(runs: Sequence[Run], name: str) -> list[Block]:
    """A heat map a policy, for each metric that the results have a grid of."""
    blocks: list[Block] = []
    grids = {run.path: run.data.get("grid") or {} for run in runs}
    metrics = dict.fromkeys(m for grid in grids.values() for m in grid.get("metrics") or {})
    many = len({run.model_label for run in runs}) > 1
    for metric in metrics:
        maps, low_is_better = [], False
        for run in sorted(runs, key=lambda r: (r.model_label, r.policy_label)):
            grid = grids[run.path]
            about = (grid.get("metrics") or {}).get(metric)
            if not about or not any(finite(x) for row in about["values"] for x in row):
                continue
            low_is_better = not about.get("higher_is_better", True)
            label = f"{run.model_label}: {run.policy_label}" if many else run.policy_label
            marks = limit_marks([run])
            maps.append(HeatMap(label, grid["depths"], grid["lengths"], about["values"], marks))
        if not maps:
            continue
        best, worst = (0.0, GUESSING) if low_is_better else (1.0, 0.0)
        words = metric.replace("_", " ")
        better = "0 is best; red: guessing" if low_is_better else "1 is best"
        picture = needle_figure(maps, f"{words} ({better})", best, worst)
        counted = runs[0].score_words(metric).capitalize()
        caption = f"{counted} by length and depth of the needle ({better})"
        blocks.append(Figure(f"{name}_{metric}", caption, picture))
    return blocks


def cost_section(runs: Sequence[Run]) -> list[Block]:
    """Time and memory against length."""
    blocks: list[Block] = [Heading(2, "Cost of reading and writing")]
    runs = sorted(runs, key=lambda r: (r.model_label, r.policy_name != "full", r.policy_label))
    devices = dict.fromkeys(_device(run) for run in runs)
    for number, device in enumerate(devices):
        mine = [run for run in runs if _device(run) == device]
        blocks += _cost_on(device, mine, f"cost_{number}" if number else "cost")
    return blocks


def _device(run: Run) -> str:
    """What a table of costs is of: times of other devices, or of more texts, are not beside it."""
    about = run.data.get("device") or {}
    dtype = run.config.get("dtype", "unknown dtype")
    rows = max((cost.get("rows", 1) for cost in run.data.get("costs") or []), default=1)
    texts = f", {rows} texts at once" if rows > 1 else ""
    return f"{about.get('kind', 'unknown device')}, {dtype}{texts}"


def _own_peak(cost: dict) -> float | None:
    """The peak of memory, None if the process had held as much before, or nobody knows (results of
    versions that did not say)."""
    return cost.get("peak_bytes") if cost.get("peak_is_of_earlier") is False else None


def _cost_on(device: str, runs: Sequence[Run], name: str) -> list[Block]:
    many = len({run.model_label for run in runs}) > 1
    columns: list[str] = []
    rows = []
    for run in runs:
        table = run.data.get("table") or {}
        label = f"{run.model_label}: {run.policy_label}" if many else run.policy_label
        columns = columns or list(table.get("columns") or [])
        rows += [[label, *row] for row in table.get("rows") or []]

    def curve(run: Run, value: Callable[[dict], float | None]) -> Curve:
        costs = run.data.get("costs") or []
        pairs = [(cost["tokens_read"], value(cost)) for cost in costs]
        shown = [(x, y) for x, y in pairs if y]
        label = f"{run.model_label}: {run.policy_label}" if many else run.policy_label
        x, y = zip(*shown, strict=True) if shown else ((), ())
        return Curve(label, x, y, is_full=run.policy_name == "full")  # pyright: ignore

    held_by = {cost.get("peak_of") for run in runs for cost in run.data.get("costs") or []}
    whose = f" of the {held_by.pop()}" if len(held_by) == 1 and None not in held_by else ""
    measures = (
        ("time to first token (s)", lambda c: c.get("first_token_s"), False),
        ("ms a token written", lambda c: c.get("ms_per_token"), False),
        ("keys and values (bytes, measured)", lambda c: c.get("kv_bytes_measured"), True),
        (f"peak memory{whose} so far (bytes)", _own_peak, True),
    )
    panels = []
    for title, value, is_bytes in measures:
        curves = [c for c in (curve(run, value) for run in runs) if len(c.x)]
        # Peaks that not every run has of its own would compare what cannot be compared.
        if curves and (value is not _own_peak or len(curves) == len(runs)):
            panels.append(Panel(curves, "tokens read", title, log_y=True, bytes_y=is_bytes))
    blocks: list[Block] = [Heading(3, device)]
    if rows:
        note = "ms/token holds a token's share of the rounds; compiling is apart"
        blocks.append(Table(["policy", *columns], rows, "", [note]))
    if panels:
        blocks.append(Figure(name, f"Cost against length on {device}", curves_figure(panels)))
    return blocks


def generic_tables(runs: Iterable[Run]) -> list[Block]:
    """What results say of themselves, of tasks that the report does not know."""
    blocks: list[Block] = []
    for run in runs:
        table = run.data.get("table")
        label = f"{run.model_label}, {run.policy_label}"
        if isinstance(table, dict) and table.get("rows"):
            rows = [[str(cell) for cell in row] for row in table["rows"]]
            blocks.append(Table(list(table["columns"]), rows, label))
        else:
            blocks.append(Paragraph(f"{label}: the result holds no table."))
    return blocks

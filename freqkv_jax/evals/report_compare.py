"""Tables of policies side by side, with differences at equal bytes, and who wins where."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from freqkv_jax.evals.report_blocks import Table, bytes_text, length_text
from freqkv_jax.evals.report_runs import Run, finite
from freqkv_jax.evals.report_stats import Difference, paired_difference

LAST_TOKENS = 1024
GUESSING = math.log(10)  # nats a digit of who knows nothing
EQUAL_BYTES = 0.02  # caches whose sizes differ by less count as equal; scores of h2o: 1.6 %
BASELINES = ("sink_window", "freqkv")  # what the others are compared with, if it is there
Samples = dict[str, dict[str, float]]  # part -> sample's key -> value


@dataclass(frozen=True)
class Metric:
    """A number of each record: its field, how it is called, and which way is better."""

    field: str
    title: str
    low_is_better: bool
    scale: float = 1.0
    form: str = "{:.2f}"
    has_plots: bool = True
    guessing: float | None = None  # what it costs to know nothing

    @property
    def is_loss(self) -> bool:
        """Shown as a perplexity; differences in percent of it."""
        return self.field in ("loss", "last_1k_loss")

    def shown(self, mean: float) -> str:
        """A mean, as tables have it."""
        return self.form.format(self.value(mean))

    def value(self, mean: float) -> float:
        """A mean in the unit that is shown."""
        return math.exp(mean) if self.is_loss else self.scale * mean

    def difference(self, found: Difference) -> Difference:
        """A difference of means in the unit that is shown."""
        if self.is_loss:
            return found.mapped(lambda x: 100 * math.expm1(x))
        return found.mapped(lambda x: self.scale * x)

    @property
    def unit(self) -> str:
        """Of differences."""
        return "%" if self.is_loss else ("points" if self.scale != 1 else "nats")


METRICS = (
    Metric("loss", "perplexity (lower is better)", True),
    Metric(
        "last_1k_loss", "perplexity of the last 1K tokens (lower is better)", True, has_plots=False
    ),
    Metric("score", "score of 100 (higher is better)", False, 100.0, "{:.1f}"),
    Metric(
        "nats_per_digit", "nats a digit of the pass-key (lower is better)", True, guessing=GUESSING
    ),
    Metric("nats_per_token", "nats a token of the needle (lower is better)", True),
)


@dataclass(frozen=True)
class Series:
    """A metric of one run at one length.

    Attributes:
      column: where it stands in a table; `length`: tokens read there, at most.
      block: neighbouring samples that overlap, and so are no news of each other.
    """

    run: Run
    metric: Metric
    column: str
    length: int
    samples: Samples
    block: int = 1

    @property
    def mean(self) -> float:
        """Parts count alike, as differences count them."""
        return float(np.mean([np.mean(list(part.values())) for part in self.samples.values()]))

    @property
    def count(self) -> int:
        """Samples."""
        return sum(map(len, self.samples.values()))

    def difference(self, other: "Series") -> Difference | None:
        """On the samples that both have, in the unit that is shown."""
        found = paired_difference(self.samples, other.samples, max(self.block, other.block))
        return None if found is None else self.metric.difference(found)


def series_of(run: Run) -> list[Series]:
    """All that a run has to compare, by metric and length."""
    found: dict[tuple[int, str], Samples] = {}
    lengths: dict[str, int] = {}
    for number, record in enumerate(_records(run)):
        part, column, length = _place(run, record)
        lengths[column] = max(length, lengths.get(column, 0))
        for index, metric in enumerate(METRICS):
            if metric.field == "last_1k_loss" and length <= LAST_TOKENS + 1:
                continue  # the same tokens as of the whole window
            if finite(record.get(metric.field)):
                samples = found.setdefault((index, column), {}).setdefault(part, {})
                samples[str(record.get("key", number))] = float(record[metric.field])
    return [
        Series(run, METRICS[index], column, lengths[column], samples, _overlap(run))
        for (index, column), samples in sorted(
            found.items(), key=lambda item: (item[0][0], lengths[item[0][1]])
        )
    ]


def _records(run: Run) -> list[dict]:
    if run.task != "perplexity":
        return run.records
    if run.records:  # in the order of the text, which drawing in blocks needs
        return sorted(run.records, key=lambda record: record.get("start") or 0)
    # Results of versions that wrote no records.
    starts, losses = run.data.get("window_starts") or [], run.data.get("window_losses") or []
    pairs = zip(starts, losses, strict=False)
    return [{"key": f"window/{start}", "start": start, "loss": loss} for start, loss in pairs]


def _place(run: Run, record: dict) -> tuple[str, str, int]:
    """Part, column and tokens of a record."""
    if run.task == "perplexity":
        length = _whole(run.config.get("seq_len") or record.get("length"))
        return "windows", length_text(length), length
    if run.task == "longbench":
        length = _whole(run.config.get("max_length"))
        return str(record.get("subset")), f"prompts to {length:,}", length
    read, target = _whole(record.get("length")), _whole(record.get("length_target"))
    part = str(record.get("key", "")).rpartition("/")[0] or run.task
    if "subtask" in record:
        part = str(record["subtask"])
    elif finite(record.get("depth")):
        part = f"depth {record['depth']:.4g} %"
    if target:
        return part, length_text(target), target
    return part, "all", read


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _overlap(run: Run) -> int:
    """How many neighbouring windows share tokens; those of two documents share none."""
    if run.task != "perplexity":
        return 1
    most, whole = 1, _whole(run.config.get("seq_len"))
    for one, other in itertools.pairwise(_records(run)):
        step = _whole(other.get("start")) - _whole(one.get("start"))
        if step > 0 and one.get("document") == other.get("document"):
            most = max(most, math.ceil((_whole(one.get("length")) or whole) / step))
    return most


class Comparison:
    """Runs of one task and setting, under one metric: policies (and models) by lengths."""

    def __init__(self, metric: Metric, series: Sequence[Series], baseline: str | None) -> None:
        self.metric, self.baseline = metric, baseline
        self.columns = list(dict.fromkeys(s.column for s in sorted(series, key=lambda s: s.length)))
        self.cells: dict[str, dict[str, Series]] = {}
        many = len({s.run.model_label for s in series}) > 1
        for one in sorted(series, key=_row_order):
            label = f"{one.run.model_label}: " if many else ""
            row = label + one.run.policy_label
            while one.column in self.cells.get(row, {}):  # two runs of one name
                row += " (again)"
            self.cells.setdefault(row, {})[one.column] = one

    @property
    def title(self) -> str:
        """The metric's, with what a score counts where a task has several."""
        run = next(one.run for cells in self.cells.values() for one in cells.values())
        words = run.score_words() if self.metric.field == "score" else ""
        return self.metric.title.replace(" (", f", {words} (", 1) if words else self.metric.title

    def bytes_of(self, row: str, column: str | None = None) -> int | None:
        """Of the cache of one text, at a column's length (the longest one's)."""
        cells = self.cells[row]
        one = cells[column] if column else max(cells.values(), key=lambda s: s.length)
        return one.run.kv_bytes(one.length)

    def reference(self, row: str, column: str) -> str | None:
        """The row that a row is compared with: the baseline of equal bytes, else of nearest."""
        mine = self.cells[row][column]
        size = self.bytes_of(row, column)
        others = [
            other
            for other, cells in self.cells.items()
            if column in cells and cells[column].run.model_label == mine.run.model_label
        ]

        def rank(other: str) -> tuple[bool, int, float]:
            run, far = self.cells[other][column].run, self._far(size, other, column)
            if self.baseline is not None:
                named = self.baseline in (run.policy_label, run.policy_name, other)
                return not named, 0, far
            names = [*BASELINES, run.policy_name]
            return far > EQUAL_BYTES, names.index(run.policy_name), far

        best = min(others, key=rank)
        if self.baseline is None and best == row and len(others) > 1:
            # Alone at its size: against the baseline whose size is nearest.
            alone = all(self._far(size, o, column) > EQUAL_BYTES for o in others if o != row)
            named = [
                o for o in others if o != row and self.cells[o][column].run.policy_name in BASELINES
            ]
            if alone and named:
                return min(named, key=lambda other: (rank(other)[1], rank(other)[2]))
        return None if best == row else best

    def _far(self, size: int | None, other: str, column: str) -> float:
        theirs = self.bytes_of(other, column)
        if not size or not theirs:
            return 0.0
        return abs(math.log(theirs / size))

    def difference(self, row: str, other: str, column: str) -> Difference | None:
        """Of two rows on the samples that both have, in the unit that is shown."""
        return self.cells[row][column].difference(self.cells[other][column])

    def values(self) -> Table:
        """What was measured."""
        rows, notes = [], set()
        for row, cells in self.cells.items():
            line = [row, bytes_text(self.bytes_of(row))]
            for column in self.columns:
                line.append(_marked(cells[column], notes) if column in cells else "-")
            rows.append(line)
        counts = sorted({s.count for cells in self.cells.values() for s in cells.values()})
        samples = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        caption = f"{self.title}; samples a cell: {samples}"
        return Table(["policy", "KV bytes", *self.columns], rows, caption, sorted(notes))

    def differences(self) -> Table | None:
        """Each row against its reference, with intervals; None where nothing can be compared."""
        rows, unequal, alike = [], False, False
        for row, cells in self.cells.items():
            lines: dict[str, list[str]] = {}
            for place, column in enumerate(self.columns):
                other = self.reference(row, column) if column in cells else None
                if other is None:
                    continue
                far = self._far(self.bytes_of(row, column), other, column) > EQUAL_BYTES
                unequal |= far
                line = lines.setdefault(other, ["-"] * len(self.columns))
                found = self.difference(row, other, column)
                alike |= found is not None and found.is_alike
                text = difference_text(found)
                line[place] = text + (" \u2260" if far else "")
            rows += [[row, other, *line] for other, line in lines.items()]
        if not rows:
            return None
        better = "negative" if self.metric.low_is_better else "positive"
        notes = [
            f"{better} is better; brackets: 95 % interval, paired bootstrap over the samples that"
            " both have, widened by Student's t",
        ]
        if any(s.block > 1 for cells in self.cells.values() for s in cells.values()):
            notes.append("windows that overlap are drawn together")
        if alike:
            notes.append("all alike: no difference of a part differs from its others")
        if unequal:
            notes.append("\u2260 the caches are not of equal size")
        unit = f"difference in {self.metric.unit}"
        return Table(["policy", "against", *self.columns], rows, unit, notes)

    def parts(self) -> Table | None:
        """Every part at the longest length, a column a row of the other tables."""
        column = self.columns[-1]
        shown = {row: cells[column] for row, cells in self.cells.items() if column in cells}
        names = sorted({part for one in shown.values() for part in one.samples}, key=natural)
        if len(names) < 2 or any(name.startswith("depth") for name in names):
            return None
        rows = []
        for name in names:
            line = [name]
            for one in shown.values():
                part = one.samples.get(name)
                line.append(self.metric.shown(_mean(part.values())) if part else "-")
            rows.append(line)
        at = "" if column == "all" else f": {column}"
        return Table(["part", *shown], rows, f"{self.title}, by part{at}")

    def verdicts(self) -> list[list[str]]:
        """Who wins where caches are of equal size, said from the numbers: a column's together, a
        size each; columns without any are left out."""
        found = [
            [self._verdict(rows, column) for rows in self._equal_sets(column)]
            for column in self.columns
        ]
        return [lines for lines in found if lines]

    def _equal_sets(self, column: str) -> list[list[str]]:
        sets: list[list[str]] = []
        for row, cells in self.cells.items():
            if column not in cells:
                continue
            for others in sets:
                run, other = cells[column].run, self.cells[others[0]][column].run
                size = self.bytes_of(row, column)
                near = size and self._far(size, others[0], column) <= EQUAL_BYTES
                if near and run.model_label == other.model_label:
                    others.append(row)
                    break
            else:
                sets.append([row])
        return [rows for rows in sets if len(rows) > 1]

    def _verdict(self, rows: list[str], column: str) -> str:
        sign = 1 if self.metric.low_is_better else -1
        ranked = sorted(rows, key=lambda row: sign * self.cells[row][column].mean)
        best, second = ranked[:2]
        place = bytes_text(self.bytes_of(best, column))
        place += "" if column == "all" else f", {column}"
        place += " tokens" if column[-1:].isalnum() and column != "all" else ""
        shown = self.metric.shown(self.cells[best][column].mean)
        found = self.difference(best, second, column)
        if found is None:
            return f"{place}: {best} is best ({shown}); no samples are shared with {second}."
        text = f"{difference_text(found, self.metric.unit)} against {second}"
        if self.metric.guessing and self.cells[best][column].mean >= self.metric.guessing:
            return f"{place}: no better than guessing; {best} has {shown} ({text})."
        if not found.mean:
            return f"{place}: {best} and {second} are level ({shown})."
        if found.low is None:
            return f"{place}: {best} is best ({shown}; {text}), on too few samples to tell."
        if found.is_clear:
            return f"{place}: {best} wins ({shown}; {text})."
        return f"{place}: no clear winner; {best} has {shown} ({text})."


def compare(runs: Iterable[Run], baseline: str | None = None) -> list[Comparison]:
    """Comparisons of runs of one setting, a metric each."""
    series = [one for run in runs for one in series_of(run)]
    metrics = [metric for metric in METRICS if any(s.metric == metric for s in series)]
    return [Comparison(m, [s for s in series if s.metric == m], baseline) for m in metrics]


def difference_text(found: Difference | None, unit: str = "") -> str:
    """-1.23 % [-1.50, -0.96]"""
    if found is None:
        return "no shared samples"
    if found.low is None or found.high is None:
        ends = "few samples"
    elif found.is_alike:
        ends = "all alike"
    else:
        ends = f"{found.low:+.2f}, {found.high:+.2f}"
    return " ".join(part for part in (f"{found.mean:+.2f}", unit, f"[{ends}]") if part)


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts 2 before 10."""
    parts, number = [], ""
    for letter in text + " ":
        if letter.isdigit():
            number += letter
            continue
        if number:
            parts.append((0, int(number), ""))
            number = ""
        parts.append((1, 0, letter))
    return parts


def _row_order(one: Series) -> tuple[str, bool, str, str, int]:
    run = one.run
    return run.model_label, run.policy_name != "full", run.policy_name, run.policy_label, one.length


def _marked(one: Series, notes: set[str]) -> str:
    text = one.metric.shown(one.mean)
    if one.run.nothing_compressed:
        text += " \u2020"
        notes.add("\u2020 nothing was compressed: every text fits the cache")
    if one.run.beyond_window(one.length):
        text += " \u2021"
        notes.add("\u2021 beyond the window that the model was trained for")
    return text


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))

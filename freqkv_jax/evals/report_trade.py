"""The report's one picture of all policies: how well text is read, and how well a key is found."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from freqkv_jax.evals.plots import COLOURS, MARKERS, new_figure, png, tidy
from freqkv_jax.evals.report_blocks import Block, Figure, Heading, Paragraph, length_text
from freqkv_jax.evals.report_compare import EQUAL_BYTES, GUESSING
from freqkv_jax.evals.report_runs import Run, finite

FEWEST = 3  # policies that make a picture
FONT = 8
Point = tuple[Run, float, float]  # of perplexity; perplexity, nats a digit


def section(runs: Sequence[Run]) -> list[Block]:
    """A picture a model; nothing where fewer than three policies were measured in both ways."""
    blocks: list[Block] = []
    for model in dict.fromkeys(run.model_label for run in runs):
        mine = [run for run in runs if run.model_label == model]
        texts = _widest(run for run in mine if finite(run.data.get("perplexity")))
        keys = _widest(run for run in mine if finite(run.data.get("nats_per_digit")))
        if not texts or not keys:
            continue
        length = _length(next(iter(texts.values())))
        told = _lengths(next(iter(keys.values())))
        told = [length] if length in told else told
        points = _of_equal_bytes(
            [
                (run, run.data["perplexity"], _nats(keys[label], told))
                for label, run in texts.items()
                if label in keys
            ]
        )
        if len(points) < FEWEST:
            continue
        caption = (
            f"Text and keys at once, caches of equal size, lower left is better ({model}):"
            f" perplexity of {length_text(length)} tokens, and nats a digit of a pass-key in texts"
            f" of {', '.join(map(length_text, told))} tokens, mean of all depths"
        )
        blocks.append(Figure(f"trade_{len(blocks)}", caption, trade_figure(points)))
    if not blocks:
        return []
    about = "Every policy at once; tables with differences and their intervals follow."
    return [Heading(2, "Text and keys"), Paragraph(about), *blocks]


def _length(run: Run) -> int:
    return int(run.config.get("seq_len") or 0)


def _lengths(run: Run) -> list[int]:
    return sorted({record["length_target"] for record in run.records})


def _nats(run: Run, lengths: Sequence[int]) -> float:
    found = [r["nats_per_digit"] for r in run.records if r["length_target"] in lengths]
    return statistics.fmean(found)


def _widest(runs: Iterable[Run]) -> dict[str, Run]:
    """Of the runs of one setting and length, those with most policies (the longest of equals)."""
    groups: dict[Any, dict[str, Run]] = defaultdict(dict)
    for run in runs:
        groups[run.setting()].setdefault(run.policy_label, run)

    def rank(group: dict[str, Run]) -> tuple[int, int]:
        return len(group), max(map(_length, group.values()))

    return max(groups.values(), key=rank, default={})


def _of_equal_bytes(points: list[Point]) -> list[Point]:
    """Full attention, and the policies of the size that most have."""

    def size(point: Point) -> float:
        run = point[0]
        return float(run.kv_bytes(_length(run)) or 0)

    def near(one: Point, other: Point) -> bool:
        return abs(size(one) - size(other)) <= EQUAL_BYTES * size(other)

    bounded = [p for p in points if p[0].policy_name != "full"]
    if not bounded:
        return []
    middle = max(bounded, key=lambda p: (sum(near(q, p) for q in bounded), size(p)))
    return [p for p in points if p[0].policy_name == "full" or near(p, middle)]


def trade_figure(points: Sequence[Point]) -> bytes:
    """Perplexity against nats a digit; each point has its name beside it."""
    figure = new_figure(7.6, 5.4)
    axes = figure.add_subplot()
    kinds = [kind for kind in dict.fromkeys(p[0].policy_name for p in points) if kind != "full"]
    for run, x, y in points:
        place = kinds.index(run.policy_name) if run.policy_name in kinds else None
        colour = "#666666" if place is None else COLOURS[place % len(COLOURS)]
        marker = "^" if place is None else MARKERS[place % len(MARKERS)]
        axes.scatter([x], [y], color=colour, marker=marker, s=42, zorder=3)
    axes.axhline(GUESSING, color="#888888", linewidth=0.9, linestyle=":", zorder=0)
    axes.annotate(
        "guessing", (1, GUESSING), xycoords=("axes fraction", "data"), xytext=(-2, 2),
        textcoords="offset points", ha="right", va="bottom", fontsize=FONT, color="#555555",
    )  # fmt: skip
    axes.margins(x=0.16, y=0.16)
    axes.set_xlabel("perplexity (lower is better)")
    axes.set_ylabel("pass-key, nats a digit (lower is better)")
    tidy(axes)
    _name_points(figure, axes, points)
    return png(figure)


def _name_points(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Names to the right of their points, moved up or down where they would meet others or the
    axis."""
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    places = [tuple(c * scale for c in axes.transData.transform((x, y))) for _, x, y in points]
    taken: list[tuple[float, float, float, float]] = []
    floor = axes.bbox.y0 * scale  # below stand the numbers of the axis
    for left, low in places:  # the points themselves
        taken.append((left - 4, low - 3, left + 4, low + 3))
    for index in sorted(range(len(points)), key=lambda i: -places[i][1]):
        run, x, y = points[index]
        name = run.policy_label
        wide, high = 0.56 * FONT * len(name), 1.15 * FONT
        left, low = places[index]
        for step in range(80):
            shift = (-1) ** step * (step + 1) // 2 * 3.0
            box = (left + 6, low + shift - high / 2, left + 6 + wide, low + shift + high / 2)
            if box[1] > floor and not any(_meet(box, other) for other in taken):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 3, "shrinkA": 0}
        axes.annotate(
            name, (x, y), xytext=(6, shift), textcoords="offset points", va="center",
            fontsize=FONT, arrowprops=line if abs(shift) > 4 else None, parse_math=False,
        )  # fmt: skip


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return (
        one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
    )  # fmt: skip

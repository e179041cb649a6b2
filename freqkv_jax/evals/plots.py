"""Pictures of results, as PNG files in memory.

Lines are told apart by their strokes and markers too, cells by numbers or crosses: not by colour
alone.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from freqkv_jax.evals.report_blocks import bytes_text, length_text

# Okabe and Ito's colours. Full attention is always the grey one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4B00", "#000000")
STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "D", "v", "P", "X", "<", ">")
FULL = ("#666666", ":", "^")
# The needle test's own three colours, from 0 to 1 (KVCache-Factory, MIT).
NEEDLE_COLOURS = ("#F0496E", "#EBB839", "#0CD79F")
DPI = 120
MAX_NUMBERED = 16  # columns of a heat map in which a number can be read


@dataclass(frozen=True)
class Curve:
    """A line: its label, its points, and half the height of each one's error bar (or none)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None] = ()
    is_full: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes with curves.

    Attributes:
      x_lengths: x is a number of tokens, on a logarithmic axis. log_y, bytes_y: so is y; in bytes.
      marks: vertical lines, (place, words).
      top: where y ends; what lies above is said in figures at the edge. None: above all points.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    x_lengths: bool = True
    log_y: bool = False
    bytes_y: bool = False
    title: str = ""
    marks: Sequence[tuple[float, str]] = field(default=())
    top: float | None = None


@dataclass(frozen=True)
class HeatMap:
    """Values of rows (depths) by columns (lengths); None where nothing was measured."""

    title: str
    rows: Sequence[float]
    columns: Sequence[int]
    values: Sequence[Sequence[float | None]]
    marks: Sequence[tuple[float, str]] = field(default=())


def new_figure(width: float, height: float) -> Any:
    """A figure that knows no screen; ImportError says what to install."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'freqkv-jax[eval]'") from error
    # A Figure of its own: pyplot would look for a screen and keep every figure.
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The picture; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def looks(curves: Sequence[Curve]) -> dict[str, tuple[str, Any, str]]:
    """Colour, line and marker of each label, in order of appearance."""
    found, others = {}, 0
    for curve in curves:
        if curve.label in found:
            continue
        if curve.is_full and FULL not in found.values():
            found[curve.label] = FULL
            continue
        n = others
        found[curve.label] = (
            COLOURS[n % len(COLOURS)], STYLES[n % len(STYLES)], MARKERS[n % len(MARKERS)]
        )  # fmt: skip
        others += 1
    return found


def curves_figure(panels: Sequence[Panel]) -> bytes:
    """Panels side by side (two a row), with one legend."""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    styles = looks([curve for panel in panels for curve in panel.curves])
    columns = 2 if across == 1 else 4
    height = 3.7 * down + 0.5 + _more_for_legend(len(styles), columns)
    figure = new_figure(4.9 * across + (1.2 if across == 1 else 0.4), height)
    grid = figure.subplots(down, across, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, styles)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    handles = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9
    )
    return png(figure)


def _more_for_legend(entries: int, columns: int) -> float:
    """Inches for the rows of a legend below the axes that a figure is not made for."""
    return 0.19 * max(0, -(-entries // columns) - 4)


def top_of(curves: Sequence[Curve]) -> float | None:
    """Where to end y so that one curve which shoots up does not flatten the others.

    None where full attention stays near the policies.
    """
    rest = [y for curve in curves if not curve.is_full for y in curve.y]
    full = [y for curve in curves if curve.is_full for y in curve.y]
    if not rest or not full or max(full) < 1.5 * max(rest):
        return None
    return max(rest) + max(0.35 * (max(rest) - min(rest)), 0.05 * max(rest))


def _end_at(axes: Any, curves: Sequence[Curve], top: float) -> None:
    low = min((y for curve in curves for y in curve.y if y <= top), default=0.0)
    axes.set_ylim(low - 0.12 * (top - low), top)


def _say_what_is_above(axes: Any, curve: Curve, top: float, colour: str) -> None:
    for x, y in zip(curve.x, curve.y, strict=True):
        if y > top:
            axes.annotate(
                f"\u2191 {y:,.3g}", (x, top), xytext=(0, -2), textcoords="offset points",
                ha="center", va="top", fontsize=8, color=colour, zorder=5,
                bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1},
            )  # fmt: skip


def _draw_panel(axes: Any, panel: Panel, styles: dict[str, tuple[str, Any, str]]) -> None:
    for curve in panel.curves:
        colour, line, marker = styles[curve.label]
        look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5}
        axes.plot(curve.x, curve.y, linewidth=1.6, label=curve.label, **look)
        bars = [(x, y, e) for x, y, e in zip(curve.x, curve.y, curve.error, strict=False) if e]
        if bars:
            x, y, e = zip(*bars, strict=True)
            axes.errorbar(x, y, yerr=e, fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    _axes_of(axes, panel)
    if panel.top is not None:
        _end_at(axes, panel.curves, panel.top)
        for curve in panel.curves:
            _say_what_is_above(axes, curve, panel.top, styles[curve.label][0])
    low, high = axes.get_xlim()
    marks = [(place, words) for place, words in panel.marks if low <= place <= high]
    for row, (place, words) in enumerate(marks):
        mark(axes, place, words, row)
    axes.set_title(panel.title, fontsize=10, pad=6 + 10 * len(marks))


def _axes_of(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if panel.x_lengths:
        ticks = sorted({x for curve in panel.curves for x in curve.x})
        axes.set_xscale("log", base=2)
        while len(ticks) > 8:
            ticks = ticks[::-2][::-1]
        axes.set_xticks(ticks, [length_text(round(x)) for x in ticks], fontsize=9)
        axes.minorticks_off()
    values = [y for curve in panel.curves for y in curve.y if y > 0]
    if panel.log_y and max(values) > 2 * min(values):
        axes.set_yscale("log", base=2 if panel.bytes_y else 10)
        decades = math.log10(max(values) / min(values))
        if not panel.bytes_y and decades < 4:
            subs = (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 5, 7)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.log_y:
        axes.set_ylim(0, 1.15 * max(values))
        if panel.bytes_y:
            step = 2.0 ** math.ceil(math.log2(max(values) / 5))
            axes.set_yticks([step * i for i in range(int(max(values) / step) + 2)])
            axes.set_ylim(0, 1.15 * max(values))
    if panel.bytes_y:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: bytes_text(y, 3)))
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    tidy(axes)


def tidy(axes: Any) -> None:
    """A light grid, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def mark(axes: Any, place: float, words: str, row: int = 0) -> None:
    """A vertical line with words above it, `row` lines up."""
    axes.axvline(place, color="#888888", linewidth=0.9, zorder=0)
    axes.annotate(
        words, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 3 + 10 * row),
        textcoords="offset points", ha="center", va="bottom", color="#555555", fontsize=8,
    )  # fmt: skip


def points_figure(curves: Sequence[Curve], y_label: str, title: str) -> bytes:
    """Quality against bytes: a point a row; x in bytes, logarithmic."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    styles = looks(curves)
    figure = new_figure(6.6, 4.4 + _more_for_legend(len(styles), 2))
    axes = figure.add_subplot()
    for label, (colour, _, marker) in styles.items():
        mine = [curve for curve in curves if curve.label == label]
        x = [value for curve in mine for value in curve.x]
        y = [value for curve in mine for value in curve.y]
        axes.scatter(x, y, color=colour, marker=marker, s=55, label=label, zorder=3)
    axes.set_xscale("log", base=2)
    places = sorted({value for curve in curves for value in curve.x})
    axes.set_xlim(places[0] / 1.5, places[-1] * 1.5)
    if len(places) <= 6:
        axes.set_xticks(places)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bytes_text(x, 3)))
    axes.set_xlabel("keys and values of one text (bytes)")
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    top = top_of(curves)
    if top is not None:
        _end_at(axes, curves, top)
        for curve in curves:
            _say_what_is_above(axes, curve, top, looks(curves)[curve.label][0])
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return png(figure)


def needle_figure(
    maps: Sequence[HeatMap], label: str, best: float = 1.0, worst: float = 0.0
) -> bytes:
    """Depth by length, a map a policy, in the needle test's colours.

    Red, yellow and green are hard to tell apart for some, so small maps show numbers, and large
    ones a cross in every cell of the worse half.

    Args:
      label: what the colours mean. best, worst: the values of green and of red.
    """
    widest = max(len(one.columns) for one in maps)
    across = 1 if widest > 24 else min(2, len(maps))
    down = -(-len(maps) // across)
    width = min(12.0, 1.6 + 0.42 * max(8, min(widest, 26)))
    figure = new_figure(width * across if across == 1 else width * 1.75, 3.5 * down + 0.4)
    grid = figure.subplots(down, across, squeeze=False)
    image = None
    for axes, one in zip(grid.flat, maps, strict=False):
        image = _draw_map(axes, one, best, worst)
    for axes in list(grid.flat)[len(maps) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), fraction=0.03, pad=0.01)
    bar.set_label(label, fontsize=9)
    return png(figure)


def _draw_map(axes: Any, one: HeatMap, best: float, worst: float) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("needle", NEEDLE_COLOURS)
    colours = colours if best > worst else colours.reversed()
    colours = colours.with_extremes(bad="#EEEEEE")
    values = np.array([[np.nan if x is None else x for x in row] for row in one.values], float)
    rows, columns = values.shape
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, aspect="auto", interpolation="nearest",
        vmin=min(best, worst), vmax=max(best, worst),
    )  # fmt: skip
    for place in range(1, columns):
        axes.axvline(place - 0.5, color="#777777", linestyle="--", linewidth=0.4)
    for place in range(1, rows):
        axes.axhline(place - 0.5, color="#777777", linestyle="--", linewidth=0.4)
    middle = (best + worst) / 2
    for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
        value = values[row, column]
        if columns <= MAX_NUMBERED:
            text = f"{value:.1f}" if abs(value) >= 9.95 else f"{value:.2f}".removeprefix("0")
            axes.text(column, row, text, ha="center", va="center", fontsize=7)
        elif (value < middle) == (best > worst) and value != middle:
            axes.plot(column, row, marker="x", color="black", markersize=3, markeredgewidth=0.6)
    every = max(1, -(-columns // 12))
    shown = list(range(0, columns, every))
    axes.set_xticks(shown, [length_text(one.columns[i]) for i in shown], fontsize=8, rotation=45)
    axes.set_yticks(range(rows), [f"{depth:g}" for depth in one.rows], fontsize=8)
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("depth of the needle (%)")
    mean = np.nanmean(values) if np.isfinite(values).any() else math.nan
    shown = _draw_limits(axes, one)
    axes.set_title(f"{one.title}: mean {mean:.2f}", fontsize=10, pad=8 + 11 * shown)
    return image


def _draw_limits(axes: Any, one: HeatMap) -> int:
    """Lines behind the last column that fits; where two meet, their words are joined.

    Returns how many were drawn.
    """
    words: dict[float, str] = {}
    for place, text in one.marks:
        at = sum(column <= place for column in one.columns) - 0.5
        if 0 < at < len(one.columns) - 0.5:
            words[at] = f"{words[at]}, {text}" if at in words else text
    for number, (at, text) in enumerate(words.items()):
        dashed = "native" in text
        axes.axvline(at, color="black" if dashed else "white", linewidth=3.4)
        axes.axvline(
            at, color="white" if dashed else "black", linewidth=2 if dashed else 1.4,
            linestyle="--" if dashed else "-",
        )  # fmt: skip
        axes.annotate(
            text, (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 3 + 11 * number),
            textcoords="offset points", ha="center", va="bottom", fontsize=8, color="#444444",
        )  # fmt: skip
    return len(words)

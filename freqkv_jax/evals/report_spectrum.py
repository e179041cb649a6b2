"""The report's section on spectra: heat maps by layer and head, curves, what rounds leave."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from freqkv_jax.evals.plots import COLOURS, MARKERS, STYLES, new_figure, png, tidy
from freqkv_jax.evals.report_blocks import Block, Figure, Heading, Paragraph, Table
from freqkv_jax.evals.report_runs import Run

TITLES = {
    "key": "keys before rotary",
    "key_rotated": "keys after rotary",
    "value": "values",
}
HEAT_BINS = 48  # of equal ratio: low frequencies, where the energy is, need room
RANGE_DB = 15


def section(runs: Sequence[Run]) -> list[Block]:
    """Blocks of all spectra."""
    blocks: list[Block] = [Heading(2, "Spectra of keys and values")]
    blocks.append(
        Paragraph(
            "Energy over frequency of the orthonormal DCT-II along the text, behind the sinks,"
            " averaged over the channels of a head; each head's energy sums to 1."
        )
    )
    for number, run in enumerate(_shown(runs)):
        blocks += _one(run, number)
    lefts = {run.policy_label: run.data["left_after"] for run in runs if run.data.get("left_after")}
    if lefts:
        caption = (
            "What rounds leave of an entry: energy of its weights in the cache, and the largest of"
            " them (mean over the entries of a chunk)"
        )
        blocks += [Figure("spectrum_left", caption, left_figure(lefts)), _left_table(lefts)]
    return blocks


def _shown(runs: Sequence[Run]) -> list[Run]:
    """Of each model and text the finest spectra, and of those without compression only one."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.data.get("energy"):
            text = run.data_digest
            groups.setdefault((run.model_label, text), []).append(run)
    shown = []
    for group in groups.values():
        finest = max(run.data["num_frequencies"] for run in group)
        fine = [run for run in group if run.data["num_frequencies"] == finest]
        fine.sort(key=lambda run: run.policy_name != "full")
        plain = [run for run in fine if run.policy_name == "full" or run.nothing_compressed]
        shown += plain[:1] + [run for run in fine if run not in plain]
    return shown


def _one(run: Run, number: int) -> list[Block]:
    data = run.data
    energy = np.asarray(data["energy"], np.float64)
    kinds: list[str] = data["kinds"]
    label = f"{run.model_label}, {run.policy_label}"
    about = f"{label}, {data['num_frequencies']:,} frequencies"
    head_shares = kept(energy, 0.5)
    rows = []
    for ratio, shares in data["kept_by_ratio"].items():
        means = np.asarray(shares).mean(axis=(0, 2))
        lows = np.asarray(shares).min(axis=(0, 2))
        cells = [f"{mean:.1%} ({low:.1%})" for mean, low in zip(means, lows, strict=True)]
        rows.append([f"{float(ratio):.4g}", *cells])
    columns = ["lowest share of frequencies", *(TITLES.get(kind) or kind for kind in kinds)]
    blocks: list[Block] = [
        Heading(3, label),
        Figure(
            f"spectrum_{number}_layers",
            f"Energy by layer and frequency, mean of the heads, against a flat spectrum ({about})",
            layers_figure(energy, kinds, data["num_frequencies"]),
        ),
        Figure(
            f"spectrum_{number}_curves",
            "Share of the energy in the lowest frequencies: median of layers and heads, and the"
            f" middle nine tenths of them ({about})",
            curves_figure(energy, kinds),
        ),
        Figure(
            f"spectrum_{number}_heads",
            f"Share of the energy in the lowest half of the frequencies, by head ({label})",
            heads_figure(head_shares, kinds),
        ),
        Table(columns, rows, "energy that it holds: mean of layers and heads (least of them)"),
    ]
    return blocks


def kept(energy: np.ndarray, ratio: float) -> np.ndarray:
    """Share of the energy [..., bins] in the lowest bins."""
    return energy[..., : max(1, round(ratio * energy.shape[-1]))].sum(axis=-1)


def rebinned(energy: np.ndarray, bins: int = HEAT_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Means over ranges of equal ratio: edges (in frequencies) and energies [..., ranges]."""
    size = energy.shape[-1]
    edges = np.unique(np.round(np.geomspace(1, size, bins + 1)).astype(int))
    edges = np.concatenate([[0], edges])
    sums = np.add.reduceat(energy, edges[:-1], axis=-1)
    return edges, sums / np.diff(edges)


def layers_figure(energy: np.ndarray, kinds: Sequence[str], num_frequencies: int) -> bytes:
    """A heat map a kind: layers by frequency, in decibels against a flat spectrum."""
    edges, means = rebinned(energy.mean(axis=2))
    level = 10 * np.log10(np.maximum(means * energy.shape[-1], 1e-12))
    figure = new_figure(3.9 * len(kinds) + 0.8, 3.9)
    grid = figure.subplots(1, len(kinds), squeeze=False)[0]
    # Frequency 0 has no place on a logarithmic axis: the first bin is drawn half an octave wide.
    places = np.concatenate([[1 / math.sqrt(2)], edges[1:]]) * num_frequencies / energy.shape[-1]
    layers = np.arange(energy.shape[0] + 1) - 0.5
    image = None
    for index, (axes, kind) in enumerate(zip(grid, kinds, strict=True)):
        image = axes.pcolormesh(
            places, layers, level[:, index], cmap="cividis", vmin=-RANGE_DB, vmax=RANGE_DB
        )
        axes.set_xscale("log")
        axes.set_xlabel("frequency (half waves a window)")
        axes.set_title(TITLES.get(kind, kind), fontsize=10)
        axes.invert_yaxis()
    grid[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(grid), pad=0.01, extend="both").set_label(
        "energy against a flat spectrum (dB)", fontsize=9
    )
    return png(figure)


def curves_figure(energy: np.ndarray, kinds: Sequence[str]) -> bytes:
    """Cumulative energy over the share of frequencies."""
    size = energy.shape[-1]
    share = np.concatenate([[0.0], np.cumsum(np.full(size, 1 / size))])
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    for index, kind in enumerate(kinds):
        heads = np.cumsum(energy[:, index].reshape(-1, size), axis=-1)
        low, middle, high = (
            np.concatenate([[0.0], np.percentile(heads, level, axis=0)]) for level in (5, 50, 95)
        )
        colour = COLOURS[index]
        places = np.searchsorted(share, (0.1, 0.3, 0.5, 0.7, 0.9))
        axes.plot(
            share, middle, color=colour, linestyle=STYLES[index], marker=MARKERS[index],
            markevery=places.clip(0, size).tolist(), markersize=5, label=TITLES.get(kind, kind),
        )  # fmt: skip
        axes.fill_between(share, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, label="flat spectrum")
    axes.axvline(0.5, color="#bbbbbb", linewidth=0.8)
    axes.set_xlabel("share of the frequencies, lowest first")
    axes.set_ylabel("share of the energy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)
    axes.legend(fontsize=9, loc="lower right")
    tidy(axes)
    return png(figure)


def heads_figure(shares: np.ndarray, kinds: Sequence[str]) -> bytes:
    """shares [layers, kinds, heads]: a map a kind."""
    heads = shares.shape[2]
    figure = new_figure(max(6.5, 1.1 * len(kinds) + 0.16 * heads * len(kinds)), 4.2)
    grid = figure.subplots(1, len(kinds), squeeze=False)[0]
    image = None
    for index, (axes, kind) in enumerate(zip(grid, kinds, strict=True)):
        image = axes.imshow(
            shares[:, index], cmap="cividis", vmin=0.5, vmax=1, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        every = -(-heads // 8)
        axes.set_xticks(range(0, heads, every))
        axes.set_xlabel("kv head")
        axes.set_title(TITLES.get(kind, kind), fontsize=10)
    grid[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(grid), pad=0.01, extend="min")
    bar.set_label("energy in the lowest half", fontsize=9)
    return png(figure)


def left_figure(lefts: dict[str, dict[str, list[float]]]) -> bytes:
    """What is left of an entry after rounds, on a logarithmic axis."""
    figure = new_figure(8.2, 3.9)
    grid = figure.subplots(1, 2)
    titles = (("energy", "energy left (squared weights)"), ("largest", "largest weight in a slot"))
    for axes, (key, title) in zip(grid, titles, strict=True):
        for number, (label, left) in enumerate(lefts.items()):
            points = [(r, value) for r, value in enumerate(left[key]) if value > 0]
            axes.plot(
                *zip(*points, strict=True), label=label, color=COLOURS[number % len(COLOURS)],
                linestyle=STYLES[number % len(STYLES)], marker=MARKERS[number % len(MARKERS)],
                markersize=5,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xticks(range(max(len(left[key]) for left in lefts.values())))
        axes.set_xlabel("rounds gone through")
        axes.set_ylabel(title)
        tidy(axes)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=9
    )
    return png(figure)


def _left_table(lefts: dict[str, dict[str, list[float]]]) -> Table:
    rows = []
    shown: Any = (1, 2, 4, 8)
    for label, left in lefts.items():
        cells = [f"{left['energy'][r]:.2g} / {left['largest'][r]:.2g}" for r in shown]
        rows.append([label, *cells])
    columns = ["policy", *(f"{r} round{'s' if r > 1 else ''}" for r in shown)]
    return Table(columns, rows, "what is left of an entry: energy / largest weight")

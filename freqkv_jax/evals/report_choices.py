"""The report's section on choices: what is left of a text by place, how long entries last."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from freqkv_jax.evals.plots import Curve, Panel, curves_figure, new_figure, png
from freqkv_jax.evals.report_blocks import Block, Figure, Heading, Paragraph, Table, length_text
from freqkv_jax.evals.report_runs import Run

COLOURS_OF_SHARES = "Blues"  # one hue, light for little: read alike by all eyes
NOT_READ = "#F0E9DC"
LINE = 96  # characters of a line of an excerpt
CHARACTER = 0.0669  # inches of one in 8 pt of the monospaced font
LINE_HEIGHT = 0.165
MARK = "\u21b5"  # for a line break


def section(runs: Sequence[Run]) -> list[Block]:
    """Blocks of all runs that followed entries."""
    shown = [run for run in runs if run.data.get("survival")]
    blocks: list[Block] = [Heading(2, "What is kept, and for how long")]
    blocks.append(
        Paragraph(
            "A policy that chooses holds a token in a kv head or does not: shares are of layers and"
            " heads. Where a round is a linear map, what is left of a token is the sum of its"
            " squared weights in the slots (1: it stands alone in one)."
        )
    )
    if shown:
        caption = "What is left of an entry, by the tokens that were read since its chunk was full"
        blocks += [Figure("choices_survival", caption, survival_figure(shown)), _table(shown)]
    for number, run in enumerate(shown):
        about = f"{run.model_label}, {run.policy_label}"
        caption = f"What is left of the text, by place and round, and by layer at the end ({about})"
        blocks += [
            Heading(3, about),
            Figure(f"choices_{number}_map", caption, map_figure(run.data)),
        ]
        excerpt = next((r["excerpt"] for r in run.records if r.get("excerpt")), None)
        if excerpt and excerpt["texts"]:
            caption = f"What is left of a passage from the middle of the text ({about})"
            picture = excerpt_figure(excerpt["texts"], excerpt["left"])
            blocks.append(Figure(f"choices_{number}_text", caption, picture))
    return blocks


def survival_figure(runs: Sequence[Run]) -> bytes:
    """A curve a policy, mean of layers and heads."""
    curves = []
    for run in runs:
        curve = np.mean(run.data["survival"], axis=0)
        tokens = (np.arange(len(curve)) * run.data["chunk"]).tolist()
        curves.append(Curve(run.policy_label, tokens, curve.tolist()))
    label = "tokens read since (rounds gone through x chunk)"
    return curves_figure([Panel(curves, label, "share of an entry left", x_lengths=False)])


def _table(runs: Sequence[Run]) -> Table:
    """How far heads and layers agree, and what is left after as many tokens as the cache holds."""
    rows = []
    for run in runs:
        agree = run.data.get("agreement") or {}
        curve, size = np.mean(run.data["survival"], axis=0), _slots(run)
        after = min(-(-size // run.data["chunk"]), len(curve) - 1) if size else len(curve) - 1
        cells = [f"{agree[k]:.2f}" if agree.get(k) is not None else "-" for k in _AGREE]
        left = f"{curve[after]:.1%} after {length_text(after * run.data['chunk'])}"
        rows.append([run.policy_label, left, *cells])
    columns = ["policy", "left", *_AGREE.values()]
    notes = [
        "agreement: mean Jaccard index of what two heads chose and still hold at the end, sinks and"
        " recents apart; 1 where they hold the same",
        "chance: two sets of that size drawn from the whole text",
    ]
    return Table(columns, rows, "what is left of an entry, and agreement", notes)


_AGREE = {
    "heads": "heads of a layer",
    "neighbours": "neighbouring layers",
    "layers": "all layers",
    "chance": "chance",
}


def _slots(run: Run) -> int | None:
    kv = run.policy
    return None if kv is None else kv.capacity


def map_figure(data: dict[str, Any]) -> bytes:
    """What is left by place in the text: a row a round, below it a row a layer at the end."""
    rounds = np.array(data["left_by_round"], np.float64)
    layers = np.array(data["left_by_layer"], np.float64)
    num_read, chunk, total = data["num_read"], data["chunk"], data["rounds"]
    # A bin's mean is over all its tokens, and those that were not read yet count as 0.
    edges = np.linspace(0, num_read, rounds.shape[1] + 1).round()
    read = num_read - (total - 1 - np.arange(total)) * chunk
    part = np.clip((read[:, None] - edges[:-1]) / np.diff(edges), 0, 1)
    shown = np.ma.masked_array(rounds / np.maximum(part, 0.5), part < 0.5)
    height = 0.7 + (1.9 if len(layers) > 1 else 0.5)
    figure = new_figure(7.4, 2.6 + height)
    top, bottom = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, height - 0.7]}
    )
    image = _shares(top, shown, (0, num_read, total + 0.5, 0.5))
    _shares(bottom, layers, (0, num_read, len(layers) - 0.5, -0.5))
    top.set_ylabel("rounds gone through")
    for axes in (top, bottom):
        axes.yaxis.get_major_locator().set_params(integer=True)
    top.set_title("after each round, mean of layers and heads", fontsize=10)
    bottom.set_title("after the last round, by layer", fontsize=10)
    if len(layers) > 1:
        bottom.set_ylabel("layer")
    else:
        bottom.set_title("after the last round (all layers are alike)", fontsize=10)
        bottom.set_yticks([])
    bottom.set_xlabel("place in the text (tokens)")
    bar = figure.colorbar(image, ax=[top, bottom], pad=0.01)
    bar.set_label("share left", fontsize=9)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
    return png(figure)


def share_norm() -> Any:
    """Colours of shares: small ones are many, and differ."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=1)


def _shares(axes: Any, values: np.ndarray, extent: tuple[float, ...]) -> Any:
    axes.set_facecolor(NOT_READ)
    return axes.imshow(
        values, cmap=COLOURS_OF_SHARES, norm=share_norm(), aspect="auto", extent=extent,
        interpolation="nearest",
    )  # fmt: skip


def excerpt_figure(texts: Sequence[str], left: Sequence[float]) -> bytes:
    """A passage, each token on the colour of what is left of it."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    places, line, column = [], 0, 0
    for text, share in zip(texts, left, strict=True):
        word = _printable(text)
        if column and column + len(word) > LINE:
            line, column = line + 1, 0
        places.append((line, column, word, share))
        column += len(word)
        if word.endswith(MARK):
            line, column = line + 1, 0
    lines = max(place[0] for place in places) + 1
    width, height = LINE * CHARACTER + 0.3, lines * LINE_HEIGHT + 0.7
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.15 / width, 0.6 / height, LINE * CHARACTER / width,
                            lines * LINE_HEIGHT / height))  # fmt: skip
    axes.set_xlim(0, LINE)
    axes.set_ylim(lines, 0)
    axes.set_axis_off()
    norm, colours = share_norm(), colormaps[COLOURS_OF_SHARES]
    for line, column, word, share in places:
        # Light enough for black letters: three quarters of the map at most.
        colour = colours(0.75 * float(norm(share)))
        axes.add_patch(Rectangle((column, line + 0.05), len(word), 0.9, color=colour, linewidth=0))
        axes.text(
            column, line + 0.5, word, family="monospace", fontsize=8, va="center",
            parse_math=False, clip_on=False,
        )  # fmt: skip
    bar_axes = figure.add_axes((0.15 / width, 0.38 / height, 2.4 / width, 0.12 / height))
    lighter = colours(np.linspace(0, 0.75, 256))
    bar = figure.colorbar(
        ScalarMappable(norm, ListedColormap(lighter)), cax=bar_axes,
        orientation="horizontal", ticks=[0, 0.05, 0.2, 0.5, 1],
    )  # fmt: skip
    bar.ax.tick_params(labelsize=7)
    figure.text(2.7 / width, 0.38 / height, "share left", fontsize=8)
    return png(figure)


def _printable(text: str) -> str:
    text = text.replace("\r", "").replace("\t", " ").replace("\n", MARK)
    shown = [c if c == MARK or _has_shape(c) else "\u00b7" for c in text]
    return "".join(shown) or "\u00b7"


def _has_shape(character: str) -> bool:
    """Whether the font is sure to know it: scripts of Europe, dashes and quotes."""
    code = ord(character)
    return character.isprintable() and (code < 0x530 or 0x2010 <= code <= 0x2027)

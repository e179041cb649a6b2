#!/usr/bin/env python3
"""The README's picture: what each policy has kept of a long text, and what that is worth.

    python scripts/what_policies_keep.py docs/results/smollm2_cache_study/results PICTURE.png

reads results of the suite cache_study: which places of a text of 8,192 tokens are left in caches of
2,048 slots, and beside each strip the policy's perplexity, pass-keys and RULER score.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from freqkv_jax.evals.plots import new_figure, png
from freqkv_jax.evals.report_choices import COLOURS_OF_SHARES, share_norm
from freqkv_jax.files import write_whole

LENGTH = 8192
# The name in the suite, and what stands beside the strip.
SHOWN = {
    "full": "full attention\n(four times the bytes)",
    "window": "sink + window",
    "freqkv": "FreqKV",
    "keydiff": "novelty\n(1 band: KeyDiff)",
    "novelty": "novelty, 16 bands,\na third by value",
}
MEASURES = ("perplexity\nat 8K", "pass-keys\nwritten at 8K", "RULER\nat 8K")


def main() -> None:
    """Reads the results, draws, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()

    def result(name: str) -> dict[str, Any]:
        return json.loads((args.results / f"{name}.json").read_text(encoding="utf-8"))

    figure = new_figure(8.8, 0.62 * len(SHOWN) + 1.25)
    grid = figure.subplots(len(SHOWN), 2, sharex="col", gridspec_kw={"width_ratios": [2.4, 1]})
    image = None
    for (strip, beside), (name, label) in zip(grid, SHOWN.items(), strict=True):
        left, num_read = np.ones(128), LENGTH
        if name != "full":
            choices = result(f"choices-{name}")
            left, num_read = np.array(choices["left_by_round"][-1]), choices["num_read"]
        look = {"cmap": COLOURS_OF_SHARES, "norm": share_norm(), "aspect": "auto"}
        image = strip.imshow(
            left[None], extent=(0, num_read, 0, 1), interpolation="nearest", **look
        )
        if num_read < LENGTH:  # what came after the last round
            strip.imshow(np.ones((1, 1)), extent=(num_read, LENGTH, 0, 1), **look)
        strip.set_xlim(0, LENGTH)
        strip.set_yticks([])
        strip.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        worth = (
            f"{result(f'perplexity-{name}')['perplexity']:.2f}",
            f"{_pass_keys(result(f'needle_written-{name}')):g} %",
            f"{result(f'ruler-{name}-lengths{LENGTH}')['score']:.1f}",
        )
        beside.set_axis_off()
        for place, text in zip((0.1, 0.5, 0.9), worth, strict=True):
            beside.text(place, 0.5, text, ha="center", va="center", fontsize=10)
    for place, text in zip((0.1, 0.5, 0.9), MEASURES, strict=True):
        grid[0, 1].text(place, 1.1, text, ha="center", va="bottom", fontsize=8)
    title = f"left of each token of {LENGTH:,}, in 2,048 slots"
    grid[0, 0].set_title(title, fontsize=9, loc="left")
    grid[-1, 0].set_xlabel("place in the text (tokens)", fontsize=9)
    bar = figure.colorbar(image, ax=grid[:, 0], orientation="horizontal", aspect=60, pad=0.02)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0", "5 %", "20 %", "50 %", "all"], fontsize=8)
    write_whole(args.picture, lambda path: Path(path).write_bytes(png(figure)))
    print(f"written {args.picture}")


def _pass_keys(needle: dict[str, Any]) -> float:
    """Per cent of the pass-keys that the model has written."""
    return float(100 * np.mean(needle["grid"]["metrics"]["exact"]["values"]))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Perplexity before and after a tuning, and the table and pictures of docs/results/smollm2_tuning.

    python scripts/tuning_perplexity.py score RESULT.json POLICY UNTUNED TUNED TEXTS
    python scripts/tuning_perplexity.py draw FOLDER

`score` reads the same spans of every text at each length, cut into windows that do not overlap,
each from an empty cache, so that lengths differ in nothing but where windows begin. `draw` reads
FOLDER/POLICY.json and FOLDER/POLICY.metrics.jsonl.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import freqkv_jax as fk
from freqkv_jax.files import write_text

CACHE, SPAN, SPANS, LENGTHS = 2048, 65536, 3, (8192, 16384, 65536)
TOKENS_AT_ONCE = 65536
NATIVE = 8192  # tokens that SmolLM2 was trained for
POLICIES = {
    "full": fk.FullConfig(),
    "sink_window": fk.SinkWindowConfig(cache_size=CACHE),
    "freqkv": fk.FreqKVConfig(cache_size=CACHE),
}
COLOURS = {"full": "#000000", "sink_window": "#0072B2", "freqkv": "#D55E00"}
MARKERS = {"full": "s", "sink_window": "^", "freqkv": "o"}


def score_policy(out: Path, policy: str, untuned: str, tuned: str, texts: Path) -> None:
    """Scores both models with a policy; writes after every length."""
    tokenizer = fk.load_tokenizer(untuned)
    files = sorted(texts.glob("*.txt"))
    tokens = {f.stem: np.asarray(tokenizer.encode(f.read_text()), np.int32) for f in files}
    starts = {
        name: [int(x) for x in np.linspace(0, len(ids) - SPAN, SPANS)]
        for name, ids in tokens.items()
    }
    result: dict[str, Any] = {"policy": policy, "cache": CACHE, "span": SPAN, "lens": LENGTHS}
    result |= {"tokens": {name: len(ids) for name, ids in tokens.items()}, "spans": starts}
    result["runs"] = {}
    for label, path in (("untuned", untuned), ("tuned", tuned)):
        model, params = fk.load_pretrained(path, kv=POLICIES[policy])
        for length in LENGTHS:
            begin = time.monotonic()
            names, losses = [], []
            for name, ids in tokens.items():
                for start in starts[name]:
                    windows = ids[start : start + SPAN].reshape(-1, length)
                    names += [name] * len(windows)
                    losses.append(_losses(model, params, windows, policy == "full"))
            found = _summary(names, np.concatenate(losses), length)
            found["seconds"] = time.monotonic() - begin
            result["runs"][f"{label}/{length}"] = found
            print(policy, label, length, f"perplexity {found['ppl']:.3f}", flush=True)
            write_text(out, json.dumps(result, indent=1) + "\n")


def _losses(model: Any, params: Any, windows: np.ndarray, whole: bool) -> np.ndarray:
    length = windows.shape[1]
    rows = 1 if whole else max(1, TOKENS_AT_ONCE // length)
    block = length if whole else None  # a full cache that grew would compile at every size
    parts = [
        fk.score(model, params, windows[first : first + rows], block_len=block)
        for first in range(0, len(windows), rows)
    ]
    return -np.concatenate([np.asarray(part, np.float64) for part in parts])


def _summary(names: list[str], losses: np.ndarray, length: int) -> dict[str, Any]:
    doubling = [1, *(2**k for k in range(10, 17) if 2**k < length), length]
    of = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
    return {
        "loss": float(losses.mean()),
        "ppl": math.exp(losses.mean()),
        "docs": {name: float(losses[rows].mean()) for name, rows in of.items()},
        "behind": float(losses[:, CACHE:].mean()),
        "window_losses": losses.mean(axis=1).tolist(),
        "positions": [
            [a, b, float(losses[:, a - 1 : b - 1].mean())]
            for a, b in zip(doubling, doubling[1:], strict=False)
        ],
    }


def draw(folder: Path) -> None:
    """Prints the tables and draws curves.png and perplexity.png."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in POLICIES}
    for policy, result in found.items():
        for label in ("untuned", "tuned"):
            runs = [result["runs"][f"{label}/{length}"] for length in LENGTHS]
            print(f"| {policy} | {label} | " + " | ".join(f"{r['ppl']:.2f}" for r in runs) + " |")
    for policy, result in found.items():
        for label in ("untuned", "tuned"):
            run = result["runs"][f"{label}/16384"]
            cells = [f"{math.exp(loss):.2f}" for loss in run["docs"].values()]
            print(f"| {policy} | {label} | " + " | ".join(cells) + " |")
    _draw_perplexity(found, folder / "perplexity.png")
    _draw_curves(folder)


def _draw_perplexity(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for policy, result in found.items():
        for label, line, face in (("untuned", "--", "none"), ("tuned", "-", COLOURS[policy])):
            style = {"color": COLOURS[policy], "marker": MARKERS[policy], "linestyle": line}
            native = NATIVE if policy == "full" else SPAN  # it is of no use beyond
            x = [length for length in LENGTHS if length <= native]
            values = [result["runs"][f"{label}/{length}"]["ppl"] for length in x]
            left.plot(x, values, label=f"{policy}, {label}", mfc=face, **style)
            places = result["runs"][f"{label}/65536"]["positions"]
            places = [place for place in places if place[1] <= native]
            x = [math.sqrt(a * b) for a, b, _ in places]
            right.plot(x, [math.exp(loss) for *_, loss in places], mfc=face, **style)
    left.set(xlabel="window (tokens)", ylabel="perplexity", ylim=(15, 24.5), xscale="log")
    left.set_xticks(LENGTHS, [f"{n // 1024}K" for n in LENGTHS], minor=False)
    left.set_xticks([], minor=True)
    left.text(9000, 15.2, "full beyond its native window of 8K: 38 to 2013, not drawn", fontsize=8)
    figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    right.set(xlabel="place in a window of 64K (tokens)", xscale="log")
    right.axvline(CACHE, color="grey", linewidth=1)
    right.text(CACHE * 1.08, 15.2, "cache", fontsize=8, color="grey")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw_curves(folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy, colour in COLOURS.items():
        lines = (folder / f"{policy}.metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        steps = [r for r in records if "loss" in r]
        smooth = np.convolve([r["loss"] for r in steps], np.ones(9) / 9, "valid")
        left.plot(range(5, 5 + len(smooth)), smooth, color=colour, label=policy)
        held = [r for r in records if "eval_loss" in r]
        right.plot(
            [r["step"] for r in held],
            [r["eval_perplexity"] for r in held],
            color=colour,
            marker=MARKERS[policy],
            label=policy,
        )
    left.set(xlabel="step", ylabel="training loss (nats a token), mean of 9 steps")
    right.set(xlabel="step", ylabel="perplexity of 16 held-out rows of 8K")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) == 7 and sys.argv[1] == "score" and sys.argv[3] in POLICIES:
        score_policy(Path(sys.argv[2]), *sys.argv[3:6], Path(sys.argv[6]))
    elif len(sys.argv) == 3 and sys.argv[1] == "draw":
        draw(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)

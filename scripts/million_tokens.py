#!/usr/bin/env python3
"""A text of a million tokens through FreqKV's cache: time and memory, block by block.

    python scripts/million_tokens.py measure RESULT.json [--model llama3-8b] [--tokens 1048576]
    python scripts/million_tokens.py draw RESULT.json PICTURE.png

The model has random weights. `measure` reads the text by `fk.prefill` and notes behind each block
when it was there and what the device held; every program is compiled before. A full cache of such
a text would need 128 GiB with the default shape.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import freqkv_jax as fk
from freqkv_jax.config import SHAPES
from freqkv_jax.evals.plots import COLOURS, FULL, new_figure, png, tidy
from freqkv_jax.evals.report_blocks import length_text
from freqkv_jax.evals.result import environment
from freqkv_jax.files import write_text, write_whole

BLOCK_TOKENS = 8192
GIB = 2**30


def main() -> None:
    """Measures, or draws what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "draw"))
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="of draw")
    parser.add_argument("--model", default="llama3-8b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--cache-size", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if args.what == "measure":
        write_text(args.result, json.dumps(measured(args), indent=1))
        return
    if args.picture is None:
        parser.error("draw needs a PICTURE")
    picture = drawn(json.loads(args.result.read_text(encoding="utf-8")))
    write_whole(args.picture, lambda name: Path(name).write_bytes(picture))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens read, seconds since the start and bytes held, behind each block."""
    kv = fk.FreqKVConfig(cache_size=args.cache_size)
    model = fk.Llama(SHAPES[args.model], kv, args.dtype)
    params = fk.init_params(model)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, args.tokens))
    device = jax.local_devices()[0]
    blocks: list[dict[str, Any]] = []

    def note(done: int, total: int) -> None:
        held = (device.memory_stats() or {}).get("bytes_in_use")
        seconds = time.perf_counter() - begin
        blocks.append({"tokens": done, "seconds": seconds, "held_bytes": held})
        if len(blocks) % 16 == 0:
            print(f"{done:,} of {total:,} tokens, {seconds:.1f} s", flush=True)

    # The same programs on a short text: the first filling, a block of chunks, and what is left.
    block = max(BLOCK_TOKENS // kv.chunk, 1) * kv.chunk
    behind = max(args.tokens - args.cache_size, 0)
    fk.prefill(model, params, tokens[:, : args.cache_size + min(behind, block + behind % block)])
    begin = time.perf_counter()
    state = fk.prefill(model, params, tokens, block_len=BLOCK_TOKENS, on_progress=note)[1]
    about = environment([f"scripts/{Path(__file__).name}", *sys.argv[1:]])
    about |= {"model": args.model, "dtype": args.dtype}
    sizes = {"cache_size": args.cache_size, "cache_bytes": state.nbytes}
    return about | sizes | {"block_tokens": block, "blocks": blocks}


def drawn(result: dict[str, Any]) -> bytes:
    """Milliseconds of each whole block, and memory, against the tokens read."""
    blocks, label = result["blocks"], f"FreqKV, {result['cache_size']:,} slots"
    whole = [
        (after["tokens"], 1e3 * (after["seconds"] - before["seconds"]))
        for before, after in itertools.pairwise(blocks)
        if after["tokens"] - before["tokens"] == result["block_tokens"]
    ]
    held = [(b["tokens"], b["held_bytes"] / GIB) for b in blocks if b["held_bytes"] is not None]
    figure = new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*whole, strict=True), color=COLOURS[0], label=label)
    left.set_ylabel(f"ms for {result['block_tokens']:,} tokens")
    if held:
        per_token = result["cache_bytes"] / result["cache_size"] / GIB
        start = held[0][1] - result["cache_bytes"] / GIB
        right.plot(*zip(*held, strict=True), color=COLOURS[0], label=label)
        full = [(n, start + per_token * n) for n, _ in held]
        colour, line, _ = FULL
        right.plot(
            *zip(*full, strict=True), color=colour, linestyle=line, label="full cache, reckoned"
        )
    right.set_ylabel("GiB held: weights and cache")
    for axes in (left, right):
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
        axes.set_xlim(0, blocks[-1]["tokens"])
        axes.set_xlabel("tokens read")
        ticks = [blocks[-1]["tokens"] * quarter // 4 for quarter in range(5)]
        axes.set_xticks(ticks, [length_text(tick) for tick in ticks])
        axes.legend(loc="upper left", fontsize=8, frameon=False)
        tidy(axes)
    figure.suptitle(f"{result['model']} on {result['device']['kind']}", fontsize=10)
    return png(figure)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Perplexity with another policy in each third of the layers: bands by layer, slots by layer.

    python scripts/policies_by_layer.py RESULT.json MODEL TOKENS.bin [--cache-size 512]

The layers of a model share one policy, since they share the count of filled slots. The parallel
form of a whole text needs no such count, so here every third of the layers has a `novelty` of its
own. All settings hold as many slots over all layers together. What is already in RESULT is not
measured again; at the end stands a table of differences to `equal`, paired by window.
"""

import argparse
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import freqkv_jax as fk
from freqkv_jax.evals.result import environment
from freqkv_jax.files import write_text
from freqkv_jax.model.llama import Block

# Slots as a share of the cache size, and bands, of the lower, middle and upper third.
SETTINGS = {
    "equal": ((1, 4), (1, 4), (1, 4)),
    "bands 1, 4, 16": ((1, 1), (1, 4), (1, 16)),
    "bands 16, 4, 1": ((1, 16), (1, 4), (1, 1)),
    "slots 3/2, 1, 1/2": ((1.5, 4), (1, 4), (0.5, 4)),
    "slots 1/2, 1, 3/2": ((0.5, 4), (1, 4), (1.5, 4)),
    "slots 3/4, 3/2, 3/4": ((0.75, 4), (1.5, 4), (0.75, 4)),
    "slots 5/4, 1/2, 5/4": ((1.25, 4), (0.5, 4), (1.25, 4)),
}


def main() -> None:
    """Measures what is missing, writes after each setting, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path, help="token ids, uint16 (freqkv tokenize)")
    parser.add_argument("--cache-size", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    args = parser.parse_args()
    asked = {
        name: getattr(args, name) for name in ("cache_size", "windows", "seq_len", "dtype")
    } | {"model": Path(args.model).name}
    result: dict[str, Any] = {"losses": {}}
    if args.result.exists():
        result = json.loads(args.result.read_text(encoding="utf-8"))
        if result["asked"] != asked:
            parser.error(f"{args.result} was made with {result['asked']}; name another file")
    result |= environment([f"scripts/{Path(__file__).name}", *sys.argv[1:]]) | {"asked": asked}
    todo = [name for name in args.settings if name not in result["losses"]]
    if todo:
        model, params = fk.load_pretrained(args.model, dtype=args.dtype)
        ids = np.fromfile(args.tokens, np.uint16)
        starts = np.linspace(0, len(ids) - args.seq_len, args.windows).astype(int)
        texts = np.stack([ids[s : s + args.seq_len] for s in starts]).astype(np.int32)
        for name in todo:
            reader = Reader(model, params, policies(name, args.cache_size, model.config.num_layers))
            means = [reader.losses(text[None])[args.cache_size :].mean() for text in texts]
            result["losses"][name] = [float(mean) for mean in means]
            write_text(args.result, json.dumps(result, indent=1))
            print(f"{name}: {math.exp(np.mean(means)):.3f}", flush=True)
    print(table(result["losses"]))


def policies(name: str, cache_size: int, num_layers: int) -> list[fk.SpectralNoveltyConfig]:
    """The policy of each layer."""
    made = [
        fk.SpectralNoveltyConfig(round(share * cache_size), bands=bands)
        for share, bands in SETTINGS[name]
    ]
    return [made[3 * layer // num_layers] for layer in range(num_layers)]


class Reader:
    """A model in its parallel form, each layer with its own policy; programs are shared by layers
    of one policy."""

    def __init__(self, model: fk.Llama, params: Any, kvs: list[fk.SpectralNoveltyConfig]) -> None:
        self.model, self.params, self.kvs = model, params, kvs

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of each token but the first, [T - 1]."""
        model, length = self.model, tokens.shape[1]
        x = _embedded(model, self.params, tokens)
        for index, kv in enumerate(self.kvs):
            x = _layer(model.clone(kv=kv), self.params[f"layers_{index}"], x, length)
        return np.asarray(_losses(model, self.params, x, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _embedded(model: fk.Llama, params: Any, tokens: Any) -> jax.Array:
    return model.apply({"params": params}, tokens, method="_embed")  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _layer(model: fk.Llama, params: Any, x: jax.Array, length: int) -> jax.Array:
    block = Block(model.config, model.kv, model.dtype, model.attention)
    maps = {name: jnp.asarray(array) for name, array in model.kv.constants().items()}
    return block.apply({"params": params}, x, model.rope, maps, length)  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnums=0)
def _losses(model: fk.Llama, params: Any, x: jax.Array, tokens: Any) -> jax.Array:
    def logits(module: fk.Llama, x: jax.Array) -> jax.Array:
        return module.logits(module.norm(x))

    scores = model.apply({"params": params}, x[0, :-1], method=logits)
    log_probs = jax.nn.log_softmax(jnp.asarray(scores), axis=-1)
    return -jnp.take_along_axis(log_probs, tokens[0, 1:, None], axis=-1)[:, 0]


def table(losses: dict[str, list[float]]) -> str:
    """Perplexity behind the first cache's length, and by how much it is above `equal`, in percent,
    with the standard error over windows."""
    lines = ["| setting | perplexity | against equal, % |", "|---|---|---|"]
    for name, found in losses.items():
        line = f"| {name} | {math.exp(np.mean(found)):.3f} |"
        if "equal" in losses and name != "equal":
            apart = np.array(found) - np.array(losses["equal"])
            error = apart.std(ddof=1) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
            # Of perplexities, exp(loss): so is an error of the loss, to first order.
            ratio = math.exp(apart.mean())
            line += f" {100 * (ratio - 1):+.2f} ± {100 * ratio * error:.2f} |"
        else:
            line += " - |"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()

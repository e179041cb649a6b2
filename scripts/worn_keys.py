"""What keys lose that are turned to a new slot, and rounded to bfloat16, in every round.

    python scripts/worn_keys.py worn.json MODEL data/test/00000.bin

All numbers are float32. Of two runs of each chunk one rounds what rotary embedding has turned to
the eight significant bits of bfloat16; nothing else differs between them. Losses are means over the
tokens behind the cache. Takes six minutes of two cores with SmolLM2-135M.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import freqkv_jax as fk
from freqkv_jax.files import write_text
from freqkv_jax.rope import Rope

SIZE, LENGTH, CHUNKS = 1024, 2560, (16, 8, 4, 2, 1)


class RoundedRope(Rope):
    """What it has turned has the eight significant bits of bfloat16."""

    @staticmethod
    def rotate(x: jax.Array, angles: jax.Array, inverse: bool = False) -> jax.Array:
        turned = Rope.rotate(x, angles, inverse)
        return jax.lax.reduce_precision(turned, exponent_bits=8, mantissa_bits=7)


class RoundedLlama(fk.Llama):
    """A Llama with rounded keys."""

    @property
    def rope(self) -> Rope:
        return RoundedRope(self.config.rope, self.config.head_dim)


def loss(model: fk.Llama, params: Any, ids: np.ndarray) -> float:
    """Mean loss of the tokens behind the cache."""
    scores = fk.score(model, params, ids[None], block_len=256)
    return -float(scores[0, model.kv.capacity - 1 :].mean())


def main(out: str, model: str, data: str) -> None:
    """Measures each chunk and writes what is there so far."""
    ids = np.fromfile(data, np.uint16)[:LENGTH].astype(np.int32)
    rows = []
    for chunk in CHUNKS:
        kv = fk.SpectralNoveltyConfig(SIZE, recent_size=SIZE // 4, chunk=chunk)
        llama, params = fk.load_pretrained(model, kv=kv, dtype="float32")
        exact = loss(llama, params, ids)
        worn = loss(RoundedLlama(llama.config, kv), params, ids)
        rows.append({"chunk": chunk, "rounds": SIZE // chunk, "loss": exact, "loss_rounded": worn})
        print(f"{chunk} a round: {exact:.4f}, keys rounded {worn:.4f}", flush=True)
        result = {"cache_size": SIZE, "tokens": LENGTH, "data": data, "rows": rows}
        result |= {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
        write_text(Path(out), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Perplexity of long text, window by window, as LongLoRA and the FreqKV paper measure it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from freqkv_jax.evals.data import (
    document_windows,
    evenly,
    stream_of,
    window_starts,
)
from freqkv_jax.evals.task import Engine, Item, Record

PROTOCOL = "longlora-ppl-v1"
DOCUMENT_PROTOCOL = "freqkv-document-ppl-v1"
LITERAL_E = 2.71828  # as LongLoRA's evaluator writes it
LAST = 1024


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of long text, in windows of --seq-len tokens that start every --stride tokens and
    are scored each from an empty cache.

    --data is a .bin file of token ids (uint16 or uint32, no header; the model then needs no
    tokenizer), a UTF-8 text, or a folder of texts. As LongLoRA and the FreqKV paper measure it,
    windows run over the borders of documents and the last one is dropped; --documents keeps each
    window within its document and adds a loss for each document.
    """

    data: str = field(metadata={"help": ".bin token ids, a text, or a folder of texts"})
    token_dtype: str | None = field(
        default=None, metadata={"help": "of a .bin file", "choices": ("uint16", "uint32")}
    )
    seq_len: int = field(default=8192, metadata={"help": "tokens of a window"})
    stride: int = field(default=256, metadata={"help": "from window to window"})
    max_windows: int | None = field(
        default=None, metadata={"help": "so many, evenly spaced (default: all)"}
    )
    documents: bool = field(default=False, metadata={"help": "windows within documents only"})
    add_bos: bool = field(default=False, metadata={"help": "a begin token before each text"})
    base_literal: bool = field(
        default=False, metadata={"help": "2.71828 ** loss, as LongLoRA's evaluator has it, for exp"}
    )
    position_bucket: int | None = field(
        default=None,
        metadata={"help": "tokens of a position range (default: 1024, then doubling ranges)"},
    )

    name: ClassVar[str] = "perplexity"

    @property
    def protocol(self) -> str:
        """Which windows count."""
        return DOCUMENT_PROTOCOL if self.documents else PROTOCOL

    def __post_init__(self) -> None:
        for name, least in (("max_windows", 1), ("position_bucket", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least {least}, got {value}")

    def items(self, engine: Engine) -> list[Item]:
        """The windows; ValueError for data or sizes that leave none."""
        return [
            Item(key=f"window/{number}", length=length)
            for number, (_, _, length) in enumerate(self._windows(engine))
        ]

    def _windows(self, engine: Engine) -> list[tuple[int | None, int, int]]:
        held = self.__dict__
        if "windows" not in held:
            held["windows"] = self._find_windows(engine)
        return held["windows"]

    def _find_windows(self, engine: Engine) -> list[tuple[int | None, int, int]]:
        """(document, start, length) of each window."""
        stream = stream_of(self, engine)
        if not self.documents:
            starts = window_starts(len(stream.tokens), self.seq_len, self.stride, self.max_windows)
            return [(None, start, self.seq_len) for start in starts]
        if stream.offsets is None:
            raise ValueError(
                f"--documents: where documents begin in {self.data} is not known; put a .json file"
                ' beside it with {"offsets": [0, ..., number of tokens]}, or give texts'
            )
        windows = document_windows(stream.offsets, self.seq_len, self.stride)
        if not windows:
            raise ValueError(f"--data {self.data} holds no document of two tokens or more")
        return [*evenly(windows, self.max_windows)]

    def describe(self, engine: Engine) -> dict[str, Any]:
        """The text."""
        return stream_of(self, engine).describe()

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """Losses of windows: the mean of a window's cross-entropies (nats), and by position."""
        tokens, windows = stream_of(self, engine).tokens, self._windows(engine)
        chosen = [windows[int(item.key.rpartition("/")[2])] for item in batch]
        texts = [tokens[start : start + length].tolist() for _, start, length in chosen]
        scored = engine.log_probs([text[:1] for text in texts], [text[1:] for text in texts])
        return [
            self._record(engine, window, -logp, best)
            for window, (logp, best) in zip(chosen, scored, strict=True)
        ]

    def _record(
        self, engine: Engine, window: tuple[int | None, int, int], losses: np.ndarray, best: Any
    ) -> Record:
        document, start, _ = window
        loss = float(losses.mean())
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss}: the weights hold values that are not numbers, or overflow in"
                f" {engine.model.dtype}; try --dtype float32"
            )
        record = {
            "start": start,
            "loss": loss,
            "last_1k_loss": float(losses[-LAST:].mean()),
            "accuracy": float(best.mean()),
            "losses_by_position": [
                {"from": low, "to": high, "loss": float(losses[low - 1 : high - 1].mean())}
                for low, high in position_ranges(len(losses), self.position_bucket)
            ],
        }
        return record if document is None else record | {"document": document}

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """`mean_loss` over windows with its perplexity, and the variants of it."""
        losses = [record["loss"] for record in records]
        counts = [record["length"] - 1 for record in records]
        mean_loss = math.fsum(losses) / len(losses)
        weighted = float(np.average(losses, weights=counts))
        last = math.fsum(record["last_1k_loss"] for record in records) / len(records)
        summary = {
            "mean_loss": mean_loss,
            "perplexity": self._perplexity(mean_loss),
            "standard_error": standard_error(losses),
            "window_losses": losses,
            "window_starts": [record["start"] for record in records],
            "num_windows": len(losses),
            "losses_by_position": _mean_by_position(records),
            "last_1k_loss": last,
            "last_1k_perplexity": self._perplexity(last),
            "token_weighted_loss": weighted,
            "token_weighted_perplexity": self._perplexity(weighted),
            "accuracy": float(np.average([r["accuracy"] for r in records], weights=counts)),
        }
        if self.documents:
            return summary | self._by_document(engine, records)
        # One number: all windows go through the same rounds.
        return summary | {"num_compressions": engine.model.kv.num_compressions(self.seq_len)}

    def _perplexity(self, loss: float) -> float:
        return LITERAL_E**loss if self.base_literal else math.exp(loss)

    def _by_document(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        stream = stream_of(self, engine)
        offsets = stream.offsets
        assert offsets is not None
        rows = []
        for number in dict.fromkeys(record["document"] for record in records):
            # The windows of one document are of one length.
            own = [record["loss"] for record in records if record["document"] == number]
            loss = math.fsum(own) / len(own)
            rows.append(
                {
                    "document": number,
                    "name": stream.names[number] if stream.names else str(number),
                    "num_tokens": offsets[number + 1] - offsets[number],
                    "num_windows": len(own),
                    "loss": loss,
                    "perplexity": self._perplexity(loss),
                }
            )
        losses = [row["loss"] for row in rows]
        mean = math.fsum(losses) / len(losses)
        return {
            "document_losses": rows,
            "document_mean_loss": mean,
            "document_mean_perplexity": self._perplexity(mean),
            "document_standard_error": standard_error(losses),
        }


def standard_error(losses: Sequence[float]) -> float | None:
    """Of the mean; None for a single loss."""
    # Windows overlap where stride < seq_len, so this understates the error of a mean over texts.
    if len(losses) < 2:
        return None
    return float(np.std(losses, ddof=1) / math.sqrt(len(losses)))


def position_ranges(count: int, bucket: int | None = None) -> list[tuple[int, int]]:
    """Ranges [from, to) of the predictions made after 1, 2, ..., `count` tokens.

    Shows what compression costs where it happens: half of an 8K window never saw a full cache of
    4096. Ranges double behind 1024 tokens; with `bucket` all are so long.
    """
    edges = [1]
    while edges[-1] <= count:
        wide = max(1024, 2 * edges[-1]) if bucket is None else edges[-1] // bucket * bucket + bucket
        edges.append(wide)
    return [(low, min(high, count + 1)) for low, high in zip(edges, edges[1:], strict=False)]


def _mean_by_position(records: Sequence[Record]) -> list[dict[str, float]]:
    """The mean over all predictions of each range, from the means of windows."""
    sums: dict[int, list[float]] = {}
    for record in records:
        for part in record["losses_by_position"]:
            held = sums.setdefault(part["from"], [0, 0.0, 0])
            count = part["to"] - part["from"]
            held[0] = max(held[0], part["to"])
            held[1] += part["loss"] * count
            held[2] += count
    return [
        {"from": low, "to": int(high), "loss": total / count}
        for low, (high, total, count) in sorted(sums.items())
    ]

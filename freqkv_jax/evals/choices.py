"""Which entries a policy keeps of a text, how long they last, how far heads and layers agree."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from freqkv_jax.evals.data import stream_of
from freqkv_jax.evals.kept import (
    agreement,
    by_bins,
    fates,
    kept_places,
    left_after_rounds,
    left_by_round,
    rounds_followed,
    survival,
)
from freqkv_jax.evals.spectrum import pack as pack_floats
from freqkv_jax.evals.spectrum import unpack as unpack_floats
from freqkv_jax.evals.task import Engine, Item, Record
from freqkv_jax.kv.choosing import ChoosingPolicy
from freqkv_jax.kv.linear import LinearPolicy

PROTOCOL = "freqkv-choices-v1"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a policy's rounds leave of a text's entries, window by window.

    A policy that chooses is followed as the model reads: each token of each kv head is there or
    not. Of a policy whose round is a linear map, what is left of a token is the sum of the squares
    of its weights in the slots (1: it stands alone in one), alike in all layers and heads. The text
    is read as far as whole chunks reach.
    """

    data: str = field(metadata={"help": ".bin token ids, or text"})
    token_dtype: str | None = field(
        default=None, metadata={"help": "of a .bin file", "choices": ("uint16", "uint32")}
    )
    seq_len: int = field(default=8192, metadata={"help": "tokens of a window at most"})
    num_windows: int = field(
        default=1, metadata={"help": "windows, evenly spaced over the data; their mean counts"}
    )
    bins: int = field(default=128, metadata={"help": "ranges of the text in the pictures"})
    excerpt: int = field(
        default=240, metadata={"help": "tokens in the middle whose fate is shown word by word"}
    )
    places: bool = field(
        default=True,
        metadata={"help": "record the round that drops each token, by layer and head"},
    )

    name: ClassVar[str] = "choices"
    protocol: ClassVar[str] = PROTOCOL

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("num_windows", 1), ("bins", 1), ("excerpt", 0)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least {least}, got {getattr(self, name)}")

    def items(self, engine: Engine) -> list[Item]:
        """The windows; ValueError for data, policy or sizes that do not fit one another."""
        length, stream = self._length(engine), stream_of(self, engine)
        slots = engine.model.kv.capacity
        if slots is not None and self.bins > slots:
            raise ValueError(f"--bins {self.bins} is more than the cache's {slots}; lower it")
        last = len(stream.tokens) - length
        if last < 0:
            raise ValueError(
                f"the data holds {len(stream.tokens):,} tokens, fewer than the {length:,} that are"
                " read: lower --seq-len or give a longer file"
            )
        starts = np.unique(np.linspace(0, last, self.num_windows).round().astype(int))
        return [Item(key=f"choices/{start}", length=length) for start in starts.tolist()]

    def _length(self, engine: Engine) -> int:
        kv = engine.model.kv
        rounds = rounds_followed(kv, self.seq_len)
        assert kv.capacity is not None
        return kv.capacity + rounds * kv.chunk

    def describe(self, engine: Engine) -> dict[str, Any]:
        """The text."""
        return stream_of(self, engine).describe()

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """A record a window: what is left by place, round and layer, and how far heads agree."""
        return [self._record(engine, int(item.key.split("/")[1])) for item in batch]

    def _record(self, engine: Engine, start: int) -> Record:
        kv, rounds = engine.model.kv, rounds_followed(engine.model.kv, self.seq_len)
        record: Record = {"start": start}
        arrays: dict[str, Any] = {}
        if isinstance(kv, LinearPolicy):
            left = left_by_round(kv, rounds)
            arrays["survival"] = left_after_rounds(kv, left)[None]
            arrays["left_by_layer"] = by_bins(left[-1:], self.bins)
            last = left[-1]
        else:
            assert isinstance(kv, ChoosingPolicy)
            window = stream_of(self, engine).tokens[start : start + self._length(engine)]
            held = kept_places(engine.model, engine.params, np.asarray(window, np.int32))
            found = fates(kv, held, rounds)
            present = (found.present(number) for number in range(1, rounds + 1))
            left = np.stack([there.mean(axis=(0, 1)) for there in present])
            end = found.present(rounds)
            last = end.mean(axis=(0, 1))
            arrays["survival"] = survival(found)
            arrays["left_by_layer"] = by_bins(end.mean(axis=1), self.bins)
            arrays |= agreement(found)._asdict()
            if self.places:
                record["lost_packed"] = pack(found.lost)
        arrays["left_by_round"] = by_bins(left, self.bins)
        record["arrays"] = {n: _packed(array) for n, array in arrays.items() if array is not None}
        return record | {"excerpt": self._excerpt(engine, start, last)}

    def _excerpt(self, engine: Engine, start: int, left: np.ndarray) -> dict[str, Any] | None:
        """The middle of what was read, token by token; None without a tokenizer."""
        length = min(self.excerpt, len(left))
        try:
            tokenizer = engine.tokenizer
        except ValueError:
            return None
        first = (len(left) - length) // 2
        ids = stream_of(self, engine).tokens[start + first : start + first + length]
        return {
            "from": first,
            "texts": [tokenizer.decode([int(token)]) for token in ids],
            "left": _rounded(left[first : first + length]),
        }

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """Means over the windows, and the sizes that places and rounds refer to."""
        kv, rounds = engine.model.kv, rounds_followed(engine.model.kv, self.seq_len)
        about: dict[str, Any] = {
            "chooses": isinstance(kv, ChoosingPolicy),
            "rounds": rounds,
            "chunk": kv.chunk,
            "num_read": self._length(engine) - kv.chunk,  # before the last round
        }
        if not records:
            return about
        means = {
            name: _rounded(np.mean([_unpacked(r["arrays"][name]) for r in records], axis=0))
            for name in records[0]["arrays"]
        }
        curve = np.mean(means["survival"], axis=0)
        rows = [[r, r * kv.chunk, f"{curve[r]:.1%}"] for r in range(rounds)]
        agree = {kind: _agreement(means, kind) for kind in ("heads", "layers", "neighbours")}
        return about | means | {
            "agreement": agree | {"chance": means.get("chance")},
            "table": {"columns": ["rounds gone through", "tokens since", "left"], "rows": rows},
        }  # fmt: skip


def _agreement(means: dict[str, Any], kind: str) -> float | None:
    """One number: of heads of a layer, of all pairs of layers, or of neighbouring layers."""
    if kind == "heads":
        found = means.get("heads")
        return None if found is None else _figures(np.mean(found))
    matrix = means.get("layers")
    if matrix is None or len(matrix) < 2:
        return None
    matrix = np.array(matrix)
    pairs = ~np.eye(len(matrix), dtype=bool) if kind == "layers" else np.eye(len(matrix), k=1) > 0
    return _figures(matrix[pairs].mean())


def pack(lost: np.ndarray) -> str:
    """`Fates.lost` [L, K, T] as text: uint16, little-endian, zlib, base64."""
    assert lost.max(initial=0) < 1 << 16
    return base64.b64encode(zlib.compress(lost.astype("<u2").tobytes(), 9)).decode()


def unpack(text: str, num_layers: int, num_kv_heads: int) -> np.ndarray:
    """The inverse of `pack`."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2")
    return raw.reshape(num_layers, num_kv_heads, -1).astype(np.int32)


def _packed(array: Any) -> dict[str, Any]:
    return {"shape": list(np.shape(array)), "packed": pack_floats(np.asarray(array))}


def _unpacked(array: dict[str, Any]) -> np.ndarray:
    return unpack_floats(array["packed"], array["shape"])


def _figures(value: float) -> float:
    return float(f"{float(value):.4g}")


def _rounded(array: Any) -> Any:
    """Nested lists, four figures a number."""
    if np.ndim(array) == 0:
        return _figures(array)
    return [_rounded(part) for part in array]

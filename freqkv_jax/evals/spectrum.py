"""Where keys and values have their energy over frequency, and what rounds leave of an entry."""

import base64
import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from freqkv_jax import spectral
from freqkv_jax.evals.data import stream_of
from freqkv_jax.evals.task import Engine, Item, Record
from freqkv_jax.kv.linear import LinearPolicy
from freqkv_jax.kv.policy import KVPolicy
from freqkv_jax.model.llama import Llama
from freqkv_jax.reading import Runner

PROTOCOL = "freqkv-spectrum-v1"
KINDS = ("key", "key_rotated", "value")
RATIOS = (0.0625, 0.125, 0.25, 0.5, 0.75)
SINK = 4  # left out where the policy has no sinks of its own
ROUNDS = 8
PROBES = 128  # entries of a chunk whose fate is followed


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Energy of keys (before and after rotary) and values over frequency, a window an item.

    Keys and values are those of the model as it reads with its policy: use `--policy full` to see
    the plain model's. The policy's sinks are left out (4 tokens where it has none).
    """

    data: str = field(metadata={"help": ".bin token ids, or text"})
    token_dtype: str | None = field(
        default=None, metadata={"help": "of a .bin file", "choices": ("uint16", "uint32")}
    )
    seq_len: int = field(default=2048, metadata={"help": "tokens T of a window"})
    num_windows: int = field(
        default=1, metadata={"help": "windows, evenly spaced over the data; their mean counts"}
    )
    bins: int | None = field(
        default=None, metadata={"help": "sum the frequencies into so many bins (default: each one)"}
    )

    name: ClassVar[str] = "spectrum"
    protocol: ClassVar[str] = PROTOCOL

    def __post_init__(self) -> None:
        for name in ("seq_len", "num_windows", "bins"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")

    def items(self, engine: Engine) -> list[Item]:
        """The windows; ValueError for data, windows or bins that do not fit one another."""
        stream, sink = stream_of(self, engine), _sink_size(engine.model.kv)
        num_frequencies = self.seq_len - sink
        if num_frequencies < 2:
            raise ValueError(
                f"--seq-len {self.seq_len} leaves {max(num_frequencies, 0)} tokens behind {sink}"
                " sinks; a spectrum needs two at least"
            )
        if self.bins is not None and self.bins > num_frequencies:
            raise ValueError(
                f"--bins {self.bins} is more than the {num_frequencies} frequencies of --seq-len"
                f" {self.seq_len} without {sink} sinks; lower it"
            )
        last = len(stream.tokens) - self.seq_len
        if last < 0:
            raise ValueError(
                f"the data holds {len(stream.tokens):,} tokens, fewer than --seq-len"
                f" {self.seq_len:,}: lower it or give a longer file"
            )
        starts = np.unique(np.linspace(0, last, self.num_windows).round().astype(int))
        return [Item(key=f"spectrum/{start}", length=self.seq_len) for start in starts.tolist()]

    def describe(self, engine: Engine) -> dict[str, Any]:
        """The text."""
        return stream_of(self, engine).describe()

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """A record a window: its energies, packed."""
        tokens, records = stream_of(self, engine).tokens, []
        for item in batch:
            start = int(item.key.split("/")[1])
            window = np.asarray(tokens[start : start + self.seq_len], np.int32)
            energy = energies(engine.model, engine.params, window)
            if not np.isfinite(energy).all():
                raise ValueError(
                    "keys or values hold values that are not numbers, or overflow in"
                    f" {engine.model.dtype}; try --dtype float32"
                )
            records.append({"start": start, "energy_packed": pack(binned(energy, self.bins))})
        return records

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """`energy` [layers, kinds, kv heads, bins], energy kept by ratio, and `left_after`."""
        kv, config = engine.model.kv, engine.model.config
        sink = _sink_size(kv)
        about = {
            "kinds": list(KINDS),
            "sink_size": sink,
            "num_frequencies": self.seq_len - sink,
            "left_after": left_after(kv),
        }
        if not records:
            return about
        bins = self.bins or self.seq_len - sink
        shape = (config.num_layers, len(KINDS), config.num_kv_heads, bins)
        energy = np.mean([unpack(record["energy_packed"], shape) for record in records], axis=0)
        kept = {str(ratio): kept_energy(energy, ratio) for ratio in RATIOS}
        means = {ratio: values.mean(axis=(0, 2)) for ratio, values in kept.items()}
        return about | {
            "energy": _rounded(energy),
            "kept_by_ratio": {ratio: _rounded(values) for ratio, values in kept.items()},
            "table": {
                "columns": ["energy in the lowest", *(kind.replace("_", ", ") for kind in KINDS)],
                "rows": [
                    [f"{float(ratio):.4g} of the frequencies", *(f"{x:.1%}" for x in mean)]
                    for ratio, mean in means.items()
                ],
            },
        }


def energies(model: Llama, params: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Energy of every layer's keys and values over frequency.

    Args:
      tokens: int32 [T]; the policy's first tokens (S, 4 where it has none) are left out.

    Returns:
      float32 [L, 3, K, T-S]: squares of the orthonormal DCT-II over tokens S..T-1, averaged over
      the channels of a head and divided by their sum over frequencies. Kinds as KINDS.
    """
    runner = Runner(model, params, 1)
    with runner.context():
        return np.asarray(_energies(model, runner.variables, tokens[None]))


@functools.partial(jax.jit, static_argnames="model")
def _energies(model: Llama, variables: Any, tokens: Int[Array, "1 T"]) -> Float[Array, "L 3 K F"]:
    def is_projection(module: Any, method: str) -> bool:
        path = module.path
        return method == "__call__" and path[-2:-1] == ("attention",) and path[-1] in ("k", "v")

    _, sown = model.apply(
        variables,
        tokens,
        method="hidden",
        capture_intermediates=is_projection,
        mutable=["intermediates"],
    )
    kept: Any = sown
    sink = _sink_size(model.kv)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    rows = []
    for layer in range(model.config.num_layers):
        found = kept["intermediates"][f"layers_{layer}"]["attention"]
        k, v = (_heads(found[name]["__call__"][0][0], model) for name in ("k", "v"))
        kinds = (k, model.rope.rotate_tokens(k, positions), v)
        rows.append(jnp.stack([_spectrum(x[sink:]) for x in kinds]))
    return jnp.stack(rows)


def _heads(x: Array, model: Llama) -> Array:
    return x.reshape(x.shape[0], model.config.num_kv_heads, model.config.head_dim)


def _spectrum(x: Float[Array, "F K D"]) -> Float[Array, "K F"]:
    wide = spectral.dct(jnp.moveaxis(x.astype(jnp.float32), 0, -1))
    energy = jnp.mean(wide * wide, axis=1)
    return energy / jnp.sum(energy, axis=-1, keepdims=True)


def binned(energy: np.ndarray, bins: int | None) -> np.ndarray:
    """Sums over `bins` ranges of near-equal width along the last axis; None leaves it as it is."""
    if bins is None:
        return energy
    edges = np.linspace(0, energy.shape[-1], bins + 1).round().astype(int)
    return np.add.reduceat(energy, edges[:-1], axis=-1)


def kept_energy(energy: np.ndarray, ratio: float) -> np.ndarray:
    """Share of the energy [..., bins] in the lowest `ratio` of the frequencies; in a bin that is
    cut, the part of it."""
    bins = energy.shape[-1]
    cut = ratio * bins
    whole = int(cut)
    kept = energy[..., :whole].sum(axis=-1)
    return kept + (cut - whole) * energy[..., whole] if whole < bins else kept


def left_after(kv: KVPolicy) -> dict[str, list[float]] | None:
    """What rounds leave of an entry that stood among the newest, mean over PROBES of them.

    A policy whose round is a linear map writes an entry into slots with weights, which each round
    maps again. For 0, 1, ... ROUNDS rounds:

    - energy: sum of the squared weights (1 where the entry stands alone in a slot).
    - largest: the largest weight; a slot in which an entry weighs 1/8 is a mean of about 8.
    - slots: in how many slots it weighs at least half of that.

    None for policies that choose by what the entries hold, or keep all.
    """
    if not isinstance(kv, LinearPolicy):
        return None
    size, prefix = kv.capacity, kv.prefix
    places = np.unique(np.linspace(prefix, size - 1, PROBES).round().astype(int))
    weights = np.zeros((size, places.size), np.float32)
    weights[places, np.arange(places.size)] = 1
    maps = {name: jnp.asarray(array) for name, array in kv.constants().items()}
    shrink = jax.jit(lambda x, maps: kv.shrink(x, 0, maps))
    left: dict[str, list[float]] = {"energy": [], "largest": [], "slots": []}
    for _ in range(ROUNDS + 1):
        size_of = np.abs(weights)
        top = size_of.max(axis=0)
        wide = ((size_of >= top / 2) & (top > 0)).sum(axis=0)
        left["energy"].append(_figures((weights**2).sum(axis=0).mean()))
        left["largest"].append(_figures(top.mean()))
        left["slots"].append(_figures(wide.mean()))
        small = np.asarray(shrink(weights, maps))
        weights = np.zeros_like(weights)
        weights[: len(small)] = small
    return left


def pack(array: np.ndarray) -> str:
    """A float32 array as text, exact and short."""
    raw = np.ascontiguousarray(array, "<f4").tobytes()
    return base64.b64encode(zlib.compress(raw, 6)).decode()


def unpack(text: str, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `pack`, as float64."""
    raw = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(raw, "<f4").reshape(shape).astype(np.float64)


def _sink_size(kv: KVPolicy) -> int:
    return getattr(kv, "sink_size", SINK)


def _figures(value: float) -> float:
    return float(f"{float(value):.6g}")


def _rounded(array: np.ndarray) -> Any:
    """Nested lists, six figures a number."""
    if array.ndim == 1:
        return [_figures(value) for value in array.tolist()]
    return [_rounded(part) for part in array]

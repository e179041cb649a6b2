"""Policies whose round is one linear map: sinks and recents stay, the span is mapped."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.policy import (
    ChunkCaches,
    KVPolicy,
    Maps,
    Memory,
    Slots,
    choose_rows,
    whole_number,
)
from freqkv_jax.rope import Rope

Parts = tuple[Array, ...]  # of keys and of values
UNROLLED = 8  # rounds written out one by one; further ones run in a loop


@dataclass(frozen=True)
class LinearPolicy(KVPolicy):
    """C_next = A [C; X] with A the identity on sinks and recents and `map_span` between.

    Sizes are those of FreqKV (design: span n = N - S - R, keep L = int(n g), chunk Q = n - L).
    A subclass gives `map_span`, and `keep` and `recent` where they differ.
    """

    cache_size: int = 4096
    sink_size: int = 4
    recent_size: int = 0
    retain_ratio: float = 0.5

    def __post_init__(self) -> None:
        for field in ("cache_size", "sink_size", "recent_size"):
            low = 1 if field == "cache_size" else 0
            object.__setattr__(self, field, whole_number(field, getattr(self, field), low))
        if self.sink_size + self.recent_size >= self.cache_size:
            raise ValueError(
                "need sink_size + recent_size < cache_size, got sink_size="
                f"{self.sink_size}, recent_size={self.recent_size}, cache_size={self.cache_size};"
                " raise cache_size or lower the others"
            )
        ratio = self.retain_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise ValueError(
                f"retain_ratio must be in [0, 1), got {ratio!r}; it is the share of the span"
                " that is kept at each compression (1 would free nothing)"
            )
        object.__setattr__(self, "retain_ratio", float(ratio))

    @property
    def span(self) -> int:
        """n = N - S - R: entries that one round maps."""
        return self.cache_size - self.sink_size - self.recent_size

    @property
    def keep(self) -> int:
        """L: entries that the span becomes; truncated as in the authors' code."""
        return int(self.span * self.retain_ratio)

    @property
    def recent(self) -> int:
        """Entries at the end that a round leaves as they are."""
        return self.recent_size

    @property
    def capacity(self) -> int:
        """N."""
        return self.cache_size

    @property
    def prefix(self) -> int:
        """P = S + L + R."""
        return self.sink_size + self.keep + self.recent_size

    def map_span(self, x: Array, axis: int, maps: Maps) -> Array:
        """Entries between sinks and recents to `prefix - sink - recent` ones, in x's dtype."""
        raise TypeError(f"{type(self).__name__} must define map_span")

    def map_parts(self, mapped: Parts, raw: Parts, maps: Maps) -> Parts:
        """`map_span` along axis 0 of spans in two parts: what a round gave and what came since."""
        spans = (jnp.concatenate(pair) for pair in zip(mapped, raw, strict=True))
        return tuple(self.map_span(span, 0, maps) for span in spans)

    def shrink(self, x: Array, axis: int, maps: Maps) -> Array:
        """One round on keys (not rotated) or values: N entries along `axis` become P."""
        size = x.shape[axis]
        sink, span, recent = (
            jax.lax.slice_in_dim(x, start, stop, axis=axis)
            for start, stop in (
                (0, self.sink_size),
                (self.sink_size, size - self.recent),
                (size - self.recent, size),
            )
        )
        return jnp.concatenate([sink, self.map_span(span, axis, maps), recent], axis=axis)

    def make_room(self, memory: Memory, rope: Rope, maps: Maps) -> Memory:
        """Keys rest rotated: turn them back, map, and turn them to their new slots."""
        with jax.named_scope("make_room"):
            k = rope.rotate_slots(memory.k, inverse=True)
            k = rope.rotate_slots(self.shrink(k, 2, maps))
            v = self.shrink(memory.v, 2, maps)
            # Sinks are not written: turned back and forth they would be rounded. Behind the first
            # P slots is what the tokens to come overwrite.
            sink = self.sink_size
            return Slots(
                jax.lax.dynamic_update_slice_in_dim(memory.k, k[:, :, sink:], sink, axis=2),
                jax.lax.dynamic_update_slice_in_dim(memory.v, v[:, :, sink:], sink, axis=2),
            )

    def chunk_caches(
        self,
        memory: Memory,
        k: Array,
        v: Array,
        counts: Array | None,
        rope: Rope,
        maps: Maps,
        seen: Array,
        queries: Array | None = None,
    ) -> ChunkCaches:
        """The recurrence on what the map gives alone, then each cache written in one piece."""
        with jax.named_scope("chunk_caches"):
            batch, chunks, size = k.shape[:3]
            start = self.prefix - self.recent
            k_first = rope.rotate_slots(memory.k, inverse=True)
            firsts = [jnp.swapaxes(x, 1, 2) for x in (k_first, memory.v)]
            streams = [
                [first[:, start:], new.reshape(batch, chunks * size, *new.shape[3:])]
                for first, new in zip(firsts, (k, v), strict=True)
            ]
            first = tuple(_slots_first(x[:, self.sink_size : start]) for x in firsts)
            # Once, and not in each turn of a loop.
            maps = {name: array.astype(k.dtype) for name, array in maps.items()}
            mapped = self._recur(first, streams, chunks, maps)
            # Sinks as they rest: turned back and forth they would be rounded.
            k_all, v_all = (
                self._written(rest[:, :, : self.sink_size], some, stream, turn)
                for rest, some, stream, turn in zip(
                    (memory.k, memory.v),
                    zip(*mapped, strict=True),
                    streams,
                    (rope, None),
                    strict=True,
                )
            )
            end = _memory_after(memory, k_all, v_all, counts, self.chunk)
            return ChunkCaches(k_all, v_all, end)

    def _recur(
        self, mapped: Parts, streams: list[list[Array]], rounds: int, maps: Maps
    ) -> list[Parts]:
        """What each round's map gives of keys and of values, [L, B, K, D].

        Args:
          mapped: of the memory, [L, B, K, D]. streams: the raw entries behind it and then all
            tokens, [B, ., K, D]; round c maps Q of them from c Q on.
        """
        size = self.chunk

        def raw(start: int, length: int) -> Parts:
            return tuple(_slots_first(_window(stream, start, length)) for stream in streams)

        now, out = mapped, []
        for c in range(rounds if rounds <= UNROLLED else 1):
            now = self.map_parts(now, raw(c * size, size), maps)
            out.append(now)
        if len(out) == rounds:
            return out

        def one_round(now: Parts, raw: Parts) -> tuple[Parts, Parts]:
            now = self.map_parts(now, raw, maps)
            return now, now

        rest = [x.reshape(rounds - 1, size, *x.shape[1:]) for x in raw(size, (rounds - 1) * size)]
        _, more = jax.lax.scan(one_round, now, tuple(rest))
        return out + list(zip(*more, strict=True))

    def _written(
        self, sinks: Array, mapped: tuple[Array, ...], stream: list[Array], rope: Rope | None
    ) -> Array:
        """The caches [B, C, N, K, D] of keys (turned to their slots by `rope`) or values.

        A cache is [sinks | entries mapped | entries raw]. The raw ones are a window of the tokens
        and the sinks [B, K, S, D] never change, so that only what is mapped is carried around.
        """
        size, start = self.chunk, self.prefix - self.recent
        slot = jnp.arange(self.capacity, dtype=jnp.int32)
        parts = []
        # One flat list: caches that are joined first and stacked then would be written twice.
        for c, old in enumerate(mapped):
            old = _slots_first(old)
            raw = _window(stream, (c + 1) * size, size + self.recent)
            if rope is not None:
                old = rope.rotate_tokens(old, slot[self.sink_size : start])
                raw = rope.rotate_tokens(raw, slot[start:])
            parts += [jnp.swapaxes(sinks, 1, 2), old, raw]
        flat = jnp.concatenate(parts, axis=1)
        return flat.reshape(flat.shape[0], len(mapped), self.capacity, *flat.shape[2:])


def _slots_first(x: Array) -> Array:
    return jnp.swapaxes(x, 0, 1)


def _window(stream: list[Array], start: int, size: int) -> Array:
    """Entries start .. start + size of arrays [B, ., ...] that follow one another."""
    parts, at = [], 0
    for part in stream:
        low, high = max(start - at, 0), min(start + size - at, part.shape[1])
        if low < high:
            parts.append(part[:, low:high])
        at += part.shape[1]
    return jnp.concatenate(parts, axis=1) if len(parts) != 1 else parts[0]


def _memory_after(
    memory: Slots, k_all: Array, v_all: Array, counts: Array | None, chunk: int
) -> Slots:
    """The cache of the chunk in which each row ends (its slots behind fill mean nothing)."""
    if counts is None:
        k, v = k_all[:, -1], v_all[:, -1]
        return Slots(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    last = jnp.maximum((counts + chunk - 1) // chunk - 1, 0)[:, None, None, None, None]
    k, v = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (k_all, v_all))
    ended = Slots(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    return choose_rows(counts > 0, ended, memory)

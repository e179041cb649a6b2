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

    def map_parts(self, mapped: Array, raw: Array, maps: Maps) -> Array:
        """`map_span` along axis 0 of a span in two parts: what a round gave and what came since."""
        return self.map_span(jnp.concatenate([mapped, raw]), 0, maps)

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
            k_first = jnp.swapaxes(rope.rotate_slots(memory.k, inverse=True), 1, 2)
            k_all = self._caches(memory.k, k_first, k, maps, rope)
            v_first = jnp.swapaxes(memory.v, 1, 2)
            v_all = self._caches(memory.v, v_first, v, maps, None)
            end = _memory_after(memory, k_all, v_all, counts, self.chunk)
            return ChunkCaches(k_all, v_all, end)

    def _caches(
        self, resting: Array, first: Array, tokens: Array, maps: Maps, rope: Rope | None
    ) -> Array:
        """The caches [B, C, N, K, D] of keys (turned to their slots by `rope`) or values.

        A cache is [sinks | entries mapped | entries raw]. The raw ones are a window of the tokens
        and the sinks never change, so that only what is mapped goes from round to round.

        Args:
          resting: [B, K, N, D], of which the sinks are taken: turned back and forth they would be
            rounded. first: the same memory, its keys turned back, [B, N, K, D].
          tokens: [B, C, Q, K, D].
        """
        batch, chunks, size = tokens.shape[:3]
        start = self.prefix - self.recent
        stream = [first[:, start:], tokens.reshape(batch, chunks * size, *tokens.shape[3:])]
        sinks = jnp.swapaxes(resting[:, :, : self.sink_size], 1, 2)
        slot = jnp.arange(self.sink_size, self.capacity, dtype=jnp.int32)
        old_slots, raw_slots = slot[: start - self.sink_size], slot[start - self.sink_size :]

        def pieces(old: Array, raw: Array) -> list[Array]:
            if rope is None:
                return [old, raw]
            return [rope.rotate_tokens(old, old_slots), rope.rotate_tokens(raw, raw_slots)]

        windows = [_window(stream, (c + 1) * size, size + self.recent) for c in range(chunks)]
        mapped = self._recur(first[:, self.sink_size : start], stream, chunks, maps)
        if isinstance(mapped, list):
            # One flat list: caches that are joined first and stacked then would be written twice.
            parts = []
            for old, raw in zip(mapped, windows, strict=True):
                parts += [sinks, *pieces(jnp.swapaxes(old, 0, 1), raw)]
            flat = jnp.concatenate(parts, axis=1)
            return flat.reshape(batch, chunks, self.capacity, *flat.shape[2:])
        sinks = jnp.broadcast_to(sinks[:, None], (batch, chunks, *sinks.shape[1:]))
        raw = jnp.stack(windows, axis=1) if self.recent else tokens
        return jnp.concatenate([sinks, *pieces(jnp.moveaxis(mapped, 2, 0), raw)], axis=2)

    def _recur(
        self, mapped: Array, stream: list[Array], rounds: int, maps: Maps
    ) -> list[Array] | Array:
        """What each round's map gives, [L, B, K, D]: a list of few, an array of many.

        Args:
          mapped: [B, L, K, D] of the memory. stream: the raw entries behind them and then all
            tokens, [B, ., K, D]; round c maps Q of them from c Q on.
        """
        size = self.chunk
        now, out = jnp.swapaxes(mapped, 0, 1), []
        for c in range(rounds if rounds <= UNROLLED else 1):
            raw = jnp.swapaxes(_window(stream, c * size, size), 0, 1)
            now = self.map_parts(now, raw, maps)
            out.append(now)
        if len(out) == rounds:
            return out
        rest = _window(stream, size, (rounds - 1) * size)
        rest = rest.reshape(rest.shape[0], rounds - 1, size, *rest.shape[2:])

        def one_round(now: Array, raw: Array) -> tuple[Array, Array]:
            now = self.map_parts(now, raw, maps)
            return now, now

        _, more = jax.lax.scan(one_round, now, jnp.moveaxis(rest, 0, 2))
        return jnp.concatenate([out[0][None], more])


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

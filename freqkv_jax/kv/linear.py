"""Policies whose round is one linear map: sinks and recents stay, the span is mapped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.folding import linear_forms
from freqkv_jax.kv.policy import (
    ChunkCaches,
    KVPolicy,
    Maps,
    Memory,
    Parts,
    Slots,
    memory_after,
    real_number,
    whole_number,
)
from freqkv_jax.rope import Rope

UNROLLED = 16  # rounds written out one by one; further ones run in a loop


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
        ratio = real_number(
            "retain_ratio",
            self.retain_ratio,
            lambda ratio: 0 <= ratio < 1,
            "in [0, 1)",
            "the share of the span that is kept at each compression (1 would free nothing)",
        )
        object.__setattr__(self, "retain_ratio", ratio)

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

    def first_round(self, mapped: Parts, raw: Parts, maps: Maps) -> Any:
        """`map_span` along axis 0 of spans in two parts: what a round gave and what came since.

        The result is what the next round goes on from, in whatever form suits the policy.
        """
        k, v = (jnp.concatenate(pair) for pair in zip(mapped, raw, strict=True))
        return self.map_span(k, 0, maps), self.map_span(v, 0, maps)

    def next_round(self, now: Any, raw: Parts, maps: Maps) -> Any:
        """`first_round` on what a round gave."""
        return self.first_round(now, raw, maps)

    def turned(self, now: Any, rope: Rope, first: int) -> Parts:
        """What a round gave as entries [L, B, K, D]: keys, turned to the slots from `first` on,
        and values."""
        k, v = now
        slots = first + jnp.arange(k.shape[0], dtype=jnp.int32)
        return rope.rotate(k, rope.angles(slots)[:, None, None, :]), v

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
        """The recurrence on what the map gives alone; sinks and recents are put around it."""
        with jax.named_scope("chunk_caches"):
            k_all, v_all = self.rounds(memory, k, v, rope, maps)
            slot = jnp.arange(self.prefix, self.capacity, dtype=jnp.int32)
            tokens = (rope.rotate_tokens(k, slot), v)
            end = memory_after(memory, (k_all, v_all), tokens, counts)
            return ChunkCaches(k_all, v_all, end)

    def caches_and_next(
        self,
        memory: Memory,
        k: Array,
        v: Array,
        rope: Rope,
        maps: Maps,
        seen: Array,
        queries: Array | None = None,
    ) -> tuple[Parts | None, Parts]:
        """One round more of the same recurrence."""
        if not k.shape[1]:
            return super().caches_and_next(memory, k, v, rope, maps, seen, queries)
        with jax.named_scope("chunk_caches"):
            k_all, v_all, *ahead = self.rounds(memory, k, v, rope, maps, more=True)
            return (k_all, v_all), (ahead[0], ahead[1])

    def rounds(
        self, memory: Memory, k: Array, v: Array, rope: Rope, maps: Maps, more: bool = False
    ) -> tuple[Array, ...]:
        """Keys and values of the caches of C chunks, [B, C, P, K, D] each; if `more`, also of the
        cache behind them, [B, 1, P, K, D]. Other arguments: see `KVPolicy.chunk_caches`."""
        batch, chunks, size = k.shape[:3]
        start = self.prefix - self.recent
        # Once, and not in each turn of a loop. Maps are constants: they have no gradient.
        maps = {n: jax.lax.stop_gradient(x).astype(k.dtype) for n, x in maps.items()}
        k_first = rope.rotate_slots(memory.k, inverse=True)
        firsts = _both(lambda x: jnp.swapaxes(x, 1, 2), (k_first, memory.v))
        # Sinks as they rest: turned back and forth they would be rounded.
        sinks = _both(lambda x: jnp.swapaxes(x[:, :, : self.sink_size], 1, 2), (memory.k, memory.v))
        mapped = _both(lambda x: _swapped(x[:, self.sink_size : start]), firsts)
        flat = _both(lambda x: x.reshape(batch, chunks * size, *x.shape[3:]), (k, v))
        streams = [[first[:, start:], new] for first, new in zip(firsts, flat, strict=True)]

        def raw(start: int, length: int) -> Parts:
            k_some, v_some = (_window(stream, start, length) for stream in streams)
            return _swapped(k_some), _swapped(v_some)

        def behind(now: Any, recents: Parts) -> Parts:
            return self._behind_sinks(now, recents, rope)

        def joined(parts: list[Parts]) -> tuple[Array, ...]:
            return tuple(map(_joined, sinks, zip(*parts, strict=True))) if parts else ()

        recents = [raw((c + 1) * size, self.recent) for c in range(chunks + more)]
        now = self.first_round(mapped, raw(0, size), maps)
        parts, caches = [behind(now, recents[0])], ()
        if chunks > UNROLLED:
            now, caches = self._loop(now, sinks, parts.pop(), raw, recents[1:chunks], behind, maps)
        for c in range(chunks if caches else 1, chunks + more):
            now = self.next_round(now, raw(c * size, size), maps)
            parts.append(behind(now, recents[c]))
        first = 0 if caches else chunks
        return *caches, *joined(parts[:first]), *joined(parts[first:])

    def _loop(
        self,
        now: Any,
        sinks: Parts,
        first: Parts,
        raw: Any,
        recents: list[Parts],
        behind: Any,
        maps: Maps,
    ) -> tuple[Any, Parts]:
        """The rounds behind the first one in a loop, which writes where attention reads: what the
        last one gave, and all caches."""
        rounds, size = len(recents), self.chunk
        wholes = tuple(
            _placed(_with_sinks(sink, part, rounds + 1), part, 0)
            for sink, part in zip(sinks, first, strict=True)
        )

        def one_round(carry: Any, xs: tuple[Array, Parts, Parts]) -> tuple[Any, None]:
            now, wholes = carry
            index, some, recents = xs
            now = self.next_round(now, some, maps)
            parts = zip(wholes, behind(now, recents), strict=True)
            return (now, tuple(_placed(*pair, index) for pair in parts)), None

        rest = tuple(x.reshape(rounds, size, *x.shape[1:]) for x in raw(size, rounds * size))
        index = jnp.arange(1, rounds + 1, dtype=jnp.int32)
        xs = (index, rest, jax.tree.map(lambda *x: jnp.stack(x), *recents))
        return jax.lax.scan(one_round, (now, wholes), xs)[0]

    def _behind_sinks(self, now: Any, recents: Parts, rope: Rope) -> Parts:
        """[entries mapped | entries raw] of keys, turned to their slots, and values,
        [B, P - S, K, D]."""
        k, v = _both(_swapped, self.turned(now, rope, self.sink_size))
        if not self.recent:
            return k, v
        slots = jnp.arange(self.prefix - self.recent, self.prefix, dtype=jnp.int32)
        k_recent, v_recent = _both(_swapped, recents)
        k_recent = rope.rotate_tokens(k_recent, slots)
        return jnp.concatenate([k, k_recent], axis=1), jnp.concatenate([v, v_recent], axis=1)


def _joined(sinks: Array, parts: tuple[Array, ...]) -> Array:
    """[B, C, P, K, D] from sinks [B, S, K, D] and what stands behind them in each chunk."""

    def plain(sinks: Array, *parts: Array) -> Array:
        wide = jnp.broadcast_to(sinks[:, None], (sinks.shape[0], len(parts), *sinks.shape[1:]))
        return jnp.concatenate([wide, jnp.stack(parts, axis=1)], axis=2)

    def cuda(sinks: Array, *parts: Array) -> Array:
        # Each is written by the kernel that makes it; a join would be one of many branches.
        whole = _with_sinks(sinks, parts[0], len(parts))
        for index, part in enumerate(parts):
            whole = _placed(whole, part, index)
        return whole

    return linear_forms(plain, cuda, sinks, *parts)


def _with_sinks(sinks: Array, part: Array, chunks: int) -> Array:
    """[B, C, P, K, D] with sinks, and zeros where `part` and its like will be `_placed`."""
    size = sinks.shape[1] + part.shape[1]
    whole = jnp.zeros((part.shape[0], chunks, size, *part.shape[2:]), part.dtype)
    wide = jnp.broadcast_to(sinks[:, None], (sinks.shape[0], chunks, *sinks.shape[1:]))
    return jax.lax.dynamic_update_slice_in_dim(whole, wide, 0, axis=2)


def _placed(whole: Array, part: Array, index: int | Array) -> Array:
    sink = whole.shape[2] - part.shape[1]
    return jax.lax.dynamic_update_slice(whole, part[:, None], (0, index, sink, 0, 0))


def _both(function: Callable[[Array], Array], parts: Parts) -> Parts:
    return function(parts[0]), function(parts[1])


def _swapped(x: Array) -> Array:
    """Batch and slots trade places."""
    return jnp.swapaxes(x, 0, 1)


def _window(stream: list[Array], start: int, size: int) -> Array:
    """Entries start .. start + size of arrays [B, ., ...] that follow one another."""
    parts, at = [], 0
    for part in stream:
        low, high = max(start - at, 0), min(start + size - at, part.shape[1])
        if low < high:
            parts.append(part[:, low:high])
        at += part.shape[1]
    parts = parts or [stream[0][:, :0]]
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

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
        """The recurrence on keys that are not rotated, then one rotation of all caches."""
        with jax.named_scope("chunk_caches"):
            k_first = jnp.swapaxes(rope.rotate_slots(memory.k, inverse=True), 1, 2)
            slot = jnp.arange(self.capacity, dtype=jnp.int32)
            k_all = rope.rotate_tokens(self._recur(k_first, k, maps), slot)
            # Sinks as they rest: turned back and forth they would be rounded.
            resting = jnp.swapaxes(memory.k, 1, 2)[:, None]
            k_all = jnp.where((slot < self.sink_size)[None, None, :, None, None], resting, k_all)
            v_all = self._recur(jnp.swapaxes(memory.v, 1, 2), v, maps)
            end = _memory_after(memory, k_all, v_all, counts, self.chunk)
            return ChunkCaches(k_all, v_all, end)

    def _recur(self, first: Array, tokens: Array, maps: Maps) -> Array:
        """first [B, N, K, D], tokens [B, C, Q, K, D] to the caches [B, C, N, K, D]."""

        def one_round(cache: Array, new: Array) -> tuple[Array, Array]:
            cache = jnp.concatenate([self.shrink(cache, 1, maps), new], axis=1)
            return cache, cache

        _, caches = jax.lax.scan(one_round, first, jnp.moveaxis(tokens, 1, 0))
        return jnp.moveaxis(caches, 0, 1)


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

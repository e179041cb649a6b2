"""Policies that choose entries: sinks and recents stay, the best of those between stay in order."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.policy import KVPolicy, Maps, Memory, Slots, whole_number
from freqkv_jax.rope import Rope

# Scores are compared on this grid. Equal tokens have equal keys in the first layer, and what
# turning them to different slots and back leaves of that (1e-7 in float32) must not decide.
GRID = 2.0**-14


@dataclass(frozen=True)
class ChoosingPolicy(KVPolicy):
    """Of the m = N - S - R entries between sinks and recents, a round frees Q and keeps the rest.

    Each kv head chooses by itself, from the keys and values as they are stored, so that the
    parallel form (which runs make_room and append in turn) and the streaming form see the same
    numbers. Ties go to the lowest slot. The parallel form holds the caches of all chunks of a
    block at once, N/Q times the keys and values of its tokens in each layer: a small Q is dear
    there.

    Attributes:
      cache_size: N, slots of the cache.
      sink_size: S, first entries, always kept.
      recent_size: R, latest entries, always kept; -1 means half of the cache.
      chunk: Q, entries freed in a round; -1 means an eighth of the cache.

    Raises:
      ValueError: unless N >= 1, S >= 0, R >= 0, S + R < N and 1 <= Q <= N - S - R.
    """

    cache_size: int = 4096
    sink_size: int = 4
    recent_size: int = -1
    chunk: int = -1  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __post_init__(self) -> None:
        size = self._whole("cache_size", 1)
        sink = self._whole("sink_size", 0)
        if self.recent_size == -1:
            object.__setattr__(self, "recent_size", max(min(size // 2, size - sink - 1), 0))
        recent = self._whole("recent_size", 0)
        if sink + recent >= size:
            raise ValueError(
                f"need sink_size + recent_size < cache_size, got sink_size={sink},"
                f" recent_size={recent}, cache_size={size}; raise cache_size or lower the others"
            )
        if self.chunk == -1:
            object.__setattr__(self, "chunk", max(min(size // 8, self.span), 1))
        if self._whole("chunk", 1) > self.span:
            raise ValueError(
                f"chunk must be in [1, {self.span}], got {self.chunk}: a round frees entries from"
                f" the {self.span} that are neither sinks nor recents; lower chunk or recent_size"
            )

    def _whole(self, field: str, low: int) -> int:
        whole = whole_number(field, getattr(self, field), low)
        object.__setattr__(self, field, whole)
        return whole

    @property
    def span(self) -> int:
        """m = N - S - R: entries that a round chooses from."""
        return self.cache_size - self.sink_size - self.recent_size

    @property
    def keep(self) -> int:
        """l = m - Q: entries that it chooses."""
        return self.span - self.chunk

    @property
    def capacity(self) -> int:
        """N."""
        return self.cache_size

    @property
    def prefix(self) -> int:
        """P = N - Q."""
        return self.cache_size - self.chunk

    def choose(self, k: Array, v: Array, maps: Maps) -> Array:
        """Which of the span's entries stay, bool [B, K, m], `keep` of them in every head.

        k (before rotary embedding) and v are float32 [B, K, m, D].
        """
        raise TypeError(f"{type(self).__name__} must define choose")

    def make_room(self, memory: Memory, rope: Rope, maps: Maps) -> Memory:
        """Chooses from the keys turned back, and moves what stays to its new slots."""
        with jax.named_scope("make_room"):
            middle = slice(self.sink_size, self.cache_size - self.recent_size)
            k, v = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in memory)
            k = rope.rotate_slots(k, inverse=True)
            chosen = self.choose(k[:, :, middle], v[:, :, middle], maps)
            return self.moved(memory, chosen, rope)

    def kept_slots(self, chosen: Array) -> Array:
        """The slots behind the sinks that stay, in order: bool [B, K, m] to int [B, K, P - S]."""
        at = jnp.arange(self.span, dtype=jnp.int32)[None, None]
        slots = jnp.sort(jnp.where(chosen, at, self.span), axis=-1)[..., : self.keep]
        recent = jnp.arange(self.cache_size - self.recent_size, self.cache_size, dtype=jnp.int32)
        recent = jnp.broadcast_to(recent[None, None], (*slots.shape[:2], self.recent_size))
        return jnp.concatenate([slots + self.sink_size, recent], axis=-1)

    def moved(self, memory: Slots, chosen: Array, rope: Rope) -> Slots:
        """The memory with what stays behind the sinks, its keys turned to the new slots."""
        old = self.kept_slots(chosen)
        k, v = (jnp.take_along_axis(x, old[..., None], axis=2, mode="clip") for x in memory)
        new = jnp.arange(self.sink_size, self.prefix, dtype=jnp.int32)[None, None]
        # By the difference of two angles: it is 0, and the key keeps its bits, where the slot does.
        k = rope.rotate(k, rope.angles(new) - rope.angles(old))
        return Slots(
            jax.lax.dynamic_update_slice_in_dim(memory.k, k, self.sink_size, axis=2),
            jax.lax.dynamic_update_slice_in_dim(memory.v, v, self.sink_size, axis=2),
        )


def highest(score: Array, count: int) -> Array:
    """Marks the `count` highest scores along the last axis, compared on GRID; ties to the lowest.

    A sort stays local however the leading axes are sharded; XLA gathers the heads for a top_k.
    """
    if count == 0:
        return jnp.zeros(score.shape, bool)
    score = jnp.round(score / GRID)
    limit = jnp.sort(score, axis=-1)[..., -count][..., None]
    above, equal = score > limit, score == limit
    left = count - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= left))

"""Policies that choose entries: sinks and recents stay, the best of those between stay in order."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freqkv_jax import nvidia
from freqkv_jax.kv import choosing_cuda
from freqkv_jax.kv.policy import (
    ChunkCaches,
    KVPolicy,
    Maps,
    Memory,
    Parts,
    Slots,
    memory_after,
    whole_number,
)
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import CHUNKS_SPEC, HEADS_SPEC, MEMORY_SPEC, P, on_each_device

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
      chunk: Q, entries freed in a round; -1 means an eighth of the cache. In half precision few
        at a time wear the keys out, and are refused (KVPolicy.check_dtype).

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
        if self._has_kernels(memory.k, 1):
            return self._make_room_by_rounds(memory, rope, maps)
        with jax.named_scope("make_room"):
            middle = slice(self.sink_size, self.cache_size - self.recent_size)
            k, v = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in memory)
            k = rope.rotate_slots(k, inverse=True)
            chosen = self.choose(k[:, :, middle], v[:, :, middle], maps)
            return self.moved(memory, chosen, rope)

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
        """The rounds one after the other, in the layout in which attention reads the caches.

        The same numbers as from make_room and append, in fewer passes: no memory is copied for
        rows that have ended, new tokens are not written into it first, nothing is transposed.
        Memories that hold more than keys and values go the plain way.
        """
        if not isinstance(memory, Slots):
            return super().chunk_caches(memory, k, v, counts, rope, maps, seen, queries)
        with jax.named_scope("chunk_caches"):
            at = jnp.arange(self.prefix, self.capacity, dtype=jnp.int32)
            tokens = (rope.rotate_tokens(k, at).astype(memory.k.dtype), v.astype(memory.v.dtype))
            first = (jnp.swapaxes(memory.k, 1, 2), jnp.swapaxes(memory.v, 1, 2))
            caches = rounds_of(self, rope, self._has_kernels(memory.k, 1))(first, tokens, maps)
            return ChunkCaches(*caches, memory_after(memory, caches, tokens, counts))

    def _make_room_by_rounds(self, memory: Slots, rope: Rope, maps: Maps) -> Slots:
        """`make_room` by the kernels of `chunk_caches`: sums in another order may turn a near tie,
        and both forms of a model are to choose alike."""
        with jax.named_scope("make_room"):
            first = (jnp.swapaxes(memory.k, 1, 2), jnp.swapaxes(memory.v, 1, 2))
            batch, _, *entry = first[0].shape
            none = jnp.zeros((batch, 1, self.chunk, *entry), memory.k.dtype)  # not asked for
            left = rounds_of(self, rope, True)(first, (none, none), maps)
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(x, jnp.swapaxes(y[:, 0], 1, 2), 0, axis=2)
                for x, y in zip(memory, left, strict=True)
            )
            return Slots(k, v)

    def _has_kernels(self, x: Array, heads: int) -> bool:
        return self.prefix > 0 and nvidia.suits(x, heads)

    def plain_rounds(
        self, first: Parts, tokens: Parts, maps: Maps, rope: Rope
    ) -> tuple[Parts, Array]:
        """All that is left before each chunk, and who that was; as `_scanned` says."""

        def who(full: Parts, _: None) -> Array:
            return self._with_sinks(self._choose_among(full, rope, maps))

        return _scanned(first, tokens, None, who, rope)

    def _choose_among(self, full: Parts, rope: Rope, maps: Maps) -> Array:
        """`choose` of full caches [B, N, K, D]."""
        start, stop = self.sink_size, self.cache_size - self.recent_size
        k, v = (jnp.swapaxes(x[:, start:stop].astype(jnp.float32), 1, 2) for x in full)
        angles = rope.angles(jnp.arange(start, stop, dtype=jnp.int32))[None, None]
        return self.choose(rope.rotate(k, angles, inverse=True), v, maps)

    def cuda_rounds(
        self, first: Parts, tokens: Parts, maps: Maps, rope: Rope
    ) -> tuple[Parts, Array]:
        """`plain_rounds` by kernels for NVIDIA."""
        chunks = tokens[0].shape[1]
        turns = rope.turns(-jnp.arange(self.chunk + 1, dtype=jnp.int32))
        k, v = (x[:, None] for x in first)
        before, behind = slice(self.prefix), slice(self.prefix, None)
        choose = self.chooser_on_gpu(rope, maps)
        full = choosing_cuda.Full(
            k[:, :, before],
            v[:, :, before],
            k[:, :, behind],
            v[:, :, behind],
            jnp.zeros(1, jnp.int32),
        )
        start = choose(full)
        whole = choosing_cuda.moved(full, start, turns, chunks)

        def one_round(whole: Parts, index: Array) -> tuple[Parts, Array]:
            full = choosing_cuda.Full(*whole, *tokens, index[None])
            old = choose(full)
            return choosing_cuda.moved(full, old, turns), old

        index = jnp.arange(chunks - 1, dtype=jnp.int32)
        # A turn of a loop costs some 15 us on the host.
        whole, rest = jax.lax.scan(one_round, whole, index, unroll=4)
        return whole, jnp.concatenate([start[None], rest])

    def chooser_on_gpu(self, rope: Rope, maps: Maps) -> Callable[[choosing_cuda.Full], Array]:
        """The slots that stay, int [B, K, P], given where full caches lie; a subclass may have
        kernels for it."""

        def choose(full: choosing_cuda.Full) -> Array:
            at = full.index[0]
            k, v = (
                jnp.concatenate([cache[:, at], new[:, at]], axis=1)
                for cache, new in ((full.k, full.k_new), (full.v, full.v_new))
            )
            return self._with_sinks(self._choose_among((k, v), rope, maps))

        return choose

    def _with_sinks(self, chosen: Array) -> Array:
        """The slots that stay, sinks first: bool [B, K, m] to int [B, K, P]."""
        sinks = jnp.arange(self.sink_size, dtype=jnp.int32)
        sinks = jnp.broadcast_to(sinks, (*chosen.shape[:2], self.sink_size))
        return jnp.concatenate([sinks, self.kept_slots(chosen)], axis=-1)

    def kept_slots(self, chosen: Array) -> Array:
        """The slots behind the sinks that stay, in order: bool [B, K, m] to int [B, K, P - S]."""
        at = jnp.arange(self.span, dtype=jnp.int32)[None, None]
        slots = _sorted(jnp.where(chosen, at, self.span))[..., : self.keep]
        recent = jnp.arange(self.cache_size - self.recent_size, self.cache_size, dtype=jnp.int32)
        recent = jnp.broadcast_to(recent[None, None], (*slots.shape[:2], self.recent_size))
        return jnp.concatenate([slots + self.sink_size, recent], axis=-1)

    def moved(self, memory: Slots, chosen: Array, rope: Rope) -> Slots:
        """The memory with what stays behind the sinks, its keys turned to the new slots."""
        old = self.kept_slots(chosen)
        k, v = (jnp.take_along_axis(x, old[..., None], axis=2, mode="clip") for x in memory)
        new = jnp.arange(self.sink_size, self.prefix, dtype=jnp.int32)[None, None]
        # By 0 where the slot stays the same: there the key keeps its bits.
        k = rope.rotate(k, rope.angles(new - old))
        return Slots(
            jax.lax.dynamic_update_slice_in_dim(memory.k, k, self.sink_size, axis=2),
            jax.lax.dynamic_update_slice_in_dim(memory.v, v, self.sink_size, axis=2),
        )


@functools.lru_cache(maxsize=64)  # each layer of a model has these
def rounds_of(policy: ChoosingPolicy, rope: Rope, kernels: bool) -> Callable[..., Parts]:
    """Full caches [B, N, K, D] and the tokens of C chunks [B, C, Q, K, D] to the caches before
    these, [B, C, P, K, D]. Given who stays, rounds are linear: all that the backward pass needs
    of them. (Rematerialisation makes it choose again.)"""

    @jax.custom_jvp
    def rounds(first: Parts, tokens: Parts, maps: Maps) -> tuple[Parts, Array]:
        plain = functools.partial(policy.plain_rounds, rope=rope)
        if not kernels:
            return plain(first, tokens, maps)
        chosen = P(None, *MEMORY_SPEC)
        cuda = on_each_device(
            functools.partial(policy.cuda_rounds, rope=rope),
            (HEADS_SPEC, CHUNKS_SPEC, P()),
            (CHUNKS_SPEC, chosen),
        )
        return jax.lax.platform_dependent(first, tokens, maps, cuda=cuda, default=plain)

    @rounds.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        first, tokens, maps = primals
        caches, old = rounds(first, tokens, maps)
        first, tokens, _ = tangents
        along = _scanned(first, tokens, old, lambda _, old: old, rope)[0]
        return (caches, old), (along, np.zeros(old.shape, jax.dtypes.float0))

    return jax.jit(lambda first, tokens, maps: rounds(first, tokens, maps)[0])


def _scanned(
    first: Parts, tokens: Parts, given: Any, who: Callable[[Parts, Any], Array], rope: Rope
) -> tuple[Parts, Array]:
    """Rounds on full caches [B, N, K, D]: all that is left before each chunk, [B, C, P, K, D], and
    who that was, int [C, B, K, P].

    Args:
      given: what each round is given, [C, ...]. who: the slots that stay of a full cache.
    """

    def left(full: Parts, given: Any) -> tuple[Parts, tuple[Parts, Array]]:
        old = who(full, given)
        at = jnp.swapaxes(old, 1, 2)
        k, v = (jnp.take_along_axis(x, at[..., None], axis=1, mode="clip") for x in full)
        new = jnp.arange(at.shape[1], dtype=jnp.int32)[None, :, None]
        now = (rope.rotate(k, rope.angles(new - at)), v)
        return now, (now, old)

    def one_round(now: Parts, xs: Any) -> Any:
        *new, given = xs
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(now, new, strict=True))
        return left((k, v), given)

    if given is not None:  # a derivative, to which else the sines of all rounds would be handed
        one_round = jax.checkpoint(one_round, prevent_cse=False)
    now, start = left(first, jax.tree.map(lambda x: x[0], given))
    xs = (*(jnp.swapaxes(x[:, :-1], 0, 1) for x in tokens), jax.tree.map(lambda x: x[1:], given))
    _, rest = jax.lax.scan(one_round, now, xs)
    (k, v), old = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), start, rest)
    return (jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)), old


def highest(score: Array, count: int) -> Array:
    """Marks the `count` highest scores along the last axis, compared on GRID; ties to the lowest.

    A sort stays local however the leading axes are sharded; XLA gathers the heads for a top_k.
    """
    if count == 0:
        return jnp.zeros(score.shape, bool)
    score = on_grid(score)
    limit = _sorted(score)[..., -count][..., None]
    above, equal = score > limit, score == limit
    left = count - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= left))


def on_grid(score: Array) -> Array:
    """Scores as they are compared."""
    return jnp.round(score / GRID)


def _sorted(x: Array) -> Array:
    # Equal numbers need not keep their order: a stable sort carries their places along.
    return jax.lax.sort(x, is_stable=False)

"""Two policies that choose entries instead of mapping them: proof that the seam serves them too.

They are fixtures of the contract's tests and not in the registry.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freqkv_jax.kv.policy import KVPolicy, Maps, Slots, write_slots
from freqkv_jax.rope import Rope


@dataclass(frozen=True)
class ChoosingPolicy(KVPolicy):
    """Keeps `kept` of the m = N - S - R middle entries, in order, with sinks and recents."""

    cache_size: int = 24
    sink_size: int = 2
    recent_size: int = 4
    kept: int = 7

    source: ClassVar[str] = "a fixture of the tests"

    @property
    def capacity(self) -> int:
        """N."""
        return self.cache_size

    @property
    def prefix(self) -> int:
        """P = S + l + R."""
        return self.sink_size + self.kept + self.recent_size

    @property
    def middle(self) -> slice:
        """The entries that are chosen from."""
        return slice(self.sink_size, self.cache_size - self.recent_size)

    def gather(self, x: Array, chosen: Array) -> Array:
        """x [B, K, N, ...] and chosen [B, K, l], indices into the middle, to [B, K, P, ...]."""
        kept = jnp.broadcast_to(jnp.arange(self.cache_size), (*chosen.shape[:2], self.cache_size))
        index = jnp.concatenate(
            [kept[..., : self.sink_size], self.sink_size + chosen, kept[..., self.middle.stop :]],
            -1,
        )
        index = index.reshape(index.shape + (1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, index, axis=2)


def write_front(old: Array, new: Array) -> Array:
    """The first slots of `old` replaced by `new`."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), 0, axis=2)


def choose(score: Array, count: int) -> Array:
    """Indices of the `count` highest scores along the last axis, in order."""
    return jnp.sort(jax.lax.top_k(score, count)[1], axis=-1)


@dataclass(frozen=True)
class NoveltyPolicy(ChoosingPolicy):
    """Keeps what the low-pass throws away: keys far from the projection on the lowest components.

    With u = k / |k| before rotary embedding and LP_B the projection on the B lowest DCT-II
    components of the middle, novelty is -cos(u, LP_B u). `by_value` of the places go to the
    entries not yet chosen with the highest -cos(u, mean u) + 0.3 log |v|^2.
    B = 1 and by_value = 0 is KeyDiff (arXiv 2504.15364).
    """

    bands: int = 3
    by_value: int = 2

    name: ClassVar[str] = "novelty"
    summary: ClassVar[str] = "keeps the keys that the low-pass explains least"
    keeps: ClassVar[str] = "sinks, novel entries, recents"

    def constants(self) -> dict[str, np.ndarray]:
        """The B lowest cosines, orthonormal rows, [B, m]."""
        size = self.middle.stop - self.middle.start
        at = np.pi * (np.arange(size) + 0.5) / size
        basis = np.cos(np.arange(self.bands)[:, None] * at) * np.sqrt(2 / size)
        basis[0] /= np.sqrt(2)
        return {"basis": basis.astype(np.float32)}

    def make_room(self, memory: Slots, rope: Rope, maps: Maps) -> Slots:
        """Keys are turned back, chosen by, and turned to their new slots."""
        k = rope.rotate_slots(memory.k.astype(jnp.float32), inverse=True)
        v = memory.v.astype(jnp.float32)
        chosen = self._choose(k[:, :, self.middle], v[:, :, self.middle], maps["basis"])
        k = rope.rotate_slots(self.gather(k, chosen))
        return Slots(write_front(memory.k, k), write_front(memory.v, self.gather(memory.v, chosen)))

    def _choose(self, k: Array, v: Array, basis: Array) -> Array:
        u = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        low = jnp.einsum("bm,bn,xknd->xkmd", basis, basis, u)
        novelty = -cosine(u, low)
        novel = jax.lax.top_k(novelty, self.kept - self.by_value)[1]
        value = -cosine(u, jnp.broadcast_to(jnp.mean(u, axis=-2, keepdims=True), u.shape))
        value = value + 0.3 * jnp.log(jnp.sum(v * v, axis=-1))
        taken = jnp.any(novel[..., None] == jnp.arange(k.shape[2]).reshape(1, 1, 1, -1), axis=-2)
        rest = jax.lax.top_k(jnp.where(taken, -jnp.inf, value), self.by_value)[1]
        return jnp.sort(jnp.concatenate([novel, rest], axis=-1), axis=-1)


def cosine(x: Array, y: Array) -> Array:
    """Of the vectors along the last axis."""
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(x * y, axis=-1) / norms


class ScoredSlots(NamedTuple):
    """Slots and the attention that each has had since room was last made, [B, K, N]."""

    slots: Slots
    score: Array


@dataclass(frozen=True)
class AttendedPolicy(ChoosingPolicy):
    """Keeps the entries that the queries since the last round attended to most.

    It needs queries, its memory is more than slots, and keys keep their true positions.
    """

    name: ClassVar[str] = "attended"
    summary: ClassVar[str] = "keeps what the latest queries attended to"
    keeps: ClassVar[str] = "sinks, attended entries, recents"
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    def init(self, batch, kv_heads, head_dim, dtype, slots=None) -> ScoredSlots:
        """Empty slots, no attention yet."""
        inner = super().init(batch, kv_heads, head_dim, dtype, slots)
        return ScoredSlots(inner, jnp.zeros((batch, kv_heads, self.cache_size), jnp.float32))

    def view(self, memory: ScoredSlots) -> tuple[Array, Array]:
        """As they lie."""
        return memory.slots.k, memory.slots.v

    def position(self, seen: Array, fill: Array) -> Array:
        """The true one."""
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(seen.shape, fill.shape))

    def append(self, memory, k, v, fill, count=None, queries=None) -> ScoredSlots:
        """Stores the tokens and adds up what their queries look at."""
        assert queries is not None
        slots = Slots(*(write_slots(old, new, fill, count) for old, new in zip(
            memory.slots, (k, v), strict=True)))  # fmt: skip
        batch, length, heads, dim = queries.shape
        kv_heads = slots.k.shape[1]
        q = queries.reshape(batch, length, kv_heads, heads // kv_heads, dim)
        scores = jnp.einsum("btkgd,bknd->bkgtn", q, slots.k, preferred_element_type=jnp.float32)
        offsets = jnp.arange(length)
        at = jnp.broadcast_to(jnp.asarray(fill), (batch,))[:, None] + offsets[None]
        seen = jnp.arange(self.cache_size).reshape(1, 1, -1) <= at[..., None]
        scores = jnp.where(seen[:, None, None], scores / dim**0.5, -1e30)
        read = jnp.full((batch,), length) if count is None else count
        taken = (offsets[None] < read[:, None])[:, None, None, :, None]
        weights = jnp.where(taken, jax.nn.softmax(scores, axis=-1), 0.0)
        return ScoredSlots(slots, memory.score + weights.sum(axis=(2, 3)))

    def make_room(self, memory: ScoredSlots, rope: Rope, maps: Maps) -> ScoredSlots:
        """Keys keep their rotation: they keep their positions."""
        chosen = choose(memory.score[:, :, self.middle], self.kept)
        k, v = (write_front(x, self.gather(x, chosen)) for x in memory.slots)
        return ScoredSlots(Slots(k, v), jnp.zeros_like(memory.score))

"""A policy that chooses by attention: proof that the seam serves queries too.

It is a fixture of the contract's tests and not in the registry.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.choosing import ChoosingPolicy, highest
from freqkv_jax.kv.policy import Maps, Slots, write_slots
from freqkv_jax.rope import Rope


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
    source: ClassVar[str] = "a fixture of the tests"
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
        middle = slice(self.sink_size, self.cache_size - self.recent_size)
        old = self.kept_slots(highest(memory.score[:, :, middle], self.keep))
        kept = (jnp.take_along_axis(x, old[..., None], axis=2) for x in memory.slots)
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(x, new, self.sink_size, axis=2)
            for x, new in zip(memory.slots, kept, strict=True)
        )
        return ScoredSlots(Slots(k, v), jnp.zeros_like(memory.score))

"""Policies that choose by attention: beside each entry lies a score, which queries add to."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from freqkv_jax.kv.choosing import ChoosingPolicy, highest
from freqkv_jax.kv.policy import Maps, Slots
from freqkv_jax.rope import Rope

QUERY_BLOCK = 128  # queries whose weights are held at once
_TINY = 1e-30  # added to scores: one that is 0 has no logarithm


class ScoredSlots(NamedTuple):
    """Slots, and the score of each entry, float32 [B, K, N]; 0 where there is none."""

    k: Array
    v: Array
    score: Array


@dataclass(frozen=True)
class ScoredPolicy(ChoosingPolicy):
    """Of the entries between sinks and recents, those that queries attended to most stay.

    The queries are those of the text itself, as they are read, at their slots: attention is
    reckoned a second time beside the model's own (flash kernels do not return it), as a mean over
    the query heads of a kv head. Scores are kept in float32 and have no gradient. A query counts
    in the rounds that come after it, so logits stay causal, and a memory needs no query.

    A subclass gives `added`, and may give `worth` and `after`. Arguments: see ChoosingPolicy.
    """

    needs: ClassVar[tuple[str, ...]] = ("queries",)

    def init(
        self, batch: int, kv_heads: int, head_dim: int, dtype: Any, slots: int | None = None
    ) -> ScoredSlots:
        """Empty, no attention yet."""
        inner = super().init(batch, kv_heads, head_dim, dtype, slots)
        score = jnp.zeros((batch, kv_heads, self.cache_size), jnp.float32)
        return ScoredSlots(inner.k, inner.v, score)

    def append(
        self,
        memory: ScoredSlots,
        k: Array,
        v: Array,
        fill: int | Array,
        count: Array | None = None,
        queries: Array | None = None,
    ) -> ScoredSlots:
        """Stores the tokens, and adds what their queries give to the scores."""
        assert queries is not None
        slots = super().append(Slots(memory.k, memory.v), k, v, fill, count)
        # One row of slots where all rows share a fill.
        offsets = jnp.arange(queries.shape[1], dtype=jnp.int32)[None]
        at = jnp.reshape(jnp.asarray(fill, jnp.int32), (-1, 1)) + offsets
        read = queries.shape[1] if count is None else count[:, None]
        taken = jnp.broadcast_to(offsets < read, queries.shape[:2])
        q, keys = (jax.lax.stop_gradient(x) for x in (queries, slots.k))
        score = memory.score + self.added(q, keys, at, taken)
        return ScoredSlots(slots.k, slots.v, score)

    def added(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B K N D"],
        at: Int[Array, "b T"],
        taken: Bool[Array, "B T"],
    ) -> Float[Array, "B K N"]:
        """What queries q in slots `at` (of each row, or of all: b is B or 1) add to the scores.

        Those that are not `taken` are none.
        """
        raise TypeError(f"{type(self).__name__} must define added")

    def worth(self, score: Array) -> Array:
        """What is compared, [B, K, N], of the scores."""
        return score

    def after(self, score: Array, chosen: Array) -> Array:
        """The scores [B, K, N] with which the next round begins."""
        old = self.kept_slots(chosen)
        kept = jnp.take_along_axis(score, old, axis=2, mode="clip")
        new = jnp.zeros((*score.shape[:2], self.chunk), jnp.float32)
        return jnp.concatenate([score[:, :, : self.sink_size], kept, new], axis=2)

    def make_room(self, memory: ScoredSlots, rope: Rope, maps: Maps) -> ScoredSlots:
        """Chooses by the scores, and moves what stays."""
        with jax.named_scope("make_room"):
            middle = slice(self.sink_size, self.cache_size - self.recent_size)
            # The logarithm puts sums of a few queries and of a million on the same grid.
            worth = jnp.log(self.worth(memory.score)[:, :, middle] + _TINY)
            chosen = highest(worth, self.keep)
            slots = self.moved(Slots(memory.k, memory.v), chosen, rope)
            return ScoredSlots(slots.k, slots.v, self.after(memory.score, chosen))


def attention_sums(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B K N D"],
    at: Int[Array, "b T"],
    taken: Bool[Array, "B T"],
) -> Float[Array, "B K N"]:
    """Attention that each slot has of queries in slots `at`, which see the slots up to their own.

    Summed over the queries that are `taken`, averaged over a kv head's query heads: over all slots
    it sums to their number. b is B, or 1 where all rows have the same `at`.
    """
    batch, length, heads, dim = q.shape
    size = min(length, QUERY_BLOCK)
    pad = -length % size
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    at, taken = (jnp.pad(x, ((0, 0), (0, pad))) for x in (at, taken))
    q = q.reshape(batch, -1, size, k.shape[1], heads // k.shape[1], dim)
    at, taken = (x.reshape(x.shape[0], -1, size) for x in (at, taken))
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    slot = jnp.arange(k.shape[2], dtype=jnp.int32)[None, None]

    def add(total: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        q, at, taken = xs
        scores = jnp.einsum(
            "btkgd,bknd->bkgtn", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        seen = (slot <= at[..., None])[:, None, None]
        scores = jnp.where(seen, scores * jnp.float32(1 / math.sqrt(dim)), jnp.float32(-1e30))
        weights = jax.nn.softmax(scores, axis=-1)
        weights = jnp.where(taken[:, None, None, :, None], weights, 0.0)
        return total + weights.mean(axis=2).sum(axis=2), None

    blocks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, at, taken))
    total = jnp.zeros(k.shape[:3], jnp.float32)
    if len(blocks[0]) == 1:
        return add(total, jax.tree.map(lambda x: x[0], blocks))[0]
    return jax.lax.scan(add, total, blocks)[0]

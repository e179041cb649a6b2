"""SnapKV: keeps the entries for which the latest queries vote."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.policy import register
from freqkv_jax.kv.scored import ScoredPolicy, attention_sums

USUAL_WINDOW = 32


@register
@dataclass(frozen=True)
class SnapKVConfig(ScoredPolicy):
    """Keeps what the last `window` queries before a round attend to (arXiv 2404.14469).

    An entry's vote is the attention that it has of these queries, which are those in the last
    `window` slots of the full cache. Votes before the window are averaged over `pool_size`
    neighbouring slots, with zeros beyond both ends, so that neighbours stay together.

    Departures from the paper. It chooses once, at the end of the prompt, and lets the cache grow
    from there; here a round chooses whenever the cache is full, from what the round before left
    and what came since, in prompt and answer alike, and votes are counted anew. Neighbours are then
    neighbours in the cache, which need not be so in the text. So a question at the end of a prompt
    votes only where a round falls behind it. Query heads that share a kv head vote together, by
    their mean. Sinks are always kept (`sink_size=0` is the paper's). Positions are slots, as for
    every policy that it is compared with, not true ones. The paper always keeps the window: here
    it does so where recent_size >= window, else the rest of the window is chosen from too.

    Attributes:
      cache_size, sink_size, recent_size, chunk: see ChoosingPolicy.
      window: W, queries that vote; -1 means 32, or chunk where that is less.
      pool_size: entries over which votes are averaged, odd; 1 for none.

    Raises:
      ValueError: as ChoosingPolicy, and unless 1 <= window <= chunk and pool_size is odd.
    """

    window: int = -1
    pool_size: int = 5

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "keeps what the last queries before a round attend to"
    keeps: ClassVar[str] = "sinks, attended entries, recents"
    source: ClassVar[str] = "arXiv 2404.14469"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window == -1:
            object.__setattr__(self, "window", min(USUAL_WINDOW, self.chunk))
        if self._whole("window", 1) > self.chunk:
            raise ValueError(
                f"window must be in [1, {self.chunk}], got {self.window}: the queries that vote are"
                " of the tokens read since the last round; raise chunk or lower window"
            )
        if self._whole("pool_size", 1) % 2 == 0:
            raise ValueError(
                f"pool_size must be odd, got {self.pool_size}: an entry and as many neighbours on"
                " either side; 1 pools nothing"
            )

    def added(self, q: Array, k: Array, at: Array, taken: Array) -> Array:
        """The attention of the queries in the last slots of the cache, and no other's."""
        start = self.cache_size - self.window
        if q.shape[1] > self.window:
            slots = start + jnp.arange(self.window, dtype=jnp.int32)[None]
            offset = slots - at[:, :1]
            inside = (offset >= 0) & (offset < q.shape[1])
            offset = jnp.broadcast_to(jnp.clip(offset, 0, q.shape[1] - 1), (len(q), self.window))
            q = jnp.take_along_axis(q, offset[..., None, None], axis=1)
            taken, at = jnp.take_along_axis(taken, offset, axis=1) & inside, slots
        votes = taken & (at >= start)
        if at.size > 1:
            return attention_sums(q, k, at, votes)
        # A token at a time, most are far from the next round. (Where rows differ, asking whether
        # any is near would be a collective.)
        none = jnp.zeros(k.shape[:3], jnp.float32)
        near = at[0, 0] >= start
        return jax.lax.cond(near, lambda: attention_sums(q, k, at, votes), lambda: none)

    def worth(self, score: Array) -> Array:
        """Votes, averaged with their neighbours' where they lie before what stays anyway."""
        end = self.cache_size - min(self.window, self.recent_size)
        side = self.pool_size // 2
        padded = jnp.pad(score[:, :, :end], ((0, 0), (0, 0), (side, side)))
        pooled = sum(padded[:, :, i : i + end] for i in range(self.pool_size)) / self.pool_size
        return jnp.concatenate([pooled, score[:, :, end:]], axis=2)

    def after(self, score: Array, chosen: Array) -> Array:
        """Nothing: whoever votes in the next round has not been read."""
        return jnp.zeros_like(score)

"""Random: what any way of choosing must beat."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.choosing import ChoosingPolicy, highest
from freqkv_jax.kv.policy import Maps, Slots, register
from freqkv_jax.rope import Rope


class CountedSlots(NamedTuple):
    """Slots, and the rounds that they have gone through, int32 [B, K]."""

    k: Array
    v: Array
    rounds: Array


@register
@dataclass(frozen=True)
class RandomConfig(ChoosingPolicy):
    """Keeps entries drawn anew in every round, each kv head its own.

    The draw depends on the seed, the round and the head: rows at the same round, and all layers,
    draw alike. Arguments: see ChoosingPolicy; seed is a whole number >= 0.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "keeps entries drawn at random"
    keeps: ClassVar[str] = "sinks, random entries, recents"
    source: ClassVar[str] = "-"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("seed", 0)

    def init(
        self, batch: int, kv_heads: int, head_dim: int, dtype: Any, slots: int | None = None
    ) -> CountedSlots:
        """Empty, no round yet."""
        inner = super().init(batch, kv_heads, head_dim, dtype, slots)
        return CountedSlots(inner.k, inner.v, jnp.zeros((batch, kv_heads), jnp.int32))

    def append(
        self,
        memory: CountedSlots,
        k: Array,
        v: Array,
        fill: int | Array,
        count: Array | None = None,
        queries: Array | None = None,
    ) -> CountedSlots:
        """Stores the tokens."""
        slots = super().append(memory, k, v, fill, count)
        return CountedSlots(slots.k, slots.v, memory.rounds)

    def make_room(self, memory: CountedSlots, rope: Rope, maps: Maps) -> CountedSlots:
        """Draws, keeps, counts."""
        heads = jnp.arange(memory.k.shape[1], dtype=jnp.uint32)[None]
        heads = jnp.broadcast_to(heads, memory.rounds.shape)

        def draw(round_: Array, head: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(self.seed), round_)
            return jax.random.uniform(jax.random.fold_in(key, head), (self.span,))

        chosen = highest(jax.vmap(jax.vmap(draw))(memory.rounds, heads), self.keep)
        slots = self.moved(Slots(memory.k, memory.v), chosen, rope)
        return CountedSlots(slots.k, slots.v, memory.rounds + 1)

"""Spectral novelty whose entries keep their true positions, as long as the model knows these."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.novelty import SpectralNoveltyConfig
from freqkv_jax.kv.policy import Maps, Slots, register, write_places
from freqkv_jax.rope import Rope


class PlacedSlots(NamedTuple):
    """Slots, the place in the text of each entry, int32 [B, K, N], and tokens read [B, K]."""

    k: Array
    v: Array
    place: Array
    read: Array


@register
@dataclass(frozen=True)
class TrueNoveltyConfig(SpectralNoveltyConfig):
    """Chooses as `novelty` does, but a key stays rotated at the place where it stood in the text.

    So a query sees how far back an entry is, where `novelty` closes the gaps. Positions grow with
    the text: beyond the model's native window this breaks down, as full attention does. It is there
    to tell what slots as positions cost or bring within that window. Arguments: see
    SpectralNoveltyConfig.
    """

    name: ClassVar[str] = "novelty_true"
    summary: ClassVar[str] = "chooses as novelty does, and keeps true positions"
    keeps: ClassVar[str] = "sinks, novel entries, recents"

    def init(
        self, batch: int, kv_heads: int, head_dim: int, dtype: Any, slots: int | None = None
    ) -> PlacedSlots:
        """Empty."""
        inner = super().init(batch, kv_heads, head_dim, dtype, slots)
        place = jnp.zeros((batch, kv_heads, self.cache_size), jnp.int32)
        return PlacedSlots(inner.k, inner.v, place, jnp.zeros((batch, kv_heads), jnp.int32))

    def append(
        self,
        memory: PlacedSlots,
        k: Array,
        v: Array,
        fill: int | Array,
        count: Array | None = None,
        queries: Array | None = None,
    ) -> PlacedSlots:
        """Stores the tokens, and their places."""
        slots = super().append(Slots(memory.k, memory.v), k, v, fill, count)
        places = write_places(memory.place, memory.read, k.shape[1], fill, count)
        return PlacedSlots(slots.k, slots.v, *places)

    def check_dtype(self, dtype: str) -> None:
        """Nothing is refused: a key is turned once, and never again."""
        del dtype

    def position(self, seen: Array, fill: Array) -> Array:
        """The token's place in the text."""
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(seen.shape, fill.shape))

    def make_room(self, memory: PlacedSlots, rope: Rope, maps: Maps) -> PlacedSlots:
        """Keys are turned back to be compared; what stays is moved as it is."""
        with jax.named_scope("make_room"):
            middle = slice(self.sink_size, self.cache_size - self.recent_size)
            k, v = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in memory[:2])
            k = rope.rotate(k, rope.angles(memory.place), inverse=True)
            chosen = self.choose(k[:, :, middle], v[:, :, middle], maps)
            old = self.kept_slots(chosen)[..., None]
            arrays = (memory.k, memory.v, memory.place[..., None])
            kept = (jnp.take_along_axis(x, old, axis=2, mode="clip") for x in arrays)
            k, v, place = (
                jax.lax.dynamic_update_slice_in_dim(x, new, self.sink_size, axis=2)
                for x, new in zip(arrays, kept, strict=True)
            )
            return PlacedSlots(k, v, place[..., 0], memory.read)

"""FreqKV for the values only: they are low-pass filtered, keys are thinned out."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from freqkv_jax.kv.freqkv import FreqKVConfig
from freqkv_jax.kv.policy import KVPolicy, Maps, Memory, Slots, register
from freqkv_jax.rope import Rope


@register
@dataclass(frozen=True)
class FreqKVValuesConfig(FreqKVConfig):
    """A slot's value is FreqKV's; its key is that of one entry, and no mean of keys.

    To tell whether it is mixing keys or mixing values that FreqKV pays for. Slot i of the L that
    the span's n entries become stands for the place (i + 1/2) n / L of the span, here and in
    FreqKV: the low-pass is centred on it. Its key is that of the entry which holds this place, of
    two at the same distance the newer one: every second where L = n / 2. Later rounds thin out what
    is left, so an old key stays whole or goes. (A window's keys, the newest ones, would stand
    beside values of other places.) Arguments: see FreqKVConfig.
    """

    name: ClassVar[str] = "freqkv_values"
    summary: ClassVar[str] = "low-pass filters the values, keeps evenly spaced keys"
    keeps: ClassVar[str] = "sinks, low frequencies of values, some keys, optional recents"
    source: ClassVar[str] = "a variant of arXiv 2505.00570"

    # Keys and values part ways in a round: the obvious form, not the one for a single map.
    chunk_caches = KVPolicy.chunk_caches  # pyright: ignore[reportAssignmentType]
    caches_and_next = KVPolicy.caches_and_next  # pyright: ignore[reportAssignmentType]

    def kept_keys(self) -> np.ndarray:
        """Slots of the cache whose keys stay, in order, int32 [P]."""
        places = (2 * np.arange(self.keep) + 1) * self.span // (2 * max(self.keep, 1))
        recents = np.arange(self.cache_size - self.recent_size, self.cache_size)
        parts = [np.arange(self.sink_size), self.sink_size + places, recents]
        return np.concatenate(parts).astype(np.int32)

    def make_room(self, memory: Memory, rope: Rope, maps: Maps) -> Memory:
        """Keys go to their new slots by the difference of two angles, values through the map."""
        with jax.named_scope("make_room"):
            old = jnp.asarray(self.kept_keys()[self.sink_size :])
            new = jnp.arange(self.sink_size, self.prefix, dtype=jnp.int32)
            k = jnp.take(memory.k, old, axis=2)
            k = rope.rotate(k, rope.angles(new[None, None]) - rope.angles(old[None, None]))
            v = self.shrink(memory.v, 2, maps)[:, :, self.sink_size :]
            return Slots(
                jax.lax.dynamic_update_slice_in_dim(memory.k, k, self.sink_size, axis=2),
                jax.lax.dynamic_update_slice_in_dim(memory.v, v, self.sink_size, axis=2),
            )

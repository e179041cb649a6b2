"""The full cache: every key and value is kept, memory grows with the text."""

from dataclasses import dataclass
from typing import ClassVar

from freqkv_jax.kv.policy import KVPolicy, Memory, register
from freqkv_jax.rope import Rope


@register
@dataclass(frozen=True)
class FullConfig(KVPolicy):
    """Plain causal attention over all that was read: the upper bound in memory, and in quality
    as far as the model's native window reaches."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "keeps everything"
    keeps: ClassVar[str] = "all entries"
    source: ClassVar[str] = "-"

    @property
    def capacity(self) -> None:
        """No bound."""
        return None

    @property
    def prefix(self) -> int:
        """Room is never made."""
        raise TypeError("a full cache has no prefix: its capacity is None")

    def make_room(self, memory: Memory, rope: Rope, maps: dict) -> Memory:
        """Never due."""
        raise TypeError("a full cache never makes room: its capacity is None")

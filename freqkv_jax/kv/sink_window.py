"""Sink + recent window (StreamingLLM): the first entries and the newest ones, nothing between."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.linear import LinearPolicy
from freqkv_jax.kv.policy import Maps, register


@register
@dataclass(frozen=True)
class SinkWindowConfig(LinearPolicy):
    """A window with FreqKV's arguments and hence its bytes: the same N, P and Q.

    It is FreqKV with L = 0 and R = P - S: a round keeps S sinks and the P - S newest entries.
    """

    name: ClassVar[str] = "sink_window"
    summary: ClassVar[str] = "keeps the first and the newest entries, drops the rest"
    keeps: ClassVar[str] = "sinks, newest entries"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"

    @property
    def recent(self) -> int:
        """P - S: the whole prefix behind the sinks."""
        return self.prefix - self.sink_size

    def map_span(self, x: Array, axis: int, maps: Maps) -> Array:
        """Nothing is kept of the span."""
        return jnp.take(x, jnp.arange(0), axis=axis)

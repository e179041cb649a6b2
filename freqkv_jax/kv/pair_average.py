"""Pair averaging: neighbours between sinks and recents become their means."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.linear import LinearPolicy
from freqkv_jax.kv.policy import Maps, register


@register
@dataclass(frozen=True)
class PairAverageConfig(LinearPolicy):
    """FreqKV's cache with the plainest low-pass: the means of neighbouring pairs.

    It is mean pooling by two (a compression function of arXiv 1911.05507), again and again: n =
    N - S - R entries become n // 2. Where n is odd, the oldest one joins the first pair, so that
    nothing is lost. Keys are averaged before rotary embedding, as FreqKV's are.

    Arguments: those of FreqKV but for retain_ratio and method; a half is kept.
    """

    # No argument: a pair becomes one entry.
    retain_ratio: ClassVar[float] = 0.5  # pyright: ignore[reportIncompatibleVariableOverride]

    name: ClassVar[str] = "pair_average"
    summary: ClassVar[str] = "averages neighbouring pairs, again and again"
    keeps: ClassVar[str] = "sinks, means of pairs, optional recents"
    source: ClassVar[str] = "mean pooling, arXiv 1911.05507"

    def map_span(self, x: Array, axis: int, maps: Maps) -> Array:
        """Means of pairs, reckoned in float32 at least."""
        if self.keep == 0:
            return jnp.take(x, jnp.arange(0), axis=axis)
        wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        size, odd = x.shape[axis], x.shape[axis] % 2
        older, newer = (
            jax.lax.slice_in_dim(wide, start, size, 2, axis=axis) for start in (odd, odd + 1)
        )
        means = (older + newer) / 2
        if odd:
            oldest, first = (jax.lax.slice_in_dim(y, 0, 1, axis=axis) for y in (wide, means))
            rest = jax.lax.slice_in_dim(means, 1, self.keep, axis=axis)
            means = jnp.concatenate([(2 * first + oldest) / 3, rest], axis=axis)
        return means.astype(x.dtype)

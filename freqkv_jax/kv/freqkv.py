"""FreqKV (arXiv 2505.00570): what lies between sinks and recents is low-pass filtered."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freqkv_jax import folding, nvidia, spectral
from freqkv_jax.kv import folded_rounds, folding_cuda
from freqkv_jax.kv.linear import LinearPolicy, Parts
from freqkv_jax.kv.policy import Maps, Memory, register
from freqkv_jax.rope import Rope


class Halves(NamedTuple):
    """What a round gave of keys and values, before the last sums of the folded map:
    [2, rows, 2, B, K, D]."""

    both: Array


@register
@dataclass(frozen=True)
class FreqKVConfig(LinearPolicy):
    """FreqKV's cache.

    Attributes:
      cache_size: N, slots of the cache.
      sink_size: S, first entries that are never compressed.
      recent_size: R, latest entries that a round leaves as they are (crashes in the authors'
        code; defined here as the design says).
      retain_ratio: g, share of the span n = N - S - R that a round keeps; L = int(n g).
      method: "matmul" (even/odd folded matrix) or "fft" (jnp.fft) for the map.

    Raises:
      ValueError: unless N >= 1, S >= 0, R >= 0, S + R < N and 0 <= g < 1.
    """

    method: str = "matmul"

    name: ClassVar[str] = "freqkv"
    summary: ClassVar[str] = "low-pass filters the cache along the sequence, again and again"
    keeps: ClassVar[str] = "sinks, low frequencies of the rest, optional recents"
    source: ClassVar[str] = "arXiv 2505.00570"

    def __post_init__(self) -> None:
        super().__post_init__()
        spectral.check_method(self.method)

    def constants(self) -> dict[str, np.ndarray]:
        """The two halves of the folded map, stacked, float32."""
        if self.method == "fft" or self.keep == 0:
            return {}
        return {"stacked": spectral.stacked_lowpass(self.span, self.keep).astype(np.float32)}

    def map_span(self, x: Array, axis: int, maps: Maps) -> Array:
        """The low-pass of `spectral.compress`, with its matrices taken from `maps`."""
        if self.keep == 0:
            return jnp.take(x, jnp.arange(0), axis=axis)
        if self.method == "fft":
            return spectral.lowpass_fft(x, self.keep, axis).astype(x.dtype)
        return folding.fold_matmul(maps["stacked"], x, self.keep, axis)

    def first_round(self, mapped: Parts, raw: Parts, maps: Maps) -> Any:
        """As the base class has it; or the product's halves alone, where the parts of a span are
        the halves that the map folds."""
        if not self.keep or self.method != "matmul" or mapped[0].shape != raw[0].shape:
            return super().first_round(mapped, raw, maps)
        stacked = maps["stacked"]
        folded = folding.fold_parts(mapped, raw, stacked.shape[2])
        return Halves(folding.product(stacked, folded))

    def next_round(self, now: Any, raw: Parts, maps: Maps) -> Any:
        """`first_round` on what a round gave."""
        if not isinstance(now, Halves):
            return self.first_round(now, raw, maps)
        stacked = maps["stacked"]
        return Halves(folding.product(stacked, folding.refold(now.both, raw, stacked.shape[2])))

    def turned(self, now: Any, rope: Rope, first: int) -> Parts:
        """As the base class has it."""
        if not isinstance(now, Halves):
            return super().turned(now, rope, first)
        k, v = (now.both[:, :, index] for index in range(2))
        return (
            folding.entries_turned(k, self.keep, rope, first),
            folding.entries_turned(v, self.keep, None),
        )

    def rounds(
        self, memory: Memory, k: Array, v: Array, rope: Rope, maps: Maps, more: bool = False
    ) -> tuple[Array, ...]:
        """As the base class has it; by kernels where there are some."""
        halved = self.method == "matmul" and 0 < self.keep == self.chunk and self.sink_size > 0
        if not (halved and nvidia.suits(k, 3)):
            return super().rounds(memory, k, v, rope, maps, more)
        return _rounds(self, rope, more)(memory, k, v, maps)


@functools.lru_cache(maxsize=64)  # each layer of a model has these
def _rounds(policy: FreqKVConfig, rope: Rope, more: bool) -> folded_rounds.Rounds:
    """`FreqKVConfig.rounds`, by kernels where there are some."""

    def plain(memory: Memory, k: Array, v: Array, maps: Maps) -> tuple[Array, ...]:
        return LinearPolicy.rounds(policy, memory, k, v, rope, maps, more)

    sizes = folding_cuda.Sizes(policy.sink_size, policy.keep, policy.prefix)
    # Caches of many times the tokens are not to be kept.
    kept = policy.prefix <= 2 * policy.chunk
    return folded_rounds.forms(plain, sizes, rope, kept, more)

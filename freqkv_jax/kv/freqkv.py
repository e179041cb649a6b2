"""FreqKV (arXiv 2505.00570): what lies between sinks and recents is low-pass filtered."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freqkv_jax import spectral
from freqkv_jax.kv.linear import LinearPolicy, Parts
from freqkv_jax.kv.policy import Maps, register


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
        return spectral.fold_matmul(maps["stacked"], x, self.keep, axis)

    def map_parts(self, mapped: Parts, raw: Parts, maps: Maps) -> Parts:
        """As the base class has it; parts of equal size are the halves that the map folds."""
        if self.keep and self.method == "matmul" and mapped[0].shape == raw[0].shape:
            backwards = [part[::-1] for part in raw]
            return spectral.map_halves(maps["stacked"], mapped, backwards, self.keep)
        return super().map_parts(mapped, raw, maps)

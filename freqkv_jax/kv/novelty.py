"""Spectral novelty: keeps the entries that a low-pass of the cache would destroy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freqkv_jax.kv import choosing_cuda, novelty_cuda
from freqkv_jax.kv.choosing import ChoosingPolicy, highest, on_grid
from freqkv_jax.kv.novelty_cuda import TINY
from freqkv_jax.kv.policy import Maps, real_number, register
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import axis_size

LOG_VALUE_WEIGHT = 0.3


@register
@dataclass(frozen=True)
class SpectralNoveltyConfig(ChoosingPolicy):
    """Keeps the keys that the low frequencies of the keys explain least.

    With u = k / |k| (k before rotary embedding) and LP_B the projection on the B lowest DCT-II
    components along the m entries between sinks and recents, the novelty of entry t is
    -cos(u_t, LP_B(u)_t). The most novel entries stay; `value_share` of the places go to those of
    the others that have the highest -cos(u_t, mean u) + 0.3 log |v_t|^2. No query is looked at.

    `bands=1, value_share=0` is KeyDiff (arXiv 2504.15364): the distance from the mean direction.

    The defaults are what docs/results/smollm2_cache_study supports (SmolLM2-135M, N = 2048, not
    tuned), its row keydiff: more bands were no better, a share chosen by value cost a little, half
    of the cache as recents (ChoosingPolicy) read best. A recency of 0.3 helps texts of many times
    the cache and costs some of the gain on shorter ones; it is left to the user.

    Attributes:
      cache_size, sink_size, recent_size, chunk: see ChoosingPolicy.
      bands: B, components of the low-pass; more than m entries have m.
      value_share: share of the places between sinks and recents given by value, in [0, 1]; 0: none.
      recency: w >= 0; w t / m is added to both scores of entry t = 0 ... m-1, oldest first. It is
        rank that counts, not age in tokens; a large w makes the choice a window. 0: none.
      shared_heads: all kv heads of a layer keep the same entries, by the means of their scores.
        Not on a mesh that splits heads (tensor > 1): they would have to meet in every round.

    Raises:
      ValueError: as ChoosingPolicy, and unless bands >= 1, 0 <= value_share <= 1 and recency is
        finite and >= 0.
    """

    bands: int = 1
    value_share: float = 0.0
    recency: float = 0.0
    shared_heads: bool = False

    name: ClassVar[str] = "novelty"
    summary: ClassVar[str] = "keeps what the low-pass would destroy: keys far from the keys' course"
    keeps: ClassVar[str] = "sinks, novel entries, recents"
    source: ClassVar[str] = "KeyDiff, arXiv 2504.15364, is `bands=1, value_share=0`"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("bands", 1)
        share = "the share of the chosen entries that are chosen by value (0: by novelty alone)"
        ahead = "what the newest entry is ahead of the oldest (0 for nothing)"
        for field, fits, allowed, meaning in (
            ("value_share", lambda x: 0 <= x <= 1, "in [0, 1]", share),
            ("recency", lambda x: 0 <= x < float("inf"), "a finite number >= 0", ahead),
        ):
            number = real_number(field, getattr(self, field), fits, allowed, meaning)
            object.__setattr__(self, field, number)
        if not isinstance(self.shared_heads, bool):
            raise ValueError(f"shared_heads must be true or false, got {self.shared_heads!r}")

    @property
    def by_value(self) -> int:
        """Places that go by value."""
        return int(self.keep * self.value_share)

    def constants(self) -> dict[str, np.ndarray]:
        """The lowest DCT-II components, orthonormal rows, float32 [B, m]."""
        size = self.span
        order = np.arange(min(self.bands, size))[:, None]
        basis = np.cos(np.pi * order * (np.arange(size) + 0.5) / size) * np.sqrt(2 / size)
        basis[0] = np.sqrt(1 / size)
        return {"basis": basis.astype(np.float32)}

    def choose(self, k: Array, v: Array, maps: Maps) -> Array:
        """The most novel entries, and of the others those with the best key and value."""
        unit = k * jax.lax.rsqrt(_square(k) + TINY)
        # float32 must be float32 on a GPU or TPU too.
        exact = jax.lax.Precision.HIGHEST
        bands = jnp.einsum("fm,bkmd->bkfd", maps["basis"], unit, precision=exact)
        low = jnp.einsum("fm,bkfd->bkmd", maps["basis"], bands, precision=exact)
        chosen = highest(self._compared(-_cosine(unit, low)), self.keep - self.by_value)
        if self.by_value:
            from_mean = -_cosine(unit, bands[:, :, :1])  # the lowest band is the mean, scaled
            worth = self._compared(_worth(_square(v)[..., 0], from_mean))
            worth = jnp.where(chosen, -jnp.inf, worth)
            chosen |= highest(worth, self.by_value)
        return jnp.broadcast_to(chosen, k.shape[:3])

    def chooser_on_gpu(self, rope: Rope, maps: Maps) -> Callable[[choosing_cuda.Full], Array]:
        """By kernels, unless bands are too many."""
        head_dim = 2 * len(rope.frequencies)
        if not novelty_cuda.scores_fit(self.bands, head_dim):
            return super().chooser_on_gpu(rope, maps)
        slots = jnp.arange(self.span, dtype=jnp.int32) + self.sink_size
        basis, back = novelty_cuda.padded(maps["basis"], head_dim), rope.turns(-slots)
        by_value = self.by_value > 0

        def choose(full: choosing_cuda.Full) -> Array:
            score, *mean = novelty_cuda.novelty(full, basis, back, self.sink_size, by_value)
            compared = jnp.broadcast_to(on_grid(self._compared(score)), score.shape)
            if by_value:
                chosen = choosing_cuda.marked(compared, self.keep - self.by_value)
                square = novelty_cuda.squares(full, self.sink_size, self.span)
                worth = self._compared(_worth(square, *mean))
                compared = jnp.where(chosen, jnp.inf, on_grid(worth))
            return choosing_cuda.staying(compared, self.keep, self.sink_size, self.recent_size)

        return choose

    def _compared(self, score: Array) -> Array:
        """Scores [B, K, m] as they are compared: [B, 1, m] where heads choose together."""
        if self.shared_heads:
            if axis_size("tensor") > 1:
                raise ValueError(
                    f"shared_heads=True cannot be used on a mesh with tensor={axis_size('tensor')}:"
                    " heads that choose together must lie on one device; use data or fsdp"
                )
            score = score.mean(axis=1, keepdims=True)
        if self.recency:
            rank = jnp.arange(self.span, dtype=jnp.float32) / self.span
            score = score + self.recency * rank[None, None]
        return score


def _worth(square: Array, from_mean: Array) -> Array:
    """Of entries, by |value|^2 and by how far the key is from the mean key."""
    return LOG_VALUE_WEIGHT * jnp.log(square + TINY) + from_mean


def _square(x: Array) -> Array:
    return jnp.sum(x * x, axis=-1, keepdims=True)


def _cosine(unit: Array, other: Array) -> Array:
    """Of unit vectors with others (which broadcast), along the last axis."""
    return jnp.sum(unit * other * jax.lax.rsqrt(_square(other) + TINY), axis=-1)

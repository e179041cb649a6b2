"""Paired bootstrap: how far a difference between two policies on the same samples is chance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
MIN_SAMPLES = 5  # an interval from fewer would say more than they do


@dataclass(frozen=True)
class Difference:
    """A mean difference, and its interval (None where there are too few samples).

    Attributes:
      count: pairs that it is made of.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves no doubt about the sign."""
        return self.low is not None and self.high is not None and self.low * self.high > 0

    def mapped(self, function: Callable[[float], float]) -> "Difference":
        """With a rising function applied to mean and ends."""
        ends = [None if end is None else float(function(end)) for end in (self.low, self.high)]
        return Difference(float(function(self.mean)), ends[0], ends[1], self.count)


def paired_difference(
    ours: Mapping[str, Mapping[str, float]],
    theirs: Mapping[str, Mapping[str, float]],
    block: int = 1,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference | None:
    """The mean of ours - theirs over the samples that both have.

    Args:
      ours, theirs: part -> sample's key -> value. Parts (data sets, say) count alike, whatever
        their size; samples are drawn anew within each, those of parts with one sample among them.
      block: neighbours (in the order of `ours`) that are drawn together, as overlapping windows
        of one text must be (moving blocks).

    Returns:
      None where they share no sample.
    """
    parts = []
    for part, values in ours.items():
        other = theirs.get(part, {})
        pairs = [value - other[key] for key, value in values.items() if key in other]
        if pairs:
            parts.append(np.asarray(pairs, np.float64))
    if not parts:
        return None
    count = sum(len(pairs) for pairs in parts)
    mean = float(np.mean([pairs.mean() for pairs in parts]))
    if count // block < MIN_SAMPLES:
        return Difference(mean, None, None, count)
    rng = np.random.default_rng(seed)
    # Parts of one sample each show no spread within: they are drawn anew among themselves.
    lone = [pairs for pairs in parts if len(pairs) == 1]
    weighted = [(pairs, 1) for pairs in parts if len(pairs) > 1]
    weighted += [(np.concatenate(lone), len(lone))] if lone else []
    total = sum(w * _resampled_means(pairs, block, resamples, rng) for pairs, w in weighted)
    means = total / len(parts)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, (tail, 100 - tail))
    return Difference(mean, float(low), float(high), count)


def _resampled_means(
    pairs: np.ndarray, block: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    block = min(block, len(pairs))
    blocks = -(-len(pairs) // block)
    means = np.empty(resamples)
    offsets = np.arange(block)
    at_once = max(1, 1_000_000 // (blocks * block))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        first = rng.integers(0, len(pairs) - block + 1, (rows, blocks, 1))
        places = (first + offsets).reshape(rows, -1)[:, : len(pairs)]
        means[start : start + rows] = pairs[places].mean(axis=1)
    return means

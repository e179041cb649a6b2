"""Paired bootstrap: how far a difference between two policies on the same samples is chance.

Plain percentiles of means drawn anew are too narrow where samples are few: of n samples the spread
of such means is short by sqrt((n - 1) / n), and a normal law takes the spread for known. So each
part's deviations are widened by sqrt(n / (n - 1)), and their sum by Student's t over the normal
quantile, with the degrees of freedom of Welch and Satterthwaite.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
MIN_SAMPLES = 8  # an interval from fewer would say more than they do
AT_ONCE = 1_000_000  # places that are drawn together
ALIKE = 1e-9  # a spread below this share of the largest difference is rounding
MANY = 1000.0  # degrees of freedom from which Student's t is normal


@dataclass(frozen=True)
class Difference:
    """A mean difference, and its interval (None where there are too few samples).

    Attributes:
      low, high: equal where all differences of each part are alike: then there is no interval, and
        no doubt that resampling could show.
      count: pairs that it is made of.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def is_alike(self) -> bool:
        """Whether no part's differences have any spread."""
        return self.low is not None and self.low == self.high

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
    # Parts of one sample each show no spread within: they are drawn anew among themselves.
    lone = [pairs for pairs in parts if len(pairs) == 1]
    weighted = [(pairs, 1) for pairs in parts if len(pairs) > 1]
    weighted += [(np.concatenate(lone), len(lone))] if lone else []
    if all(np.ptp(pairs) <= ALIKE * np.abs(pairs).max() for pairs, _ in weighted):
        return Difference(mean, mean, mean, count)
    rng = np.random.default_rng(seed)
    drawn = [
        weight / len(parts) * _deviations(pairs, block, resamples, rng)
        for pairs, weight in weighted
    ]
    freedom = [_draws(pairs, block) - 1 for pairs, _ in weighted]
    deviations = sum(drawn) * _student_ratio([one.var() for one in drawn], freedom)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(deviations, (tail, 100 - tail))
    return Difference(mean, mean + float(low), mean + float(high), count)


def _draws(pairs: np.ndarray, block: int) -> int:
    """Blocks that make a sample as large as `pairs`."""
    return -(-len(pairs) // min(block, len(pairs)))


def _deviations(
    pairs: np.ndarray, block: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """How far means of samples drawn anew are from their own mean, widened to be unbiased."""
    means, draws = _resampled_means(pairs, block, resamples, rng), _draws(pairs, block)
    return (means - means.mean()) * math.sqrt(draws / max(draws - 1, 1))


def _student_ratio(variances: Sequence[float], freedom: Sequence[int]) -> float:
    """Quantile of Student's t over that of the normal law, for a sum of independent parts.

    The degrees of freedom are (sum of v)^2 / sum of (v^2 / freedom) (Welch 1947, Satterthwaite
    1946); with t = sqrt(freedom) tan(a) the density of a is proportional to cos(a)^(freedom - 1).
    """
    pairs = [(v, f) for v, f in zip(variances, freedom, strict=True) if v > 0 and f > 0]
    if not pairs:
        return 1.0
    known = sum(v for v, _ in pairs) ** 2 / sum(v * v / f for v, f in pairs)
    known = min(known, MANY)
    angles = np.linspace(0, np.pi / 2, 20_001)
    share = np.cumsum(np.cos(angles) ** (known - 1))
    quantile = math.sqrt(known) * math.tan(np.interp(LEVEL, share / share[-1], angles))
    return quantile / NormalDist().inv_cdf((1 + LEVEL) / 2)


def _resampled_means(
    pairs: np.ndarray, block: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    block, blocks = min(block, len(pairs)), _draws(pairs, block)
    means = np.empty(resamples)
    offsets = np.arange(block)
    at_once = max(1, AT_ONCE // (blocks * block))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        first = rng.integers(0, len(pairs) - block + 1, (rows, blocks, 1))
        places = (first + offsets).reshape(rows, -1)[:, : len(pairs)]
        means[start : start + rows] = pairs[places].mean(axis=1)
    return means

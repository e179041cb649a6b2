"""The order of rows: a permutation an epoch, computed place by place."""

import numpy as np

from freqkv_jax.training.generated import key_of, mix

_ROUNDS = 8


def permuted(places: np.ndarray, num_rows: int, key: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of 0 .. num_rows-1 sends each of `places` (int64).

    A balanced Feistel network over the next power of four, walked until it lands inside (Black
    and Rogaway 2002): no memory, and the same on every host and numpy.
    """
    half = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    keys = mix(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64))
    out = places.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> bits, out[todo] & low
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) >> np.uint64(32) & low)
        out[todo] = (left << bits) | right
        todo = todo[out[todo] >= num_rows]
    return out.astype(np.int64)


def batch_indices(num_rows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Row numbers int64 [batch_size] of the global batch of step `step` (from 0).

    Batches follow each other through an endless row of epochs, each its own permutation of all
    rows; a batch may end one and begin the next. A pure function of its arguments.

    Raises:
      ValueError: numbers that make no sense.
    """
    if num_rows < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            f"need num_rows >= 1, batch_size >= 1 and step >= 0, got {num_rows}, {batch_size},"
            f" {step}"
        )
    first = step * batch_size
    places = np.arange(first, first + batch_size, dtype=np.int64)
    epochs, within = np.divmod(places, num_rows)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        key = key_of("epoch", seed, int(epoch))
        out[chosen] = permuted(within[chosen], num_rows, key)
    return out

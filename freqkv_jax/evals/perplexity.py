"""Perplexity of long text, window by window, as LongLoRA and the FreqKV paper measure it."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from freqkv_jax.evals.data import window_starts
from freqkv_jax.kv.policy import policy_to_dict
from freqkv_jax.model.llama import Llama
from freqkv_jax.score import score

PROTOCOL = "longlora-ppl-v1"


def perplexity(
    model: Llama,
    params: Mapping[str, Any],
    tokens: np.ndarray,
    seq_len: int,
    stride: int = 256,
    max_windows: int | None = None,
    batch_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores overlapping windows of one token stream, each from an empty cache.

    The loss of a window is the plain mean of its seq_len - 1 cross-entropies (nats); `mean_loss`
    is the mean over windows, whatever the batch size: a short last batch is filled up with a
    repeated row (so that nothing is compiled anew) that is then dropped.

    Args:
      model, params: what to score.
      tokens: integer ids [M].
      seq_len, stride: windows of `seq_len` tokens start every `stride` tokens (see
        `data.window_starts` for which ones count).
      max_windows: take this many windows, evenly spaced; None takes all.
      batch_size: windows scored together.
      on_progress: called with windows done and windows in all.

    Returns:
      mean_loss, perplexity, standard_error (of mean_loss), window_losses, window_starts,
      num_windows, num_compressions (in one window), losses_by_position, seconds,
      tokens_per_second, kv_bytes (of one window's cache).

    Raises:
      ValueError: a stream too short for one window, or non-positive sizes.

    Source: the evaluator of LongLoRA (arXiv 2309.12307), used by FreqKV (arXiv 2505.00570).
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    starts = window_starts(len(tokens), seq_len, stride, max_windows)
    losses: list[float] = []
    by_place = np.zeros(seq_len - 1)
    begin = time.monotonic()
    for first in range(0, len(starts), batch_size):
        batch = starts[first : first + batch_size]
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        windows = np.stack([tokens[start : start + seq_len] for start in padded])
        logp = np.asarray(score(model, params, windows.astype(np.int32)), np.float64)[: len(batch)]
        losses.extend((-logp.mean(axis=1)).tolist())
        by_place -= logp.sum(axis=0)
        if on_progress is not None:
            on_progress(len(losses), len(starts))
    seconds = time.monotonic() - begin
    mean_loss = math.fsum(losses) / len(losses)
    if not math.isfinite(mean_loss):
        raise ValueError(
            f"the loss is {mean_loss}: the weights hold values that are not numbers, or overflow in"
            f" {model.dtype}; try --dtype float32"
        )
    return {
        "mean_loss": mean_loss,
        "perplexity": math.exp(mean_loss),
        "standard_error": _standard_error(losses),
        "window_losses": losses,
        "window_starts": starts,
        "num_windows": len(losses),
        "num_compressions": model.kv.num_compressions(seq_len),
        "losses_by_position": losses_by_position(by_place / len(losses)),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(losses) * seq_len / max(seconds, 1e-9), 1),
        "kv_bytes": model.kv.kv_bytes(model.config, model.dtype, seq_len),
    }


def _standard_error(losses: list[float]) -> float | None:
    # Windows overlap where stride < seq_len, so this understates the error of a mean over texts.
    if len(losses) < 2:
        return None
    return float(np.std(losses, ddof=1) / math.sqrt(len(losses)))


def losses_by_position(place_losses: np.ndarray) -> list[dict[str, float]]:
    """Mean loss of the predictions made after `from` to `to` - 1 tokens, in doubling ranges.

    Shows what compression costs where it happens: half of an 8K window never saw a full cache of
    4096. `place_losses` [T-1]: mean loss of the prediction made after 1, 2, ..., T-1 tokens.
    """
    edges = [1]
    while edges[-1] <= len(place_losses):
        edges.append(max(1024, 2 * edges[-1]))
    ranges = zip(edges, edges[1:], strict=False)
    return [
        {
            "from": low,
            "to": min(high, len(place_losses) + 1),
            "loss": float(place_losses[low - 1 : high - 1].mean()),
        }
        for low, high in ranges
    ]


def describe_model(model: Llama) -> dict[str, Any]:
    """What a result file says about model and policy."""
    kept = getattr(model.kv, "keep", None)
    span = getattr(model.kv, "span", None)
    return {
        "policy": policy_to_dict(model.kv),
        "retain_ratio_effective": kept / span if kept is not None and span else None,
        "dtype": model.dtype,
        "model": model.config.to_hf(),
    }

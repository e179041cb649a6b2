"""Log-probabilities of given tokens, at constant memory in the length of the text."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freqkv_jax import programs
from freqkv_jax.kv.state import KVState
from freqkv_jax.model.llama import Llama
from freqkv_jax.reading import OnProgress, Runner, checked_tokens, copied, cut, report


def score(
    model: Llama,
    params: Mapping[str, Any],
    tokens: Any,
    lengths: Any = None,
    state: KVState | None = None,
    block_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> Float[Array, "B T-1"]:
    """Log-probability of each token after the first, given those before it (natural logarithm).

    Args:
      model, params: what to score with. Parameters on a mesh run on the mesh.
      tokens: int [B, T].
      lengths: tokens of each row, 1 to T; the rest is ignored. None: all.
      state: what was read before the tokens; stays usable. None: nothing.
      block_len: tokens a row that are read at once; memory grows with it, results do not change.
      on_progress: called after each block with the tokens read and those in all.

    Returns:
      float32 [B, T-1]: entry t is log p(token t+1 | state, tokens 0..t); 0 behind a row's length.

    Raises:
      ValueError: bad tokens, lengths or state. TypeError: called under jit.
    """
    return jnp.asarray(
        score_greedy(model, params, tokens, lengths, state, block_len, on_progress)[0]
    )


def score_greedy(
    model: Llama,
    params: Mapping[str, Any],
    tokens: Any,
    lengths: Any = None,
    state: KVState | None = None,
    block_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`score`, and whether each token is the most likely one: float32 and bool [B, T-1], on the
    host; False behind a row's length."""
    ids, counts = checked_tokens(model, tokens, lengths)
    batch, length = ids.shape
    run = Runner(model, params, batch)
    if state is not None:
        run.check_state(state)
        state = copied(state)
    parts = []
    # Every token but the last is read: its hidden state gives the one after it.
    for step, ready in run.steps(state, counts - 1, block_len):
        got, best, state = run(
            programs.read_scores,
            cut(ids, step),
            cut(ids, step, shift=1),
            ready(state),
            step.counts.astype(np.int32),
            kind=step.kind,
        )
        parts.append((step, got, best))
        report(on_progress, step, counts - 1, got)
    out = np.zeros((batch, length - 1), np.float32), np.zeros((batch, length - 1), bool)
    for step, *got in parts:
        for target, values in zip(out, map(np.asarray, got), strict=True):
            for row in np.flatnonzero(step.counts):
                start, count = step.offsets[row], step.counts[row]
                target[row, start : start + count] = values[row, :count]
    return out

"""Generation for batches of prompts of different lengths, with streaming."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freqkv_jax.decode import Decoder, eos_ids, prefill
from freqkv_jax.kv.policy import whole_number
from freqkv_jax.kv.state import KVState
from freqkv_jax.model.llama import Llama
from freqkv_jax.reading import OnProgress
from freqkv_jax.sampling import sampling

STREAM_STEPS = 16  # tokens between two calls of `stream`
BLOCK_STEPS = 64  # tokens between two looks at whether all rows have ended


def generate(
    model: Llama,
    params: Mapping[str, Any],
    prompts: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    stream: Callable[[int, list[int]], Any] | None = None,
    return_state: bool = False,
    state: KVState | None = None,
    on_progress: OnProgress | None = None,
) -> Any:
    """Continues prompts.

    Args:
      model, params: parameters on a mesh run on the mesh.
      prompts: lists of token ids, of different lengths if need be, or an int array [B, T].
      max_new_tokens: at most so many new tokens a row.
      temperature, top_k, top_p: as `fk.decode`; 0 is greedy.
      eos_id: end token or tokens, at which a row stops. None: never (the model's own are not
        consulted).
      seed: one number (row i uses its key folded with i) or one a row.
      stream: called with a row's number and its new ids (no end token) after every block of at
        most 16 steps, for rows that have new ones.
      return_state: whether to return the state too: each row has read its prompt, its new tokens
        and its end token, and can be continued.
      state: what the rows have read before the prompts; it stays usable.
      on_progress: called while the prompts are read, with the tokens read and those in all.

    Returns:
      A list of new ids a row, without prompt and end token; with `return_state` a pair of this
      and the state (None for no prompts).

    Raises:
      ValueError: an empty prompt, ids outside the vocabulary, options out of range.
    """
    left = whole_number("max_new_tokens", max_new_tokens, 0)
    tokens, lengths = _padded(prompts)
    if not len(lengths):
        return ([], None) if return_state else []
    batch = len(lengths)
    rule, draw = sampling(temperature, top_k, top_p, _keys(seed, batch), batch)
    eos = eos_ids(model, eos_id)
    decoder = Decoder(model, params, rule, draw, eos, batch)
    logits, state = prefill(model, params, tokens, lengths, state, on_progress=on_progress)
    if model.kv.capacity is None:  # room for all at once, so that the arrays grow only once
        state = decoder.run.with_slots(state, int(np.asarray(state.fill).max()) + left)
    new, state = _continued(decoder, state, logits, left, stream)
    return (new, state) if return_state else new


def _continued(
    decoder: Decoder,
    state: KVState,
    logits: Array,
    left: int,
    stream: Callable[[int, list[int]], Any] | None,
) -> tuple[list[list[int]], KVState]:
    """At most `left` new ids a row, and the state behind them."""
    new: list[list[int]] = [[] for _ in range(state.batch)]
    ended = np.zeros(state.batch, bool)
    while left and not ended.all():
        steps = min(left, STREAM_STEPS if stream is not None else BLOCK_STEPS)
        block, logits, state = decoder.steps(state, logits, steps)
        left -= steps
        for row in np.flatnonzero(~ended):
            ids, ended[row] = _until_end(block[row], decoder.eos)
            new[row].extend(ids)
            if stream is not None and ids:
                stream(int(row), ids)
    return new, state


def _padded(prompts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array [B, T], padded with zeros, and their lengths; refuses empty ones."""
    rows = [np.asarray(prompt) for prompt in prompts]
    for number, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(
                f"prompts must be lists of token ids; prompt {number} has shape {row.shape}"
                " (one prompt? pass [prompt])"
            )
        if not row.size:
            raise ValueError(f"prompt {number} is empty; a prompt needs at least one token")
        if not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompt {number} holds {row.dtype}, not token ids; encode it first")
    lengths = np.array([row.size for row in rows], np.int64)
    out = np.zeros((len(rows), lengths.max(initial=0)), np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: ids.size] = ids
    return out, lengths


def _keys(seed: int | Sequence[int], batch: int) -> Any:
    seeds = np.asarray(seed)
    if not np.issubdtype(seeds.dtype, np.integer) or seeds.shape not in ((), (batch,)):
        raise ValueError(f"seed must be a whole number or one a row ({batch}), got {seed!r}")
    if seeds.ndim == 0:
        return jax.random.key(int(seeds))
    return jnp.stack([jax.random.key(int(one)) for one in seeds])


def _until_end(tokens: np.ndarray, eos: np.ndarray | None) -> tuple[list[int], bool]:
    """A row's tokens before its first end token, and whether there is one."""
    places = np.flatnonzero(np.isin(tokens, eos)) if eos is not None else []
    if len(places):
        return tokens[: places[0]].tolist(), True
    return tokens.tolist(), False

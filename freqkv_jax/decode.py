"""Prefill and decode: prompts of any length into a state, and tokens out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from freqkv_jax import programs
from freqkv_jax.kv.policy import whole_number
from freqkv_jax.kv.state import KVState
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.llama import maps as maps_of
from freqkv_jax.reading import (
    OnProgress,
    Runner,
    check_logits,
    check_state,
    checked_tokens,
    copied,
    cut,
    placed_maps,
    report,
)
from freqkv_jax.sampling import Draw, Sampling, sampling

# A text of any length is decoded by scans of these lengths. Each is a program that takes seconds to
# compile on a GPU (5 to 7 s for 30 layers), whereas starting one costs a fraction of a millisecond:
# powers of two up to 256 compiled for 41 s what these compile in a third of that.
SCAN_LENGTHS = (64, 8, 1)


def prefill(
    model: Llama,
    params: Mapping[str, Any],
    tokens: Any,
    lengths: Any = None,
    state: KVState | None = None,
    block_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Float[Array, "B V"], KVState]:
    """Reads tokens, in blocks of constant memory however many there are.

    Args:
      model, params: parameters on a mesh run on the mesh.
      tokens: int [B, T], padded on the right.
      lengths: tokens of each row, 1 to T; what stands behind is ignored. None: all.
      state: what was read before; it stays usable (it is copied). Reading a text in several calls
        gives what one call gives.
      block_len: tokens a row that are read at once; memory grows with it, results do not change.
      on_progress: called after each block with the tokens read and those in all.

    Returns:
      float32 logits [B, V] behind each row's last token, and the state.

    Raises:
      ValueError: bad tokens, lengths or state. TypeError: called under jit.
    """
    ids, counts = checked_tokens(model, tokens, lengths)
    run = Runner(model, params, ids.shape[0])
    if state is not None:
        run.check_state(state)
        state = copied(state)
    last = np.zeros((ids.shape[0], model.config.hidden_size), jnp.dtype(model.dtype))
    for step, ready in run.steps(state, counts, block_len):
        last, state = run(
            programs.read_last,
            cut(ids, step),
            ready(state),
            step.counts.astype(np.int32),
            last,
            kind=step.kind,
        )
        report(on_progress, step, counts, last)
    assert state is not None
    return run(programs.head, last), state


def decode(
    model: Llama,
    params: Mapping[str, Any],
    state: KVState,
    logits: Float[Array, "B V"],
    num_steps: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: Any = None,
) -> tuple[Int[Array, "B n"], Float[Array, "B V"], KVState]:
    """Picks a token from `logits`, reads it, and so on, `num_steps` times.

    Args:
      params: one text on an NVIDIA GPU is decoded faster with `fk.fuse(params)`.
      state, logits: of `prefill` or `decode`. The state is donated: do not use it again.
      temperature: 0 is greedy (ties take the lowest id); else tokens are drawn, after
        temperature, `top_k` and `top_p` in this order, and `key` is required.
      eos_id: end tokens. A row that reads one is frozen: its state and logits stay and `tokens`
        repeats the end token. None: no row stops, and rows frozen by an earlier call go on.
      key: one PRNG key (row i uses it folded with i) or one a row. A row that has read t tokens
        draws with its key folded with t, so decode(10) twice equals decode(20).

    Returns:
      tokens int32 [B, num_steps], all of them read; logits for the token after; the state.

    Raises:
      ValueError: a sampling value out of range, no key, bad num_steps, eos_id, logits or state.
      TypeError: called under jit (use `decode_scan` there).
    """
    num_steps = whole_number("num_steps", num_steps, 0)
    rule, draw = sampling(temperature, top_k, top_p, key, state.batch)
    decoder = Decoder(model, params, rule, draw, eos_ids(model, eos_id), state.batch)
    decoder.run.check_state(state)
    check_logits(model, logits, state.batch)
    if not num_steps:
        return jnp.zeros((state.batch, 0), jnp.int32), logits, state
    tokens, logits, state = decoder.steps(state, logits, num_steps)
    return jnp.asarray(tokens), logits, state


class Decoder:
    """Decodes with fixed options; what `decode` and `generate` share."""

    def __init__(
        self,
        model: Llama,
        params: Mapping[str, Any],
        rule: Sampling,
        draw: Draw,
        eos: np.ndarray | None,
        batch: int,
    ) -> None:
        self.run = Runner(model, params, batch)
        self.rule, self.draw, self.eos = rule, draw, eos

    def steps(
        self, state: KVState, logits: Array, num_steps: int
    ) -> tuple[np.ndarray, Array, KVState]:
        """`decode` on the host: tokens as a NumPy array. When a round is due is known here, so
        that no program branches; a scan ends where any running row is due."""
        capacity = self.run.model.kv.capacity
        fills, running = self._rows(state)
        state = self.run.with_slots(state, int(fills.max()) + num_steps)
        uniform = len(set(fills[running].tolist())) <= 1
        parts, left = [], num_steps
        while left and running.any():
            room = left
            if capacity is not None:
                due = running & (fills == capacity)
                if due.any():
                    state = self.run.make_room(state, due)
                    fills = np.where(due, self.run.model.kv.prefix, fills)
                room = capacity - int(fills[running].max())
            size = next(length for length in SCAN_LENGTHS if length <= min(left, room))
            tokens, logits, state = self.run(
                programs.decode_steps, state, logits, self.draw, self.eos,
                rule=self.rule, num_steps=size, uniform=uniform,
            )  # fmt: skip
            parts.append(tokens)
            left -= size
            if self.eos is None:
                fills = fills + size
            else:
                fills, running = self._rows(state)
        if left:  # every row is frozen
            parts.append(np.repeat(np.asarray(state.end_token)[:, None], left, axis=1))
        # Joined on the host: joining arrays of many lengths would compile as many programs.
        return np.concatenate([np.asarray(part) for part in parts], axis=1), logits, state

    def _rows(self, state: KVState) -> tuple[np.ndarray, np.ndarray]:
        """Each row's fill, and whether it runs."""
        fills = np.array(state.fill, np.int64)
        if self.eos is None:
            return fills, np.ones(len(fills), bool)
        return fills, np.asarray(state.end_token) < 0


def decode_scan(
    model: Llama,
    params: Mapping[str, Any],
    state: KVState,
    logits: Float[Array, "B V"],
    num_steps: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: Any = None,
    maps: Mapping[str, Any] | None = None,
) -> tuple[Int[Array, "B n"], Float[Array, "B V"], KVState]:
    """`decode` as one program that can be jitted and built upon, for rows of equal fill.

    Arguments and results are `decode`'s, and besides:
      maps: `fk.maps(model)`, to be passed through your own jit as an argument; without it the
        policy's arrays become constants of the program (17 MB for FreqKV at a cache of 4096).
    Donate the state at your jit boundary. Where the fill is known (the state is no argument of
    the jit) every loop has a fixed length; else an inner loop ends by a comparison, which on a
    GPU the host waits for. With parameters on a mesh, call it in `with jax.set_mesh(mesh):`.

    Raises:
      ValueError: as `decode`; where the fill is known, rows of different fill and a full cache
        without room. Where it is not known these give NaN for all logits and -1 for all tokens.
    """
    num_steps = whole_number("num_steps", num_steps, 0)
    check_state(model, state, state.batch)
    check_logits(model, logits, state.batch)
    kv = model.kv
    if maps is None:
        traced = isinstance(state.fill, Tracer)
        maps = maps_of(model) if traced else placed_maps(kv, None)
    rule, draw = sampling(temperature, top_k, top_p, key, state.batch)
    ids = eos_ids(model, eos_id)
    eos = None if ids is None else jnp.asarray(ids)
    if not num_steps:
        return jnp.zeros((state.batch, 0), jnp.int32), logits, state
    scan = _Scan(model, {"params": params, "maps": maps}, rule, draw, eos)
    known = _known_fill(state, eos is not None)
    if kv.capacity is None and (known or 0) + num_steps > state.slots:
        raise ValueError(
            f"the full cache has {state.slots} slots, too few for {num_steps} more tokens; use"
            " fk.decode, which makes it grow"
        )
    fill = programs.common_fill(state, eos is not None) if known is None else jnp.int32(known)
    tokens = jnp.zeros((state.batch, num_steps), jnp.int32)
    carry = (state, logits, fill, jnp.int32(0), tokens)
    if kv.capacity is None:
        carry = scan.steps(carry, num_steps)
    elif known is not None:
        carry = scan.rounds(carry, num_steps, kv.capacity - known)
    else:
        carry = scan.segments(carry, num_steps)
    end, last, _, _, tokens = carry
    if known is None:
        uneven = (state.fill != fill) & (True if eos is None else ~state.ended)
        wrong = jnp.any(uneven | (end.fill > end.slots))
        last, tokens = jnp.where(wrong, jnp.nan, last), jnp.where(wrong, -1, tokens)
    return tokens, last, end


@dataclass(frozen=True)
class _Scan:
    """The loops of `decode_scan`. A carry is state, logits, common fill, tokens done, tokens."""

    model: Llama
    variables: programs.Variables
    rule: Sampling
    draw: Draw
    eos: Array | None

    def steps(self, carry: Any, count: Any) -> Any:
        """`count` steps for which there is room; a scan where count is a number."""

        def step(_: Any, carry: Any) -> Any:
            state, logits, fill, done, out = carry
            new, logits, state = programs.decode_step(
                self.model, self.variables, state, logits, fill, self.rule, self.draw, self.eos
            )
            out = jax.lax.dynamic_update_slice_in_dim(out, new[:, None], done, axis=1)
            return state, logits, fill + 1, done + 1, out

        return jax.lax.fori_loop(0, count, step, carry)

    def after_room(self, carry: Any) -> Any:
        """Makes room in all rows that run."""
        state, logits, fill, *rest = carry
        due = None if self.eos is None else ~state.ended
        state = programs.make_room(self.model, self.variables, state, due)
        return state, logits, jnp.full_like(fill, self.model.kv.prefix), *rest

    def rounds(self, carry: Any, num_steps: int, room: int) -> Any:
        """Behind a known fill, with `room` slots free: every loop has a fixed length."""
        chunk = self.model.kv.chunk
        first = min(num_steps, room)
        rounds, rest = divmod(num_steps - first, chunk)
        carry = self.steps(carry, first)
        carry = jax.lax.fori_loop(
            0, rounds, lambda _, carry: self.steps(self.after_room(carry), chunk), carry
        )
        return self.steps(self.after_room(carry), rest) if rest else carry

    def segments(self, carry: Any, num_steps: int) -> Any:
        """Behind a fill that only the device knows."""
        size = self.model.kv.capacity

        def segment(_: Any, carry: Any) -> Any:
            left = num_steps - carry[3]
            full = (carry[2] == size) & (left > 0)
            carry = jax.lax.cond(full, self.after_room, lambda carry: carry, carry)
            return self.steps(carry, jnp.minimum(left, size - carry[2]))

        return jax.lax.fori_loop(0, 1 + -(-num_steps // self.model.kv.chunk), segment, carry)


def _known_fill(state: KVState, masked: bool) -> int | None:
    """The common fill of the running rows, None under jit; ValueError if they differ."""
    if isinstance(state.fill, Tracer) or isinstance(state.end_token, Tracer):
        return None
    fills = np.asarray(state.fill)
    running = np.asarray(state.end_token) < 0 if masked else np.ones(len(fills), bool)
    if len(set(fills[running].tolist())) > 1:
        raise ValueError(
            f"decode_scan needs rows of equal fill, got {fills.tolist()}; use fk.decode"
        )
    return int(fills[running][0]) if running.any() else int(fills[0])


def eos_ids(model: Llama, eos_id: int | Sequence[int] | None) -> np.ndarray | None:
    """End tokens as an array, None where there are none; ValueError outside the vocabulary."""
    if eos_id is None:
        return None
    ids = np.atleast_1d(np.asarray(eos_id))
    if not ids.size:
        return None
    vocab = model.config.vocab_size
    whole = ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)
    if not whole or ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(
            f"eos_id must be token ids from 0 to {vocab - 1}, one or a list, got {eos_id!r}"
        )
    return ids.astype(np.int32)

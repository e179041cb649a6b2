"""The jittable programs behind reading and decoding: pure functions of arrays, no host logic.

`variables` is {"params": ..., "maps": ...}; a state is an argument and a result.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from freqkv_jax.kv.policy import Memory, choose_rows
from freqkv_jax.kv.state import KVState
from freqkv_jax.model.llama import Llama
from freqkv_jax.sampling import Draw, Sampling, pick
from freqkv_jax.sharding import BATCH_AXES, P, constrain

Variables = dict[str, Any]
# Float32 logits that are held at once while scoring (64 MiB), whatever the vocabulary.
LOGITS_AT_ONCE = 1 << 24


def _apply(model: Llama, variables: Variables, *args: Any, method: str) -> Any:
    return model.apply(variables, *args, method=method)


def read(
    model: Llama,
    variables: Variables,
    tokens: Int[Array, "B T"],
    state: KVState,
    counts: Int[Array, "B"],
    kind: str,
) -> tuple[Float[Array, "B T E"], KVState]:
    """Reads `counts` of T tokens in every row; rows with count 0 stay as they are.

    Args:
      kind: "fresh", all rows are empty (T <= N); "more", each row has room behind its fill;
        "chunks", rows that read are full and T is a multiple of Q.

    Returns:
      Final hidden states (meaningless behind a row's count) and the state.
    """
    if kind == "chunks":
        hidden, new = _apply(model, variables, tokens, state, counts, method="block")
    else:
        fill = 0 if kind == "fresh" else None
        hidden, new = _apply(model, variables, tokens, state, counts, fill, method="extend")
    # A frozen row that is given more to read goes on.
    end_token = jnp.where(counts > 0, -1, new.end_token)
    return hidden, dataclasses.replace(new, end_token=end_token)


def read_last(
    model: Llama,
    variables: Variables,
    tokens: Int[Array, "B T"],
    state: KVState,
    counts: Int[Array, "B"],
    last: Float[Array, "B E"],
    kind: str,
) -> tuple[Float[Array, "B E"], KVState]:
    """`read`, keeping of the hidden states each row's last one (`last` where it reads nothing)."""
    hidden, state = read(model, variables, tokens, state, counts, kind)
    place = jnp.maximum(counts - 1, 0)[:, None, None]
    mine = jnp.take_along_axis(hidden, place, axis=1)[:, 0]
    return jnp.where((counts > 0)[:, None], mine, last), state


def read_scores(
    model: Llama,
    variables: Variables,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    state: KVState,
    counts: Int[Array, "B"],
    kind: str,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], KVState]:
    """`read`, turning the hidden states into what `log_probs` says of `targets`."""
    hidden, state = read(model, variables, tokens, state, counts, kind)
    return *log_probs(model, variables, hidden, targets), state


def log_probs(
    model: Llama,
    variables: Variables,
    hidden: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """log p of every target, float32, and whether none is likelier; at most LOGITS_AT_ONCE logits
    exist at a time.

    Blocks are cut along T only, their length by the vocabulary: cutting the vocabulary itself
    would gather it where it is sharded.
    """
    batch, length = targets.shape
    block = max(1, LOGITS_AT_ONCE // (batch * model.config.vocab_size))
    if block >= length:
        return _log_probs(model, variables, hidden, targets)
    blocks = -(-length // block)
    pad = blocks * block - length
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(batch, blocks, block, -1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(batch, blocks, block)
    parts = jax.lax.map(
        lambda xs: _log_probs(model, variables, *xs),
        (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0)),
    )
    logp, best = (jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in parts)
    return logp, best


def _log_probs(
    model: Llama, variables: Variables, hidden: Array, targets: Array
) -> tuple[Array, Array]:
    logits = _apply(model, variables, hidden, method="logits")
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    # A masked sum, not a gather: it stays local where the vocabulary is sharded.
    chosen = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    best = chosen >= jnp.max(logits, axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1), best


def make_room(
    model: Llama, variables: Variables, state: KVState, due: Bool[Array, "B"] | None = None
) -> KVState:
    """Frees Q slots in the full rows that are `due` (None: in all rows, without a mask)."""
    shrink = _shrinker(model, variables)

    def one(memory: Memory) -> Memory:
        new = shrink(memory)
        new = new if due is None else choose_rows(due, new, memory)
        return jax.tree.map(lambda leaf: constrain(leaf, P(BATCH_AXES, "tensor")), new)

    prefix = jnp.full_like(state.fill, model.kv.prefix)
    fill = prefix if due is None else jnp.where(due, prefix, state.fill)
    return dataclasses.replace(state, layers=tuple(map(one, state.layers)), fill=fill)


def make_room_in_row(
    model: Llama, variables: Variables, state: KVState, row: Int[Array, ""]
) -> KVState:
    """Frees Q slots in one full row, touching no other."""
    shrink = _shrinker(model, variables)

    def one(memory: Memory) -> Memory:
        mine = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0), memory)
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0),
            memory,
            shrink(mine),
        )

    fill = state.fill.at[row].set(model.kv.prefix)
    return dataclasses.replace(state, layers=tuple(map(one, state.layers)), fill=fill)


def _shrinker(model: Llama, variables: Variables) -> Callable[[Memory], Memory]:
    rope, maps = model.rope, variables["maps"]["kv"]
    return lambda memory: model.kv.make_room(memory, rope, maps)


def decode_step(
    model: Llama,
    variables: Variables,
    state: KVState,
    logits: Float[Array, "B V"],
    fill: Int[Array, ""] | None,
    rule: Sampling,
    draw: Draw,
    eos: Int[Array, "E"] | None,
) -> tuple[Int[Array, "B"], Float[Array, "B V"], KVState]:
    """Picks a token a row and reads it; there must be room.

    Args:
      fill: the fill that all running rows share, or None where rows differ.
      eos: end tokens; a row that reads one is frozen: state, logits and token stay. None: none.

    Returns:
      tokens read, logits after them, state.
    """
    tokens = pick(logits, state.seen, rule, draw)
    if eos is None:
        new = tokens[:, None]
        hidden, state = _apply(model, variables, new, state, None, fill, method="extend")
        # Nothing ends here, so that a row which an earlier call froze goes on.
        state = dataclasses.replace(state, end_token=jnp.full_like(state.end_token, -1))
        return tokens, head(model, variables, hidden[:, 0]), state
    running = ~state.ended
    tokens = jnp.where(running, tokens, state.end_token)
    counts = running.astype(jnp.int32)
    hidden, state = _apply(model, variables, tokens[:, None], state, counts, fill, method="extend")
    new_logits = head(model, variables, hidden[:, 0])
    logits = jnp.where(running[:, None], new_logits, logits)
    stops = running & jnp.any(tokens[:, None] == eos[None, :], axis=1)
    end_token = jnp.where(stops, tokens, state.end_token)
    return tokens, logits, dataclasses.replace(state, end_token=end_token)


def common_fill(state: KVState, masked: bool) -> Int[Array, ""]:
    """The fill that the running rows share; `masked` says whether rows can be frozen."""
    if not masked:
        return state.fill[0]
    # Rows that are frozen have an older, smaller or larger fill, which must not count.
    return jnp.max(jnp.where(state.ended, 0, state.fill))


def decode_steps(
    model: Llama,
    variables: Variables,
    state: KVState,
    logits: Float[Array, "B V"],
    draw: Draw,
    eos: Int[Array, "E"] | None,
    rule: Sampling,
    num_steps: int,
    uniform: bool,
) -> tuple[Int[Array, "B n"], Float[Array, "B V"], KVState]:
    """`num_steps` decode steps in one scan, with room for all of them.

    Args:
      uniform: the running rows share one fill, so that a token is one write for the whole batch.
    """
    fill = common_fill(state, eos is not None) if uniform else None

    def step(carry: Any, index: Array) -> tuple[Any, Array]:
        state, logits = carry
        at = None if fill is None else fill + index
        tokens, logits, state = decode_step(model, variables, state, logits, at, rule, draw, eos)
        return (state, logits), tokens

    steps = jnp.arange(num_steps, dtype=jnp.int32)
    (state, logits), tokens = jax.lax.scan(step, (state, logits), steps)
    return tokens.T, logits, state


def head(model: Llama, variables: Variables, hidden: Float[Array, "B E"]) -> Float[Array, "B V"]:
    """Logits of final hidden states."""
    return _apply(model, variables, hidden, method="logits")

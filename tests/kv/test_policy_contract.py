"""What every policy owes the model: those of the registry, and one that needs queries.

The model is driven through its own methods (parallel form, whole chunks, a token at a time).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax.kv import POLICIES, FreqKVConfig, FullConfig, KVPolicy, policy_from_args
from freqkv_jax.kv.choosing import ChoosingPolicy
from freqkv_jax.kv.policy import choose_rows
from freqkv_jax.kv.state import empty_state
from freqkv_jax.model.llama import Llama, maps
from tests.kv.attended_fixture import AttendedPolicy
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import (
    BF16_REL_L2,
    COMPRESS,
    LOGITS,
    assert_close,
    rel_l2,
)

CONFIG = tiny_config(6, 2, num_layers=1)  # the layers are alike: one is quicker to compile
LENGTH = 51
SIZES = {"cache_size": 16, "sink_size": 3, "recent_size": 2, "retain_ratio": 0.4}
SIZES |= {"chunk": 6, "bands": 3, "value_share": 0.3, "window": 4, "pool_size": 3}
REGISTERED = [policy_from_args(name, **SIZES) for name in sorted(POLICIES)]
OTHERS = [
    FreqKVConfig(17, 2, method="fft"),
    FreqKVConfig(13, 3, 0, 0.0),
    AttendedPolicy(20, 2, 3, 9),
]
ALL = REGISTERED + OTHERS
BOUNDED = [kv for kv in ALL if kv.capacity is not None]
OWN_CHUNK_CACHES = [kv for kv in BOUNDED if type(kv).chunk_caches is not KVPolicy.chunk_caches]
BY_ATTENTION = [kv for kv in REGISTERED if kv.needs]
# To compile, or nearly another policy: what other tests imply is slow for them.
DEAR = {kv.name for kv in BY_ATTENTION} | {"freqkv_values", "novelty_true"}


def every(policies, slow=()):
    marked = [pytest.param(kv, marks=[pytest.mark.slow] * (kv.name in slow)) for kv in policies]
    return pytest.mark.parametrize("kv", marked, ids=lambda kv: f"{kv.name}-{kv.capacity}")


class Driver:
    """One policy's compiled programs, and the loop that a caller would write around them."""

    def __init__(self, kv: KVPolicy, dtype: str = "float32") -> None:
        self.kv, self.model, self.traces = kv, Llama(CONFIG, kv, dtype), 0
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params(CONFIG))
        self.variables = {"params": params, "maps": maps(self.model)}
        self._apply, self._extend = jax.jit(self.model.apply), jax.jit(self.extend)
        self._first = jax.jit(lambda v, t, s: self.extend(v, t, s, None, 0))
        self._block, self._make_room = jax.jit(self.block), jax.jit(self.make_room)

    def extend(self, variables, tokens, state, counts=None, fill=None):
        self.traces += 1
        hidden, state = self.model.apply(variables, tokens, state, counts, fill, method="extend")
        return self.model.apply(variables, hidden, method="logits"), state

    def block(self, variables, tokens, state, counts):
        hidden, state = self.model.apply(variables, tokens, state, counts, method="block")
        return self.model.apply(variables, hidden, method="logits"), state

    def make_room(self, variables, state, due):
        layers = tuple(
            choose_rows(due, self.kv.make_room(m, self.model.rope, variables["maps"]["kv"]), m)
            for m in state.layers
        )
        return dataclasses.replace(
            state, layers=layers, fill=jnp.where(due, self.kv.prefix, state.fill)
        )

    def empty(self, batch):
        return empty_state(CONFIG, self.kv, batch, self.model.dtype, LENGTH)

    def parallel(self, tokens):
        return np.asarray(self._apply(self.variables, tokens))

    def step(self, tokens, state, counts=None):
        """One token [B] for each row (that counts take), room made where there is none."""
        if self.kv.capacity is not None:
            due = np.asarray(state.fill) == self.kv.capacity
            due &= True if counts is None else counts > 0
            if due.any():
                state = self._make_room(self.variables, state, due)
        logits, state = self._extend(self.variables, tokens[:, None], state, counts)
        return np.asarray(logits[:, 0]), state

    def stream(self, tokens, state=None):
        """Logits of tokens [B, T], one at a time."""
        state, out = state or self.empty(len(tokens)), []
        for t in range(tokens.shape[1]):
            logits, state = self.step(tokens[:, t], state)
            out.append(logits)
        return np.stack(out, axis=1), state


@functools.cache
def driver(kv, dtype="float32"):
    return Driver(kv, dtype)


@functools.cache
def whole(kv):
    """Tokens [3, LENGTH] and their logits in the parallel form."""
    tokens = random_tokens(CONFIG, 3, LENGTH)
    return tokens, driver(kv).parallel(tokens)


@every(ALL)
def test_the_full_cache_until_capacity_is_reached(kv):
    tokens, logits = whole(kv)
    full = driver(FullConfig()).parallel(tokens)
    size = kv.capacity or LENGTH
    assert_close(logits[:, :size], full[:, :size], LOGITS)
    if kv.capacity is not None:
        assert np.abs(logits[:, size:] - full[:, size:]).max() > 100 * LOGITS


@every(ALL)
def test_a_token_at_a_time_is_the_parallel_form(kv):
    tokens, want = whole(kv)
    this, state = driver(kv), driver(kv).empty(3)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    this.traces = 0
    for t in range(LENGTH):
        logits, state = this.step(tokens[:, t], state)
        assert_close(logits, want[:, t], LOGITS)
        assert state.fill.tolist() == [kv.fill_after(t + 1)] * 3
        assert state.seen.tolist() == [t + 1] * 3
        assert kv.capacity is None or state.fill.max() <= kv.capacity
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert this.traces <= 1, "decoding was traced again"


@every(BOUNDED)
def test_whole_chunks_behind_a_full_cache_are_the_parallel_form(kv):
    tokens, want = whole(kv)
    this, size, chunk = driver(kv), kv.capacity, kv.chunk
    logits, state = this._first(this.variables, tokens[:, :size], this.empty(3))
    assert_close(logits, want[:, :size], LOGITS)
    assert state.fill.tolist() == [size] * 3
    before = state
    # Row 0 takes all that is left, row 1 one chunk (or less), row 2 nothing.
    rest = LENGTH - size
    counts = np.array([rest, min(chunk, rest - 1), 0], np.int32)
    padded = np.zeros((3, -(-rest // chunk) * chunk), np.int32)
    padded[:, :rest] = tokens[:, size:]
    logits, state = this._block(this.variables, padded, state, counts)
    for row, count in enumerate(counts):
        assert_close(logits[row, :count], want[row, size : size + count], LOGITS)
    assert state.fill.tolist() == [kv.fill_after(size + count) for count in counts.tolist()]
    assert state.seen.tolist() == (size + counts).tolist()
    for new, old in zip(jax.tree.leaves(state.layers), jax.tree.leaves(before.layers), strict=True):
        np.testing.assert_array_equal(new[2], old[2])
    # Rows of different fill go on, each with its own tokens.
    for step in range(4):
        at = size + counts + step
        more = np.where(at < LENGTH, 1, 0).astype(np.int32)
        logits, state = this.step(tokens[np.arange(3), np.minimum(at, LENGTH - 1)], state, more)
        for row in np.flatnonzero(more):
            assert_close(logits[row], want[row, at[row]], LOGITS)


@every(ALL, slow=DEAR)
def test_prefixes_give_the_logits_of_the_whole(kv):
    tokens, want = whole(kv)
    size = kv.capacity or 16
    for length in (size + 1, LENGTH - 1):
        assert_close(driver(kv).parallel(tokens[:, :length]), want[:, :length], LOGITS)


@every(ALL)
def test_rows_are_independent(kv):
    tokens, want = whole(kv)
    other = tokens.copy()
    other[1:] = random_tokens(CONFIG, 2, LENGTH, seed=5)
    assert_close(driver(kv).parallel(other)[0], want[0], LOGITS)


@every(ALL)
def test_a_frozen_row_keeps_its_memory(kv):
    this = driver(kv)
    tokens = random_tokens(CONFIG, 3, kv.capacity or 9)
    _, state = this._first(this.variables, tokens, this.empty(3))
    counts = np.array([0, 1, 0], np.int32)
    _, after = this.step(tokens[:, 0], state, counts)
    for new, old in zip(jax.tree.leaves(after.layers), jax.tree.leaves(state.layers), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[[0, 2]], np.asarray(old)[[0, 2]])
    assert (after.seen - state.seen).tolist() == [0, 1, 0]
    assert after.fill.tolist()[::2] == state.fill.tolist()[::2]


def layer_inputs(kv, chunks=3, dtype="float32"):
    """A full memory of one layer, and k, v, queries of some chunks, not rotated."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    rope = driver(kv).model.rope
    seen = jnp.full((3,), kv.capacity, jnp.int32)
    at = jnp.arange(kv.capacity, dtype=jnp.int32)
    at = kv.position(at, at)
    k, v, q = (normal(3, kv.capacity, heads, 8) for heads in (2, 2, 6))
    k, q = rope.rotate_tokens(k, at), rope.rotate_tokens(q, at)
    queries = q if kv.needs else None
    memory = kv.append(kv.init(3, 2, 8, jnp.dtype(dtype)), k, v, 0, queries=queries)
    k, v, q = (normal(3, chunks, kv.chunk, heads, 8) for heads in (2, 2, 6))
    return memory, k, v, seen, q if kv.needs else None


@every(OWN_CHUNK_CACHES)
@pytest.mark.parametrize("more", [None, 0, 1], ids=["all", "whole-chunks", "a-token-more"])
def test_chunk_caches_are_make_room_and_append_in_turn(kv, more):
    memory, k, v, seen, queries = layer_inputs(kv)
    counts = None
    if more is not None:
        counts = jnp.array([2 * kv.chunk + more, kv.chunk - more, 0], jnp.int32)
    rest = (counts, driver(kv).model.rope, driver(kv).variables["maps"]["kv"], seen, queries)
    got = kv.chunk_caches(memory, k, v, *rest)
    want = KVPolicy.chunk_caches(kv, memory, k, v, *rest)
    taken = np.full(3, 3 * kv.chunk) if counts is None else np.asarray(counts)
    for row, count in enumerate(taken):
        for chunk in range(-(-count // kv.chunk)):
            for ours, theirs in ((got.k, want.k), (got.v, want.v)):
                assert ours.shape[2] == kv.prefix
                assert_close(ours[row, chunk], theirs[row, chunk], COMPRESS)
        fill = kv.fill_after(kv.capacity + count)
        for ours, theirs in zip(kv.view(got.memory), kv.view(want.memory), strict=True):
            assert_close(ours[row, :, :fill], theirs[row, :, :fill], COMPRESS)
    assert jax.tree.structure(got.memory) == jax.tree.structure(memory)


@every([kv for kv in BOUNDED if type(kv).caches_and_next is not KVPolicy.caches_and_next])
@pytest.mark.parametrize("chunks", [0, 2])
def test_the_next_cache_is_make_room_behind_the_chunks(kv, chunks):
    memory, k, v, seen, queries = layer_inputs(kv, chunks=3)
    k, v = k[:, :chunks], v[:, :chunks]
    queries = None if queries is None else queries[:, :chunks]
    rope, maps = driver(kv).model.rope, driver(kv).variables["maps"]["kv"]
    caches, ahead = kv.caches_and_next(memory, k, v, rope, maps, seen, queries)
    assert (caches is None) == (chunks == 0)
    if chunks:
        want = kv.chunk_caches(memory, k, v, None, rope, maps, seen, queries)
        for ours, theirs in zip(caches, want[:2], strict=True):
            assert_close(ours, theirs, COMPRESS)
        memory = want.memory
    room = kv.view(kv.make_room(memory, rope, maps))
    for ours, theirs in zip(ahead, room, strict=True):
        theirs = jnp.swapaxes(theirs[:, :, : kv.prefix], 1, 2)[:, None]
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, COMPRESS)


@every(BOUNDED, slow=DEAR)
def test_jit_equals_eager(kv):
    memory, k, v, _, queries = layer_inputs(kv)
    rope, arrays = driver(kv).model.rope, driver(kv).variables["maps"]["kv"]

    def functions(memory, k, v, queries):
        room = kv.make_room(memory, rope, arrays)
        first = None if queries is None else queries[:, 0]
        return room, kv.append(room, k[:, 0], v[:, 0], kv.prefix, None, first)

    eager = functions(memory, k, v, queries)
    jitted = jax.jit(functions)(memory, k, v, queries)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for got, want in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, COMPRESS)


@every(BOUNDED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_making_room_keeps_the_sinks_and_the_shape(kv, dtype):
    memory, *_ = layer_inputs(kv, dtype=dtype)
    room = kv.make_room(memory, driver(kv).model.rope, driver(kv).variables["maps"]["kv"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), room) == jax.tree.map(
        lambda x: (x.shape, x.dtype), memory
    )
    (k_old, v_old), (k, v) = kv.view(memory), kv.view(room)
    sinks = kv.sink_size
    np.testing.assert_array_equal(v[:, :, :sinks], v_old[:, :, :sinks])
    np.testing.assert_array_equal(k[:, :, :sinks], k_old[:, :, :sinks])
    assert not np.allclose(v[:, :, sinks : kv.prefix], v_old[:, :, sinks : kv.prefix]) or (
        kv.prefix == sinks
    )


@every([kv for kv in OTHERS if kv.sink_size] + BY_ATTENTION, slow=DEAR)
def test_gradients_reach_the_first_tokens_through_every_round(kv):
    this = driver(kv)
    tokens = np.arange(kv.capacity + 2 * kv.chunk + 1, dtype=np.int32)[None] % CONFIG.vocab_size

    def last_logit(embedding):
        params = this.variables["params"] | {"embed": {"embedding": embedding}}
        return this.model.apply(this.variables | {"params": params}, tokens)[0, -1, 0]

    embedding = this.variables["params"]["embed"]["embedding"]
    grad = np.asarray(jax.jit(jax.grad(last_logit))(embedding))
    assert np.isfinite(grad).all()
    assert np.abs(grad[0]).max() > 1e-4, "the first token has no gradient"


@every([OTHERS[-1], *BY_ATTENTION], slow=DEAR)
def test_choosing_policies_through_the_public_functions(kv):
    tokens, want = whole(kv)
    this, lengths = driver(kv), [LENGTH, kv.capacity + 1, 5]
    params = this.variables["params"]
    logits, state = fk.prefill(this.model, params, tokens, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_close(logits[row], want[row, length - 1], LOGITS)
    assert state.fill.tolist() == [kv.fill_after(length) for length in lengths]
    picked, last, state = fk.decode(this.model, params, state, logits, 2 * kv.chunk)
    # One batch of texts, padded behind their ends, which causal logits do not see.
    text = np.zeros((3, LENGTH + 2 * kv.chunk), np.int32)
    for row, length in enumerate(lengths):
        text[row, : length + 2 * kv.chunk] = [*tokens[row, :length], *np.asarray(picked[row])]
    whole_logits = this.parallel(text)
    for row, length in enumerate(lengths):
        end = length + 2 * kv.chunk
        assert_close(last[row], whole_logits[row, end - 1], LOGITS)
        assert picked[row].tolist() == whole_logits[row, length - 1 : end - 1].argmax(-1).tolist()


@every(REGISTERED)
def test_bfloat16_is_near_float32(kv):
    tokens, want = whole(kv)
    this = driver(kv, "bfloat16")
    got = this.parallel(tokens)
    assert got.dtype == np.float32
    if isinstance(kv, ChoosingPolicy):
        # Rounding decides between keys that float32 sees as equal; both forms must decide alike.
        size = kv.capacity
        assert rel_l2(got[:, :size], want[:, :size]) <= BF16_REL_L2
        want = got
    assert rel_l2(got, want) <= BF16_REL_L2
    streamed, state = this.stream(tokens)
    assert rel_l2(streamed, want) <= BF16_REL_L2
    # Scores and counters, which are small, have a dtype of their own.
    assert {x.dtype.name for x in jax.tree.leaves(state.layers) if x.ndim == 4} == {"bfloat16"}

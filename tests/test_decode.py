"""Prefill and decode on tiny models: however a text is cut into calls, it is the same text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import programs
from freqkv_jax.decode import SCAN_LENGTHS
from freqkv_jax.reading import compiled
from tests import oracle
from tests.tiny import parallel_logits, random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, assert_close

# Odd and even spans, R > 0, L = 0, a window, no bound; chunks of 6, 6, 12, 5 and 1.
POLICIES = [
    fk.FreqKVConfig(16, 4),
    fk.FreqKVConfig(17, 3, 2, 0.5, method="fft"),
    fk.FreqKVConfig(12, 0, 0, 0.0),
    fk.SinkWindowConfig(15, 2, 3, 0.5),
    fk.FreqKVConfig(9, 8),
    fk.FullConfig(),
]
N, P = 16, 10  # of the first


@functools.cache
def setup(kv=POLICIES[0], rows=2, length=70, heads=(6, 2)):
    """model, params, tokens and the parallel form's logits [B, T, V]."""
    config = tiny_config(*heads)
    model, params = fk.Llama(config, kv), random_params(config)
    tokens = random_tokens(config, rows, length)
    return model, params, tokens, parallel_logits(model, params, tokens)


def one_at_a_time(model, params, tokens, state=None):
    """Logits [B, T, V] by prefilling one token after the other."""
    out = []
    for t in range(tokens.shape[1]):
        logits, state = fk.prefill(model, params, tokens[:, t : t + 1], state=state)
        out.append(logits)
    return np.stack(out, axis=1), state


def same_state(a, b, atol=LOGITS):
    assert a.fill.tolist() == b.fill.tolist() and a.seen.tolist() == b.seen.tolist()
    for layer in range(len(a.layers)):
        for x, y in zip(map(np.asarray, a.kv(layer)), map(np.asarray, b.kv(layer)), strict=True):
            for row, fill in enumerate(a.fill.tolist()):
                assert_close(x[row, :, :fill], y[row, :, :fill], atol)


@pytest.mark.parametrize(
    "kv",
    [*POLICIES[:4], *(pytest.param(kv, marks=pytest.mark.slow) for kv in POLICIES[4:])],
    ids=str,
)
def test_all_forms_agree(kv):
    model, params, tokens, want = setup(kv)
    stepwise, slow = one_at_a_time(model, params, tokens)
    assert_close(stepwise, want, LOGITS)
    # Blocks shorter than a chunk and longer than one; one policy is enough for these.
    for block_len in (None, 5, 13) if kv == POLICIES[0] else (None,):
        logits, state = fk.prefill(model, params, tokens, block_len=block_len)
        assert_close(logits, want[:, -1], LOGITS)
        same_state(state, slow)
        assert state.seen.tolist() == [70, 70]
        if kv.capacity is not None:
            assert state.fill.tolist() == [kv.fill_after(70)] * 2
            assert state.slots == kv.capacity


@pytest.mark.parametrize(
    "kv", [POLICIES[0], pytest.param(POLICIES[3], marks=pytest.mark.slow), POLICIES[5]], ids=str
)
def test_a_continued_state_is_one_reading(kv):
    model, params, tokens, want = setup(kv)
    for cut in (1, 11, 16, 17, 40):
        first, state = fk.prefill(model, params, tokens[:, :cut])
        assert_close(first, want[:, cut - 1], LOGITS)
        logits, _ = fk.prefill(model, params, tokens[:, cut:], state=state)
        assert_close(logits, want[:, -1], LOGITS)
        # The given state is still there to be continued otherwise.
        again, _ = fk.prefill(model, params, tokens[:, cut : cut + 5], state=state)
        assert_close(again, want[:, cut + 4], LOGITS)


@pytest.mark.parametrize("length", [1, N - 1, N, N + 1, P, N + 6, N + 7])
def test_prompt_lengths(length):
    model, params, tokens, want = setup()
    logits, state = fk.prefill(model, params, tokens[:, :length])
    assert_close(logits, want[:, length - 1], LOGITS)
    new, after, state = fk.decode(model, params, state, logits, 12)
    text = np.concatenate([tokens[:, :length], new], axis=1)
    whole = parallel_logits(model, params, text)
    assert_close(after, whole[:, -1], LOGITS)
    assert new.tolist() == np.argmax(whole[:, length - 1 : -1], axis=-1).tolist()


def test_greedy_decode_follows_the_oracle():
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens[:1, :5])
    new, _, state = fk.decode(model, params, state, logits, 40)
    reader = oracle.Oracle(model.config, params, oracle.from_policy(model.kv))
    scores = reader.read(tokens[0, :5])[-1]
    for token in new[0].tolist():
        assert token == int(np.argmax(scores))
        scores = reader.step(token)
    assert reader.fill == int(state.fill[0]) and reader.num_compressions == 5


@pytest.mark.parametrize(
    "kv",
    [POLICIES[1], *(pytest.param(POLICIES[i], marks=pytest.mark.slow) for i in (3, 5))],
    ids=str,
)
def test_rows_of_different_lengths(kv):
    model, params, tokens, want = setup(kv, rows=4)
    lengths = [1, 16, 37, 70]
    junk = np.where(np.arange(70)[None] < np.array(lengths)[:, None], tokens, -7)
    logits, state = fk.prefill(model, params, junk, lengths)
    for row, n in enumerate(lengths):
        assert_close(logits[row], want[row, n - 1], LOGITS)
    new, after, state = fk.decode(model, params, state, logits, 13)
    for row, n in enumerate(lengths):
        alone, mine = fk.prefill(model, params, tokens[row : row + 1, :n])
        tokens_alone, after_alone, mine = fk.decode(model, params, mine, alone, 13)
        assert new[row].tolist() == tokens_alone[0].tolist()
        assert_close(after[row], after_alone[0], LOGITS)
        assert int(state.fill[row]) == int(mine.fill[0])
    more, _ = fk.prefill(model, params, tokens[:, :20], [20, 3, 1, 9], state=state)
    for row, (n, m) in enumerate(zip(lengths, [20, 3, 1, 9], strict=True)):
        text = np.concatenate([tokens[row, :n], new[row], tokens[row, :m]])[None]
        assert_close(more[row], parallel_logits(model, params, text)[0, -1], LOGITS)


def test_decode_is_the_same_in_pieces():
    model, params, tokens, _ = setup()
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "key": jax.random.key(1)}
    for kwargs in ({}, options):
        logits, state = fk.prefill(model, params, tokens[:, :9])
        whole, last, _ = fk.decode(model, params, state, logits, 33, **kwargs)
        logits, state = fk.prefill(model, params, tokens[:, :9])
        parts = []
        for n in (1, 0, 20, 12):
            part, logits, state = fk.decode(model, params, state, logits, n, **kwargs)
            assert part.shape == (2, n) and part.dtype == jnp.int32
            parts.append(part)
        assert np.concatenate(parts, axis=1).tolist() == whole.tolist()
        assert_close(logits, last, LOGITS)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_row_freezes_at_an_end_token(ragged):
    model, params, tokens, _ = setup(rows=3)
    lengths = [9, 14, 12] if ragged else [9, 9, 9]
    logits, state = fk.prefill(model, params, tokens[:, :14], lengths)
    first = logits
    free, _, _ = fk.decode(model, params, state, logits, 30)
    eos = [int(free[0, 3]), int(free[1, 9])]
    stops = [next((t for t in range(30) if free[row, t] in eos), None) for row in range(3)]
    assert stops[0] is not None and stops[0] != stops[1]
    logits, state = fk.prefill(model, params, tokens[:, :14], lengths)
    new, after, state = fk.decode(model, params, state, logits, 30, eos_id=eos)
    for row, stop in enumerate(stops):
        read = 30 if stop is None else stop + 1
        assert new[row, :read].tolist() == free[row, :read].tolist()
        assert set(new[row, read:].tolist()) <= {int(free[row, read - 1])}
        assert int(state.seen[row]) == lengths[row] + read
        assert bool(state.ended[row]) == (stop is not None)
        text = np.concatenate([tokens[row, : lengths[row]], new[row, :read]])[None]
        assert_close(after[row], parallel_logits(model, params, text)[0, -1], LOGITS)
    # In pieces it is the same, repeated end tokens included.
    logits, state2 = fk.prefill(model, params, tokens[:, :14], lengths)
    a, logits, state2 = fk.decode(model, params, state2, logits, 10, eos_id=eos)
    b, logits, state2 = fk.decode(model, params, state2, logits, 20, eos_id=eos)
    assert np.concatenate([a, b], axis=1).tolist() == new.tolist()
    same_state(state, state2)
    # Without end tokens a frozen row goes on as if it had never stopped.
    if not ragged:
        _, kept = fk.prefill(model, params, tokens[:, :14], lengths)
        _, mid, kept = fk.decode(model, params, kept, first, 4, eos_id=eos[:1])
        assert kept.ended.tolist() == [True, False, False]
        on, _, kept = fk.decode(model, params, kept, mid, 5)
        assert on[0].tolist() == free[0, 4:9].tolist() and not kept.ended.any()
    # A new turn wakes a frozen row.
    turn = tokens[:, 20:26]
    logits, state = fk.prefill(model, params, turn, state=state)
    assert not state.ended.any()
    for row, stop in enumerate(stops):
        read = 30 if stop is None else stop + 1
        text = np.concatenate([tokens[row, : lengths[row]], new[row, :read], turn[row]])[None]
        assert_close(logits[row], parallel_logits(model, params, text)[0, -1], LOGITS)


def test_a_full_frozen_row_is_not_written_to():
    model, params, tokens, _ = setup(rows=2)
    logits, state = fk.prefill(model, params, tokens[:, :N])  # fill = N
    end = int(np.argmax(logits[0]))
    state = dataclasses.replace(state, end_token=jnp.array([end, -1], jnp.int32))
    before = [np.asarray(x[0]) for x in jax.tree.leaves(state.layers)]
    new, after, state = fk.decode(model, params, state, logits, 20, eos_id=[end, 60])
    assert new[0].tolist() == [end] * 20 and int(state.fill[0]) == N
    for x, y in zip(before, jax.tree.leaves(state.layers), strict=True):
        np.testing.assert_array_equal(x, y[0])
    assert_close(after[0], logits[0], 0)


def test_the_program_count_is_small_and_the_same_for_ragged_batches():
    model, params, tokens, _ = setup(fk.FreqKVConfig(64, 4), rows=3, length=30)
    programs_run = 0
    for lengths in ([30, 30, 30], [3, 30, 11]):
        logits, state = fk.prefill(model, params, tokens, lengths)
        compiled.cache_clear()
        jax.clear_caches()
        seen = []
        with jax.log_compiles(False):
            jax.monitoring.register_event_duration_secs_listener(
                lambda name, _seconds, seen=seen, **_: seen.append(name)
            )
            try:
                fk.decode(model, params, state, logits, 5000)
            finally:
                jax.monitoring.clear_event_listeners()
        programs_run = sum(name.endswith("backend_compile_duration") for name in seen)
        # All scan lengths, and one way to make room.
        assert programs_run == len(SCAN_LENGTHS) + 1 <= 12


def test_buffers_are_updated_in_place():
    model, params, tokens, _ = setup(fk.FreqKVConfig(64, 4))
    logits, state = fk.prefill(model, params, tokens)
    size = state.nbytes
    variables = {"params": params, "maps": fk.maps(model)}
    from freqkv_jax.sampling import sampling

    rule, draw = sampling(0.0, None, None, None, 2)
    step = compiled(programs.decode_steps, None, model.kv).lower(
        model, variables, state, logits, draw, None, rule=rule, num_steps=8, uniform=True
    )
    assert step.compile().memory_analysis().alias_size_in_bytes >= size
    room = compiled(programs.make_room, None, model.kv).lower(model, variables, state)
    assert room.compile().memory_analysis().alias_size_in_bytes >= size
    row = compiled(programs.make_room_in_row, None, model.kv).lower(
        model, variables, state, np.int32(1)
    )
    assert row.compile().memory_analysis().alias_size_in_bytes >= size
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.layers)}
    _, _, after = fk.decode(model, params, state, logits, 100)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.layers))
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(after.layers)} == pointers


def test_equal_models_share_programs():
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens)
    fk.decode(model, params, state, logits, 8)
    program = compiled(programs.decode_steps, None, model.kv)
    size = program._cache_size()
    twin = fk.Llama(tiny_config(6, 2), fk.FreqKVConfig(16, 4))
    assert twin == model and hash(twin) == hash(model)
    logits, state = fk.prefill(twin, params, tokens)
    fk.decode(twin, params, state, logits, 8)
    assert compiled(programs.decode_steps, None, twin.kv) is program
    assert program._cache_size() == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 0), int)}, r"a row and a token at least, got \[2, 0\]"),
        ({"tokens": np.zeros((0, 4), int)}, r"got \[0, 4\]"),
        ({"tokens": np.zeros(4, int)}, r"integers \[B, T\], got int64 of shape \(4,\)"),
        ({"tokens": np.zeros((2, 4))}, "got float64"),
        ({"tokens": [[1, 2], [3]]}, "got rows of different lengths; pad on the right and"),
        ({"tokens": np.full((2, 4), 61)}, r"token id 61 is outside the vocabulary \(0 to 60\)"),
        ({"tokens": np.full((2, 4), -1)}, "token id -1 is outside"),
        ({"lengths": [1]}, r"one whole number a row \(2\)"),
        ({"lengths": [0, 3]}, r"lengths must be 1 to 4 \(T\), got \[0, 3\]"),
        ({"lengths": [5, 3]}, "lengths must be 1 to 4"),
        ({"block_len": 0}, "block_len must be at least 1"),
    ],
)
@pytest.mark.parametrize("function", [fk.prefill, fk.score])
def test_bad_input(function, change, message):
    model, params, _, _ = setup()
    with pytest.raises(ValueError, match=message):
        function(model, params, **({"tokens": np.zeros((2, 4), int)} | change))


def test_a_state_of_another_policy_or_batch_is_refused():
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens)
    other = model.clone(kv=fk.SinkWindowConfig(16, 4))
    with pytest.raises(ValueError, match="the state belongs to policy FreqKVConfig"):
        fk.prefill(other, params, tokens, state=state)
    with pytest.raises(ValueError, match="the state holds 2 rows, the call has 1"):
        fk.prefill(model, params, tokens[:1], state=state)
    with pytest.raises(ValueError, match="num_steps must be a whole number"):
        fk.decode(model, params, state, logits, -1)
    for ids in ([3, 61], [[3, 4]], 3.0, "a"):
        with pytest.raises(
            ValueError, match="eos_id must be token ids from 0 to 60, one or a list"
        ):
            fk.decode(model, params, state, logits, 1, eos_id=ids)


def test_drivers_refuse_to_be_traced():
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens)
    with pytest.raises(TypeError, match="use fk.decode_scan"):
        jax.jit(lambda p: fk.prefill(model, p, tokens))(params)
    with pytest.raises(TypeError, match="use fk.decode_scan"):
        jax.jit(lambda s, x: fk.decode(model, params, s, x, 3))(state, logits)
    with pytest.raises(TypeError, match="use fk.decode_scan"):
        jax.grad(lambda p: fk.score(model, p, tokens).sum())(params)

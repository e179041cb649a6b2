"""decode_scan: what decode gives, as one program; and what both refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import freqkv_jax as fk
from freqkv_jax.reading import placed_maps
from tests.test_decode import POLICIES, same_state, setup
from tests.tolerances import LOGITS, assert_close

SCANNED = [
    *((POLICIES[i], 29) for i in (0, 5)),
    (POLICIES[0], 1),
    *(pytest.param(POLICIES[i], 29, marks=pytest.mark.slow) for i in (1, 2, 3, 4)),
]


@pytest.mark.parametrize(("kv", "steps"), SCANNED)
def test_decode_scan(kv, steps):
    model, params, tokens, _ = setup(kv)
    options = {"temperature": 0.8, "key": jax.random.key(2)}
    for length, kwargs in ((13, {}), (16, options)):
        logits, state = fk.prefill(model, params, tokens[:, :length])
        unknown = jax.jit(
            lambda p, m, s, x, kwargs=kwargs: fk.decode_scan(
                model, p, s, x, steps, maps=m, **kwargs
            )
        )(params, fk.maps(model), state, logits)
        known = fk.decode_scan(model, params, state, logits, steps, **kwargs)
        tokens_want, logits_want, state_want = fk.decode(
            model, params, state, logits, steps, **kwargs
        )
        for new, after, end in (unknown, known):
            assert new.tolist() == tokens_want.tolist()
            assert_close(after, logits_want, LOGITS)
            same_state(end, state_want)


def test_decode_scan_freezes_rows():
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens[:, :9])
    free, _, _ = fk.decode(model, params, state, logits, 30)
    eos = int(free[0, 4])
    logits, state = fk.prefill(model, params, tokens[:, :9])
    run = jax.jit(lambda p, s, x: fk.decode_scan(model, p, s, x, 30, eos_id=eos))
    new, after, end = run(params, state, logits)
    known, _, _ = fk.decode_scan(model, params, state, logits, 30, eos_id=eos)
    want, after_want, end_want = fk.decode(model, params, state, logits, 30, eos_id=eos)
    assert new.tolist() == want.tolist() == known.tolist()
    assert_close(after, after_want, LOGITS)
    same_state(end, end_want)


def test_what_is_first_called_under_jit_leaves_no_tracer():
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens[:, :9])
    placed_maps.cache_clear()
    new = jax.jit(lambda x: fk.decode_scan(model, params, state, x, 20)[0])(logits)
    again, state = fk.prefill(model, params, tokens[:, :9])
    assert fk.decode(model, params, state, again, 20)[0].tolist() == new.tolist()


def test_decode_scan_refuses():
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens, [3, 9])
    with pytest.raises(ValueError, match=r"rows of equal fill, got \[3, 9\]"):
        fk.decode_scan(model, params, state, logits, 4)
    full = model.clone(kv=fk.FullConfig())
    logits, state = fk.prefill(full, params, tokens)
    with pytest.raises(ValueError, match="256 slots, too few"):
        fk.decode_scan(full, params, state, logits, 200)


def decode_scan_jitted(model, params, state, logits, num_steps):
    return jax.jit(lambda s, x: fk.decode_scan(model, params, s, x, num_steps))(state, logits)


def shows_wrong_use(result):
    tokens, logits, _ = result
    return bool(jnp.isnan(logits).all()) and set(tokens.ravel().tolist()) == {-1}


def shows_none(result):
    tokens, logits, _ = result
    return bool(jnp.isfinite(logits).all()) and int(tokens.min()) >= 0


@pytest.mark.parametrize("kv", [POLICIES[0], POLICIES[5]], ids=str)
def test_decode_scan_shows_rows_of_different_fill_under_jit(kv):
    model, params, tokens, _ = setup(kv)
    logits, state = fk.prefill(model, params, tokens, [3, 9])
    run = jax.jit(
        lambda s, x, eos: fk.decode_scan(model, params, s, x, 4, eos_id=eos), static_argnums=2
    )
    assert shows_wrong_use(run(state, logits, None))
    assert shows_wrong_use(run(state, logits, 60))
    # A frozen row's fill does not count.
    frozen = dataclasses.replace(state, end_token=jnp.array([60, -1], jnp.int32))
    new, after, end = run(frozen, logits, 60)
    want, after_want, end_want = fk.decode(model, params, frozen, logits, 4, eos_id=60)
    assert new.tolist() == want.tolist()
    assert_close(after, after_want, LOGITS)
    same_state(end, end_want)


def test_decode_scan_shows_a_full_cache_without_room_under_jit():
    model, params, tokens, _ = setup(POLICIES[5])
    logits, state = fk.prefill(model, params, tokens)  # 70 of 256 slots
    assert shows_none(decode_scan_jitted(model, params, state, logits, 186))
    assert shows_wrong_use(decode_scan_jitted(model, params, state, logits, 187))


@pytest.mark.parametrize("function", [fk.decode_scan, decode_scan_jitted, fk.decode])
def test_no_steps(function):
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens)
    new, after, end = function(model, params, state, logits, 0)
    assert new.shape == (2, 0) and new.dtype == jnp.int32
    assert_close(after, logits, 0)
    same_state(end, state, 0)


@pytest.mark.parametrize("function", [fk.decode, fk.decode_scan, decode_scan_jitted])
def test_what_does_not_belong_to_the_model_is_refused(function):
    model, params, tokens, _ = setup()
    logits, state = fk.prefill(model, params, tokens)
    layers = state.layers
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), layers)
    fewer = jax.tree.map(lambda x: x[:, :1], layers)
    counted = tuple((*memory, state.fill) for memory in layers)
    for changes, message in [
        ({"policy": fk.SinkWindowConfig(16, 4)}, "the state belongs to policy SinkWindowConfig"),
        ({"layers": layers[:1]}, "the state has 1 layers, the model 2; it belongs to another"),
        ({"layers": fewer}, r"layers/0/k is float32 \[2, 1, 16, 8\], the model's float32 \[2, 2"),
        ({"layers": halves}, "layers/0/k is bfloat16 .*, the model's float32 .*model or dtype"),
        ({"layers": counted}, "the state's arrays are layers/0/0, .* the model's layers/0/k"),
        ({"seen": state.seen[:1]}, r"seen is int32 \[1\], the model's int32 \[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(model, params, dataclasses.replace(state, **changes), logits, 3)
    for wrong in (logits[:1], logits[:, :-1], logits[:, None]):
        with pytest.raises(ValueError, match=r"logits must be \[B, V\] = \[2, 61\], got \["):
            function(model, params, state, wrong, 3)

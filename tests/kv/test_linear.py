"""The recurrence of linear policies: written in one piece, against make_room and append in turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

from freqkv_jax import folding, spectral
from freqkv_jax.kv import (
    FreqKVConfig,
    FreqKVValuesConfig,
    KVPolicy,
    PairAverageConfig,
    SinkWindowConfig,
    linear,
    policy_from_dict,
    policy_to_dict,
)
from freqkv_jax.rope import Rope
from tests import oracle
from tests.tiny import tiny_config
from tests.tolerances import BF16_PRIMITIVE_REL_L2, COMPRESS, GRAD_REL_L2, assert_close, rel_l2

ROPE = Rope(tiny_config(2, 2).rope, 8)
POLICIES = [
    FreqKVConfig(20, 4),  # L = Q: parts are the halves that the map folds, L even
    FreqKVConfig(18, 4),  # and odd
    FreqKVConfig(19, 4),  # span odd
    FreqKVConfig(17, 3, 0, 0.7),  # L > Q
    FreqKVConfig(17, 3, 2, 0.3),  # recents, L < Q
    FreqKVConfig(16, 1, 9, 0.5),  # more recents than tokens of a chunk
    FreqKVConfig(13, 3, 0, 0.0),  # nothing mapped
    FreqKVConfig(20, 0),
    FreqKVConfig(18, 4, method="fft"),
    SinkWindowConfig(16, 3),
    SinkWindowConfig(16, 3, 2, 0.8),  # the window is longer than a chunk
    PairAverageConfig(20, 4),
    PairAverageConfig(18, 4, 3),  # span odd
]
every = pytest.mark.parametrize("kv", POLICIES, ids=str)


def inputs(kv, chunks, dtype="float32", batch=2):
    """A full memory, k and v [B, C, Q, K, D] of its chunks, tokens read before."""
    rng = np.random.default_rng(chunks)
    shapes = [(batch, kv.capacity, 2, 8)] * 2 + [(batch, chunks, kv.chunk, 2, 8)] * 2
    k, v, *new = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    k = ROPE.rotate_tokens(k, jnp.arange(kv.capacity))
    memory = kv.append(kv.init(batch, 2, 8, jnp.dtype(dtype)), k, v, 0)
    return memory, *new, jnp.full((batch,), kv.capacity, jnp.int32)


def arrays(kv):
    return {name: jnp.asarray(array) for name, array in kv.constants().items()}


def caches(form, kv, maps, memory, k, v, seen):
    return form(kv, memory, k, v, None, ROPE, maps, seen)


@functools.cache
def both(kv, unrolled):
    """The written-out form (rounds in a loop where `unrolled` is small) and the obvious one."""
    del unrolled  # the form is traced anew for each
    fast = jax.jit(functools.partial(caches, type(kv).chunk_caches, kv))
    return fast, jax.jit(functools.partial(caches, KVPolicy.chunk_caches, kv))


@every
@pytest.mark.parametrize("unrolled", [16, 2], ids=["unrolled", "loop"])
def test_caches_are_make_room_and_append_in_turn(kv, unrolled, monkeypatch):
    monkeypatch.setattr(linear, "UNROLLED", unrolled)
    fast, obvious = both(kv, unrolled)
    args = arrays(kv), *inputs(kv, 4)
    for got, want in zip(
        jax.tree.leaves(fast(*args)), jax.tree.leaves(obvious(*args)), strict=True
    ):
        assert got.dtype == want.dtype
        assert_close(got, want, COMPRESS)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Programs take the forms that are for NVIDIA; what they are made of, every platform has."""

    def chosen(*args, cuda, default):
        return cuda(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)


@pytest.mark.parametrize("unrolled", [16, 2], ids=["unrolled", "loop"])
@pytest.mark.parametrize("kv", [POLICIES[i] for i in (0, 1, 4, 7)], ids=str)
def test_forms_for_nvidia_change_nothing(kv, unrolled, monkeypatch, as_on_cuda):
    """Neither caches nor their gradients, which are those of the plain forms."""
    monkeypatch.setattr(linear, "UNROLLED", unrolled)
    memory, k, v, seen = inputs(kv, 4)

    def run(form, memory, k, v):
        got = caches(form, kv, arrays(kv), memory, k, v, seen)
        return (got.k**2).sum() + (got.v**2).sum(), got

    results = [
        jax.jit(jax.value_and_grad(functools.partial(run, form), (0, 1, 2), has_aux=True))(
            memory, k, v
        )
        for form in (type(kv).chunk_caches, KVPolicy.chunk_caches)
    ]
    for got, want in zip(*(jax.tree.leaves(found[0][1]) for found in results), strict=True):
        assert_close(got, want, COMPRESS)
    for got, want in zip(*(jax.tree.leaves(found[1]) for found in results), strict=True):
        assert rel_l2(got, want) <= GRAD_REL_L2


def test_forms_for_nvidia_are_free_of_joins(as_on_cuda):
    """Joins and pads along the slots are branches in XLA's kernels for GPUs."""
    kv, chunks = FreqKVConfig(20, 4), 3
    args = arrays(kv), *inputs(kv, chunks)

    def seen_by_attention(*args):
        got = caches(type(kv).chunk_caches, kv, *args)
        return got.k, got.v

    made = jax.make_jaxpr(seen_by_attention)(*args)
    text = str(pe.dce_jaxpr(made.jaxpr, [True, True])[0])
    # One join is of the halves of a head, where keys of the memory are turned back.
    assert text.count("= concatenate[") == 1 and "= pad[" not in text


@pytest.mark.parametrize(
    ("kv", "unrolled"),
    [
        *((POLICIES[i], 16) for i in (0, 4)),
        (POLICIES[2], 2),
        *(pytest.param(kv, n, marks=pytest.mark.slow) for kv in POLICIES for n in (16, 2)),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_obvious_form(kv, unrolled, monkeypatch):
    monkeypatch.setattr(linear, "UNROLLED", unrolled)
    memory, k, v, seen = inputs(kv, 4)
    rng = np.random.default_rng(9)
    weights = [jnp.asarray(rng.normal(size=(2, 4, kv.prefix, 2, 8)), "float32") for _ in range(2)]

    def loss(form, memory, k, v):
        got = caches(form, kv, arrays(kv), memory, k, v, seen)
        return (got.k * weights[0]).sum() + (got.v * weights[1]).sum()

    grads = [
        jax.jit(jax.grad(functools.partial(loss, form), (0, 1, 2)))(memory, k, v)
        for form in (type(kv).chunk_caches, KVPolicy.chunk_caches)
    ]
    for got, want in zip(*(jax.tree.leaves(grad) for grad in grads), strict=True):
        assert rel_l2(got, want) <= GRAD_REL_L2


@pytest.mark.parametrize("unrolled", [16, 2], ids=["unrolled", "loop"])
@pytest.mark.parametrize("size", [132, 516])
def test_many_rounds_in_bfloat16_stay_near_float64(size, unrolled, monkeypatch):
    monkeypatch.setattr(linear, "UNROLLED", unrolled)
    kv, chunks = FreqKVConfig(size, 4), 8
    memory, k, v, seen = inputs(kv, chunks, "bfloat16", 1)
    first = jnp.swapaxes(memory.v, 1, 2)
    form = functools.partial(caches, type(kv).chunk_caches, kv)
    caches_then = jax.jit(form)(arrays(kv), memory, k, v, seen)
    got = caches_then.v
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        jnp.swapaxes(caches_then.memory.v, 1, 2)[:, kv.prefix :], v[:, -1]
    )
    cache = np.asarray(first[0], np.float64)
    for c in range(chunks):
        low = oracle.low_pass(cache[4:].reshape(kv.span, -1), kv.keep).reshape(kv.keep, 2, 8)
        cache = np.concatenate([cache[:4], low, np.asarray(v[0, c], np.float64)])
        assert rel_l2(got[0, c, 4:], low) <= BF16_PRIMITIVE_REL_L2
        # What is not mapped is handed on to the bit.
        np.testing.assert_array_equal(got[0, c, :4], first[0, :4])


@pytest.mark.parametrize("kv", POLICIES[-2:], ids=str)
def test_pairs_become_their_means(kv):
    x = np.random.default_rng(0).normal(size=(kv.capacity, 3)).astype(np.float32)
    end = kv.capacity - kv.recent_size
    pairs = [list(range(t - 2, t)) for t in range(end, 5, -2)][::-1]
    if kv.span % 2:
        pairs[0].insert(0, 4)
    assert sorted(sum(pairs, [])) == list(range(4, end)) and len(pairs) == kv.keep
    want = [*x[:4], *(x[pair].mean(axis=0) for pair in pairs), *x[end:]]
    assert_close(kv.shrink(jnp.asarray(x), 0, {}), want, COMPRESS)
    assert_close(kv.shrink(jnp.asarray(x.T), 1, {}), np.array(want).T, COMPRESS)


@pytest.mark.parametrize(("recent", "ratio"), [(0, 0.5), (3, 0.4), (2, 0.8)])
def test_values_are_filtered_and_keys_thinned_out(recent, ratio):
    kv = FreqKVValuesConfig(21, 4, recent, ratio)
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(1, 2, 21, 8)).astype(np.float32) for _ in range(2))
    rotated = ROPE.rotate_slots(jnp.asarray(k))
    got = kv.make_room(kv.init(1, 2, 8, jnp.float32)._replace(k=rotated, v=v), ROPE, arrays(kv))
    # The entry nearest to the middle of each of L equal parts of the span, the newer one of two.
    middles = [(i + 0.5) * kv.span / kv.keep - 0.5 for i in range(kv.keep)]
    nearest = [min(range(kv.span), key=lambda t: (abs(t - m), -t)) for m in middles]
    slots = [*range(4), *(4 + t for t in nearest), *range(21 - recent, 21)]
    assert kv.kept_keys().tolist() == slots
    want = ROPE.rotate_slots(jnp.asarray(k[:, :, slots]))
    assert_close(got.k[:, :, : kv.prefix], want, COMPRESS)
    np.testing.assert_array_equal(got.k[:, :, :4], rotated[:, :, :4])
    plain = FreqKVConfig(21, 4, recent, ratio)
    want = plain.shrink(jnp.asarray(v), 2, arrays(plain))
    assert_close(got.v[:, :, : kv.prefix], want, COMPRESS)


def test_every_second_key_is_kept():
    assert FreqKVValuesConfig(12, 4).kept_keys().tolist() == [0, 1, 2, 3, 5, 7, 9, 11]
    assert FreqKVValuesConfig(12, 4, 0, 0.0).kept_keys().tolist() == [0, 1, 2, 3]


def test_pair_averaging_has_no_ratio():
    kv = PairAverageConfig(17, 3)
    assert (kv.keep, kv.chunk, kv.prefix) == (7, 7, 10)
    assert "retain_ratio" not in policy_to_dict(kv)
    assert policy_from_dict(policy_to_dict(kv)) == kv != PairAverageConfig(17, 4)
    assert PairAverageConfig(5, 4).keep == 0
    with pytest.raises(TypeError, match="retain_ratio"):
        PairAverageConfig(17, 3, retain_ratio=0.25)


def test_halves_are_the_span(kv=POLICIES[0]):
    rng = np.random.default_rng(0)
    mapped, raw = (
        tuple(jnp.asarray(rng.normal(size=(8, 3)), "float32") for _ in range(2)) for _ in range(2)
    )
    now = kv.first_round(mapped, raw, arrays(kv)).both
    got = [folding.unfold(now[:, :, i], kv.keep) for i in range(2)]
    for out, old, new in zip(got, mapped, raw, strict=True):
        span = np.concatenate([old, new]).astype(np.float64)
        assert_close(out, oracle.low_pass(span, kv.keep), COMPRESS)


@pytest.mark.parametrize(
    ("size", "up"), [(15, 15), (16, 16), (127, 128), (1023, 1024), (2046, 2048), (4092, 4096)]
)
def test_sizes_are_aligned_where_it_costs_little(size, up):
    assert spectral._aligned(size) == up
    assert spectral._aligned(up) == up


def test_a_real_map_is_aligned_and_zero_around_its_halves():
    stacked = FreqKVConfig(2048, 4).constants()["stacked"]
    assert stacked.shape == (2, 512, 1024) and stacked.dtype == np.float32
    assert not stacked[:, 511:].any() and not stacked[:, :, 1022:].any()
    even, odd = spectral.folded_lowpass(2044, 1022)
    assert_close(2 * stacked[0, :511, :1022], even, COMPRESS)
    assert_close(2 * stacked[1, :511, :1022], odd, COMPRESS)


def test_a_round_is_one_product():
    """Of the usual case: keys and values of a round go through it together."""
    kv, chunks = FreqKVConfig(20, 4), 3
    args = arrays(kv), *inputs(kv, chunks)
    text = str(jax.make_jaxpr(functools.partial(caches, type(kv).chunk_caches, kv))(*args))
    assert text.count(" dot_general[") == chunks and " scan[" not in text

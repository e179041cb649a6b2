"""The Triton kernels of choosing policies, interpreted on a CPU, against the plain rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax import nvidia
from freqkv_jax.config import RopeConfig
from freqkv_jax.kv import KeyNormConfig, SpectralNoveltyConfig, choosing_cuda
from freqkv_jax.kv.choosing import GRID, highest, rounds_of
from freqkv_jax.kv.choosing_cuda import marked, staying
from freqkv_jax.kv.policy import Slots
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import make_mesh

ROPE = Rope(RopeConfig(1e4), 64)
SIZES = {"cache_size": 100, "sink_size": 3, "recent_size": 20, "chunk": 37}
POLICIES = [
    SpectralNoveltyConfig(bands=1, **SIZES),
    SpectralNoveltyConfig(bands=3, **SIZES),
    SpectralNoveltyConfig(bands=20, recency=0.3, **SIZES),
    SpectralNoveltyConfig(bands=4, shared_heads=True, **SIZES),
    SpectralNoveltyConfig(bands=4, value_share=0.5, **SIZES),
    SpectralNoveltyConfig(bands=20, value_share=1, recency=0.1, **SIZES),
    SpectralNoveltyConfig(bands=1, value_share=0.5, shared_heads=True, **SIZES),
    SpectralNoveltyConfig(bands=300, **SIZES),  # chosen without a kernel
    KeyNormConfig(**SIZES),
]


def arguments(kv, chunks, batch=2, heads=3, dtype="bfloat16"):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    first = [normal(batch, kv.capacity, heads, 64) for _ in range(2)]
    tokens = [normal(batch, chunks, kv.chunk, heads, 64) for _ in range(2)]
    maps = {name: jnp.asarray(array) for name, array in kv.constants().items()}
    return tuple(first), tuple(tokens), maps


@pytest.mark.parametrize(
    ("kv", "chunks"), [(POLICIES[0], 1), *((kv, 4) for kv in POLICIES)], ids=str
)
def test_the_rounds_are_the_plain_ones(kv, chunks, interpreted):
    args = arguments(kv, chunks)
    plain = jax.jit(functools.partial(kv.plain_rounds, rope=ROPE))(*args)
    (k, v), old = jax.jit(functools.partial(kv.cuda_rounds, rope=ROPE))(*args)
    np.testing.assert_array_equal(old, plain[1])
    np.testing.assert_array_equal(v, plain[0][1])
    # A product and a sum may be one operation here and two there.
    wide, other = (np.asarray(x, np.float32) for x in (k, plain[0][0]))
    assert np.abs(wide - other).max() <= 2**-6 and (wide != other).mean() < 1e-3
    assert not np.isnan(wide).any()


# Spans below and above what is counted at a time; without sinks, recents, or any that are chosen.
@pytest.mark.parametrize("sizes", [(300, 3, 20, 37), (60, 0, 0, 20), (200, 4, 150, 46)], ids=str)
@pytest.mark.parametrize("part", [4096, 64])
def test_who_stays_is_who_is_highest(sizes, part, interpreted, monkeypatch):
    monkeypatch.setattr(choosing_cuda, "PART", part)
    kv = KeyNormConfig(*sizes)
    rng = np.random.default_rng(0)
    score = jnp.asarray(rng.integers(-5, 5, (3, 3, kv.span)), jnp.float32)  # many are equal
    score = score.at[0].set(1.0)  # or all
    score = score.at[1].multiply(-1.0)  # zeros of both signs
    score = jnp.where(score == -5, -jnp.inf, jnp.where(score == 4, jnp.inf, score))
    stay = functools.partial(staying, keep=kv.keep, sink=kv.sink_size, recent=kv.recent_size)
    want = kv._with_sinks(highest(score * GRID, kv.keep))
    np.testing.assert_array_equal(jax.jit(stay)(score), want)
    chosen = jax.jit(functools.partial(marked, keep=kv.keep))(score)
    np.testing.assert_array_equal(chosen, highest(score * GRID, kv.keep))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF])
def test_not_a_number_leaves_as_many(bits, interpreted):
    """A GPU's NaN is the first of these; slots that nobody wrote would be read behind the cache."""
    kv = KeyNormConfig(**SIZES)
    nan = jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)
    score = jnp.full((1, 2, kv.span), nan).at[0, 1, 5:].set(1.0)
    old = np.asarray(staying(score, kv.keep, kv.sink_size, kv.recent_size))
    assert (np.diff(old, axis=-1) > 0).all() and old.min() == 0 and old.max() == kv.cache_size - 1


def test_making_room_is_a_round(interpreted, monkeypatch):
    """The same kernels: streaming and parallel form choose alike to the bit."""
    kv = POLICIES[0]
    first, tokens, maps = arguments(kv, 1)
    memory = Slots(*(jnp.swapaxes(x, 1, 2) for x in first))
    plain = kv.make_room(memory, ROPE, maps)
    monkeypatch.setattr(nvidia, "suits", lambda x, heads: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    caches = rounds_of(kv, ROPE, True)(first, tokens, maps)
    made = kv.make_room(memory, ROPE, maps)
    for x, cache, other in zip(made, caches, plain, strict=True):
        np.testing.assert_array_equal(x[:, :, : kv.prefix], jnp.swapaxes(cache[:, 0], 1, 2))
        assert np.abs(np.asarray(x - other, np.float32)[:, :, : kv.prefix]).max() <= 2**-6


def test_what_is_taken(monkeypatch):
    k = jnp.zeros((2, 8, 4, 64), jnp.bfloat16)
    assert not nvidia.suits(k, 2)  # no GPU here
    monkeypatch.setattr(nvidia, "present", lambda: True)
    assert nvidia.suits(k, 2)
    assert not nvidia.suits(k.astype(jnp.float32), 2)
    assert not nvidia.suits(k[..., :48], 2)
    with jax.set_mesh(make_mesh(1, 2, 2)):
        assert nvidia.suits(k, 2)
        assert not nvidia.suits(k[:, :, :3], 2)
        assert not nvidia.suits(k[:1], 2)
    with jax.set_mesh(jax.make_mesh((2,), ("rows",))):
        assert not nvidia.suits(k, 2)  # of axes that are not ours


def test_a_cpu_goes_the_plain_way(monkeypatch):
    """Kernels that could be traced are not what a CPU's program runs; gradients need none."""
    kv = POLICIES[0]
    first, tokens, maps = arguments(kv, 3)

    def both():
        def total(first):
            caches = rounds_of(kv, ROPE, nvidia.present())(first, tokens, maps)
            return caches[0].astype(jnp.float32).sum(), caches

        run = jax.jit(jax.grad(total, has_aux=True)).trace(first)
        return str(run.jaxpr), run.lower().compile()(first)

    text, plain = both()
    assert "pallas_call" not in text
    monkeypatch.setattr(nvidia, "present", lambda: True)
    text, found = both()
    assert "pallas_call" in text
    for some, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(some, other)


def test_derivatives_in_both_directions(monkeypatch):
    """Forward, as following entries through a round needs it, and twice."""
    monkeypatch.setattr(nvidia, "present", lambda: True)
    kv = POLICIES[0]
    first, tokens, maps = arguments(kv, 3)

    def run(*args):
        return rounds_of(kv, ROPE, True)(*args, maps)

    _, along = jax.jvp(run, (first, tokens), (first, tokens))
    for one, other in zip(along, run(first, tokens), strict=True):
        np.testing.assert_array_equal(one, other)  # linear, given who stays

    def loss(first):
        return sum((x.astype(jnp.float32) ** 2).sum() for x in run(first, tokens))

    assert jax.tree.leaves(jax.grad(lambda f: jax.grad(loss)(f)[0].astype(float).sum())(first))

"""The Triton kernels of FreqKV's rounds, interpreted on a CPU, against the plain rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax import nvidia
from freqkv_jax.config import RopeConfig
from freqkv_jax.kv import FreqKVConfig, folding_cuda
from freqkv_jax.kv.folding_cuda_back import transposed
from freqkv_jax.kv.linear import LinearPolicy
from freqkv_jax.kv.policy import Slots
from freqkv_jax.rope import Rope
from tests.tolerances import BF16_PRIMITIVE_REL_L2, rel_l2

ROPE = Rope(RopeConfig(1e4), 64)
POLICIES = [
    FreqKVConfig(100, 4),  # L even
    FreqKVConfig(98, 4),  # and odd
    FreqKVConfig(100, 4, 10),
    FreqKVConfig(100, 2, 60),  # more recents than tokens of a chunk
]
# One chunk, several; two, whose loop has no turn, and more than are written out one by one; without
# the cache behind them, and with it.
CASES = [(POLICIES[0], 1, False), (POLICIES[0], 2, True), (POLICIES[0], 19, True)]
CASES += [(POLICIES[0], 3, False), (POLICIES[1], 1, True), (POLICIES[1], 3, False)]
CASES += [(POLICIES[2], 1, True), (POLICIES[2], 3, False)]
CASES += [(POLICIES[3], 1, False), (POLICIES[3], 3, True)]


def arguments(kv, chunks, batch=2, heads=3, dtype="bfloat16"):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    memory = Slots(*(normal(batch, heads, kv.capacity, 64) for _ in range(2)))
    tokens = [normal(batch, chunks, kv.chunk, heads, 64) for _ in range(2)]
    return memory, *tokens, {name: jnp.asarray(array) for name, array in kv.constants().items()}


def plain(kv, more, memory, k, v, maps):
    return LinearPolicy.rounds(kv, memory, k, v, ROPE, maps, more)


def cuda_rounds(kv, more, memory, k, v, maps):
    sizes = folding_cuda.Sizes(kv.sink_size, kv.keep, kv.prefix)
    return folding_cuda.rounds(memory, k, v, maps["stacked"], sizes, ROPE, more)


@pytest.mark.parametrize(("kv", "chunks", "more"), CASES, ids=str)
def test_the_rounds_are_the_plain_ones(kv, chunks, more, interpreted):
    args = arguments(kv, chunks)
    found = jax.jit(functools.partial(cuda_rounds, kv, more))(*args)
    other = jax.jit(functools.partial(plain, kv, more))(*args)
    assert len(found) == 2 + 2 * more
    for one, two in zip(found, other, strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        one, two = (np.asarray(x, np.float32) for x in (one, two))
        # Nearly all numbers are equal; a product and a sum may be one operation here, two there.
        assert rel_l2(one, two) < BF16_PRIMITIVE_REL_L2 / 4
        np.testing.assert_array_equal(one[:, :, : kv.sink_size], two[:, :, : kv.sink_size])


@pytest.mark.parametrize(("kv", "chunks", "more"), CASES, ids=str)
def test_backwards_they_are_the_plain_ones_transposed(kv, chunks, more, interpreted):
    memory, k, v, maps = arguments(kv, chunks)
    rng = np.random.default_rng(1)
    sizes = [chunks, chunks, 1, 1] if more else [chunks, chunks]
    shapes = [(len(k), size, kv.prefix, *k.shape[3:]) for size in sizes]
    grads = tuple(jnp.asarray(rng.normal(size=shape), k.dtype) for shape in shapes)
    sizes = folding_cuda.Sizes(kv.sink_size, kv.keep, kv.prefix)

    def cuda(maps, grads):
        return transposed(grads, maps["stacked"], sizes, ROPE, kv.capacity)

    def wide(maps, grads):
        args, grads = jax.tree.map(lambda x: x.astype(jnp.float32), ((memory, k, v), grads))
        return jax.vjp(lambda *args: plain(kv, more, *args, maps), *args)[1](grads)

    found, expected = jax.jit(cuda)(maps, grads), jax.jit(wide)(maps, grads)
    for one, two in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.shape == two.shape and one.dtype == k.dtype
        one, two = (np.asarray(x, np.float32) for x in (one, two))
        # Entry by entry, so that none which is small is lost in the sum over all.
        off = np.linalg.norm(one - two, axis=-1) / np.maximum(np.linalg.norm(two, axis=-1), 1)
        assert off.max() < 4 * BF16_PRIMITIVE_REL_L2


def test_gradients_and_results_on_a_cpu_are_the_plain_ones(monkeypatch):
    """Kernels are traced, and a CPU runs none of them."""
    kv = POLICIES[0]
    memory, k, v, maps = arguments(kv, 3)

    def total(memory, k, v):
        caches = kv.chunk_caches(memory, k, v, None, ROPE, maps, jnp.full((2,), kv.capacity))
        return sum((x.astype(jnp.float32) ** 2).sum() for x in caches[:2]), caches

    def both():
        run = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True)).trace(memory, k, v)
        return str(run.jaxpr), run.lower().compile()(memory, k, v)

    text, expected = both()
    assert "pallas_call" not in text
    monkeypatch.setattr(nvidia, "present", lambda: True)
    text, found = both()
    assert "pallas_call" in text
    for some, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        some, other = (np.asarray(x, np.float32) for x in (some, other))
        assert rel_l2(some, other) < BF16_PRIMITIVE_REL_L2 / 4


@pytest.mark.parametrize(
    "kv",
    [FreqKVConfig(100, 4, 0, 0.7), FreqKVConfig(100, 0), FreqKVConfig(100, 4, method="fft")],
    ids=str,
)
def test_what_goes_the_plain_way(kv, monkeypatch):
    monkeypatch.setattr(nvidia, "present", lambda: True)
    memory, k, v, maps = arguments(kv, 2)
    run = functools.partial(kv.chunk_caches, counts=None, rope=ROPE, maps=maps, seen=None)
    assert "pallas_call" not in str(jax.make_jaxpr(run)(memory, k, v))

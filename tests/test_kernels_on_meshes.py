"""Triton kernels on a mesh, interpreted: each device runs them on its own rows and heads."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from freqkv_jax import nvidia
from freqkv_jax.config import RopeConfig
from freqkv_jax.kv import FreqKVConfig, SpectralNoveltyConfig
from freqkv_jax.kv.policy import Slots
from freqkv_jax.model.flash_decode import BLOCK, attend_rows
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import BATCH_AXES, CHUNKS_SPEC, HEADS_SPEC, MEMORY_SPEC, P, make_mesh

ROPE = Rope(RopeConfig(1e4), 64)
MESH = (2, 1, 2)


@pytest.fixture
def kernels(monkeypatch, interpreted):
    """As if the CPU devices were GPUs."""
    monkeypatch.setattr(nvidia, "present", lambda: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))


def compiled(what, shape=MESH):
    """`what` on one device and on a mesh: results, and what the mesh's program moves."""
    function, specs, args = what
    alone = jax.jit(function)(*args)
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    where = jax.tree.map(lambda x, spec: NamedSharding(mesh, spec), args, specs)
    with jax.set_mesh(mesh):
        program = jax.jit(function).lower(*jax.device_put(args, where)).compile()
        split = program(*jax.device_put(args, where))
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return alone, split, set(re.findall(names, program.as_text()))


def rounds_and_gradients(kv):
    """Function, its arguments' parts on a mesh, and arguments: the caches of two chunks and the
    one behind, and back."""
    rng = np.random.default_rng(0)
    shape = (2, 2, kv.chunk, 2, 64)
    maps = {name: jnp.asarray(array) for name, array in kv.constants().items()}

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    memory = Slots(*(normal(2, 2, kv.capacity, 64) for _ in range(2)))
    weights = normal(2, 2, kv.prefix, 2, 64)

    def caches_and_gradients(memory, k, v, weights):
        def total(memory, k, v):
            seen = jnp.full((len(k),), kv.capacity)
            caches = jax.tree.leaves(kv.caches_and_next(memory, k, v, ROPE, maps, seen))
            # Per row and head, so that no sum is one over devices.
            parts = [(x * weights[:, : x.shape[1]]).astype(jnp.float32) for x in caches]
            return [part.sum((1, 2, 4)) for part in parts], caches

        sums, back, caches = jax.vjp(total, memory, k, v, has_aux=True)
        return caches, back(jax.tree.map(jnp.ones_like, sums))

    args = memory, normal(*shape), normal(*shape), weights
    specs = Slots(MEMORY_SPEC, MEMORY_SPEC), CHUNKS_SPEC, CHUNKS_SPEC, CHUNKS_SPEC
    return caches_and_gradients, specs, args


@pytest.mark.parametrize(
    "kv",
    [
        FreqKVConfig(100, 4, 10),
        SpectralNoveltyConfig(48, recent_size=12, chunk=16, bands=20, value_share=0.5),
    ],
    ids=["freqkv", "novelty"],
)
def test_rounds_and_their_gradients(kv, kernels):
    """To the bit what one device makes of them, and nothing is moved between devices."""
    alone, split, moved = compiled(rounds_and_gradients(kv))
    assert not moved
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(one, two)


def making_room(kv):
    rng = np.random.default_rng(0)
    shape = (2, 2, kv.capacity, 64)
    memory = Slots(*(jnp.asarray(rng.normal(size=shape), "bfloat16") for _ in range(2)))
    room = functools.partial(kv.make_room, rope=ROPE, maps=kv.constants())
    return room, (Slots(MEMORY_SPEC, MEMORY_SPEC),), (memory,)


def test_making_room(kernels):
    alone, split, moved = compiled(making_room(SpectralNoveltyConfig(48, recent_size=12, chunk=16)))
    assert not moved
    for one, two in zip(alone, split, strict=True):
        np.testing.assert_array_equal(one, two)


def a_query_a_row(fill, behind=0):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    fill = jnp.asarray(fill, jnp.int32)
    args = (
        normal(4, 1, 6 + behind, 64),
        normal(4, 2, 2 * BLOCK, 64),
        normal(4, 2, 2 * BLOCK, 64),
        fill,
    )
    specs = HEADS_SPEC, MEMORY_SPEC, MEMORY_SPEC, P(BATCH_AXES) if fill.ndim else P()
    return functools.partial(attend_rows, num_heads=6), specs, args


@pytest.mark.parametrize("fill", [[70, 3, 9, 127], 70], ids=str)
@pytest.mark.parametrize("behind", [0, 4])  # heads behind the queries, as fused weights give them
def test_a_query_a_row(fill, behind, kernels):
    alone, split, moved = compiled(a_query_a_row(fill, behind))
    assert not moved or behind  # the queries are cut out first, and are small
    np.testing.assert_array_equal(alone, split)

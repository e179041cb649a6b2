"""The Triton kernel of one query a row, interpreted on a CPU, against XLA's form."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import nvidia
from freqkv_jax.kv.state import empty_state
from freqkv_jax.model import flash_decode
from freqkv_jax.model.attention import attend_cache
from freqkv_jax.sharding import make_mesh
from tests.tiny import random_params, tiny_config
from tests.tolerances import BF16_PRIMITIVE_REL_L2, PRIMITIVE, assert_close, rel_l2

BLOCK = flash_decode.BLOCK


def inputs(heads, kv_heads, dim, slots, dtype="float32", batch=()):
    """q, k, v of one row, or of a batch."""
    rng = np.random.default_rng(0)
    shapes = (heads, dim), (kv_heads, slots, dim), (kv_heads, slots, dim)
    q, k, v = (jnp.asarray(rng.normal(size=batch + shape), dtype) for shape in shapes)
    return (q[:, None] if batch else q), k, v


def plain(q, k, v, fill):
    return attend_cache(q[None, None], k[None], v[None], fill)[0, 0]


# Runs of slots that are a power of two and one that is not; groups of 1, 3 and 4.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "slots"), [(9, 3, 8 * BLOCK), (2, 2, 2 * BLOCK), (4, 1, 3 * BLOCK)]
)
def test_it_is_the_plain_form(heads, kv_heads, slots, interpreted):
    q, k, v = inputs(heads, kv_heads, 64, slots)
    flash = jax.jit(flash_decode.flash, static_argnames="num_heads")
    rows = jnp.concatenate([q, jnp.full((2 * kv_heads, 64), 1e4)])  # what lies behind the queries
    for fill in (0, BLOCK - 1, BLOCK, BLOCK + 7, slots - 1):
        got = flash(rows, k, v, jnp.int32(fill), heads)
        assert_close(got, plain(q, k, v, jnp.int32(fill)), PRIMITIVE)


# A fill that rows share, and their own: a block's first slot and last, the last of all, and behind
# it, where a full row is frozen.
@pytest.mark.parametrize("fill", [BLOCK + 7, [0, BLOCK - 1, 2 * BLOCK, 3 * BLOCK - 1, 3 * BLOCK]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_rows_are_the_plain_form(heads, kv_heads, fill, interpreted):
    q, k, v = inputs(heads, kv_heads, 64, 3 * BLOCK, batch=(5,))
    fill = jnp.asarray(fill, jnp.int32)
    behind = jnp.full((5, 1, 2 * kv_heads, 64), 1e4, q.dtype)
    rows = jax.jit(flash_decode.flash_rows, static_argnames="num_heads")
    got = rows(jnp.concatenate([q, behind], axis=2), k, v, fill, heads)
    assert_close(got, attend_cache(q, k, v, fill), PRIMITIVE)


def test_rows_in_half_precision_and_dead_slots(interpreted):
    q, k, v = inputs(4, 2, 64, 4 * BLOCK, "bfloat16", batch=(2,))
    fill = jnp.asarray([70, 3], jnp.int32)
    got = flash_decode.flash_rows(q, k, v, fill, 4)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    assert got.dtype == jnp.bfloat16
    assert rel_l2(got.astype(jnp.float32), attend_cache(*wide, fill)) < BF16_PRIMITIVE_REL_L2
    dead = jnp.arange(4 * BLOCK, dtype=jnp.int32)[None] > fill[:, None]
    dirty = [jnp.where(dead[:, None, :, None], jnp.asarray(1e4, x.dtype), x) for x in (k, v)]
    again = flash_decode.flash_rows(q, *dirty, fill, 4)
    np.testing.assert_array_equal(got, again)


def test_rows_share_the_programs():
    """Many rows write no more partial sums than one; the grids are read off the kernels."""

    def programs(batch):
        q, k, v = inputs(3, 3, 64, 8 * BLOCK, "bfloat16", batch=(batch,))
        rows = functools.partial(flash_decode.flash_rows, num_heads=3)
        made = str(jax.make_jaxpr(rows)(q, k, v, jnp.int32(5)))
        return math.prod(map(int, re.findall(r"grid=\(([\d, ]+)\)", made)[0].split(",")))

    assert programs(2) == 2 * 3 * 8  # a run a block
    assert programs(64) == 64 * 3 * 4
    assert programs(200) == 200 * 3


def test_half_precision_and_dead_slots(interpreted):
    q, k, v = inputs(4, 2, 128, 4 * BLOCK, "bfloat16")
    q = 40 * q  # scores whose exponential is more than a float holds
    fill = jnp.int32(70)
    got = flash_decode.flash(q, k, v, fill, 4)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    assert got.dtype == jnp.bfloat16
    assert rel_l2(got.astype(jnp.float32), plain(*wide, fill)) < BF16_PRIMITIVE_REL_L2
    dirty = [x.at[:, 71:].set(1e4) for x in (k, v)]
    np.testing.assert_array_equal(got, flash_decode.flash(q, *dirty, fill, 4))


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((9, 3, 64, 2 * BLOCK), "bfloat16", True),
        ((9, 3, 64, 2 * BLOCK), "float32", False),  # its products would be rounded
        ((9, 3, 80, 2 * BLOCK), "bfloat16", False),
        ((9, 3, 64, 2 * BLOCK + 8), "bfloat16", False),
        ((17, 1, 64, 2 * BLOCK), "bfloat16", False),
    ],
)
def test_what_it_takes(shape, dtype, taken, monkeypatch):
    """Traced only: lowering for a GPU needs to know one."""
    monkeypatch.setattr(nvidia, "present", lambda: True)
    q, k, v = inputs(*shape, dtype)
    made = str(
        jax.make_jaxpr(lambda *a: flash_decode.attend_one(*a, shape[0]))(q, k, v, jnp.int32(5))
    )
    assert bool(re.search(r"pallas_call", made)) == taken
    q, k, v = inputs(*shape, dtype, batch=(2,))
    made = str(
        jax.make_jaxpr(lambda *a: flash_decode.attend_rows(*a, shape[0]))(q, k, v, jnp.int32(5))
    )
    assert ("pallas_call" in made) == taken


def test_a_cpu_runs_the_plain_form(monkeypatch):
    monkeypatch.setattr(nvidia, "present", lambda: True)
    rows, k, v = inputs(8, 2, 64, 2 * BLOCK, "bfloat16")
    got = jax.jit(lambda *a: flash_decode.attend_one(*a, 4))(rows, k, v, jnp.int32(5))
    np.testing.assert_array_equal(got, jax.jit(plain)(rows[:4], k, v, jnp.int32(5)))
    q, k, v = inputs(4, 2, 64, 2 * BLOCK, "bfloat16", batch=(3,))
    fill = jnp.asarray([5, 0, 2 * BLOCK - 1], jnp.int32)
    got = jax.jit(lambda *a: flash_decode.attend_rows(*a, 4))(q, k, v, fill)
    np.testing.assert_array_equal(got, jax.jit(attend_cache)(q, k, v, fill))


@pytest.mark.parametrize("fill", [5, [5, 70]])
def test_derivatives_are_those_of_the_plain_form(fill, monkeypatch):
    """Of a loop, too: the kernel is traced but never differentiated."""
    monkeypatch.setattr(nvidia, "present", lambda: True)
    q, k, v = inputs(4, 2, 64, 2 * BLOCK, "bfloat16", batch=(2,))
    fill = jnp.asarray(fill, jnp.int32)

    def loss(form):
        def step(q, _):
            return form(q, k, v, fill), None

        def run(q, k, v):
            q, _ = jax.lax.scan(step, form(q, k, v, fill), length=2)
            return jnp.sum(q.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(run, (0, 1, 2)))

    got = loss(lambda *a: flash_decode.attend_rows(*a, 4))(q, k, v)
    jax.tree.map(np.testing.assert_array_equal, got, loss(attend_cache)(q, k, v))


def test_where_a_model_takes_it(monkeypatch):
    """For one token a row, on a mesh if it splits the rows. Traced only."""
    monkeypatch.setattr(nvidia, "present", lambda: True)
    config = tiny_config(4, 2, head_dim=64)
    model = fk.Llama(config, fk.FreqKVConfig(BLOCK, 4), "bfloat16", "blocked")  # else cuDNN's
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(config))
    state = jax.eval_shape(lambda: empty_state(config, model.kv, 2, "bfloat16", BLOCK))

    def kernels(length, fill):
        def run(params, tokens, state):
            return model.apply({"params": params}, tokens, state, None, fill, method="extend")[0]

        made = jax.make_jaxpr(run)(params, jnp.zeros((2, length), jnp.int32), state)
        return str(made).count("pallas_call")

    assert kernels(1, None) == kernels(1, jnp.int32(5)) == 2 * config.num_layers
    assert kernels(2, None) == kernels(1, 5) == 0
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        assert kernels(1, None) == 2 * config.num_layers
    with jax.set_mesh(make_mesh(data=4)):
        assert kernels(1, None) == 0
    with jax.set_mesh(make_mesh()):  # of one device
        assert kernels(1, None) == 2 * config.num_layers

"""The Triton kernel of one query, interpreted on a CPU, against XLA's form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax.model import cudnn, flash_decode
from freqkv_jax.model.attention import attend_cache
from tests.tolerances import BF16_PRIMITIVE_REL_L2, PRIMITIVE, assert_close, rel_l2

BLOCK = flash_decode.BLOCK


def inputs(heads, kv_heads, dim, slots, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (heads, dim), (kv_heads, slots, dim), (kv_heads, slots, dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def plain(q, k, v, fill):
    return attend_cache(q[None, None], k[None], v[None], fill)[0, 0]


# Runs of slots that are a power of two and one that is not; groups of 1, 3 and 4.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "slots"), [(9, 3, 8 * BLOCK), (2, 2, 2 * BLOCK), (4, 1, 3 * BLOCK)]
)
def test_it_is_the_plain_form(heads, kv_heads, slots):
    q, k, v = inputs(heads, kv_heads, 64, slots)
    flash = jax.jit(flash_decode.flash, static_argnames=("num_heads", "interpret"))
    rows = jnp.concatenate([q, jnp.full((2 * kv_heads, 64), 1e4)])  # what lies behind the queries
    for fill in (0, BLOCK - 1, BLOCK, BLOCK + 7, slots - 1):
        got = flash(rows, k, v, jnp.int32(fill), heads, interpret=True)
        assert_close(got, plain(q, k, v, jnp.int32(fill)), PRIMITIVE)


def test_half_precision_and_dead_slots():
    q, k, v = inputs(4, 2, 128, 4 * BLOCK, "bfloat16")
    q = 40 * q  # scores whose exponential is more than a float holds
    fill = jnp.int32(70)
    got = flash_decode.flash(q, k, v, fill, 4, interpret=True)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    assert got.dtype == jnp.bfloat16
    assert rel_l2(got.astype(jnp.float32), plain(*wide, fill)) < BF16_PRIMITIVE_REL_L2
    dirty = [x.at[:, 71:].set(1e4) for x in (k, v)]
    np.testing.assert_array_equal(got, flash_decode.flash(q, *dirty, fill, 4, interpret=True))


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
    monkeypatch.setattr(cudnn, "present", lambda: True)
    q, k, v = inputs(*shape, dtype)
    made = str(
        jax.make_jaxpr(lambda *a: flash_decode.attend_one(*a, shape[0]))(q, k, v, jnp.int32(5))
    )
    assert bool(re.search(r"pallas_call", made)) == taken


def test_a_cpu_runs_the_plain_form(monkeypatch):
    monkeypatch.setattr(cudnn, "present", lambda: True)
    rows, k, v = inputs(8, 2, 64, 2 * BLOCK, "bfloat16")
    got = jax.jit(lambda *a: flash_decode.attend_one(*a, 4))(rows, k, v, jnp.int32(5))
    np.testing.assert_array_equal(got, jax.jit(plain)(rows[:4], k, v, jnp.int32(5)))

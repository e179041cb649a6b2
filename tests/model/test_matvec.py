"""Triton's products of one row, interpreted on a CPU, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax import nvidia
from freqkv_jax.model import fused, matvec
from tests.tiny import tiny_config
from tests.tolerances import BF16_PRIMITIVE_REL_L2, PRIMITIVE, assert_close, rel_l2

CONFIG = tiny_config()


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def finish(first, second, extra):
    return first + extra, second - first * extra


def inputs(width, pairs):
    """x, norm, a kernel's rows, and what `finish` wants."""
    rng = np.random.default_rng(0)
    rows = normal(rng, pairs[0] * 2 * pairs[2], width) / (4 * width**0.5)
    return normal(rng, width), {"scale": normal(rng, width)}, rows, normal(rng, pairs[0], pairs[2])


# Columns in one part and in three, the last of them not whole, and in more than are read without a
# loop; rows that 2 divides or 4.
@pytest.mark.parametrize(
    ("width", "pairs", "parts"),
    [(96, (5, 2, 6), 16), (2500, (1, 2, 300), 16), (2500, (1, 2, 20), 2)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_the_obvious_ones(width, pairs, parts, dtype, monkeypatch, interpreted):
    monkeypatch.setattr(matvec, "PROGRAMS", 8)
    monkeypatch.setattr(matvec, "MOST_PARTS", parts)
    assert matvec._rows(pairs[2], pairs[0], 4) == (4 if pairs[2] == 300 else 2)
    x, norm, rows, extra = inputs(width, pairs)
    x, rows = x.astype(dtype), rows.astype(dtype)
    wide, kernel = x.astype(jnp.float32), rows.astype(jnp.float32)

    def check(got, want):
        assert got.dtype == x.dtype
        if dtype == "float32":
            assert_close(got, want, PRIMITIVE)
        else:
            assert rel_l2(got.astype(jnp.float32), want) < BF16_PRIMITIVE_REL_L2

    normed = wide / jnp.sqrt(jnp.mean(wide**2) + CONFIG.rms_norm_eps) * norm["scale"]
    outputs = (kernel @ normed).reshape(pairs)
    want = jnp.stack(finish(outputs[:, 0], outputs[:, 1], extra), axis=1)
    args = x, norm["scale"], CONFIG.rms_norm_eps, rows, pairs, finish, (extra,)
    check(matvec.normed_pairs(*args), want)
    y = jnp.flip(wide).astype(dtype)
    residual = normal(np.random.default_rng(1), kernel.shape[0]).astype(dtype)
    want = residual.astype(jnp.float32) + kernel @ y.astype(jnp.float32)
    check(matvec.plus_product(residual, rows, y), want)


def test_a_program_has_some_rows_and_there_are_enough_programs():
    sizes = (11008, 1), (64, 96), (32, 15), (7, 999)
    assert [matvec._rows(*size, 4) for size in sizes] == [4, 4, 1, 1]
    assert matvec._rows(4096, 1, 1) == 1


def both(linear, extra, pairs):
    """Both products of `fused`, as a function of arrays."""

    def run(x, norm, y):
        made = fused._normed_pairs(x, norm, CONFIG, linear, pairs, finish, (extra,))
        return made, fused._plus(y, linear, x)

    return run


@pytest.mark.parametrize("weights", [None, "int8"])
def test_who_makes_a_product(weights, monkeypatch):
    """Traced only: lowering for a GPU needs to know one."""
    pairs = (5, 2, 6)
    x, norm, rows, extra = inputs(96, pairs)
    linear = {"rows": rows} if weights is None else fused._int8(rows)
    y = jnp.ones(60, jnp.float32)
    for there in (False, True):
        monkeypatch.setattr(nvidia, "present", lambda there=there: there)
        made = str(jax.make_jaxpr(both(linear, extra, pairs))(x, norm, y))
        assert made.count("pallas_call") == (2 if there else 0)


@pytest.mark.parametrize("width", [96, 2500])
def test_products_of_integers_are_the_plain_ones(width, interpreted):
    """Each output is its sum of integers times its own factor, before anything is made of it."""
    pairs = (5, 2, 6)
    x, norm, rows, extra = inputs(width, pairs)
    linear, y = fused._int8(rows), jnp.ones(60, jnp.float32)
    want = both(linear, extra, pairs)(x, norm, y)
    args = x, norm["scale"], CONFIG.rms_norm_eps, linear["rows"], pairs, finish, (extra,)
    assert_close(matvec.normed_pairs(*args, linear["scale"]), want[0], PRIMITIVE)
    assert_close(matvec.plus_product(y, linear["rows"], x, linear["scale"]), want[1], PRIMITIVE)


def test_a_cpu_sums_along_rows(monkeypatch):
    pairs = (5, 2, 6)
    x, norm, rows, extra = inputs(96, pairs)
    linear, y = {"rows": rows}, jnp.ones(60, jnp.float32)
    # A function of its own for each trace, which JAX would else remember.
    want = jax.jit(both(linear, extra, pairs))(x, norm, y)
    monkeypatch.setattr(nvidia, "present", lambda: True)
    got = jax.jit(both(linear, extra, pairs))(x, norm, y)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    first, second = fused._normed_products(x, norm, CONFIG, linear, pairs)
    assert_close(got[0], jnp.stack(finish(first, second, extra), axis=1), PRIMITIVE)

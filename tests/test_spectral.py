"""The low-pass map in its three forms (matrix, fold, FFT) against scipy, and its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft as scipy_fft

from freqkv_jax import folding, spectral
from freqkv_jax.spectral import compress
from tests import oracle
from tests.tolerances import (
    BF16_PRIMITIVE_REL_L2,
    COMPRESS,
    FLOAT64,
    GRAD_REL_L2,
    assert_close,
    rel_l2,
)

METHODS = spectral.METHODS
# (span, keep): odd and even, the ends of the range, and the design's own span of 4092.
SIZES = [(60, 30), (7, 3), (11, 4), (12, 5), (1, 0), (2, 1), (5, 0), (6, 6), (9, 8), (100, 28)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def in_float64(function, *args, **options):
    """The result in float64, as a NumPy array: one program for each shape."""
    options = tuple(sorted(options.items()))
    with jax.enable_x64(True):
        out = _jitted(function, options)(*(jnp.asarray(x, jnp.float64) for x in args))
        assert out.dtype == jnp.float64
        return np.asarray(out)


@functools.cache
def _jitted(function, options):
    return jax.jit(functools.partial(function, **dict(options)))


def compress32(x, keep, method, axis=-2):
    return _jitted(compress, (("axis", axis), ("keep", keep), ("method", method)))(np.float32(x))


def compress64(x, keep, method):
    return in_float64(compress, x, keep=keep, method=method)


@st.composite
def any_size(draw):
    """A span and how much of it to keep."""
    span = draw(st.integers(1, 200))
    return span, draw(st.integers(0, span))


seeds = st.integers(0, 2**31)
# From a few sizes, because every new shape is compiled.
cases = st.tuples(st.sampled_from(SIZES), seeds).map(lambda case: (*case[0], case[1]))
# The first example of a size compiles: a deadline would measure that.
few = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.mark.parametrize(("span", "keep"), [*SIZES, (4092, 2046), (1021, 511)])
def test_matrix_is_the_oracles(span, keep):
    assert_close(spectral.lowpass_matrix(span, keep), oracle.low_pass_matrix(span, keep), FLOAT64)


@given(any_size())
@few
def test_facts_of_the_matrix(case):
    span, keep = case
    matrix = spectral.lowpass_matrix(span, keep)
    assert matrix.dtype == np.float64 and matrix.shape == (keep, span)
    assert_close(matrix.sum(axis=1), np.ones(keep), FLOAT64)
    assert_close(matrix[::-1, ::-1], matrix, FLOAT64)
    assert_close(matrix @ matrix.T, np.eye(keep) * keep / span, FLOAT64)


def symmetric(y, sign):
    """The first half of the even (sign 1) or odd (sign -1) part of y."""
    return ((y + sign * y[::-1]) / 2)[: (len(y) + 1) // 2]


@given(any_size())
@few
def test_the_fold_is_the_matrix_in_two_quarters(case):
    span, keep = case
    even, odd = spectral.folded_lowpass(span, keep)
    assert even.shape == ((keep + 1) // 2, (span + 1) // 2)
    assert odd.shape == (keep // 2, span // 2)
    # The even part of the input gives the even part of the output, the odd part the odd one.
    x, matrix = normal(span, 2), spectral.lowpass_matrix(span, keep)
    half, mirror = span // 2, x[::-1]
    assert_close(even @ (x + mirror)[: span - half], 2 * symmetric(matrix @ x, 1), FLOAT64)
    assert_close(odd @ (x - mirror)[:half], 2 * symmetric(matrix @ x, -1)[: keep // 2], FLOAT64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("span", "keep"), SIZES)
def test_methods_are_the_oracles(span, keep, method):
    x = normal(2, span, 3)
    want = np.moveaxis(oracle.low_pass(np.moveaxis(x, 1, 0), keep), 0, 1)
    assert_close(compress32(x, keep, method), want, COMPRESS)
    assert_close(compress64(x, keep, method), want, FLOAT64)


@pytest.mark.parametrize("method", METHODS)
def test_a_real_span(method):
    x = normal(4092, 3)
    assert_close(compress(np.float32(x), 2046, method=method), oracle.low_pass(x, 2046), COMPRESS)


@given(cases)
@few
def test_dct_is_scipys_and_idct_its_inverse(case):
    span, _, seed = case
    x = normal(3, span, seed=seed)
    forward = in_float64(spectral.dct, x)
    assert_close(forward, scipy_fft.dct(x, norm="ortho"), FLOAT64)
    assert_close(in_float64(spectral.idct, x), scipy_fft.idct(x, norm="ortho"), FLOAT64)
    assert_close(in_float64(spectral.idct, forward), x, FLOAT64)
    # Parseval: an orthonormal transform keeps the energy.
    assert_close((forward**2).sum(-1), (x**2).sum(-1), FLOAT64)
    # Along any axis.
    assert_close(in_float64(spectral.dct, x.T, axis=0), forward.T, FLOAT64)


@pytest.mark.parametrize("method", METHODS)
@given(cases, st.floats(-4, 4), st.floats(-4, 4))
@few
def test_linear(method, case, a, b):
    span, keep, seed = case
    x, y = normal(span, 2, seed=seed), normal(span, 2, seed=seed + 1)
    got = compress64(a * x + b * y, keep, method)
    assert_close(got, a * compress64(x, keep, method) + b * compress64(y, keep, method), FLOAT64)


@pytest.mark.parametrize("method", METHODS)
@given(cases, st.floats(-100, 100))
@few
def test_constants_are_preserved(method, case, value):
    span, keep, _ = case
    got = compress64(np.full((span, 2), value), keep, method)
    assert_close(got, np.full((keep, 2), value), FLOAT64)


@pytest.mark.parametrize("method", METHODS)
@given(cases)
@few
def test_energy_is_that_of_the_kept_frequencies(method, case):
    span, keep, seed = case
    x = normal(span, 2, seed=seed)
    got = compress64(x, keep, method)
    kept = scipy_fft.dct(x, norm="ortho", axis=0)[:keep]
    assert_close((got**2).sum(), (kept**2).sum() * keep / span, FLOAT64)


@pytest.mark.parametrize("method", METHODS)
@given(cases)
@few
def test_reversing_the_input_reverses_the_output(method, case):
    span, keep, seed = case
    x = normal(span, 2, seed=seed)
    got = compress64(x[::-1], keep, method)
    assert_close(got, compress64(x, keep, method)[::-1], FLOAT64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_keeping_everything_returns_x(method, dtype):
    x = jnp.asarray(normal(2, 7, 3), dtype)
    got = compress(x, 7, method=method)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("method", METHODS)
def test_low_frequencies_pass_and_high_ones_do_not(method):
    at = np.pi * (2 * np.arange(40) + 1) / 80
    fewer = np.pi * (2 * np.arange(20) + 1) / 40
    for frequency in (0, 1, 7, 19):
        got = compress32(np.cos(frequency * at)[:, None], 20, method)
        assert_close(got[:, 0], np.cos(frequency * fewer), COMPRESS)
    for frequency in (20, 21, 39):
        got = compress32(np.cos(frequency * at)[:, None], 20, method)
        assert_close(got[:, 0], np.zeros(20), COMPRESS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -4])
def test_any_axis(axis, method):
    x = normal(6, 7, 8, 9)
    want = np.moveaxis(oracle.low_pass(np.moveaxis(x, axis, 0), 3), 0, axis)
    assert_close(compress32(x, 3, method, axis), want, COMPRESS)


def test_the_default_axis_is_the_last_but_one():
    assert compress(jnp.zeros((2, 8, 3)), 4).shape == (2, 4, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_float32_inside(dtype, method):
    x = jnp.asarray(normal(2, 301, 5), dtype)
    got = compress(x, 150, method=method)
    assert got.dtype == x.dtype
    wide = compress(x.astype(jnp.float32), 150, method=method)
    # Float32 inside: the result is the float32 result, rounded once (an odd tie aside).
    assert rel_l2(got, wide) <= BF16_PRIMITIVE_REL_L2 / 4
    assert np.mean(np.asarray(got) != np.asarray(wide.astype(dtype))) < 0.01


def test_the_models_bfloat16_fold_accumulates_in_float32():
    stacked = jnp.asarray(spectral.stacked_lowpass(1021, 510), jnp.float32)
    x = jnp.asarray(normal(1021, 4), jnp.bfloat16)
    got = folding.fold_matmul(stacked, x, 510, 0)
    assert got.dtype == jnp.bfloat16
    assert rel_l2(got, oracle.low_pass(np.asarray(x, np.float64), 510)) <= BF16_PRIMITIVE_REL_L2


@pytest.mark.parametrize("method", METHODS)
def test_jit_and_vmap(method):
    x = np.float32(normal(3, 13, 4))
    want = compress(x, 5, method=method)
    jitted = jax.jit(lambda x: compress(x, 5, method=method))
    assert_close(jitted(x), want, COMPRESS)
    mapped = jax.vmap(lambda x: compress(x, 5, axis=0, method=method))
    assert_close(mapped(x), want, COMPRESS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("span", "keep"), [(12, 6), (13, 5), (5, 0), (6, 6)])
def test_the_gradient_is_the_transposed_matrix(span, keep, method):
    x, y = np.float32(normal(span, 2)), np.float32(normal(keep, 2, seed=1))
    grad = jax.jit(jax.grad(lambda x: (compress(x, keep, method=method) * y).sum()))(x)
    want = oracle.low_pass_matrix(span, keep).T @ y
    assert rel_l2(grad, want) <= GRAD_REL_L2
    tangent = np.float32(normal(span, 2, seed=2))
    _, out = jax.jvp(lambda x: compress(x, keep, method=method), (x,), (tangent,))
    assert_close(out, oracle.low_pass(np.float64(tangent), keep), COMPRESS)


@pytest.mark.parametrize("keep", [-1, 9, 100])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=rf"need 0 <= keep <= n, got keep={keep}, n=8"):
        compress(jnp.zeros((8, 2)), keep)


def test_unknown_method():
    with pytest.raises(ValueError, match="method 'dct' is unknown; allowed: matmul, fft"):
        compress(jnp.zeros((8, 2)), 4, method="dct")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"takes floating-point arrays, got .*; cast it first"):
        compress(jnp.zeros((8, 2), dtype), 4)


@pytest.mark.parametrize("axis", [2, -3])
def test_axis_out_of_range(axis):
    with pytest.raises(ValueError, match=rf"axis {axis} is out of range .* \(8, 2\)"):
        compress(jnp.zeros((8, 2)), 4, axis=axis)


@pytest.mark.parametrize("keep", [2.0, "2", True, None])
def test_keep_must_be_a_whole_number(keep):
    with pytest.raises(ValueError, match="keep must be a whole number"):
        compress(jnp.zeros((8, 2)), keep)


def test_numpy_integers_are_whole_numbers():
    assert compress(jnp.zeros((8, 2)), np.int64(4)).shape == (4, 2)

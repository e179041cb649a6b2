"""Turning keys to their slots and back (the comparison with torch is in test_torch_parity)."""

import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax.config import RopeConfig
from freqkv_jax.rope import Rope
from tests import oracle
from tests.tolerances import BF16_PRIMITIVE_REL_L2, PRIMITIVE, assert_close, rel_l2

ROPES = [
    RopeConfig(1e4),
    RopeConfig(1e5, "linear", 4.0),
    RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 64),
]


def normal(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.rope_type)
def test_slots_are_positions(rope):
    x, ours = normal(2, 3, 60, 8), Rope(rope, 8)
    freqs = oracle.inverse_frequencies(rope, 8)
    want = oracle.rotate(np.swapaxes(np.float64(x), 1, 2), np.arange(60), freqs)
    assert_close(ours.rotate_slots(x), np.swapaxes(want, 1, 2), PRIMITIVE)
    tokens = ours.rotate_tokens(jnp.swapaxes(x, 1, 2), jnp.arange(60))
    assert_close(jnp.swapaxes(tokens, 1, 2), ours.rotate_slots(x), PRIMITIVE)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.rope_type)
def test_turning_back_undoes_it(rope):
    x, ours = normal(2, 4096, 64), Rope(rope, 64)
    assert_close(ours.rotate_slots(ours.rotate_slots(x), inverse=True), x, PRIMITIVE)
    assert np.abs(ours.rotate_slots(x) - x).max() > 1


def test_bfloat16_is_turned_in_float32():
    x, ours = normal(1, 300, 64, dtype="bfloat16"), Rope(ROPES[0], 64)
    got = ours.rotate_slots(x)
    assert got.dtype == jnp.bfloat16
    assert rel_l2(got, ours.rotate_slots(x.astype(jnp.float32))) <= BF16_PRIMITIVE_REL_L2 / 4


def test_each_row_has_its_own_positions():
    x, ours = normal(2, 5, 3, 8), Rope(ROPES[0], 8)
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    got = ours.rotate_tokens(x, positions)
    for row in range(2):
        assert_close(got[row], ours.rotate_tokens(x[row], positions[row]), PRIMITIVE)


def test_scores_depend_on_distance_only():
    q, k = normal(1, 1, 8), normal(1, 1, 8)[..., ::-1]
    ours = Rope(ROPES[0], 8)
    scores = [
        jnp.vdot(ours.rotate_tokens(q, jnp.array([at + 3])), ours.rotate_tokens(k, jnp.array([at])))
        for at in (0, 5, 100)
    ]
    assert_close(scores[1:], [scores[0]] * 2, PRIMITIVE * 8)

"""Choosing tokens: order of the rules, ties, distributions, keys, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax.sampling import pick, sampling


def draw_many(logits, count=20_000, **options):
    """Frequencies of `count` draws from one row of logits."""
    rule, draw = sampling(
        options.pop("temperature", 1.0),
        options.pop("top_k", None),
        options.pop("top_p", None),
        jax.random.key(0),
        batch=count,
    )
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    tokens = pick(rows, jnp.zeros(count, jnp.int32), rule, draw)
    return np.bincount(tokens, minlength=len(logits)) / count


def softmax(x):
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


def test_greedy_takes_the_lowest_id_of_a_tie():
    rule, draw = sampling(0.0, None, None, None, 2)
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    assert pick(logits, jnp.zeros(2, jnp.int32), rule, draw).tolist() == [1, 0]


LOGITS = [0.3, 2.0, 1.5, -1.0, 1.5, 0.9]


# 0.02 is five standard deviations of a frequency over 20,000 draws.
def test_temperature():
    want = softmax(np.array(LOGITS) / 0.7)
    np.testing.assert_allclose(draw_many(LOGITS, temperature=0.7), want, atol=0.02)


def test_top_k_keeps_exactly_k_and_ties_go_to_the_lowest_id():
    # The second and the fifth value tie for the second place.
    got = draw_many([0.0, 2.0, 3.0, -1.0, 2.0], top_k=2)
    assert got[4] == 0
    np.testing.assert_allclose(got[[1, 2]], softmax([2.0, 3.0]), atol=0.02)


def test_top_k_beyond_the_vocabulary_keeps_all():
    np.testing.assert_allclose(draw_many(LOGITS, top_k=100), softmax(LOGITS), atol=0.02)


def test_top_k_may_be_a_numpy_integer():
    rule, _ = sampling(1.0, np.int64(3), None, jax.random.key(0), 1)
    assert rule == sampling(1.0, 3, None, jax.random.key(0), 1)[0] and type(rule.top_k) is int


def test_top_p_keeps_the_smallest_set_that_reaches_the_share():
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    got = draw_many(np.log(shares), top_p=0.6)  # 0.5 is short of it, 0.8 is not
    np.testing.assert_allclose(got, [0.625, 0.375, 0, 0], atol=0.02)
    assert draw_many(np.log(shares), top_p=0.3)[0] == 1.0


def test_top_p_counts_among_what_top_k_left():
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    got = draw_many(np.log(shares), top_k=2, top_p=0.5)  # 4/7 already reaches it
    assert got[0] == 1.0


def test_temperature_comes_before_top_p():
    shares = np.array([0.5, 0.3, 0.2])
    flat = draw_many(np.log(shares), temperature=100.0, top_p=0.6)
    assert flat[1] > 0.4  # nearly even at this temperature, so that two are needed


def test_a_row_draws_the_same_alone_and_beside_others():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)), jnp.float32)
    seen = jnp.array([4, 9, 2], jnp.int32)
    keys = jnp.stack([jax.random.key(i) for i in (5, 6, 7)])
    rule, draw = sampling(1.0, 10, 0.9, keys, 3)
    together = pick(logits, seen, rule, draw)
    for row in range(3):
        rule, draw = sampling(1.0, 10, 0.9, keys[row : row + 1], 1)
        assert pick(logits[row : row + 1], seen[row : row + 1], rule, draw)[0] == together[row]


def test_one_key_is_folded_with_the_row():
    logits = jnp.zeros((2, 1000))
    seen = jnp.zeros(2, jnp.int32)
    key = jax.random.key(3)
    one = pick(logits, seen, *sampling(1.0, None, None, key, 2))
    rows = jnp.stack([jax.random.fold_in(key, i) for i in range(2)])
    assert one.tolist() == pick(logits, seen, *sampling(1.0, None, None, rows, 2)).tolist()
    assert one[0] != one[1]
    raw = pick(logits, seen, *sampling(1.0, None, None, jax.random.PRNGKey(3), 2))
    assert raw.tolist() == one.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be a whole number >= 1"),
        ({"top_k": 2.5}, "top_k must be a whole number >= 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"top_k": True}, "top_k must be a whole number >= 1"),
        ({"key": None}, "needs key"),
        ({"key": 3}, r"must be a PRNG key, such as jax.random.key\(3\), got 3"),
        ({"key": np.uint32(3)}, "must be a PRNG key"),
        ({"key": np.zeros(2)}, "must be a PRNG key"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, "one key or one a row"),
    ],
)
def test_refused(options, message):
    full = {"temperature": 1.0, "top_k": None, "top_p": None, "key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        sampling(full["temperature"], full["top_k"], full["top_p"], full["key"], 2)

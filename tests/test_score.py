"""Scores: the same numbers as the full logits give, however the text and the vocabulary are cut."""

import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import programs
from tests import oracle
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, LOSS, assert_close

POLICIES = [fk.FreqKVConfig(16, 4), fk.SinkWindowConfig(17, 2, 3, 0.5), fk.FullConfig()]


def setup(kv, rows=2, length=57):
    config = tiny_config(6, 2)
    return fk.Llama(config, kv), random_params(config), random_tokens(config, rows, length)


def log_probs(model, params, tokens):
    """By the oracle: float64 [B, T-1]."""
    logits = oracle.logits(model.config, params, oracle.from_policy(model.kv), tokens)
    logp = np.log(oracle.softmax(logits[:, :-1]))
    return np.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize("kv", POLICIES, ids=str)
def test_scores_and_loss(kv):
    model, params, tokens = setup(kv)
    want = log_probs(model, params, tokens)
    for block_len in (None, 5):
        got = fk.score(model, params, tokens, block_len=block_len)
        assert got.dtype == np.float32
        assert_close(got, want, LOGITS)
        assert_close(got.mean(), want.mean(), LOSS)


def test_the_vocabulary_limits_the_block(monkeypatch):
    model, params, tokens = setup(POLICIES[0])
    want = fk.score(model, params, tokens)
    # A fresh model, since programs that are compiled do not read the constant again.
    model = model.clone(kv=fk.FreqKVConfig(16, 4, method="fft"))
    monkeypatch.setattr(programs, "LOGITS_AT_ONCE", 7 * 2 * 61)
    assert_close(fk.score(model, params, tokens), want, LOGITS)


def test_rows_of_different_lengths():
    model, params, tokens = setup(POLICIES[0], rows=3)
    lengths = [57, 1, 30]
    got = np.asarray(fk.score(model, params, tokens, lengths))
    want = log_probs(model, params, tokens)
    for row, n in enumerate(lengths):
        assert_close(got[row, : n - 1], want[row, : n - 1], LOGITS)
        assert not got[row, n - 1 :].any()


def test_behind_a_state():
    model, params, tokens = setup(POLICIES[0])
    _, state = fk.prefill(model, params, tokens[:, :20])
    for _ in range(2):  # the state stays usable
        got = fk.score(model, params, tokens[:, 20:], state=state)
        assert_close(got, log_probs(model, params, tokens)[:, 20:], LOGITS)


def test_one_token_has_nothing_to_score():
    model, params, tokens = setup(POLICIES[0])
    assert fk.score(model, params, tokens[:, :1]).shape == (2, 0)

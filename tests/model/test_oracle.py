"""The library's parallel form against the NumPy oracle: heads, policies, lengths of all kinds."""

import jax
import jax.numpy as jnp
import pytest

from freqkv_jax.config import RopeConfig
from freqkv_jax.kv import FreqKVConfig, FullConfig, SinkWindowConfig
from freqkv_jax.model.llama import Llama
from tests import oracle
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, LOSS, assert_close

HEADS = [(4, 4), (4, 2), (6, 2), (3, 1)]
# (kv, T). Spans, kept lengths and chunks odd and even, none a multiple of another.
CASES = [
    (FreqKVConfig(16, 4), 45),
    (FreqKVConfig(17, 3), 61),  # span 14, keep 7
    (FreqKVConfig(16, 4, method="fft"), 45),
    (FreqKVConfig(18, 3, 4, 0.5, method="fft"), 47),  # span 11, keep 5
    (FreqKVConfig(16, 2, 3, 0.37), 50),  # span 11, keep 4, chunk 7
    (FreqKVConfig(13, 0), 40),  # no sinks, span 13, keep 6
    (FreqKVConfig(12, 4, 0, 0.0), 37),  # L = 0: sinks and a window that starts anew
    (FreqKVConfig(12, 0, 5, 0.0), 37),  # L = 0, recents only
    (FreqKVConfig(20, 1, 7, 0.8), 55),  # chunk 3: a dozen compressions
    (FreqKVConfig(9, 8), 30),  # span 1: every token drops one
    (FreqKVConfig(16, 0, 15), 30),
    (FreqKVConfig(1, 0, 0, 0.0), 12),  # one slot
    (FreqKVConfig(100, 0, 0, 0.29), 180),  # int(29 - 4e-15) = 28
    (SinkWindowConfig(16, 4), 45),
    (SinkWindowConfig(16, 2, 3, 0.37), 50),
    (FullConfig(), 33),
]


def check(config, kv, length, seed=0):
    params, tokens = random_params(config, seed), random_tokens(config, 2, length, seed)
    want = oracle.logits(config, params, oracle.from_policy(kv), tokens)
    got = jax.jit(Llama(config, kv).apply)({"params": params}, tokens)
    assert got.dtype == jnp.float32
    assert_close(got, want, LOGITS)
    log_probs = jax.nn.log_softmax(got[:, :-1])
    loss = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()
    assert_close(loss, oracle.mean_loss(want, tokens), LOSS)


@pytest.mark.parametrize("kv, length", CASES, ids=str)
def test_policies(kv, length):
    check(tiny_config(6, 2), kv, length)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kv", [FreqKVConfig(17, 3, 2), SinkWindowConfig(17, 3)], ids=str)
def test_heads(heads, kv):
    check(tiny_config(*heads), kv, 44, seed=1)


# N - 1, N, N + 1, P, P + 1, 1, and around the later compressions (N + Q, N + 2 Q).
@pytest.mark.parametrize("length", [2, 10, 11, 15, 16, 17, 22, 23, 28, 29])
def test_lengths(length):
    check(tiny_config(4, 2), FreqKVConfig(16, 4), length)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(5e5),
        RopeConfig(1e4, "linear", factor=4.0),
        RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 64),
    ],
    ids=lambda rope: f"{rope.rope_type}-{rope.theta:g}",
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rope_and_tied_embeddings(rope, tied):
    config = tiny_config(6, 2, rope=rope, tie_word_embeddings=tied)
    check(config, FreqKVConfig(24, 4), 70)


def test_one_token():
    config = tiny_config()
    params, tokens = random_params(config), random_tokens(config, 2, 1)
    want = oracle.logits(config, params, oracle.OraclePolicy(16), tokens)
    got = Llama(config, FreqKVConfig(16, 4)).apply({"params": params}, tokens)
    assert_close(got, want, LOGITS)

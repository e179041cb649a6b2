"""Gradients of the mean loss through every compression, against torch float64 autograd."""

import jax
import jax.numpy as jnp
import pytest

from freqkv_jax.kv import FreqKVConfig, FullConfig, SinkWindowConfig
from freqkv_jax.model.llama import Llama
from tests import torch_oracle
from tests.oracle import from_policy
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import GRAD_REL_L2, LOSS, assert_close, rel_l2

# (heads, kv, T): at least three compressions each, the last chunk partial.
CASES = [
    pytest.param((4, 4), FreqKVConfig(16, 4), 41, marks=pytest.mark.slow),
    ((6, 2), FreqKVConfig(16, 4), 41),
    pytest.param((6, 2), FreqKVConfig(16, 4, method="fft"), 41, marks=pytest.mark.slow),
    ((4, 2), FreqKVConfig(18, 3, 4, 0.5, method="fft"), 45),  # span 11, keep 5
    ((3, 1), FreqKVConfig(17, 2, 4, 0.45), 49),  # span 11, keep 4, R > 0
    ((4, 2), FreqKVConfig(15, 2, 3, 0.0), 47),  # L = 0
    ((4, 2), SinkWindowConfig(16, 4), 41),
    ((6, 2), FullConfig(), 30),
]


def check(config, kv, length):
    params, tokens = random_params(config), random_tokens(config, 2, length)
    want_loss, want = torch_oracle.loss_and_grads(config, params, from_policy(kv), tokens)
    model = Llama(config, kv)

    def mean_loss(params):
        log_probs = jax.nn.log_softmax(model.apply({"params": params}, tokens)[:, :-1])
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()

    loss, got = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert_close(loss, want_loss, LOSS)
    errors = jax.tree.map(rel_l2, got, want)
    bad = {
        jax.tree_util.keystr(path): error
        for path, error in jax.tree_util.tree_leaves_with_path(errors)
        if not error <= GRAD_REL_L2
    }
    assert not bad, f"relative L2 over {GRAD_REL_L2}: {bad}"


@pytest.mark.parametrize("heads, kv, length", CASES, ids=str)
def test_gradients(heads, kv, length):
    if kv.capacity is not None:
        assert kv.num_compressions(length) >= 3
    check(tiny_config(*heads), kv, length)


def test_gradients_tied_embeddings():
    check(tiny_config(4, 2, tie_word_embeddings=True), FreqKVConfig(16, 4), 41)

"""Chunks read group by group, for the memory's sake, give what all at once give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import kv as kv_policies
from freqkv_jax import nvidia
from freqkv_jax.model import self_attention
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS

CONFIG = tiny_config(num_layers=1)
PARAMS = random_params(CONFIG)
SIZES = {"cache_size": 16, "sink_size": 2, "recent_size": 4, "chunk": 3}
POLICIES = [
    fk.SpectralNoveltyConfig(bands=2, **SIZES),
    kv_policies.H2OConfig(**SIZES),
    fk.SinkWindowConfig(cache_size=16, sink_size=2, retain_ratio=0.8),
]
CACHE = 2 * 13 * 2 * 8 * 4  # bytes of one chunk's keys and values in one row


def grouped(monkeypatch, kv, rows, chunks):
    """A model that holds so many chunks' caches at once, and one that holds all."""
    for most in (CACHE * rows * chunks, 1 << 31):
        monkeypatch.setattr(self_attention, "CACHE_BYTES", most)
        yield fk.Llama(CONFIG, kv)


@pytest.mark.parametrize("kv", POLICIES, ids=lambda kv: kv.name)
@pytest.mark.parametrize(("length", "chunks"), [(16 + 8 * 3 + 2, 3), (16 + 6 * 3, 2), (16 + 4, 1)])
def test_results_and_gradients(kv, length, chunks, monkeypatch):
    assert kv.prefix == 13
    tokens = random_tokens(CONFIG, 2, length)

    def loss(params, model):
        logits = model.apply({"params": params}, tokens)
        return (logits**2).mean(), logits

    found = [
        jax.jit(jax.grad(functools.partial(loss, model=model), has_aux=True))(PARAMS)
        for model in grouped(monkeypatch, kv, 2, chunks)
    ]
    for some, whole in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(some, whole, atol=LOGITS, rtol=0)


def test_rows_of_different_length(monkeypatch):
    tokens, lengths = random_tokens(CONFIG, 3, 60), [60, 31, 12]
    found = []
    for model in grouped(monkeypatch, POLICIES[0], 3, 2):
        jax.clear_caches()  # of programs for equal models
        logits, state = fk.prefill(model, PARAMS, tokens, lengths)
        found.append((logits, state.seen, state.fill))
    for some, whole in zip(*found, strict=True):
        np.testing.assert_allclose(some, whole, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("remat", ["none", "attention", "dots", "full"])
def test_no_more_is_held(remat, present, monkeypatch):
    """Nor kept for the backward pass: not by a rematerialisation, nor where kernels are traced."""
    monkeypatch.setattr(nvidia, "present", lambda: present)
    config = tiny_config(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=64)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    kv = fk.FreqKVConfig(40, 2, 20)  # P = 31, Q = 9
    tokens = random_tokens(config, 1, 40 + 8 * 9)

    def held(chunks):
        model = fk.Llama(config, kv, "bfloat16", "blocked", remat=remat)

        def loss(params):
            return model.apply({"params": params}, tokens).sum()

        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        assert ("pallas_call" in text) == present
        # Of all eight chunks, in one piece or as groups in a loop.
        return any(f"bf16[{shape},31,2,64]" in text for shape in chunks)

    monkeypatch.setattr(self_attention, "CACHE_BYTES", 2 * 31 * 2 * 64 * 2 * 2)
    assert not held(("1,8", "4,1,2")) and held(("1,2",))
    monkeypatch.setattr(self_attention, "CACHE_BYTES", 1 << 31)
    assert held(("1,8",))


def test_groups_are_even_where_they_can_be():
    pairs = ((5, 8), (0, 8), (112, 34), (5, 4), (14, 4))
    assert [self_attention._part(*pair) for pair in pairs] == [5, 1, 28, 3, 4]

"""The blocked loss and its gradients against torch float64, on the golden model and a tied one."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import FreqKVConfig
from freqkv_jax.model.llama import Llama, maps
from freqkv_jax.training.loss import sum_loss
from tests import torch_oracle
from tests.hf_names import to_params
from tests.oracle import from_policy
from tests.tiny import parallel_logits, random_params, random_tokens, tiny_config
from tests.tolerances import GRAD_REL_L2, LOSS, assert_close, rel_l2

GOLDEN = Path(__file__).parent.parent / "data" / "goldens" / "mha"


def mean_loss(model, logits_at_once):
    def loss(params, tokens, mask):
        tree = {"params": params, "maps": maps(model)}
        total, count = sum_loss(model, tree, tokens, mask, logits_at_once)
        return total / count

    return jax.jit(jax.value_and_grad(loss))


def check(config, params, kv, tokens, remat, logits_at_once):
    want_loss, want = torch_oracle.loss_and_grads(config, params, from_policy(kv), tokens)
    run = mean_loss(Llama(config, kv, remat=remat), logits_at_once)
    loss, got = run(params, tokens, np.ones_like(tokens, bool))
    assert_close(loss, want_loss, LOSS)
    errors = jax.tree_util.tree_leaves_with_path(jax.tree.map(rel_l2, got, want))
    bad = {jax.tree_util.keystr(p): e for p, e in errors if not e <= GRAD_REL_L2}
    assert not bad, f"relative L2 over {GRAD_REL_L2}: {bad}"


@pytest.mark.parametrize("remat", ["none", "full"])
def test_golden_model(remat):
    config = LlamaConfig.from_hf(json.loads((GOLDEN / "config.json").read_text()))
    params = to_params(load_file(GOLDEN / "model.safetensors"), config)
    tokens = np.load(GOLDEN / "logits.npz")["tokens"].astype(np.int32)
    check(config, params, FreqKVConfig(cache_size=64), tokens, remat, 1 << 11)


def test_tied_model_in_blocks_that_do_not_divide():
    config = tiny_config(num_layers=1, tie_word_embeddings=True)
    tokens = random_tokens(config, 2, 41)
    check(config, random_params(config), FreqKVConfig(16, 4), tokens, "dots", 61 * 2 * 7)


@functools.cache
def small():
    config = tiny_config(num_layers=1)
    return Llama(config, FreqKVConfig(16, 4)), random_params(config), random_tokens(config, 2, 30)


@pytest.mark.parametrize("at_once", [1, 61 * 2 * 4, 1 << 20])
def test_blocks_change_nothing_and_masked_tokens_do_not_count(at_once):
    model, params, tokens = small()
    mask = np.random.default_rng(0).random(tokens.shape) < 0.5
    mask[:, 0] = True  # nothing predicts it
    run = jax.jit(functools.partial(sum_loss, model, logits_at_once=at_once))
    total, count = run({"params": params}, tokens, mask)
    log_probs = jax.nn.log_softmax(parallel_logits(model, params, tokens, 30))
    chosen = np.take_along_axis(np.asarray(log_probs)[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    assert int(count) == mask[:, 1:].sum()
    np.testing.assert_allclose(total, -(chosen * mask[:, 1:]).sum(), rtol=1e-6)


def test_no_logits_of_the_whole_text_exist():
    model, params, tokens = small()

    def loss(params):
        mask = jnp.ones(tokens.shape, bool)
        return sum_loss(model, {"params": params}, tokens, mask, 61 * 2 * 5)[0]

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "f32[2,5,61]" in text
    assert "f32[2,30,61]" not in text and "f32[2,29,61]" not in text


def test_a_frozen_head_gets_no_gradient():
    model, params, tokens = small()

    def loss(norm, head):
        tree = {"params": params | {"norm": norm, "lm_head": head}}
        return sum_loss(model, tree, tokens, jnp.ones(tokens.shape, bool))[0]

    for argnums, made in [(0, False), (1, True)]:
        text = str(jax.make_jaxpr(jax.grad(loss, argnums))(params["norm"], params["lm_head"]))
        assert ("f32[1,32,61]" in text) is made

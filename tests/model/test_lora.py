"""Adapters: zero b changes nothing, and merging them equals running beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax.kv import FreqKVConfig, FullConfig
from freqkv_jax.model import lora
from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import TRAINABLE_RULES, lora_shardings, make_mesh, match_specs
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, assert_close

CONFIG = tiny_config(num_layers=1)
MODEL = Llama(CONFIG, FreqKVConfig(16, 4))
APPLY = jax.jit(MODEL.apply)


def adapters(seed=0):
    """Random adapters on every target, b not zero."""
    tree = lora.init_lora(CONFIG, list(lora.TARGETS), 3, seed)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32), tree)


def test_zero_b_is_the_base_and_merged_is_adapted():
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 2, 41)
    fresh = lora.init_lora(CONFIG, list(lora.TARGETS), 3)
    base = APPLY({"params": params}, tokens)
    same = APPLY({"params": params, "lora": lora.collection(fresh, 2.0, "float32")}, tokens)
    np.testing.assert_array_equal(base, same)
    tree = adapters()
    adapted = APPLY({"params": params, "lora": lora.collection(tree, 2.0, "float32")}, tokens)
    merged = APPLY({"params": lora.merge_lora(params, tree, 2.0)}, tokens)
    assert np.abs(adapted - base).max() > 0.1
    assert_close(adapted, merged, LOGITS)


def test_every_target_is_merged_into_its_kernel():
    params = random_params(CONFIG)
    for name, (part, leaf) in lora.TARGETS.items():
        tree = lora.init_lora(CONFIG, [name], 2)
        ones = jax.tree.map(jnp.ones_like, tree)
        merged = lora.merge_lora(params, ones, 0.5)
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, merged)
        assert changed["layers_0"][part][leaf]["kernel"]
        assert sum(jax.tree.leaves(changed)) == 1
        difference = merged["layers_0"][part][leaf]["kernel"]
        difference = difference - params["layers_0"][part][leaf]["kernel"]
        assert_close(difference, np.ones_like(difference), 1e-6)


def test_fresh_adapters():
    tree = lora.init_lora(CONFIG, ["q", "down"], 4)
    assert set(tree["layers_0"]) == {"attention", "mlp"}
    down = tree["layers_0"]["mlp"]["down"]
    assert down["a"].shape == (44, 4) and down["b"].shape == (4, 32)
    assert not np.any(down["b"]) and 0.1 < np.abs(down["a"]).max() <= 44**-0.5
    q = tree["layers_0"]["attention"]["q"]["a"]
    assert not np.array_equal(q[:32], down["a"][:32])
    shapes = lora.abstract_lora(CONFIG, ["q", "down"], 4)
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(lambda x: x.shape, shapes)


@pytest.mark.parametrize(
    "targets, rank, message",
    [(["q", "w"], 4, "name one or more of q, k"), ([], 4, "LoRA targets"), (["q"], 0, "rank")],
)
def test_bad_adapters(targets, rank, message):
    with pytest.raises(ValueError, match=message):
        lora.init_lora(CONFIG, targets, rank)


def test_every_adapter_has_a_rule_and_drawing_does_not_depend_on_the_mesh():
    config = tiny_config(num_layers=1, intermediate_size=48)
    alone = lora.init_lora(config, list(lora.TARGETS), 3)
    spread = lora.init_lora(config, list(lora.TARGETS), 3, mesh=make_mesh(2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, alone, spread)
    o = spread["layers_0"]["attention"]["o"]
    assert o["a"].addressable_shards[0].data.shape == (16, 3)
    assert o["b"].addressable_shards[0].data.shape == (3, 16)
    lora_shardings(alone, make_mesh(2, 2, 2))
    match_specs({"lora": alone, "params": random_params(config)}, TRAINABLE_RULES)


def test_remat_must_be_known():
    allowed = "allowed: none, attention, dots, full"
    with pytest.raises(ValueError, match=f"remat 'some' is unknown; {allowed}"):
        MODEL.clone(remat="some").init(jax.random.key(0), random_tokens(CONFIG, 1, 3))


def test_attention_is_not_done_again_where_its_results_are_kept():
    config = tiny_config(num_layers=1)
    tokens = random_tokens(config, 1, 600)  # more than four blocks of queries: they run in loops

    def loops(remat):
        model = Llama(config, FullConfig(), attention="blocked", remat=remat)

        def loss(params):
            return model.apply({"params": params}, tokens).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(random_params(config))).count("scan[")

    assert loops("dots") - loops("attention") == loops("none") // 2 > 0

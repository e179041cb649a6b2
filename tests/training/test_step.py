"""The optimizer step: what moves, what stays, and that parts and devices change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax.model.llama import Llama, maps
from freqkv_jax.sharding import make_mesh
from freqkv_jax.training.step import (
    abstract_train_state,
    flops_per_step,
    init_state,
    make_train_step,
    state_shardings,
)
from freqkv_jax.training.trainable import lora_scale, merge, split, variables
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import BF16_LOSS, LOGITS, SHARDED_LOSS, assert_close
from tests.training.runs import run_config

CONFIG = tiny_config(vocab_size=64, intermediate_size=48, num_layers=1)
PARAMS = random_params(CONFIG)
TOKENS = random_tokens(CONFIG, 8, 41)
# Rows with very different numbers of tokens that count.
MASK = np.arange(41)[None] < np.array([41, 3, 41, 20, 41, 41, 7, 30])[:, None]
BATCH = {"tokens": TOKENS, "mask": MASK}


@functools.cache
def compiled(cfg, mesh=None):
    return make_train_step(cfg, Llama(CONFIG, cfg.kv, cfg.model.dtype), mesh)


def run(cfg, mesh=None, steps=5, batch=BATCH):
    model = Llama(CONFIG, cfg.kv, cfg.model.dtype)
    state, frozen = init_state(cfg, model, PARAMS, mesh)
    step, losses = compiled(cfg, mesh), []
    for _ in range(steps):
        state, metrics = step(state, frozen, maps(model), batch)
        losses.append(float(metrics["loss"]))
    return losses, state, frozen, metrics


@functools.cache
def reference():
    return run(run_config(remat="none"))


def test_lora_step_changes_what_is_trained_only():
    losses, state, frozen, metrics = reference()
    assert losses[-1] < losses[0] - 0.1
    assert set(state.trainable["params"]) == {"embed", "norm", "layers_0"}
    assert set(state.trainable["params"]["layers_0"]) == {"input_norm", "post_norm"}
    assert set(frozen) == {"layers_0", "lm_head"}
    for name in "qkvo":
        kernel = frozen["layers_0"]["attention"][name]["kernel"]
        np.testing.assert_array_equal(kernel, PARAMS["layers_0"]["attention"][name]["kernel"])
        assert np.any(state.trainable["lora"]["layers_0"]["attention"][name]["b"])
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * trained  # none for what is frozen
    assert int(state.step) == 5 and float(metrics["tokens"]) == MASK[:, 1:].sum()
    assert bool(metrics["finite"]) and np.isclose(float(metrics["learning_rate"]), 0.01)


def test_the_base_is_not_donated_and_the_state_is():
    cfg = run_config(remat="none")
    model = Llama(CONFIG, cfg.kv)
    base = jax.tree.map(jnp.asarray, PARAMS)
    state, frozen = init_state(cfg, model, base)
    compiled(cfg)(state, frozen, maps(model), BATCH)
    assert not any(x.is_deleted() for x in jax.tree.leaves((base, frozen)))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trainable))


def test_merged_is_what_was_trained():
    _, state, frozen, _ = reference()
    cfg = run_config()
    model, scale = Llama(CONFIG, cfg.kv), lora_scale(cfg.train)
    assert scale == 2.0
    apply = jax.jit(model.apply)
    adapted = apply(variables(model, state.trainable, frozen, maps(model), scale), TOKENS)
    merged = merge(state.trainable, frozen, scale)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(np.shape, PARAMS)
    assert_close(apply({"params": merged}, TOKENS), adapted, LOGITS)


def test_micro_batches_change_nothing():
    losses, state, _, _ = run(run_config(micro_batch=2, remat="none"))
    np.testing.assert_allclose(losses, reference()[0], atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        state.trainable,
        reference()[1].trainable,
    )


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mesh_changes_nothing(scan_layers):
    mesh = make_mesh(2, 2, 2)
    split = {"data": 2, "fsdp": 2, "tensor": 2}
    cfg = run_config(mesh=split, micro_batch=1, scan_layers=scan_layers)
    losses, state, frozen, _ = run(cfg, mesh)
    np.testing.assert_allclose(losses, reference()[0], atol=SHARDED_LOSS)
    o = state.trainable["lora"]["layers_0"]["attention"]["o"]["a"]
    assert o.addressable_shards[0].data.shape == (16, 8)
    assert frozen["lm_head"]["kernel"].addressable_shards[0].data.shape == (16, 32)


def test_bfloat16_follows_float32():
    cfg = run_config(remat="none")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype="bfloat16"))
    losses, state, frozen, _ = run(cfg)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert losses != reference()[0]
    np.testing.assert_allclose(losses, reference()[0], rtol=BF16_LOSS)


def test_bad_batches_change_nothing():
    cfg = run_config(remat="none")
    model = Llama(CONFIG, cfg.kv)
    state, frozen = init_state(cfg, model, PARAMS)
    before = jax.tree.map(np.array, state)
    step = compiled(cfg)
    state, metrics = step(state, frozen, maps(model), BATCH | {"limit": np.float32(0.5)})
    assert not metrics["finite"] and float(metrics["loss"]) > 0.5
    jax.tree.map(np.testing.assert_array_equal, state.trainable, before.trainable)
    state, metrics = step(state, frozen, maps(model), BATCH)
    assert metrics["finite"] and int(state.step) == 2
    poisoned = jax.tree.map(lambda x: x * np.nan, frozen)
    kept = jax.tree.map(np.array, state.trainable)
    state, metrics = step(state, poisoned, maps(model), BATCH)
    assert not metrics["finite"] and np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state.trainable, kept)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
@pytest.mark.parametrize("mode", ["lora", "full", "norms"])
def test_shapes_and_shardings(name, mode):
    cfg = run_config(optimizer={"name": name}, mode=mode)
    model = Llama(CONFIG, cfg.kv)
    state, frozen = abstract_train_state(cfg, model)
    mesh = make_mesh(2, 2, 2)
    where = state_shardings(state, mesh)
    # Every spec fits its leaf.
    jax.tree.map(lambda leaf, s: s.shard_shape(leaf.shape), state, where)
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    if mode == "full":
        assert not frozen and trained == CONFIG.num_params
    if mode == "norms":
        assert trained == 3 * 32 and state.trainable["lora"] == {}
    moments = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(where.opt_state), strict=True)
    sizes = [int(np.prod(s.shard_shape(leaf.shape))) for leaf, s in moments]
    if name == "adamw" and mode == "full":
        assert sum(sizes) < trained  # two moments, split over four devices or more


def test_frozen_weights_are_cast_and_masters_are_float32():
    trainable, frozen = split(run_config().train, PARAMS, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}


def test_flops_by_hand():
    cfg = run_config(mode="full", batch_size=8)
    model = Llama(CONFIG, cfg.kv)
    e, heads, kv, f, v = 32, 32, 16, 48, 64
    weights = 2 * e * heads + 2 * e * kv + 3 * e * f + e * v
    # N=16, S=4, span 12, keep 6, chunk 6: fills 1..16, then 11..16 again and again.
    slots = sum(range(1, 17)) + sum(11 + (i % 6) for i in range(41 - 16))
    want = 6 * weights * 41 + 12 * slots * heads + 5 * 2 * 12 * 6 * 2 * kv
    assert flops_per_step(cfg, model) == 8 * want
    # Embeddings that are only looked up cost nothing, an adapter 6 a weight and the rest 4.
    lora = 8 * (4 * e + 2 * heads + 2 * kv)
    adapted = flops_per_step(run_config(), model)
    assert adapted == 8 * (want - 2 * weights * 41 + 6 * lora * 41)


def test_mesh_that_does_not_divide():
    cfg = run_config(batch_size=6)
    with pytest.raises(ValueError, match="multiple of mesh.data"):
        make_train_step(cfg, Llama(CONFIG, cfg.kv), make_mesh(2, 2, 2))

"""Schedules, decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from freqkv_jax.training.schema import OptimizerSection

TREE = {
    "lora": {"layers_0": {"attention": {"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}}},
    "params": {"norm": {"scale": jnp.ones(4)}, "embed": {"embedding": jnp.ones((6, 4))}},
}


def rates(steps=100, **fields):
    rate = make_schedule(OptimizerSection(learning_rate=2.0, **fields), steps)
    return np.asarray(rate(np.arange(steps)))


def test_constant_after_warm_up():
    got = rates(warmup_steps=20)
    np.testing.assert_allclose(got[:20], 2.0 * np.arange(1, 21) / 20, rtol=1e-6)
    assert np.all(got[20:] == 2.0)
    assert np.all(rates(warmup_steps=0) == 2.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_falls_to_its_floor_at_the_last_step(schedule):
    got = rates(schedule=schedule, warmup_steps=10, final_ratio=0.1, decay_ratio=0.2)
    assert got.max() == 2.0 and got[9] == 2.0
    np.testing.assert_allclose(got[-1], 0.2, rtol=1e-5)
    assert np.all(np.diff(got[10:]) <= 0)
    halfway = {"cosine": 1.1, "linear": 1.1, "wsd": 2.0}[schedule]
    np.testing.assert_allclose(got[10:100].mean() if schedule != "wsd" else got[79], halfway, 0.01)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_norms_do_not_decay(name):
    section = OptimizerSection(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    optimizer, _ = make_optimizer(section, 10)
    zero = jax.tree.map(jnp.zeros_like, TREE)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(TREE), TREE)
    np.testing.assert_allclose(updates["params"]["embed"]["embedding"], -0.05, rtol=1e-5)
    np.testing.assert_allclose(updates["lora"]["layers_0"]["attention"]["q"]["b"], -0.05, rtol=1e-5)
    assert not np.any(updates["params"]["norm"]["scale"])


def test_decay_mask():
    mask = decay_mask(TREE | {"bias": jnp.ones((1, 4))})
    assert mask["params"] == {"norm": {"scale": False}, "embed": {"embedding": True}}
    assert mask["bias"] is False


def test_clipping_makes_large_gradients_alike():
    section = OptimizerSection(name="adamw", warmup_steps=0, clip_norm=1.0, b1=0.0, b2=0.0, eps=1.0)
    optimizer, _ = make_optimizer(section, 10)
    state = optimizer.init(TREE)
    update = jax.jit(optimizer.update)
    nine = jax.tree.map(lambda x: jnp.full_like(x, 9), TREE)
    hundred = jax.tree.map(lambda x: jnp.full_like(x, 100), TREE)
    one, two = (update(grads, state, TREE)[0] for grads in (nine, hundred))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)


def test_unknown_names():
    section = OptimizerSection()
    object.__setattr__(section, "name", "sgd")
    with pytest.raises(ValueError, match="allowed: adamw, adafactor, lion"):
        make_optimizer(section, 10)
    object.__setattr__(section, "schedule", "step")
    with pytest.raises(ValueError, match="allowed: constant, cosine, linear, wsd"):
        make_schedule(section, 10)

"""A loop over the layers gives what the layers give one by one."""

import jax
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import reading
from freqkv_jax.model.lora import init_lora
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import GRAD_REL_L2, PRIMITIVE, rel_l2

CONFIG = tiny_config(num_layers=3)
POLICIES = {
    "freqkv": fk.FreqKVConfig(cache_size=16, sink_size=2),
    "full": fk.FullConfig(),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_reading_by_a_loop_changes_nothing(policy, monkeypatch):
    model, params = fk.Llama(CONFIG, POLICIES[policy]), random_params(CONFIG)
    ids = np.random.default_rng(1).integers(0, 61, (2, 25))
    lengths = [25, 20]
    found = []
    for limit in (0, reading.SCAN_BYTES):
        monkeypatch.setattr(reading, "SCAN_BYTES", limit)
        assert reading.Runner(model, params, 2).reading.scan_layers == bool(limit)
        found.append(fk.prefill(model, params, ids, lengths))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, atol=PRIMITIVE)


def test_the_loop_is_one_program_for_all_layers():
    """The program has as many equations with three layers as with two."""

    def equations(num_layers):
        config = tiny_config(num_layers=num_layers)
        model = fk.Llama(config, POLICIES["full"], scan_layers=True)
        state = jax.eval_shape(lambda: reading.empty_state(config, model.kv, 1, "float32", 16))
        tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
        made = jax.make_jaxpr(lambda p, t, s: model.apply({"params": p}, t, s, method="extend"))(
            random_params(config), tokens, state
        )
        scans = [e for e in made.eqns if e.primitive.name == "scan"]
        assert len(scans) == 1 and scans[0].params["length"] == num_layers
        return len(scans[0].params["jaxpr"].eqns)

    assert equations(3) == equations(2) > 20


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_gradients_of_a_loop_are_those_of_the_layers(remat):
    """With adapters, and a text of several compressions."""
    config = tiny_config(num_layers=2)
    params, ids = random_params(config), random_tokens(config, 2, 25)
    adapters = init_lora(config, ("q", "down"), 2, seed=0)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    found = []
    for scan_layers in (False, True):
        model = fk.Llama(config, POLICIES["freqkv"], remat=remat, scan_layers=scan_layers)

        def loss(params, adapters, model=model):
            return (model.apply({"params": params, "lora": adapters}, ids) ** 2).mean()

        found.append(jax.jit(jax.grad(loss, (0, 1)))(params, adapters))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert rel_l2(other, one) <= GRAD_REL_L2

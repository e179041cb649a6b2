"""The mesh, the tables of sharding rules, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from freqkv_jax import sharding
from freqkv_jax.config import SHAPES, shape_named
from freqkv_jax.kv import FreqKVConfig, FullConfig
from freqkv_jax.kv.state import empty_state
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.params import init_params
from tests.tiny import random_params, tiny_config


def leaves(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {sharding.tree_path(path): leaf for path, leaf in flat}


def test_mesh_axes_are_auto():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    few = jax.devices()[:4]
    assert dict(sharding.make_mesh(tensor=-1, devices=few).shape)["tensor"] == 4


def test_a_small_mesh_takes_the_first_devices():
    assert list(sharding.make_mesh(data=2).devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "at most one of them -1, got data=0,fsdp=1,tensor=1"),
        ((-2, 1, 1), "got data=-2"),
        ((-1, -1, 1), "at most one of them -1"),
        ((-1, 3, 1), "3 does not divide the 8 devices"),
        ((4, 2, 2), "needs 16 devices, got 8"),
    ],
)
def test_mesh_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_mesh_uses_all_devices_that_are_named():
    with pytest.raises(ValueError, match="needs 2 devices, got 8"):
        sharding.make_mesh(data=2, devices=jax.devices())


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(tied):
    params = random_params(tiny_config(tie_word_embeddings=tied))
    specs = leaves(sharding.param_specs(params))
    assert specs.keys() == leaves(params).keys()
    assert specs["layers_1/attention/o/kernel"] == P("tensor", "fsdp")
    assert specs["layers_0/mlp/gate/kernel"] == P("fsdp", "tensor")
    assert specs["layers_0/input_norm/scale"] == P()
    assert sharding.unused_rules(params) == []


def test_unused_rules_are_named():
    params = random_params(tiny_config())
    del params["embed"]
    assert sharding.unused_rules(params) == ["embed/embedding"]


def test_no_rule_uses_an_axis_twice():
    for pattern, spec in (*sharding.RULES, *sharding.STATE_RULES):
        used = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry)]
        assert len(used) == len(set(used)), pattern
        assert set(used) <= set(sharding.AXES), pattern


def test_a_rule_that_uses_an_axis_twice_is_refused():
    rules = [(r"w", P(("data", "fsdp"), "fsdp"))]
    with pytest.raises(ValueError, match="'w' uses a mesh axis twice"):
        sharding.match_specs({"w": np.zeros((2, 2))}, rules)


def test_parameters_without_a_rule_are_listed_together():
    params = random_params(tiny_config())
    params["layers_0"]["attention"]["q"]["bias"] = np.zeros(32)
    params["extra"] = {"kernel": np.zeros((2, 2))}
    with pytest.raises(ValueError) as error:
        sharding.param_specs(params)
    assert "layers_0/attention/q/bias (no rule matches)" in str(error.value)
    assert "extra/kernel (no rule matches)" in str(error.value)


def test_a_parameter_of_too_low_a_rank_is_refused():
    with pytest.raises(ValueError, match=r"lm_head/kernel \(shape \(4,\) is too short"):
        sharding.param_specs({"lm_head": {"kernel": np.zeros(4)}})


def test_parameters_are_split_as_the_table_says():
    mesh = sharding.make_mesh(2, 2, 2)
    params = random_params(tiny_config(vocab_size=64))
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    down = placed["layers_0"]["mlp"]["down"]["kernel"]
    assert down.addressable_shards[0].data.shape == (22, 16)
    np.testing.assert_array_equal(down, params["layers_0"]["mlp"]["down"]["kernel"])
    assert placed["norm"]["scale"].is_fully_replicated


def test_state_is_split_by_row_and_head_and_never_by_slot():
    mesh = sharding.make_mesh(2, 2, 2)
    kv = FreqKVConfig(cache_size=16, sink_size=2)
    state = empty_state(tiny_config(), kv, batch=4, dtype="float32")
    shardings = sharding.state_shardings(state, mesh)
    placed = jax.device_put(state, shardings)
    for leaf in jax.tree.leaves(placed.layers):
        assert leaf.addressable_shards[0].data.shape == (1, 1, 16, 8)
    for counter in (placed.fill, placed.seen, placed.end_token):
        assert counter.is_fully_replicated
    assert placed.policy == kv


def test_state_that_the_mesh_does_not_divide_is_refused():
    state = empty_state(tiny_config(), FreqKVConfig(cache_size=16), batch=3, dtype="float32")
    with pytest.raises(ValueError, match="axis of 3 by data\\*fsdp=4"):
        sharding.state_shardings(state, sharding.make_mesh(2, 2, 2))


def test_state_arrays_without_a_rule_are_refused():
    with pytest.raises(ValueError, match="scratch"):
        sharding.state_specs({"layers": [np.zeros((2, 2, 4, 8))], "scratch": np.zeros(3)})


def test_check_mesh_names_what_does_not_divide():
    config = shape_named("smollm2-135m")
    with pytest.raises(ValueError) as error:
        sharding.check_mesh(config, sharding.make_mesh(2, 2, 2), batch=3)
    text = str(error.value)
    assert "num_heads 9 by tensor=2" in text
    assert "num_kv_heads 3 by tensor=2" in text
    assert "batch 3 by data*fsdp=4" in text
    assert "tensor must divide 3" in text and "hidden_size" not in text


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b"])
def test_check_mesh_accepts_what_divides(name):
    sharding.check_mesh(SHAPES[name], sharding.make_mesh(1, 1, 8), batch=1)
    sharding.check_mesh(SHAPES[name], sharding.make_mesh(2, 2, 2), batch=8)


def test_random_parameters_need_a_mesh_that_divides():
    model = Llama(tiny_config(4, 2), FullConfig())
    with pytest.raises(ValueError, match="does not divide num_kv_heads 2 by tensor=4, vocab_size"):
        init_params(model, mesh=sharding.make_mesh(tensor=4))


def test_check_mesh_checks_each_size():
    mesh = sharding.make_mesh(1, 2, 4)
    good = {"num_heads": 8, "num_kv_heads": 4, "vocab_size": 64, "intermediate_size": 48}
    sharding.check_mesh(tiny_config(**good), mesh)
    for field, value, text in [
        ("vocab_size", 61, "vocab_size 61 by tensor=4"),
        ("intermediate_size", 46, "intermediate_size 46 by tensor=4"),
        ("num_kv_heads", 2, "num_kv_heads 2 by tensor=4"),
        ("hidden_size", 33, "hidden_size 33 by fsdp=2"),
    ]:
        with pytest.raises(ValueError, match=text):
            sharding.check_mesh(tiny_config(**(good | {field: value})), mesh)


def test_mesh_of_finds_the_mesh_of_arrays():
    mesh = sharding.make_mesh(2, 2, 2)
    x = jnp.zeros((4, 4))
    assert sharding.mesh_of({"a": x, "b": None}) is None
    one = jax.device_put(x, NamedSharding(sharding.make_mesh(), P()))
    assert sharding.mesh_of(one) is None
    assert (
        sharding.mesh_of({"a": x, "b": jax.device_put(x, NamedSharding(mesh, P("data")))}) == mesh
    )


def test_constrain_without_a_mesh_changes_nothing():
    x = jnp.ones((4, 4))
    assert sharding.constrain(x, P("data")) is x


def test_constrain_splits_under_a_mesh():
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x * 2, P(("data", "fsdp"), "tensor")))(
            jnp.ones((4, 4))
        )
    assert y.sharding.spec == P(("data", "fsdp"), "tensor")


def test_constrain_leaves_out_axes_that_the_mesh_lacks():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, P(("data", "fsdp"), "tensor")))(
            jnp.ones((8, 2))
        )
    assert y.addressable_shards[0].data.shape == (1, 2)


def test_constrain_inside_shard_map_leaves_the_rest_alone():
    mesh = sharding.make_mesh(2, 2, 2)

    def double(x):
        return sharding.constrain(x * 2, P(("data", "fsdp"), "tensor"))

    with jax.set_mesh(mesh):
        y = jax.jit(jax.shard_map(double, in_specs=P("data"), out_specs=P("data")))(
            jnp.ones((4, 4))
        )
    np.testing.assert_array_equal(y, 2 * np.ones((4, 4)))

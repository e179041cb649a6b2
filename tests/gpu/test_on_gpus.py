"""Kernels on a mesh of two NVIDIA GPUs: the numbers of one.

Run with `make test-gpu`.
"""

import jax
import jax.numpy as jnp
import pytest

import freqkv_jax as fk
from freqkv_jax import sharding
from tests.test_kernels_on_meshes import (
    a_query_a_row,
    compiled,
    making_room,
    rounds_and_gradients,
)
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import BF16_PRIMITIVE_REL_L2, BF16_REL_L2, rel_l2

pytestmark = pytest.mark.gpu

CONFIG = tiny_config(8, 4, head_dim=64, hidden_size=512, intermediate_size=512, vocab_size=64)
TOKENS = random_tokens(CONFIG, 4, 700)
KV = fk.FreqKVConfig(256)
SHAPES = {"data": (2, 1, 1), "tensor": (1, 1, 2)}
KERNELS = {
    "rounds": lambda: rounds_and_gradients(fk.FreqKVConfig(1000, 4, 300)),
    "choosing": lambda: rounds_and_gradients(
        fk.SpectralNoveltyConfig(1024, recent_size=300, chunk=256)
    ),
    "making_room": lambda: making_room(fk.SpectralNoveltyConfig(1024, recent_size=300, chunk=256)),
    "rows": lambda: a_query_a_row([70, 3, 9, 127]),
    "one_fill": lambda: a_query_a_row(70),
}


@pytest.fixture(autouse=True)
def gpus():
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs: run make test-gpu on a machine that has them")


@pytest.mark.parametrize("axis", SHAPES)
@pytest.mark.parametrize("name", KERNELS)
def test_each_runs_its_own_rows_and_heads(name, axis):
    """Choices are made in the kernels, of the same bits: one made otherwise would show."""
    alone, split, moved = compiled(KERNELS[name](), SHAPES[axis])
    assert not moved
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        assert rel_l2(two, one) < BF16_PRIMITIVE_REL_L2


@pytest.fixture(params=SHAPES)
def mesh(request):
    return fk.make_mesh(*SHAPES[request.param], devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: jnp.asarray(x, "bfloat16"), random_params(CONFIG))


@pytest.fixture
def placed(mesh, params):
    return jax.device_put(params, sharding.param_shardings(params, mesh))


def test_reading_and_writing(placed, params):
    """FreqKV alone: what a policy chooses would hang on how products are summed before it."""
    model = fk.Llama(CONFIG, KV, "bfloat16")
    pairs = [(fk.score(model, placed, TOKENS), fk.score(model, params, TOKENS))]
    for lengths in (None, [700, 3, 260, 511]):
        one, state = fk.prefill(model, params, TOKENS, lengths)
        many, spread = fk.prefill(model, placed, TOKENS, lengths)
        pairs.append((many, one))
        _, one, _ = fk.decode(model, params, state, one, 1)
        _, many, _ = fk.decode(model, placed, spread, many, 1)
        pairs.append((many, one))
    for many, one in pairs:
        assert rel_l2(many, one) < BF16_REL_L2


def test_gradients(mesh, placed, params):
    model = fk.Llama(CONFIG, KV, "bfloat16")

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens).astype(jnp.float32)
        return (logits**2).mean()

    want = jax.jit(jax.grad(loss))(params, TOKENS)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss))(placed, TOKENS)
    for many, one in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rel_l2(many, one) < BF16_REL_L2

"""The first state of a run: what is read in which precision, and how often it is held."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax.sharding import make_mesh
from freqkv_jax.training import setup
from tests.tiny import random_params, tiny_config
from tests.training.runs import run_config
from tests.weights.files import gguf_tensors, leaves, write_gguf

CONFIG = tiny_config(num_layers=1, vocab_size=64)
PARAMS = random_params(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    fk.save_pretrained(fk.Llama(CONFIG, fk.FreqKVConfig(16), "float32"), PARAMS, path)
    return path


def first_state(path, mesh, **train):
    cfg = run_config(**train)
    about = dataclasses.replace(cfg.model, path=str(path), dtype="bfloat16")
    cfg = dataclasses.replace(cfg, model=about)
    model = fk.Llama(CONFIG, cfg.kv, "bfloat16")
    parts = types.SimpleNamespace(model=model, mesh=mesh)
    return setup.first_state(cfg, parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_masters_have_the_float32_values_of_the_file(folder, mode):
    mesh = make_mesh(1, 2, 2)
    state, frozen = first_state(folder, mesh, mode=mode)
    want, masters = leaves(PARAMS), leaves(state.trainable["params"])
    assert len(masters) == (len(want) if mode == "full" else 4)
    for path, master in masters.items():
        np.testing.assert_array_equal(master, want[path])
        assert master.dtype == np.float32
    assert any((x != x.astype(jnp.bfloat16)).any() for x in masters.values()), "else this is empty"
    for path, x in leaves(frozen).items():
        np.testing.assert_array_equal(x, want[path].astype(jnp.bfloat16))
    whole = {leaf.sharding.mesh for leaf in jax.tree.leaves((state, frozen))}
    assert whole == {mesh}


def test_masters_of_a_gguf_file_are_not_rounded(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", CONFIG, gguf_tensors(PARAMS, CONFIG))
    state, _ = first_state(file, make_mesh(), mode="lora")
    embedding = state.trainable["params"]["embed"]["embedding"]
    np.testing.assert_array_equal(embedding, PARAMS["embed"]["embedding"])


def test_masters_are_the_arrays_that_were_read(folder, monkeypatch):
    """No second copy of the weights is made."""
    read = []
    load = setup.weights.load_pretrained

    def spy(*args, **kwargs):
        model, params = load(*args, **kwargs)
        read.append(params)
        return model, params

    monkeypatch.setattr(setup.weights, "load_pretrained", spy)
    state, frozen = first_state(folder, make_mesh(), mode="lora")
    master = state.trainable["params"]["embed"]["embedding"]
    kernel = frozen["layers_0"]["attention"]["q"]["kernel"]
    for mine, base in ((master, read[0]["embed"]["embedding"]),
                       (kernel, read[0]["layers_0"]["attention"]["q"]["kernel"])):  # fmt: skip
        assert mine.unsafe_buffer_pointer() == base.unsafe_buffer_pointer()

"""Every packaged config: parsed, resolved, its step traced to shapes, its first comment whole."""

import dataclasses
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax import spectral
from freqkv_jax.config import SHAPES
from freqkv_jax.model.llama import Llama, maps
from freqkv_jax.training import schema
from freqkv_jax.training.plan import planned_config
from freqkv_jax.training.step import abstract_train_state, make_train_step
from freqkv_jax.training.yaml_file import packaged_configs, read_config_text

NAMES = (
    "tiny", "smollm2_8k", "llama2_7b_8k", "llama2_7b_16k", "llama2_7b_32k", "llama3_8b_16k",
    "llama2_7b_longalpaca", "llama2_7b_full",
)  # fmt: skip


@pytest.fixture(autouse=True)
def maps_of_nothing(monkeypatch):
    """Shapes are asked for, so the matrices are not reckoned: 8K slots take seconds."""

    def zeros(span, keep):
        return np.zeros((-(-keep // 2), -(-span // 2))), np.zeros((keep // 2, span // 2))

    monkeypatch.setattr(spectral, "folded_lowpass", zeros)


def traced(cfg, config):
    """The shapes of one step's results."""
    model = Llama(config, cfg.kv, cfg.model.dtype, cfg.model.attention)
    state, frozen = abstract_train_state(cfg, model)
    size = (cfg.train.batch_size, cfg.train.seq_len)
    batch = {
        "tokens": jax.ShapeDtypeStruct(size, jnp.int32),
        "mask": jax.ShapeDtypeStruct(size, jnp.bool_),
    }
    step = make_train_step(cfg, model, None)
    constants = jax.eval_shape(lambda: maps(model))
    return state, jax.eval_shape(step, state, frozen, constants, batch)


def test_the_list():
    assert sorted(packaged_configs()) == sorted(NAMES)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "configs/*.yaml" in project["tool"]["setuptools"]["package-data"]["freqkv_jax"]


@pytest.mark.parametrize("name", NAMES)
def test_parsed_and_resolved(name):
    cfg = schema.load(name)
    assert schema.from_dict(schema.to_dict(cfg)) == cfg
    assert cfg.run.dir == f"runs/{name}"
    # Sizes are known without a download.
    assert planned_config(cfg) == SHAPES[cfg.model.shape or cfg.model.path]


@pytest.mark.parametrize("name", NAMES)
def test_first_comment(name):
    head = read_config_text(name).split("run:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for part in ("Command:", "Hardware:", "Time:", "Expected:"):
        assert f"#   {part}" in head.replace("# ", "#   ", 1) or f"# {part}" in head
    assert f"freqkv train --config {name}" in head


@pytest.mark.parametrize("name", NAMES)
def test_traced_with_one_layer(name):
    cfg = schema.load(name)
    config = dataclasses.replace(planned_config(cfg), num_layers=1)
    before, (after, metrics) = traced(cfg, config)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, before, after)
    assert all(jax.tree.leaves(same))
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_traced_whole(name):
    cfg = schema.load(name)
    _, (_, metrics) = traced(cfg, planned_config(cfg))
    assert metrics["loss"].shape == ()


def test_the_papers_recipe():
    for name, cache, length in (
        ("llama2_7b_8k", 4096, 8192),
        ("llama2_7b_16k", 4096, 16384),
        ("llama2_7b_32k", 4096, 32768),
        ("llama3_8b_16k", 8192, 16384),
    ):
        cfg = schema.load(name)
        assert (cfg.kv.cache_size, cfg.kv.sink_size, cfg.kv.retain_ratio) == (cache, 4, 0.5)
        train, optimizer = cfg.train, cfg.optimizer
        assert (train.mode, train.lora_rank, train.lora_alpha) == ("lora", 8, 16)
        assert train.lora_targets == ("q", "k", "v", "o")
        assert train.train_embeddings and train.train_norms
        assert (train.batch_size, train.steps, train.seq_len) == (64, 1000, length)
        assert (optimizer.learning_rate, optimizer.schedule) == (2e-5, "constant")
        assert optimizer.warmup_steps == 20

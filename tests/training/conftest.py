"""A model of one layer on disk, which runs start from."""

import pytest

import freqkv_jax as fk
from tests.tiny import random_params, tiny_config
from tests.training.runs import KV


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A one-layer model on disk."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_config(num_layers=1, vocab_size=64)
    model = fk.Llama(config, fk.FreqKVConfig(**{k: v for k, v in KV.items() if k != "policy"}))
    fk.save_pretrained(model, random_params(config), folder)
    return folder

"""Rows that are padded for the products' sake change nothing."""

import jax
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax.model import llama
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import BF16_REL_L2, rel_l2

CONFIG = tiny_config(num_layers=1)
POLICIES = [fk.FullConfig(), fk.FreqKVConfig(cache_size=16, sink_size=2)]


@pytest.mark.parametrize("kv", POLICIES, ids=lambda kv: kv.name)
def test_a_length_of_no_multiple(kv, monkeypatch):
    monkeypatch.setattr(llama, "MANY_ROWS", 16)
    model, params = fk.Llama(CONFIG, kv, "bfloat16"), random_params(CONFIG)
    tokens = random_tokens(CONFIG, 2, 37)
    found = []
    for unit in (8, 1):
        monkeypatch.setattr(llama, "ROW_UNIT", unit)
        made = jax.make_jaxpr(lambda t: model.apply({"params": params}, t, method="hidden"))(tokens)
        assert ("bf16[2,40,32]" in str(made)) == (unit == 8)
        found.append(jax.jit(lambda t: model.apply({"params": params}, t))(tokens))
    assert rel_l2(*found) <= BF16_REL_L2
    assert found[0].shape == (2, 37, CONFIG.vocab_size)


def test_blocks_of_chunks(monkeypatch):
    """Seven tokens a chunk: the two chunks behind the first 16 tokens are no multiple."""
    monkeypatch.setattr(llama, "MANY_ROWS", 8)
    kv = fk.FreqKVConfig(cache_size=16, sink_size=2)
    model, params = fk.Llama(CONFIG, kv, "bfloat16"), random_params(CONFIG)
    tokens = np.asarray(random_tokens(CONFIG, 1, 16 + 15))  # the last is scored, not read
    found, paddings = [], []
    padding = llama.row_padding
    monkeypatch.setattr(
        llama, "row_padding", lambda *args: paddings.append(padding(*args)) or paddings[-1]
    )
    for unit, padded in ((8, [2]), (1, [0])):
        monkeypatch.setattr(llama, "ROW_UNIT", unit)
        jax.clear_caches()
        paddings.clear()
        found.append(fk.score(model, params, tokens))
        assert paddings == padded
    assert rel_l2(*found) <= BF16_REL_L2

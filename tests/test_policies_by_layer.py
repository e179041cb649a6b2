"""scripts/policies_by_layer.py: a policy a layer, of which equal ones are the model's own."""

import json

import jax
import numpy as np
import pytest

import freqkv_jax as fk
from tests.scripts import load_script
from tests.tiny import random_params, random_tokens, tiny_config

script = load_script("policies_by_layer")


def test_layers_that_are_equal_are_the_model():
    config = tiny_config(num_layers=3)
    params = jax.tree.map(np.asarray, random_params(config))
    kvs = script.policies("equal", 24, 3)
    assert len(set(kvs)) == 1
    tokens = random_tokens(config, 1, 90)
    found = script.Reader(fk.Llama(config, kvs[0]), params, kvs).losses(tokens)
    expected = fk.score(fk.Llama(config, kvs[0]), params, tokens)
    np.testing.assert_allclose(-found, np.asarray(expected)[0][: len(found)], atol=2e-4)
    other = script.policies("slots 3/2, 1, 1/2", 24, 3)
    assert [kv.cache_size for kv in other] == [36, 24, 12]
    changed = script.Reader(fk.Llama(config, kvs[0]), params, other).losses(tokens)
    assert np.abs(changed[40:] - found[40:]).max() > 1e-3


def test_every_setting_holds_as_many_slots():
    for name in script.SETTINGS:
        assert sum(kv.cache_size for kv in script.policies(name, 512, 30)) == 30 * 512


def test_what_is_there_is_not_measured_again(tmp_path, monkeypatch, capsys):
    result = tmp_path / "result.json"
    asked = {"cache_size": 8, "windows": 2, "seq_len": 16, "dtype": "float32", "model": "m"}
    losses = {"equal": [1.0, 2.0], "bands 1, 4, 16": [1.1, 2.3]}
    result.write_text(json.dumps({"asked": asked, "losses": losses}))
    words = ["x", str(result), "folder/m", "none", "--cache-size", "8", "--windows", "2"]
    words += ["--seq-len", "16", "--settings", "equal"]
    monkeypatch.setattr("sys.argv", words)
    script.main()
    # exp(0.2) - 1: percent of perplexity, not nats.
    assert "+22.14 ± 12.21" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*words, "--dtype", "bfloat16"])
    with pytest.raises(SystemExit):
        script.main()

"""scripts/worn_keys.py: two runs that differ in nothing but the rounding of turned keys."""

import json

import numpy as np
import pytest

import freqkv_jax as fk
from tests.scripts import load_script
from tests.tiny import random_params, tiny_config

script = load_script("worn_keys")


def test_only_turned_keys_are_rounded(tmp_path, monkeypatch, capsys):
    for name, value in (("SIZE", 32), ("LENGTH", 96), ("CHUNKS", (4,))):
        monkeypatch.setattr(script, name, value)
    config = tiny_config()
    params = random_params(config)
    monkeypatch.setattr(
        fk, "load_pretrained", lambda path, kv, dtype: (fk.Llama(config, kv, dtype), params)
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 96).astype(np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    script.main(str(tmp_path / "out.json"), "model", str(tmp_path / "ids.bin"))
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    kv = fk.SpectralNoveltyConfig(32, recent_size=8, chunk=4)
    scores = fk.score(fk.Llama(config, kv), params, ids[None].astype(np.int32))
    want = -float(scores[0, 31:].mean())
    assert row["loss"] == pytest.approx(want, abs=1e-5)
    assert 1e-6 < abs(row["loss_rounded"] - want) < 0.1
    assert "4 a round" in capsys.readouterr().out

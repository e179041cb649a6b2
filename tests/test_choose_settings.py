"""The rule of scripts/choose_settings.py, on made-up results."""

import json
import sys

import pytest
import yaml

from freqkv_jax.evals.suite import find_suite, read_suite
from tests.scripts import load_script

NOW = (
    "B1-v0",
    "B16-v0",
    "B16",
    *(f"{p}-Q256" for p in ("window", "random", "knorm", "snapkv", "h2o")),
)


def run(folder, monkeypatch, measured):
    """The suite that is written where `measured` has (perplexity, nats) of what is not (20, 2)."""
    text, name = find_suite("cache_study_choices")
    for cell in read_suite(text, name, {"model": "M"}).cells:
        perplexity, nats = measured.get(cell.policy_name, (20.0, 2.0))
        result = {"perplexity": perplexity, "nats_per_digit": nats}
        (folder / f"{cell.name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["choose", str(folder), str(folder / "out.yaml")])
    load_script("choose_settings").main()
    return (folder / "out.yaml").read_text()


def test_the_settings_that_stand_there_leave_the_suite_as_it_is(tmp_path, monkeypatch):
    got = run(tmp_path, monkeypatch, dict.fromkeys(NOW, (20.0, 1.5)))
    assert got == find_suite("cache_study")[0]


def test_the_rule(tmp_path, monkeypatch, capsys):
    measured = {
        "B64": (19.0, 2.0),  # all other perplexities are too far from the best one ...
        "B4": (19.09, 1.0),  # ... but this one, which finds more
        "B1": (19.2, 0.1),
        "B16-recency0.3": (15.0, 0.0),  # no candidate
        "window-Q64": (20.0, 2.0),  # equals: the largest chunk
        "B1-v0-R1024": (20.05, 1.9),
        "knorm-Q64": (20.0, 1.9),
    }
    got = yaml.safe_load(run(tmp_path, monkeypatch, measured))["policies"]
    novelty = {
        "policy": "novelty",
        "cache_size": 2048,
        "recent_size": 512,
        "chunk": 256,
        "bands": 4,
    }
    assert got["novelty"] == novelty
    assert got["novelty-512"] == novelty | {"cache_size": 512, "recent_size": 128, "chunk": 64}
    assert got["novelty-recency"] == novelty | {"recency": 0.3}
    assert got["novelty-Q1"] == novelty | {"chunk": 1}
    assert got["novelty-true"] == novelty | {"policy": "novelty_true"}
    assert got["window"] == {"policy": "sink_window", "cache_size": 2048}
    assert got["keydiff-1024"]["recent_size"] == 512 and got["keydiff-1024"]["value_share"] == 0
    assert got["knorm"]["chunk"] == 64 and got["random"]["chunk"] == 1022
    assert got["freqkv-R256"]["recent_size"] == 256, "not a choice"
    assert "B4" in next(
        x for x in capsys.readouterr().out.splitlines() if "novelty " in x and "<-" in x
    )


def test_results_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["choose", str(tmp_path), str(tmp_path / "out.yaml")])
    with pytest.raises(SystemExit, match="run the suite"):
        load_script("choose_settings").main()

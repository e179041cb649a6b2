"""Scripts of the cache study: how its settings were chosen, and the README's picture of it."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from freqkv_jax.evals.suite import find_suite, read_suite
from tests.scripts import load_script

MEASURED = Path(__file__).parent.parent / "docs" / "results" / "smollm2_cache_study" / "choices"


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


def test_the_packaged_suite_has_the_settings_that_were_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["choose", str(MEASURED), str(tmp_path / "out.yaml")])
    load_script("choose_settings").main()
    assert (tmp_path / "out.yaml").read_text() == find_suite("cache_study")[0]


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
        "value_share": 1 / 3,
    }
    assert got["novelty"] == novelty
    assert got["novelty-512"] == novelty | {"cache_size": 512, "recent_size": 128, "chunk": 64}
    assert got["novelty-recency"] == novelty | {"recency": 0.3}
    assert got["novelty-Q16"] == novelty | {"chunk": 16}
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


def test_the_picture_of_what_is_kept(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    file = tmp_path / "kept.png"
    monkeypatch.setattr(sys, "argv", ["keep", str(MEASURED.parent / "results"), str(file)])
    load_script("what_policies_keep").main()
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


def test_a_finer_window_beside_the_study(monkeypatch, capsys):
    """What its README says of the window's chunk."""
    study = MEASURED.parent
    words = [str(study / "small" / "window_64.json")]
    words += [str(study / "results" / f"perplexity-{p}.json") for p in ("window", "keydiff")]
    monkeypatch.setattr(sys, "argv", ["compare", *words, "--behind", "2048"])
    load_script("compare_windows").main()
    printed = capsys.readouterr().out
    assert "| window\\_64.json | 48 | 22.39 | - | +0.00 |" in printed
    assert "| perplexity-window.json | 48 | 22.45 | +0.29" in printed
    assert "| perplexity-keydiff.json | 48 | 22.19 | -0.89" in printed and "-1.20 |" in printed


def test_windows_of_different_places_are_not_compared(tmp_path, monkeypatch):
    result = json.loads((MEASURED.parent / "small" / "window_64.json").read_text())
    result["window_starts"] = [start + 1 for start in result["window_starts"]]
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps(result))
    words = ["compare", str(moved), str(MEASURED.parent / "small" / "window_64.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="read different windows"):
        load_script("compare_windows").main()

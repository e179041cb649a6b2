"""`freqkv bench` on the tiny shape: every work, its fields, its errors."""

import json

import pytest

from freqkv_jax.bench import ceilings
from freqkv_jax.cli import main

FLAGS = ["--model", "tiny", "--cache-size", "16", "--lengths", "28"]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU", ceilings.Sizes(1 << 12, 64))


def test_all(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert main(["bench", "all", *FLAGS, "--layers", "1", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["ceilings"]["flops_per_s"] > 0 and record["ceilings"]["bytes_per_s"] > 0
    assert record["kv"]["cache_size"] == 16 and record["versions"]["jax"]
    rows = {row["case"]: row for row in record["rows"]}
    assert set(rows) == {
        f"{work}/{policy}/{length}"
        for work in ("forward", "prefill", "decode", "compress", "attention", "layer")
        for policy, length in (("freqkv", "any" if work == "decode" else 28), ("full", 28))
    } - {"compress/full/28"}
    for name, row in rows.items():
        assert f"| {name} |" in out
        assert len(row["times_ms"]) == row["repeats"] == 5
        assert row["ms"] > 0 and row["share"] > 0 and row["roofline_ms"] > 0
        assert row["bytes"] > 0 and row["tokens_per_s"] > 0 and row["spread"] >= 0
        assert row["compile_seconds"] >= 0
    assert rows["decode/freqkv/any"]["steps"] == 6


def test_compile_only(tmp_path, capsys):
    """Nothing is run; prefill is many programs."""
    file = tmp_path / "bench.json"
    words = ["bench", "all", *FLAGS, "--layers", "1", "--policy-only", "--compile-only"]
    assert main([*words, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert "ceilings" not in record and "TFLOP/s (" not in capsys.readouterr().out
    for row in record["rows"]:
        assert "ms" not in row
        assert ("skipped" in row) == (row["work"] == "prefill")
        assert row["work"] == "prefill" or row["compile_seconds"] > 0 and row["program_bytes"] > 0


def test_only_and_profile(tmp_path, capsys):
    words = ["bench", "attention", *FLAGS, "--only", "*/freqkv/*", "--profile", str(tmp_path)]
    assert main(words) == 0
    assert "attention/full" not in capsys.readouterr().out
    assert list((tmp_path / "attention-freqkv-28").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "4"], "repeats must be at least 5"),
        (["--lengths", "8,x"], "--lengths '8,x' is not understood"),
        (["--weights", "int8"], "are for decode alone, not forward"),
        (["--batch", "0"], "need batch >= 1"),
        (["--peers", "--compile-only"], "--peers times Hugging Face, and --compile-only times not"),
        (["--only", "nothing"], "no case of forward is called"),
        (["--model", "enormous"], "no file or folder here and no shape"),
    ],
)
def test_errors(capsys, words, message):
    assert main(["bench", "forward", *FLAGS, *words]) == 2
    assert message in capsys.readouterr().err

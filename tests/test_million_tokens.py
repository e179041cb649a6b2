"""scripts/million_tokens.py on a tiny model: what it notes, and its picture."""

import json

import pytest

from tests.scripts import load_script

script = load_script("million_tokens")


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["million_tokens.py", *map(str, words)])
    script.main()


def test_blocks_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "BLOCK_TOKENS", 64)
    result, picture = tmp_path / "million.json", tmp_path / "million.png"
    words = ("--model", "tiny", "--tokens", 500, "--cache-size", 32, "--dtype", "float32")
    run(monkeypatch, "measure", result, *words)
    found = json.loads(result.read_text())
    blocks = found["blocks"]
    assert blocks[0]["tokens"] == 32 and blocks[-1]["tokens"] == 500
    assert found["block_tokens"] == 56  # four chunks of 14
    seconds = [block["seconds"] for block in blocks]
    assert seconds == sorted(seconds) and found["cache_bytes"] > 0
    for block in blocks:
        block["held_bytes"] = 5_000_000  # a CPU does not count
    result.write_text(json.dumps(found))
    run(monkeypatch, "draw", result, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_a_name(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "draw", tmp_path / "million.json")
    assert "draw needs a PICTURE" in capsys.readouterr().err

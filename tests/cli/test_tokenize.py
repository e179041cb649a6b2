"""`freqkv tokenize`."""

import json

import numpy as np
import pytest

from freqkv_jax.cli import COMMANDS, main
from freqkv_jax.training import tokenize
from freqkv_jax.training.data import open_data
from freqkv_jax.training.store import open_folder
from tests.model_folder import VOCAB_SIZE


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setitem(COMMANDS, "tokenize", "turn text into token files for training")


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"number {i} " * 9}) + "\n" for i in range(40)]
    file.write_text("".join(lines))
    return file


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(*args):
    return main(["tokenize", *map(str, args)])


def test_workers_change_nothing(texts, tmp_path, model_folder, capsys):
    flags = ("--tokenizer", model_folder, "--shard-chars", 500)
    assert run(texts, tmp_path / "one", *flags, "--workers", 1) == 0
    out = capsys.readouterr()
    assert "tokens of 40 documents in 8 shards" in out.out and "00007: " in out.err
    assert run(texts, tmp_path / "two", *flags, "--workers", 2) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_goes_on_where_it_stopped(texts, tmp_path, model_folder, capsys, monkeypatch):
    flags = ("--tokenizer", model_folder, "--shard-chars", 500, "--workers", 1)
    assert run(texts, tmp_path / "whole", *flags) == 0
    make, made = tokenize._make_shard, []

    def stops(batch, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(batch.name)
        return make(batch, *rest)

    monkeypatch.setattr(tokenize, "_make_shard", stops)
    out = tmp_path / "out"
    assert run(texts, out, *flags) == 130
    assert not (out / "tokens.json").exists()
    (out / "00001.bin").write_bytes(b"torn")
    made.clear()
    monkeypatch.setattr(
        tokenize, "_make_shard", lambda batch, *rest: made.append(batch.name) or make(batch, *rest)
    )
    assert run(texts, out, *flags) == 0
    assert made == ["00001", *(f"{i:05}" for i in range(3, 8))]
    assert contents(out) == contents(tmp_path / "whole")
    assert "there already" in capsys.readouterr().err
    texts.write_text('{"text": "other"}\n')
    assert run(texts, out, *flags) == 2
    assert "holds shards of other data" in capsys.readouterr().err
    assert run(texts, out, *flags, "--force") == 0
    assert open_folder(out, VOCAB_SIZE, None).offsets.tolist() == [0, 6]


def test_answers(tmp_path, model_folder):
    from types import SimpleNamespace

    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    flags = ("--tokenizer", model_folder, "--answers-only", "--workers", 1)
    assert run(tmp_path / "c.jsonl", tmp_path / "out", *flags) == 0
    entry = SimpleNamespace(path=str(tmp_path / "out"), weight=1.0, kind="auto", field="text")
    section = SimpleNamespace(train=[entry], eval=[], pack="documents", answers_only=True)
    rows = open_data(section, 64, VOCAB_SIZE, None, 0).rows(np.array([0]))
    assert rows["mask"].sum() == 3  # A, the end token, a line end


def test_bad_input(texts, tmp_path, model_folder, capsys):
    flags = ("--tokenizer", model_folder, "--workers", 1)
    for args, message in (
        ((tmp_path / "no.txt", tmp_path / "out", *flags), "does not exist"),
        ((texts, texts, *flags), "is a file; name a folder"),
        ((texts, tmp_path / "out", *flags, "--field", "b"), "a.jsonl, line 1: no field 'b'"),
        ((texts, tmp_path / "out", "--tokenizer", model_folder, "--workers", 0), "at least 1"),
    ):
        assert run(*args) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "e.txt").write_text("")
    assert run(tmp_path / "e.txt", tmp_path / "out", *flags) == 2
    assert "no text in it" in capsys.readouterr().err
    (tmp_path / "t.bin").write_bytes(b"ab")
    assert run(tmp_path / "t.bin", tmp_path / "out", *flags) == 2
    assert "holds token ids already" in capsys.readouterr().err

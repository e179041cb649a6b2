"""Result files: whole or not at all, and what they say."""

import json

import pytest

from freqkv_jax import files
from freqkv_jax.evals import result


def test_write_and_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    result.write_result(file, {"perplexity": 12.5})
    assert json.loads(file.read_text()) == {"perplexity": 12.5}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_nothing_half_written(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(ValueError):
        result.write_result(file, {"perplexity": float("nan")})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(result.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        result.write_result(file, {})
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_output_is_checked_before_the_run(tmp_path):
    result.check_output(tmp_path / "new" / "a.json")
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
    with pytest.raises(OSError, match="is a folder; give a file name"):
        result.check_output(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        result.check_output(tmp_path / "file" / "a.json")


def test_environment():
    found = result.environment(["freqkv", "eval", "a b"])
    assert found["command"] == "freqkv eval 'a b'"
    assert found["device"]["platform"] == "cpu"
    assert found["versions"]["jax"] and found["versions"]["python"]
    json.dumps(found, allow_nan=False)


def test_fingerprint_tells_checkpoints_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "EDGE_BYTES", 4)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"0123456789")
    first = result.model_fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("other files do not count")
    assert result.model_fingerprint(tmp_path) == first
    assert result.model_fingerprint(file) == first
    seen = {first}
    for content in (b"x123456789", b"012345678x", b"01234567899"):
        file.write_bytes(content)
        seen.add(result.model_fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    seen.add(result.model_fingerprint(tmp_path))
    assert len(seen) == 5
    assert result.model_fingerprint("some/hub-id") is None


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "generation_config.json",
     "special_tokens_map.json", "tokenizer.json"],
)  # fmt: skip
def test_fingerprint_covers_what_makes_prompts_and_ends_answers(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(b"0123")
    seen = {result.model_fingerprint(tmp_path)}
    for content in ("a", "b"):
        (tmp_path / name).write_text(content)
        seen.add(result.model_fingerprint(tmp_path))
    assert len(seen) == 3


def test_fingerprint_of_one_file_is_that_of_before(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"0123456789")
    (tmp_path / "chat_template.jinja").write_text("beside a file, and not read with it")
    assert result.model_fingerprint(file) == (
        "884b2e2fbcf400bf37da9b389516d656cb33b703935049c986f856da42c1d401"
    )


def test_fingerprint_of_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"0123")
    first = result.model_fingerprint(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"0124")
    assert result.model_fingerprint(tmp_path) != first

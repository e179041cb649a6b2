"""What a path to a model may mean, and what is said when it means nothing."""

import sys

import gguf
import huggingface_hub
import numpy as np
import pytest

from freqkv_jax import sources


def write_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(7)
    writer.add_layer_norm_rms_eps(0.5)
    writer.add_add_bos_token(True)
    writer.add_token_list(["a", "ü"])
    writer.add_token_types([1, 3])
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_exists_is_taken_as_it_is(tmp_path, monkeypatch):
    assert sources.resolve(tmp_path) == tmp_path
    assert sources.resolve(str(tmp_path)) == tmp_path
    file = write_gguf(tmp_path / "m.gguf")
    assert sources.resolve(file) == file
    unnamed = file.rename(tmp_path / "0a1b2c")  # as a download cache names it
    assert sources.resolve(unnamed) == unnamed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert sources.resolve("org/name").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.resolve("~/org") == tmp_path / "org"


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"something")
    with pytest.raises(
        ValueError, match=r"model\.bin is a file but not a GGUF file; allowed: a Hug"
    ):
        sources.resolve(file)


@pytest.mark.parametrize(
    "path", ["/no/such", "./org/name", "nothing", "a/b/c", "org/m.gguf", "org/m.safetensors", ""]
)
def test_a_path_to_nothing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path == "":
        assert sources.resolve(path) == sources.Path()  # the current directory
        return
    with pytest.raises(FileNotFoundError, match="does not exist; give a Hugging Face directory"):
        sources.resolve(path)


def test_a_hub_id_without_network(monkeypatch):
    def fail(repo, **_):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match=r"hub does not give .*\(no route\); check .* the network"):
        sources.resolve("org/name")


def test_a_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="or fetch config.json, the tokenizer files and model"):
        sources.resolve("org/name")


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_fetches_what_is_read(monkeypatch, tmp_path, weights):
    asked = {}

    def fetch(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert sources.resolve("org/name", weights) == tmp_path
    assert asked["repo"] == "org/name"
    assert {"config.json", "tokenizer.json"} <= set(asked["patterns"])
    assert ("model*.safetensors" in asked["patterns"]) == weights


def test_gguf_values(tmp_path):
    reader = sources.open_gguf(write_gguf(tmp_path / "m.gguf"))
    values = {
        "general.architecture": "llama",
        "llama.context_length": 7,
        "llama.attention.layer_norm_rms_epsilon": 0.5,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.tokens": ["a", "ü"],
        "tokenizer.ggml.token_type": [1, 3],
        "nothing": None,
    }
    got = {key: sources.gguf_value(reader, key) for key in values}
    assert got == values
    assert [type(value) for value in got.values()] == [type(value) for value in values.values()]
    assert sources.gguf_value(reader, "nothing", 5) == 5


def test_every_truncation_is_noticed(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    # The last bytes are padding, which nothing reads.
    for size in range(4, len(whole) - 31, 5):
        path = tmp_path / "part.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"part\.gguf is truncated or corrupted"):
            sources.open_gguf(path)


def test_damage_never_shows_as_another_error(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "bad.gguf"
    noticed = 0
    for at in range(4, len(whole) - 256, 3):  # the tensor's data behind it may be anything
        path.write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])
        try:
            sources.open_gguf(path)
        except ValueError as error:
            noticed += 1
            assert "bad.gguf is truncated or corrupted" in str(error)
    assert noticed > 50


def test_not_gguf_at_all(tmp_path):
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 something else"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.gguf is not a GGUF file"):
            sources.open_gguf(path)
    with pytest.raises(FileNotFoundError):
        sources.open_gguf(tmp_path / "none.gguf")


def test_a_model_in_an_object_store_is_copied_here(tmp_path, monkeypatch):
    """With a folder in the store's place; epath reads gs:// and local paths alike."""
    epath = pytest.importorskip("etils.epath")
    bucket = tmp_path / "bucket"
    monkeypatch.setattr(epath, "Path", lambda url: bucket / url.removeprefix("gs://bucket/"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (bucket / "m").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "notes.txt"):
        (bucket / "m" / name).write_text(name)
    light = sources.resolve("gs://bucket/m", weights=False)
    assert sorted(f.name for f in light.iterdir()) == ["config.json", "tokenizer.json"]
    whole = sources.resolve("gs://bucket/m")
    assert whole == light and (whole / "model.safetensors").read_text() == "model.safetensors"
    assert not (whole / "notes.txt").exists()
    # What is as it was is not copied again; what has changed is, and what is gone goes.
    (whole / "config.json").chmod(0o600)
    (bucket / "m" / "model.safetensors").rename(bucket / "m" / "model-1.safetensors")
    (bucket / "m" / "tokenizer.json").write_text("another")
    sources.resolve("gs://bucket/m")
    assert (whole / "config.json").stat().st_mode & 0o777 == 0o600
    assert (whole / "tokenizer.json").read_text() == "another"
    assert [f.name for f in whole.glob("*.safetensors")] == ["model-1.safetensors"]
    file = write_gguf(bucket / "m.gguf")
    copy = sources.resolve("gs://bucket/m.gguf")
    assert copy.name == "m.gguf" and copy.read_bytes() == file.read_bytes()
    with pytest.raises(FileNotFoundError, match="gs://bucket/none does not exist; give a Hugging"):
        sources.resolve("gs://bucket/none")


def test_an_object_store_needs_etils(monkeypatch):
    monkeypatch.setitem(sys.modules, "etils", None)
    with pytest.raises(ImportError, match=r"gs://b/m is not a local path.*freqkv-jax\[train\]"):
        sources.resolve("gs://b/m")

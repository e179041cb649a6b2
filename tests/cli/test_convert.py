"""`freqkv convert`."""

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from freqkv_jax.cli import main
from freqkv_jax.kv import FullConfig, SinkWindowConfig, policy_to_dict
from freqkv_jax.tokenizer import load_tokenizer
from freqkv_jax.weights import load_pretrained, read_config
from tests.tiny import random_params, tiny_config
from tests.weights.files import (
    TYPES,
    assert_same,
    gguf_tensors,
    hf_tensors,
    tiny_folder,
    write_gguf,
    write_hf,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_a_directory(model_folder, tmp_path, capsys):
    target = tmp_path / "new" / "out"
    assert main(["convert", model_folder, str(target)]) == 0
    out = capsys.readouterr().out
    config, policy = read_config(target)
    assert policy is None  # nothing was remembered, so nothing is
    assert config == read_config(model_folder)[0]
    assert f"{config.num_params:,} parameters in float32 written to {target}" in out
    for name in names(target):
        assert name in out
    assert "tokenizer.json" in names(target)
    want = load_pretrained(model_folder, FullConfig(), "float32")[1]
    assert_same(load_pretrained(target, FullConfig(), "float32")[1], want)
    text = "Wörter und\tcode();"
    assert load_tokenizer(target).encode(text) == load_tokenizer(model_folder).encode(text)
    assert AutoTokenizer.from_pretrained(target).decode([72, 105])
    assert AutoModelForCausalLM.from_pretrained(target).config.vocab_size == config.vocab_size


def test_dtype_is_the_stored_one_or_the_flag(tmp_path, capsys):
    config = tiny_config()
    tensors = {
        n: t.astype(np.float16) for n, t in hf_tensors(random_params(config), config).items()
    }
    source = str(write_hf(tmp_path / "src", config, tensors))
    assert main(["convert", source, str(tmp_path / "same"), "--no-tokenizer"]) == 0
    assert main(["convert", source, str(tmp_path / "flag"), "--dtype", "bfloat16"]) == 0
    assert "no tokenizer is written" in capsys.readouterr().err
    for name, dtype in (("same", "float16"), ("flag", "bfloat16")):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype


def test_gguf(tmp_path):
    config = tiny_config(intermediate_size=64)
    params = random_params(config)
    file = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(params, config), TYPES.Q8_0)
    target = tmp_path / "out"
    assert main(["convert", str(file), str(target), "--no-tokenizer"]) == 0
    want = load_pretrained(file, FullConfig(), "float32")[1]
    assert_same(load_pretrained(target, FullConfig(), "float32")[1], want)


def test_a_remembered_policy_is_kept(tmp_path):
    folder, config, _ = tiny_folder(tmp_path / "src")
    kv = SinkWindowConfig(64, 2)
    raw = config.to_hf() | {"freqkv_jax": policy_to_dict(kv)}
    (folder / "config.json").write_text(json.dumps(raw))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert read_config(tmp_path / "out")[1] == kv


def test_a_full_directory_is_left_alone(tmp_path, capsys):
    folder, _, params = tiny_folder(tmp_path / "src")
    target = tmp_path / "out"
    target.mkdir()
    assert main(["convert", str(folder), str(target)]) == 0  # empty is fine
    (target / "mine.txt").write_text("mine")
    (target / "config.json").write_text("{}")
    before = names(target)
    assert main(["convert", str(folder), str(target)]) == 2
    error = capsys.readouterr().err
    assert f"DST {target} is not empty; name a new directory, or --force" in error
    assert (names(target), (target / "config.json").read_text()) == (before, "{}")
    assert main(["convert", str(folder), str(target), "--force"]) == 0
    assert "mine.txt" in names(target)
    assert_same(load_pretrained(target, FullConfig(), "float32")[1], params)


def test_bad_source_writes_nothing(tmp_path, capsys):
    folder, _, _ = tiny_folder(tmp_path / "src")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["convert", str(folder), str(tmp_path / "new" / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "model.safetensors is truncated or corrupted" in error
    assert names(tmp_path) == ["src"]


@pytest.mark.parametrize("target", ["src", "file"])
def test_bad_destination(tmp_path, capsys, target):
    folder, _, _ = tiny_folder(tmp_path / "src")
    (tmp_path / "file").write_text("")
    assert main(["convert", str(folder), str(tmp_path / target), "--force"]) == 2
    message = {"src": "SRC and DST are the same directory", "file": "is a file; name a directory"}
    assert message[target] in capsys.readouterr().err

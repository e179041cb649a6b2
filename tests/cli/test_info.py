"""`freqkv info`."""

import json

import pytest

from freqkv_jax.cli import main
from freqkv_jax.config import SHAPES, RopeConfig
from freqkv_jax.kv import SinkWindowConfig, policy_to_dict
from freqkv_jax.kv.policy import POLICIES
from tests.tiny import random_params, tiny_config
from tests.weights.files import TYPES, gguf_tensors, tiny_folder, write_gguf


def info(capsys, *args) -> dict[str, str]:
    """Runs the command; its lines by label."""
    assert main(["info", *map(str, args)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    return {line[:16].strip(): line[16:].strip() for line in lines}


def test_a_shape(capsys):
    out = info(capsys, "llama3-8b")
    assert out["parameters"] == "8,030,261,248 (untied embeddings)"
    assert out["vocabulary"].startswith("128,256")
    assert out["rope"] == "theta 500000, default"
    assert "random weights" in out["stored"]
    assert out["KV cache"] == "128.0 KiB a token in bfloat16"
    assert out["policy"].endswith("(the default)")
    # 2 (K, V) * 2 bytes * 32 layers * 8 heads * 128, times 4096 slots
    assert out["freqkv 4096"].split() == ["512.0", "MiB"] * 4
    assert out["full"].split() == ["512.0", "MiB", "4.0", "GiB", "16.0", "GiB", "128.0", "GiB"]
    assert {name.split()[0] for name in out} >= set(POLICIES)


def test_flags(capsys):
    out = info(capsys, "smollm2-135m", "--cache-size", 2048, "--policy", "sink_window")
    assert "sink_window 2048" in out
    assert "full" not in out
    assert "cache_size=2048" in out["policy"] and out["policy"].endswith("(from the flags)")
    assert out["sink_window 2048"].split() == ["45.0", "MiB"] * 4


def test_a_directory(tmp_path, capsys):
    rope = RopeConfig(1e4, "linear", 4.0)
    folder, config, _ = tiny_folder(tmp_path, 2, rope=rope, eos_token_id=(2, 3))
    out = info(capsys, folder)
    assert out["architecture"] == "LlamaForCausalLM"
    assert out["parameters"].startswith(f"{config.num_params:,} ")
    assert out["rope"] == "theta 10000, linear, factor 4"
    assert out["heads"] == "4 of 8, 2 for keys and values"
    assert out["vocabulary"] == "61 tokens (begin none, end 2, 3)"
    assert "safetensors (F32 100% of the elements)" in out["stored"]
    assert "policy" in out and "default" in out["policy"]


def test_a_remembered_policy(tmp_path, capsys):
    folder, config, _ = tiny_folder(tmp_path)
    raw = config.to_hf() | {
        "freqkv_jax": policy_to_dict(SinkWindowConfig(64, 2)),
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(raw))
    out = info(capsys, folder)
    assert out["policy"].startswith("sink_window cache_size=64 sink_size=2")
    assert out["policy"].endswith("(remembered by the model)")
    assert "freqkv 64" in out and "sink_window 64" in out
    (folder / "model.safetensors").unlink()
    assert info(capsys, folder)["stored"] == "no weights here; config.json says float16"


def test_a_gguf_file(tmp_path, capsys):
    config = tiny_config(intermediate_size=64, tie_word_embeddings=True)
    tensors = gguf_tensors(random_params(config), config)
    file = write_gguf(tmp_path / "m.gguf", config, tensors, TYPES.Q8_0)
    out = info(capsys, file)
    assert "of GGUF (Q8_0 " in out["stored"]
    assert "tied embeddings" in out["parameters"]


def test_weights_are_not_loaded(tmp_path, capsys, monkeypatch):
    folder, _, _ = tiny_folder(tmp_path)
    from freqkv_jax.weights import hf

    def refuse(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(hf, "_reader", lambda file, part: refuse)
    assert "parameters" in info(capsys, folder)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no-such-model"], "no-such-model does not exist"),
        (["tiny", "--cache-size", "4"], "need sink_size + recent_size < cache_size"),
    ],
)
def test_errors_are_one_line(capsys, args, message):
    assert main(["info", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_every_shape(capsys):
    for name, config in SHAPES.items():
        assert info(capsys, name)["parameters"].startswith(f"{config.num_params:,} ")

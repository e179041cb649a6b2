"""Directories that are written: read back, read by transformers, and whole or not at all."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from freqkv_jax.config import RopeConfig
from freqkv_jax.kv import FreqKVConfig, FullConfig, policy_to_dict
from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import make_mesh, param_shardings
from freqkv_jax.weights import load_pretrained, save, save_pretrained
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, assert_close
from tests.weights.files import assert_same

ROPES = [
    RopeConfig(1e5),
    RopeConfig(1e4, "linear", 4.0),
    RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 64),
]


def tiny_model(kv=None, **changes):
    config = tiny_config(**changes)
    return Llama(config, kv or FullConfig()), random_params(config)


def load(folder, dtype="float32", **options):
    return load_pretrained(folder, dtype=dtype, **options)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tied, dtype):
    kv = FreqKVConfig(64, 2, 8, 0.25)
    model, params = tiny_model(kv, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=(2, 3))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.dtype(dtype)), params)
    folder = tmp_path / "new" / "model"
    save_pretrained(model, params, folder)
    assert listing(folder) == ["config.json", "generation_config.json", "model.safetensors"]
    assert listing(folder.parent) == ["model"]
    got, read = load(folder, dtype)
    assert got == model.clone(dtype=dtype)
    assert_same(read, params)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["freqkv_jax"] == policy_to_dict(kv)
    assert (raw["dtype"], raw["torch_dtype"]) == (dtype, dtype)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    with safe_open(folder / "model.safetensors", "np") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118
        assert file.get_slice("model.layers.0.mlp.up_proj.weight").get_shape() == [44, 32]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.rope_type)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_we_save(tmp_path, rope, tied):
    model, params = tiny_model(rope=rope, tie_word_embeddings=tied, eos_token_id=2)
    save_pretrained(model, params, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == 2
    tokens = random_tokens(model.config, 2, 90)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens).long()).logits
    assert_close(model.apply({"params": params}, tokens), want, LOGITS)


def test_sharded_files(tmp_path, monkeypatch):
    model, params = tiny_model()
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 16_000)
    save_pretrained(model, params, tmp_path)
    files = sorted(path for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 16_000 + 2_000 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == total
    assert_same(load(tmp_path)[1], params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    want = params["lm_head"]["kernel"].T
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), want)


def test_from_a_mesh(tmp_path):
    model, params = tiny_model(vocab_size=62)
    placed = jax.device_put(params, param_shardings(params, make_mesh(2, 2, 2)))
    save_pretrained(model, placed, tmp_path)
    assert_same(load(tmp_path)[1], params)


def test_gradients_can_be_saved(tmp_path):
    model, params = tiny_model()
    gradients = jax.tree.map(lambda x: -2 * x, params)
    gradients["norm"]["scale"] = gradients["norm"]["scale"].astype(np.float16)
    save_pretrained(model, gradients, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.get_tensor("model.norm.weight").dtype == np.float16  # each in its own
        up = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(up, -2 * params["layers_1"]["mlp"]["up"]["kernel"].T)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_another_tree_is_refused(tmp_path):
    model, params = tiny_model()
    del params["norm"]
    params["layers_0"]["bias"] = np.zeros(3, np.float32)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].T
    params["embed"]["embedding"] = params["embed"]["embedding"].astype(np.int32)
    with pytest.raises(ValueError) as caught:
        save_pretrained(model, params, tmp_path / "new")
    text = str(caught.value)
    assert "missing norm/scale; " in text
    assert "extra layers_0/bias" in text
    assert "lm_head/kernel has shape [61, 32], the model [32, 61]" in text
    assert "embed/embedding is int32 (allowed: float64, float32, bfloat16, float16)" in text
    assert not listing(tmp_path)


class BrokenTokenizer:
    def save(self, folder):
        (folder / "tokenizer.json").write_text("{")
        raise OSError("disk full")


def test_nothing_is_half_written(tmp_path):
    model, params = tiny_model()
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model, params, tmp_path / "new", BrokenTokenizer())
    assert not listing(tmp_path)
    folder = tmp_path / "old"
    save_pretrained(model, params, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model, other, folder, BrokenTokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_earlier_model_is_replaced(tmp_path, monkeypatch):
    model, params = tiny_model()
    (tmp_path / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(save, "MAX_SHARD_BYTES", 16_000)
        save_pretrained(model, params, tmp_path)
    other = jax.tree.map(lambda x: x + 1, params)
    save_pretrained(model, other, tmp_path)
    assert listing(tmp_path) == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    ]  # fmt: skip
    assert_same(load(tmp_path)[1], other)


def test_broken_off_while_replacing_is_no_model(tmp_path, monkeypatch):
    model, params = tiny_model()
    save_pretrained(model, params, tmp_path)

    def fail(self, target):
        raise OSError("pulled out")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="pulled out"):
        save_pretrained(model, params, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)


def test_a_file_in_the_way(tmp_path):
    model, params = tiny_model()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file is a file; name a directory"):
        save_pretrained(model, params, tmp_path / "file")


def test_folder_has_ordinary_rights(tmp_path):
    model, params = tiny_model()
    save_pretrained(model, params, tmp_path / "new")
    plain = tmp_path / "plain"
    plain.mkdir()
    assert os.stat(tmp_path / "new").st_mode == os.stat(plain).st_mode

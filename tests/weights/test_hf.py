"""Hugging Face directories: what is read, and what is refused."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig as TorchConfig
from transformers import LlamaForCausalLM

from freqkv_jax.kv import (
    FreqKVConfig,
    FullConfig,
    SinkWindowConfig,
    SpectralNoveltyConfig,
    policy_to_dict,
)
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.params import abstract_params
from freqkv_jax.sharding import make_mesh, param_shardings
from freqkv_jax.weights import load_pretrained, memory, read_config
from freqkv_jax.weights.table import nest, targets
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, assert_close
from tests.weights.files import assert_same, hf_tensors, leaves, tiny_folder, write_hf

FULL = FullConfig()


def load(folder, kv=FULL, dtype="float32", **options):
    return load_pretrained(folder, kv, dtype, **options)


@pytest.mark.parametrize("tied", [False, True])
def test_table_is_the_model(tied):
    config = tiny_config(tie_word_embeddings=tied)
    ours = nest({t.path: t.shape for t in targets(config, "hf").values()})
    model = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config, "float32"))
    assert ours == model
    assert len(targets(config, "gguf")) == len(targets(config, "hf"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_reads_every_weight(tmp_path, shards, tied):
    folder, config, params = tiny_folder(tmp_path, shards, tie_word_embeddings=tied)
    model, got = load(folder)
    assert model == Llama(config, FULL, "float32")
    assert_same(got, params)


def test_other_files_are_ignored(tmp_path):
    folder, _, params = tiny_folder(tmp_path)
    save_file({"lora": np.zeros(3, np.float32)}, folder / "adapter.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"rubbish")
    assert_same(load(folder)[1], params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
def test_every_weight_is_cast(tmp_path, stored, dtype):
    config = tiny_config()
    kind = np.dtype(getattr(ml_dtypes, stored, stored))
    params = jax.tree.map(lambda x: x.astype(kind), random_params(config))
    folder = write_hf(tmp_path, config, hf_tensors(params, config))
    model, got = load(folder, dtype=dtype)
    assert model.dtype == dtype
    assert_same(got, jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params))


def test_harmless_extras(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    params = random_params(config)
    tensors = hf_tensors(params, config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = np.ones((61, 32), np.float32)  # tied all the same
    assert_same(load(write_hf(tmp_path, config, tensors))[1], params)


def test_all_faults_in_one_error(tmp_path):
    config = tiny_config()
    tensors = hf_tensors(random_params(config), config)
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((44, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((44, 32), np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((32, 44), np.int8)
    folder = write_hf(tmp_path, config, tensors, 2)
    twice = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
    for number in (1, 2):  # one file had it, now both do
        file = folder / f"model-0000{number}-of-00002.safetensors"
        part = {n: t for i, (n, t) in enumerate(sorted(tensors.items())) if i % 2 == number - 1}
        save_file(part | twice, file)
    with pytest.raises(ValueError) as caught:
        load(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "missing: model.norm.weight, lm_head.weight;" in text
    assert "duplicate: model.embed_tokens.weight (model-00001" in text
    assert "model.layers.2.mlp.up_proj.weight" in text
    assert "extra: model.layers.0.self_attn.q_proj.bias" in text
    assert "model.layers.1.mlp.down_proj.weight [44, 32] (the config says [32, 44])" in text
    assert "model.layers.0.mlp.down_proj.weight I8" in text


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 4, 1), (1, 1, 2), (8, 1, 1)], ids=str)
def test_on_a_mesh(tmp_path, axes):
    folder, config, params = tiny_folder(tmp_path, 2, vocab_size=62)
    mesh = make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    _, got = load(folder, mesh=mesh)
    wanted = param_shardings(abstract_params(config, "float32"), mesh)
    assert jax.tree.map(lambda x: x.sharding, got) == wanted
    assert_same(got, params)


def test_a_host_reads_its_slices_only(tmp_path, monkeypatch):
    folder, _, _ = tiny_folder(tmp_path, vocab_size=62)
    from freqkv_jax.weights import hf

    sizes = []
    real = hf._reader

    def watched(file, part):
        read = real(file, part)

        def spy(index):
            data = read(index)
            sizes.append((tuple(part.get_shape()), data.shape))
            return data

        return spy

    monkeypatch.setattr(hf, "_reader", watched)
    load(folder, mesh=make_mesh(2, 2, 2))
    matrices = [(whole, part) for whole, part in sizes if len(whole) == 2]
    assert all(part == (whole[0] // 2, whole[1] // 2) for whole, part in matrices)
    assert len(matrices) == 4 * (2 * 7 + 2)  # each quarter once, though it lies on two devices


def test_a_mesh_that_does_not_divide(tmp_path):
    folder, _, _ = tiny_folder(tmp_path)  # vocabulary 61
    with pytest.raises(ValueError, match="does not divide vocab_size 61 by tensor=2"):
        load(folder, mesh=make_mesh(tensor=2))


def test_policy_is_given_remembered_or_default(tmp_path):
    folder, _, _ = tiny_folder(tmp_path)
    assert load(folder, kv=None)[0].kv == FreqKVConfig()
    assert read_config(folder)[1] is None
    kv = SinkWindowConfig(64, 2)
    config = folder / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"freqkv_jax": policy_to_dict(kv)}))
    assert load(folder, kv=None)[0].kv == kv
    assert load(folder, kv=FULL)[0].kv == FULL
    assert read_config(folder) == (load(folder)[0].config, kv)
    config.write_text(json.dumps(raw | {"freqkv_jax": {"policy": "freqkw"}}))
    with pytest.raises(ValueError, match=r"config\.json: no policy is named 'freqkw'"):
        load(folder, kv=None)


def test_a_cache_beyond_the_window_warns(tmp_path):
    folder, _, _ = tiny_folder(tmp_path, max_position_embeddings=100)
    with pytest.warns(UserWarning, match="cache_size 101 is above .*max_position_embeddings 100"):
        load(folder, kv=FreqKVConfig(101))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, kv=FreqKVConfig(100))
        load(folder, kv=FULL)


def test_transformers_writes_we_read(tmp_path):
    config = TorchConfig(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, params = load(tmp_path)
    tokens = random_tokens(model.config, 2, 50)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens).long()).logits
    assert_close(model.apply({"params": params}, tokens), want, LOGITS)


def truncated(folder, file, size):
    path = folder / file
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 5, 200, -100], ids=str)
def test_truncated_safetensors(tmp_path, size):
    folder, _, _ = tiny_folder(tmp_path)
    truncated(folder, "model.safetensors", size)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupted"):
        load(folder)


def test_corrupted_safetensors(tmp_path):
    folder, _, _ = tiny_folder(tmp_path)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:40] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupted"):
        load(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load(folder)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)
    folder, _, _ = tiny_folder(tmp_path, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not there: model-00002-of-00002"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is corrupted: it has no weight_map"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type 'yarn'"),
        ({"hidden_size": "wide", "head_dim": None}, "config.json: unsupported operand"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json: integer .*division"),
        ({"freqkv_jax": 3}, "config.json: "),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else None,
)
def test_bad_config(tmp_path, change, message):
    folder, config, _ = tiny_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | change))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_damaged_config(tmp_path):
    folder, _, _ = tiny_folder(tmp_path)
    truncated(folder, "config.json", 100)
    with pytest.raises(ValueError, match=r"config\.json is truncated or corrupted"):
        load(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold one JSON object, got a list"):
        load(folder)


def test_a_cache_that_would_wear_out_comes_before_weights(tmp_path, monkeypatch):
    folder, _, _ = tiny_folder(tmp_path)
    monkeypatch.setattr("freqkv_jax.weights.load_params", None)
    with pytest.raises(ValueError, match="at least 2 entries a round .* or use float32"):
        load(folder, kv=SpectralNoveltyConfig(129, chunk=1), dtype="bfloat16")


def test_bad_arguments_come_before_files(tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is not supported; allowed: float32"):
        load(tmp_path / "nothing", dtype="int8")
    with pytest.raises(ValueError, match="attention"):
        load(tmp_path / "nothing", attention="flash")


def test_not_enough_memory(tmp_path, monkeypatch):
    folder, config, _ = tiny_folder(tmp_path, vocab_size=62)
    needed = config.num_params * 4
    monkeypatch.setattr(memory, "free_host_bytes", lambda: needed - 1)
    with pytest.raises(MemoryError, match=r"need 0\.00 GB in float32, and this host has"):
        load(folder)
    load(folder, dtype="bfloat16")
    with pytest.raises(MemoryError):  # 2 copies along "data" on one host
        load(folder, dtype="bfloat16", mesh=make_mesh(data=2))
    load(folder, dtype="bfloat16", mesh=make_mesh(tensor=2))


def test_free_memory_is_known_here(tmp_path):
    assert 0 < memory.free_host_bytes() < 2**60
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 50\n")
    assert memory._left_in_group(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_group(tmp_path) == float("inf")
    assert memory._available(tmp_path / "none") == float("inf")


def test_leaves_are_whole(tmp_path):
    folder, config, _ = tiny_folder(tmp_path)
    _, params = load(folder)
    # Later changes of the files do not reach what was loaded.
    before = {path: leaf.copy() for path, leaf in leaves(params).items()}
    shutil.rmtree(folder)
    assert_same(params, nest(before))
    assert sum(leaf.size for leaf in before.values()) == config.num_params

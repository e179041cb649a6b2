"""GGUF files: config, every tensor type, the order of Q and K rows, and what is refused."""

import gguf
import jax
import numpy as np
import pytest
from gguf import quants

from freqkv_jax.config import RopeConfig
from freqkv_jax.kv import FullConfig
from freqkv_jax.rope import inverse_frequencies
from freqkv_jax.sharding import make_mesh
from freqkv_jax.sources import open_gguf
from freqkv_jax.weights import load_pretrained, read_config
from freqkv_jax.weights.gguf import stored_tensors
from tests.tiny import random_params, tiny_config
from tests.weights.files import TYPES, assert_same, gguf_tensors, leaves, permuted, write_gguf

FULL = FullConfig()
SIZES = {"intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}  # rows of whole blocks


def load(path, dtype="float32", **options):
    return load_pretrained(path, FULL, dtype, **options)


def tiny_gguf(path, kind=TYPES.F32, arch="llama", extra=(), tied=False, **changes):
    config = tiny_config(tie_word_embeddings=tied, **(SIZES | changes))
    params = random_params(config)
    return write_gguf(path, config, gguf_tensors(params, config), kind, arch, extra), config, params


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2)], ids=str)
def test_float32_is_exact(tmp_path, heads, tied):
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1]}
    path, config, params = tiny_gguf(tmp_path / "m.gguf", tied=tied, **sizes)
    model, got = load(path)
    assert model.config == config
    assert_same(got, params)


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q5_1])
def test_quantised_types(tmp_path, kind):
    path, _, params = tiny_gguf(tmp_path / "m.gguf", kind)
    want = {}
    for name, leaf in leaves(params).items():
        stored = leaf.T if name.endswith("kernel") else leaf
        if leaf.ndim > 1:  # a row is quantised by itself, so the order of rows does not matter
            stored = quants.dequantize(quants.quantize(np.ascontiguousarray(stored), kind), kind)
        want[name] = stored.T if name.endswith("kernel") else stored
    got = leaves(load(path)[1])
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def dequantisable():
    row = 256  # a multiple of every block
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        data = np.zeros((1, row // block * size), np.uint8)
        try:
            quants.dequantize(data, kind)
        except NotImplementedError:
            continue
        yield kind


@pytest.mark.parametrize("kind", list(dequantisable()), ids=lambda kind: kind.name)
def test_every_type_of_the_package(tmp_path, kind):
    config = tiny_config(hidden_size=256, intermediate_size=256, head_dim=64, num_layers=1)
    path = tmp_path / "m.gguf"
    tensors = gguf_tensors(random_params(config), config)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (128, 256 // block * size)).astype(np.uint8)
    if kind in (TYPES.F16, TYPES.F32):
        raw = rng.normal(size=(128, 256)).astype({TYPES.F16: np.float16}.get(kind, np.float32))
    with np.errstate(all="ignore"):  # random bytes make infinite scales
        want = quants.dequantize(raw, kind).T
    writer_writes = {
        name: array for name, array in tensors.items() if name != "blk.0.attn_v.weight"
    }
    extra = [("add_tensor", "blk.0.attn_v.weight", raw, None, kind)]
    write_gguf(path, config, writer_writes, extra=extra)
    with np.errstate(all="ignore"):
        got = load(path)[1]["layers_0"]["attention"]["v"]["kernel"]
    np.testing.assert_array_equal(got, want)


def test_on_a_mesh(tmp_path):
    path, _, _ = tiny_gguf(tmp_path / "m.gguf", TYPES.Q8_0, vocab_size=64)
    want = load(path)[1]
    got = load(path, mesh=make_mesh(2, 2, 2))[1]
    assert len(jax.tree.leaves(got)[0].sharding.device_set) == 8
    assert_same(got, want)


def test_metadata(tmp_path):
    extra = [
        ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
        ("add_rope_scaling_factor", 4.0),
        ("add_key_length", 8),
        ("add_value_length", 8),
        ("add_eot_token_id", 7),
    ]
    path, config, _ = tiny_gguf(tmp_path / "m.gguf", extra=extra)
    got, policy = read_config(path)
    assert policy is None
    assert got.rope == RopeConfig(1e4, "linear", 4.0)
    assert (got.bos_token_id, got.eos_token_id) == (1, (2, 7))
    assert (got.rms_norm_eps, got.max_position_embeddings) == (1e-5, 4096)
    assert got.head_dim == config.head_dim


def rope_table(rope, head_dim=16):
    plain = inverse_frequencies(RopeConfig(rope.theta), head_dim)
    return (plain / inverse_frequencies(rope, head_dim)).astype(np.float32)


def test_llama3_scaling(tmp_path):
    rope = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    config = tiny_config(rope=rope, head_dim=16, **SIZES)
    tensors = gguf_tensors(random_params(config), config)
    table = rope_table(rope)
    assert np.any((table > 1.1) & (table < 7.9))  # a ramp is in it
    path = write_gguf(tmp_path / "m.gguf", config, {"rope_freqs.weight": table} | tensors)
    assert load(path)[0].config == config
    other = rope_table(RopeConfig(5e5, "llama3", 8.0, 1.0, 2.0, 8192))
    for bad in (other, table[:4], table * 1.01):
        path = write_gguf(tmp_path / "bad.gguf", config, {"rope_freqs.weight": bad} | tensors)
        with pytest.raises(ValueError, match=r"rope_freqs\.weight scales frequencies otherwise"):
            load(path)
    ones = np.ones(8, np.float32)
    path = write_gguf(tmp_path / "ones.gguf", config, {"rope_freqs.weight": ones} | tensors)
    assert read_config(path)[0].rope == RopeConfig(5e5)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("add_rope_scaling_type", gguf.RopeScalingType.YARN), "rope scaling type 'yarn'"),
        (("add_expert_count", 8), "expert_count is 8, which this model does not compute"),
        (("add_sliding_window", 64), "sliding_window is 64"),
        (("add_key_length", 16), "rope.dimension_count 8 .* must equal the head size 16"),
    ],
    ids=lambda case: case[0] if isinstance(case, tuple) else None,
)
def test_refused_metadata(tmp_path, extra, message):
    path, _, _ = tiny_gguf(tmp_path / "m.gguf", extra=[extra])
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        load(path)


def test_other_architecture(tmp_path):
    path, _, _ = tiny_gguf(tmp_path / "m.gguf", arch="gemma")
    with pytest.raises(ValueError, match="architecture 'gemma' is not supported .* allowed: llama"):
        load(path)


def test_missing_metadata(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_tensor("token_embd.weight", np.zeros((61, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"metadata lacks llama\.embedding_length"):
        load(path)


def test_unreadable_types_are_listed(tmp_path):
    path, _, _ = tiny_gguf(tmp_path / "m.gguf", TYPES.F64, tied=True)
    with pytest.raises(ValueError, match="cannot be dequantised") as caught:
        load(path)
    assert "token_embd.weight (F64)" in str(caught.value)
    assert "blk.1.ffn_down.weight (F64)" in str(caught.value)


def test_all_faults_in_one_error(tmp_path):
    config = tiny_config(**SIZES)
    tensors = gguf_tensors(random_params(config), config)
    del tensors["blk.1.attn_k.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    tensors["blk.0.ffn_up.weight"] = np.zeros((64, 64), np.float32)
    with pytest.raises(ValueError) as caught:
        load(write_gguf(tmp_path / "m.gguf", config, tensors))
    text = str(caught.value)
    assert "missing: blk.1.attn_k.weight;" in text
    assert "extra: blk.0.attn_q.bias" in text
    assert "blk.0.ffn_up.weight [64, 64] (the config says [64, 32])" in text


def test_what_is_read_does_not_hang_on_the_file(tmp_path):
    path, config, _ = tiny_gguf(tmp_path / "m.gguf")
    reader = open_gguf(path)
    for tensor in stored_tensors(path, reader, config):
        part = tensor.read((slice(None),) * len(tensor.shape))
        assert not np.may_share_memory(part, reader.data), tensor.name


def test_permutation_is_llama_cpps():
    weight = np.arange(24.0).reshape(12, 2)
    rows = permuted(weight, 3)[:, 0] / 2
    # In a head of 4 rows, neighbours (2p, 2p+1) are Hugging Face's (p, p+2).
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]

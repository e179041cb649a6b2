"""Model files written by hand, apart from the library's own writer."""

import json
from pathlib import Path

import gguf
import jax
import numpy as np
from gguf import GGMLQuantizationType, quants
from safetensors.numpy import save_file

from freqkv_jax.config import LlamaConfig
from freqkv_jax.sharding import tree_path
from tests.tiny import random_params, tiny_config

TYPES = GGMLQuantizationType


def leaves(tree) -> dict:
    """{path: NumPy array} of a parameter tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tree_path(path): np.asarray(leaf) for path, leaf in flat}


def assert_same(got, want) -> None:
    """Two trees have the same leaves, dtypes and bits."""
    got, want = leaves(got), leaves(want)
    assert list(got) == list(want)
    for path, array in want.items():
        assert got[path].dtype == array.dtype, path
        assert got[path].tobytes() == array.tobytes(), path


def hf_tensors(params, config: LlamaConfig) -> dict[str, np.ndarray]:
    """The tree under Hugging Face's names, [out, in]."""
    out = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    for i in range(config.num_layers):
        block, at = params[f"layers_{i}"], f"model.layers.{i}"
        out[f"{at}.input_layernorm.weight"] = block["input_norm"]["scale"]
        out[f"{at}.post_attention_layernorm.weight"] = block["post_norm"]["scale"]
        for p in "qkvo":
            out[f"{at}.self_attn.{p}_proj.weight"] = block["attention"][p]["kernel"].T
        for p in ("gate", "up", "down"):
            out[f"{at}.mlp.{p}_proj.weight"] = block["mlp"][p]["kernel"].T
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = params["lm_head"]["kernel"].T
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def write_hf(folder: Path, config: LlamaConfig, tensors: dict, shards: int = 1) -> Path:
    """A Hugging Face directory, its tensors dealt out over `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tiny_folder(folder: Path, shards: int = 1, **changes):
    """(folder, config, params) of a random tiny model on disk."""
    config = tiny_config(**changes)
    params = random_params(config)
    return write_hf(folder, config, hf_tensors(params, config), shards), config, params


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K [out, in] as llama.cpp's converter orders them."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return split.swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(params, config: LlamaConfig) -> dict[str, np.ndarray]:
    """The tree under GGUF's names, [out, in], Q and K rows permuted."""
    out = {
        "token_embd.weight": params["embed"]["embedding"],
        "output_norm.weight": params["norm"]["scale"],
    }
    mlp = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for i in range(config.num_layers):
        block, at = params[f"layers_{i}"], f"blk.{i}"
        attention = {p: block["attention"][p]["kernel"].T for p in "qkvo"}
        out[f"{at}.attn_norm.weight"] = block["input_norm"]["scale"]
        out[f"{at}.ffn_norm.weight"] = block["post_norm"]["scale"]
        out[f"{at}.attn_q.weight"] = permuted(attention["q"], config.num_heads)
        out[f"{at}.attn_k.weight"] = permuted(attention["k"], config.num_kv_heads)
        out[f"{at}.attn_v.weight"] = attention["v"]
        out[f"{at}.attn_output.weight"] = attention["o"]
        for ours, theirs in mlp.items():
            out[f"{at}.{theirs}.weight"] = block["mlp"][ours]["kernel"].T
    if not config.tie_word_embeddings:
        out["output.weight"] = params["lm_head"]["kernel"].T
    return out


def write_gguf(
    path: Path, config: LlamaConfig, tensors: dict, kind=TYPES.F32, arch="llama", extra=()
) -> Path:
    """A GGUF file; matrices are of type `kind`, vectors float32. `extra`: calls on the writer."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if config.num_heads * config.head_dim != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for method, *args in extra:
        getattr(writer, method)(*args)
    for name, array in tensors.items():
        array = np.ascontiguousarray(array)
        if array.ndim == 1 or kind == TYPES.F64:
            writer.add_tensor(name, array.astype(np.float64) if array.ndim > 1 else array)
        else:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

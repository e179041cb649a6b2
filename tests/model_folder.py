"""A tiny model as a directory on disk, with a tokenizer of bytes and a chat template."""

import json
from pathlib import Path

import numpy as np

from freqkv_jax.config import LlamaConfig
from tests.tiny import random_params, tiny_config

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model_folder(folder: Path, tokenizer: bool = True, **changes) -> LlamaConfig:
    """Writes config.json, model.safetensors and, if asked for, a tokenizer; returns the config."""
    from safetensors.numpy import save_file

    config = tiny_config(**{"vocab_size": VOCAB_SIZE, "eos_token_id": 258, **changes})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    tensors = to_hf_tensors(random_params(config), config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(folder)
    return config


def to_hf_tensors(params: dict, config: LlamaConfig) -> dict[str, np.ndarray]:
    """The parameter tree under Hugging Face's names, [out, in]: what tests.hf_names reads back."""

    def turned(kernel):
        return np.ascontiguousarray(kernel["kernel"].T)

    tensors = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    for i in range(config.num_layers):
        layer, at = params[f"layers_{i}"], f"model.layers.{i}"
        tensors[f"{at}.input_layernorm.weight"] = layer["input_norm"]["scale"]
        tensors[f"{at}.post_attention_layernorm.weight"] = layer["post_norm"]["scale"]
        for p in "qkvo":
            tensors[f"{at}.self_attn.{p}_proj.weight"] = turned(layer["attention"][p])
        for p in ("gate", "up", "down"):
            tensors[f"{at}.mlp.{p}_proj.weight"] = turned(layer["mlp"][p])
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = turned(params["lm_head"])
    return tensors


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: one token a byte, then SPECIAL."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))

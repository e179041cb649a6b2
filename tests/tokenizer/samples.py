"""Texts that a tokenizer must carry, and tiny tokenizers in every form they come in."""

import json
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXTS = {
    "empty": "",
    "space": " ",
    "prose": "It was the best of times, it was the worst of times; they'd said so. 1859, 3.14!",
    "code": "def f(x: int) -> str:\n\tif x >= 10_000:\n\t\treturn f'{x!r}'  # ok\n\n\n    pass\n",
    "chinese": "狄更斯的小说：最好的时代，最坏的时代。",
    "arabic": "كان أفضل الأزمنة، كان أسوأ الأزمنة",
    "hindi": "वह सबसे अच्छा समय था",
    "emoji": "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👍🏽!",
    "accents": "naïve café; cafe\u0301 (decomposed)",
    "chat": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "spaces": "a  b   c    d        e                                  f  ",
    "newlines": "\n\n\na\r\nb\r\rc\n \n  \n\t\t\t x\t",
    "replacement": "a real \ufffd in the text",
    "nul": "a\x00b\x7f",
}
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Hello\n  there <|im_end|> 你好"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": ""},
]


def tiny_backend(vocab_size: int = 400) -> tokenizers.Tokenizer:
    """Byte-level BPE of the smollm kind, trained on the texts above."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS.values(), TEXTS["prose"]], trainer)
    return backend


def write_directory(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A Hugging Face directory with the tiny tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_backend().save(str(folder / "tokenizer.json"))
    given = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    given |= {"chat_template": TEMPLATE, "model_max_length": 512}
    text = json.dumps(given | (config or {}))
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder


def tiny_fields() -> dict[str, Any]:
    """The tiny tokenizer as GGUF metadata, keys without "tokenizer."."""
    spec = json.loads(tiny_backend().to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "smollm",
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "ggml.merges": [" ".join(pair) for pair in spec["merges"]],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.eot_token_id": 3,
        "ggml.unknown_token_id": 0,
        "ggml.add_bos_token": False,
        "chat_template": TEMPLATE,
    }


PIECES = [
    "▁", "e", "t", "a", "o", "n", "i", "s", "r", "h", "l", "d", "m", "u", "f", "w", "b", ",", ".",
    "1", "8", "é", "狄",
    "▁t", "he", "▁the", "in", "er", "▁a", "▁w", "as", "▁was", "▁w", "es", "st", "▁b", "est",
    "▁best", "▁▁", "▁▁▁▁", "▁o", "▁of", "ti", "me", "ime", "▁time", "▁times", "the", "or", "wor",
    "▁wor", "ll", "ell", "hell", "llo", "hello", "el", "▁h", "▁hello",
]  # fmt: skip


def spm_fields(**changes: Any) -> dict[str, Any]:
    """A small SentencePiece-like vocabulary as GGUF metadata; a value of None leaves a key out."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    pieces = list(dict.fromkeys(PIECES))
    tokens += [*pieces, "<|user|>"]
    types += [1] * len(pieces) + [4]
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(pieces))] + [0.0],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    } | changes


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """A GGUF file with this metadata and no tensors; a value of None leaves the key out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    for key, value in fields.items():
        name = f"tokenizer.{key}"
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

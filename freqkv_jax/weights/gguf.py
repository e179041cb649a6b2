"""A GGUF file: config from its metadata, tensors dequantised, Q and K rows put back in order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from freqkv_jax.config import LlamaConfig, RopeConfig
from freqkv_jax.rope import inverse_frequencies
from freqkv_jax.sources import gguf_value
from freqkv_jax.weights.table import Index, Stored, targets

ARCHITECTURE = "llama"
ROPE_FREQS = "rope_freqs.weight"
# What Llama 3.1 and later were made with; a file keeps only the table that follows from it.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(path: Path, reader: Any) -> LlamaConfig:
    """The model's config from the file's metadata.

    Raises:
      ValueError: another architecture, a feature that this model does not compute, or a missing
        field.
    """
    architecture = gguf_value(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported in a GGUF file; allowed:"
            f" {ARCHITECTURE}"
        )
    try:
        return _config(reader)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _config(reader: Any) -> LlamaConfig:
    def value(key: str, default: Any = None) -> Any:
        return gguf_value(reader, f"{ARCHITECTURE}.{key}", default)

    _refuse_other_computation(value)
    heads = _required("attention.head_count", value)
    width = _required("embedding_length", value)
    vocab = value("vocab_size") or len(gguf_value(reader, "tokenizer.ggml.tokens", []))
    if not vocab:
        raise ValueError(f"metadata lacks {ARCHITECTURE}.vocab_size (and a tokenizer to count)")
    head_dim = value("attention.key_length") or width // heads
    rotated = value("rope.dimension_count", head_dim)
    if rotated != head_dim or value("attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"rope.dimension_count {rotated} and attention.value_length"
            f" {value('attention.value_length', head_dim)} must equal the head size {head_dim}"
        )
    names = {tensor.name for tensor in reader.tensors}
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=_required("feed_forward_length", value),
        num_layers=_required("block_count", value),
        num_heads=heads,
        num_kv_heads=_one(value("attention.head_count_kv", heads), "attention.head_count_kv"),
        head_dim=head_dim,
        rms_norm_eps=_shortest(_required("attention.layer_norm_rms_epsilon", value)),
        rope=_rope(reader, value, head_dim),
        max_position_embeddings=_required("context_length", value),
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=gguf_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_eos(reader),
    )


def _refuse_other_computation(value: Callable[..., Any]) -> None:
    for key in ("expert_count", "attention.sliding_window"):
        if value(key):
            raise ValueError(
                f"{ARCHITECTURE}.{key} is {value(key)}, which this model does not compute;"
                " allowed: absent or 0"
            )


def _required(key: str, value: Callable[..., Any]) -> Any:
    got = value(key)
    if got is None:
        raise ValueError(f"metadata lacks {ARCHITECTURE}.{key}")
    return _one(got, key)


def _one(got: Any, key: str) -> Any:
    """The value of a field that may be given a layer; layers that differ are refused."""
    if not isinstance(got, list):
        return got
    if len(set(got)) != 1:
        raise ValueError(f"{ARCHITECTURE}.{key} differs between layers ({got}); allowed: one value")
    return got[0]


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _eos(reader: Any) -> int | tuple[int, ...] | None:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = list(dict.fromkeys(i for key in keys if (i := gguf_value(reader, key)) is not None))
    return tuple(ids) if len(ids) > 1 else ids[0] if ids else None


def _rope(reader: Any, value: Callable[..., Any], head_dim: int) -> RopeConfig:
    theta = _shortest(value("rope.freq_base", 10000.0))  # the format's own default
    factor = value("rope.scaling.factor") or value("rope.scale_linear") or 1.0
    kind = value("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"rope scaling type {kind!r} is not supported in a GGUF file; allowed: none, linear,"
            f" and Llama 3's (a {ROPE_FREQS} tensor)"
        )
    linear = kind == "linear" and factor != 1.0
    rope = RopeConfig(theta, "linear", _shortest(factor)) if linear else RopeConfig(theta)
    table = next((t for t in reader.tensors if t.name == ROPE_FREQS), None)
    if table is None:
        return rope
    slowed = np.asarray(table.data, np.float32).reshape(-1)
    if slowed.shape == (head_dim // 2,) and np.all(slowed == 1):
        return rope
    # The table divides each frequency. Only its largest entry, the factor, is not known before.
    llama3 = RopeConfig(theta, "llama3", float(np.round(slowed.max(), 4)), **LLAMA3)
    plain = inverse_frequencies(RopeConfig(theta), head_dim)
    expected = plain / inverse_frequencies(llama3, head_dim)
    if linear or slowed.shape != expected.shape or not np.allclose(slowed, expected, rtol=1e-3):
        raise ValueError(
            f"tensor {ROPE_FREQS} scales frequencies otherwise than Llama 3.1 does"
            f" ({LLAMA3}); convert the model from its Hugging Face directory instead"
        )
    return llama3


def stored_tensors(path: Path, reader: Any, config: LlamaConfig) -> list[Stored]:
    """Every tensor of the file; a read dequantises the rows that it needs.

    Raises ValueError for tensor types that the gguf package cannot dequantise, all listed.
    """
    wanted = targets(config, "gguf")
    unknown = [
        f"{tensor.name} ({tensor.tensor_type.name})"
        for tensor in reader.tensors
        if tensor.name in wanted and not _readable(tensor)
    ]
    if unknown:
        raise ValueError(
            f"{path}: tensor types that cannot be dequantised: {', '.join(unknown)}; use a file"
            " of another type, for example Q8_0 or F16"
        )
    tensors = []
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        heads = wanted[tensor.name].num_heads if tensor.name in wanted else None
        kind = tensor.tensor_type.name
        tensors.append(Stored(tensor.name, shape, kind, path, _reader(tensor, shape, heads)))
    return tensors


def _readable(tensor: Any) -> bool:
    from gguf import quants

    row = tensor.data.reshape(-1, tensor.data.shape[-1])[:1]
    try:
        quants.dequantize(row, tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _reader(
    tensor: Any, shape: tuple[int, ...], num_heads: int | None
) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        from gguf import quants

        data = tensor.data
        if num_heads is not None:
            data = data[row_order(shape[0], num_heads)[index[0]]]
        elif len(shape) > 1:
            data = data[index[0]]
        part = quants.dequantize(data, tensor.tensor_type)
        part = part[index] if len(shape) == 1 else part[:, index[1]]
        # A float32 tensor is a view of the file, which may change later.
        return np.array(part) if np.may_share_memory(part, tensor.data) else part

    return read


def row_order(rows: int, num_heads: int) -> np.ndarray:
    """Which stored row of Q or K is row j of Hugging Face's order.

    llama.cpp rotates neighbouring rows (2p, 2p+1) of a head, Hugging Face rows (p, p + D/2); its
    converter reorders the rows accordingly, and this undoes it.
    """
    return np.arange(rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)

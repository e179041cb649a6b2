"""`freqkv info PATH`: what a model is, and what its cache will cost. Weights are not loaded."""

import argparse
import dataclasses
from typing import Any

from freqkv_jax.cli.common import (
    MODEL_HELP,
    add_policy_arguments,
    describe_policy,
    policy_from_flags,
    size_text,
)
from freqkv_jax.config import SHAPES, LlamaConfig

DESCRIPTION = """\
Prints a model's architecture, sizes and rope, and the bytes that its key-value cache takes under
each policy, at the sizes that the flags give. Weights are not loaded (those of a hub id not even
fetched)."""
EPILOG = """\
examples:
  freqkv info MODEL
  freqkv info llama3-8b --cache-size 8192"""
LENGTHS = {"4K": 4096, "32K": 32768, "128K": 131072, "1M": 1048576}
CACHE_DTYPE = "bfloat16"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "path", metavar="PATH", help=f"{MODEL_HELP}; or a shape: {', '.join(SHAPES)}"
    )
    add_policy_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the description and the table."""
    chosen = policy_from_flags(args)
    if args.path in SHAPES:
        config, remembered = SHAPES[args.path], None
        stored = "nothing: a shape, for compiling and benchmarks with random weights"
    else:
        from freqkv_jax.weights.load import open_source

        source = open_source(args.path, weights=False)
        config, remembered = source.config, source.policy
        stored = _stored(source)
    about = {"model": args.path} | _describe(config)
    about["stored"] = stored
    about["policy"] = _policy_text(chosen, remembered)
    about["KV cache"] = f"{size_text(config.kv_bytes_per_token)} a token in {CACHE_DTYPE}"
    for label, text in about.items():
        print(f"{label:16}{text}")
    print()
    _print_table(config, _policies(args.policy, chosen or remembered))
    return 0


def _describe(config: LlamaConfig) -> dict[str, str]:
    rope = config.rope.scaling_dict()
    scaling = ", ".join([rope.pop("rope_type"), *(f"{name} {v:g}" for name, v in rope.items())])
    tied = "tied embeddings" if config.tie_word_embeddings else "untied embeddings"
    ends = ", ".join(map(str, config.eos_ids)) or "none"
    bos = "none" if config.bos_token_id is None else config.bos_token_id
    return {
        "architecture": config.architecture,
        "parameters": f"{config.num_params:,} ({tied})",
        "layers": f"{config.num_layers}, width {config.hidden_size}, feed-forward"
        f" {config.intermediate_size}",
        "heads": f"{config.num_heads} of {config.head_dim}, {config.num_kv_heads} for keys and"
        " values",
        "vocabulary": f"{config.vocab_size:,} tokens (begin {bos}, end {ends})",
        "rope": f"theta {config.rope.theta:g}, {scaling}",
        "native window": f"{config.max_position_embeddings:,} tokens",
    }


def _stored(source: Any) -> str:
    """Size and element types on disk, from the files' headers."""
    from freqkv_jax.weights import hf

    if source.names == "hf" and not any(source.path.glob("model*.safetensors")):
        return f"no weights here; config.json says {hf.config_dtype(source.path) or 'no dtype'}"
    tensors = source.tensors()
    total = sum(file.stat().st_size for file in {tensor.file for tensor in tensors})
    kinds: dict[str, int] = {}
    for tensor in tensors:
        kinds[tensor.dtype] = kinds.get(tensor.dtype, 0) + tensor.num_elements
    count = sum(kinds.values())
    shares = sorted(kinds.items(), key=lambda item: -item[1])
    types = ", ".join(f"{kind} {100 * n / count:.3g}%" for kind, n in shares)
    form = "GGUF" if source.names == "gguf" else "safetensors"
    return f"{size_text(total)} of {form} ({types} of the elements)"


def _policy_text(chosen: Any, remembered: Any) -> str:
    from freqkv_jax.kv import FreqKVConfig

    if chosen is not None:
        return f"{describe_policy(chosen)} (from the flags)"
    if remembered is not None:
        return f"{describe_policy(remembered)} (remembered by the model)"
    return f"{describe_policy(FreqKVConfig())} (the default)"


def _policies(only: str | None, sizes_of: Any) -> list[Any]:
    """The policies of the table: `only` that one or all, each with the sizes of `sizes_of`."""
    from freqkv_jax.kv.policy import POLICIES, policy_from_args

    sizes = {} if sizes_of is None else dataclasses.asdict(sizes_of)
    return [policy_from_args(name, **sizes) for name in POLICIES if only in (None, name)]


def _print_table(config: LlamaConfig, policies: list[Any]) -> None:
    print(f"{'KV bytes after':16}" + "".join(f"{length:>12}" for length in LENGTHS) + " tokens")
    for kv in policies:
        cells = (size_text(kv.kv_bytes(config, CACHE_DTYPE, n)) for n in LENGTHS.values())
        size = "" if kv.capacity is None else f" {kv.capacity}"
        print(f"{kv.name + size:16}" + "".join(f"{cell:>12}" for cell in cells))

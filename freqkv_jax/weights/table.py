"""The one table between stored tensor names and the parameter tree, for both directions.

Files store a matrix as [out, in], the tree holds it as [in, out].
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from freqkv_jax.config import LlamaConfig

Names = Literal["hf", "gguf"]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Rule:
    """One kind of weight. `{i}` is the layer; `shape` is the tree's, in the letters of `_sizes`.

    `heads`: the letter of the heads whose rows GGUF keeps in another order, if any.
    """

    path: str
    hf: str
    gguf: str
    shape: str
    transposed: bool = False
    heads: str = ""


_BLOCK, _LAYER = "layers_{i}", "model.layers.{i}"
RULES = (
    Rule("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", "V E"),
    Rule(f"{_BLOCK}/input_norm/scale", f"{_LAYER}.input_layernorm.weight",
         "blk.{i}.attn_norm.weight", "E"),
    Rule(f"{_BLOCK}/attention/q/kernel", f"{_LAYER}.self_attn.q_proj.weight",
         "blk.{i}.attn_q.weight", "E HD", True, "H"),
    Rule(f"{_BLOCK}/attention/k/kernel", f"{_LAYER}.self_attn.k_proj.weight",
         "blk.{i}.attn_k.weight", "E KD", True, "K"),
    Rule(f"{_BLOCK}/attention/v/kernel", f"{_LAYER}.self_attn.v_proj.weight",
         "blk.{i}.attn_v.weight", "E KD", True),
    Rule(f"{_BLOCK}/attention/o/kernel", f"{_LAYER}.self_attn.o_proj.weight",
         "blk.{i}.attn_output.weight", "HD E", True),
    Rule(f"{_BLOCK}/post_norm/scale", f"{_LAYER}.post_attention_layernorm.weight",
         "blk.{i}.ffn_norm.weight", "E"),
    Rule(f"{_BLOCK}/mlp/gate/kernel", f"{_LAYER}.mlp.gate_proj.weight",
         "blk.{i}.ffn_gate.weight", "E F", True),
    Rule(f"{_BLOCK}/mlp/up/kernel", f"{_LAYER}.mlp.up_proj.weight",
         "blk.{i}.ffn_up.weight", "E F", True),
    Rule(f"{_BLOCK}/mlp/down/kernel", f"{_LAYER}.mlp.down_proj.weight",
         "blk.{i}.ffn_down.weight", "F E", True),
    Rule("norm/scale", "model.norm.weight", "output_norm.weight", "E"),
    Rule("lm_head/kernel", "lm_head.weight", "output.weight", "E V", True),
)  # fmt: skip

HEAD = "lm_head/kernel"  # absent where the embedding is the head
# Stored by some writers and not weights: tables that follow from the config.
NOT_WEIGHTS = (
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    r"rope_freqs\.weight",  # weights/gguf.py compares it with the config
    r"blk\.\d+\.attn_rot_embd(\.weight)?",
)
# Element types that a file may have (for GGUF: see weights/gguf.py, which dequantises).
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Target:
    """One weight of a given model: where it goes, and how it is stored."""

    path: str
    name: str
    shape: tuple[int, ...]  # in the tree
    transposed: bool
    num_heads: int | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, not read yet. `read(index)` gives that part of it, [out, in]."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[Index], np.ndarray]

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return int(np.prod(self.shape, dtype=np.int64))


def targets(config: LlamaConfig, names: Names) -> dict[str, Target]:
    """Every weight of a model by its stored name, layer by layer."""
    sizes = {
        "V": config.vocab_size,
        "E": config.hidden_size,
        "F": config.intermediate_size,
        "HD": config.num_heads * config.head_dim,
        "KD": config.num_kv_heads * config.head_dim,
    }
    heads = {"": None, "H": config.num_heads, "K": config.num_kv_heads}
    found = {}
    for rule in RULES:
        if rule.path == HEAD and config.tie_word_embeddings:
            continue
        for i in range(config.num_layers if "{i}" in rule.path else 1):
            name = getattr(rule, names).format(i=i)
            shape = tuple(sizes[letter] for letter in rule.shape.split())
            path = rule.path.format(i=i)
            found[name] = Target(path, name, shape, rule.transposed, heads[rule.heads])
    return found


def match(
    stored: Sequence[Stored], config: LlamaConfig, names: Names, where: Path
) -> list[tuple[Target, Stored]]:
    """Pairs every weight of the model with its tensor.

    Raises:
      ValueError: missing, extra, wrongly shaped, wrongly typed or duplicate tensors, all listed.
    """
    wanted = targets(config, names)
    by_name: dict[str, Stored] = {}
    problems: dict[str, list[str]] = {}

    def complain(kind: str, text: str) -> None:
        problems.setdefault(kind, []).append(text)

    for tensor in stored:
        name = tensor.name
        if any(re.fullmatch(pattern, name) for pattern in NOT_WEIGHTS):
            continue
        if name in by_name:
            complain("duplicate", f"{name} ({by_name[name].file.name} and {tensor.file.name})")
        elif name in wanted:
            by_name[name] = tensor
            if tensor.shape != wanted[name].stored_shape:
                expected = list(wanted[name].stored_shape)
                complain("wrong shape", f"{name} {list(tensor.shape)} (the config says {expected})")
            if names == "hf" and tensor.dtype not in FLOATS:
                complain("wrong type", f"{name} {tensor.dtype} (allowed: {', '.join(FLOATS)})")
        elif not _is_unused_head(name, config, names):
            complain("extra", name)
    missing = [name for name in wanted if name not in by_name]
    if missing:
        problems = {"missing": missing} | problems
    if problems:
        listed = "; ".join(f"{kind}: {', '.join(texts)}" for kind, texts in problems.items())
        raise ValueError(
            f"the tensors of {where} are not those that its config describes: {listed}. Fetch the"
            " model again, or correct the config (a quantised or adapter checkpoint must be merged"
            " to plain weights first)"
        )
    return [(target, by_name[name]) for name, target in wanted.items()]


def _is_unused_head(name: str, config: LlamaConfig, names: Names) -> bool:
    # Some writers store the head of a tied model as well; transformers ignores it too.
    return config.tie_word_embeddings and name == getattr(RULES[-1], names)


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} to {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree

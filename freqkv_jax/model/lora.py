"""Low-rank adapters as their own tree: W + scale a b beside a weight W that stays as it is.

The tree is {"layers_0": {"attention": {"q": {"a": [in, r], "b": [r, out]}}}, ...}. The model reads
it as the variable collection "lora", whose b are scaled already (`collection`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from freqkv_jax.config import LlamaConfig
from freqkv_jax.sharding import lora_shardings, tree_path

# Name of a target -> its place in a layer.
TARGETS = {
    "q": ("attention", "q"),
    "k": ("attention", "k"),
    "v": ("attention", "v"),
    "o": ("attention", "o"),
    "gate": ("mlp", "gate"),
    "up": ("mlp", "up"),
    "down": ("mlp", "down"),
}


def check_lora(targets: Sequence[str], rank: int) -> None:
    """ValueError for an unknown target, none at all, or a rank below 1."""
    wrong = [name for name in targets if name not in TARGETS]
    if wrong or not targets:
        raise ValueError(
            f"LoRA targets {list(targets)} are not understood; name one or more of"
            f" {', '.join(TARGETS)}"
        )
    if rank < 1:
        raise ValueError(f"the LoRA rank must be 1 or more, got {rank}")


def abstract_lora(config: LlamaConfig, targets: Sequence[str], rank: int) -> Any:
    """The adapter tree as float32 shapes."""
    check_lora(targets, rank)
    e, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_heads * d, config.num_kv_heads * d
    sizes = {
        "q": (e, heads), "k": (e, kv), "v": (e, kv), "o": (heads, e),
        "gate": (e, f), "up": (e, f), "down": (f, e),
    }  # fmt: skip

    def layer() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, (part, leaf) in TARGETS.items():
            if name in targets:
                fan_in, fan_out = sizes[name]
                found.setdefault(part, {})[leaf] = {
                    "a": jax.ShapeDtypeStruct((fan_in, rank), jnp.float32),
                    "b": jax.ShapeDtypeStruct((rank, fan_out), jnp.float32),
                }
        return found

    return {f"layers_{i}": layer() for i in range(config.num_layers)}


def init_lora(
    config: LlamaConfig,
    targets: Sequence[str],
    rank: int,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Any:
    """A fresh adapter, float32: a uniform in +-1/sqrt(in), as peft does, and b zero."""
    shapes = abstract_lora(config, targets, rank)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    where = [None] * len(leaves) if mesh is None else jax.tree.leaves(lora_shardings(shapes, mesh))
    key = jax.random.key(seed)
    made = []
    for i, ((path, leaf), sharding) in enumerate(zip(leaves, where, strict=True)):
        bound = leaf.shape[0] ** -0.5 if tree_path(path).endswith("/a") else 0.0
        make = _uniform_on(leaf.shape, bound, sharding)
        made.append(make(jax.random.fold_in(key, i)))
    return jax.tree.unflatten(tree, made)


@functools.lru_cache(maxsize=64)
def _uniform_on(shape: tuple[int, ...], bound: float, sharding: Any) -> Callable[[Array], Array]:
    def uniform(key: Array) -> Array:
        if not bound:
            return jnp.zeros(shape, jnp.float32)
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return jax.jit(uniform, out_shardings=sharding)


def collection(lora: Any, scale: float, dtype: Any) -> Any:
    """The model's variable collection "lora": in `dtype`, b times `scale` (= alpha / rank)."""

    def leaf(path: tuple[Any, ...], x: Array) -> Array:
        return (x * scale if tree_path(path).endswith("/b") else x).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, lora)


def merge_lora(params: Any, lora: Any, scale: float) -> Any:
    """`params` with every adapted kernel W replaced by W + scale a b, in W's dtype."""

    def walk(node: Any, part: Any) -> Any:
        if "a" in part and "kernel" in node:
            return node | {"kernel": _merged(node["kernel"], part["a"], part["b"], scale)}
        return node | {name: walk(node[name], below) for name, below in part.items()}

    return walk(params, lora)


@jax.jit
def _merged(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    delta = jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)

"""Layers as one loop in place of a program each: compiling takes as long as for one layer."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.policy import Memory

# layer(variables, x, memory) -> x, memory
Layer = Callable[[Any, Array, Memory], tuple[Array, Memory]]


def scan_layers(
    layer: Layer, x: Array, variables: Sequence[Any], memories: Sequence[Memory]
) -> tuple[Array, list[Memory]]:
    """Applies `layer` once for each element of `variables` and `memories`, in order.

    The weights and memories of all layers are copied into one array each, and the memories back:
    twice their bytes are moved and held at a time. That is little beside reading many tokens with
    a small model, and much beside a decode step.

    Returns: x, and the layers' memories.
    """

    def one(x: Array, both: Any) -> tuple[Array, Memory]:
        return layer(both[0], x, both[1])

    x, after = jax.lax.scan(one, x, (_stack(variables), _stack(memories)))
    count = len(memories)
    return x, [jax.tree.map(lambda leaf, i=i: leaf[i], after) for i in range(count)]


def scan_whole(layer: Callable[[Any, Array], Array], x: Array, variables: Sequence[Any]) -> Array:
    """Applies `layer(variables, x)` once for each element of `variables`, in order."""

    def one(x: Array, some: Any) -> tuple[Array, None]:
        return layer(some, x), None

    return jax.lax.scan(one, x, _stack(variables))[0]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

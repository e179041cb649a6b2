"""Parameters without a checkpoint: their shapes, and random values."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import FullConfig, KVState
from freqkv_jax.kv.state import empty_state
from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import check_mesh, param_shardings, tree_path


def abstract_params(config: LlamaConfig, dtype: str) -> Any:
    """The parameter tree as shapes: nothing is computed or allocated."""
    model = Llama(config, FullConfig(), dtype)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def init_params(model: Llama, seed: int = 0, mesh: Mesh | None = None) -> Any:
    """Random parameters, for benchmarks, tests and training from nothing.

    Args:
      model: gives shapes and dtype.
      seed: of the draw.
      mesh: where they are made, each device its own part. None: the default device.

    Returns:
      The parameter tree: scales 1, embeddings with standard deviation 0.02, kernels [in, out]
      with in^-1/2.

    Raises:
      ValueError: the mesh does not divide the model's sizes (all of them are named).
    """
    if mesh is not None:
        check_mesh(model.config, mesh)
    shapes = abstract_params(model.config, model.dtype)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    where = (
        jax.tree.leaves(param_shardings(shapes, mesh)) if mesh is not None else [None] * len(leaves)
    )
    key = jax.random.key(seed)
    # Leaf by leaf, so that the few shapes are compiled once each: one program for all leaves of a
    # 7B model takes a minute to compile.
    made = [
        _random(jax.random.fold_in(key, i), tree_path(path), leaf, sharding)
        for i, ((path, leaf), sharding) in enumerate(zip(leaves, where, strict=True))
    ]
    return jax.tree.unflatten(tree, made)


def _random(key: Array, name: str, leaf: jax.ShapeDtypeStruct, sharding: Any) -> Array:
    kind = name.rpartition("/")[2]
    std = {"scale": 0.0, "embedding": 0.02}.get(kind, leaf.shape[0] ** -0.5)
    make = _normal_on(leaf.shape, leaf.dtype, sharding)
    return make(key, jnp.float32(std), jnp.float32(kind == "scale"))


@functools.lru_cache(maxsize=64)
def _normal_on(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[..., Array]:
    def normal(key: Array, std: Array, mean: Array) -> Array:
        return (mean + std * jax.random.normal(key, shape)).astype(dtype)

    return jax.jit(normal, out_shardings=sharding)


def abstract_state(model: Llama, batch: int, slots: int | None = None) -> KVState:
    """The shapes of a state of `batch` rows."""
    return jax.eval_shape(lambda: empty_state(model.config, model.kv, batch, model.dtype, slots))

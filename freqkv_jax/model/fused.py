"""Weights laid out for decoding, and one token of one text through them in few kernels.

A step at batch 1 reads every weight once and computes next to nothing: a large model takes as long
as reading takes, a small one as long as starting its kernels. A fused tree holds the kernels of q,
k, v in one array and those of gate, up in another, each as [out, in], so that a product is a sum
along rows: the compiler makes one kernel of a norm, a product and what stands before it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import KVPolicy
from freqkv_jax.kv.policy import Memory
from freqkv_jax.model.flash_decode import attend_one
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import mesh_of


def fuse(params: Any, donate: bool = False) -> Any:
    """The parameter tree with fused kernels, for prefill, decode, generate and score on one device.

    Embedding, head and norms are shared with `params`; the kernels are new arrays, as large as the
    old. A tree that is fused already comes back as it is. Only a plain tree can be saved, trained
    or spread over a mesh.

    Args:
      params: the tree of a model. donate: free its kernels layer by layer, so that never more than
        one layer's weights exist twice; `params` cannot be used again.

    Raises:
      ValueError: the parameters lie on a mesh: joined kernels would have to be gathered.
    """
    if is_fused(params):
        return params
    if mesh_of(params) is not None:
        raise ValueError("parameters on a mesh cannot be fused; use them as they are")
    fused = dict(params)
    for name in params:
        if name.startswith("layers_"):
            fused[name] = _fused_layer(params[name])
            if donate:
                _free(params[name], fused[name])
    return fused


def is_fused(params: Any) -> bool:
    """Whether a parameter tree is one of `fuse`."""
    return "qkv" in params["layers_0"]["attention"]


def pays(params: Any, batch: int) -> bool:
    """Whether decoding `batch` texts gets faster by `fuse`: one text, on one GPU.

    On a CPU, which starts no kernels, it takes as long either way.
    """
    if batch != 1 or is_fused(params) or mesh_of(params) is not None:
        return False
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.Array):
        return {device.platform for device in leaf.devices()} <= {"gpu", "cuda"}
    return jax.default_backend() == "gpu"


@jax.jit
def _fused_layer(layer: Any) -> Any:
    def rows(part: str, *names: str) -> dict[str, Array]:
        return {"rows": jnp.concatenate([layer[part][name]["kernel"].T for name in names])}

    return {
        "input_norm": layer["input_norm"],
        "attention": {"qkv": rows("attention", "q", "k", "v"), "o": rows("attention", "o")},
        "post_norm": layer["post_norm"],
        "mlp": {"gate_up": rows("mlp", "gate", "up"), "down": rows("mlp", "down")},
    }


def _free(layer: Any, after: Any) -> None:
    jax.block_until_ready(after)
    for leaf in jax.tree.leaves(layer):
        if isinstance(leaf, jax.Array):
            leaf.delete()


class Token(NamedTuple):
    """What the layers need to know of the token that is read, the same in all of them."""

    fill: Array  # its slot, a scalar
    counts: Array | None  # [1]: 0 where the row is frozen and keeps its memory
    cos: Array  # [H + 2K, D/2] of the angles by which heads of q, k, v are turned (v by none)
    sin: Array


def token_at(
    config: LlamaConfig, kv: KVPolicy, rope: Rope, seen: Array, fill: Array, counts: Array | None
) -> Token:
    """The token behind `fill` slots, in a text of which `seen` tokens are read (scalars)."""
    angles = rope.angles(kv.position(seen, fill))
    heads = config.num_heads + 2 * config.num_kv_heads
    turned = (jnp.arange(heads) < heads - config.num_kv_heads)[:, None]
    angles = jnp.where(turned, angles[None], jnp.float32(0))
    return Token(fill, counts, jnp.cos(angles), jnp.sin(angles))


def read_token(
    layer: Any,
    config: LlamaConfig,
    kv: KVPolicy,
    x: Float[Array, "E"],
    memory: Memory,
    token: Token,
) -> tuple[Float[Array, "E"], Memory]:
    """A layer of a fused tree: what `Block.extend` computes, for one token of one text."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    qkv = layer["attention"]["qkv"]["rows"].reshape(heads + 2 * kv_heads, 2, -1, x.size)
    # The halves that rotary embedding pairs, each its own sum of one kernel.
    first, second = _normed_products(x, layer["input_norm"], config, qkv[:, 0], qkv[:, 1])
    cos, sin = token.cos, token.sin
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)[None, None]
    q, k, v = jnp.split(turned, [heads, heads + kv_heads], axis=2)
    queries = q if "queries" in kv.needs else None
    memory = kv.append(memory, k, v, token.fill, token.counts, queries)
    keys, values = kv.view(memory)
    out = attend_one(q[0, 0], keys[0], values[0], token.fill).reshape(-1)
    x = _plus_product(x, layer["attention"]["o"], out)
    gate_up = layer["mlp"]["gate_up"]["rows"].reshape(2, -1, x.size)
    gate, up = _normed_products(x, layer["post_norm"], config, gate_up[0], gate_up[1])
    return _plus_product(x, layer["mlp"]["down"], (jax.nn.silu(gate) * up).astype(x.dtype)), memory


def _normed_products(
    x: Array, norm: Any, config: LlamaConfig, *kernels: Array
) -> tuple[Array, ...]:
    """RMSNorm(x) [E] times kernels [..., E] of one shape, summed along their rows, float32.

    The sum of x^2 is one more sum of the same loop: as a kernel of its own, with another one to
    scale, it costs a small model more than adding it up in every row does.
    """
    wide = x.astype(jnp.float32)
    scaled = wide * norm["scale"].astype(jnp.float32)
    parts = [kernel.astype(jnp.float32) * _along(scaled, kernel) for kernel in kernels]
    parts.append(jnp.broadcast_to(_along(wide * wide, kernels[0]), kernels[0].shape))
    zeros = (jnp.float32(0),) * len(parts)
    *sums, squares = jax.lax.reduce(tuple(parts), zeros, _add_all, (kernels[0].ndim - 1,))
    squares = squares.reshape(-1)[0]  # the same in every row
    rate = jax.lax.rsqrt(squares / x.size + config.rms_norm_eps)
    return tuple(y * rate for y in sums)


def _add_all(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _plus_product(x: Array, linear: Any, y: Array) -> Array:
    """x + y @ kernel, in x's dtype.

    x enters as the first term of each sum: added behind them it would be a kernel of its own.
    """
    rows = linear["rows"].astype(jnp.float32)
    first = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) == 0
    start = jnp.where(first, x.astype(jnp.float32)[:, None], jnp.float32(0))
    return jnp.sum(rows * _along(y.astype(jnp.float32), rows) + start, axis=-1).astype(x.dtype)


def _along(x: Array, like: Array) -> Array:
    return x.reshape((1,) * (like.ndim - 1) + (-1,))

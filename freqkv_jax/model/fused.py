"""Weights laid out for decoding, and one token of one text through them in few kernels.

A step at batch 1 reads every weight once and computes next to nothing: a large model takes as long
as reading takes, a small one as long as starting its kernels. A fused tree holds the kernels of q,
k, v in one array and those of gate, up in another, each as [out, in], so that a product is a sum
along rows: the compiler makes one kernel of a norm, a product and what stands before it. On NVIDIA
`matvec` makes one of what stands behind it, too; elsewhere the sums here are what runs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from freqkv_jax import nvidia
from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import KVPolicy
from freqkv_jax.kv.policy import Memory
from freqkv_jax.model import matvec
from freqkv_jax.model.flash_decode import attend_one
from freqkv_jax.nvidia import triton
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import mesh_of

WEIGHTS = ("int8",)  # how `fuse` can store kernels, other than as they are


def fuse(params: Any, donate: bool = False, weights: str | None = None) -> Any:
    """The parameter tree with fused kernels, for prefill, decode, generate and score on one device.

    Embedding, head and norms are shared with `params`; the kernels are new arrays, as large as the
    old. A tree that is fused already comes back as it is. Only a plain tree can be saved, trained
    or spread over a mesh. Library functions take the tree they are given; `freqkv generate` fuses
    its own where `pays` says so.

    Args:
      params: the tree of a model.
      donate: free its kernels layer by layer, so that never more than one layer's weights exist
        twice; `params` cannot be used again.
      weights: "int8" stores kernels, and the table that is the head, as integers with one float32
        factor an output (its largest weight is 127): half the bytes of bfloat16, not exact.

    Raises:
      ValueError: unknown weights, or a fused tree to be stored otherwise; the parameters lie on a
        mesh: joined kernels would have to be gathered.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights {weights!r} are unknown; allowed: {', '.join(WEIGHTS)} or None")
    if is_fused(params):
        if weights == stored_as(params):
            return params
        raise ValueError("the tree is fused already; fuse the plain one with these weights")
    if mesh_of(params) is not None:
        raise ValueError("parameters on a mesh cannot be fused; use them as they are")
    fused = dict(params)
    for name in params:
        if name.startswith("layers_"):
            fused[name] = _fused_layer(params[name], weights)
        elif weights is not None and name == "lm_head":
            fused[name] = _int8(params[name]["kernel"].T)
        elif weights is not None and name == "embed" and "lm_head" not in params:
            table = _int8(params[name]["embedding"])
            fused[name] = {"embedding": table["rows"], "scale": table["scale"]}
        if donate and fused[name] is not params[name]:
            _free(params[name], fused[name])
    return fused


def is_fused(params: Any) -> bool:
    """Whether a parameter tree is one of `fuse`."""
    return "qkv" in params["layers_0"]["attention"]


def stored_as(params: Any) -> str | None:
    """The `weights` of a fused tree."""
    rows = params["layers_0"]["attention"]["qkv"]["rows"]
    return "int8" if rows.dtype == jnp.int8 else None


def pays(params: Any, batch: int) -> bool:
    """Whether decoding `batch` texts is faster with `fuse`: one text, on one NVIDIA GPU.

    On a CPU, which starts no kernels, it takes as long either way; elsewhere it was not timed.
    """
    if batch != 1 or is_fused(params) or mesh_of(params) is not None or not nvidia.present():
        return False
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        return {device.platform for device in leaf.devices()} <= {"gpu", "cuda"}
    return jax.default_backend() == "gpu"


@functools.partial(jax.jit, static_argnums=1)
def _fused_layer(layer: Any, weights: str | None) -> Any:
    def rows(part: str, *names: str) -> dict[str, Array]:
        joined = jnp.concatenate([layer[part][name]["kernel"].T for name in names])
        return {"rows": joined} if weights is None else _int8(joined)

    return {
        "input_norm": layer["input_norm"],
        "attention": {"qkv": rows("attention", "q", "k", "v"), "o": rows("attention", "o")},
        "post_norm": layer["post_norm"],
        "mlp": {"gate_up": rows("mlp", "gate", "up"), "down": rows("mlp", "down")},
    }


@jax.jit
def _int8(rows: Array) -> dict[str, Array]:
    """Rows [out, in] as integers from -127 to 127, and the factor of each."""
    wide = rows.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=1) / 127
    unit = jnp.where(scale > 0, scale, jnp.float32(1))
    return {"rows": jnp.round(wide / unit[:, None]).astype(jnp.int8), "scale": scale}


def _free(old: Any, new: Any) -> None:
    """Deletes the matrices of `old` once `new` is there; norms may be the same arrays in both."""
    jax.block_until_ready(new)
    for leaf in jax.tree.leaves(old):
        if isinstance(leaf, jax.Array) and leaf.ndim > 1:
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
    # The halves that rotary embedding pairs, each its own sum of one kernel.
    pairs = (heads + 2 * kv_heads, 2, config.head_dim // 2)
    qkv = layer["attention"]["qkv"]
    angles = (token.cos, token.sin)
    turned = _normed_pairs(x, layer["input_norm"], config, qkv, pairs, _turned, angles)
    turned = turned.reshape(-1, config.head_dim)
    q, k, v = jnp.split(turned[None, None], [heads, heads + kv_heads], axis=2)
    queries = q if "queries" in kv.needs else None
    memory = kv.append(memory, k, v, token.fill, token.counts, queries)
    keys, values = kv.view(memory)
    out = attend_one(turned, keys[0], values[0], token.fill, heads).reshape(-1)
    x = _plus(x, layer["attention"]["o"], out)
    pairs = (1, 2, config.intermediate_size)
    hidden = _normed_pairs(x, layer["post_norm"], config, layer["mlp"]["gate_up"], pairs, _gated)
    return _plus(x, layer["mlp"]["down"], hidden.reshape(-1)), memory


def _turned(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    return first * cos - second * sin, second * cos + first * sin


def _gated(gate: Array, up: Array) -> tuple[Array]:
    return (jax.nn.silu(gate) * up,)


def _by_triton() -> bool:
    """Whether products go through `matvec` where the program is lowered for an NVIDIA GPU."""
    return triton is not None and nvidia.present()


def _normed_pairs(
    x: Array,
    norm: Any,
    config: LlamaConfig,
    linear: Any,
    pairs: tuple[int, int, int],
    finish: matvec.Finish,
    extras: tuple[Array, ...] = (),
) -> Array:
    """RMSNorm(x) [E] times a kernel whose outputs are `pairs` [a, 2, b], finished, in x's dtype.

    Returns [a, n, b] of the n arrays that `finish` makes of both outputs, float32 [a, b], and of
    `extras`, float32 [a, b].
    """

    def plain(x: Array, norm: Any, linear: Any, *extras: Array) -> Array:
        first, second = _normed_products(x, norm, config, linear, pairs)
        return jnp.stack(finish(first, second, *extras), axis=1).astype(x.dtype)

    def kernel(x: Array, norm: Any, linear: Any, *extras: Array) -> Array:
        rows, scale = linear["rows"], linear.get("scale")
        args = x, norm["scale"], config.rms_norm_eps, rows, pairs, finish, extras, scale
        return matvec.normed_pairs(*args)

    special = {"cuda": kernel} if _by_triton() else {}
    return jax.lax.platform_dependent(x, norm, linear, *extras, default=plain, **special)


def _plus(x: Array, linear: Any, y: Array) -> Array:
    """x [E] + y [F] @ kernel, in x's dtype."""

    def kernel(x: Array, linear: Any, y: Array) -> Array:
        return matvec.plus_product(x, linear["rows"], y, linear.get("scale"))

    special = {"cuda": kernel} if _by_triton() else {}
    return jax.lax.platform_dependent(x, linear, y, default=_plus_product, **special)


def _normed_products(
    x: Array, norm: Any, config: LlamaConfig, linear: Any, pairs: tuple[int, int, int]
) -> tuple[Array, Array]:
    """RMSNorm(x) [E] times a kernel whose outputs are `pairs` [a, 2, b]: both of each, [a, b].

    The sum of x^2 is one more sum of the same loop: as a kernel of its own, with another one to
    scale, it costs a small model more than adding it up in every row does.
    """
    wide = x.astype(jnp.float32)
    scaled = wide * norm["scale"].astype(jnp.float32)
    rows = linear["rows"].reshape(*pairs, x.size)
    halves = [rows[:, i].astype(jnp.float32) for i in range(2)]
    parts = [half * _along(scaled, half) for half in halves]
    parts.append(jnp.broadcast_to(_along(wide * wide, halves[0]), halves[0].shape))
    zeros = (jnp.float32(0),) * len(parts)
    first, second, squares = jax.lax.reduce(tuple(parts), zeros, _add_all, (2,))
    squares = squares[0, 0]  # the same in every row
    rate = jax.lax.rsqrt(squares / x.size + config.rms_norm_eps)
    if "scale" not in linear:
        return first * rate, second * rate
    scale = linear["scale"].reshape(pairs)
    return first * rate * scale[:, 0], second * rate * scale[:, 1]


def _add_all(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _plus_product(x: Array, linear: Any, y: Array) -> Array:
    """x + y @ kernel, in x's dtype.

    x enters as the first term of each sum: added behind them it would be a kernel of its own.
    """
    rows = linear["rows"].astype(jnp.float32)
    if "scale" in linear:
        rows = rows * linear["scale"][:, None]
    first = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) == 0
    start = jnp.where(first, x.astype(jnp.float32)[:, None], jnp.float32(0))
    return jnp.sum(rows * _along(y.astype(jnp.float32), rows) + start, axis=-1).astype(x.dtype)


def _along(x: Array, like: Array) -> Array:
    return x.reshape((1,) * (like.ndim - 1) + (-1,))

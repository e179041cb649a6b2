"""Causal attention behind one function: naive reference, blocked XLA, cuDNN, and splash on TPU.

Queries are aligned to the bottom right: with T queries and S keys, query j sees keys 0 .. S-T+j.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from freqkv_jax import nvidia
from freqkv_jax.model import cudnn
from freqkv_jax.model.cudnn import ATTENDED
from freqkv_jax.sharding import HEADS_SPEC, on_each_device

BACKENDS = ("auto", "naive", "blocked", "cudnn", "splash")
QUERY_BLOCK = 128  # queries whose scores are held at once by the blocked form
SPLASH_ALIGN = 128  # splash wants lengths that its blocks divide


def check_backend(backend: str) -> None:
    """ValueError unless `backend` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"attention {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    backend: str = "auto",
) -> Float[Array, "B T H D"]:
    """Causal attention of the last T of S tokens, scale 1/sqrt(D), float32 softmax.

    Args:
      q, k, v: T <= S; heads h of q share kv head h // (H/K).
      backend: one of BACKENDS. "auto" is resolved when the program is lowered, from the platform
        that it is compiled for: cuDNN on NVIDIA in bfloat16 or float16, splash on TPU, the
        blocked form elsewhere and in float32.

    Raises:
      ValueError: an unknown backend, or cuDNN for a dtype that it has not.
    """
    check_backend(backend)
    if backend != "auto":
        return _FORMS[backend](q, k, v)
    special: dict[str, Callable[..., Array]] = {"tpu": splash}
    if cudnn.takes(q) and nvidia.present():
        special["cuda"] = cudnn.causal
    return jax.lax.platform_dependent(q, k, v, default=blocked, **special)


def attend_behind(
    q: Float[Array, "B T H D"],
    old: tuple[Float[Array, "B P K D"], Float[Array, "B P K D"]],
    new: tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]],
    backend: str = "auto",
) -> Float[Array, "B T H D"]:
    """`attend` on old entries and new ones: query j sees all of old and new[: j + 1].

    Args:
      old, new: keys and values.
      backend: as of `attend`. With cuDNN the parts are attended one by one (`cudnn.behind`), the
        other forms read them joined.
    """
    check_backend(backend)

    def joined(q: Array, *parts: Array) -> Array:
        k, v = (jnp.concatenate(pair, axis=1) for pair in (parts[::2], parts[1::2]))
        return attend(q, k, v, backend)

    apart = backend in ("auto", "cudnn") and cudnn.takes(q) and cudnn.has_parts()
    if not apart or not old[0].shape[1]:
        return joined(q, *old, *new)
    if backend == "cudnn":
        return cudnn.behind(q, *old, *new)
    if not nvidia.present():
        return joined(q, *old, *new)
    return jax.lax.platform_dependent(q, *old, *new, default=joined, cuda=cudnn.behind)


def naive(q: Array, k: Array, v: Array) -> Array:
    """The obvious form: all scores at once, in float32."""
    first = k.shape[1] - q.shape[1]
    out = attend_cache(q, _heads_major(k), _heads_major(v), first, block=None)
    return checkpoint_name(out, ATTENDED)


def blocked(q: Array, k: Array, v: Array) -> Array:
    """Blocks of queries, scores recomputed in the backward pass; any dtype and platform."""
    first, length = k.shape[1] - q.shape[1], q.shape[1]
    k, v = _heads_major(k), _heads_major(v)
    # A few pieces with their own static number of keys: what the causal mask hides beyond a
    # piece is never computed (1/2 of the square is wasted by one piece, 1/8 by four).
    size = -(-length // (4 * QUERY_BLOCK)) * QUERY_BLOCK
    pieces = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = first + stop
        pieces.append(attend_cache(q[:, start:stop], k[:, :, :seen], v[:, :, :seen], first + start))
    out = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
    return checkpoint_name(out, ATTENDED)


def attend_cache(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N D"],
    first: int | Array,
    block: int | None = QUERY_BLOCK,
) -> Float[Array, "B T H D"]:
    """Attention on a cache: query j sits at slot first + j and sees the slots up to it.

    Args:
      k, v: heads before slots, as a state holds them.
      first: an int, a scalar, or one slot a row [B].
      block: queries at a time; None for all at once.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[1]
    q = jnp.transpose(q.reshape(batch, length, k.shape[1], groups, dim), (0, 2, 3, 1, 4))
    q = q * jnp.asarray(1 / math.sqrt(dim), q.dtype) if q.dtype == jnp.float32 else q
    first = jnp.asarray(first, jnp.int32)

    def some_queries(q: Array, offset: Array) -> Array:
        return _softmax_average(q, k, v, first + offset)

    if block is None or length <= block:
        out = some_queries(q, jnp.int32(0))
    else:
        blocks = -(-length // block)
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, blocks * block - length), (0, 0)))
        q = jnp.moveaxis(q.reshape(*q.shape[:3], blocks, block, dim), 3, 0)
        offsets = jnp.arange(blocks, dtype=jnp.int32) * block
        # Without the checkpoint the backward pass would keep every block's probabilities.
        out = jax.lax.map(lambda xs: jax.checkpoint(some_queries)(*xs), (q, offsets))
        out = jnp.moveaxis(out, 0, 3).reshape(*out.shape[1:4], blocks * block, dim)
        out = out[:, :, :, :length]
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, length, heads, dim)


def _softmax_average(q: Array, k: Array, v: Array, first: Array) -> Array:
    """q [B, K, G, t, D] at slots first, first + 1, ...; float32 q comes scaled already."""
    exact = q.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else None
    scores = jnp.einsum(
        "bkgtd,bknd->bkgtn", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    if not exact:
        scores = scores * jnp.float32(1 / math.sqrt(q.shape[-1]))
    slot = jnp.arange(k.shape[2], dtype=jnp.int32)
    at = first.reshape(-1, 1) + jnp.arange(q.shape[3], dtype=jnp.int32)[None]
    seen = slot[None, None, :] <= at[:, :, None]
    scores = jnp.where(seen[:, None, None], scores, jnp.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum(
        "bkgtn,bknd->bkgtd", weights, v, precision=precision, preferred_element_type=jnp.float32
    ).astype(q.dtype)


def splash(q: Array, k: Array, v: Array, interpret: bool = False) -> Array:
    """Splash attention (TPU). Under a mesh each device runs it on its own rows and heads."""

    def local(q: Array, k: Array, v: Array) -> Array:
        kernel = _splash_kernel(q.shape[2], q.shape[1], k.shape[1], interpret)
        q_pad = -q.shape[1] % SPLASH_ALIGN
        k_pad = -k.shape[1] % SPLASH_ALIGN
        # Queries are padded on the left (the offset moves with them), keys on the right, where
        # the mask hides them. The kernel does not scale.
        q_in = jnp.pad(q, ((0, 0), (q_pad, 0), (0, 0), (0, 0)))
        q_in = q_in * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
        k_in, v_in = (jnp.pad(x, ((0, 0), (0, k_pad), (0, 0), (0, 0))) for x in (k, v))
        out = jax.vmap(kernel)(*(_heads_major(x) for x in (q_in, k_in, v_in)))
        return _heads_major(out)[:, q_pad:].astype(q.dtype)

    return on_each_device(local, (HEADS_SPEC,) * 3, HEADS_SPEC)(q, k, v)


def _splash_kernel(heads: int, queries: int, keys: int, interpret: bool) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as sm

    q_len, k_len = (-(-n // SPLASH_ALIGN) * SPLASH_ALIGN for n in (queries, keys))
    mask = sm.CausalMask((q_len, k_len), offset=keys - q_len)
    q_block, k_block = (max(b for b in (128, 256, 512) if n % b == 0) for n in (q_len, k_len))
    sizes = sk.BlockSizes(
        block_q=q_block, block_kv=k_block, block_kv_compute=k_block,
        block_q_dkv=q_block, block_kv_dkv=k_block, block_kv_dkv_compute=k_block,
        block_q_dq=q_block, block_kv_dq=k_block,
    )  # fmt: skip
    # Made anew in every program (jax remembers the slow part): its arrays belong to the mesh of
    # the program that is traced, which may be of devices that are not here.
    return sk.make_splash_mha(
        sm.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )


def _heads_major(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2)


_FORMS = {"naive": naive, "blocked": blocked, "cudnn": cudnn.causal, "splash": splash}

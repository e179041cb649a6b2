"""cuDNN's flash attention on NVIDIA: causal, or of a chunk behind the cache before it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

ATTENDED = "attended"  # the name by which rematerialisation knows what attention gives


def takes(q: Array) -> bool:
    """Whether cuDNN has a kernel for queries of this dtype and head_dim."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def check(q: Array) -> None:
    """ValueError unless `takes`."""
    if not takes(q):
        raise ValueError(
            f"cuDNN attention takes bfloat16 or float16 with head_dim a multiple of 8 up to 256,"
            f" got {q.dtype} and head_dim {q.shape[-1]}; use attention='auto' or 'blocked'"
        )


def causal(q: Array, k: Array, v: Array) -> Array:
    """Causal attention of the last T of S tokens, [B, T, H, D].

    cuDNN's mask is aligned to the top left, so shorter queries are padded on the left until
    both alignments are the same; exact forward and backward, at up to 4/3 of the scores. Of what
    JAX passes on, nothing moves the mask: sequence lengths end it, a sliding window begins it, and
    the offsets are those of packed texts.
    """
    check(q)
    entries = k.shape[1]
    pad = entries - q.shape[1]
    q, k, v = _even(jnp.pad(q, ((0, 0), (pad, 0), (0, 0), (0, 0))), k, v)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return out[:, pad:entries]


def behind(q: Array, k_old: Array, v_old: Array, k_new: Array, v_new: Array) -> Array:
    """Queries [B, T, H, D] that see all of P old entries, and the T new ones up to their own.

    The two parts are attended one by one, so that no score behind the mask is computed and the old
    entries and the new need not be joined, and are weighed by their log-sums. In the backward pass
    each part is given the whole's result and log-sum, from which the kernel makes its own share of
    the softmax: that is exact, and as the forward pass computes no score in vain.
    """
    check(q)
    queries = q.shape[1]
    q, k_new, v_new = _even(q, k_new, v_new)
    return _behind(q, k_old, v_old, k_new, v_new)[:, :queries]


def _even(*arrays: Array) -> tuple[Array, ...]:
    """Arrays [B, T, ...] of an even length: a last row more where T is odd, which a causal mask
    keeps from the others. Of odd lengths JAX refuses derivatives (for a bias that is not there),
    of one query and one key cuDNN itself."""
    odd = arrays[0].shape[1] % 2
    return tuple(jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in arrays)


@jax.custom_vjp
def _behind(q: Array, k_old: Array, v_old: Array, k_new: Array, v_new: Array) -> Array:
    return _merged(q, k_old, v_old, k_new, v_new)[0]


def _merged(q: Array, k_old: Array, v_old: Array, k_new: Array, v_new: Array) -> Any:
    (out, log_sum), (out_new, log_sum_new) = (
        _part(q, k_old, v_old, False),
        _part(q, k_new, v_new, True),
    )
    return merge(out, log_sum, out_new, log_sum_new)


def merge(out: Array, log_sum: Array, other: Array, log_sum_other: Array) -> tuple[Array, Array]:
    """Attention over two sets of entries from that over each: [B, T, H, D], float32 [B, H, T]."""
    share = jax.nn.sigmoid(log_sum - log_sum_other)
    share = jnp.swapaxes(share, 1, 2)[..., None]
    mixed = out.astype(jnp.float32) * share + other.astype(jnp.float32) * (1 - share)
    return mixed.astype(out.dtype), jnp.logaddexp(log_sum, log_sum_other)


def _forward(q: Array, k_old: Array, v_old: Array, k_new: Array, v_new: Array) -> Any:
    out, log_sum = _merged(q, k_old, v_old, k_new, v_new)
    out, log_sum = checkpoint_name(out, ATTENDED), checkpoint_name(log_sum, ATTENDED)
    return out, (q, k_old, v_old, k_new, v_new, out, log_sum)


def _backward(kept: Any, grad: Array) -> tuple[Array, ...]:
    q, k_old, v_old, k_new, v_new, out, log_sum = kept
    q_one, k_old, v_old = _part_gradients(q, k_old, v_old, out, log_sum, grad, False)
    q_two, k_new, v_new = _part_gradients(q, k_new, v_new, out, log_sum, grad, True)
    q_grad = q_one.astype(jnp.float32) + q_two.astype(jnp.float32)
    return q_grad.astype(q.dtype), k_old, v_old, k_new, v_new


_behind.defvjp(_forward, _backward)


def _part(q: Array, k: Array, v: Array, is_causal: bool) -> tuple[Array, Array]:
    """Attention and its log-sum, float32 [B, H, T]. jax.nn's own rounds the latter to q's dtype."""
    scale = 1 / math.sqrt(q.shape[-1])
    return _internals().dot_product_attention(
        q, k, v, scale=scale, mask_type=_mask(is_causal), return_residual=True
    )


def _part_gradients(
    q: Array, k: Array, v: Array, out: Array, log_sum: Array, grad: Array, is_causal: bool
) -> tuple[Array, Array, Array]:
    """What a part gives to the gradients of q, k, v, from the result and log-sum of the whole."""
    internals, mask = _internals(), _mask(is_causal)
    absent = jnp.zeros(0, q.dtype)
    kept = (q, k, v, *[absent] * 7, log_sum, out)
    layout = internals.AttentionLayout.BTNH.value
    scale, version = 1 / math.sqrt(q.shape[-1]), internals.check_cudnn_version()
    grads = internals._dot_product_attention_bwd_rule(
        scale, 0, 0.0, (False, False), mask, layout, None, version, False, kept, grad
    )
    return grads[0], grads[1], grads[2]


def _mask(is_causal: bool) -> Any:
    kinds = _internals().MaskType
    return kinds.CAUSAL if is_causal else kinds.NO_MASK


@functools.cache
def _internals() -> Any:
    """JAX's own module: no public function takes or gives a log-sum in float32."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


@functools.cache
def has_parts() -> bool:
    """Whether this JAX has the internals that `behind` needs (0.10 to 0.11 do)."""
    names = (
        "dot_product_attention",
        "_dot_product_attention_bwd_rule",
        "check_cudnn_version",
        "AttentionLayout",
        "MaskType",
    )
    try:
        return all(hasattr(_internals(), name) for name in names)
    except ImportError:
        return False


def keeps(prim: Any, *_: Any, **params: Any) -> bool:
    """Policy of rematerialisation: saves what attention gives, and the statistics it needs back.

    cuDNN's are results of a primitive of JAX's own, known by its name; the other forms give theirs
    the name ATTENDED.
    """
    return params.get("name") == ATTENDED or prim.name.startswith("dot_product_attention_fwd")

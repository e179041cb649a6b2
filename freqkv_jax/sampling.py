"""Choosing the next token: greedy, or drawn by temperature, top-k and top-p with a key a row."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from freqkv_jax.kv.policy import whole_number


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as far as a program must know it when it is traced."""

    greedy: bool
    top_k: int | None
    nucleus: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw:
    """The values of sampling: `keys` is one key or one a row; None throughout where greedy."""

    keys: Any
    temperature: Any
    top_p: Any


def sampling(
    temperature: float, top_k: int | None, top_p: float | None, key: Any, batch: int
) -> tuple[Sampling, Draw]:
    """The two parts of a sampling rule; ValueError for values out of range or a missing key."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if top_k is not None:
        top_k = whole_number("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], or None for all, got {top_p!r}")
    if temperature == 0:
        return Sampling(True, None, False), Draw(None, None, None)
    if key is None:
        raise ValueError(
            f"temperature {temperature} samples, which needs key: pass key=jax.random.key(seed),"
            " or temperature=0 for greedy decoding"
        )
    keys = _wrapped(key)
    if keys.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one a row ({batch}), got shape {keys.shape}")
    nucleus = top_p is not None and top_p < 1
    share = jnp.float32(top_p) if nucleus else None
    return Sampling(False, top_k, nucleus), Draw(keys, jnp.float32(temperature), share)


def _wrapped(key: Any) -> Array:
    """`key` as a typed key, made of raw key data if it is that; ValueError if it is neither."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype != jnp.uint32 or not key.ndim:
        raise ValueError(f"key must be a PRNG key, such as jax.random.key(3), got {key!r}")
    return jax.random.wrap_key_data(key)


def pick(
    logits: Float[Array, "B V"], seen: Int[Array, "B"], rule: Sampling, draw: Draw
) -> Int[Array, "B"]:
    """The next token of every row.

    A row that has read t tokens draws with fold_in(row key, t), so that neither the other rows
    nor the cut into calls changes it. Ties take the lowest id. The order is temperature, top-k,
    top-p: top-p counts shares among what top-k left.
    """
    if rule.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = draw.keys
    if keys.ndim == 0:
        rows = jnp.arange(logits.shape[0], dtype=jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys, rows)
    keys = jax.vmap(jax.random.fold_in)(keys, seen)
    logits = logits / draw.temperature
    if rule.top_k is None and not rule.nucleus:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    values, order = jax.lax.top_k(logits, min(rule.top_k or logits.shape[-1], logits.shape[-1]))
    if rule.nucleus:
        shares = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        values = jnp.where(before < draw.top_p, values, -jnp.inf)
    place = jax.vmap(jax.random.categorical)(keys, values)
    return jnp.take_along_axis(order, place[:, None], axis=1)[:, 0].astype(jnp.int32)

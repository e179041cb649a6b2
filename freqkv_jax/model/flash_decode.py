"""Attention of one query a row to a cache's live slots as one Triton kernel (Pallas), and a merge.

XLA writes scores and weights out and reads all slots, and the values column by column: of an H200's
bandwidth it reached a quarter with 32 heads of 128. This reads the live slots once. JAX deprecates
Pallas' Triton backend; where it is gone, or a shape does not suit, XLA's form takes over.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from freqkv_jax import nvidia
from freqkv_jax.model.attention import attend_cache
from freqkv_jax.nvidia import triton
from freqkv_jax.sharding import (
    BATCH_AXES,
    HEADS_SPEC,
    MEMORY_SPEC,
    P,
    axis_size,
    on_each_device,
)

BLOCK = 64  # slots that a program holds at a time
PROGRAMS = 512  # about so many share the slots of all rows: a few for each of the GPU's processors
TILE = 16  # rows that a tensor core takes at least: a kv head's queries and zeros


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def attend_rows(
    q: Float[Array, "B 1 R D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N D"],
    fill: Int[Array, "*rows"],
    num_heads: int,
) -> Float[Array, "B 1 H D"]:
    """`attend_cache` for one query a row, at slot `fill` (a scalar or [B]).

    The platform decides when it is lowered; on a mesh each device runs the kernel on its own rows
    and heads. The queries are the first `num_heads` of q's R heads: on one device the kernel is
    given all of them, for cutting them out would be a kernel of its own.
    """
    plain = functools.partial(_plain, num_heads=num_heads)
    special = {}
    if suits(num_heads, q, k):
        parts = axis_size("tensor")
        if parts > 1:
            q = q[:, :, :num_heads]  # what is split among the devices are queries alone
        rows = P(BATCH_AXES) if fill.ndim else P()
        special["cuda"] = on_each_device(
            functools.partial(flash_rows, num_heads=num_heads // parts),
            (HEADS_SPEC, MEMORY_SPEC, MEMORY_SPEC, rows),
            HEADS_SPEC,
        )
    return jax.lax.platform_dependent(q, k, v, fill, default=plain, **special)


@attend_rows.defjvp
def _derivative(num_heads: int, at: Any, along: Any) -> tuple[Array, Array]:
    """Who differentiates gets the plain form: the kernel has no derivative."""
    fill = at[3]
    return jax.jvp(lambda q, k, v: _plain(q, k, v, fill, num_heads), at[:3], along[:3])


def _plain(q: Array, k: Array, v: Array, fill: Array, num_heads: int) -> Array:
    return attend_cache(q[:, :, :num_heads], k, v, fill)


def attend_one(
    q: Float[Array, "R D"],
    k: Float[Array, "K N D"],
    v: Float[Array, "K N D"],
    fill: Int[Array, ""],
    num_heads: int,
) -> Float[Array, "H D"]:
    """`attend_rows` for one row."""
    return attend_rows(q[None, None], k[None], v[None], fill, num_heads)[0, 0]


def suits(num_heads: int, q: Array, k: Array) -> bool:
    """Whether the kernel takes these: half precision (float32 would be rounded), even blocks."""
    heads, slots = k.shape[1:3]
    even = slots % BLOCK == 0 and num_heads <= TILE * heads
    return nvidia.suits(k, 1) and q.dtype == k.dtype and even


def flash_rows(q: Array, k: Array, v: Array, fill: Array, num_heads: int) -> Array:
    """`flash` of all rows at once: they become one more axis of the kernels' grids."""
    one = functools.partial(flash, num_heads=num_heads, num_rows=q.shape[0])
    return jax.vmap(one, (0, 0, 0, 0 if fill.ndim else None))(q[:, 0], k, v, fill)[:, None]


def flash(q: Array, k: Array, v: Array, fill: Array, num_heads: int, num_rows: int = 1) -> Array:
    """Partial averages of each kv head and run of slots, and a second kernel that merges them.

    Shapes as in `attend_one`, of a row beside which `num_rows` - 1 others are attended; the result
    has q's dtype.
    """
    heads, slots, dim = k.shape
    groups, blocks = num_heads // heads, slots // BLOCK
    runs = 1
    while blocks % (2 * runs) == 0 and num_rows * heads * runs < PROGRAMS:
        runs *= 2
    a_run = pl.BlockSpec((None, slots // runs, dim), lambda head, run: (head, run, 0))
    a_sum = pl.BlockSpec((None, None, groups), lambda head, run: (head, run, 0))
    sums = jax.ShapeDtypeStruct((heads, runs, groups), jnp.float32)
    average, top, total = nvidia.call_in_blocks(
        functools.partial(_average, groups=groups, scale=1 / math.sqrt(dim)),
        (heads, runs),
        [jax.ShapeDtypeStruct((*sums.shape, dim), jnp.float32), sums, sums],
        in_specs=[
            pl.BlockSpec((1,), lambda head, run: (0,)),
            pl.BlockSpec((groups, dim), lambda head, run: (head, 0)),
            a_run,
            a_run,
        ],
        out_specs=[
            pl.BlockSpec((None, None, groups, dim), lambda head, run: (head, run, 0, 0)),
            a_sum,
            a_sum,
        ],
    )(fill.reshape(1), q, k, v)
    all_sums = pl.BlockSpec((None, runs, None), lambda head, group: (head, 0, group))
    out = nvidia.call_in_blocks(
        _merge,
        (heads, groups),
        jax.ShapeDtypeStruct((heads, groups, dim), q.dtype),
        in_specs=[
            pl.BlockSpec((None, runs, None, dim), lambda head, group: (head, 0, group, 0)),
            all_sums,
            all_sums,
        ],
        out_specs=pl.BlockSpec((None, None, dim), lambda head, group: (head, group, 0)),
    )(average, top, total)
    return out.reshape(heads * groups, dim)


def _merge(average_ref: Any, top_ref: Any, total_ref: Any, out_ref: Any) -> None:
    """The average of one query over all runs."""
    top = top_ref[...]
    share = jnp.exp(top - jnp.max(top))
    merged = jnp.sum(average_ref[...] * share[:, None], axis=0)
    out_ref[...] = (merged / jnp.sum(total_ref[...] * share)).astype(out_ref.dtype)


def _average(
    fill_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    average_ref: Any,
    top_ref: Any,
    total_ref: Any,
    *,
    groups: int,
    scale: float,
) -> None:
    """One run of slots of one kv head: sum of exp(score - top) v, top, and sum of exp."""
    size = k_ref.shape[0]
    start = pl.program_id(1) * size
    last = fill_ref[0]
    rows = jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    real, some = rows < groups, pl.ds(0, TILE)
    q = triton.load(q_ref.at[some, :], mask=real[:, None], other=0)

    def block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        average, top, total = carry
        here = pl.ds(index * BLOCK, BLOCK)
        scores = triton.dot(q, k_ref[here, :], trans_b=True) * scale
        slot = start + index * BLOCK + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(slot <= last, scores, -1e30)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, kept = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        values = v_ref[here, :]
        average = average * kept[:, None] + triton.dot(weights.astype(values.dtype), values)
        return average, new_top, total * kept + jnp.sum(weights, axis=1)

    zeros = jnp.zeros((TILE,), jnp.float32)
    carry = jnp.zeros(q.shape, jnp.float32), jnp.full((TILE,), -1e30, jnp.float32), zeros
    live = jnp.clip((last - start) // BLOCK + 1, 0, size // BLOCK)
    average, top, total = jax.lax.fori_loop(0, live, block, carry)
    triton.store(average_ref.at[some, :], average, mask=real[:, None])
    triton.store(top_ref.at[some], top, mask=real)
    triton.store(total_ref.at[some], total, mask=real)

"""Rounds of choosing as Triton kernels (Pallas) on NVIDIA: who stays, and the move.

A kernel reads entries where they lie, in the caches of all chunks and among the chunks' tokens, and
writes what stays where attention will read it. XLA wrote keys out in float32, joined, copied and
transposed whole caches: 0.52 ms a round of the 7B shape on an H200 (docs/performance_log.md).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from freqkv_jax import nvidia
from freqkv_jax.nvidia import columns, load, masked, places, store, triton, turned

TILE = 32  # entries that a program holds at a time
INFINITY = 0x7F800000  # its bits in float32
PART = 4096  # scores of a head that are counted at a time, if there are so many


class Full(NamedTuple):
    """Full caches of B rows before a round: P entries of a chunk's cache, then Q tokens.

    Attributes:
      k, v: [B, C, P, K, D]. k_new, v_new: [B, C', Q, K, D]; keys rotated.
      index: int32 [1], which of C and C'.
    """

    k: Array
    v: Array
    k_new: Array
    v_new: Array
    index: Array


def moved(
    full: Full,
    old: Int[Array, "B K P"],
    turns: tuple[Float[Array, "Q1 half"], Float[Array, "Q1 half"]],
    chunks: int | None = None,
) -> tuple[Array, Array]:
    """Caches [B, C, P, K, D] in which what stays of `full` is written behind it, keys turned.

    Args:
      old: the slot of `full` that each of P slots takes its entry from, not before its own.
      turns: cosine and sine of the angles by which a key turns that moves 0 ... Q slots down.
      chunks: None: the entries become cache index + 1 of full.k and full.v, in place. Else cache 0
        of new arrays of so many, whose others hold nothing yet.
    """
    batch, _, prefix, heads, dim = full.k.shape
    shape = (batch, full.k.shape[1] if chunks is None else chunks, prefix, heads, dim)
    out = [jax.ShapeDtypeStruct(shape, x.dtype) for x in (full.k, full.v)]
    kernel = functools.partial(_move, step=int(chunks is None))
    aliases = {5: 0, 6: 1} if chunks is None else {}
    grid = (batch, heads, -(-prefix // TILE))
    return nvidia.call(kernel, grid, out, input_output_aliases=aliases)(
        full.index, old, *turns, full.k_new, full.k, full.v, full.v_new
    )


def _move(
    index_ref: Any,
    old_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    k_new_ref: Any,
    k_ref: Any,
    v_ref: Any,
    v_new_ref: Any,
    k_out_ref: Any,
    v_out_ref: Any,
    *,
    step: int,
) -> None:
    """TILE slots of a head."""
    row, head, tile = (pl.program_id(axis) for axis in range(3))
    index, prefix, half = index_ref[0], k_ref.shape[2], cos_ref.shape[1]
    here = pl.ds(tile * TILE, TILE)
    slot = places(tile * TILE, TILE)
    inside, shape = slot < prefix, (TILE, half)
    old = load(old_ref.at[row, head, here], inside)
    turn = jnp.where(inside, old - slot, 0)[:, None]
    cos, sin = (load(ref.at[turn, columns(0, half)], inside, shape) for ref in (cos_ref, sin_ref))

    def halves(cache_ref: Any, new_ref: Any) -> list[Array]:
        at = (row, index, old, head)
        return [entries(cache_ref, new_ref, at, first, half, inside) for first in (0, half)]

    def write(ref: Any, low: Array, high: Array) -> None:
        for first, x in ((0, low), (half, high)):
            store(ref.at[row, index + step, here, head, pl.ds(first, half)], x, inside)

    low, high = (x.astype(jnp.float32) for x in halves(k_ref, k_new_ref))
    write(k_out_ref, *turned(low, high, cos, sin))
    write(v_out_ref, *halves(v_ref, v_new_ref))


def entries(
    cache_ref: Any, new_ref: Any, at: tuple[Any, ...], first: int, width: int, inside: Array
) -> Array:
    """In a kernel, entries of a full cache, [slots, width].

    Args:
      cache_ref, new_ref: k and k_new, or v and v_new, of a `Full`.
      at: row, index, slots [slots], head. first, width: which columns. inside: bool [slots], which
        of the slots there are.
    """
    row, index, slot, head = at
    prefix, some = cache_ref.shape[2], columns(first, width)
    cached, shape = slot < prefix, (slot.shape[0], width)
    place = jnp.where(cached, slot, 0)[:, None]
    old = load(cache_ref.at[row, index, place, head, some], cached & inside, shape)
    place = jnp.where(cached, 0, slot - prefix)[:, None]
    new = load(new_ref.at[row, index, place, head, some], ~cached & inside, shape)
    return jnp.where(jnp.broadcast_to(cached[:, None], shape), old, new)


def staying(score: Float[Array, "B K m"], keep: int, sink: int, recent: int) -> Int[Array, "B K P"]:
    """The slots that stay of a full cache, in order: sinks, the `keep` of the m behind them that
    have the highest scores, of equal ones the lowest, and recents.

    One kernel, one program a head; XLA sorts twice.
    """
    batch, heads, size = score.shape
    out = jax.ShapeDtypeStruct((batch, heads, sink + keep + recent), jnp.int32)
    kernel = functools.partial(
        _staying, keep=keep, sink=sink, step=min(PART, pl.next_power_of_2(size))
    )
    return nvidia.call(kernel, (batch, heads), out)(score)


def marked(score: Float[Array, "B K m"], keep: int) -> Bool[Array, "B K m"]:
    """Marks the `keep` highest scores, of equal ones the lowest."""
    if keep == 0:
        return jnp.zeros(score.shape, bool)
    batch, heads, size = score.shape
    rows, cols = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    marks = jnp.zeros((batch, heads, size), bool)
    at = marks.at[rows, cols, staying(score, keep, 0, 0)]
    return at.set(True, unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")


def _staying(score_ref: Any, old_ref: Any, *, keep: int, sink: int, step: int) -> None:
    """Of a head. First the `keep`-th highest score, bit by bit; then the entries' places."""
    row, head = (pl.program_id(axis) for axis in range(2))
    size, fixed = score_ref.shape[2], old_ref.shape[2] - keep
    scores = functools.partial(_ordered, score_ref, (row, head), step)
    parts = -(-size // step)

    def count(bar: Array | int) -> Array:
        """How many scores are not below it."""

        def add(part: Array, total: Array) -> Array:
            score, _, inside = scores(part)
            return total + _number(inside & (score >= bar))

        return jax.lax.fori_loop(0, parts, add, jnp.int32(0))

    bar = jnp.where(count(0) >= keep, 0, jnp.int32(-(2**31)))

    def with_bit(index: Array, bar: Array) -> Array:
        higher = bar + jnp.left_shift(1, 30 - index)
        return jnp.where(count(higher) >= keep, higher, bar)

    bar = jax.lax.fori_loop(0, 31, with_bit, bar)
    equal = keep - count(bar + 1)  # so many of those that are level with it stay

    def write(part: Array, before: tuple[Array, Array]) -> tuple[Array, Array]:
        stay, level = before
        score, at, inside = scores(part)
        is_level = inside & (score == bar)
        order = level + jnp.cumsum(is_level.astype(jnp.int32))
        stays = (inside & (score > bar)) | (is_level & (order <= equal))
        place = stay + jnp.cumsum(stays.astype(jnp.int32)) - 1
        to = masked(sink + place, stays)
        triton.store(old_ref.at[row, head, to], sink + at, mask=stays)
        return stay + _number(stays), level + _number(is_level)

    jax.lax.fori_loop(0, parts, write, (jnp.int32(0), jnp.int32(0)))

    def write_fixed(part: Array, _: None) -> None:
        at = places(part * step, step)
        inside, is_sink = at < fixed, at < sink
        # Recents lie behind all m, and move behind those that stay
        to = masked(jnp.where(is_sink, at, at + keep), inside)
        triton.store(old_ref.at[row, head, to], jnp.where(is_sink, at, at + size), mask=inside)

    jax.lax.fori_loop(0, -(-fixed // step), write_fixed, None)


def _number(marks: Array) -> Array:
    return jnp.sum(marks.astype(jnp.int32))


def _ordered(
    ref: Any, head: tuple[Array, Array], step: int, part: Array
) -> tuple[Array, Array, Array]:
    """A part of the scores as integers of the same order, their places, and which there are."""
    at = places(part * step, step)
    inside = at < ref.shape[2]
    score = load(ref.at[*head, pl.ds(part * step, step)], inside)
    score = jnp.where(score == 0, 0.0, score)  # which may have a sign
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)
    # Of negative floats the higher bits are the lower numbers. NaN counts as infinity: no number
    # may be the highest there is, for the one above it is asked for, too.
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, jnp.minimum(bits, INFINITY)), at, inside

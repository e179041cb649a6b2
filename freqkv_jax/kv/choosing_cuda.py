"""Rounds of choosing as Triton kernels (Pallas) on NVIDIA: scores of keys, who stays, and the move.

A kernel reads entries where they lie, in the caches of all chunks and among the chunks' tokens, and
writes what stays where attention will read it. XLA wrote keys out in float32, joined, copied and
transposed whole caches: 0.52 ms a round of the 7B shape on an H200 (docs/performance_log.md).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from freqkv_jax import nvidia
from freqkv_jax.nvidia import columns, exact_dot, load, masked, store, triton, turned

TILE = 32  # entries that a program holds at a time
WIDE = 128  # others that it compares them with at a time
# About so many programs share the entries of a text that are scored, eight a processor of a Hopper.
# How many texts there are must not change in which order sums are taken.
PROGRAMS = 1056
LEAST = 16  # rows that a product of Triton's takes
MOST_NUMBERS = 64 * 128  # of a low-pass's components: more were never tried on a GPU


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
    slot = tile * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    inside, shape = slot < prefix, (TILE, half)
    old = load(old_ref.at[row, head, here], inside)
    turn = jnp.where(inside, old - slot, 0)[:, None]
    cos, sin = (load(ref.at[turn, columns(0, half)], inside, shape) for ref in (cos_ref, sin_ref))

    def halves(cache_ref: Any, new_ref: Any) -> list[Array]:
        at = (row, index, old, head)
        return [_entries(cache_ref, new_ref, at, first, half, inside) for first in (0, half)]

    def write(ref: Any, low: Array, high: Array) -> None:
        for first, x in ((0, low), (half, high)):
            store(ref.at[row, index + step, here, head, pl.ds(first, half)], x, inside)

    low, high = (x.astype(jnp.float32) for x in halves(k_ref, k_new_ref))
    write(k_out_ref, *turned(low, high, cos, sin))
    write(v_out_ref, *halves(v_ref, v_new_ref))


def _entries(
    cache_ref: Any, new_ref: Any, at: tuple[Any, ...], first: int, width: int, inside: Array
) -> Array:
    """Of entries of a full cache at (row, index, slots, head), `width` columns from `first` on."""
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

    Every entry counts those before it: two kernels of a few us where XLA sorts twice.
    """
    batch, heads, size = score.shape
    chosen = nvidia.call(
        functools.partial(_chosen, keep=keep),
        (batch, heads, -(-size // TILE)),
        jax.ShapeDtypeStruct(score.shape, jnp.int32),
    )(score)
    return nvidia.call(
        functools.partial(_places, keep=keep, sink=sink),
        (batch, heads, -(-max(size, sink + recent) // TILE)),
        jax.ShapeDtypeStruct((batch, heads, sink + keep + recent), jnp.int32),
    )(chosen)


def _chosen(score_ref: Any, out_ref: Any, *, keep: int) -> None:
    """Whether TILE entries of a head are among the `keep` highest."""
    here, at, inside = _tile(score_ref)
    score = load(score_ref.at[here], inside)[:, None]
    count, mine, parts = _others(score_ref, here, -jnp.inf)
    # Of equal scores the lowest slot is first: only within one part does that need the places.
    before = count(0, mine, lambda other, place: other >= score)
    before += count(mine, 1, lambda o, place: (o > score) | ((o == score) & (place < at[:, None])))
    before += count(mine + 1, parts - mine - 1, lambda other, place: other > score)
    rank = jnp.sum(before, axis=1)
    triton.store(out_ref.at[here], (rank < keep).astype(jnp.int32), mask=inside)


def _places(chosen_ref: Any, old_ref: Any, *, keep: int, sink: int) -> None:
    """Writes TILE entries of a head that stay to their places; and sinks and recents."""
    here, at, inside = _tile(chosen_ref)
    row, head, _ = here
    chosen = load(chosen_ref.at[here], inside) > 0
    count, mine, _ = _others(chosen_ref, here, 0)
    before = jnp.sum(count(0, mine, lambda other, place: other > 0, rows=1))
    place = before + jnp.sum(
        count(mine, 1, lambda other, place: (other > 0) & (place < at[:, None])), axis=1
    )
    chosen &= place < keep
    triton.store(old_ref.at[row, head, masked(sink + place, chosen)], sink + at, mask=chosen)
    fixed = at < old_ref.shape[2] - keep
    gap = jnp.where(at < sink, 0, keep)  # recents lie behind all m, and move behind those that stay
    to, come_from = at + gap, jnp.where(at < sink, at, at + chosen_ref.shape[2])
    triton.store(old_ref.at[row, head, masked(to, fixed)], come_from, mask=fixed)


def _tile(ref: Any) -> tuple[tuple[Array, Array, Any], Array, Array]:
    """Where a program's entries lie in [B, K, m], their places, and which of them there are."""
    row, head, tile = (pl.program_id(axis) for axis in range(3))
    at = tile * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    return (row, head, pl.ds(tile * TILE, TILE)), at, at < ref.shape[2]


def _others(ref: Any, here: Any, nothing: float) -> tuple[Callable[..., Array], Array, int]:
    """What counts a head's entries, WIDE at a time, of which a program's lie in one part; which;
    and how many parts there are. Behind the last entry stands `nothing`."""
    row, head, own = here
    size = ref.shape[2]

    def count(
        first: Any, parts: Any, marked: Callable[[Array, Array], Array], rows: int = TILE
    ) -> Array:
        """int32 [rows, WIDE], to be summed: adding up numbers of a thread costs one instruction."""

        def add(part: Any, total: Array) -> Array:
            start = (first + part) * WIDE
            place = columns(start, WIDE)
            other = triton.load(
                ref.at[row, head, pl.ds(start, WIDE)], mask=place[0] < size, other=nothing
            )
            return total + marked(other[None], place).astype(jnp.int32)

        return jax.lax.fori_loop(0, parts, add, jnp.zeros((rows, WIDE), jnp.int32))

    return count, own.start // WIDE, -(-size // WIDE)


def scores_fit(num_bands: int, head_dim: int) -> bool:
    """Whether `novelty` holds so many rows in a program's registers."""
    return _rows(num_bands) * head_dim <= MOST_NUMBERS


def padded(basis: Float[Array, "F m"]) -> Float[Array, "F m"]:
    """A basis with rows of zeros behind it, as `novelty` takes it."""
    return jnp.pad(basis, ((0, _rows(len(basis)) - len(basis)), (0, 0)))


def _rows(num_bands: int) -> int:
    return max(LEAST, pl.next_power_of_2(num_bands))


def novelty(
    full: Full,
    basis: Float[Array, "F m"],
    back: tuple[Float[Array, "m half"], Float[Array, "m half"]],
    start: int,
) -> Float[Array, "B K m"]:
    """-cos(u, low-pass of u) of the m entries from slot `start` on, as SpectralNoveltyConfig says.

    Args:
      basis: rows of the low-pass, `padded`. back: cosine and sine of the angles by which the keys
        of these slots are turned back.
    """
    batch, _, _, heads, dim = full.k.shape
    rows, size = basis.shape
    parts = max(1, min(-(-size // TILE), PROGRAMS // heads))
    length = -(-size // (parts * TILE)) * TILE  # entries of a program
    parts = -(-size // length)
    grid = (batch, heads, parts)
    sizes = {"start": start, "length": length}
    given = (full.index, basis, *back, full.k_new, full.k)
    sums = jax.ShapeDtypeStruct((batch, heads, parts, rows, dim), jnp.float32)
    (bands,) = nvidia.call(functools.partial(_bands, **sizes), grid, [sums])(*given)
    scores = jax.ShapeDtypeStruct((batch, heads, size), jnp.float32)
    kernel = functools.partial(_scores, **sizes)
    return nvidia.call(kernel, grid, [scores])(*given, bands.sum(axis=2))[0]


def _bands(index_ref: Any, basis_ref: Any, *refs: Any, start: int, length: int) -> None:
    """What some entries of a head give to the low-pass's components."""
    *given, out_ref = refs
    row, head, part = (pl.program_id(axis) for axis in range(3))
    rows, half = basis_ref.shape[0], given[0].shape[1]

    def add(tile: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        first = part * length + tile * TILE
        basis, inside = _basis(basis_ref, first)
        units = _units(index_ref, given, (row, head), first, start, inside)
        low, high = (s + exact_dot(basis, x) for s, x in zip(sums, units, strict=True))
        return low, high

    zeros = jnp.zeros((rows, half), jnp.float32)
    low, high = jax.lax.fori_loop(0, length // TILE, add, (zeros, zeros))
    every = pl.ds(0, rows)
    out_ref[row, head, part, every, pl.ds(0, half)] = low
    out_ref[row, head, part, every, pl.ds(half, half)] = high


def _scores(index_ref: Any, basis_ref: Any, *refs: Any, start: int, length: int) -> None:
    """-cosine of some entries of a head with their low-pass."""
    *given, bands_ref, out_ref = refs
    row, head, part = (pl.program_id(axis) for axis in range(3))
    rows, half = basis_ref.shape[0], given[0].shape[1]
    bands = [bands_ref[row, head, pl.ds(0, rows), pl.ds(first, half)] for first in (0, half)]

    def write(tile: Array, _: None) -> None:
        first = part * length + tile * TILE
        basis, inside = _basis(basis_ref, first)
        units = _units(index_ref, given, (row, head), first, start, inside)
        lows = [exact_dot(basis, band, trans_a=True) for band in bands]
        along = jnp.sum(units[0] * lows[0] + units[1] * lows[1], axis=1)
        square = jnp.sum(lows[0] * lows[0] + lows[1] * lows[1], axis=1)
        out = out_ref.at[row, head, pl.ds(first, TILE)]
        triton.store(out, -along * jax.lax.rsqrt(square + 1e-30), mask=inside)

    jax.lax.fori_loop(0, length // TILE, write, None)


def _basis(basis_ref: Any, first: Array) -> tuple[Array, Array]:
    """Columns of the low-pass from `first` on, [rows, TILE], and which of them there are."""
    rows, size = basis_ref.shape
    inside = first + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0) < size
    mask = jnp.broadcast_to(inside[None], (rows, TILE))
    return load(basis_ref.at[pl.ds(0, rows), pl.ds(first, TILE)], mask), inside


def _units(
    index_ref: Any,
    refs: Sequence[Any],
    at: tuple[Array, Array],
    first: Array,
    start: int,
    inside: Array,
) -> tuple[Array, Array]:
    """Both halves of TILE keys turned back and scaled to length 1, float32 [TILE, D/2]."""
    cos_ref, sin_ref, new_ref, cache_ref = refs
    half = cos_ref.shape[1]
    row, head = at
    cos, sin = (
        load(ref.at[pl.ds(first, TILE), pl.ds(0, half)], inside, (TILE, half))
        for ref in (cos_ref, sin_ref)
    )
    slot = start + first + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    low, high = (
        _entries(cache_ref, new_ref, (row, index_ref[0], slot, head), column, half, inside).astype(
            jnp.float32
        )
        for column in (0, half)
    )
    rate = jax.lax.rsqrt(jnp.sum(low * low + high * high, axis=1) + 1e-30)[:, None]
    low, high = turned(low, high, cos, sin)
    return low * rate, high * rate

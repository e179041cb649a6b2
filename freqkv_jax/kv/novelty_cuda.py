"""Scores of `novelty` as Triton kernels (Pallas) on NVIDIA, read where entries lie."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from freqkv_jax import nvidia
from freqkv_jax.kv.choosing_cuda import TILE, Full, entries
from freqkv_jax.nvidia import exact_dot, load, triton, turned

# About so many programs share the entries of a text that are scored, eight a processor of a Hopper.
# How many texts there are must not change in which order sums are taken.
PROGRAMS = 1056
TINY = 1e-30  # added to squared norms: a key of zeros has no direction
LEAST = 16  # rows of a low-pass that a product of Triton's takes; fewer are summed one by one
FEW_NUMBERS = 4 * 128  # of rows that are: an entry of a tile has as many sums
MOST_NUMBERS = 64 * 128  # of a low-pass's components: more were never tried on a GPU


def scores_fit(num_bands: int, head_dim: int) -> bool:
    """Whether `novelty` holds so many rows in a program's registers."""
    return _rows(num_bands, head_dim) * head_dim <= MOST_NUMBERS


def padded(basis: Float[Array, "F m"], head_dim: int) -> Float[Array, "R m"]:
    """A basis with rows of zeros behind it, as `novelty` takes it."""
    rows = _rows(len(basis), head_dim)
    return jnp.pad(basis, ((0, rows - len(basis)), (0, 0)))


def _rows(num_bands: int, head_dim: int) -> int:
    if num_bands * head_dim <= FEW_NUMBERS and num_bands < LEAST:
        return num_bands
    return max(LEAST, pl.next_power_of_2(num_bands))


def novelty(
    full: Full,
    basis: Float[Array, "R m"],
    back: tuple[Float[Array, "m half"], Float[Array, "m half"]],
    start: int,
    from_mean: bool,
) -> list[Float[Array, "B K m"]]:
    """-cos(u, low-pass of u) of the m entries from slot `start` on, as SpectralNoveltyConfig says,
    and, if asked for, -cos(u, mean of u).

    Args:
      basis: rows of the low-pass, `padded`, of which the first is constant. back: cosine and sine
        of the angles by which the keys of these slots are turned back.
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
    outs = [scores] * (1 + from_mean)
    return list(nvidia.call(kernel, grid, outs)(*given, bands.sum(axis=2)))


def squares(full: Full, start: int, size: int) -> Float[Array, "B K m"]:
    """|v|^2 of `size` entries from slot `start` on, float32."""
    parts = (x[:, full.index[0]].astype(jnp.float32) for x in (full.v, full.v_new))
    square = jnp.concatenate([jnp.sum(x * x, axis=-1) for x in parts], axis=1)
    return jnp.swapaxes(square[:, start : start + size], 1, 2)


def _bands(index_ref: Any, basis_ref: Any, *refs: Any, start: int, length: int) -> None:
    """What some entries of a head give to the low-pass's components."""
    *given, out_ref = refs
    row, head, part = (pl.program_id(axis) for axis in range(3))
    rows, half = basis_ref.shape[0], given[0].shape[1]

    def add(tile: Array, sums: list[Array]) -> list[Array]:
        first = part * length + tile * TILE
        basis, inside = _basis(basis_ref, first)
        units = _units(index_ref, given, (row, head), first, start, inside)
        if rows >= LEAST:
            return [s + exact_dot(basis[0], x) for s, x in zip(sums, units, strict=True)]
        # Sums of a thread's own numbers, added up over the entries once, behind the loop.
        each = [weight[:, None] * x for weight in basis for x in units]
        return [s + x for s, x in zip(sums, each, strict=True)]

    shapes = [(rows, half)] * 2 if rows >= LEAST else [(TILE, half)] * (2 * rows)
    zeros = [jnp.zeros(shape, jnp.float32) for shape in shapes]
    sums = jax.lax.fori_loop(0, length // TILE, add, zeros)
    for number, x in enumerate(sums):
        dims = pl.ds(number % 2 * half, half)
        if rows >= LEAST:
            out_ref[row, head, part, pl.ds(0, rows), dims] = x
        else:
            out_ref[row, head, part, jnp.int32(number // 2), dims] = jnp.sum(x, axis=0)


def _scores(index_ref: Any, basis_ref: Any, *refs: Any, start: int, length: int) -> None:
    """-cosine of some entries of a head with their low-pass, and with the mean if there is a
    second place to write to."""
    given, bands_ref, out_refs = refs[:4], refs[4], refs[5:]
    row, head, part = (pl.program_id(axis) for axis in range(3))
    rows, half = basis_ref.shape[0], given[0].shape[1]
    every = [pl.ds(0, rows)] if rows >= LEAST else [jnp.int32(r) for r in range(rows)]
    bands = [[bands_ref[row, head, r, pl.ds(first, half)] for r in every] for first in (0, half)]
    means = [bands_ref[row, head, jnp.int32(0), pl.ds(first, half)][None] for first in (0, half)]

    def write(tile: Array, _: None) -> None:
        first = part * length + tile * TILE
        basis, inside = _basis(basis_ref, first)
        units = _units(index_ref, given, (row, head), first, start, inside)
        lows = [_low_pass(basis, band, rows) for band in bands]
        for ref, others in zip(out_refs, (lows, means), strict=False):
            along = jnp.sum(units[0] * others[0] + units[1] * others[1], axis=1)
            square = jnp.sum(others[0] * others[0] + others[1] * others[1], axis=1)
            out = ref.at[row, head, pl.ds(first, TILE)]
            triton.store(out, -along * jax.lax.rsqrt(square + TINY), mask=inside)

    jax.lax.fori_loop(0, length // TILE, write, None)


def _low_pass(basis: list[Array], band: list[Array], rows: int) -> Array:
    """Of one half of TILE entries, [TILE, D/2]."""
    if rows >= LEAST:
        return exact_dot(basis[0], band[0], trans_a=True)
    each = [weight[:, None] * x[None] for weight, x in zip(basis, band, strict=True)]
    return functools.reduce(jnp.add, each)


def _basis(basis_ref: Any, first: Array) -> tuple[list[Array], Array]:
    """Columns of the low-pass from `first` on, one [rows, TILE] or, where rows are few, of each
    [TILE]; and which of them there are."""
    rows, size = basis_ref.shape
    inside = first + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0) < size
    here = pl.ds(first, TILE)
    if rows >= LEAST:
        mask = jnp.broadcast_to(inside[None], (rows, TILE))
        return [load(basis_ref.at[pl.ds(0, rows), here], mask)], inside
    return [load(basis_ref.at[jnp.int32(row), here], inside) for row in range(rows)], inside


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
        entries(cache_ref, new_ref, (row, index_ref[0], slot, head), column, half, inside).astype(
            jnp.float32
        )
        for column in (0, half)
    )
    rate = jax.lax.rsqrt(jnp.sum(low * low + high * high, axis=1) + TINY)[:, None]
    low, high = turned(low, high, cos, sin)
    return low * rate, high * rate

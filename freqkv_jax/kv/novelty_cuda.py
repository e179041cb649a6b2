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
from freqkv_jax.nvidia import exact_dot, load, places, triton, turned

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
        each = [_weighted(weights, x) for weights in basis for x in units]
        return [s + x for s, x in zip(sums, each, strict=True)]

    groups, many = _groups(rows), rows >= LEAST
    zeros = jnp.zeros((rows if many else TILE, half), jnp.float32)
    sums = jax.lax.fori_loop(0, length // TILE, add, [zeros] * (2 * len(groups)))
    for number, x in enumerate(sums):
        place = out_ref.at[row, head, part, groups[number // 2], pl.ds(number % 2 * half, half)]
        place[...] = x if many else jnp.sum(x, axis=0)


def _scores(index_ref: Any, basis_ref: Any, *refs: Any, start: int, length: int) -> None:
    """-cosine of some entries of a head with their low-pass, and with the mean if there is a
    second place to write to."""
    given, bands_ref, out_refs = refs[:4], refs[4], refs[5:]
    row, head, part = (pl.program_id(axis) for axis in range(3))
    rows, half = basis_ref.shape[0], given[0].shape[1]
    bands = [
        [bands_ref[row, head, group, pl.ds(first, half)] for group in _groups(rows)]
        for first in (0, half)
    ]
    means = [bands_ref[row, head, jnp.int32(0), pl.ds(first, half)][None] for first in (0, half)]

    def write(tile: Array, _: None) -> None:
        first = part * length + tile * TILE
        basis, inside = _basis(basis_ref, first)
        units = _units(index_ref, given, (row, head), first, start, inside)
        lows = [_low_pass(basis, band) for band in bands]
        for ref, others in zip(out_refs, (lows, means), strict=False):
            along = jnp.sum(units[0] * others[0] + units[1] * others[1], axis=1)
            square = jnp.sum(others[0] * others[0] + others[1] * others[1], axis=1)
            out = ref.at[row, head, pl.ds(first, TILE)]
            triton.store(out, -along * jax.lax.rsqrt(square + TINY), mask=inside)

    jax.lax.fori_loop(0, length // TILE, write, None)


def _groups(rows: int) -> list[Any]:
    """The rows of a low-pass that are held as one: all, or each where they are few."""
    return [pl.ds(0, rows)] if rows >= LEAST else [jnp.int32(row) for row in range(rows)]


def _basis(basis_ref: Any, first: Array) -> tuple[list[Array], Array]:
    """TILE columns of the low-pass from `first` on, of each group [rows, TILE] or, where rows are
    few, [TILE]; and which of them there are."""
    rows, size = basis_ref.shape
    inside = places(first, TILE) < size
    mask = jnp.broadcast_to(inside[None], (rows, TILE)) if rows >= LEAST else inside
    here = pl.ds(first, TILE)
    return [load(basis_ref.at[group, here], mask) for group in _groups(rows)], inside


def _weighted(weights: Array, x: Array) -> Array:
    """What a tile of x [TILE, D/2] gives to sums over all entries: [rows, D/2]; of a single row's
    weights [TILE, D/2], a thread's own numbers, to be added up over the entries once at the end."""
    return weights[:, None] * x if weights.ndim == 1 else exact_dot(weights, x)


def _low_pass(basis: list[Array], bands: list[Array]) -> Array:
    """Of one half of TILE entries, [TILE, D/2]."""
    each = [
        weights[:, None] * band[None]
        if weights.ndim == 1
        else exact_dot(weights, band, trans_a=True)
        for weights, band in zip(basis, bands, strict=True)
    ]
    return functools.reduce(jnp.add, each)


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
    slot = places(start + first, TILE)
    low, high = (
        entries(cache_ref, new_ref, (row, index_ref[0], slot, head), column, half, inside).astype(
            jnp.float32
        )
        for column in (0, half)
    )
    rate = jax.lax.rsqrt(jnp.sum(low * low + high * high, axis=1) + TINY)[:, None]
    low, high = turned(low, high, cos, sin)
    return low * rate, high * rate

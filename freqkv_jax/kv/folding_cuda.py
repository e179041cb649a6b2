"""FreqKV's rounds as Triton kernels (Pallas) on NVIDIA: the fold, and a chunk's cache written.

Between two products of the folded map a round only adds, turns and copies. XLA's kernels for that
were bound by their instructions, not by memory: 1.2 of the 3.3 ms that the rounds of a 7B layer
take at 32740 tokens on an H200 (docs/performance.md).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from freqkv_jax import nvidia
from freqkv_jax.nvidia import columns, load, triton

TILE = 32  # entries that a program holds at a time


class Stream(NamedTuple):
    """Raw keys (not rotated) and values, in order: what a full cache held, then the chunks' tokens.

    Attributes:
      k_first, v_first: [B, K, N, D], of which entry 0 of the stream is the first behind the mapped
        ones. k, v: [B, T, K, D].
    """

    k_first: Array
    v_first: Array
    k: Array
    v: Array


def fold(
    stream: Stream,
    halves: Float[Array, "2 rows 2 B K D"] | None,
    keep: int,
    cols: int,
    sink: int,
    index: Array,
    interpret: bool = False,
) -> Float[Array, "2 cols 2 B K D"]:
    """Even and odd part of round `index`'s spans: what is mapped already, and L raw entries.

    Args:
      halves: what the product gave in the round before; None: the mapped entries are L of the full
        cache, behind its `sink` sinks.
      index: int32 [1]. Raw are the L entries of the stream from L * index on.
    """
    batch, heads, _, dim = stream.k_first.shape
    shape = jax.ShapeDtypeStruct((2, cols, 2, batch, heads, dim), stream.k.dtype)
    kernel = functools.partial(_fold, keep=keep, sink=sink, is_first=halves is None)
    given = (index, *stream) if halves is None else (index, *stream, halves)
    return nvidia.call(kernel, (-(-cols // TILE), heads, batch), shape, interpret)(*given)


def _fold(index_ref: Any, *refs: Any, keep: int, sink: int, is_first: bool) -> None:
    """TILE entries of a head's even and odd part, of keys and of values."""
    *given, out_ref = refs
    head, row = pl.program_id(1), pl.program_id(2)
    cols, dim = out_ref.shape[1], out_ref.shape[5]
    here = pl.program_id(0) * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    inside, shape = here < cols, (TILE, dim)
    place = jnp.minimum(here, keep - 1)  # what stands behind the span meets zeros of the map
    start = sink + keep
    for which in range(2):
        first_ref, new_ref = given[which], given[2 + which]
        if is_first:
            low = load(
                first_ref.at[row, head, (sink + place)[:, None], columns(0, dim)], inside, shape
            )
        else:
            low = _entries(given[4], which, place, (row, head), keep, inside, (0, dim))
        at = index_ref[0] * keep + keep - 1 - place
        high = _raw(first_ref, new_ref, at, start, (row, head), inside, (0, dim))
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        mask = jnp.broadcast_to(inside[:, None], shape)
        for part, x in enumerate((low + high, low - high)):
            tile = pl.ds(pl.program_id(0) * TILE, TILE)
            # Pallas' interpreter takes no plain numbers here.
            at = (np.int32(part), tile, np.int32(which), row, head, pl.ds(0, dim))
            out = out_ref.at[at]
            triton.store(out, x.astype(out_ref.dtype), mask=mask)


def write(
    stream: Stream,
    sinks: tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]],
    halves: Float[Array, "2 rows 2 B K D"],
    turns: tuple[Float[Array, "P half"], Float[Array, "P half"]],
    keep: int,
    index: Array,
    into: tuple[Array, Array] | int,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Caches [B, C, P, K, D] with that of chunk `index` written: sinks, mapped entries, recents.

    Args:
      sinks: as they rest. turns: cosine and sine of the angles of all P slots.
      index: int32 [1].
      into: the caches, which are written in place; or C, for new ones that hold nothing else.
    """
    batch, heads, _, dim = stream.k_first.shape
    prefix = turns[0].shape[0]
    chunks = into if isinstance(into, int) else into[0].shape[1]
    shape = jax.ShapeDtypeStruct((batch, chunks, prefix, heads, dim), stream.k.dtype)
    given = [index, *stream, *sinks, halves, *turns]
    aliases = {}
    if not isinstance(into, int):
        aliases = {len(given): 0, len(given) + 1: 1}
        given += into
    return nvidia.call(
        functools.partial(_write, keep=keep),
        (-(-prefix // TILE), heads, batch),
        [shape, shape],
        interpret,
        input_output_aliases=aliases,
    )(*given)


def _write(index_ref: Any, *refs: Any, keep: int) -> None:
    """TILE slots of a head, of keys and of values."""
    streams, sink_refs, (halves_ref, cos_ref, sin_ref) = refs[:4], refs[4:6], refs[6:9]
    head, row, index = pl.program_id(1), pl.program_id(2), index_ref[0]
    prefix, half, sink = cos_ref.shape[0], cos_ref.shape[1], sink_refs[0].shape[2]
    here = pl.ds(pl.program_id(0) * TILE, TILE)
    slot = pl.program_id(0) * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0)
    inside, shape = slot < prefix, (TILE, half)
    sunk, recent = slot < sink, slot >= sink + keep
    # Entry 0 of the stream is the first behind the mapped ones; a round takes `keep` of them.
    at = (index + 1) * keep + slot - sink - keep

    def part(which: int, first: int) -> Array:
        some, where = (first, half), (row, head)
        mapped = inside & ~sunk & ~recent
        place = jnp.where(mapped, slot - sink, 0)
        x = _entries(halves_ref, which, place, where, keep, mapped, some)
        raw = inside & recent
        pair = streams[which], streams[2 + which]
        y = _raw(*pair, jnp.where(raw, at, 0), sink + keep, where, raw, some)
        return jnp.where(jnp.broadcast_to(recent[:, None], shape), y, x)

    def store(ref: Any, which: int, low: Array, high: Array) -> None:
        for first, x in ((0, low), (half, high)):
            place = jnp.where(sunk, slot, 0)[:, None]
            rest = load(
                sink_refs[which].at[row, head, place, columns(first, half)], sunk & inside, shape
            )
            x = jnp.where(jnp.broadcast_to(sunk[:, None], shape), rest, x.astype(ref.dtype))
            out = ref.at[row, index, here, head, pl.ds(first, half)]
            triton.store(out, x, mask=jnp.broadcast_to(inside[:, None], shape))

    cos, sin = (load(ref.at[here, pl.ds(0, half)], inside, shape) for ref in (cos_ref, sin_ref))
    low, high = (part(0, first).astype(jnp.float32) for first in (0, half))
    store(refs[-2], 0, low * cos - high * sin, high * cos + low * sin)
    store(refs[-1], 1, *(part(1, first) for first in (0, half)))


def _entries(
    halves_ref: Any,
    which: int,
    place: Array,
    at: tuple[Any, Any],
    keep: int,
    inside: Array,
    some: tuple[int, int],
) -> Array:
    """`folding.unfold` at some places of keys (`which` 0) or values, rounded as it rounds."""
    row, head = at
    mirrored = jnp.minimum(place, keep - 1 - place)[:, None]
    shape = (place.shape[0], some[1])
    even, odd = (
        load(halves_ref.at[part, mirrored, which, row, head, columns(*some)], inside, shape)
        for part in range(2)
    )
    even, odd = even.astype(jnp.float32), odd.astype(jnp.float32)
    front = jnp.broadcast_to((place < (keep + 1) // 2)[:, None], shape)
    return jnp.where(front, even + odd, even - odd).astype(halves_ref.dtype)


def _raw(
    first_ref: Any,
    new_ref: Any,
    place: Array,
    start: int,
    at: tuple[Any, Any],
    inside: Array,
    some: tuple[int, int],
) -> Array:
    """Entries of a stream, which begins with what a full cache held from slot `start` on."""
    row, head = at
    size, shape = first_ref.shape[2] - start, (place.shape[0], some[1])
    held = place < size
    slot = (start + jnp.where(held, place, 0))[:, None]
    old = load(first_ref.at[row, head, slot, columns(*some)], held & inside, shape)
    token = jnp.where(held, 0, place - size)[:, None]
    new = load(new_ref.at[row, token, head, columns(*some)], ~held & inside, shape)
    return jnp.where(jnp.broadcast_to(held[:, None], shape), old, new)

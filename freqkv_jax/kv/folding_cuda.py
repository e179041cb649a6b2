"""FreqKV's rounds as Triton kernels (Pallas) on NVIDIA: all of a round but its product.

Between two products of the folded map a round only adds, turns and copies: it writes a chunk's
cache out of the product's halves, and folds what is mapped with what came since for the next
product. XLA's kernels for that were bound by their instructions, not by memory: 2.0 of the 3.3 ms
that the rounds of a 7B layer took at 32740 tokens on an H100 (docs/performance_log.md).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from freqkv_jax import nvidia
from freqkv_jax.folding import product
from freqkv_jax.kv.linear import UNROLLED
from freqkv_jax.kv.policy import Slots
from freqkv_jax.nvidia import columns, load, masked, places, store, turned
from freqkv_jax.rope import Rope

TILE = 32  # entries, or pairs of entries, that a program holds at a time


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


class Sizes(NamedTuple):
    """S, L and P of a policy whose chunk has as many tokens as a round keeps of the span."""

    sink: int
    keep: int
    prefix: int


def rounds(
    memory: Slots,
    k: Array,
    v: Array,
    stacked: Array,
    sizes: Sizes,
    rope: Rope,
    more: bool = False,
) -> tuple[Array, ...]:
    """`LinearPolicy.rounds`: keys and values of all chunks' caches, and of the one behind.

    Args:
      memory: full. k: [B, C, Q, K, D], not rotated. v: the same shape. stacked: the folded map.
    """
    batch, chunks, size = k.shape[:3]
    stacked, sink = stacked.astype(k.dtype), sizes.sink
    k, v = (x.reshape(batch, chunks * size, *x.shape[3:]) for x in (k, v))
    stream = Stream(rope.rotate_slots(memory.k, inverse=True), memory.v, k, v)
    sinks = memory.k[:, :, :sink], memory.v[:, :, :sink]
    turns = rope.turns(jnp.arange(sizes.prefix, dtype=jnp.int32))

    def written(folded: Array, index: Array, into: Any, folds: bool) -> tuple[Any, Any]:
        halves = product(stacked, folded)
        cols = stacked.shape[2] if folds else None
        k, v, *folded_next = write(stream, sinks, halves, turns, sizes, index, into, cols)
        return (k, v), folded_next[0] if folds else None

    def one_round(now: tuple[Any, Any], index: Array) -> tuple[Any, None]:
        return written(now[1], index, now[0], True), None

    index = places_of(chunks)
    folded = first_fold(stream, sizes, stacked.shape[2])
    now = written(folded, index[0], chunks, chunks > 1 or more)
    if chunks > 1:
        now, _ = jax.lax.scan(one_round, now, index[1:-1], unroll=unrolled(chunks))
        now = written(now[1], index[-1], now[0], more)
    if not more:
        return now[0]
    return *now[0], *written(now[1], jnp.array([chunks, 0], jnp.int32), 1, False)[0]


def places_of(chunks: int) -> Array:
    """Of each chunk's cache, int32 [2]: chunks before it, and its place among the caches."""
    return jnp.broadcast_to(jnp.arange(chunks, dtype=jnp.int32)[:, None], (chunks, 2))


def unrolled(chunks: int) -> int:
    """Rounds of so many that are written out: a turn of a loop costs the device some 30 us of
    waiting."""
    return UNROLLED if chunks <= UNROLLED else 4


def first_fold(stream: Stream, sizes: Sizes, cols: int) -> Float[Array, "2 cols 2 B K D"]:
    """Even and odd part of the first round's spans: L entries behind the sinks of the full cache,
    and the L that follow."""
    batch, heads, _, dim = stream.k_first.shape
    shape = jax.ShapeDtypeStruct((2, cols, 2, batch, heads, dim), stream.k.dtype)
    grid = (-(-cols // TILE), heads, batch)
    return nvidia.call(functools.partial(_first_fold, sizes=sizes), grid, shape)(*stream)


def _first_fold(*refs: Any, sizes: Sizes) -> None:
    """TILE entries of a head's even and odd part, of keys and of values."""
    *given, out_ref = refs
    tile, head, row = (pl.program_id(axis) for axis in range(3))
    cols, dim = out_ref.shape[1], out_ref.shape[5]
    here = places(tile * TILE, TILE)
    inside = here < cols
    # What stands behind the span meets zeros of the map: any entry will do.
    place = jnp.minimum(here, sizes.keep - 1)
    for which in range(2):
        low, high = (
            _raw(given, which, at, sizes, (row, head), inside, (0, dim))
            for at in (place - sizes.keep, sizes.keep - 1 - place)
        )
        store_folded(out_ref, low, high, here, inside, (which, row, head), (0, dim))


def store_folded(
    ref: Any, low: Array, high: Array, place: Array, mask: Array, at: Any, some: tuple[int, int]
) -> None:
    """Writes sum and difference of entries, `some` columns of them, to [2, rows, 2, B, K, D]."""
    which, row, head = at
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    place = masked(place, mask)[:, None]
    for part, x in enumerate((low + high, low - high)):
        # Pallas' interpreter takes no plain numbers here.
        out = ref.at[np.int32(part), place, np.int32(which), row, head, columns(*some)]
        store(out, x, mask)


def write(
    stream: Stream,
    sinks: tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]],
    halves: Float[Array, "2 rows 2 B K D"],
    turns: tuple[Float[Array, "P half"], Float[Array, "P half"]],
    sizes: Sizes,
    index: Array,
    into: tuple[Array, Array] | int,
    cols: int | None,
) -> tuple[Array, ...]:
    """Caches [B, C, P, K, D] with one of them written: sinks, mapped entries, recents.

    Args:
      sinks: as they rest. halves: what the product gave. turns: cosine and sine of the angles of
        all P slots. index: of the one written (`places_of`).
      into: the caches, which are written in place; or C, for new ones that hold nothing else.
      cols: if given, the result has a third array, `first_fold` of the round that follows.
    """
    batch, heads, _, dim = stream.k_first.shape
    chunks = into if isinstance(into, int) else into[0].shape[1]
    dtype = stream.k.dtype
    shapes = [jax.ShapeDtypeStruct((batch, chunks, sizes.prefix, heads, dim), dtype)] * 2
    if cols is not None:
        shapes.append(jax.ShapeDtypeStruct((2, cols, 2, batch, heads, dim), dtype))
    given = [index, *stream, *sinks, halves, *turns]
    aliases = {}
    if not isinstance(into, int):
        aliases = {len(given): 0, len(given) + 1: 1}
        given += into
    pairs = -(-((sizes.keep + 1) // 2) // TILE)
    others = max(sizes.prefix, cols or 0) - sizes.keep
    return nvidia.call(
        functools.partial(_write, sizes=sizes, pairs=pairs, folds=cols is not None),
        (pairs + -(-others // TILE), heads, batch),
        shapes,
        input_output_aliases=aliases,
    )(*given)


def _write(index_ref: Any, *refs: Any, sizes: Sizes, pairs: int, folds: bool) -> None:
    """TILE pairs of mapped entries of a head, or TILE of its sinks and recents."""
    outs = refs[-3:] if folds else (*refs[-2:], None)
    tile = pl.program_id(0)
    at = (pl.program_id(2), pl.program_id(1))  # row, head

    @pl.when(tile < pairs)
    def _() -> None:
        _write_pairs(index_ref, refs, outs, tile * TILE, at, sizes)

    @pl.when(tile >= pairs)
    def _() -> None:
        _write_others(index_ref, refs, outs, (tile - pairs) * TILE, at, sizes)


def _write_pairs(
    index: Any, refs: Any, outs: Any, first: Array, at: tuple[Any, Any], sizes: Sizes
) -> None:
    """Entries i and L-1-i of the mapped ones, which are sum and difference of the same halves."""
    stream, halves_ref, turns = refs[:4], refs[6], refs[7:9]
    half = turns[0].shape[1]
    front = places(first, TILE)
    back = sizes.keep - 1 - front
    masks = (front < (sizes.keep + 1) // 2, front < sizes.keep // 2)
    raw = (index[0] + 1) * sizes.keep
    for which in range(2):
        entries: tuple[list[Array], list[Array]] = ([], [])
        for start in (0, half):
            even, odd = (
                load(
                    halves_ref.at[part, front[:, None], which, *at, columns(start, half)],
                    masks[0],
                    (TILE, half),
                ).astype(jnp.float32)
                for part in range(2)
            )
            for one, x in zip(entries, (even + odd, even - odd), strict=True):
                one.append(x.astype(halves_ref.dtype))
        for one, place, other, mask in zip(
            entries, (front, back), (back, front), masks, strict=True
        ):
            for start, x in zip((0, half), one, strict=True):
                if outs[2] is not None:
                    some = (start, half)
                    high = _raw(stream, which, raw + other, sizes, at, mask, some)
                    store_folded(outs[2], x, high, place, mask, (which, *at), some)
            place = place + sizes.sink
            low, high = (x.astype(jnp.float32) for x in one)
            if which == 0:
                low, high = turned_to(turns, low, high, place, mask)
            _store_entries(outs[which], low, high, index[1], place, mask, at)


def _write_others(
    index: Any, refs: Any, outs: Any, first: Array, at: tuple[Any, Any], sizes: Sizes
) -> None:
    """Sinks, as they rest, recents, and zeros behind what is folded."""
    stream, sink_refs, turns = refs[:4], refs[4:6], refs[7:9]
    half = turns[0].shape[1]
    place = places(first, TILE)
    inside, sunk = place < sizes.prefix - sizes.keep, place < sizes.sink
    slot = jnp.where(sunk, place, place + sizes.keep)
    raw = (index[0] + 1) * sizes.keep + place - sizes.sink
    for which in range(2):
        recents, sinks = [], []
        for start in (0, half):
            some = (start, half)
            recents.append(_raw(stream, which, raw, sizes, at, inside & ~sunk, some))
            here = jnp.where(sunk, place, 0)[:, None]
            ref = sink_refs[which].at[*at, here, columns(*some)]
            sinks.append(load(ref, sunk, (TILE, half)))
        low, high = (x.astype(jnp.float32) for x in recents)
        if which == 0:
            low, high = turned_to(turns, low, high, slot, inside)
        wide = jnp.broadcast_to(sunk[:, None], (TILE, half))
        low, high = (
            jnp.where(wide, sink.astype(jnp.float32), x)
            for sink, x in zip(sinks, (low, high), strict=True)
        )
        _store_entries(outs[which], low, high, index[1], slot, inside, at)
        if outs[2] is not None:
            behind = place + sizes.keep
            for start in (0, half):
                zeros = jnp.zeros((TILE, half), jnp.float32)
                mask = behind < outs[2].shape[1]
                store_folded(outs[2], zeros, zeros, behind, mask, (which, *at), (start, half))


def turned_to(
    turns: Any, low: Array, high: Array, slot: Array, mask: Array, back: bool = False
) -> tuple[Array, Array]:
    """`Rope.rotate` of both halves of keys to their slots, or back from them."""
    half = low.shape[1]
    slot = jnp.where(mask, slot, 0)[:, None]
    cos, sin = (load(ref.at[slot, columns(0, half)], mask, low.shape) for ref in turns)
    return turned(low, high, cos, -sin if back else sin)


def _store_entries(
    ref: Any, low: Array, high: Array, index: Array, slot: Array, mask: Array, at: tuple[Any, Any]
) -> None:
    row, head = at
    slot, half = masked(slot, mask)[:, None], low.shape[1]
    for start, x in ((0, low), (half, high)):
        out = ref.at[row, index, slot, head, columns(start, half)]
        store(out, x, mask)


def _raw(
    stream: Any,
    which: int,
    place: Array,
    sizes: Sizes,
    at: tuple[Any, Any],
    inside: Array,
    some: tuple[int, int],
) -> Array:
    """Keys (`which` 0) or values of the stream; places -L to -1 are the first mapped entries."""
    first_ref, new_ref = stream[which], stream[2 + which]
    row, head = at
    start = sizes.sink + sizes.keep  # of the stream in what the full cache held
    size, shape = first_ref.shape[2] - start, (place.shape[0], some[1])
    held = place < size
    slot = jnp.where(inside & held, start + place, 0)[:, None]
    old = load(first_ref.at[row, head, slot, columns(*some)], held & inside, shape)
    token = jnp.where(inside & ~held, place - size, 0)[:, None]
    new = load(new_ref.at[row, token, head, columns(*some)], ~held & inside, shape)
    return jnp.where(jnp.broadcast_to(held[:, None], shape), old, new)

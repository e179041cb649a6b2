"""The rounds of `kv.folding_cuda` transposed: gradients of all caches to those of what went in.

A round backwards is a product with the transposed map and, around it, what a round does turned
about: a cache's gradient is turned back from its slots, joined with what the round behind it sends,
and folded; what comes out of the product goes to the entries of the span.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from freqkv_jax import nvidia
from freqkv_jax.folding import product
from freqkv_jax.kv.folding_cuda import (
    TILE,
    Sizes,
    places_of,
    store_folded,
    turned_to,
    unrolled,
)
from freqkv_jax.kv.policy import Parts, Slots
from freqkv_jax.nvidia import columns, load, masked, places, store
from freqkv_jax.rope import Rope


def transposed(
    caches: tuple[Array, ...], stacked: Array, sizes: Sizes, rope: Rope, capacity: int
) -> tuple[Slots, Array, Array]:
    """`kv.folding_cuda.rounds` transposed: gradients of its memory, k and v.

    Args:
      caches: gradients of what it gives, keys and values of the chunks' caches, [B, C, P, K, D],
        and perhaps of the one behind, [B, 1, P, K, D]. capacity: slots of the memory.
    """
    batch, chunks, _, heads, dim = caches[0].shape
    keep, sink = sizes.keep, sizes.sink
    streams = _spans(caches, stacked.astype(caches[0].dtype), sizes, rope)
    given = []
    for which, stream in enumerate(streams):
        # Of the stream's tokens the last chunk's go through no round, if no cache is behind it.
        total = capacity - sink + chunks * keep
        stream = jnp.pad(stream, ((0, 0), (0, total - stream.shape[1]), (0, 0), (0, 0)))
        recents = _cut(caches[which::2], sink + keep, sizes.prefix)
        stream += _recents(recents, sizes, rope if which == 0 else None, total)
        first, tokens = stream[:, : capacity - sink], stream[:, capacity - sink :]
        if which == 0:
            first = rope.rotate_tokens(first, jnp.arange(sink, capacity, dtype=jnp.int32))
        sinks = _cut(caches[which::2], 0, sink)
        sinks = sinks.astype(jnp.float32).sum(1).astype(sinks.dtype)
        first = jnp.swapaxes(jnp.concatenate([sinks, first], axis=1), 1, 2)
        given.append((first, tokens.reshape(batch, chunks, keep, heads, dim)))
    (k_first, k), (v_first, v) = given
    return Slots(k_first, v_first), k, v


def _cut(caches: tuple[Array, ...], first: int, end: int) -> Array:
    """Entries first .. end of all caches."""
    return jnp.concatenate([cache[:, :, first:end] for cache in caches], axis=1)


def _recents(recents: Array, sizes: Sizes, rope: Rope | None, total: int) -> Array:
    """What the raw entries of the caches give to a stream [B, total, K, D]; 0 if there are none."""
    keep, given = sizes.keep, jnp.zeros((), recents.dtype)
    if rope is not None:
        slots = jnp.arange(sizes.sink + keep, sizes.prefix, dtype=jnp.int32)
        recents = rope.rotate(recents, rope.angles(slots)[None, None, :, None], inverse=True)
    # Of caches that follow one another those of more than L are partly the same entries.
    for piece in range(-(-recents.shape[2] // keep)):
        some = recents[:, :, piece * keep : (piece + 1) * keep]
        some = jnp.pad(some, ((0, 0), (0, 0), (0, keep - some.shape[2]), (0, 0), (0, 0)))
        some = some.reshape(recents.shape[0], -1, *recents.shape[3:])
        first = (piece + 2) * keep
        behind = total - first - some.shape[1]  # below 0 where the last piece's padding goes
        given += jax.lax.pad(
            some, jnp.zeros((), some.dtype), [(0, 0, 0), (first, behind, 0), (0, 0, 0), (0, 0, 0)]
        )
    return given


def _spans(caches: tuple[Array, ...], stacked: Array, sizes: Sizes, rope: Rope) -> Parts:
    """What the spans of all rounds give to the stream, [B, (rounds + 1) L, K, D] of keys and of
    values; the first L are the mapped entries that the full cache held."""
    chunks, more = caches[0].shape[1], len(caches) > 2
    back = jnp.swapaxes(stacked, 1, 2)
    turns = rope.turns(jnp.arange(sizes.prefix, dtype=jnp.int32))
    length = (chunks + more + 1) * sizes.keep
    step = functools.partial(
        _step, caches=caches[:2], turns=turns, sizes=sizes, rows=stacked.shape[1], length=length
    )

    def one_round(now: tuple[Any, Array], index: Array) -> tuple[Any, None]:
        *into, halves = step(index, product(back, now[1]), now[0])
        return (tuple(into), halves), None

    index, into = places_of(chunks), None
    if more:
        (halves,) = step(jnp.array([chunks, 0], jnp.int32), None, None, caches=caches[2:])
        left = index
    else:
        (halves,) = step(index[-1], None, None)
        left = index[:-1]
    if len(left):
        *into, halves = step(left[-1], product(back, halves), None)
        now, left = (tuple(into), halves), left[:-1][::-1]
        (into, halves), _ = jax.lax.scan(one_round, now, left, unroll=unrolled(chunks + more))
    k, v = step(index[0] - 1, product(back, halves), into, last=True)
    return k, v


def _step(
    index: Array,
    folded: Array | None,
    into: Parts | None,
    *,
    caches: tuple[Array, ...],
    turns: Parts,
    sizes: Sizes,
    rows: int,
    length: int,
    last: bool = False,
) -> tuple[Array, ...]:
    """Between two products, backwards, at one of the caches (`places_of`).

    Args:
      folded: gradients of even and odd part of the spans of the round behind this cache,
        [2, cols, 2, B, K, D]; none behind the last cache. into: `_spans`' result, in which the
        raw half of those spans is written; new arrays if not given.
      length: of the stream.
      last: whether the entries of the other half are given back as the stream's first ones, in
        front of all caches.

    Returns:
      `_spans`' result, if `folded` is given, and, but for the last step, the gradients of the
      halves of this cache's entries, [2, rows, 2, B, K, D].
    """
    batch, _, _, heads, dim = caches[0].shape
    dtype = caches[0].dtype
    given, shapes, aliases = [index, *turns], [], {}
    if not last:
        given += caches
    if folded is not None:
        given.append(folded)
        stream = jax.ShapeDtypeStruct((batch, length, heads, dim), dtype)
        shapes += [stream, stream]
        if into is not None:
            aliases = {len(given): 0, len(given) + 1: 1}
            given += into
    if not last:
        shapes.append(jax.ShapeDtypeStruct((2, rows, 2, batch, heads, dim), dtype))
    forms = {"folds": not last, "spans": folded is not None, "aliased": into is not None}
    return nvidia.call(
        functools.partial(_kernel, sizes=sizes, **forms),
        (-(-rows // TILE), heads, batch),
        shapes,
        input_output_aliases=aliases,
    )(*given)


def _kernel(
    index_ref: Any, *refs: Any, sizes: Sizes, folds: bool, spans: bool, aliased: bool
) -> None:
    """TILE pairs of a head's entries: i and L-1-i."""
    turns, refs = refs[:2], refs[2:]
    cache_refs, refs = (refs[:2], refs[2:]) if folds else ((), refs)
    folded_ref, refs = (refs[0], refs[1:]) if spans else (None, refs)
    outs = refs[2:] if aliased else refs
    at = (pl.program_id(2), pl.program_id(1))  # row, head
    half = turns[0].shape[1]
    front = places(pl.program_id(0) * TILE, TILE)
    back = sizes.keep - 1 - front
    # An odd L has an entry in the middle, which is its own other one.
    masks = (front < (sizes.keep + 1) // 2, front < sizes.keep // 2)
    for which in range(2):
        sides = []
        for place, mask in zip((front, back), masks, strict=True):
            planes = [jnp.zeros((TILE, half), jnp.float32)] * 2
            if folds:
                planes = _from_slots(cache_refs, turns, which, index_ref[1], place, mask, at, sizes)
            if spans:
                low, high = _from_span(folded_ref, which, place, mask, at, half)
                planes = [x + y for x, y in zip(planes, low, strict=True)]
                raw = (index_ref[0] + 3) * sizes.keep - 1 - place
                _put(outs[which], high, raw, mask, at)
                if not folds:
                    _put(outs[which], planes, place, mask, at)
            sides.append(planes)
        if folds:
            inside = front < outs[-1].shape[1]
            for start, low, high in zip((0, half), *sides, strict=True):
                store_folded(outs[-1], low, high, front, inside, (which, *at), (start, half))


def _from_slots(
    refs: Any,
    turns: Any,
    which: int,
    index: Array,
    place: Array,
    mask: Array,
    at: Any,
    sizes: Sizes,
) -> list[Array]:
    """Both halves of the gradients of a cache's mapped entries: keys (`which` 0), turned back from
    their slots, or values."""
    row, head = at
    half = turns[0].shape[1]
    slot = place + sizes.sink
    there = jnp.where(mask, slot, 0)[:, None]
    low, high = (
        load(refs[which].at[row, index, there, head, columns(start, half)], mask, (TILE, half))
        for start in (0, half)
    )
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    return list(turned_to(turns, low, high, slot, mask, back=True)) if which == 0 else [low, high]


def _from_span(
    ref: Any, which: int, place: Array, mask: Array, at: Any, half: int
) -> tuple[list[Array], list[Array]]:
    """Both halves of what entry `place` of a span's first half gets, and its mirrored one."""
    slot = jnp.where(mask, place, 0)[:, None]
    lows, highs = [], []
    for start in (0, half):
        even, odd = (
            load(
                ref.at[np.int32(part), slot, np.int32(which), *at, columns(start, half)],
                mask,
                (TILE, half),
            ).astype(jnp.float32)
            for part in range(2)
        )
        lows.append(even + odd)
        highs.append(even - odd)
    return lows, highs


def _put(ref: Any, planes: list[Array], place: Array, mask: Array, at: Any) -> None:
    row, head = at
    half = planes[0].shape[1]
    for start, x in zip((0, half), planes, strict=True):
        store(ref.at[row, masked(place, mask)[:, None], head, columns(start, half)], x, mask)

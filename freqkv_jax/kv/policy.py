"""The seam between the model and its cache: what a policy is, and the registry of policies."""

import dataclasses
import difflib
import numbers
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freqkv_jax.config import LlamaConfig
from freqkv_jax.rope import Rope

Memory = Any  # one layer's memory: a pytree that only its policy looks into; leaves are [B, K, ...]
Maps = dict[str, Array]
Parts = tuple[Array, Array]  # of keys and of values

SomePolicy = TypeVar("SomePolicy", bound="KVPolicy")

POLICIES: dict[str, type["KVPolicy"]] = {}  # filled at import, read-only after


def register(cls: type[SomePolicy]) -> type[SomePolicy]:
    """Class decorator: makes a policy known to the command line, files, tests and tables."""
    POLICIES[cls.name] = cls
    return cls


class Slots(NamedTuple):
    """The usual memory: keys (rotated) and values, each [B, K, slots, D]."""

    k: Array
    v: Array


class ChunkCaches(NamedTuple):
    """What attention reads before each of C chunks, and the memory in which every row ends.

    The first P slots of the chunks' caches: behind them stand the chunk's own tokens, as they are.
    """

    k: Array  # [B, C, P, K, D], rotated
    v: Array  # [B, C, P, K, D]
    memory: Memory


@dataclass(frozen=True)
class KVPolicy:
    """A cache of at most N entries: pure functions on one layer's memory, and static sizes.

    A subclass is a frozen dataclass (hashable, compared by value) that gives `capacity` and
    `prefix` and `make_room`; the other methods have defaults for policies that hold keys and
    values in slots. All of it runs inside jit: no Python branch on values. Every leaf of a memory
    is [B, K, ...], so that rows can be chosen, and the batch and the heads sharded, from outside.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for the table of policies
    keeps: ClassVar[str]
    source: ClassVar[str]
    # What the model must compute for `append` beside k and v: () or ("queries",).
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def capacity(self) -> int | None:
        """N: entries that the memory holds at most; None if it grows without bound."""
        raise TypeError(f"{type(self).__name__} must define capacity")

    @property
    def prefix(self) -> int:
        """P: entries left when room has been made."""
        raise TypeError(f"{type(self).__name__} must define prefix")

    @property
    def chunk(self) -> int:
        """Q = N - P: tokens that are read between two rounds of making room."""
        assert self.capacity is not None
        return self.capacity - self.prefix

    def check_dtype(self, dtype: str) -> None:
        """ValueError where a cache of this dtype would wear its keys out: unless N/Q * eps <= 1.

        A round turns keys to their new slots and rounds them. An entry moves by N slots at most, in
        some N/Q rounds: of as many small turns each may be rounded off, up to N/Q * eps/2 radians
        in all. At N/Q = 2048 in bfloat16 perplexity was 29.8 for 22.5 (docs/method.md).
        """
        if self.capacity is None:
            return
        most = int(1 / jnp.finfo(dtype).eps)
        if self.capacity > most * self.chunk:
            raise ValueError(
                f"rounds of {self.chunk} of {self.capacity} entries turn and round a key up to"
                f" {-(-self.capacity // self.chunk)} times, of which {dtype} allows {most}: free"
                f" at least {-(-self.capacity // most)} entries a round (chunk, or a lower"
                " retain_ratio), or use float32"
            )

    def num_compressions(self, seen: int) -> int:
        """Rounds of making room that a row has gone through after reading `seen` tokens."""
        if self.capacity is None or seen <= self.capacity:
            return 0
        return -(-(seen - self.capacity) // self.chunk)

    def fill_after(self, seen: int) -> int:
        """Slots that a row fills after reading `seen` tokens from an empty cache."""
        rounds = self.num_compressions(seen)
        return seen - rounds * self.chunk if rounds else seen

    def kv_bytes(self, config: LlamaConfig, dtype: str, seen: int | None = None) -> int:
        """Bytes of the whole cache of one text; for an unbounded policy, after `seen` tokens."""
        slots = self.capacity if self.capacity is not None else seen
        if slots is None:
            raise ValueError(f"policy {self.name!r} has no fixed size: say for how many tokens")
        heads, size = config.num_kv_heads, config.head_dim
        memory = jax.eval_shape(lambda: self.init(1, heads, size, jnp.dtype(dtype), slots))
        leaves = jax.tree.leaves(memory)
        return config.num_layers * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def constants(self) -> dict[str, np.ndarray]:
        """Arrays that `make_room` needs, handed to it as `maps` (no literals in a program)."""
        return {}

    def init(
        self, batch: int, kv_heads: int, head_dim: int, dtype: Any, slots: int | None = None
    ) -> Memory:
        """An empty memory; `slots` is for unbounded policies only."""
        size = self.capacity if self.capacity is not None else slots
        assert size is not None
        shape = (batch, kv_heads, size, head_dim)
        return Slots(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def append(
        self,
        memory: Memory,
        k: Array,
        v: Array,
        fill: int | Array,
        count: Array | None = None,
        queries: Array | None = None,
    ) -> Memory:
        """Stores T new tokens.

        Args:
          memory: of B rows.
          k: [B, T, K, D] keys, rotated at `position`. v: [B, T, K, D].
          fill: first free slot: an int, a scalar array, or one a row [B].
          count: how many of the T tokens each row takes [B]; None takes all. A row with count 0
            keeps its memory as it is.
          queries: [B, T, H, D] rotated, if `needs` asks for them.
        """
        del queries
        return Slots(
            write_slots(memory.k, k, fill, count),
            write_slots(memory.v, v, fill, count),
        )

    def view(self, memory: Memory) -> tuple[Array, Array]:
        """Keys (rotated) and values as attention reads them, [B, K, slots, D] each."""
        return memory.k, memory.v

    def position(self, seen: Array, fill: Array) -> Array:
        """Position at which a new token is rotated: its slot, unless a policy keeps true ones."""
        del seen
        return fill

    def make_room(self, memory: Memory, rope: Rope, maps: Maps) -> Memory:
        """Shrinks full memories (fill = N) to their first P slots. All rows; the caller masks."""
        raise TypeError(f"{type(self).__name__} must define make_room")

    def chunk_caches(
        self,
        memory: Memory,
        k: Array,
        v: Array,
        counts: Array | None,
        rope: Rope,
        maps: Maps,
        seen: Array,
        queries: Array | None = None,
    ) -> ChunkCaches:
        """What the caches of C chunks hold before these, at once: it depends on k, v (and queries)
        alone.

        This default repeats make_room and append, one chunk after the other; it defines what a
        faster override must give.

        Args:
          memory: full (fill = N) in every row that takes tokens.
          k: [B, C, Q, K, D], not rotated. v: the same shape.
          counts: [B], tokens of the C*Q that each row takes; None for all.
          seen: [B], tokens read before the first chunk.
          queries: [B, C, Q, H, D], not rotated, if `needs` asks for them.
        """
        batch, chunks, length = k.shape[:3]
        if counts is None:
            counts = jnp.full((batch,), chunks * length, jnp.int32)
        offsets = jnp.arange(length, dtype=jnp.int32)

        def one_chunk(carry: tuple[Memory, Memory], xs: Any) -> tuple[Any, Any]:
            now, end = carry
            index, k_new, v_new, q_new = xs
            read = seen[:, None] + index * length + offsets[None]
            at = jnp.broadcast_to(self.prefix + offsets[None], read.shape)
            position = self.position(read, at)
            left = jnp.clip(counts - index * length, 0, length)
            rotated = None if q_new is None else rope.rotate_tokens(q_new, position)
            k_new = rope.rotate_tokens(k_new, position)
            now = self.make_room(now, rope, maps)
            views = [view[:, :, : self.prefix] for view in self.view(now)]
            now = self.append(now, k_new, v_new, self.prefix, left, rotated)
            end = choose_rows(left > 0, now, end)
            return (now, end), tuple(views)

        xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (k, v, queries))
        steps = (jnp.arange(chunks, dtype=jnp.int32), *xs)
        (_, end), views = jax.lax.scan(one_chunk, (memory, memory), steps)
        k_all, v_all = (jnp.transpose(x, (1, 0, 3, 2, 4)) for x in views)
        return ChunkCaches(k_all, v_all, end)

    def caches_and_next(
        self,
        memory: Memory,
        k: Array,
        v: Array,
        rope: Rope,
        maps: Maps,
        seen: Array,
        queries: Array | None = None,
    ) -> tuple[Parts | None, Parts]:
        """`chunk_caches` of C chunks, None where C is 0, and what the cache holds behind them,
        [B, 1, P, K, D]: all that a part of a chunk needs, which hangs on no token of its own."""
        caches, chunks = None, k.shape[1]
        if chunks:
            k_all, v_all, memory = self.chunk_caches(memory, k, v, None, rope, maps, seen, queries)
            caches = (k_all, v_all)

        def blank(x: Array) -> Array:
            return jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype)

        seen = seen + chunks * self.chunk
        none = None if queries is None else blank(queries)
        ahead = self.chunk_caches(memory, blank(k), blank(v), None, rope, maps, seen, none)
        return caches, ahead[:2]


def choose_rows(mask: Array, new: Memory, old: Memory) -> Memory:
    """`new` in the rows where mask [B] holds, `old` in the others."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(mask.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def memory_after(
    memory: Slots,
    caches: Parts,
    tokens: Parts,
    counts: Array | None,
) -> Slots:
    """The memory in which each row ends, out of what stood before each chunk and its tokens.

    Args:
      memory: of before; it stays where a row takes no token.
      caches: keys and values [B, C, P, K, D]. tokens: [B, C, Q, K, D], keys rotated.
      counts: [B], tokens that each row takes; None for all. Slots behind a row's fill mean nothing.
    """
    size = tokens[0].shape[2]
    every = (*caches, *tokens)
    if counts is None:
        ended = [x[:, -1] for x in every]
    else:
        last = jnp.maximum((counts + size - 1) // size - 1, 0)[:, None, None, None, None]
        ended = [jnp.take_along_axis(x, last, axis=1)[:, 0] for x in every]
    k, v = (jnp.swapaxes(jnp.concatenate(x, axis=1), 1, 2) for x in (ended[::2], ended[1::2]))
    return Slots(k, v) if counts is None else choose_rows(counts > 0, Slots(k, v), memory)


def write_slots(slots: Array, new: Array, fill: int | Array, count: Array | None = None) -> Array:
    """slots [B, K, N, D] with new [B, T, K, D] written from slot `fill` on (see KVPolicy.append).

    What would lie behind the last slot is dropped, but a row that takes tokens must have room for
    the first. A row with count 0 is left untouched, even a full one: a plain dynamic_update_slice
    would clamp to the last slot and overwrite it.
    """
    new = jnp.swapaxes(new, 1, 2).astype(slots.dtype)
    if isinstance(fill, int):
        new = new[:, :, : slots.shape[2] - fill]
        if count is not None:
            old = slots[:, :, fill : fill + new.shape[2]]
            new = jnp.where((count > 0)[:, None, None, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(slots, new, fill, axis=2)
    if new.shape[2] == 1 and fill.ndim == 0:
        return _write_token(slots, new, fill, None if count is None else (count > 0), axis=2)
    if new.shape[2] == 1:
        taken = jnp.ones(fill.shape, bool) if count is None else count > 0
        return jax.vmap(lambda s, x, f, t: _write_token(s, x, f, t, axis=1))(
            slots, new, fill, taken
        )
    fill = jnp.broadcast_to(fill, slots.shape[:1])
    offset = jnp.arange(slots.shape[2], dtype=jnp.int32)[None] - fill[:, None]
    limit = new.shape[2] if count is None else count[:, None]
    inside = ((offset >= 0) & (offset < limit))[:, None, :, None]
    source = jnp.clip(offset, 0, new.shape[2] - 1)[:, None, :, None]
    return jnp.where(inside, jnp.take_along_axis(new, source, axis=2), slots)


def write_places(
    place: Array, read: Array, length: int, fill: int | Array, count: Array | None
) -> tuple[Array, Array]:
    """Beside `write_slots`: the places in the text of each slot's entry, and tokens read.

    place: int32 [B, K, N]. read: int32 [B, K], before these `length` tokens.
    """
    new = read[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :, None]
    place = write_slots(place[..., None], new[..., None], fill, count)[..., 0]
    return place, read + (jnp.int32(length) if count is None else count.astype(jnp.int32)[:, None])


def _write_token(slots: Array, new: Array, fill: Array, taken: Array | None, axis: int) -> Array:
    if taken is not None:
        old = jax.lax.dynamic_slice_in_dim(slots, fill, 1, axis=axis)
        new = jnp.where(taken.reshape(taken.shape + (1,) * (new.ndim - taken.ndim)), new, old)
    return jax.lax.dynamic_update_slice_in_dim(slots, new, fill, axis=axis)


def whole_number(field: str, value: Any, low: int) -> int:
    """`value` as an int; ValueError, naming the field, unless it is a whole number >= low."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool) or whole < low:
        raise ValueError(f"{field} must be a whole number >= {low}, got {value!r}")
    return whole


def real_number(
    field: str, value: Any, fits: Callable[[float], bool], allowed: str, meaning: str
) -> float:
    """`value` as a float; ValueError unless it is a number (true and false are none) that fits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits(float(value)):
        raise ValueError(f"{field} must be {allowed}, got {value!r}; it is {meaning}")
    return float(value)


def policy_to_dict(kv: KVPolicy) -> dict[str, Any]:
    """A policy as plain data: {"policy": name, field: value, ...}."""
    return {"policy": kv.name} | dataclasses.asdict(kv)


def policy_from_dict(data: dict[str, Any]) -> KVPolicy:
    """The inverse of `policy_to_dict`; ValueError on an unknown name, field or a bad value."""
    data = dict(data)
    cls = _policy_class(data.pop("policy", None))
    allowed = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in allowed:
            raise ValueError(
                f"policy {cls.name!r} has no field {key!r}; allowed: {', '.join(allowed)}"
                + _nearest(key, allowed)
            )
    return cls(**data)


def policy_from_args(name: str, **sizes: Any) -> KVPolicy:
    """A policy by name from a common set of arguments: it takes those that it has fields for."""
    cls = _policy_class(name)
    fields = {f.name for f in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in sizes.items() if key in fields})


def _policy_class(name: Any) -> type[KVPolicy]:
    if name not in POLICIES:
        raise ValueError(
            f"no policy is named {name!r}; allowed: {', '.join(sorted(POLICIES))}"
            + _nearest(name, POLICIES)
        )
    return POLICIES[name]


def _nearest(given: Any, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(given), allowed, 1)
    return f"; did you mean {near[0]!r}?" if near else ""

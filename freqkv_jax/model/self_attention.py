"""Self-attention through a cache policy, as the decoder's layers call it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import KVPolicy
from freqkv_jax.kv.policy import Maps, Memory, Parts
from freqkv_jax.model import cudnn
from freqkv_jax.model.attention import attend, attend_behind, attend_cache
from freqkv_jax.model.flash_decode import attend_rows
from freqkv_jax.model.layers import ROWS, Linear
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import BATCH_AXES, HEADS_SPEC, axis_size, constrain

# Caches of a layer's chunks, on a device, that are held at once; 112 chunks of 256 tokens behind
# 4096 slots of the 7B shape would be 7 GB.
CACHE_BYTES = 1 << 31


class Attention(nn.Module):
    """Self-attention through a cache policy, in its three calls."""

    config: LlamaConfig
    kv: KVPolicy
    dtype: str
    backend: str

    def setup(self) -> None:
        c = self.config
        self.q = Linear(c.num_heads * c.head_dim, self.dtype)
        self.k = Linear(c.num_kv_heads * c.head_dim, self.dtype)
        self.v = Linear(c.num_kv_heads * c.head_dim, self.dtype)
        self.qkv = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, self.dtype)  # fused
        self.o = Linear(c.hidden_size, self.dtype, ROWS)

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        def split(y: Array) -> Array:
            heads = y.reshape(*y.shape[:-1], -1, self.config.head_dim)
            return constrain(heads, HEADS_SPEC)

        if self.has_variable("params", "qkv"):
            heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
            q, k, v = jnp.split(split(self.qkv(x)), [heads, heads + kv_heads], axis=-2)
            return q, k, v
        return split(self.q(x)), split(self.k(x)), split(self.v(x))

    def _merge(self, x: Array, rows: int | None = None) -> Array:
        x = x.reshape(*x.shape[:-2], -1)
        more = 0 if rows is None else rows - x.shape[1]
        return self.o(jnp.pad(x, ((0, 0), (0, more), (0, 0))) if more else x)

    def __call__(self, x: Array, rope: Rope, maps: Maps, length: int) -> Array:
        """Parallel form on a whole text, from an empty cache: [B, T, E] to [B, T, E], of which
        `length` tokens are the text."""
        capacity = self.kv.capacity
        head = length if capacity is None else min(length, capacity)
        sizes = (head, length - head, x.shape[1] - length)
        (q, k, v), behind, _ = _split(self._project(x), sizes)
        at = jnp.arange(head, dtype=jnp.int32)
        at = self.kv.position(at, at)
        q_head, k_head = (rope.rotate_tokens(y, at) for y in (q, k))
        out = attend(q_head, k_head, v, self.backend)
        if head == length:
            return self._merge(out, x.shape[1])
        memory = self.kv.init(x.shape[0], k.shape[2], k.shape[3], k.dtype)
        queries = q_head if "queries" in self.kv.needs else None
        memory = self.kv.append(memory, k_head, v, 0, queries=queries)
        seen = jnp.full((x.shape[0],), head, jnp.int32)
        q, k, v = behind
        rest, _ = self._chunks(q, k, v, memory, seen, None, rope, maps)
        return self._merge(jnp.concatenate([out, rest], axis=1), x.shape[1])

    def block(
        self,
        x: Array,
        memory: Memory,
        seen: Array,
        counts: Array,
        rope: Rope,
        maps: Maps,
        length: int,
    ) -> tuple[Array, Memory]:
        """Parallel form on whole chunks, the first `length` tokens, behind full memories; rows
        take `counts` of them."""
        q, k, v = (y[:, :length] for y in self._project(x))
        out, memory = self._chunks(q, k, v, memory, seen, counts, rope, maps)
        return self._merge(out, x.shape[1]), memory

    def _chunks(
        self,
        q: Array,
        k: Array,
        v: Array,
        memory: Memory,
        seen: Array,
        counts: Array | None,
        rope: Rope,
        maps: Maps,
    ) -> tuple[Array, Memory]:
        """Tokens [B, T, ., D] behind full memories: whole chunks, in groups, and what is left,
        behind which there is no memory: it costs by its length."""
        size, total = self.kv.chunk, q.shape[1]
        full = total // size * size
        each = _part(full // size, self._at_once(k)) * size  # tokens of a group, but the last
        looped = full // each * each if each < full else 0

        def some(memory: Memory, start: int | Array, q: Array, k: Array, v: Array) -> Any:
            if q.shape[1] % size:
                return self._last_chunks(q, k, v, memory, seen + start, rope, maps), None
            some = None if counts is None else jnp.clip(counts - start, 0, q.shape[1])
            return self._some_chunks(q, k, v, memory, seen + start, some, rope, maps)

        outs = []
        loop, rest = _split((q, k, v), (looped, total - looped))
        if looped:
            out, memory = _one_by_one(some, memory, each, *loop)
            outs.append(out)
            some = jax.checkpoint(some, policy=cudnn.keeps)
        if total > looped:
            out, memory = some(memory, looped, *rest)
            outs.append(out)
        return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0], memory

    def _at_once(self, k: Array) -> int:
        """Chunks whose caches are held at once: of short ones these are many times their tokens."""
        kv = self.kv
        rows = -(-k.shape[0] // math.prod(map(axis_size, BATCH_AXES)))
        heads = -(-k.shape[2] // axis_size("tensor"))
        each = 2 * rows * heads * k.shape[3] * kv.prefix * k.dtype.itemsize
        return k.shape[1] if kv.prefix <= 2 * kv.chunk else max(1, CACHE_BYTES // each)

    def _some_chunks(
        self,
        q: Array,
        k: Array,
        v: Array,
        memory: Memory,
        seen: Array,
        counts: Array | None,
        rope: Rope,
        maps: Maps,
    ) -> tuple[Array, Memory]:
        """`_chunks` of whole chunks."""
        q, k, v = (_cut(x, self.kv.chunk) for x in (q, k, v))
        queries = q if "queries" in self.kv.needs else None
        caches = self.kv.chunk_caches(memory, k, v, counts, rope, maps, seen, queries)
        return self._behind((q, k, v), caches[:2], seen, rope), caches.memory

    def _last_chunks(
        self, q: Array, k: Array, v: Array, memory: Memory, seen: Array, rope: Rope, maps: Maps
    ) -> Array:
        """Whole chunks, or none, and less than one."""
        size = self.kv.chunk
        whole = q.shape[1] // size * size
        chunks, left = _split((q, k, v), (whole, q.shape[1] - whole))
        q, k, v = (_cut(x, size) for x in chunks)
        queries = q if "queries" in self.kv.needs else None
        caches, ahead = self.kv.caches_and_next(memory, k, v, rope, maps, seen, queries)
        out = self._behind([x[:, None] for x in left], ahead, seen + whole, rope)
        if caches is None:
            return out
        return jnp.concatenate([self._behind((q, k, v), caches, seen, rope), out], axis=1)

    def _behind(self, tokens: Sequence[Array], caches: Parts, seen: Array, rope: Rope) -> Array:
        """Tokens [B, C, T, ., D], T of each chunk, behind the chunks' caches: [B, C T, H, D]."""
        batch, chunks, length = tokens[0].shape[:3]
        offsets = jnp.arange(length, dtype=jnp.int32)
        steps = jnp.arange(chunks, dtype=jnp.int32)[:, None] * self.kv.chunk + offsets[None]
        at = self.kv.position(seen[:, None, None] + steps[None], self.kv.prefix + offsets)
        q, k = (rope.rotate_tokens(x, at) for x in tokens[:2])
        q, k, v, k_old, v_old = (
            constrain(x.reshape(batch * chunks, *x.shape[2:]), HEADS_SPEC)
            for x in (q, k, tokens[2], *caches)
        )
        out = attend_behind(q, (k_old, v_old), (k, v), self.backend)
        return out.reshape(batch, chunks * length, *out.shape[2:])

    def extend(
        self,
        x: Array,
        memory: Memory,
        seen: Array,
        fill: int | Array,
        counts: Array | None,
        rope: Rope,
    ) -> tuple[Array, Memory]:
        """Streaming form: T tokens that find room behind `fill` (int, scalar or [B])."""
        q, k, v = self._project(x)
        offsets = jnp.arange(x.shape[1], dtype=jnp.int32)
        slot = jnp.asarray(fill, jnp.int32)
        at = self.kv.position(seen[:, None] + offsets[None], slot[..., None] + _like(offsets, slot))
        q, k = rope.rotate_tokens(q, at), rope.rotate_tokens(k, at)
        queries = q if "queries" in self.kv.needs else None
        memory = self.kv.append(memory, k, v, fill, counts, queries)
        k_all, v_all = self.kv.view(memory)
        if isinstance(fill, int):
            end = fill + x.shape[1]
            k_all, v_all = (jnp.swapaxes(y[:, :, :end], 1, 2) for y in (k_all, v_all))
            return self._merge(attend(q, k_all, v_all, self.backend)), memory
        if x.shape[1] == 1:
            return self._merge(attend_rows(q, k_all, v_all, slot, q.shape[2])), memory
        return self._merge(attend_cache(q, k_all, v_all, fill)), memory


def _split(arrays: Sequence[Array], sizes: Sequence[int]) -> list[tuple[Array, ...]]:
    """Parts of so many tokens, each of all arrays [B, T, ...]. Backwards the gradients of parts are
    joined; those of slices would be padded and added, which XLA makes one slow kernel of."""
    return list(zip(*(jax.lax.split(x, sizes, axis=1) for x in arrays), strict=True))


def _cut(x: Array, size: int) -> Array:
    """[B, C Q, ...] in chunks, [B, C, Q, ...]."""
    return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])


def _part(chunks: int, most: int) -> int:
    """Chunks of a group, `most` or fewer: a divisor of all of them, if a large one is."""
    if chunks <= most:
        return max(chunks, 1)
    even = (size for size in range(most, most // 2, -1) if chunks % size == 0)
    return next(even, -(-chunks // -(-chunks // most)))


def _one_by_one(some: Any, memory: Memory, length: int, *tokens: Array) -> tuple[Array, Memory]:
    """`some` on so many of the tokens [B, T, ...] after the other, each behind the memory before.

    Without the checkpoint the backward pass would keep the caches of every group; with it, what
    attention gives.
    """
    groups = tokens[0].shape[1] // length

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], groups, length, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, policy=cudnn.keeps, prevent_cse=False)
    def one(memory: Memory, xs: Any) -> tuple[Memory, Array]:
        start, *tokens = xs
        out, memory = some(memory, start, *tokens)
        return memory, out

    starts = jnp.arange(groups, dtype=jnp.int32) * length
    memory, out = jax.lax.scan(one, memory, (starts, *map(split, tokens)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], groups * length, *out.shape[3:]), memory


def _like(offsets: Array, slot: Array) -> Array:
    return offsets.reshape((1,) * slot.ndim + (-1,))

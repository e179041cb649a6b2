"""Policies that choose by attention: against slow loops, in ragged calls, on a mesh, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import sharding
from freqkv_jax.config import RopeConfig
from freqkv_jax.hlo import Program
from freqkv_jax.kv import H2OConfig, SnapKVConfig, scored
from freqkv_jax.rope import Rope
from tests.tolerances import COMPRESS, assert_close

ROPE = Rope(RopeConfig(1e4), 8)
N, HEADS, KV_HEADS = 20, 6, 2
H2O = H2OConfig(N, 2, 5, 6)
SNAPKV = SnapKVConfig(N, 2, 4, 6, window=4, pool_size=5)  # the pool reaches into the window
BOTH = [H2O, SNAPKV]


def every(policies):
    return pytest.mark.parametrize("kv", policies, ids=str)


def text(batch=2, length=45, seed=0):
    """Queries, keys (not rotated) and values; a value is the number of its token."""
    rng = np.random.default_rng(seed)
    q = 2 * rng.normal(size=(batch, length, HEADS, 8))
    k = rng.normal(size=(batch, length, KV_HEADS, 8))
    v = np.broadcast_to(np.arange(length)[None, :, None, None], k.shape)
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


@jax.jit(static_argnums=0)
def step(kv, memory, q, k, v, fill, count=None):
    """Tokens [B, T] behind `fill`, a number or one a row."""
    at = jnp.reshape(fill, (-1, 1)) + jnp.arange(q.shape[1])[None]
    q, k = (ROPE.rotate_tokens(x, at) for x in (q, k))
    return kv.append(memory, k, v, fill, count, q)


@jax.jit(static_argnums=0)
def room(kv, memory):
    return kv.make_room(memory, ROPE, {})


def turned(x, slot):
    """x [8] at a slot, in float64."""
    angle = slot / 1e4 ** (np.arange(4) / 4)
    a, b = x[:4], x[4:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def attention(queries, keys, slot):
    """Mean over query heads [G, 8] of their attention to keys [slot + 1, 8], by the definition."""
    rows = []
    for q in queries:
        logits = [turned(q, slot) @ turned(k, j) / 8**0.5 for j, k in enumerate(keys)]
        weights = np.exp(np.array(logits) - max(logits))
        rows.append(weights / weights.sum())
    return np.mean(rows, axis=0)


def slow_votes(kv, score):
    """What SnapKV compares: a mean over neighbours that lie before the window."""
    end, side = N - min(kv.window, kv.recent_size), kv.pool_size // 2
    out = list(score)
    for i in range(end):
        out[i] = sum(score[j] for j in range(i - side, i + side + 1) if 0 <= j < end)
    return out


def slow_head(kv, q, k):
    """One head reads a text [T, G, 8], [T, 8]: for each token, the tokens in the cache, in order,
    and what they have for a score."""
    tokens, score, course = [], [], []
    for t in range(len(k)):
        if len(tokens) == N:
            worth = slow_votes(kv, score) if isinstance(kv, SnapKVConfig) else score
            middle = range(kv.sink_size, N - kv.recent_size)
            best = sorted(middle, key=lambda i: -worth[i])[: kv.keep]
            kept = [*range(kv.sink_size), *sorted(best), *range(N - kv.recent_size, N)]
            tokens = [tokens[i] for i in kept]
            score = [0.0 if isinstance(kv, SnapKVConfig) else score[i] for i in kept]
        slot = len(tokens)
        tokens, score = [*tokens, t], [*score, 0.0]
        if not isinstance(kv, SnapKVConfig) or slot >= N - kv.window:
            seen = attention(q[t], [k[i] for i in tokens], slot)
            score = [old + new for old, new in zip(score, seen, strict=True)]
        course.append((tokens, score))
    return course


@every([
    *BOTH,
    SnapKVConfig(N, 0, 0, 9, window=5, pool_size=5),  # the window is chosen from too
    SnapKVConfig(N, 1, 8, 7, window=1, pool_size=1),
    H2OConfig(N, 0, 10, 1),  # the paper's: no sinks, one entry a token
])  # fmt: skip
def test_rounds_are_the_slow_loop(kv):
    q, k, v = text()
    memory, fill = kv.init(2, KV_HEADS, 8, jnp.float32), 0
    group = np.asarray(q, np.float64).reshape(*q.shape[:2], KV_HEADS, -1, 8)
    keys = np.asarray(k, np.float64)
    want = [[slow_head(kv, group[b, :, h], keys[b, :, h]) for h in range(KV_HEADS)] for b in (0, 1)]
    moved = 0
    for t in range(q.shape[1]):
        if fill == N:
            memory, fill = room(kv, memory), kv.prefix
        one = (x[:, t : t + 1] for x in (q, k, v))
        memory, fill = step(kv, memory, *one, jnp.int32(fill)), fill + 1
        for row in (0, 1):
            for head in range(KV_HEADS):
                tokens, score = want[row][head][t]
                assert memory.v[row, head, :fill, 0].tolist() == tokens
                assert_close(memory.score[row, head, :fill], score, COMPRESS)
                moved += tokens != want[row][0][t][0]
        assert not np.asarray(memory.score[:, :, fill:]).any()
    assert moved, "all heads chose alike: the text is too easy"


@every(BOTH)
def test_a_call_of_many_tokens_is_many_calls(kv):
    q, k, v = text(4, N)
    fills, counts = np.array([0, 3, N - 2, N - 1]), np.array([N, 9, 2, 0])
    start = kv.init(4, KV_HEADS, 8, jnp.float32)
    start = step(kv, start, *(x[:, :N] for x in text(4, N, seed=1)), jnp.zeros(4, jnp.int32),
                 jnp.asarray(fills, jnp.int32))  # fmt: skip
    got = step(kv, start, q, k, v, jnp.asarray(fills, jnp.int32), jnp.asarray(counts, jnp.int32))
    want = start
    for t in range(N):
        count = jnp.asarray(t < counts, jnp.int32)
        at = jnp.asarray(np.minimum(fills + t, N - 1), jnp.int32)
        want = step(kv, want, *(x[:, t : t + 1] for x in (q, k, v)), at, count)
    for row, fill in enumerate(fills + counts):
        np.testing.assert_array_equal(got.v[row, :, :fill], want.v[row, :, :fill])
    assert_close(got.score, want.score, COMPRESS)
    np.testing.assert_array_equal(got.score[3], start.score[3])
    assert np.asarray(got.score[0]).any()


def test_all_attention_is_counted_once(monkeypatch):
    q, k, v = text(2, N)
    memory = step(H2O, H2O.init(2, KV_HEADS, 8, jnp.float32), q, k, v, jnp.int32(0))
    assert_close(memory.score.sum(-1), np.full((2, KV_HEADS), N), 10 * COMPRESS)
    monkeypatch.setattr(scored, "QUERY_BLOCK", 8)  # which does not divide N
    taken, at = jnp.ones((2, N), bool), jnp.broadcast_to(jnp.arange(N), (2, N))
    q = ROPE.rotate_tokens(q, jnp.arange(N))
    assert_close(scored.attention_sums(q, memory.k, at, taken), memory.score, COMPRESS)


def test_neighbours_of_a_needle_stay():
    """One entry has all votes; pooled, those beside it are next."""
    kv = SnapKVConfig(40, 2, 8, 27, window=4, pool_size=3)
    memory = kv.init(1, 1, 8, jnp.float32)
    v = jnp.broadcast_to(jnp.arange(40.0)[None, None, :, None], (1, 1, 40, 8))
    got = room(kv, memory._replace(v=v, score=memory.score.at[:, :, 20].set(4.0)))
    assert got.v[0, 0, 2:5, 0].tolist() == [19, 20, 21]
    assert not np.asarray(got.score).any()


@every(BOTH)
def test_the_choice_has_no_gradient_and_what_stays_has(kv):
    q, k, v = text(1, N)

    def loss(q, k, v):
        memory = step(kv, kv.init(1, KV_HEADS, 8, jnp.float32), q, k, v, jnp.int32(0))
        memory = kv.make_room(memory, ROPE, {})
        return jnp.sum(jnp.sin(memory.k + memory.v)[:, :, : kv.prefix])

    of_q, of_k, of_v = (np.asarray(g) for g in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))
    assert not of_q.any()
    for grad in (of_k, of_v):  # a head's entry has a gradient if it stays
        assert (grad != 0).any(-1).sum() == KV_HEADS * kv.prefix


@every(BOTH)
def test_heads_and_rows_choose_where_they_lie(kv):
    mesh = fk.make_mesh(data=2, fsdp=2, tensor=2)
    memory = kv.init(4, 2, 8, jnp.float32)
    spec = sharding.P(("data", "fsdp"), "tensor")
    place = jax.sharding.NamedSharding(mesh, spec)
    shard = jax.tree.map(lambda _: place, memory)
    whole = jax.sharding.NamedSharding(mesh, sharding.P())
    tokens = jax.sharding.NamedSharding(mesh, sharding.P(("data", "fsdp"), None, "tensor"))

    def both(memory, q, k, v, fill):
        memory = kv.append(kv.make_room(memory, ROPE, {}), k, v, fill[0], None, q)
        return kv.append(memory, k, v, fill, None, q)

    run = jax.jit(both, in_shardings=(shard, *[tokens] * 3, whole), out_shardings=shard)
    q, k, v = (jnp.zeros((4, 1, heads, 8)) for heads in (6, 2, 2))
    compiled = run.lower(memory, q, k, v, jnp.full((4,), N - 1, jnp.int32)).compile()
    assert Program(compiled.as_text() or "").collectives() == []


def test_sizes():
    kv = SnapKVConfig()
    assert (kv.window, kv.pool_size, kv.recent_size, kv.chunk) == (32, 5, 2048, 512)
    assert SnapKVConfig(64).window == 8 and SnapKVConfig(64, chunk=3).window == 3
    assert SnapKVConfig(1, 0).window == 1
    assert (H2OConfig().recent_size, H2OConfig().prefix) == (2048, 3584)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window must be a whole number >= 1, got 0"),
        ({"chunk": 5, "window": 6}, r"window must be in \[1, 5\], got 6: .*raise chunk or lower"),
        ({"pool_size": 0}, "pool_size must be a whole number >= 1, got 0"),
        ({"pool_size": 4}, "pool_size must be odd, got 4"),
        ({"cache_size": 8, "recent_size": 4}, "need sink_size .* lower the others"),
    ],
    ids=str,
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SnapKVConfig(**fields)

"""Choosing policies: what they choose, ties, both forms alike, gradients, sharding, bad input."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import sharding
from freqkv_jax.cli.common import add_policy_arguments, policy_from_flags
from freqkv_jax.config import RopeConfig
from freqkv_jax.hlo import Program
from freqkv_jax.kv import (
    H2OConfig,
    KeyNormConfig,
    KVPolicy,
    RandomConfig,
    SnapKVConfig,
    SpectralNoveltyConfig,
    TrueNoveltyConfig,
)
from freqkv_jax.kv.choosing import highest
from freqkv_jax.kv.policy import Slots
from freqkv_jax.rope import Rope
from tests.tolerances import COMPRESS, GRAD_REL_L2, assert_close

KV = SpectralNoveltyConfig(40, 3, 8, 11, bands=4, value_share=0.4)
ROPE = Rope(RopeConfig(1e4), 8)


def arrays(kv):
    return {name: jnp.asarray(array) for name, array in kv.constants().items()}


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def cosine(x, y):
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def chosen_slowly(kv, k, v):
    """Sorted indices that each head keeps, by the definition, in float64: k, v are [K, m, D]."""
    scores = [scored_slowly(kv, *head) for head in zip(k, v, strict=True)]
    if kv.shared_heads:
        scores = [np.mean(scores, axis=0)] * len(scores)
    return [kept_slowly(kv, *both) for both in scores]


def kept_slowly(kv, novelty, worth):
    m = len(novelty)
    by_value = int(kv.keep * kv.value_share)
    kept = sorted(range(m), key=lambda t: -novelty[t])[: kv.keep - by_value]
    rest = sorted(set(range(m)) - set(kept), key=lambda t: -worth[t])
    return sorted(kept + rest[:by_value])


def scored_slowly(kv, k, v):
    """Novelty and worth of one head's entries."""
    m = len(k)
    u = k / np.linalg.norm(k, axis=-1, keepdims=True)
    low = np.zeros_like(u)
    for f in range(min(kv.bands, m)):
        wave = np.cos(np.pi * f * (2 * np.arange(m) + 1) / (2 * m))
        wave /= np.linalg.norm(wave)
        low += np.outer(wave, wave @ u)
    novelty = [-cosine(u[t], low[t]) + kv.recency * t / m for t in range(m)]
    worth = [
        -cosine(u[t], u.mean(0)) + 0.3 * np.log(v[t] @ v[t]) + kv.recency * t / m for t in range(m)
    ]
    return novelty, worth


@pytest.mark.parametrize(
    "kv",
    [
        KV,
        SpectralNoveltyConfig(40, 3, 8, 11, bands=1, value_share=0.0),
        dataclasses.replace(KV, recency=0.7),
        dataclasses.replace(KV, shared_heads=True),
        dataclasses.replace(KV, recency=0.4, shared_heads=True, value_share=0.0),
    ],
    ids=str,
)
def test_a_round_is_the_definition(kv):
    k, v = normal(2, 2, 40, 8), normal(2, 2, 40, 8, seed=1)
    got = kv.make_room(Slots(ROPE.rotate_slots(k), v), ROPE, arrays(kv))
    for row in range(2):
        middle = [np.asarray(x[row, :, 3:32], np.float64) for x in (k, v)]
        for head, chosen in enumerate(chosen_slowly(kv, *middle)):
            kept = [0, 1, 2, *(3 + t for t in chosen), *range(32, 40)]
            assert len(kept) == kv.prefix
            want = ROPE.rotate_slots(k[row, head, np.array(kept)])
            assert_close(got.k[row, head, : kv.prefix], want, COMPRESS)
            np.testing.assert_array_equal(got.v[row, head, : kv.prefix], v[row, head, kept])


def test_true_positions_are_kept_round_after_round():
    """The choice is novelty's; keys stay as they were rotated, and keep their bits."""
    kv = TrueNoveltyConfig(*(getattr(KV, f.name) for f in dataclasses.fields(KV)))
    chunk = KV.chunk
    k, v = normal(1, 40 + 2 * chunk, 2, 8), normal(1, 40 + 2 * chunk, 2, 8, seed=1)
    rotated = ROPE.rotate_tokens(k, jnp.arange(40 + 2 * chunk))
    memory = kv.append(kv.init(1, 2, 8, jnp.float32), rotated[:, :40], v[:, :40], 0)
    held = [list(range(40)) for _ in range(2)]
    for number in range(2):
        memory = kv.make_room(memory, ROPE, arrays(kv))
        new = slice(40 + number * chunk, 40 + (number + 1) * chunk)
        memory = kv.append(memory, rotated[:, new], v[:, new], kv.prefix)
        middle = [np.array([x[0, held[h][3:32], h] for h in range(2)], np.float64) for x in (k, v)]
        for head, chosen in enumerate(chosen_slowly(kv, *middle)):
            kept = [
                held[head][slot] for slot in [0, 1, 2, *(3 + t for t in chosen), *range(32, 40)]
            ]
            held[head] = kept + list(range(new.start, new.stop))
            assert memory.place[0, head].tolist() == held[head]
            np.testing.assert_array_equal(memory.k[0, head], rotated[0, held[head], head])
            np.testing.assert_array_equal(memory.v[0, head], v[0, held[head], head])
    assert memory.read.tolist() == [[40 + 2 * chunk] * 2]


def test_a_large_recency_is_a_window_and_none_changes_nothing():
    k, v = normal(1, 2, 40, 8), normal(1, 2, 40, 8, seed=1)
    memory = Slots(ROPE.rotate_slots(k), v)
    got = dataclasses.replace(KV, recency=1000.0).make_room(memory, ROPE, arrays(KV))
    np.testing.assert_array_equal(got.v[:, :, 3 : KV.prefix], v[:, :, 40 - KV.prefix + 3 :])
    heads = [chosen_slowly(KV, *(np.asarray(x[0, :, 3:32], np.float64) for x in (k, v)))[h]
             for h in range(2)]  # fmt: skip
    assert heads[0] != heads[1], "heads must differ where they choose each for itself"


def test_heads_that_choose_together_are_refused_where_they_are_split():
    kv = dataclasses.replace(KV, shared_heads=True)
    memory = Slots(normal(2, 2, 40, 8), normal(2, 2, 40, 8, seed=1))
    room = jax.jit(lambda m, a: kv.make_room(m, ROPE, a))
    with (
        jax.set_mesh(fk.make_mesh(data=2, tensor=2)),
        pytest.raises(ValueError, match="shared_heads=True cannot be used on a mesh with tensor=2"),
    ):
        room(memory, arrays(kv))
    with jax.set_mesh(fk.make_mesh(data=2, fsdp=2)):
        room(memory, arrays(kv))


def test_key_norms_choose_the_shortest():
    kv = KeyNormConfig(40, 3, 8, 11)
    k, v = normal(1, 1, 40, 8), normal(1, 1, 40, 8, seed=1)
    got = kv.make_room(Slots(ROPE.rotate_slots(k), v), ROPE, {})
    kept = 3 + np.sort(np.argsort(np.linalg.norm(k[0, 0, 3:32], axis=-1))[:18])
    np.testing.assert_array_equal(got.v[0, 0, 3:21], v[0, 0, kept])


def test_random_draws_differ_by_round_head_and_seed_and_not_by_row():
    def run(seed):
        kv = RandomConfig(40, 3, 8, 11, seed=seed)
        slots = kv.init(2, 2, 8, jnp.float32)
        v = jnp.broadcast_to(jnp.arange(40.0)[None, None, :, None], (2, 2, 40, 8))
        once = kv.make_room(slots._replace(v=v), ROPE, {})
        twice = kv.make_room(once._replace(v=v), ROPE, {})
        return [np.asarray(x.v[..., 3:21, 0]) for x in (once, twice)]

    once, twice = run(0)
    np.testing.assert_array_equal(once[0], once[1])
    assert (once[0, 0] != once[0, 1]).any() and (once != twice).any()
    assert (run(1)[0] != once).any()
    assert all((np.diff(x) > 0).all() for x in (once, twice))


def test_ties_go_to_the_lowest_slot():
    score = jnp.array([[1.0, 3.0, 2.0, 2.0 + 1e-6, 2.0 - 1e-6, 0.0]])
    assert highest(score, 3).tolist() == [[False, True, True, True, False, False]]
    assert highest(score, 0).sum() == 0 and highest(score, 6).all()
    # Keys of equal tokens, turned to their slots: rounding must not decide.
    kv = SpectralNoveltyConfig(40, 3, 8, 11, bands=1, value_share=0.0)
    k = ROPE.rotate_slots(jnp.broadcast_to(normal(8), (1, 1, 40, 8)))
    v = jnp.broadcast_to(jnp.arange(40.0)[None, None, :, None], k.shape)
    got = kv.make_room(Slots(k, v), ROPE, arrays(kv))
    assert got.v[0, 0, : kv.prefix, 0].tolist() == [*range(21), *range(32, 40)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", [KV, KeyNormConfig(40, 3, 8, 11)], ids=lambda kv: kv.name)
def test_both_forms_choose_alike_where_tokens_repeat(kv, dtype):
    """Few different keys, so near-ties abound. The values tell which entries were kept."""
    chunks = 4
    length = 40 + chunks * kv.chunk
    words = np.random.default_rng(2).integers(0, 5, (2, length))
    k = normal(5, 2, 8, dtype=dtype)[words]
    v = normal(2, length, 2, 8, seed=3, dtype=dtype)
    first = ROPE.rotate_tokens(k[:, :40], jnp.arange(40))
    memory = kv.append(kv.init(2, 2, 8, jnp.dtype(dtype)), first, v[:, :40], 0)
    cut = (2, chunks, kv.chunk, 2, 8)
    seen = jnp.full((2,), 40, jnp.int32)
    parallel = jax.jit(lambda m, k, v: kv.chunk_caches(m, k, v, None, ROPE, arrays(kv), seen))(
        memory, k[:, 40:].reshape(cut), v[:, 40:].reshape(cut)
    )
    room = jax.jit(lambda m: kv.make_room(m, ROPE, arrays(kv)))
    append = jax.jit(
        lambda m, k, v, fill: KVPolicy.append(kv, m, ROPE.rotate_tokens(k, fill[None]), v, fill)
    )
    for t in range(40, length):
        step = (t - 40) % kv.chunk
        memory = room(memory) if step == 0 else memory
        memory = append(
            memory, k[:, t : t + 1], v[:, t : t + 1], jnp.asarray(kv.prefix + step, jnp.int32)
        )
    np.testing.assert_array_equal(parallel.memory.v, memory.v)
    assert_close(parallel.memory.k, memory.k, COMPRESS)


def test_what_stays_in_its_slot_keeps_its_bits():
    k = normal(1, 2, 40, 8, dtype="bfloat16")
    slots = jnp.broadcast_to(jnp.arange(40, dtype=jnp.bfloat16)[None, None, :, None], k.shape)
    got = KV.make_room(Slots(k, slots), ROPE, arrays(KV))
    same = np.array(got.v[..., 0] == jnp.arange(40, dtype=jnp.bfloat16)[None, None])
    same[..., KV.prefix :] = False
    assert same.sum() > 2 * KV.sink_size
    np.testing.assert_array_equal(np.asarray(got.k)[same], np.asarray(k)[same])


def test_gradients_are_those_of_finite_differences():
    k, v, weight = (normal(1, 1, 40, 8, seed=s) for s in (4, 5, 6))

    def loss(k, v):
        room = KV.make_room(Slots(ROPE.rotate_slots(k), v), ROPE, arrays(KV))
        return jnp.sum(weight[:, :, : KV.prefix] * (room.k + room.v)[:, :, : KV.prefix])

    # Linear where no choice flips, so that a difference is exact but for rounding.
    grads = jax.jit(jax.grad(loss, (0, 1)))(k, v)
    value = jax.jit(loss)
    for which in (0, 1):
        along = normal(1, 1, 40, 8, seed=7)
        ahead, back = (
            value(*(x + step * along if i == which else x for i, x in enumerate((k, v))))
            for step in (1e-3, -1e-3)
        )
        want = float(jnp.sum(grads[which] * along))
        assert abs((ahead - back) / 2e-3 - want) <= 100 * GRAD_REL_L2 * abs(want)
    assert (np.asarray(grads[1]) == 0).any() and (np.asarray(grads[1]) != 0).any()


@pytest.mark.parametrize("kv", [KV, RandomConfig(40, 3, 8, 11)], ids=lambda kv: kv.name)
def test_heads_and_rows_choose_where_they_lie(kv):
    mesh = fk.make_mesh(data=2, fsdp=2, tensor=2)
    memory = kv.init(4, 2, 8, jnp.float32)
    spec = sharding.P(("data", "fsdp"), "tensor")
    shard = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, spec), memory)
    room = jax.jit(
        lambda m, a: kv.make_room(m, ROPE, a), in_shardings=(shard, None), out_shardings=shard
    )
    text = room.lower(memory, arrays(kv)).compile().as_text() or ""
    assert Program(text).collectives() == []


def test_sizes():
    kv = SpectralNoveltyConfig()
    assert (kv.recent_size, kv.chunk, kv.prefix, kv.keep) == (2048, 512, 3584, 1532)
    assert SpectralNoveltyConfig(2048).recent_size == 1024
    assert SpectralNoveltyConfig(1, 0) == SpectralNoveltyConfig(1, 0, 0, 1)
    assert SpectralNoveltyConfig(40, 3, 8, 29).keep == 0
    room = SpectralNoveltyConfig(40, 3, 8, 29).make_room(
        Slots(normal(1, 1, 40, 8), normal(1, 1, 40, 8)), ROPE, arrays(KV)
    )
    assert room.k.shape == (1, 1, 40, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_size": 0}, "cache_size must be a whole number >= 1, got 0"),
        ({"recent_size": -2}, "recent_size must be a whole number >= 0, got -2"),
        ({"cache_size": 8, "recent_size": 4}, "need sink_size .* lower the others"),
        ({"chunk": 0}, "chunk must be a whole number >= 1, got 0"),
        ({"cache_size": 8, "recent_size": 1, "chunk": 4}, r"chunk must be in \[1, 3\], got 4"),
        ({"bands": 0}, "bands must be a whole number >= 1, got 0"),
        ({"value_share": 1.1}, r"value_share must be in \[0, 1\], got 1.1"),
        ({"value_share": True}, r"value_share must be in \[0, 1\], got True"),
        ({"recency": -0.1}, "recency must be a finite number >= 0, got -0.1"),
        ({"recency": float("nan")}, "recency must be a finite number >= 0, got nan"),
        ({"shared_heads": 1}, "shared_heads must be true or false, got 1"),
    ],
    ids=str,
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SpectralNoveltyConfig(**fields)


def test_flags_of_the_command_line():
    parser = argparse.ArgumentParser()
    add_policy_arguments(parser)

    def policy(line):
        return policy_from_flags(parser.parse_args(line.split()))

    assert policy("") is None
    assert policy("--cache-size 64") == fk.FreqKVConfig(64)
    assert policy("--policy novelty --cache-size 64") == SpectralNoveltyConfig(64)
    assert policy(
        "--policy novelty --cache-size 64 --recent-size 8 --chunk 7 --bands 2 --value-share 0.1"
    ) == SpectralNoveltyConfig(64, 4, 8, 7, 2, 0.1)
    assert policy("--policy novelty --recency 0.5 --shared-heads") == SpectralNoveltyConfig(
        recency=0.5, shared_heads=True
    )
    assert policy("--policy knorm --chunk 7 --bands 2") == KeyNormConfig(chunk=7)
    assert policy("--policy h2o --chunk 7 --window 2") == H2OConfig(chunk=7)
    assert policy("--policy snapkv --window 2 --pool-size 3") == SnapKVConfig(window=2, pool_size=3)
    assert policy("--policy freqkv --compress-method fft --chunk 7") == fk.FreqKVConfig(
        method="fft"
    )

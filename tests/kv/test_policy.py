"""Sizes, bad input, the registry, and writing into slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import freqkv_jax as fk
from freqkv_jax.config import SHAPES
from freqkv_jax.kv import (
    POLICIES,
    FreqKVConfig,
    FreqKVValuesConfig,
    FullConfig,
    H2OConfig,
    KeyNormConfig,
    PairAverageConfig,
    RandomConfig,
    SinkWindowConfig,
    SnapKVConfig,
    SpectralNoveltyConfig,
    TrueNoveltyConfig,
    policy_from_args,
    policy_from_dict,
    policy_to_dict,
)
from freqkv_jax.kv.policy import write_slots
from freqkv_jax.kv.state import empty_state
from freqkv_jax.rope import Rope
from tests.kv.attended_fixture import AttendedPolicy
from tests.tiny import tiny_config
from tests.tolerances import rel_l2


def test_the_registry():
    assert {
        "freqkv": FreqKVConfig,
        "freqkv_values": FreqKVValuesConfig,
        "full": FullConfig,
        "h2o": H2OConfig,
        "knorm": KeyNormConfig,
        "novelty": SpectralNoveltyConfig,
        "novelty_true": TrueNoveltyConfig,
        "pair_average": PairAverageConfig,
        "random": RandomConfig,
        "sink_window": SinkWindowConfig,
        "snapkv": SnapKVConfig,
    } == POLICIES
    for name, cls in POLICIES.items():
        assert cls.name == name and cls.summary and cls.keeps and cls.source


def test_defaults_are_the_papers():
    kv = FreqKVConfig()
    assert (kv.cache_size, kv.sink_size, kv.recent_size, kv.retain_ratio) == (4096, 4, 0, 0.5)
    assert (kv.span, kv.keep, kv.chunk, kv.prefix) == (4092, 2046, 2046, 2050)
    assert kv.capacity == 4096


def test_kept_length_is_truncated_as_python_does():
    assert FreqKVConfig(100, 0, 0, 0.29).keep == 28
    assert FreqKVConfig(16, 2, 3, 0.37).keep == 4
    assert FreqKVConfig(12, 4, 0, 0.0).keep == 0


@given(st.integers(1, 60), st.integers(0, 12), st.integers(0, 12), st.floats(0, 0.99))
@settings(deadline=None, derandomize=True)
def test_sizes_are_those_of_a_loop(size, sink, recent, ratio):
    if sink + recent >= size:
        with pytest.raises(ValueError, match="need sink_size"):
            FreqKVConfig(size, sink, recent, ratio)
        return
    kv, window = (cls(size, sink, recent, ratio) for cls in (FreqKVConfig, SinkWindowConfig))
    assert kv.chunk >= 1 and kv.prefix + kv.chunk == size
    assert (window.prefix, window.chunk, window.capacity) == (kv.prefix, kv.chunk, size)
    assert window.recent == kv.prefix - sink
    fill = rounds = 0
    for seen in range(1, 3 * size):
        if fill == size:
            fill, rounds = kv.prefix, rounds + 1
        fill += 1
        assert (kv.fill_after(seen), kv.num_compressions(seen)) == (fill, rounds)
        assert window.fill_after(seen) == fill
    assert (kv.fill_after(0), kv.num_compressions(0)) == (0, 0)


def test_a_full_cache_never_compresses():
    assert FullConfig().fill_after(10**6) == 10**6
    assert FullConfig().num_compressions(10**6) == 0
    assert FullConfig().capacity is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_kv_bytes_are_those_of_the_arrays(name, dtype):
    config = tiny_config(6, 2)
    kv = policy_from_args(name, cache_size=20, window=4, chunk=4)
    assert kv.kv_bytes(config, dtype, 33) == empty_state(config, kv, 1, dtype, 33).nbytes


def test_kv_bytes_of_llama2():
    # 32 layers, 32 heads of 128, keys and values of 2 bytes, 4096 slots: 2 GiB.
    assert FreqKVConfig().kv_bytes(SHAPES["llama2-7b"], "bfloat16") == 2**31
    with pytest.raises(ValueError, match="'full' has no fixed size: say for how many tokens"):
        FullConfig().kv_bytes(SHAPES["llama2-7b"], "bfloat16")


BAD_SIZES = [
    ({"cache_size": 0}, "cache_size must be a whole number >= 1, got 0"),
    ({"cache_size": -5}, "cache_size must be a whole number >= 1, got -5"),
    ({"cache_size": 16.0}, "cache_size must be a whole number >= 1, got 16.0"),
    ({"cache_size": True}, "cache_size must be a whole number >= 1, got True"),
    ({"cache_size": "16"}, "cache_size must be a whole number >= 1, got '16'"),
    ({"cache_size": None}, "cache_size must be a whole number"),
    ({"sink_size": -1}, "sink_size must be a whole number >= 0, got -1"),
    ({"sink_size": False}, "sink_size must be a whole number >= 0, got False"),
    ({"recent_size": -2}, "recent_size must be a whole number >= 0, got -2"),
    (
        {"cache_size": 8, "sink_size": 4, "recent_size": 4},
        "sink_size=4, recent_size=4, cache_size=8",
    ),
    ({"cache_size": 4}, r"need sink_size \+ recent_size < cache_size.*raise cache_size or lower"),
    ({"retain_ratio": 1}, r"retain_ratio must be in \[0, 1\), got 1"),
    ({"retain_ratio": 1.0}, r"retain_ratio must be in \[0, 1\), got 1.0"),
    ({"retain_ratio": -0.1}, r"retain_ratio must be in \[0, 1\), got -0.1"),
    ({"retain_ratio": float("nan")}, r"retain_ratio must be in \[0, 1\), got nan"),
    ({"retain_ratio": True}, r"retain_ratio must be in \[0, 1\), got True"),
    ({"retain_ratio": "0.5"}, r"retain_ratio must be in \[0, 1\), got '0.5'"),
]


@pytest.mark.parametrize(("sizes", "message"), BAD_SIZES, ids=[str(s) for s, _ in BAD_SIZES])
@pytest.mark.parametrize("cls", [FreqKVConfig, SinkWindowConfig])
def test_bad_sizes(cls, sizes, message):
    with pytest.raises(ValueError, match=message):
        cls(**sizes)


def worn(rounds, dtype):
    """Relative error of keys that moved a slot in each of so many rounds, rounded each time."""
    rope = Rope(tiny_config().rope, 64)
    keys = jax.random.normal(jax.random.key(0), (64, 64)).astype(dtype)
    one, all_of_them = (rope.angles(jnp.full((1,), -n)) for n in (1, rounds))
    moved = jax.lax.fori_loop(0, rounds, lambda _, k: rope.rotate(k, one), keys)
    want = rope.rotate(keys.astype(jnp.float32), all_of_them)
    return rel_l2(moved.astype(jnp.float32), want)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 128), ("float16", 1024)])
def test_narrow_floats_allow_so_many_rounds_in_a_keys_life(dtype, most):
    assert worn(most, dtype) < 0.1
    assert worn(8 * most, dtype) > 0.4
    SpectralNoveltyConfig(most, chunk=1).check_dtype(dtype)
    for kv in (
        SpectralNoveltyConfig(most + 1, chunk=1),
        SinkWindowConfig(4 * most, retain_ratio=1 - 3 / (4 * most)),
    ):
        kv.check_dtype("float32")
        need = -(-kv.capacity // most)
        with pytest.raises(ValueError, match=f"free at least {need} entries .* or use float32"):
            kv.check_dtype(dtype)
    with pytest.raises(ValueError, match="use float32"):
        fk.Llama(tiny_config(), SpectralNoveltyConfig(most + 1, chunk=1), dtype).apply(
            {}, np.zeros((1, 4), np.int32)
        )
    for kv in FullConfig(), TrueNoveltyConfig(most + 1, chunk=1):  # which turn no key again
        kv.check_dtype(dtype)


def test_unknown_method():
    with pytest.raises(ValueError, match="method 'dct' is unknown; allowed: matmul, fft"):
        FreqKVConfig(method="dct")


def test_policies_compare_by_value_whatever_numbers_made_them():
    kv = FreqKVConfig(np.int64(64), np.int32(4), 0, np.float64(0.5))
    assert kv == FreqKVConfig(64, 4, 0, 0.5) and hash(kv) == hash(FreqKVConfig(64))
    assert type(kv.cache_size) is int and type(kv.retain_ratio) is float
    assert kv == FreqKVConfig(64, 4, 0, np.float32(0.5))
    novelty = SpectralNoveltyConfig(64, value_share=np.float32(0.5), recency=np.float16(0.25))
    assert novelty == SpectralNoveltyConfig(64, value_share=0.5, recency=0.25)
    assert type(novelty.value_share) is float and type(novelty.recency) is float
    assert FreqKVConfig(64) != SinkWindowConfig(64) and FreqKVConfig(64) != FreqKVConfig(65)
    with pytest.raises(AttributeError):
        kv.cache_size = 3  # pyright: ignore


@pytest.mark.parametrize(
    "kv", [FreqKVConfig(64, 3, 2, 0.3, "fft"), FullConfig(), SinkWindowConfig(20, 1)], ids=str
)
def test_policies_as_plain_data(kv):
    data = policy_to_dict(kv)
    assert data["policy"] == kv.name
    assert policy_from_dict(data) == kv and "policy" in data


def test_a_new_policy_needs_one_registry_entry(monkeypatch):
    monkeypatch.setitem(POLICIES, AttendedPolicy.name, AttendedPolicy)
    kv = policy_from_args("attended", cache_size=32, chunk=5, retain_ratio=0.5, bands=2)
    assert kv == AttendedPolicy(32, chunk=5)
    assert policy_from_dict(policy_to_dict(kv)) == kv


def test_from_args_takes_what_it_knows():
    sizes = {"cache_size": 64, "sink_size": 2, "recent_size": 1, "retain_ratio": 0.25}
    assert policy_from_args("freqkv", **sizes, method="fft") == FreqKVConfig(64, 2, 1, 0.25, "fft")
    assert policy_from_args("sink_window", **sizes, method="fft") == SinkWindowConfig(
        64, 2, 1, 0.25
    )
    assert policy_from_args("pair_average", **sizes) == PairAverageConfig(64, 2, 1)
    assert policy_from_args("full", **sizes) == FullConfig()


def test_messages_of_the_registry():
    with pytest.raises(ValueError, match="no policy is named 'freqv'.*did you mean 'freqkv'"):
        policy_from_args("freqv")
    with pytest.raises(
        ValueError, match="no policy is named None; allowed: freqkv, freqkv_values, full, h2o"
    ):
        policy_from_dict({"cache_size": 3})
    with pytest.raises(ValueError, match="has no field 'cachesize'; allowed: .*'cache_size'"):
        policy_from_dict({"policy": "freqkv", "cachesize": 3})
    with pytest.raises(ValueError, match="cache_size must be a whole number"):
        policy_from_dict({"policy": "freqkv", "cache_size": 0})


def slow_write(slots, new, fill, count):
    slots, (rows, length) = slots.copy(), new.shape[:2]
    for row in range(rows):
        for t in range(length if count is None else count[row]):
            if fill[row] + t < slots.shape[2]:
                slots[row, :, fill[row] + t] = new[row, t]
    return slots


# (T, fill, count) of 3 rows and 7 slots; fill one number where it may be an int or a scalar.
WRITES = [
    (1, [0, 3, 6], None),
    (1, [0, 3, 6], [1, 0, 1]),
    (1, [7, 7, 2], [0, 0, 1]),  # full rows that take nothing
    (3, [0, 2, 4], None),
    (3, [0, 2, 4], [0, 2, 3]),
    (3, [6, 5, 7], [3, 3, 0]),  # overflow is dropped
    (1, 7, [0, 0, 0]),
    (3, 5, [3, 0, 1]),
    (3, 6, None),
    (7, [0, 0, 0], [7, 0, 3]),
    (2, 4, None),
    (1, 6, [0, 1, 1]),
    (1, 5, None),
]


@pytest.mark.parametrize(("length", "fill", "count"), WRITES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "scalar", "int"])
def test_write_slots_is_the_slow_loop(length, fill, count, kind):
    if kind != "rows" and not isinstance(fill, int):
        fill = fill[2]
    rng = np.random.default_rng(0)
    slots = rng.normal(size=(3, 2, 7, 4)).astype(np.float32)
    new = rng.normal(size=(3, length, 2, 4)).astype(np.float32)
    rows = [fill] * 3 if isinstance(fill, int) else fill
    want = slow_write(slots, new, rows, count)
    count = None if count is None else jnp.array(count)
    if kind == "int":
        got = jax.jit(lambda s, x, c: write_slots(s, x, fill, c))(slots, new, count)
        # With an int the whole block is written: what is behind a row's count means nothing.
        for row in range(3):
            end = fill + (length if count is None else int(count[row]))
            np.testing.assert_array_equal(got[row, :, :end], want[row, :, :end])
            if end == fill:
                np.testing.assert_array_equal(got[row], slots[row])
        return
    at = jnp.array(rows if kind == "rows" else fill)
    np.testing.assert_array_equal(jax.jit(write_slots)(slots, new, at, count), want)


def test_write_slots_casts_to_the_dtype_of_the_cache():
    got = write_slots(jnp.zeros((1, 1, 3, 2), jnp.bfloat16), jnp.full((1, 1, 1, 2), 1.001), 1)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[0, 0, :, 0], jnp.array([0, 1, 0], jnp.bfloat16))

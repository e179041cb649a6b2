"""The plan of blocks: every token once and in order, room before it is needed and never sooner."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freqkv_jax.kv import FreqKVConfig, FullConfig, SinkWindowConfig
from freqkv_jax.reading import plan, roomy

POLICIES = [FreqKVConfig(16, 4), FreqKVConfig(9, 8), SinkWindowConfig(17, 2, 3, 0.3), FullConfig()]


def replay(kv, fills, lengths, block_len):
    """Follows a plan a token at a time; returns the fills at its end and its steps."""
    fill, done = list(fills), [0] * len(lengths)
    steps = list(plan(kv, fills, lengths, block_len))
    for step in steps:
        assert step.counts.max() <= step.length
        assert step.kind != "fresh" or not any(fill)
        for row, count in enumerate(step.counts):
            assert step.offsets[row] == done[row]
            if step.due[row]:
                assert fill[row] == kv.capacity and count > 0
                fill[row] = kv.prefix
            if step.kind == "chunks":
                assert step.length % kv.chunk == 0
            for _ in range(count):
                if fill[row] == kv.capacity:
                    assert step.kind == "chunks", "no room"
                    fill[row] = kv.prefix
                fill[row] += 1
            done[row] += int(count)
    assert done == list(lengths)
    return fill, steps


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_token_is_read_once_where_there_is_room(data):
    kv = data.draw(st.sampled_from(POLICIES))
    rows = data.draw(st.integers(1, 4))
    most = kv.capacity or 40
    fills = data.draw(st.lists(st.integers(0, most), min_size=rows, max_size=rows))
    lengths = data.draw(st.lists(st.integers(0, 120), min_size=rows, max_size=rows))
    block_len = data.draw(st.integers(1, 80))
    fill, _ = replay(kv, fills, lengths, block_len)
    if not any(fills):
        assert fill == [kv.fill_after(n) for n in lengths]


def test_long_texts_are_read_in_chunks_of_few_lengths():
    _, steps = replay(FreqKVConfig(64, 4), [0], [64 + 30 * 21 + 7], 256)
    assert [(s.kind, s.length) for s in steps] == [
        ("fresh", 64),
        ("chunks", 240),
        ("chunks", 240),
        ("chunks", 150),
        ("more", 16),
    ]


@pytest.mark.parametrize("chunks", [1, 8, 9, 14, 57, 62, 977])
def test_blocks_have_two_sizes_at_most(chunks):
    kv = FreqKVConfig(64, 4)
    _, steps = replay(kv, [64], [30 * chunks], 8 * 30)
    sizes = [step.length // 30 for step in steps]
    assert sum(sizes) == chunks and max(sizes) <= 8 and len(set(sizes)) <= 2
    assert len(sizes) == -(-chunks // 8)


def test_a_short_turn_behind_a_full_cache_reads_no_padding_of_a_whole_chunk():
    kv = FreqKVConfig(2048, 4)
    [step] = plan(kv, [2048], [20], 8192)
    assert (step.kind, step.length, step.due.tolist()) == ("more", 32, [True])


def test_a_frozen_plan_for_no_tokens_is_empty():
    assert list(plan(FreqKVConfig(16, 4), [3, 16], [0, 0], 8)) == []


@pytest.mark.parametrize("entries, slots", [(1, 256), (256, 256), (257, 512), (5000, 8192)])
def test_roomy(entries, slots):
    assert roomy(entries) == slots
    assert np.log2(roomy(entries)) % 1 == 0

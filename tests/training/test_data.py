"""Order of rows, rows of documents, mixtures, and each host's part of a batch."""

from types import SimpleNamespace

import numpy as np
import pytest

from freqkv_jax.training.data import Batches, batch_indices, open_data
from freqkv_jax.training.generated import Generated
from freqkv_jax.training.paths import Watch
from freqkv_jax.training.rows import Mixture, PackedRows, cut, fill_rows
from freqkv_jax.training.store import MemoryStore

T = 8


def store_of(lengths, answers=None, vocab_size=10_000):
    """Documents of ids 100, 101, ... so that a token tells where it was."""
    ends = np.cumsum([0, *lengths])
    ids = np.arange(100, 100 + ends[-1], dtype=np.uint32)
    flags = [None] * len(lengths) if answers is None else answers
    parts = [(ids[a:b], f) for a, b, f in zip(ends[:-1], ends[1:], flags, strict=True)]
    return MemoryStore(parts, "data", vocab_size, Watch())


def all_rows(source):
    return source.rows(np.arange(source.num_rows))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 64, 65, 1000])
def test_an_epoch_has_every_row_once(num_rows):
    for seed in (0, 7):
        order = np.concatenate([batch_indices(num_rows, 1, s, seed) for s in range(2 * num_rows)])
        for epoch in np.split(order, 2):
            assert sorted(epoch) == list(range(num_rows))
        if num_rows >= 64:
            assert (np.diff(order) != 1).mean() > 0.9  # shuffled
            assert (order[:num_rows] != order[num_rows:]).mean() > 0.9  # and anew
    if num_rows >= 64:
        assert (batch_indices(num_rows, 64, 0, 0) != batch_indices(num_rows, 64, 0, 1)).any()


def test_places_of_rows_are_even():
    # Every row comes to every place about equally often over seeds.
    counts = np.zeros((6, 6))
    for seed in range(600):
        counts[np.arange(6), batch_indices(6, 6, 0, seed)] += 1
    assert counts.min() > 60 and counts.max() < 145


def test_batches_do_not_depend_on_their_cut():
    one = np.concatenate([batch_indices(37, 4, step, 3) for step in range(30)])
    other = np.concatenate([batch_indices(37, 12, step, 3) for step in range(10)])
    np.testing.assert_array_equal(one, other)
    # Fixed for ever: a run that is resumed with a later version goes on in the same order.
    np.testing.assert_array_equal(batch_indices(1000, 5, 2, 0), [153, 50, 518, 387, 158])
    with pytest.raises(ValueError, match="num_rows >= 1"):
        batch_indices(0, 4, 0, 0)


def test_hosts_read_the_global_batch_together():
    source = PackedRows(store_of([T] * 21), T, "documents", False, "data")
    with Batches(source, 8, seed=1) as whole:
        for hosts in (1, 2, 4, 8):
            parts = [Batches(source, 8, 1, host, hosts) for host in range(hosts)]
            for step in (0, 1, 2, 7):
                want = whole.at(step)
                got = [part.at(step) for part in parts]
                for name in ("tokens", "mask"):
                    assert len(got[0][name]) == 8 // hosts
                    joined = np.concatenate([part[name] for part in got])
                    np.testing.assert_array_equal(joined, want[name])
            for part in parts:
                part.close()
    seen = np.concatenate([batch_indices(21, 8, s, 1) for s in range(21)])
    assert (np.bincount(seen) == 8).all()
    with pytest.raises(ValueError, match="does not divide among 3 hosts"):
        Batches(source, 8, 1, 0, 3)


def test_resume_gives_the_same_batches():
    source = PackedRows(store_of([5, 40, 3, 9, 17]), T, "documents", False, "data")
    with Batches(source, 3, seed=5) as first, Batches(source, 3, seed=5) as again:
        want = [first.at(step)["tokens"] for step in range(12)]
        for step in range(7, 12):
            np.testing.assert_array_equal(again.at(step)["tokens"], want[step])
        np.testing.assert_array_equal(again.at(2)["tokens"], want[2])  # back, too
        assert first.waited > 0


@pytest.mark.parametrize("pack", ["documents", "concat"])
def test_every_token_is_in_one_row(pack):
    lengths = [20, 3, 1, 8, 0, 5, 31, 2, 7]
    source = PackedRows(store_of(lengths), T, pack, False, "data")
    rows = all_rows(source)
    tokens, mask = rows["tokens"], rows["mask"]
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape[1] == T
    kept = np.sort(tokens[tokens > 0])
    assert len(set(kept)) == len(kept)
    missing = sum(lengths) - len(kept)
    assert missing <= (0 if pack == "concat" else 2)  # pieces of one token teach nothing
    assert not mask[:, 0].any() and not mask[tokens == 0].any()
    starts = 100 + np.cumsum([0, *lengths])[:-1]
    assert not mask[np.isin(tokens, starts)].any()
    # Where a token counts, the one before it is its predecessor in the document.
    row, place = np.nonzero(mask)
    assert (tokens[row, place] - tokens[row, place - 1] == 1).all()


def test_a_document_has_rows_of_its_own():
    rows = all_rows(PackedRows(store_of([19, 4, 8, 4]), T, "documents", False, "data"))
    tokens = {tuple(row) for row in rows["tokens"].tolist()}
    assert tuple(range(100, 108)) in tokens and tuple(range(108, 116)) in tokens
    assert tuple(range(123, 131)) in tokens  # the document of exactly one row
    joined = [*range(116, 123), 0]  # the first one's rest, and the next document
    assert tuple(joined) in tokens
    at = rows["tokens"].tolist().index(joined)
    assert rows["mask"][at].tolist() == [False, True, True, False, True, True, True, False]


def test_concat_is_the_stream_cut():
    rows = all_rows(PackedRows(store_of([19, 4, 8, 4]), T, "concat", False, "data"))
    np.testing.assert_array_equal(rows["tokens"].ravel()[:35], np.arange(100, 135))
    assert rows["mask"].ravel()[[19, 23, 31]].tolist() == [False] * 3
    assert rows["mask"].sum() == 35 - 5 - 3


def test_pieces_are_kept_whole_and_rows_well_filled():
    lengths = np.random.default_rng(0).integers(2, T + 1, 500)
    rows = fill_rows(lengths, T)
    sizes = np.bincount(rows, lengths)
    assert sizes.max() <= T and sizes.min() > 0
    assert sizes.mean() > 0.9 * T


def test_answers_only():
    flags = [np.zeros(20, bool), np.zeros(6, bool), np.zeros(9, bool)]
    flags[0][17:] = True  # the answer ends a document of two and a half rows
    flags[2][3] = True
    source = PackedRows(store_of([20, 6, 9], flags), T, "documents", True, "data")
    rows = all_rows(source)
    assert sorted(rows["tokens"][rows["mask"]]) == [117, 118, 119, 129]
    # Cut from the end: the answer has a full row before it.
    assert list(range(112, 120)) in rows["tokens"].tolist()
    assert source.num_rows == 2  # rows without an answer are left out
    starts, lengths = cut(np.array([0, 20]), T, "documents", from_end=True)
    assert starts.tolist() == [0, 4, 12] and lengths.tolist() == [4, 8, 8]
    with pytest.raises(ValueError, match="does not say which tokens are answers"):
        PackedRows(store_of([20]), T, "documents", True, "data")
    with pytest.raises(ValueError, match="no token of an answer"):
        PackedRows(store_of([6], [np.zeros(6, bool)]), T, "documents", True, "data")


def test_mixture_by_weight():
    big = PackedRows(store_of([T] * 30), T, "documents", False, "big")
    small = PackedRows(store_of([T] * 4), T, "documents", False, "small")
    mixed = Mixture([big, small], [3, 1])
    assert mixed.num_rows == 40
    tokens = all_rows(mixed)["tokens"]
    # Which source a row came from cannot be told by its ids alone, so ask the mixture's table.
    which = mixed._source
    assert np.bincount(which).tolist() == [30, 10]
    assert sorted(tokens[which == 0][:, 0]) == [100 + T * i for i in range(30)]
    counts = np.unique(tokens[which == 1][:, 0], return_counts=True)[1]
    assert len(counts) == 4 and counts.max() - counts.min() <= 1
    for start in range(0, 40, 4):
        assert which[start : start + 4].sum() == 1  # spread evenly
    assert mixed.fingerprint != Mixture([big, small], [1, 3]).fingerprint
    np.testing.assert_array_equal(mixed.rows(np.array([7, 3, 7]))["tokens"], tokens[[7, 3, 7]])
    with pytest.raises(ValueError, match="positive"):
        Mixture([big, small], [1, 0])


def test_generated_language():
    source = Generated("x", "train", 64, 256, 0)
    rows = source.rows(np.array([5, 0, 5]))
    np.testing.assert_array_equal(rows["tokens"][0], rows["tokens"][2])
    assert (rows["tokens"][0] != rows["tokens"][1]).any()
    text = bytes(rows["tokens"][0].astype(np.uint8).tolist()).decode()
    assert text == source.text(5) and text.count(" ") > 5
    held_out = Generated("x", "eval", 64, 256, 0)
    assert held_out.text(5) != text and held_out.fingerprint != source.fingerprint
    small = Generated("x", "train", 64, 61, 0).rows(np.arange(4))["tokens"]
    assert small.max() < 28
    with pytest.raises(ValueError, match="at least 28"):
        Generated("x", "train", 64, 27, 0)


def test_generated_language_is_learnable():
    # A table of what follows three letters knows most of it; letters alone do not.
    text = "".join(Generated("x", "train", 512, 256, 0).text(i) for i in range(60))
    after: dict[str, dict[str, int]] = {}
    for i in range(3, len(text)):
        at = after.setdefault(text[i - 3 : i], {})
        at[text[i]] = at.get(text[i], 0) + 1
    held_out = Generated("x", "eval", 512, 256, 0).text(0)
    right = [
        max(after[held_out[i - 3 : i]], key=after[held_out[i - 3 : i]].get) == held_out[i]
        for i in range(3, 512)
        if held_out[i - 3 : i] in after
    ]
    assert len(right) > 480 and np.mean(right) > 0.55


def test_a_generated_section():
    entry = SimpleNamespace(path="x", weight=1.0, kind="generated", field="text")
    section = SimpleNamespace(train=[entry], eval=[], pack="documents", answers_only=False)
    source = open_data(section, 32, 256, None, 0)
    rows = source.rows(np.arange(3))
    assert rows["tokens"].shape == (3, 32) and rows["mask"].sum() == 3 * 31
    with pytest.raises(ValueError, match="data.eval is empty"):
        open_data(section, 32, 256, None, 0, split="eval")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        open_data(section, 1, 256, None, 0)

"""Window losses, their mean whatever the batch size, and the float64 program's."""

import math

import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax.evals.drive import Run, run_task
from freqkv_jax.evals.engine import ModelEngine
from freqkv_jax.evals.perplexity import Perplexity, position_ranges
from freqkv_jax.evals.result import describe_model
from tests import oracle
from tests.evals.fakes import KV, MODEL, FakeEngine
from tests.tiny import random_params, random_tokens
from tests.tolerances import FLOAT64, LOSS, assert_close


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    monkeypatch.setattr("freqkv_jax.evals.result.code_revision", lambda: None)


def token_file(folder, tokens, sidecar=None):
    path = folder / "tokens.bin"
    np.asarray(tokens).astype("<u2").tofile(path)
    if sidecar is not None:
        path.with_suffix(".json").write_text(sidecar)
    return str(path)


def measure(data, engine=None, batch_size=1, **options):
    task = Perplexity(data=data, **options)
    return run_task(task, engine or FakeEngine(), Run(model_path="m", batch_size=batch_size))


def loss_of(tokens, start, end):
    return float(np.mean(np.asarray(tokens)[start + 1 : end] % 7))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 9])
def test_mean_over_windows_with_a_short_last_batch(tmp_path, batch_size):
    tokens = np.random.default_rng(0).integers(0, 61, 100)
    got = measure(token_file(tmp_path, tokens), batch_size=batch_size, seq_len=40, stride=12)
    starts = [0, 12, 24, 36]  # 48 is below 60 too, and is the one that is dropped
    want = [loss_of(tokens, s, s + 40) for s in starts]
    assert got["window_starts"] == starts and got["num_windows"] == 4
    assert_close(got["window_losses"], want, FLOAT64)
    assert_close(got["mean_loss"], np.mean(want), FLOAT64)
    assert_close(got["token_weighted_loss"], np.mean(want), FLOAT64)
    assert_close(got["perplexity"], math.exp(np.mean(want)), 100 * FLOAT64)
    assert_close(got["standard_error"], np.std(want, ddof=1) / 2, FLOAT64)
    assert got["protocol"] == "longlora-ppl-v1" and got["records"][1]["key"] == "window/1"
    even = np.mean([np.mean(tokens[s + 1 : s + 40] % 2 == 0) for s in starts])
    assert_close(got["accuracy"], even, FLOAT64)


def test_positions_and_the_last_tokens(tmp_path):
    tokens = np.arange(4000) % 61
    data = token_file(tmp_path, tokens)
    got = measure(data, seq_len=3000, stride=300)
    ranges = [(r["from"], r["to"]) for r in got["losses_by_position"]]
    assert ranges == [(1, 1024), (1024, 2048), (2048, 3000)]
    losses = np.array([tokens[s + 1 : s + 3000] % 7 for s in got["window_starts"]], float)
    want = [losses[:, low - 1 : high - 1].mean() for low, high in ranges]
    assert_close([r["loss"] for r in got["losses_by_position"]], want, FLOAT64)
    assert_close(got["last_1k_loss"], losses[:, -1024:].mean(), FLOAT64)
    assert_close(got["last_1k_perplexity"], math.exp(losses[:, -1024:].mean()), 1e-7)
    fine = measure(data, seq_len=3000, stride=300, position_bucket=500)["losses_by_position"]
    assert [r["from"] for r in fine] == [1, 500, 1000, 1500, 2000, 2500]
    assert_close(fine[1]["loss"], losses[:, 499:999].mean(), FLOAT64)


@pytest.mark.parametrize("bucket", [None, 1, 7, 1024])
def test_ranges_cover_every_place_once(bucket):
    for length in (1, 5, 1023, 1024, 2047, 2048, 5000):
        ranges = position_ranges(length, bucket)
        assert ranges[0][0] == 1 and ranges[-1][1] == length + 1
        assert all(a[1] == b[0] and a[0] < a[1] for a, b in zip(ranges, ranges[1:], strict=False))


def test_documents(tmp_path):
    tokens = np.random.default_rng(1).integers(0, 61, 100)
    data = token_file(tmp_path, tokens, '{"offsets": [0, 30, 31, 31, 85, 100], "name": "x"}')
    got = measure(data, documents=True, seq_len=20, stride=10)
    # The second document has one token and the third none; the last is shorter than a window.
    want = {0: [(0, 20), (10, 30)], 3: [(31, 51), (41, 61), (51, 71), (61, 81)], 4: [(85, 100)]}
    places = [place for windows in want.values() for place in windows]
    assert got["window_starts"] == [start for start, _ in places]
    losses = [loss_of(tokens, *place) for place in places]
    assert_close(got["window_losses"], losses, FLOAT64)
    counts = [end - start - 1 for start, end in places]
    assert_close(got["token_weighted_loss"], np.average(losses, weights=counts), FLOAT64)
    assert_close(got["mean_loss"], np.mean(losses), FLOAT64)
    rows = got["document_losses"]
    own = [np.mean([loss_of(tokens, *p) for p in windows]) for windows in want.values()]
    assert [row["document"] for row in rows] == [0, 3, 4]
    assert [row["num_tokens"] for row in rows] == [30, 54, 15]
    assert_close([row["loss"] for row in rows], own, FLOAT64)
    assert_close(got["document_mean_loss"], np.mean(own), FLOAT64)
    assert got["protocol"] != "longlora-ppl-v1" and got["data"]["num_documents"] == 5
    rounds = got["num_compressions"]
    assert (rounds["min"], rounds["max"]) == (0, KV.num_compressions(20))


def test_numbers_that_are_one_where_windows_are_alike(tmp_path):
    got = measure(token_file(tmp_path, range(60)), seq_len=40, stride=5)
    assert got["num_compressions"] == KV.num_compressions(40) > 0
    assert got["kv_bytes"] == 2 * 16 * 2 * 2 * 8 * 4  # K and V, slots, layers, heads, D, bytes


def test_literal_base(tmp_path):
    data = token_file(tmp_path, np.arange(100) % 61)
    exact = measure(data, seq_len=40, stride=12)
    got = measure(data, seq_len=40, stride=12, base_literal=True)
    assert got["mean_loss"] == exact["mean_loss"]
    assert got["perplexity"] == 2.71828 ** got["mean_loss"] != exact["perplexity"]


@pytest.mark.slow  # tests/cli/test_eval.py does the same by the command line
@pytest.mark.parametrize("batch_size", [1, 2])
def test_against_the_oracle(tmp_path, batch_size):
    params, tokens = random_params(MODEL.config), random_tokens(MODEL.config, 1, 70)[0]
    engine = ModelEngine(MODEL, params, rows=batch_size)
    data = token_file(tmp_path, tokens)
    got = measure(data, engine, batch_size, seq_len=45, stride=8)
    policy = oracle.from_policy(KV)
    windows = [tokens[None, start : start + 45] for start in (0, 8, 16)]
    logits = [oracle.logits(MODEL.config, params, policy, w) for w in windows]
    want = [oracle.mean_loss(x, w) for x, w in zip(logits, windows, strict=True)]
    assert got["window_starts"] == [0, 8, 16]
    assert_close(got["window_losses"], want, LOSS)
    assert_close(got["mean_loss"], np.mean(want), LOSS)
    hits = [np.argmax(x[0, :-1], -1) == w[0, 1:] for x, w in zip(logits, windows, strict=True)]
    assert_close(got["accuracy"], np.mean(hits), FLOAT64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 99}, "holds 100 tokens"),
        ({"seq_len": 1}, "--seq-len must be at least 2"),
        ({"documents": True}, r"where documents begin in .* is not known; put a \.json"),
        ({"max_windows": 0}, "--max-windows must be at least 1, got 0"),
        ({"position_bucket": 0}, "--position-bucket must be at least 1"),
        ({"add_bos": True}, "--add-bos is for texts"),
    ],
)
def test_mistakes(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        measure(token_file(tmp_path, np.arange(100) % 61), **options)


def test_weights_that_are_not_numbers(tmp_path):
    class Broken(FakeEngine):
        def log_probs(self, contexts, continuations):
            return [(np.full(len(c), np.nan), np.zeros(len(c), bool)) for c in continuations]

    with pytest.raises(ValueError, match="all 7 items failed.*the loss is nan.*--dtype float32"):
        measure(token_file(tmp_path, np.arange(100) % 61), Broken(), seq_len=40, stride=8)


def test_description():
    got = describe_model(MODEL)
    assert got["policy"]["policy"] == "freqkv" and got["policy"]["cache_size"] == 16
    assert got["retain_ratio_effective"] == 0.5 and got["dtype"] == "float32"
    assert describe_model(MODEL.clone(kv=fk.FullConfig()))["retain_ratio_effective"] is None

"""Window losses, their mean whatever the batch size, and the float64 program's."""

import math

import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax.evals import perplexity as module
from freqkv_jax.evals.perplexity import describe_model, losses_by_position, perplexity
from freqkv_jax.model.llama import Llama
from tests import oracle
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import FLOAT64, LOSS, assert_close

CONFIG = tiny_config()
KV = fk.FreqKVConfig(cache_size=16, sink_size=2)
MODEL = Llama(CONFIG, KV)


@pytest.fixture
def shapes(monkeypatch):
    """Puts known log-probabilities in place of a model; returns the shapes asked for."""
    asked = []

    def fake(model, params, windows):
        asked.append(windows.shape)
        return -(windows[:, 1:] % 7).astype(np.float32)

    monkeypatch.setattr(module, "score", fake)
    return asked


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 9])
def test_mean_over_windows_with_a_short_last_batch(shapes, batch_size):
    tokens = np.random.default_rng(0).integers(0, 61, 100)
    got = perplexity(MODEL, None, tokens, seq_len=40, stride=12, batch_size=batch_size)
    starts = [0, 12, 24, 36]  # 48 is below 60 too, and is the one that is dropped
    want = [float(np.mean(tokens[s + 1 : s + 40] % 7)) for s in starts]
    assert got["window_starts"] == starts and got["num_windows"] == 4
    assert_close(got["window_losses"], want, FLOAT64)
    assert_close(got["mean_loss"], np.mean(want), FLOAT64)
    assert_close(got["perplexity"], math.exp(np.mean(want)), 100 * FLOAT64)
    assert_close(got["standard_error"], np.std(want, ddof=1) / 2, FLOAT64)
    assert set(shapes) == {(batch_size, 40)}, "a short batch must not compile a program of its own"


def test_progress_and_place(shapes):
    done = []
    got = perplexity(
        MODEL, None, np.arange(3000) % 61, 1500, 500, batch_size=2,
        on_progress=lambda *now: done.append(now),
    )  # fmt: skip
    assert done == [(2, 2)]
    ranges = [(r["from"], r["to"]) for r in got["losses_by_position"]]
    assert ranges == [(1, 1024), (1024, 1500)]
    weights = np.array([1023, 476])
    mean = np.dot(weights, [r["loss"] for r in got["losses_by_position"]]) / weights.sum()
    assert_close(mean, got["mean_loss"], FLOAT64)


def test_ranges_cover_every_place_once():
    for length in (1, 5, 1023, 1024, 2047, 2048, 5000):
        ranges = losses_by_position(np.arange(float(length)))
        assert ranges[0]["from"] == 1 and ranges[-1]["to"] == length + 1
        assert all(a["to"] == b["from"] for a, b in zip(ranges, ranges[1:], strict=False))


def test_against_the_oracle():
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 1, 70)[0]
    got = perplexity(MODEL, params, tokens, seq_len=45, stride=8, batch_size=2)
    policy = oracle.from_policy(KV)
    windows = [tokens[None, start : start + 45] for start in (0, 8, 16)]
    want = [oracle.mean_loss(oracle.logits(CONFIG, params, policy, w), w) for w in windows]
    assert got["window_starts"] == [0, 8, 16]
    assert_close(got["window_losses"], want, LOSS)
    assert_close(got["mean_loss"], np.mean(want), LOSS)
    assert got["num_compressions"] == KV.num_compressions(45) > 0
    assert got["kv_bytes"] == 2 * 16 * 2 * 2 * 8 * 4  # K and V, slots, layers, heads, D, bytes


def test_errors(shapes):
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        perplexity(MODEL, None, np.arange(100), 40, batch_size=0)
    with pytest.raises(ValueError, match="holds 100 tokens"):
        perplexity(MODEL, None, np.arange(100), 99)


def test_weights_that_are_not_numbers(monkeypatch):
    monkeypatch.setattr(module, "score", lambda m, p, w: np.full((len(w), w.shape[1] - 1), np.nan))
    with pytest.raises(ValueError, match="the loss is nan.*--dtype float32"):
        perplexity(MODEL, None, np.arange(100), 40, 8)


def test_description():
    got = describe_model(MODEL)
    assert got["policy"]["policy"] == "freqkv" and got["policy"]["cache_size"] == 16
    assert got["retain_ratio_effective"] == 0.5 and got["dtype"] == "float32"
    assert describe_model(MODEL.clone(kv=fk.FullConfig()))["retain_ratio_effective"] is None

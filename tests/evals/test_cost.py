"""Costs of a tiny model: what is counted, what is left out, and how rounds are charged."""

import dataclasses
import json

import jax
import pytest

import freqkv_jax as fk
from freqkv_jax.evals import cost
from freqkv_jax.evals.cost import Cost
from freqkv_jax.evals.perplexity import Perplexity
from freqkv_jax.evals.task import measures_time
from freqkv_jax.model.llama import Llama
from tests.tiny import random_params, tiny_config
from tests.tolerances import FLOAT64, assert_close

CONFIG = tiny_config(num_layers=1)


@dataclasses.dataclass
class FakeEngine:
    model: Llama
    params: dict


def engine(kv, config=CONFIG):
    return FakeEngine(Llama(config, kv), random_params(config))


def test_items_are_short_first():
    items = Cost(lengths=(300, 20, 300, 1000)).items(engine(fk.FullConfig()))
    assert [item.length for item in items] == [20, 300, 1000]
    assert sorted(items, key=lambda item: item.group) == items, "also in the order of groups"
    assert len({item.group for item in items}) == 3, "nothing is timed beside something else"


def test_the_device_belongs_to_the_run():
    assert measures_time(Cost()) and not measures_time(Perplexity(data="d", seq_len=2))


def test_costs_of_a_bounded_cache():
    kv = fk.FreqKVConfig(cache_size=24, sink_size=2)
    task = Cost(lengths=(40, 20), new_tokens=8, single_steps=25, repeats=2, rows=2)
    one = engine(kv)
    items = task.items(one)
    records = task.run(one, items[1:]) + task.run(one, items[:1])
    got = json.loads(json.dumps(task.summarize(one, records), allow_nan=False))
    rows = got["costs"]
    assert [row["tokens_read"] for row in rows] == [20, 40]
    for row in rows:
        assert row["kv_bytes_measured"] == row["kv_bytes_reckoned"] == 2 * 24 * 2 * 2 * 8 * 4
        assert len(row["first_token_times_s"]) == 2 and row["first_token_s"] > 0
        assert row["step_ms"]["p99"] >= row["step_ms"]["p50"] > 0
        assert row["round_ms"]["count"] == row["step_with_round_ms"]["count"] == 5
        assert_close(row["ms_per_token_of_rounds"], row["round_ms"]["p50"] / kv.chunk, FLOAT64)
        assert row["ms_per_token"] >= row["ms_per_token_of_rounds"]
        assert_close(row["decode_tokens_per_s"] * row["ms_per_token"], 2000.0, 1e-6)
        assert row["compile_s"] > 0 and row["peak_bytes"] > 0 and not row["beyond_native_window"]
    # 25 single steps from a fill of 48 read tokens: fill 23; one step, then rounds at every 11.
    assert kv.fill_after(48) == 15 and rows[1]["step_ms"]["count"] == 25 - 2
    assert [row[0] for row in got["table"]["rows"]] == ["20", "40"]
    assert {len(row) for row in got["table"]["rows"]} == {len(got["table"]["columns"])}


def test_an_unbounded_cache_is_marked_beyond_its_window():
    config = tiny_config(num_layers=1, max_position_embeddings=64)
    task = Cost(lengths=(60,), new_tokens=4, single_steps=2, repeats=1)
    one = engine(fk.FullConfig(), config)
    (record,) = task.run(one, task.items(one))
    assert record["beyond_native_window"] and "round_ms" not in record
    assert record["ms_per_token_of_rounds"] == 0
    assert record["kv_bytes_measured"] >= record["kv_bytes_reckoned"] == 66 * 2 * 2 * 8 * 4
    assert task.summarize(one, [record])["table"]["rows"][0][0] == "60 (beyond the native window)"


def test_rounds_that_fell_into_the_timed_tokens_are_charged_evenly():
    kv = fk.FreqKVConfig(cache_size=24, sink_size=2)
    task = Cost(lengths=(20,), new_tokens=10)
    watch = cost._Stopwatch(task, engine(kv), 20)
    # 10 tokens took 100 ms, of which one round 20: 8 ms a token, and 20 for every 11 tokens.
    got = watch._speed([0.1, 0.1, 9.0], {"round_ms": {"p50": 20.0}})
    assert_close(got["ms_per_token"], 8 + 20 / 11, 1e-9)
    assert watch._speed([0.1], {})["ms_per_token"] == pytest.approx(10)


def test_what_does_not_fit_is_said_in_words(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(cost, "prefill", full)
    one = engine(fk.FullConfig())
    task = Cost(lengths=(131072,))
    with pytest.raises(MemoryError, match="131,072 tokens do not fit"):
        task.run(one, task.items(one))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": ()}, "--lengths must be numbers of at least 2"),
        ({"lengths": (1,)}, "at least 2"),
        ({"new_tokens": 0}, "--new-tokens must be at least 1, got 0"),
        ({"repeats": 0}, "--repeats"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Cost(**options)

"""Made-up results for the tests of the report."""

import numpy as np

from freqkv_jax.evals.report_runs import Run
from tests.tiny import tiny_config

MODEL = tiny_config().to_hf() | {"max_position_embeddings": 256}
POLICIES = {
    "full": {"policy": "full"},
    "freqkv": {"policy": "freqkv", "cache_size": 64, "sink_size": 4, "recent_size": 0},
    "window": {"policy": "sink_window", "cache_size": 64},
    "large": {"policy": "freqkv", "cache_size": 128},
}
MEANS = {"full": 3.0, "freqkv": 3.2, "window": 3.1, "large": 3.05}


def result(task, policy, records=(), **more):
    config = {
        "model_path": "/models/tiny", "adapter": None, "dtype": "float32", "batch_size": 2,
        "policy": POLICIES[policy], "model": MODEL,
    }  # fmt: skip
    config |= more.pop("config", {})
    return {
        "task": task, "protocol": f"{task}-v1", "config": config, "data": {"sha256": "ab" * 32},
        "records": list(records), "num_items": len(records), "num_failed": 0,
        "num_compressions": {"min": 1, "mean": 1, "max": 1},
        "device": {"kind": "cpu"}, "versions": {"freqkv-jax": "0.1.0"}, "seconds": 1.0,
    } | more  # fmt: skip


def perplexity(policy, seq_len=128, seed=1, offset=0.0, **more):
    shared = np.random.default_rng(seq_len).normal(0, 0.3, 40)
    own = np.random.default_rng([seed, len(policy)]).normal(0, 0.01, 40)
    losses = (MEANS[policy] + offset + shared + own).tolist()
    records = [
        {"key": f"window/{i}", "start": i * seq_len, "length": seq_len, "loss": x}
        for i, x in enumerate(losses)
    ]
    more = {"config": {"seq_len": seq_len, "stride": 64} | more.pop("config", {})} | more
    more |= {"window_starts": [r["start"] for r in records]}
    edges = [(1, 64), (64, seq_len)]
    more["losses_by_position"] = [{"from": a, "to": b, "loss": 3.0} for a, b in edges]
    return result("perplexity", policy, records, **more)


def runs_of(*results):
    return [Run(f"/results/{i}.json", data) for i, data in enumerate(results)]


def passkey(policy, nats, **more):
    lengths = {128: nats, 512: nats + 2}
    records = [
        {"key": f"{n}/50/{i}", "length": n, "length_target": n, "nats_per_digit": x + i - 0.5,
         "score": 0.0, "scores": {"greedy": 0.0}, "depth": 50}
        for n, x in lengths.items() for i in range(2)
    ]  # fmt: skip
    return result("needle", policy, records, nats_per_digit=nats + 1, **more)

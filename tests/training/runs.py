"""Configs of runs on the tiny test model, and runs of a model of one layer on disk."""

from freqkv_jax.training.metrics import read_lines
from freqkv_jax.training.schema import RunConfig, from_dict

KV = {"policy": "freqkv", "cache_size": 16, "sink_size": 2}


def run_config(optimizer=None, mesh=None, **train) -> RunConfig:
    """FreqKV with 16 slots on rows of 41 tokens: at least three compressions."""
    return from_dict(
        {
            "run": {"dir": "unused"},
            "model": {"path": "tiny", "dtype": "float32"},
            "kv": {"policy": "freqkv", "cache_size": 16},
            "data": {"train": ["unused"]},
            "mesh": mesh or {},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2} | (optimizer or {}),
            "train": {"steps": 20, "batch_size": 8, "seq_len": 41} | train,
        }
    )


def raw(base, folder, **sections):
    tree = {
        "run": {"dir": str(folder)},
        "model": {"path": str(base), "dtype": "float32"},
        "kv": KV,
        "data": {"train": [{"path": "train", "kind": "generated"}]},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {"mode": "norms", "steps": 6, "batch_size": 8, "seq_len": 32, "remat": "none"},
        "checkpoint": {"every": 2},
        "log": {"tensorboard": False},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return tree


def run(base, folder, **sections):
    from freqkv_jax.training.loop import train

    return train(from_dict(raw(base, folder, **sections)))


def losses(folder):
    return [r["loss"] for r in read_lines(folder / "metrics.jsonl") if "loss" in r]

"""Configs of runs on the tiny test model."""

from freqkv_jax.training.schema import RunConfig, from_dict


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

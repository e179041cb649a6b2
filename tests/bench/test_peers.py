"""Hugging Face torch beside the other rows."""

import argparse

import pytest

from freqkv_jax.cli.bench import run_peers
from tests.tiny import tiny_config


@pytest.mark.parametrize("batch", [None, 2])
def test_rows_of_the_peers(batch):
    """In a process of its own, as --peers runs them; torch.compile is left out (a minute)."""
    pytest.importorskip("torch")
    config = tiny_config(max_position_embeddings=256)
    args = argparse.Namespace(batch=batch, dtype="float32", repeats=5, budget=100)
    rows = run_peers(args, config, (40,), ("prefill", "forward"))
    (row,) = rows
    assert row["case"] == "forward/hf-eager/40" and row["batch"] == (batch or 1)
    assert len(row["times_ms"]) == 5 and row["ms"] > 0 and row["torch"]

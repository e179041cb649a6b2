"""`python eval.py perplexity` end to end."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from freqkv_jax.cli import main
from freqkv_jax.config import LlamaConfig
from tests import oracle
from tests.hf_names import to_params
from tests.model_folder import VOCAB_SIZE
from tests.tolerances import LOSS, assert_close

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tokens(tmp_path):
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 110)
    ids.astype("<u2").tofile(tmp_path / "tokens.bin")
    return ids


def want_losses(folder, policy, tokens, starts, seq_len):
    config = LlamaConfig.from_hf(json.loads((Path(folder) / "config.json").read_text()))
    params = to_params(load_file(Path(folder) / "model.safetensors"), config)
    windows = [tokens[None, s : s + seq_len] for s in starts]
    return [oracle.mean_loss(oracle.logits(config, params, policy, w), w) for w in windows]


def test_as_a_program_without_a_tokenizer(bare_folder, tokens, tmp_path):
    words = [sys.executable, "eval.py", "perplexity", "--model", bare_folder, "--data",
             str(tmp_path / "tokens.bin"), "--seq-len", "60", "--stride", "16", "--cache-size",
             "24", "--sink-size", "2", "--recent-size", "3", "--retain-ratio", "0.6",
             "--output", str(tmp_path / "new" / "out.json")]  # fmt: skip
    env = os.environ | {"FREQKV_NO_COMPILE_CACHE": "1"}
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert run.returncode == 0, run.stderr
    got = json.loads((tmp_path / "new" / "out.json").read_text())
    starts = [0, 16, 32]
    policy = oracle.OraclePolicy(24, 2, 3, 0.6)
    want = want_losses(bare_folder, policy, tokens, starts, 60)
    assert got["window_starts"] == starts and got["num_windows"] == 3
    assert_close(got["window_losses"], want, LOSS)
    assert_close(got["mean_loss"], np.mean(want), LOSS)
    assert got["perplexity"] == pytest.approx(math.exp(got["mean_loss"]))
    assert got["num_compressions"] == math.ceil((60 - 24) / (19 - 11))
    assert f"perplexity        {got['perplexity']:.4f}" in run.stdout
    assert got["task"] == "perplexity" and got["protocol"] == "longlora-ppl-v1"
    assert got["config"]["policy"] == {
        "policy": "freqkv", "cache_size": 24, "sink_size": 2, "recent_size": 3,
        "retain_ratio": 0.6, "method": "matmul",
    }  # fmt: skip
    assert got["config"]["dtype"] == "float32" and got["config"]["seq_len"] == 60
    assert got["data"]["token_dtype"] == "uint16" and got["data"]["num_tokens"] == 110
    assert got["versions"]["jax"] and got["device"]["platform"] == "cpu"
    assert got["model_fingerprint"] and "perplexity" in got["command"]


@pytest.mark.parametrize("policy", ["full", "sink_window"])
def test_policies_and_batches(bare_folder, tokens, tmp_path, policy, capsys):
    output = tmp_path / "out.json"
    words = ["eval", "perplexity", "--model", bare_folder, "--data", str(tmp_path / "tokens.bin"),
             "--seq-len", "60", "--stride", "16", "--cache-size", "24", "--batch-size", "2",
             "--policy", policy, "--output", str(output)]  # fmt: skip
    assert main(words) == 0
    size = None if policy == "full" else 24
    chosen = oracle.OraclePolicy(size, window=policy == "sink_window")
    want = want_losses(bare_folder, chosen, tokens, [0, 16, 32], 60)
    got = json.loads(output.read_text())
    assert_close(got["window_losses"], want, LOSS)
    assert ("no compression" in capsys.readouterr().out) == (policy == "full")


def test_text(model_folder, tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("It was a dark and stormy night, and the cache was full. " * 2)
    words = ["eval", "perplexity", "--model", model_folder, "--data", str(book), "--seq-len", "60",
             "--stride", "16", "--max-windows", "1", "--cache-size", "24", "--batch-size", "2",
             "--policy", "sink_window"]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr()
    assert "windows           1\n" in out.out and "1 windows of 60 tokens" in out.err


def test_bfloat16(bare_folder, tokens, tmp_path, capsys):
    words = ["eval", "perplexity", "--model", bare_folder, "--data", str(tmp_path / "tokens.bin"),
             "--seq-len", "60", "--stride", "16", "--dtype", "bfloat16"]  # fmt: skip
    assert main(words) == 0
    assert "(bfloat16)" in capsys.readouterr().err


BAD = {
    "short": (["--seq-len", "110"], "the data holds 110 tokens"),
    "one predicted": (["--seq-len", "1"], "--seq-len must be at least 2"),
    "dtype": (["--token-dtype", "uint32", "--seq-len", "20", "--stride", "4"], "token id"),
    "no file": (["--data", "none.bin"], "none.bin"),
    "text, no tokenizer": (["--data", str(ROOT / "LICENSE")], "tokenizer"),
    "ratio": (["--retain-ratio", "1.5"], "retain_ratio must be in [0, 1)"),
    "output": (["--output", "."], "is a folder; give a file name"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(bare_folder, tokens, tmp_path, capsys, case):
    words, message = BAD[case]
    output = tmp_path / "out.json"
    flags = ["--data", str(tmp_path / "tokens.bin"), "--output", str(output)]
    assert main(["eval", "perplexity", "--model", bare_folder, *flags, *words]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("freqkv eval: error: ") and message in last
    assert not output.exists()

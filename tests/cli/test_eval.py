"""`python eval.py perplexity` end to end."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from freqkv_jax.cli import eval as eval_command
from freqkv_jax.cli import main
from freqkv_jax.config import LlamaConfig
from freqkv_jax.evals.registry import TASKS
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
    assert "windows           1\n" in out.out and "1 items of 60 tokens" in out.err


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


def test_a_result_is_not_overwritten(bare_folder, tokens, tmp_path, capsys):
    output = tmp_path / "out.json"
    words = [
        "eval",
        "perplexity",
        "--model",
        bare_folder,
        "--data",
        str(tmp_path / "tokens.bin"),
        "--seq-len",
        "60",
        "--stride",
        "16",
        "--cache-size",
        "24",
        "--output",
        str(output),
    ]
    assert main([*words, "--limit", "1"]) == 0
    first, shown = output.read_text(), capsys.readouterr().out
    assert main([*words, "--limit", "1"]) == 0
    assert "holds this run's result already" in capsys.readouterr().err
    assert output.read_text() == first and "windows           1\n" in shown
    assert main(words) == 2
    assert "is the result of another run" in capsys.readouterr().err
    assert output.read_text() == first
    assert main([*words, "--force"]) == 0
    assert json.loads(output.read_text())["num_items"] == 3


def test_documents_of_a_folder(model_folder, tmp_path, capsys):
    for name, count in (("b.txt", 3), ("a.txt", 1)):
        (tmp_path / name).write_text("A quick brown fox and a lazy dog. " * count)
    words = ["eval", "perplexity", "--model", model_folder, "--data", str(tmp_path), "--documents",
             "--seq-len", "60", "--stride", "40", "--cache-size", "24", "--add-bos",
              "--output", str(tmp_path / "out.json")]  # fmt: skip
    assert main(words) == 0
    got = json.loads((tmp_path / "out.json").read_text())
    rows = got["document_losses"]
    assert [(r["name"], r["num_tokens"], r["num_windows"]) for r in rows] == [
        ("a.txt", 35, 1), ("b.txt", 103, 2),
    ]  # fmt: skip
    assert got["data"]["num_documents"] == 2 and got["window_starts"] == [0, 35, 75]
    out = capsys.readouterr().out
    assert "a.txt" in out and "compressions      2 to 4 (mean 3.3) a window" in out


SUITE = """
common: {dtype: float32}
models: {tiny: {}}
policies:
  freqkv: {cache_size: 24}
  full: {policy: full}
runs:
  - {task: perplexity, options: {stride: 16}, grid: {seq_len: [60]}}
  - {task: perplexity, name: long, policies: full, options: {stride: 16, seq_len: 500}}
"""


def test_suite(bare_folder, tokens, tmp_path, capsys, monkeypatch):
    (tmp_path / "my.yaml").write_text(SUITE)
    words = ["eval", "--suite", str(tmp_path / "my.yaml"), "--model", bare_folder, "--output",
             str(tmp_path / "results"), "--set", f"data={tmp_path / 'tokens.bin'}"]  # fmt: skip
    assert main(words) == 1, "one cell is longer than the text"
    out = capsys.readouterr()
    files = sorted((tmp_path / "results").iterdir())
    assert [f.name for f in files] == [
        "perplexity-tiny-freqkv-seq_len60.json", "perplexity-tiny-full-seq_len60.json",
    ]  # fmt: skip
    got = json.loads(files[0].read_text())
    want = want_losses(bare_folder, oracle.OraclePolicy(24), tokens, [0, 16, 32], 60)
    assert_close(got["window_losses"], want, LOSS)
    assert got["config"]["policy_name"] == "freqkv" and got["config"]["model_name"] == "tiny"
    table = {line.split()[0]: line for line in out.out.splitlines()}
    assert f"{got['perplexity']:.4f}" in table["perplexity-tiny-freqkv-seq_len60"]
    assert "nothing compressed" in table["perplexity-tiny-full-seq_len60"]
    assert "failed: the data holds 110 tokens" in table["long-tiny-full"]
    before = [file.read_bytes() for file in files]
    # What is done needs no weights; the cell that failed comes last.
    monkeypatch.setattr("freqkv_jax.load_pretrained", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(words)
    assert capsys.readouterr().err.count("holds this run's result already") == 2
    assert main([*words, "--only", "perplexity-*"]) == 0
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(ZeroDivisionError):
        main([*words, "--only", "perplexity-*", "--force"])
    assert main([*words, "--only", "needle-*"]) == 2
    assert "'needle-*' matches no cell" in capsys.readouterr().err


def test_each_model_of_a_suite_has_its_own_tokenizer(monkeypatch):
    monkeypatch.setattr("freqkv_jax.load_tokenizer", lambda path: [path])
    runner = eval_command._SuiteRunner(argparse.Namespace())
    first = runner._tokenizer("a")
    assert first == ["a"] and runner._tokenizer("a") is first, "read once"
    assert runner._tokenizer("b") == ["b"]


USAGE = {
    "task": (["perplexty"], "no task is named 'perplexty'; did you mean 'perplexity'"),
    "flag": (["perplexity", "--model", "m", "--data", "d", "--strid", "3"],
             "unknown flag --strid; did you mean '--stride'"),
    "flag with value": (["needle", "--model", "m", "--depth=3"], "did you mean '--depths'"),
    "flags before": (["--output", "r.json", "--limit", "5", "perplexity", "--model", "m"],
                     "--limit, --output before the task perplexity would not count"),
    "force before": (["--force", "needle", "--model", "m"], "--force before the task needle"),
    "suite and task": (["--suite", "small", "perplexity", "--model", "m"],
                       "--suite before the task perplexity"),
    "no data": (["perplexity", "--model", "m"], "required: --data"),
}  # fmt: skip


def test_costs_are_printed_by_their_table_alone(bare_folder, capsys):
    words = ["eval", "cost", "--model", bare_folder, "--lengths", "20", "--new-tokens", "2",
             "--single-steps", "1", "--repeats", "1", "--cache-size", "24"]  # fmt: skip
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "prefill tokens/s" in lines[0] and any(line.startswith("seconds ") for line in lines)
    assert not any(line.startswith(("KV cache", "tokens/s")) for line in lines)


@pytest.mark.parametrize("case", USAGE)
def test_usage(case, capsys):
    words, message = USAGE[case]
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_help_of_every_task(task, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", task, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "task options" in out and "--cache-size" in out


def test_neither_task_nor_suite(capsys):
    assert main(["eval"]) == 2
    assert "give a TASK (perplexity, needle" in capsys.readouterr().err


@pytest.mark.slow
def test_sigkill_in_a_suite(bare_folder, tokens, tmp_path):
    """Killed again and again, the suite ends with what an unbroken run gives."""
    suite = SUITE.replace("seq_len: 500", "seq_len: 90").replace("stride: 16", "stride: 1")
    (tmp_path / "my.yaml").write_text(suite)
    env = os.environ | {"FREQKV_NO_COMPILE_CACHE": "1"}

    def command(folder):
        words = [sys.executable, "eval.py", "--suite", str(tmp_path / "my.yaml"), "--model",
                 bare_folder, "--output", str(tmp_path / folder), "--set",
                 f"data={tmp_path / 'tokens.bin'}"]  # fmt: skip
        return subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                cwd=ROOT, env=env)  # fmt: skip

    def lines():
        files = (tmp_path / "b").glob("*.partial")
        return sum(len(file.read_bytes().splitlines()) for file in files)

    assert command("a").wait(300) == 0
    for more in (5, 30):
        start, process = lines(), command("b")
        while process.poll() is None and lines() < start + more:
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert list((tmp_path / "b").glob("*.partial")), "it was killed before its end"
    assert command("b").wait(300) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        a, b = (json.loads((tmp_path / x / name).read_text()) for x in "ab")
        assert a["records"] == b["records"] and a["mean_loss"] == b["mean_loss"]


@pytest.mark.parametrize("case", BAD)
def test_errors(bare_folder, tokens, tmp_path, capsys, case):
    words, message = BAD[case]
    output = tmp_path / "out.json"
    flags = ["--data", str(tmp_path / "tokens.bin"), "--output", str(output)]
    assert main(["eval", "perplexity", "--model", bare_folder, *flags, *words]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("freqkv eval: error: ") and message in last
    assert not output.exists()

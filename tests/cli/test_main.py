"""Help that a newcomer can act on, and errors in one line with exit status 2."""

import os
import subprocess
import sys

import pytest

from freqkv_jax import cli
from freqkv_jax.cli import COMMANDS, main
from freqkv_jax.kv import POLICIES


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help(capsys):
    text = help_of(capsys)
    for name, summary in COMMANDS.items():
        assert name in text and summary in " ".join(text.split())
    assert "freqkv info MODEL" in text and ".gguf" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys, command):
    text = help_of(capsys, command)
    assert f"usage: freqkv {command}" in text
    # More than the flags: a sentence that says what it does.
    assert len(text.split("\n\n")[1].split()) > 5


def test_help_of_perplexity(capsys):
    text = help_of(capsys, "eval", "perplexity")
    for flag in ("--data", "--seq-len", "--stride", "--max-windows", "--policy", "--output"):
        assert flag in text
    assert "8192" in text and "token ids" in text
    assert "example" in help_of(capsys, "eval")


def test_policies_come_from_the_registry(capsys):
    text = help_of(capsys, "generate")
    assert "{" + ",".join(POLICIES) + "}" in text


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["generate"], ["eval", "x"], ["generate", "--mod"]]
)
def test_wrong_usage(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "freqkv" in capsys.readouterr().err


BAD = {
    "no such model": (["generate", "--model", "./none", "--prompt", "x"], "none"),
    "no policy": (["generate", "--cache-size", "0"], "cache_size"),
    "sinks fill the cache": (["generate", "--cache-size", "4"], "sink_size"),
    "nothing is freed": (["generate", "--retain-ratio", "1"], "retain_ratio must be in [0, 1)"),
    "mesh": (["generate", "--mesh", "data=x"], "--mesh 'data=x'"),
    "mesh too large": (["generate", "--mesh", "data=99"], "99"),
    "heads not divided": (["generate", "--mesh", "tensor=8"], "8"),
    "empty prompt": (["generate", "--prompt", ""], "--prompt is empty"),
    "system without chat": (["generate", "--system", "s"], "--chat"),
    "negative tokens": (["generate", "--max-new-tokens", "-1"], "-1"),
    "temperature": (["generate", "--temperature", "-1"], "temperature"),
    "top p": (["generate", "--temperature", "1", "--top-p", "0"], "top_p"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_in_one_line(capsys, model_folder, case):
    words, message = BAD[case]
    if "--model" not in words:
        words = [*words, "--model", model_folder]
    if "--prompt" not in words:
        words = [*words, "--prompt", "hello"]
    assert main(words) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert "Traceback" not in out.err
    last = out.err.splitlines()[-1]
    assert last.startswith("freqkv generate: error: ") and message in last
    errors = [
        line for line in out.err.splitlines() if not line.startswith(("loading ", "prompt: "))
    ]
    assert len(errors) == 1


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(capsys, place):
    words = ["generate", "--model", "./none", "--prompt", "x"]
    words = ["--debug", *words] if place == "before" else [*words, "--debug"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "freqkv generate: error: " in err.splitlines()[-1]


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def broken(name):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info", "x"])


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (MemoryError("needs 3 GiB"), 2, "error: needs 3 GiB"),
        (KeyError("policy"), 2, "error: policy"),
        (ValueError("two\nlines"), 2, "error: two lines"),
        (RuntimeError("RESOURCE_EXHAUSTED: 5 GiB"), 2, "ran out of memory"),
    ],
)
def test_what_a_command_raises(monkeypatch, capsys, error, status, text):
    from freqkv_jax.cli import generate

    def run(args):
        raise error

    monkeypatch.setattr(generate, "run", run)
    assert main(["generate", "--model", "m", "--prompt", "x"]) == status
    err = capsys.readouterr().err
    assert text in err and len(err.splitlines()) == 1


def test_as_a_program():
    env = os.environ | {"FREQKV_NO_COMPILE_CACHE": "1"}
    words = [sys.executable, "-m", "freqkv_jax", "generate", "--model", "./none", "--prompt", "x"]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    assert run.returncode == 2
    assert run.stderr.startswith("freqkv generate: error: ") and run.stderr.count("\n") == 1

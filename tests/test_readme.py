"""What the README says holds: its table is current, its commands run, its Python too."""

import io
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

import freqkv_jax as fk
from freqkv_jax import readme
from freqkv_jax.kv import POLICIES
from tests.model_folder import write_model_folder
from tests.tolerances import BF16_LOSS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def blocks(language: str) -> list[str]:
    """The contents of the README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command line of the README's shell blocks, continuation lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line]


INSTALLS = [line for line in commands() if line.startswith(("make", "pip", "git", "cd"))]
RUNS = [line for line in commands() if line not in INSTALLS]


# A reader wants sizes that measure something, a test those of the tiny model.
SMALLER = {
    "--seq-len 8192 --max-windows 4": "--seq-len 200 --stride 64",
    "--seq-len 32768": "--seq-len 2048 --max-windows 1",
    "--model llama2-7b --lengths 32740": "--model tiny --cache-size 64 --lengths 124",
    "--lengths 8192": "--lengths 400",
    "--cache-size 2048": "--cache-size 128",
}


# As little as the report reads.
RESULT = {
    "task": "needle",
    "protocol": "passkey-v1",
    "config": {"model_path": "MODEL", "policy": {"policy": "full"}},
    "kv_bytes": 1000,
    "records": [{"key": "400/50/0", "length": 400, "score": 1.0, "compressions": 0}],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which MODEL is a tiny model; book.txt, tokens.bin and results can be read."""
    import numpy as np

    write_model_folder(tmp_path / "MODEL", num_heads=4, num_kv_heads=2, vocab_size=260)
    text = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea. "
    (tmp_path / "book.txt").write_text(text * 4)
    np.arange(9000, dtype="<u2").__mod__(250).tofile(tmp_path / "tokens.bin")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "full.json").write_text(json.dumps(RESULT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FREQKV_NO_COMPILE_CACHE", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/exit\n"))
    return tmp_path


def test_table_is_current():
    assert readme.with_table(README) == README, "run python -m freqkv_jax.readme"


def test_table_has_every_policy_and_its_file():
    table = readme.policy_table()
    for name, cls in POLICIES.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert cls.summary in row and cls.keeps in row and cls.source in row
        assert (ROOT / re.search(r"\]\((.*?)\)", row).group(1)).is_file()
    # 32 layers, K and V, 4096 wide, 2 bytes, 4096 slots or 32768 tokens.
    assert "| 2.0 GiB |" in table and "| 16.0 GiB |" in table


def test_command_rewrites_the_table(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(README.replace("low-pass filters", "does something to"))
    assert readme.main([str(file)]) == 0 and file.read_text() == README
    assert readme.main([str(file)]) == 0 and "is current" in capsys.readouterr().out
    file.write_text("no markers")
    assert readme.main([str(file)]) == 2 and "must hold" in capsys.readouterr().err
    assert file.read_text() == "no markers"
    assert readme.main([str(tmp_path / "none")]) == 2


def test_readme_has_what_the_tests_look_for():
    assert len(blocks("python")) == 3 and len(RUNS) >= 5
    assert all(size in README for size in SMALLER)
    assert {"make demo", "make test"} <= set(INSTALLS)


@pytest.mark.parametrize("line", INSTALLS)
def test_make_and_install(line):
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word][0] in targets
        return
    assert words[:2] == ["pip", "install"], f"no test for {line!r}"
    (what,) = [word for word in words[2:] if not word.startswith("-")]
    name, _, extras = what.rstrip("]").partition("[")
    assert name == "." or name == PROJECT["name"]
    assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("line", RUNS)
def test_command_runs(line, place, capsys):
    from freqkv_jax.cli import main

    for size, smaller in SMALLER.items():
        line = line.replace(size, smaller)
    words = shlex.split(line)
    if words[:2] == ["python", "eval.py"]:
        assert (ROOT / "eval.py").is_file()
        words = ["freqkv", "eval", *words[2:]]
    assert words[0] == "freqkv", f"no test for {line!r}"
    status = main(words[1:])
    out = capsys.readouterr()
    if words[1] == "compile" and status == 2:
        # The TPU compiler is in an extra that the ordinary tests do without.
        assert "tpu" in out.err and "pip install" in out.err
        return
    assert status == 0, out.err
    assert "Traceback" not in out.err and (out.out or out.err)


def test_python_runs(place, capsys):
    code, _, on_devices = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) >= 3

    def mean_score():
        return float(fk.score(names["model"], names["params"], [names["prompt"]]).mean())

    alone = mean_score()
    exec(compile(on_devices, "README.md", "exec"), names)
    assert abs(mean_score() / alone - 1) < BF16_LOSS


def test_every_policy_is_one_line():
    _, code, _ = blocks("python")
    policies = [eval(line, {"fk": fk}) for line in code.splitlines()]
    assert [policy.name for policy in policies] == ["full", "sink_window", "freqkv", "novelty"]
    assert {policy.capacity for policy in policies[1:]} == {2048}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http", "mailto:")):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def documented():
    """Every whole `freqkv` command in the code blocks of docs, by page."""
    for file in sorted((ROOT / "docs").rglob("*.md")):
        text = "".join(re.findall(r"^```.*?^```", file.read_text(), re.DOTALL | re.MULTILINE))
        for line in text.replace("\\\n", " ").splitlines():
            line = line.partition(" #")[0].strip()
            if line.startswith("freqkv ") and "..." not in line and "[" not in line:
                yield pytest.param(line, id=f"{file.name}: {line[:60]}")


@pytest.mark.parametrize("line", list(documented()))
def test_commands_of_the_docs_are_understood(line):
    """Their flags exist; they are not run."""
    from freqkv_jax.cli import _parser

    words = shlex.split(line)[1:]
    assert _parser(words).parse_args(words).command == words[0]

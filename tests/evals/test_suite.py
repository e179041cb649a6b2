"""Suites: a YAML file into cells, and what is said of mistakes before anything runs."""

import re

import pytest

import freqkv_jax as fk
from freqkv_jax.evals import suite as module
from freqkv_jax.evals.options import option_values
from freqkv_jax.evals.suite import find_suite, headline, read_suite, run_cells, select
from tests.evals.fakes import FakeTask

TEXT = """
output: results/x
common: {dtype: float32, batch_size: 4, seed: 3}
options: {data: books/a.txt, stride: 8}
models:
  plain: {model: A}
  tuned: {model: A, adapter: B}
policies:
  full: {policy: full}
  freqkv: {cache_size: 32, compress_method: fft}
  own: null
runs:
  - task: perplexity
    policies: [full, freqkv]
    options: {stride: 16}
    grid: {seq_len: [64, 128], data: [books/a.txt, b.txt]}
  - task: needle
    models: plain
    policies: own
"""


def cells(text=TEXT, flags=None, settings=()):
    return read_suite(text, "my.yaml", flags or {}, settings)


def test_cells():
    got = cells()
    assert got.output == "results/x" and len(got.cells) == 2 * 2 * 2 * 2 + 1
    names = [cell.name for cell in got.cells]
    assert names[0] == "perplexity-plain-full-seq_len64-dataa"
    assert "needle-plain-own" in names and len(set(names)) == len(names)
    # Cells of one model stand together: it is loaded once.
    assert [cell.model_name for cell in got.cells] == ["plain"] * 9 + ["tuned"] * 8
    first, last = got.cells[0], got.cells[-1]
    options = option_values(first.task)
    assert (options["stride"], options["seq_len"], options["data"]) == (16, 64, "books/a.txt")
    assert first.kv == fk.FullConfig() and last.kv == fk.FreqKVConfig(cache_size=32, method="fft")
    assert last.flags == {"dtype": "float32", "batch_size": 4, "model": "A", "adapter": "B"}
    needle = next(cell for cell in got.cells if cell.name == "needle-plain-own")
    assert needle.kv is None and needle.task.seed == 3, "common keys reach the tasks that have them"


def test_one_model_that_is_not_named():
    (one,) = cells("runs: [{task: cost}]", {"model": "models/tiny.gguf"}).cells
    assert one.name == "cost-freqkv" and one.model_name == "tiny"
    assert one.kv == fk.FreqKVConfig()


def test_a_part_of_the_cells():
    whole = cells()
    got = select(whole, "needle-*, perplexity-plain-full-seq_len64-data?")
    assert got.output == whole.output
    assert {c.name for c in got.cells} == {c.name for c in whole.cells if c.name[0] == "n"} | {
        "perplexity-plain-full-seq_len64-dataa",
        "perplexity-plain-full-seq_len64-datab",
    }
    with pytest.raises(ValueError, match=r"'needel-\*' matches no cell"):
        select(whole, "perplexity-*,needel-*")


def test_the_command_line_wins():
    text = TEXT.replace("plain: {model: A}", "plain: {}")
    got = cells(text, {"model": "M", "dtype": "bfloat16", "limit": 2}, ["data=c.txt", "seq-len=32"])
    assert len(got.cells) == 2 * 2 + 1, "a setting takes the place of a grid"
    plain, tuned = got.cells[0], got.cells[-1]
    assert plain.flags["model"] == "M" and tuned.flags["model"] == "A"
    assert plain.flags["dtype"] == "bfloat16" and plain.flags["limit"] == 2
    assert plain.task.data == "c.txt" and plain.task.seq_len == 32


MISTAKES = {
    "key": (("output:", "ouput:"), "my.yaml: unknown key 'ouput'; did you mean 'output'"),
    "run key": (("grid:", "gird:"), "run 1: unknown key 'gird'; did you mean 'grid'"),
    "common": (("batch_size:", "batchsize:"), "common: unknown key 'batchsize'; did you mean 'b"),
    "option": (
        ("stride: 16", "strid: 16"),
        "run 1, options: unknown key 'strid'; did you mean 'stride'",
    ),
    "value": (("stride: 16", "stride: no"), "run 1: --stride must be a whole number, got False"),
    "task": (("task: needle", "task: neddle"), "no task is named 'neddle'; did you mean 'needle'"),
    "policy": (("cache_size:", "cach_size:"), "policy freqkv: .*did you mean 'cache_size'"),
    "sizes": (("cache_size: 32", "cache_size: 1"), "my.yaml, policy freqkv: .*cache_size"),
    "policy name": (("policies: own", "policies: owl"), "'owl' is not defined; did you mean 'own'"),
    "model name": (("models: plain", "models: plane"), "'plane' is not defined; did you mean 'pl"),
    "grid": (("seq_len: [64, 128]", "seq_len: 64"), "grid seq_len must be a list of values"),
    "no path": (("plain: {model: A}", "plain: {}"), "model plain has no path; give --model"),
    "no task": (("task: needle", "name: x"), "run 2 has no task"),
    "yaml": (("output: results/x", "output: [x"), "my.yaml is not valid YAML"),
    "same name": (("policies: own\n", "policies: own\n  - task: perplexity"
                   "\n    options: {data: x.txt}\n    grid: {seq_len: [64], data: [x/a.md]}\n"),
                  "two cells would write perplexity-plain-full-seq_len64-dataa.json; give"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    change, message = MISTAKES[case]
    assert change[0] in TEXT
    with pytest.raises(ValueError, match=message):
        cells(TEXT.replace(*change))


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        ({"model": "M"}, [], "--model is of no use"),
        ({}, ["sead=1"], "--set: unknown key 'sead'; did you mean 'seed'"),
        ({}, ["seed"], "--set 'seed' is not of the form KEY=VALUE"),
        ({}, ["seq_len=x"], "--seq-len must be a whole number, got 'x'"),
    ],
)
def test_mistakes_of_the_command_line(flags, settings, message):
    with pytest.raises(ValueError, match=message):
        cells(TEXT, flags, settings)


@pytest.mark.parametrize("text", ["", "runs: []", "runs: {task: needle}", "- 1"])
def test_no_suite_at_all(text):
    with pytest.raises(ValueError, match=r"my.yaml"):
        cells(text)


def test_finding(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    file.write_text("x")
    assert find_suite(str(file)) == ("x", str(file))
    with pytest.raises(FileNotFoundError, match="neither a file nor a packaged suite"):
        find_suite("smal")


def packaged():
    from importlib import resources

    folder = resources.files("freqkv_jax") / "configs" / "suites"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


@pytest.mark.parametrize("name", packaged())
def test_packaged_suites_are_whole(name):
    text, found = find_suite(name)
    assert text.startswith("#"), "the first comment says command, hardware and time"
    try:
        got = read_suite(text, found, {"model": "M"}, [])
    except ValueError as error:  # that names its models
        assert "--model is of no use" in str(error)
        got = read_suite(text, found, {}, [])
    assert got.output and got.cells
    told = re.search(r"(\d+) cells of (\d+) policies", text)
    if told:
        policies = {cell.policy_name for cell in got.cells}
        assert [int(number) for number in told.groups()] == [len(got.cells), len(policies)]


def test_a_failing_cell_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(module, "task_class", lambda name: FakeTask)
    text = "models: {m: {model: A}}\nruns: [{task: fake, grid: {count: [1, 2, 3]}}]"
    notes = []

    def measure(cell, output):
        assert output == f"folder/{cell.name}.json"
        if cell.task.count == 2:
            raise FileNotFoundError("no\nbook")
        return {"score": cell.task.count, "nothing_compressed": True, "num_failed": 0}

    got = run_cells(cells(text), measure, "folder", notes.append)
    assert [row.get("value") for row in got] == [1, None, 3]
    assert got[1]["error"] == "no book" and got[0]["nothing_compressed"]
    assert "[2/3] fake-m-freqkv-count2" in notes and "fake-m-freqkv-count2 failed: no book" in notes


def test_headlines():
    assert headline({"perplexity": 3.5, "score": 1})["value"] == 3.5
    assert headline({"score": 50.0, "num_failed": 2}) == {
        "headline": "score", "value": 50.0, "nothing_compressed": False, "num_failed": 2,
    }  # fmt: skip
    assert "value" not in headline({"score": None})

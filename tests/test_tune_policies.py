"""scripts/tune_policies.py: trains, evaluates, goes on where it was stopped, and compares."""

import json
import sys

import numpy as np
import pytest
import yaml

from freqkv_jax.evals.options import option_values
from freqkv_jax.evals.suite import find_suite, read_suite
from freqkv_jax.training import setup
from tests.evals import results
from tests.model_folder import write_model_folder
from tests.scripts import load_script

SUITE = """
common: {dtype: float32, batch_size: 2, seed: 1}
policies:
  window: {policy: sink_window, cache_size: 16}
  novelty-v0: {policy: novelty, cache_size: 16, recent_size: 4, chunk: 4}
runs:
  - {task: perplexity, policies: [window, novelty-v0], options: {data: x, seq_len: 40, stride: 8}}
  - task: needle
    policies: [window, novelty-v0]
    options:
      {variant: passkey, scoring: loglikelihood, lengths: [1], depths: [0, 100], num_samples: 1}
  - task: perplexity
    name: perplexity-64k
    policies: [novelty-v0]
    options: {data: x, seq_len: 64, stride: 16}
  - {task: cost, policies: [window], options: {lengths: [64]}}
"""
SEEDS = {"window": 1, "freqkv": 2}  # of made-up results
PAIRS = ("window-s0", "window-s1", "novelty-v0-s0", "novelty-v0-s1")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("FREQKV_NO_COMPILE_CACHE", "1")
    monkeypatch.setattr(setup, "make_train_step", setup.make_train_step)  # put back afterwards
    return load_script("tune_policies")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    write_model_folder(folder / "model", num_layers=1)
    ids = np.random.default_rng(0).integers(32, 120, 2000).astype(np.uint16)
    ids.tofile(folder / "train.bin")
    ids[:120].tofile(folder / "test.bin")
    (folder / "suite.yaml").write_text(SUITE)
    return folder


def run(script, work, monkeypatch, *more):
    words = f"run {work}/out --model {work}/model --train {work}/train.bin --test {work}/test.bin"
    words += f" --config tiny --suite {work}/suite.yaml --key-length 400 --weights {work}/weights"
    words += " --policies window novelty-v0 --set train.steps=2 train.batch_size=2"
    words += " train.seq_len=40 optimizer.warmup_steps=0"
    monkeypatch.setattr(sys, "argv", ["tune", *words.split(), *more])
    script.main()


def read(path):
    return json.loads(path.read_text())


def stop(*args):
    raise KeyboardInterrupt


def fail(*args, **options):
    raise AssertionError("this is done already")


def test_the_whole_command(script, work, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(
        setup, "make_train_step", lambda *a, make=setup.make_train_step: made.append(a) or make(*a)
    )
    # Stopped in the evaluation of the first model, between its results.
    with monkeypatch.context() as patch:
        patch.setattr("freqkv_jax.evals.needle.Needle.run", stop)
        with pytest.raises(SystemExit, match="130"):
            run(script, work, monkeypatch, "--seeds", "0", "1")
    first = work / "weights" / "window-s0" / "results" / "perplexity-window_s0.json"
    before = first.stat().st_mtime_ns
    assert not (work / "out").exists()
    # The model is not trained again, and what was measured is kept.
    with monkeypatch.context() as patch:
        patch.setattr("freqkv_jax.training.loop.prepare", fail)
        with pytest.raises(AssertionError, match="done already"):
            run(script, work, monkeypatch, "--seeds", "0", "1", "--keep")
    assert first.stat().st_mtime_ns == before
    names = sorted(path.name for path in (work / "out").iterdir())
    assert names == [f"{x}-window-s0.json" for x in ("needle", "perplexity", "train")]
    run(script, work, monkeypatch, "--seeds", "0", "1")
    assert list((work / "weights").iterdir()) == []
    assert len(made) == 2, "one step a policy, for all seeds"

    found = {path.name: read(path) for path in (work / "out").iterdir()}
    runs = ("perplexity", "needle", "train")
    want = {f"{x}-{pair}.json" for x in runs for pair in PAIRS}
    want |= {f"perplexity-64k-{pair}.json" for pair in PAIRS[2:]}
    assert set(found) == want
    one, other = (found[f"train-novelty-v0-s{seed}.json"] for seed in (0, 1))
    assert one["losses"][0] != other["losses"][0], "other rows"
    assert one["tokens"] == 2 * 2 * 40 and one["loss"] == one["losses"][1] and one["seconds"] > 0
    ours, theirs = one["config"], other["config"]
    assert ours["kv"]["chunk"] == 4 and ours["optimizer"]["schedule"] == "cosine"
    assert ours.pop("run") != theirs.pop("run") and theirs.pop("environment")
    assert ours | {"environment": 0} == theirs | {"environment": 0}, "the seed alone"
    a, b = (found[f"perplexity-novelty-v0-s{seed}.json"] for seed in (0, 1))
    assert a["model_fingerprint"] != b["model_fingerprint"] and a["num_windows"] == 9
    assert a["config"]["policy"]["chunk"] == 4
    assert [r["length_target"] for r in found["needle-window-s1.json"]["records"]] == [400] * 2

    # Everything is there: nothing is done.
    monkeypatch.setattr(script, "call", fail)
    run(script, work, monkeypatch, "--seeds", "1", "0")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["tune", "table", str(work / "out")])
    script.main()
    assert "| novelty-v0 | - | - |" in capsys.readouterr().out


def test_a_policy_that_the_suite_lacks(script, work, monkeypatch):
    with pytest.raises(SystemExit, match="no policy 'windy': window, novelty-v0"):
        run(script, work, monkeypatch, "--policies", "windy")


def test_one_that_fails_does_not_stop_the_others(script, work, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "freqkv", lambda words: seen.append(words[0]) or 2)
    with pytest.raises(SystemExit, match=r"window, seed 7: freqkv train .* 2\nnovelty-v0, seed 7"):
        run(script, work, monkeypatch, "--seeds", "7")
    assert seen == ["train", "train"]


def test_a_run_that_was_stopped_is_not_evaluated(script, work, monkeypatch):
    monkeypatch.setattr(script, "freqkv", lambda words: 0)  # as after SIGTERM
    with pytest.raises(SystemExit, match="stopped"):
        run(script, work, monkeypatch, "--seeds", "7")


@pytest.mark.parametrize("policy", ["full", "freqkv", "window", "keydiff", "novelty", "novelty-v0"])
def test_runs_are_those_of_the_study(script, policy):
    text, name = find_suite("cache_study")
    cells = {cell.name: cell for cell in read_suite(text, name, {"model": "M"}).cells}
    made = script.evaluation_of(yaml.safe_load(text), policy, f"{policy}-s0", 8192)
    got = read_suite(yaml.safe_dump(made), "made", {"model": "E"}).cells
    runs = script.RUNS if policy != "full" else ("perplexity", "needle")
    assert {cell.name for cell in got} == {
        script.result_file(run, f"{policy}-s0").removesuffix(".json") for run in runs
    }
    for cell in got:
        study = cells[cell.name.removesuffix("_s0")]
        mine, theirs = option_values(cell.task), option_values(study.task)
        if cell.task.name == "needle":
            assert (mine.pop("lengths"), len(theirs.pop("lengths"))) == ([8192], 3)
        assert mine == theirs and cell.kv == study.kv
        assert {**cell.flags, "model": 0} == {**study.flags, "model": 0}


def test_table(script, tmp_path, monkeypatch, capsys):
    output, untuned = tmp_path / "tuned", tmp_path / "untuned"
    output.mkdir()
    untuned.mkdir()
    gains = {"window": (0.1, 0.3), "freqkv": (0.2, 0.5)}
    for policy, of_seed in gains.items():
        for run in ("perplexity", "perplexity_64k"):
            before = results.perplexity(policy, seed=SEEDS[policy])
            (untuned / f"{run}-{policy}.json").write_text(json.dumps(before))
        (untuned / f"needle-{policy}.json").write_text(json.dumps(results.passkey(policy, 1.0)))
        for seed, gain in enumerate(of_seed):
            tuned = results.perplexity(policy, seed=SEEDS[policy], offset=-gain)
            about = {"policy": policy, "seed": seed}
            for run, what in (("perplexity", tuned), ("perplexity-64k", tuned), ("train", about)):
                (output / f"{run}-{policy}-s{seed}.json").write_text(json.dumps(what))
            needle = results.passkey(policy, 1.0 - gain)
            needle["records"] = needle["records"][:2]
            path = output / f"needle-{policy}-s{seed}.json"
            path.write_text(json.dumps(needle))
    (output / "train-freqkv-s5.json").write_text('{"policy": "freqkv", "seed": 5}')
    monkeypatch.setattr(sys, "argv", ["tune", "table", str(output), str(untuned)])
    script.main()
    out = capsys.readouterr().out.replace("\\", "")

    def row(title, policy):
        table = out[out.index(title) :]
        line = next(line for line in table.splitlines() if line.startswith(f"| {policy} "))
        return line.strip("| ").split(" | ")

    def mean_loss(policy):
        records = results.perplexity(policy, seed=SEEDS[policy])["records"]
        return np.mean([record["loss"] for record in records])

    for title in ("perplexity, 128", "perplexity-64k, 128"):
        _, before, behind, after, mine, span, seeds = row(title, "freqkv")
        loss, other = mean_loss("freqkv"), mean_loss("window")
        low, middle, high = (f"{np.exp(loss - gain):.2f}" for gain in (0.5, 0.35, 0.2))
        assert (before, after) == (f"{np.exp(loss):.2f}", f"{middle} ({low} to {high})")
        percent = [100 * np.expm1(loss - other - gain) for gain in (0, 0.15, 0.2, 0.1)]
        assert behind.startswith(f"{percent[0]:+.2f} [")
        assert mine.startswith(f"{percent[1]:+.2f} [") and seeds == "2"
        assert span == f"{percent[2]:+.2f} to {percent[3]:+.2f}"
        ends = [float(end) for end in mine.split("[")[1].rstrip("]").split(", ")]
        assert ends[0] < percent[1] < ends[1] and ends[1] - ends[0] < 2, "paired: noise of 0.01"
        assert row(title, "window")[2] == row(title, "window")[4] == "-"
    nats = row("needle, 128: nats", "freqkv")
    assert nats[1] == "1.00" and nats[3] == "0.65 (0.50 to 0.80)", "of three lengths, the tuned one"
    assert nats[5] == "-0.20 to -0.10"
    assert row("needle, 128: score", "freqkv")[3] == "0.0 (0.0 to 0.0)"
    assert row("by position", "window")[1] == "20.09 \u2192 20.09"

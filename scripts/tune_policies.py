#!/usr/bin/env python3
"""Tunes a model through several cache policies with several seeds, and evaluates each.

    python scripts/tune_policies.py run OUTPUT --model MODEL --train data/train \\
        --test data/test/00000.bin --seeds 0 1 2
    python scripts/tune_policies.py table OUTPUT [docs/results/smollm2_cache_study/results]

`run` trains all policies with one seed, then with the next, and evaluates the weights as the suite
cache_study does: OUTPUT/RUN-POLICY-sSEED.json for each of its runs, and what training took in
OUTPUT/train-POLICY-sSEED.json. A seed changes the order of the training rows and nothing else. The
same command goes on where it was stopped. One process can take some of the policies: in it, all
seeds of a policy share the compiled programs. `table` prints Markdown.
"""

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from freqkv_jax.cli import main as freqkv
from freqkv_jax.evals.report_blocks import Block, Paragraph, Table, to_markdown
from freqkv_jax.evals.report_compare import Series, difference_text, series_of
from freqkv_jax.evals.report_runs import load_runs
from freqkv_jax.evals.report_stats import Difference
from freqkv_jax.evals.suite import find_suite
from freqkv_jax.files import write_text
from freqkv_jax.training import setup
from freqkv_jax.training.metrics import read_lines
from freqkv_jax.training.rundir import CONFIG, EXPORT, FINISHED, METRICS

POLICIES = ("full", "freqkv", "window", "keydiff", "novelty")
BASELINE = "window"
RUNS = ("perplexity", "perplexity-64k", "needle")  # of the suite
FIGURES = (  # run, field of its records
    ("perplexity", "loss"),
    ("perplexity-64k", "loss"),
    ("needle", "nats_per_digit"),
    ("needle", "score"),
)


def main() -> None:
    """Runs what the command line says."""
    args = parse()
    if args.command == "table":
        print(to_markdown(list(tables(args.output, args.untuned))), end="")
        return
    share_compiled_steps()
    suite = yaml.safe_load(find_suite(args.suite)[0])
    for name in args.policies:
        if name not in suite["policies"]:
            raise SystemExit(f"{args.suite} has no policy {name!r}: {', '.join(suite['policies'])}")
    failed = []
    for seed in args.seeds:
        for name in args.policies:
            try:
                tune(args, suite, name, seed)
            except Failed as error:
                failed.append(f"{name}, seed {seed}: {error}")
    if failed:
        raise SystemExit("\n".join(failed))


class Failed(Exception):
    """A command came to no good end; the next model may be luckier."""


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("output", type=Path, help="folder of the result files")
    run.add_argument("--model", required=True, help="what to tune, e.g. a .gguf file")
    run.add_argument("--train", required=True, help="file or folder to train on")
    run.add_argument("--test", required=True, help="file of tokens to measure perplexity on")
    run.add_argument("--policies", nargs="+", default=POLICIES, help="names in the suite")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--config", default="smollm2_8k", help="of `freqkv train`")
    run.add_argument("--set", nargs="+", default=[], help="of --config, e.g. train.steps=80")
    run.add_argument("--suite", default="cache_study", help="of `freqkv eval`")
    run.add_argument("--key-length", type=int, default=8192, help="tokens of a text with a key")
    run.add_argument("--weights", type=Path, default=Path("runs/tune_policies"), help="their place")
    run.add_argument("--keep", action="store_true", help="do not delete the weights")
    table = commands.add_parser("table")
    table.add_argument("output", type=Path)
    table.add_argument("untuned", type=Path, nargs="?", help="results of the suite, not tuned")
    return parser.parse_args()


def share_compiled_steps() -> None:
    """Lets runs that differ in nothing but the seed share a train step, traced once for all."""
    make, made = setup.make_train_step, {}

    def shared(cfg: Any, model: Any, mesh: Any = None) -> Any:
        key = (cfg.train, cfg.optimizer, model, mesh)
        if key not in made:
            made[key] = make(cfg, model, mesh)
        return made[key]

    setup.make_train_step = shared


def tune(args: argparse.Namespace, suite: Mapping[str, Any], policy: str, seed: int) -> None:
    """Trains and evaluates one model, unless all of its results are there."""
    label = f"{policy}-s{seed}"
    folder = args.weights / label
    evaluation = evaluation_of(suite, policy, label, args.key_length)
    names = [run_name(run) for run in evaluation["runs"]]
    places = {name: args.output / f"{name}-{label}.json" for name in names}
    about = args.output / f"train-{label}.json"  # written last
    if not about.exists() or not all(place.exists() for place in places.values()):
        figures = train(args, suite["policies"][policy], policy, seed, folder)
        evaluate(args, evaluation, folder)
        for name, place in places.items():
            write_text(
                place, (folder / "results" / result_file(name, label)).read_text(encoding="utf-8")
            )
        write_text(about, json.dumps(figures, indent=1) + "\n")
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)


def evaluation_of(
    suite: Mapping[str, Any], policy: str, label: str, key_length: int
) -> dict[str, Any]:
    """A suite of the runs that a policy has, by its own name and with keys at one length."""
    runs = []
    for run in suite["runs"]:
        if run_name(run) in RUNS and policy in run["policies"]:
            lengths = {"lengths": [key_length]} if run["task"] == "needle" else {}
            runs.append({**run, "policies": [label], "options": run["options"] | lengths})
    policies = {label: suite["policies"][policy]}
    return {"common": suite["common"], "policies": policies, "runs": runs}


def run_name(run: Mapping[str, Any]) -> str:
    """Of a suite's run."""
    return run.get("name") or run["task"]


def result_file(run: str, policy: str) -> str:
    """Where `freqkv eval --suite` writes a cell's result."""
    return f"{run.replace('-', '_')}-{policy.replace('-', '_')}.json"


def train(
    args: argparse.Namespace, kv: Mapping[str, Any], policy: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Trains into `folder`, unless that is done; what it took."""
    settings = {
        "run.dir": str(folder),
        "run.seed": seed,
        "model.path": args.model,
        "kv": kv,
        "data.train": [{"path": args.train}],
        "data.eval": [],
        # Only the weights of the last step are of use.
        "checkpoint.every": 10**9,
        "checkpoint.keep": 1,
        "checkpoint.keep_best": False,
        "log.eval_every": 0,
        "log.sample_every": 0,
        "log.tensorboard": False,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    anew, begin = not (folder / CONFIG).exists(), time.monotonic()
    call("train", "--config", args.config, "--set", *words, *args.set)
    if not (folder / FINISHED).exists():
        raise SystemExit(f"training of {folder} was stopped; the same command goes on")
    kept = folder / "seconds.json"
    if anew:
        write_text(kept, f"{time.monotonic() - begin:.1f}")
    seconds = (
        json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else None
    )  # it was broken off
    return {"policy": policy, "seed": seed, "seconds": seconds} | summary(folder)


def call(*words: str) -> None:
    """Runs `freqkv WORDS` in this process, whose compiled programs it can use."""
    status = freqkv(words)
    if status == 130:  # Ctrl-C
        raise SystemExit(status)
    if status:
        raise Failed(f"freqkv {words[0]} ended with status {status}")


def summary(folder: Path) -> dict[str, Any]:
    """Loss and speed of a finished run, and its whole config."""
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    steps = [record for record in read_lines(folder / METRICS) if "loss" in record]
    speeds = [r["tokens_per_second"] for r in steps if r["tokens_per_second"]]
    sizes = config["train"]
    return {
        "loss": steps[-1]["loss"],
        "tokens": sizes["steps"] * sizes["batch_size"] * sizes["seq_len"],
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "memory_bytes": steps[-1]["memory_bytes"],
        "losses": [record["loss"] for record in steps],
        "config": config,
    }


def evaluate(args: argparse.Namespace, evaluation: Mapping[str, Any], folder: Path) -> None:
    """Runs the suite `evaluation` with the tuned weights, into folder/results."""
    path = folder / "suite.yaml"
    write_text(path, yaml.safe_dump(evaluation, sort_keys=False))
    where = ("--model", str(folder / EXPORT), "--output", str(folder / "results"))
    call("eval", "--suite", str(path), *where, "--set", f"data={json.dumps(args.test)}")


Figure = dict[str, dict[int, Series]]  # policy -> seed -> what was measured


def tables(output: Path, untuned: Path | None) -> Iterator[Block]:
    """What tuning did, a table for each figure, and perplexity by position."""
    pairs = [
        json.loads(path.read_text(encoding="utf-8")) for path in output.glob("train-*-s*.json")
    ]
    order = {name: place for place, name in enumerate(POLICIES)}
    pairs.sort(key=lambda d: (order.get(d["policy"], len(order)), d["policy"], d["seed"]))
    files = {run: {} for run in RUNS}
    for policy, seed in ((pair["policy"], pair["seed"]) for pair in pairs):
        for run in RUNS:
            place = output / f"{run}-{policy}-s{seed}.json"
            if place.exists():
                files[run].setdefault(policy, {})[seed] = place
    for run, field in FIGURES:
        tuned = {
            policy: {seed: measured(path, field) for seed, path in of_seed.items()}
            for policy, of_seed in files[run].items()
        }
        if tuned:
            yield comparison(run, tuned, untuned_figure(untuned, run, field, tuned))
    if files["perplexity-64k"]:
        yield positions(files["perplexity-64k"], untuned)
    yield Paragraph(
        f"Differences are to the {BASELINE} of the same seed; brackets: 95 % interval, paired"
        " bootstrap over samples, whose values are averaged over seeds (losses before they become"
        " a perplexity)."
    )


def measured(path: Path, field: str, column: str | None = None) -> Series:
    """A figure of a result file, at the length of `column` if it has several."""
    found = [
        one
        for one in series_of(load_runs([path])[0])
        if one.metric.field == field and column in (None, one.column)
    ]
    if len(found) != 1:
        raise SystemExit(f"{path} has {field} at {len(found)} lengths, not one")
    return found[0]


def untuned_figure(folder: Path | None, run: str, field: str, tuned: Figure) -> dict[str, Series]:
    """The same of the model that was not tuned, where it is there."""
    found = {}
    for policy, of_seed in tuned.items():
        path = folder / result_file(run, policy) if folder else None
        if path and path.exists():
            found[policy] = measured(path, field, next(iter(of_seed.values())).column)
    return found


def comparison(run: str, tuned: Figure, untuned: Mapping[str, Series]) -> Table:
    """Policies, not tuned and tuned, beside the window of the same seed."""
    one = next(iter(next(iter(tuned.values())).values()))
    metric, rows = one.metric, []
    for policy, of_seed in tuned.items():
        means = sorted(metric.value(series.mean) for series in of_seed.values())
        mean = metric.shown(averaged(list(of_seed.values())).mean)
        before, base = untuned.get(policy), untuned.get(BASELINE)
        row = [policy, metric.shown(before.mean) if before else "-", "-"]
        if before and base and policy != BASELINE:
            row[-1] = difference_text(difference(before, base))
        row.append(f"{mean} ({metric.form.format(means[0])} to {metric.form.format(means[-1])})")
        both = [seed for seed in of_seed if seed in tuned.get(BASELINE, {})]
        if policy != BASELINE and both:
            ours, theirs = ([tuned[p][seed] for seed in both] for p in (policy, BASELINE))
            each = sorted(difference(a, b).mean for a, b in zip(ours, theirs, strict=True))
            row.append(difference_text(difference(averaged(ours), averaged(theirs))))
            row.append(f"{each[0]:+.2f} to {each[-1]:+.2f}")
        else:
            row += ["-", "-"]
        rows.append([*row, str(len(of_seed))])
    against = f"against the {BASELINE}, {metric.unit}"
    columns = ["policy", "not tuned", against, "tuned (lowest to highest seed)", against]
    columns += ["lowest to highest seed", "seeds"]
    return Table(columns, rows, f"{run}, {one.column}: {metric.title}")


def averaged(series: Sequence[Series]) -> Series:
    """Each sample's mean over seeds."""
    samples = {
        part: {key: float(np.mean([s.samples[part][key] for s in series])) for key in values}
        for part, values in series[0].samples.items()
    }
    return dataclasses.replace(series[0], samples=samples)


def difference(ours: Series, theirs: Series) -> Difference:
    """In the unit of their metric."""
    found = ours.difference(theirs)
    if found is None:
        raise SystemExit(f"{ours.run.path} and {theirs.run.path} share no sample")
    return found


def positions(files: Mapping[str, Mapping[int, Path]], untuned: Path | None) -> Table:
    """Perplexity by position in the longest windows, not tuned and tuned."""
    run, rows, columns = "perplexity-64k", [], []
    for policy, of_seed in files.items():
        tuned = [
            json.loads(path.read_text(encoding="utf-8"))["losses_by_position"]
            for path in of_seed.values()
        ]
        columns = [f"{place['from']} to {place['to']}" for place in tuned[0]]
        places = zip(*tuned, strict=True)
        cells = [f"{math.exp(np.mean([p['loss'] for p in place])):.2f}" for place in places]
        path = untuned / result_file(run, policy) if untuned else None
        if path and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))["losses_by_position"]
            pairs = zip(before, cells, strict=True)
            cells = [f"{math.exp(place['loss']):.2f} \u2192 {cell}" for place, cell in pairs]
        rows.append([policy, *cells])
    return Table(["policy", *columns], rows, f"{run} by position, not tuned \u2192 tuned")


if __name__ == "__main__":
    main()

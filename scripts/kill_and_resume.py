"""Shows that a run that is killed again and again ends as one that was never killed.

    python scripts/kill_and_resume.py --kills 20

Trains a config once without a disturbance, then again in another run.dir with SIGKILL at random
moments (while it starts, between two steps, during a save), each time going on by the same
command. Then every loss and every array of the last checkpoint and of the exported model must be
equal bit for bit. Prints a table of the kills; status 0 if all is equal, 1 if not.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("step", "save", "save", "start", "step")  # in turn: of five kills two are during saves
SAVING = ".orbax-checkpoint-tmp"
COMPARED = ("loss", "grad_norm", "learning_rate")
DEADLINE_S = 600.0  # for one attempt


def main() -> int:
    """Runs the comparison; returns the exit status."""
    args = parse()
    work = Path(args.work or tempfile.mkdtemp(prefix="kill_and_resume-"))
    work.mkdir(parents=True, exist_ok=True)
    calm, killed = work / "calm", work / "killed"
    rng = random.Random(args.seed)
    print(f"in {work}: {args.steps} steps, a checkpoint every {args.every}", flush=True)
    begin = time.monotonic()
    finish(launch(args, calm, work / "calm.log"), work / "calm.log")
    print(f"never killed: {time.monotonic() - begin:.1f} s", flush=True)
    # Kills lie anywhere in the run, in rising order; a save is at most `every` steps further on.
    last = max(1, args.steps - args.every - 1)
    targets = sorted(rng.randint(1, last) for _ in range(args.kills))
    print("\nkill  when       after s  steps written  saving  goes on from", flush=True)
    for number, target in enumerate(targets, 1):
        kind = KINDS[(number - 1) % len(KINDS)]
        kill_once(args, killed, work, number, kind, target, rng)
    finish(launch(args, killed, work / "killed.log"), work / "killed.log")
    problems = compare(calm, killed, args.steps)
    print()
    for problem in problems:
        print(f"DIFFERENT  {problem}")
    if not problems:
        print(f"{args.kills} kills: losses and weights are bit-equal to those of the calm run")
    return bool(problems)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--work", metavar="DIR", help="folder for both runs (default: a new one)")
    return parser.parse_args()


def launch(args: argparse.Namespace, folder: Path, log: Path) -> subprocess.Popen:
    """Starts training into `folder`: the same command every time."""
    sets = [f"run.dir={folder}", f"train.steps={args.steps}", f"checkpoint.every={args.every}"]
    command = [sys.executable, str(ROOT / "train.py"), "--config", args.config]
    for one in sets + args.set:
        command += ["--set", one]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def finish(process: subprocess.Popen, log: Path) -> None:
    """Waits for the end; RuntimeError with the log's tail if it fails."""
    status = process.wait(timeout=DEADLINE_S)
    if status:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"training ended with status {status}:\n{tail}")


def kill_once(
    args: argparse.Namespace,
    folder: Path,
    work: Path,
    number: int,
    kind: str,
    target: int,
    rng: random.Random,
) -> None:
    """Goes on training until the moment that is meant, kills, and prints a row."""
    log = work / "killed.log"
    left_over = saves(folder)  # what an earlier kill broke off
    process = launch(args, folder, log)
    begin = time.monotonic()
    if kind == "start":
        delay = rng.uniform(0.1, 6.0)
        wait_until(process, log, lambda: time.monotonic() - begin > delay)
    else:
        wait_until(process, log, lambda: steps_written(folder) >= target)
        if kind == "save":
            wait_until(process, log, lambda: bool(saves(folder) - left_over))
        time.sleep(rng.uniform(0.0, 0.02 if kind == "save" else 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"kill {number}: the run had ended; take more --steps")
    saving = bool(saves(folder) - left_over)
    whole = max(saved_steps(folder), default=0)
    print(
        f"{number:4}  {kind:9}  {time.monotonic() - begin:7.2f}  {steps_written(folder):13}"
        f"  {'yes' if saving else 'no':6}  {whole:12}",
        flush=True,
    )


def wait_until(process: subprocess.Popen, log: Path, reached: Callable[[], bool]) -> None:
    """Waits until `reached()`; RuntimeError if the run ends before."""
    begin = time.monotonic()
    while not reached():
        if process.poll() is not None:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the run ended with status {process.returncode}:\n{tail}")
        if time.monotonic() - begin > DEADLINE_S:
            process.kill()
            raise RuntimeError(f"waited for {DEADLINE_S:.0f} s in vain; see {log}")
        time.sleep(0.001)


def steps_written(folder: Path) -> int:
    """The last step in metrics.jsonl."""
    lines = step_lines(folder)
    return max(lines, default=0)


def step_lines(folder: Path) -> dict[int, dict]:
    """Training steps' lines of metrics.jsonl by step; a half-written line is left out."""
    path, found = folder / "metrics.jsonl", {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if "loss" in record:
                if record["step"] in found:
                    raise RuntimeError(f"{path} has step {record['step']} twice")
                found[record["step"]] = record
    return found


def saves(folder: Path) -> set[tuple[str, int]]:
    """Folders of checkpoints that are not whole: being written, or broken off."""
    found = set()
    for path in (folder / "checkpoints").glob(f"*{SAVING}*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    try:
        return [int(name) for name in os.listdir(folder / "checkpoints") if name.isdigit()]
    except FileNotFoundError:
        return []


def compare(calm: Path, killed: Path, steps: int) -> list[str]:
    """What differs between two finished runs, in words."""
    problems = []
    first, second = step_lines(calm), step_lines(killed)
    for step in range(1, steps + 1):
        for key in COMPARED:
            a, b = (lines.get(step, {}).get(key) for lines in (first, second))
            if a != b or a is None:
                problems.append(f"{key} of step {step}: {a!r} and {b!r}")
    problems += compare_arrays("checkpoint", *(read_checkpoint(f, steps) for f in (calm, killed)))
    return problems + compare_arrays("export", *(read_export(f) for f in (calm, killed)))


def compare_arrays(what: str, first: dict, second: dict) -> list[str]:
    """Arrays of the same names, compared bit by bit."""
    if first.keys() != second.keys() or not first:
        return [f"{what}: other arrays, or none: {sorted(first.keys() ^ second.keys())}"]
    return [f"{what}: {n}" for n in sorted(first) if first[n].tobytes() != second[n].tobytes()]


def read_checkpoint(folder: Path, step: int) -> dict:
    """Everything that the last checkpoint holds: weights, moments, step."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder / "checkpoints", item_names=("state",)) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(step, args=args)["state"]
    return {name: np.asarray(array) for name, array in state.items()}


def read_export(folder: Path) -> dict:
    """The weights of the exported model."""
    import ml_dtypes  # noqa: F401  (NumPy must know bfloat16)
    from safetensors.numpy import load_file

    arrays = {}
    for file in sorted((folder / "export").glob("*.safetensors")):
        arrays |= load_file(file)
    return arrays


if __name__ == "__main__":
    sys.exit(main())

"""Runs of several processes, and runs that are killed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.tolerances import SHARDED_LOSS
from tests.training.runs import losses, raw

ROOT = Path(__file__).parents[2]


def environment(**more):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return env | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"} | more


@pytest.mark.slow
def test_killed_three_times_it_ends_the_same(tmp_path):
    command = [sys.executable, "scripts/kill_and_resume.py", "--kills", "3", "--steps", "24"]
    done = subprocess.run(
        [*command, "--work", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills: losses and weights are bit-equal" in done.stdout


def start_train(config, env, *sets):
    command = [sys.executable, "train.py", "--config", str(config)]
    command += [word for one in sets for word in ("--set", one)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def train_together(config, count, *sets):
    """Trains in `count` processes of 2 devices in all."""
    finish(start_together(config, count, *sets))


def start_together(config, count, *sets, each=None):
    """Starts `count` processes; `each` has one setting more for every one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(count):
        flag = f"--xla_force_host_platform_device_count={2 // count}"
        env = environment(XLA_FLAGS=flag)
        if count > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(number),
            }
        own = sets if each is None else (*sets, each[number])
        started.append(start_train(config, env, *own))
    return started


def finish(started):
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_two_processes_train_save_and_resume_as_one(base, tmp_path, axis):
    config = tmp_path / "config.yaml"
    held = {"eval": [{"path": "b", "kind": "generated"}]}
    tree = raw(base, tmp_path / "x", mesh={axis: 2}, log={"eval_every": 4, "eval_rows": 3})
    tree["data"] |= held
    tree["train"] |= {"mode": "lora"}
    config.write_text(json.dumps(tree))
    train_together(config, 1, f"run.dir={tmp_path}/one", "train.steps=8")
    two = f"run.dir={tmp_path}/two"
    train_together(config, 2, two, "train.steps=4")
    assert len(losses(tmp_path / "two")) == 4, "one process writes"
    train_together(config, 2, two, "train.steps=6")
    train_together(config, 1, two, "train.steps=8")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    np.testing.assert_allclose(one, two, atol=SHARDED_LOSS, rtol=0)
    assert jax.process_count() == 1


@pytest.mark.slow
def test_two_processes_with_a_folder_each_stop_at_once(base, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(raw(base, tmp_path / "x", mesh={"data": 2})))
    folders = [f"run.dir={tmp_path}/a", f"run.dir={tmp_path}/b"]
    started = start_together(config, 2, each=folders)
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode and "is not one folder for all 2 processes" in output


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_behind_the_same_step(base, tmp_path):
    config = tmp_path / "config.yaml"
    tree = raw(base, tmp_path / "run", mesh={"data": 2}, checkpoint={"every": 100000})
    tree["train"] |= {"steps": 100000}
    config.write_text(json.dumps(tree))
    started = start_together(config, 2)
    begin = time.monotonic()
    while len(losses(tmp_path / "run")) < 5 and time.monotonic() - begin < 200:
        time.sleep(0.1)
    started[1].terminate()
    finish(started)
    last = len(losses(tmp_path / "run"))
    assert last >= 5
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [str(last)]

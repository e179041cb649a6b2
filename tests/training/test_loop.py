import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax.sharding import make_mesh
from freqkv_jax.training import distributed, schema, setup
from freqkv_jax.training.loop import train
from freqkv_jax.training.metrics import read_lines
from freqkv_jax.training.monitor import BadLossError, HeldOut, LossGuard
from freqkv_jax.training.rundir import RunDir
from freqkv_jax.training.step import make_train_step
from tests.tiny import random_params, tiny_config
from tests.tolerances import LOGITS, SHARDED_LOSS

ROOT = Path(__file__).parents[2]
KV = {"policy": "freqkv", "cache_size": 16, "sink_size": 2}


@pytest.fixture(scope="module", autouse=True)
def one_program_for_equal_runs():
    """Runs whose step is the same share the compiled one."""
    made = {}

    def make(cfg, model, mesh):
        train = dataclasses.replace(cfg.train, on_bad_loss="stop", steps=1)
        key = (train, cfg.optimizer, model, mesh)
        if key not in made:
            made[key] = make_train_step(cfg, model, mesh)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_train_step", make)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A one-layer model on disk."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_config(num_layers=1, vocab_size=64)
    model = fk.Llama(config, fk.FreqKVConfig(**{k: v for k, v in KV.items() if k != "policy"}))
    fk.save_pretrained(model, random_params(config), folder)
    return folder


def raw(base, folder, **sections):
    tree = {
        "run": {"dir": str(folder)},
        "model": {"path": str(base), "dtype": "float32"},
        "kv": KV,
        "data": {"train": [{"path": "train", "kind": "generated"}]},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {"mode": "norms", "steps": 6, "batch_size": 8, "seq_len": 32, "remat": "none"},
        "checkpoint": {"every": 2},
        "log": {"tensorboard": False},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return tree


def run(base, folder, **sections):
    return train(schema.from_dict(raw(base, folder, **sections)))


def losses(folder):
    return [r["loss"] for r in read_lines(folder / "metrics.jsonl") if "loss" in r]


def stop_at(monkeypatch, step):
    """SIGTERM while the batch of `step` is made."""
    from freqkv_jax.training import loop

    class Stopping(loop.Batches):
        def at(self, number):
            if number == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().at(number)

    monkeypatch.setattr(loop, "Batches", Stopping)


@pytest.fixture(scope="module")
def calm(base, tmp_path_factory):
    """A LoRA run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run") / "calm"
    lora = {"mode": "lora", "lora_rank": 2, "lora_targets": ["q", "v"]}
    held = {"train": [{"path": "a", "kind": "generated"}]}
    held["eval"] = [{"path": "b", "kind": "generated"}]
    log = {"eval_every": 3, "eval_rows": 3}
    sections = {"train": raw(base, folder)["train"] | lora, "data": held}
    sections["log"] = raw(base, folder)["log"] | log
    assert run(base, folder, **sections) == 0
    return folder, sections


def test_a_run_writes_what_it_should(calm, base):
    folder, sections = calm
    records = read_lines(folder / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    keys = "step loss grad_norm learning_rate tokens_per_second mfu memory_bytes data_wait_seconds"
    assert all(list(r) == keys.split() for r in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    # The first compiles; 2 and 6 are saved, and waited for right behind the step before them.
    assert [r["step"] for r in steps if r["tokens_per_second"] is None] == [1, 2, 6]
    held = [r for r in records if "loss" not in r]
    assert [r["step"] for r in held] == [0, 3, 6]
    assert all(k == "step" or k.startswith("eval_") for r in held for k in r)
    assert held[-1]["eval_loss"] < held[0]["eval_loss"]
    assert (folder / "curves.png").stat().st_size and (folder / "adapter").is_dir()
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["4", "6"]
    again = schema.load(folder / "config.yaml")
    assert again == schema.from_dict(raw(base, folder, **sections))
    assert '"versions"' in json.dumps(RunDir(str(folder)).recorded())


def test_the_exported_model_is_the_trained_one(calm):
    """Held-out loss of export/ is the last that the run measured."""
    folder, sections = calm
    model, params = fk.load_pretrained(folder / "export", dtype="float32")
    assert isinstance(model.kv, fk.FreqKVConfig) and model.kv.cache_size == 16
    from freqkv_jax.training.data import open_data

    section = schema.from_dict(raw("x", folder, **sections)).data
    source = open_data(section, 32, 64, None, 0, split="eval")
    rows = np.linspace(0, source.num_rows - 1, 3).round().astype(int)
    tokens = source.rows(rows)["tokens"]
    logits = jax.jit(model.apply)({"params": params, "maps": fk.maps(model)}, tokens)
    logp = jax.nn.log_softmax(logits[:, :-1])
    got = -np.take_along_axis(np.asarray(logp), tokens[:, 1:, None], axis=2)[..., 0]
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert abs(got.mean() - last["eval_loss"]) < LOGITS
    assert abs(got[:, :16].mean() - last["eval_loss_inside"]) < LOGITS
    assert abs(got[:, 16:].mean() - last["eval_loss_behind"]) < LOGITS
    assert abs(got[:, 23:].mean() - last["eval_loss_last_quarter"]) < LOGITS


def test_finished_says_so(calm, base, capsys):
    folder, sections = calm
    before = (folder / "metrics.jsonl").read_bytes()
    assert run(base, folder, **sections) == 0
    assert "all 6 steps are done" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_stopped_and_resumed_on_a_mesh_it_ends_the_same(base, tmp_path, calm, monkeypatch):
    folder, sections = calm
    mine = tmp_path / "mine"
    stop_at(monkeypatch, 3)
    before = signal.getsignal(signal.SIGTERM)
    assert run(base, mine, **sections) == 0
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before
    assert losses(mine) == losses(folder)[:3], "bit-equal until it was stopped"
    assert (mine / "checkpoints" / "3").is_dir() and not (mine / "export").exists()
    with (mine / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 7.0}\n{"step"')  # of a step that no checkpoint has
    # Both may change.
    mesh, quiet = {"data": 2, "fsdp": 2, "tensor": 2}, {"eval_every": 0}
    assert run(base, mine, **(sections | {"mesh": mesh, "log": sections["log"] | quiet})) == 0
    assert losses(mine)[:3] == losses(folder)[:3]
    assert [r["step"] for r in read_lines(mine / "metrics.jsonl") if "loss" in r] == [*range(1, 7)]
    np.testing.assert_allclose(losses(mine), losses(folder), atol=SHARDED_LOSS, rtol=0)
    held = [r["step"] for r in read_lines(mine / "metrics.jsonl") if "loss" not in r]
    assert held == [0, 3]


def test_resume_refuses_another_config(calm, base):
    folder, sections = calm
    other = sections | {"train": sections["train"] | {"lora_rank": 4}}
    with pytest.raises(ValueError, match=r"another config: train.lora_rank: was 2, now 4"):
        run(base, folder, **other)


def test_resume_refuses_other_data(calm, base, tmp_path):
    """The same config, but what it names holds something else now."""
    text = tmp_path / "tokens.bin"
    ids = np.random.default_rng(0).integers(3, 60, 4000).astype(np.uint16)
    ids.tofile(text)
    data = {"data": {"train": [{"path": str(text)}]}}
    steps = raw(base, tmp_path)["train"]
    assert run(base, tmp_path / "r", **data, train=steps | {"steps": 1}) == 0
    ids[::2].tofile(text)
    with pytest.raises(ValueError, match=r"the data differ .* until step 1"):
        run(base, tmp_path / "r", **data, train=steps | {"steps": 2})


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_a_bad_loss(base, tmp_path, what, monkeypatch):
    """At step 3 the limit is below every loss."""
    from freqkv_jax.training import loop

    class Strict(loop.monitor.LossGuard):
        def limit(self, step):
            return 0.0 if step == 3 else np.inf

    monkeypatch.setattr(loop.monitor, "LossGuard", Strict)
    steps = raw(base, tmp_path)["train"] | {"steps": 4, "on_bad_loss": what}
    if what == "stop":
        with pytest.raises(BadLossError, match=r"loss of step 3 .*last good checkpoint is .*/2\."):
            run(base, tmp_path, train=steps)
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2"]
        return
    with pytest.warns(UserWarning, match="loss of step 3 .* skipped"):
        assert run(base, tmp_path, train=steps) == 0
    assert len(losses(tmp_path)) == 4


def test_guard_looks_back_the_same_after_a_resume():
    values = [*np.linspace(3.0, 2.0, 20), 9.0, 2.0, float("nan"), 2.1, 2.0]
    records = [{"step": s, "loss": None if np.isnan(v) else v} for s, v in enumerate(values, 1)]
    calm, limits = LossGuard(2.0), []
    for record, value in zip(records, values, strict=True):
        limits.append(calm.limit(record["step"]))
        problem = calm.problem(record["step"], value)
        assert (problem is None) == (record["step"] not in (21, 23))
    for step in (12, 22, 24, 25):
        resumed = LossGuard(2.0, records[: step - 1])
        assert resumed.limit(step) == limits[step - 1]
    assert limits[:11] == [np.inf] * 11 and limits[11] < np.inf
    assert LossGuard(None, records).limit(26) == np.inf


def test_pieces_cover_each_place_once():
    model = fk.Llama(tiny_config(), fk.FreqKVConfig(cache_size=16, sink_size=2))
    held = types.SimpleNamespace(model=model)
    pieces = HeldOut._pieces(held, 32)  # type: ignore[arg-type]
    assert sum(p.astype(int) for p in pieces.values()).tolist() == [0] + [1] * 31
    in_window = sum(p for key, p in pieces.items() if 1 in key)
    assert np.flatnonzero(in_window).tolist() == list(range(1, 17))


def test_addresses_and_clusters():
    env = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    want = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
    assert distributed.addresses(env) == want
    assert distributed.addresses({}) is None
    for wrong in ({"JAX_PROCESS_ID": "2"}, {"JAX_COORDINATOR_ADDRESS": "host"}):
        with pytest.raises(ValueError, match="HOST:PORT of process 0"):
            distributed.addresses(env | wrong)
    assert distributed.in_cluster({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    assert not distributed.in_cluster({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert distributed.in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert distributed.start(False, {}) is False


def fake_devices(slices, each):
    kind = {"platform": "fake", "device_kind": "fake"}
    return [
        types.SimpleNamespace(id=s * each + i, slice_index=s, process_index=s, **kind)
        for s in range(slices)
        for i in range(each)
    ]


def test_hybrid_mesh_keeps_tensor_inside_a_slice():
    devices = fake_devices(2, 4)
    for sizes in ((2, 2, 2), (1, 4, 2), (4, 1, 2)):
        grid = distributed.hybrid_grid(devices, sizes)
        assert grid.shape == sizes
        assert all(len({d.slice_index for d in row}) == 1 for row in grid.reshape(-1, sizes[2]))
    with pytest.raises(ValueError, match="multiple of 2"):
        distributed.hybrid_grid(devices, (1, 1, 8))


def test_batch_share_of_one_process():
    assert distributed.batch_share(make_mesh(2, 2, 2), 8) == (0, 1)
    got = distributed.global_batch(make_mesh(2, 2, 2), {"tokens": np.arange(16).reshape(8, 2)}, 8)
    assert np.asarray(got["tokens"]).tolist() == np.arange(16).reshape(8, 2).tolist()


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


def start_together(config, count, *sets):
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
        started.append(start_train(config, env, *sets))
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

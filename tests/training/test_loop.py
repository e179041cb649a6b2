import dataclasses
import json
import os
import signal
import types

import jax
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax.training import schema, setup
from freqkv_jax.training.metrics import read_lines
from freqkv_jax.training.monitor import BadLossError, HeldOut, LossGuard
from freqkv_jax.training.rundir import RunDir
from freqkv_jax.training.step import make_train_step
from tests.model_folder import write_tokenizer
from tests.tiny import random_params, tiny_config
from tests.tolerances import LOGITS, SHARDED_LOSS
from tests.training.runs import losses, raw, run


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
    keys += " finite"
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


def test_others_wait_until_the_first_has_written_all(base, tmp_path, monkeypatch):
    """An upload of minutes would outlast the patience of jax's own barrier at the end."""
    from freqkv_jax.training import loop

    met = []
    monkeypatch.setattr(
        loop,
        "wait_for_all",
        lambda name: met.append((name, (tmp_path / "r" / "finished.json").exists())),
    )
    assert run(base, tmp_path / "r", train=raw(base, tmp_path)["train"] | {"steps": 1}) == 0
    assert met == [("finished", True)]


def test_no_adapter_of_a_merged_base(base, calm, tmp_path, capsys):
    """The first one is part of the base by then; only the merged model can be used."""
    folder, sections = calm
    adapter = {"path": str(base), "dtype": "float32", "adapter": str(folder / "adapter")}
    steps = sections["train"] | {"steps": 1}
    assert run(base, tmp_path / "r", model=adapter, train=steps) == 0
    assert "no adapter/" in capsys.readouterr().err
    assert (tmp_path / "r" / "export").is_dir() and not (tmp_path / "r" / "adapter").exists()


def test_a_remote_folder_has_no_tensorboard_and_says_so(base, tmp_path, monkeypatch, capsys):
    from freqkv_jax.training import loop

    class Remote(RunDir):
        def __init__(self, path):
            super().__init__(path)
            self.remote = True

    monkeypatch.setattr(loop, "RunDir", Remote)
    steps = raw(base, tmp_path)["train"] | {"steps": 1}
    assert run(base, tmp_path / "r", train=steps, log={"tensorboard": True}) == 0
    assert "no tensorboard/: " in capsys.readouterr().err
    assert not (tmp_path / "r" / "tensorboard").exists()
    assert (tmp_path / "r" / "export" / "model.safetensors").exists()


def test_samples(base, tmp_path):
    """On a mesh, too; the checkpoint comes first."""
    write_tokenizer(tmp_path)
    held = {"train": [{"path": "train", "kind": "generated"}], "tokenizer": str(tmp_path)}
    log = {"sample_every": 2, "sample_prompt": "ABC", "sample_tokens": 4}
    sections = {"data": held, "train": raw(base, tmp_path)["train"] | {"steps": 2}, "log": log}
    assert run(base, tmp_path / "one", **sections) == 0
    assert run(base, tmp_path / "four", mesh={"data": 2, "fsdp": 2}, **sections) == 0
    one, four = (read_lines(tmp_path / name / "samples.jsonl") for name in ("one", "four"))
    assert [record["step"] for record in one] == [2] and len(one[0]["text"]) == 4
    assert one == four


def test_a_sample_without_a_tokenizer_is_refused_at_the_start(base, tmp_path):
    log = {"sample_every": 2, "sample_prompt": "ABC"}
    with pytest.raises((ValueError, OSError), match="tokenizer"):
        run(base, tmp_path / "r", log=log)
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_failing_sample_costs_no_step(base, tmp_path, monkeypatch):
    from freqkv_jax.training import loop

    def fails(*_):
        raise RuntimeError("no room for a sample")

    monkeypatch.setattr(loop, "sample", fails)
    write_tokenizer(tmp_path)
    data = {"train": [{"path": "train", "kind": "generated"}], "tokenizer": str(tmp_path)}
    log = {"sample_every": 2, "sample_prompt": "ABC"}
    with pytest.raises(RuntimeError, match="no room"):
        run(base, tmp_path / "r", data=data, log=log)
    assert (tmp_path / "r" / "checkpoints" / "2").is_dir()


def test_asked_to_stop_it_saves_before_it_measures(base, tmp_path, monkeypatch):
    held = {"train": [{"path": "a", "kind": "generated"}]}
    held["eval"] = [{"path": "b", "kind": "generated"}]
    best = {"every": 2, "keep_best": True}
    measure, seen = HeldOut.__call__, []

    def spy(self, *args):
        seen.append((tmp_path / "r" / "checkpoints" / "3").is_dir())
        return measure(self, *args)

    monkeypatch.setattr(HeldOut, "__call__", spy)
    stop_at(monkeypatch, 3)
    for eval_every, folder in ((3, "r"), (5, "s")):
        log = {"eval_every": eval_every, "eval_rows": 1}
        assert run(base, tmp_path / folder, data=held, checkpoint=best, log=log) == 0
        steps = [r["step"] for r in read_lines(tmp_path / folder / "metrics.jsonl")]
        assert steps == ([0, 1, 2, 2, 3, 3] if folder == "r" else [0, 1, 2, 2, 3])
    assert seen == [False, False, True] + [True] * 2


def test_held_out_rows_run_through_the_step_s_kind_of_layers(base, tmp_path):
    data = {"train": [{"path": "a", "kind": "generated"}]}
    tree = raw(base, tmp_path, log={"eval_every": 1}, data=data | {"eval": data["train"]})
    for scan in (False, True):
        tree["train"]["scan_layers"] = scan
        made = setup.prepare(schema.from_dict(tree), RunDir(str(tmp_path)))
        assert made.held_out is not None and made.held_out.model.scan_layers is scan


@pytest.mark.parametrize("mode", ["lora", "norms"])
def test_resume_refuses_another_base(tmp_path, mode):
    config = tiny_config(num_layers=1, vocab_size=64)
    model, params = fk.Llama(config, fk.FreqKVConfig(16)), random_params(config)
    fk.save_pretrained(model, params, tmp_path / "base")
    steps = raw("", "")["train"] | {"mode": mode, "steps": 1}
    assert run(tmp_path / "base", tmp_path / "r", train=steps) == 0
    kernel = params["layers_0"]["mlp"]["up"]["kernel"]
    params["layers_0"]["mlp"]["up"]["kernel"] = kernel * np.float32(1.01)
    fk.save_pretrained(model, params, tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"base holds another base .* its weights differ by 0\.\d%"
    ):
        run(tmp_path / "base", tmp_path / "r", train=steps | {"steps": 2})


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
    for record in records:
        record["finite"] = record["step"] not in (6, 7, 8, 9)  # by their gradients
    calm, limits = LossGuard(2.0), []
    for record, value in zip(records, values, strict=True):
        limits.append(calm.limit(record["step"]))
        problem = calm.problem(record["step"], value, record["finite"])
        assert (problem is None) == (record["step"] not in (6, 7, 8, 9, 21, 23))
    for step in (12, 16, 18, 22, 24, 25):
        resumed = LossGuard(2.0, records[: step - 1])
        assert resumed.limit(step) == limits[step - 1]
    assert limits[:15] == [np.inf] * 15 and limits[15] < np.inf
    assert LossGuard(None, records).limit(26) == np.inf


def test_pieces_cover_each_place_once():
    model = fk.Llama(tiny_config(), fk.FreqKVConfig(cache_size=16, sink_size=2))
    held = types.SimpleNamespace(model=model)
    pieces = HeldOut._pieces(held, 32)  # type: ignore[arg-type]
    assert sum(p.astype(int) for p in pieces.values()).tolist() == [0] + [1] * 31
    in_window = sum(p for key, p in pieces.items() if 1 in key)
    assert np.flatnonzero(in_window).tolist() == list(range(1, 17))

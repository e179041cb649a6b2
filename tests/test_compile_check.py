"""`freqkv compile`: sizes, reports and refusals, with 8 fake CPU devices as the target."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from freqkv_jax import compile_check, compile_work
from freqkv_jax.cli import main
from freqkv_jax.compile_check import CHIPS, Target, Work
from freqkv_jax.config import shape_named
from freqkv_jax.kv import FreqKVConfig, FullConfig, SinkWindowConfig
from tests.test_hlo import TPU_LOOP

KV = FreqKVConfig(cache_size=64)  # prefix 34, chunk 30
TINY = ["compile", "--target", "cpu:8", "--model", "tiny", "--cache-size", "64"]


def plan(what, kv=KV, config=None, **sizes):
    config = config or shape_named("tiny", num_layers=1)
    return compile_work.make_plan(what, config, kv, Target.parse("cpu:8").devices(), **sizes)


def device_bytes(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:4x4", "write tpu:GENERATION:TOPOLOGY"),
        ("tpu:v9:4x4", "a generation of v4, v5e, v5p, v6e, tpu7x"),
        ("cpu:0", "is not understood"),
        ("cpu", "is not understood"),
        ("tpu:v5e:4x", "topology '4x' of target"),
        ("tpu:v5e:0x4", "topology '0x4'"),
    ],
)
def test_unknown_targets_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Target.parse(text)


def test_targets_are_read():
    assert dataclasses.astuple(Target.parse("tpu:v5p:2x2x2"))[1:] == ("v5p", "2x2x2")
    assert len(Target.parse("cpu:4").devices()) == 4
    with pytest.raises(ValueError, match="cpu:9 needs 9 CPU devices, jax was started with 8"):
        Target.parse("cpu:9").devices()


def test_a_tpu_target_without_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(compile_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'freqkv-jax\[tpu\]'"):
        Target.parse("tpu:v5e:4x4").devices()


@pytest.mark.parametrize(
    ("shape", "what", "devices", "hbm", "expected"),
    [
        ("llama2-7b", "forward", 16, 16, (1, 2, 8)),
        ("llama3-8b", "decode", 16, 16, (2, 1, 8)),
        ("llama2-13b", "decode", 4, 8, (1, 1, 4)),
        ("llama2-13b", "decode", 16, 4, (1, 2, 8)),  # the weights fill more than half
        ("smollm2-135m", "prefill", 16, 16, (1, 16, 1)),  # 3 kv heads
        ("smollm2-135m", "prefill", 256, 16, (4, 64, 1)),  # hidden size 576 = 64 * 9
        ("tiny", "forward", 8, None, (1, 4, 2)),
    ],
)
def test_default_mesh(shape, what, devices, hbm, expected):
    hbm = hbm and hbm * compile_check.GIB
    sizes = compile_work.default_mesh(shape_named(shape), what, devices, hbm)
    assert tuple(sizes.values()) == expected
    assert tuple(sizes) == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("train", {}, "program 'train' is unknown; allowed: forward, prefill, decode"),
        ("forward", {"seq_len": 0}, "seq_len must be 1 or more, got 0"),
        ("decode", {"batch": -1}, "batch must be 1 or more, got -1"),
        ("decode", {"steps": 31}, "steps 31 do not fit the 30 slots"),
        ("decode", {"steps": 9, "kv": FullConfig(), "seq_len": 8}, "steps 9 do not fit the 8"),
        ("forward", {"batch": 3}, "batch 3 by data\\*fsdp=4"),
        ("forward", {"mesh": {"tensor": 8}}, "num_kv_heads 2 by tensor=8"),
        ("forward", {"mesh": {"data": 3, "tensor": -1}}, "3 does not divide the 8 devices"),
        ("forward", {"mesh": {"data": 2}}, "needs 2 devices, got 8"),
    ],
)
def test_plans_that_cannot_be_are_refused(what, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(what, **changes)


def test_sizes_that_are_left_open():
    assert plan("prefill").seq_len == 4 * KV.chunk
    assert plan("prefill", seq_len=31).seq_len == 2 * KV.chunk
    assert plan("prefill", kv=FullConfig(), seq_len=31).seq_len == 31
    assert plan("forward").seq_len == 8192
    assert plan("forward", mesh={"data": 2, "fsdp": -1}).batch == 8


@pytest.mark.parametrize(
    ("what", "kv"),
    [("forward", KV), ("prefill", KV), ("decode", KV)]
    + [("prefill", FullConfig()), ("decode", FullConfig()), ("decode", SinkWindowConfig(64))],
)
def test_programs_are_compiled_and_measured(what, kv):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    made = plan(what, kv, mesh=mesh, seq_len=100, batch=4, steps=3)
    report = compile_work.report(made, None)
    memory, work = report["memory"], compile_work.build_work(made)
    assert memory["arguments"] == device_bytes(work.arguments)
    assert memory["hbm"] is None and report["estimate"] is None
    assert report["num_cache_all_gathers"] == 0
    assert report["num_kernels"] == 0 and not report["unknown_loops"]
    assert {"all-gather", "all-reduce"} <= {row["kind"] for row in report["collectives"]}
    gathered = {g["origin"] for g in report["all_gathers"]}
    assert "variables/params/layers_0/attention/q/kernel" in gathered
    if what == "forward":
        # [4, 100, 256] float32 over (data, fsdp) = 4 and tensor = 2.
        assert memory["outputs"] == 100 * 256 * 4 // 2 and memory["aliased"] == 0
    else:
        state = work.arguments[work.names.index("state")]
        assert memory["aliased"] >= device_bytes(state.layers) > 0  # updated in place


def test_a_gathered_cache_is_seen():
    made = plan("decode", mesh={"data": 2, "fsdp": 2, "tensor": 2})
    work = compile_work.build_work(made)
    state = work.arguments[1]
    whole = NamedSharding(made.mesh, P())
    is_cache = compile_check.is_cache_gather("decode", KV, jax.tree.leaves(state.layers), 16)

    def gathers(function):
        bad = Work(function, (state,), ("state",))
        compiled = compile_check.compile_work(bad, made.mesh)
        report = compile_check.analyse(compiled, bad.argument_names(), None, 8, 0, 0, is_cache)
        return [g["origin"] for g in report["all_gathers"] if g["touches_cache"]]

    def moved(state):
        return jax.lax.with_sharding_constraint(state.layers[0].k, whole)

    def computed(state):
        return jax.lax.with_sharding_constraint(state.layers[0].v * 2, whole)

    # Axis by axis: what the first gather gives counts as computed, and is as large.
    assert "state/layers/0/k" in gathers(moved)
    assert gathers(computed)
    assert not gathers(lambda state: jax.lax.with_sharding_constraint(state.fill + 1, whole))


def test_large_activations_of_a_parallel_form_are_no_cache():
    made = plan("forward", mesh={"data": 2, "fsdp": 2, "tensor": 2})
    leaves = jax.tree.leaves(compile_work.build_work(plan("decode")).arguments[1].layers)
    test = compile_check.is_cache_gather("forward", made.model.kv, leaves, 16)

    def gather(*dims):
        output = SimpleNamespace(dims=dims, size=math.prod(dims))
        return SimpleNamespace(output=(output,))

    assert test(gather(4, 64, 2, 16)) and test(gather(4, 2, 30, 2, 16))
    assert not test(gather(4, 8192, 64)) and not test(gather(16, 16))


def test_attended_entries_by_counting():
    assert compile_check.attended_entries(FullConfig(), "forward", 5, 99) == 1 + 2 + 3 + 4 + 5
    assert compile_check.attended_entries(FullConfig(), "decode", 3, 10) == 8 + 9 + 10
    # Tokens 1..64 see as many entries; the 65th is in slot 34 and sees 35.
    assert compile_check.attended_entries(KV, "forward", 66, 0) == 64 * 65 // 2 + 35 + 36
    assert compile_check.attended_entries(KV, "prefill", 31, 0) == sum(range(35, 65)) + 35
    assert compile_check.attended_entries(KV, "decode", 2, 0) == 35 + 36


def test_useful_flops_by_hand():
    config = shape_named("tiny")
    # q, o: 64*64; k, v: 64*32; gate, up, down: 64*128; two layers; head 64*256.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    attention = 4 * 4 * 16 * 2 * (10 * 11 // 2)
    total = compile_check.useful_flops(config, KV, "forward", 3, 10, 0)
    assert total == 3 * (2 * 10 * (weights + 64 * 256) + attention)
    assert compile_check.attention_flops(config, KV, "forward", 3, 10, 0) == 3 * attention
    once = compile_check.useful_flops(config, KV, "prefill", 1, 30, 0)
    assert once == 2 * (30 * weights + 64 * 256) + 4 * 4 * 16 * 2 * sum(range(35, 65))


def test_the_estimate_counts_kernels_at_the_peak():
    memory = SimpleNamespace(
        argument_size_in_bytes=100, output_size_in_bytes=60, alias_size_in_bytes=50,
        temp_size_in_bytes=7, generated_code_size_in_bytes=3,
    )  # fmt: skip
    compiled = SimpleNamespace(
        as_text=lambda: TPU_LOOP, cost_analysis=lambda: None, memory_analysis=lambda: memory
    )
    chip = CHIPS["v5e"]
    report = compile_check.analyse(compiled, ["x"], chip, 2, 200 * 131072, 14 * 131072)
    assert report["memory"]["total"] == 100 + (60 - 50) + 7 + 3
    estimate = report["estimate"]
    assert (estimate["cycles"], estimate["kernel_cycles"]) == (43, 7)
    assert estimate["longest_loop"] == {"runs": 4, "cycles": 10}
    # 100 cycles' worth of FLOPs a device in 50 cycles.
    assert estimate["mfu"] == pytest.approx(100 / 50)
    assert estimate["seconds"] == pytest.approx(50 / chip.clock_hz)
    assert "not a measurement" in estimate["note"]


def test_a_program_that_does_not_fit_is_a_clear_error(monkeypatch):
    def refuse(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory\nUsed 20G of 16G")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    mesh = plan("decode").mesh
    with pytest.raises(ValueError, match="does not fit the device's memory.*Used 20G of 16G; take"):
        compile_check.compile_work(Work(lambda x: x, (jnp.ones(2),), ("x",)), mesh)


def test_command_line_report(tmp_path, capsys):
    file = tmp_path / "new" / "report.json"
    flags = ["--what", "decode", "--steps", "4", "--layers", "1", "--json", str(file)]
    assert main([*TINY, *flags, "--mesh", "data=2,fsdp=-1,tensor=2"]) == 0
    out = capsys.readouterr().out
    for text in (
        "one compression of every cache, then 4 greedy steps, 4 rows, 64 slots",
        "8 of cpu:8, mesh data=2,fsdp=2,tensor=2",
        "1 layers, bfloat16",
        "cache gathered   no",
        "all-reduce",
        "estimate         none off TPU",
    ):
        assert text in out
    report = json.loads(file.read_text())
    assert report["kv"]["cache_size"] == 64 and report["steps"] == 4
    assert report["memory"]["total"] > 0 and report["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama9"], "no file or folder here and no shape; shapes: tiny"),
        (["--target", "tpu:v1:2x2"], "is not understood"),
        (["--batch", "3"], "batch 3 by data*fsdp=4"),
        (["--layers", "3"], "--layers must be 1 to 2 here, got 3"),
        (["--mesh", "rows=2"], "--mesh 'rows=2' is not understood"),
        (["--sink-size", "64"], "need sink_size + recent_size < cache_size"),
        (["--attention", "cudnn", "--dtype", "float32"], "cuDNN attention takes bfloat16"),
    ],
)
def test_command_line_errors_are_one_line(flags, message, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert (
        main([*TINY, "--what", "prefill", "--mesh", "fsdp=4,tensor=2", *flags, "--json", str(file)])
        == 2
    )
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("freqkv compile: error: ") and message in err[-1]
    assert not list(tmp_path.iterdir())


def test_a_model_on_disk_is_read_with_its_policy(tmp_path, capsys):
    config = shape_named("tiny", num_layers=1).to_hf()
    config["freqkv_jax"] = {"policy": "sink_window", "cache_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--target", "cpu:8", "--model", str(tmp_path), "--what", "decode", "--steps", "2"]
    assert main(["compile", *flags]) == 0
    assert "sink_window cache_size=32" in capsys.readouterr().out


def test_help_names_shapes_and_programs(capsys):
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    out = capsys.readouterr().out
    assert "llama3-8b" in out and "tpu:v5e:4x4" in out and "prefill" in out

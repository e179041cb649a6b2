import json

import jax
import pytest

from freqkv_jax.cli import main
from freqkv_jax.sharding import make_mesh
from freqkv_jax.training import compile_step, schema


def config(tmp_path, **train):
    return schema.from_dict(
        {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": "tiny", "dtype": "float32"},
            "kv": {"policy": "freqkv", "cache_size": 32, "sink_size": 4},
            "data": {"train": [{"path": "train", "kind": "generated"}]},
            "train": {"steps": 2, "batch_size": 8, "seq_len": 64} | train,
        }
    )


def test_work_is_the_real_step_in_shapes(tmp_path):
    cfg = config(tmp_path, mode="lora")
    mesh = make_mesh(2, 2, 2)
    work = compile_step.build_work(cfg, compile_step.model_of(cfg), mesh)
    names = work.argument_names()
    assert "state/trainable/lora/layers_0/attention/q/a" in names
    assert "frozen/layers_1/mlp/down/kernel" in names and names[-1] == "limit"
    shardings = [x.sharding.mesh for x in jax.tree.leaves(work.arguments)]
    assert set(shardings) == {mesh}
    assert work.donate == (0,)


def test_gathers_are_counted_by_pass_and_micro_batch():
    def gather(origin, op_name, runs):
        return {"origin": origin, "op_name": op_name, "runs": runs}

    counts = compile_step.weight_gathers(
        [
            gather("frozen/q", "jit(step)/while/jvp(hidden)/q", 4),
            gather("frozen/q", "jit(step)/while/transpose(jvp(hidden))/rematted/q", 4),
            gather("frozen/q", "jit(step)/while/transpose(jvp(hidden))/q", 4),
            gather("state/a", "jit(step)/jvp(hidden)/a", 1),
            gather("computed", "jit(step)/x", 9),
        ],
        4,
    )
    assert counts == {
        "frozen/q": {"forward": 1.0, "backward": 2.0},
        "state/a": {"forward": 0.25, "backward": 0.0},
    }


@pytest.mark.slow
def test_each_frozen_weight_is_gathered_once_a_pass(tmp_path):
    """With a CPU's compiler; tests/tpu asks the TPU's."""
    cfg = config(tmp_path, mode="lora", micro_batch=1)
    mesh = make_mesh(2, 2, 2)
    report = compile_step.report(cfg, compile_step.model_of(cfg).config, mesh, None)
    counts = report["weight_gathers"]
    kernels = {path for path in counts if path.startswith("frozen/layers_")}
    assert len(kernels) == 2 * 7
    # This compiler gathers some before the micro-batches, once for all of them.
    assert all(counts[path]["forward"] <= 1 == counts[path]["backward"] for path in kernels), counts


@pytest.mark.slow
def test_compile_only_prints_the_report_and_trains_nothing(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(schema.to_dict(config(tmp_path, mode="lora"))))
    words = ["train", "--config", str(file), "--compile-only", "cpu:8", "--set", "mesh.data=-1"]
    assert main([*words, "--set", "mesh.tensor=2", "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert "mesh data=4,fsdp=1,tensor=2" in printed and "cache gathered   no" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["memory"]["aliased"] > 0, "the state is donated"
    assert report["num_cache_all_gathers"] == 0
    assert not any(move["touches_cache"] for move in report["other_moves"])
    assert not (tmp_path / "run").exists()

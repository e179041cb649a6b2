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
    assert not (tmp_path / "run").exists()

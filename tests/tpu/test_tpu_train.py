"""The real TPU compiler on the training step of every packaged config (make test-tpu).

Two layers of each, which tell what moves; all of them with FREQKV_TPU_LAYERS=32, which takes many
minutes a program and tells what fits.
"""

import json
import math
import os
import subprocess
import sys

import pytest

from freqkv_jax.training import schema
from freqkv_jax.training.plan import planned_config
from freqkv_jax.training.yaml_file import packaged_configs

LAYERS = int(os.environ.get("FREQKV_TPU_LAYERS", "2"))
MATRICES = 7  # q, k, v, o, gate, up, down of a layer
# Each config on the smallest machine that is to hold it, and what one device asks of the mesh.
SMALLEST = [
    ("tiny", "tpu:v5e:2x2", ("mesh.fsdp=-1",)),
    ("smollm2_8k", "tpu:v5e:2x2", ("mesh.fsdp=-1",)),
    ("llama2_7b_8k", "tpu:v5e:4x4", ()),
    ("llama2_7b_8k", "tpu:v5p:2x2x2", ()),
    ("llama2_7b_16k", "tpu:v5e:4x4", ()),
    ("llama2_7b_32k", "tpu:v6e:4x4", ()),
    ("llama3_8b_16k", "tpu:v6e:4x4", ()),
    ("llama2_7b_longalpaca", "tpu:v5e:4x4", ()),
    ("llama2_7b_full", "tpu:v5e:16x16", ()),
    ("llama2_7b_full", "tpu:v5p:4x4x4", ()),
]

pytestmark = pytest.mark.tpu


def report_of(tmp_path, name, target, sets):
    """Compiled in a process of its own: libtpu reads its settings when it is loaded."""
    file = tmp_path / "report.json"
    layers = min(LAYERS, planned_config(schema.load(name)).num_layers)
    command = [sys.executable, "-m", "freqkv_jax", "train", "--config", name, "--json", str(file)]
    command += ["--compile-only", target, "--layers", str(layers), "--set", "run.seed=0", *sets]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1700)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_every_packaged_config_is_compiled():
    assert {name for name, *_ in SMALLEST} == set(packaged_configs())


@pytest.mark.parametrize(("name", "target", "sets"), SMALLEST)
def test_the_step_compiles_and_moves_what_it_must(tmp_path, name, target, sets):
    cfg = schema.load(name, sets)
    report = report_of(tmp_path, name, target, sets)
    assert 0 < report["memory"]["total"] < report["memory"]["hbm"]
    assert not report["unknown_loops"]
    assert report["memory"]["aliased"] > 0, "the state is donated"
    # No cache moves, be it by a gather or otherwise.
    assert report["num_cache_all_gathers"] == 0
    moves = report["other_moves"]
    assert not any(move["touches_cache"] for move in moves), moves
    # Each weight comes at most once forward and once backward in a micro-batch...
    counts = report["weight_gathers"]
    tied = planned_config(cfg).tie_word_embeddings  # then the embedding comes as the head, too
    for path, count in counts.items():
        most = 2 if tied and path.endswith("embed/embedding") else 1
        assert max(count.values()) <= most, (path, count)
    frozen = {path: count for path, count in counts.items() if path.startswith("frozen/layers_")}
    if cfg.train.mode == "lora":
        assert len(frozen) == MATRICES * report["num_layers"]
        assert all(count == {"forward": 1, "backward": 1} for count in frozen.values())
    # ... and none comes piece by piece, in a ring of permutes that would not be among them.
    fsdp = report["mesh"]["fsdp"]
    hidden = planned_config(cfg).hidden_size
    piece = hidden * hidden // fsdp * 2
    rings = [m for m in moves if m["kind"] == "collective-permute" and m["bytes"] >= piece]
    if cfg.train.mode == "lora":
        assert not rings, rings
    assert math.isfinite(report["estimate"]["seconds"])

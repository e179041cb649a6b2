"""The real TPU compiler on Llama shapes, without a TPU (make test-tpu).

Every layer compiles to the same program, so two of them are compiled; all of them with
FREQKV_TPU_LAYERS=32, which takes minutes a program.
"""

import json
import os
import subprocess
import sys

import pytest

from freqkv_jax.cli import COMMANDS

LAYERS = int(os.environ.get("FREQKV_TPU_LAYERS", "2"))
PARALLEL = ("forward", "prefill")

pytestmark = pytest.mark.tpu


def freqkv(*flags):
    """Runs the command in a process of its own: libtpu reads its settings when it is loaded."""
    assert "compile" in COMMANDS
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "freqkv_jax", "compile", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=1700)


def report_of(tmp_path, target, model, what, *flags):
    file = tmp_path / "report.json"
    layers = ("--layers", str(LAYERS))
    done = freqkv(
        "--target", target, "--model", model, "--what", what, *layers, "--json", str(file), *flags
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "libtpu" not in done.stderr
    return json.loads(file.read_text())


def check(report, what):
    assert report["num_cache_all_gathers"] == 0, report["all_gathers"]
    assert not report["unknown_loops"]
    memory = report["memory"]
    assert 0 < memory["total"] < memory["hbm"]
    estimate = report["estimate"]
    assert estimate["cycles"] > 0 and 0 < estimate["mfu"] <= 1
    if what != "forward":
        shape = report["mesh"]
        config = {"llama2-7b": 32, "llama3-8b": 8}[report["model"]]
        rows = report["batch"] // (shape["data"] * shape["fsdp"])
        cache = 2 * LAYERS * rows * config // shape["tensor"] * 4096 * 128 * 2
        assert memory["aliased"] >= cache  # donated: the cache is updated in place
    # Splash attention where there is a whole square of scores.
    assert (report["num_kernels"] >= LAYERS) == (what in PARALLEL)


@pytest.mark.parametrize("what", ["forward", "prefill", "decode"])
@pytest.mark.parametrize("model", ["llama2-7b", "llama3-8b"])
def test_llama_shapes_on_v5e(tmp_path, model, what):
    report = report_of(tmp_path, "tpu:v5e:4x4", model, what)
    assert report["num_devices"] == 16 and report["mesh"]["tensor"] == 8
    check(report, what)


@pytest.mark.parametrize("what", ["forward", "prefill", "decode"])
@pytest.mark.parametrize("model", ["llama2-7b", "llama3-8b"])
def test_llama_shapes_on_v5p(tmp_path, model, what):
    check(report_of(tmp_path, "tpu:v5p:2x2x1", model, what, "--mesh", "fsdp=2,tensor=2"), what)


def test_sharded_weights_are_gathered_in_decode_and_caches_are_not(tmp_path):
    mesh = ("--mesh", "data=2,fsdp=2,tensor=4", "--batch", "8")
    report = report_of(tmp_path, "tpu:v5e:4x4", "llama3-8b", "decode", *mesh)
    check(report, "decode")
    assert any("lm_head" in gather["origin"] for gather in report["all_gathers"])


def test_the_fft_form_compiles(tmp_path):
    flags = ("--compress-method", "fft", "--cache-size", "1024")
    report = report_of(tmp_path, "tpu:v5e:2x2", "smollm2-135m", "decode", *flags)
    assert report["memory"]["total"] < report["memory"]["hbm"]


def test_blocked_attention_can_be_asked_for(tmp_path):
    flags = ("--attention", "blocked", "--cache-size", "1024", "--seq-len", "2048")
    report = report_of(tmp_path, "tpu:v5e:2x2", "smollm2-135m", "forward", *flags)
    assert report["num_kernels"] == 0 and report["num_cache_all_gathers"] == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tpu:v5e:3x5", "libtpu knows no topology 3x5 of v5e"),
        ("tpu:v3:4x4", "a generation of v4, v5e, v5p, v6e, tpu7x"),
    ],
)
def test_unknown_targets(target, message):
    done = freqkv("--target", target, "--model", "tiny", "--what", "decode")
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_what_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "report.json"
    flags = ("--policy", "full", "--seq-len", str(2**20), "--batch", "16", "--layers", "1")
    done = freqkv(
        "--target", "tpu:v5e:2x2", "--model", "llama2-7b", "--what", "decode", *flags,
        "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 2
    assert "does not fit the device's memory" in done.stderr
    assert not file.exists()

"""States on disk: bit for bit the same, refused by strangers, whole or not there."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import freqkv_jax as fk
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, assert_close

CONFIG = tiny_config(4, 2, vocab_size=64)
PARAMS = random_params(CONFIG)
TOKENS = random_tokens(CONFIG, 2, 40)


def read(kv, dtype="float32"):
    model = fk.Llama(CONFIG, kv, dtype)
    logits, state = fk.prefill(model, PARAMS, TOKENS, [40, 7])
    return model, logits, state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kv",
    [
        fk.FreqKVConfig(16, 4),
        pytest.param(fk.SinkWindowConfig(16), marks=pytest.mark.slow),
        fk.FullConfig(),
    ],
    ids=str,
)
def test_round_trip(tmp_path, kv, dtype):
    model, logits, state = read(kv, dtype)
    path = tmp_path / "deep" / "state.safetensors"
    fk.save_state(state, path, model)
    again = fk.load_state(path, model)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    want, _, _ = fk.decode(model, PARAMS, state, logits, 12)
    assert fk.decode(model, PARAMS, again, logits, 12)[0].tolist() == want.tolist()
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_on_a_mesh(tmp_path):
    model, _, state = read(fk.FreqKVConfig(16, 4))
    fk.save_state(state, tmp_path / "s", model)
    placed = fk.load_state(tmp_path / "s", model, mesh=fk.make_mesh(2, 1, 2))
    leaf = jax.tree.leaves(placed.layers)[0]
    assert leaf.addressable_shards[0].data.shape == (1, 1, 16, 8)
    fk.save_state(placed, tmp_path / "t", model)
    again = fk.load_state(tmp_path / "t", model)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    model, _, state = read(fk.FreqKVConfig(16, 4))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    fk.save_state(state, tmp_path / "s", model)
    assert not list(tmp_path.iterdir())


TOGETHER = """
import sys
import jax

address, number, path = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))
import freqkv_jax as fk
from freqkv_jax.sharding import param_shardings
from tests.test_state_file import CONFIG, PARAMS, TOKENS

mesh = fk.make_mesh(data=2, tensor=2)
params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
model = fk.Llama(CONFIG, fk.FreqKVConfig(16, 4))
_, state = fk.prefill(model, params, TOKENS, [40, 7])
fk.save_state(state, path, model)
fk.load_state(path, model, mesh)
"""


@pytest.mark.slow
def test_two_processes_save_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, address, number, str(tmp_path / "s")],
            cwd=Path(__file__).parent.parent, env=env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for number in "01"
    ]  # fmt: skip
    try:
        for process in started:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
    model, _, want = read(fk.FreqKVConfig(16, 4))
    got = fk.load_state(tmp_path / "s", model)
    assert got.fill.tolist() == want.fill.tolist() and got.seen.tolist() == want.seen.tolist()
    for layer in range(CONFIG.num_layers):
        for a, b in zip(got.kv(layer), want.kv(layer), strict=True):
            for row, fill in enumerate(want.fill.tolist()):
                assert_close(a[row, :, :fill], b[row, :, :fill], LOGITS)


def test_strangers_are_refused(tmp_path):
    model, _, state = read(fk.FreqKVConfig(16, 4))
    path = tmp_path / "state"
    fk.save_state(state, path, model)
    with pytest.raises(ValueError, match="was saved with policy FreqKVConfig.cache_size=16"):
        fk.load_state(path, model.clone(kv=fk.FreqKVConfig(32, 4)))
    with pytest.raises(ValueError, match="belongs to another model: its model is"):
        fk.load_state(path, fk.Llama(tiny_config(4, 4, vocab_size=64), model.kv))
    with pytest.raises(ValueError, match="its dtype is float32, here it is bfloat16"):
        fk.load_state(path, model.clone(dtype="bfloat16"))
    with pytest.raises(ValueError, match="the state belongs to policy"):
        fk.save_state(state, path, model.clone(kv=fk.FullConfig()))


def test_damage_is_told(tmp_path):
    model, _, state = read(fk.FreqKVConfig(16, 4))
    path = tmp_path / "state"
    fk.save_state(state, path, model)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="state is damaged"):
        fk.load_state(path, model)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="state is damaged"):
        fk.load_state(path, model)
    with pytest.raises(FileNotFoundError, match="no state file at"):
        fk.load_state(tmp_path / "absent", model)


def test_other_safetensors_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="is no state file"):
        fk.load_state(tmp_path / "weights", read(fk.FreqKVConfig(16, 4))[0])


def test_a_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    model, _, state = read(fk.FreqKVConfig(16, 4))
    path = tmp_path / "state"
    path.write_text("earlier")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        fk.save_state(state, path, model)
    assert path.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1

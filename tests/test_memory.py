"""Memory does not grow with the text: state arrays, and the whole process on the real model."""

import json
import subprocess
import sys

import numpy as np
import pytest

import freqkv_jax as fk
from tests.tiny import random_params, random_tokens, tiny_config

# Run in a process of its own, whose peak resident memory is then that of one length.
PROBE = """
import json, resource, sys
import jax, numpy as np
import freqkv_jax as fk

path, what, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, params = fk.load_pretrained(path, kv=fk.FreqKVConfig(2048), dtype="float32")
tokens = np.random.default_rng(0).integers(0, 49152, (1, length)).astype(np.int32)
if what == "score":
    fk.score(model, params, tokens)
    nbytes = None
else:
    logits, state = fk.prefill(model, params, tokens)
    jax.block_until_ready(logits)
    nbytes = state.nbytes
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak, "state": nbytes}))
"""


@pytest.mark.parametrize(
    "kv",
    [fk.FreqKVConfig(64, 4), pytest.param(fk.SinkWindowConfig(64, 4), marks=pytest.mark.slow)],
    ids=str,
)
def test_state_bytes_are_constant(kv):
    config = tiny_config(num_layers=1)
    model, params, sizes = fk.Llama(config, kv), random_params(config), set()
    for length in (64, 4096, 65536):
        _, state = fk.prefill(model, params, random_tokens(config, 1, length))
        assert int(state.seen[0]) == length and int(state.fill[0]) == kv.fill_after(length)
        sizes.add(state.nbytes)
    assert sizes == {kv.kv_bytes(config, "float32")}


@pytest.mark.slow
def test_a_million_tokens():
    config = tiny_config(num_layers=1)
    kv = fk.FreqKVConfig(64, 4)
    model, params = fk.Llama(config, kv), random_params(config)
    logits, state = fk.prefill(model, params, random_tokens(config, 1, 1_000_000))
    assert state.nbytes == kv.kv_bytes(config, "float32")
    assert np.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["score", "prefill"])
def test_peak_memory_of_the_real_model(smollm2_gguf, what):
    found = []
    for length in (16384, 65536):
        run = subprocess.run(
            [sys.executable, "-c", PROBE, str(smollm2_gguf), what, str(length)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(json.loads(run.stdout.splitlines()[-1]))
    short, long = found
    assert short["state"] == long["state"]
    assert long["peak"] <= 1.10 * short["peak"], (short, long)

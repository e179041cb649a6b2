"""The paper authors' own logits (tests/data/goldens) against the oracle and against the library."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import freqkv_jax as fk
from freqkv_jax.config import LlamaConfig
from freqkv_jax.model.llama import Llama
from tests import oracle
from tests.hf_names import to_params
from tests.tolerances import LOGITS, assert_close

FOLDER = Path(__file__).parent / "data" / "goldens" / "mha"
LENGTHS = [40, 100]
KV = fk.FreqKVConfig(cache_size=64, sink_size=4, recent_size=0, retain_ratio=0.5)


@pytest.fixture(scope="module")
def golden():
    """config, params, tokens [2, 100] and {T: logits [2, T, 128]}."""
    config = LlamaConfig.from_hf(json.loads((FOLDER / "config.json").read_text()))
    params = to_params(load_file(FOLDER / "model.safetensors"), config)
    data = np.load(FOLDER / "logits.npz")
    logits = {length: data[f"C64_s4_r0.5_T{length}"] for length in LENGTHS}
    return config, params, data["tokens"].astype(np.int32), logits


@pytest.mark.parametrize("length", LENGTHS)
def test_oracle(golden, length):
    config, params, tokens, logits = golden
    got = oracle.logits(config, params, oracle.from_policy(KV), tokens[:, :length])
    assert_close(got, logits[length], LOGITS)


@pytest.mark.parametrize("method", ["matmul", "fft"])
@pytest.mark.parametrize("length", LENGTHS)
def test_parallel_form(golden, length, method):
    config, params, tokens, logits = golden
    model = Llama(config, fk.FreqKVConfig(cache_size=64, method=method))
    got = jax.jit(model.apply)({"params": params}, tokens[:, :length])
    assert_close(got, logits[length], LOGITS)


@pytest.mark.parametrize("block_len", [None, 1, 7, 30, 64, 100])
def test_prefill_in_blocks(golden, block_len):
    config, params, tokens, logits = golden
    got, state = fk.prefill(Llama(config, KV), params, tokens, block_len=block_len)
    assert_close(got, logits[100][:, -1], LOGITS)
    assert state.fill.tolist() == [40, 40] and state.seen.tolist() == [100, 100]


def test_prefill_rows_of_different_lengths(golden):
    config, params, tokens, logits = golden
    for lengths in ([64, 95], [1, 65], [94, 100]):
        got, _ = fk.prefill(Llama(config, KV), params, tokens, lengths=lengths)
        want = np.stack([logits[100][row, n - 1] for row, n in enumerate(lengths)])
        assert_close(got, want, LOGITS)


def test_one_token_at_a_time(golden):
    config, params, tokens, logits = golden
    model, state = Llama(config, KV), None
    for t in range(100):
        got, state = fk.prefill(model, params, tokens[:, t : t + 1], state=state)
        assert_close(got, logits[100][:, t], LOGITS)


def test_score(golden):
    config, params, tokens, logits = golden
    want = np.log(oracle.softmax(logits[100][:, :-1].astype(np.float64)))
    want = np.take_along_axis(want, tokens[:, 1:, None], axis=-1)[..., 0]
    assert_close(fk.score(Llama(config, KV), params, tokens), want, LOGITS)

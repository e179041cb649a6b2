"""Spectra against scipy's DCT of what a full cache holds, and the fate of entries by hand."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

import freqkv_jax as fk
from freqkv_jax.evals import spectrum
from freqkv_jax.evals.spectrum import (
    KINDS,
    Spectrum,
    binned,
    energies,
    kept_energy,
    left_after,
    pack,
    unpack,
)
from freqkv_jax.model.llama import Llama
from freqkv_jax.spectral import lowpass_matrix
from tests.tiny import random_params, tiny_config
from tests.tolerances import COMPRESS, assert_close

CONFIG = tiny_config()
MODEL = Llama(CONFIG, fk.FullConfig())
PARAMS = random_params(CONFIG)
TOKENS = np.random.default_rng(5).integers(0, 61, 150).astype(np.uint16)


@dataclasses.dataclass
class FakeEngine:
    model: Llama = MODEL
    params: dict = dataclasses.field(default_factory=lambda: PARAMS)

    @property
    def tokenizer(self):
        raise ValueError("this model has no tokenizer")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "tokens.bin"
    TOKENS.tofile(path)
    return str(path)


def expected(tokens, sink):
    """From the cache of a prefill: rotated keys and values; keys are turned back."""
    _, state = fk.prefill(MODEL, PARAMS, tokens[None].astype(np.int32))
    layers = []
    for layer in range(CONFIG.num_layers):
        k, v = (np.asarray(x)[0, :, : len(tokens)] for x in state.kv(layer))
        plain = np.asarray(MODEL.rope.rotate_slots(jnp.asarray(k), inverse=True))
        kinds = []
        for x in (plain, k, v):
            energy = scipy.fft.dct(x[:, sink:].astype(np.float64), axis=1, norm="ortho") ** 2
            energy = energy.mean(axis=-1)
            kinds.append(energy / energy.sum(axis=-1, keepdims=True))
        layers.append(kinds)
    return np.array(layers)


def test_energy_is_that_of_what_a_cache_holds():
    got = energies(MODEL, PARAMS, TOKENS[:90].astype(np.int32))
    want = expected(TOKENS[:90], sink=4)
    assert got.shape == (2, 3, 2, 86)
    assert np.abs(want[:, 0] - want[:, 1]).max() > 100 * COMPRESS, "rotary must make a difference"
    assert_close(got, want, COMPRESS)


def test_the_result_of_windows(data):
    task = Spectrum(data=data, seq_len=60, num_windows=3)
    engine = FakeEngine(Llama(CONFIG, fk.FreqKVConfig(cache_size=64, sink_size=7)))
    items = task.items(engine)
    assert [item.key for item in items] == ["spectrum/0", "spectrum/45", "spectrum/90"]
    records = task.run(engine, items[:2]) + task.run(engine, items[2:])
    got = json.loads(json.dumps(task.summarize(engine, records), allow_nan=False))
    energy = np.array(got["energy"])
    want = np.mean([expected(TOKENS[start : start + 60], 7) for start in (0, 45, 90)], axis=0)
    assert_close(energy, want, COMPRESS)
    assert_close(energy.sum(axis=-1), np.ones((2, 3, 2)), COMPRESS)
    assert got["kinds"] == list(KINDS) and got["num_frequencies"] == 53 and got["sink_size"] == 7
    half = np.array(got["kept_by_ratio"]["0.5"])
    want_half = want[..., :26].sum(axis=-1) + 0.5 * want[..., 26]
    assert_close(half, want_half, COMPRESS)
    assert task.describe(engine)["num_tokens"] == 150
    assert got["table"]["rows"][0][0] == "0.0625 of the frequencies"


def test_bins_keep_the_sum(data, monkeypatch):
    energy = np.arange(10.0)
    assert binned(energy, 4).tolist() == [0 + 1, 2 + 3 + 4, 5 + 6 + 7, 8 + 9]
    assert binned(energy, None) is energy
    assert kept_energy(energy, 1.0) == 45 and kept_energy(energy, 0.55) == 10 + 0.5 * 5
    task = Spectrum(data=data, seq_len=60, bins=5)
    engine = FakeEngine()
    monkeypatch.setattr(spectrum, "energies", lambda *_: np.full((2, 3, 2, 56), 1 / 56))
    got = task.summarize(engine, task.run(engine, task.items(engine)))
    sums = np.array([11, 11, 12, 11, 11]) / 56
    assert_close(got["energy"], np.broadcast_to(sums, (2, 3, 2, 5)), COMPRESS)


def test_pack_is_exact():
    array = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    assert (unpack(pack(array), (2, 3)) == array).all()


def test_what_rounds_leave_of_an_entry():
    kv = fk.FreqKVConfig(cache_size=24, sink_size=2, recent_size=0, retain_ratio=0.5)
    got = left_after(kv)
    matrix = np.eye(24)
    matrix[2:] = 0
    matrix[2:13, 2:] = lowpass_matrix(22, 11)
    fate = np.eye(24)[:, kv.prefix :]
    for energy, largest in zip(got["energy"], got["largest"], strict=True):
        assert_close(energy, (fate**2).sum(axis=0).mean(), COMPRESS)
        assert_close(largest, np.abs(fate).max(axis=0).mean(), COMPRESS)
        fate = matrix @ fate
    assert got["energy"][0] == 1 and got["slots"][0] == 1 and len(got["energy"]) == 9
    # A window drops entries whole, and the others stay alone in their slots.
    window = left_after(fk.SinkWindowConfig(cache_size=24, sink_size=2))
    assert window["energy"] == window["largest"]
    assert window["energy"][:4] == [1.0, 1.0, 0.0, 0.0]
    assert left_after(fk.FullConfig()) is None
    assert left_after(fk.SpectralNoveltyConfig(cache_size=64)) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 151}, "150 tokens, fewer than --seq-len 151"),
        ({"seq_len": 5}, "leaves 1 tokens behind 4 sinks"),
        ({"seq_len": 20, "bins": 17}, "more than the 16 frequencies"),
        ({"data": "/nowhere.bin"}, "is not a file"),
    ],
)
def test_what_does_not_fit_is_said(data, options, words):
    task = Spectrum(**({"data": data} | options))
    with pytest.raises((ValueError, OSError), match=words):
        task.items(FakeEngine())


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="--num-windows must be at least 1, got 0"):
        Spectrum(data="x", num_windows=0)


def test_weights_that_are_not_numbers(data, monkeypatch):
    monkeypatch.setattr(spectrum, "energies", lambda *_: np.full((2, 3, 2, 26), np.nan))
    task = Spectrum(data=data, seq_len=30)
    engine = FakeEngine()
    with pytest.raises(ValueError, match="not numbers"):
        task.run(engine, task.items(engine))

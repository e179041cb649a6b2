"""Filling a sample to a length, and the words that samples are made of."""

import sys

import pytest

from freqkv_jax.evals import ruler_sample
from freqkv_jax.evals.ruler_sample import Dice, TooShort, fit


@pytest.mark.parametrize("seed", range(60))
def test_fit(seed):
    rng = Dice(seed, "fit", 0)(0, "sizes")
    sizes = [rng.randint(5, rng.choice([6, 20, 300])) for _ in range(400)]
    fixed, tries = rng.randint(0, 200), []

    def read(units):
        tries.append(units)
        return range(fixed + sum(sizes[:units]))

    budget, least = rng.randint(fixed + 5, 3000), rng.randint(0, 1)
    most = rng.choice([None, 30])
    if budget < fixed + sum(sizes[:least]):
        with pytest.raises(TooShort):
            fit(read, budget, 20, least, most, 1)
        return
    units, tokens = fit(read, budget, rng.choice([0, 20, 390]), least, most, rng.choice([0, 1, 5]))
    assert len(tokens) == fixed + sum(sizes[:units]) <= budget
    assert units == most or len(tokens) + sizes[units] > budget
    assert len(tries) == len(set(tries)) <= 20


def test_real_words():
    pytest.importorskip("wonderwords")
    words = ruler_sample.read_words()
    assert len(words.nouns) > 6000 and len(words.adjectives) > 800 and len(words.verbs) > 900
    assert words.source.path.startswith("wonderwords ")
    if words.source.path.endswith(" 3.0.1"):
        assert len(words.all) == 8166


def test_words_package_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(ImportError, match=r"pip install 'freqkv-jax\[eval\]'"):
        ruler_sample.read_words.__wrapped__()

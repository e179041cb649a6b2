"""Answers and scores of a real tiny model: whatever the batch, the same as one row alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import sharding
from freqkv_jax.evals import engine as module
from freqkv_jax.evals.engine import ModelEngine
from freqkv_jax.evals.task import Answer, Prompt
from freqkv_jax.model.llama import Llama
from tests import oracle
from tests.tiny import random_params, tiny_config
from tests.tolerances import LOGITS, assert_close

CONFIG = tiny_config(num_layers=1)
PARAMS = random_params(CONFIG)
MODEL = Llama(CONFIG, fk.FreqKVConfig(cache_size=24, sink_size=2))
EOS = 60
# Two rows everywhere: what is compiled for one test serves the others.
ROWS = 2


class Letters:
    """Token i is the i-th letter from "A" on; ids in `eos_ids` are special."""

    def __init__(self, eos_ids=(EOS,)):
        self.eos_ids = eos_ids

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if not (skip_special_tokens and i in self.eos_ids)]
        return "".join(chr(65 + i) for i in kept)


def prompt(length, seed=0, **changes):
    ids = np.random.default_rng(seed).integers(0, 60, length)
    return Prompt(key=str(length), length=length, tokens=tuple(ids.tolist()),
                  **({"max_new_tokens": 20} | changes))  # fmt: skip


PROMPTS = [prompt(30), prompt(7, 1)]
MORE = [prompt(41, 2), prompt(30, 3, max_new_tokens=9), prompt(1, 4)]


def engine(rows=ROWS, eos=(EOS,)):
    return ModelEngine(MODEL, PARAMS, lambda: Letters(eos), rows)


@pytest.fixture(scope="module")
def likely():
    """The library's own generation; no end token is met."""
    return fk.generate(MODEL, PARAMS, [p.tokens for p in PROMPTS], 20, eos_id=EOS)


def test_answers_are_greedy(likely):
    want = [Answer(Letters().decode(ids), 20, False) for ids in likely]
    assert engine().generate(PROMPTS) == want
    short = [
        dataclasses.replace(p, max_new_tokens=n) for p, n in zip(PROMPTS, (3, 20), strict=True)
    ]
    got = engine().generate(short)
    assert got == [Answer(want[0].text[:3], 3, False), want[1]]
    assert engine().generate(PROMPTS[1:]) == want[1:], "filled up with a repeated row"
    assert engine().generate([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("block", [64, 8])
def test_a_batch_changes_nothing(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_STEPS", block)
    alone = engine(rows=1).generate([*PROMPTS, *MORE])
    assert engine().generate([*PROMPTS, *MORE]) == alone, "two batches and a half"
    assert engine(rows=3).generate([*MORE, *PROMPTS]) == [*alone[2:], *alone[:2]]


def test_end_token_and_least_number(likely):
    ids = likely[0]
    end = ids[6]
    first = ids.index(end)
    got = engine(eos=(end,)).generate([PROMPTS[0]])[0]
    assert got == Answer(Letters().decode(ids[:first]), first, True)
    # An end token does not come before the least number of tokens, whatever is likeliest.
    held = dataclasses.replace(PROMPTS[0], min_new_tokens=first + 2)
    other = dataclasses.replace(PROMPTS[0])
    both = engine(eos=(end,)).generate([held, other])
    assert both[0].num_tokens >= first + 2
    assert len(both[0].text) == both[0].num_tokens, "no end token is among them"
    assert both[0].text[:first] == Letters().decode(ids[:first])
    assert both[1] == got, "a neighbour is not held up"


@pytest.mark.parametrize("block", [64, 8])
def test_stop_texts(block, likely, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_STEPS", block)
    text = Letters().decode(likely[0])
    stop = text[11:13]
    place = text.index(stop)
    one = dataclasses.replace(PROMPTS[0], stop=("never", stop, text[11:14]))
    got = engine().generate([one, PROMPTS[1]])
    assert got[0] == Answer(text[:place], place + 2, True)
    assert got[1] == Answer(Letters().decode(likely[1]), 20, False)
    late = dataclasses.replace(one, stop=(text[0],), min_new_tokens=1)
    again = text.find(text[0], 1)
    want = text[:again] if again > 0 else text
    assert engine().generate([late])[0].text == want, "a stop does not count at once"


def test_log_probs_and_whether_they_are_greedy(likely):
    contexts = [PROMPTS[0].tokens, prompt(1, 6).tokens, prompt(12, 7).tokens]
    continuations = [likely[0][:8], prompt(37, 8).tokens, [3]]
    got = engine().log_probs(contexts, continuations)
    for context, continuation, (logp, best) in zip(contexts, continuations, got, strict=True):
        tokens = np.array([[*context, *continuation]])
        logits = oracle.logits(CONFIG, PARAMS, oracle.from_policy(MODEL.kv), tokens)[0, :-1]
        want = np.log(oracle.softmax(logits))[np.arange(len(logits)), tokens[0, 1:]]
        assert logp.dtype == np.float64 and best.dtype == bool
        assert_close(logp, want[len(context) - 1 :], LOGITS)
        likeliest = np.argmax(logits, axis=-1) == tokens[0, 1:]
        assert best.tolist() == likeliest[len(context) - 1 :].tolist()
    assert got[0][1].all() and not got[1][1].all()
    with pytest.raises(ValueError, match="one token of context at least"):
        engine().log_probs([[]], [[1]])


def test_the_tokenizer_is_loaded_once_and_when_asked_for():
    loaded = []

    def load():
        loaded.append(1)
        return Letters()

    one = ModelEngine(MODEL, PARAMS, load)
    assert not loaded
    assert one.tokenizer is one.tokenizer and loaded == [1]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        _ = ModelEngine(MODEL, PARAMS).tokenizer
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        ModelEngine(MODEL, PARAMS, rows=0)


def test_a_tie_counts_as_most_likely():
    flat = {**PARAMS, "lm_head": {"kernel": jnp.zeros_like(PARAMS["lm_head"]["kernel"])}}
    ((logp, best),) = ModelEngine(MODEL, flat, rows=ROWS).log_probs([[1, 2]], [[3, 4]])
    assert best.all()
    assert_close(logp, np.full(2, -np.log(61)), LOGITS)


def placed(**axes):
    mesh = fk.make_mesh(**axes)
    return jax.device_put(PARAMS, sharding.param_shardings(PARAMS, mesh))


def test_a_batch_that_a_mesh_cannot_split():
    with pytest.raises(ValueError, match="batch 3 by data"):
        ModelEngine(MODEL, placed(data=2, fsdp=2, tensor=1), rows=3)


@pytest.mark.slow
def test_on_a_mesh():
    spread = ModelEngine(MODEL, placed(data=2, fsdp=2, tensor=1), Letters, rows=4)
    prompts = [*PROMPTS, *MORE, dataclasses.replace(PROMPTS[0], min_new_tokens=3)]
    assert spread.generate(prompts) == engine(rows=4).generate(prompts)
    pairs = [p.tokens for p in prompts], [p.tokens for p in reversed(prompts)]
    for many, one in zip(spread.log_probs(*pairs), engine(rows=4).log_probs(*pairs), strict=True):
        assert_close(many[0], one[0], LOGITS)
        assert many[1].tolist() == one[1].tolist()

"""SmolLM2 from its GGUF file, exported, in transformers (torch, CPU, float32) and here."""

import pydoc_data.topics

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from freqkv_jax.generate import generate
from freqkv_jax.kv import FreqKVConfig, FullConfig
from freqkv_jax.model.fused import fuse
from freqkv_jax.score import score
from freqkv_jax.tokenizer import load_tokenizer
from freqkv_jax.weights import load_pretrained, save_pretrained
from tests.tolerances import REAL_REL_L2, rel_l2

pytestmark = pytest.mark.real
TEXT = pydoc_data.topics.topics["typesseq"]


@pytest.fixture(scope="module")
def loaded(smollm2_gguf):
    return load_pretrained(smollm2_gguf, FullConfig(), "float32")


@pytest.fixture(scope="module")
def exported(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    save_pretrained(*loaded, folder)
    return folder


@pytest.fixture(scope="module")
def theirs(exported):
    return AutoModelForCausalLM.from_pretrained(exported).eval()


@pytest.fixture(scope="module")
def ids(smollm2_gguf):
    return load_tokenizer(smollm2_gguf).encode(TEXT)


def logits_of(loaded, tokens) -> np.ndarray:
    model, params = loaded
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    return np.asarray(apply(params, np.asarray([tokens], np.int32))[0])


def check_logits(loaded, theirs, tokens) -> None:
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0].numpy()
    got = logits_of(loaded, tokens)
    assert np.std(want) > 1
    assert rel_l2(got, want) <= REAL_REL_L2
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


def greedy(theirs, prompt, count: int) -> list[int]:
    """transformers' greedy continuation."""
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
    assert out[: len(prompt)] == prompt and len(out) == len(prompt) + count
    return out[len(prompt) :]


def test_config(loaded):
    model, params = loaded
    assert model.config.num_params == sum(x.size for x in jax.tree.leaves(params)) == 134_515_008
    assert (model.config.num_heads, model.config.num_kv_heads) == (9, 3)
    assert (model.config.rms_norm_eps, model.config.rope.theta) == (1e-5, 1e5)
    assert (model.config.bos_token_id, model.config.eos_ids) == (1, (2,))


def test_exported_logits(loaded, theirs, ids):
    check_logits(loaded, theirs, ids[:200])


def test_exported_greedy(loaded, theirs, ids):
    new = greedy(theirs, ids[:40], 12)
    # Greedy choices agree one by one if and only if each is the likeliest behind those before it.
    assert logits_of(loaded, ids[:40] + new).argmax(-1)[39:-1].tolist() == new


@pytest.mark.slow
def test_exported_logits_long(loaded, theirs, ids):
    check_logits(loaded, theirs, ids[:2048])


@pytest.mark.slow
def test_exported_greedy_long(loaded, theirs, ids):
    assert generate(*loaded, [ids[:300]], 200) == [greedy(theirs, ids[:300], 200)]
    # A cache that is never full changes nothing.
    model, params = loaded
    roomy = model.clone(kv=FreqKVConfig(512))
    assert generate(roomy, params, [ids[:300]], 200) == generate(model, params, [ids[:300]], 200)


def test_what_int8_costs(loaded, ids):
    """0.011 nats a token of real text, of 2.013: 1.1 % of perplexity."""
    model, params = loaded
    tokens = np.asarray([ids[:600]], np.int32)
    want = np.asarray(score(model, params, tokens))
    got = np.asarray(score(model, fuse(params, weights="int8"), tokens))
    assert abs(got.mean() - want.mean()) < 0.02
    assert np.abs(got - want).mean() < 0.1

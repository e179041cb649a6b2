"""A fused tree decodes and reads as the plain one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import nvidia
from freqkv_jax.kv.policy import policy_from_args
from freqkv_jax.model import fused
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import BF16_REL_L2, LOGITS, assert_close, rel_l2


def both(heads=(6, 2), kv=None, dtype="float32", **changes):
    """A model with a plain and with a fused tree."""
    config = tiny_config(*heads, **changes)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params(config))
    return fk.Llama(config, kv or fk.FreqKVConfig(16, 4), dtype), params, fk.fuse(params)


POLICIES = [
    policy_from_args("freqkv", cache_size=16),
    policy_from_args("snapkv", cache_size=16, chunk=4, window=2),  # wants the queries
    pytest.param(policy_from_args("h2o", cache_size=16, chunk=4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kv", POLICIES, ids=str)
def test_decode_is_that_of_the_plain_tree(kv):
    model, plain, tree = both(kv=kv)
    tokens = random_tokens(model.config, 1, 13)
    logits, state = fk.prefill(model, plain, tokens)
    want, want_logits, _ = fk.decode(model, plain, state, logits, 20)
    logits, state = fk.prefill(model, tree, tokens)
    got, got_logits, _ = fk.decode(model, tree, state, logits, 20)
    assert got.tolist() == want.tolist()
    assert_close(got_logits, want_logits, LOGITS)


@pytest.mark.parametrize(
    ("heads", "tied"),
    [((4, 4), True), pytest.param((8, 2), False, marks=pytest.mark.slow)],
    ids=str,
)
def test_heads_end_tokens_and_batches(heads, tied):
    model, plain, tree = both(heads, fk.FullConfig(), tie_word_embeddings=tied)
    prompts = [row.tolist() for row in random_tokens(model.config, 2, 19)]
    free = fk.generate(model, plain, prompts, 24)
    for texts in (prompts[:1], prompts):
        assert fk.generate(model, tree, texts, 24) == free[: len(texts)]
    stop = free[0][11]
    want = fk.generate(model, plain, prompts[:1], 24, eos_id=stop, return_state=True)
    got = fk.generate(model, tree, prompts[:1], 24, eos_id=stop, return_state=True)
    assert got[0] == want[0] and got[1].fill.tolist() == want[1].fill.tolist()
    for layer in range(model.config.num_layers):
        for a, b in zip(got[1].kv(layer), want[1].kv(layer), strict=True):
            assert_close(a, b, LOGITS)


def test_score_and_decode_scan():
    model, plain, tree = both(kv=fk.FullConfig())
    tokens = random_tokens(model.config, 2, 40)
    assert_close(fk.score(model, tree, tokens), fk.score(model, plain, tokens), LOGITS)
    logits, state = fk.prefill(model, plain, tokens[:1])
    want, _, _ = fk.decode(model, plain, state, logits, 9)
    logits, state = fk.prefill(model, plain, tokens[:1])
    assert fk.decode_scan(model, tree, state, logits, 9)[0].tolist() == want.tolist()


def test_bfloat16():
    model, plain, tree = both(dtype="bfloat16")
    logits, state = fk.prefill(model, plain, random_tokens(model.config, 1, 30))
    _, want, _ = fk.decode(model, plain, jax.tree.map(jnp.copy, state), logits, 1)
    _, got, _ = fk.decode(model, tree, state, logits, 1)
    assert rel_l2(got, want) < BF16_REL_L2


def test_a_fused_tree_is_decoded_by_the_form_for_one_token(monkeypatch):
    model, plain, tree = both(kv=fk.FullConfig())
    tokens = random_tokens(model.config, 1, 13)
    calls = []
    read_token = fused.read_token
    monkeypatch.setattr(fused, "read_token", lambda *a: calls.append(1) or read_token(*a))
    found = []
    for params in (plain, tree):
        logits, state = fk.prefill(model, params, tokens)
        assert not calls
        found.append(fk.decode(model, params, state, logits, 9)[:2])
        assert bool(calls) == (params is tree)
    assert found[0][0].tolist() == found[1][0].tolist()
    assert_close(found[1][1], found[0][1], LOGITS)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_decode_by_the_kernels_of_a_gpu(weights, monkeypatch, interpreted):
    """Interpreted: that every product is given what it is to be made of."""
    model, plain, tree = both(kv=fk.FreqKVConfig(20, 4))  # a model that no other test has traced
    logits, state = fk.prefill(model, plain, random_tokens(model.config, 1, 18))
    if weights is not None:
        tree = plain = fk.fuse(plain, weights=weights)
    other = fk.Llama(model.config, model.kv, "float32", "naive")  # whose traces are not model's
    want, want_logits, _ = fk.decode(other, plain, jax.tree.map(jnp.copy, state), logits, 9)
    calls = []

    def counted(kernel):
        return lambda *args: calls.append(kernel) or kernel(*args)

    for name in ("normed_pairs", "plus_product"):
        monkeypatch.setattr(fused.matvec, name, counted(getattr(fused.matvec, name)))
    monkeypatch.setattr(fused, "_by_triton", lambda: True)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, cuda=None: (cuda or default)(*args)
    )
    got, got_logits, _ = fk.decode(model, tree, state, logits, 9)
    assert len(calls) % (4 * model.config.num_layers) == 0 and calls
    assert got.tolist() == want.tolist()
    assert_close(got_logits, want_logits, LOGITS)


def test_what_fuse_gives_and_when_it_pays(monkeypatch):
    _, plain, tree = both()
    assert fk.fuse(tree) is tree and fused.is_fused(tree) and not fused.is_fused(plain)
    assert tree["embed"] is plain["embed"] and tree["lm_head"] is plain["lm_head"]
    assert sum(map(np.size, jax.tree.leaves(tree))) == sum(map(np.size, jax.tree.leaves(plain)))
    assert not fused.pays(plain, 1)  # on a CPU, also beside a GPU
    monkeypatch.setattr(nvidia, "present", lambda: True)
    assert not fused.pays(plain, 1)
    # Trees that lie nowhere yet are for the default device.
    nowhere = jax.eval_shape(lambda: plain)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fused.pays(nowhere, 1)
    assert not fused.pays(nowhere, 2) and not fused.pays(jax.eval_shape(lambda: tree), 1)
    monkeypatch.setattr(nvidia, "present", lambda: False)  # a GPU that is not NVIDIA's
    assert not fused.pays(nowhere, 1)


def test_what_donate_frees():
    _, plain, tree = both()
    kernel = plain["layers_1"]["mlp"]["up"]["kernel"]
    again = fk.fuse(plain, donate=True)
    assert kernel.is_deleted() and not plain["norm"]["scale"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_parameters_on_a_mesh_stay_as_they_are():
    config = tiny_config()
    model = fk.Llama(config, fk.FullConfig())
    params = fk.init_params(model, mesh=fk.make_mesh(fsdp=2))
    assert not fused.pays(params, 1)
    with pytest.raises(ValueError, match="on a mesh cannot be fused"):
        fk.fuse(params)


def plain_again(config, tree):
    """The plain float32 tree that an int8 one stands for."""

    def wide(linear, name="rows"):
        return np.asarray(linear[name], np.float32) * np.asarray(linear["scale"])[:, None]

    def kernels(linear, *sizes):
        ends = np.cumsum(sizes)[:-1]
        return [{"kernel": part.T} for part in np.split(wide(linear), ends)]

    heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    params = dict(tree)
    for name in [name for name in tree if name.startswith("layers_")]:
        layer, ffn = tree[name], config.intermediate_size
        q, k, v = kernels(layer["attention"]["qkv"], heads, kv_heads, kv_heads)
        gate, up = kernels(layer["mlp"]["gate_up"], ffn, ffn)
        (o,), (down,) = kernels(layer["attention"]["o"], 0), kernels(layer["mlp"]["down"], 0)
        params[name] = layer | {
            "attention": {"q": q, "k": k, "v": v, "o": o},
            "mlp": {"gate": gate, "up": up, "down": down},
        }
    if "lm_head" in tree:
        params["lm_head"] = {"kernel": wide(tree["lm_head"]).T}
    else:
        params["embed"] = {"embedding": wide(tree["embed"], "embedding")}
    return params


@pytest.mark.parametrize("tied", [False, True])
def test_int8_is_what_it_stands_for(tied):
    model, plain, _ = both(kv=fk.FreqKVConfig(16, 4), tie_word_embeddings=tied)
    tree = fk.fuse(plain, weights="int8")
    same = plain_again(model.config, tree)
    assert jax.tree.map(np.shape, same) == jax.tree.map(np.shape, plain)
    kernel, want = (x["layers_1"]["mlp"]["up"]["kernel"] for x in (same, plain))
    step = np.abs(want).max(axis=0) / 127
    assert (np.abs(kernel - want) <= step * 0.5001).all()
    tokens = random_tokens(model.config, 1, 30)
    want, state = fk.prefill(model, same, tokens)
    want_tokens, want_after, _ = fk.decode(model, same, state, want, 10)
    got, state = fk.prefill(model, tree, tokens)
    got_tokens, got_after, _ = fk.decode(model, tree, state, got, 10)
    assert_close(got, want, LOGITS)
    assert got_tokens.tolist() == want_tokens.tolist()
    assert_close(got_after, want_after, LOGITS)


def test_bad_weights():
    _, plain, tree = both()
    with pytest.raises(ValueError, match="weights 'int4' are unknown; allowed: int8 or None"):
        fk.fuse(plain, weights="int4")
    with pytest.raises(ValueError, match="fused already"):
        fk.fuse(tree, weights="int8")
    zero = jax.tree.map(jnp.zeros_like, plain)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fk.fuse(zero, weights="int8")))

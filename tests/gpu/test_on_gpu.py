"""What only an NVIDIA GPU can show: cuDNN attention, float32 that is float32, bfloat16 models.

Run with `make test-gpu`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax.config import RopeConfig
from freqkv_jax.kv.linear import LinearPolicy
from freqkv_jax.kv.policy import Slots
from freqkv_jax.model import fused
from freqkv_jax.model.attention import attend, attend_behind, attend_cache
from freqkv_jax.model.flash_decode import attend_one, attend_rows
from freqkv_jax.model.llama import REMAT
from freqkv_jax.rope import Rope
from tests import oracle
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import BF16_REL_L2, LOGITS, assert_close, rel_l2

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU: run make test-gpu on a machine that has one")


def qkv(batch, queries, keys, heads, kv_heads, dim):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return (
        normal(batch, queries, heads, dim),
        normal(batch, keys, kv_heads, dim),
        normal(batch, keys, kv_heads, dim),
        normal(batch, queries, heads, dim),
    )


SHAPES = [
    (2, 256, 256, 4, 4, 64),
    (3, 100, 256, 8, 2, 128),
    (2, 1022, 2048, 9, 3, 64),
    (1, 2046, 4096, 32, 8, 128),
    (2, 301, 301, 8, 2, 128),
    (2, 1, 3, 9, 3, 64),
    (1, 1, 2048, 32, 8, 128),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cudnn_is_the_naive_form(shape):
    q, k, v, w = qkv(*shape)

    def loss(backend):
        return lambda q, k, v: (attend(q, k, v, backend).astype(jnp.float32) * w).sum()

    def gradients(backend):
        return jax.jit(jax.grad(loss(backend), (0, 1, 2)))

    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    form = jax.jit(attend, static_argnums=3)
    want = form(q, k, v, "naive")
    got = form(*narrow, "cudnn")
    assert got.dtype == jnp.bfloat16
    assert rel_l2(got.astype(jnp.float32), want) < 0.01
    grads = gradients("naive")(q, k, v)
    for a, b in zip(gradients("cudnn")(*narrow), grads, strict=True):
        assert rel_l2(a.astype(jnp.float32), b) < 0.02


BEHIND = [
    (2, 2, 300, 9, 3, 64),
    (2, 100, 256, 8, 2, 128),
    (2, 1, 2, 9, 3, 64),
    (1, 1, 2048, 32, 8, 128),
    (2, 65, 366, 9, 3, 64),
    (2, 4, 2054, 9, 3, 64),
    (3, 1022, 2048, 9, 3, 64),
    (1, 2046, 4096, 32, 32, 128),
]


@pytest.mark.parametrize("shape", BEHIND, ids=str)
def test_parts_attended_apart_are_the_naive_form(shape):
    """As near as the whole in one piece is."""
    q, k, v, w = qkv(*shape)
    old = shape[2] - shape[1]

    def loss(form):
        return lambda q, k, v: (form(q, k, v).astype(jnp.float32) * w).sum()

    def apart(q, k, v):
        return attend_behind(q, (k[:, :old], v[:, :old]), (k[:, old:], v[:, old:]), "cudnn")

    def naive(q, k, v):
        return attend(q, k, v, "naive")

    def gradients(form):
        return jax.jit(jax.grad(loss(form), (0, 1, 2)))

    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got, want = jax.jit(apart)(*narrow), jax.jit(naive)(q, k, v)
    assert rel_l2(got.astype(jnp.float32), want) < 0.01
    grads = gradients(naive)(q, k, v)
    for a, b in zip(gradients(apart)(*narrow), grads, strict=True):
        assert rel_l2(a.astype(jnp.float32), b) < 0.02


@pytest.mark.parametrize("backend", ["auto", "cudnn"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 300), (40, 1, 2048)], ids=str)
def test_one_query_is_the_naive_form(shape, backend):
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in qkv(*shape, 9, 3, 64))
    new = slice(shape[2] - 1, None)
    want = attend(*(x.astype(jnp.float32) for x in (q, k, v)), "naive")
    forms = (
        lambda q, k, v: attend(q, k, v, backend),
        lambda q, k, v: attend_behind(
            q, (k[:, : new.start], v[:, : new.start]), (k[:, new], v[:, new]), backend
        ),
    )
    for form in forms:
        assert rel_l2(jax.jit(form)(q, k, v).astype(jnp.float32), want) < 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_auto_takes_cudnn_for_narrow_floats_only(dtype):
    q, k, v, _ = (x.astype(dtype) for x in qkv(*SHAPES[1]))
    text = jax.jit(attend).lower(q, k, v).compile().as_text()
    assert ("cudnn" in text and "fmha" in text.lower()) == (dtype == "bfloat16")
    want = attend(*(x.astype(jnp.float32) for x in (q, k, v)), "naive")
    got = jax.jit(attend)(q, k, v).astype(jnp.float32)
    assert rel_l2(got, want) < (0.01 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("kv", [fk.FreqKVConfig(17, 3, 2), fk.SinkWindowConfig(16, 4)], ids=str)
def test_float32_is_float32_in_both_forms(kv):
    config = tiny_config(6, 2)
    model, params, tokens = (
        fk.Llama(config, kv),
        random_params(config),
        random_tokens(config, 2, 60),
    )
    want = oracle.logits(config, params, oracle.from_policy(kv), tokens)
    got = jax.jit(model.apply)({"params": params, "maps": fk.maps(model)}, tokens)
    assert_close(got, want, LOGITS)
    logits, state = fk.prefill(model, params, tokens[:, :40], [40, 23])
    assert_close(logits, np.stack([want[0, 39], want[1, 22]]), LOGITS)
    new, _, _ = fk.decode(model, params, state, logits, 30)
    for row, length in enumerate([40, 23]):
        reader = oracle.Oracle(config, params, oracle.from_policy(kv))
        scores = reader.read(tokens[row, :length])[-1]
        for token in new[row].tolist():
            assert token == int(np.argmax(scores))
            scores = reader.step(token)


def test_bfloat16_model():
    config = tiny_config(8, 2, head_dim=64, hidden_size=512, intermediate_size=512)
    kv = fk.FreqKVConfig(128, 4)
    params, tokens = random_params(config), random_tokens(config, 2, 500)
    wide = jax.jit(fk.Llama(config, kv).apply)({"params": params}, tokens)
    model = fk.Llama(config, kv, "bfloat16")
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    got = jax.jit(model.apply)({"params": narrow}, tokens)
    assert got.dtype == jnp.float32
    assert rel_l2(got, wide) < BF16_REL_L2
    logits, state = fk.prefill(model, narrow, tokens)
    assert rel_l2(logits, wide[:, -1]) < BF16_REL_L2
    _, after, _ = fk.decode(model, narrow, state, logits, 200)
    assert bool(jnp.isfinite(after).all())


@pytest.mark.parametrize("shape", [(9, 3, 64, 2048), (32, 8, 128, 4096), (32, 32, 128, 4096)])
def test_the_kernel_of_one_query_is_the_plain_form(shape):
    heads, kv_heads, dim, slots = shape
    q, k, v, _ = qkv(1, 1, slots, heads, kv_heads, dim)
    q, k, v = q[0, 0], jnp.swapaxes(k[0], 0, 1), jnp.swapaxes(v[0], 0, 1)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    one = jax.jit(attend_one, static_argnums=4)
    assert "xla.gpu.triton" in one.lower(*narrow, jnp.int32(5), heads).as_text()
    for fill in (0, 63, 64, 1000, slots - 1):
        want = attend_cache(q[None, None], k[None], v[None], jnp.int32(fill))[0, 0]
        got = one(*narrow, jnp.int32(fill), heads)
        assert rel_l2(got.astype(jnp.float32), want) < 0.01


# Those of SmolLM2-135M, of Llama-3-8B and of Llama-2-7B; of 64 rows with slots in fewer runs.
@pytest.mark.parametrize(
    "shape", [(64, 9, 3, 64, 2048), (3, 32, 8, 128, 4096), (8, 32, 32, 128, 4096)]
)
def test_the_kernel_of_a_query_a_row_is_the_plain_form(shape):
    batch, heads, kv_heads, dim, slots = shape
    q, k, v, _ = qkv(batch, 1, slots, heads, kv_heads, dim)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    rows, plain = jax.jit(attend_rows, static_argnums=4), jax.jit(attend_cache)
    own = jnp.arange(batch, dtype=jnp.int32) * (slots - 1) // (batch - 1)
    assert "xla.gpu.triton" in rows.lower(*narrow, own, heads).as_text()
    for fill in (own, jnp.int32(0), jnp.int32(1000), jnp.int32(slots - 1)):
        got = rows(*narrow, fill, heads)
        assert got.dtype == jnp.bfloat16
        # Row by row: that of many slots is small, and would be lost in the sum over all.
        for one, want in zip(np.asarray(got, np.float32), plain(q, k, v, fill), strict=True):
            assert rel_l2(one, want) < 0.01


# Those of SmolLM2-135M and of Llama-2-7B: gate with up, and down.
@pytest.mark.parametrize(("width", "hidden"), [(576, 1536), (4096, 11008)])
@pytest.mark.parametrize(
    ("dtype", "weights"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")]
)
def test_kernels_of_one_row_are_the_plain_form(width, hidden, dtype, weights):
    config, pairs = tiny_config(), (1, 2, hidden)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, dtype)

    def rows(out, size):
        return {"rows": normal(out, size)} if weights is None else fused._int8(normal(out, size))

    norm = {"scale": jnp.asarray(rng.normal(size=width), dtype)}
    x, gate_up, down = normal(width), rows(2 * hidden, width), rows(width, hidden)

    def products(x, norm, gate_up, down):
        hidden = fused._normed_pairs(x, norm, config, gate_up, pairs, fused._gated).reshape(-1)
        return hidden, fused._plus(x, down, hidden)

    def plain(x, norm, gate_up, down):
        gate, up = fused._normed_products(x, norm, config, gate_up, pairs)
        hidden = fused._gated(gate, up)[0].reshape(-1)
        return hidden, fused._plus_product(x.astype(jnp.float32), down, hidden)

    args = x, norm, gate_up, down
    assert jax.jit(products).lower(*args).as_text().count("xla.gpu.triton") == 2
    for got, want in zip(jax.jit(products)(*args), jax.jit(plain)(*args), strict=True):
        assert got.dtype == x.dtype
        assert rel_l2(got.astype(jnp.float32), want) < (0.01 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_weights_decode_as_plain_ones(dtype):
    config = tiny_config(8, 2, head_dim=64, hidden_size=512, intermediate_size=512)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params(config))
    for kv in (fk.FreqKVConfig(128, 4), fk.FullConfig()):  # 128 and 256 slots
        model = fk.Llama(config, kv, dtype)
        logits, state = fk.prefill(model, params, random_tokens(config, 1, 100))
        again = jax.tree.map(jnp.copy, state)
        _, want, _ = fk.decode(model, params, state, logits, 1)
        _, got, _ = fk.decode(model, fk.fuse(params), again, logits, 1)
        assert rel_l2(got, want) < (BF16_REL_L2 if dtype == "bfloat16" else 1e-4)


def test_the_real_model_in_bfloat16(smollm2_gguf):
    kv = fk.FreqKVConfig(512)
    tokens = np.asarray(fk.load_tokenizer(smollm2_gguf).encode("The sea was calm. " * 600))[None]
    model, params = fk.load_pretrained(smollm2_gguf, kv=kv, dtype="float32")
    want = fk.score(model, params, tokens)
    model, params = fk.load_pretrained(smollm2_gguf, kv=kv, dtype="bfloat16")
    got = fk.score(model, params, tokens)
    assert abs(float(got.mean() - want.mean())) < 0.02 * abs(float(want.mean())) + 0.01


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("attention", 1), ("dots", 2)])
def test_forward_passes_of_attention_in_a_gradient(remat, times):
    """What rematerialisation keeps of cuDNN's attention; traced only."""
    x = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)

    def loss(q, k, v):
        return attend(q, k, v, "cudnn").astype(jnp.float32).sum()

    gradient = jax.grad(jax.checkpoint(loss, policy=REMAT[remat]), (0, 1, 2))
    made = str(jax.make_jaxpr(gradient)(x, x, x))
    assert made.count("dot_product_attention_fwd") == times
    assert made.count("dot_product_attention_bwd") == 1


ROPE = Rope(RopeConfig(1e4), 128)


def full_cache(kv, chunks, heads=8):
    """A full memory, and k and v of the chunks behind it, bfloat16."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    memory = Slots(*(normal(2, heads, kv.capacity, 128) for _ in range(2)))
    tokens = [normal(2, chunks, kv.chunk, heads, 128) for _ in range(2)]
    return memory, *tokens, {name: jnp.asarray(array) for name, array in kv.constants().items()}


@pytest.mark.parametrize("kv", [fk.FreqKVConfig(4096), fk.FreqKVConfig(1000, 4, 300)], ids=str)
def test_kernels_of_the_rounds_are_the_plain_form(kv):
    memory, k, v, maps = full_cache(kv, 5)
    seen = jnp.full((2,), kv.capacity)

    def caches(memory, k, v):
        caches, ahead = kv.caches_and_next(memory, k, v, ROPE, maps, seen)
        return *caches, *ahead

    def plain(memory, k, v):
        return LinearPolicy.rounds(kv, memory, k, v, ROPE, maps, more=True)

    def gradients(form):
        def loss(*args):
            return sum((x.astype(jnp.float32) ** 2).sum() for x in form(*args))

        return jax.jit(jax.grad(loss, (0, 1, 2)))

    text = jax.jit(caches).lower(memory, k, v).as_text()
    assert "xla.gpu.triton" in text
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (memory, k, v))
    for got, want in zip(jax.jit(caches)(memory, k, v), jax.jit(plain)(*wide), strict=True):
        assert rel_l2(got.astype(jnp.float32), want) < 0.01
    backwards = gradients(caches).lower(memory, k, v).as_text()
    assert backwards.count("xla.gpu.triton") > text.count("xla.gpu.triton")
    found, expected = gradients(caches)(memory, k, v), gradients(plain)(*wide)
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert rel_l2(got.astype(jnp.float32), want) < 0.02


@pytest.mark.parametrize(
    ("bands", "share", "places"),
    [(1, 0, 0.99), (4, 0, 0.99), (16, 1 / 3, 0.97), (64, 0, 0.99)],
)
def test_kernels_of_choosing_are_the_plain_form(bands, share, places):
    kv = fk.SpectralNoveltyConfig(4096, chunk=256, bands=bands, value_share=share)
    memory, k, v, maps = full_cache(kv, 6)
    at = jnp.arange(kv.prefix, kv.capacity)
    args = [jnp.swapaxes(x, 1, 2) for x in memory], (ROPE.rotate_tokens(k, at), v), maps
    (keys, values), old = jax.jit(functools.partial(kv.cuda_rounds, rope=ROPE))(*args)
    plain, want = jax.jit(functools.partial(kv.plain_rounds, rope=ROPE))(*args)
    # A near tie may fall otherwise: then two entries change places. Behind it a head goes its own
    # way, since what lies between them lies a slot elsewhere.
    old, want = np.asarray(old), np.asarray(want)
    assert (np.diff(old, axis=-1) > 0).all()
    alike = np.ones(old.shape[1:3], bool)
    for mine, other in zip(old, want, strict=True):
        pairs = zip(mine[alike], other[alike], strict=True)
        assert max(np.setdiff1d(a, b).size for a, b in pairs) <= 1
        alike &= (mine == other).all(axis=-1)
    assert (old == want).mean() > places
    same = alike[:, None, None, :, None]
    for got, other in zip((keys, values), plain, strict=True):
        assert rel_l2(jnp.where(same, got, 0), jnp.where(same, other, 0)) < 0.004

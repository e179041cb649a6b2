"""Every back end against the obvious form, and which one a program is lowered with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqkv_jax import nvidia
from freqkv_jax.model import attention, cudnn
from freqkv_jax.model.attention import attend, attend_behind, attend_cache
from tests.tolerances import BF16_PRIMITIVE_REL_L2, GRAD_REL_L2, PRIMITIVE, assert_close, rel_l2

# (T, S): square, a chunk behind a prefix, one query; more than one block and more than one piece.
SHORT = [(1, 1), (5, 5), (5, 12), (1, 9)]
LONG = [(130, 200), (600, 700)]
HEADS = [(4, 4), (4, 2), (6, 2), (4, 1)]  # groups of 1, 2, 3 and 4


def inputs(queries, keys, heads=(6, 2), dim=16, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=(2, length, count, dim)) * gain, dtype)
        for length, count, gain in (
            (queries, heads[0], 2),
            (keys, heads[1], 2),
            (keys, heads[1], 1),
        )
    )


def reference(q, k, v):
    """In float64, head after head and query after query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for h in range(q.shape[2]):
        kv = h // (q.shape[2] // k.shape[2])
        for t in range(q.shape[1]):
            seen = k.shape[1] - q.shape[1] + t + 1
            scores = np.einsum("bd,bnd->bn", q[:, t, h], k[:, :seen, kv]) / q.shape[-1] ** 0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[:, t, h] = np.einsum("bn,bnd->bd", weights, v[:, :seen, kv])
    return out


def jax_nn(q, k, v):
    """JAX's own attention, with a mask aligned to the bottom right."""
    length, keys = q.shape[1], k.shape[1]
    mask = np.arange(keys) <= keys - length + np.arange(length)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None], implementation="xla")


def splash(q, k, v):
    return attention.splash(q, k, v, interpret=True)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", SHORT, ids=str)
def test_naive_is_the_float64_loop(lengths, heads):
    args = inputs(*lengths, heads)
    assert_close(jax.jit(attention.naive)(*args), reference(*args), PRIMITIVE)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", [(5, 12), *LONG], ids=str)
def test_blocked_and_jax_nn_are_naive(lengths, heads):
    args = inputs(*lengths, heads)
    want = jax.jit(attention.naive)(*args)
    assert_close(jax.jit(attention.blocked)(*args), want, PRIMITIVE)
    assert_close(jax.jit(jax_nn)(*args), want, PRIMITIVE)


@pytest.mark.parametrize("heads", [(4, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(5, 5), (126, 130), (130, 300)], ids=str)
def test_splash_is_naive(lengths, heads):
    args = inputs(*lengths, heads)
    assert_close(splash(*args), attention.naive(*args), PRIMITIVE)


@pytest.mark.parametrize("form", [attention.blocked, splash], ids=["blocked", "splash"])
def test_gradients(form):
    args = inputs(140, 200, (3, 1))
    weight = inputs(140, 200, (3, 1), seed=1)[0]

    def gradients(function):
        return jax.jit(jax.grad(lambda *a: (function(*a) * weight).sum(), (0, 1, 2)))(*args)

    for got, want in zip(gradients(form), gradients(attention.naive), strict=True):
        assert rel_l2(got, want) <= GRAD_REL_L2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", [attention.naive, attention.blocked], ids=["naive", "blocked"])
def test_half_precision(form, dtype):
    args = inputs(130, 200, dtype=dtype)
    got = jax.jit(form)(*args)
    assert got.dtype == args[0].dtype
    assert rel_l2(got, reference(*args)) <= BF16_PRIMITIVE_REL_L2


@pytest.mark.parametrize("kind", ["int", "scalar", "rows"])
@pytest.mark.parametrize("queries", [1, 5, 150])
def test_attend_cache_sees_the_slots_up_to_each_query(queries, kind):
    slots = 170
    q, k, v = inputs(queries, slots)
    heads_major = [jnp.swapaxes(x, 1, 2) for x in (k, v)]
    first = {"int": 11, "scalar": jnp.int32(11), "rows": jnp.array([3, 20])}[kind]
    got = jax.jit(attend_cache)(q, *heads_major, first)
    for row in range(2):
        at = [3, 20][row] if kind == "rows" else 11
        seen = at + queries
        row_of = (x[row : row + 1, :size] for x, size in ((q, queries), (k, seen), (v, seen)))
        assert_close(got[row : row + 1], attention.naive(*row_of), PRIMITIVE)


def test_attend_cache_takes_nothing_from_slots_that_mean_nothing():
    q, k, v = inputs(2, 20)
    heads_major = [jnp.swapaxes(x, 1, 2) for x in (k, v)]
    dirty = [x.at[:, :, 9:].set(1e4) for x in heads_major]
    np.testing.assert_array_equal(attend_cache(q, *dirty, 7), attend_cache(q, *heads_major, 7))


def test_auto_on_a_cpu_is_the_blocked_form():
    args = inputs(130, 200)
    got = jax.jit(attend)(*args)
    np.testing.assert_array_equal(got, jax.jit(attention.blocked)(*args))


@pytest.mark.parametrize("backend", ["naive", "blocked"])
def test_a_named_backend(backend):
    args = inputs(5, 12)
    assert_close(attend(*args, backend), reference(*args), PRIMITIVE)


def lowered_for(platform, dtype):
    args = inputs(256, 512, (4, 2), 64, dtype)
    return jax.jit(attend).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_platform_of_the_program_decides_not_that_of_this_process(dtype):
    assert jax.default_backend() == "cpu"
    assert "tpu_custom_call" in lowered_for("tpu", dtype)
    assert "custom_call" not in lowered_for("cpu", dtype)


def test_cuda_without_nvidia_in_this_process_falls_back(monkeypatch):
    monkeypatch.setattr(nvidia, "present", lambda: False)
    assert "custom_call" not in lowered_for("cuda", "bfloat16")


@pytest.mark.parametrize(("dtype", "chosen"), [("bfloat16", True), ("float32", False)])
def test_cuda_takes_cudnn_in_half_precision_only(monkeypatch, dtype, chosen):
    calls = []

    def causal(q, k, v):
        calls.append(q.dtype)
        return attention.blocked(q, k, v)

    monkeypatch.setattr(nvidia, "present", lambda: True)
    monkeypatch.setattr(cudnn, "causal", causal)
    args = inputs(4, 8, (4, 2), 64, dtype)
    # A new function each time: a cached trace would not see the replacement.
    jax.jit(lambda *a: attend(*a)).trace(*args).lower(lowering_platforms=("cuda",))
    assert bool(calls) == chosen


@pytest.mark.parametrize("shape", [(5, 12), (4, 11), (11, 11), (1, 1), (1, 8)], ids=str)
def test_the_queries_of_cudnn_are_aligned_to_the_bottom_right(monkeypatch, shape):
    """The recipe around the kernel, with JAX's XLA form in its place."""
    inner = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, is_causal, implementation):
        assert implementation == "cudnn"
        assert q.shape[1] == k.shape[1] and q.shape[1] % 2 == 0  # what it has derivatives of
        return inner(q, k, v, is_causal=is_causal, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    args = inputs(*shape, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):
        got = cudnn.causal(*args)
    assert rel_l2(got, reference(*args)) <= BF16_PRIMITIVE_REL_L2


def scores_of(q, k, is_causal):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", *(x.astype(jnp.float32) for x in (q, k)))
    scores = scores / q.shape[-1] ** 0.5
    seen = jnp.tri(*scores.shape[2:], dtype=bool) if is_causal else True
    return jnp.where(seen, scores, -jnp.inf)


def part(q, k, v, is_causal):
    """What cuDNN gives of a part: attention, and the log-sum of its scores."""
    assert q.shape[1] % 2 == 0
    scores = scores_of(q, k, is_causal)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(jnp.float32)
    out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return out.astype(q.dtype), jax.nn.logsumexp(scores, axis=-1)


def part_gradients(q, k, v, out, log_sum, grad, is_causal):
    """The backward pass of flash attention: the softmax made again from the log-sum given."""
    weights = jnp.exp(scores_of(q, k, is_causal) - log_sum[..., None])
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = (jnp.repeat(x, groups, axis=2).astype(jnp.float32) for x in (k, v))
    grad = grad.astype(jnp.float32)
    inner = jnp.einsum("bthd,bshd->bhts", grad, wide_v)
    inner -= jnp.einsum("bthd,bthd->bht", grad, out.astype(jnp.float32))[..., None]
    inner = weights * inner / q.shape[-1] ** 0.5
    dq = jnp.einsum("bhts,bshd->bthd", inner, wide_k)
    dk = jnp.einsum("bhts,bthd->bshd", inner, q.astype(jnp.float32))
    dv = jnp.einsum("bhts,bthd->bshd", weights, grad)
    dk, dv = (x.reshape(*k.shape[:3], groups, -1).sum(3) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


@pytest.mark.parametrize(("queries", "heads"), [(1, (4, 4)), (7, (6, 2))], ids=str)
def test_parts_weighed_by_their_log_sums_are_the_whole(queries, heads, monkeypatch):
    """The recipe around cuDNN's kernels, forward and backward, with plain forms in their place."""
    monkeypatch.setattr(cudnn, "_part", part)
    monkeypatch.setattr(cudnn, "_part_gradients", part_gradients)
    monkeypatch.setattr(cudnn, "check", lambda q: None)  # float32 shows what bfloat16 hides
    q, k, v = inputs(queries, 9 + queries, heads)
    w = inputs(queries, 1, heads, seed=3)[0]

    def whole(q, k, v):
        return (attend(q, k, v, "naive") * w).sum()

    def apart(q, k, v):
        return (cudnn.behind(q, k[:, :9], v[:, :9], k[:, 9:], v[:, 9:]) * w).sum()

    got = cudnn.behind(q, k[:, :9], v[:, :9], k[:, 9:], v[:, 9:])
    assert_close(got, reference(q, k, v), PRIMITIVE)
    want = jax.grad(whole, (0, 1, 2))(q, k, v)
    for ours, theirs in zip(jax.grad(apart, (0, 1, 2))(q, k, v), want, strict=True):
        assert rel_l2(ours, theirs) <= GRAD_REL_L2


@pytest.mark.parametrize("backend", ["auto", "naive", "blocked"])
@pytest.mark.parametrize("old", [0, 9])
@pytest.mark.parametrize("queries", [1, 5])
def test_behind_old_entries_is_attention_on_all(queries, old, backend):
    q, k, v = inputs(queries, old + queries)
    got = attend_behind(q, (k[:, :old], v[:, :old]), (k[:, old:], v[:, old:]), backend)
    assert_close(got, reference(q, k, v), PRIMITIVE)


@pytest.mark.parametrize(("old", "internals", "apart"), [(9, True, 1), (0, True, 0), (9, False, 0)])
def test_cuda_attends_the_parts_apart(monkeypatch, old, internals, apart):
    """Where there are old entries, and JAX has what that needs."""
    calls = []

    def behind(q, *parts):
        calls.append(q.dtype)
        return q

    monkeypatch.setattr(nvidia, "present", lambda: True)
    monkeypatch.setattr(cudnn, "has_parts", lambda: internals)
    monkeypatch.setattr(cudnn, "behind", behind)
    monkeypatch.setattr(cudnn, "causal", attention.blocked)
    q, k, v = inputs(5, old + 5, dim=64, dtype="bfloat16")
    parts = (k[:, :old], v[:, :old]), (k[:, old:], v[:, old:])
    jax.jit(lambda q, *kv: attend_behind(q, *kv)).trace(q, *parts).lower(
        lowering_platforms=("cuda",)
    )
    assert len(calls) == apart


def test_this_jax_has_what_the_parts_need():
    assert cudnn.has_parts()


@pytest.mark.parametrize(
    ("dtype", "dim", "text"),
    [("float32", 64, "float32"), ("bfloat16", 12, "head_dim 12"), ("float16", 264, "head_dim 264")],
)
def test_cudnn_refuses_what_it_has_not(dtype, dim, text):
    with pytest.raises(
        ValueError, match=rf"takes bfloat16 or float16.*{text}.*use attention='auto'"
    ):
        attend(*inputs(4, 4, (2, 2), dim, dtype), "cudnn")


def test_unknown_backend():
    with pytest.raises(ValueError, match="attention 'flash' is unknown; allowed: auto, naive, blo"):
        attend(*inputs(2, 2), "flash")
    for name in attention.BACKENDS:
        attention.check_backend(name)

"""What the benchmark counts, and that compiling is apart. No speed is asserted."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest

from freqkv_jax.bench import amounts, cases, report, timing
from freqkv_jax.bench.ceilings import Ceilings, Sizes, copy_call, measure_ceilings
from freqkv_jax.config import SHAPES
from freqkv_jax.kv import FreqKVConfig, FullConfig, SinkWindowConfig
from freqkv_jax.model.fused import is_fused, stored_as
from freqkv_jax.model.llama import Llama
from tests.tiny import random_params

TINY = SHAPES["tiny"]  # E 64, F 128, 2 layers, 4 heads of 16, 2 kv heads, V 256
KV = FreqKVConfig(16, 4)  # n 12, L 6, P 10, Q 6
CEILINGS = Ceilings(1e12, 1e9, "float32", Sizes(1, 1))


def case_of(work, kv=KV, length=28, batch=1):
    return next(iter(cases.make_cases([work], Llama(TINY, kv), [length], batch)))


def test_amounts_by_hand():
    weights = 2 * (64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128)  # multiplications of all layers
    # 28 tokens: 16 fill the cache, then two chunks of 6 at slots 10..15.
    seen = sum(range(1, 17)) + 2 * sum(range(11, 17))
    got = amounts.forward(TINY, KV, "float32", 3, 28)
    assert got.useful_flops == 3 * (2 * weights * 28 + 2 * 4 * 4 * 16 * seen)
    # Folded: two [3, 6] matrices, on 2 * 16 channels of keys and as many of values.
    one_round = 2 * (3 * 6 * 2) * 2 * 32
    assert got.map_flops == 3 * 2 * 2 * one_round
    norms = 2 * 2 * 64 + 64
    assert got.num_bytes == 4 * (weights + norms + 3 * 28 * 64)
    step = amounts.decode(TINY, KV, "float32", 3, 6, 0)
    live = sum(range(11, 17))
    entry = 2 * 2 * 2 * 16 * 4  # bytes of one token: layers, K and V, heads, D
    assert step.num_bytes == 6 * 4 * (weights + norms + 256 * 64) + 3 * entry * live
    int8 = amounts.decode(TINY, KV, "float32", 3, 6, 0, "int8")
    assert step.num_bytes - int8.num_bytes == 6 * 3 * (weights + norms + 256 * 64)
    assert step.map_flops == 3 * 2 * one_round
    assert step.useful_flops == 3 * (6 * 2 * (weights + 256 * 64) + 2 * 4 * 4 * 16 * live)
    text = amounts.prefill(TINY, KV, "float32", 3, 28)
    assert text.useful_flops == got.useful_flops + 3 * 2 * 256 * 64
    assert text.num_bytes == 4 * (weights + norms + 256 * 64) + 3 * entry * 16
    one = amounts.compress(TINY, KV, "float32", 3, 2)
    assert one.map_flops == 3 * 2 * one_round
    assert one.num_bytes == 4 * 3 * (16 + 2 * (6 + 16)) * 64
    part = amounts.attention(TINY, KV, "float32", 3, 28)
    assert part.useful_flops == 3 * 4 * 4 * 16 * seen
    assert part.num_bytes == 4 * 3 * 16 * (2 * 28 * 4 + 2 * (16 + 2 * 16) * 2)
    assert amounts.map_flops(TINY, SinkWindowConfig(16, 4), 5, 1) == 0


def test_the_roofline_by_hand():
    assert CEILINGS.floor(3e12, 1e9) == (3.0, "compute")
    assert CEILINGS.floor(1e12, 2e9) == (2.0, "memory")
    case = case_of("decode")
    row = report.make_row(case, timing.Timing((1.0, 2.0, 3.0, 4.0, 6.0), 9.0, 7), CEILINGS, None)
    assert case.steps == 6 and row["ms"] == 500.0  # the median, 3 s, over 6 steps
    assert row["times_ms"][0] == pytest.approx(1000 / 6)
    assert row["spread"] == pytest.approx(5 / 3)
    assert row["tokens_per_s"] == 2.0
    assert row["bound"] == "memory"
    assert row["roofline_ms"] == pytest.approx(1e3 * case.amount.num_bytes / 1e9 / 6)
    assert row["share"] == pytest.approx(row["roofline_ms"] / row["ms"])
    assert row["tflops"] == pytest.approx(case.amount.useful_flops / 3e12)
    assert row["gbytes_per_s"] == pytest.approx(case.amount.num_bytes / 3e9)
    assert row["compile_seconds"] == 9.0 and row["program_bytes"] == 7


def test_ceilings():
    got = measure_ceilings("float32", Sizes(1 << 12, 64))
    assert got.flops_per_s > 0 and got.bytes_per_s > 0
    # Every addition is done: none is folded into another.
    call, start = copy_call(8, 3), jax.random.normal(jax.random.key(0), (8,))
    assert jnp.allclose(call(0), start + 3, atol=1e-4)
    assert jnp.allclose(call(1), start + 6, atol=1e-4)


def test_compiling_is_not_timed_and_inputs_change():
    seen = []

    def slow_to_trace(x):
        time.sleep(0.2)
        return x * 2

    def following(index, args, out):
        seen.append(float(out))
        return (args[0] + 1,)

    program = timing.Program(slow_to_trace, (jnp.float32(1),), following)
    got = timing.measure(program)
    assert got.compile_seconds > 0.2 > got.median
    assert len(got.seconds) == 5 and seen == [2.0, 4.0, 6.0, 8.0, 10.0]
    with pytest.raises(timing.OverBudgetError):
        timing.measure(program, deadline=time.monotonic() - 1)
    with pytest.raises(ValueError, match="at least 5"):
        timing.measure(program, 4)


def test_the_host_driver_changes_its_input():
    calls = []
    got = timing.measure_host(lambda index: calls.append(index) or jnp.zeros(()))
    assert calls == list(range(6)) and len(got.seconds) == 5 and got.compile_seconds >= 0


def test_decode_is_a_round_and_gives_its_buffers_away():
    config = dataclasses.replace(TINY, num_layers=1)
    case = next(iter(cases.make_cases(["decode"], Llama(config, KV), [28], 1)))
    program = case.build(random_params(config))
    _, state, _ = program.first
    assert state.fill.tolist() == [16]
    run = jax.jit(program.function, donate_argnums=program.donate)
    out = run(*program.first)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.layers))
    assert out[0].shape == (1, 6) and out[2].fill.tolist() == [16]
    again = program.following(1, program.first, out)
    assert again[1].seen.tolist() == [16] and again[2] is out[1]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_decode_has_the_weights_of_a_gpu(weights, monkeypatch):
    monkeypatch.setattr(cases, "pays", lambda params, batch: batch == 1)
    model = Llama(dataclasses.replace(TINY, num_layers=1), KV)
    (case,) = cases.make_cases(["decode"], model, [28], 1, beside=False, weights=weights)
    params = case.build(random_params(model.config)).first[0]["params"]
    assert is_fused(params) and stored_as(params) == weights
    with pytest.raises(ValueError, match="are for decode alone, not forward"):
        cases.make_cases(["forward"], model, [28], 1, weights="int8")


def test_which_cases():
    model = Llama(TINY, KV)
    names = [case.name for case in cases.make_cases(cases.WORKS, model, [28, 10], 1)]
    assert names.count("decode/freqkv/any") == 1
    assert {"decode/full/10", "forward/freqkv/10", "compress/freqkv/28"} <= set(names)
    assert "compress/freqkv/10" not in names and "compress/full/28" not in names
    only_full = cases.make_cases(["forward"], model.clone(kv=FullConfig()), [28], 1)
    assert [case.name for case in only_full] == ["forward/full/28"]
    assert cases.default_lengths(FreqKVConfig()) == (8188, 32740, 130948)
    with pytest.raises(ValueError, match="batch"):
        cases.make_cases(["forward"], model, [28], 0)
    with pytest.raises(ValueError, match="no work"):
        cases.make_cases(["sleep"], model, [28], 1)


def test_budget_and_memory_leave_reasons():
    def build(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    def refuse():
        raise AssertionError("begun after the deadline")

    case = case_of("attention")
    late = report.run_cases([case], refuse, CEILINGS, 5, time.monotonic() - 1)
    assert "budget" in late[0]["skipped"]
    big = dataclasses.replace(case, build=build)
    rows = report.run_cases([big], lambda: None, CEILINGS, 5, None)
    assert "memory" in rows[0]["skipped"] and "skipped" in report.table(rows)

"""The training step as a case: what the loop runs, counted as the loop counts it."""

import dataclasses

import jax
import numpy as np
import pytest

from freqkv_jax.bench import amounts, report, timing, train_case
from freqkv_jax.cli import main
from freqkv_jax.config import SHAPES
from freqkv_jax.model.llama import Llama
from freqkv_jax.training.step import flops_per_step
from tests.training.runs import run_config

CONFIG = dataclasses.replace(SHAPES["tiny"], num_layers=1)


def first_case(cfg, length=28):
    return next(train_case.make_train_cases(cfg, CONFIG, [length]))


def test_the_step_of_the_loop_goes_on_from_its_own_state():
    case = first_case(run_config(mode="norms", remat="none", micro_batch=4))
    program = case.build(None)
    first, seen = program.first, []
    # A model of 16 slots: the rows are long enough to be compressed.
    assert case.name == "train/freqkv/28" and case.tokens == 8 * 28
    assert first[3].shape == (8, 28) and case.model.kv.num_compressions(28) == 2

    def following(index, args, out):
        seen.append((int(out[0].step), float(out[1]["loss"]), bool(out[1]["finite"])))
        return program.following(index, args, out)

    got = timing.measure(dataclasses.replace(program, following=following))
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(loss) and finite for _, loss, finite in seen)
    assert len({loss for _, loss, _ in seen}) == 5, "the tokens change"
    assert all(x.is_deleted() for x in jax.tree.leaves(first[0])), "the state is donated"
    assert not any(x.is_deleted() for x in jax.tree.leaves(first[1]))
    assert got.compile_seconds > 0 and got.program_bytes


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_compiling_from_shapes_makes_ready_what_is_timed(mode, monkeypatch):
    """The same text, which is what a compile cache goes by. Rows of 32 are padded by nothing; such
    a pad is one function or two, by whether the tokens are known to lie on a mesh."""
    texts = []

    def lowered(program):
        texts.append(timing._lower(program).as_text())
        return None, 0.0

    monkeypatch.setattr(report, "compile_program", lowered)
    monkeypatch.setattr(report, "program_bytes", lambda compiled: None)
    case = first_case(run_config(mode=mode, remat="none", micro_batch=8), 32)
    report.compile_cases([case], lambda: None)
    lowered(case.build(None))
    assert texts[0] == texts[1]


def test_amounts_are_those_of_the_loop():
    for mode in ("lora", "full"):
        cfg = run_config(mode=mode, seq_len=28)
        model = Llama(CONFIG, cfg.kv, "float32")
        got = train_case.step_amount(cfg, model, 2)
        assert got.useful_flops + got.map_flops == pytest.approx(flops_per_step(cfg, model) / 2)
        assert got.map_flops == amounts.map_flops(CONFIG, cfg.kv, 2, 8)  # twice, on two devices
        # Masters and two moments, float32, in and out; and a few counters.
        trained = CONFIG.num_params if mode == "full" else 64 * 256 + 3 * 64 + 8 * (8 * 64 - 64)
        frozen = 0 if mode == "full" else CONFIG.num_params - 64 * 256 - 3 * 64
        assert got.num_bytes == pytest.approx((2 * 3 * trained + frozen) * 4 / 2, abs=32)


def test_the_full_cache_beside_it_and_lengths():
    cfg = run_config(mode="full")
    names = [case.name for case in train_case.make_train_cases(cfg, CONFIG, [96, 48])]
    assert names == ["train/freqkv/48", "train/full/48", "train/freqkv/96", "train/full/96"]
    alone = train_case.make_train_cases(cfg, CONFIG, [48], beside=False)
    assert [case.name for case in alone] == ["train/freqkv/48"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "bench train takes a training config"),
        (["train", "--config", "tiny", "--model", "tiny"], "and no --model"),
        (["train", "--config", "tiny", "--peers"], "not train"),
        (["train", "--config", "tiny", "--batch", "0"], "batch_size must be at least 1"),
        (["train", "--config", "tiny", "--set", "train.bath=1"], "did you mean 'batch_size'"),
        (["forward"], "bench forward takes --model"),
        (["forward", "--model", "tiny", "--config", "tiny"], "are train's"),
    ],
)
def test_errors(capsys, words, message):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err

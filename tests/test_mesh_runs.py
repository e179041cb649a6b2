"""Scoring, prefill and decode on 8 fake devices: the numbers of one, and no cache is gathered."""

import jax
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import programs, sharding
from freqkv_jax.hlo import Program
from freqkv_jax.reading import compiled, placed_maps
from freqkv_jax.sampling import sampling
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, assert_close

CONFIG = tiny_config(4, 2, vocab_size=64)
PARAMS = random_params(CONFIG)
TOKENS = random_tokens(CONFIG, 4, 50)
POLICIES = [fk.FreqKVConfig(16, 4), fk.SinkWindowConfig(16, 4), fk.FullConfig()]


@pytest.fixture(scope="module")
def mesh():
    return fk.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def placed(mesh):
    return jax.device_put(PARAMS, sharding.param_shardings(PARAMS, mesh))


def is_spread(state):
    return all(
        leaf.sharding.shard_shape(leaf.shape)[:2] == (1, 1)
        for leaf in jax.tree.leaves(state.layers)
    )


@pytest.mark.parametrize(
    "kv", [POLICIES[0], *(pytest.param(kv, marks=pytest.mark.slow) for kv in POLICIES[1:])], ids=str
)
def test_the_numbers_are_those_of_one_device(placed, kv):
    model = fk.Llama(CONFIG, kv)
    assert_close(fk.score(model, placed, TOKENS), fk.score(model, PARAMS, TOKENS), LOGITS)
    for lengths in (None, [50, 3, 16, 31]):
        one, state = fk.prefill(model, PARAMS, TOKENS, lengths)
        many, spread = fk.prefill(model, placed, TOKENS, lengths)
        assert_close(many, one, LOGITS)
        assert is_spread(spread)
        tokens, one, state = fk.decode(model, PARAMS, state, one, 14)
        got, many, spread = fk.decode(model, placed, spread, many, 14)
        assert got.tolist() == tokens.tolist()
        assert_close(many, one, LOGITS)
        assert is_spread(spread) and spread.fill.sharding.is_fully_replicated


def test_generate_on_a_mesh(placed):
    model = fk.Llama(CONFIG, POLICIES[0])
    prompts = [row[:n].tolist() for row, n in zip(TOKENS, (50, 3, 16, 31), strict=True)]
    options = {"temperature": 1.0, "top_k": 40, "eos_id": [7]}
    assert fk.generate(model, placed, prompts, 20, **options) == fk.generate(
        model, PARAMS, prompts, 20, **options
    )


def test_jits_of_ones_own_run_with_the_mesh_set(mesh, placed):
    model = fk.Llama(CONFIG, POLICIES[0])
    logits, state = fk.prefill(model, PARAMS, TOKENS)
    many, spread = fk.prefill(model, placed, TOKENS)
    apply = jax.jit(lambda p: model.apply({"params": p}, TOKENS))
    scan = jax.jit(lambda p, s, x: fk.decode_scan(model, p, s, x, 14))
    with jax.set_mesh(mesh):
        got, whole = scan(placed, spread, many), apply(placed)
    assert_close(whole, apply(PARAMS), LOGITS)
    want = scan(PARAMS, state, logits)
    assert got[0].tolist() == want[0].tolist()
    assert_close(got[1], want[1], LOGITS)
    assert is_spread(got[2])


def test_a_batch_that_does_not_divide_is_refused(placed):
    model = fk.Llama(CONFIG, POLICIES[0])
    with pytest.raises(ValueError, match=r"does not divide batch 3 by data\*fsdp=4"):
        fk.prefill(model, placed, TOKENS[:3])


def test_no_cache_is_gathered(mesh, placed):
    # Wide enough that a cache leaf's shard is larger than any activation.
    kv = fk.FreqKVConfig(64, 4)
    model = fk.Llama(CONFIG, kv)
    logits, state = fk.prefill(model, placed, TOKENS)
    variables = {"params": placed, "maps": placed_maps(kv, mesh)}
    rule, draw = sampling(0.0, None, None, None, 4)
    eos = np.array([7], np.int32)
    shard = min(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.layers)
    )
    texts = []
    with jax.set_mesh(mesh):
        step = compiled(programs.decode_steps, mesh, kv)
        for uniform in (False, True):
            lowered = step.lower(
                model, variables, state, logits, draw, eos, rule=rule, num_steps=4, uniform=uniform
            )
            texts.append(lowered.compile().as_text())
        room = compiled(programs.make_room, mesh, kv)
        for due in (None, np.array([True, False, True, False])):
            texts.append(room.lower(model, variables, state, due).compile().as_text())
    for text in texts:
        moved = [c for c in Program(text).collectives() if c.kind != "all-reduce"]
        large = [c for c in moved if any(array.size >= shard for array in c.output)]
        # Weights are gathered over fsdp; what is gathered comes from a parameter of the model.
        assert all(c.origin.startswith("parameter") or _is_weight(c) for c in large), large


def _is_weight(collective):
    sizes = {leaf.shape for leaf in jax.tree.leaves(PARAMS)}
    parts = {tuple(sorted(shape)) for shape in sizes}
    halves = {tuple(sorted((a // x, b // y))) for s in sizes if len(s) == 2 for a, b in [s]
              for x in (1, 2) for y in (1, 2)}  # fmt: skip
    return all(tuple(sorted(a.dims)) in parts | halves for a in collective.output)

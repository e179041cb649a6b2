"""Generation: rows as they are alone, streams that add up to the result, states that go on."""

import numpy as np
import pytest

import freqkv_jax as fk
from tests.tiny import parallel_logits, random_params, random_tokens, tiny_config

CONFIG = tiny_config(4, 2)
MODEL, PARAMS = fk.Llama(CONFIG, fk.FreqKVConfig(16, 4)), random_params(CONFIG)
TOKENS = random_tokens(CONFIG, 3, 40)
PROMPTS = [TOKENS[0, :3].tolist(), TOKENS[1, :40].tolist(), TOKENS[2, :16].tolist()]


def generate(prompts=PROMPTS, new=20, **options):
    return fk.generate(MODEL, PARAMS, prompts, new, **options)


def follow(prompt, count):
    """Greedy continuation by the parallel form alone."""
    text = list(prompt)
    for _ in range(count):
        logits = parallel_logits(MODEL, PARAMS, [text])
        text.append(int(np.argmax(logits[0, -1])))
    return text[len(prompt) :]


def test_greedy_rows_are_those_of_the_parallel_form():
    out = generate(new=8)
    assert out == [follow(prompt, 8) for prompt in PROMPTS]
    assert generate(np.array([PROMPTS[0]] * 2), new=8) == [out[0]] * 2


def test_a_row_is_the_same_alone_sampled_too():
    options = {"temperature": 1.0, "top_k": 30, "top_p": 0.95}
    together = generate(seed=[4, 5, 6], **options)
    for prompt, seed, want in zip(PROMPTS, [4, 5, 6], together, strict=True):
        assert generate([prompt], seed=[seed], **options) == [want]
    one_seed = generate(seed=4, **options)
    assert generate(PROMPTS[:1], seed=4, **options) == one_seed[:1]
    assert one_seed != generate(seed=7, **options)


@pytest.mark.parametrize("stops", [False, True])
def test_streams_add_up(stops):
    free = generate(new=40)
    eos = [free[1][17]] if stops else None
    pieces = [[], [], []]
    calls = []

    def stream(row, ids):
        assert 0 < len(ids) <= 16
        pieces[row].extend(ids)
        calls.append(row)

    out = generate(new=40, eos_id=eos, stream=stream)
    assert out == pieces == generate(new=40, eos_id=eos)
    for got, want in zip(out, free, strict=True):
        end = want.index(eos[0]) if stops and eos[0] in want else 40
        assert got == want[:end]
    assert len(calls) > 3


def test_a_state_goes_on():
    free = generate(new=40)
    eos = free[0][12]
    out, state = generate(new=20, eos_id=eos, return_state=True)
    read = [len(p) + len(o) + (eos in f[:20]) for p, o, f in zip(PROMPTS, out, free, strict=True)]
    assert state.seen.tolist() == read
    turn = [[5, 6, 7], [8], [9, 10]]
    more = generate(turn, new=6, state=state)
    for row in range(3):
        end = [eos] if eos in free[row][:20] else []
        text = PROMPTS[row] + out[row] + end + turn[row]
        assert more[row] == follow(text, 6)


def test_nothing_to_do():
    assert generate([]) == [] and generate([], return_state=True) == ([], None)
    out, state = generate(new=0, return_state=True)
    assert out == [[], [], []] and state.seen.tolist() == [3, 40, 16]


def test_the_full_cache_grows():
    full = MODEL.clone(kv=fk.FullConfig())
    _, state = fk.generate(full, PARAMS, [TOKENS[0].tolist() * 8], 10, return_state=True)
    assert state.slots == 512 and state.seen.tolist() == [330]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [1, 2]}, r"pass \[prompt\]"),
        ({"prompts": [["a"]]}, "not token ids; encode it first"),
        ({"prompts": [[61]]}, "token id 61 is outside the vocabulary"),
        ({"new": -1}, "max_new_tokens must be a whole number"),
        ({"seed": [1, 2]}, r"seed must be a whole number or one a row \(3\)"),
        ({"temperature": -0.5}, "temperature must be 0"),
        ({"eos_id": 99}, "eos_id must be token ids"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**change)

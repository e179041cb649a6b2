"""The lm-eval adapter: what it makes of requests, and whole runs through lm-eval itself."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from freqkv_jax.evals import drive, lm_eval_task
from freqkv_jax.evals.lm_eval_task import LmEval
from freqkv_jax.evals.task import Answer
from freqkv_jax.tokenizer import load_tokenizer
from tests.evals.fakes import MODEL, FakeEngine
from tests.model_folder import write_tokenizer

ROOT = Path(__file__).parents[2]
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: the extra eval"
)


class Engine(FakeEngine):
    """Reads bytes; answers with the length of the prompt."""

    tokenizer = None

    def __init__(self, tokenizer):
        super().__init__(MODEL)
        self.tokenizer = tokenizer

    def generate(self, prompts):
        return [Answer(str(len(prompt.tokens)), 3, True) for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def adapter():
    return pytest.importorskip("freqkv_jax.evals.lm_eval_adapter", exc_type=ImportError)


@pytest.fixture
def make(adapter, tokenizer):
    return lambda **options: adapter.FreqKVLM(Engine(tokenizer), **options)


@dataclasses.dataclass
class Request:
    args: tuple


BOS = 256  # of the byte tokenizer of tests.model_folder


def test_context_and_continuation(make, tokenizer):
    lm = make()
    (pair,) = lm.plan("loglikelihood", ("The sky is ", "blue"), "k").pairs
    assert tokenizer.decode(pair[0]) == "The sky is" and tokenizer.decode(pair[1]) == " blue"
    (pair,) = lm.plan("loglikelihood", ("", "blue"), "k").pairs
    assert pair[0] == (BOS,) and tokenizer.decode(pair[1]) == "blue"
    # The begin token is in the text already: it is the context.
    (pair,) = lm.plan("loglikelihood", ("", "<|endoftext|>ab"), "k").pairs
    assert pair[0] == (BOS,) and tokenizer.decode(pair[1]) == "ab"
    with pytest.raises(ValueError, match="no token of its own"):
        lm.plan("loglikelihood", ("x", ""), "k")
    with pytest.raises(ValueError, match="multimodal requests cannot be answered"):
        lm.plan("multimodal", ("x",), "k")


def test_begin_token_stands_once(make, monkeypatch):
    lm = make()
    assert lm.tok_encode("ab", add_special_tokens=True) == [BOS, *lm.tok_encode("ab")]
    monkeypatch.setattr(lm, "_begins", True)
    ids = lm.tok_encode("ab")
    assert ids[0] == BOS and len(ids) == 3
    assert lm.tok_encode("<|endoftext|>ab") == ids
    assert lm.tok_encode("ab", add_special_tokens=False) == ids[1:]
    (pair,) = lm.plan("loglikelihood", ("a", "b"), "k").pairs
    assert pair == ((BOS, ids[1]), (ids[2],))
    (pair,) = lm.plan("loglikelihood_rolling", ("ab",), "k").pairs
    assert pair == ((BOS,), tuple(ids[1:]))


def test_long_prompts_lose_their_middle(make, tokenizer, adapter):
    lm = make(max_length=7)
    (pair,) = lm.plan("loglikelihood", ("0123456789", "ab"), "k").pairs
    assert tokenizer.decode(pair[0]) == "01289" and tokenizer.decode(pair[1]) == "ab"
    prompt = lm.plan("generate_until", ("0123456789", {"until": "."}), "k")
    assert tokenizer.decode(prompt.tokens) == "0123789" and prompt.length == 7
    assert prompt.stop == (".",) and prompt.max_new_tokens == 256
    for room in range(1, 12):
        cut = adapter.cut_middle(range(10), room)
        assert len(cut) == min(room, 10) and cut == sorted(set(cut)) and cut[0] == 0
    with pytest.raises(ValueError, match="leaves no room"):
        lm.plan("loglikelihood", ("x", "1234567"), "k")
    with pytest.raises(ValueError, match="--max-length"):
        make(max_length=1)


def test_rolling_scores_every_token_once(make, tokenizer):
    text = "Call me Ishmael."
    ids = tuple(tokenizer.encode(text))
    whole = make().plan("loglikelihood_rolling", (text,), "k")
    assert whole.pairs == (((BOS,), ids),) and whole.length == 17
    parts = make(max_length=5).plan("loglikelihood_rolling", (text,), "k")
    assert sum((b for _, b in parts.pairs), ()) == ids
    assert all(a and len(a) + len(b) <= 6 for a, b in parts.pairs)
    assert make().plan("loglikelihood_rolling", ("",), "k").pairs == ()


def test_answers_come_in_order_whatever_the_batch(make, tokenizer):
    texts = ["long, longer, longest", "x", "in between", "y"]
    for batch_size in (1, 3):
        lm = make(batch_size=batch_size)
        requests = [Request((text, {"until": [], "max_gen_toks": 4})) for text in texts]
        assert lm.generate_until(requests) == [str(len(text)) for text in texts]
        got = lm.loglikelihood([Request(("c", text)) for text in texts])
        for (log_prob, greedy), text in zip(got, texts, strict=True):
            ids = np.array(tokenizer.encode(text))  # what the fake engine makes of them
            assert (log_prob, greedy) == (-(ids % 7).sum(), bool((ids % 2 == 0).all()))
        rolling = lm.loglikelihood_rolling([Request((text,)) for text in ["", *texts]])
        assert rolling == [0.0, *(log_prob for log_prob, _ in got)]


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, ((), 256)),
        ({"until": "a", "max_gen_toks": 3}, (("a",), 3)),
        ({"until": ["a", "", "b"], "max_new_tokens": 3, "max_tokens": 9}, (("a", "b"), 3)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "num_beams": 1}, ((), 256)),
        ({"do_sample": True, "temperature": 0}, ((), 256)),
    ],
)
def test_greedy_settings(adapter, settings, want):
    assert adapter.greedy_settings(settings) == want


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_sample": True}, "the task samples"),
        ({"temperature": 0.7}, "the task samples"),
        ({"num_beams": 4}, "num_beams"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"max_gen_toks": 0}, "at least one token"),
    ],
)
def test_other_than_greedy_is_refused(adapter, settings, words):
    with pytest.raises(ValueError, match=words):
        adapter.greedy_settings(settings)


def test_chat(make, tokenizer):
    lm, turns = make(), [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(turns) == tokenizer.render_chat(turns)
    open_end = lm.apply_chat_template(
        [*turns, {"role": "assistant", "content": "Hi"}], add_generation_prompt=False
    )
    assert open_end.endswith("<|im_start|>assistant\nHi")
    assert lm.chat_template(True) == tokenizer.chat_template and lm.chat_template(False) is None
    assert lm.tokenizer_name == make().tokenizer_name


def test_failed_requests_are_wrong_answers(adapter):
    assert adapter.response("loglikelihood", None) == (float("-inf"), False)
    assert adapter.response("loglikelihood_rolling", None) == float("-inf")
    assert adapter.response("generate_until", None) == ""
    assert lm_eval_task._plain({"a": (float("nan"), np.float64(1), len)}) == {
        "a": [None, 1.0, str(len)]
    }


@needs_lm_eval
def test_bad_tasks(tokenizer):
    class Manager:
        all_tasks = ("hellaswag", "ruler_vt")

        def match_tasks(self, names):
            return [name for name in self.all_tasks if name == names[0]]

    assert lm_eval_task._known_names(Manager(), ["ruler_vt"]) == ["ruler_vt"]
    with pytest.raises(ValueError, match="no task 'helaswag'; did you mean hellaswag"):
        lm_eval_task._known_names(Manager(), ["helaswag"])
    with pytest.raises(FileNotFoundError, match="--include-path ./none is no folder"):
        LmEval(tasks=("x",), include_path="./none").items(Engine(tokenizer))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is there")
def test_without_lm_eval(tokenizer):
    with pytest.raises(ImportError, match="freqkv-jax\\[eval\\]"):
        LmEval(tasks=("x",)).items(Engine(tokenizer))


@pytest.fixture
def choice(monkeypatch):
    """The task freqkv_choice of tests/data: three questions."""
    monkeypatch.chdir(ROOT)  # where it names its data from
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return LmEval(tasks=("freqkv_choice",), include_path=str(ROOT / "tests/data/lm_eval_task"))


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # lm-eval's and those of what it needs
def test_a_finished_run_is_found_by_a_new_task(choice, tokenizer, tmp_path):
    settings = drive.Run(model_path="org/model", output=str(tmp_path / "a.json"))
    got = drive.run_task(choice, Engine(tokenizer), settings)
    again = dataclasses.replace(choice)
    assert drive.finished(again, Engine(tokenizer), settings) == got
    write_tokenizer(tmp_path)
    other = load_tokenizer(tmp_path)
    again.describe(Engine(other))
    assert again.__dict__["_of"] is other, "another model's requests are its own"


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_failed_documents_at_the_end_count_as_wrong(choice, tokenizer, monkeypatch):
    right = drive.run_task(choice, Engine(tokenizer), drive.Run(model_path="org/model"))
    assert right["num_documents"]["freqkv_choice"]["effective"] == 3
    log_probs = FakeEngine.log_probs

    def failing(self, contexts, continuations):
        if any(last == tuple(c) for c in contexts):
            raise ValueError("no room")
        return log_probs(self, contexts, continuations)

    last = choice.items(Engine(tokenizer))[-1].items[0].pairs[0][0]
    monkeypatch.setattr(FakeEngine, "log_probs", failing)
    got = drive.run_task(choice, Engine(tokenizer), drive.Run(model_path="org/model"))
    assert [r["key"] for r in got["records"] if "error" in r] == ["freqkv_choice/2"]
    assert got["num_documents"]["freqkv_choice"]["effective"] == 3
    scores = [one["samples"]["freqkv_choice"]["acc,none"] for one in (right, got)]
    assert scores[1] == [*scores[0][:2], 0.0]


@needs_lm_eval
def test_through_lm_eval_without_torch(tmp_path):
    env = os.environ | {
        "FREQKV_NO_COMPILE_CACHE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    words = [sys.executable, "-m", "tests.evals.lm_eval_run", str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=280)
    assert run.returncode == 0, run.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["loaded"] == []
    command, library = seen["command"], seen["library"]
    assert "holds this run's result already" in run.stderr
    assert command["task"] == "lm-eval" and command["protocol"].startswith("lm-eval-0.")
    # Two documents a task: questions with three and two choices, texts, answers.
    assert command["num_items"] == 6 and command["num_failed"] == 0
    assert command["num_documents"]["freqkv_choice"] == {"original": 3, "effective": 2}
    assert command["num_compressions"]["max"] > 0
    for name, metrics in library["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in metric:
                assert command["results"][name][metric] == pytest.approx(value, rel=1e-4)
    assert [pair[0] for pair in library["pairs"]] == pytest.approx(
        [pair[1] for pair in library["pairs"]], abs=1e-4
    )
    records = {r["key"]: r for r in command["records"]}
    ours = [x for i in range(2) for x in records[f"freqkv_choice/{i}"]["log_probs"]]
    assert ours == pytest.approx([pair[1] for pair in library["pairs"]], abs=1e-4)
    assert "freqkv_answer" in run.stdout and "exact_match" in run.stdout


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.real
def test_ruler_of_lm_eval(smollm2_gguf, tmp_path):
    """Sized by transformers from our tokenizer, and answered by a real model, without torch."""
    output = tmp_path / "vt.json"
    code = (
        "import sys; from tests.evals.lm_eval_run import hide; hide('torch')\n"
        "from freqkv_jax.cli import main; status = main(sys.argv[1:])\n"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, "eval", "lm-eval", "--model", str(smollm2_gguf), "--tasks",
             "ruler_vt", "--lengths", "1024", "--limit", "2", "--cache-size", "512", "--output",
             str(output)]  # fmt: skip
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=1800)
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text())
    assert result["num_items"] == 2 and result["num_compressions"]["min"] > 0
    # What lm-eval makes is at most so long, though not nearly always that.
    assert all(512 < record["length"] < 1024 for record in result["records"])
    assert 0 <= result["results"]["ruler_vt"]["1024,none"] <= 1

import json
from types import SimpleNamespace

import pytest

from freqkv_jax.evals import longgenbench, report_sections
from freqkv_jax.evals.longgenbench import LongGenBench, read_assignments, says, units
from freqkv_jax.evals.options import build_task
from tests.evals.results import result, runs_of
from tests.evals.text_tasks import FakeEngine, assignment, gold_text, run


@pytest.fixture
def data(tmp_path):
    records = [assignment(), assignment("Menu Week", 8), assignment("Floor")]
    return write(tmp_path, records)


def write(folder, records):
    file = folder / "short.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def writer(data, numbers=None):
    """Says the gold text of a prompt's record."""
    records = json.loads(data.read_text())
    return FakeEngine(lambda p: gold_text(records[p.assignment.index], numbers))


def test_writing_all_that_is_asked_for_scores_100(data):
    records, summary = run(LongGenBench(data=str(data)), writer(data))
    assert [record["key"] for record in records] == ["floor/0", "menu-week/1", "floor/2"]
    assert [record["score"] for record in records] == [1, 1, 1]
    assert summary["score"] == summary["completion_rate"] == 100
    assert summary["string_check"] == {"once": 100, "range": 100, "periodic": 100, "mean": 100}
    assert summary["accuracy_x_completion"] == 100
    assert summary["judge"] is None
    assert summary["accuracy_by"] == "string_check"


def test_writing_nothing_scores_0(data):
    records, summary = run(LongGenBench(data=str(data)), FakeEngine(lambda _: ""))
    # The first unit is in the prompt: it is there, and empty.
    assert [record["completion_rate"] for record in records] == [1 / 6, 1 / 8, 1 / 6]
    assert summary["score"] == 0
    assert summary["string_check"]["once"] == 0
    assert summary["string_check"]["range"] is summary["string_check"]["mean"] is None
    assert summary["accuracy_x_completion"] is None


def test_a_report_calls_percent_percent(data):
    _, summary = run(LongGenBench(data=str(data)), writer(data))
    (table,) = report_sections._extras(runs_of(result("longgenbench", "freqkv", **summary)))
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "model": "tiny", "policy": "FreqKV N=64", "completion rate %": "100",
        "string check %": "100", "judge %": "-", "accuracy x completion %": "100",
    }  # fmt: skip


def test_a_short_text_keeps_its_accuracy_and_loses_completion(data):
    records, summary = run(LongGenBench(data=str(data)), writer(data, [1, 2, 3]))
    assert records[0]["completion_rate"] == 0.5
    assert records[0]["score"] == 4 / 7  # of all checks: units 1, 2, 2, 3 out of those and 4, 4, 6
    assert summary["string_check"] == {"once": 100, "range": 100, "periodic": 100, "mean": 100}
    assert summary["completion_rate"] == pytest.approx(100 * (0.5 + 3 / 8 + 0.5) / 3, abs=0.005)
    assert summary["accuracy_x_completion"] == summary["completion_rate"]


def test_accuracy_pools_the_checks_of_all_texts(data):
    def say(prompt):
        return " a tea room #*# Floor 3: a garden" * (prompt.assignment.index == 0)

    _, summary = run(LongGenBench(data=str(data)), FakeEngine(say))
    # "once" has a check of unit 1 in three texts, "range" one of unit 3 in one text.
    assert summary["string_check"]["once"] == pytest.approx(100 / 3, abs=0.005)
    assert summary["string_check"]["range"] == 100
    rows = {row[0]: row for row in summary["table"]["rows"]}
    assert [rows[name][1] for name in ("floor", "menu-week", "all")] == [2, 1, 3]
    assert rows["floor"][3] == 50


def test_prompts(data):
    engine = FakeEngine(lambda _: "")
    prompts = LongGenBench(data=str(data)).items(engine)
    record = assignment()
    assert engine.tokenizer.decode(prompts[0].tokens) == record["prompt"]
    assert (prompts[0].max_new_tokens, prompts[0].stop) == (16000, ("*** finished",))
    wrapped = LongGenBench(data=str(data), chat_template="tokenizer", max_new_tokens=7)
    (prompt, *_) = wrapped.items(engine)
    assert prompt.max_new_tokens == 7
    assert engine.tokenizer.decode(prompt.tokens) == (
        "<|im_start|>user\nPlan 6 of Floor. *** started ***<|im_end|>\n"
        "<|im_start|>assistant\n#*# Floor 1 (first):"
    )


def test_the_long_version_may_be_twice_as_long(tmp_path):
    data = write(tmp_path, [assignment(number=300)])
    (prompt,) = LongGenBench(data=str(data)).items(FakeEngine(lambda _: ""))
    assert prompt.max_new_tokens == 32000


def test_units(data):
    it = read_assignments(str(data))[0]
    text = "one #*# Floor 2: two #*# floor 3 #*# Floor 2: again #*# Floor 7: #*# Floor 12 #*# Floor"
    found = units(it, text)
    assert sorted(found) == [1, 2]  # 3 is spelled otherwise, 7 and 12 were not asked for
    assert found[2].strip() == "Floor 2: two"
    assert sorted(units(it, "x *** finished ***\n#*# Floor 2: y")) == [1]
    # A name that another contains, and one that regular expressions would read otherwise.
    menu = read_assignments(str(data))[1]
    assert sorted(units(menu, "x #*# Week 2: y #*# Menu Week 3: z")) == [1, 3]


def test_string_check_is_of_whole_words():
    assert says("There is a BOOK\n  shop!", "book (shop)")
    assert says("Café-bar: ¡naïve!", "café bar")
    assert not says("an office", "off")
    assert not says("", "x")


class Judge:
    """Says yes where the event is garden; asked in order of length."""

    def __init__(self):
        self.tokenizer, self.asked = FakeEngine(None).tokenizer, []

    def generate(self, prompts):
        self.asked += prompts
        lengths = [prompt.length for prompt in prompts]
        assert lengths == sorted(lengths)
        texts = [self.tokenizer.decode(prompt.tokens) for prompt in prompts]
        words = ["Yes." if "following: garden?" in text else "No" for text in texts]
        return [SimpleNamespace(text=word) for word in words]


def test_a_judge(data, monkeypatch):
    judge, loaded = Judge(), []

    def load(path, dtype, rows):
        loaded.append((path, dtype, rows))
        return judge

    monkeypatch.setattr(longgenbench, "load_judge", load)
    monkeypatch.setattr(longgenbench, "load_tokenizer", lambda path: judge.tokenizer)
    engine = writer(data, [1, 2, 3])
    engine.model = SimpleNamespace(dtype="float32")
    task = LongGenBench(data=str(data), judge="a/judge", judge_batch_size=5, judge_max_length=30)
    records, summary = run(task, engine)
    assert loaded == [("a/judge", "float32", 5)]
    assert len(judge.asked) == 12  # of units that are there
    assert max(prompt.length for prompt in judge.asked) < 30 + 80
    assert summary["judge"] == {"once": 0, "range": 100, "periodic": 0, "mean": 33.33}
    assert summary["string_check"]["once"] == 100
    assert summary["accuracy_by"] == "judge"
    assert records[0]["score"] == 1 / 7
    assert records[0]["scores"] == {"completion_rate": 0.5, "string_check": 1, "judge": 0.25}
    assert summary["score"] == pytest.approx(100 / 7, abs=0.005)
    assert task.describe(engine)["judge"] == "a/judge"


def test_another_judge_of_the_same_name_is_another_run(data, tmp_path):
    (tmp_path / "judge").mkdir()
    task, seen = LongGenBench(data=str(data), judge=str(tmp_path / "judge")), []
    for weights in (b"0123", b"0124"):
        (tmp_path / "judge" / "model.safetensors").write_bytes(weights)
        seen.append(task.describe(FakeEngine(None)))
    assert seen[0]["judge"] == seen[1]["judge"] and seen[0] != seen[1]
    assert "judge_fingerprint" not in LongGenBench(data=str(data)).describe(FakeEngine(None))


def test_a_judge_that_cannot_be_asked_is_refused_before_anything_runs(data, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LongGenBench(data=str(data), judge=str(tmp_path / "nowhere")).items(FakeEngine(None))
    plain = FakeEngine(None, template=None).tokenizer
    monkeypatch.setattr(longgenbench, "load_tokenizer", lambda path: plain)
    with pytest.raises(ValueError, match="no chat template"):
        LongGenBench(data=str(data), judge="a/judge").items(FakeEngine(None))
    assert LongGenBench(data=str(data), judge="a/judge", judge_template="none").items(
        FakeEngine(None)
    )


def test_summary_of_nothing(data):
    assert LongGenBench(data=str(data)).summarize(FakeEngine(None), [])["score"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON.*fetch Dataset/Dataset_short.json"),
        ("{}", "must hold a JSON list"),
        ("[]", "must hold a JSON list"),
        ([assignment(), {"prompt": "x"}], "record 1: not a LongGenBench record: lacks 'type'"),
        ([assignment(prompt=3)], "record 0: .*prompt and prefix must be texts"),
        ([assignment(number=0)], "record 0: .*number positive"),
        ([assignment(checks_once="{'1': ")], "record 0: not a LongGenBench record"),
        ([assignment(checks_once="open('x')")], "record 0: not a LongGenBench record"),
        ([assignment(checks_range=["x"])], "record 0: not a LongGenBench record"),
        (["x"], "record 0: not a LongGenBench record"),
    ],
)
def test_data_of_another_schema(tmp_path, content, message):
    file = tmp_path / "data.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        LongGenBench(data=str(file)).items(FakeEngine(None))


def test_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a file; fetch Dataset/Dataset_short.json"):
        read_assignments(str(tmp_path))
    with pytest.raises(ValueError, match="needs --data"):
        build_task(LongGenBench, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "--num-samples must be at least 1"),
        ({"judge_batch_size": 0}, "--judge-batch-size must be at least 1"),
        ({"judge_template": "x"}, "--judge-template 'x': allowed are none"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LongGenBench(data="x", **options)

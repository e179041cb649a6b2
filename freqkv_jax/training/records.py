"""Sources of records: text files, JSONL, JSON, Hugging Face datasets, tensorflow-datasets."""

import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from freqkv_jax.training.paths import files_below, path_of, read_lines, read_text
from freqkv_jax.training.store import is_token_folder

KINDS = ("auto", "text", "jsonl", "tokens", "hf", "tfds", "chat", "alpaca", "generated")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_RECORDS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|changelog|citation|authors)\b.*", re.I)
_MESSAGES = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Record:
    """One record, as a mapping of fields, and where it stands (for errors)."""

    fields: dict[str, Any]
    where: str


def ending(path: Any) -> str:
    """The file's suffix, one of .gz left out."""
    name = path.name.removesuffix(".gz").lower()
    return name[name.rfind(".") :] if "." in name else ""


def find_kind(text: str) -> str:
    """What a path is, where data.*.kind is auto.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: a folder with nothing to read in it, or a hub id.
    """
    path = path_of(text)
    if not path.exists():
        if _HUB_ID.fullmatch(text):
            return "hf"
        raise FileNotFoundError(
            f"data {text} does not exist; give a text, .jsonl, .json, .parquet or .bin file, a"
            " folder of them, or name the kind (tfds, generated)"
        )
    if path.is_dir():
        if is_token_folder(path):
            return "tokens"
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return "hf"
        first = _deciding(text, files_below(path))
    else:
        first = path
    kind = ending(first)
    if kind == ".bin":
        return "tokens"
    if kind not in _RECORDS:
        return "text"
    record = next(read_records(text, "jsonl"), None)
    if record is not None and any(name in record.fields for name in _MESSAGES):
        return "chat"
    if record is not None and "instruction" in record.fields and "output" in record.fields:
        return "alpaca"
    return "jsonl"


def _deciding(text: str, files: list[Any]) -> Any:
    """The file of a folder that says what the folder is; records count, a README beside them not.

    Raises ValueError for an empty folder, and for one of records and texts.
    """
    if not files:
        raise ValueError(f"data folder {text} is empty; put text or record files into it")
    records = [file for file in files if ending(file) in _RECORDS]
    others = [f for f in files if ending(f) not in _RECORDS and not _ABOUT.fullmatch(f.name)]
    if records and others:
        raise ValueError(
            f"data folder {text} holds records ({records[0].name}) and other files"
            f" ({others[0].name}); say which to read with kind: (in the config, --kind on the"
            " command line) text or jsonl, or move one sort elsewhere"
        )
    return (records or others or files)[0]


def source_files(text: str, kind: str) -> list[Any]:
    """The local files of a source, in order; none for what is not a file (hub ids, tfds).

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: a folder without a file that the kind can read.
    """
    if kind in ("tfds", "generated"):
        return []
    path = path_of(text)
    if not path.exists():
        if kind not in ("text", "jsonl", "tokens") and _HUB_ID.fullmatch(text):
            return []
        raise FileNotFoundError(f"data {text} does not exist")
    if not path.is_dir():
        return [path]
    files = files_below(path)
    if kind == "tokens":
        files = [file for file in files if file.suffix == ".bin"]
    elif kind in ("jsonl", "chat", "alpaca", "hf"):
        files = [file for file in files if ending(file) in _RECORDS]
    if not files:
        raise ValueError(f"data folder {text} has no file of kind {kind}; name another kind")
    return files


def read_records(text: str, kind: str, split: str = "train") -> Iterator[Record]:
    """Every record of a source in order.

    Args:
      text: a path; for hf also a hub id, read as a stream; for tfds NAME or NAME:SPLIT.
      kind: one of KINDS but auto, tokens and generated.
      split: of a hub id or of tfds.

    Raises:
      ValueError, OSError, ImportError: with the file and the line or record.
    """
    if kind == "tfds":
        yield from _tfds(text, split)
        return
    files = source_files(text, kind)
    if not files:
        yield from _hub(text, split)
    elif kind == "text":
        for file in files:
            yield Record({"text": read_text(file)}, str(file))
    elif kind == "hf" and path_of(text).is_dir() and any(ending(f) == ".arrow" for f in files):
        yield from _saved(text, split)
    else:
        for file in files:
            yield from _file_records(file)


def _file_records(file: Any) -> Iterator[Record]:
    if ending(file) in (".parquet", ".arrow"):
        builder = {".parquet": "parquet", ".arrow": "arrow"}[ending(file)]
        datasets = _import("datasets")
        # Streaming reads the file itself, without a converted copy in the user's cache.
        rows = datasets.load_dataset(builder, data_files=str(file), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield Record(dict(row), f"{file}, record {number}")
        return
    if ending(file) == ".json":
        whole = read_text(file)
        if whole.lstrip()[:1] == "[":
            try:
                rows = json.loads(whole)
            except ValueError as error:
                raise ValueError(f"{file} is not valid JSON: {error}") from None
            for number, row in enumerate(rows, 1):
                yield _record(row, f"{file}, record {number}")
            return
    for number, line in read_lines(file):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error}); mend or delete it") from None
        yield _record(row, where)


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a record must be a JSON object, got {type(row).__name__}")
    return Record(row, where)


def _saved(text: str, split: str) -> Iterator[Record]:
    """A directory of `save_to_disk`."""
    data = _import("datasets").load_from_disk(text)
    if hasattr(data, "keys"):
        if split not in data:
            raise ValueError(f"{text} has no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    for number, row in enumerate(data, 1):
        yield Record(dict(row), f"{text}, record {number}")


def _hub(text: str, split: str) -> Iterator[Record]:
    datasets = _import("datasets")
    try:
        rows = datasets.load_dataset(text, split=split, streaming=True)
    except Exception as error:  # which ones it raises for a lost connection differs by its version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"no path is named {text!r}, and the Hugging Face hub does not give a data set of that"
            f" name with a split {split!r} ({reason[0]}); check name, split and network"
        ) from error
    for number, row in enumerate(rows, 1):
        yield Record(dict(row), f"{text} ({split}), record {number}")


def _tfds(text: str, split: str) -> Iterator[Record]:
    tfds = _import("tensorflow_datasets")
    name, _, own_split = text.partition(":")
    split = own_split or split
    try:
        rows = tfds.data_source(name, split=split, download=False)
    except Exception as error:  # from a wrong name to a file format that needs TensorFlow
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"tensorflow-datasets cannot read {name!r}, split {split!r} ({reason[0]}); prepare it"
            f" once with `tfds build {name} --file_format=array_record`"
        ) from error
    for number in range(len(rows)):
        row = {key: _plain(value) for key, value in rows[number].items()}
        # pg19 and its like name their text after what it is.
        if "text" not in row and "book_text" in row:
            row["text"] = row["book_text"]
        yield Record(row, f"{name} ({split}), record {number + 1}")


def _plain(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"this data needs the package {name}: pip install 'freqkv-jax[train]'"
        ) from None

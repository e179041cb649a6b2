"""Token ids with document ends: in memory, in flat files, or in a folder of `freqkv tokenize`.

A token folder holds shards NNNNN.bin (flat little-endian ids), NNNNN.answers where answers are
known (one byte a token, 1 for an answer), NNNNN.json beside each, and tokens.json, written last.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from freqkv_jax.token_ids import TOKEN_DTYPES, check_ids, dtype_for
from freqkv_jax.training.paths import BLOCK_BYTES, Watch, edges_sha256, file_sha256, path_of

INDEX = "tokens.json"
FORMAT = "freqkv-tokens-1"
WRONG_IDS = (
    "it was made for another tokenizer, or holds ids of another width (uint16 where the vocabulary"
    " fits, else uint32)"
)


class TokenStore(Protocol):
    """All documents of a source end to end; offsets int64 [documents + 1] say where they begin."""

    offsets: np.ndarray
    has_answers: bool
    fingerprint: str

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids of places start to stop."""
        ...

    def answers(self, start: int, stop: int) -> np.ndarray:
        """Whether each is part of an answer, bool; only where `has_answers`."""
        ...

    def check(self) -> None:
        """ValueError if a file behind it is not what it was."""
        ...


class MemoryStore:
    """Documents tokenised just now."""

    def __init__(
        self,
        documents: Sequence[tuple[np.ndarray, np.ndarray | None]],
        name: str,
        vocab_size: int,
        watch: Watch,
    ) -> None:
        """`documents` are ids and, for all or none, answer flags."""
        self._watch = watch
        self._tokens = np.concatenate([d[0] for d in documents] or [np.zeros(0, np.uint32)])
        check_ids(name, self._tokens, vocab_size, WRONG_IDS)
        flags = [d[1] for d in documents if d[1] is not None]
        self.has_answers = bool(documents) and len(flags) == len(documents)
        self._answers = np.concatenate(flags).astype(bool) if self.has_answers else None
        self.offsets = np.cumsum([0, *(len(d[0]) for d in documents)], dtype=np.int64)
        digest = hashlib.sha256(self._tokens.astype("<u4").tobytes())
        digest.update(self.offsets.astype("<i8").tobytes())
        if self._answers is not None:
            digest.update(self._answers.tobytes())
        self.fingerprint = digest.hexdigest()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids of places start to stop."""
        return self._tokens[start:stop]

    def answers(self, start: int, stop: int) -> np.ndarray:
        """Whether each is part of an answer."""
        assert self._answers is not None
        return self._answers[start:stop]

    def check(self) -> None:
        """Whether the texts are still what they were: a resume would read them again."""
        self._watch.check()


@dataclass(frozen=True)
class Shard:
    """One flat file of ids and what is known of it."""

    path: Any
    dtype: np.dtype
    num_tokens: int
    sha256: str
    answers: Any = None  # path of the flags, if there are any


class FileStore:
    """Documents in flat files. Rows are read from the files, nothing is kept."""

    def __init__(
        self, shards: Sequence[Shard], offsets: np.ndarray, fingerprint: str, watch: Watch
    ) -> None:
        self._shards, self._watch = list(shards), watch
        self._ends = np.cumsum([shard.num_tokens for shard in shards])
        self.offsets, self.fingerprint = offsets, fingerprint
        self.has_answers = bool(shards) and all(s.answers is not None for s in shards)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids of places start to stop."""
        return np.concatenate(
            [_read(s.path, s.dtype, low, high) for s, low, high in self._parts(start, stop)]
            or [np.zeros(0, np.uint16)]
        )

    def answers(self, start: int, stop: int) -> np.ndarray:
        """Whether each is part of an answer."""
        flags = np.dtype(np.uint8)
        parts = [_read(s.answers, flags, low, high) for s, low, high in self._parts(start, stop)]
        return np.concatenate(parts or [np.zeros(0, np.uint8)]).astype(bool)

    def check(self) -> None:
        """Whether the files are still what they were."""
        self._watch.check()

    def _parts(self, start: int, stop: int) -> list[tuple[Shard, int, int]]:
        """The shards that hold the places, and where in each."""
        out = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard = self._shards[number]
            base = int(self._ends[number]) - shard.num_tokens
            end = min(stop, base + shard.num_tokens)
            out.append((shard, start - base, end - base))
            start, number = end, number + 1
        return out


def _read(path: Any, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    # Read and not mapped: a file cut short under a map would kill the process.
    size = (stop - start) * dtype.itemsize
    try:
        with path.open("rb") as file:
            file.seek(start * dtype.itemsize)
            raw = file.read(size)
    except FileNotFoundError:
        raise ValueError(f"{path} has gone since this run began; put it back as it was") from None
    if len(raw) != size:
        raise ValueError(f"{path} has become shorter since this run began; put it back as it was")
    return np.frombuffer(raw, dtype)


def open_flat(files: Sequence[Any], vocab_size: int) -> FileStore:
    """Files of ids without a header, each one document: uint16 where the vocabulary fits, unless
    every second word is zero as it is in uint32, else uint32.

    Raises:
      ValueError: a size that is no multiple of the dtype, or ids outside the vocabulary.
    """
    shards = []
    for file in files:
        dtype = TOKEN_DTYPES[dtype_for(vocab_size)]
        with file.open("rb") as opened:
            head = np.frombuffer(opened.read(8192)[: 8192 // 4 * 4 or None], np.uint8)
        words = head[: len(head) // 4 * 4].view("<u2")
        if dtype.itemsize == 2 and words.any() and not words[1::2].any() and len(words) >= 8:
            dtype = TOKEN_DTYPES["uint32"]
        shards.append(_scan(file, dtype, vocab_size))
    offsets = np.cumsum([0, *(s.num_tokens for s in shards)], dtype=np.int64)
    about = repr([(s.sha256, str(s.dtype)) for s in shards])
    watch = Watch((s.path, s.sha256) for s in shards)
    return FileStore(shards, offsets, hashlib.sha256(about.encode()).hexdigest(), watch)


def _scan(file: Any, dtype: np.dtype, vocab_size: int) -> Shard:
    """Reads a flat file through once."""
    digest, num_bytes = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(block)
            if len(block) % dtype.itemsize:
                raise ValueError(
                    f"{file} has {num_bytes + len(block):,} bytes, which is no multiple of the"
                    f" {dtype.itemsize} bytes of {dtype.name}; the file is cut short, or holds no"
                    " token ids"
                )
            offset = num_bytes // dtype.itemsize
            check_ids(str(file), np.frombuffer(block, dtype), vocab_size, WRONG_IDS, offset)
            num_bytes += len(block)
    return Shard(file, dtype, num_bytes // dtype.itemsize, digest.hexdigest())


def is_token_folder(folder: Any) -> bool:
    """Whether `freqkv tokenize` wrote the folder, or began to."""
    return (folder / INDEX).exists() or (folder / "00000.json").exists()


def read_json(path: Any) -> dict[str, Any]:
    """A JSON object; ValueError that names a damaged file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make the token folder again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (no object); make the token folder again")
    return value


def open_folder(
    folder: Any, vocab_size: int, vocabulary: str | None, also_watch: Sequence[Any] = ()
) -> FileStore:
    """A folder that `freqkv tokenize` finished.

    Args:
      vocab_size: ids must be below it.
      vocabulary: digest of the run's vocabulary (tokenize.vocabulary_sha256), None if unknown.
      also_watch: pairs of path and SHA-256, the texts that it was made of.

    Raises:
      ValueError: unfinished or damaged, another tokenizer, or ids outside the vocabulary.
    """
    folder = path_of(folder)
    if not (folder / INDEX).exists():
        raise ValueError(
            f"{folder} is not finished ({INDEX} is missing): give the same freqkv tokenize command"
            " again, which goes on where it stopped"
        )
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{folder / INDEX} has format {index.get('format')!r}, this version reads {FORMAT!r};"
            " make the token folder again"
        )
    if vocabulary is not None and index["vocabulary"] != vocabulary:
        raise ValueError(
            f"{folder} was made with another tokenizer (of {index['tokenizer']}): its ids mean"
            " other tokens to this model; give freqkv tokenize the tokenizer of this run"
        )
    shards, offsets, watched = [], [np.zeros(1, np.int64)], list(also_watch)
    base = 0
    for name in index["shards"]:
        about = read_json(folder / f"{name}.json")
        shard = _open_shard(folder, name, about)
        if about["max_token"] >= vocab_size:
            tokens = _read(shard.path, shard.dtype, 0, shard.num_tokens)
            check_ids(str(shard.path), tokens, vocab_size, WRONG_IDS)
        shards.append(shard)
        offsets.append(np.asarray(about["offsets"], np.int64)[1:] + base)
        base += shard.num_tokens
        watched.append((shard.path, shard.sha256))
        if shard.answers is not None:
            watched.append((shard.answers, about["answers_sha256"]))
    return FileStore(shards, np.concatenate(offsets), fingerprint_of(folder, index), Watch(watched))


def fingerprint_of(folder: Any, index: dict[str, Any]) -> str:
    """Digest of the shards' digests and document ends."""
    digest = hashlib.sha256()
    for name in index["shards"]:
        about = read_json(folder / f"{name}.json")
        parts = (about["sha256"], about["answers_sha256"], about["dtype"], about["offsets"])
        digest.update(repr(parts).encode())
    return digest.hexdigest()


def _open_shard(folder: Any, name: str, about: dict[str, Any]) -> Shard:
    path, dtype = folder / f"{name}.bin", TOKEN_DTYPES[about["dtype"]]
    answers = folder / f"{name}.answers" if about["answers_sha256"] else None
    for file, item, digest in (
        (path, dtype.itemsize, about["sha256"]),
        (answers, 1, about["answers_sha256"]),
    ):
        if file is None:
            continue
        if not file.exists():
            raise ValueError(f"{file} is missing; give the same freqkv tokenize command again")
        stat = file.stat()
        size = getattr(stat, "st_size", None) or getattr(stat, "length", 0)
        # Hashing a large shard would take minutes of a start: its size and edges are compared.
        damaged = size != about["num_tokens"] * item
        if not damaged and size <= BLOCK_BYTES:
            damaged = file_sha256(file) != digest
        elif not damaged and file is path and "edges_sha256" in about:
            damaged = edges_sha256(file) != about["edges_sha256"]
        if damaged:
            raise ValueError(
                f"{file} is damaged (not the {about['num_tokens']:,} tokens that {name}.json tells"
                " of); delete it and its .json and give the same freqkv tokenize command again"
            )
    return Shard(path, dtype, about["num_tokens"], about["sha256"], answers)

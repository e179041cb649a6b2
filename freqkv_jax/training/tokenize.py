"""Writing token folders: records in, shards out, by several processes, to be gone on with.

One process reads the records in order and deals them out in batches that depend on nothing but
the records, so that the shards are the same however many processes encode them.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from freqkv_jax.files import stamp
from freqkv_jax.token_ids import TOKEN_DTYPES, dtype_for
from freqkv_jax.training.documents import encode_records, tokenizer_sha256, vocabulary_sha256
from freqkv_jax.training.paths import edges_sha256, put_bytes
from freqkv_jax.training.records import Record, read_records
from freqkv_jax.training.store import FORMAT, INDEX, read_json

SHARD_CHARS = 1 << 25  # characters of text a shard is made of, about 8M tokens


@dataclass(frozen=True)
class Job:
    """What is to be tokenised and how."""

    sources: tuple[tuple[str, str], ...]  # path and kind of each, kinds found already
    field: str = "text"
    answers: bool = False
    split: str = "train"
    shard_chars: int = SHARD_CHARS


@dataclass(frozen=True)
class _Batch:
    name: str
    kind: str
    records: list[Record]
    sha256: str


def batches(job: Job) -> Iterator[_Batch]:
    """The records of each shard; a shard is of one source."""
    number = 0
    for text, kind in job.sources:
        records: list[Record] = []
        size, digest = 0, hashlib.sha256()
        for record in read_records(text, kind, job.split):
            if kind not in ("chat", "alpaca") and job.field in record.fields:
                record = Record({job.field: record.fields[job.field]}, record.where)
            raw = json.dumps(record.fields, sort_keys=True, default=str)
            digest.update(raw.encode())
            records.append(record)
            size += len(raw)
            if size >= job.shard_chars:
                yield _Batch(f"{number:05}", kind, records, digest.hexdigest())
                records, size, digest = [], 0, hashlib.sha256()
                number += 1
        if records:
            yield _Batch(f"{number:05}", kind, records, digest.hexdigest())
            number += 1


def write_folder(
    job: Job,
    folder: Any,
    tokenizer: Any,
    tokenizer_path: str,
    workers: int = 1,
    force: bool = False,
    on_shard: Callable[[dict[str, Any], bool], Any] | None = None,
) -> dict[str, Any]:
    """Writes the token folder, or what is missing of it; returns its index.

    Args:
      folder: as of `paths.path_of`.
      tokenizer: a freqkv_jax.tokenizer.Tokenizer.
      tokenizer_path: where other processes load it from; written down in any case.
      workers: processes; 1 encodes in this one.
      force: replaces shards of other data or settings instead of refusing.
      on_shard: called with a shard's description and whether it was there already.

    Raises:
      ValueError, OSError: bad records (shards done before them stay), no tokens at all, or other
        data in the folder.
    """
    about = (tokenizer_sha256(tokenizer), job.field, job.answers, job.shard_chars)
    made_by = hashlib.sha256(repr(about).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, Any]] = {}

    def done(description: dict[str, Any], was_there: bool) -> None:
        shards[description["name"]] = description
        if on_shard is not None:
            on_shard(description, was_there)

    todo = _missing(job, folder, made_by, force, done)
    if workers > 1:
        _in_processes(todo, job, folder, made_by, tokenizer_path, workers, done)
    else:
        for batch in todo:
            done(_make_shard(batch, job, folder, made_by, tokenizer), False)
    total = sum(shard["num_tokens"] for shard in shards.values())
    if total == 0:
        names = ", ".join(text for text, _ in job.sources)
        raise ValueError(f"{names}: no text in it, so there is nothing to write; check --field")
    index = {
        "format": FORMAT,
        "tokenizer": tokenizer_path,
        "vocabulary": vocabulary_sha256(tokenizer),
        "made_by": made_by,
        "num_tokens": total,
        "num_documents": sum(shard["num_documents"] for shard in shards.values()),
        "shards": sorted(shards),
    }
    put_bytes(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return index


def _missing(
    job: Job,
    folder: Any,
    made_by: str,
    force: bool,
    done: Callable[[dict[str, Any], bool], Any],
) -> Iterator[_Batch]:
    """Batches whose shards are not there; those that are go to `done`."""
    for batch in batches(job):
        path = folder / f"{batch.name}.json"
        if path.exists():
            about = read_json(path)
            if about.get("made_by") == made_by and about.get("input_sha256") == batch.sha256:
                if _is_whole(folder, about):
                    done(about, True)
                    continue
            elif not force:
                raise FileExistsError(
                    f"{folder} holds shards of other data or of another tokenizer or setting"
                    f" ({path.name} differs); name a new folder, or --force to replace them"
                )
        # From here on the folder is not finished, until the index is written anew.
        (folder / INDEX).unlink(missing_ok=True)
        yield batch


def _is_whole(folder: Any, about: dict[str, Any]) -> bool:
    sizes = {"bin": about["num_tokens"] * TOKEN_DTYPES[about["dtype"]].itemsize}
    if about["answers_sha256"]:
        sizes["answers"] = about["num_tokens"]
    files = {folder / f"{about['name']}.{end}": size for end, size in sizes.items()}
    return all(file.is_file() and stamp(file)[0] == n for file, n in files.items())


def _make_shard(
    batch: _Batch, job: Job, folder: Any, made_by: str, tokenizer: Any
) -> dict[str, Any]:
    documents = list(encode_records(batch.records, batch.kind, job.field, tokenizer, job.answers))
    dtype = dtype_for(tokenizer.vocab_size)
    tokens = np.concatenate([np.zeros(0, np.uint32), *(d[0] for d in documents)])
    raw = tokens.astype(TOKEN_DTYPES[dtype]).tobytes()
    flags = None
    if job.answers:
        known = [d[1] for d in documents if d[1] is not None]
        flags = np.concatenate([np.zeros(0, bool), *known]).astype(np.uint8).tobytes()
        put_bytes(folder / f"{batch.name}.answers", flags)
    put_bytes(folder / f"{batch.name}.bin", raw)
    about = {
        "name": batch.name,
        "tokenizer": tokenizer_sha256(tokenizer),
        "made_by": made_by,
        "input_sha256": batch.sha256,
        "dtype": dtype,
        "num_tokens": len(tokens),
        "num_documents": len(documents),
        "max_token": int(tokens.max()) if len(tokens) else -1,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "edges_sha256": edges_sha256(folder / f"{batch.name}.bin"),
        "answers_sha256": None if flags is None else hashlib.sha256(flags).hexdigest(),
        "offsets": np.cumsum([0, *(len(d[0]) for d in documents)]).tolist(),
    }
    # Last: a shard without its description does not exist.
    put_bytes(folder / f"{batch.name}.json", (json.dumps(about) + "\n").encode())
    return about


_worker_tokenizer: Any = None  # of a worker process, set once when it starts


def _start_worker(tokenizer_path: str) -> None:
    from freqkv_jax.tokenizer import load_tokenizer

    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(tokenizer_path)


def _work(batch: _Batch, job: Job, folder: Any, made_by: str) -> dict[str, Any]:
    return _make_shard(batch, job, folder, made_by, _worker_tokenizer)


def _in_processes(
    todo: Iterator[_Batch],
    job: Job,
    folder: Any,
    made_by: str,
    tokenizer_path: str,
    workers: int,
    done: Callable[[dict[str, Any], bool], Any],
) -> None:
    # spawn: a forked child of a process that runs JAX's threads may hang.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer_path,)
    )
    running: set[concurrent.futures.Future] = set()
    try:
        for batch in todo:
            running.add(pool.submit(_work, batch, job, folder, made_by))
            # Texts wait in memory, so only so many are read ahead.
            while len(running) >= 2 * workers:
                running = _collect(running, done)
        while running:
            running = _collect(running, done)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(
    running: set[concurrent.futures.Future], done: Callable[[dict[str, Any], bool], Any]
) -> set[concurrent.futures.Future]:
    first = concurrent.futures.FIRST_COMPLETED
    finished, running = concurrent.futures.wait(running, return_when=first)
    for future in finished:
        done(future.result(), False)
    return running

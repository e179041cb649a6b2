"""The data of a run: rows by number, and each host's part of the batch of any step.

Nothing here has a state that must be saved: the batch of a step is a function of the data, the
seed and the step.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from freqkv_jax.tokenizer.base import NoTokenizerError
from freqkv_jax.training.documents import (
    encode_records,
    tokenizer_sha256,
    vocabulary_sha256,
)
from freqkv_jax.training.generated import Generated
from freqkv_jax.training.order import batch_indices
from freqkv_jax.training.paths import Watch, file_sha256, path_of
from freqkv_jax.training.records import KINDS, find_kind, read_records, source_files
from freqkv_jax.training.rows import Mixture, PackedRows, RowSource
from freqkv_jax.training.store import (
    INDEX,
    MemoryStore,
    TokenStore,
    is_token_folder,
    open_flat,
    open_folder,
)
from freqkv_jax.training.tokenize import Job, write_folder

__all__ = ["Batches", "RowSource", "batch_indices", "open_data"]

SMALL_BYTES = 1 << 20  # texts up to this are tokenised anew by each start, in memory


def open_data(
    section: Any,
    seq_len: int,
    vocab_size: int,
    tokenizer: Any,
    seed: int,
    split: str = "train",
    cache_dir: str | os.PathLike[str] | None = None,
) -> RowSource:
    """The rows that the section `data` of a config describes.

    Args:
      section: schema.DataSection.
      seq_len: tokens a row.
      vocab_size: the model's; every id is checked against it.
      tokenizer: a Tokenizer, a function without arguments that gives one (called if text or a
        token folder has to be read; a folder does without), or None.
      seed: of generated data.
      split: "train" or "eval", which list of the section.
      cache_dir: local folder where tokenised text is kept; None keeps it in memory.

    Raises:
      ValueError, OSError, ImportError: nothing to read, or something that cannot be read; with
        the file, and for records the line.
    """
    if seq_len < 2:
        raise ValueError(f"rows need at least 2 tokens (one prediction), got seq_len {seq_len}")
    entries = getattr(section, split)
    if not entries:
        raise ValueError(f"data.{split} is empty; list at least one source, such as {{path: FILE}}")
    reader = _Reader(section, seq_len, vocab_size, tokenizer, seed, split, cache_dir)
    sources = [reader.open(entry) for entry in entries]
    if len(sources) == 1:
        return sources[0]
    return Mixture(sources, [entry.weight for entry in entries])


class _Reader:
    """Opens one entry of a list after the other."""

    def __init__(
        self,
        section: Any,
        seq_len: int,
        vocab_size: int,
        tokenizer: Any,
        seed: int,
        split: str,
        cache_dir: str | os.PathLike[str] | None,
    ) -> None:
        self._section, self._seq_len, self._vocab_size = section, seq_len, vocab_size
        self._tokenizer, self._seed, self._split = tokenizer, seed, split
        self._cache_dir = None if cache_dir is None else Path(cache_dir)

    def open(self, entry: Any) -> RowSource:
        text = "" if entry.path is None else str(entry.path)
        if entry.kind not in KINDS:
            raise ValueError(f"data kind {entry.kind!r} is not known; allowed: {', '.join(KINDS)}")
        if entry.kind == "generated":
            return Generated(text, self._split, self._seq_len, self._vocab_size, self._seed)
        if not text:
            raise ValueError(f"a source of data.{self._split} has no path; name a file or folder")
        kind = find_kind(text) if entry.kind == "auto" else entry.kind
        store = self._token_files(text) if kind == "tokens" else self._texts(text, kind, entry)
        section = self._section
        return PackedRows(store, self._seq_len, section.pack, section.answers_only, text)

    def _token_files(self, text: str) -> TokenStore:
        path = path_of(text)
        if not path.is_dir() or not is_token_folder(path):
            return open_flat(source_files(text, "tokens"), self._vocab_size)
        # Token files need no tokenizer; where there is one, it is compared.
        if self._tokenizer is not None and _is_function(self._tokenizer):
            with contextlib.suppress(NoTokenizerError, FileNotFoundError):
                self._tokenizer = self._tokenizer()
        known = self._tokenizer is not None and not _is_function(self._tokenizer)
        vocabulary = vocabulary_sha256(self._tokenizer) if known else None
        return open_folder(path, self._vocab_size, vocabulary)

    def _texts(self, text: str, kind: str, entry: Any) -> TokenStore:
        files = source_files(text, kind)
        if not files and kind != "tfds":
            raise ValueError(
                f"{text} is not a local path but looks like a hub id, which has no random access:"
                f" stream it into token files first with `freqkv tokenize {text} DST --kind {kind}"
                f" --tokenizer MODEL`, then give DST as the path"
            )
        if self._tokenizer is None:
            raise ValueError(
                f"{text} is text and needs a tokenizer; set data.tokenizer, or give token files"
            )
        if _is_function(self._tokenizer):
            self._tokenizer = self._tokenizer()
        digests = [(file, file_sha256(file)) for file in files]
        answers = self._section.answers_only
        size = sum(_size(file) for file in files)
        if self._cache_dir is not None and (size > SMALL_BYTES or not files):
            return self._cached(text, kind, entry.field, answers, digests)
        records = read_records(text, kind)
        documents = list(encode_records(records, kind, entry.field, self._tokenizer, answers))
        return MemoryStore(documents, text, self._vocab_size, Watch(digests))

    def _cached(
        self, text: str, kind: str, field: str, answers: bool, digests: list[tuple[Any, str]]
    ) -> TokenStore:
        assert self._cache_dir is not None
        # The same texts under another path are the same data.
        contents = [(file.name, digest) for file, digest in digests] or text
        about = (kind, field, answers, contents, tokenizer_sha256(self._tokenizer))
        folder = self._cache_dir / hashlib.sha256(repr(about).encode()).hexdigest()[:24]
        if not (folder / INDEX).exists():
            job = Job(((text, kind),), field, answers)
            write_folder(job, folder, self._tokenizer, "the run's own")
        return open_folder(folder, self._vocab_size, None, also_watch=digests)


def _is_function(tokenizer: Any) -> bool:
    return not hasattr(tokenizer, "encode")


def _size(file: Any) -> int:
    stat = file.stat()
    return stat.st_size if hasattr(stat, "st_size") else stat.length


class Batches:
    """Every step's batch, or one host's part of it, with the next ones read in the background."""

    def __init__(
        self,
        source: RowSource,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        depth: int = 2,
    ) -> None:
        """
        Args:
          batch_size: rows of the global batch.
          process_index, process_count: which part of how many: rows in the order of the global
            batch, as jax.make_array_from_process_local_data joins them.
          depth: batches read ahead.

        Raises:
          ValueError: a batch that does not divide among the hosts.
        """
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"a global batch of {batch_size} rows does not divide among {process_count} hosts;"
                " make train.batch_size a multiple"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"host {process_index} is not one of 0 to {process_count - 1}")
        self._source, self._batch_size, self._seed = source, batch_size, seed
        share = batch_size // process_count
        self._part = slice(process_index * share, (process_index + 1) * share)
        self._depth = depth
        # One thread: rows come from one disk, and in order.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "freqkv-data")
        self._ahead: dict[int, concurrent.futures.Future] = {}
        self.waited = 0.0  # seconds that `at` has waited for rows, in all

    def indices(self, step: int) -> np.ndarray:
        """Row numbers of this host's part."""
        every = batch_indices(self._source.num_rows, self._batch_size, step, self._seed)
        return every[self._part]

    def at(self, step: int) -> dict[str, np.ndarray]:
        """This host's rows of the batch of `step`: tokens int32 and mask bool, [rows, seq_len].

        Raises:
          ValueError: a file has changed since the data was opened.
        """
        wanted = range(step, step + 1 + self._depth)
        for old in [s for s in self._ahead if s not in wanted]:
            self._ahead.pop(old).cancel()
        for new in wanted:
            if new not in self._ahead:
                self._ahead[new] = self._thread.submit(self._read, new)
        start = time.perf_counter()
        try:
            return self._ahead.pop(step).result()
        finally:
            self.waited += time.perf_counter() - start

    def _read(self, step: int) -> dict[str, np.ndarray]:
        return self._source.rows(self.indices(step))

    def close(self) -> None:
        """Stops reading ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

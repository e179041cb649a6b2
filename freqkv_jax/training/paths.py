"""Local paths and gs:// ones alike, and the files that must not change while a run reads them."""

import contextlib
import gzip
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freqkv_jax.files import edges, stamp, write_whole

BLOCK_BYTES = 1 << 24
CHECKED_AT_ONCE = 64  # files that one check looks at, so that a batch never waits for thousands


def path_of(text: Any) -> Any:
    """A pathlib.Path, or for `gs://...` and the like an etils.epath.Path, which acts as one.

    Raises:
      ImportError: a remote path without etils (it comes with the train extra).
    """
    if "://" not in str(text):
        return Path(text).expanduser()
    try:
        from etils import epath
    except ImportError:
        raise ImportError(
            f"{text} is not a local path; reading it needs pip install 'freqkv-jax[train]'"
        ) from None
    return epath.Path(str(text))


def put_bytes(path: Any, raw: bytes) -> None:
    """Writes a file that appears whole or not at all. Raises OSError."""
    if isinstance(path, Path):
        write_whole(path, lambda name: Path(name).write_bytes(raw))
    else:  # an object store knows no half-written object
        path.write_bytes(raw)


@contextlib.contextmanager
def open_bytes(path: Any) -> Iterator[Any]:
    """The file opened for reading; what ends in .gz is unpacked."""
    with path.open("rb") as file:
        if path.suffix == ".gz":
            # Closing it leaves the file below open, which is why both are closed here.
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        else:
            yield file


def read_text(path: Any) -> str:
    """A whole UTF-8 file; ValueError that names it if it is something else."""
    with open_bytes(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, move it out of the folder,"
            " or name it .bin if it holds token ids"
        ) from None


def read_lines(path: Any) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines of a UTF-8 file, without reading it whole."""
    number = 0
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                yield number, line
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, after line {number}: not UTF-8 text ({error.reason}); convert the file"
            ) from None


def files_below(folder: Any) -> list[Any]:
    """Every file in the folder and below, hidden ones left out, in one order everywhere."""
    found, folders = [], [folder]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry)
            else:
                found.append(entry)
    return sorted(found, key=str)


def file_sha256(path: Any) -> str:
    """Hex digest of the file as it lies on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def edges_sha256(path: Any) -> str:
    """Hex digest of the first and the last MiB: quick however large the file."""
    return hashlib.sha256(edges(path)).hexdigest()


@dataclass
class _Watched:
    path: Any
    sha256: str | None
    stamp: tuple[int, int]


class Watch:
    """Files as they were when the data was opened.

    A file whose time stamp alone changed is hashed again, and taken if its content is the same.
    """

    def __init__(self, files: Iterable[tuple[Any, str | None]] = ()) -> None:
        """`files` are paths and their SHA-256, None where a new time stamp is never forgiven."""
        self._files = [_Watched(path, sha256, stamp(path)) for path, sha256 in files]
        self._next = 0

    def check(self) -> None:
        """Looks at the next files in turn; ValueError if one has changed or gone."""
        for _ in range(min(len(self._files), CHECKED_AT_ONCE)):
            self._check(self._files[self._next])
            self._next = (self._next + 1) % len(self._files)

    def _check(self, file: _Watched) -> None:
        try:
            now = stamp(file.path)
        except OSError as error:
            raise ValueError(
                f"{file.path} was there when this run began and cannot be found now ({error});"
                " put it back as it was and start the run again: it resumes where it was saved"
            ) from None
        if now == file.stamp:
            return
        if now[0] == file.stamp[0] and file.sha256 and file_sha256(file.path) == file.sha256:
            file.stamp = now
            return
        raise ValueError(
            f"{file.path} has changed since this run began ({file.stamp[0]:,} bytes then,"
            f" {now[0]:,} now, or other content); put it back as it was and start the run again,"
            " or begin a new run.dir with the new data"
        )

"""What a run has measured so far, on disk: a killed run goes on where it was.

The ledger lies beside the result file until that is written. Its first line names the run; then
come lines of records and of times, as they are made, flushed to the disk after every batch.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from freqkv_jax.evals.task import Record

SUFFIX = ".partial"
FORMAT = "freqkv-ledger-1"
Times = dict[str, float]


def ledger_path(output: str | os.PathLike[str]) -> Path:
    """Where the ledger of a result file lies."""
    return Path(f"{os.fspath(output)}{SUFFIX}")


def finished_result(
    output: str | os.PathLike[str], is_ours: Callable[[dict[str, Any]], bool], force: bool
) -> dict[str, Any] | None:
    """The result that `output` holds if it is this run's; None if there is no file or `force`.

    Args:
      is_ours: tells this run's result.

    Raises:
      FileExistsError: the file is another run's, or no result at all.
    """
    file = Path(output)
    if force or not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if isinstance(found, dict) and is_ours(found):
        return found
    what = "the result of another run" if isinstance(found, dict) else "no result file"
    raise FileExistsError(
        f"--output {file} exists and is {what}: choose another name, or give --force to replace it"
    )


class Ledger:
    """Records by key and summed times of one run, in a file or (path None) only in memory."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any], force: bool = False) -> None:
        """Reads what is there.

        Raises:
          FileExistsError: the ledger belongs to another run and `force` is not given.
        """
        self.path = path
        self.records: dict[str, Record] = {}
        self.times: Times = {}
        self._identity = json.loads(json.dumps(identity))
        self._keep = 0  # bytes of whole lines that stay
        self._file: IO[bytes] | None = None
        if path is not None and path.exists() and not force:
            self._read(path)

    def _read(self, path: Path) -> None:
        for number, (line, end) in enumerate(_whole_lines(path.read_bytes())):
            if number == 0:
                self._check_header(path, line)
            elif "record" in line:
                self.records[line["record"]["key"]] = line["record"]
            else:
                self._count(line["times"])
            self._keep = end

    def _check_header(self, path: Path, line: dict[str, Any]) -> None:
        theirs = line.get("run") if line.get("ledger") == FORMAT else None
        if theirs == self._identity:
            return
        keys = [*self._identity, *(theirs or {})]
        mine = self._identity
        changed = [k for k in dict.fromkeys(keys) if (theirs or {}).get(k) != mine.get(k)]
        raise FileExistsError(
            f"{path} holds the beginning of another run"
            + (f" (other {', '.join(changed)})" if theirs else "")
            + ": choose another --output, or give --force to begin anew"
        )

    def _count(self, times: Mapping[str, float]) -> None:
        for name, value in times.items():
            self.times[name] = self.times.get(name, 0) + value

    def add(self, records: Sequence[Record], times: Times) -> None:
        """Takes a batch in; it is on the disk when this returns."""
        lines = [{"record": record} for record in records] + [{"times": times}]
        for record in records:
            self.records[record["key"]] = record
        self._count(times)
        if self._file is not None:
            # One write: a kill leaves at most one torn line.
            self._file.write(b"".join(_line(line) for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def open(self, writes: bool = True) -> Iterator[None]:
        """The file open for `add`, a torn last line cut off; one process of a run `writes`."""
        if self.path is None or not writes:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self._keep else "wb") as file:
            file.truncate(self._keep)
            file.seek(self._keep)
            if not self._keep:
                file.write(_line({"ledger": FORMAT, "run": self._identity}))
            self._file = file
            try:
                yield
            finally:
                self._file = None

    def remove(self) -> None:
        """Deletes the file: the result is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _line(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _whole_lines(raw: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line that is whole JSON, with the place behind it; ends at the first that is not."""
    end = 0
    for line in raw.splitlines(keepends=True):
        try:
            value = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(value, dict):
            return
        end += len(line)
        yield value, end

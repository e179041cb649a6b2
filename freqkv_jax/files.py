"""Files that appear whole or not at all, and what tells one large file from another."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

EDGE_BYTES = 1 << 20


def write_whole(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place.

    Whatever goes wrong, `path` stays what it was and nothing is left beside it. Raises OSError.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(name)
        os.chmod(name, 0o644)  # mkstemp gives 0600
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text so, line ends as they are."""
    write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8", newline=""))


def stamp(path: Any) -> tuple[int, int]:
    """Bytes of a file, and when it was changed last (nanoseconds); of epath's files too."""
    stat = path.stat()
    if hasattr(stat, "st_size"):
        return stat.st_size, stat.st_mtime_ns
    return stat.length, int(stat.mtime * 1e9)


def edges(path: Any) -> bytes:
    """The first and the last MiB of a file (they overlap in a small one): quick however large."""
    with path.open("rb") as file:
        first = file.read(EDGE_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - EDGE_BYTES))
        return first + file.read(EDGE_BYTES)

"""Progress with an estimate of the time left, on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

REPORT_EVERY_S = 10.0  # where stderr is no terminal


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to be called with how many of `total` are done.

    A bar with the time left on a terminal; elsewhere (a log) a line every 10 seconds.
    """
    if sys.stderr.isatty():
        with _bar(label, total) as update:
            yield update
    else:
        yield _Lines(label, total)


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=total)
        yield lambda done: bars.update(task, completed=done)


class _Lines:
    """Prints `label: done/total, N s left` at most every REPORT_EVERY_S seconds."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.begin = self.reported = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if done and now - self.reported >= REPORT_EVERY_S and done < self.total:
            left = (now - self.begin) * (self.total - done) / done
            print(f"{self.label}: {done}/{self.total}, {left:.0f} s left", file=sys.stderr)
            self.reported = now

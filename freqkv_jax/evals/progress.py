"""Progress with an estimate of the time left, on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

REPORT_EVERY_S = 10.0  # where stderr is no terminal


@contextlib.contextmanager
def progress(label: str, total: int, before: int = 0) -> Iterator[Callable[..., None]]:
    """Yields a function to be called with how many of `total` are done.

    A bar with the time left on a terminal; elsewhere (a log) a line every 10 seconds. Where items
    differ in size, call it with (done, share): the share of all work, from which the time left is
    told. `before`: how many were done by an earlier run.
    """
    if sys.stderr.isatty():
        with _bar(label, total, before) as update:
            yield update
    else:
        yield _Lines(label, total, before)


@contextlib.contextmanager
def _bar(label: str, total: int, before: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}/{task.fields[all]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=1.0, done=before, all=total)

        def update(done: int, share: float | None = None) -> None:
            bars.update(task, completed=_share(done, before, total, share), done=done)

        yield update


def _share(done: int, before: int, total: int, share: float | None) -> float:
    """The share of this run's work that is done."""
    return (done - before) / max(total - before, 1) if share is None else share


class _Lines:
    """Prints `label: done/total, N s left` at most every REPORT_EVERY_S seconds."""

    def __init__(self, label: str, total: int, before: int = 0) -> None:
        self.label, self.total, self.before = label, total, before
        self.begin = self.reported = time.monotonic()

    def __call__(self, done: int, share: float | None = None) -> None:
        now, share = time.monotonic(), _share(done, self.before, self.total, share)
        if share > 0 and now - self.reported >= REPORT_EVERY_S and done < self.total:
            left = (now - self.begin) * (1 - share) / share
            print(f"{self.label}: {done}/{self.total}, {left:.0f} s left", file=sys.stderr)
            self.reported = now

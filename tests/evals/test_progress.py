"""Progress where stderr is a log, and where it is a terminal."""

import io
import sys

from freqkv_jax.evals import progress


def test_lines_in_a_log(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("scoring", 10) as update:
        for seconds, done in ((5, 1), (12, 2), (15, 3), (30, 6), (50, 10)):
            now[0] = seconds
            update(done)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 2/10, 48 s left",
        "scoring: 6/10, 20 s left",
    ]


def test_time_left_follows_the_work_and_not_the_count(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("scoring", 10, before=4) as update:
        for seconds, done, share in ((11, 5, 0.1), (40, 6, None), (50, 10, 1.0)):
            now[0] = seconds
            update(done, share)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 5/10, 99 s left",
        "scoring: 6/10, 80 s left",  # two of the six that this run has to do
    ]


def test_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress("scoring", 4) as update:
        update(2)
        update(4)
    assert "scoring" in terminal.getvalue() and "4/4" in terminal.getvalue()

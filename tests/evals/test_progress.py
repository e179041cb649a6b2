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

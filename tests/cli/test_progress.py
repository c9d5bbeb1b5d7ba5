"""Lines of progress in a log: the share that is done, what is going on, and how long it takes yet."""

from __future__ import annotations

import pytest

from aicompress.cli import progress


def test_lines_tell_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 0.0, 6.0, 8.0, 12.0, 13.0, 500.0, 1000.0, 2000.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    told = progress.reporter(quiet=False)
    told("loss 1", 10, 100)  # goes on behind ten steps of a stopped run
    for what, done in (("loss 1", 20), ("loss 2", 30), ("loss 2", 40)):  # at 6, 8 and 12 seconds
        told(what, done, 100)
    told("writing", 0, 1000)  # another count, at 13 seconds
    for done in (500, 600, 1000):
        told("writing", done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        " 20%  loss 1, 48 s left",
        " 40%  loss 2, 24 s left",
        " 50%  writing, 8 min left",
        " 60%  writing, 11 min left",
        "100%  writing",
    ]

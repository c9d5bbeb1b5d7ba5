"""Progress on standard error: a bar with an estimate on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from typing import Any

PLAIN_INTERVAL = 5.0  # seconds between lines in a log


def reporter(quiet: bool) -> Callable[[str, int, int], None]:
    """A function (what, done, total) to call as work proceeds."""
    if quiet:
        return lambda what, done, total: None
    return _Bar() if sys.stderr.isatty() else _Lines()


class _Lines:
    """One line every few seconds with the time that is left, and none for a run that is done before."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.first: tuple[float, int, int] | None = None  # when a count began, at how many of how many

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None or total != self.first[2] or done < self.first[1]:
            self.first = (now, done, total)
        if now - self.last >= PLAIN_INTERVAL:
            self.last = now
            print(f"{100 * done // max(total, 1):3d}%  {what}{self._left(now, done)}", file=sys.stderr, flush=True)

    def _left(self, now: float, done: int) -> str:
        """How long what is counted goes on, at the speed that it has had; nothing before there is one."""
        assert self.first is not None
        start, before, total = self.first
        if done <= before or done >= total:
            return ""
        seconds = (now - start) * (total - done) / (done - before)
        return f", {seconds:.0f} s left" if seconds < 100 else f", {seconds / 60:.0f} min left"


class _Bar:
    """A bar that goes when the work is done."""

    def __init__(self) -> None:
        self.progress: Any = None
        self.task: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self.progress is None:
            columns = (
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self.progress.start()
            atexit.register(self.progress.stop)  # an error would leave the terminal without its cursor
            self.task = self.progress.add_task(what, total=total)
        self.progress.update(self.task, description=what, completed=done, total=total)
        if done >= total:
            self.progress.stop()

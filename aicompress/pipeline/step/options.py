"""Options of a run that every command shares."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Mode = Literal["auto", "layers", "off"]  # what is timed when an output is written
Progress = Callable[[str, int, int], None]  # what is going on, done, total


@dataclass(frozen=True)
class Options:
    """How a command runs; nothing here changes what it computes.

    Attributes:
        resume: continue a stopped run of the same step.
        latency: "auto" times the forward passes of input and output, "layers" those of their layers, "off" nothing.
        progress: called with (what, done, total).
        device: cpu, cuda, or auto for a GPU where there is one; where training and evaluation run.
        started: when the command started, by `time.perf_counter`; None where it is not a command that runs.
    """

    resume: bool = False
    latency: Mode = "auto"
    progress: Progress = lambda what, done, total: None
    device: str = "cpu"
    started: float | None = None

    def waited(self) -> float | None:
        """Seconds since the command started; None where it is not a command that runs."""
        return None if self.started is None else time.perf_counter() - self.started

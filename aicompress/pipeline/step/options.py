"""How a step runs: resuming, timing, progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Mode = Literal["auto", "layers", "off"]  # what is timed when an output is written
Progress = Callable[[str, int, int], None]  # what is going on, done, total


ANEW = "nothing of a stopped run was used: this kind of step starts anew"


@dataclass(frozen=True)
class Options:
    """How a step runs; nothing here changes the numbers.

    Attributes:
        resume: go on where a stopped run of the same step was.
        latency: "auto" times forward passes of input and output, whole models where they are small; "layers" times
            their layers; "off" nothing.
        progress: called with (what, done bytes, total bytes).
    """

    resume: bool = False
    latency: Mode = "auto"
    progress: Progress = lambda what, done, total: None

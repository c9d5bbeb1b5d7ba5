"""What a training run tells of every step: lines of JSON, and the same numbers as events that TensorBoard draws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aicompress.errors import Refused
from aicompress.pipeline.distillation.loop.state import Point

METRICS = "metrics.jsonl"


def require_free(folder: Path | None, resumed: bool) -> None:
    """Refuse a folder that holds the log of another run.

    Raises:
        Refused: it does, or is a file.
    """
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise Refused(f"--log-dir {folder} is a file", "name a folder")
    if not resumed and (folder / METRICS).exists():
        raise Refused(f"--log-dir {folder} holds the log of another run", "choose another folder")


class TrainingLog:
    """The log of one run.

    A disk that takes no more ends the log, and not the run.

    Args:
        folder: where it lies, which is made.
        done: steps of a stopped run that this one goes on from; what was logged of later ones goes.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        from tensorboardX import SummaryWriter

        self.trouble = ""  # what ended the log
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        before = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in before if _step(line) <= done), encoding="utf-8")
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        ending = f".{done}"  # names have seconds: a run that goes on at once would take the file of the one before
        self._events: Any = SummaryWriter(str(folder), filename_suffix=ending, purge_step=done + 1 if done else None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step, counted from 1; 0 is the student as it came."""
        if self.trouble:
            return
        try:
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:
            self.trouble = f"the log ends at step {step}: {error.strerror}"

    def close(self) -> None:
        """Write what is not yet written."""
        try:
            self._events.close()
            self._lines.close()
        except OSError as error:
            self.trouble = self.trouble or f"the end of the log is missing: {error.strerror}"


def write_curve(folder: Path | None, curve: Sequence[Point]) -> None:
    """Log held-out losses of a run that takes no steps with all of the student."""
    if folder is None:
        return
    log = TrainingLog(folder)
    for point in curve:
        log.add(point.step, {"held_out": point.held_out})
    log.close()


def _step(line: str) -> float:
    """The step of a line; a line that a kill has cut belongs to none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")

"""The state of a training run on disk, to resume a stopped one: tensors as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress.disk import disk_errors

FOLDER = "training"
STATE = "state.json"


@dataclass(frozen=True)
class Point:
    """Training and held-out loss at one step.

    Attributes:
        step: optimizer steps done.
        train: mean training loss of the steps since the point before; None at step 0.
        held_out: loss of the held-out samples.
    """

    step: int
    train: float | None
    held_out: float


@dataclass
class TrainingHistory:
    """Progress and loss curve of a training run.

    Attributes:
        step: optimizer steps done.
        best_step: where the held-out loss was lowest; 0 is the input.
        curve: every measurement.
        running: sum of the training losses since the last one.
        samples, tokens: trained on so far, repetitions counted.
        seconds: spent in training steps.
    """

    step: int = 0
    best_step: int = 0
    curve: list[Point] = field(default_factory=list)
    running: float = 0.0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def before(self) -> float:
        """Held-out loss of the input."""
        return self.curve[0].held_out

    @property
    def best(self) -> float:
        """Lowest held-out loss."""
        return next(point.held_out for point in self.curve if point.step == self.best_step)


class StateFile:
    """The file of a run's state in its working directory.

    A state is complete when `state.json` names it, so a kill at any moment leaves the state before or the new one. That
    it belongs to this run is what the journal beside it says.

    Args:
        work: working directory of the output.
    """

    def __init__(self, work: Path) -> None:
        self.folder = work / FOLDER

    def save(self, history: TrainingHistory, tensors: dict[str, Tensor]) -> None:
        """Replace the saved state.

        Raises:
            OutOfSpace: the disk is full; the state before is still there.
        """
        name = f"state-{history.step}.safetensors"
        partial, written = self.folder / f"{name}.partial", self.folder / f"{STATE}.partial"
        try:
            with disk_errors(self.folder):
                self.folder.mkdir(exist_ok=True)
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, partial)
                replace_file(partial, self.folder / name)
                plain = {"tensors": name, "history": asdict(history)}
                written.write_text(json.dumps(plain), encoding="utf-8")
                replace_file(written, self.folder / STATE)
        finally:
            for left in (partial, written):
                left.unlink(missing_ok=True)
        for other in self.folder.glob("state-*.safetensors*"):
            if other.name != name:
                other.unlink()

    def load(self) -> tuple[TrainingHistory, dict[str, Tensor]] | None:
        """The saved state, or None where there is none."""
        path = self.folder / STATE
        if not path.is_file():
            return None
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields = plain["history"]
        history = TrainingHistory(**{**fields, "curve": [Point(**point) for point in fields["curve"]]})
        return history, load_file(self.folder / plain["tensors"])

    def remove(self) -> None:
        """Delete the state: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def replace_file(partial: Path, final: Path) -> None:
    """Rename into place after the bytes are on disk."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, final)

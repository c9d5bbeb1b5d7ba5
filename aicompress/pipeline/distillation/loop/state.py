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
UNSHARED = ("the processes do not see the same saved state", "OUT must lie where all of them see it")


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


@dataclass(frozen=True)
class ChosenTemperature:
    """A temperature, and what it was chosen by.

    Attributes:
        value: of all losses that leave it open.
        tried: the divergence that each candidate left; none where stored outputs had one already.
        samples: how many it was measured on.
    """

    value: float
    tried: dict[float, float]
    samples: int

    @property
    def note(self) -> str:
        """What the report says of it."""
        if not self.tried:
            return f"temperature: {self.value:g}, for which the stored outputs were made"
        losses = ", ".join(f"{temperature:g}: {loss:.4g}" for temperature, loss in self.tried.items())
        return f"temperature: {self.value:g} was chosen on {self.samples} held-out samples ({losses})"

    def summary(self) -> dict[str, Any]:
        """What the report's training section holds of it."""
        return {"value": self.value, "held_out_by_temperature": {f"{t:g}": loss for t, loss in self.tried.items()}}


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
        temperature: the one that was chosen before the first step; None where the recipe gives it.
    """

    step: int = 0
    best_step: int = 0
    curve: list[Point] = field(default_factory=list)
    running: float = 0.0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    temperature: ChosenTemperature | None = None

    @property
    def before(self) -> float:
        """Held-out loss of the input."""
        return self.curve[0].held_out

    @property
    def since_best(self) -> int:
        """How many measurements there were after the lowest one."""
        return sum(point.step > self.best_step for point in self.curve)

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
        plain = self._plain()
        return None if plain is None else (_history(plain["history"]), load_file(self.folder / plain["tensors"]))

    def temperature(self) -> ChosenTemperature | None:
        """The temperature that the saved run has chosen; None where it has chosen none, or there is no such run."""
        plain = self._plain()
        return None if plain is None else _history(plain["history"]).temperature

    def _plain(self) -> dict[str, Any] | None:
        path = self.folder / STATE
        plain: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return plain

    def remove(self) -> None:
        """Delete the state: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _history(fields: dict[str, Any]) -> TrainingHistory:
    """A history of its JSON."""
    chosen = fields.get("temperature")
    if chosen is not None:  # JSON has no numbers for keys
        chosen = ChosenTemperature(**{**chosen, "tried": {float(t): loss for t, loss in chosen["tried"].items()}})
    curve = [Point(**point) for point in fields["curve"]]
    return TrainingHistory(**{**fields, "curve": curve, "temperature": chosen})


def replace_file(partial: Path, final: Path) -> None:
    """Rename into place after the bytes are on disk."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, final)

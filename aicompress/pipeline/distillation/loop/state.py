"""The state of a training run, in memory and on disk, to resume a stopped one: safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress.disk import disk_errors, put_in_place
from aicompress.errors import CompressError
from aicompress.pipeline.distillation.loop.shards import Shards

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
                put_in_place(partial, self.folder / name)
                plain = {"tensors": name, "history": asdict(history)}
                written.write_text(json.dumps(plain), encoding="utf-8")
                put_in_place(written, self.folder / STATE)
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


@dataclass
class TrainingTensors:
    """Tensors of a training run by name of a parameter, of each what this process holds.

    Attributes:
        parameters: what is trained.
        optimizer: its moments.
        average: the moving average of the weights, where there is one.
        movement: -Σ w g of what is watched.
        shards: what is divided over the processes.
        best: weights as they are stored, of the lowest held-out loss; empty where the input has that.
    """

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    movement: dict[str, Tensor]
    shards: Shards = field(default_factory=Shards)
    best: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Give trained parameters other values, in place."""
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)

    def saved(self) -> dict[str, Tensor]:
        """All of them, whole, by the names of the state's file; every process asks at once."""
        whole = self.shards.whole
        tensors = {f"weight.{name}": whole(name, tensor.detach()) for name, tensor in self.parameters.items()}
        tensors |= {f"best.{name}": whole(name, tensor) for name, tensor in self.best.items()}
        tensors |= {f"average.{name}": whole(name, tensor) for name, tensor in self.average.items()}
        tensors |= {f"movement.{name}": whole(name, tensor) for name, tensor in self.movement.items()}
        for name, parameter in self.parameters.items():
            own = self.optimizer.state.get(parameter, {})
            tensors |= {f"moment.{name}/{key}": whole(name, value) for key, value in own.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what was saved, of each tensor what this process holds.

        Raises:
            CompressError: the run that saved it watched other parameters.
        """
        part = self.shards.part
        self.put({name: part(name, tensor) for name, tensor in _under("weight.", tensors).items()})
        self.best = {name: part(name, tensor) for name, tensor in _under("best.", tensors).items()}
        averages = _under("average.", tensors)
        for name, average in self.average.items():
            average.copy_(part(name, averages[name]))
        moved = _under("movement.", tensors)
        if moved.keys() != self.movement.keys():
            raise CompressError("the stopped run did not record the same movement", "start again without --resume")
        self.movement = {name: part(name, moved[name]) for name in self.movement}
        moments = _under("moment.", tensors)
        for name, parameter in self.parameters.items():
            own = _under(f"{name}/", moments)
            if own:
                self.optimizer.state[parameter] = {key: part(name, value) for key, value in own.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""Unlike sizes for structures: as many parameters in total as with equal ones, where least is lost.

Losses are measured over sizes on the original model, as the method defines them. The choice is a knapsack (see
`budget`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aicompress.errors import raise_all
from aicompress.methods.budget import least_loss
from aicompress.methods.structural import AnyPruner, Losses, Structure
from aicompress.model.blocks.walk import Visitor
from aicompress.pipeline.calibration import requirements
from aicompress.pipeline.calibration.gradients import differentiate
from aicompress.pipeline.calibration.request import MIN_ROWS, Step, StepInput
from aicompress.pipeline.calibration.runner import CalibrationRun
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.survey import SurveyResult
from aicompress.pipeline.step.workers import processes
from aicompress.pipeline.structured.reading import Importances, factor_problems, layers_of
from aicompress.statistics import InputStats


@dataclass(frozen=True)
class Allocator(StepInput):
    """Shares out units between the structures of a checkpoint.

    Attributes:
        pruner: the method with its parameters.
        losses: what structures lose with fewer units.
    """

    pruner: AnyPruner
    losses: Losses

    def allocate(
        self, structures: Sequence[Structure], sizes: Sequence[int]
    ) -> tuple[tuple[Structure, ...], tuple[int, ...], Mapping[str, Any]]:
        """Share out as many parameters as these sizes have.

        Args:
            structures: all of one kind.
            sizes: those that they would have if no losses were measured.

        Returns:
            The structures with their units' importance, where it was measured; how many units of each stay; and the
            record of the calibration data.

        Raises:
            Refused: or Problems, what is missing.
        """
        tensors = [part.tensor for structure in structures for part in structure.parts]
        self._require(tensors)
        names = f"{structures[0].name} to {structures[-1].name}"
        what = f"losses of {len(structures)} structures over their sizes, {names}"
        measured = self.request.survey.recorded(what, self.checkpoint, self.recipe, partial(self._measure, structures))
        tried = [self.losses.candidates(structure.size) for structure in structures]
        curves = [measured.tensors.get(f"losses.{number}") for number in range(len(structures))]
        lost = [[0.0] if curve is None else curve.tolist() for curve in curves]  # None: too few rows reached it
        tried = [[size] if curve is None else row for row, curve, size in zip(tried, curves, sizes, strict=True)]
        weights = measured.tensors["parameters"].tolist()
        costs = [[float(weight * size) for size in row] for weight, row in zip(weights, tried, strict=True)]
        budget = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
        picks = least_loss(costs, lost, float(budget)).picks
        chosen = tuple(row[pick] for row, pick in zip(tried, picks, strict=True))
        known = {number: measured.tensors.get(f"importance.{number}") for number in range(len(structures))}
        judged = tuple(dataclasses.replace(each, importance=known[number]) for number, each in enumerate(structures))
        return judged, chosen, measured.record

    def _require(self, tensors: Sequence[str]) -> None:
        """Nothing that the losses read is missing.

        Raises:
            Refused: or Problems, what is.
        """
        if not self.losses.statistics:
            return
        infos = layers_of(self.checkpoint, tensors)
        layers = [LayerPlan(info, self.pruner.config) for info in infos]
        direct = dataclasses.replace(self, request=dataclasses.replace(self.request, stats=()))
        missing = requirements.problems(direct, self.pruner.method, layers)
        raise_all([*(factor_problems(infos) if "gradients" in self.losses.statistics else []), *missing])

    def _measure(self, structures: Sequence[Structure], progress: Progress) -> SurveyResult:
        """The losses of each structure that the data reached, its units' importance, and parameters of a unit."""
        reads = self.losses.statistics
        visitor = _Curves(structures, self.losses)
        record: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        if "gradients" in reads:
            importance, record = self._gradients(structures, progress)
            tensors |= {f"importance.{number}": total for number, total in importance.items()}
            for number, total in importance.items():
                visitor.add(number, dataclasses.replace(structures[number], importance=total))
        elif reads:
            engine = self._engine(structures)
            engine.walk(visitor, reads, False, lambda done, total: progress("blocks", done, total))
            record = engine.record()
        else:
            for number, structure in enumerate(structures):
                visitor.add(number, structure)
        tensors |= {f"losses.{n}": torch.tensor(lost, dtype=torch.float64) for n, lost in visitor.losses_by.items()}
        tensors["parameters"] = torch.tensor([_parameters(structure) for structure in structures])
        return SurveyResult(tensors, record)

    def _engine(self, structures: Sequence[Structure]) -> CalibrationRun:
        consumers = [part.tensor for structure in structures for part in structure.of("consumer")]
        return CalibrationRun.of(self._measurement(consumers), consumers, processes(torch.device("cpu")))

    def _measurement(self, tensors: Sequence[str]) -> Step:
        layers = [LayerPlan(info, self.pruner.config) for info in layers_of(self.checkpoint, tensors)]
        return Step(self.checkpoint, self.recipe, self.request, layers)

    def _gradients(
        self, structures: Sequence[Structure], progress: Progress
    ) -> tuple[dict[int, Tensor], dict[str, Any]]:
        """Importance of the units of the structures that gradients reached, and the record of the data."""
        step = self._measurement([part.tensor for structure in structures for part in structure.parts])
        sums = Importances(structures, {layer.info.tensor: layer.info for layer in step.layers})
        team = processes(torch.device("cpu"))
        differentiate(step, team, sums.add, lambda done, total: progress("gradients", done, total))
        reached = {number: total for number, total in sums.totals.items() if float(total.sum()) > 0}
        return reached, self._engine(structures).record()


def _parameters(structure: Structure) -> int:
    """Parameters of one unit."""
    return sum(part.read().shape[1] for part in structure.parts if part.role != "offset")


def _reached(structures: Sequence[Structure], stats: Mapping[str, InputStats]) -> Iterator[tuple[int, Structure]]:
    """Structures all of whose consumers enough rows reached, with those statistics, and their places."""
    for number, structure in enumerate(structures):
        names = [part.tensor for part in structure.of("consumer")]
        if all(name in stats and stats[name].count >= MIN_ROWS for name in names):
            yield number, dataclasses.replace(structure, inputs={name: stats[name] for name in names})


@dataclass
class _Curves(Visitor):
    """Computes every structure's losses as its statistics come in, and changes nothing.

    Attributes:
        structures: whose losses are computed.
        losses: how, and for what sizes.
        losses_by: the losses by the structure's place.
    """

    structures: Sequence[Structure]
    losses: Losses
    losses_by: dict[int, list[float]] = field(default_factory=dict)

    def add(self, number: int, structure: Structure) -> None:
        """Compute the losses of a structure that has all that they read."""
        self.losses_by[number] = self.losses.of(structure, self.losses.candidates(structure.size))

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        for number, structure in _reached(self.structures, stats):
            self.add(number, structure)
        return {}

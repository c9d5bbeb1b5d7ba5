"""Unlike widths for layers: as many units in total, where the consumers' outputs lose least.

Every layer's loss is measured over sizes on the original model: for score obs by structured optimal brain surgeon, as
all layers write into one stream, so that their squared errors add up; for other scores by what goes of their sum. The
choice is a knapsack (see `budget`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import raise_all
from aicompress.layer import InputStats
from aicompress.methods.budget import least_loss
from aicompress.methods.prune.units import obs, units
from aicompress.methods.prune.width import WidthConfig
from aicompress.methods.structural import StructuralMethod, Structure
from aicompress.pipeline.calibration import requirements as needs
from aicompress.pipeline.calibration.gradients import differentiate
from aicompress.pipeline.calibration.requirements import MIN_ROWS, Request
from aicompress.pipeline.calibration.runner import Engine
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.workers import processes
from aicompress.pipeline.structured.units.gradient_scores import Importances, factors
from aicompress.recipe import Recipe

POINTS = 48  # sizes of a layer that are tried


@dataclass(frozen=True)
class Allotment:
    """What each structure keeps.

    Attributes:
        structures: the structures.
        sizes: how many units of each stay.
        record: where the calibration rows came from.
    """

    structures: tuple[Structure, ...]
    sizes: tuple[int, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class _Step:
    checkpoint: Checkpoint
    recipe: Recipe
    request: Request
    layers: Sequence[needs.Chosen]


def allotted(
    checkpoint: Checkpoint,
    method: StructuralMethod,
    recipe: Recipe,
    request: Request,
    uniform: tuple[Sequence[Structure], Sequence[int]],
) -> Allotment:
    """Share out as many parameters as uniform sizes have.

    Args:
        uniform: the structures, and the sizes that they would all have.

    Raises:
        Refused: or Problems, what is missing.
    """
    structures, sizes = uniform
    config = recipe.method
    assert isinstance(config, WidthConfig)
    measuring = _Measuring(checkpoint, recipe, request, method)
    known, record = measuring.known(structures)
    tried = [_sizes(structure, config.multiple) for structure in structures]
    curves: dict[int, list[float]] = {}
    if config.score == "obs":
        walked = _Curves(structures, tried, config.damping)
        record, curves = measuring.walk(structures, walked, frozenset({"gram", "mean"})), walked.found
    else:
        curves = {number: units.curve(each, tried[number], config.score) for number, each in known.items()}
    for number in set(range(len(structures))) - set(curves):  # too few rows reached it
        tried[number], curves[number] = [sizes[number]], [0.0]
    weights = [_numbers(structure) for structure in structures]
    costs = [[float(weight * size) for size in row] for weight, row in zip(weights, tried, strict=True)]
    budget = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    picks = least_loss(costs, [curves[number] for number in range(len(structures))], float(budget)).picks
    chosen = tuple(row[pick] for row, pick in zip(tried, picks, strict=True))
    judged = tuple(known.get(number, structure) for number, structure in enumerate(structures))
    if config.score != "taylor":  # statistics of the original's inputs are measured anew behind what was pruned
        judged = tuple(structures)
    return Allotment(judged, chosen, record)


@dataclass(frozen=True)
class _Measuring:
    """How scores of the original model come about."""

    checkpoint: Checkpoint
    recipe: Recipe
    request: Request
    method: StructuralMethod

    def known(self, structures: Sequence[Structure]) -> tuple[dict[int, Structure], dict[str, Any]]:
        """Structures with what their score reads, those that the data reached; and where the data came from."""
        score = getattr(self.recipe.method, "score", "")
        if score == "taylor":
            return self._graded(structures)
        if score != "activation":
            return dict(enumerate(structures)), {}
        gatherer = _Gatherer(structures)
        record = self.walk(structures, gatherer, frozenset({"mean_abs"}))
        return gatherer.found, record

    def walk(self, structures: Sequence[Structure], visitor: Any, wanted: frozenset[str]) -> dict[str, Any]:
        """Bring statistics of the consumers' inputs to the visitor; returns the record of the data.

        Raises:
            Refused: or Problems, what is missing.
        """
        tensors = [part.tensor for structure in structures for part in structure.of("consumer")]
        engine = Engine.of(self._step(tensors), tensors, processes(torch.device("cpu")))
        engine.walk(visitor, wanted, False, lambda done, total: None)
        return engine.record()

    def _graded(self, structures: Sequence[Structure]) -> tuple[dict[int, Structure], dict[str, Any]]:
        tensors = [part.tensor for structure in structures for part in structure.parts]
        step, team = self._step(tensors), processes(torch.device("cpu"))
        adding = Importances(structures, {layer.info.tensor: layer.info for layer in step.layers})
        differentiate(step, team, adding.add, lambda done, total: None)
        found = {
            number: dataclasses.replace(structures[number], importance=total)
            for number, total in adding.totals.items()
            if float(total.sum()) > 0
        }
        consumers = [part.tensor for structure in structures for part in structure.of("consumer")]
        return found, Engine.of(step, consumers, team).record()

    def _step(self, tensors: Sequence[str]) -> _Step:
        """What is asked of these parameters, once nothing is missing."""
        wanted = set(tensors)
        infos = [info for info in self.checkpoint.layers(known_kinds(self.checkpoint)[0]) if info.tensor in wanted]
        step = _Step(self.checkpoint, self.recipe, self.request, [LayerPlan(i, self.recipe.method) for i in infos])
        graded = "gradients" in self.method.reads(self.recipe.method)
        direct = dataclasses.replace(self.request, stats=())
        missing = needs.problems(self.checkpoint, self.recipe, self.method, step.layers, direct)
        raise_all([*(factors(infos) if graded else []), *missing])
        return step


def _sizes(structure: Structure, multiple: int) -> list[int]:
    """Sizes that are tried, from all units down."""
    step = max(multiple, -(-structure.size // (POINTS * multiple)) * multiple)
    return [structure.size, *range((structure.size - 1) // step * step, 0, -step)]


def _numbers(structure: Structure) -> int:
    """Parameters of one unit."""
    return sum(part.read().shape[1] for part in structure.parts if part.role != "offset")


def _reached(structures: Sequence[Structure], stats: Mapping[str, InputStats]) -> Iterator[tuple[int, Structure]]:
    """Structures all of whose consumers enough rows reached, with those statistics, and their places."""
    for number, structure in enumerate(structures):
        names = [part.tensor for part in structure.of("consumer")]
        if all(name in stats and stats[name].count >= MIN_ROWS for name in names):
            yield number, dataclasses.replace(structure, inputs={name: stats[name] for name in names})


@dataclass
class _Curves:
    """Measures every structure's losses as its statistics come in, and changes nothing.

    Attributes:
        structures, tried: what is measured, and at what sizes.
        damping: of the Gram matrices.
        found: losses by structure.
    """

    structures: Sequence[Structure]
    tried: Sequence[Sequence[int]]
    damping: float
    found: dict[int, list[float]] = field(default_factory=dict)

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        for number, known in _reached(self.structures, stats):
            read = obs.consumers(known, self.damping)
            self.found[number] = obs.curve(known, read, self.tried[number])
        return {}


@dataclass
class _Gatherer:
    """Keeps the statistics of structures that enough rows reached, and changes nothing."""

    structures: Sequence[Structure]
    found: dict[int, Structure] = field(default_factory=dict)

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        self.found.update(_reached(self.structures, stats))
        return {}

"""Unlike widths for layers: as many units in total, where the consumers' outputs lose least.

Every layer's loss is measured over sizes by structured optimal brain surgeon on the original model; all layers write
into one stream, so that their squared errors add up. The choice is a knapsack (see `budget`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import raise_all
from aicompress.layer import InputStats
from aicompress.methods.budget import least_loss
from aicompress.methods.prune import surgeon
from aicompress.methods.prune.width import WidthConfig
from aicompress.methods.structural import StructuralMethod, Structure
from aicompress.pipeline.calibration import request as needs
from aicompress.pipeline.calibration.engine import Engine
from aicompress.pipeline.calibration.ready import MIN_ROWS
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.plan import LayerPlan
from aicompress.pipeline.preflight import known_kinds
from aicompress.pipeline.processes import processes
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
    tensors = [part.tensor for structure in structures for part in structure.of("consumer")]
    infos = [info for info in checkpoint.layers(known_kinds(checkpoint)[0]) if info.tensor in set(tensors)]
    step = _Step(checkpoint, recipe, request, [LayerPlan(info, config) for info in infos])
    raise_all(needs.problems(checkpoint, recipe, method, step.layers, dataclasses.replace(request, stats=())))
    tried = [_sizes(structure, config.multiple) for structure in structures]
    curves = _Curves(structures, tried, config.damping)
    engine = Engine.of(step, tensors, processes(torch.device("cpu")))
    engine.walk(curves, frozenset({"gram", "mean"}), False, lambda done, total: None)
    for number in set(range(len(structures))) - set(curves.found):  # too few rows reached it
        tried[number], curves.found[number] = [sizes[number]], [0.0]
    weights = [_numbers(structure) for structure in structures]
    costs = [[float(weight * size) for size in row] for weight, row in zip(weights, tried, strict=True)]
    losses = [curves.found[number] for number in range(len(structures))]
    budget = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    picks = least_loss(costs, losses, float(budget)).picks
    chosen = tuple(row[pick] for row, pick in zip(tried, picks, strict=True))
    return Allotment(tuple(structures), chosen, engine.record())


def _sizes(structure: Structure, multiple: int) -> list[int]:
    """Sizes that are tried, from all units down."""
    step = max(multiple, -(-structure.size // (POINTS * multiple)) * multiple)
    return [structure.size, *range((structure.size - 1) // step * step, 0, -step)]


def _numbers(structure: Structure) -> int:
    """Parameters of one unit."""
    return sum(part.read().shape[1] for part in structure.parts if part.role != "offset")


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
        for number, structure in enumerate(self.structures):
            names = [part.tensor for part in structure.of("consumer")]
            if all(name in stats and stats[name].count >= MIN_ROWS for name in names):
                known = dataclasses.replace(structure, inputs={name: stats[name] for name in names})
                read = surgeon.consumers(known, self.damping)
                self.found[number] = surgeon.curve(known, read, self.tried[number])
        return {}

"""Trying widths on the running model: compressed weights of any unit at any width, and what they cost the outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from aicompress.layer import from_matrix
from aicompress.measure import nbytes
from aicompress.methods.decisions import Width
from aicompress.model.blocks.walk import Walk, walk
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.output_divergence import OutputSensitivity
from aicompress.pipeline.calibration.data import Inputs, calibration_inputs
from aicompress.pipeline.calibration.request import module_of
from aicompress.pipeline.layerwise.allocation.probe import measured_part, probe_of
from aicompress.pipeline.layerwise.allocation.width_groups import WidthGroup, group
from aicompress.pipeline.layerwise.compress import Compression, LayerStatistics
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.workers import Processes
from aicompress.statistics import InputStats
from aicompress.weights import Weight

HELD = 1 << 30  # bytes of compressed weights that are kept for the next trial


@dataclass
class WidthTrial(AbstractContextManager["WidthTrial"]):
    """The model of a plan, its open layers in units, and weights at their widths.

    Attributes:
        plan: with open layers.
        compression: the method's sketch, which reads no more than norms of its inputs.
        probe: the running model.
        inputs: what it runs on.
        stats: norms of the inputs of the open layers' parameters.
        units: what gets one width.
    """

    plan: Plan
    compression: Compression
    probe: OutputSensitivity
    inputs: Inputs
    stats: Mapping[str, InputStats]
    units: list[WidthGroup]
    _held: OrderedDict[tuple[str, Width], Tensor] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, plan: Plan) -> WidthTrial:
        """Read the data and find the units: one pass of the uncompressed model.

        Raises:
            RecipeError: the calibration data does not fit the model.
        """
        assert plan.recipe.calibration is not None
        data = measured_part(plan.recipe.calibration, plan.search.samples)
        model = module_of(plan)
        inputs = calibration_inputs(plan.checkpoint, model, data, plan.recipe.seed, Processes())
        stats = _norms(plan, model, inputs)
        probe = probe_of(plan.checkpoint, module_of(plan), inputs)
        assert plan.method.widths is not None
        method = replace(plan.method, apply=plan.method.widths.sketch)
        compression = Compression(method, plan.checkpoint, plan.recipe.seed)
        return cls(plan, compression, probe, inputs, stats, group(plan, stats))

    def __enter__(self) -> Self:
        self.probe.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.probe.__exit__(kind, error, trace)

    def changes(self, unit: WidthGroup, pick: int) -> dict[str, Tensor]:
        """A unit's dense parameters at one of its widths, for the probe."""
        return {tensor: self._weight(tensor, unit.widths[pick]) for tensor in unit.tensors if self.probe.holds(tensor)}

    def loss(self, picks: Sequence[int]) -> float:
        """What the outputs lose with a width for every unit."""
        changed: dict[str, Tensor] = {}
        for unit, pick in zip(self.units, picks, strict=True):
            changed |= self.changes(unit, pick)
        return self.probe.loss(changed)

    def _weight(self, tensor: str, width: Width) -> Tensor:
        """A parameter at a width; those used last are kept."""
        key = tensor, width
        if key not in self._held:
            self._held[key] = self._compressed(tensor, width)
            while len(self._held) > 1 and sum(map(nbytes, self._held.values())) > HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def _compressed(self, tensor: str, width: Width) -> Tensor:
        jobs = [layer for layer in self.plan.at_width(tensor, width) if layer.config is not None]
        given = self.stats.get(tensor, InputStats(0))
        weight, _ = self.compression.compress_parameter(
            tensor, jobs, {layer.info.name: LayerStatistics(given) for layer in jobs}
        )
        return dense(self.plan, tensor, weight)


def dense(plan: Plan, tensor: str, weight: Weight) -> Tensor:
    """A compressed parameter as the model runs it."""
    planned = plan.output.parameters[tensor]
    assert planned.info is not None
    return from_matrix(weight.dense(), planned.dense.shape, planned.info.transposed).to(planned.dense.dtype)


def _norms(plan: Plan, model: Any, inputs: Inputs) -> dict[str, InputStats]:
    """Mean squares of the inputs of every parameter with an open layer."""
    loader = PartialModel(plan.checkpoint, model)
    names = dict.fromkeys(layer.info.tensor for layer in plan.layers if layer.info.name in plan.open)
    places = {name: place for name in names if (place := loader.reader_of(name)) is not None}
    keeper = _Keeper()
    needs = frozenset({"gram"}) if any(layer.info.part for layer in plan.layers) else frozenset({"norms"})
    walk(Walk(model, loader, inputs.batches, places, needs, weights=inputs.weights), keeper)
    return keeper.stats


@dataclass
class _Keeper:
    """Keeps statistics and changes nothing."""

    stats: dict[str, InputStats] = field(default_factory=dict)

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, torch.Tensor]:
        self.stats.update(stats)
        return {}

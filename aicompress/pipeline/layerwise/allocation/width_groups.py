"""What the search decides at once: layers that share an input, and what each width costs them on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from aicompress.checkpoint.layouts import on_disk
from aicompress.measure import nbytes
from aicompress.methods.decisions import Width
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.statistics import InputStats
from aicompress.weights import Weight


@dataclass(frozen=True)
class WidthGroup:
    """Layers that get the same width: query, key and value of a block, or one layer alone.

    Attributes:
        layers: with the least width of the choices as their parameters.
        tensors: their parameters.
        widths: what to choose among, least bytes first.
    """

    layers: tuple[LayerPlan, ...]
    tensors: tuple[str, ...]
    widths: tuple[Width, ...]

    @cached_property
    def name(self) -> str:
        """Its first layer's."""
        return self.layers[0].info.name

    @property
    def weights(self) -> int:
        """Numbers in its matrices."""
        return sum(layer.info.shape[0] * layer.info.shape[1] for layer in self.layers)


def group(plan: Plan, stats: Mapping[str, InputStats]) -> list[WidthGroup]:
    """Units of the layers whose width is open, in the order of the file.

    Layers of one parameter are together; others are where the model gives them the same tensor.

    Args:
        plan: with open layers.
        stats: statistics by parameter; those that share their input have the same object.
    """
    members: dict[tuple[object, tuple[Width, ...]], list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.info.name in plan.open:
            given = stats.get(layer.info.tensor)
            key: object = id(given) if given is not None and given.count else layer.info.tensor
            members.setdefault((key, plan.open[layer.info.name]), []).append(layer)
    return [
        WidthGroup(tuple(layers), tuple(dict.fromkeys(layer.info.tensor for layer in layers)), widths)
        for (_, widths), layers in members.items()
    ]


def costs(plan: Plan, units: Sequence[WidthGroup]) -> list[list[float]]:
    """Bytes on disk of every unit at each of its widths, in the layout of a plan."""
    return [
        [float(sum(_on_disk(plan, name, plan.stored(name, width)) for name in unit.tensors)) for width in unit.widths]
        for unit in units
    ]


def bits_per_weight(plan: Plan) -> float:
    """Stored bits per weight of the layers whose width is searched, scales and zero points included."""
    layers = [layer.info for layer in plan.layers if layer.info.name in plan.open]
    tensors = dict.fromkeys(info.tensor for info in layers)
    total = sum(_on_disk(plan, name, plan.output.parameters[name].weight) for name in tensors)
    return 8 * total / sum(info.shape[0] * info.shape[1] for info in layers)


def _on_disk(plan: Plan, tensor: str, weight: Weight | None) -> int:
    if weight is None:
        return plan.output.parameters[tensor].dense.nbytes
    return sum(nbytes(part) for part in on_disk(tensor, weight, plan.output.layout).values())


def widths_of(units: Sequence[WidthGroup], picks: Sequence[int]) -> dict[str, Width]:
    """The width of every layer."""
    return {layer.info.name: unit.widths[n] for unit, n in zip(units, picks, strict=True) for layer in unit.layers}

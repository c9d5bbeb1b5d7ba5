"""Experts of mixtures: their tensors, or their part of merged ones, and their rows of the router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import layer_name
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.prune.experts import Experts
from aicompress.methods.structural import Part, Structure
from aicompress.model import hf
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.config_fields import with_value
from aicompress.model.architecture.experts import Mixture, mixtures
from aicompress.model.architecture.small_models.silenced_experts import silence_experts
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.block_influence import BlockRun
from aicompress.model.sensitivity.expert_routing import Routing
from aicompress.pipeline.calibration.data import calibration_inputs, record_of_data
from aicompress.pipeline.calibration.request import Step, module_of
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import processes
from aicompress.pipeline.structured.edit import Cut, Edit, ParameterChange
from aicompress.pipeline.structured.parts import as_one_row, part
from aicompress.pipeline.structured.unit import (
    Kept,
    Scores,
    StructuralUnit,
    UnitLayout,
    in_stack,
    require_axis,
    require_held,
)


@dataclass(frozen=True)
class MixtureLayout(UnitLayout):
    """Mixtures of experts, a structure for each.

    Attributes:
        mixtures: in the order of the structures.
    """

    mixtures: Sequence[Mixture]


class ExpertUnit(StructuralUnit[Experts, MixtureLayout]):
    """Experts of mixtures."""

    kind = Experts
    scored = True

    def find(self, checkpoint: Checkpoint, unit: Experts, stack: str | None) -> MixtureLayout:
        """Every mixture of the stack.

        Raises:
            Refused: there are none, or the checkpoint does not hold what its architecture has.
        """
        architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
        chosen = _chosen(architecture, stack)
        return MixtureLayout(tuple(_structure(checkpoint, mixture) for mixture in chosen), architecture, chosen)

    def interchangeable(self, checkpoint: Checkpoint, layout: MixtureLayout) -> bool:
        """Experts are where those of a mixture are stored in the same form, to the byte."""
        return all(
            _stored(checkpoint, mixture.single(place, expert)) == _stored(checkpoint, mixture.single(place, 0))
            for mixture in layout.mixtures
            for place in mixture.singles
            for expert in range(1, mixture.size)
        )

    def require_scores(self, layout: MixtureLayout, measurement: Step) -> None:
        """The experts of a mixture are watched as one module.

        Raises:
            RecipeError: they are modules of their own.
        """
        loader = PartialModel(measurement.checkpoint, module_of(measurement))
        for mixture in layout.mixtures:
            _module(loader, mixture)

    def scores(
        self,
        layout: MixtureLayout,
        sizes: Sequence[int],
        measurement: Step,
        reads: frozenset[str],
        progress: Progress,
    ) -> Scores:
        """What experts answer to the tokens that are routed to them, or how many tokens these are."""
        checkpoint, recipe = measurement.checkpoint, measurement.recipe
        assert recipe.calibration is not None
        model = module_of(measurement)
        loader, team = PartialModel(checkpoint, model), processes(torch.device("cpu"))
        paths = {_module(loader, mixture): mixture.size for mixture in layout.mixtures}
        inputs = calibration_inputs(checkpoint, model, recipe.calibration, recipe.seed, team)
        progress("experts", 0, 1)
        totals = Routing(paths).measure(BlockRun(model, loader, inputs.batches, team))
        importance = [_scores(totals[path], "reap" in reads) for path in paths]
        return importance, record_of_data(inputs.sources, team.size)

    def edit(self, layout: MixtureLayout, sizes: Sequence[int], kept: Kept) -> Edit:
        """Drop the tensors of the other experts or their part of merged ones, and number those that stay anew."""
        edited = layout.architecture.config
        for mixture, size in zip(layout.mixtures, sizes, strict=True):
            edited = with_value(edited, mixture.field, size)
        notes = tuple(
            f"{structure.name}: kept experts {', '.join(map(str, kept[number]))} of {structure.size}"
            for number, structure in enumerate(layout.structures)
            if sizes[number] < structure.size
        )
        changes = _changes(layout, sizes, kept)
        return Edit(edited, layout.structures, tuple(sizes), changes, notes=notes, kept=kept)

    def silent(
        self, model: Any, layout: MixtureLayout, kept: Mapping[int, Tensor], inputs: Mapping[str, Tensor]
    ) -> AbstractContextManager[object]:
        """Let routers choose no expert that goes."""
        places = hf.parameter_names(model, [name for mixture in layout.mixtures for name, _ in mixture.axes])
        for number, mixture in enumerate(layout.mixtures):
            gone = torch.tensor([expert for expert in range(mixture.size) if expert not in kept[number].tolist()])
            routed = [places[name][0] for name, _ in mixture.axes]
            silence_experts(model, [name for name in routed if name in model.state_dict()], gone, inputs)
        return nullcontext()


def _stored(checkpoint: Checkpoint, name: str) -> tuple[Any, ...]:
    """Everything but the values of a parameter as the input stores it."""
    entry = checkpoint.manifest.entries.get(name)
    if entry is not None and (outline := checkpoint.outline(name)) is not None:
        return checkpoint.parameters()[name], outline.meta(), outline.specs()
    tensors = {suffix: checkpoint.tensors[disk].spec for suffix, disk in checkpoint.stored_names(name).items()}
    return checkpoint.parameters()[name], None, tensors


def _chosen(architecture: Architecture, stack: str | None) -> list[Mixture]:
    every = mixtures(architecture)
    if not every:
        raise CheckpointError("config.json counts no experts", "this is no mixture of experts: see `width` and `heads`")
    chosen = in_stack(every, stack, "mixture of experts", "counts the experts of")
    for layer in chosen:
        for name in (layer.single(place, expert) for place in layer.singles for expert in range(layer.size)):
            require_held(architecture.specs, name)
        for tensor, axis in layer.axes:
            require_axis(architecture.specs, tensor, axis, layer.size, f"config.json counts {layer.size} experts")
    return chosen


def _structure(checkpoint: Checkpoint, layer: Mixture) -> Structure:
    parts = tuple(_parts(checkpoint, layer))
    return Structure(layer.name, layer.size, parts, groups=layer.groups, worth=layer.chosen)


def _parts(checkpoint: Checkpoint, layer: Mixture) -> Iterable[Part]:
    """Matrices of experts, a row for each; the router is no expert's own."""
    for place in layer.singles:
        for expert in range(layer.size):
            name = layer.single(place, expert)
            yield part(checkpoint, name, layer_name(name), "whole", as_one_row, (), expert)
    for name, axis in layer.axes:
        if len(checkpoint.parameters()[name].shape) > 2:
            yield part(checkpoint, name, layer_name(name), "whole", partial(_rows, axis), (axis,))


def _rows(axis: int, tensor: Tensor) -> Tensor:
    moved = tensor.movedim(axis, 0)
    return moved.reshape(len(moved), -1)


def _changes(layout: MixtureLayout, sizes: Sequence[int], kept: Kept) -> dict[str, ParameterChange]:
    """Every parameter of the output: experts that stay under their new numbers."""
    specs = layout.architecture.specs
    changes = {name: ParameterChange(name) for name in specs}
    for number, (mixture, size) in enumerate(zip(layout.mixtures, sizes, strict=True)):
        for place in mixture.singles:
            for expert in range(size, mixture.size):
                del changes[mixture.single(place, expert)]
            for new, expert in enumerate(kept[number]):
                detail = {} if new == expert else {"expert": f"{expert}, now {new}"}
                changes[mixture.single(place, new)] = ParameterChange(mixture.single(place, expert), detail=detail)
        for tensor, axis in mixture.axes if size < mixture.size else ():
            detail = {Experts.plural: f"{size} of {mixture.size}"}
            changes[tensor] = ParameterChange(tensor, (Cut(number, axis),), detail)
    return changes


UNIT = ExpertUnit()


def _scores(totals: Tensor, reap: bool) -> Tensor:
    """An expert that no token reached has score 0."""
    tokens, weighed = totals.unbind(dim=1)
    return weighed / tokens.clamp_min(1) if reap else tokens


def _module(loader: PartialModel, layer: Mixture) -> str:
    """Path of the module that runs the experts of a layer.

    Raises:
        RecipeError: each expert is a module of its own.
    """
    names = [layer.single(place, 0) for place in layer.singles]
    names += [name for name, _ in layer.axes if ".experts" in name]
    modules = {loader.targets[name][0].rpartition(".")[0] for name in names}
    merged = len(modules) == 1 and all(
        loader.model.get_parameter(loader.targets[name][0]).ndim >= 2 for name in names if loader.targets[name][0]
    )
    if not merged or not modules:
        raise RecipeError(
            f"{layer.name}: its experts are modules of their own, which cannot be watched together",
            "choose them by weight norm: score: norm",
        )
    return modules.pop()

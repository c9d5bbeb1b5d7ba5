"""Neurons of feed-forward layers: rows of the projections that make them, and columns of what reads them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.prune.width import Neurons
from aicompress.methods.structural import Part, Structure
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.config_fields import dotted, with_value
from aicompress.model.architecture.feed_forward import Coupling, FeedForward, feed_forwards, sets_widths
from aicompress.pipeline.structured.axes import units_first
from aicompress.pipeline.structured.edit import Cut, Edit, ParameterChange
from aicompress.pipeline.structured.parts import offset_part, part
from aicompress.pipeline.structured.unit import Kept, StructuralUnit, UnitLayout, in_stack, require_axis

_NAME = re.compile(r"[._](?:weight|bias)$")  # what a weight's and its bias's names end in


@dataclass(frozen=True)
class FeedForwardLayout(UnitLayout):
    """Feed-forward layers of an architecture, a structure for each.

    Attributes:
        layers: in the order of the structures.
        uniform: layers that config.json counts together keep equal numbers of neurons.
    """

    layers: Sequence[FeedForward]
    uniform: bool


class NeuronUnit(StructuralUnit[Neurons, FeedForwardLayout]):
    """Neurons of feed-forward layers."""

    kind = Neurons

    def find(self, checkpoint: Checkpoint, unit: Neurons, stack: str | None) -> FeedForwardLayout:
        """Every feed-forward layer of the stack.

        Raises:
            Refused: config.json sets no width, or the checkpoint does not hold what its architecture has.
        """
        architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
        layers = _chosen_layers(architecture, stack)
        _require_tensors(architecture, layers)
        if not unit.uniform and any(layer.experts > 1 for layer in layers):
            raise _merged()
        structures = tuple(
            Structure(layer.name, layer.experts * layer.width, tuple(_neuron_parts(checkpoint, layer)), layer.experts)
            for layer in layers
        )
        return FeedForwardLayout(structures, architecture, layers, unit.uniform)

    def require_statistics(self, layout: FeedForwardLayout, reads: frozenset[str]) -> None:
        """Statistics are those of inputs of single layers, and merged experts are none.

        Raises:
            RecipeError: some are merged.
        """
        merged = next((layer for layer in layout.layers if layer.experts > 1), None)
        if merged is not None:
            raise RecipeError(
                f"{merged.name}: one tensor holds all experts, whose neurons cannot be chosen by statistics",
                "choose them by weights: score: product or sum",
            )

    def edit(self, layout: FeedForwardLayout, sizes: Sequence[int], kept: Kept) -> Edit:
        """Cut the projections of every layer; config.json has the width, or the manifest has the widths of each.

        Raises:
            RecipeError: config.json holds one width for layers of unlike ones.
            CheckpointError: layers that are merged in the model, such as experts, have one width.
        """
        structures, changes = layout.structures, _changes(layout, sizes)
        if not layout.uniform:
            widths = _unlike_widths(layout, sizes)
            told = ", ".join(f"{layer.name} {size}" for layer, size in zip(layout.layers, sizes, strict=True))
            config = dict(layout.architecture.config)
            return Edit(config, structures, tuple(sizes), changes, (f"widths: {told}",), widths=widths)
        edited, by_field = dict(layout.architecture.config), defaultdict(set)
        for layer, size in zip(layout.layers, sizes, strict=True):
            by_field[layer.field].add(size // layer.experts)
            for field, value in ((layer.field, size // layer.experts), *layer.settings):
                edited = with_value(edited, field, value)
        uneven = [dotted(path) for path, several in by_field.items() if len(several) > 1]
        if uneven:
            raise RecipeError(
                f"{uneven[0]} of config.json holds one width for several layers", "give them the same width"
            )
        whole = all(size == structure.size for size, structure in zip(sizes, structures, strict=True))
        stays = f"no neuron goes: the width of {layout.layers[0].name} stays {layout.layers[0].width}"
        warnings = (stays,) if whole else ()
        edited = dict(layout.architecture.config) if whole else edited
        return Edit(edited, structures, tuple(sizes), changes, warnings)


def _changes(layout: FeedForwardLayout, sizes: Sequence[int]) -> dict[str, ParameterChange]:
    changes = {name: ParameterChange(name) for name in layout.architecture.specs}
    for number, (layer, size) in enumerate(zip(layout.layers, sizes, strict=True)):
        for coupling in layer.couplings if size < layer.experts * layer.width else ():
            earlier = changes[coupling.tensor].cuts
            spans, stacked = (coupling.span,) * coupling.parts, layer.experts > 1 and coupling.axis > 0
            cut = Cut(number, coupling.axis, spans, stacked=stacked)
            detail = {Neurons.plural: f"{size // layer.experts} of {layer.width}"}
            changes[coupling.tensor] = ParameterChange(coupling.tensor, (*earlier, cut), detail)
    return changes


def _unlike_widths(layout: FeedForwardLayout, sizes: Sequence[int]) -> dict[str, dict[str, int]]:
    """Modules whose width config.json does not give any more; their tensors tell."""
    widths: dict[str, dict[str, int]] = {
        coupling.tensor.rpartition(".")[0]: {}
        for layer, size in zip(layout.layers, sizes, strict=True)
        for coupling in layer.couplings
        if size < layer.width
    }
    if any(".experts." in path for path in widths):
        raise _merged()
    return widths


def _merged() -> CheckpointError:
    return CheckpointError("experts are merged in the model and have one width", "leave widths: per_layer out")


def _require_tensors(architecture: Architecture, layers: list[FeedForward]) -> None:
    """The checkpoint must hold what its config.json says.

    Raises:
        CheckpointError: a tensor is missing, or of another width.
    """
    for layer in layers:
        for c in layer.couplings:
            length = layer.width * c.parts * c.span * (layer.experts if c.axis == 0 else 1)
            said = f"{dotted(layer.field)} of config.json is {layer.width}"
            require_axis(architecture.specs, c.tensor, c.axis, length, said)


def _chosen_layers(architecture: Architecture, stack: str | None) -> list[FeedForward]:
    layers = feed_forwards(architecture)
    if not layers and not sets_widths(architecture):
        raise CheckpointError(
            "config.json sets no width of feed-forward layers: the architecture takes it from the hidden size",
            "prune whole blocks (depth), or factorize its layers (svd)",
        )
    if not layers:
        raise CheckpointError(
            "how neurons lie in the feed-forward layers of this architecture cannot be told",
            "prune heads or whole blocks (depth), or factorize its layers (svd)",
        )
    return in_stack(layers, stack, "feed-forward layer", "sets the width of")


def _neuron_parts(checkpoint: Checkpoint, layer: FeedForward) -> Iterable[Part]:
    """Rows of producers and columns of consumers, (neurons, numbers); a fused tensor gives several."""
    for coupling in layer.couplings:
        module = _NAME.sub("", coupling.tensor)
        axes = {coupling.axis, *([0] if _is_stacked(layer, coupling) else [])}
        for number in range(coupling.parts * coupling.span):
            take = partial(_taken, layer, coupling, number)
            yield part(checkpoint, coupling.tensor, f"{module}[{number}]", coupling.role, take, axes)
        yield from offset_part(checkpoint, coupling.tensor) if coupling.role == "consumer" else ()


def _is_stacked(layer: FeedForward, coupling: Coupling) -> bool:
    """Whether the experts of a merged tensor lie along axis 0."""
    return layer.experts > 1 and coupling.axis > 0


def _taken(layer: FeedForward, coupling: Coupling, number: int, tensor: Tensor) -> Tensor:
    """One of several entries of every neuron in a tensor, those of all experts one below the other."""
    rows = units_first(tensor, (coupling.axis, _is_stacked(layer, coupling)))
    part, turn = divmod(number, coupling.span)
    entries = rows.reshape(layer.experts, coupling.parts, layer.width, coupling.span, -1)[:, part, :, turn]
    return entries.reshape(layer.experts * layer.width, -1)


UNIT = NeuronUnit()

"""Neurons of feed-forward layers: rows of the projections that make them, and columns of what reads them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.prune.width import Neurons
from aicompress.methods.structural import Part, Structure
from aicompress.model.architecture.architecture import Architecture, FeedForward
from aicompress.model.architecture.config_fields import with_value
from aicompress.pipeline.structured.edit import Change, Cut, Edit, offset_part
from aicompress.pipeline.structured.unit import Kept, Layout, StructuralUnit


@dataclass(frozen=True)
class FeedForwardLayout(Layout):
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
        layers = _chosen_layers(architecture.feed_forwards(), stack)
        _require_tensors(architecture, layers)
        structures = tuple(
            Structure(layer.name, layer.width, tuple(_neuron_parts(checkpoint, layer))) for layer in layers
        )
        return FeedForwardLayout(structures, architecture, layers, unit.uniform)

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
            by_field[layer.field].add(size)
            edited = with_value(edited, layer.field, size)
        uneven = [".".join(path) for path, several in by_field.items() if len(several) > 1]
        if uneven:
            raise RecipeError(
                f"{uneven[0]} of config.json holds one width for several layers", "give them the same width"
            )
        whole = all(size == structure.size for size, structure in zip(sizes, structures, strict=True))
        warnings = (f"no neuron goes: the width of {structures[0].name} stays {structures[0].size}",) if whole else ()
        return Edit(edited, structures, tuple(sizes), changes, warnings)


def _changes(layout: FeedForwardLayout, sizes: Sequence[int]) -> dict[str, Change]:
    changes = {name: Change(name) for name in layout.architecture.specs}
    for number, (layer, size) in enumerate(zip(layout.layers, sizes, strict=True)):
        for coupling in layer.couplings if size < layer.width else ():
            earlier = changes[coupling.tensor].cuts
            cut = Cut(number, coupling.axis, (1,) * coupling.parts)
            detail = {Neurons.plural: f"{size} of {layer.width}"}
            changes[coupling.tensor] = Change(coupling.tensor, (*earlier, cut), detail)
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
        raise CheckpointError("experts are merged in the model and have one width", "leave widths: per_layer out")
    return widths


def _require_tensors(architecture: Architecture, layers: list[FeedForward]) -> None:
    """The checkpoint must hold what its config.json says.

    Raises:
        CheckpointError: a tensor is missing, or of another width.
    """
    for layer in layers:
        for c in layer.couplings:
            spec = architecture.specs.get(c.tensor)
            if spec is None:
                raise CheckpointError(
                    f"the checkpoint lacks {c.tensor}, which its architecture has",
                    "save it again with a current transformers, so that its tensors have their present names",
                )
            if len(spec.shape) <= c.axis or spec.shape[c.axis] != layer.width * c.parts:
                raise CheckpointError(
                    f"{c.tensor} has shape {spec.shape}, but {'.'.join(layer.field)} of config.json is {layer.width}",
                    "the checkpoint and its config.json do not belong together",
                )


def _chosen_layers(layers: list[FeedForward], stack: str | None) -> list[FeedForward]:
    if not layers:
        raise CheckpointError(
            "config.json sets no width of feed-forward layers that can be changed",
            "it is tied to the hidden size, or gates are interleaved, or one tensor stores all experts",
        )
    chosen = [layer for layer in layers if stack is None or layer.name.startswith(f"{stack}.")]
    if not chosen:
        raise RecipeError(
            f"method.stack: no feed-forward layer lies in {stack!r}", f"there are {layers[0].name} to {layers[-1].name}"
        )
    fields = {layer.field for layer in chosen}
    shared = [layer for layer in layers if layer.field in fields and layer not in chosen]
    if shared:
        raise RecipeError(
            f"{'.'.join(shared[0].field)} of config.json also sets the width of {shared[0].name}",
            "leave method.stack out",
        )
    return chosen


def _neuron_parts(checkpoint: Checkpoint, layer: FeedForward) -> Iterable[Part]:
    """Rows of producers and columns of consumers, (neurons, numbers); a fused tensor gives several."""
    for coupling in layer.couplings:
        module = coupling.tensor.rpartition(".")[0]
        for part in range(coupling.parts):
            take = partial(_taken, coupling.axis, part * layer.width, layer.width)
            read = partial(_read, checkpoint, coupling.tensor, take)
            yield Part(coupling.tensor, f"{module}[{part}]", coupling.role, 0, read, take=take)
        yield from offset_part(checkpoint, coupling.tensor) if coupling.role == "consumer" else ()


def _read(checkpoint: Checkpoint, tensor: str, take: Callable[[Tensor], Tensor]) -> Tensor:
    return take(checkpoint.dense(tensor))


def _taken(axis: int, first: int, width: int, tensor: Tensor) -> Tensor:
    return tensor.movedim(axis, 0)[first : first + width].float().reshape(width, -1)


UNIT = NeuronUnit()

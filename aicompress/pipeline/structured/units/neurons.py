"""What goes with neurons of feed-forward layers: rows of the projections that make them, columns of what reads them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.structural import Part, StructuralConfig, StructuralMethod, Structure
from aicompress.model.architecture.architecture import Architecture, FeedForward, with_value
from aicompress.pipeline.calibration.requirements import Request
from aicompress.pipeline.structured.edit import Change, Cut, Edit, offset_part, with_refits
from aicompress.pipeline.structured.units.width_allocation import Allotment, allotted
from aicompress.recipe import Recipe


def narrow(checkpoint: Checkpoint, method: StructuralMethod, recipe: Recipe, request: Request) -> Edit:
    """Keep some neurons of every feed-forward layer, as many in each that config.json counts together.

    Raises:
        Refused: config.json sets no width, or the checkpoint does not hold what its architecture has.
    """
    config = recipe.method
    assert isinstance(config, StructuralConfig)
    architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
    layers = _chosen_layers(architecture.feed_forwards(), config.stack)
    _require_tensors(architecture, layers)
    structures = tuple(Structure(layer.name, layer.width, tuple(_neuron_parts(checkpoint, layer))) for layer in layers)
    sizes = method.sizes(structures, config)
    if getattr(config, "widths", "uniform") == "per_layer":
        allotment = allotted(checkpoint, method, recipe, request, (structures, sizes))
        return _uneven(architecture, layers, allotment, method.refits(config))
    edited, widths = dict(architecture.config), defaultdict(set)
    for layer, size in zip(layers, sizes, strict=True):
        widths[layer.field].add(size)
        edited = with_value(edited, layer.field, size)
    uneven = [".".join(path) for path, found in widths.items() if len(found) > 1]
    if uneven:
        raise RecipeError(f"{uneven[0]} of config.json holds one width for several layers", "give them the same width")
    changes = _changes(architecture, layers, sizes)
    refitted = with_refits(changes, structures, sizes, method.refits(config))
    kept = all(size == structure.size for size, structure in zip(sizes, structures, strict=True))
    told = (f"no neuron goes: the width of {structures[0].name} stays {structures[0].size}",) if kept else ()
    return Edit(edited, structures, tuple(sizes), refitted, told)


def _changes(architecture: Architecture, layers: list[FeedForward], sizes: list[int]) -> dict[str, Change]:
    changes = {name: Change(name) for name in architecture.specs}
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        for coupling in layer.couplings if size < layer.width else ():
            earlier = changes[coupling.tensor].cuts
            cut = Cut(number, coupling.axis, (1,) * coupling.parts)
            changes[coupling.tensor] = Change(coupling.tensor, (*earlier, cut), {"neurons": f"{size} of {layer.width}"})
    return changes


def _uneven(architecture: Architecture, layers: list[FeedForward], allotment: Allotment, refits: bool) -> Edit:
    """Layers of unlike widths: config.json keeps the old one, and the manifest says what each has.

    Raises:
        CheckpointError: layers that are merged in the model, such as experts, have one width.
    """
    structures, sizes = allotment.structures, list(allotment.sizes)
    widths: dict[str, dict[str, int]] = {
        coupling.tensor.rpartition(".")[0]: {}
        for layer, size in zip(layers, sizes, strict=True)
        for coupling in layer.couplings
        if size < layer.width
    }
    if any(".experts." in path for path in widths):
        raise CheckpointError("experts are merged in the model and have one width", "leave widths: per_layer out")
    changes = with_refits(_changes(architecture, layers, sizes), structures, sizes, refits)
    told = ", ".join(f"{layer.name} {size}" for layer, size in zip(layers, sizes, strict=True))
    config = dict(architecture.config)
    return Edit(config, structures, tuple(sizes), changes, (f"widths: {told}",), allotment.record, widths=widths)


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

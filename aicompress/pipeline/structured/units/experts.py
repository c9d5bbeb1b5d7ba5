"""What goes with experts: their tensors, or their part of merged ones, and their rows of the router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import layer_name
from aicompress.errors import CheckpointError, RecipeError
from aicompress.methods.structural import Part, StructuralConfig, StructuralMethod, Structure
from aicompress.model.architecture.architecture import Architecture, with_value
from aicompress.model.architecture.experts import Mixture, mixtures
from aicompress.pipeline.calibration.requirements import Request
from aicompress.pipeline.structured.edit import Change, Cut, Edit
from aicompress.pipeline.structured.units.expert_scores import importances
from aicompress.recipe import Recipe


def drop_experts(checkpoint: Checkpoint, method: StructuralMethod, recipe: Recipe, request: Request) -> Edit:
    """Keep some experts of every mixture, as many in each, and number them anew.

    Which ones is decided here, as names depend on it; scores that need data run the model.

    Raises:
        Refused: there are none, or the checkpoint does not hold what its architecture has.
    """
    config = recipe.method
    assert isinstance(config, StructuralConfig)
    architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
    layers = _chosen(architecture, config.stack)
    structures = tuple(_structure(checkpoint, layer) for layer in layers)
    sizes = method.sizes(structures, config)
    record: Mapping[str, Any] = {}
    if method.reads(config) and any(size < s.size for s, size in zip(structures, sizes, strict=True)):
        found, record = importances(checkpoint, method, recipe, request, layers)
        structures = tuple(replace(s, importance=each) for s, each in zip(structures, found, strict=True))
    kept = {n: tuple(method.keep(s, size, config)) for n, (s, size) in enumerate(zip(structures, sizes, strict=True))}
    edited = architecture.config
    for layer, size in zip(layers, sizes, strict=True):
        edited = with_value(edited, layer.field, size)
    changes = _changes(architecture, layers, sizes, kept)
    told = tuple(
        f"{s.name}: kept experts {', '.join(map(str, kept[n]))} of {s.size}"
        for n, s in enumerate(structures)
        if sizes[n] < s.size
    )
    whole = tuple(replace(s, parts=()) for s in structures)  # nothing reads them any more
    return Edit(edited, whole, tuple(sizes), changes, told, record, kept)


def _chosen(architecture: Architecture, stack: str | None) -> list[Mixture]:
    found = mixtures(architecture)
    if not found:
        raise CheckpointError("config.json counts no experts", "this is no mixture of experts: see `width` and `heads`")
    chosen = [layer for layer in found if stack is None or layer.name.startswith(f"{stack}.")]
    if not chosen:
        raise RecipeError(
            f"method.stack: no experts lie in {stack!r}", f"there are {found[0].name} to {found[-1].name}"
        )
    fields = {layer.field for layer in chosen}
    shared = [layer for layer in found if layer.field in fields and layer not in chosen]
    if shared:
        field = ".".join(shared[0].field)
        raise RecipeError(f"{field} of config.json also counts the experts of {shared[0].name}", "leave stack out")
    for layer in chosen:
        named = [layer.single(place, expert) for place in layer.singles for expert in range(layer.size)]
        for name in (*named, *(tensor for tensor, _ in layer.axes)):
            if name not in architecture.specs:
                raise CheckpointError(
                    f"the checkpoint lacks {name}, which its architecture has",
                    "save it again with a current transformers, so that its tensors have their present names",
                )
        for tensor, axis in layer.axes:
            shape = architecture.specs[tensor].shape
            if len(shape) <= axis or shape[axis] != layer.size:
                raise CheckpointError(
                    f"{tensor} has shape {shape}, but config.json counts {layer.size} experts",
                    "the checkpoint and its config.json do not belong together",
                )
    return chosen


def _structure(checkpoint: Checkpoint, layer: Mixture) -> Structure:
    parts = tuple(_parts(checkpoint, layer))
    return Structure(layer.name, layer.size, parts, groups=layer.groups, worth=layer.chosen)


def _parts(checkpoint: Checkpoint, layer: Mixture) -> Iterable[Part]:
    """Matrices of experts, a row for each; the router is no expert's own."""
    for place in layer.singles:
        for expert in range(layer.size):
            name = layer.single(place, expert)
            yield Part(name, layer_name(name), "whole", expert, partial(_row, checkpoint, name))
    for name, axis in layer.axes:
        if len(checkpoint.parameters()[name].shape) > 2:
            yield Part(name, layer_name(name), "whole", 0, partial(_rows, checkpoint, name, axis))


def _row(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.dense(name).float().reshape(1, -1)


def _rows(checkpoint: Checkpoint, name: str, axis: int) -> Tensor:
    moved = checkpoint.dense(name).movedim(axis, 0)
    return moved.float().reshape(len(moved), -1)


def _changes(
    architecture: Architecture, layers: list[Mixture], sizes: list[int], kept: Mapping[int, tuple[int, ...]]
) -> dict[str, Change]:
    """Every parameter of the output: experts that stay under their new numbers."""
    renamed: dict[str, tuple[str, dict[str, str]]] = {}
    gone: set[str] = set()
    cuts: dict[str, Change] = {}
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        for place in layer.singles:
            gone |= {layer.single(place, expert) for expert in range(layer.size)}
            for new, expert in enumerate(kept[number]):
                old, name = layer.single(place, expert), layer.single(place, new)
                renamed[old] = name, {} if new == expert else {"expert": f"{expert}, now {new}"}
        for tensor, axis in layer.axes if size < layer.size else ():
            cuts[tensor] = Change(tensor, (Cut(number, axis),), {"experts": f"{size} of {layer.size}"})
    found: dict[str, Change] = {}
    for name in architecture.specs:
        if name in renamed:
            new_name, detail = renamed[name]
            found[new_name] = Change(name, detail=detail)
        elif name not in gone:
            found[name] = cuts.get(name, Change(name))
    return found

"""A checkpoint seen with its residual stream rotated, for methods that compress it so."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.views.rewritten import RewrittenCheckpoint
from aicompress.errors import Refused
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.model.equivalence.rotated_parameters import Rotatable
from aicompress.model.equivalence.rotation import find_rotatable
from aicompress.model.loading.definitions.definition import skeleton
from aicompress.pipeline.calibration.random_weights import on_noise
from aicompress.pipeline.calibration.request import StepInput

HINT = "quantize it as it is: gptq, or awq"


def rotated(step: StepInput, method: AnyLayerMethod) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that a method compresses, rotated where it asks for that, and warnings for the user.

    The structure that the rotation is folded into is searched for on random weights (`on_noise`); the checkpoint's own
    are rotated as they are read.

    Raises:
        Refused: the model cannot be rotated, with the reason.
    """
    rotates, checkpoint, recipe = method.rotates, step.checkpoint, step.recipe
    if rotates is None:
        return checkpoint, []
    view, warnings = _untied(RewrittenCheckpoint.over(checkpoint), rotates.unties(recipe.method))

    def rotating(width: int, centred: bool) -> Any:
        return rotates.rotation(width, centred, recipe.seed).along

    try:
        turnable = on_noise(
            replace(step, checkpoint=view), lambda model, loader, batch: find_rotatable(model, loader, batch, rotating)
        )
    except Refused as error:
        raise Refused(f"{checkpoint.path} cannot be rotated: {error.message}", error.hint or HINT) from error
    _require_plain(view, turnable)
    matrices = [axis for reader in turnable.readers for axis in reader.matrices]
    axes = [*matrices, *turnable.writers]
    by_rows = {axis.parameter for axis in axes} - {axis.parameter for axis in axes if axis.axis == 0}
    for parameter, change in turnable.changes(view.dense, rotating(turnable.width, turnable.centred)):
        view.change(parameter, change, parameter in by_rows)
    return view, warnings


def _untied(view: RewrittenCheckpoint, untie: bool) -> tuple[RewrittenCheckpoint, list[str]]:
    """The view with an output head of its own.

    Raises:
        Refused: the head shares the embedding's matrix, and may not be given its own.
    """
    config = view.config
    model = None if config is None else skeleton(config)
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    if not ties or config is None:
        return view, []
    named = {name: _named(view, name) for pair in ties.items() for name in pair}
    copies = {named[target] or target: named[source] or source for target, source in ties.items()}
    copies = {head: kept if kept in view.tensors else head for head, kept in copies.items()}
    size = sum(view.nbytes(kept) for kept in copies.values() if kept in view.tensors)
    if not untie:
        message = f"{view.path} cannot be rotated: {min(copies)} shares its matrix with another layer"
        raise Refused(message, f"untie: true gives it one of its own, {size:,} bytes")
    told = f"{', '.join(sorted(copies))} has a matrix of its own now: {size:,} bytes more than the input"
    return view.untied(_with_ties_off(config), copies), [told]


def _named(view: Checkpoint, name: str) -> str | None:
    """A parameter of the model as the checkpoint calls it."""
    return next((known for known in view.tensors if known == name or name.endswith(f".{known}")), None)


def _with_ties_off(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that ties nothing, in all its sections that say so."""
    untied = copy.deepcopy(dict(config))
    for section in (untied, *(value for value in untied.values() if isinstance(value, dict))):
        if section is untied or "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = False
    return untied


def _require_plain(view: RewrittenCheckpoint, turnable: Rotatable) -> None:
    """Everything that changes must be stored plainly, and a norm's bias must survive its weight.

    Raises:
        Refused: naming the parameter.
    """
    axes = [axis for reader in turnable.readers for axis in (reader.weight, *reader.matrices)]
    bound = view.manifest.entries.keys() | set(view.manifest.lent.values())
    for axis in (*axes, *turnable.writers):
        if axis.parameter in bound:
            raise Refused(f"{axis.parameter} is compressed already, so it cannot be rotated", "rotate first")
    for reader in turnable.readers:
        if reader.bias is not None:
            gone = view.dense(reader.weight.parameter).float() + reader.weight.offset == 0
            if bool((gone & (view.dense(reader.bias.parameter) != 0)).any()):
                raise Refused(f"{reader.weight.parameter} holds zeros where its bias has none, so it cannot move", HINT)
    if any(view.tensors[axis.parameter].spec.dtype not in FLOATS for axis in (*axes, *turnable.writers)):
        raise Refused(f"{view.path} holds weights that are no floating numbers", HINT)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

"""Try a structural edit on a small random model: what is left must compute as the whole with those units silent.

Shapes show which tensors hold the units of a structure. They do not show what a model does with them as it runs: a
block that reads another's keys, a projection whose halves are interleaved, a number of blocks that a forward pass
counts by. So the same edit is made on a model of the same architecture with few of everything, and both are run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, Refused
from aicompress.methods.structural import Structure, Unit
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.shapes import filled, save
from aicompress.model.architecture.small_models import tiny_model
from aicompress.model.architecture.small_models.bounded_run import EndlessRun
from aicompress.model.architecture.small_models.reduced_model import reduced, started
from aicompress.model.architecture.small_models.tiny_inputs import inputs_of
from aicompress.pipeline.structured.axes import along, length_of, positions, restored, selected, units_first
from aicompress.pipeline.structured.edit import Cut, Edit
from aicompress.pipeline.structured.unit import AnyUnit, UnitLayout

LARGEST = 10_000_000  # numbers in a small model
Decided = tuple[tuple[int, ...], ...]  # units that stay, by structure
HINT = "its units depend on one another in a way that is not known: choose another method"


@dataclass(frozen=True)
class SmallModelChoice:
    """Which units stay of a small model.

    Attributes:
        layout: where its units lie.
        edit: what changes.
        kept: the units that stay, by structure.
    """

    layout: UnitLayout
    edit: Edit
    kept: Mapping[int, Tensor]


def require_reference(
    handler: AnyUnit, unit: Unit, architecture: Architecture, planned: Edit, stack: str | None = None
) -> str:
    """Refuse an architecture whose small model computes otherwise without some units than with these silent.

    Args:
        handler: what handles the units.
        unit: how the method takes them.
        architecture: of the checkpoint.
        planned: what changes in it.
        stack: prefix of the stack that is acted on, or None.

    Returns:
        Why it could not be tried; empty where it was, or where there is nothing to try.

    Raises:
        CheckpointError: it does.
    """
    if not handler.silenceable or not planned.changed or planned.widths:
        return ""
    decided = tuple(tuple(planned.kept.get(number, ())) for number in range(len(planned.structures)))
    config = json.dumps(architecture.config, sort_keys=True)
    same, untried = _tried(handler, unit, stack, config, decided if handler.scored else ())
    if not same:
        raise CheckpointError(
            f"without some {handler.kind.plural}, a small model of this architecture does not compute as with these "
            "silent",
            HINT,
        )
    return untried


@lru_cache(maxsize=64)
def _tried(handler: AnyUnit, unit: Unit, stack: str | None, config: str, decided: Decided) -> tuple[bool, str]:
    """Whether a small model computes the same, or why that could not be tried."""
    try:
        model = started(reduced(json.loads(config)))
        if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
            return True, "its smallest model is too large"
        inputs = inputs_of(model)
        tiny_model.outputs_of(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder)
            checkpoint = Checkpoint.open(Path(folder))
            choice = _choice(handler, checkpoint, (unit, stack), decided)
            return _same(handler, checkpoint, choice, inputs), ""
    except Refused as error:
        return True, error.message


def _choice(
    handler: AnyUnit, checkpoint: Checkpoint, asked: tuple[Unit, str | None], decided: Decided
) -> SmallModelChoice:
    """The units that are decided, else half of every structure's, or more where the architecture does not take these.

    Raises:
        Refused: the small model has no such units, or takes no choice of them.
    """
    layout = handler.find(checkpoint, *asked)
    structures = layout.structures
    choices = [[_share(structure, divisor) for structure in structures] for divisor in (2, 4, 1)]
    if decided and all(decided):
        choices = [[len(units) for units in decided]]
    refusal = Refused(f"no {handler.kind.plural} can go of its small model", HINT)
    for wanted in choices:
        try:
            sizes = handler.accepted(layout, wanted)
            kept = {number: _drawn(structures[number], size, number) for number, size in enumerate(sizes)}
            if decided and all(decided):
                kept = {number: torch.tensor(units) for number, units in enumerate(decided)}
            edit = handler.edit(layout, sizes, {number: tuple(units.tolist()) for number, units in kept.items()})
        except Refused as error:
            refusal = error
            continue
        if edit.changed and not edit.widths and edit.config is not None:
            return SmallModelChoice(layout, edit, kept)
    raise refusal


def _share(structure: Structure, divisor: int) -> int:
    """About one in so many units, the same number of every group; all but one of each group for a divisor of 1."""
    each = structure.size // structure.groups
    return structure.groups * max(1, each - 1 if divisor == 1 else each // divisor)


def _drawn(structure: Structure, size: int, seed: int) -> Tensor:
    """Units that stay, ascending, as many of every group."""
    generator = torch.Generator().manual_seed(seed)
    each, few = structure.size // structure.groups, size // structure.groups
    return torch.cat(
        [
            group * each + torch.randperm(each, generator=generator)[:few].sort().values
            for group in range(structure.groups)
        ]
    )


@torch.no_grad()
def _same(handler: AnyUnit, checkpoint: Checkpoint, choice: SmallModelChoice, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the cut model gives what the whole one does with those units silent.

    Raises:
        CheckpointError: one of them does not run.
    """
    edit, whole = choice.edit, {name: checkpoint.dense(name) for name in checkpoint.parameters()}
    cut = {name: _cut(whole[change.source], change.cuts, edit, choice.kept) for name, change in edit.changes.items()}
    assert checkpoint.config is not None
    assert edit.config is not None
    reference = filled(checkpoint.config, silenced(whole, choice))
    with handler.silent(reference, choice.layout, choice.kept, inputs):
        before = tiny_model.outputs_of(reference, inputs)
    narrow = filled(edit.config, cut)
    try:
        after = tiny_model.outputs_of(narrow, inputs)
    except EndlessRun:
        raise
    except CheckpointError:  # a width that the cut does not reach, such as that of a norm over all heads
        return False
    return all(tiny_model.alike(one, other) for one, other in zip(after, before, strict=False))


def _cut(value: Tensor, cuts: Sequence[Cut], edit: Edit, kept: Mapping[int, Tensor]) -> Tensor:
    for where in along(cuts):
        mine = [one for one in cuts if (one.axis, one.stacked) == where]
        value = selected(value, where, positions(mine, length_of(value.shape, where), edit.structures, kept))
    return value


def silenced(whole: Mapping[str, Tensor], choice: SmallModelChoice) -> dict[str, Tensor]:
    """The whole model's tensors, with zeros where consumers read units that go."""
    edit, tensors = choice.edit, dict(whole)
    for number, structure in enumerate(edit.structures):
        for name in {part.tensor for part in structure.of("consumer")}:
            for one in edit.changes[name].cuts:
                if one.structure != number:
                    continue
                value, where = tensors[name].clone(), (one.axis, one.stacked)
                length = length_of(value.shape, where)
                stays = positions([one], length, edit.structures, choice.kept)
                gone = torch.ones(length, dtype=torch.bool).index_fill_(0, stays, False).nonzero()[:, 0]
                rows = units_first(value, where).index_fill(0, gone, 0.0)
                tensors[name] = restored(rows, value.shape, where)
    return tensors

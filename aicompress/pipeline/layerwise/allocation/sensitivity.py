"""What every width of every unit costs the model, with only that unit changed.

Measured on the model's outputs, or, where that takes too long, on the outputs of the unit's block: the error there is
turned into one of the outputs by a factor that is measured once for each block, with all its units changed together.
Errors of narrow widths are no longer in proportion to those of wide ones, so every width is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from torch import Tensor

from aicompress.checkpoint.journal import Journal
from aicompress.methods.decisions import Width
from aicompress.pipeline.calibration.request import MIN_ROWS
from aicompress.pipeline.layerwise.allocation.width_groups import WidthGroup
from aicompress.pipeline.layerwise.allocation.width_trial import WidthTrial
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes

WORK = 2e14  # operations that are spent on measuring outputs before blocks must do: about an hour of a fast core


def by_block(trial: WidthTrial) -> bool:
    """Whether the blocks' outputs are measured: as the recipe says, or by the work."""
    if trial.plan.search.sensitivity is not None:
        return trial.plan.search.sensitivity == "block"
    widths = sum(len(unit.widths) for unit in trial.units)
    numbers = sum(spec.nbytes // spec.dtype.itemsize for spec in trial.plan.checkpoint.parameters().values())
    rows = sum(next(iter(batch.values())).numel() for batch in trial.inputs.batches if batch)
    operations: float = widths / 2 * 2 * numbers * rows  # half of the blocks run, on average
    return operations > WORK


def measured(trial: WidthTrial, journal: Journal | None, team: Processes, progress: Progress) -> list[list[float]]:
    """Losses of every unit at each of its widths.

    The processes share the units; what a stopped run has measured is not measured again.

    Args:
        trial: the running model.
        journal: the first process's notes; None in the others.
        team: the processes.
        progress: told of every round.
    """
    blockwise = by_block(trial)
    done: dict[str, list[float]] = dict(team.gather(None if journal is None else journal.done)[0])
    tasks: list[tuple[str, Callable[[], list[float]]]] = []
    for unit in trial.units:
        local = blockwise and _block(trial, unit) is not None
        tasks.append((f"loss {unit.name}", lambda unit=unit, local=local: _losses(trial, unit, local)))  # type: ignore[misc]
    if blockwise:
        for block, units in _by_block(trial).items():
            tasks.append((_factor_name(trial, block), lambda units=units: _factor(trial, units)))  # type: ignore[misc]
    left = [task for task in tasks if task[0] not in done]
    for start in range(0, len(left), team.size):
        progress("sensitivities", start + len(tasks) - len(left), len(tasks))
        mine = left[start + team.rank : start + team.rank + 1]
        for results in team.gather([(name, measure()) for name, measure in mine]):
            for name, values in results:
                done[name] = values
                if journal is not None:
                    journal.record(name, values)
    return supplied(trial, [_scaled(trial, unit, done, blockwise) for unit in trial.units])


def supplied(trial: WidthTrial, losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """Losses with those that could not be measured taken from the others, by the median per weight at each width.

    An expert that few tokens reached, or a layer that the compared outputs do not depend on, would look free. A width
    that no measured unit has is taken for the one of as many bits with the next larger groups, or the next smaller.
    """
    known: dict[Width, list[float]] = {}
    unknown = [not max(row) or _unseen(trial, unit) for unit, row in zip(trial.units, losses, strict=True)]
    for unit, row, skip in zip(trial.units, losses, unknown, strict=True):
        for width, loss in zip(unit.widths, row, strict=True) if not skip else ():
            known.setdefault(width, []).append(loss / unit.weights)
    middle = {width: median(values) for width, values in known.items()}
    return [
        [_like(width, middle, loss / unit.weights) * unit.weights for width, loss in zip(unit.widths, row, strict=True)]
        if skip
        else list(row)
        for unit, row, skip in zip(trial.units, losses, unknown, strict=True)
    ]


def _like(width: Width, known: Mapping[Width, float], otherwise: float) -> float:
    """The loss of a width, or of the one that is most like it."""
    own = width.group or 0
    alike = [other for other in known if other.bits == width.bits]
    nearest = min(alike, key=lambda other: ((other.group or 0) < own, abs((other.group or 0) - own)), default=None)
    return otherwise if nearest is None else known[nearest]


def _unseen(trial: WidthTrial, unit: WidthGroup) -> bool:
    """Whether too few rows reached a unit's layers; an embedding is not given rows but tokens."""
    if any(layer.info.kind == "embedding" for layer in unit.layers):
        return False
    return max(trial.stats[name].count if name in trial.stats else 0 for name in unit.tensors) < MIN_ROWS


def _losses(trial: WidthTrial, unit: WidthGroup, local: bool) -> list[float]:
    changes = [trial.changes(unit, pick) for pick in range(len(unit.widths))]
    return [trial.probe.block_loss(change) if local else trial.probe.loss(change) for change in changes]


def _block(trial: WidthTrial, unit: WidthGroup) -> int | None:
    """The one block whose output tells of a unit.

    None where it is outside of all, in several, or in one that leaves keys and values for others.
    """
    blocks = {trial.probe.block_of(tensor) for tensor in unit.tensors if trial.probe.holds(tensor)}
    block = blocks.pop() if len(blocks) == 1 else None
    return None if block is None or trial.probe.shares(block) else block


def _by_block(trial: WidthTrial) -> dict[int, list[WidthGroup]]:
    units_of: dict[int, list[WidthGroup]] = {}
    for unit in trial.units:
        if (block := _block(trial, unit)) is not None:
            units_of.setdefault(block, []).append(unit)
    return units_of


def _factor_name(trial: WidthTrial, block: int) -> str:
    """What notes call a block's factor, which is of the layers that share a budget."""
    return f"factor {block} {trial.plan.budget}".strip()


def _factor(trial: WidthTrial, units: Sequence[WidthGroup]) -> list[float]:
    """Loss of the outputs per squared error of a block's output, at the second least of the bits."""
    changes: dict[str, Tensor] = {}
    for unit in units:
        bits = sorted({width.bits for width in unit.widths})[:2][-1]
        changes |= trial.changes(unit, next(n for n, width in enumerate(unit.widths) if width.bits == bits))
    error = trial.probe.block_loss(changes)
    return [trial.probe.loss(changes) / error if error else 0.0]


def _scaled(trial: WidthTrial, unit: WidthGroup, done: dict[str, list[float]], blockwise: bool) -> list[float]:
    block = _block(trial, unit) if blockwise else None
    factor = 1.0 if block is None else done[_factor_name(trial, block)][0]
    return [factor * value for value in done[f"loss {unit.name}"]]

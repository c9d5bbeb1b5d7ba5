"""Statistics for narrowing the residual stream, which all blocks share: what stays is chosen, then readers are fitted.

Both walks run the original model, block by block: the norm of a cut stream has another scale, which zeros in the place
of coordinates could not imitate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from aicompress.checkpoint.statistics import StatisticsFile, merged, merged_gradients
from aicompress.layer import InputStats
from aicompress.pipeline.calibration.gradients import differentiate, gradients
from aicompress.pipeline.calibration.record import record_of_files
from aicompress.pipeline.calibration.requirements import MIN_ROWS, foreign
from aicompress.pipeline.calibration.runner import Engine, Together
from aicompress.pipeline.step.workers import Processes
from aicompress.pipeline.structured.cutting import Cutting
from aicompress.pipeline.structured.plan import StructurePlan
from aicompress.pipeline.structured.units.gradient_scores import Read, importance

CHOICE, GRADED = frozenset({"mean_abs"}), frozenset({"gradients"})


def choose(work: Cutting, team: Processes, inputs: Future[dict[str, str]]) -> dict[str, Any]:
    """Choose the coordinates that stay by what their readers are given, and fit the readers.

    Returns:
        The record of the calibration data.
    """
    plan = work.plan
    if not plan.edit.changed:
        return {}
    readers, fitter = _readers(plan), _Fitter(work)
    if plan.request.stats:
        files = [StatisticsFile.open(path) for path in plan.request.stats]
        weighed = _weighed(work, partial(merged_gradients, files))
        seen = {name: replace(merged(files, name), gram=None) for name in readers} if CHOICE & plan.reads else {}
        work.choose(0, seen, weighed)
        for name in readers if plan.reads - CHOICE - GRADED else ():
            fitter.visit({name: merged(files, name)})
        work.warnings += [*foreign(files, inputs.result()), *fitter.scarce()]
        return record_of_files(files)
    gatherer, weighed = _Gatherer(), None
    if GRADED & plan.reads:
        with gradients(plan, team, work.say) as store:
            weighed = _weighed(work, store.read)
    engine = _walk(plan, team, CHOICE & plan.reads, gatherer, work.say)
    work.choose(0, gatherer.seen, weighed)
    _walk(plan, team, plan.reads - CHOICE - GRADED, fitter, work.say)
    work.warnings += fitter.scarce()
    return (engine or Engine.of(plan, readers, team)).record()


def _weighed(work: Cutting, read: Read) -> Tensor | None:
    """Importance of the coordinates by gradients, where the method asks for it."""
    plan = work.plan
    if not GRADED & plan.reads:
        return None
    found, reached = importance(plan.edit.structures[0], {layer.info.tensor: layer.info for layer in plan.layers}, read)
    if not reached:
        work.warnings.append("no gradient reached the stream: its coordinates are chosen by their weights")
    return found


def _readers(plan: StructurePlan) -> list[str]:
    """Layers that read the stream."""
    return [part.tensor for part in plan.edit.structures[0].of("consumer")]


def follow(plan: StructurePlan, team: Processes) -> None:
    """What the other processes do: run their share of the batches."""
    if GRADED & plan.reads:
        differentiate(plan, team, lambda moments: None, lambda done, total: None)
    for needs in (CHOICE & plan.reads, plan.reads - CHOICE - GRADED) if plan.edit.changed else ():
        _walk(plan, team, needs, None, lambda what: None)


def _walk(
    plan: StructurePlan, team: Processes, needs: frozenset[str], visitor: Any, say: Callable[[str], None]
) -> Engine | None:
    """One walk through the original model; none where nothing is needed."""
    if not needs:
        return None
    engine = Engine.of(plan, _readers(plan), team)
    together = Together(plan.checkpoint.parameters(), team, visitor)
    engine.walk(together, needs, False, lambda done, total: say(f"block {done} of {total}"))
    return engine


@dataclass
class _Gatherer:
    """Keeps the statistics of all blocks."""

    seen: dict[str, InputStats] = field(default_factory=dict)

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        self.seen |= stats
        return {}


@dataclass
class _Fitter:
    """Writes the readers of each block, fitted; the running model stays as it is.

    Attributes:
        work: the run, with the coordinates that stay.
        cut: readers that too few rows reached, and how many: they are cut as they are.
    """

    work: Cutting
    cut: dict[str, int] = field(default_factory=dict)

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        self.cut |= {name: inputs.count for name, inputs in stats.items() if inputs.count < MIN_ROWS}
        self.work.fit(0, {name: inputs for name, inputs in stats.items() if inputs.count >= MIN_ROWS})
        return {}

    def scarce(self) -> list[str]:
        """A warning that names the readers which too few calibration rows reached."""
        if not self.cut:
            return []
        some = [f"{name} ({count})" for name, count in list(self.cut.items())[:3]]
        shown = ", ".join(some) + (", ..." if len(self.cut) > 3 else "")
        return [f"{len(self.cut)} readers saw fewer than {MIN_ROWS} calibration rows and are not fitted: {shown}"]

"""Structural methods that need statistics: block by block, units are chosen and what reads the rest is made anew.

The running model keeps its shapes: a unit that goes is one whose consumer reads it with zeros, so the next block sees
what it will see in the cut model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
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
from aicompress.pipeline.structured import calibrated_hidden as residual
from aicompress.pipeline.structured.cutting import Cutting
from aicompress.pipeline.structured.plan import StructurePlan
from aicompress.pipeline.structured.units.gradient_scores import Read, importance


def choose(work: Cutting, team: Processes, inputs: Future[dict[str, str]]) -> dict[str, Any]:
    """Choose what stays of every structure by statistics of its consumers' inputs.

    Returns:
        The record of the calibration data.
    """
    plan, chooser = work.plan, _Chooser(work)
    if plan.method.units == "hidden":
        return residual.choose(work, team, inputs)
    if plan.request.stats:
        files = [StatisticsFile.open(path) for path in plan.request.stats]
        chooser.weigh(partial(merged_gradients, files))
        for structure in plan.edit.changed:
            chooser.visit({name: merged(files, name) for name in _consumers(plan, structure)})
        work.warnings += [*foreign(files, inputs.result()), *chooser.scarce()]
        return record_of_files(files)
    engine = Engine.of(plan, plan.edit.consumers, team)
    if "gradients" in plan.reads:
        with gradients(plan, team, work.say) as store:
            chooser.weigh(store.read)
    if plan.reads - {"gradients"}:
        _walk(plan, engine, Together(plan.checkpoint.parameters(), team, chooser))
    for structure in plan.edit.changed:  # no layer of the running model, such as one that it uses in its own way
        if structure not in work.kept:
            chooser.visit({name: InputStats(0) for name in _consumers(plan, structure)})
    work.warnings += chooser.scarce()
    return engine.record()


def follow(plan: StructurePlan, team: Processes) -> None:
    """What the other processes do while the first one chooses: run their share of the batches."""
    if plan.method.units == "hidden":
        residual.follow(plan, team)
        return
    engine = Engine.of(plan, plan.edit.consumers, team)
    if "gradients" in plan.reads:
        differentiate(plan, team, lambda moments: None, lambda done, total: None)
    if plan.reads - {"gradients"}:
        _walk(plan, engine, Together(plan.checkpoint.parameters(), team, None))


def _walk(plan: StructurePlan, engine: Engine, visitor: Together) -> None:
    def tell(done: int, total: int) -> None:
        if isinstance(visitor.first, _Chooser):
            visitor.first.work.say(f"block {done} of {total}")

    engine.walk(visitor, plan.reads - {"gradients"}, plan.method.compares(plan.recipe.method), tell)


def _consumers(plan: StructurePlan, structure: int) -> list[str]:
    return [part.tensor for part in plan.edit.structures[structure].of("consumer")]


@dataclass
class _Chooser:
    """Settles the structures of each block as their statistics come in.

    Attributes:
        work: the run.
        data_free: structures that too few rows reached, and how many.
        importance: of the units of each structure, by gradients.
    """

    work: Cutting
    data_free: dict[str, int] = field(default_factory=dict)
    importance: dict[int, Tensor] = field(default_factory=dict)

    def weigh(self, read: Read) -> None:
        """Add up w² E[g²] over the weights of each unit, if the method asks for it; w² where no gradient reaches."""
        plan = self.work.plan
        if "gradients" not in plan.reads:
            return
        infos = {layer.info.tensor: layer.info for layer in plan.layers}
        for number in plan.edit.changed:
            structure = plan.edit.structures[number]
            self.importance[number], reached = importance(structure, infos, read)
            if not reached:
                self.data_free[structure.name] = 0

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        """Settle every structure whose consumers are all there."""
        plan = self.work.plan
        read = bool(plan.reads - {"gradients"})
        found: dict[str, Tensor] = {}
        for number in plan.edit.changed:
            names = _consumers(plan, number)
            if number not in self.work.kept and all(name in stats for name in names):
                inputs = {name: self._enough(number, name, stats[name]) for name in names} if read else {}
                found |= self.work.settle(number, inputs, self.importance.get(number))
        return found

    def _enough(self, number: int, name: str, inputs: InputStats) -> InputStats:
        """Statistics of a consumer; without enough rows as if its inputs were white noise."""
        structure = self.work.plan.edit.structures[number]
        if inputs.count >= MIN_ROWS:
            if inputs.cross is not None:
                return inputs
            return dataclasses.replace(inputs, cross=inputs.gram, original_mean=inputs.mean)
        self.data_free[structure.name] = inputs.count
        span = next(part.span for part in structure.of("consumer") if part.tensor == name)
        return InputStats.white(structure.size * span)

    def scarce(self) -> list[str]:
        """A warning that names the structures which too few calibration rows reached."""
        if not self.data_free:
            return []
        some = [f"{name} ({count})" for name, count in list(self.data_free.items())[:3]]
        shown = ", ".join(some) + (", ..." if len(self.data_free) > 3 else "")
        total = len(self.work.plan.edit.changed)
        return [
            f"{len(self.data_free)} of {total} saw fewer than {MIN_ROWS} calibration rows and are data-free: {shown}"
        ]

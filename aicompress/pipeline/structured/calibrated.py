"""Structural methods that read statistics: units are chosen block by block, and what reads the rest is refitted.

The running model keeps its shapes: a unit that goes is one whose consumer reads it with zeros, so the next block sees
what it will see in the cut model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from aicompress.checkpoint.statistics import StatisticsFile, merged, merged_gradients
from aicompress.errors import listed
from aicompress.methods.structural import Structure
from aicompress.model.blocks.walk import Visitor
from aicompress.pipeline.calibration.data import record_of_files
from aicompress.pipeline.calibration.gradients import GradientReader, differentiate, gradients
from aicompress.pipeline.calibration.request import MIN_ROWS
from aicompress.pipeline.calibration.requirements import foreign
from aicompress.pipeline.calibration.runner import Broadcast, CalibrationRun
from aicompress.pipeline.step.workers import Processes
from aicompress.pipeline.structured.cutting import Cutting
from aicompress.pipeline.structured.reading import Reading, importance
from aicompress.statistics import InputStats

GRADIENTS = frozenset({"gradients"})


def choose(reading: Reading, work: Cutting, team: Processes, inputs: Future[dict[str, str]]) -> dict[str, Any]:
    """Choose what stays of every structure by statistics of its consumers' inputs.

    Returns:
        The record of the calibration data.
    """
    chooser = _Chooser(reading, work)
    if reading.request.stats:
        files = [StatisticsFile.open(path) for path in reading.request.stats]
        chooser.weigh(partial(merged_gradients, files))
        for number in reading.edit.changed:
            chooser.visit({name: merged(files, name) for name in _consumers(reading.edit.structures[number])})
        work.warnings += [*foreign(files, inputs.result()), *chooser.scarce()]
        return record_of_files(files)
    engine = CalibrationRun.of(reading, reading.edit.consumers, team)
    if GRADIENTS & reading.needs:
        with gradients(reading, reading.output, team, work.say) as store:
            chooser.weigh(store.read)
    _walk(reading, engine, Broadcast(reading.checkpoint.parameters(), team, chooser), work.say)
    for number in reading.edit.changed:  # no layer of the running model, such as one that it uses in its own way
        if number not in work.kept:
            chooser.visit({name: InputStats(0) for name in _consumers(reading.edit.structures[number])})
    work.warnings += chooser.scarce()
    return engine.record()


def follow(reading: Reading, team: Processes) -> None:
    """What the other processes do while the first one chooses: run their share of the batches."""
    engine = CalibrationRun.of(reading, reading.edit.consumers, team)
    if GRADIENTS & reading.needs:
        differentiate(reading, team, lambda moments: None, lambda done, total: None)
    _walk(reading, engine, Broadcast(reading.checkpoint.parameters(), team, None), lambda what: None)


def _walk(reading: Reading, engine: CalibrationRun, visitor: Broadcast, say: Callable[[str], None]) -> None:
    """One walk through the model with the statistics of inputs that are read, if there are any."""
    needs = reading.needs - GRADIENTS
    if needs:
        engine.walk(visitor, needs, reading.compares, lambda done, total: say(f"block {done} of {total}"))


def _consumers(structure: Structure) -> list[str]:
    return [part.tensor for part in structure.of("consumer")]


@dataclass
class _Chooser(Visitor):
    """Resolves the structures of each block as their statistics come in.

    Attributes:
        reading: the statistics that are read.
        work: the run.
        data_free: structures that too few rows reached, and how many.
        importance: of the units of each structure, by gradients.
    """

    reading: Reading
    work: Cutting
    data_free: dict[str, int] = field(default_factory=dict)
    importance: dict[int, Tensor] = field(default_factory=dict)

    def weigh(self, read: GradientReader) -> None:
        """Add up w² E[g²] over the weights of each unit, if the method asks for it; w² where no gradient reaches."""
        if not GRADIENTS & self.reading.needs:
            return
        infos = {layer.info.tensor: layer.info for layer in self.reading.layers}
        for number in self.reading.edit.changed:
            structure = self.reading.edit.structures[number]
            self.importance[number], reached = importance(structure, infos, read)
            if not reached:
                self.data_free[structure.name] = 0

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        """Resolve every structure whose consumers are all there."""
        needed = bool(self.reading.needs - GRADIENTS)
        values: dict[str, Tensor] = {}
        for number in self.reading.edit.changed:
            names = _consumers(self.reading.edit.structures[number])
            if number not in self.work.kept and all(name in stats for name in names):
                inputs = {name: self._enough(number, name, stats[name]) for name in names} if needed else {}
                values |= self.work.resolve(number, inputs, self.importance.get(number))
        return values

    def _enough(self, number: int, name: str, inputs: InputStats) -> InputStats:
        """Statistics of a consumer; without enough rows as if its inputs were white noise."""
        structure = self.reading.edit.structures[number]
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
        shown = listed(f"{name} ({count})" for name, count in self.data_free.items())
        total = len(self.reading.edit.changed)
        return [
            f"{len(self.data_free)} of {total} saw fewer than {MIN_ROWS} calibration rows and are data-free: {shown}"
        ]

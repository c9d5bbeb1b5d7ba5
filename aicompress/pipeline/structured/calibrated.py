"""Structural methods that read statistics: units are chosen, and what reads the rest is refitted.

Units inside a block are chosen block by block. The running model keeps its shapes: a unit that goes is one whose
consumer reads it with zeros, so the next block sees what it will see in the cut model.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from aicompress.checkpoint.statistics import StatisticsFile, merged, merged_gradients
from aicompress.errors import listed
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


@dataclass
class Chooser(Visitor, ABC):
    """Chooses what stays of every structure by statistics, in the process that writes.

    Attributes:
        reading: the statistics that are read.
        work: the run.
        few: what too few rows reached, and how many.
    """

    reading: Reading
    work: Cutting
    few: dict[str, int] = field(default_factory=dict)

    @staticmethod
    @abstractmethod
    def walks(reading: Reading) -> Sequence[tuple[frozenset[str], bool]]:
        """Statistics that each walk through the model collects, and whether both models' inputs are compared."""

    @abstractmethod
    def weigh(self, read: GradientReader) -> None:
        """Take the importance of the units by gradients."""

    @abstractmethod
    def visitors(self) -> Iterator[Visitor]:
        """What each walk tells of its statistics; is gone on with after the last one, too."""

    @abstractmethod
    def look_up(self, of: Callable[[str], InputStats]) -> None:
        """Take the statistics of inputs from files, in the place of walks."""

    @abstractmethod
    def scarce(self) -> list[str]:
        """A warning that names what too few calibration rows reached."""


def choose(chooser: Chooser, team: Processes, inputs: Future[dict[str, str]]) -> dict[str, Any]:
    """Choose what stays by statistics of inputs, and of gradients where the method reads them.

    Returns:
        The record of the calibration data.
    """
    reading, work, engine = chooser.reading, chooser.work, None
    if reading.request.stats:
        files = [StatisticsFile.open(path) for path in reading.request.stats]
        if GRADIENTS & reading.needs:
            chooser.weigh(partial(merged_gradients, files))
        chooser.look_up(partial(merged, files))
        work.warnings += [*foreign(files, inputs.result()), *chooser.scarce()]
        return record_of_files(files)
    if GRADIENTS & reading.needs:
        with gradients(reading, reading.output, team, work.say) as store:
            chooser.weigh(store.read)
    for visitor, walk in zip(chooser.visitors(), chooser.walks(reading), strict=False):
        engine = _walk(reading, team, walk, visitor, work.say) or engine
    work.warnings += chooser.scarce()
    return (engine or CalibrationRun.of(reading, reading.edit.consumers, team)).record()


def follow(chooser: type[Chooser], reading: Reading, team: Processes) -> None:
    """What the other processes do while the first one chooses: run their share of the batches."""
    if GRADIENTS & reading.needs:
        differentiate(reading, team, lambda moments: None, lambda done, total: None)
    for walk in chooser.walks(reading):
        _walk(reading, team, walk, None, lambda what: None)


def _walk(
    reading: Reading,
    team: Processes,
    walk: tuple[frozenset[str], bool],
    visitor: Visitor | None,
    say: Callable[[str], None],
) -> CalibrationRun | None:
    """One walk through the model; none where nothing is needed."""
    needs, compares = walk
    if not needs:
        return None
    engine = CalibrationRun.of(reading, reading.edit.consumers, team)
    together = Broadcast(reading.checkpoint.parameters(), team, visitor)
    engine.walk(together, needs, compares, lambda done, total: say(f"block {done} of {total}"))
    return engine


@dataclass
class BlockChooser(Chooser):
    """Resolves the structures of each block as their statistics come in.

    Attributes:
        importance: of the units of each structure, by gradients.
    """

    importance: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def walks(reading: Reading) -> Sequence[tuple[frozenset[str], bool]]:
        """One, in which later blocks see what earlier ones have become."""
        return [(reading.needs - GRADIENTS, reading.compares)]

    def weigh(self, read: GradientReader) -> None:
        """Add up w² E[g²] over the weights of each unit; w² where no gradient reaches."""
        infos = {layer.info.tensor: layer.info for layer in self.reading.layers}
        for number in self.reading.edit.changed:
            structure = self.reading.edit.structures[number]
            self.importance[number], reached = importance(structure, infos, read)
            if not reached:
                self.few[structure.name] = 0

    def look_up(self, of: Callable[[str], InputStats]) -> None:
        """Resolve every structure that no statistics have resolved yet."""
        for number in self.reading.edit.changed:
            if number not in self.work.kept:
                self.visit({name: of(name) for name in self._consumers(number)})

    def visitors(self) -> Iterator[Visitor]:
        """Itself; what is no layer of the running model, such as one that it uses in its own way, is resolved last."""
        yield self
        self.look_up(lambda name: InputStats(0))

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        """Resolve every structure whose consumers are all there."""
        needed = bool(self.reading.needs - GRADIENTS)
        values: dict[str, Tensor] = {}
        for number in self.reading.edit.changed:
            names = self._consumers(number)
            if number not in self.work.kept and all(name in stats for name in names):
                inputs = {name: self._enough(number, name, stats[name]) for name in names} if needed else {}
                values |= self.work.resolve(number, inputs, self.importance.get(number))
        return values

    def _consumers(self, number: int) -> list[str]:
        return [part.tensor for part in self.reading.edit.structures[number].of("consumer")]

    def _enough(self, number: int, name: str, inputs: InputStats) -> InputStats:
        """Statistics of a consumer; without enough rows as if its inputs were white noise."""
        structure = self.reading.edit.structures[number]
        if inputs.count >= MIN_ROWS:
            if inputs.cross is not None:
                return inputs
            return dataclasses.replace(inputs, cross=inputs.gram, original_mean=inputs.mean)
        self.few[structure.name] = inputs.count
        span = next(part.span for part in structure.of("consumer") if part.tensor == name)
        return InputStats.white(structure.size * span)

    def scarce(self) -> list[str]:
        """A warning that names the structures which too few calibration rows reached."""
        if not self.few:
            return []
        shown = listed(f"{name} ({count})" for name, count in self.few.items())
        total = len(self.reading.edit.changed)
        return [f"{len(self.few)} of {total} saw fewer than {MIN_ROWS} calibration rows and are data-free: {shown}"]

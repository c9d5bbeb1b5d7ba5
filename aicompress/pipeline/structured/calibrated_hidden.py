"""Statistics for narrowing the residual stream, which all blocks share: coordinates are chosen, then readers fitted.

Both walks run the original model, block by block: the norm of a cut stream has another scale, which zeros in the place
of coordinates could not imitate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from aicompress.checkpoint.statistics import StatisticsFile, merged, merged_gradients
from aicompress.errors import listed
from aicompress.model.blocks.walk import Gatherer, Visitor
from aicompress.pipeline.calibration.data import record_of_files
from aicompress.pipeline.calibration.gradients import GradientReader, differentiate, gradients
from aicompress.pipeline.calibration.request import MIN_ROWS
from aicompress.pipeline.calibration.requirements import foreign
from aicompress.pipeline.calibration.runner import Broadcast, CalibrationRun
from aicompress.pipeline.step.workers import Processes
from aicompress.pipeline.structured.calibrated import GRADIENTS
from aicompress.pipeline.structured.cutting import Cutting
from aicompress.pipeline.structured.reading import Reading, importance
from aicompress.statistics import InputStats

CHOICE = frozenset({"mean_abs"})


def choose(reading: Reading, work: Cutting, team: Processes, inputs: Future[dict[str, str]]) -> dict[str, Any]:
    """Choose the coordinates that stay by what their readers are given, and fit the readers.

    Returns:
        The record of the calibration data.
    """
    if not reading.edit.changed:
        return {}
    readers, fitter = _readers(reading), _Fitter(work)
    if reading.request.stats:
        files = [StatisticsFile.open(path) for path in reading.request.stats]
        scores = _importance(reading, work, partial(merged_gradients, files))
        seen = {name: replace(merged(files, name), gram=None) for name in readers} if CHOICE & reading.needs else {}
        work.choose(0, seen, scores)
        for name in readers if _fitted(reading) else ():
            fitter.visit({name: merged(files, name)})
        work.warnings += [*foreign(files, inputs.result()), *fitter.scarce()]
        return record_of_files(files)
    gatherer, scores = Gatherer(), None
    if GRADIENTS & reading.needs:
        with gradients(reading, reading.output, team, work.say) as store:
            scores = _importance(reading, work, store.read)
    engine = _walk(reading, team, CHOICE & reading.needs, gatherer, work.say)
    work.choose(0, gatherer.seen, scores)
    _walk(reading, team, _fitted(reading), fitter, work.say)
    work.warnings += fitter.scarce()
    return (engine or CalibrationRun.of(reading, readers, team)).record()


def follow(reading: Reading, team: Processes) -> None:
    """What the other processes do: run their share of the batches."""
    if GRADIENTS & reading.needs:
        differentiate(reading, team, lambda moments: None, lambda done, total: None)
    for needs in (CHOICE & reading.needs, _fitted(reading)) if reading.edit.changed else ():
        _walk(reading, team, needs, None, lambda what: None)


def _importance(reading: Reading, work: Cutting, read: GradientReader) -> Tensor | None:
    """Importance of the coordinates by gradients, where the method asks for it."""
    if not GRADIENTS & reading.needs:
        return None
    infos = {layer.info.tensor: layer.info for layer in reading.layers}
    scores, reached = importance(reading.edit.structures[0], infos, read)
    if not reached:
        work.warnings.append("no gradient reached the stream: its coordinates are chosen by their weights")
    return scores


def _fitted(reading: Reading) -> frozenset[str]:
    """Statistics that the fit of the readers needs; none where they are not fitted."""
    return reading.needs - CHOICE - GRADIENTS


def _readers(reading: Reading) -> list[str]:
    """Layers that read the stream."""
    return [part.tensor for part in reading.edit.structures[0].of("consumer")]


def _walk(
    reading: Reading, team: Processes, needs: frozenset[str], visitor: Any, say: Callable[[str], None]
) -> CalibrationRun | None:
    """One walk through the original model; none where nothing is needed."""
    if not needs:
        return None
    engine = CalibrationRun.of(reading, _readers(reading), team)
    together = Broadcast(reading.checkpoint.parameters(), team, visitor)
    engine.walk(together, needs, False, lambda done, total: say(f"block {done} of {total}"))
    return engine


@dataclass
class _Fitter(Visitor):
    """Writes the readers of each block, fitted; the running model stays as it is.

    Attributes:
        work: the run, with the coordinates that stay.
        cut: readers that too few rows reached, and how many: they are cut as they are.
    """

    work: Cutting
    cut: dict[str, int] = field(default_factory=dict)

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        self.cut |= {name: inputs.count for name, inputs in stats.items() if inputs.count < MIN_ROWS}
        self.work.fit(0, {name: inputs for name, inputs in stats.items() if inputs.count >= MIN_ROWS})
        return {}

    def scarce(self) -> list[str]:
        """A warning that names the readers which too few calibration rows reached."""
        if not self.cut:
            return []
        shown = listed(f"{name} ({count})" for name, count in self.cut.items())
        return [f"{len(self.cut)} readers saw fewer than {MIN_ROWS} calibration rows and are not fitted: {shown}"]

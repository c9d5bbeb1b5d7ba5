"""Statistics of the original model, collected into a file for this step and later ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.statistics import StatisticsWriter
from aicompress.methods.method import OF_GRADIENTS
from aicompress.pipeline.calibration.gradients import differentiate
from aicompress.pipeline.calibration.joints import MOMENTS
from aicompress.pipeline.calibration.request import Step
from aicompress.pipeline.calibration.runner import CalibrationRun
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes
from aicompress.statistics import InputStats, column_statistics


@dataclass(frozen=True)
class Wanted:
    """What to collect.

    Attributes:
        tensors: parameters whose layers' inputs are looked at.
        needs: which statistics.
    """

    tensors: Sequence[str]
    needs: frozenset[str]


def collect(plan: Step, wanted: Wanted, path: Path, team: Processes, progress: Callable[[str, int, int], None]) -> None:
    """Run the model and keep the statistics of layers' inputs; the first process writes the file.

    Raises:
        RecipeError: the calibration data does not fit the model.
    """
    engine = CalibrationRun.of(plan, wanted.tensors, team)
    needs, graded = (wanted.needs - OF_GRADIENTS) | _always(), bool(wanted.needs & OF_GRADIENTS)

    def tell(done: int, total: int) -> None:
        progress("statistics", done, total)

    def back(done: int, total: int) -> None:
        progress("gradients", done, total)

    if team.rank != 0:
        engine.walk(_Keeper(None), needs, False, tell, changes=False)
        if graded:
            differentiate(plan, team, lambda moments: None, back, wanted.needs)
        return
    with StatisticsWriter(path) as writer:
        engine.walk(_Keeper(writer), needs, False, tell, changes=False)
        writer.add({name: InputStats(0) for name in wanted.tensors if name not in engine.wanted})
        if graded:
            differentiate(plan, team, writer.add_gradients, back, wanted.needs)
        writer.seal(digests(plan.checkpoint.source), engine.record())


@dataclass(frozen=True)
class _Keeper:
    """Keeps statistics and changes nothing."""

    writer: StatisticsWriter | None

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        if self.writer is not None:
            self.writer.add(stats)
        return {}


def _always() -> frozenset[str]:
    """Statistics that cost next to nothing, and make a file fit more methods."""
    return frozenset(name for name, statistic in column_statistics().items() if statistic.of_gram is None)


def kept(needs: frozenset[str]) -> frozenset[str]:
    """Statistics that a file which the user keeps holds: with moments of gradients, which fit more methods."""
    return needs | {MOMENTS} if needs & OF_GRADIENTS else needs


def with_statistics(plan: Step, wanted: Callable[[], Wanted], team: Processes, progress: Progress) -> bool:
    """Make sure that the files of statistics that a step names exist; False for a step that names none."""
    there = team.gather(plan.request.reads_files)[0]
    if plan.request.stats and not there:
        collect(plan, wanted(), plan.request.stats[0], team, progress)
        team.wait()
    return bool(plan.request.stats)

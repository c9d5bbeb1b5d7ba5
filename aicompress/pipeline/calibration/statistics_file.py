"""Statistics of the original model, collected into a file for this step and later ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.statistics import StatisticsWriter
from aicompress.methods.method import OF_GRADIENTS
from aicompress.model.blocks.walk import Visitor
from aicompress.pipeline.calibration.gradients import MOMENTS, differentiate
from aicompress.pipeline.calibration.request import Step
from aicompress.pipeline.calibration.runner import CalibrationRun
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes
from aicompress.statistics import InputStats, column_statistics


def collect(
    step: Step, tensors: Sequence[str], needs: frozenset[str], path: Path, team: Processes, progress: Progress
) -> None:
    """Run the model and keep the statistics of some parameters' inputs; the first process writes the file.

    Raises:
        RecipeError: the calibration data does not fit the model.
    """
    engine = CalibrationRun.of(step, tensors, team)
    graded = bool(needs & OF_GRADIENTS)
    tell, back = partial(progress, "statistics"), partial(progress, "gradients")
    with StatisticsWriter(path) if team.rank == 0 else nullcontext() as writer:
        engine.walk(_Keeper(writer), (needs - OF_GRADIENTS) | _always(), False, tell, changes=False)
        if graded:
            differentiate(step, team, writer.add_gradients if writer else lambda moments: None, back, needs)
        if writer is not None:
            writer.add({name: InputStats(0) for name in tensors if name not in engine.wanted})
            writer.seal(digests(step.checkpoint.source), engine.record())


@dataclass(frozen=True)
class _Keeper(Visitor):
    """Keeps statistics and changes nothing."""

    writer: StatisticsWriter | None

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


def with_statistics(
    step: Step, tensors: Sequence[str], needs: frozenset[str], team: Processes, progress: Progress
) -> bool:
    """Make sure that the files of statistics that a step names exist; False for a step that names none."""
    there = team.gather(step.request.reads_files)[0]
    if step.request.stats and not there:
        collect(step, tensors, needs, step.request.stats[0], team, progress)
        team.wait()
    return bool(step.request.stats)

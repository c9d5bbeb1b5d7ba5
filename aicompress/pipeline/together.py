"""What the processes of a step do together: the first one writes, the others help it and return its report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aicompress.pipeline.calibration.request import Step
from aicompress.pipeline.finish import written_report
from aicompress.pipeline.output import Output
from aicompress.pipeline.processes import Processes
from aicompress.pipeline.progress import Progress
from aicompress.report.model import Report

if TYPE_CHECKING:
    from aicompress.pipeline.calibration.collect import Wanted


def led(output: Output, team: Processes, lead: Callable[[], Report], follow: Callable[[], None]) -> Report:
    """The report of an output that the first process writes.

    Args:
        output: what is written.
        team: the processes.
        lead: what the first one does.
        follow: what the others do meanwhile: their share of the calibration samples.
    """
    if team.rank == 0:
        report = lead()
        team.wait()
        return report
    follow()
    team.wait()
    return written_report(output)


def with_statistics(plan: Step, wanted: Callable[[], Wanted], team: Processes, progress: Progress) -> bool:
    """Make sure that the files of statistics that a step names exist; False for a step that names none."""
    there = team.gather(plan.request.reads_files)[0]
    if plan.request.stats and not there:
        from aicompress.pipeline.calibration.collect import collect

        collect(plan, wanted(), plan.request.stats[0], team, progress)
        team.wait()
    return bool(plan.request.stats)

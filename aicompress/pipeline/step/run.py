"""What the processes of a step do together: the first one writes, the others help it and return its report."""

from __future__ import annotations

from collections.abc import Callable

from aicompress.pipeline.step.output import Output
from aicompress.pipeline.step.report import written_report
from aicompress.pipeline.step.workers import Processes
from aicompress.report.model import Report


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

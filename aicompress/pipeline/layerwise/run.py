"""Run a layer-wise plan: one layer in memory at a time, bytes streamed to the output, everything measured."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from aicompress.checkpoint import CheckpointWriter
from aicompress.checkpoint.journal import Journal, require_same
from aicompress.checkpoint.place import working_path
from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.pipeline.calibration.statistics_file import with_statistics
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.layerwise.row_blocks import load_compiled
from aicompress.pipeline.layerwise.work import Work
from aicompress.pipeline.step.digests import fingerprint, hashing
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import with_digests
from aicompress.pipeline.step.report import Facts, finish
from aicompress.pipeline.step.run import led
from aicompress.pipeline.step.workers import Processes, processes
from aicompress.report.model import Report

if TYPE_CHECKING:
    from aicompress.pipeline.calibration.statistics_file import Wanted
    from aicompress.pipeline.layerwise.allocation.bits import Found


def run(plan: Plan, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside.

    Under torchrun the processes share the calibration samples and the first one writes; the others return its report.

    Raises:
        CheckpointError: a weight holds NaN or infinity; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    from aicompress.pipeline.layerwise.allocation.bits import decided

    options = options or Options()
    team = processes(torch.device("cpu"))
    team.wait()  # until all have made their plans: those refuse an output that is there
    if plan.surveys:
        from aicompress.pipeline.layerwise.allocation.sparsity import allocated

        plan = allocated(plan, team, options.progress)
    found = decided(plan, options.resume, team, options.progress)
    plan = found.plan
    collected = with_statistics(plan, lambda: _wanted(plan), team, options.progress)

    def follow() -> None:
        if plan.needs and not collected:
            from aicompress.pipeline.layerwise import calibrated

            calibrated.follow(plan, team)

    return led(plan.output, team, lambda: _lead(found, options, team), follow)


def _wanted(plan: Plan) -> Wanted:
    """What a file of statistics must hold for a plan."""
    from aicompress.pipeline.calibration.statistics_file import Wanted
    from aicompress.pipeline.layerwise.plan import selected

    return Wanted(selected(plan), plan.needs | plan.surveys)


def _lead(found: Found, options: Options, team: Processes) -> Report:
    """What the process does that writes."""
    load_compiled(found.plan.method, found.plan.layers)  # before the clock starts, as torch was loaded
    start = time.perf_counter() - found.seconds
    plan = found.plan.rewritable()
    output = plan.output
    mark = fingerprint(plan)
    if options.resume:
        require_same(working_path(output.destination.path), mark)
    with (
        CheckpointWriter(output.destination.path, output.shards, options.resume) as writer,
        hashing(plan.checkpoint.source) as inputs,
    ):
        journal = (Journal.resume if options.resume else Journal.start)(writer.work, mark)
        found.keep(writer.work)
        work = Work(plan, writer, journal, options.progress)
        for name in output.parameters.keys() & journal.done.keys():
            work.tell(name)
        calibration = _calibrated(work, team, inputs) if plan.needs else {}
        work.write_all([name for name in output.parameters if name not in journal.done])
        final = with_digests(output, inputs.result())
        warnings = (*plan.warnings, *work.warnings)
        source = plan.checkpoint.original
        facts = Facts(plan.recipe, source, plan.kinds, work.rows(), warnings, start, calibration=calibration)
        facts = dataclasses.replace(facts, bits=found.record)
        found.forget(writer.work)
        return finish(facts, final, writer, options.latency)


def _calibrated(work: Work, team: Processes, inputs: Future[dict[str, str]]) -> dict[str, Any]:
    """Write the selected layers of a method that reads statistics; returns the record of the calibration data."""
    from aicompress.pipeline.calibration.requirements import foreign
    from aicompress.pipeline.layerwise import calibrated

    if work.plan.request.stats:
        files = [StatisticsFile.open(path) for path in work.plan.request.stats]
        record = calibrated.compress_from_files(work, files)
        work.warnings += foreign(files, inputs.result())
    else:
        record = calibrated.compress(work, team)
    work.warnings += calibrated.scarce(work)
    return record

"""Run a layer-wise plan: one layer in memory at a time, bytes streamed to the output, every layer measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.pipeline.calibration.gradients import GradientReader
from aicompress.pipeline.calibration.requirements import foreign
from aicompress.pipeline.calibration.statistics_file import kept, with_statistics
from aicompress.pipeline.layerwise import calibrated
from aicompress.pipeline.layerwise.allocation.amounts import allocated, files_of_original
from aicompress.pipeline.layerwise.allocation.decision import Decision, decided
from aicompress.pipeline.layerwise.plan import Plan, fingerprint_of
from aicompress.pipeline.layerwise.report_rows import better_rounded, coarse, vanished
from aicompress.pipeline.layerwise.rows import malloc
from aicompress.pipeline.layerwise.rows.writing import load_compiled
from aicompress.pipeline.layerwise.untouched import untouched
from aicompress.pipeline.layerwise.work import Work
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput, StepRun, assembled, run_step
from aicompress.pipeline.step.workers import Processes
from aicompress.report.model import Report


def run(plan: Plan, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside.

    Under torchrun the processes share the calibration samples and the first one writes; the others return its report.

    Raises:
        CheckpointError: a weight holds NaN or infinity; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    options = options or Options()
    team = assembled(torch.device("cpu"))
    start = time.perf_counter()
    with allocated(plan, team, options.progress) as (explicit, known, files):
        surveyed = time.perf_counter() - start
        decision = decided(explicit, options.resume, team, options.progress)
        decision = replace(decision, seconds=surveyed + decision.seconds)
        if files is None and across(decision.plan):
            with files_of_original(decision.plan, explicit.needs, team, options.progress) as original:
                return _written(decision, known, original, team, options)
        return _written(decision, known, files, team, options)


def _written(
    decision: Decision,
    known: GradientReader | None,
    files: list[StatisticsFile] | None,
    team: Processes,
    options: Options,
) -> Report:
    """Write the output of a decided plan; `files` hold what is known of the original model where that is read."""
    plan = decision.plan
    from_files = with_statistics(plan, plan.selected, kept(plan.needs), team, options.progress)
    malloc.share_one_arena()
    load_compiled(plan.method, plan.layers)  # before the clock starts, as torch was loaded
    step = StepRun(
        checkpoint=plan.checkpoint.original,
        kinds=plan.kinds,
        recipe=plan.recipe,
        output=plan.output,
        write=partial(_write, decision, partial(_calibrated, known, files, team), options.progress),
        follow=partial(calibrated.follow, plan, known, team)
        if plan.needs and not from_files and files is None
        else lambda: None,
        fingerprint=fingerprint_of(plan),
        seconds=decision.seconds,
    )
    return run_step(step, team, options)


def _write(
    decision: Decision, calibrate: Callable[[Work, OpenOutput], dict[str, Any]], progress: Progress, opened: OpenOutput
) -> Results:
    """Write every parameter that a stopped run has not written."""
    plan = decision.plan.rewritable()
    decision.keep(opened.writer.work)
    work = Work(plan, opened.writer, opened.journal, progress)
    for name in plan.output.parameters.keys() & work.journal.done.keys():
        work.tell(name)
    calibration = calibrate(work, opened) if plan.needs else dict(plan.measured_on)
    work.write_all([name for name in plan.output.parameters if name not in work.journal.done])
    decision.forget(opened.writer.work)
    rows = work.rows()
    warnings = (*plan.warnings, *work.warnings, *coarse(rows), *vanished(rows), *better_rounded(rows))
    left = untouched(plan.checkpoint, plan.layers)
    return Results(rows, warnings, calibration=calibration, bits=decision.record, untouched=left, notes=plan.notes)


def across(plan: Plan) -> bool:
    """Whether layers of several blocks are compressed together, by what the original model shows of them."""
    return plan.method.shares is not None and plan.method.shares.across and bool(plan.needs) and not plan.request.stats


def _calibrated(
    known: GradientReader | None, own: list[StatisticsFile] | None, team: Processes, work: Work, opened: OpenOutput
) -> dict[str, Any]:
    """Write the selected layers of a method that reads statistics; returns the record of the calibration data."""
    if own is not None:
        calibrated.compress_from_files(work, own)
        record = dict(own[0].calibration)
    elif work.plan.request.stats:
        files = [StatisticsFile.open(path) for path in work.plan.request.stats]
        record = calibrated.compress_from_files(work, files)
        work.warnings += foreign(files, opened.input_digests.result())
    else:
        record = calibrated.compress(work, known, team)
    work.warnings += calibrated.scarce(work)
    return record

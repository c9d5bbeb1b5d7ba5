"""Run a structural plan: tensors are cut, dropped and renamed, one in memory at a time."""

from __future__ import annotations

from functools import partial

import torch

from aicompress.pipeline.calibration.statistics_file import with_statistics
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput, StepRun, assembled, run_step
from aicompress.pipeline.step.workers import Processes
from aicompress.pipeline.structured.calibrated import choose, follow
from aicompress.pipeline.structured.cutting import Cutting
from aicompress.pipeline.structured.plan import StructurePlan
from aicompress.report.model import Report


def run(plan: StructurePlan, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside. A stopped run starts anew.

    Under torchrun the processes share the calibration samples and the first one writes; the others return its report.

    Raises:
        CheckpointError: a weight holds NaN or infinity; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    options = options or Options()
    team = assembled(torch.device("cpu"))
    plan = plan.decided(options.progress)
    reading = plan.reading
    from_files = with_statistics(reading, reading.tensors, reading.needs, team, options.progress)
    shares = reading.needs and not from_files
    step = StepRun(
        checkpoint=plan.checkpoint,
        kinds=plan.kinds,
        recipe=plan.recipe,
        output=plan.output,
        write=partial(_write, plan, team, options.progress),
        follow=partial(follow, plan.choice.unit.chooser, reading, team) if shares else lambda: None,
    )
    return run_step(step, team, options)


def _write(plan: StructurePlan, team: Processes, progress: Progress, opened: OpenOutput) -> Results:
    """Choose the units that stay where the plan has not, and write every parameter."""
    work = Cutting(plan.checkpoint, plan.edit, plan.output, plan.choice.pruner, opened.writer, progress)
    calibration = dict(plan.edit.calibration)
    if plan.needs:
        calibration = choose(plan.choice.unit.chooser(plan.reading, work), team, opened.input_digests)
    for name in plan.output.parameters:
        if name not in work.seconds:
            work.write(name)
    rows = plan.rows({plan.edit.changes[name].source: seconds for name, seconds in work.seconds.items()})
    warnings, figures = (*plan.warnings, *work.warnings), dict(plan.edit.figures)
    return Results(rows, warnings, calibration=calibration, notes=plan.told, vocabulary=figures)

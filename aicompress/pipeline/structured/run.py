"""Run a structural plan: tensors are cut, dropped and renamed, one in memory at a time."""

from __future__ import annotations

import time

import torch

from aicompress.checkpoint import CheckpointWriter
from aicompress.pipeline.calibration.statistics_file import Wanted, with_statistics
from aicompress.pipeline.step.digests import hashing
from aicompress.pipeline.step.options import ANEW, Options
from aicompress.pipeline.step.output import with_digests
from aicompress.pipeline.step.report import Facts, finish
from aicompress.pipeline.step.run import led
from aicompress.pipeline.step.workers import Processes, processes
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
    team = processes(torch.device("cpu"))
    team.wait()  # until all have made their plans: those refuse an output that is there
    plan = plan.decided(options.progress)
    reading = plan.reading
    collected = with_statistics(reading, lambda: Wanted(reading.tensors, reading.needs), team, options.progress)

    def follow() -> None:
        if reading.needs and not collected:
            plan.choice.unit.follow(reading, team)

    return led(plan.output, team, lambda: _lead(plan, options, team), follow)


def _lead(plan: StructurePlan, options: Options, team: Processes) -> Report:
    """What the process does that writes."""
    start = time.perf_counter()
    output = plan.output
    with (
        CheckpointWriter(output.destination.path, output.shards) as writer,
        hashing(plan.checkpoint.source) as inputs,
    ):
        work = Cutting(plan.checkpoint, plan.edit, output, plan.pruner, writer, options.progress)
        calibration = dict(plan.edit.calibration)
        if plan.needs:
            calibration = plan.choice.unit.choose(plan.reading, work, team, inputs)
        for name in output.parameters:
            if name not in work.seconds:
                work.write(name)
        final = with_digests(output, inputs.result())
        warnings = (*plan.warnings, *work.warnings, *([ANEW] if options.resume else []))
        rows = plan.rows({plan.edit.changes[name].source: seconds for name, seconds in work.seconds.items()})
        facts = Facts(plan.recipe, plan.checkpoint, plan.kinds, rows, warnings, start, calibration=calibration)
        return finish(facts, final, writer, options.latency)

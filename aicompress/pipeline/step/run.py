"""Run a planned step: the first process writes the output and its report, the others help it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.checkpoint.journal import NAME, Journal, require_same
from aicompress.checkpoint.place import shared_mode, working_path
from aicompress.checkpoint.reader import digests
from aicompress.errors import first_line
from aicompress.layer import Kind
from aicompress.pipeline.step.blocks import Block, put_block
from aicompress.pipeline.step.digests import hashing, with_digests
from aicompress.pipeline.step.options import Mode, Options, Progress
from aicompress.pipeline.step.output import Output
from aicompress.pipeline.step.plan import StepPlan
from aicompress.pipeline.step.report import Results, add_report, build_report, written_report
from aicompress.pipeline.step.sides import side_of
from aicompress.pipeline.step.storage import entropy_coded_output, sizes
from aicompress.pipeline.step.timing.latency import compare
from aicompress.pipeline.step.workers import Processes, processes
from aicompress.recipe import Recipe
from aicompress.recipe.distillation import DistillRecipe
from aicompress.recipe.made import ExportRecipe
from aicompress.report.model import Latency, Report

STARTS_ANEW = "nothing of a stopped run was used: this kind of step starts anew"


@dataclass(frozen=True)
class OpenOutput:
    """An output that is being written.

    Attributes:
        writer: takes the tensors.
        journal: parameters that are written already; empty and without a file for a step that cannot be resumed.
        input_digests: sha256 of the input's files by name, as soon as they are computed.
    """

    writer: CheckpointWriter
    journal: Journal
    input_digests: Future[dict[str, str]]


@dataclass(frozen=True)
class StepRun:
    """What a driver asks to be run.

    Attributes:
        checkpoint: the input.
        kinds: what the model definition says of the input's parameters.
        recipe: what was asked for.
        output: every file and byte of the output.
        write: writes every parameter of the output; the first process does it.
        follow: what the other processes do meanwhile, such as their share of the calibration samples.
        fingerprint: digest of everything that decides the output's bytes; None for a step that cannot be resumed.
        further: inputs beside the first, by their names in the lineage.
        compared: what the report puts the output beside, an ancestor of the input; None for the input.
        seconds: time of the step before this, such as that of a search.
    """

    checkpoint: Checkpoint
    kinds: Mapping[str, Kind | None] | None
    recipe: Recipe | DistillRecipe | ExportRecipe
    output: Output
    write: Callable[[OpenOutput], Results]
    follow: Callable[[], object] = lambda: None
    fingerprint: str | None = None
    further: Mapping[str, Checkpoint] = field(default_factory=dict)
    compared: Checkpoint | None = None
    seconds: float = 0.0


def run_alone(plan: StepPlan, write: Callable[[OpenOutput, Progress], Results], options: Options) -> Report:
    """Write the output of a plan, its report inside; a stopped run starts anew.

    Under torchrun the first process does it all; the others return its report.
    """
    step = StepRun(
        checkpoint=plan.checkpoint,
        kinds=plan.kinds,
        recipe=plan.recipe,
        output=plan.output,
        write=lambda opened: write(opened, options.progress),
    )
    return run_step(step, assembled(torch.device("cpu")), options)


def write_all(
    output: Output,
    writer: CheckpointWriter,
    blocks: Callable[[str], Iterable[Block]],
    progress: Progress,
    axis: Callable[[str], int] = lambda name: 0,
) -> dict[str, float]:
    """Write every parameter in turn.

    Args:
        output, writer: where they go.
        blocks: gives a parameter's blocks of rows by its name.
        progress: told of every parameter.
        axis: that a parameter's rows lie along.

    Returns:
        The seconds that each took.
    """
    seconds: dict[str, float] = {}
    total, done = sum(planned.dense.nbytes for planned in output.parameters.values()), 0
    for name, planned in output.parameters.items():
        began = time.perf_counter()
        for block in blocks(name):
            put_block(output, writer, name, block, axis(name))
        seconds[name] = time.perf_counter() - began
        done += planned.dense.nbytes
        progress(name, done, total)
    return seconds


def assembled(device: torch.device) -> Processes:
    """The processes of a step, once all of them have made their plans: those refuse an output that is there."""
    team = processes(device)
    team.wait()
    return team


def require_resumable(output: Output, fingerprint: str) -> None:
    """Refuse to continue a stopped run that another step left; nothing of it is touched.

    Raises:
        Refused: the stopped run had another input, recipe or version.
    """
    require_same(working_path(output.destination.path), fingerprint)


def run_step(step: StepRun, team: Processes, options: Options) -> Report:
    """Write the output of a step, its report inside; every process returns the report.

    Raises:
        Refused: the stopped run that is to be resumed was another step's.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    if team.rank == 0:
        report = _write(step, options)
        team.wait()
        return report
    step.follow()
    team.wait()
    return written_report(step.output)


def _write(step: StepRun, options: Options) -> Report:
    """Write and seal the output; the first process does it."""
    start, output = time.perf_counter() - step.seconds, step.output
    further = {**{name: each.source for name, each in step.further.items()}, **step.checkpoint.foreign.beside}
    sources = [step.checkpoint.source, *further.values()]
    resumes = options.resume and step.fingerprint is not None
    if resumes and step.fingerprint is not None:
        require_resumable(output, step.fingerprint)
    mode = shared_mode(file for source in sources for file in source.files)
    with (
        CheckpointWriter(output.destination.path, output.shards, resumes, output.destination.overwrite, mode) as writer,
        hashing(sources) as inputs,
    ):
        results = step.write(OpenOutput(writer, _journal(writer.work, step.fingerprint, resumes), inputs[0]))
        if options.resume and not resumes:
            results = replace(results, warnings=(*results.warnings, STARTS_ANEW))
        if output.entropy_coded:
            output = entropy_coded_output(output, writer)
        first, *others = (future.result() for future in inputs)
        output = with_digests(output, first, dict(zip(further, others, strict=True)))
        output.write_files(writer)
        if output.metadata():
            writer.stamp(output.metadata())
        written = Checkpoint.open(writer.work / output.shards[0].name if output.destination.single else writer.work)
        if output.entropy_coded:
            results = replace(results, layers=sizes(results.layers, written, step.kinds))
        seconds = time.perf_counter() - start  # timing forward passes is not part of the step
        report = _report(replace(step, output=output), written, results, options, seconds)
        report = add_report(report, step.recipe.report.html, writer)
        writer.seal()
    return report


def _journal(work: Path, fingerprint: str | None, resumes: bool) -> Journal:
    if fingerprint is None:
        return Journal(work / NAME, {})
    return Journal.resume(work, fingerprint) if resumes else Journal.start(work, fingerprint)


def _report(step: StepRun, written: Checkpoint, results: Results, options: Options, seconds: float) -> Report:
    """The report of an output that is complete but for it."""
    output, checkpoint = step.output, step.compared or step.checkpoint
    lineage = output.manifest.lineage
    first = lineage[len(checkpoint.manifest.lineage)]  # the step whose input is compared
    latency, untimed = _latency(checkpoint, written, options.latency)
    sha256 = digests(written.source)
    if output.destination.single:  # the working file has another name
        sha256 = dict(zip([output.destination.path.name], sha256.values(), strict=True))
    after = side_of(written, step.kinds, str(output.destination.path), sha256)
    after = replace(after, bytes=output.weight_bytes + output.other_bytes)  # a report cannot count itself
    before = side_of(checkpoint, step.kinds, str(checkpoint.path), dict(first["inputs"]))
    results = replace(
        results,
        latency=latency,
        warnings=(*results.warnings, *untimed),
        notes=(*checkpoint.foreign.merged, *results.notes),
        waited=options.waited(),
    )
    return build_report(lineage[-1]["command"], step.recipe, (before, after), lineage, results, seconds)


def _latency(before: Checkpoint, after: Checkpoint, mode: Mode) -> tuple[Latency | None, list[str]]:
    """Forward times of input and output, and warnings: a model that does not run must not cost a complete output."""
    try:
        return compare(before, after, mode)
    except Exception as error:
        reason = first_line(error, "no message")
        return None, [f"latency was not measured: {type(error).__name__}: {reason}"]

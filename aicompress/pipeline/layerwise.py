"""Run a layer-wise plan: one layer in memory at a time, bytes streamed to the output, everything measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aicompress.checkpoint import CheckpointWriter
from aicompress.checkpoint.journal import Journal, require_same
from aicompress.checkpoint.place import working_path
from aicompress.checkpoint.reader import require_finite
from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.layer import GradientStats, InputStats, Layer, LayerInfo, from_matrix
from aicompress.measure import rel_error
from aicompress.methods.zeros import kept_zero
from aicompress.pipeline.calibration.rescaling import Rescaling
from aicompress.pipeline.fingerprint import fingerprint
from aicompress.pipeline.finish import Facts, finish
from aicompress.pipeline.hashing import hashing
from aicompress.pipeline.latency import Mode
from aicompress.pipeline.layer_rows import changed_row, idle_row, noted
from aicompress.pipeline.output import with_digests
from aicompress.pipeline.plan import LayerPlan, Plan
from aicompress.pipeline.processes import Processes, processes
from aicompress.pipeline.progress import Progress
from aicompress.pipeline.row_blocks import load_compiled, row_blocks
from aicompress.pipeline.settling import layer_seed
from aicompress.pipeline.together import led, with_statistics
from aicompress.report.model import LayerRow, Report
from aicompress.weights import Dense, LowRank, Weight

if TYPE_CHECKING:
    from aicompress.pipeline.bits.decided import Found
    from aicompress.pipeline.calibration.collect import Wanted


ANEW = "nothing of a stopped run was used: this kind of step starts anew"


@dataclass(frozen=True)
class Options:
    """How a step runs; nothing here changes the numbers.

    Attributes:
        resume: go on where a stopped run of the same step was.
        latency: "auto" times the forward passes of input and output, "off" does not.
        progress: called with (what, done bytes, total bytes).
    """

    resume: bool = False
    latency: Mode = "auto"
    progress: Progress = lambda what, done, total: None


@dataclass(frozen=True)
class Ready:
    """A layer that has been compressed with others, before its turn to be written.

    Attributes:
        weight: its new weight.
        seconds: its share of the time.
    """

    weight: Weight
    seconds: float


@dataclass(frozen=True)
class Known:
    """What is known of a layer beside its weight, for methods that need it; its new weight where that is ready."""

    inputs: InputStats | None = None
    gradients: GradientStats | None = None
    movement: Tensor | None = None
    ready: Ready | None = None


@dataclass
class Work:
    """A run on its way.

    Attributes:
        plan: what to do.
        writer: where bytes go.
        journal: what is done.
        progress: told of every parameter.
        warnings: what was noticed on the way.
        done: bytes of parameters that are written.
    """

    plan: Plan
    writer: CheckpointWriter
    journal: Journal
    progress: Progress
    warnings: list[str] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self.rescaling = Rescaling(self.plan, self.journal)

    def write(self, name: str, known: Mapping[str, Known] | None = None, note: str = "") -> Weight | Tensor:
        """Compress or copy one parameter to the output and note it in the journal.

        Args:
            name: the parameter.
            known: statistics by layer name.
            note: put first into the notes of its layers' rows.

        Returns:
            What was written.
        """
        value, rows = _produce(self.plan, name, known or {})
        for disk, tensor in self.plan.output.encode(name, value).items():
            self.writer.put(disk, tensor)
        self.record(name, [noted(row, note) for row in rows])
        return value

    def write_all(self, names: Sequence[str]) -> None:
        """Compress or copy parameters without statistics, those that can be in blocks of rows."""
        with row_blocks(self.plan, self.writer) as threads:
            for name, rows in threads.written(names):
                if rows is None:
                    self.write(name)
                else:
                    self.record(name, rows)

    def record(self, name: str, rows: list[LayerRow]) -> None:
        """Note in the journal that a parameter is written."""
        fresh = name not in self.journal.done  # a block that was stopped half way is done again
        self.journal.record(name, [dataclasses.asdict(row) for row in rows])
        if fresh:
            self.tell(name)

    def tell(self, name: str) -> None:
        """Report progress past a parameter."""
        self.done += self.plan.output.parameters[name].dense.nbytes
        self.say(name)

    def say(self, what: str) -> None:
        """Report what is going on."""
        total = sum(planned.dense.nbytes for planned in self.plan.output.parameters.values())
        self.progress(what, self.done, total)

    def rows(self) -> tuple[LayerRow, ...]:
        """Rows of all parameters that are done, in the output's order."""
        return tuple(LayerRow(**row) for name in self.plan.output.parameters for row in self.journal.done.get(name, ()))


def run(plan: Plan, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside.

    Under torchrun the processes share the calibration samples and the first one writes; the others return its report.

    Raises:
        CheckpointError: a weight holds NaN or infinity; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    from aicompress.pipeline.bits.decided import decided

    options = options or Options()
    team = processes(torch.device("cpu"))
    team.wait()  # until all have made their plans: those refuse an output that is there
    if plan.surveys:
        from aicompress.pipeline.allocation import allocated

        plan = allocated(plan, team, options.progress)
    found = decided(plan, options.resume, team, options.progress)
    plan = found.plan
    collected = with_statistics(plan, lambda: _wanted(plan), team, options.progress)

    def follow() -> None:
        if plan.needs and not collected:
            from aicompress.pipeline.calibration import blocks

            blocks.follow(plan, team)

    return led(plan.output, team, lambda: _lead(found, options, team), follow)


def _wanted(plan: Plan) -> Wanted:
    """What a file of statistics must hold for a plan."""
    from aicompress.pipeline.calibration.blocks import selected
    from aicompress.pipeline.calibration.collect import Wanted

    return Wanted(selected(plan), plan.needs | plan.surveys)


def _lead(found: Found, options: Options, team: Processes) -> Report:
    """What the process does that writes."""
    load_compiled(found.plan)  # before the clock starts, as torch was loaded
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
    from aicompress.pipeline.calibration import blocks
    from aicompress.pipeline.calibration.request import foreign

    if work.plan.request.stats:
        files = [StatisticsFile.open(path) for path in work.plan.request.stats]
        record = blocks.compress_from_files(work, files)
        work.warnings += foreign(files, inputs.result())
    else:
        record = blocks.compress(work, team)
    work.warnings += blocks.scarce(work)
    return record


def _produce(plan: Plan, name: str, known: Mapping[str, Known]) -> tuple[Weight | Tensor, list[LayerRow]]:
    """One parameter of the output, and a row for each of its layers."""
    checkpoint, planned = plan.checkpoint, plan.output.parameters[name]
    layers = plan.by_tensor.get(name, [])
    jobs = [layer for layer in layers if layer.config is not None]
    value: Weight | Tensor
    if jobs:
        value, rows = compressed(plan, name, jobs, known)
    else:
        rows = []
        value = checkpoint.weight(name) if name in checkpoint.manifest.entries else checkpoint.read(name)
        for tensor in [value] if isinstance(value, Tensor) else value.tensors().values():
            require_finite(tensor, name, checkpoint.path)
    if isinstance(value, Dense):
        assert planned.info is not None
        value = from_matrix(value.matrix, planned.dense.shape, planned.info.transposed).to(planned.dense.dtype)
    return value, rows + [idle_row(layer) for layer in layers if layer.config is None]


def compressed(
    plan: Plan, name: str, jobs: list[LayerPlan], known: Mapping[str, Known]
) -> tuple[Weight, list[LayerRow]]:
    """Apply the method to a parameter, or to the parts of a low-rank one."""
    by_part = {job.info.part: job for job in jobs}
    if "" in by_part:
        weight, row = _apply(plan, by_part[""], known.get(by_part[""].info.name, Known()))
        return weight, [row]
    old = plan.checkpoint.weight(name)
    assert isinstance(old, LowRank)
    out, inner, rows = old.out, old.inner, []
    of = {part: known.get(job.info.name, Known()) for part, job in by_part.items()}
    if "in" in by_part:
        inner, row = _apply(plan, by_part["in"], of["in"])
        rows.append(row)
    if "out" in by_part:
        inputs = of["out"].inputs.through(inner.dense()) if of["out"].inputs else None
        out, row = _apply(plan, by_part["out"], Known(inputs, of["out"].gradients))
        rows.append(row)
    return LowRank(out, inner), rows


def layer_of(plan: Plan, info: LayerInfo, known: Known) -> Layer:
    """A layer of the input as its method is given it."""
    layer = plan.checkpoint.layer(info, layer_seed(plan.recipe.seed, info.name))
    return dataclasses.replace(layer, inputs=known.inputs, gradients=known.gradients, movement=known.movement)


def _apply(plan: Plan, job: LayerPlan, known: Known) -> tuple[Weight, LayerRow]:
    layer = layer_of(plan, job.info, known)
    start = time.perf_counter()
    weight = plan.method.apply(layer, job.config) if known.ready is None else known.ready.weight
    if plan.method.command == "quantize":
        weight = kept_zero(layer, weight)
    seconds = time.perf_counter() - start + (0 if known.ready is None else known.ready.seconds)
    return weight, changed_row(plan.method, job, weight, rel_error(layer.weight, weight), seconds)

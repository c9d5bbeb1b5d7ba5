"""Layer-wise methods that need statistics: the engine brings them block by block, and the layers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from aicompress.checkpoint.statistics import StatisticsFile, merged, merged_gradients, merged_movement
from aicompress.errors import listed
from aicompress.layer import from_matrix
from aicompress.methods.method import OF_TRAINING
from aicompress.model.blocks.reconstruction import Stage
from aicompress.model.loading.places import Place
from aicompress.pipeline.calibration.data import ROWS, record_of_files
from aicompress.pipeline.calibration.gradients import GradientReader, differentiate, gradients
from aicompress.pipeline.calibration.request import MIN_ROWS
from aicompress.pipeline.calibration.runner import Broadcast, CalibrationRun
from aicompress.pipeline.layerwise.block_tuning import can_move, tuned, vectors
from aicompress.pipeline.layerwise.compress import Compressed, LayerStatistics, completed, sharing_inputs
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.layerwise.work import Work
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.output import Planned
from aicompress.pipeline.step.workers import Processes
from aicompress.report.model import LayerRow
from aicompress.statistics import GradientStats, InputStats
from aicompress.weights import TensorSpec, Weight

DATA_FREE = "calibration rows: data-free"
EXPERTS_DATA_FREE = f"experts saw fewer than {MIN_ROWS} rows: data-free"
UNREACHED = "no gradient reaches it: data-free"


def compress(work: Work, known: GradientReader | None, team: Processes) -> dict[str, Any]:
    """Compress every selected layer with statistics of its inputs behind compressed layers, or behind original ones.

    Args:
        work: the run.
        known: reads gradients of the original model that are known already; None: they are taken where they are read.
        team: the processes.

    Returns:
        The record of the calibration data.
    """
    tune = work.plan.recipe.tune
    engine = CalibrationRun.of(work.plan, work.plan.selected, team, ROWS if tune is None else tune.batch)
    left = [name for name in work.plan.selected if name not in work.journal.done]
    if not team.gather(bool(left))[0]:
        return engine.record()
    plan, differentiated = work.plan, work.plan.reads_gradients and known is None
    with gradients(plan, plan.output, team, work.say, plan.needs) if differentiated else nullcontext() as store:
        read = known if store is None else store.read
        if work.plan.input_statistics:
            writer = _Writer(work, read, engine.wanted, vectors(work.plan, engine.loader.paths))
            engine.walk(
                Broadcast(_specs(work.plan), team, writer),
                work.plan.input_statistics,
                work.plan.compares_inputs,
                lambda done, total: work.say(f"block {done} of {total}"),
                tune=None if tune is None else writer.tune,
            )
        for name in left:
            if name not in work.journal.done:  # such as a parameter that the running model uses in its own way
                write(work, name, InputStats(0), read)
    work.rescaling.restore()
    return engine.record()


def follow(plan: Plan, known: GradientReader | None, team: Processes) -> None:
    """Run the batches of this process, in the processes that do not write, while the first one compresses."""
    engine = CalibrationRun.of(plan, plan.selected, team)
    if not team.gather(None)[0]:
        return
    if plan.reads_gradients and known is None:
        differentiate(plan, team, lambda moments: None, lambda done, total: None, plan.needs)
    if plan.input_statistics:
        visitor = Broadcast(_specs(plan), team, None)
        engine.walk(visitor, plan.input_statistics, plan.compares_inputs, lambda done, total: None)


def _specs(plan: Plan) -> dict[str, TensorSpec]:
    """The dense parameters that a layer-wise step puts into the running model."""
    return {name: planned.dense for name, planned in plan.output.parameters.items()}


def compress_from_files(work: Work, files: Sequence[StatisticsFile]) -> dict[str, Any]:
    """Compress every selected layer with statistics of the original model's inputs, kept in files.

    Returns:
        The record of the calibration data.
    """
    work.rescaling.restore()
    work.rescaling.decide(lambda name: merged(files, name))
    read = partial(merged_gradients, files) if work.plan.reads_gradients else None
    for name in work.plan.selected:
        if name in work.journal.done:
            continue
        if work.plan.needs & OF_TRAINING:
            infos = [layer.info for layer in work.plan.by_tensor[name]]
            work.write(name, {info.name: LayerStatistics(movement=merged_movement(files, info.name)) for info in infos})
        else:
            work.write(name, *_of_files(work, name, files, read))
    return record_of_files(files)


def _of_files(
    work: Work, name: str, files: Sequence[StatisticsFile], read: GradientReader | None
) -> tuple[dict[str, LayerStatistics], str]:
    """What files tell of a parameter, and of the layers that are compressed with it: as `statistics_of`."""
    known: dict[str, LayerStatistics] = {}
    notes: list[str] = []
    for member in work.plan.by_tensor[name][0].members or (name,):
        its, note = statistics_of(work, member, merged(files, member), read)
        known |= its
        notes += [note] if note else []
    return known, "; ".join(dict.fromkeys(notes))


def write(work: Work, name: str, inputs: InputStats, read: GradientReader | None = None) -> Weight | Tensor:
    """Compress a parameter with what is known of it.

    Args:
        work: the run.
        name: the parameter.
        inputs: statistics of its input.
        read: reads gradients, for methods that use them.
    """
    known, note = statistics_of(work, name, inputs, read)
    return work.write(name, known, note)


def statistics_of(
    work: Work, name: str, inputs: InputStats, read: GradientReader | None = None
) -> tuple[dict[str, LayerStatistics], str]:
    """The statistics of a parameter's layers by layer name, and a note that says what is missing.

    With too few rows the inputs count as white noise; where no gradient reaches the parameter, all of its weights count
    as equally important.
    """
    infos = [layer.info for layer in work.plan.by_tensor[name]]
    notes: list[str] = []
    if inputs.frequency is not None and "frequency" not in work.plan.needs:
        inputs = InputStats(0)
    held = infos[0].experts
    if work.plan.input_statistics and held is not None:
        few = held.count - sum(own.count >= MIN_ROWS for own in inputs.experts)
        notes += [f"{few} of {held.count} {EXPERTS_DATA_FREE}"] if few else []
    elif work.plan.input_statistics and inputs.count < MIN_ROWS:
        notes.append(f"{inputs.count} {DATA_FREE}")
    if work.plan.input_statistics:
        inputs = completed(inputs, infos)
    inputs, note = work.rescaling.rescaled(name, inputs)
    notes += [note] if note else []
    gradients = {info.name: None if read is None else read(info.name) for info in infos}
    for info in infos if read is not None else ():
        moments = gradients[info.name]
        if moments is None or not moments.reached:
            notes.append(UNREACHED)
            gradients[info.name] = GradientStats.flat(info.shape)
    known = {layer: LayerStatistics(inputs if inputs.count else None, moments) for layer, moments in gradients.items()}
    return known, "; ".join(dict.fromkeys(notes))


def scarce(work: Work) -> list[str]:
    """Warnings that name the layers which too few calibration rows reached, or no gradient."""
    rows = work.rows()
    few, experts, unreached = (
        [row for row in rows if said in row.note] for said in (DATA_FREE, EXPERTS_DATA_FREE, UNREACHED)
    )
    chosen = sum(row.method != "-" for row in rows)
    warnings: list[str] = []
    if few:
        shown = listed(f"{row.name} ({row.note.split()[0]})" for row in few)
        warnings.append(
            f"{len(few)} of {chosen} layers saw fewer than {MIN_ROWS} calibration rows and are data-free: {shown}"
        )
    if experts:
        shown = listed(f"{row.name} ({' '.join(row.note.split()[:3])})" for row in experts)
        warnings.append(
            f"{len(experts)} tensors hold experts that saw fewer than {MIN_ROWS} calibration rows and are data-free: "
            f"{shown}"
        )
    if unreached:
        shown = listed(row.name for row in unreached)
        warnings.append(
            f"no gradient of the loss reaches {len(unreached)} of {chosen} layers, which are data-free: {shown}"
        )
    return warnings


@dataclass
class _Writer:
    """Writes the layers of each block as their statistics come in. Here layers go by their parameters' names.

    Attributes:
        work: the run.
        read: reads gradients, for methods that use them.
        places: where the model has each layer.
        vectors: where it has the norms and biases that are tuned with their block.
    """

    work: Work
    read: GradientReader | None
    places: Mapping[str, Place]
    vectors: Mapping[str, str]

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        """A block that an earlier run wrote: its parameters as the working files hold them."""
        if not all(name in self.work.journal.done for name in layers):
            return None
        written = self.work.plan.output.so_far(self.work.writer.work)
        self.work.rescaling.restore(layers)
        tuned = self.work.journal.done.get(_beside(layers), ())
        return {**{name: written.dense(name) for name in (*layers, *tuned)}, **self.work.rescaling.beside(layers)}

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        """Compress the layers of a block: those that share their inputs together, where the method can."""
        self.work.rescaling.decide(stats.get)
        results: dict[str, tuple[Weight, LayerRow]] = {}
        for jobs in self._batches(stats):
            for job, compressed in zip(jobs, self._together(jobs, stats), strict=True):
                results[job.info.tensor] = self.work.compression.finished(job, compressed)
        return self._written(stats, results)

    def tune(self, stats: Mapping[str, InputStats], stage: Stage) -> Mapping[str, Tensor]:
        """Compress the layers of a block, and tune those that can move; these are held until then."""
        plan, compression = self.work.plan, self.work.compression
        assert plan.recipe.tune is not None
        held: dict[str, Compressed] = {}
        results: dict[str, tuple[Weight, LayerRow]] = {}
        for jobs in self._batches(stats):
            for job, compressed in zip(jobs, self._together(jobs, stats), strict=True):
                if can_move([job]):
                    held[job.info.tensor] = compressed
                else:
                    results[job.info.tensor] = compression.finished(job, compressed)
        for name in stats:
            if name not in held and name not in results and can_move(plan.by_tensor[name]):
                (job,) = plan.by_tensor[name]
                held[name] = compression.compress_alone(job, self._known(name, stats)[job.info.name])
        after = tuned(plan.recipe.tune, plan.recipe.seed, stage, held, self.places, self.vectors)
        for name, compressed in {**held, **after.layers}.items():
            results[name] = compression.finished(plan.by_tensor[name][0], compressed)
        for name, vector in after.vectors.items():
            self.work.put(name, vector, [])
        self.work.journal.record(_beside(list(stats)), list(after.vectors))  # first: they come with the last layer
        return {**after.vectors, **self._written(stats, results)}

    def _batches(self, stats: Mapping[str, InputStats]) -> list[tuple[LayerPlan, ...]]:
        """Layers of a block that are compressed together: of a product of heads, of a group, or of one input."""
        plan = self.work.plan
        if plan.method.couples is not None or plan.method.shares is not None:
            jobs = {job.members: job for name in stats for job in plan.by_tensor[name]}
            whole = [members for members in jobs if members and set(members) <= stats.keys()]
            return [tuple(plan.by_tensor[member][0] for member in members) for members in whole]
        return [] if plan.method.batched is None else sharing_inputs(stats, plan.by_tensor)

    def _together(self, jobs: Sequence[LayerPlan], stats: Mapping[str, InputStats]) -> list[Compressed]:
        known = [self._known(job.info.tensor, stats)[job.info.name] for job in jobs]
        return self.work.compression.compress_together(jobs, known)

    def _known(self, name: str, stats: Mapping[str, InputStats]) -> dict[str, LayerStatistics]:
        return statistics_of(self.work, name, stats[name], self.read)[0]

    def _written(
        self, stats: Mapping[str, InputStats], results: Mapping[str, tuple[Weight, LayerRow]]
    ) -> dict[str, Tensor]:
        """Write all layers of a block, those that are not compressed yet one by one; dense, as the model runs them."""
        parameters = self.work.plan.output.parameters
        dense: dict[str, Tensor] = {}
        owners = self.work.plan.checkpoint.manifest.owners
        for name, inputs in sorted(stats.items(), key=lambda item: bool(owners(item[0]))):  # what they share first
            if name in results:
                weight, row = results[name]
                value = self.work.put(name, weight, [row], statistics_of(self.work, name, inputs, self.read)[1])
            else:
                value = write(self.work, name, inputs, self.read)
            dense[name] = _dense(value, parameters[name])
        return {**dense, **self.work.rescaling.beside(dense)}


def _beside(layers: Sequence[str]) -> str:
    """What the journal calls the norms and biases that were tuned with the layers of a block."""
    return f"beside {layers[0]}"


def _dense(value: Weight | Tensor, planned: Planned) -> Tensor:
    if isinstance(value, Tensor):
        return value
    assert planned.info is not None
    return from_matrix(value.dense(), planned.dense.shape, planned.info.transposed).to(planned.dense.dtype)

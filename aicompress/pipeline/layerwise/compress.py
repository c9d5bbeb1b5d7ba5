"""Compress the layers of one parameter, or several layers that share their inputs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.layer import Layer, LayerInfo, MergedExperts
from aicompress.measure import rel_error, relative, squared_sums
from aicompress.methods.factors import (
    inner_metric,
    is_plain_product,
    outer_metric,
    refit_inner,
    refit_outer,
    rotated_factors,
)
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.methods.quantize.grid.row_feedback import BLOCKS, rounded_by_rows
from aicompress.methods.span_metric import SpanMetric
from aicompress.pipeline.calibration.request import MIN_ROWS, input_width
from aicompress.pipeline.layerwise.experts import reader
from aicompress.pipeline.layerwise.report_rows import (
    COARSE_NOTE,
    ROTATED_NOTE,
    TURNED_NOTE,
    changed_row,
    is_coarse,
    noted,
    parts_of_bytes,
    rounded_note,
    shared_note,
)
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.report.model import LayerRow
from aicompress.statistics import GradientStats, InputStats
from aicompress.weights import Dense, LowRank, PerExpert, Weight, outline_nbytes

INNER = 32  # blocks of rows of an inner factor, at most


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer, for methods that read them; None where the method does not, or nothing is known."""

    inputs: InputStats | None = None
    gradients: GradientStats | None = None
    movement: Tensor | None = None

    def of_expert(self, experts: MergedExperts, number: int) -> LayerStatistics:
        """The statistics of one of the experts that a layer holds."""
        inputs = None if self.inputs is None else self.inputs.experts[number]
        return LayerStatistics(
            inputs, None if self.gradients is None else self.gradients.of_expert(experts.split, number)
        )


@dataclass(frozen=True)
class Compressed:
    """A layer as it was read, and the method's weight for it.

    Attributes:
        layer: the layer; held no longer than its block, for its error and for the tuning of its codes.
        weight: the new weight.
        seconds: in the method.
        nbytes: of the weight, and the layer's part of those that it shares; None: what the weight takes by itself.
    """

    layer: Layer
    weight: Weight
    seconds: float
    nbytes: int | None = None


@dataclass(frozen=True)
class Compression:
    """A method on the layers of a checkpoint.

    Attributes:
        method: what compresses them.
        checkpoint: where they are read.
        seed: of the step; every layer has one of its own from it.
    """

    method: AnyLayerMethod
    checkpoint: Checkpoint
    seed: int

    def compress_parameter(
        self,
        name: str,
        jobs: Sequence[LayerPlan],
        known: Mapping[str, LayerStatistics],
        lent: Mapping[str, Weight] | None = None,
    ) -> tuple[Weight, list[LayerRow]]:
        """Compress a parameter, or the factors of one.

        Args:
            name: the parameter.
            jobs: its layers that are compressed.
            known: by layer name.
            lent: factors that another parameter stores, as they are now; None: as they were.
        """
        by_part = {job.info.part: job for job in jobs}
        if "" in by_part:
            job = by_part[""]
            if job.info.experts is not None:
                weight, row = self._experts(job, job.info.experts, known.get(job.info.name, LayerStatistics()))
                return weight, [row]
            weight, row = self.finished(job, self.compress_alone(job, known.get(job.info.name, LayerStatistics())))
            return weight, [row]
        old = self.checkpoint.weight(name)
        if is_plain_product(old) and self.turns(name, by_part):
            return self._both(old, by_part, known)
        factors: dict[str, Weight] = {**old.parts(), **(lent or {})}
        rows = []
        for part in reversed(factors):
            if part in by_part:
                job = by_part[part]
                if job.info.experts is not None:
                    factors[part], row = self._experts(job, job.info.experts, LayerStatistics())
                    rows.append(row)
                    continue
                own, moves = known.get(job.info.name, LayerStatistics()), False
                if part == "out" and self.method.recodes and is_plain_product(old) and factors["in"] is not old.inner:
                    moves, old = True, refit_outer(old, factors["in"], None if own.inputs is None else own.inputs.gram)
                before = old.with_parts(factors).before(part)  # the outer factor is given what the new inner one gives
                if before is not None and own.inputs:
                    own = dataclasses.replace(own, inputs=own.inputs.through(before))
                factors[part], row = self.finished(job, self.compress_alone(job, own, old))
                rows.append(noted(row, TURNED_NOTE) if moves else row)
        return old.with_parts(factors), rows

    def experts(
        self, job: LayerPlan, experts: MergedExperts, known: LayerStatistics
    ) -> Iterator[tuple[Weight, float, float]]:
        """Compress the experts that a parameter holds, each by itself; one is in memory at a time.

        Yields:
            The weight of each in turn, ‖W − Ŵ‖² and ‖W‖².
        """
        assert job.config is not None
        read, by = reader(self.checkpoint, job.info, self.seed), self.checkpoint.factors(job.info.tensor)
        scales = None if by is None else experts.split(job.info.matrix(by))
        for number in range(experts.count):
            own = known.of_expert(experts, number)
            layer = dataclasses.replace(read(number), inputs=own.inputs, gradients=own.gradients)
            weight = self.method.stored(layer, self.method.apply(layer, job.config))
            yield weight, *_squared_sums(layer.weight, weight, None if scales is None else scales[number])

    def _experts(self, job: LayerPlan, experts: MergedExperts, known: LayerStatistics) -> tuple[Weight, LayerRow]:
        """Compress the experts that a parameter holds, each by itself."""
        start = time.perf_counter()
        weights, errors, norms = zip(*self.experts(job, experts, known), strict=True)
        seconds = time.perf_counter() - start
        weight = PerExpert.joined(weights, experts.transposed)
        row = changed_row(self.method, job, weight, relative(sum(errors), sum(norms)), seconds)
        return weight, noted(row, COARSE_NOTE) if is_coarse(weight) else row

    def _both(
        self, old: LowRank, jobs: Mapping[str, LayerPlan], known: Mapping[str, LayerStatistics]
    ) -> tuple[Weight, list[LayerRow]]:
        """Round both factors of a parameter: the outer one as the inner one can make up for it, which then does."""
        made, old = old, rotated_factors(old, layer_seed(self.seed, jobs["out"].info.tensor))
        own = known.get(jobs["out"].info.name, LayerStatistics())
        if own.inputs:
            own = dataclasses.replace(own, inputs=own.inputs.through(old.inner.dense()))
        outer = self._by_rows(jobs["out"], own, old, outer_metric(old))
        old, inputs = refit_inner(old, outer.weight), known.get(jobs["in"].info.name, LayerStatistics())
        outer = dataclasses.replace(outer, layer=dataclasses.replace(outer.layer, weight=old.out.dense()))
        metric = inner_metric(made, outer.weight, None if inputs.inputs is None else inputs.inputs.gram)
        inner = self._by_rows(jobs["in"], inputs, old, metric, INNER)
        done = {part: self.finished(jobs[part], each) for part, each in (("in", inner), ("out", outer))}
        weight = old.with_parts({part: factor for part, (factor, _) in done.items()})
        return weight, [noted(row, TURNED_NOTE) for _, row in done.values()]

    def _by_rows(
        self, job: LayerPlan, known: LayerStatistics, stored: LowRank, metric: Tensor | SpanMetric, most: int = BLOCKS
    ) -> Compressed:
        """Compress a factor whose rows' errors count together."""
        layer = self._read(job.info, known, stored)
        start = time.perf_counter()
        assert job.config is not None
        weight = rounded_by_rows(layer, metric, self.method, job.config, most)
        return Compressed(layer, weight, time.perf_counter() - start)

    def turns(self, name: str, parts: Collection[str]) -> bool:
        """Whether the factors of a parameter are turned: both are rounded, and nothing else is made of them."""
        if not self.method.recodes or not {"out", "in"} <= set(parts):
            return False
        manifest = self.checkpoint.manifest
        return not manifest.owners(name) and not manifest.borrowers([name])

    def compress_alone(self, job: LayerPlan, known: LayerStatistics, stored: Weight | None = None) -> Compressed:
        """Read a layer and compress it by itself.

        Args:
            job: the layer.
            known: what is known of it.
            stored: its parameter, where that has been read already.
        """
        layer = self._read(job.info, known, stored)
        start = time.perf_counter()
        weight = self.method.apply(layer, job.config)
        return Compressed(layer, weight, time.perf_counter() - start)

    def compress_together(self, jobs: Sequence[LayerPlan], known: Sequence[LayerStatistics]) -> list[Compressed]:
        """Read layers that share their inputs or a part of their weights, and their config; compress them together.

        The same for those of which only products of heads count.
        """
        layers = [self._read(job.info, own) for job, own in zip(jobs, known, strict=True)]
        start = time.perf_counter()
        weights = self._weights(jobs[0], layers)
        share = (time.perf_counter() - start) / len(layers)
        group = jobs[0].group
        sizes = [None] * len(jobs) if group is None else parts_of_bytes(weights, group.part)
        compressed = zip(layers, weights, sizes, strict=True)
        return [Compressed(layer, weight, share, size) for layer, weight, size in compressed]

    def _weights(self, job: LayerPlan, layers: Sequence[Layer]) -> list[Weight]:
        """The weights of layers that are compressed together, of which one has this plan."""
        method, product = self.method, job.product
        if product is not None and method.couples is not None:
            biases = [self.checkpoint.read(name).float() if name else None for name in product.biases]
            return method.couples.compress(product, layers, biases, job.config)
        together = method.batched if job.group is None else method.shares
        assert together is not None
        return together.compress(layers, job.config)

    def finished(self, job: LayerPlan, compressed: Compressed) -> tuple[Weight, LayerRow]:
        """A layer's weight as it is stored, and its row of the report."""
        layer, start = compressed.layer, time.perf_counter()
        weight = self.method.stored(layer, compressed.weight)
        seconds = compressed.seconds + time.perf_counter() - start
        row = changed_row(self.method, job, weight, self._rel_error(layer, weight), seconds)
        row = noted(row, ROTATED_NOTE) if self.method.rotates is not None else row
        size = outline_nbytes(weight) if compressed.nbytes is None else compressed.nbytes
        row = noted(row, rounded_note(self.method.rounded(layer, job.config, weight, size)))
        if job.group is not None and not isinstance(weight, Dense):
            row = noted(row, shared_note(job.group, job.info.tensor))
        return weight, noted(row, COARSE_NOTE) if is_coarse(weight) else row

    def _rel_error(self, layer: Layer, weight: Weight) -> float | None:
        """`rel_error` in the input's own scale, whatever the layer was rescaled by before it was compressed."""
        factors = self.checkpoint.factors(layer.info.tensor)
        if factors is None:
            return rel_error(layer.weight, weight)
        by = layer.info.matrix(factors)
        return rel_error(layer.weight / by, weight.dense() / by)

    def _read(self, info: LayerInfo, known: LayerStatistics, stored: Weight | None = None) -> Layer:
        layer = self.checkpoint.layer(info, layer_seed(self.seed, info.name), stored)
        return dataclasses.replace(layer, inputs=known.inputs, gradients=known.gradients, movement=known.movement)


def _squared_sums(weight: Tensor, stored: Weight, by: Tensor | None) -> tuple[float, float]:
    """‖W − Ŵ‖² and ‖W‖² in the input's own scale, which a layer was multiplied by before it was compressed."""
    return squared_sums(weight, stored) if by is None else squared_sums(weight / by, Dense(stored.dense() / by))


def completed(inputs: InputStats, layers: Sequence[LayerInfo]) -> InputStats:
    """What a method is given: of white noise where too few rows came; with `cross` where nothing is compressed yet."""
    held = layers[0].experts
    if held is not None:
        own = inputs.experts or (InputStats(0),) * held.count
        expert = layers[0].of_expert(0)
        return InputStats.of_experts([completed(stats, [expert]) for stats in own])
    if inputs.count < MIN_ROWS:
        return InputStats.white(input_width(layers))
    if inputs.frequency is not None:
        return inputs.of_lookups(input_width(layers))
    return inputs if inputs.cross is not None else dataclasses.replace(inputs, cross=inputs.gram)


def sharing_inputs(
    stats: Mapping[str, InputStats], layers: Mapping[str, Sequence[LayerPlan]]
) -> list[tuple[LayerPlan, ...]]:
    """Whole layers that have the same statistics and the same parameters of the method, where there are several.

    Args:
        stats: by parameter; those that share their inputs have the same object.
        layers: by parameter.
    """
    groups: list[tuple[InputStats, list[LayerPlan]]] = []
    for name, inputs in stats.items():
        (job, *more) = layers[name]
        if more or job.info.part or job.info.experts or job.config is None:
            continue
        group = next((jobs for other, jobs in groups if other is inputs and jobs[0].config == job.config), None)
        if group is None:
            groups.append((inputs, [job]))
        else:
            group.append(job)
    return [tuple(jobs) for _, jobs in groups if len(jobs) > 1]

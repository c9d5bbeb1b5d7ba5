"""Parameters worked on in blocks of rows: each is read, compressed, measured and written while it is near.

What a row becomes must not depend on other rows, or on nothing but counts that a first reading gives (`RowWise`);
parameters that are copied go this way too. Blocks of the next ones are begun before the last one is finished.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import CheckpointWriter
from aicompress.checkpoint.files import count_not_finite, may_be_infinite
from aicompress.checkpoint.reader import require_finite
from aicompress.layer import LayerInfo
from aicompress.measure import relative
from aicompress.methods.capabilities import Measured, Rounded
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.report_rows import (
    COARSE_NOTE,
    ROTATED_NOTE,
    changed_row,
    idle_row,
    is_coarse,
    noted,
    parts_of_bytes,
    rounded_note,
    shared_note,
)
from aicompress.pipeline.layerwise.rows import reading
from aicompress.pipeline.layerwise.rows.configs import configs, parted
from aicompress.pipeline.layerwise.rows.kept import KeptBlocks, is_kept_apart
from aicompress.pipeline.layerwise.rows.parts import copy_what_is_no_part, encoded
from aicompress.pipeline.layerwise.rows.sums import BySums, ErrorSums, compressed, key_of, summed
from aicompress.pipeline.step.blocks import copied_in_parts
from aicompress.pipeline.step.layer_plan import Group, LayerPlan
from aicompress.pipeline.step.output import Output
from aicompress.report.model import LayerRow
from aicompress.weights import Dense, Weight

LARGE = 1 << 28  # weights from which on compiled code is worth loading, or compiling
AHEAD = 4  # parameters begun before the first of them is finished


@dataclass(frozen=True)
class RowBlocks:
    """Threads that work through blocks of rows.

    Attributes:
        compression: the method and the checkpoint it reads.
        layers: by parameter.
        output: what is written.
        writer: where bytes go.
        pool: the threads.
        compiled: the method's `measured`, where it is worth the time it takes to be ready.
        infinite: parameters that are copied though they are not finite.
        groups: those that are begun.
    """

    compression: Compression
    layers: Mapping[str, Sequence[LayerPlan]]
    output: Output
    writer: CheckpointWriter
    pool: ThreadPoolExecutor
    compiled: Callable[[Tensor, LayerInfo, Any], Measured | None] | None = None
    infinite: set[str] = field(default_factory=set)
    groups: dict[Group, list[Future[BySums]]] = field(default_factory=dict)

    def written(self, names: Sequence[str]) -> Iterator[tuple[str, list[LayerRow] | None]]:
        """Write parameters in order, and give their layers' rows; None for one that has to be done as a whole.

        Raises:
            CheckpointError: a weight holds NaN or infinity.
            CompressError: the method gave such values.
        """
        begun: deque[tuple[str, list[Future[BySums]]]] = deque()
        for name in names:
            begun.append((name, self._begin(name)))
            # What all rows of a layer gave may be as large as half of it: it waits for one layer, and not for several.
            while len(begun) > (1 if self._parted(name) else AHEAD):
                yield self._finish(*begun.popleft())
        while begun:
            yield self._finish(*begun.popleft())

    def _begin(self, name: str) -> list[Future[BySums]]:
        if not reading.divisible(self.compression, name, self.layers.get(name, [])):
            return []
        layers = self.layers.get(name, [])
        jobs = [layer for layer in layers if layer.config is not None]
        if jobs and jobs[0].group is not None:
            return self._begin_group(jobs[0].group)
        if jobs:
            left = [layer for layer in layers if layer.config is None and not layer.info.owner]  # other parts of it
            if jobs[0].info.part:
                copy_what_is_no_part(self.compression.checkpoint, name, self.writer)
            begun = [future for job in jobs for future in self._begin_job(name, job)]
            return begun + [self.pool.submit(self._copied_part, name, layer) for layer in left]
        outline = self.compression.checkpoint.outline(name)
        if outline is not None and not outline.in_proportion():
            return [self.pool.submit(self._copied_in_parts, name)]
        parts = reading.slices(self.compression, name, None)
        return [self.pool.submit(self._copied, name, rows) for rows in parts]

    def _begin_job(self, name: str, job: LayerPlan) -> list[Future[BySums]]:
        """Begin a layer: a parameter, or a part of one."""
        parts, part = reading.slices(self.compression, name, job), job.info.part
        begin, submitted = dict[str, int](), list[Future[BySums]]()
        in_order = job.info.outline is not None and job.outline is not None and is_kept_apart(job.outline)
        kept = KeptBlocks(name, self.output, self.writer, part) if in_order else None
        for rows, config in zip(parts, configs(self.compression, [job], [parts]), strict=True):
            put = partial(self._put, name, start=rows.start, begin=dict(begin), part=part)
            if kept is not None:
                put = partial(kept.put, previous=submitted[-1] if submitted else None, is_last=rows is parts[-1])
            submitted.append(self.pool.submit(self._block, name, rows, replace(job, config=config), put))
            if config is not job.config and job.info.outline is None:  # else rows are stored in proportion
                for disk, length in self._lengths(name, job, rows, config).items():
                    begin[disk] = begin.get(disk, 0) + length
        return submitted

    def _begin_group(self, group: Group) -> list[Future[BySums]]:
        """Begin layers that share what they become."""
        if group not in self.groups:
            jobs = [self.layers[member][0] for member in group.members]
            whole = not all(reading.divisible(self.compression, job.info.tensor, [job]) for job in jobs)
            parts = [] if whole else [reading.slices(self.compression, job.info.tensor, job) for job in jobs]
            given = [] if whole else configs(self.compression, jobs, parts)
            blocks = zip(given, zip_longest(*parts), strict=True)
            self.groups[group] = [self.pool.submit(self._together, jobs, rows, config) for config, rows in blocks]
        return self.groups[group]

    def _parted(self, name: str) -> bool:
        """Whether a parameter's blocks have configs of their own, if it is done in blocks."""
        return any(parted(self.compression.method, layer) for layer in self.layers.get(name, []))

    def _lengths(self, name: str, job: LayerPlan, rows: slice, config: Any) -> dict[str, int]:
        """How long the tensors are that a block of rows gives, by their names on disk."""
        outline = self.compression.method.outline(reading.part_of(job.info, rows), config)
        tensors = {} if isinstance(outline, Dense) else self.output.encode(name, outline)
        return {disk: len(tensor) for disk, tensor in tensors.items()}

    def _finish(self, name: str, parts: list[Future[BySums]]) -> tuple[str, list[LayerRow] | None]:
        if not parts:
            return name, None
        done = [part.result() for part in parts]
        layers = self.layers.get(name, [])
        jobs = [layer for layer in reversed(layers) if layer.config is not None]  # parts as they are applied
        rows = [self._row(job, [sums[key_of(job)] for sums in done if key_of(job) in sums]) for job in jobs]
        return name, [*rows, *(idle_row(layer) for layer in layers if layer.config is None)]

    def _row(self, layer: LayerPlan, sums: Sequence[ErrorSums]) -> LayerRow:
        """The row of a layer, of what its blocks gave."""
        assert layer.outline is not None
        error = relative(math.fsum(each.error for each in sums), math.fsum(each.norm for each in sums))
        seconds = sum(each.seconds for each in sums)
        row = changed_row(self.compression.method, layer, layer.outline, error, seconds)
        row = noted(row, rounded_note(Rounded.of_blocks([each.rounded for each in sums])))
        if layer.group is not None and not isinstance(layer.outline, Dense):
            row = noted(row, shared_note(layer.group, layer.info.tensor))
        row = row if self.compression.method.rotates is None else noted(row, ROTATED_NOTE)
        return noted(row, COARSE_NOTE) if any(each.coarse for each in sums) else row

    def _copied(self, name: str, rows: slice) -> BySums:
        """Copy some rows of a parameter."""
        checkpoint = self.compression.checkpoint
        value = (
            checkpoint.weight(name, rows)
            if name in checkpoint.manifest.entries
            else checkpoint.rows(name, rows.start, rows.stop).to(self.output.parameters[name].dense.dtype)
        )
        for tensor in [value] if isinstance(value, Tensor) else value.tensors().values():
            if not self.layers.get(name) and not may_be_infinite(name):
                require_finite(tensor, name, checkpoint.path)
            elif count_not_finite(tensor):
                self.infinite.add(name)
        self._put(name, value, rows.start)
        return {name: ErrorSums()}

    def _copied_part(self, name: str, layer: LayerPlan) -> BySums:
        """Copy a part of a stored weight."""
        checkpoint, part = self.compression.checkpoint, layer.info.part
        alone = layer.info.outline is not None and layer.info.outline.in_proportion()
        for rows in reading.slices(self.compression, name, layer) if alone else [None]:
            self._put(name, checkpoint.weight(name, rows, part), 0 if rows is None else rows.start, part=part)
        return {}

    def _copied_in_parts(self, name: str) -> BySums:
        """Copy a parameter of which no block of rows can be written alone."""
        checkpoint = self.compression.checkpoint
        if not copied_in_parts(checkpoint, name, self.output, self.writer, name):
            self._put(name, checkpoint.weight(name), 0)
        return {name: ErrorSums()}

    def _block(self, name: str, rows: slice, job: LayerPlan, put: Callable[[Weight], None]) -> BySums:
        """Read, compress and write some rows of a parameter."""
        if self.compiled and job.info.outline is None:
            axis = reading.axis_of(self.compression.checkpoint, name, job)
            tensor = self.compression.checkpoint.rows(name, rows.start, rows.stop, axis)
            start = time.perf_counter()
            measured = self.compiled(job.info.matrix(tensor).contiguous(), job.info, job.config)
            seconds = time.perf_counter() - start
            if measured is not None:
                put(measured.weight)
                return {name: ErrorSums(measured.error, measured.norm, seconds, is_coarse(measured.weight))}
        weight, sums = compressed(self.compression.method, job, reading.read(self.compression, job, rows))
        put(weight)
        return {key_of(job): sums}

    def _together(self, jobs: Sequence[LayerPlan], rows: Sequence[slice | None], config: Any) -> BySums:
        """Read, compress and write blocks of rows of layers that share what they become; None: a layer has no such."""
        method, group = self.compression.method, jobs[0].group
        assert method.shares is not None
        assert group is not None
        parts = parts_of_bytes([job.outline for job in jobs if job.outline is not None], group.part)
        there = [(job, its, part) for job, its, part in zip(jobs, rows, parts, strict=True) if its is not None]
        layers = [reading.read(self.compression, job, its) for job, its, _ in there]
        start = time.perf_counter()
        weights = method.shares.compress(layers, config)
        seconds = (time.perf_counter() - start) / len(layers)
        sums = {}
        for (job, its, part), layer, weight in zip(there, layers, weights, strict=True):
            self._put(job.info.tensor, weight, its.start)
            sums[job.info.tensor] = summed(method, job, layer, weight, part, seconds)
        return sums

    def _put(
        self, name: str, weight: Tensor | Weight, start: int, begin: Mapping[str, int] | None = None, part: str = ""
    ) -> None:
        """Write what the rows from `start` on became.

        Args:
            begin: where their part of a tensor begins, by its name on disk, if not in proportion to the rows.
            part: of the parameter's weight, of which these are rows; '' for all of it.
        """
        planned, job = self.output.parameters[name], next(iter(self.layers.get(name, [])), None)
        axis = reading.axis_of(self.compression.checkpoint, name, job if job and job.config is not None else None)
        dense, total = planned.dense, planned.dense.shape[0 if part else axis]
        if part and planned.weight is not None:
            total = planned.weight.parts()[part].shape[0]
        elif isinstance(weight, Dense):
            matrix = weight.matrix.t() if axis else weight.matrix.reshape(-1, *dense.shape[1:])
            weight = matrix.to(dense.dtype)
        for disk, tensor in encoded(self.output, name, weight, part).items():
            if begin and begin.get(disk, 0) >= self.output.stored[name][disk].shape[0]:
                continue  # each block gives all of it, and the first one has
            if isinstance(weight, Tensor):
                self.writer.put_part(disk, tensor, start, axis)
            elif begin and disk in begin:
                self.writer.put_part(disk, tensor, begin[disk])
            else:
                self.writer.put_rows(disk, tensor, start, total)


def fast_pass(
    method: AnyLayerMethod, layers: Iterable[LayerPlan]
) -> Callable[[Tensor, LayerInfo, Any], Measured | None] | None:
    """The method's fast pass over rows; None where it has none, or the layers are too small to be worth its loading."""
    if method.row_wise is None or method.row_wise.measured is None:
        return None
    weights = sum(math.prod(layer.info.shape) for layer in layers if layer.config is not None)
    return method.row_wise.measured if weights >= LARGE else None


def load_compiled(method: AnyLayerMethod, layers: Sequence[LayerPlan]) -> None:
    """Have code loaded that blocks will run, or compiled for the first time: by a row of ones."""
    compiled = fast_pass(method, layers)
    job = next((layer for layer in layers if layer.config is not None), None)
    if job is None or compiled is None or method.reads(job.config):
        return
    columns = job.info.shape[1]
    info = replace(job.info, shape=(1, columns), tensor_shape=(1, columns))
    compiled(torch.ones(1, columns, dtype=info.dtype), info, job.config)


@contextmanager
def row_blocks(
    compression: Compression, layers: Mapping[str, Sequence[LayerPlan]], output: Output, writer: CheckpointWriter
) -> Iterator[RowBlocks]:
    """A thread for each of torch's, each of which computes alone; what is not begun at an error never is."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        compiled = fast_pass(compression.method, chain.from_iterable(layers.values()))
        yield RowBlocks(compression, layers, output, writer, pool, compiled)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # it is the default of threads to come

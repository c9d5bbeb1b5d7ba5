"""Parameters worked on in blocks of rows: each is read, compressed, measured and written while it is near.

What a row becomes must not depend on other rows, or on nothing but counts that a first reading gives (`RowWise`);
parameters that are copied go this way too.
Blocks of the next parameters are begun before the last one is finished, so that no core waits.
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
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import CheckpointWriter
from aicompress.checkpoint.files import count_not_finite, may_be_infinite
from aicompress.checkpoint.reader import require_finite
from aicompress.layer import Layer, LayerInfo
from aicompress.measure import relative, squared_sums
from aicompress.methods.capabilities import Measured
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.report_rows import COARSE_NOTE, changed_row, idle_row, is_coarse, noted
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.pipeline.step.output import Output
from aicompress.report.model import LayerRow
from aicompress.weights import Dense, Weight

BLOCK = 1 << 21  # weights in a block: a few pieces of the arithmetic (`rounding.PIECE`), little memory beside a layer
WORD = 32  # a block's rows are a multiple: zero points of so many rows share words
LARGE = 1 << 28  # weights from which on compiled code is worth loading, or compiling
AHEAD = 4  # parameters begun before the first of them is finished


@dataclass(frozen=True)
class Sums:
    """What a block adds to its layer's row: ‖W − Ŵ‖², ‖W‖², seconds in the method, and whether scales are coarse."""

    error: float = 0.0
    norm: float = 0.0
    seconds: float = 0.0
    coarse: bool = False


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
    """

    compression: Compression
    layers: Mapping[str, Sequence[LayerPlan]]
    output: Output
    writer: CheckpointWriter
    pool: ThreadPoolExecutor
    compiled: Callable[[Tensor, LayerInfo, Any], Measured | None] | None = None
    infinite: set[str] = field(default_factory=set)  # copied as they are

    def written(self, names: Sequence[str]) -> Iterator[tuple[str, list[LayerRow] | None]]:
        """Write parameters in order, and give their layers' rows; None for one that has to be done as a whole.

        Raises:
            CheckpointError: a weight holds NaN or infinity.
            CompressError: the method gave such values.
        """
        begun: deque[tuple[str, list[Future[Sums]]]] = deque()
        for name in names:
            begun.append((name, self._begin(name)))
            if len(begun) > AHEAD:
                yield self._finish(*begun.popleft())
        while begun:
            yield self._finish(*begun.popleft())

    def _begin(self, name: str) -> list[Future[Sums]]:
        if not divisible(self.compression, name, self.layers.get(name, [])):
            return []
        job = next((layer for layer in self.layers.get(name, []) if layer.config is not None), None)
        parts = _slices(self.compression, name, job)
        if job is None:
            return [self.pool.submit(self._copied, name, rows) for rows in parts]
        begin: dict[str, int] = {}
        submitted = []
        for rows, config in zip(parts, self._configs(job, name, parts), strict=True):
            submitted.append(self.pool.submit(self._block, name, rows, replace(job, config=config), dict(begin)))
            if config is not job.config:
                for disk, length in self._lengths(name, job, rows, config).items():
                    begin[disk] = begin.get(disk, 0) + length
        return submitted

    def _configs(self, job: LayerPlan, name: str, parts: Sequence[slice]) -> Sequence[Any]:
        """The config of every block of rows."""
        rows_apart = self.compression.method.row_wise
        divided = None if rows_apart is None or not rows_apart.parted(job.config) else rows_apart.divided
        if divided is None or len(parts) == 1:
            return [job.config] * len(parts)
        readers = [partial(_read, self.compression, job, rows) for rows in parts]
        return divided(job.info, readers, job.config)

    def _lengths(self, name: str, job: LayerPlan, rows: slice, config: Any) -> dict[str, int]:
        """How long the tensors are that a block of rows gives, by their names on disk."""
        outline = self.compression.method.outline(_part(job.info, rows), config)
        tensors = {} if isinstance(outline, Dense) else self.output.encode(name, outline)
        return {disk: len(tensor) for disk, tensor in tensors.items()}

    def _finish(self, name: str, parts: list[Future[Sums]]) -> tuple[str, list[LayerRow] | None]:
        if not parts:
            return name, None
        sums = [part.result() for part in parts]
        layer = next(iter(self.layers.get(name, [])), None)
        if layer is None or layer.config is None:
            return name, [] if layer is None else [idle_row(layer)]
        assert layer.outline is not None
        error = relative(math.fsum(each.error for each in sums), math.fsum(each.norm for each in sums))
        seconds = sum(each.seconds for each in sums)
        row = changed_row(self.compression.method, layer, layer.outline, error, seconds)
        return name, [noted(row, COARSE_NOTE) if any(each.coarse for each in sums) else row]

    def _copied(self, name: str, rows: slice) -> Sums:
        """Copy some rows of a parameter."""
        tensor = self.compression.checkpoint.rows(name, rows.start, rows.stop)
        if not self.layers.get(name) and not may_be_infinite(name):
            require_finite(tensor, name, self.compression.checkpoint.path)
        elif count_not_finite(tensor):
            self.infinite.add(name)
        self._put(name, tensor, rows.start)
        return Sums()

    def _block(self, name: str, rows: slice, job: LayerPlan, begin: Mapping[str, int]) -> Sums:
        """Read, compress and write some rows of a parameter."""
        if self.compiled:
            tensor = self.compression.checkpoint.rows(name, rows.start, rows.stop)
            start = time.perf_counter()
            measured = self.compiled(job.info.matrix(tensor), job.info, job.config)
            seconds = time.perf_counter() - start
            if measured is not None:
                self._put(name, measured.weight, rows.start)
                return Sums(measured.error, measured.norm, seconds, is_coarse(measured.weight))
        layer = _read(self.compression, job, rows)
        start = time.perf_counter()
        weight = self.compression.method.apply(layer, job.config)
        seconds = time.perf_counter() - start
        self._put(name, weight, rows.start, begin)
        return Sums(*squared_sums(layer.weight, weight), seconds, is_coarse(weight))

    def _put(self, name: str, weight: Tensor | Weight, start: int, begin: Mapping[str, int] | None = None) -> None:
        """Write what the rows from `start` on became.

        Args:
            begin: where their part of a tensor begins, by its name on disk, if not in proportion to the rows.
        """
        dense = self.output.parameters[name].dense
        if isinstance(weight, Dense):
            weight = weight.matrix.reshape(-1, *dense.shape[1:]).to(dense.dtype)
        for disk, part in self.output.encode(name, weight).items():
            if begin and disk in begin:
                self.writer.put_part(disk, part, begin[disk])
            else:
                self.writer.put_rows(disk, part, start, dense.shape[0])


def readers(compression: Compression, job: LayerPlan) -> list[Callable[[], Layer]] | None:
    """Functions that read a layer's blocks of rows, in order; None where it is worked on as a whole."""
    if not divisible(compression, job.info.tensor, [job]):
        return None
    return [partial(_read, compression, job, rows) for rows in _slices(compression, job.info.tensor, job)]


def _slices(compression: Compression, name: str, job: LayerPlan | None) -> list[slice]:
    rows_apart = compression.method.row_wise
    together = 1 if job is None or rows_apart is None else rows_apart.together(job.config)
    return blocks(compression.checkpoint.tensors[name].spec.shape, together)


def _read(compression: Compression, job: LayerPlan, rows: slice) -> Layer:
    """Read some rows of a layer, as a layer.

    Raises:
        CheckpointError: they hold NaN or infinity.
    """
    tensor = compression.checkpoint.rows(job.info.tensor, rows.start, rows.stop)
    matrix = job.info.matrix(tensor)
    require_finite(matrix, job.info.name, compression.checkpoint.path)
    seed = layer_seed(compression.seed, job.info.name)
    return Layer(_part(job.info, slice(0, len(tensor))), matrix.float(), Dense(matrix), seed=seed)


def _part(info: LayerInfo, rows: slice) -> LayerInfo:
    """Some rows of a layer's tensor, as those of a layer."""
    whole, count = info.tensor_shape[0], rows.stop - rows.start
    shape = (info.shape[0] * count // whole, info.shape[1])
    return replace(info, shape=shape, tensor_shape=(count, *info.tensor_shape[1:]))


def divisible(compression: Compression, name: str, layers: Sequence[LayerPlan]) -> bool:
    """Whether a parameter may be done in blocks of rows: copied as it is, or compressed row by row."""
    checkpoint, method = compression.checkpoint, compression.method
    if not checkpoint.is_plain(name) or not checkpoint.tensors[name].spec.shape:
        return False
    return all(_by_rows(method, layer) for layer in layers if layer.config is not None)


def whole_ones(compression: Compression, layers: Iterable[LayerPlan]) -> list[str]:
    """A note that names the largest layer of those that a method without calibration data works on as a whole."""
    method = compression.method
    chosen = [layer for layer in layers if layer.config is not None and not method.reads(layer.config)]
    infos = [layer.info for layer in chosen if not divisible(compression, layer.info.tensor, [layer])]
    whole = [info if info.experts is None else info.of_expert(0) for info in infos]
    largest = max(whole, key=lambda info: math.prod(info.shape), default=None)
    if largest is None or math.prod(largest.shape) <= BLOCK:
        return []
    size = f"{4 * math.prod(largest.shape):,} bytes of memory"
    return [f"{method.name} reads matrices whole: {largest.name} takes {size} beside what is made of it"]


def _by_rows(method: AnyLayerMethod, layer: LayerPlan) -> bool:
    if method.row_wise is None or method.reads(layer.config) or layer.info.transposed or layer.info.experts:
        return False
    if method.row_wise.parted(layer.config) and layer.info.kind == "experts":
        return False  # each of them has counts of its own
    return method.row_wise.independent(layer.config)


def blocks(shape: Sequence[int], together: int = 1) -> list[slice]:
    """Slices along the first axis of about `BLOCK` elements.

    Args:
        shape: of a tensor.
        together: a slice holds a multiple of so many rows; the last one holds the rest as well.
    """
    rows, row = shape[0], math.prod(shape[1:])
    if len(shape) == 3 and row % WORD == 0 and shape[1] % WORD == 0:  # experts, each of whole words
        step = max(1, BLOCK // max(1, row))  # a tensor may be empty
    else:
        each = math.lcm(WORD, together)
        step = max(1, BLOCK // max(1, row) // each) * each
    starts = list(range(0, rows, step))
    if together > 1 and len(starts) > 1 and rows - starts[-1] < step:
        starts.pop()  # a short one might be stored otherwise than the whole
    return [slice(start, end) for start, end in pairwise([*starts, rows])]


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

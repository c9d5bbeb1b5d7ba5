"""Which layers are worked on in blocks of rows, and how such a block is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from aicompress.checkpoint.reader import require_finite
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.weights import Dense

BLOCK = 1 << 21  # weights in a block: a few pieces of the arithmetic (`rounding.PIECE`), little memory beside a layer
WORD = 32  # a block's rows are a multiple: zero points of so many rows share words


def readers(compression: Compression, job: LayerPlan) -> list[Callable[[], Layer]] | None:
    """Functions that read a layer's blocks of rows, in order; None where it is worked on as a whole."""
    if not divisible(compression, job.info.tensor, [job]):
        return None
    return [partial(read, compression, job, rows) for rows in slices(compression, job.info.tensor, job)]


def slices(compression: Compression, name: str, job: LayerPlan | None) -> list[slice]:
    """The blocks of rows of a parameter: where layers are worked on together, all of theirs are one block's weights."""
    rows_apart = compression.method.row_wise
    together = 1 if job is None or rows_apart is None else rows_apart.together(job.config)
    layers = 1 if job is None or job.group is None else len(job.group.members)
    return blocks(compression.checkpoint.tensors[name].spec.shape, together, BLOCK // layers)


def read(compression: Compression, job: LayerPlan, rows: slice) -> Layer:
    """Read some rows of a layer, as a layer.

    Raises:
        CheckpointError: they hold NaN or infinity.
    """
    tensor = compression.checkpoint.rows(job.info.tensor, rows.start, rows.stop)
    matrix = job.info.matrix(tensor)
    require_finite(matrix, job.info.name, compression.checkpoint.path)
    seed = layer_seed(compression.seed, job.info.name)
    return Layer(part_of(job.info, slice(0, len(tensor))), matrix.float(), Dense(matrix), seed=seed)


def part_of(info: LayerInfo, rows: slice) -> LayerInfo:
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
    if layer.product is not None or (layer.group is not None and not (method.shares and method.shares.row_wise)):
        return False
    if method.row_wise is None or method.reads(layer.config) or layer.info.transposed or layer.info.experts:
        return False
    if method.row_wise.parted(layer.config) and layer.info.kind == "experts":
        return False  # each of them has counts of its own
    return method.row_wise.independent(layer.config)


def blocks(shape: Sequence[int], together: int = 1, weights: int | None = None) -> list[slice]:
    """Slices along the first axis of about `BLOCK` elements, or as many as are given.

    Args:
        shape: of a tensor.
        together: a slice holds a multiple of so many rows; the last one holds the rest as well.
        weights: elements of a slice.
    """
    rows, row, most = shape[0], math.prod(shape[1:]), BLOCK if weights is None else weights
    if len(shape) == 3 and row % WORD == 0 and shape[1] % WORD == 0:  # experts, each of whole words
        step = max(1, most // max(1, row))  # a tensor may be empty
    else:
        each = math.lcm(WORD, together)
        step = max(1, most // max(1, row) // each) * each
    starts = list(range(0, rows, step))
    if together > 1 and len(starts) > 1 and rows - starts[-1] < step:
        starts.pop()  # a short one might be stored otherwise than the whole
    return [slice(start, end) for start, end in pairwise([*starts, rows])]

"""Which layers are worked on in blocks of rows, and how such a block is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from aicompress.checkpoint import Checkpoint, files
from aicompress.checkpoint.reader import require_finite
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.factors import is_plain_product
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.methods.quantize.grid.row_feedback import blocks_of
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.rows.kept import is_kept_apart
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.weights import Dense, Weight
from aicompress.weights.coding.rows import row_slices

BLOCK = 1 << 21  # weights in a block: a few pieces of the arithmetic (`rounding.PIECE`), little memory beside a layer
WORD = 32  # a block's rows are a multiple: zero points of so many rows share words
MOST = 2 * BLOCK  # weights of a block of a layer that is stored (in, out), whose rows are read a piece each


def readers(compression: Compression, job: LayerPlan) -> list[Callable[[], Layer]] | None:
    """Functions that read a layer's blocks of rows, in order; None where it is worked on as a whole."""
    if not divisible(compression, job.info.tensor, [job]):
        return None
    return [partial(read, compression, job, rows) for rows in slices(compression, job.info.tensor, job)]


def slices(compression: Compression, name: str, job: LayerPlan | None) -> list[slice]:
    """The blocks of rows of a parameter: where layers are worked on together, all of theirs are one block's weights."""
    checkpoint, rows_apart = compression.checkpoint, compression.method.row_wise
    multiple = 1 if job is None or rows_apart is None else rows_apart.multiple(job.config)
    members = (name,) if job is None or job.group is None else job.group.members
    part = "" if job is None else job.info.part
    axis, shape = axis_of(checkpoint, name, job), checkpoint.parameters()[name].shape
    along = job.info.shape if job is not None and part else (shape[axis], *shape[:axis], *shape[axis + 1 :])
    stored = math.lcm(*(checkpoint.row_multiple(member, part) for member in members))  # the same rows of each
    stored = math.lcm(stored, files.narrow(math.prod(along[1:]), MOST)) if axis else stored
    return blocks(along, multiple, BLOCK // len(members), stored)


def axis_of(checkpoint: Checkpoint, name: str, job: LayerPlan | None) -> int:
    """The axis of a parameter that the rows of its blocks lie along: 1 of a layer that is stored (in, out)."""
    if job is not None and job.info.part:
        return 0
    return 1 if job is not None and job.info.transposed else checkpoint.row_axis(name)


def read(compression: Compression, job: LayerPlan, rows: slice) -> Layer:
    """Read some rows of a layer, as a layer.

    Raises:
        CheckpointError: they hold NaN or infinity.
    """
    checkpoint, info = compression.checkpoint, job.info
    own = part_of(info, rows)
    if info.outline is None:
        axis = axis_of(checkpoint, info.tensor, job)
        tensor = checkpoint.rows(info.tensor, rows.start, rows.stop, axis)
        weight: Weight = Dense(info.matrix(tensor).contiguous())
    else:
        weight = checkpoint.weight(info.tensor, rows, info.part)
        own = replace(own, outline=weight)
    matrix = weight.dense()
    require_finite(matrix, info.name, checkpoint.path)
    return Layer(own, matrix, weight, seed=layer_seed(compression.seed, info.name))


def part_of(info: LayerInfo, rows: slice) -> LayerInfo:
    """Some rows of a layer's tensor, as those of a layer."""
    count = rows.stop - rows.start
    if info.part:
        return replace(info, shape=(count, info.shape[1]))
    if info.transposed:
        return replace(info, shape=(count, info.shape[1]), tensor_shape=(info.tensor_shape[0], count))
    shape = (info.shape[0] * count // info.tensor_shape[0], info.shape[1])
    return replace(info, shape=shape, tensor_shape=(count, *info.tensor_shape[1:]))


def divisible(compression: Compression, name: str, layers: Sequence[LayerPlan]) -> bool:
    """Whether a parameter may be done in blocks of rows: copied as it is, or compressed row by row.

    Args:
        compression: of the step.
        name: the parameter.
        layers: its layers.
    """
    checkpoint, method = compression.checkpoint, compression.method
    chosen = [layer for layer in layers if layer.config is not None]
    if not all(_by_rows(method, layer) for layer in chosen) or _together(compression, name, chosen):
        return False
    return all(checkpoint.row_multiple(name, layer.info.part) for layer in chosen) and (
        bool(chosen) or checkpoint.row_multiple(name) > 0
    )


def _together(compression: Compression, name: str, chosen: Sequence[LayerPlan]) -> bool:
    """Whether one factor of a parameter is rounded as the other one can make up for it."""
    if not compression.method.recodes or not any(layer.info.part for layer in chosen):
        return False
    lent = bool(compression.checkpoint.manifest.owners(name))
    return (lent or len(chosen) > 1) and is_plain_product(compression.checkpoint.outline(name))


def pair(compression: Compression, name: str, layers: Sequence[LayerPlan]) -> tuple[LayerPlan, LayerPlan] | None:
    """The layers of two factors that are rounded together, the outer one in blocks of rows; None: any others."""
    method, jobs = compression.method, {layer.info.part: layer for layer in layers if layer.config is not None}
    if not compression.turns(name, jobs) or not is_plain_product(compression.checkpoint.outline(name)):
        return None
    out, inner = jobs["out"], jobs["in"]
    if inner.info.experts or method.reads(inner.config) or not _by_rows(method, out) or out.config is None:
        return None
    whole = method.row_wise is None or method.row_wise.parted(out.config) or method.two_sided is not None
    small = len(slices(compression, name, out)) == 1
    return None if whole or small or len(blocks_of(out.info, method, out.config)) == 1 else (out, inner)


def whole_ones(compression: Compression, layers: Iterable[LayerPlan]) -> list[str]:
    """A note that names the largest layer of those that a method without calibration data works on as a whole."""
    method = compression.method
    chosen = [layer for layer in layers if layer.config is not None and not method.reads(layer.config)]
    by_tensor: dict[str, list[LayerPlan]] = {}
    for layer in chosen:
        by_tensor.setdefault(layer.info.tensor, []).append(layer)
    whole_tensors = {name for name, its in by_tensor.items() if not divisible(compression, name, its)}
    outer = {name for name in whole_tensors if pair(compression, name, by_tensor[name])}
    held = [layer.info for layer in chosen if layer.info.tensor in whole_tensors]
    infos = [info for info in held if info.part != "out" or info.tensor not in outer]
    whole = [info if info.experts is None else info.of_expert(0) for info in infos]
    largest = max(whole, key=lambda info: math.prod(info.shape), default=None)
    if largest is None or math.prod(largest.shape) <= BLOCK:
        return []
    size = f"{4 * math.prod(largest.shape):,} bytes of memory"
    return [f"{method.name} reads matrices whole: {largest.name} takes {size} beside what is made of it"]


def _by_rows(method: AnyLayerMethod, layer: LayerPlan) -> bool:
    stored = layer.info.outline is not None
    if stored and layer.group:
        return False
    if stored and layer.outline and not layer.outline.in_proportion() and not is_kept_apart(layer.outline):
        return False
    if layer.product is not None or (layer.group is not None and not (method.shares and method.shares.row_wise)):
        return False
    if method.row_wise is None or method.reads(layer.config) or layer.info.experts:
        return False
    return method.row_wise.independent(layer.config)


def blocks(shape: Sequence[int], multiple: int = 1, weights: int | None = None, stored: int = 1) -> list[slice]:
    """Slices along the first axis of about `BLOCK` elements, or as many as are given.

    Args:
        shape: of a tensor.
        multiple: a slice holds a multiple of so many rows; the last one holds the rest as well.
        weights: elements of a slice.
        stored: entries of the axis that the input holds together.
    """
    row = math.prod(shape[1:])
    experts = len(shape) == 3 and row % WORD == 0 and shape[1] % WORD == 0  # each of whole words
    each = stored if experts else math.lcm(WORD, multiple, stored)
    slices = row_slices(shape[0], row, BLOCK if weights is None else weights, each)
    if multiple > 1 and len(slices) > 1 and slices[-1].stop - slices[-1].start < slices[0].stop:
        slices[-2:] = [slice(slices[-2].start, shape[0])]  # a short one might be stored otherwise than the whole
    return slices

"""What stays of an axis along which units lie, and of a tensor or a stored form that is cut along it.

Where the groups of a structure lie along axis 0, as the experts of a merged tensor do, both axes count as one: all
sections of the first expert, then those of the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.methods.structural import Structure
from aicompress.pipeline.step.output import Planned
from aicompress.pipeline.structured.edit import Cut, Edit
from aicompress.weights import PerExpert, TensorSpec, Weight

Along = tuple[int, bool]  # an axis, and whether axis 0 holds groups of its units


def along(cuts: Iterable[Cut]) -> list[Along]:
    """The axes of some cuts, each once."""
    return sorted({(one.axis, one.stacked) for one in cuts})


def length_of(shape: Sequence[int], where: Along) -> int:
    """Entries of an axis, those of all groups together."""
    axis, stacked = where
    return shape[0] * shape[axis] if stacked else shape[axis]


def positions(cuts: Sequence[Cut], length: int, structures: Sequence[Structure], kept: Mapping[int, Tensor]) -> Tensor:
    """Positions that stay along one axis, ascending.

    Args:
        cuts: all cuts of this axis.
        length: of the axis.
        structures: all structures of the edit.
        kept: units that stay, by structure.
    """
    stays = torch.ones(length, dtype=torch.bool)
    for one in cuts:
        structure = structures[one.structure]
        units = torch.zeros(structure.size, dtype=torch.bool)
        units[kept[one.structure]] = True
        groups = units.view(structure.groups if one.stacked else 1, -1)
        sections = torch.cat([groups.repeat_interleave(span, dim=1) for span in one.spans], dim=1).reshape(-1)
        stays[one.begin : one.begin + len(sections)] = sections
    return stays.nonzero()[:, 0]


def selected(tensor: Tensor, where: Along, index: Tensor) -> Tensor:
    """What stays of a tensor along an axis; as much of every group."""
    axis, stacked = where
    if not stacked:
        return tensor.index_select(axis, index)
    return restored(units_first(tensor, where).index_select(0, index), tensor.shape, where)


def units_first(tensor: Tensor, where: Along) -> Tensor:
    """The axis before all others, which a stacked one shares with the groups."""
    axis, stacked = where
    return tensor.movedim(axis, 1).flatten(0, 1) if stacked else tensor.movedim(axis, 0)


def restored(rows: Tensor, shape: Sequence[int], where: Along) -> Tensor:
    """Undo `units_first`.

    Args:
        rows: of units; there may be fewer of them than before.
        shape: of the tensor before.
        where: the axis of units.
    """
    axis, stacked = where
    moved = rows.view(shape[0], -1, *rows.shape[1:]).movedim(1, axis) if stacked else rows.movedim(0, axis)
    return moved.contiguous()


def planned(checkpoint: Checkpoint, edit: Edit, name: str, infos: Mapping[str, LayerInfo]) -> Planned:
    """Outline of one parameter of the output."""
    change = edit.changes[name]
    old = checkpoint.parameters()[change.source]
    shape = list(old.shape)
    for one in change.cuts:
        structure = edit.structures[one.structure]
        gone = (structure.size - edit.sizes[one.structure]) * sum(one.spans)
        shape[one.axis] -= gone // structure.groups if one.stacked else gone
    spec = TensorSpec(old.dtype, tuple(shape))
    weight = None if change.refit else checkpoint.outline(change.source)
    info = infos.get(change.source)
    if weight is None or info is None:
        return Planned(spec, None, info)
    for where in along(change.cuts):
        index = torch.arange(length_of(shape, where), device="meta")
        weight = None if weight is None else cut_matrix(weight, info.transposed, old.shape, where, index)
    columns = spec.shape[-1] if info.kind == "experts" else math.prod(spec.shape[1:])
    if info.kind == "experts":
        rows = math.prod(spec.shape) // columns
        return Planned(spec, weight, replace(info, tensor=name, shape=(rows, columns), tensor_shape=spec.shape))
    matrix = (columns, spec.shape[0]) if info.transposed else (spec.shape[0], columns)
    return Planned(spec, weight, replace(info, tensor=name, shape=matrix, tensor_shape=spec.shape))


def cut_matrix(weight: Weight, transposed: bool, shape: tuple[int, ...], where: Along, index: Tensor) -> Weight | None:
    """Cut the matrix (out, in) of a compressed parameter along one axis of its tensor, whose shape was `shape`."""
    axis, stacked = where
    if stacked:  # of experts one below the other; the columns that stay are not the same for all
        return weight.cut(0, index) if axis == 1 and weight.shape == (shape[0] * shape[1], shape[2]) else None
    if len(shape) == 3 and weight.shape == (shape[0] * shape[1], shape[2]) and shape[1] > 1:  # experts
        if isinstance(weight, PerExpert) and axis == 0:
            return weight.chosen(index)
        rows = (index[:, None] * shape[1] + torch.arange(shape[1], device=index.device)).reshape(-1)
        return weight.cut(0, rows) if axis == 0 else None
    across = 1 - axis if transposed else axis
    tail = math.prod(shape[2:])  # a kernel's elements lie beside one another in a row
    if across > 1:
        return None
    if across == 1 and tail > 1:
        index = (index[:, None] * tail + torch.arange(tail, device=index.device)).reshape(-1)
    return weight.cut(across, index)

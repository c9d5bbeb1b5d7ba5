"""What stays of an axis along which units lie, and of a tensor that is cut along it.

Where the groups of a structure lie along axis 0, as the experts of a merged tensor do, both axes count as one: all
sections of the first expert, then those of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from aicompress.methods.structural import Structure
from aicompress.pipeline.structured.edit import Cut

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

"""Sums and extremes of the weights that share a scale: of groups that are held, or of a matrix read in blocks of rows.

A search for scales asks for sums alone, many in one pass over the weights, and does not see which of the two it works
on. Those of a matrix are added up in float64 over rows, so that it makes no difference where its blocks end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from aicompress.methods.quantize.grid.rounding import widened

BLOCK = 1 << 17  # weights that are summed at once: four times as many float32 numbers stay in a core's cache

Sums: TypeAlias = Callable[[Tensor], Tensor]  # weights (rows, groups, columns) -> (sums, rows, groups)
Total: TypeAlias = Callable[[Sums], Tensor]  # the same sums over everything that shares a scale
Blocks: TypeAlias = Sequence[Callable[[], Tensor]]  # functions that read a matrix's blocks of rows, (rows, columns)


def of_groups(groups: Tensor) -> Total:
    """Totals of groups (rows, groups, columns) that each have a scale: (sums, rows, groups)."""
    return lambda sums: sums(groups)


def of_matrix(blocks: Blocks) -> Total:
    """Totals of a matrix that shares one scale, (sums, 1, 1) float64; every call reads the matrix once."""

    def total(sums: Sums) -> Tensor:
        found = None
        for read in blocks:
            matrix = read().contiguous()
            for rows in torch.split(matrix, max(1, BLOCK // max(1, matrix.shape[1]))):
                own = sums(rows[:, None]).double().sum(-2, keepdim=True)
                found = own if found is None else found.add_(own)
        assert found is not None
        return found

    return total


def range_of_matrix(blocks: Blocks, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of a matrix, zero included, (1, 1) each; reads it once."""
    low = high = 0.0  # numbers: a tensor that stays while large ones come and go would keep theirs from the allocator
    for read in blocks:
        least, most = torch.aminmax(read())
        low, high = min(low, float(least)), max(high, float(most))
    return widened(torch.full((1, 1), low), torch.full((1, 1), high), symmetric)

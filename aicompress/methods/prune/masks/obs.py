"""Optimal brain surgeon, column by column: zero weights in turn and move each one's error into the columns to come.

Hassibi and Stork 1992; the order by columns, shared by all rows, is that of SparseGPT (Frantar and Alistarh 2023,
arXiv:2301.00774, algorithm 1). Works on the transpose, (in, out), so that a column of the weight is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAF = 16  # columns that are updated one by one; matrix products do the rest

Choose = Callable[[Tensor, int], Tensor]  # scores (out, width), first column -> mask (out, width)


@dataclass(frozen=True)
class PruningSweep:
    """How columns are pruned.

    Attributes:
        factor: C, (in, in) upper triangular float32 with H⁻¹ = Cᵀ C.
        choose: the mask of `span` columns, from the loss w² / C_jj² that each weight's removal costs.
        there: (out, in) bool; a weight that is not there stays zero even where the mask keeps it.
        span: columns whose mask is chosen together.
    """

    factor: Tensor
    choose: Choose
    there: Tensor
    span: int

    def run(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Prune a matrix.

        Args:
            weight: (out, in) float32.

        Returns:
            The pruned weight with the survivors moved, and its mask, both (out, in).
        """
        left = weight.t().contiguous().clone()
        mask = torch.zeros(left.shape, dtype=torch.bool)
        columns, block = len(left), max(self.span, -(-128 // self.span) * self.span)
        for begin in range(0, columns, block):
            end = min(columns, begin + block)
            errors = torch.empty_like(left[begin:end])
            for first in range(begin, end, self.span):
                self._span(left, mask, errors, (begin, first, min(end, first + self.span)), end)
            left[end:].addmm_(self.factor[begin:end, end:].t(), errors, alpha=-1)
        return left.t().contiguous(), mask.t().contiguous()

    def _span(self, left: Tensor, mask: Tensor, errors: Tensor, where: tuple[int, int, int], end: int) -> None:
        """Choose the mask of a span and prune its columns; columns up to `end` are kept up to date."""
        begin, first, last = where
        diagonal = self.factor.diagonal()[first:last, None]
        mask[first:last] = self.choose((left[first:last] / diagonal).square_().t(), first).t()
        stays = mask[first:last] & self.there[:, first:last].t()
        for start in range(first, last, LEAF):
            stop = min(last, start + LEAF)
            for i in range(start, stop):
                value = left[i] * stays[i - first]
                error = torch.sub(left[i], value, out=errors[i - begin]).div_(self.factor[i, i])
                left[i] = value
                left[i + 1 : stop].addr_(self.factor[i, i + 1 : stop], error, alpha=-1)
            left[stop:end].addmm_(self.factor[start:stop, stop:end].t(), errors[start - begin : stop - begin], alpha=-1)

"""Rounding to a uniform grid by what a code costs in error and in bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aicompress.methods.quantize.grid.columns import ColumnSweep, in_one_pass, one_by_one
from aicompress.weights.decoding import compiled

MOST = 127


@dataclass(frozen=True)
class UniformGrid:
    """A uniform grid for each column, and what its codes cost.

    Attributes:
        steps: (in,) float32.
        price: of a bit in each column, in squares of its step.
        tables: (buckets, 256) bits of code + 128; zeros where bits do not count.
        bucket: of each column, int64.
    """

    steps: Tensor
    price: Tensor
    tables: Tensor
    bucket: Tensor

    def leaf(self, sweep: ColumnSweep, begin: int, end: int) -> None:
        """Round some of the columns of a sweep, each telling the later ones of them its error."""
        columns = compiled(round_uniform)
        if columns is None:
            one_by_one(self.round, sweep, begin, end)
            return
        in_one_pass(columns, (self.steps, self.price, self.tables, self.bucket), sweep, begin, end)

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """Fill `codes` (out,) with the codes of least cost of a column; returns their values."""
        exact = target / self.steps[column]
        nearest = torch.round(exact, out=codes).clamp_(-MOST, MOST)
        table, smaller = self.tables[self.bucket[column]], nearest - nearest.sign()
        saved = table[(nearest + 128).int()] - table[(smaller + 128).int()]
        further = (exact - smaller).square_() - (exact - nearest).square_()
        codes.copy_(torch.where(further < saved.mul_(self.price[column]), smaller, nearest))
        return codes * self.steps[column]


def round_uniform(targets: Any, coupling: Any, costs: Any, span: Any, codes: Any, errors: Any) -> None:
    """Fill codes and errors of columns `span` and move the errors into later ones. Compiled by numba.

    Args:
        targets, coupling, codes, errors: of a sweep; no coupling where it has no entries.
        costs: of a `UniformGrid`.
        span: the first column, and the one after the last.
    """
    steps, price, tables, bucket = costs
    begin, end = span
    for i in range(begin, end):
        step, cost, table = steps[i], price[i], tables[bucket[i]]
        target, code, error = targets[i], codes[i], errors[i]
        for row in range(target.size):
            exact = target[row] / step
            nearest = min(np.float32(127), max(np.float32(-127), np.rint(exact)))
            smaller = nearest - np.sign(nearest)
            saved = table[int(nearest) + 128] - table[int(smaller) + 128]
            near, far = exact - nearest, exact - smaller
            chosen = smaller if far * far - near * near < saved * cost else nearest
            code[row] = chosen
            error[row] = chosen * step - target[row]
        if coupling.size > 0:
            for k in range(i + 1, end):
                later, factor = targets[k], coupling[i, k]
                for row in range(later.size):
                    later[row] += factor * error[row]

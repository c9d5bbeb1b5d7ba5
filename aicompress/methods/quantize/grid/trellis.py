"""Rounding to two quantizers by the path of least cost through a trellis of eight states, down the rows of a column.

Rows of a column are independent of each other under the error of a layer, so that the feedback between columns stays as
it is in GPTQ. The path is found by the Viterbi algorithm, over blocks of 256 rows: for each row, state and parity the
code of least (x − v)² + λ R, where R is the code length under the quantizer that the state says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aicompress.methods.quantize.grid.columns import ColumnSweep, in_one_pass
from aicompress.weights.decoding import NEXT_STATE, compiled

# Of each state, the two that lead to it: the lower one, its parity, the higher one, its parity.
PREVIOUS = np.array(
    [[n for state in range(8) for parity in (0, 1) if NEXT_STATE[state][parity] == new for n in (state, parity)]
     for new in range(8)]
)  # fmt: skip


@dataclass(frozen=True)
class TrellisGrid:
    """A grid of two quantizers for each column, and what its codes cost.

    Attributes:
        steps: (in,) float32.
        price: of a bit in each column, in squares of its step.
        tables: (buckets, 2, 256) bits of code + 128 under each quantizer.
        bucket: of each column.
    """

    steps: Tensor
    price: Tensor
    tables: Tensor
    bucket: Tensor

    def leaf(self, sweep: ColumnSweep, begin: int, end: int) -> None:
        """Round some of the columns of a sweep, each telling the later ones of them its error."""
        columns = compiled_search() or round_trellis
        in_one_pass(columns, (self.steps, self.price, self.tables, self.bucket), sweep, begin, end)


def compiled_search() -> Any:
    """`round_trellis`, compiled; None without numba."""
    return compiled(round_trellis, least_cost)


def round_trellis(targets: Any, coupling: Any, costs: Any, span: Any, codes: Any, errors: Any) -> None:
    """Fill codes and errors of columns `span` and move the errors into later ones. Compiled by numba.

    Args:
        targets, coupling, codes, errors: of a sweep; no coupling where it has no entries.
        costs: of a `TrellisGrid`.
        span: the first column, and the one after the last.
    """
    steps, price, tables, bucket = costs
    begin, end = span
    for i in range(begin, end):
        step, target, code, error = steps[i], targets[i], codes[i], errors[i]
        least_cost(target / step, tables[bucket[i]], price[i], code, error)
        for row in range(target.size):
            error[row] = error[row] * step - target[row]
        if coupling.size > 0:
            for k in range(i + 1, end):
                later, factor = targets[k], coupling[i, k]
                for row in range(later.size):
                    later[row] += factor * error[row]


def least_cost(exact: Any, table: Any, price: Any, codes: Any, values: Any) -> None:
    """Fill codes and their values in steps, (rows,) float32, for targets in steps. Compiled by numba."""
    back = np.empty((256, 8), dtype=np.uint8)  # which of two states was before
    kept = np.empty((256, 4), dtype=np.int8)  # the best code of each quantizer and parity
    cost, after, best = np.empty(8), np.empty(8), np.empty(4)
    for begin in range(0, len(exact), 256):
        rows = min(256, len(exact) - begin)
        cost[:] = 1e30
        cost[0] = 0.0
        for row in range(rows):
            x = exact[begin + row]
            sign = 1 if x >= 0 else -1
            best[:] = 1e30
            for quantizer in range(2):
                middle = sign * int((abs(x) + quantizer) / 2 + 0.5)
                for candidate in (middle, middle - 1, middle + 1, 0):
                    k = min(127, max(-127, candidate))
                    off = x - (2 * k - quantizer * ((1 if k > 0 else 0) - (1 if k < 0 else 0)))
                    total = off * off + price * table[quantizer, k + 128]
                    place = 2 * quantizer + (k & 1)
                    if total < best[place]:
                        best[place] = total
                        kept[row, place] = k
            for new in range(8):
                first, second = PREVIOUS[new, 0], PREVIOUS[new, 2]
                one = cost[first] + best[2 * (first & 1) + PREVIOUS[new, 1]]
                other = cost[second] + best[2 * (second & 1) + PREVIOUS[new, 3]]
                back[row, new] = 1 if other < one else 0
                after[new] = min(one, other)
            cost[:] = after
        state = 0
        for new in range(1, 8):
            state = new if cost[new] < cost[state] else state
        for row in range(rows - 1, -1, -1):
            before = 2 * back[row, state]
            place = PREVIOUS[state, before + 1]
            state = PREVIOUS[state, before]
            k = kept[row, 2 * (state & 1) + place]
            codes[begin + row] = k
            values[begin + row] = 2 * k - (state & 1) * ((1 if k > 0 else 0) - (1 if k < 0 else 0))


def typical() -> Tensor:
    """Code lengths (1, 2, 256) to begin with, before any code is counted."""
    return (1 + 0.5 * torch.arange(-128, 128).abs()).repeat(1, 2, 1)

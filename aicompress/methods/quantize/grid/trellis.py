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

from aicompress.weights.decoding import NEXT_STATE, compiled


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

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """Fill `codes` (out,) with the path of least cost of a column; returns its values."""
        exact = (target / self.steps[column]).numpy()
        table = self.tables[self.bucket[column]].numpy()
        values = np.empty(len(exact), dtype=np.float32)
        path = compiled(least_cost) or least_cost
        path(exact, table, float(self.price[column]), np.array(NEXT_STATE, dtype=np.int64), codes.numpy(), values)
        return torch.from_numpy(values).mul_(self.steps[column])


def least_cost(exact: Any, table: Any, price: float, follow: Any, codes: Any, values: Any) -> None:
    """Fill codes and their values in steps, (rows,) float32, for targets in steps. Compiled by numba."""
    back = np.empty((256, 8), dtype=np.int64)
    chosen = np.empty((256, 8), dtype=np.int64)
    cost, after = np.empty(8), np.empty(8)
    best, code = np.empty((2, 2)), np.empty((2, 2), dtype=np.int64)
    for begin in range(0, len(exact), 256):
        rows = min(256, len(exact) - begin)
        cost[:] = 1e30
        cost[0] = 0.0
        for row in range(rows):
            x = exact[begin + row]
            best[:] = 1e30
            for quantizer in range(2):
                sign = 1 if x >= 0 else -1
                middle = sign * int((abs(x) + quantizer) / 2 + 0.5)
                for candidate in (middle, middle - 1, middle + 1, 0):
                    k = min(127, max(-127, candidate))
                    value = 2 * k - quantizer * ((1 if k > 0 else 0) - (1 if k < 0 else 0))
                    total = (x - value) * (x - value) + price * table[quantizer, k + 128]
                    if total < best[quantizer, k & 1]:
                        best[quantizer, k & 1] = total
                        code[quantizer, k & 1] = k
            after[:] = 1e30
            for state in range(8):
                for parity in range(2):
                    total = cost[state] + best[state & 1, parity]
                    new = follow[state, parity]
                    if total < after[new]:
                        after[new] = total
                        back[row, new] = state
                        chosen[row, new] = code[state & 1, parity]
            cost[:] = after
        state = int(np.argmin(cost))
        for row in range(rows - 1, -1, -1):
            k = chosen[row, state]
            state = back[row, state]
            codes[begin + row] = k
            values[begin + row] = 2 * k - (state & 1) * ((1 if k > 0 else 0) - (1 if k < 0 else 0))


def typical() -> Tensor:
    """Code lengths (1, 2, 256) to begin with, before any code is counted."""
    return (1 + 0.5 * torch.arange(-128, 128).abs()).repeat(1, 2, 1)

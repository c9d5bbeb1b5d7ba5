"""Integer codes of a matrix whose errors E count by both sides, tr(P E H Eᵀ), in compiled passes.

Each code is rounded with feedback from the columns and from the rows before it (YAQA, Tseng et al. 2025,
arXiv:2505.22988, with H⁻¹ = Cᵀ C and P⁻¹ = Dᵀ D as in GPTQ, arXiv:2210.17323). Then sweeps of coordinate descent give
every code the nearest to its best value with all others fixed, −(P E H)_ri / (P_rr H_ii) from where it is. After each
the scales of every row are fitted, where that loses less. All matrices are transposed, (in, out), columns in the order
of rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aicompress.methods.quantize.grid.columns import ColumnGrid, ColumnSweep, in_one_pass
from aicompress.methods.quantize.grid.coordinate_descent import fit_scales
from aicompress.weights.decoding import compiled

SWEEPS = 8
FITS = 1  # of the scales to what rows aim at, and roundings after it, before the sweeps


@dataclass(frozen=True)
class DampedSides:
    """What errors count by, both damped to be positive definite.

    Attributes:
        hessian: H, (in, in) float32.
        columns: C / diag(C), (in, in) float32.
        metric: P, (out, out) float32.
        rows: D / diag(D), (out, out) float32.
    """

    hessian: Tensor
    columns: Tensor
    metric: Tensor
    rows: Tensor

    def loss(self, error: Tensor) -> float:
        """tr(P E H Eᵀ) of an error (in, out)."""
        return float(torch.sum((self.hessian @ error) * (error @ self.metric), dtype=torch.float64))


@dataclass(frozen=True)
class _Rounding:
    """Rounds columns whose rows make up for the rows before.

    Attributes:
        kernel: `round_both`, compiled.
        costs: of a grid.
        wanted: (in, out).
        rows: as of `Sides`.
        goals: (in, out), to be filled with what rows aim at, errors of the rows before made up for.
    """

    kernel: Any
    costs: Sequence[Tensor]
    wanted: Tensor
    rows: Tensor
    goals: Tensor

    def leaf(self, sweep: ColumnSweep, begin: int, end: int) -> None:
        """Round some of the columns of a sweep, each telling the later ones of them its error."""
        in_one_pass(self.kernel, (*self.costs, self.wanted, self.rows, self.goals), sweep, begin, end)


@dataclass(frozen=True)
class _Descent:
    """Gives the codes of columns their best values; targets of the sweep are H E P, its errors the changes of E P.

    Attributes:
        kernel: `descend_both`, compiled.
        costs: of a grid.
        values: (in, out), of the codes; changed with them.
        diagonal: of H, (in,).
        metric: as of `Sides`.
    """

    kernel: Any
    costs: Sequence[Tensor]
    values: Tensor
    diagonal: Tensor
    metric: Tensor

    def leaf(self, sweep: ColumnSweep, begin: int, end: int) -> None:
        """Change the codes of some columns, each telling the later ones of them its changes."""
        in_one_pass(self.kernel, (*self.costs, self.values, self.diagonal, self.metric), sweep, begin, end)


def can_round() -> bool:
    """Whether there is a compiler for these passes, which would take minutes otherwise."""
    return compiled(round_both) is not None and compiled(descend_both) is not None


def rounded(wanted: Tensor, sides: DampedSides, levels: ColumnGrid, dtype: torch.dtype) -> tuple[Tensor, ColumnGrid]:
    """Codes (in, out) float32 and the grid with its scales fitted.

    Args:
        wanted: W, (in, out) float32.
        sides: what errors count by.
        levels: the grid to start from, with scales of every row.
        dtype: that scales are stored in.
    """
    codes, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    for turn in range(FITS + 1):
        goals = torch.empty_like(wanted)
        rounding = _Rounding(compiled(round_both), levels.costs, wanted, sides.rows, goals)
        ColumnSweep(wanted.clone(), sides.columns, None, codes, errors).run(rounding, 0, len(wanted))
        if turn < FITS:
            levels = fit_scales(sides.hessian @ goals, sides.hessian, levels, codes, dtype)
    for _ in range(SWEEPS):
        values = levels.values(codes)
        pull = sides.hessian @ ((values - wanted) @ sides.metric)
        descent = _Descent(compiled(descend_both), levels.costs, values, sides.hessian.diagonal(), sides.metric)
        ColumnSweep(pull, sides.hessian, None, codes, errors).run(descent, 0, len(wanted))
        levels = _fitted(wanted, sides, levels, codes, dtype)
    return codes, levels


def _fitted(wanted: Tensor, sides: DampedSides, levels: ColumnGrid, codes: Tensor, dtype: torch.dtype) -> ColumnGrid:
    """Scales of every row that are best with the other rows as they are, where all of them together lose less."""
    error = levels.values(codes) - wanted
    goals = wanted + error - (error @ sides.metric) / sides.metric.diagonal()
    fitted = fit_scales(sides.hessian @ goals, sides.hessian, levels, codes, dtype)
    return fitted if sides.loss(fitted.values(codes) - wanted) < sides.loss(error) else levels


def round_both(targets: Any, coupling: Any, costs: Any, span: Any, codes: Any, errors: Any) -> None:
    """Fill codes, errors and goals of columns `span` and move the errors into later ones. Compiled by numba.

    Args:
        targets, coupling, codes, errors: of a sweep.
        costs: of a `Grid`, and the matrices of a `_Rounding`.
        span: the first column, and the one after the last.
    """
    scales, zeros, groups, ends, wanted, rows, goals = costs
    begin, end = span
    for i in range(begin, end):
        scale, zero = scales[groups[i]], zeros[groups[i] % len(zeros)]
        shifted = int(zero.size > 1)
        goal, code, error = goals[i], codes[i], errors[i]
        for r in range(goal.size):
            goal[r] = wanted[i, r]
        for r in range(goal.size):
            target, offset = targets[i, r] + (goal[r] - wanted[i, r]), zero[r * shifted]
            code[r] = min(ends[1], max(ends[0], np.rint(target / scale[r] + offset)))
            value = (code[r] - offset) * scale[r]
            error[r], missed = value - target, value - goal[r]
            for later in range(r + 1, goal.size):
                goal[later] += rows[r, later] * missed
        for k in range(i + 1, end):
            column, factor = targets[k], coupling[i, k]
            for r in range(column.size):
                column[r] += factor * error[r]


def descend_both(targets: Any, coupling: Any, costs: Any, span: Any, codes: Any, errors: Any) -> None:
    """Give the codes of columns `span` their best values in turn. Compiled by numba.

    Args:
        targets, coupling, codes, errors: of a sweep.
        costs: of a `Grid`, and the matrices of a `_Descent`.
        span: the first column, and the one after the last.
    """
    scales, zeros, groups, ends, values, diagonal, metric = costs
    begin, end = span
    for i in range(begin, end):
        scale, zero, own = scales[groups[i]], zeros[groups[i] % len(zeros)], diagonal[i]
        shifted = int(zero.size > 1)
        pull, code, change = targets[i], codes[i], errors[i]
        change[:] = 0
        for r in range(pull.size):
            best = values[i, r] - pull[r] / (metric[r, r] * own)
            nearest = min(ends[1], max(ends[0], np.rint(best / scale[r] + zero[r * shifted])))
            if nearest != code[r]:
                step = (nearest - code[r]) * scale[r]
                code[r] = nearest
                values[i, r] += step
                for other in range(pull.size):
                    moved = metric[r, other] * step
                    change[other] += moved
                    pull[other] += moved * own
        for k in range(i + 1, end):
            column, factor = targets[k], coupling[i, k]
            for r in range(column.size):
                column[r] += factor * change[r]

"""Round the columns of a matrix one after another, each telling the later ones its error.

GPTQ and coordinate descent are this loop with different couplings, WaterSIC with other steps, and rate-distortion
quantization with codes that cost what they take once they are coded. It works on the transpose, (in, out), so that a
column of the weight is contiguous, and splits the columns in halves: the left half is rounded first and reaches the
right half as one matrix product. That is GPTQ's lazy batch update at every size at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from aicompress.methods.quantize.grid.rounding import code_range
from aicompress.weights.decoding import compiled

LEAF = 16  # columns that are updated one by one; matrix products do the rest


class Rounding(Protocol):
    """What columns are rounded to."""

    def leaf(self, sweep: ColumnSweep, begin: int, end: int) -> None:
        """Round some of the columns of a sweep, each telling the later ones of them its error."""


@dataclass(frozen=True)
class ColumnGrid:
    """The values that each column may take.

    Attributes:
        scale: (groups, out) float32, never 0; (1, 1) where the whole matrix shares it.
        zero: float32 of the same shape, or None for symmetric codes.
        group: group of each column, in the order in which the columns are rounded.
        bits: of a code.
    """

    scale: Tensor
    zero: Tensor | None
    group: tuple[int, ...]
    bits: int

    def steps(self, codes: Tensor) -> Tensor:
        """Codes (in, out) less their zero points: how many scales each value is."""
        return codes if self.zero is None else codes - self.zero[list(self.group)]

    def values(self, codes: Tensor) -> Tensor:
        """What codes (in, out) stand for."""
        return self.steps(codes) * self.scale[list(self.group)]

    def leaf(self, sweep: ColumnSweep, begin: int, end: int) -> None:
        """Round some of the columns of a sweep, each telling the later ones of them its error."""
        columns = compiled(round_nearest)
        if columns is None:
            one_by_one(self.round, sweep, begin, end)
            return
        reference = sweep.targets if sweep.reference is None else sweep.reference
        in_one_pass(columns, (*self.costs, reference), sweep, begin, end)

    @cached_property
    def costs(self) -> tuple[Tensor, ...]:
        """What compiled passes read of the grid: scales, zero points, groups, and the least and largest code."""
        zero = torch.zeros(1, 1) if self.zero is None else self.zero
        return self.scale, zero, torch.tensor(self.group), torch.tensor(code_range(self.bits), dtype=torch.float32)

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """Fill `codes` (out,) with the nearest codes of a column; returns their values."""
        lowest, highest = code_range(self.bits)
        group = self.group[column]
        scale = self.scale[group]
        code = torch.div(target, scale, out=codes)
        if self.zero is None:
            return code.round_().clamp_(lowest, highest) * scale
        zero = self.zero[group]
        return (code.add_(zero).round_().clamp_(lowest, highest) - zero).mul_(scale)


@dataclass(frozen=True)
class ColumnSweep:
    """Columns on their way to be rounded, all matrices in the order of rounding.

    Attributes:
        targets: (in, out) float32; overwritten where columns are coupled.
        coupling: (in, in) float32, of which the strict upper triangle is read; None where no error is moved.
        reference: (in, out), what the rounded values are compared with; None: the targets at their turn.
        codes: (in, out) float32, to be filled.
        errors: (in, out) float32, to be filled.
    """

    targets: Tensor
    coupling: Tensor | None
    reference: Tensor | None
    codes: Tensor
    errors: Tensor

    def run(self, levels: Rounding, begin: int, end: int) -> None:
        """Round columns `begin` to `end` by halves."""
        if self.coupling is None or end - begin <= LEAF:
            levels.leaf(self, begin, end)
            return
        middle = begin + (end - begin) // 2
        self.run(levels, begin, middle)
        self.targets[middle:end].addmm_(self.coupling[begin:middle, middle:end].t(), self.errors[begin:middle])
        self.run(levels, middle, end)


def round_nearest(targets: Any, coupling: Any, costs: Any, span: Any, codes: Any, errors: Any) -> None:
    """Fill codes and errors of columns `span` and move the errors into later ones. Compiled by numba.

    Args:
        targets, coupling, codes, errors: of a sweep; no coupling where it has no entries.
        costs: scales, zero points and group of a `Grid`, least and largest code, and what values are compared with.
        span: the first column, and the one after the last.
    """
    scales, zeros, groups, ends, reference = costs
    begin, end = span
    for i in range(begin, end):
        scale, zero = scales[groups[i]], zeros[groups[i] % len(zeros)]
        wide, shifted = int(scale.size > 1), int(zero.size > 1)  # else all outputs have one
        target, code, error = targets[i], codes[i], errors[i]
        for row in range(target.size):
            step, offset = scale[row * wide], zero[row * shifted]
            code[row] = min(ends[1], max(ends[0], np.rint(target[row] / step + offset)))
            error[row] = (code[row] - offset) * step - reference[i, row]
        if coupling.size > 0:
            for k in range(i + 1, end):
                later, factor = targets[k], coupling[i, k]
                for row in range(later.size):
                    later[row] += factor * error[row]


def round_columns(
    targets: Tensor, coupling: Tensor | None, levels: Rounding, reference: Tensor | None = None
) -> Tensor:
    """Round row i of `targets` to its grid, then add coupling[i, k] (ŵ_i − reference_i) to every later row k.

    Args:
        targets, coupling, reference: as of a `ColumnSweep`.
        levels: what to round to.

    Returns:
        Codes, (in, out) float32 integers.
    """
    sweep = ColumnSweep(targets, coupling, reference, torch.empty_like(targets), torch.empty_like(targets))
    sweep.run(levels, 0, len(targets))
    return sweep.codes


def one_by_one(round_column: Callable[[int, Tensor, Tensor], Tensor], sweep: ColumnSweep, begin: int, end: int) -> None:
    """Round columns by a function that fills the codes (out,) of a column and returns their values."""
    for i in range(begin, end):
        target = sweep.targets[i]
        value = round_column(i, target, sweep.codes[i])
        error = torch.sub(value, target if sweep.reference is None else sweep.reference[i], out=sweep.errors[i])
        if sweep.coupling is not None and i + 1 < end:
            sweep.targets[i + 1 : end].addr_(sweep.coupling[i, i + 1 : end], error)


def in_one_pass(columns: Any, costs: Sequence[Tensor], sweep: ColumnSweep, begin: int, end: int) -> None:
    """Round columns by a compiled function that also moves their errors.

    Args:
        columns: (targets, coupling, costs, (begin, end), codes, errors), arrays; of no coupling one without entries.
        costs: what it reads of a grid.
    """
    coupling = torch.empty(0, 0) if sweep.coupling is None else sweep.coupling
    read = tuple(cost.numpy() for cost in costs)
    columns(sweep.targets.numpy(), coupling.numpy(), read, (begin, end), sweep.codes.numpy(), sweep.errors.numpy())

"""Rows and columns of a stored weight, in the same form where the form allows it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from aicompress.weights.dense import Dense
from aicompress.weights.form import Weight
from aicompress.weights.int_grouped import IntGrouped
from aicompress.weights.low_rank import LowRank


def cut(weight: Weight, axis: int, index: Tensor) -> Weight | None:
    """Some rows (axis 0) or columns (axis 1) of a weight or of its outline, bit for bit.

    Returns:
        The same form, or None where it cannot hold them: columns of a weight whose scales are shared by groups of
        columns, a low-rank weight whose factors would take more room than the dense matrix, any other form.
    """
    if isinstance(weight, Dense):
        return Dense(weight.matrix.index_select(axis, index))
    if isinstance(weight, IntGrouped):
        return _cut_codes(weight, axis, index)
    if isinstance(weight, LowRank):
        return _cut_factors(weight, axis, index)
    return None


def _cut_codes(weight: IntGrouped, axis: int, index: Tensor) -> IntGrouped | None:
    codes = weight.codes.index_select(axis, index)
    if axis == 1:
        return replace(weight, codes=codes) if weight.group_size == 0 else None
    if weight.scale.shape[0] == 1:  # one scale for the whole tensor
        return replace(weight, codes=codes)
    zero = weight.zero.index_select(0, index) if weight.zero is not None else None
    return replace(weight, codes=codes, scale=weight.scale.index_select(0, index), zero=zero)


def _cut_factors(weight: LowRank, axis: int, index: Tensor) -> LowRank | None:
    """U's rows or V's columns; the other factor stays as it is."""
    factor = cut(weight.out if axis == 0 else weight.inner, axis, index)
    if factor is None:
        return None
    found = replace(weight, out=factor) if axis == 0 else replace(weight, inner=factor)
    out, columns = found.shape
    return found if weight.rank * (out + columns) < out * columns else None

"""Zeros among integer codes: pruning coded weights, and coding pruned ones without giving the zeros up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.curvature import damped, raw_gram
from aicompress.weights import Coded, IntGrouped, Masked, SparseCodes, Weight, outline_nbytes
from aicompress.weights.stored.int_grouped import spread

LEAF = 16  # columns that are updated one by one; matrix products do the rest
SWEEPS = 2  # passes of coordinate descent
DAMPING = 0.01  # of the mean diagonal of the Gram matrix


def codes_of(weight: Weight | None) -> IntGrouped | None:
    """A weight, or its outline, with a code for every element; None where it has no integer codes."""
    return weight.grouped() if isinstance(weight, Coded) else None


def mask_of(weight: Weight | None) -> Tensor | None:
    """The mask of a sparse weight; None for other forms."""
    return weight.mask if isinstance(weight, Masked) else None


def exact(weight: IntGrouped) -> bool:
    """Whether some code stands for exactly zero: not where zero points are real numbers."""
    return weight.zero is None or not weight.zero.is_floating_point()


def outline_of(info: LayerInfo, outline: Weight) -> Weight:
    """Outline of integer codes for a layer that is sparse: survivors alone where that is smaller."""
    if not isinstance(info.outline, Masked) or not isinstance(outline, IntGrouped) or not exact(outline):
        return outline
    if outline.activation_bits is not None:
        return outline
    sparse = SparseCodes.outline(outline, info.outline.numbers(), info.outline.grouping)
    return sparse if outline_nbytes(sparse) < outline_nbytes(outline) else outline


def kept_zero(layer: Layer, weight: Weight, outline: Weight | None = None) -> Weight:
    """Integer codes of a layer that is sparse, with the zeros that it came with.

    A method that does not know of them has given them codes. They are zeroed again, and where the Gram matrix is known
    the survivors make up for it on their grid. The form is that of the outline, or the smaller one.
    """
    mask = mask_of(layer.stored)
    if mask is None or not isinstance(weight, IntGrouped) or not exact(weight):
        return weight
    if layer.inputs is not None and layer.inputs.gram is not None and layer.inputs.count:
        codes = descended(layer.weight, weight, mask, damped(raw_gram(layer), DAMPING).float())
    else:
        codes = zeroed(weight, mask)
    form = outline or outline_of(layer.info, weight)
    grouping = layer.stored.grouping if isinstance(layer.stored, Masked) else None
    return SparseCodes.of(codes, mask, grouping) if isinstance(form, SparseCodes) else codes


def zeroed(weight: IntGrouped, mask: Tensor) -> IntGrouped:
    """Codes that stand for exactly zero where the mask is False: 0, or the group's zero point."""
    if weight.zero is None:
        return replace(weight, codes=weight.codes * mask)
    zero = spread(weight.zero, weight.shape[1], weight.group_size)
    return replace(weight, codes=torch.where(mask, weight.codes, zero))


def descended(wanted: Tensor, start: IntGrouped, mask: Tensor, hessian: Tensor) -> IntGrouped:
    """Codes under a mask whose survivors make up for what is gone, on the same grid.

    Coordinate descent: with all others fixed, the best value of column j is the one on its grid that is nearest to
    ŵ_j + ((W − Ŵ) H)_j / H_jj, so that no step can raise tr((W − Ŵ) H (W − Ŵ)ᵀ) above that of the masked start.

    Args:
        wanted: W, (out, in) float32.
        start: the codes to begin with, and the grid.
        mask: (out, in) bool.
        hessian: H, (in, in) float32, positive definite.
    """
    stays, nearest = mask.t(), grid(start)
    values = (start.dense() * mask).t().contiguous()  # (in, out): a column of the weight is contiguous
    pull = hessian @ (wanted.t() - values)
    for first in list(range(0, len(values), LEAF)) * SWEEPS:
        last = min(len(values), first + LEAF)
        change = torch.zeros_like(values[first:last])
        for i in range(first, last):
            target = values[i] + pull[i] / hessian[i, i]
            change[i - first] = nearest(target, i) * stays[i] - values[i]
            values[i] += change[i - first]
            pull[first:last].addr_(hessian[first:last, i], change[i - first], alpha=-1)
        own = pull[first:last].clone()
        pull.addmm_(hessian[:, first:last], change, alpha=-1)
        pull[first:last] = own
    return encoded(values.t(), start)


def grid(weight: IntGrouped) -> Callable[[Tensor, int], Tensor]:
    """(column, its number) -> the nearest values that the codes of a weight can take."""
    wide = weight.group_size or weight.codes.shape[1]  # columns that share a scale
    half = 1 << (weight.bits - 1)
    scale = steps(weight)
    zero = torch.zeros_like(scale) if weight.zero is None else weight.zero.float()

    def nearest(column: Tensor, number: int) -> Tensor:
        step, shift = scale[:, number // wide], zero[:, number // wide]
        return ((column / step).round() + shift).clamp(-half, half - 1).sub(shift).mul(step)

    return nearest


def encoded(values: Tensor, weight: IntGrouped) -> IntGrouped:
    """Codes of values (out, in) that lie on a weight's grid."""
    columns, size = weight.shape[1], weight.group_size
    codes = (values / spread(steps(weight), columns, size)).round()
    if weight.zero is not None:
        codes = codes + spread(weight.zero.float(), columns, size)
    return replace(weight, codes=codes.to(torch.int8))


def steps(weight: IntGrouped) -> Tensor:
    """(rows, groups) float32 scales; 1 where a group of zeros has none."""
    scale = weight.scale.float()
    return torch.where(scale == 0, 1.0, scale)

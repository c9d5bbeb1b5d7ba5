"""Rounding to a uniform grid, shared by every integer method: ranges, clip search, codes."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12


def grouped(matrix: Tensor, group_size: int, per_tensor: bool = False) -> Tensor:
    """View (out, in) as (rows, groups, columns) where each last axis shares a scale."""
    if per_tensor:
        return matrix.reshape(1, 1, -1)
    out, columns = matrix.shape
    return matrix.reshape(out, -1, group_size or columns)


def grid(bits: int) -> tuple[int, int]:
    """Lowest and highest code: -2^(b-1) and 2^(b-1)-1."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def minmax_range(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, zero included; (rows, groups) each. Symmetric ranges are ±max|w|."""
    low, high = torch.aminmax(groups, dim=-1)
    if symmetric:
        high = torch.maximum(-low, high)
        return -high, high
    return low.clamp_max(0), high.clamp_min(0)


def scale_and_zero(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales in their stored dtype, and int8 zero points for asymmetric ranges.

    Symmetric: scale = absmax / ((2^b - 1)/2), so that the codes use -2^(b-1) too. Asymmetric: (high-low)/(2^b-1).
    A group of zeros gets the smallest scale, never 0. The scale is rounded to its dtype before any code is made.
    """
    lowest, highest = grid(bits)
    smallest = max(torch.finfo(dtype).tiny, EPSILON)
    if symmetric:
        return (high / ((highest - lowest) / 2)).clamp_min(smallest).to(dtype), None
    scale = ((high - low) / (highest - lowest)).clamp_min(smallest).to(dtype)
    zero = torch.round(lowest - low / scale.float()).clamp(lowest, highest)
    return scale, zero.to(torch.int8)


def encode(groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Round to the nearest code: float tensor of integers, same shape as groups."""
    lowest, highest = grid(bits)
    codes = groups / scale.float()[..., None]
    if zero is not None:
        codes = codes + zero.float()[..., None]
    return codes.round_().clamp_(lowest, highest)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Values of the codes."""
    shifted = codes if zero is None else codes - zero.float()[..., None]
    return shifted * scale.float()[..., None]

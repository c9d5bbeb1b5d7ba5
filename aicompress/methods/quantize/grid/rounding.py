"""Rounding to a uniform grid, shared by every integer method: ranges, scales, codes.

Large matrices are worked on in pieces of rows: every pass over a piece costs a part of a pass over the matrix. Pieces
that fit a core's own cache would be quicker still in one thread; two threads with operations so short hand each other
the interpreter more often than they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from aicompress.errors import Refused

PIECE = 1 << 20  # weights in a piece: 4 MiB of float32; two threads with smaller ones wait for the interpreter
EPSILON = 1e-12  # keeps a quotient of sums of squares finite
STEP = 2.0**-24  # between the least numbers of float16

Scaling = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def grouped(matrix: Tensor, group_size: int, per_tensor: bool = False) -> Tensor:
    """View (out, in) as (rows, groups, columns) where each last axis shares a scale.

    Where the size does not divide the columns, the last group is filled up with zeros: they stretch no range, and
    rounding gives them no error.
    """
    if per_tensor:
        return matrix.reshape(1, 1, -1)
    out, columns = matrix.shape
    if group_size and columns % group_size:
        matrix = torch.nn.functional.pad(matrix, (0, -columns % group_size))
    return matrix.reshape(out, -1, group_size or columns)


def ungrouped(groups: Tensor, columns: int) -> Tensor:
    """Undo `grouped`: (rows, groups, columns of a group) -> (rows, columns)."""
    return groups.flatten(1)[:, :columns]


def pieces(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows of about `PIECE` weights."""
    out, columns = shape
    step = max(1, PIECE // max(1, columns))
    for start in range(0, out, step):
        yield slice(start, min(start + step, out))


def code_range(bits: int) -> tuple[int, int]:
    """Lowest and highest code: -2^(b-1) and 2^(b-1)-1."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def minmax_range(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, zero included; (rows, groups) each. Symmetric ranges are ±max|w|."""
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)  # together twice as fast as aminmax along an axis
    return widened(low, high, symmetric)


def widened(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Ranges with zero inside, or as wide to both sides of it."""
    if symmetric:
        high = torch.maximum(-low, high)
        return -high, high
    return low.clamp_max(0), high.clamp_min(0)


def scale_and_zero(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales in their stored dtype, and int8 zero points for asymmetric ranges.

    Symmetric: scale = absmax / ((2^b - 1)/2), so that the codes use -2^(b-1) too. Asymmetric: (high-low)/(2^b-1). It is
    rounded to its dtype before any code is made, see `stored_scale`.
    """
    lowest, highest = code_range(bits)
    levels = highest - lowest
    if symmetric:
        return stored_scale(high / (levels / 2), dtype), None
    scale = stored_scale(high / levels - low / levels, dtype)
    zero = torch.round(lowest - low / scale.float()).clamp(lowest, highest)
    return scale, zero.to(torch.int8)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales ≥ 0 in the dtype they are stored in, never zero.

    A group of zeros gets the smallest normal number. Below it float16 has steps of 2^-24: a scale goes up to the next
    one, which makes the codes coarser by as much and clips none. What float16 cannot hold becomes infinite, see
    `require_scales`.
    """
    smallest = torch.finfo(dtype).tiny
    if dtype is not torch.float16:
        return scale.clamp_min(smallest).to(dtype)
    small = torch.where(scale > 0, (scale / STEP).ceil() * STEP, smallest)
    return torch.where(scale < smallest, small, scale).to(dtype)


def require_scales(scale: Tensor, name: str) -> None:
    """Refuse scales that overflowed their dtype.

    Raises:
        Refused: naming the layer.
    """
    if not torch.isfinite(scale).all():
        kind = str(scale.dtype).removeprefix("torch.")
        raise Refused(f"{name}: its values are too large for {kind} scales", "set scale_dtype: float32")


def encode(groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int, out: Tensor | None = None) -> Tensor:
    """Round to the nearest code: float tensor of integers, same shape as groups.

    Args:
        groups: (rows, groups, columns).
        scale, zero: (rows, groups), or (1, 1).
        bits: of a code.
        out: filled and returned; a new tensor when not given.
    """
    lowest, highest = code_range(bits)
    codes = torch.div(groups, scale.float()[..., None], out=out)
    if zero is not None:
        codes.add_(zero[..., None])
    return codes.round_().clamp_(lowest, highest)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Values of the codes."""
    shifted = codes if zero is None else codes - zero.float()[..., None]
    return shifted * scale.float()[..., None]


def squared_error(groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int, out: Tensor) -> Tensor:
    """Σ (w − ŵ)² of every group, (rows, groups). `out` is scratch of the groups' shape."""
    codes = encode(groups, scale, zero, bits, out)
    if zero is not None:
        codes.sub_(zero[..., None])
    return codes.mul_(scale.float()[..., None]).sub_(groups).square_().sum(dim=-1)


def quantize_rows(matrix: Tensor, group_size: int, bits: int, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a matrix, piece by piece.

    Args:
        matrix: (out, in) float32.
        group_size: columns that share a scale; 0 for whole rows.
        bits: of a code.
        scaling: groups (rows, groups, columns) -> scales and zero points (rows, groups).

    Returns:
        Codes (out, in) int8, scales and zero points (out, groups).
    """
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales, zeros = [], []
    for rows in pieces((matrix.shape[0], matrix.shape[1])):
        groups = grouped(matrix[rows], group_size)
        scale, zero = scaling(groups)
        codes[rows] = ungrouped(encode(groups, scale, zero, bits), matrix.shape[1])
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    return codes, torch.cat(scales), torch.cat(zeros) if zeros else None

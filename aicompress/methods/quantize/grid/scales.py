"""Scales and zero points of least weighted squared error, Σ_j h_j (w_j − ŵ_j)², group by group.

A grid of ranges is tried, then scales and codes are fitted in turn: codes by rounding, the scale by least squares,
s = Σ h w q / Σ h q². A symmetric scale may be negative: codes reach one step further below zero than above, so
the sign decides which end of the range gets that step. Readers multiply by the scale and do not mind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from aicompress.methods.quantize.grid.rounding import (
    EPSILON,
    code_range,
    decode,
    encode,
    grouped,
    minmax_range,
    pieces,
    scale_and_zero,
)
from aicompress.methods.quantize.grid.totals import BLOCK, Blocks, Total, of_groups, of_matrix, range_of_matrix

SHRINKS = 20  # clips of an asymmetric range that are tried
STEPS = 8  # symmetric scales that are tried, each fitted, with both signs
NORMAL = {2: 0.996, 3: 0.586, 4: 0.335, 8: 0.031}  # best step for a normal distribution of deviation 1, by bits
LEAST = 0.75  # the least scale that is tried, in such steps: less than a group of few weights ever takes
FITS = 3  # rounds of fitting scales and codes in turn


class ScaleSharing(Protocol):
    """Parameters that say what shares a scale: the tensor, a channel, or a group of input columns."""

    @property
    def granularity(self) -> str: ...

    @property
    def group_size(self) -> int: ...


class Grid(ScaleSharing, Protocol):
    """Parameters of integer codes on a grid of equal steps."""

    @property
    def bits(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...


class StoredScales(Protocol):
    """Parameters that say in which dtype scales are stored."""

    @property
    def scale_dtype(self) -> str: ...


def full_range(weight: Tensor, config: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of the full range of every group.

    Args:
        weight: (out, in).
        config: gives bits, granularity, group_size and symmetric.
        dtype: of the stored scales.
    """
    groups = _groups(weight, config)
    return scale_and_zero(*minmax_range(groups, config.symmetric), config.bits, config.symmetric, dtype)


def full_range_of_matrix(blocks: Blocks, config: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The same for a matrix that shares one scale and is read in blocks of rows, once."""
    low, high = range_of_matrix(blocks, config.symmetric)
    return scale_and_zero(low, high, config.bits, config.symmetric, dtype)


def least_error(
    weight: Tensor, importance: Tensor | None, config: Grid, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of least Σ h (w − ŵ)².

    Args:
        weight: (out, in) float32.
        importance: h, (in,) ≥ 0; None: all equal.
        config: gives bits, granularity, group_size and symmetric.
        dtype: of the stored scales.

    Returns:
        (out, groups) or (1, 1) scales in `dtype`, and int8 zero points for asymmetric codes.
    """
    h = torch.ones(weight.shape[1]) if importance is None or not importance.any() else importance / importance.mean()
    h = h.clamp_min(1e-3)  # inputs that were never seen still count a little
    if config.granularity == "tensor":
        return least_error_of_matrix([lambda: weight], h, config, dtype)
    own = _groups(h[None], config)[0]
    grids = []
    for rows in pieces((weight.shape[0], weight.shape[1])):
        groups = _groups(weight[rows].contiguous(), config)
        step = max(1, BLOCK // max(1, groups[0].numel()))
        for part in torch.split(groups, step) if config.symmetric else [groups]:
            grids.append(_search(of_groups(part), own, minmax_range(part, config.symmetric), config, dtype))
    zeros = [zero for _, zero in grids if zero is not None]
    return torch.cat([scale for scale, _ in grids]), torch.cat(zeros) if zeros else None


def least_error_of_matrix(blocks: Blocks, h: Tensor, config: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The same for a matrix that shares one scale and is read in blocks of rows, 5 to 8 times.

    Args:
        blocks: functions that read its blocks of rows, in order.
        h: (in,) above zero.
        config, dtype: as of `least_error`.
    """
    return _search(of_matrix(blocks), h[None], range_of_matrix(blocks, config.symmetric), config, dtype)


def _groups(weight: Tensor, config: ScaleSharing) -> Tensor:
    size = config.group_size if config.granularity == "group" else 0
    return grouped(weight, size, config.granularity == "tensor")


def _search(
    total: Total, h: Tensor, ends: tuple[Tensor, Tensor], config: Grid, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of least error, whatever shares one.

    Args:
        total: sums over the weights that share a scale.
        h: (groups, columns), or (1, columns) where all groups have them.
        ends: lowest and highest value of what shares a scale.
        config: gives bits and symmetric.
        dtype: of the stored scales.
    """
    if config.symmetric:
        return _symmetric(total, h, ends[1], config.bits, dtype), None
    return _asymmetric(total, h, ends, config.bits, dtype)


def _asymmetric(
    total: Total, h: Tensor, ends: tuple[Tensor, Tensor], bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The clip of the range of least Σ h (w − ŵ)², and then its scale fitted to its codes."""
    shrinks = [1 - 0.8 * step / SHRINKS for step in range(SHRINKS)]
    grids = [scale_and_zero(ends[0] * shrink, ends[1] * shrink, bits, False, dtype) for shrink in shrinks]
    errors = total(partial(_errors, h=h, grids=grids, bits=bits))
    best = torch.full(ends[0].shape, float("inf"))
    best_scale, best_zero = grids[0]
    for error, (scale, zero) in zip(errors, grids, strict=True):
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    for _ in range(FITS):
        pulls, powers = total(partial(_line, h=h, scale=best_scale, zero=best_zero, bits=bits))
        fitted = (pulls / powers.clamp_min(EPSILON)).to(dtype)
        candidate = torch.where(fitted == 0, best_scale, fitted)
        (error,) = total(partial(_errors, h=h, grids=[(candidate, best_zero)], bits=bits))
        best_scale = torch.where(error < best, candidate, best_scale)
        best = torch.minimum(error, best)
    return best_scale, best_zero


def _errors(groups: Tensor, h: Tensor, grids: Sequence[tuple[Tensor, Tensor | None]], bits: int) -> Tensor:
    """Σ h (w − ŵ)² of every grid, (grids, rows, groups)."""
    values = (decode(encode(groups, scale, zero, bits), scale, zero) for scale, zero in grids)
    return torch.stack([each.sub_(groups).square_().mul_(h).sum(-1) for each in values])


def _line(groups: Tensor, h: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Σ h w q and Σ h q² of a grid's codes less their zero points, whose quotient is the best scale for them."""
    codes = encode(groups, scale, zero, bits)
    steps = codes if zero is None else codes - zero.float()[..., None]
    weighted = h * steps
    return torch.stack([(weighted * groups).sum(-1), (weighted * steps).sum(-1)])


def _symmetric(total: Total, h: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Symmetric scales of least Σ h (w − s q)².

    For codes q, with a = Σ h w q and b = Σ h q², the loss falls by s (2 a − s b) below Σ h w², most at s = a / b. The
    range that gives the codes goes from the full one down to where a normal distribution's best step is well inside.
    """
    lowest, highest = code_range(bits)
    ends = [(lowest, highest, 1), (-highest, -lowest, -1)]  # those of a negative scale, negated
    full = scale_and_zero(-high, high, bits, True, dtype)[0]
    squares, counts = total(partial(_power, h=h))
    deviation = (squares / counts).sqrt().float()
    widest = full.float()
    narrowest = torch.minimum(LEAST * NORMAL[bits] * deviation, 0.9 * widest).maximum(0.1 * widest)
    shrink = (narrowest / widest).pow(1 / (STEPS - 1))
    tried = [widest]
    while len(tried) < STEPS:
        tried.append(tried[-1] * shrink)
    scale, gain = full, torch.zeros(full.shape)
    for turn in range(FITS):
        steps, own = (tried, ends) if turn == 0 else ([scale.float()], ends[:1])
        sums = total(partial(_fits, h=h, steps=steps, ends=own))
        for a, b, (_, _, sign) in zip(sums[::2], sums[1::2], own * len(steps), strict=True):
            fitted = (sign * a / b.clamp_min(EPSILON)).to(dtype)
            s = sign * fitted.float()
            falls = s * (2 * a - s * b)
            better = falls > gain
            scale, gain = torch.where(better, fitted, scale), torch.where(better, falls, gain)
    return scale


def _power(groups: Tensor, h: Tensor) -> Tensor:
    """Σ h w² and Σ h."""
    return torch.stack([(h * groups * groups).sum(-1), h.sum(-1).expand(groups.shape[:2])])


def _fits(groups: Tensor, h: Tensor, steps: Sequence[Tensor], ends: Sequence[tuple[int, int, int]]) -> Tensor:
    """Σ h w q and Σ h q² of the codes q of every step between every two ends, one after the other."""
    pulls, found = h * groups, []
    near, codes = torch.empty_like(groups), torch.empty_like(groups)
    for step in steps:
        torch.div(groups, step[..., None], out=near).round_()
        for least, most, _ in ends:
            torch.clamp(near, least, most, out=codes)
            found.append(torch.mul(codes, pulls).sum(-1))
            found.append(codes.square_().mul_(h).sum(-1))
    return torch.stack(found)


def stored_scale_dtype(config: StoredScales, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the scales on disk."""
    if config.scale_dtype != "auto":
        return getattr(torch, config.scale_dtype)  # type: ignore[no-any-return]
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16

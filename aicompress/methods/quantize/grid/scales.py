"""Scales and zero points of least weighted squared error, Σ_j h_j (w_j − ŵ_j)², group by group.

A grid of ranges is tried, then scales and codes are fitted in turn: codes by rounding, the scale by least squares,
s = Σ h w q / Σ h q². A symmetric scale may be negative: codes reach one step further below zero than above, so
the sign decides which end of the range gets that step. Readers multiply by the scale and do not mind.
"""

from __future__ import annotations

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

SHRINKS = 20  # clips of an asymmetric range that are tried
STEPS = 8  # symmetric scales that are tried, each fitted, with both signs
NORMAL = {2: 0.996, 3: 0.586, 4: 0.335, 8: 0.031}  # best step for a normal distribution of deviation 1, by bits
LEAST = 0.75  # the least scale that is tried, in such steps: less than a group of few weights ever takes
BLOCK = 1 << 17  # weights that are searched at once: four times as many float32 numbers stay in a core's cache
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
        return _search(_groups(weight.contiguous(), config), h.expand_as(weight).reshape(1, 1, -1), config, dtype)
    grids = []
    for rows in pieces((weight.shape[0], weight.shape[1])):
        groups = _groups(weight[rows].contiguous(), config)
        grids.append(_search(groups, _groups(h[None], config)[0], config, dtype))
    zeros = [zero for _, zero in grids if zero is not None]
    return torch.cat([scale for scale, _ in grids]), torch.cat(zeros) if zeros else None


def _groups(weight: Tensor, config: ScaleSharing) -> Tensor:
    size = config.group_size if config.granularity == "group" else 0
    return grouped(weight, size, config.granularity == "tensor")


def _search(groups: Tensor, weights: Tensor, config: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if config.symmetric:
        rows = max(1, BLOCK // max(1, groups[0].numel()))
        return torch.cat([_symmetric(part, weights, config.bits, dtype) for part in torch.split(groups, rows)]), None
    low, high = minmax_range(groups, symmetric=False)
    best = torch.full(low.shape, float("inf"))
    best_scale, best_zero = scale_and_zero(low, high, config.bits, False, dtype)
    for step in range(SHRINKS):
        shrink = 1 - 0.8 * step / SHRINKS
        scale, zero = scale_and_zero(low * shrink, high * shrink, config.bits, False, dtype)
        error = _error(groups, weights, scale, zero, config.bits)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    for _ in range(FITS):
        candidate = fitted(groups, weights, encode(groups, best_scale, best_zero, config.bits), best_zero)
        candidate = torch.where(candidate.to(dtype) == 0, best_scale, candidate.to(dtype))
        error = _error(groups, weights, candidate, best_zero, config.bits)
        best_scale = torch.where(error < best, candidate, best_scale)
        best = torch.minimum(error, best)
    return best_scale, best_zero


def _symmetric(groups: Tensor, weights: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Symmetric scales (rows, groups) of least Σ h (w − s q)².

    For codes q, with a = Σ h w q and b = Σ h q², the loss falls by s (2 a − s b) below Σ h w², most at s = a / b. The
    range that gives the codes goes from the full one down to where a normal distribution's best step is well inside.
    """
    lowest, highest = code_range(bits)
    pulls = weights * groups
    full = scale_and_zero(*minmax_range(groups, symmetric=True), bits, True, dtype)[0]
    deviation = ((pulls * groups).sum(-1) / weights.sum(-1)).sqrt()
    widest = full.float()
    narrowest = torch.minimum(LEAST * NORMAL[bits] * deviation, 0.9 * widest).maximum(0.1 * widest)
    shrink = (narrowest / widest).pow(1 / (STEPS - 1))
    near, codes = torch.empty_like(groups), torch.empty_like(groups)
    scale, gain = full, torch.zeros(full.shape)

    def fit(least: int, most: int, sign: int) -> None:
        nonlocal scale, gain
        torch.clamp(near, least, most, out=codes)
        a = torch.mul(codes, pulls).sum(-1)
        b = codes.square_().mul_(weights).sum(-1)
        fitted = (sign * a / b.clamp_min(EPSILON)).to(dtype)
        s = sign * fitted.float()
        falls = s * (2 * a - s * b)
        better = falls > gain
        scale, gain = torch.where(better, fitted, scale), torch.where(better, falls, gain)

    step = widest
    for _ in range(STEPS):
        torch.div(groups, step[..., None], out=near).round_()
        fit(lowest, highest, 1)
        fit(-highest, -lowest, -1)  # the codes of a negative scale, negated
        step = step * shrink
    for _ in range(FITS - 1):  # the scales that were tried are fitted already
        torch.div(groups, scale.float()[..., None], out=near).round_()
        fit(lowest, highest, 1)
    return scale


def fitted(groups: Tensor, weights: Tensor, codes: Tensor, zero: Tensor | None) -> Tensor:
    """Least-squares scale for given codes: Σ h w q / Σ h q²."""
    steps = codes if zero is None else codes - zero.float()[..., None]
    weighted = weights * steps
    return (weighted * groups).sum(-1) / (weighted * steps).sum(-1).clamp_min(EPSILON)


def _error(groups: Tensor, weights: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return (decode(encode(groups, scale, zero, bits), scale, zero).sub_(groups).square_().mul_(weights)).sum(-1)


def stored_scale_dtype(config: StoredScales, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the scales on disk."""
    if config.scale_dtype != "auto":
        return getattr(torch, config.scale_dtype)  # type: ignore[no-any-return]
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16

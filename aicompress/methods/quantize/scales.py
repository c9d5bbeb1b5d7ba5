"""Scales and zero points of least weighted squared error, Σ_j h_j (w_j − ŵ_j)², group by group.

A grid of shrinks of the range is tried, then scales and codes are fitted in turn: codes by rounding, the scale by least
squares, s = Σ h w q / Σ h q². A symmetric scale may be negative: codes reach one step further below zero than above, so
the sign decides which end of the range gets that step. Readers multiply by the scale and do not mind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aicompress.methods.quantize.rounding import (
    EPSILON,
    decode,
    encode,
    grouped,
    minmax_range,
    pieces,
    scale_and_zero,
)

SHRINKS = 20  # clips of the range that are tried
FITS = 3  # rounds of fitting scales and codes in turn


def full_range(weight: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of the full range of every group.

    Args:
        weight: (out, in).
        config: gives bits, granularity, group_size and symmetric.
        dtype: of the stored scales.
    """
    groups = _groups(weight, config)
    return scale_and_zero(*minmax_range(groups, config.symmetric), config.bits, config.symmetric, dtype)


def least_error(
    weight: Tensor, importance: Tensor | None, config: Any, dtype: torch.dtype
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
    h = torch.ones(weight.shape[1]) if importance is None else importance
    h = h.clamp_min(1e-3 * h.mean() + EPSILON)  # inputs that were never seen still count a little
    if config.granularity == "tensor":
        return _search(_groups(weight.contiguous(), config), h.expand_as(weight).reshape(1, 1, -1), config, dtype)
    found = []
    for rows in pieces((weight.shape[0], weight.shape[1])):
        groups = _groups(weight[rows].contiguous(), config)
        found.append(_search(groups, _groups(h[None], config)[0], config, dtype))
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _groups(weight: Tensor, config: Any) -> Tensor:
    size = config.group_size if config.granularity == "group" else 0
    return grouped(weight, size, config.granularity == "tensor")


def _search(groups: Tensor, weights: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    low, high = minmax_range(groups, config.symmetric)
    best = torch.full(low.shape, float("inf"))
    best_scale, best_zero = scale_and_zero(low, high, config.bits, config.symmetric, dtype)
    for step in range(SHRINKS):
        shrink = 1 - 0.8 * step / SHRINKS
        scale, zero = scale_and_zero(low * shrink, high * shrink, config.bits, config.symmetric, dtype)
        for candidate in (scale, -scale) if config.symmetric else (scale,):
            error = _error(groups, weights, candidate, zero, config.bits)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, candidate, best_scale)
            if zero is not None and best_zero is not None:
                best_zero = torch.where(better, zero, best_zero)
    for _ in range(FITS):
        candidate = fitted(groups, weights, encode(groups, best_scale, best_zero, config.bits), best_zero)
        candidate = torch.where(candidate.to(dtype) == 0, best_scale, candidate.to(dtype))
        error = _error(groups, weights, candidate, best_zero, config.bits)
        best_scale = torch.where(error < best, candidate, best_scale)
        best = torch.minimum(error, best)
    return best_scale, best_zero


def fitted(groups: Tensor, weights: Tensor, codes: Tensor, zero: Tensor | None) -> Tensor:
    """Least-squares scale for given codes: Σ h w q / Σ h q²."""
    steps = codes if zero is None else codes - zero.float()[..., None]
    weighted = weights * steps
    return (weighted * groups).sum(-1) / (weighted * steps).sum(-1).clamp_min(EPSILON)


def _error(groups: Tensor, weights: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return (decode(encode(groups, scale, zero, bits), scale, zero).sub_(groups).square_().mul_(weights)).sum(-1)

"""How the numbers of a parameter are spread and what rounding does to them, from blocks of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aicompress.methods.quantize.grid.totals import Blocks
from aicompress.methods.quantize.grid.widths import MAX_ERROR, WIDTHS, effective_levels, proposed, rounding_errors
from aicompress.methods.quantize.rtn import RtnConfig

OUTLIER = 4.0  # standard deviations; a normal distribution has 0.006% of its mass beyond
PIECE = 1 << 21  # elements that are read and summed at a time


@dataclass(frozen=True)
class Distribution:
    """How the numbers of a parameter are spread.

    Attributes:
        low, high: the smallest and the largest.
        mean, std: of all elements.
        kurtosis: fourth standardized moment; 3 for a normal distribution, more with heavy tails.
        outliers: share of elements further than OUTLIER standard deviations from the mean.
        zeros: share of elements that are exactly zero.
        row_spread: largest over median absolute maximum of the rows: what one scale per tensor would lose.
            None where most rows are zero.
    """

    low: float
    high: float
    mean: float
    std: float
    kurtosis: float
    outliers: float
    zeros: float
    row_spread: float | None


@dataclass(frozen=True)
class Analysis:
    """What is asked of the weights.

    Attributes:
        group_size: columns that share a scale; rows whose width it does not divide have one scale.
        max_error: the relative error that proposed bits keep.
    """

    group_size: int = 64
    max_error: float = MAX_ERROR


@dataclass(frozen=True)
class RoundingLoss:
    """What rounding to nearest does to a layer, symmetric, with the full range of every group.

    Attributes:
        group: columns that share a scale.
        peak: largest magnitude in standard deviations.
        levels: of the 16 codes of 4 bits, how many are in use: 2 to the power of their entropy.
        errors: ‖W − Ŵ‖ / ‖W‖ by bits.
        proposed: the least bits within the bound, the same for layers that share their input; None where no bits are.
    """

    group: int
    peak: float
    levels: float
    errors: dict[int, float]
    proposed: int | None


def distribution(blocks: Blocks, axis: int = 0) -> Distribution:
    """Moments and outliers of a tensor, in float64; every block is read three times.

    Args:
        blocks: of the tensor.
        axis: that they lie along.
    """
    count = zeros = 0
    total, low, high, peaks = 0.0, math.inf, -math.inf, torch.zeros(0)
    for read in blocks:
        block = read()
        if not block.numel():
            return Distribution(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        least, most = block.float().reshape(len(block) if block.ndim > 1 else 1, -1).aminmax(dim=1)
        low, high = min(low, float(least.min())), max(high, float(most.max()))
        own = torch.maximum(-least, most)
        apart = (block.ndim > 1 and axis == 0) or not len(peaks)  # else parts of the same rows
        peaks = torch.cat([peaks, own]) if apart else torch.maximum(peaks, own)
        count, zeros = count + block.numel(), zeros + block.numel() - int(torch.count_nonzero(block))
        total += sum(float(piece.double().sum()) for piece in _pieces(block))
    mean, second, fourth, far = total / count, 0.0, 0.0, 0
    for piece in (piece for read in blocks for piece in _pieces(read())):
        squares = (piece.double() - mean).square_()
        second += float(squares.sum())
        fourth += float(squares.square_().sum())
    std = math.sqrt(second / count)
    for piece in (piece for read in blocks for piece in _pieces(read())):
        far += int(((piece.double() - mean).abs_() > OUTLIER * std).sum())
    kurtosis = fourth / count / std**4 if second else 0.0
    middle = float(peaks.median())
    row_spread = float(peaks.max()) / middle if middle else None
    return Distribution(low, high, mean, std, kurtosis, far / count, zeros / count, row_spread)


def _pieces(block: Tensor) -> Sequence[Tensor]:
    """A block's elements, so many at a time that float64 copies are small."""
    return torch.split(block.reshape(-1), PIECE)


def rounding(blocks: Blocks, columns: int, spread: Distribution, analysis: Analysis) -> RoundingLoss:
    """What rounding a matrix (out, in) does at each width.

    Args:
        blocks: functions that read its blocks of rows, float32.
        columns: of the matrix.
        spread: of its numbers.
        analysis: what is asked.
    """
    fits = columns % analysis.group_size == 0
    shared = {"group_size": analysis.group_size} if fits else {"granularity": "channel"}
    config = RtnConfig(name="rtn", bits=4, **shared)
    errors = rounding_errors(blocks, config, WIDTHS)
    peak = max(-spread.low, spread.high) / spread.std if spread.std else 0.0
    group = analysis.group_size if fits else columns
    return RoundingLoss(group, peak, effective_levels(blocks, config), errors, proposed(errors, analysis.max_error))

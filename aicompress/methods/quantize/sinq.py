"""Sinkhorn-normalized quantization: round W / c to nearest, c one factor per input column. Data-free.

Müller et al. 2025, arXiv:2509.22944, algorithm 1: rows and columns are divided in turn by their standard deviations, in
small steps, until both are as even as they get; outliers are then spread over a row's and a column's scale. The row
factors become part of the groups' scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import RowWise
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid.integer import (
    IntegerConfig,
    check,
    describe,
    encoded,
    resolve,
    searched,
    stored_scale_dtype,
)
from aicompress.methods.quantize.grid.integer import outline as integer_outline
from aicompress.methods.quantize.grid.scales import (
    full_range,
    full_range_of_matrix,
    least_error,
    least_error_of_matrix,
)
from aicompress.methods.quantize.grid.totals import Blocks
from aicompress.weights import ColumnScaled, Weight

HELD = 1 << 24  # weights of a layer up to which its blocks are held from one iteration to the next
LOWEST_STEP, HIGHEST_STEP = 0.7, 2.0  # one step multiplies a factor by no less and no more


class SinqConfig(IntegerConfig):
    """Parameters of sinq."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"bits": 4, "group_size": 4}, {"granularity": "channel", "symmetric": False}]}
    )

    name: Literal["sinq"] = "sinq"
    iterations: int = Field(16, ge=0, le=1000, description="at most; the most even rows and columns seen are kept")
    range: Literal["minmax", "mse"] = Field("mse", description="range of the codes: full, or of least squared error")


def outline(info: LayerInfo, config: SinqConfig) -> Weight:
    """The stored weight without data."""
    return ColumnScaled.outline(integer_outline(info, config), stored_scale_dtype(config, info.dtype))


class SinqBlockConfig(SinqConfig):
    """Parameters for some rows of a layer, with the factors of the whole layer's columns.

    Attributes:
        factors: (in,) float32.
        grid: scale and zero point of the whole layer, if it has one scale; (1, 1) each.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    factors: Tensor
    grid: tuple[Tensor, Tensor | None] | None


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: SinqConfig) -> list[SinqConfig]:
    """A config for each block of rows, with the factors of the columns, and the scale if all rows share one.

    Reads blocks once an iteration, and for one scale 1 to 8 times more.
    """
    read: list[Callable[[], Tensor]] = [partial(_weight, block) for block in blocks]
    if math.prod(info.shape) <= HELD:
        read = [partial(_same, weight()) for weight in read]
    return [for_blocks(info, read, config)] * len(blocks)


def _weight(read: Callable[[], Layer]) -> Tensor:
    return read().weight


def _same(weight: Tensor) -> Tensor:
    return weight


def for_blocks(info: LayerInfo, blocks: Blocks, config: SinqConfig) -> SinqBlockConfig:
    """The config with what all rows share."""
    factors = column_factors(blocks, info.shape, config.iterations)
    by, grid = factors.to(stored_scale_dtype(config, info.dtype)).float(), None
    if config.granularity == "tensor":
        grid = shared_grid(info, [partial(_divided, read, by) for read in blocks], config)
    return SinqBlockConfig.model_construct(**dict(config), factors=factors, grid=grid)


def _divided(read: Callable[[], Tensor], by: Tensor) -> Tensor:
    return read() / by


def shared_grid(info: LayerInfo, blocks: Blocks, config: SinqConfig) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point of a whole matrix whose columns are even."""
    dtype = stored_scale_dtype(config, info.dtype)
    if config.range == "minmax":
        return full_range_of_matrix(blocks, config, dtype)
    return least_error_of_matrix(blocks, torch.ones(info.shape[1]), config, dtype)


def apply(layer: Layer, config: SinqConfig) -> Weight:
    """Quantize one layer.

    Raises:
        Refused: its values are too large for the scales' dtype.
    """
    dtype = stored_scale_dtype(config, layer.info.dtype)
    weight = layer.weight.contiguous()
    own = config if isinstance(config, SinqBlockConfig) else for_blocks(layer.info, [lambda: weight], config)
    columns = own.factors.to(dtype)
    normal = weight / columns.float()
    return ColumnScaled(encoded(layer.info, normal, config, *(own.grid or grids_of(normal, config, dtype))), columns)


def grids_of(normal: Tensor, config: SinqConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of every group of a matrix whose columns are even."""
    return full_range(normal, config, dtype) if config.range == "minmax" else least_error(normal, None, config, dtype)


def column_factors(blocks: Sequence[Callable[[], Tensor]], shape: tuple[int, int], iterations: int) -> Tensor:
    """Factors (in,) float32 of mean logarithm 0 that, with factors of the rows, even out the standard deviations.

    Rows and columns of equal values, zero ones among them, keep factor 1. The variances of W / (r cᵀ) are products of
    W and W² with vectors, so that no iteration forms a matrix.

    Args:
        blocks: functions that read W's blocks of rows, in order.
        shape: of W.
        iterations: at most.
    """
    dtype = torch.float64 if math.prod(shape) < 1 << 20 else torch.float32
    rows, columns = (torch.zeros(length, dtype=dtype) for length in shape)  # logarithms
    best, evenest = torch.inf, columns
    smallest = None
    for _ in range(iterations + 1):
        by_row, by_column = _deviations(blocks, (-rows).exp(), (-columns).exp())
        spread = torch.cat([by_row[by_row > 0], by_column[by_column > 0]])
        if not len(spread):
            break
        imbalance = float(spread.max() / spread.min())
        if imbalance < best:
            best, evenest = imbalance, columns
        smallest = spread.min() if smallest is None else smallest
        rows, columns = rows + _step(by_row, smallest), columns + _step(by_column, smallest)
    return (evenest - evenest.mean()).exp().float()


def _deviations(blocks: Sequence[Callable[[], Tensor]], r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of the rows (out,) and of the columns (in,) of W multiplied by r and c."""
    by_row = []
    total, square_total = torch.zeros_like(c), torch.zeros_like(c)
    start = 0
    for read in blocks:
        w = read().to(c.dtype)
        squares, own = w.square(), r[start : start + len(w)]
        start += len(w)
        by_row.append(_deviation(own * (w @ c), own.square() * (squares @ c.square()), len(c)))
        total += w.t() @ own
        square_total += squares.t() @ own.square()
    return torch.cat(by_row), _deviation(c * total, c.square() * square_total, len(r))


def _deviation(total: Tensor, squares: Tensor, count: int) -> Tensor:
    """Standard deviation from Σ x and Σ x²; 0 where rounding could have made it."""
    variance = squares / count - (total / count).square()
    return torch.where(variance > 1e-9 * squares / count, variance, 0.0).clamp_min(0).sqrt()


def _step(deviation: Tensor, target: Tensor) -> Tensor:
    step = (deviation / target).clamp(LOWEST_STEP, HIGHEST_STEP).log()
    return torch.where(deviation > 0, step, 0.0)


METHOD = LayerMethod(
    name="sinq",
    command="quantize",
    summary="round to nearest after evening out rows and columns; data-free",
    when="rows and columns of unlike size, without data; try it beside hqq",
    config=SinqConfig,
    apply=apply,
    outline=outline,
    row_wise=RowWise(lambda config: True, divided=divided),
    check=check,
    allocates=Allocates(resolve),
    widths=searched(SinqConfig, apply),
    describe=describe,
)

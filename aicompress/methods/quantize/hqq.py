"""Half-quadratic quantization: zero points, and scales, that are robust to outliers. Data-free.

Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog: min Σ |w − ŵ|^p with p < 1 is split into a sparse error e and
a quadratic term, min |e|^p + β/2 (w − ŵ − e)², and solved in turn: e by the generalised soft threshold, the grid by
least squares against w − e. Two things differ from the original: errors are measured in steps of the scale, so that β
means the same for every layer, and least squares fits the scale too, which the original leaves at the full range.
"""

from __future__ import annotations

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
    resolve,
    searched,
    shared_columns,
    stored_scale_dtype,
)
from aicompress.methods.quantize.grid.integer import outline as integer_outline
from aicompress.methods.quantize.grid.rounding import (
    EPSILON,
    code_range,
    encode,
    grouped,
    minmax_range,
    pieces,
    require_scales,
    scale_and_zero,
    stored_scale,
    ungrouped,
)
from aicompress.weights import IntGrouped, Weight

TINY = 1e-6  # steps; below it an error counts as this large, so that its power p − 1 is finite


class HqqConfig(IntegerConfig):
    """Parameters of hqq."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"bits": 4, "group_size": 4}, {"granularity": "channel", "power": 0.5}]}
    )

    name: Literal["hqq"] = "hqq"
    granularity: Literal["channel", "group"] = Field("group", description="what shares a scale")
    symmetric: Literal[False] = Field(False, description="zero points are what this method fits")
    power: float = Field(0.7, gt=0, le=1, description="p of the error |w - ŵ|^p")
    beta: float = Field(10.0, gt=0, description="weight of the quadratic term, for errors in steps of the scale")
    growth: float = Field(1.01, ge=1, le=2, description="factor of beta per iteration")
    iterations: int = Field(10, ge=0, le=1000, description="of the solver; the best grid seen counts")


def outline(info: LayerInfo, config: HqqConfig) -> Weight:
    """The stored weight without data: zero points have the dtype of the scales."""
    integer = integer_outline(info, config)
    assert isinstance(integer, IntGrouped)
    return IntGrouped(integer.codes, integer.scale, torch.empty_like(integer.scale), config.bits, integer.group_size)


def apply(layer: Layer, config: HqqConfig) -> Weight:
    """Quantize one layer.

    Raises:
        Refused: its values are too large for the scales' dtype.
    """
    dtype, size = stored_scale_dtype(config, layer.info.dtype), shared_columns(config)
    codes = torch.empty(layer.info.shape, dtype=torch.int8)
    scales, zeros = [], []
    for rows in pieces(layer.info.shape):
        grouped_codes, scale, zero = solve(grouped(layer.weight[rows].contiguous(), size), config, dtype)
        codes[rows] = ungrouped(grouped_codes, layer.info.shape[1])
        scales.append(scale)
        zeros.append(zero)
    scale = torch.cat(scales)
    require_scales(scale, layer.info.name)
    return IntGrouped(codes, scale, torch.cat(zeros), config.bits, size)


def solve(groups: Tensor, config: HqqConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The grid of the least error seen.

    Args:
        groups: (rows, groups, columns) float32.
        config: what to solve.
        dtype: of the stored scales and zero points.

    Returns:
        Codes (rows, groups, columns) int8, scales and zero points (rows, groups).
    """
    lowest, highest = code_range(config.bits)
    # Round to nearest, which holds an exact zero, is the one to beat; real zero points start from the range itself.
    best_scale, whole = scale_and_zero(*minmax_range(groups, symmetric=False), config.bits, False, dtype)
    assert whole is not None
    best_zero = whole.to(dtype)
    best = _evaluate(groups, best_scale, best_zero, config)[0]
    low, high = groups.amin(-1), groups.amax(-1)
    scale = stored_scale(high / (highest - lowest) - low / (highest - lowest), dtype)
    zero = (lowest - low / scale.float()).to(dtype)
    beta = config.beta
    for turn in range(config.iterations + 1):
        total, codes, error, powers = _evaluate(groups, scale, zero, config)
        better = total < best
        best = torch.minimum(total, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        if turn == config.iterations:
            break
        sparse = error.abs().sub_(powers.div_(beta)).clamp_min_(0).copysign_(error)
        scale, zero = _fit(groups, codes, sparse, scale, dtype)
        beta *= config.growth
    return encode(groups, best_scale, best_zero, config.bits).to(torch.int8), best_scale, best_zero


def _evaluate(groups: Tensor, scale: Tensor, zero: Tensor, config: HqqConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ |w − ŵ|^p of each group, the codes, the errors in steps, and their magnitudes to the power p − 1."""
    codes = encode(groups, scale, zero, config.bits)
    error = groups * scale.float().reciprocal()[..., None]
    error.sub_(codes).add_(zero.float()[..., None])
    size = error.abs()
    powers = size.clamp_min(TINY).pow_(config.power - 1)
    return size.mul_(powers).sum(-1) * scale.float().pow(config.power), codes, error, powers


def _fit(groups: Tensor, codes: Tensor, sparse: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Least-squares line w − e ≈ s (q − z) through the codes of each group."""
    targets = torch.addcmul(groups, sparse, scale.float()[..., None], value=-1)
    q, t = codes.mean(-1), targets.mean(-1)
    spread = codes - q[..., None]
    slope = (spread * targets).sum(-1) / spread.square_().sum(-1).clamp_min(EPSILON)
    fitted = torch.where(slope.to(dtype) > 0, slope.to(dtype), scale)
    return fitted, (q - t / fitted.float()).to(dtype)


METHOD = LayerMethod(
    name="hqq",
    command="quantize",
    summary="round to nearest, scales and real zero points robust to outliers; data-free",
    when="4 bits and fewer without calibration data; with data gptq loses about half as much",
    config=HqqConfig,
    apply=apply,
    outline=outline,
    stacks=True,
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
    row_wise=RowWise(lambda config: True),
    widths=searched(HqqConfig, apply),
)

"""What all methods with integer codes share: their knobs, what they check, the outline of what they store."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.curvature import importance
from aicompress.methods.quantize.grid.fitting import GroupSize
from aicompress.methods.quantize.grid.rounding import encode, grouped, pieces, require_scales, ungrouped
from aicompress.methods.quantize.grid.scales import Grid, ScaleSharing, StoredScales, least_error, stored_scale_dtype
from aicompress.methods.quantize.grid.widths import CodeWidthConfig, resolve, searched, unfit
from aicompress.weights import IntGrouped, Weight
from aicompress.weights.stored.int_grouped import groups_of

__all__ = [
    "IntegerConfig",
    "check",
    "describe",
    "encoded",
    "outline",
    "resolve",
    "searched",
    "shared_columns",
    "sketched",
    "stored_scale_dtype",
]


class IntegerConfig(CodeWidthConfig):
    """Knobs of integer codes."""

    granularity: Literal["tensor", "channel", "group"] = Field("group", description="what shares a scale")
    group_size: GroupSize = Field(64, ge=1, description="input columns that share a scale, when granularity is group")
    pad: bool = Field(
        False, description="where group_size does not divide the input columns, let the last group of a row be narrower"
    )
    symmetric: bool = Field(True, description="no zero point")
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="stored scales; auto: the model's dtype, float16 for a float32 model"
    )


def shared_columns(config: ScaleSharing) -> int:
    """IntGrouped's group_size: 0 where a whole row or the tensor shares a scale."""
    return config.group_size if config.granularity == "group" else 0


def check(info: LayerInfo, config: Any) -> tuple[str, str] | None:
    """A group size must divide the input width, or the method must be told to let the last group be narrower."""
    columns, pad = info.shape[1], getattr(config, "pad", None)
    problem = unfit(config, columns)
    if problem is None:
        return None
    fitting = [str(n) for n in range(8, min(columns, 512) + 1) if columns % n == 0]
    ways = [*([f"sizes that fit: {', '.join(fitting)}"] if fitting else []), "granularity: channel"]
    ways += [] if pad is None else ["pad: true"]
    return f"{info.name}: {problem} its {columns} input columns", "; or ".join(ways)


class StoredGrid(Grid, StoredScales, Protocol):
    """Parameters of integer codes on a grid, and of the scales that are stored with them."""


def outline(info: LayerInfo, config: StoredGrid) -> IntGrouped:
    """The stored weight without data."""
    rows, columns = info.shape
    size = shared_columns(config)
    shape = (1, 1) if config.granularity == "tensor" else (rows, groups_of(columns, size))
    scale = (stored_scale_dtype(config, info.dtype), shape)
    return IntGrouped.outline(info.shape, scale, config.symmetric, config.bits, size)


def encoded(info: LayerInfo, weight: Tensor, config: IntegerConfig, scale: Tensor, zero: Tensor | None) -> IntGrouped:
    """A weight rounded to the nearest codes of a grid.

    Raises:
        Refused: the scales overflowed their dtype.
    """
    require_scales(scale, info.name)
    size, shape = shared_columns(config), info.shape
    codes = torch.empty(shape, dtype=torch.int8)
    for rows in pieces(shape):
        own = slice(0, 1) if config.granularity == "tensor" else rows
        groups = grouped(weight[rows], size)
        codes[rows] = ungrouped(encode(groups, scale[own], None if zero is None else zero[own], config.bits), shape[1])
    return IntGrouped(codes, scale, zero, config.bits, size)


def sketched(layer: Layer, config: IntegerConfig) -> Weight:
    """What a calibrated method would give, about, at a fraction of its time: scales of least error, codes by rounding.

    Errors are weighted by the inputs' mean squares where they are known.
    """
    known = layer.inputs is not None and layer.inputs.count > 0
    dtype = stored_scale_dtype(config, layer.info.dtype)
    grid = least_error(layer.weight, importance(layer) if known else None, config, dtype)
    return encoded(layer.info, layer.weight, config, *grid)


def describe(config: Grid, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    shares = config.group_size if config.granularity == "group" else config.granularity
    return {"bits": config.bits, "group": shares, "symmetric": config.symmetric}

"""Round to nearest: W ≈ (Q − z) s with s, z from each group's range; optionally the range of least error.

Min-max ranges are the textbook rule (Jacob et al. 2018, arXiv:1712.05877, eq. 5 to 7). `range: mse` searches the clip
that minimises Σ (w − ŵ)² over a grid of shrinks of the range, as OCTAV (Sakr et al. 2022, arXiv:2206.06501) motivates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.measure import representable
from aicompress.methods.capabilities import Measured, RowWise
from aicompress.methods.decisions import Allocates
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.grid import integer
from aicompress.methods.quantize.grid.compiled import kernels
from aicompress.methods.quantize.grid.fitting import GroupSize
from aicompress.methods.quantize.grid.integer import check, describe, shared_columns
from aicompress.methods.quantize.grid.rounding import (
    minmax_range,
    quantize_rows,
    require_scales,
    scale_and_zero,
    squared_error,
    widened,
)
from aicompress.methods.quantize.grid.scales import stored_scale_dtype
from aicompress.methods.quantize.grid.totals import Blocks, Total, of_groups, of_matrix, range_of_matrix
from aicompress.methods.quantize.grid.widths import Bits, CodeWidthConfig, resolve, searched
from aicompress.weights import IntGrouped, Weight

PRESET = re.compile(r"W([2-8])A(16|8)(?:G(\d+))?")
STEPS = 40  # clips that the search for the range of least error tries


class RtnConfig(CodeWidthConfig):
    """Parameters of rtn."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"bits": 8, "granularity": "channel"},
                {"bits": 4, "group_size": 4},
                {"bits": 3, "group_size": 4, "symmetric": False},
                {"bits": 2, "granularity": "tensor", "range": "mse"},
                {"bits": 4, "granularity": "channel", "symmetric": False, "range": "mse", "scale_dtype": "float32"},
                {"preset": "W8A8"},
                {"bits": "range", "max_error": 0.3},
            ]
        }
    )

    name: Literal["rtn"] = "rtn"
    preset: str | None = Field(
        None, description="W8A16 W8A8 W4A16 W3A16 W2A16, with G64 for a group size; fields beside it win"
    )
    bits: Bits = Field(8, description="bits of a code; auto: searched on the running model; range: from its values")
    granularity: Literal["tensor", "channel", "group"] = Field("group", description="what shares a scale")
    group_size: GroupSize = Field(128, ge=1, description="input columns that share a scale, when granularity is group")
    pad: bool = Field(
        False, description="where group_size does not divide the input columns, let the last group of a row be narrower"
    )
    symmetric: bool = Field(True, description="no zero point")
    range: Literal["minmax", "mse"] = Field(
        "minmax", description="range of the codes: full, or clipped for least squared error"
    )
    activation_bits: Literal[8] | None = Field(None, description="also quantize inputs, per token, when running")
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="stored scales; auto: the model's dtype, float16 for a float32 model"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        """A preset fills the fields that the recipe leaves open."""
        if not isinstance(given, dict) or not given.get("preset"):
            return given
        return {**expand_preset(str(given["preset"])), **given}

    @model_validator(mode="after")
    def _activations_need_channel(self) -> RtnConfig:
        if self.activation_bits and (self.granularity != "channel" or not self.symmetric or self.bits != 8):
            raise ValueError("activation_bits needs bits: 8, granularity: channel, symmetric: true")
        return self


def expand_preset(preset: str) -> dict[str, Any]:
    """Fields that a preset stands for: `W4A16G64` -> bits 4, groups of 64.

    Raises:
        ValueError: not a preset.
    """
    match = PRESET.fullmatch(preset)
    if match is None or match[1] not in "2348" or (match[2] == "8" and (match[1] != "8" or match[3])):
        raise ValueError(
            f"unknown preset {preset!r}: known are W8A16 W8A8 W4A16 W3A16 W2A16, with a suffix such as G64"
        )
    fields: dict[str, Any] = {"bits": int(match[1]), "symmetric": True}
    if match[2] == "8":
        return {**fields, "granularity": "channel", "activation_bits": 8}
    if match[1] == "8" and not match[3]:
        return {**fields, "granularity": "channel"}
    sizes = {"group_size": int(match[3])} if match[3] else {}
    return {**fields, "granularity": "group", **sizes}


def outline(info: LayerInfo, config: RtnConfig) -> Weight:
    """The stored weight without data."""
    return replace(integer.outline(info, config), activation_bits=config.activation_bits)


class RtnBlockConfig(RtnConfig):
    """Parameters for some rows of a layer, with the scale and zero point of all of it, (1, 1)."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    scale: Tensor
    zero: Tensor | None


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: RtnConfig) -> list[RtnConfig]:
    """A config for each block of rows, with the scale of all of them; blocks are read once, and once for a search.

    Raises:
        Refused: its values are too large for the scale's dtype.
    """
    scale, zero = shared_grid(info, [partial(_weight, read) for read in blocks], config)
    return [RtnBlockConfig.model_construct(**dict(config), scale=scale, zero=zero)] * len(blocks)


def _weight(read: Callable[[], Layer]) -> Tensor:
    return read().weight


def shared_grid(info: LayerInfo, blocks: Blocks, config: RtnConfig) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point of a whole matrix; errors as of `divided`."""
    ends = range_of_matrix(blocks, config.symmetric)
    grid = scales_of(of_matrix(blocks), ends, config, stored_scale_dtype(config, info.dtype))
    require_scales(grid[0], info.name)
    return grid


def apply(layer: Layer, config: RtnConfig) -> Weight:
    """Quantize one layer.

    Raises:
        Refused: its values are too large for the scales' dtype.
    """
    group = shared_columns(config)
    if config.granularity == "tensor":
        if isinstance(config, RtnBlockConfig):
            scale, zero = config.scale, config.zero
        else:
            scale, zero = shared_grid(layer.info, [lambda: layer.weight], config)
        codes, _, _ = quantize_rows(layer.weight, 0, config.bits, lambda groups: (scale, zero))
        return IntGrouped(codes, scale, zero, config.bits, group, config.activation_bits)
    dtype = stored_scale_dtype(config, layer.info.dtype)

    def scaling(groups: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = scales_of(of_groups(groups), minmax_range(groups, config.symmetric), config, dtype)
        require_scales(scale, layer.info.name)
        return scale, zero

    codes, scale, zero = quantize_rows(layer.weight, group, config.bits, scaling)
    return IntGrouped(codes, scale, zero, config.bits, group, config.activation_bits)


def measured(matrix: Tensor, info: LayerInfo, config: RtnConfig) -> Measured | None:
    """What `apply` gives for rows of a weight as it is stored, by compiled passes, where there are such.

    What cannot be done is left to `apply`, which says why.
    """
    compiled = kernels()
    if compiled is None or config.range != "minmax" or config.granularity == "tensor":
        return None
    group = shared_columns(config)
    matrix = (matrix if matrix.dtype is torch.bfloat16 else matrix.float()).contiguous()
    low, high = widened(*compiled.ranges(matrix, group), config.symmetric)
    scale, zero = scale_and_zero(low, high, config.bits, config.symmetric, stored_scale_dtype(config, info.dtype))
    if not torch.isfinite(scale).all():
        return None
    rounded = compiled.rounded(matrix, group, config.bits, scale, zero)
    if not representable(rounded.error, rounded.norm):
        return None
    weight = IntGrouped(rounded.codes, scale, zero, config.bits, group, config.activation_bits)
    if config.activation_bits is None:  # else the codes are stored as they are
        weight = weight.with_stream(compiled.packed(rounded.codes, config.bits))
    return Measured(weight, rounded.error, rounded.norm)


def scales_of(
    total: Total, ends: tuple[Tensor, Tensor], config: RtnConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points, from sums over the weights that share a scale and their lowest and highest values."""
    low, high = least_error_range(total, *ends, config, dtype) if config.range == "mse" else ends
    return scale_and_zero(low, high, config.bits, config.symmetric, dtype)


def least_error_range(
    total: Total, low: Tensor, high: Tensor, config: RtnConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shrink each range to the grid point of least Σ (w − ŵ)²; the full range wins ties."""
    shrinks = [1 - step / (STEPS + STEPS // 4) for step in range(STEPS)]  # 1.00, 0.98, ... 0.22
    grids = [scale_and_zero(low * by, high * by, config.bits, config.symmetric, dtype) for by in shrinks]

    def errors(groups: Tensor) -> Tensor:
        scratch = torch.empty_like(groups)
        return torch.stack([squared_error(groups, *grid, config.bits, scratch) for grid in grids])

    best = torch.full_like(low, float("inf"))
    best_low, best_high = low, high
    for shrink, error in zip(shrinks, total(errors), strict=True):
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, low * shrink, best_low), torch.where(better, high * shrink, best_high)
    return best_low, best_high


METHOD = LayerMethod(
    name="rtn",
    command="quantize",
    summary="round to nearest, min-max or least-squares range; data-free",
    when="8 bits, embeddings, and a first try of fewer bits: no data, seconds; from 4 bits down gptq loses less",
    config=RtnConfig,
    apply=apply,
    outline=outline,
    stacks=True,
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
    row_wise=RowWise(lambda config: True, measured, divided, lambda config: config.granularity == "tensor"),
    widths=searched(RtnConfig, apply),
)

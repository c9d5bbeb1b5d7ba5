"""GPTQ: round the columns in turn and move each one's error into those not rounded yet.

Frantar et al. 2023, arXiv:2210.17323, equations 2 and 3 and algorithm 1, with these later additions: scales fixed
before the columns are permuted (static groups) and searched for least error weighted by the inputs; the target shifted
to W* = W E[x̃ xᵀ] H⁻¹ where the uncompressed model's inputs x̃ are known (GPTAQ, arXiv:2504.02692; Qronos,
arXiv:2505.11695); with `refine`, sweeps that round every column again given all others and fit the scales.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import damped, gram, inverse_factor, shifted
from aicompress.methods.quantize.columns import Grid, round_columns
from aicompress.methods.quantize.descent import refine
from aicompress.methods.quantize.integer import (
    IntegerConfig,
    check,
    describe,
    outline,
    settle,
    shared_columns,
    stored_scale_dtype,
)
from aicompress.methods.quantize.rounding import require_scales
from aicompress.methods.quantize.scales import full_range, least_error
from aicompress.methods.registry import LayerMethod
from aicompress.weights import IntGrouped, Weight


class GptqConfig(IntegerConfig):
    """Parameters of gptq."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"bits": 3, "group_size": 4, "symmetric": False, "refine": 3},
                {"bits": 2, "granularity": "channel", "shift": 0.5},
                {"bits": 4, "granularity": "tensor", "order": "natural"},
            ]
        }
    )

    name: Literal["gptq"] = "gptq"
    order: Literal["importance", "natural"] = Field(
        "importance", description="columns with the largest inputs first, or left to right"
    )
    damping: float = Field(0.05, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    range: Literal["minmax", "mse", "weighted"] = Field(
        "weighted", description="scales: full range, least squared error, or least error weighted by 1 / (H⁻¹)_jj"
    )
    shift: float = Field(
        0.0, ge=0, le=1, description="how far the target moves to make up for what compressed layers before it changed"
    )
    refine: int = Field(2, ge=0, le=100, description="rounds of coordinate descent and scale fitting after GPTQ")


def apply(layer: Layer, config: GptqConfig) -> Weight:
    """Quantize one layer.

    Raises:
        CompressError: no calibration token reached the layer, or its Gram matrix is not one.
        Refused: its values are too large for the scales' dtype.
    """
    hessian = damped(gram(layer), config.damping)  # (in, in) float64
    target = shifted(layer, hessian, config.shift)
    order = torch.arange(len(hessian))
    if config.order == "importance":
        order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order[:, None], order]
    factor = inverse_factor(hessian)
    saliency = torch.empty(len(order))
    saliency[order] = factor.square().sum(0).reciprocal().float()  # 1 / (H⁻¹)_jj
    dtype = stored_scale_dtype(config, layer.info.dtype)
    if config.range == "minmax":
        scale, zero = full_range(target, config, dtype)
    else:
        scale, zero = least_error(target, saliency if config.range == "weighted" else None, config, dtype)
    require_scales(scale, layer.info.name)
    levels = grid_of(scale, zero, config, order)
    wanted = target.t()[order].contiguous()  # (in, out), in the order of rounding
    coupling = factor.div_(factor.diagonal().clone()[:, None]).float()
    del factor  # as large as the Gram matrix in float64
    codes = round_columns(wanted.clone(), coupling, levels)
    del coupling
    if config.refine:
        codes, levels = refine(wanted, hessian, levels, codes, config.refine, scale.dtype)
        scale = levels.scale.t().to(scale.dtype).contiguous()
    found = torch.empty(codes.shape[::-1], dtype=torch.int8)
    found[:, order] = codes.t().to(torch.int8)
    return IntGrouped(found, scale, zero, config.bits, shared_columns(config))


def grid_of(scale: Tensor, zero: Tensor | None, config: GptqConfig, order: Tensor) -> Grid:
    """The grid of each column in the order of rounding."""
    size = shared_columns(config) or len(order)
    offset = None if zero is None else zero.float().t().contiguous()
    return Grid(scale.float().t().contiguous(), offset, tuple((order // size).tolist()), config.bits)


METHOD = LayerMethod(
    name="gptq",
    command="quantize",
    summary="columns rounded in turn, errors moved into later ones; calibrated",
    config=GptqConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    outline=outline,
    check=check,
    settle=settle,
    describe=describe,
    compares=lambda config: config.shift > 0,
)

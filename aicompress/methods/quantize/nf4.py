"""NormalFloat: 16 values at equal masses of a Gaussian, and the largest magnitude of each group as scale. Data-free.

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3 and appendix E; the table is bitsandbytes'.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, Field

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import RowWise
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.grid.fitting import GroupSize, with_fitting_groups
from aicompress.methods.quantize.grid.integer import check, shared_columns, stored_scale_dtype
from aicompress.methods.quantize.grid.rounding import grouped, pieces, require_scales, stored_scale
from aicompress.weights import Codebook, Weight

BITS = 4
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Nf4Config(MethodConfig):
    """Parameters of nf4."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"group_size": 4}, {"granularity": "channel"}]})

    name: Literal["nf4"] = "nf4"
    granularity: Literal["channel", "group"] = Field("group", description="what shares a scale")
    group_size: GroupSize = Field(64, ge=1, description="input columns that share a scale, when granularity is group")
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="stored scales and table; auto: the model's dtype, float16 for a float32 model"
    )

    def fitted(self, columns: int) -> Self:
        """Groups that divide a layer's columns, where the recipe gives no size."""
        return with_fitting_groups(self, columns, "group_size" in self.model_fields_set)


def outline(info: LayerInfo, config: Nf4Config) -> Weight:
    """The stored weight without data."""
    size = shared_columns(config) or info.shape[1]
    groups = (info.shape[0], info.shape[1] // size)
    return Codebook.outline(info.shape, BITS, 1, stored_scale_dtype(config, info.dtype), groups)


def apply(layer: Layer, config: Nf4Config) -> Weight:
    """Quantize one layer.

    Raises:
        Refused: its values are too large for the scales' dtype.
    """
    dtype = stored_scale_dtype(config, layer.info.dtype)
    table = torch.tensor(NF4).to(dtype)
    borders = (table[1:].float() + table[:-1].float()) / 2
    codes, scales = torch.empty(layer.info.shape, dtype=torch.uint8), []
    for rows in pieces(layer.info.shape):
        groups = grouped(layer.weight[rows].contiguous(), shared_columns(config))
        scale = stored_scale(torch.maximum(groups.amax(-1), -groups.amin(-1)), dtype)
        codes[rows] = torch.bucketize(groups / scale.float()[..., None], borders).flatten(1).to(torch.uint8)
        scales.append(scale)
    require_scales(torch.cat(scales), layer.info.name)
    return Codebook(codes, table[None], torch.cat(scales), BITS)


def describe(config: Nf4Config, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    return {"bits": BITS, "group": config.group_size if config.granularity == "group" else config.granularity}


METHOD = LayerMethod(
    name="nf4",
    command="quantize",
    summary="nearest of 16 values spaced for Gaussian weights; data-free",
    when="near-Gaussian weights without data, for size alone: layers run decoded, no kernel multiplies by tables",
    config=Nf4Config,
    apply=apply,
    outline=outline,
    stacks=True,
    row_wise=RowWise(lambda config: True),
    check=check,
    describe=describe,
)

"""SmoothQuant: move the outliers of activations into the weights, then quantize both to 8 bits.

Xiao et al. 2022, arXiv:2211.10438, equation 4: the input is divided by s_j = max|x_j|^α / max|w_j|^(1−α), which is
folded into whatever makes it, and the columns of the layers that read it are multiplied by s_j. An input is quantized
per token: one channel with large values costs all others their precision, and after the division there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods import MethodConfig
from aicompress.methods.capabilities import Candidate, Rescales, ScalingFactors
from aicompress.methods.curvature import statistics
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize import rtn
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.weights import Weight

FLOOR = 1e-5  # of the largest: the least size that counts


class SmoothquantConfig(MethodConfig):
    """Parameters of smoothquant."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"alpha": 0.8, "range": "mse"}]})

    name: Literal["smoothquant"] = "smoothquant"
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the inputs' range moves into the weights")
    range: Literal["minmax", "mse"] = Field(
        "minmax", description="range of the weights' codes: full, or clipped for least squared error"
    )
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="stored scales; auto: the model's dtype, float16 for a float32 model"
    )


def rounding(config: SmoothquantConfig) -> RtnConfig:
    """How the rescaled weights are rounded: 8 bits, a scale per row, inputs per token."""
    return RtnConfig(preset="W8A8", range=config.range, scale_dtype=config.scale_dtype)


def outline(info: LayerInfo, config: SmoothquantConfig) -> Weight:
    """The stored weight without data."""
    return rtn.outline(info, rounding(config))


def apply(layer: Layer, config: SmoothquantConfig) -> Weight:
    """Quantize one rescaled layer.

    Raises:
        Refused: its values are too large for the scales' dtype.
    """
    return rtn.apply(layer, rounding(config))


def scaling_factors(
    candidates: Sequence[Candidate[SmoothquantConfig]], pooled: Callable[[Tensor], Tensor]
) -> ScalingFactors | None:
    """The factors of one input.

    Args:
        candidates: the layers that read it; the first one's alpha counts.
        pooled: makes factors equal that must be.

    Raises:
        CompressError: an input is not finite.
    """
    inputs, weights = [], []
    for candidate in candidates:
        layer = candidate.read()
        if layer.inputs is None or not layer.inputs.count:
            continue
        largest = statistics(layer).max_abs
        if largest is None or not torch.isfinite(largest).all():
            raise CompressError(f"{layer.info.name}: the largest inputs are not known", "calibrate in float32")
        inputs.append(largest)
        weights.append(layer.weight.abs().amax(dim=0))
    alpha = candidates[0].config.alpha
    if not inputs:
        return None
    factors = pooled(smoothing(torch.stack(inputs).amax(dim=0), torch.stack(weights).amax(dim=0), alpha))
    return ScalingFactors(factors, f"inputs smoothed, alpha {alpha:g}")


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s = max|x|^α / max|w|^(1−α), (in,); 1 for a channel that carries nothing."""
    largest, widest = inputs.clamp_min(FLOOR * inputs.max()), weights.clamp_min(FLOOR * weights.max())
    factors = largest.pow(alpha) / widest.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0) & torch.isfinite(factors) & (factors > 0), factors, 1.0)


def describe(config: SmoothquantConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    return {"bits": 8, "group": "channel", "activations": 8}


METHOD = LayerMethod(
    name="smoothquant",
    command="quantize",
    summary="8-bit weights and inputs, outliers of the inputs moved into the weights; calibrated",
    when="inputs rounded to 8 bits whose outliers cost quality; where none do, rtn with preset: W8A8",
    config=SmoothquantConfig,
    needs=frozenset({"max_abs"}),
    apply=apply,
    outline=outline,
    describe=describe,
    rescales=Rescales(scaling_factors),
)
